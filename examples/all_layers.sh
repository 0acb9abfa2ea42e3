#!/bin/bash
# One picture through every layer of the network, as FOLDER/LAYER.png, with an overview in sheet.png and index.html.
# Existing pictures are skipped, so it can be interrupted and rerun.
# SIDE=300 is the shorter side of the pictures in pixels; LAYERS="conv2/3x3 ..." limits it to these layers.
# Usage: all_layers.sh IMAGE [FOLDER] [MORE OPTIONS]
set -euo pipefail
. "$(dirname "$0")/common.sh"
trap 'exit 130' INT
case ${1:--} in -*) usage 'IMAGE [FOLDER] [MORE OPTIONS]' ;; esac
image=$1 name=$(stem "$1")
shift
case ${1:--} in
    -*) folder=${name}_layers ;;
    *) folder=$1 && shift ;;
esac

layers=${LAYERS:-$("$python" "$cnn_vis" --list_layers "$@" | cut -d ' ' -f 1)}
mkdir -p "$folder"
start=$folder/start.png
"$python" "$root/examples/picture.py" fit "$image" "$start" "${SIDE:-300}"
pictures=("$start=start") failed=
for layer in $layers; do
    output=$folder/${layer//\//-}.png
    # Large steps and weak regularizers, so that layers with small gradients also show something.
    if dream "$output" --image "$start" --num_steps 20 --learning_rate 4 --decay_rate 0.9 --alpha 2 --p_reg 0.0005 \
        --beta 2.5 --tv_reg 0.005 "$@" --layer "$layer"; then
        pictures+=("$output=$layer")
    else
        failed+=" $layer"
    fi
done
"$python" "$root/examples/sheet.py" "$folder/sheet.png" --columns 8 --html "$folder/index.html" --title "$name" "${pictures[@]}"
echo "$folder/index.html" >&2
[ -z "$failed" ] || { echo "failed:$failed" >&2 && exit 1; }
