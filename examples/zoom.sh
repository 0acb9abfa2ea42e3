#!/bin/bash
# An endless zoom: dreams a little, enlarges the middle, and repeats. Frames go to NAME_zoom; the film is NAME_zoom.mp4.
# Existing frames are skipped, so it can be interrupted and rerun, also with more FRAMES.
# SIDE=400 is the shorter side in pixels, ZOOM=1.04 the enlargement per frame, FPS=20 the film's frames per second.
# Usage: zoom.sh IMAGE [FRAMES] [MORE OPTIONS]
set -euo pipefail
. "$(dirname "$0")/common.sh"
trap 'exit 130' INT
case ${1:--} in -*) usage 'IMAGE [FRAMES] [MORE OPTIONS]' ;; esac
image=$1 name=$(stem "$1")_zoom
shift
case ${1:--} in
    -*) frames=100 ;;
    *[!0-9]*) usage 'IMAGE [FRAMES] [MORE OPTIONS]' ;;
    *) frames=$1 && shift ;;
esac

picture_py=$root/examples/picture.py
mkdir -p "$name"
"$python" "$picture_py" fit "$image" "$name/start.png" "${SIDE:-400}"
has layer "$@" || set -- --layer inception_4c/output "$@"
previous=$name/start.png factor=1
for ((i = 1; i <= frames; i++)); do
    printf -v frame '%s/%05d.png' "$name" "$i"
    if [ ! -e "$frame" ]; then
        "$python" "$picture_py" zoom "$previous" "$name/next.png" "$factor" "$name/start.png"
        dream "$frame" --image "$name/next.png" --num_steps 10 --learning_rate 1.5 \
            --decay_rate 0.9 --alpha 2 --p_reg 0.05 --beta 2.5 --tv_reg 0.5 --use_pixel_learning_rates "$@"
    fi
    previous=$frame factor=${ZOOM:-1.04}
done
# Players need even sides; without tags they take films of 720 lines or more for BT.709, and others for BT.601.
film=(ffmpeg -loglevel error -y -framerate "${FPS:-20}" -i "$name/%05d.png")
if [ "$(height "$previous")" -ge 720 ]; then
    film+=(-vf 'crop=trunc(iw/2)*2:trunc(ih/2)*2,scale=out_color_matrix=bt709:out_range=tv' -pix_fmt yuv420p
        -colorspace bt709 -color_primaries bt709 -color_trc bt709 -color_range tv "$name.mp4")
else
    film+=(-vf 'crop=trunc(iw/2)*2:trunc(ih/2)*2,scale=out_color_matrix=smpte170m:out_range=tv' -pix_fmt yuv420p
        -colorspace smpte170m -color_primaries smpte170m -color_trc smpte170m -color_range tv "$name.mp4")
fi
if command -v ffmpeg > /dev/null; then
    "${film[@]}"
    echo "$name.mp4" >&2
else
    echo "ffmpeg is not installed; install it, and make the film with: ${film[*]@Q}" >&2
fi
