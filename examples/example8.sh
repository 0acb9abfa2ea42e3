#!/bin/sh
# The neighbour of example 7: look for ripples along the edges and the grain of the wood.
# The preset's sizes suit this picture (600x400 pixels); the original's were x0.08 to x0.15 of a painting.
# Usage: example8.sh [MORE OPTIONS]
set -eu
. "$(dirname "$0")/common.sh"
image=$(photograph coffee.png)
has image "$@" || set -- --image "$image" "$@"
exec "$python" "$cnn_vis" --preset example8 --output example8.png "$@"
