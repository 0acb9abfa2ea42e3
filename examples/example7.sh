#!/bin/sh
# A very low layer: look for a net of cracks, as in old paint, over all plain areas.
# The preset's sizes suit this picture (600x400 pixels); the original's were x0.08 to x0.15 of a painting.
# Usage: example7.sh [MORE OPTIONS]
set -eu
. "$(dirname "$0")/common.sh"
image=$(photograph coffee.png)
has image "$@" || set -- --image "$image" "$@"
exec "$python" "$cnn_vis" --preset example7 --output example7.png "$@"
