#!/bin/sh
# A network that knows places instead of things: look for arches, windows and roofs.
# Usage: example5.sh [MORE OPTIONS]
set -eu
. "$(dirname "$0")/common.sh"
exec "$python" "$cnn_vis" --preset example5 --output example5.png "$@"
