#!/bin/sh
# The layer of example 1 for twice as long, and hardly smoothed: look for sharp lines and harsh colours.
# Usage: example4.sh [MORE OPTIONS]
set -eu
. "$(dirname "$0")/common.sh"
exec "$python" "$cnn_vis" --output example4.png --layer inception_4d/3x3_reduce \
    --initial_size 270x480 --final_size 1080x1920 --num_sizes 5 --num_steps 200 \
    --learning_rate 10 --decay_rate 0.25 --alpha 6 --p_reg 1e-11 --beta 2.5 --tv_reg 0.01 --batch_size 10 \
    "$@"
