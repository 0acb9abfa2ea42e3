#!/bin/sh
# Large steps and strong smoothing: look for soft eyes all over the fur, and pale colours, which the second p-norm holds back.
# The sizes are fitted to this picture (451x300 pixels; the original: x0.2 to x0.5 of a painting).
# Usage: example12.sh [MORE OPTIONS]
set -eu
. "$(dirname "$0")/common.sh"
image=$(photograph chelsea.png)
exec "$python" "$cnn_vis" --output example12.png --image "$image" --layer inception_4c/output \
    --initial_size x0.8 --final_size x2 --num_sizes 3 --num_steps 100 \
    --learning_rate 5 --decay_rate 0.85 --alpha 2 --p_reg 0.5 --beta 2.5 --tv_reg 5 \
    --alpha_aux 8 --p_reg_aux 5e-11 --use_pixel_learning_rates \
    "$@"
