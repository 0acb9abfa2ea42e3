#!/bin/sh
# The table dreams and the cup on it does not, in the colours of the photograph. The mask is drawn by this script; to make
# your own in an image editor, paint white over what should dream, and black over what should stay.
# Usage: mask.sh [MORE OPTIONS]
set -eu
. "$(dirname "$0")/common.sh"
image=$(photograph coffee.png)
evaluate '
import sys
from PIL import Image, ImageDraw, ImageFilter

mask = Image.new("L", (600, 400), "white")
ImageDraw.Draw(mask).ellipse((65, 5, 490, 395), "black")
mask.filter(ImageFilter.GaussianBlur(6)).save(sys.argv[1])
' mask.png
has layer "$@" || set -- --layer inception_4c/output "$@"
exec "$python" "$cnn_vis" --output masked.png --image "$image" --mask mask.png --keep_colors \
    --initial_size x0.85 --final_size x1.4 --num_sizes 3 --num_steps 40 --learning_rate 2.5 --decay_rate 0.9 \
    --alpha 2 --p_reg 0.02 --beta 2.5 --tv_reg 0.5 --alpha_aux 8 --p_reg_aux 5e-11 --use_pixel_learning_rates \
    --iter_behavior none "$@"
