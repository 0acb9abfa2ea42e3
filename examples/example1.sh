#!/bin/sh
# Noise that becomes a plain with small dogs, birds and vessels: look for one shape in ever new variations.
# Usage: example1.sh [MORE OPTIONS]
set -eu
. "$(dirname "$0")/common.sh"
exec "$python" "$cnn_vis" --output example1.png --layer inception_4d/3x3_reduce \
    --initial_size 270x480 --final_size 1080x1920 --num_sizes 5 --num_steps 100 \
    --learning_rate 10 --decay_rate 0.25 --alpha 6 --p_reg 1e-10 --beta 2.5 --tv_reg 0.5 --batch_size 25 \
    "$@"
