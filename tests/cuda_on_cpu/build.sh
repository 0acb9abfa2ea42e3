#!/bin/sh
# Builds the package `caffe` for emulated GPUs: build.sh PYTHON FOLDER
#   PYTHON  the Python of a virtual environment with pycaffe installed, whose libraries are used
#   FOLDER  the folder to build in: add it to PYTHONPATH, and FOLDER/caffe/driver to LD_LIBRARY_PATH
set -eu
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
"$1" -m pip install --quiet --upgrade --no-deps --target "$2" -C cmake.define.PYCAFFE_CUDA=ON \
    -C cmake.define.CMAKE_PROJECT_INCLUDE="$here/toolkit.cmake" "$here/../../pycaffe"
packages=$("$1" -c 'import importlib.metadata as m; print(m.distribution("scipy-openblas32").locate_file(""))')
for name in cmeel.prefix scipy_openblas32; do ln -sfn "$packages/$name" "$2/$name"; done
