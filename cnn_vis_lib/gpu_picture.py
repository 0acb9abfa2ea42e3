"""A picture on a GPU, in the worker that computes its tiles there: they are cut, run through the
network and stepped where they are, and a step needs nothing of this machine but a word to begin.

What does it is pycaffe/src/canvas.cu. A turn, one colour of tiles in one step, is done in parts of
at most a batch; each is a CUDA graph where the Network makes graphs."""

import ctypes
import dataclasses
import itertools
import math

import numpy as np

from .ahead import overlap
from .cuda_graphs import Graphs
from .prototxt import caffe_library


@dataclasses.dataclass(frozen=True)
class Layout:
    """What a picture on a GPU is made for: its size and that of its tiles, (height, width); for
    both turns of a step the regions, in order; which of the arrays below there are; --strength,
    with --step_rule mean; and the most tiles in a batch."""

    size: tuple
    tile_size: tuple
    turns: tuple
    has: frozenset
    strength: float
    batch_size: int

    def arrays(self):
        """{name: (dtype, shape)} of the arrays that come from the main process and go there: those
        of the Dream with these names."""
        tiles = sum(map(len, self.turns))
        every = {
            "image": ("float64", (3, *self.size)),
            "caches": ("float64", (tiles, 3, *self.tile_size)),
            "divisors": ("float64", self.size),
            "start": ("uint8", (3, *self.size)),
        }
        return {name: kind for name, kind in every.items() if name in self.has}

    def parts(self):
        """The Parts of a step."""
        parts, first = [], 0
        for turn in self.turns:
            number = math.ceil(len(turn) / self.batch_size)
            ends = [len(turn) * i // number for i in range(number + 1)] if number else []
            for begin, end in itertools.pairwise(ends):
                levels = apart(turn[begin:end])
                whole = len(turn) if begin == 0 else 0
                parts.append(Part(first + begin, begin, tuple(map(len, levels)), whole))
            first += len(turn)
        return parts


@dataclasses.dataclass(frozen=True)
class Part:
    """Tiles of one turn: the number of the first, in the step and in the turn; how many can be
    stepped at once, time after time; and how many there are in the turn, if this is its first
    part."""

    first: int
    in_turn: int
    levels: tuple
    whole: int

    @property
    def count(self):
        """The number of tiles."""
        return sum(self.levels)

    @property
    def end(self):
        """The number, in the step, of the tile after them."""
        return self.first + self.count


def apart(regions):
    """The regions in order, as few lists as possible of regions that do not overlap."""
    lists = []
    for region in regions:
        if not lists or any(overlap(region, other) for other in lists[-1]):
            lists.append([])
        lists[-1].append(region)
    return lists


def size_of(kinds):
    """The bytes that arrays take, each from a multiple of 8 on; `kinds` is {name: (dtype,
    shape)}."""
    sizes = [np.dtype(dtype).itemsize * math.prod(shape) for dtype, shape in kinds.values()]
    return sum(-(-size // 8) * 8 for size in sizes)


class Fields(ctypes.Structure):
    """The struct Canvas of canvas.cu."""

    ARRAYS = (
        "image", "start", "caches", "divisors", "places", "numbers", "cuts", "slopes_x", "slopes_y",
        "steps", "sums", "sizes", "factors", "flags",
    )  # fmt: skip
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ARRAYS),
        *((name, ctypes.c_int64) for name in ("height", "width", "h", "w", "tiles")),
        ("strength", ctypes.c_double),
        ("scale", ctypes.c_float),
    )


class GpuArray:
    """An array in a GPU's memory. Raises MemoryError."""

    def __init__(self, dtype, shape):
        self.dtype, self.shape = np.dtype(dtype), shape
        self.nbytes = math.prod(shape) * self.dtype.itemsize
        caffe_library().cnn_vis_allocate.restype = ctypes.c_void_p
        self.address = caffe_library().cnn_vis_allocate(ctypes.c_size_t(max(1, self.nbytes)))
        if not self.address:
            raise MemoryError

    def __del__(self):
        if getattr(self, "address", None):
            caffe_library().cnn_vis_free(ctypes.c_void_p(self.address))

    def write(self, array):
        """Copies an array of its shape to it."""
        array = np.ascontiguousarray(array, self.dtype)
        self._copy(self.address, array.ctypes.data, self.nbytes)

    def read(self, out, at=0):
        """Copies what begins at so many bytes to the array `out`, until that is full."""
        self._copy(out.ctypes.data, self.address + at, out.nbytes)

    def _copy(self, to, source, size):
        caffe_library().cnn_vis_copy(*map(ctypes.c_void_p, (to, source)), ctypes.c_size_t(size))


STEP_SYMBOL = "cnn_vis_end_step"  # of a Caffe that takes steps on a GPU


def can_hold_pictures(network):
    """Whether this Caffe can do all of a step on the GPU with the Network."""
    return network.has_objective and hasattr(caffe_library(), STEP_SYMBOL)


class GpuPicture:
    """A picture on this process's GPU, with the Layout, for the Network. Raises MemoryError."""

    _serial = itertools.count()
    FLAGS = ("is_not_finite", "has_gradient", "has_step")

    def __init__(self, network, layout):
        self.network, self.layout, self.parts = network, layout, layout.parts()
        (h, w), most = layout.tile_size, max(part.count for part in self.parts)
        at_once = max(max(part.levels) for part in self.parts)
        shapes = layout.arrays() | {
            "places": ("int32", (sum(map(len, layout.turns)), 2)),
            "numbers": ("uint8", (16 * 8,)),
            "cuts": ("float32", (max(map(len, layout.turns)), 3, h, w)),
            "flags": ("int32", (len(self.FLAGS),)),
        }
        shapes |= dict.fromkeys(("slopes_x", "slopes_y", "steps"), ("float64", (at_once, 3, h, w)))
        if "caches" not in layout.has:
            shapes |= {"sums": ("float64", (most, w)), "factors": ("float32", (most,))}
            shapes["sizes"] = ("float64", (3,))
        whole = min(layout.batch_size, max(map(len, layout.turns)))  # in memory: measured steps
        for count in sorted({whole, *(part.count for part in self.parts)}, reverse=True):
            network.pass_on_gpu(None, count, lambda _: None, lambda _: None)  # takes memory
        if size_of(shapes) > 0.9 * network.free_gpu_memory():  # libraries may want some, too
            raise MemoryError
        self._arrays = {name: GpuArray(*kind) for name, kind in shapes.items()}
        corners = [(y, x) for y, _, x, _ in itertools.chain(*layout.turns)]
        self._arrays["places"].write(corners)
        addresses = (self._arrays[n].address if n in shapes else None for n in Fields.ARRAYS)
        scales = (layout.strength, network.spec.files.scale)
        self._fields = Fields(*addresses, *layout.size, h, w, len(corners), *scales)
        self._numbers, self._key = None, next(self._serial)
        caffe_library().cnn_vis_allocate_pinned.restype = ctypes.c_void_p
        self._told = ctypes.c_void_p(caffe_library().cnn_vis_allocate_pinned(ctypes.c_size_t(64)))

    def __del__(self):
        if getattr(self, "_told", None):
            caffe_library().cnn_vis_free_pinned(self._told)

    def load(self, arrays, gradient_size):
        """Takes the state of a Dream after a whole step: {name: array} as in Layout.arrays, and its
        gradient_size."""
        # CUDA loads a kernel when it is first used, which must not be while a graph is made. All
        # others are used in a step's first part, which is tried first.
        caffe_library().cnn_vis_end_step(ctypes.byref(self._fields), self._told)
        for name, array in arrays.items():
            self._arrays[name].write(array)
        self._arrays["flags"].write([0] * len(self.FLAGS))
        if "sizes" in self._arrays:
            self._arrays["sizes"].write([gradient_size, 0, 0])

    def advance(self, first, until, numbers):
        """Does the parts of a step from the number `first` to before `until`. `numbers` are those
        for compiled_step, as bytes. Returns {name in FLAGS: whether that has been met in the step},
        if the step is then done, or None."""
        if numbers != self._numbers:
            self._arrays["numbers"].write(np.frombuffer(numbers, np.uint8))
            self._numbers = numbers
        for number in range(first, until):
            self._do_part(number)
        caffe_library().cnn_vis_wait()
        if until < len(self.parts):
            return None
        told = ctypes.cast(self._told, ctypes.POINTER(ctypes.c_int32))
        return self._named(told[: len(self.FLAGS)])

    def _named(self, flags):
        return dict(zip(self.FLAGS, map(bool, flags)))

    def _do_part(self, number):
        part, do, fields = self.parts[number], caffe_library(), ctypes.byref(self._fields)

        def before(tiles):
            for at in range(0, part.whole, self.layout.batch_size):  # of the whole turn
                count = min(self.layout.batch_size, part.whole - at)
                do.cnn_vis_cut(fields, part.first + at, count, at)
            do.cnn_vis_feed(fields, part.in_turn, part.count, ctypes.c_void_p(tiles))

        def after(gradients):
            do.cnn_vis_measure(fields, part.count, ctypes.c_void_p(gradients))
            done = 0
            for count in part.levels:
                do.cnn_vis_step(fields, part.first + done, count, done, ctypes.c_void_p(gradients))
                done += count
            if number == len(self.parts) - 1:
                do.cnn_vis_end_step(fields, self._told)

        key = (self._key, number) if len(self.parts) <= Graphs.MOST else None
        self.network.pass_on_gpu(key, part.count, before, after)

    def fetch(self, arrays):
        """Copies the image and the caches to `arrays`, {name: array}. Returns the gradient_size and
        gradient_sum of the Dream."""
        for name in ("image", "caches"):
            if name in arrays:
                self._arrays[name].read(arrays[name])
        sizes = np.zeros(2)
        if "sizes" in self._arrays:
            self._arrays["sizes"].read(sizes)
        return tuple(map(float, sizes))

    def flags(self):
        """{name in FLAGS: whether that has been met in the step under way}"""
        flags = np.empty(len(self.FLAGS), np.int32)
        self._arrays["flags"].read(flags)
        return self._named(flags)

    def cuts(self, numbers):
        """The pixels of tiles, by their numbers in the turn, as they were before it, float32 (N, 3,
        h, w)."""
        found = np.empty((len(numbers), 3, *self.layout.tile_size), np.float32)
        for tile, number in zip(found, numbers):
            self._arrays["cuts"].read(tile, number * tile.nbytes)
        return found
