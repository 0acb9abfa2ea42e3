#!/bin/bash
# What the first channels of a layer respond to, each from noise, with an overview in neurons_LAYER/sheet.png.
# Existing pictures are skipped.
# Usage: neurons.sh LAYER [COUNT] [MORE OPTIONS]
set -euo pipefail
. "$(dirname "$0")/common.sh"
trap 'exit 130' INT
layer=${1:--}
case $layer in -*) usage 'LAYER [COUNT] [MORE OPTIONS]' ;; esac
shift
case ${1:--} in
    -*) count=16 ;;
    *[!0-9]*) usage 'LAYER [COUNT] [MORE OPTIONS]' ;;
    *) count=$1 && shift ;;
esac

channels=$("$python" "$cnn_vis" --list_layers "$@" | awk -v layer="$layer" '$1 == layer { print $2 + 0 }')
[ "$count" -le "${channels:-$count}" ] || count=$channels
folder=neurons_${layer//\//-} pictures=()
mkdir -p "$folder"
for ((neuron = 0; neuron < count; neuron++)); do
    dream "$folder/$neuron.png" --initial_size 224x224 --initialization_scale 20 --seed 0 --num_steps 200 --learning_rate 4 \
        --p_reg 1e-8 --tv_reg 0.002 --rescale_image "$@" --image_type amplify_neuron --layer "$layer" --target_neuron "$neuron"
    pictures+=("$folder/$neuron.png=$layer $neuron")
done
"$python" "$root/examples/sheet.py" "$folder/sheet.png" "${pictures[@]}"
echo "$folder/sheet.png" >&2
