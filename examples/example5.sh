#!/bin/sh
# A network trained on places instead of objects: look for arches, windows and roofs.
# Usage: example5.sh [MORE OPTIONS]
set -eu
. "$(dirname "$0")/common.sh"
exec "$python" "$cnn_vis" --preset example5 --output example5.png "$@"
