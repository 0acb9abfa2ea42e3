#!/bin/sh
# Places again, from strong, blurred noise: look for landscapes that follow its patches.
# Usage: example6.sh [MORE OPTIONS]
set -eu
. "$(dirname "$0")/common.sh"
exec "$python" "$cnn_vis" --preset example6 --output example6.png "$@"
