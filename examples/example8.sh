#!/bin/sh
# The neighbour of example 7: look for ripples along the edges and the grain of the wood.
# The sizes are fitted to this picture (600x400 pixels; the original: x0.08 to x0.15 of a painting).
# Usage: example8.sh [MORE OPTIONS]
set -eu
. "$(dirname "$0")/common.sh"
image=$(photograph coffee.png)
exec "$python" "$cnn_vis" --output example8.png --image "$image" --layer inception_3a/3x3_reduce \
    --initial_size x0.75 --final_size x1.4 --num_sizes 2 --num_steps 30 \
    --learning_rate 1 --decay_rate 0.9 --alpha 2 --p_reg 0.5 --beta 2.5 --tv_reg 0.05 \
    "$@"
