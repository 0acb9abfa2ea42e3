#!/bin/sh
# The layer of example 1, with twice the steps and little smoothing: look for sharp lines and harsh colours.
# Usage: example4.sh [MORE OPTIONS]
set -eu
. "$(dirname "$0")/common.sh"
exec "$python" "$cnn_vis" --preset example4 --output example4.png "$@"
