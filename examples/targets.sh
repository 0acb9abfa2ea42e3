#!/bin/sh
# Kinds of --layer targets on one photograph: a layer, its strongest channels, the strongest one alone, sums of two layers, and
# a layer minus what another one finds. targets.png shows them side by side, targets/index.html with their commands.
# Usage: targets.sh [MORE OPTIONS]
set -eu
. "$(dirname "$0")/common.sh"
"$python" "$cnn_vis" --image "$(photograph coffee.png)" --output 'targets/{layer}.png' --preset animals \
    --layer inception_4c/output --layer inception_4c/output:strong5 --layer inception_4c/output:strong1 \
    --layer 'inception_4c/output + conv2/3x3' --layer 'inception_4c/output + inception_3a/output' \
    --layer 'inception_4c/output + -0.7*inception_4a/output' --iter_behavior none "$@"
"$python" "$root/examples/sheet.py" targets.png --columns 3 --width 300 targets/*.png
"$python" "$root/examples/sheet.py" targets/
