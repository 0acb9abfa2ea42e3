#!/bin/sh
# A few channels on pure texture: look for stars of grass, animals in them, and colour in what was grey.
# The preset's sizes suit this picture (512x512 pixels); the original's were x0.25 to x0.5 of a meadow.
# Usage: example13.sh [MORE OPTIONS]
set -eu
. "$(dirname "$0")/common.sh"
image=$(photograph grass.png)
has image "$@" || set -- --image "$image" "$@"
exec "$python" "$cnn_vis" --preset example13 --output example13.png "$@"
