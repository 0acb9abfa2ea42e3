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
has image "$@" || set -- --image "$image" "$@"
exec "$python" "$cnn_vis" --preset dream --final_size x1.4 --output "$output" "$@"
