#!/bin/sh
# A high layer, kept close to the photograph: look for scales and faces in the wall and in the suit.
# The preset's sizes suit this picture (512x512 pixels); the original's were x0.12 to x0.25 of a painting.
# Usage: example9.sh [MORE OPTIONS]
set -eu
. "$(dirname "$0")/common.sh"
image=$(photograph astronaut.png)
has image "$@" || set -- --image "$image" "$@"
exec "$python" "$cnn_vis" --preset example9 --output example9.png "$@"
