#!/bin/bash
# One picture through every network that is installed, side by side in FOLDER/sheet.png.
# SIDE=400 is the shorter side of the pictures in pixels.
# Usage: compare_networks.sh IMAGE [MORE OPTIONS]
set -euo pipefail
. "$(dirname "$0")/common.sh"
trap 'exit 130' INT
case ${1:--} in -*) usage 'IMAGE [MORE OPTIONS]' ;; esac
image=$1 folder=$(stem "$1")_networks
shift

networks=$("$python" "$cnn_vis" --list_models | awk '$2 " " $3 != "not installed;" { print $1 }')
mkdir -p "$folder"
start=$folder/start.png
"$python" "$root/examples/picture.py" fit "$image" "$start" "${SIDE:-400}"
pictures=("$start=start") failed=
has layer "$@" || set -- --layer inception_4c/output "$@"
for network in $networks; do
    rm -f "$folder/$network.png" # an old one may show another layer
    if dream "$folder/$network.png" --image "$start" --num_steps 30 --learning_rate 2 \
        --decay_rate 0.9 --alpha 2 --p_reg 0.05 --beta 2.5 --tv_reg 0.5 --use_pixel_learning_rates "$@" --model "$network"; then
        pictures+=("$folder/$network.png=$network")
    else
        failed+=" $network"
    fi
done
"$python" "$root/examples/sheet.py" "$folder/sheet.png" --columns 5 --width 480 "${pictures[@]}"
echo "$folder/sheet.png" >&2
[ -z "$failed" ] || { echo "failed:$failed" >&2 && exit 1; }
