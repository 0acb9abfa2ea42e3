#!/bin/sh
# A whole module instead of a few channels: look for birds, spiders and coils, in brighter colours than those of example 1.
# Usage: example2.sh [MORE OPTIONS]
set -eu
. "$(dirname "$0")/common.sh"
exec "$python" "$cnn_vis" --output example2.png --layer inception_4c/output \
    --initial_size 270x480 --final_size 1080x1920 --num_sizes 5 --num_steps 100 \
    --learning_rate 10 --decay_rate 0.25 --alpha 6 --p_reg 1e-10 --beta 2.5 --tv_reg 0.5 \
    "$@"
