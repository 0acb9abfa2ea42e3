#!/bin/sh
# A network that knows places instead of things: look for arches, windows and roofs.
# Usage: example5.sh [MORE OPTIONS]
set -eu
. "$(dirname "$0")/common.sh"
exec "$python" "$cnn_vis" --output example5.png --model googlenet_places205 --layer inception_4b/3x3_reduce \
    --initial_size 270x480 --final_size 1080x1920 --num_sizes 5 --num_steps 200 \
    --learning_rate 5 --decay_rate 0.95 --alpha 4 --p_reg 1e-9 --beta 2.0 --tv_reg 0.3 --batch_size 10 \
    "$@"
