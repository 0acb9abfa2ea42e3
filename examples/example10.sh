#!/bin/sh
# A scene kept closer still (--p_reg 5): look for the towers that become temples, and what moves in the sky.
# The preset's sizes suit this picture (640x427 pixels); the original's were x0.2 to x0.75 of a lake.
# Usage: example10.sh [MORE OPTIONS]
set -eu
. "$(dirname "$0")/common.sh"
image=$(photograph rocket.jpg)
has image "$@" || set -- --image "$image" "$@"
exec "$python" "$cnn_vis" --preset example10 --output example10.png "$@"
