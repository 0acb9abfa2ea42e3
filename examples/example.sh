#!/bin/sh
# A first dream, of a cat that comes with scikit-image; `make example` runs it.
# Usage: example.sh [OUTPUT] [MORE OPTIONS]
set -eu
. "$(dirname "$0")/common.sh"
case ${1:--} in
    -*) output=example.png ;;
    *) output=$1 && shift ;;
esac
image=$(photograph chelsea.png)
exec "$python" "$cnn_vis" --image "$image" --layer inception_4c/output \
    --initial_size x0.85 --final_size x1.4 --num_sizes 3 --num_steps 30 --learning_rate 2 --decay_rate 0.9 \
    --alpha 2 --p_reg 0.05 --beta 2.5 --tv_reg 0.5 --alpha_aux 8 --p_reg_aux 5e-11 --use_pixel_learning_rates \
    --iter_behavior none --output "$output" "$@"
