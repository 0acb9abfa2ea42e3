#!/bin/sh
# A scene kept closer still (--p_reg 5): look for the towers that become temples, and what moves in the sky.
# The sizes are fitted to this picture (640x427 pixels; the original: x0.2 to x0.75 of a lake).
# Usage: example10.sh [MORE OPTIONS]
set -eu
. "$(dirname "$0")/common.sh"
image=$(photograph rocket.jpg)
exec "$python" "$cnn_vis" --output example10.png --image "$image" --layer inception_4d/pool \
    --initial_size x0.53 --final_size x2 --num_sizes 4 --num_steps 50 \
    --learning_rate 1 --decay_rate 0.9 --alpha 2 --p_reg 5 --beta 2.5 --tv_reg 0.1 \
    "$@"
