#!/bin/sh
# A first dream, of a cat that comes with scikit-image: example.sh [OUTPUT] [MORE OPTIONS]
# Needs the python that cnn_vis.py runs on to be the first on the PATH.
set -eu
output=${1:-example.png}
[ $# -eq 0 ] || shift
cat=$(python -c 'import os, skimage.data; print(os.path.join(os.path.dirname(skimage.data.__file__), "chelsea.png"))')
exec python "$(dirname "$0")/../cnn_vis.py" --image "$cat" --layer inception_4c/output \
    --initial_size x0.85 --final_size x1.4 --num_sizes 3 --num_steps 30 --learning_rate 2 --decay_rate 0.9 \
    --alpha 2 --p_reg 0.05 --beta 2.5 --tv_reg 0.5 --alpha_aux 8 --p_reg_aux 5e-11 --use_pixel_learning_rates \
    --iter_behavior none --output "$output" "$@"
