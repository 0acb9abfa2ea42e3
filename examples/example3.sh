#!/bin/sh
# Two modules above example 2: look for the coils that fill everything, and the few animals at their edge.
# Usage: example3.sh [MORE OPTIONS]
set -eu
. "$(dirname "$0")/common.sh"
exec "$python" "$cnn_vis" --output example3.png --layer inception_4e/output \
    --initial_size 270x480 --final_size 1080x1920 --num_sizes 5 --num_steps 100 \
    --learning_rate 10 --decay_rate 0.25 --alpha 6 --p_reg 1e-10 --beta 2.5 --tv_reg 0.5 \
    "$@"
