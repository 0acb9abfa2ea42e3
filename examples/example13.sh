#!/bin/sh
# A few channels on mere texture: look for stars of grass, animals in them, and colour in what was grey.
# The sizes are fitted to this picture (512x512 pixels; the original: x0.25 to x0.5 of a meadow).
# Usage: example13.sh [MORE OPTIONS]
set -eu
. "$(dirname "$0")/common.sh"
image=$(photograph grass.png)
exec "$python" "$cnn_vis" --output example13.png --image "$image" --layer inception_4b/5x5_reduce \
    --initial_size x0.6 --final_size x1.2 --num_sizes 3 --num_steps 100 \
    --learning_rate 5 --decay_rate 0.85 --alpha 2 --p_reg 0.5 --beta 2.5 --tv_reg 0.5 \
    --alpha_aux 8 --p_reg_aux 5e-11 --use_pixel_learning_rates \
    "$@"
