#!/bin/sh
# Two modules above example 2: look for the coils that fill everything, and the few animals at their edge.
# Usage: example3.sh [MORE OPTIONS]
set -eu
. "$(dirname "$0")/common.sh"
exec "$python" "$cnn_vis" --preset example3 --output example3.png "$@"
