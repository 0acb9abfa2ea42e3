#!/bin/sh
# Large steps and strong smoothing: look for soft eyes all over the fur, and pale colours, which the second p-norm holds back.
# The preset's sizes suit this picture (451x300 pixels); the original's were x0.2 to x0.5 of a painting.
# Usage: example12.sh [MORE OPTIONS]
set -eu
. "$(dirname "$0")/common.sh"
image=$(photograph chelsea.png)
has image "$@" || set -- --image "$image" "$@"
exec "$python" "$cnn_vis" --preset example12 --output example12.png "$@"
