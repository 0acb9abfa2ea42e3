"""The compiled step of a tile, which comes with this program's build of Caffe."""

import ctypes
import functools

import numpy as np

from .models import find_in_caffe


def step_numbers(terms, decay, learning_rate, mean):
    """What a step is: float64 (12,), weight, exponent and scale of two p-norms and of total
    variation, 0 as weight if the `terms` lack one, then the three other numbers; and int64 (4,),
    where the operator of total variation has 1 and -1, its length, and whether it is that of the
    change."""
    numbers, places = [], (0, 1, 2, False)
    for name in ("p", "aux"):
        norm = terms.get(name)
        numbers += (norm.weight, norm.p, norm.scale) if norm else (0, 2, 1)
    tv = terms.get("tv")
    numbers += (tv.weight, tv.beta, tv.scale) if tv else (0, 2, 1)
    if tv:
        places = tv.difference.index(1), tv.difference.index(-1), len(tv.difference), tv.of_change
    numbers += decay, learning_rate, mean
    return np.array(numbers, np.float64), np.array(places, np.int64)


def compiled_step_tile(x, start, mean, descent, cache, divisors, terms, decay, learning_rate):
    """What the script's step_tile does, by compiled_step."""
    numbers = step_numbers(terms, decay, learning_rate, mean)
    step_size = compiled_step()(x, start, descent, cache, divisors, *numbers)
    return None if step_size < 0 else step_size


@functools.cache
def compiled_step():
    """The function that steps a tile in the library that is installed with this program's Caffe, or
    None without that library. It is four times as fast as NumPy. Its results are identical to the
    last bit if `power` uses square roots and products, and nearly identical otherwise.

    It takes x, start, descent, cache and divisors, as for the script's step_tile, and the numbers
    and places of step_numbers. It returns the mean size of the step, negative if that overflows.
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
        descent = np.ascontiguousarray(descent, np.float32)
        if start is not None and start.strides[:2] != (x.strides[0] // 8, x.strides[1] // 8):
            raise ValueError("x and start must be parts of pictures of the same size")
        arrays = (x, start, descent, cache, divisors, numbers, places)
        addresses = (None if array is None else array.ctypes.data for array in arrays)
        plane, row = (stride // 8 for stride in x.strides[:2])
        return function(*x.shape[1:], row, plane, *addresses)

    return step
