#!/bin/bash
# A video, dreamed frame by frame. Each frame starts with the previous frame's dream, carried along by optical flow, so
# that the film flickers far less. At a cut a new dream begins; all scenes are dreamed at the same time.
# The frames stay in OUT.mp4.frames until all are done, so it can be interrupted and rerun.
# BLEND=0.9 is the share of the dream that is carried along, from 0 to 1; FLOW=dis or farneback is the flow method. With
# BLEND=0 nothing is carried, and all frames can be dreamed at the same time.
# Usage: video.sh IN.mp4 OUT.mp4 [MORE OPTIONS]
set -euo pipefail
. "$(dirname "$0")/common.sh"
trap 'exit 130' INT
for file in "${1:--}" "${2:--}"; do
    case $file in -*) usage 'IN.mp4 OUT.mp4 [MORE OPTIONS]' ;; esac
done
command -v ffmpeg > /dev/null || { echo 'video.sh: ffmpeg is needed: apt-get install ffmpeg' >&2 && exit 1; }
evaluate 'import cv2' 2> /dev/null \
    || { echo "video.sh: OpenCV is needed: $python -m pip install -r $root/examples/requirements.txt" >&2 && exit 1; }
input=$1 output=$2 work=$2.frames
shift 2
case $output in *'{name}'* | *'{layer}'*) echo "video.sh: $output: the name must not contain {name} or {layer}" >&2 && exit 2 ;; esac
case ${output##*/} in ?*.?*) ;; *) echo "video.sh: $output: add an ending, such as .mp4" >&2 && exit 2 ;; esac
[ -e "$input" ] && input=file:$(realpath "$input") # ffmpeg would take c: for a protocol
ending=${output##*.}

# probe NAME: prints a property of the input's first video stream.
probe() {
    ffprobe -v error -select_streams v:0 -show_entries "stream=$1" -of default=nokey=1:noprint_wrappers=1 "$input" |
        head -n 1
}

rate=$(probe avg_frame_rate)
case $rate in '' | 0/* | */0) rate=$(probe r_frame_rate) ;; esac
matrix=$(probe color_space)
case $matrix in # an untagged film of 720 lines or more is BT.709, as players assume
    '' | unknown | reserved) if [ "$(probe height)" -ge 720 ]; then matrix=bt709; else matrix=smpte170m; fi ;;
    *) matrix=auto ;;
esac
case $(probe color_transfer)/$(probe color_primaries) in # frames have the colours of screens, or say otherwise
    smpte2084/* | arib-std-b67/* | */bt2020 | */smpte43?) as= ;;
    *) as=,setparams=color_primaries=bt709:color_trc=iec61966-2-1 ;;
esac
if [ ! -e "$work/in" ]; then
    rm -rf "$work/in.part"
    mkdir -p "$work/in.part" "$work/out"
    (cd "$work" && ffmpeg -nostdin -loglevel error -i "$input" \
        -vf "fps=$rate,scale=in_color_matrix=$matrix,format=rgb24|rgb48be$as" in.part/%06d.png) # whatever $work contains
    mv "$work/in.part" "$work/in"
fi
has layer "$@" || set -- --layer inception_4c/output "$@"
settings=(--iter_behavior none --num_steps 10 --learning_rate 0.5 --decay_rate 0.9 --alpha 2 --p_reg 0.05 --beta 2.5
    --tv_reg 0.5 --use_pixel_learning_rates "$@" --output "$work/out/{name}.png")
flow=("$python" "$root/examples/flow.py")
count=$(find "$work/in" -name '*.png' | wc -l) dreamed=0

if [[ ${BLEND:-0.9} =~ ^0*\.?0*$ ]]; then
    "$python" "$cnn_vis" "${settings[@]}" --image "$work/in"
else
    if [ ! -e "$work/plan" ]; then
        "${flow[@]}" plan "$work/in" > "$work/plan.part"
        mv "$work/plan.part" "$work/plan"
    fi
    mkdir -p "$work/next"
    while read -r -a frames <&3; do # of different scenes
        if [ ! -e "$work/next/${frames[-1]}.done" ]; then
            starts=() pictures=()
            for frame in "${frames[@]}"; do
                previous=$(printf %06d.png $((10#${frame%.png} - 1)))
                starts+=("$work/next/$frame")
                pictures+=("$work/in/$frame" "$work/next/$frame" "$work/in/$previous" "$work/out/$previous")
                [ "$dreamed" != 0 ] || cp "$work/in/$frame" "$work/next"
            done
            [ "$dreamed" = 0 ] || "${flow[@]}" carry "${BLEND:-0.9}" "${FLOW:-dis}" "${pictures[@]}"
            "$python" "$cnn_vis" "${settings[@]}" --quiet --image "${starts[@]}"
            touch "$work/next/${frames[-1]}.done"
        fi
        dreamed=$((dreamed + ${#frames[@]}))
        echo "$output: $dreamed of $count frames are dreamed" >&2
    done 3< "$work/plan"
fi
# Players need even sides; without tags they take films of 720 lines or more for BT.709, and others for BT.601. The
# sound, if any, comes from the input.
if [ "$(height "$work/out/000001.png")" -ge 720 ]; then space=bt709; else space=smpte170m; fi
(cd "$work" && ffmpeg -nostdin -loglevel error -y -framerate "$rate" -i out/%06d.png -i "$input" -map 0:v -map '1:a?' \
    -vf "crop=trunc(iw/2)*2:trunc(ih/2)*2,scale=out_color_matrix=$space:out_range=tv" -pix_fmt yuv420p \
    -colorspace $space -color_primaries $space -color_trc $space -color_range tv "film.$ending")
mv "$work/film.$ending" "$output"
rm -r "$work"
echo "$output" >&2
