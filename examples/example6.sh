#!/bin/sh
# Places again, from noise that is strong and blurred: look for landscapes that follow its patches.
# Usage: example6.sh [MORE OPTIONS]
set -eu
. "$(dirname "$0")/common.sh"
exec "$python" "$cnn_vis" --output example6.png --model googlenet_places205 --layer inception_4c/pool \
    --initialization_scale 10 --initialization_blur 1 \
    --initial_size 270x480 --final_size 1080x1920 --num_sizes 5 --num_steps 150 \
    --learning_rate 2 --decay_rate 0.9 --alpha 4 --p_reg 1e-9 --beta 2.5 --tv_reg 1 --batch_size 20 \
    "$@"
