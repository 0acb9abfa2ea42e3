#!/bin/sh
# The layer of example 1 for twice as long, and hardly smoothed: look for sharp lines and harsh colours.
# Usage: example4.sh [MORE OPTIONS]
set -eu
. "$(dirname "$0")/common.sh"
exec "$python" "$cnn_vis" --preset example4 --output example4.png "$@"
