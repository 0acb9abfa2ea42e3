#!/bin/sh
# A cat, guided by three other pictures: a cup of coffee, coins and a motorcycle. guides.png shows them side by side.
# Usage: guides.sh [MORE OPTIONS]
set -eu
. "$(dirname "$0")/common.sh"
image=$(photograph chelsea.png)
for guide in coffee coins motorcycle_left; do
    "$python" "$cnn_vis" --output "guided_by_$guide.png" --image "$image" --guide "$(photograph "$guide.png")" \
        --preset animals --iter_behavior none "$@"
done
"$python" "$root/examples/sheet.py" guides.png --columns 2 --width 450 "$image=the photograph" \
    guided_by_coffee.png=coffee guided_by_coins.png=coins guided_by_motorcycle_left.png=motorcycle
