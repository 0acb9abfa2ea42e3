#!/bin/sh
# A whole module instead of a few channels: look for birds, spiders and coils, in brighter colours than those of example 1.
# Usage: example2.sh [MORE OPTIONS]
set -eu
. "$(dirname "$0")/common.sh"
exec "$python" "$cnn_vis" --preset example2 --output example2.png "$@"
