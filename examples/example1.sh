#!/bin/sh
# From noise, a plain with small dogs, birds and vessels: look for one shape in ever new variations.
# Usage: example1.sh [MORE OPTIONS]
set -eu
. "$(dirname "$0")/common.sh"
exec "$python" "$cnn_vis" --preset example1 --output example1.png "$@"
