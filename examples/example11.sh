#!/bin/sh
# A picture without distinct objects, gently smoothed: look for the animals that the network finds in the clouds of grey.
# The preset's sizes suit this picture (512x512 pixels); the original's were x0.25 to x1.0 of a sky.
# Usage: example11.sh [MORE OPTIONS]
set -eu
. "$(dirname "$0")/common.sh"
image=$(photograph moon.png)
has image "$@" || set -- --image "$image" "$@"
exec "$python" "$cnn_vis" --preset example11 --output example11.png "$@"
