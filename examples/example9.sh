#!/bin/sh
# A high layer, kept close to the photograph: look for scales and faces in the wall and in the suit.
# The sizes are fitted to this picture (512x512 pixels; the original: x0.12 to x0.25 of a painting).
# Usage: example9.sh [MORE OPTIONS]
set -eu
. "$(dirname "$0")/common.sh"
image=$(photograph astronaut.png)
exec "$python" "$cnn_vis" --output example9.png --image "$image" --layer inception_4d/output \
    --initial_size x0.6 --final_size x1.25 --num_sizes 3 --num_steps 50 \
    --learning_rate 1 --decay_rate 0.9 --alpha 2 --p_reg 0.5 --beta 2.5 --tv_reg 0.05 \
    "$@"
