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
exec "$python" "$cnn_vis" --image "$image" --preset animals --initial_size x0.85 --final_size x1.4 --num_steps 16 \
    --learning_rate 2 --tv_reg 0.2 --iter_behavior none --output "$output" "$@"
