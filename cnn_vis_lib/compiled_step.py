"""The compiled step of a tile, which comes with this program's build of Caffe."""

import ctypes
import functools

import numpy as np

from .models import find_in_caffe


@functools.cache
def compiled_step():
    """The function that steps a tile in the library that is installed with this program's Caffe, or
    None without that library. It is four times as fast as NumPy. Its results are identical to the
    last bit if `power` uses square roots and products, and nearly identical otherwise.

    It takes x, start, descent, cache and divisors, as for the script's step_tile; numbers, weight,
    exponent and scale of two p-norms and of total variation, then decay, learning rate and mean;
    places, where the operator of total variation has 1 and -1, its length, and whether it is that
    of the change. It returns the mean size of the step, negative if that overflows.
    """
    path = find_in_caffe("python/caffe/libstep_tile.so", "libstep_tile.so")
    if path is None:
        return None
    try:
        function = ctypes.CDLL(path).cnn_vis_step_tile_4  # its fourth signature
    except (OSError, AttributeError):  # built for another machine, or too old
        return None
    function.argtypes = [ctypes.c_int64] * 4 + [ctypes.c_void_p] * 7
    function.restype = ctypes.c_double

    def step(x, start, descent, cache, divisors, numbers, places):
        numbers, places = np.array(numbers, np.float64), np.array(places, np.int64)
        descent = np.ascontiguousarray(descent, np.float32)
        if start is not None and start.strides[:2] != (x.strides[0] // 8, x.strides[1] // 8):
            raise ValueError("x and start must be parts of pictures of the same size")
        arrays = (x, start, descent, cache, divisors, numbers, places)
        addresses = (None if array is None else array.ctypes.data for array in arrays)
        plane, row = (stride // 8 for stride in x.strides[:2])
        return function(*x.shape[1:], row, plane, *addresses)

    return step
