# shellcheck shell=sh disable=SC2034
# Read by the scripts here: where cnn_vis.py is, the python it runs on, and what several of them do.
# CNN_VIS_ROOT and CNN_VIS_PYTHON name others, for a script that is run from a copy of it, or in another environment.

root=${CNN_VIS_ROOT:-$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)}
cnn_vis=$root/cnn_vis.py
if [ -n "${CNN_VIS_PYTHON:-}" ]; then
    python=$CNN_VIS_PYTHON
elif [ -x "$root/.venv/bin/python" ]; then
    python=$root/.venv/bin/python
else
    python=python
fi

# usage ARGUMENTS: says how the script is called, and ends it.
usage() {
    echo "usage: ${0##*/} $1" >&2
    exit 2
}

# stem PATH: prints a file's name without its folder and its ending.
stem() {
    file=${1##*/}
    echo "${file%.*}"
}

# photograph FILE: prints the path of a picture that comes with scikit-image.
photograph() {
    "$python" -c 'import pathlib, sys, skimage.data as data; print(pathlib.Path(data.__file__).with_name(sys.argv[1]))' "$1"
}

# dream PICTURE.png OPTIONS...: makes a picture, unless it is there. It has another name until it is whole, because
# cnn_vis.py writes what it has when it is stopped.
dream() {
    picture=$1
    part=${1%.png}.part.png
    shift
    [ ! -e "$picture" ] || return 0
    echo "$picture" >&2
    "$python" "$cnn_vis" --iter_behavior none --quiet "$@" --checkpoint_iter 0 --output "$part" && mv "$part" "$picture"
}
