#!/bin/sh
# A very low layer: look for the net of cracks, as in old paint, over everything that is plain.
# The sizes are fitted to this picture (600x400 pixels; the original: x0.08 to x0.15 of a painting).
# Usage: example7.sh [MORE OPTIONS]
set -eu
. "$(dirname "$0")/common.sh"
image=$(photograph coffee.png)
exec "$python" "$cnn_vis" --output example7.png --image "$image" --layer inception_3a/1x1 \
    --initial_size x0.75 --final_size x1.4 --num_sizes 2 --num_steps 30 \
    --learning_rate 1 --decay_rate 0.9 --alpha 2 --p_reg 0.5 --beta 2.5 --tv_reg 0.05 \
    "$@"
