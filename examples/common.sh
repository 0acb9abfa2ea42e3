# shellcheck shell=sh disable=SC2034
# Sourced by the scripts here: finds cnn_vis.py and Python, and defines shared functions.
# Set CNN_VIS_ROOT if a script runs as a copy outside this folder, and CNN_VIS_PYTHON to use another environment.

root=${CNN_VIS_ROOT:-$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)}
cnn_vis=$root/cnn_vis.py
if [ -n "${CNN_VIS_PYTHON:-}" ]; then
    python=$CNN_VIS_PYTHON
elif [ -x "$root/.venv/bin/python" ]; then
    python=$root/.venv/bin/python
else
    python=python
fi

# has OPTION ARGUMENTS...: whether the option, image or layer, is among the arguments, under any name; an argument that
# comes first and is no option is a picture.
has() {
    option=$1
    shift
    case $option,${1:--} in image,-* | layer,*) ;; *) return 0 ;; esac
    for word; do
        case $word in
            --"$option" | --"$option"=* | --initial[-_]"$option"* | --target[-_]"$option"*) return 0 ;;
        esac
    done
    return 1
}

# usage ARGUMENTS: prints how to call the script, and exits.
usage() {
    echo "usage: ${0##*/} $1" >&2
    exit 2
}

# stem PATH: prints a file's name without folder and extension.
stem() {
    file=${1##*/}
    echo "${file%.*}"
}

# evaluate CODE ARGUMENTS...: runs Python code, which imports nothing from the current folder.
evaluate() {
    "$python" -c 'import sys; sys.path[:] = filter(None, sys.path); exec(sys.argv.pop(1))' "$@"
}

# height PICTURE: prints its height in pixels.
height() {
    evaluate 'import sys; from PIL import Image; print(Image.open(sys.argv[1]).height)' "$1"
}

# photograph FILE: prints the path of a picture that comes with scikit-image.
photograph() {
    evaluate 'import pathlib, sys, skimage.data as data; print(pathlib.Path(data.__file__).with_name(sys.argv[1]))' "$1"
}

# dream PICTURE.png OPTIONS...: makes a picture, unless it exists. It has a temporary name until it is complete, because
# cnn_vis.py also saves an unfinished picture when it is stopped.
dream() {
    picture=$1
    part=${1%.png}.part.png
    shift
    [ ! -e "$picture" ] || return 0
    echo "$picture" >&2
    "$python" "$cnn_vis" --iter_behavior none --quiet "$@" --checkpoint_iter 0 --output "$part" && mv "$part" "$picture"
}
