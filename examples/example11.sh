#!/bin/sh
# A picture without things in it, softly smoothed: look for the animals that the network finds in the clouds of grey.
# The sizes are fitted to this picture (512x512 pixels; the original: x0.25 to x1.0 of a sky).
# Usage: example11.sh [MORE OPTIONS]
set -eu
. "$(dirname "$0")/common.sh"
image=$(photograph moon.png)
exec "$python" "$cnn_vis" --output example11.png --image "$image" --layer inception_4d/pool \
    --initial_size x0.45 --final_size x1.8 --num_sizes 5 --num_steps 50 \
    --learning_rate 1 --decay_rate 0.85 --alpha 2 --p_reg 10 --beta 2.5 --tv_reg 1 \
    --alpha_aux 8 --p_reg_aux 5e-11 --use_pixel_learning_rates \
    "$@"
