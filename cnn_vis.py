#!/usr/bin/env python3
"""Inceptionism pictures on real Caffe: see what a layer of GoogLeNet sees in a picture, or in noise.

    python cnn_vis.py --image in.jpg --layer inception_4c/output
    python cnn_vis.py --image in.jpg --layer inception_3b/output --initial_size x0.5 --final_size x2 --num_sizes 4
    python cnn_vis.py --initial_size 270x480 --final_size 1080x1920 --num_sizes 5 --num_steps 100 \\
                      --learning_rate 10 --decay_rate .25 --p_reg 1e-10 --beta 2.5        # from noise
    python cnn_vis.py --image in.jpg --image_type amplify_neuron --layer inception_4b/output --target_neuron 17
    python cnn_vis.py --help

Faithful to Justin Johnson's cnn-vis (2015): the picture is cut into overlapping tiles of the network's input size; each
step runs every tile forward and backward through Caffe, adds the gradients of two p-norms and of total variation, and takes
an RMSProp step. After num_steps steps the picture is enlarged, and so on from initial_size to final_size.

A picture in memory is float64, shape (1, 3, H, W), channels B, G, R, with the mean image's mean taken off.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import csv
import ctypes
import dataclasses
import difflib
import functools
import glob
import hashlib
import importlib.util
import io
import itertools
import json
import math
import mmap
import multiprocessing
import os
import re
import resource
import shlex
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import types
import warnings
import zipfile
import zlib

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until main() can say a word: no traceback out of an import

import numpy as np

__version__ = "1.0.0"


class BadRequest(Exception):
    """What the user asked for cannot be done; the message names the option, the value and the remedy. Exit status 2."""


class RunFailed(Exception):
    """A run that was asked for rightly went wrong. Exit status 1."""


class NotFinite(RunFailed):
    """Options drove the picture out of all bounds."""


def one_line(error):
    """An exception's message in one line."""
    return " ".join(str(error).split()) or type(error).__name__


# ---- Pictures ----------------------------------------------------------------------------------------------------------

MAX_PIXELS = 178_956_970  # of a picture file; Pillow too takes more for an attack
GAIN = 1.2  # contrast gained whenever a picture becomes 8-bit


def read_picture(path, background="white"):
    """The picture in the file `path` as people see it: uint8 (H, W, 3), sRGB; and a list of remarks on what was done to it.

    Heeded are EXIF orientation, colour profile, depths other than 8 bits; what is transparent shows the colour `background`.
    Of several frames the first is taken. Raises BadRequest.
    """
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on size, which is checked here, and on damaged metadata, which does not matter
            with Image.open(path) as file:
                if file.width * file.height > MAX_PIXELS:
                    raise BadRequest(f"--image {path}: {file.width}x{file.height} is too large a picture; make it smaller first")
                remarks = []
                if getattr(file, "is_animated", False) and file.format != "MPO":  # MPO: a camera's JPEG with its preview
                    remarks.append(f"{path}: the first of {file.n_frames} frames is used")
                picture = file
                with contextlib.suppress(Exception):  # damaged EXIF data says nothing on the orientation
                    picture = ImageOps.exif_transpose(file)
                picture = to_srgb(picture, path, remarks)
                if picture.mode != "RGB":
                    picture = picture.convert("RGBA")
                    picture = Image.alpha_composite(Image.new("RGBA", picture.size, background), picture).convert("RGB")
                return np.asarray(picture), remarks
    except BadRequest:
        raise
    except Image.DecompressionBombError:
        raise BadRequest(f"--image {path}: too large a picture; make it smaller first") from None
    except Exception as error:  # a damaged file can fail anywhere in Pillow's decoders, in any way
        heic = path.lower().endswith((".heic", ".heif"))
        remedy = "save HEIC pictures as JPEG first" if heic else "give a PNG or JPEG file"
        raise BadRequest(f"--image {path}: cannot be read as a picture ({one_line(error)}); {remedy}") from None


def to_srgb(picture, path, remarks):
    """A PIL picture of any mode and colour profile as an 8-bit sRGB one, mode RGB, or RGBA where parts are transparent."""
    from PIL import Image, ImageCms

    profile = picture.info.get("icc_profile")
    if picture.mode.startswith(("I", "F")):
        picture, profile = Image.fromarray(to_8_bits(np.asarray(picture))), None
    transparent = "transparency" in picture.info or picture.mode in ("LA", "La", "PA", "RGBA", "RGBa")
    if picture.mode not in ("L", "CMYK") or transparent:
        picture = picture.convert("RGBA" if transparent else "RGB")
    if profile:
        try:
            profile = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            if "srgb" not in ImageCms.getProfileDescription(profile).lower():
                mode = "RGBA" if transparent else "RGB"
                return ImageCms.profileToProfile(picture, profile, ImageCms.createProfile("sRGB"), outputMode=mode)
        except (OSError, ImageCms.PyCMSError) as error:
            remarks.append(f"{path}: its colour profile is left aside ({one_line(error)})")
    return picture if transparent else picture.convert("RGB")


def to_8_bits(values):
    """A deeper greyscale picture, an array (H, W), as uint8. Two bytes a pixel are 0..65535; else it is the first of 0..1
    (fractions only), 0..255, 0..65535 and 0..maximum that holds the values."""
    sixteen_bits = values.dtype.itemsize == 2
    values = np.nan_to_num(values.astype(np.float64), posinf=0, neginf=0)
    tops = [65535] if sixteen_bits else ([1] if (values % 1).any() else []) + [255, 65535]
    top = next((top for top in tops if values.max() <= top), values.max())
    return np.clip(values * (255 / top) + 0.5, 0, 255).astype(np.uint8)


def to_uint8(image, mean, rescale=False):
    """What one sees of `image` (1, 3, H, W): uint8 (H, W, 3) RGB, truncated; with `rescale` stretched instead of clipped."""
    picture = np.empty((*image.shape[2:], 3), np.uint8)
    low, high = (GAIN * end + mean for end in (image.min(), image.max())) if rescale else (0, 255)
    for channel, plane in enumerate(image[0, ::-1]):  # one at a time, for the memory
        plane = GAIN * plane
        plane += mean
        if rescale:
            plane -= low
            plane *= 255
            plane /= (high - low) or 1
        picture[:, :, channel] = np.clip(plane, 0, 255, out=plane)
    return picture


def from_uint8(picture, mean):
    """uint8 (H, W, 3) RGB to float64 (1, 3, H, W) BGR without the mean. No gain, so not the inverse of to_uint8."""
    image = np.array(picture[:, :, ::-1].transpose(2, 0, 1)[np.newaxis], dtype=np.float64, order="C")
    image -= mean
    return image


def resize(picture, size, bilinear=False):
    """uint8 (H, W, 3) resized to `size` (height, width) as PIL does it, bicubic unless `bilinear`."""
    from PIL import Image

    method = Image.Resampling.BILINEAR if bilinear else Image.Resampling.BICUBIC
    return np.asarray(Image.fromarray(picture).resize((size[1], size[0]), method))


def noise(size, scale, blur, mean, seed=None):
    """Noise to start from, float64 (1, 3, H, W). The blur is the original's: on 8-bit pixels, and across channels too."""
    from scipy.ndimage import gaussian_filter

    image = scale * np.random.RandomState(seed).randn(1, 3, *size)
    return from_uint8(gaussian_filter(to_uint8(image, mean), sigma=blur), mean)


# ---- Sizes and tiles ---------------------------------------------------------------------------------------------------

MAX_SIDE = 1_000_000


def parse_size(text, base):
    """A size as an option gives it ("HxW", "xF", "N" or None) as (height, width); `base` is (height, width), of whose shape "N"
    is with the longer side N. Raises ValueError."""
    if text is None:
        return tuple(base)
    height, x, width = text.partition("x")
    if not x:
        size = tuple(max(1, round(int(text) * side / max(base))) for side in base)
    else:
        size = (int(height), int(width)) if height else tuple(int(float(width) * side) for side in base)
    if min(size) < 1:
        raise ValueError(f"{size[0]}x{size[1]} has no pixels")
    if max(size) > MAX_SIDE:
        raise ValueError(f"sides of more than {MAX_SIDE} pixels are more than can be done")
    return size


def size_sequence(initial, final, number, resize_type):
    """`number` sizes (height, width) from initial to final, geometric or linear, rounded half to even."""
    if number == 1:
        return [tuple(initial)]
    if resize_type == "geometric":
        sides = [np.logspace(np.log10(a), np.log10(b), number) for a, b in zip(initial, final)]
    else:
        sides = [np.linspace(a, b, number) for a, b in zip(initial, final)]
    return [(int(h), int(w)) for h, w in zip(*np.round(sides))]


def tile_starts(total, tile):
    """Where tiles of `tile` pixels start so that as few as can be cover `total` pixels, evenly spread, rounded half up."""
    count = -(-total // tile)
    return [math.floor(start + 0.5) for start in np.linspace(0, total - tile, count)]


def tiles(size, tile):
    """The tiles of a picture of `size`, as two lists (even, odd) of (y0, y1, x0, x1): a chequerboard, columns outer."""
    colours = ([], [])
    for i, x in enumerate(tile_starts(size[1], tile[1])):
        for j, y in enumerate(tile_starts(size[0], tile[0])):
            colours[(i + j) % 2].append((y, y + tile[0], x, x + tile[1]))
    return colours


def all_tiles(size, tile):
    """The tiles of both colours in one list, the even ones first."""
    even, odd = tiles(size, tile)
    return even + odd


def tile_counts(size, tile):
    """How many tiles cover each pixel, float64 (H, W)."""
    counts = np.zeros(size)
    for y0, y1, x0, x1 in all_tiles(size, tile):
        counts[y0:y1, x0:x1] += 1
    return counts


def cut_tile(image, region):
    """The pixels (3, H, W) of a region (y0, y1, x0, x1), a view."""
    y0, y1, x0, x1 = region
    return image[0, :, y0:y1, x0:x1]


def overlap(a, b):
    """Whether two regions (y0, y1, x0, x1) have pixels in common."""
    return a[0] < b[1] and b[0] < a[1] and a[2] < b[3] and b[2] < a[3]


BYTES_A_PIXEL = 130  # of a run: picture, start picture, caches of overlapping tiles, a snapshot, and what enlarging takes


def plan_sizes(options, picture, tile_size):
    """The sizes of a run, [(height, width), ...], all at least the network's input and no larger than memory. Raises
    BadRequest."""
    base = tile_size if picture is None else picture.shape[:2]
    ends = []
    for name in ("initial_size", "final_size")[: options.num_sizes]:
        try:
            ends.append(parse_size(getattr(options, name), base))
        except (ValueError, OverflowError) as error:
            value = getattr(options, name)
            raise BadRequest(
                f"--{name} {value}: {one_line(error)}; give HxW, the longer side, or xF, as 540x960, 960 or x0.5"
            ) from None
    sizes = size_sequence(ends[0], ends[-1], options.num_sizes, options.resize_type)
    for size in sizes:
        if size[0] < tile_size[0] or size[1] < tile_size[1]:
            name = "initial_size" if size == sizes[0] else "final_size"
            factor = max(math.ceil(100 * t / b) / 100 for t, b in zip(tile_size, base))
            raise BadRequest(
                f"--{name} {getattr(options, name) or 'unset'}: {size[0]}x{size[1]} is smaller than the network's input, "
                f"{tile_size[0]}x{tile_size[1]}; x{factor:g} or more will do"
            )
    height, width = max(sizes, key=math.prod)
    needed, free = BYTES_A_PIXEL * height * width, free_memory()
    if needed > free:
        name = "final_size" if len(sizes) > 1 and (height, width) == sizes[-1] else "initial_size"
        raise BadRequest(
            f"--{name} {getattr(options, name) or 'unset'}: {height}x{width} takes {needed / 1e9:.1f} GB of memory and "
            f"{free / 1e9:.1f} GB are free; give a smaller one"
        )
    return sizes


# ---- Objective, regularizers, step -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is to grow. With `neuron` None, every activation a of the target: l1 a|a| / 2 + l2 a^2 / 2, the square going on
    as a straight line beyond `clip`. Else the sum of channel `neuron`."""

    neuron: int | None = None
    l1: float = 1.0
    l2: float = 1.0
    clip: float = 5.0

    def value(self, a):
        """The objective of one tile's activations `a` (C, ...), a number."""
        if self.neuron is not None:
            return float(a[self.neuron].sum(dtype=np.float64))
        a = a.astype(np.float64)
        size = np.abs(a)
        square = np.where(size <= self.clip, a * a / 2, self.clip * size - self.clip**2 / 2)
        return float((self.l1 * a * size / 2 + self.l2 * square).sum())

    def descent(self, a):
        """Minus the objective's gradient by `a`, for the network to take backward: steps go downhill. Same shape and dtype."""
        if self.neuron is not None:
            gradient = np.zeros_like(a)
            gradient[:, self.neuron] = -1
            return gradient
        return -self.l1 * np.abs(a) - self.l2 * np.clip(a, -self.clip, self.clip)


FLOOR = 1e-3  # under the squared gradient in total variation
EPSILON = 1e-8  # under RMSProp's square root
TV_OPERATORS = {  # slopes: (difference along the axis, smoothing across it), both as correlation kernels
    "naive": ((1, -1), (1, 0)),
    "sobel": ((-1, 0, 1), (1, 2, 1)),
    "sobel_squish": ((-1, 1, 0), (1, 2, 1)),
}


# Exponents in use are halves and quarters of whole numbers, which square roots and products give several times faster than a
# general power. Losses and gradients below are by x, an array (1, 3, H, W), float64.
def power(x, exponent):
    """x ** exponent for x >= 0."""
    quarters = exponent * 4
    if not (quarters == int(quarters) and 0 <= quarters <= 48):
        return x**exponent
    result, factor, bits = None, x, int(quarters)
    if bits % 4:
        root = np.sqrt(x)
        result = root if bits & 2 else None
        if bits & 1:
            fourth = np.sqrt(root)
            result = fourth if result is None else result * fourth
    bits >>= 2
    while bits:
        if bits & 1:
            result = factor if result is None else result * factor
        bits >>= 1
        if bits:
            factor = factor * factor
    return np.ones_like(x) if result is None else result


def p_norm_loss(x, p, scale):
    """sum |x / scale|^p."""
    return float(power(np.abs(x) / scale, p).sum())


def p_norm_gradient(x, p, scale, weight=1.0):
    """Of weight * p_norm_loss by x: weight * p / scale * sign(x) * |x / scale|^(p - 1)."""
    scaled = x if scale == 1 else x / scale
    if p == 2:
        return scaled * (weight * 2 / scale)
    if p % 2 == 0:  # an odd power keeps the sign
        gradient = power(scaled * scaled, (p - 2) / 2)
        gradient *= scaled
    else:
        gradient = power(np.abs(scaled), p - 1)
        gradient *= np.sign(scaled)
    gradient *= weight * p / scale
    return gradient


def _window(x, axis, start, length):
    """The `length` entries of x from `start` along axis 2 or 3."""
    return x[:, :, start : start + length] if axis == 2 else x[..., start : start + length]


def _slope(x, operator, axis):
    """The slopes of x along axis 2 or 3 that the operator measures, where it fits."""
    difference, smoothing = TV_OPERATORS[operator]
    n = len(difference) - 1
    up, down = (_window(x, axis, difference.index(sign), x.shape[axis] - n) for sign in (1, -1))
    slope, across = up - down, 5 - axis
    parts = [_window(slope, across, i, x.shape[across] - n) for i in range(n + 1)]
    if smoothing == (1, 0):
        return parts[0]
    smooth = parts[1] * 2
    smooth += parts[0]
    smooth += parts[2]
    return smooth


def _spread_slope(x, slope, operator, axis):
    """Adds to x the transpose of _slope applied to `slope`."""
    difference, smoothing = TV_OPERATORS[operator]
    n, across = len(difference) - 1, 5 - axis
    if smoothing != (1, 0):
        shape = list(slope.shape)
        shape[across] += n
        spread = np.zeros(shape)
        for i, factor in enumerate(smoothing):
            place = _window(spread, across, i, slope.shape[across])
            place += slope if factor == 1 else factor * slope
    else:
        spread, x = slope, _window(x, across, 0, x.shape[across] - n)
    up, down = (_window(x, axis, difference.index(sign), spread.shape[axis]) for sign in (1, -1))
    up += spread
    down -= spread


def _tv_slopes(x, operator, scale):
    """dx, dy of x / scale, and max(dx^2 + dy^2, FLOOR)."""
    dx, dy = (_slope(x, operator, axis) for axis in (3, 2))
    if scale != 1:
        dx /= scale
        dy /= scale
    squared = dx * dx
    squared += dy * dy
    np.maximum(squared, FLOOR, out=squared)
    return dx, dy, squared


def tv_loss(x, beta, operator="naive", scale=1.0):
    """Total variation of x / scale (Mahendran and Vedaldi 2015, equation 4, each channel apart): sum (dx^2 + dy^2)^(beta/2)."""
    return float(power(_tv_slopes(x, operator, scale)[2], beta / 2).sum())


def tv_gradient(x, beta, operator="naive", scale=1.0, weight=1.0):
    """Of weight * tv_loss by x. As in the original the floor is not masked out: a flat place has a gradient, of nearly 0."""
    dx, dy, factor = _tv_slopes(x, operator, scale)
    if beta >= 2:
        factor = power(factor, beta / 2 - 1)
    else:
        factor **= beta / 2 - 1
    factor *= weight * beta / scale
    dx *= factor
    dy *= factor
    gradient = np.zeros_like(x)
    _spread_slope(gradient, dx, operator, 3)
    _spread_slope(gradient, dy, operator, 2)
    return gradient


def rmsprop(gradient, cache, decay, learning_rate):
    """The step -gradient / sqrt(cache + EPSILON) * learning_rate. Changes `cache` (and `gradient`, which becomes the step)."""
    scratch = gradient * gradient
    scratch *= 1 - decay
    cache *= decay
    cache += scratch
    np.add(cache, EPSILON, out=scratch)
    np.sqrt(scratch, out=scratch)
    gradient /= scratch
    gradient *= -learning_rate
    return gradient


# ---- The dream ---------------------------------------------------------------------------------------------------------


def tile_gradients(workers, image, colours):
    """Yields (region, receive) for every region of `colours`, an iterable of (list of regions, whether the objective is to be
    measured), in order. The caller steps a region before it asks for the next; to do so it calls receive(), which waits for
    the tile and returns (gradient float32 (3, H, W), objective's value or None), and can do what else there is to do first.

    A tile's gradient is that of the picture as it stood when the first tile of its colour was stepped. That may be known
    earlier: as soon as nothing that is still to come before this colour reaches into the tile. Then it is sent, so that
    workers need not wait for the end of a colour, or of a step.
    """
    numbered_colours = enumerate(colours)
    ahead = collections.deque()  # (number of its colour, region, whether to measure) of tiles not sent, to the end of a colour
    batch = []  # of them, those that are sent next
    sent = collections.deque()  # batches on their way: (tiles, ticket)
    unstepped = collections.deque()  # all tiles sent or in the batch
    kept = {}  # pixels of tiles not sent that others of their colour have begun to change
    while True:
        while workers.has_room():
            while len(batch) < workers.batch_size:
                if not ahead:
                    number, (colour, measure) = next(numbered_colours, (None, ((), None)))
                    ahead.extend((number, region, measure) for region in colour)
                if not ahead:
                    break
                number, region, _ = ahead[0]
                if any(other < number and overlap(region, place) for other, place, _ in unstepped):
                    break
                batch.append(ahead.popleft())
                unstepped.append(batch[-1])
            # A batch with places left waits for more tiles, if any can come free meanwhile.
            if not batch or (len(batch) < workers.batch_size and sent and ahead):
                break
            pixels = [kept.pop(tile) if tile in kept else cut_tile(image, tile[1]) for tile in batch]
            sent.append((batch, workers.send(pixels, any(measure for *_, measure in batch))))
            batch = []
        if not sent:
            return
        tiles_sent, ticket = sent.popleft()
        received = functools.cache(functools.partial(workers.receive, ticket))
        for place, (number, region, _) in enumerate(tiles_sent):
            for tile in itertools.takewhile(lambda tile, number=number: tile[0] == number, itertools.chain(batch, ahead)):
                if tile not in kept and overlap(tile[1], region):
                    kept[tile] = cut_tile(image, tile[1]).astype(np.float32)
            yield region, lambda received=received, place=place: received()[place]
            unstepped.popleft()


@dataclasses.dataclass
class Progress:
    """Where a run is after a step. `size_index` and `step` count from 0; `image` is the picture in memory, not to be changed;
    `stats` is {name: number} or None when not asked for."""

    sizes: list
    size_index: int
    step: int
    num_steps: int
    image: np.ndarray
    mean: float
    stats: dict | None

    def steps_done(self):
        """How many steps the run has done, at all sizes."""
        return self.size_index * self.num_steps + self.step + 1

    def picture(self, rescale=False):
        """What one sees of it: uint8 (H, W, 3), RGB."""
        return to_uint8(self.image, self.mean, rescale)


def whereabouts(progress):
    """Where a Progress is, in words."""
    height, width = progress.sizes[progress.size_index]
    return f"size {progress.size_index + 1}/{len(progress.sizes)} {height}x{width}, step {progress.step + 1}/{progress.num_steps}"


STATS = ("objective", "p_loss", "aux_loss", "tv_loss", "p_gradient", "aux_gradient", "tv_gradient", "cnn_gradient", "step_size",
         "step_to_value", "image_mean", "image_std")  # fmt: skip
COLUMNS = ("size", "height", "width", "step", *STATS)


class Gauge:
    """Sums up one step over all of its tiles; the original printed the last tile's figures only."""

    def __init__(self):
        self._sums = collections.Counter()
        self._tiles = 0

    def add_tile(self, value):
        """Counts a tile; `value` is its objective."""
        self._tiles += 1
        self._sums["objective"] += value

    def add_means(self, **planes):
        """The mean sizes of a tile's arrays, of one of its three channels."""
        for name, plane in planes.items():
            self._sums[name] += float(np.abs(plane).mean()) / 3

    def add_losses(self, **losses):
        """The parts of a tile's losses that one channel has."""
        for name, loss in losses.items():
            self._sums[f"{name}_loss"] += loss

    def summary(self, image):
        """Means over the tiles, and the picture's mean and standard deviation."""
        stats = {name: self._sums[name] / self._tiles for name in STATS[:-3]}
        stats["step_to_value"] = self._sums["step_size"] / (self._sums["value"] or 1)
        return stats | {"image_mean": float(image.mean()), "image_std": float(image.std())}


class Dream:
    """One run: the picture as it stands and all that the next step depends on.

    `options` are those of the command line, `picture` the uint8 (H, W, 3) start picture or None for noise, `mean` the scalar
    taken off, `workers` an entered Workers that has described its network. Raises BadRequest for sizes below the network's.
    """

    def __init__(self, options, picture, mean, workers):
        self.options, self.picture, self.mean, self.workers = options, picture, mean, workers
        self.sizes = plan_sizes(options, picture, workers.tile_size)
        self.size_index, self.step = 0, 0  # of the next step
        self.image = None

    def run(self, wants_stats=lambda step: False):
        """Does the run, or what is left of it, yielding a Progress after every step; wants_stats(step) tells which ones are
        to be measured. Raises NotFinite where a step is not; the picture then is as it was amid that step, before it was not."""
        keep_freed_memory()
        while True:
            self._lay_out()
            if self.step == 0:
                self._begin_size()
            steps_left = range(self.step, self.options.num_steps)
            colours = [colour for colour in tiles(self.sizes[self.size_index], self.workers.tile_size) if colour]
            to_come = ((colour, wants_stats(step)) for step in steps_left for colour in colours)
            gradients = tile_gradients(self.workers, self.image, to_come)
            for step in steps_left:
                gauge = Gauge() if wants_stats(step) else None
                for region, receive in itertools.islice(gradients, len(self.tiles)):
                    self._update_tile(region, receive, gauge)
                self._advance_schedules()
                stats = gauge and gauge.summary(self.image)
                yield Progress(self.sizes, self.size_index, step, self.options.num_steps, self.image, self.mean, stats)
            if self.size_index + 1 == len(self.sizes):
                return
            self.size_index, self.step = self.size_index + 1, 0

    def _begin_size(self):
        """Brings the picture to its next size and starts caches and schedules over."""
        size, options = self.sizes[self.size_index], self.options
        if self.image is not None:
            self.image = from_uint8(resize(to_uint8(self.image, self.mean), size), self.mean)
        elif self.picture is not None:
            self.image = self.start.copy()
        else:
            self.image = noise(size, options.initialization_scale, options.initialization_blur, self.mean, options.seed)
        self.caches = np.zeros((len(all_tiles(size, self.workers.tile_size)), 3, *self.workers.tile_size))
        self.learning_rate, self.tv_reg = options.learning_rate, options.tv_reg

    def _lay_out(self):
        """Makes what a size takes besides: its tiles {region: place in caches}, start picture, how many tiles cover a pixel."""
        size, tile_size = self.sizes[self.size_index], self.workers.tile_size
        self.tiles = {region: place for place, region in enumerate(all_tiles(size, tile_size))}
        self.start = None
        if self.picture is not None:
            self.start = from_uint8(resize(self.picture, size, bilinear=True), self.mean)
        self.counts = tile_counts(size, tile_size) if self.options.use_pixel_learning_rates else None

    def _update_tile(self, region, receive, gauge):
        """Regularizes one tile's gradient, which `receive` gives, and takes its RMSProp step.

        One channel at a time: they do not meet here, and the arrays of one stay in the processor's cache. While the network
        is at the tile, the regularizers' part is done.
        """
        y0, y1, x0, x1 = region
        planes = [np.s_[:, channel : channel + 1, y0:y1, x0:x1] for channel in range(3)]
        regularizers = [self._regularizers(plane, gauge) for plane in planes]
        gradients, value = receive()
        if gauge is not None:
            gauge.add_tile(value)
        cache = self.caches[self.tiles[region]]
        for channel, (plane, parts) in enumerate(zip(planes, regularizers)):
            gradient = gradients[np.newaxis, channel : channel + 1].astype(np.float64)
            if gauge is not None:
                gauge.add_means(cnn_gradient=gradient)
            for part in parts:
                gradient += part
            step = rmsprop(gradient, cache[np.newaxis, channel : channel + 1], self.options.decay_rate, self.learning_rate)
            overflow = not math.isfinite(step.sum() + cache[channel].sum())
            if self.counts is not None:
                step /= self.counts[y0:y1, x0:x1]
            if gauge is not None:
                gauge.add_means(step_size=step, value=self.image[plane])
            if overflow:
                raise NotFinite(
                    f"step {self.step + 1} at size {self.size_index + 1} is no longer finite; lower --learning_rate, the weights "
                    "(--l1_weight, --l2_weight, --p_reg, --p_reg_aux, --tv_reg) or the exponents (--alpha, --alpha_aux, --beta)"
                )
            self.image[plane] += step

    def _regularizers(self, place, gauge):
        """The gradients of the regularizers that have a weight, by one channel of a tile, in the original's order."""
        o, parts = self.options, {}
        plane = self.image[place]
        pulled = plane if self.start is None else plane - self.start[place]
        if o.p_reg:
            parts["p"] = p_norm_gradient(pulled, o.alpha, o.p_scale, o.p_reg)
        if o.p_reg_aux:
            parts["aux"] = p_norm_gradient(plane, o.alpha_aux, o.p_scale_aux, o.p_reg_aux)
        if self.tv_reg:
            parts["tv"] = tv_gradient(plane, o.beta, o.tv_grad_operator, o.tv_reg_scale, self.tv_reg)
        if gauge is not None:
            gauge.add_means(**{f"{name}_gradient": part for name, part in parts.items()})
            gauge.add_losses(
                p=o.p_reg and o.p_reg * p_norm_loss(pulled, o.alpha, o.p_scale),
                aux=o.p_reg_aux and o.p_reg_aux * p_norm_loss(plane, o.alpha_aux, o.p_scale_aux),
                tv=self.tv_reg and self.tv_reg * tv_loss(plane, o.beta, o.tv_grad_operator, o.tv_reg_scale),
            )
        return parts.values()

    def _advance_schedules(self):
        """Counts a step. Both schedules count those at this size."""
        self.step += 1
        if self.step % self.options.learning_rate_decay_iter == 0:
            self.learning_rate *= self.options.learning_rate_decay_fraction
        if self.step % self.options.tv_reg_step_iter == 0:
            self.tv_reg += self.options.tv_reg_step

    def is_done(self):
        """Whether no step is left."""
        return self.size_index + 1 == len(self.sizes) and self.step == self.options.num_steps

    def state(self):
        """All that the next step depends on besides options, picture and network: ({name: number}, {name: array})."""
        numbers = {name: getattr(self, name) for name in ("size_index", "step", "learning_rate", "tv_reg")}
        return numbers, {"image": self.image, "caches": self.caches}

    def restore(self, numbers, arrays):
        """Goes on from a `state`. Raises ValueError where it is none of such a run."""
        size_index, step = numbers["size_index"], numbers["step"]
        if not (
            type(size_index) is type(step) is int and 0 <= size_index < len(self.sizes) and 1 <= step <= self.options.num_steps
        ):
            raise ValueError("its step is none of the run")
        size, tile_size = self.sizes[size_index], self.workers.tile_size
        shapes = {"image": (1, 3, *size), "caches": (len(all_tiles(size, tile_size)), 3, *tile_size)}
        for name, shape in shapes.items():
            if arrays[name].shape != shape or arrays[name].dtype != np.float64 or not np.isfinite(arrays[name].sum()):
                raise ValueError(f"its {name} does not fit the run")
            setattr(self, name, arrays[name])
        self.size_index, self.step = size_index, step
        self.learning_rate, self.tv_reg = float(numbers["learning_rate"]), float(numbers["tv_reg"])


def keep_freed_memory():
    """Has glibc keep what this process frees (up to 64 MB) for what it takes next. A tile's arrays come and go at every step;
    by default each is given back to the system and taken again page by page, which doubles the time of the maths."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 64 << 20)  # M_TRIM_THRESHOLD


##########################################################################################################################
# Above is cnn-vis. Below is what carries it: options, networks, processes, files, the command line.
##########################################################################################################################


# ---- Options -----------------------------------------------------------------------------------------------------------

BEHAVIORS = ("print", "save", "show", "plot_pix", "plot", "gif", "none")


def number(kind, low=None, high=None, above=None):
    """A type for argparse: an int or float between bounds; `above` is an open lower bound."""

    def parse(text):
        value = kind(text)
        if kind is int and abs(value) > 10**15:
            raise argparse.ArgumentTypeError(f"{text[:30]} is out of range; give a smaller number")
        if not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text} is not a finite number")
        if low is not None and value < low or above is not None and value <= above or high is not None and value > high:
            bounds = [f"at least {low}" if low is not None else None, f"more than {above}" if above is not None else None]
            bounds.append(f"at most {high}" if high is not None else None)
            raise argparse.ArgumentTypeError(f"{text} is out of range; it must be {' and '.join(filter(None, bounds))}")
        return value

    parse.__name__ = "whole number" if kind is int else "number"
    return parse


def given(text):
    """A type for argparse: anything but nothing, which an unset variable of a shell script gives."""
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r} is no name; give one, or leave the option out")
    return text


def file_name(text):
    """A type for argparse: a file name, with ~ and variables expanded."""
    return os.path.expanduser(os.path.expandvars(given(text)))


def gpu_numbers(text):
    """A type for argparse: GPUs as a list, [] for the CPU."""
    words = text.split(",")
    if all(re.fullmatch(r"[0-9]{1,9}", word) for word in words) and len(set(map(int, words))) == len(words):
        return list(map(int, words))
    if re.fullmatch(r"-[0-9]+", text):
        return []
    raise argparse.ArgumentTypeError(f"{text!r}: give different GPUs, as 0,1, or -1 alone for the CPU")


def behaviors(text):
    """A type for argparse: words of BEHAVIORS joined by +, as a set."""
    words = set(text.split("+"))
    if not words <= set(BEHAVIORS):
        raise argparse.ArgumentTypeError(f"{text!r}: choose from {', '.join(BEHAVIORS)}, joined by +")
    if "none" in words and len(words) > 1:
        raise argparse.ArgumentTypeError(f"{text!r}: none stands alone")
    return words - {"none"}


def colour(text):
    """A type for argparse: a colour that PIL knows."""
    from PIL import ImageColor

    try:
        ImageColor.getrgb(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no colour; give a name or #rrggbb, as black or #808080") from None
    return text


class Parser(argparse.ArgumentParser):
    """argparse with dashes for underscores in option names, negative numbers like -1e-4, and errors in one line."""

    def __init__(self, *arguments, **more):
        super().__init__(*arguments, **more)
        self._negative_number_matcher = re.compile(r"^-(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$")

    def parse_known_args(self, args=None, namespace=None):
        def underscored(arg):
            name, equals, value = arg.partition("=")
            if value == "--" and name.startswith("--"):  # which some versions of argparse take for no value at all
                self.error(f"{name}: -- is no value")
            return name.replace("-", "_").replace("__", "--", 1) + equals + value if arg.startswith("--") else arg

        return super().parse_known_args([underscored(a) for a in (sys.argv[1:] if args is None else args)], namespace)

    def error(self, message):
        raise BadRequest(f"{message.removeprefix('argument ')}; see --help")


class HelpFormatter(argparse.HelpFormatter):
    """Adds an option's default to its help where there is one and the text does not tell it."""

    def _get_help_string(self, action):
        has_default = not any(action.default is none for none in (None, False, argparse.SUPPRESS))
        return f"{action.help} (default: %(default)s)" if has_default else action.help


def build_parser():
    """The options: the original's names first, then the other names that its README used."""
    parser = Parser(
        prog="cnn_vis.py",
        description="Inceptionism pictures on real Caffe: amplifies what one layer of a network sees in a picture, or in noise.",
        epilog="Names may be written with dashes. Sizes are height x width in pixels, HxW, or the longer side alone, or xF times "
        "the base size (the start picture's, or the network's input for noise); no side is below the network's input.",
        formatter_class=HelpFormatter,
    )
    # fmt: off
    parser.add_argument("--version", action="version", version=f"cnn_vis.py {__version__}")

    group = parser.add_argument_group("network")
    add = group.add_argument
    add("--model", choices=tuple(MODELS), help="network to use; its weights are looked for in "
        "$CAFFE_ROOT, then in $CNN_VIS_MODELS or ~/.cache/cnn-vis (default: bvlc_googlenet if installed, else googlenet_mini)")
    add("--list_models", action="store_true", help="list these networks, and which are installed, and stop")
    add("--list_layers", action="store_true", help="list the layers of the network that can be amplified, and stop")
    add("--download_model", metavar="NAME", choices=tuple(m.name for m in MODELS.values() if m.url),
        help="download a network (%(choices)s), check it, and stop")
    add("--model_url", metavar="URL", type=given, help="where to download it from (default: the official place)")
    add("--deploy_txt", metavar="FILE", type=file_name, help="network description (default: the model's)")
    add("--caffe_model", metavar="FILE", type=file_name, help="the network's weights (default: the model's)")
    add("--mean_image", metavar="FILE", type=file_name,
        help="mean image (.npy), whose mean is taken off every pixel (default: the model's)")
    add("--gpu", metavar="N", type=gpu_numbers, help="GPU to run on, counted from 0, or several: 0,1,2; negative: CPU "
        "(default: GPU 0 where Caffe can use one, else CPU)")
    add("--batch_size", metavar="N", type=number(int, 1), help="tiles that go to a GPU at once; on the CPU they go one by "
        "one (default: what the GPU's memory holds)")
    add("--workers", metavar="N", type=number(int, 1, 1024), help="processes that compute on the CPU (default: one for each "
        "core)")

    group = parser.add_argument_group("what is amplified")
    add = group.add_argument
    add("--image_type", choices=("amplify_layer", "amplify_neuron"), default="amplify_layer",
        help="everything that the layer sees, or one channel of it")
    add("--target_layer", "--layer", metavar="NAME", default="inception_4d/3x3_reduce", help="layer to amplify")
    add("--target_neuron", metavar="N", type=number(int, 0), default=0, help="channel for amplify_neuron, counted from 0")
    add("--amplify_l1_weight", "--l1_weight", metavar="W", type=number(float), default=1.0,
        help="for amplify_layer: weight of the absolute activations in the target's gradient")
    add("--amplify_l2_weight", "--l2_weight", metavar="W", type=number(float), default=1.0,
        help="for amplify_layer: weight of the activations, clipped, in the target's gradient")
    add("--amplify_grad_clip", "--grad_clip", metavar="A", type=number(float, 0), default=5.0,
        help="for amplify_layer: activation at which the l2 part is clipped")

    group = parser.add_argument_group("start picture")
    add = group.add_argument
    add("--initial_image", "--image", metavar="FILE", type=file_name, help="picture to start from (default: noise)")
    add("--background", metavar="COLOUR", type=colour, default="white", help="what shows where the picture is transparent: "
        "a name or #rrggbb")
    add("--initialization_scale", metavar="S", type=number(float), default=1.0, help="noise: standard deviation in grey levels")
    add("--initialization_blur", metavar="S", type=number(float, 0, 1000), default=0.0, help="noise: sigma of a blur in pixels")
    add("--seed", metavar="N", type=number(int, 0, 2**32 - 1), help="noise: makes it the same every time (default: drawn, "
        "and told)")

    group = parser.add_argument_group("sizes")
    add = group.add_argument
    add("--initial_size", metavar="SIZE", help="first size: HxW, the longer side, or xF (default: the base size)")
    add("--final_size", metavar="SIZE", help="last size, where there are several (default: the base size)")
    add("--num_sizes", metavar="N", type=number(int, 1, 10_000), default=1, help="number of sizes; 1: only the first")
    add("--resize_type", choices=("geometric", "linear"), default="geometric", help="how the sizes between are spaced")

    group = parser.add_argument_group("steps")
    add = group.add_argument
    add("--num_steps", metavar="N", type=number(int, 1), default=1000, help="steps at each size")
    add("--learning_rate", metavar="R", type=number(float, above=0), default=1.0, help="step size, about in grey levels")
    add("--decay_rate", metavar="D", type=number(float, 0, 1), default=0.95, help="of RMSProp's running mean square")
    add("--learning_rate_decay_iter", metavar="N", type=number(int, 1), default=100,
        help="steps after which the learning rate is multiplied by the fraction below")
    add("--learning_rate_decay_fraction", "--learning_rate_decay_factor", metavar="F", type=number(float, above=0), default=1.0,
        help="factor of the learning rate; 1: it stays")
    add("--use_pixel_learning_rates", action="store_true", help="divide each pixel's steps by the number of tiles that cover it")

    group = parser.add_argument_group("regularizers", "keep the picture smooth and its values in range")
    add = group.add_argument
    add("--alpha", metavar="P", type=number(float, 1), default=6.0,
        help="exponent of the p-norm, of the difference from the start picture where there is one")
    add("--p_scale", metavar="S", type=number(float, above=0), default=1.0, help="the p-norm's unit, in grey levels")
    add("--p_reg", metavar="W", type=number(float), default=1e-4, help="weight of the p-norm; 0: none")
    add("--alpha_aux", metavar="P", type=number(float, 1), default=6.0, help="exponent of the p-norm of the picture itself")
    add("--p_scale_aux", metavar="S", type=number(float, above=0), default=1.0, help="its unit, in grey levels")
    add("--p_reg_aux", metavar="W", type=number(float), default=0.0, help="its weight; 0: none")
    add("--beta", metavar="B", type=number(float, above=0), default=2.0, help="exponent of total variation")
    add("--tv_reg", metavar="W", type=number(float), default=0.5, help="weight of total variation; 0: none")
    add("--tv_reg_scale", metavar="S", type=number(float, above=0), default=1.0, help="its unit, in grey levels")
    add("--tv_reg_step", metavar="W", type=number(float), default=0.0, help="what is added to its weight from time to time")
    add("--tv_reg_step_iter", metavar="N", type=number(int, 1), default=50, help="steps after which it is added")
    add("--tv_grad_operator", choices=tuple(TV_OPERATORS), default="naive", help="how slopes are measured")

    group = parser.add_argument_group("output")
    add = group.add_argument
    add("--output_file", "--output", metavar="FILE", type=file_name, default="out.png", help="the finished picture")
    add("--output_iter", metavar="N", type=number(int, 1), default=50, help="steps after which iter_behavior is done")
    add("--iter_behavior", metavar="WORDS", type=behaviors, default="save+print",
        help=f"what is done: {', '.join(BEHAVIORS)}, joined by +; save writes NAME_SIZE_STEP.EXT beside the output, plot "
        "NAME_plot.png, gif NAME_run.gif; show and plot_pix without a display NAME_show.png and NAME_plot_pix.png")
    add("--stats", metavar="FILE", type=file_name, help="measure every step, and write the figures as CSV")
    add("--sidecar", action="store_true", help="write OUTPUT.json, which tells how the picture was made; a PNG carries it inside")
    add("--reproduce", metavar="FILE", type=file_name, help="print the command that made a picture, and stop")
    add("--checkpoint_iter", metavar="N", type=number(int, 0), help="steps after which OUTPUT.checkpoint is written, for "
        "--resume; it is removed at the end; 0: never (default: as output_iter, but 50 at least)")
    add("--resume", metavar="FILE", type=file_name, help="go on from a checkpoint; the run's options need not be given again")
    add("--quiet", action="store_true", help="no progress bar and no notices")
    add("--show_width", metavar="W", type=number(float, 1, 100), default=5.0, help="of the window of show, in inches")
    add("--show_height", metavar="H", type=number(float, 1, 100), default=5.0, help="of the window of show, in inches")
    add("--rescale_image", action="store_true", help="stretch the pictures saved or shown to the full range, instead of clipping")

    # fmt: on
    return parser


def given_options(argv):
    """The names of the options that a command line gives, whatever their values."""
    parser = build_parser()
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return set(vars(parser.parse_args(argv)))


def without_effect(options):
    """Notices of options that were given and change nothing."""
    o, default = options, vars(build_parser().parse_args([]))
    idle = {
        ("final_size", "resize_type"): o.num_sizes == 1 and "--num_sizes 1",
        ("target_neuron",): o.image_type == "amplify_layer" and "--image_type amplify_layer",
        ("amplify_l1_weight", "amplify_l2_weight", "amplify_grad_clip"):
            o.image_type == "amplify_neuron" and "--image_type amplify_neuron",
        ("initialization_scale", "initialization_blur", "seed"): o.initial_image and "--image",
        ("background",): not o.initial_image and "no --image",
        ("alpha", "p_scale"): not o.p_reg and "--p_reg 0",
        ("alpha_aux", "p_scale_aux"): not o.p_reg_aux and "--p_reg_aux 0",
        ("beta", "tv_reg_scale", "tv_grad_operator"): not (o.tv_reg or o.tv_reg_step) and "--tv_reg 0",
        ("tv_reg_step_iter",): not o.tv_reg_step and "--tv_reg_step 0",
        ("tv_reg_step",): o.tv_reg_step_iter >= o.num_steps
            and f"--num_steps {o.num_steps} and --tv_reg_step_iter {o.tv_reg_step_iter}",
        ("learning_rate_decay_iter",): o.learning_rate_decay_fraction == 1 and "--learning_rate_decay_fraction 1",
        ("learning_rate_decay_fraction",): o.learning_rate_decay_iter >= o.num_steps
            and f"--num_steps {o.num_steps} and --learning_rate_decay_iter {o.learning_rate_decay_iter}",
        ("output_iter",): o.output_iter > o.num_steps and f"--num_steps {o.num_steps}",
        ("iter_behavior",): o.output_iter > o.num_steps and o.iter_behavior and not o.iter_behavior & {"plot", "gif"}
            and f"--num_steps {o.num_steps} and --output_iter {o.output_iter}",
        ("show_width", "show_height"): "show" not in o.iter_behavior and "no show in --iter_behavior",
        ("model_url",): not o.download_model and "no --download_model",
        ("workers",): o.gpu and "--gpu",
        ("model",): o.deploy_txt and o.caffe_model and o.mean_image and "all three files given",
    }  # fmt: skip
    for names, reason in idle.items():
        for name in names:
            if not reason or getattr(o, name) == default[name]:
                continue
            yield f"--{name} has no effect with {reason}"


def command_words(options, portable=False):
    """The options that differ from their defaults, as words of a command line; with `portable` files can be found from any
    folder, and the output is left out."""
    parser, words = build_parser(), []
    default = vars(parser.parse_args([]))
    for action in parser._actions:
        value = getattr(options, action.dest, None)
        if (
            value == default.get(action.dest)
            or value is None
            or action.dest in ("resume", "quiet")
            or (portable and action.dest == "output_file")
        ):
            continue
        if action.nargs == 0:
            words.append(action.option_strings[0])
            continue
        if action.dest == "iter_behavior":
            value = "+".join(sorted(value)) or "none"
        elif action.dest == "gpu":
            value = ",".join(map(str, value)) or "-1"
        elif portable and action.dest in ("deploy_txt", "caffe_model", "mean_image", "initial_image", "stats"):
            value = os.path.abspath(value)
        words.append(f"{action.option_strings[0]}={value}")
    return words


# Options that a resumed run may change, since the picture does not depend on them; the network's files are compared by hash.
FREE_OPTIONS = {
    "model", "deploy_txt", "caffe_model", "mean_image", "gpu", "batch_size", "workers", "output_file", "output_iter",
    "iter_behavior", "stats", "sidecar", "checkpoint_iter", "resume", "quiet", "show_width", "show_height", "list_models",
    "list_layers", "download_model", "model_url", "reproduce",
}  # fmt: skip


# ---- Networks by name --------------------------------------------------------------------------------------------------

HERE = os.path.dirname(os.path.abspath(__file__))
ILSVRC_MEAN = "imagenet/ilsvrc_2012_mean.npy"
GOOGLENET_DEPLOY = "models/bvlc_googlenet/deploy.prototxt"


@dataclasses.dataclass(frozen=True)
class Model:
    """A network known by name.

    `mean` is taken off its input; None: the mean of Caffe's ilsvrc mean image. `url` is where the weights are to be had, or
    an archive with a file `member` in it; `hashes` ("sha1:..." or "sha256:...") are those of the right weights.
    """

    name: str
    url: str | None = None
    hashes: tuple = ()
    mean: float | None = None
    member: str | None = None
    other_weights: tuple = ()  # where else they may lie below $CAFFE_ROOT

    def weights_places(self):
        """The paths at which the weights may lie, the first one that exists to be used."""
        below = f"{self.name}/{self.name}.caffemodel"
        root = os.environ.get("CAFFE_ROOT")
        places = [os.path.join(root, "models", path) for path in (below, *self.other_weights)] if root else []
        return [*places, self.cache_place(), os.path.join(HERE, "models", below)]

    def cache_place(self):
        """The path to which the weights are downloaded."""
        return os.path.join(cache_folder(), self.name, f"{self.name}.caffemodel")

    def find_weights(self):
        """The path of the weights, or None where they are not installed."""
        return next(filter(os.path.isfile, self.weights_places()), None)

    def find_deploy(self):
        """The path of the network's description, or None. One prototxt serves every full GoogLeNet."""
        own = os.path.join(HERE, "models", self.name, "deploy.prototxt")
        return own if os.path.isfile(own) else find_in_caffe(GOOGLENET_DEPLOY, GOOGLENET_DEPLOY)


MODELS = {
    model.name: model
    for model in (
        Model("googlenet_mini", hashes=("sha256:1ec4ffee98d64fdbb37cc2419d447d463d116bb353d544e9418c65e7d20521c4",)),
        Model("bvlc_googlenet", "http://dl.caffe.berkeleyvision.org/bvlc_googlenet.caffemodel",
              ("sha1:405fc5acd08a3bb12de8ee5e23a96bec22f08204",)),
        # The published sha1 of Places205 does not say whether it is the archive's or the weights'. If the archive's, the weights
        # do not match it, and count as "structure checked".
        Model("googlenet_places205", "http://places.csail.mit.edu/model/googlenet_places205.tar.gz",
              ("sha1:d767debf686fa15df1e05fbc9b4598076127134a",), mean=np.mean([105.417, 113.753, 116.047]),
              member="googlelet_places205_train_iter_2400000.caffemodel",
              other_weights=("googlenet_places/googlelet_places205_train_iter_2400000.caffemodel",)),
        Model("googlenet_places365", "http://places2.csail.mit.edu/models_places365/googlenet_places365.caffemodel",
              mean=np.mean([104.051, 112.514, 116.676])),
    )
}  # fmt: skip


def cache_folder():
    """Where this user's networks are kept: $CNN_VIS_MODELS, or cnn-vis in the cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.environ.get("CNN_VIS_MODELS") or os.path.join(cache, "cnn-vis")


def find_in_caffe(below_root, below_package):
    """A file of Caffe's: below $CAFFE_ROOT, or else inside the installed Python package. None where there is neither."""
    places = [os.path.join(os.environ["CAFFE_ROOT"], below_root)] if os.environ.get("CAFFE_ROOT") else []
    package = importlib.util.find_spec("caffe")
    if package is not None and package.submodule_search_locations:
        places.append(os.path.join(package.submodule_search_locations[0], below_package))
    return next(filter(os.path.isfile, places), None)


def choose_model(name, given_files):
    """The Model that `name` (or None) stands for. Without a name it is BVLC GoogLeNet, or the small network that comes along
    where BVLC GoogLeNet is not installed and no file (`given_files`) was named in its place."""
    model, small = MODELS[name or "bvlc_googlenet"], MODELS["googlenet_mini"]
    stands_in = name is None and not given_files and model.find_weights() is None and small.find_weights()
    return small if stands_in else model


def stand_in_notices(asked, name):
    """What to tell, as a list, where the network `name` runs and `asked` (or None) was the option."""
    if asked is not None or name != "googlenet_mini":
        return []
    return [
        "BVLC GoogLeNet is not installed: using googlenet_mini, a small imitation. "
        "To get the real one: python cnn_vis.py --download_model bvlc_googlenet"
    ]


def find_file(option, path):
    """`path`, the file that an option names. Raises BadRequest."""
    if not os.path.isfile(path):
        there = "is a folder, not a file" if os.path.isdir(path) else "is no ordinary file"
        reason = there if os.path.exists(path) else "no such file"
        raise BadRequest(f"--{option} {path}: {reason}; give another path")
    return path


def read_mean(path):
    """The mean of the mean image (.npy), in the file's own dtype. Raises BadRequest."""
    try:
        array = np.load(path, allow_pickle=False)
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu" or not array.size:
            raise ValueError("it holds no numbers")
        mean = float(array.mean())
    except Exception as error:  # anything can call itself .npy
        raise BadRequest(f"--mean_image {path}: cannot be read as an array ({one_line(error)}); give a .npy file") from None
    if not 0 <= mean <= 255:
        raise BadRequest(f"--mean_image {path}: its mean is {mean:g}, and pictures go from 0 to 255; give another file")
    return mean


def file_hash(path, algorithm):
    """The hash of a file as "algorithm:hex"."""
    digest = hashlib.new(algorithm)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return f"{algorithm}:{digest.hexdigest()}"


def has_known_hash(path, model):
    """Whether the file is one of those that the model's hashes tell."""
    return any(file_hash(path, known.partition(":")[0]) == known for known in model.hashes)


def standing(path, model):
    """How far the weights `path` can be trusted to be the model's, in a few words."""
    if has_known_hash(path, model):
        return "verified"
    with contextlib.suppress(OSError), open(f"{path}.checked") as file:
        remembered = file.read().strip()
        return "structure checked" if file_hash(path, "sha256") == remembered else "changed since it was downloaded"
    return "not verified"


TIMEOUT = 30  # seconds without a word from the server


def fetch(url, path):
    """Downloads `url` to `path`, with a progress bar. Raises RunFailed."""
    import pooch
    import requests

    folder, name = os.path.split(path)
    pooch.get_logger().setLevel("WARNING")
    downloader = pooch.HTTPDownloader(progressbar=sys.stderr.isatty(), chunk_size=1 << 16, timeout=TIMEOUT)
    try:
        pooch.retrieve(url, known_hash=None, fname=name, path=folder, downloader=downloader)
    except requests.exceptions.HTTPError as error:
        raise RunFailed(f"{url}: the server says {error.response.status_code} {error.response.reason}; try --model_url") from None
    except requests.exceptions.Timeout:
        raise RunFailed(f"{url}: no word from the server for {TIMEOUT} seconds; try again, or --model_url") from None
    except requests.exceptions.ChunkedEncodingError:
        raise RunFailed(f"{url}: the download broke off; try again") from None
    except requests.exceptions.ConnectionError:
        raise RunFailed(f"{url}: no connection; is this machine online? A mirror can be named with --model_url") from None
    except (requests.exceptions.RequestException, ValueError) as error:
        raise RunFailed(f"{url}: cannot be downloaded ({one_line(error)})") from None


def unpack(archive, member, path):
    """Writes the one file called `member`, in whatever folder of the tar archive, to `path`. Raises RunFailed."""
    import tarfile

    try:
        with tarfile.open(archive) as tar:
            found = next((item for item in tar if item.isfile() and os.path.basename(item.name) == member), None)
            if found is None:
                raise RunFailed(f"the archive holds no {member}")
            with tar.extractfile(found) as source, open(path, "wb") as target:
                shutil.copyfileobj(source, target)
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise RunFailed(f"the archive cannot be read ({one_line(error)})") from None


def download(model, url, check_structure):
    """Downloads the model's weights to where they are looked for. Nothing lies there before it is known to be right: by its
    hash, or else because check_structure(path), which returns what is wrong or None, finds nothing. Raises RunFailed."""
    place = model.cache_place()
    folder = os.path.dirname(place)
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as temporary:
            fetched = weights = os.path.join(temporary, "fetched")
            fetch(url, fetched)
            with open(fetched, "rb") as file:
                start = file.read(512).lstrip().lower()
            if start.startswith((b"<!doctype", b"<html", b"<?xml")):
                raise RunFailed(f"{url}: a web page came instead of the network; is there a login page on this connection?")
            if model.member is not None:
                weights = os.path.join(temporary, "weights")
                try:
                    unpack(fetched, model.member, weights)
                except RunFailed as error:
                    raise RunFailed(f"{url}: {error}; try again, or --model_url") from None
            verified = has_known_hash(weights, model)
            if model.member is None and model.hashes and not verified:
                raise RunFailed(f"{url}: not the right file: its {file_hash(fetched, 'sha1')} is not {model.hashes[0]}; removed")
            if not verified:
                error = check_structure(weights)
                if error is not None:
                    raise RunFailed(f"{url}: not a {model.name}: {error}; removed")
                with open(f"{weights}.checked", "w") as file:
                    file.write(f"{file_hash(weights, 'sha256')}\n")
                os.replace(f"{weights}.checked", f"{place}.checked")
            os.replace(weights, place)
    except OSError as error:
        raise RunFailed(
            f"{folder}: {error.strerror or error}; free some space, or name another folder in CNN_VIS_MODELS"
        ) from None


# ---- The network -------------------------------------------------------------------------------------------------------
# Runs in the workers only, so that Caffe, which ends its process at any error, never ends the program.


@dataclasses.dataclass(frozen=True)
class NetworkSpec:
    """All that a worker needs to load the network. Paths are strings, as Caffe wants them."""

    deploy: str
    weights: str
    target: str
    objective: Objective
    fit_classifier: bool = False  # whether the classifier takes its width from the weights
    use_gpu: bool = False


@contextlib.contextmanager
def stand_ins(*names):
    """Within, those of the modules `names` that were not imported yet are empty ones, which have any name asked of them."""
    names = [name for name in names if name not in sys.modules]
    for name in names:
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__getattr__ = lambda _: None
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


def import_caffe():
    """Caffe, quiet, from the Python path or else from $CAFFE_ROOT/python. Raises BadRequest."""
    os.environ.setdefault("GLOG_minloglevel", "2")
    try:
        # What only caffe.io uses, to read pictures, would be the half of a worker's start.
        with stand_ins("skimage", "skimage.io", "skimage.transform", "scipy", "scipy.ndimage"):
            import caffe
    except Exception as error:  # somebody's own may fail in any way
        root = os.environ.get("CAFFE_ROOT")
        if not root or (path := os.path.join(root, "python")) in sys.path:
            raise BadRequest(f"Caffe cannot be imported ({one_line(error)}); install it with: pip install ./pycaffe") from None
        sys.path.append(path)
        return import_caffe()
    return caffe


@contextlib.contextmanager
def caffe_net(net):
    """The NetParameter as a caffe.Net in TEST phase, without weights."""
    caffe = import_caffe()
    with tempfile.TemporaryFile("w+") as file:  # has no name, so none is left when Caffe ends the process
        file.write(str(net))
        file.seek(0)
        yield caffe.Net(f"/dev/fd/{file.fileno()}", caffe.TEST)


def read_prototxt(path):
    """The prototxt `path` as a caffe_pb2.NetParameter. Raises BadRequest."""
    import_caffe()
    from caffe.proto import caffe_pb2
    from google.protobuf import text_format

    try:
        with open(path, encoding="utf-8") as file:
            net = text_format.Parse(file.read(), caffe_pb2.NetParameter())
    except (OSError, UnicodeDecodeError, text_format.ParseError) as error:
        raise BadRequest(f"--deploy_txt {path}: not a network description ({one_line(error)}); give a deploy.prototxt") from None
    return upgraded(net) if net.layers else net


def upgraded(net):
    """A NetParameter of the older format (V1, `layers`) in the newer one: Caffe upgrades what it loads, and saves it so."""
    from caffe.proto import caffe_pb2

    with caffe_net(net) as loaded, tempfile.NamedTemporaryFile() as file:
        loaded.save(file.name)
        new = caffe_pb2.NetParameter.FromString(file.read())
    for layer in new.layer:
        del layer.blobs[:]
    return new


def read_weights(path):
    """The layers of the caffemodel `path` as {name: shapes of its blobs}. Raises BadRequest."""
    import_caffe()
    from caffe.proto import caffe_pb2
    from google.protobuf.message import DecodeError

    try:
        with open(path, "rb") as file:
            net = caffe_pb2.NetParameter.FromString(file.read())
    except (OSError, DecodeError) as error:
        raise BadRequest(f"--caffe_model {path}: cannot be read as Caffe weights ({one_line(error)})") from None
    return {layer.name: [blob_shape(blob) for blob in layer.blobs] for layer in (net.layer or net.layers)}


def blob_shape(blob):
    """A BlobProto's shape; in the older format it has leading ones, up to four axes."""
    return tuple(blob.shape.dim) or (blob.num, blob.channels, blob.height, blob.width)


def without_leading_ones(shape):
    """The shape, so that it can be compared between the formats."""
    return tuple(itertools.dropwhile(lambda side: side == 1, shape))


def fit_classifier(net, weights):
    """Gives the classifier of the NetParameter `net` the width that `weights` (of read_weights) have: one GoogLeNet
    prototxt serves all data sets. Changes `net` in place."""
    for layer in net.layer:
        if layer.type == "InnerProduct" and weights.get(layer.name) and len(weights[layer.name][0]) > 1:
            layer.inner_product_param.num_output = weights[layer.name][0][-2]


def structure_error(deploy, path):
    """What is wrong with the weights `path` for the network `deploy`, in one line, or None: every layer must have its
    blobs, of its shapes. Caffe has then read the file too."""
    try:
        weights = read_weights(path)
    except BadRequest:
        return "it cannot be read as Caffe weights"
    net = read_prototxt(deploy)
    fit_classifier(net, weights)
    with caffe_net(net) as loaded:
        for name, blobs in loaded.params.items():
            expected, found = [tuple(blob.shape) for blob in blobs], weights.get(name, [])
            if list(map(without_leading_ones, found)) != list(map(without_leading_ones, expected)):
                return f"layer {name} has weights of shape {found or None}, not {expected}"
        loaded.copy_from(path)
    return None


def runs_in_test(layer):
    """Whether Caffe keeps this LayerParameter in its TEST phase, at level 0 and without stages."""
    from caffe import TEST

    def is_met(rule):
        phase = not rule.HasField("phase") or rule.phase == TEST
        level = not rule.HasField("min_level") or rule.min_level <= 0
        level = level and (not rule.HasField("max_level") or rule.max_level >= 0)
        return phase and level and not rule.stage

    return any(map(is_met, layer.include)) if layer.include else not any(map(is_met, layer.exclude))


def targets(net):
    """The layers of a caffe_pb2.NetParameter that can be amplified: those with a blob of their own name, in order."""
    return [layer.name for layer in net.layer if layer.name in layer.top and layer.bottom and runs_in_test(layer)]


def layer_shapes(deploy, weights):
    """[(name, shape of one tile's activations), ...] of all layers of `deploy` that can be targets. With `weights` (a path or
    None) the classifier has their width."""
    net = read_prototxt(deploy)
    if weights is not None:
        fit_classifier(net, read_weights(weights))
    with caffe_net(net) as loaded:
        shapes = [(name, tuple(loaded.blobs[name].shape)) for name in targets(net)]
    return [(name, shape[1:]) for name, shape in shapes if len(shape) > 1]


def cut(net, target, blob_counts):
    """Cuts the NetParameter `net` down to what the gradient of `target` by the input takes; changes it in place.

    Kept are the target's ancestors and the layers that work in place on it. Caffe's force_backward would also compute the
    gradient of every weight. Instead one weight only is left to learn, the first layer's bias: then Caffe runs backward
    from a loss (put on the last writer of the target) down to that layer, and propagate_down takes it on to the input.
    Where that cannot be had (a first layer without bias, several of them) force_backward does the same slowly.
    `blob_counts` is {layer name: number of its weight blobs}. Raises BadRequest where the input is no ancestor.
    """
    kept, needed = [], {target}
    for layer in reversed(net.layer):
        if runs_in_test(layer) and not needed.isdisjoint(layer.top):
            kept.insert(0, layer)
            needed.update(layer.bottom)
    inputs = set(net.input).union(*(layer.top for layer in kept if layer.type == "Input"))
    first = [layer for layer in kept if not inputs.isdisjoint(layer.bottom)]
    if not first:
        raise BadRequest(f"--layer {target}: does not depend on the picture; choose another of --list_layers")
    has_bias = len(first) == 1 and blob_counts.get(first[0].name, 0) == 2 and first[0].type in ("Convolution", "InnerProduct")
    net.force_backward = not has_bias
    if has_bias:
        for layer in kept:
            while len(layer.param) < blob_counts.get(layer.name, 0):
                layer.param.add()
            for param in layer.param:
                param.lr_mult = 0
        first[0].param[1].lr_mult = 1
        first[0].propagate_down[:] = [True]
        kept[-1].loss_weight[:] = [1.0 if top == target else 0.0 for top in kept[-1].top]
    names = {layer.name for layer in kept}
    for index in reversed(range(len(net.layer))):
        if net.layer[index].name not in names or not runs_in_test(net.layer[index]):
            del net.layer[index]


# Layers of this program's build of Caffe that compute what Caffe's own do, but for rounding, in less time.
FAST_LAYERS = {"Convolution": "WinogradConvolution", "LRN": "FastLRN", "Pooling": "MaxPooling"}


def use_fast_layers(net):
    """Changes the NetParameter `net` to use those of FAST_LAYERS that this Caffe has."""
    known = set(import_caffe().layer_type_list())
    for layer in net.layer:
        if FAST_LAYERS.get(layer.type) in known:
            layer.type = FAST_LAYERS[layer.type]


class Network:
    """A Caffe net from its input to the target layer. Raises BadRequest where `spec` cannot be loaded.

    Attributes: tile_size, (height, width) of the input; target_shape, of one tile's activations, as (C, ...).
    """

    def __init__(self, spec):
        # One BLAS thread: processes scale where threads hardly do, and sums then come out the same however many workers run.
        os.environ.update(OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
        caffe = import_caffe()
        if spec.use_gpu:
            caffe.set_mode_gpu()
            caffe.set_device(0)  # the only one that this worker sees
        else:
            caffe.set_mode_cpu()
        weights = read_weights(spec.weights)
        net = read_prototxt(spec.deploy)
        if spec.fit_classifier:
            fit_classifier(net, weights)
        self._check(spec, net, weights)
        cut(net, spec.target, {name: len(shapes) for name, shapes in weights.items()})
        use_fast_layers(net)
        with caffe_net(net) as self._net:
            self._net.copy_from(spec.weights)
        self._spec = spec
        self._input = self._net.blobs["data" if "data" in self._net.inputs else next(iter(self._net.inputs))]
        shape = tuple(self._input.shape)
        if len(shape) != 4 or shape[1] != 3:
            raise BadRequest(f"--deploy_txt {spec.deploy}: its input has shape {shape}; it must take 3-channel pictures")
        self.tile_size = shape[2:]
        self.target_shape = tuple(self._net.blobs[spec.target].shape)[1:]
        if not self.target_shape:
            raise BadRequest(f"--layer {spec.target}: is one number, without channels; choose another of --list_layers")
        if spec.objective.neuron is not None and spec.objective.neuron >= self.target_shape[0]:
            raise BadRequest(
                f"--target_neuron {spec.objective.neuron}: {spec.target} has {self.target_shape[0]} channels, counted from 0"
            )

    @staticmethod
    def _check(spec, net, weights):
        names = targets(net)
        if spec.target not in names:
            if not names:
                raise BadRequest(f"--deploy_txt {spec.deploy}: has no layer that can be amplified; give a deploy.prototxt")
            close = difflib.get_close_matches(spec.target, names, n=3, cutoff=0.4)
            hint = f"did you mean {' or '.join(close)}?" if close else f"choose one of {', '.join(names)}"
            raise BadRequest(f"--layer {spec.target}: {spec.deploy} has no such layer; {hint}")
        if net.layer and not any(weights.get(layer.name) for layer in net.layer):
            raise BadRequest(f"--caffe_model {spec.weights}: holds weights for none of the layers in {spec.deploy}")

    def batch_for_memory(self):
        """How many tiles at once the free memory of the GPU holds, at most 32; 1 on the CPU, where more bring nothing."""
        if not self._spec.use_gpu:
            return 1
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        ctypes.CDLL("libcuda.so.1").cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total))
        tile = sum(2 * 4 * math.prod(blob.shape) // blob.shape[0] for blob in self._net.blobs.values())  # data and diff
        return min(32, max(1, int(0.7 * free.value) // tile))

    def gradients(self, batch, measure=True):
        """Minus the objective's gradient by the tiles `batch`, float32 (N, 3, H, W); and the objective of each, None unless it is
        to be measured."""
        if tuple(self._input.shape) != batch.shape:
            self._input.reshape(*batch.shape)
            self._net.reshape()
        self._input.data[...] = batch
        self._net.forward()
        blob = self._net.blobs[self._spec.target]
        blob.diff[...] = self._spec.objective.descent(blob.data)
        # From the layer of the target's name: an in-place ReLU after it has shaped the activations but is not passed backward.
        self._net.backward(start=self._spec.target)
        return self._input.diff, [self._spec.objective.value(a) if measure else None for a in blob.data]


# ---- Workers -----------------------------------------------------------------------------------------------------------
# A device is a process with a Caffe of its own. Tiles and gradients travel through one shared memory, cut into slots. It
# has no name, as has the pipe that Caffe's words come through: however a process ends, nothing is left behind.


@functools.cache
def load_network(spec):
    """The worker's network: loaded at its first task, kept for all others."""
    return Network(spec)


def map_memory(pid, descriptor, shape):
    """The shared memory that process `pid` has open as `descriptor`, an array float32 of `shape` (slots, 2, batch, 3, H, W):
    in each slot the tiles and their gradients."""
    with open(f"/proc/{pid}/fd/{descriptor}", "r+b") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), 4 * math.prod(shape)), np.float32).reshape(shape)


attach = functools.cache(map_memory)  # in a worker, which has one memory for life


def describe(spec):
    """Task: (tile_size, target_shape, batch size that suits the device) of the network, after a first trial of it."""
    network = load_network(spec)
    network.gradients(np.zeros((1, 3, *network.tile_size), np.float32))  # takes its memory, and fails now if it ever does
    return network.tile_size, network.target_shape, network.batch_for_memory()


def compute_slot(spec, memory, slot, count, measure):
    """Task: computes the gradients of the slot's first `count` tiles; returns their objectives, None unless it is to `measure`
    them."""
    tiles_in, gradients_out = attach(*memory)[slot, :, :count]
    gradients_out[...], values = load_network(spec).gradients(tiles_in, measure)
    return values


def can_use_gpu():
    """Task: whether this Caffe was built with CUDA, asked of its library: Caffe itself ends the process that asks in vain."""
    import_caffe()
    import caffe._caffe

    return hasattr(ctypes.CDLL(caffe._caffe.__file__), "_ZN5caffe20cublasGetErrorStringE14cublasStatus_t")


def count_gpus():
    """How many GPUs the NVIDIA driver shows this process; 0 without a driver."""
    count = ctypes.c_int(0)
    with contextlib.suppress(OSError):
        driver = ctypes.CDLL("libcuda.so.1")
        if driver.cuInit(0) == 0:
            driver.cuDeviceGetCount(ctypes.byref(count))
    return count.value


def visible_gpu(number):
    """The name for CUDA_VISIBLE_DEVICES of the GPU that is the number-th of those that this process sees."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[number].strip() if visible else str(number)


def cgroup_folders():
    """The folders that tell this process's limits: its control group's (version 2), and those above it."""
    with contextlib.suppress(OSError), open("/proc/self/cgroup") as file:
        path = re.search(r"^0::/(.*)$", file.read(), re.MULTILINE)
        parts = path[1].split("/") if path else []
        for depth in range(len(parts), -1, -1):
            yield os.path.join("/sys/fs/cgroup", *parts[:depth])


def count_cores():
    """How many cores this process may use, by its affinity and its control groups' quotas."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for folder in cgroup_folders():
        with contextlib.suppress(OSError, ValueError), open(f"{folder}/cpu.max") as file:
            quota, period = file.read().split()
            cores = min(cores, max(1, int(quota) // int(period)))
    return cores


def free_memory():
    """How many bytes this process may still take, by the system's account and its control groups'; infinite where none tells."""
    free = [math.inf]
    with contextlib.suppress(OSError), open("/proc/meminfo") as file:
        free += [1024 * int(kilobytes) for kilobytes in re.findall(r"MemAvailable: *(\d+) kB", file.read())]
    for folder in cgroup_folders():
        with contextlib.suppress(OSError, ValueError):
            limit, current, stat = (read_text(f"{folder}/memory.{name}") for name in ("max", "current", "stat"))
            # A file cache counts as taken, and is given back when asked for.
            cached = sum(int(size) for size in re.findall(r"^inactive_file (\d+)", stat, re.MULTILINE))
            free.append(int(limit) - int(current) + cached)
    return max(0, min(free))


def read_text(path):
    """The text of a small file."""
    with open(path) as file:
        return file.read()


@contextlib.contextmanager
def signals_held_back():
    """While processes are started: nothing interrupts that half done here, and they are born with Ctrl-C and the loss of the
    terminal blocked, which are not meant for them."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if threading.current_thread() is threading.main_thread() else ()
    came = []
    before = {number: signal.signal(number, lambda number, _: came.append(number)) for number in numbers}
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGHUP})
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in came:
            signal.raise_signal(number)


def end_with_parent():
    """Ends this process when its parent is gone, however that ended."""
    multiprocessing.parent_process().join()
    os._exit(1)


def start_worker(log, gpus, memory):
    """Makes a fresh process a worker: its output goes to the pipe `log`, Ctrl-C is the parent's, it sees one GPU, and on the
    CPU no file from a stranger makes it take more than `memory` bytes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    if gpus is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus.get()
    elif math.isfinite(memory):
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        limit = int(memory) if hard == resource.RLIM_INFINITY else min(int(memory), hard)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


def caffe_reason(log):
    """Why Caffe ended its process, in one line, from what it wrote; None where it did not end it."""
    if "std::bad_alloc" in log:
        return "there is not enough memory; use smaller sizes, or fewer --workers"
    fatal = re.search(r"^F\d{4,8} [^\]]*\] (.*)", log, re.MULTILINE)
    return fatal and " ".join(fatal[1].split())


class Workers:
    """Processes that compute gradients of tiles; a context manager. One for each GPU in `gpus`, or `number` on the CPU.

    One that is killed from outside is started again, with all the others, and its tiles are computed again.
    """

    MAX_RESTARTS = 3

    def __init__(self, spec=None, number=1, gpus=(), batch_size=None):
        self.number, self.batch_size = len(gpus) or number, batch_size
        self.spec, self.gpus = spec, gpus
        self._context = multiprocessing.get_context("spawn")
        self._log, self._log_end = self._context.Pipe(duplex=False)
        os.set_blocking(self._log_end.fileno(), False)  # what nobody reads must not hold a worker up
        self._memory_file = os.memfd_create("cnn_vis")
        self._restarts = 0
        self._jobs = {}  # slot -> (number of tiles, whether they are measured, future of their objectives)
        self._start()

    def _start(self):
        gpus = self._context.SimpleQueue() if self.gpus else None
        for gpu in self.gpus:
            gpus.put(visible_gpu(gpu))
        arguments = (self._log_end, gpus, free_memory())
        try:
            with signals_held_back():  # its queues start a process that looks after them
                self._executor = concurrent.futures.ProcessPoolExecutor(self.number, self._context, start_worker, arguments)
        except OSError as error:
            raise RunFailed(
                f"workers cannot be started ({error.strerror}); they take a little of /dev/shm, and open files: see ulimit -n"
            ) from None

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if kind is Stopped:  # at once; from Python 3.14 on the executor has kill_workers() for it
            for process in list((self._executor._processes or {}).values()):
                process.kill()
        self._executor.shutdown(cancel_futures=True)
        self._log.close()
        self._log_end.close()
        os.close(self._memory_file)

    def _submit(self, task, *arguments):
        """The future of a task, which may start a process."""
        try:
            with signals_held_back():
                return self._executor.submit(task, *arguments)
        except concurrent.futures.process.BrokenProcessPool as error:  # to be told when the result is asked for
            future = concurrent.futures.Future()
            future.set_exception(error)
            return future

    def _restart(self):
        """After the death of a worker. Raises RunFailed where Caffe chose it, or at one death too many; BadRequest where it did
        so for want of a gradient."""
        log = b""
        while self._log.poll():
            log += os.read(self._log.fileno(), 1 << 16)
        reason = caffe_reason(log.decode(errors="replace"))
        if reason and "Not Implemented Yet" in reason:
            raise BadRequest(f"--layer {self.spec.target}: Caffe has no gradient there; choose another of --list_layers")
        if reason:
            doubt = "" if self._jobs or not self.spec else f"; do {self.spec.deploy} and {self.spec.weights} fit together?"
            raise RunFailed(f"Caffe stopped: {reason[:300]}{doubt}")
        self._restarts += 1
        if self._restarts > self.MAX_RESTARTS:
            raise RunFailed(
                f"workers were killed {self._restarts} times, perhaps for want of memory; use fewer --workers, or smaller sizes"
            )
        self._executor.shutdown()
        self._start()

    def call(self, task, *arguments):
        """task(*arguments), done by a worker. Raises what the task raises; RunFailed where Caffe stops."""
        while True:
            try:
                return self._submit(task, *arguments).result()
            except concurrent.futures.process.BrokenProcessPool:
                self._restart()

    def describe(self):
        """(tile_size, target_shape) of the network. Starts all workers."""
        others = [self._submit(describe, self.spec) for _ in range(self.number - 1)]
        self.tile_size, self.target_shape, suits = self.call(describe, self.spec)
        if self.gpus and not self.batch_size:
            for future in others:
                with contextlib.suppress(concurrent.futures.process.BrokenProcessPool):  # which the next task finds too
                    suits = min(suits, future.result()[2])
            self.batch_size = suits
        if not self.gpus:  # more than one would bring nothing, and a sum could come out otherwise for the company it is in
            self.batch_size = 1
        shape = (2 * self.number + 1, 2, self.batch_size, 3, *self.tile_size)
        os.truncate(self._memory_file, 4 * math.prod(shape))
        self._memory = (os.getpid(), self._memory_file, shape)
        self._slots = map_memory(*self._memory)
        self._free = list(range(len(self._slots)))
        return self.tile_size, self.target_shape

    def has_room(self):
        """Whether `send` can be called: workers have two batches each at most, one to compute and one to begin with next."""
        return bool(self._free)

    def send(self, tiles_in, measure=True):
        """Has the gradients of `tiles_in`, up to batch_size arrays (3, H, W), computed; returns a ticket for `receive`."""
        slot = self._free.pop()
        for place, tile in enumerate(tiles_in):
            self._slots[slot, 0, place] = tile
        self._compute(slot, len(tiles_in), measure)
        return slot

    def _compute(self, slot, count, measure):
        future = self._submit(compute_slot, self.spec, self._memory, slot, count, measure)
        self._jobs[slot] = (count, measure, future)

    def receive(self, slot):
        """[(gradient, float32 (3, H, W); objective, None unless measured), ...] of the ticket's tiles, for which it waits."""
        while True:
            count, _, future = self._jobs[slot]
            try:
                values = future.result()
                break
            except concurrent.futures.process.BrokenProcessPool:
                self._restart()
                for other, (*job, future) in list(self._jobs.items()):
                    if future.exception() is not None:
                        self._compute(other, *job)
        del self._jobs[slot]
        self._free.append(slot)
        return list(zip(self._slots[slot, 1, :count].copy(), values))


def in_a_worker(task, *arguments):
    """Runs a task that needs Caffe in a process of its own. Raises what the task raises; RunFailed where Caffe stops."""
    with Workers() as workers:
        return workers.call(task, *arguments)


# ---- Files of a run ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def whole_file(path, name=None):
    """A binary file to write that becomes `path` (if that is a link, what it leads to) when all is written and on the disk, and
    leaves no trace if that fails. Raises RunFailed, which calls it `name`."""
    try:
        place = os.path.realpath(path)
        part = part_name(place, os.getpid())
        try:
            with open(part, "w+b") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, place)
        finally:
            with contextlib.suppress(OSError):
                os.remove(part)
    except OSError as error:
        raise RunFailed(f"{name or path}: cannot be written ({one_line(error)}); what was there is unchanged") from None


def part_name(path, pid):
    """Where process `pid` of this machine writes what is to become `path`."""
    folder, name = os.path.split(path)
    return os.path.join(folder, f".{os.fsdecode(os.fsencode(name)[:100])}.{os.uname().nodename}.{pid}.part")


def remove_parts(output):
    """Removes what runs to `output` that were killed while they wrote a file have left."""
    for part in glob.glob(part_name(f"{glob.escape(os.path.splitext(os.path.realpath(output))[0])}*", "*")):
        pid = part.split(".")[-2]
        if pid.isdecimal() and not os.path.exists(f"/proc/{pid}"):
            with contextlib.suppress(OSError):
                os.remove(part)


@contextlib.contextmanager
def sole_writer(paths):
    """Within, no other run on this machine writes to any of `paths`. Raises BadRequest where one does.

    Each path is held by a socket in Linux's abstract namespace, which leaves nothing behind however the process ends.
    """
    with contextlib.ExitStack() as stack:
        for path in sorted({os.path.realpath(path) for path in paths}):
            lock = stack.enter_context(socket.socket(socket.AF_UNIX))
            try:
                lock.bind(f"\0cnn-vis {hashlib.sha256(os.fsencode(path)).hexdigest()}")
            except OSError:
                raise BadRequest(f"--output: another run is writing {path}; choose another name, or stop it") from None
        yield


FORMATS = {  # by a file name's extension: PIL's name, the greatest side in pixels, PIL's options
    ".png": ("PNG", MAX_SIDE, {}),
    ".jpg": ("JPEG", 65_500, {"quality": 95, "subsampling": 0}),
    ".jpeg": ("JPEG", 65_500, {"quality": 95, "subsampling": 0}),
    ".webp": ("WEBP", 16_383, {"quality": 95}),
    ".tif": ("TIFF", MAX_SIDE, {"compression": "tiff_deflate"}),
    ".tiff": ("TIFF", MAX_SIDE, {"compression": "tiff_deflate"}),
}


def picture_format(path):
    """The entry of FORMATS for a file name, or None."""
    return FORMATS.get(os.path.splitext(path)[1].lower())


def write_picture(picture, path, origin=None):
    """Writes uint8 (H, W, 3), sRGB, to `path`, whole or not at all; the format is by the extension. A PNG carries the dict
    `origin`, which tells how it was made. Raises RunFailed."""
    from PIL import Image, ImageCms, PngImagePlugin

    name, _, extra = picture_format(path)
    extra = extra | {"icc_profile": ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()}
    if name == "PNG" and origin:
        extra["pnginfo"] = PngImagePlugin.PngInfo()
        extra["pnginfo"].add_text("Software", origin["program"])
        extra["pnginfo"].add_itxt("Comment", os.fsencode(origin["command"]).decode(errors="backslashreplace"))
        extra["pnginfo"].add_itxt(ORIGIN_KEY, json.dumps(origin))
    with whole_file(path, f"--output {path}") as file:
        Image.fromarray(picture).save(file, name, **extra)


def numbered(path, size_index, step):
    """The name of a picture along the way: NAME_SIZE_STEP.EXT, counted from 1."""
    stem, extension = os.path.splitext(path)
    return f"{stem}_{size_index + 1}_{step + 1}{extension}"


ORIGIN_KEY = "cnn-vis"  # of the text in a PNG that tells how it was made


def read_origin(path):
    """The dict that tells how a picture was made, from the PNG `path`, or from the JSON file `path` or `path`.json. Raises
    BadRequest."""
    from PIL import Image

    try:
        origin, sidecar = None, path
        if not path.lower().endswith(".json"):
            with Image.open(path) as file:
                origin = file.info.get(ORIGIN_KEY)
            sidecar = f"{path}.json"
        if origin is None:
            with open(sidecar, encoding="utf-8") as file:
                origin = file.read()
        origin = json.loads(origin)
        on_the_way = f"after step {origin['step']} of size {origin['size']}" if "step" in origin else ""
        texts = {name: str(origin[name]) for name in ("program", "network", "weights_sha256")}
        return texts | {"words": shlex.split(origin["command"]), "when": on_the_way}
    except Exception as error:  # strangers' files
        raise BadRequest(
            f"--reproduce {path}: holds no word of how it was made ({one_line(error)}); give a PNG that cnn_vis.py wrote, or the "
            "file that --sidecar wrote"
        ) from None


@functools.cache
def versions():
    """The versions of what makes the pictures, as a dict."""
    import importlib.metadata
    import platform

    found = {"python": platform.python_version()}
    for name in ("numpy", "scipy", "pillow", "pycaffe"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return {"versions": found}


def check_output(option, path, formats=FORMATS):
    """Raises BadRequest where nothing can be written to `path`: tries it, without touching what is there."""
    extension = os.path.splitext(path)[1].lower()
    if formats and extension not in formats:
        known = ", ".join(formats)
        raise BadRequest(f"--{option} {path}: {extension or 'no ending'} is no known format; use one of {known}")
    folder = os.path.dirname(os.path.realpath(path))
    if not os.path.isdir(folder):
        raise BadRequest(f"--{option} {path}: the folder {folder} does not exist; make it first")
    if os.path.isdir(path):
        raise BadRequest(f"--{option} {path}: is a folder; give a file name")
    if os.path.exists(path) and not os.path.isfile(path):
        raise BadRequest(f"--{option} {path}: is no ordinary file; give another name")
    try:
        for name in (path, checkpoint_name(path), numbered(path, 98, 99998)):
            with contextlib.suppress(FileNotFoundError):
                os.lstat(name)  # fails where the name is too long
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))
    except OSError as error:
        raise BadRequest(f"--{option} {path}: cannot be written there ({error.strerror}); choose another place") from None


def check_sides(path, sizes):
    """Raises BadRequest where the format of `path` does not hold pictures as large as the `sizes` of the run."""
    name, greatest, _ = picture_format(path)
    if max(map(max, sizes)) > greatest:
        raise BadRequest(f"--output {path}: {name} holds no sides of more than {greatest} pixels; use .png")


FIGURES = {"show": "_show.png", "plot_pix": "_plot_pix.png", "plot": "_plot.png", "gif": "_run.gif"}  # of iter_behavior


def figure_name(output, behavior):
    """Where what a word of FIGURES asks for is written: beside the output."""
    return os.path.splitext(output)[0] + FIGURES[behavior]


def files_of(options):
    """The paths that a run writes at its end."""
    figures = [figure_name(options.output_file, word) for word in FIGURES if word in options.iter_behavior]
    more = [options.stats, f"{options.output_file}.json" if options.sidecar else None]
    return [options.output_file, *filter(None, more), *figures]


def check_apart(options, spec):
    """Raises BadRequest where the run would write over a file that it reads, or two files under one name."""
    stem, extension = map(re.escape, os.path.splitext(os.path.realpath(options.output_file)))
    figures = "|".join(map(re.escape, FIGURES.values()))
    ours = rf"{stem}({figures}|{extension}(\.json|{CHECKPOINT_ENDING})?|_\d+_\d+{extension})"
    read = {
        "image": options.initial_image,
        "caffe_model": spec.weights,
        "deploy_txt": spec.deploy,
        "mean_image": options.mean_image,
    }
    for name, path in [*read.items(), ("resume", options.resume)]:
        is_checkpoint = name == "resume" and path and output_of(path) is not None
        if path and not is_checkpoint and re.fullmatch(ours, os.path.realpath(path)):
            raise BadRequest(f"--output {options.output_file}: the run would write over --{name} {path}; choose another name")
    if options.stats:
        stats = os.path.realpath(options.stats)
        if re.fullmatch(ours, stats) or stats in [os.path.realpath(path) for path in [*read.values(), options.resume] if path]:
            raise BadRequest(f"--stats {options.stats}: is the name of another file of the run; choose another")


def checkpoint_name(output):
    """Where the checkpoint of a run lies."""
    return f"{output}.checkpoint"


CHECKPOINT_ENDING = r"\.checkpoint(\.old\d*)?"  # also of those that set_aside has renamed


def output_of(checkpoint):
    """The output of the run that a checkpoint belongs to, by its name; None where somebody has given it one of his own."""
    match = re.search(f"{CHECKPOINT_ENDING}$", checkpoint)
    return match and checkpoint[: match.start()]


def set_aside(checkpoint, resumed):
    """Gives the checkpoint of an earlier run, if there is one and it is not `resumed`, another name; returns that, or None."""
    if not os.path.exists(checkpoint) or (resumed and os.path.samefile(checkpoint, resumed)):
        return None
    old = next(name for n in itertools.count(1) if not os.path.exists(name := f"{checkpoint}.old{n}"))
    os.replace(checkpoint, old)
    return old


# NumPy's archive of arrays, unpacked: the state of a Dream, the start picture, and one array of JSON with the rest.
def write_checkpoint(path, header, arrays):
    """Writes the JSON-able dict `header` and the arrays {name: array} to `path`, whole or not at all. Raises RunFailed."""
    with whole_file(path) as file:
        np.savez(file, header=np.frombuffer(json.dumps(header).encode(), np.uint8), **arrays)


CHECKPOINT_FIELDS = {
    "command": list,
    "numbers": dict,
    "seconds": float,
    "weights_sha256": str,
    "deploy_sha256": str,
    "mean": float,
}
CHECKPOINT_ARRAYS = {  # dtype, shape; None: any
    "image": (np.float64, 1, 3, None, None),
    "caches": (np.float64, None, 3, None, None),
    "picture": (np.uint8, None, None, 3),
    "rows": (np.float64, None, len(COLUMNS)),
    "frames": (np.uint8, None, None, None, 3),
    "pixels": (np.float64, None, 6),
}


def read_checkpoint(path):
    """(header, arrays) as written by write_checkpoint, all of the kinds that they should be. Raises BadRequest.

    Every array's bytes are read, and so checked against their CRC, before anything in them is believed. No pickles.
    """
    try:
        with zipfile.ZipFile(path) as file:
            if sum(entry.file_size for entry in file.infolist()) > os.path.getsize(path):
                raise ValueError("it claims to hold more than it does")
            arrays = {
                os.path.splitext(name)[0]: np.load(io.BytesIO(file.read(name)), allow_pickle=False) for name in file.namelist()
            }
        header = json.loads(arrays.pop("header").tobytes())
        for name, kind in CHECKPOINT_FIELDS.items():
            if type(header[name]) is not kind:
                raise ValueError(f"its {name} is no {kind.__name__}")
        for name, array in arrays.items():
            kind, *shape = CHECKPOINT_ARRAYS[name]
            if (
                array.dtype != kind
                or array.ndim != len(shape)
                or any(n not in (None, side) for n, side in zip(shape, array.shape))
            ):
                raise ValueError(f"its {name} is of another kind")
        return header, arrays
    except Exception as error:  # damaged, it can fail in any part of zipfile, NumPy and json
        raise BadRequest(
            f"--resume {path}: not a checkpoint that can be read ({one_line(error)}); start anew without --resume"
        ) from None


# ---- Along the way -----------------------------------------------------------------------------------------------------


def say(text, stream="stdout"):
    """Prints a line on sys.stdout or sys.stderr, past the progress bar if there is one; if nobody reads any more (| head), or a
    log's disk is full, this and all later ones go nowhere, and the run goes on."""
    file, tqdm = getattr(sys, stream), sys.modules.get("tqdm")
    try:
        tqdm.tqdm.write(text, file) if tqdm else print(text, file=file)
        file.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())
        with contextlib.suppress(OSError):
            file.flush()


def note(text):
    """Prints a line on stderr."""
    say(text, "stderr")


def teller(options):
    """The function that gives notices: `note`, or with --quiet one that does not."""
    return (lambda text: None) if options.quiet else note


def printable(text):
    """The text with what a terminal might obey, or not show, as escapes."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def format_stats(progress):
    """The statistics of a Progress as lines for people."""
    s = progress.stats
    return (
        f"{whereabouts(progress)}, objective {s['objective']:.4g}\n"
        f"  losses: p {s['p_loss']:.4g}, aux {s['aux_loss']:.4g}, tv {s['tv_loss']:.4g}\n"
        f"  mean gradients: cnn {s['cnn_gradient']:.4g}, p {s['p_gradient']:.4g}, aux {s['aux_gradient']:.4g}, "
        f"tv {s['tv_gradient']:.4g}\n"
        f"  step: mean {s['step_size']:.4g}, to value {s['step_to_value']:.4g}; "
        f"image: mean {s['image_mean']:.4g}, std {s['image_std']:.4g}"
    )


def check_matplotlib():
    """Raises BadRequest where matplotlib is not installed, or set up for something that it does not have."""
    try:
        import matplotlib.figure
        import matplotlib.pyplot  # noqa: F401
    except (ImportError, ValueError) as error:
        raise BadRequest(
            f"--iter_behavior: matplotlib does not work ({one_line(error)}); pip install matplotlib, and look at $MPLBACKEND"
        ) from None


class Figure:
    """A matplotlib figure in a window; where there is no display, in the file `path`."""

    def __init__(self, path, **arguments):
        import matplotlib.figure
        import matplotlib.pyplot

        try:
            self.figure, self._pyplot = matplotlib.pyplot.figure(**arguments), matplotlib.pyplot
        except Exception:  # each toolkit fails in its own way without a display
            self.figure, self._pyplot = None, None
        if self._pyplot is None or self.figure.canvas.required_interactive_framework is None:
            arguments.pop("num", None)
            self.figure, self._pyplot = matplotlib.figure.Figure(**arguments), None
        self.path = None if self._pyplot else path

    def draw(self):
        """Shows the figure as it is, or writes it."""
        if self._pyplot:
            self._pyplot.pause(0.01)
        else:
            write_figure(self.figure, self.path)


def write_figure(figure, path):
    """Writes a matplotlib figure as a PNG. Raises RunFailed."""
    with whole_file(path) as file:
        figure.savefig(file, format="png")


class PlotPix:
    """A few pixels' values over time, behavior `plot_pix`: the original's four pixels, those that the picture has."""

    PIXELS = ((100, 100), (200, 200), (100, 200), (200, 100))

    def __init__(self, history=()):
        self.history = list(history)  # (step, y, x, b, g, r)

    def record(self, progress):
        """Takes down the pixels of the picture; to be called at every step."""
        image = progress.image
        for y, x in self.PIXELS:
            if y < image.shape[2] and x < image.shape[3]:
                self.history.append((progress.steps_done(), y, x, *image[0, :, y, x]))

    def draw(self, figure):
        """Draws what was recorded into a matplotlib figure."""
        figure.clf()
        for place, (y, x) in enumerate(self.PIXELS, 1):
            axes = figure.add_subplot(2, 2, place, title=f"pixel {(y, x)}", xlabel="step")
            rows = [row for row in self.history if row[1:3] == (y, x)]
            for colour, channel in zip("bgr", (3, 4, 5)):
                axes.plot([row[0] for row in rows], [row[channel] for row in rows], colour)
        figure.tight_layout()


def stats_row(progress):
    """The figures of a measured Progress, as COLUMNS name them; size and step count from 1."""
    size = progress.sizes[progress.size_index]
    return (progress.size_index + 1, *size, progress.step + 1, *(progress.stats[name] for name in STATS))


def write_stats(rows, path):
    """Writes rows of stats_row as CSV. Raises RunFailed."""
    with whole_file(path, f"--stats {path}") as file:
        text = io.TextIOWrapper(file, encoding="utf-8", newline="")
        csv.writer(text).writerows([COLUMNS, *([*map(int, row[:4]), *row[4:]] for row in rows)])
        text.detach()


def plot_stats(rows, num_steps):
    """A matplotlib figure of rows of stats_row: objective, losses and step size over all steps, of which a size has num_steps;
    size changes marked."""
    from matplotlib.figure import Figure as Plain

    columns = dict(zip(COLUMNS, np.array(rows, float).T))
    steps = (columns["size"] - 1) * num_steps + columns["step"]
    changes = steps[1:][np.diff(columns["size"]) > 0] - 0.5
    figure = Plain(figsize=(8, 9), layout="constrained")
    groups = {"objective": ["objective"], "loss": ["p_loss", "aux_loss", "tv_loss"], "mean step": ["step_size"]}
    for axes, (label, names) in zip(figure.subplots(len(groups), sharex=True), groups.items()):
        for name in names:
            if columns[name].any():
                axes.plot(steps, columns[name], label=name.replace("_", " "))
        for change in changes:
            axes.axvline(change, color="grey", linewidth=0.7, linestyle=":")
        axes.set_ylabel(label)
        if any((columns[name] > 0).any() for name in names[1:]):
            axes.set_yscale("log")
        if len(names) > 1 and axes.lines:
            axes.legend()
    axes.set_xlabel("step, over all sizes (dotted: the size changes)")
    return figure


FRAME_SIDE = 480  # pixels at most, of a gif


def gif_frame(picture, last_size):
    """A frame of the animation, whatever the size: uint8 (h, w, 3), of the last size's shape."""
    scale = min(1, FRAME_SIDE / max(last_size))
    return resize(picture, tuple(max(1, round(scale * side)) for side in last_size))


def write_gif(frames, path):
    """Writes frames uint8 (h, w, 3) as an animation of ten a second that rests on the last. Raises RunFailed."""
    from PIL import Image

    first, *others = (Image.fromarray(frame) for frame in frames)
    durations = [100] * len(others) + [2000]
    with whole_file(path) as file:
        first.save(file, "GIF", save_all=True, append_images=others, duration=durations, loop=0)


class Output:
    """All that a run writes and shows: the pictures, statistics, plots, animation and checkpoints that `options` ask for.

    `mean` is the scalar to add for pictures, `origin` tells how they are made, `header` identifies the run in checkpoints,
    `kept` holds the arrays of an earlier checkpoint.
    """

    def __init__(self, options, mean, origin, header, kept):
        self.options, self.mean, self.origin, self.header = options, mean, origin, header
        self.path, self.behavior = options.output_file, options.iter_behavior
        self.checkpoint = checkpoint_name(self.path)
        self.checkpoint_iter = max(50, options.output_iter) if options.checkpoint_iter is None else options.checkpoint_iter
        self.begun = time.monotonic() - header.get("seconds", 0)
        self.rows = kept["rows"].tolist() if "rows" in kept else []
        self.frames = list(kept.get("frames", []))
        self.show = self.plot_pix = None
        if "show" in self.behavior:
            size = (options.show_width, options.show_height)
            self.show = Figure(figure_name(self.path, "show"), num="cnn-vis", figsize=size)
        if "plot_pix" in self.behavior:
            self.plot_pix = Figure(figure_name(self.path, "plot_pix"), num="cnn-vis pixels")
            self.pixels = PlotPix(map(tuple, kept.get("pixels", np.empty((0, 6))).tolist()))
        self.every_step = bool(options.stats) or "plot" in self.behavior

    def files(self):
        """The paths that figures go to for want of a display."""
        return [figure.path for figure in (self.show, self.plot_pix) if figure is not None and figure.path]

    def is_due(self, step):
        """Whether iter_behavior is to be done after this step, counted from 0."""
        return (step + 1) % self.options.output_iter == 0

    def wants_stats(self, step):
        """Whether the step, counted from 0, is to be measured."""
        return self.every_step or ("print" in self.behavior and self.is_due(step))

    def after_step(self, dream, progress):
        """Does what is due after a step. A file that cannot be written is told of, and the run goes on."""
        if self.every_step:
            self.rows.append(stats_row(progress))
        if self.plot_pix is not None:
            self.pixels.record(progress)
        if self.is_due(progress.step):
            if "print" in self.behavior:
                say(format_stats(progress))
            picture = None
            if self.behavior & {"save", "show", "gif"}:
                picture = progress.picture(self.options.rescale_image)
            for write in (self._save, self._show, self._gif, self._plots):
                try:
                    write(picture, progress)
                except RunFailed as error:
                    note(f"cnn_vis.py: {error}")
        if self.checkpoint_iter and progress.steps_done() % self.checkpoint_iter == 0:
            self.write_checkpoint(dream)

    def _save(self, picture, progress):
        if "save" in self.behavior:
            path = numbered(self.path, progress.size_index, progress.step)
            write_picture(picture, path, self.origin_now(size=progress.size_index + 1, step=progress.step + 1))

    def _show(self, picture, progress):
        if self.show is not None:
            self.show.figure.clf()
            axes = self.show.figure.add_axes((0, 0, 1, 1))
            axes.imshow(picture)
            axes.axis("off")
            self.show.draw()
        if self.plot_pix is not None:
            self.pixels.draw(self.plot_pix.figure)
            self.plot_pix.draw()

    def _gif(self, picture, progress):
        if "gif" in self.behavior:
            self.frames.append(gif_frame(picture, progress.sizes[-1]))

    def _plots(self, *_):
        if "plot" in self.behavior and self.rows:
            write_figure(plot_stats(self.rows, self.options.num_steps), figure_name(self.path, "plot"))
        if self.options.stats and self.rows:
            write_stats(self.rows, self.options.stats)

    def origin_now(self, **more):
        """How the picture as it stands was made."""
        return self.origin | versions() | more | {"seconds": round(time.monotonic() - self.begun, 1)}

    def write_checkpoint(self, dream, tell=note):
        """Writes a checkpoint; where that fails it says so by tell(text)."""
        numbers, arrays = dream.state()
        if dream.picture is not None:
            arrays["picture"] = dream.picture
        arrays["rows"] = np.array(self.rows, np.float64).reshape(-1, len(COLUMNS))
        if self.frames:
            arrays["frames"] = np.stack(self.frames)
        if self.plot_pix is not None:
            arrays["pixels"] = np.array(self.pixels.history, np.float64).reshape(-1, 6)
        header = self.header | {"numbers": numbers, "seconds": time.monotonic() - self.begun}
        try:
            write_checkpoint(self.checkpoint, header, arrays)
        except RunFailed as error:
            tell(f"cnn_vis.py: {error}")

    def rescue(self, dream):
        """Saves a run whose picture could not be written, if need be among the temporary files; returns how to go on."""
        self.write_checkpoint(dream, tell=lambda text: None)
        if os.path.exists(self.checkpoint):
            return self.hint()
        self.checkpoint = os.path.join(tempfile.gettempdir(), os.path.basename(self.checkpoint))
        set_aside(self.checkpoint, None)
        self.write_checkpoint(dream, tell=lambda text: None)
        return f"{self.hint()} --output ANOTHER.png" if os.path.exists(self.checkpoint) else ""

    def hint(self):
        """How to go on after the run has ended too early, if there is a checkpoint."""
        path = next(filter(os.path.exists, filter(None, (self.checkpoint, self.options.resume))), None)
        return f"; go on with: python cnn_vis.py --resume {shlex.quote(path)}" if path else ""

    def finish(self, dream):
        """Writes the picture as it stands, and all that goes with it."""
        picture = to_uint8(dream.image, self.mean, self.options.rescale_image)
        numbers = {"size": dream.size_index + 1, "step": dream.step}
        origin = self.origin_now(**({} if dream.is_done() else numbers))
        write_picture(picture, self.path, origin)
        if self.options.sidecar:
            with whole_file(f"{self.path}.json") as file:
                file.write(json.dumps(origin, indent=1).encode())
        self._plots()
        if "gif" in self.behavior:
            last = gif_frame(picture, dream.sizes[-1])
            frames = self.frames if self.frames and np.array_equal(self.frames[-1], last) else [*self.frames, last]
            write_gif(frames, figure_name(self.path, "gif"))


# ---- A run -------------------------------------------------------------------------------------------------------------


class Stopped(KeyboardInterrupt):
    """A signal has ended the program; exit status 128 + signum."""

    def __init__(self, signum, message="stopped"):
        super().__init__(message)
        self.signum = signum


class Signals:
    """Ctrl-C, SIGTERM and SIGHUP; a context manager. One raises Stopped, unless `held`: then the first is only remembered, as
    `signum`, for the run to end where it can go on later, and only Ctrl-C again hurries it. The third ends the process."""

    def __init__(self):
        self.held, self.signum, self._count = False, None, 0

    def __enter__(self):
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        self._before = {n: signal.getsignal(n) for n in numbers if signal.getsignal(n) != signal.SIG_IGN}  # nohup's stay
        for number in self._before:
            signal.signal(number, self._handle)
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, signum, _):
        self._count += signum == signal.SIGINT or not self.held or not self.signum
        if self._count > 2:
            os._exit(128 + signum)
        if self.held and self.signum and signum != signal.SIGINT:
            return  # a supervisor's, to the process and again to its group
        if not self.held or self.signum:
            raise Stopped(signum)
        self.signum = signum
        if sys.stderr.isatty():
            os.write(2, b"\nFinishing this step, then saving; once more to stop at once.\n")


LIMITS = {"v": (resource.RLIMIT_AS, 600 << 20), "d": (resource.RLIMIT_DATA, 250 << 20)}  # of ulimit: what libraries take


def check_surroundings():
    """Raises BadRequest where the shell that started the program leaves it no room to work."""
    try:
        os.getcwd()
    except OSError:
        raise BadRequest("the current folder is no more; go to another one") from None
    for letter, (limit, least) in LIMITS.items():
        soft = resource.getrlimit(limit)[0]
        if soft != resource.RLIM_INFINITY and soft < least:
            raise BadRequest(f"ulimit -{letter} {soft >> 10}: too little memory to start in; allow {least >> 10} at least")


def find_files(options):
    """(deploy, weights or None, whether the classifier is to be fitted, Model) for the options. Raises BadRequest."""
    model = choose_model(options.model, options.deploy_txt or options.caffe_model)
    weights = find_file("caffe_model", options.caffe_model) if options.caffe_model else model.find_weights()
    deploy = find_file("deploy_txt", options.deploy_txt) if options.deploy_txt else model.find_deploy()
    if deploy is None:
        raise BadRequest(f"--model {model.name}: no deploy.prototxt found; pip install ./pycaffe, or name one with --deploy_txt")
    return deploy, weights, not options.deploy_txt, model


def find_network(options):
    """(NetworkSpec, name of the network, scalar mean) for the options. Raises BadRequest."""
    deploy, weights, fit, model = find_files(options)
    if weights is None:
        raise BadRequest(
            f"--model {model.name}: not installed at {' or '.join(model.weights_places()[:-1])}; "
            f"get it with --download_model {model.name}, or name its weights with --caffe_model"
        )
    if options.mean_image or model.mean is None:
        packaged = options.mean_image or find_in_caffe(f"python/caffe/{ILSVRC_MEAN}", ILSVRC_MEAN)
        if packaged is None:
            raise BadRequest("--mean_image: Caffe's ilsvrc_2012_mean.npy was not found; pip install ./pycaffe, or name the file")
        mean = read_mean(find_file("mean_image", packaged))
    else:
        mean = model.mean
    neuron = options.target_neuron if options.image_type == "amplify_neuron" else None
    objective = Objective(neuron, options.amplify_l1_weight, options.amplify_l2_weight, options.amplify_grad_clip)
    name = "network" if options.deploy_txt or options.caffe_model else model.name
    return NetworkSpec(deploy, weights, options.target_layer, objective, fit), name, mean


def choose_gpus(gpus):
    """The GPUs to run on, [] for the CPU; and why it is the CPU where no GPU was named. `gpus` is the option's list, or None.
    Raises BadRequest."""
    if gpus == []:
        return [], ""
    present = count_gpus()
    cuda = (present or gpus) and in_a_worker(can_use_gpu)
    if gpus is None:
        return ([0], "") if cuda else ([], ", as Caffe was built without CUDA" if present else ", as no GPU was found")
    asked = ",".join(map(str, gpus))
    if not cuda:
        raise BadRequest(f"--gpu {asked}: Caffe was built without CUDA; use --gpu -1 for the CPU, or build with PYCAFFE_CUDA=1")
    if max(gpus) >= present:
        found = f"only {present} found, counted from 0" if present else "none found"
        raise BadRequest(f"--gpu {asked}: there is no such GPU, {found}; use another number, or -1 for the CPU")
    return gpus, ""


def set_up(options):
    """(name of the network, scalar mean, Workers not yet entered) for the options. Raises BadRequest."""
    spec, name, mean = find_network(options)
    gpus, reason = choose_gpus(options.gpu)
    workers = Workers(dataclasses.replace(spec, use_gpu=bool(gpus)), options.workers or count_cores(), gpus, options.batch_size)
    many = "s" * (workers.number > 1)
    workers.device = f"GPU{many} {','.join(map(str, gpus))}" if gpus else f"CPU{reason}, {workers.number} worker{many}"
    return name, mean, workers


def identify(spec, mean):
    """What tells a network from others, as a dict."""
    hashes = {name: file_hash(getattr(spec, name), "sha256").partition(":")[2] for name in ("weights", "deploy")}
    return {"weights_sha256": hashes["weights"], "deploy_sha256": hashes["deploy"], "mean": mean}


def check_same_network(path, header, identity):
    """Raises BadRequest where the network is not the one that the checkpoint `path` was begun with."""
    for name, option in (("weights_sha256", "caffe_model"), ("deploy_sha256", "deploy_txt"), ("mean", "mean_image")):
        if header[name] != identity[name]:
            raise BadRequest(
                f"--{option}: not the one that {path} was begun with ({name} {identity[name]}, not {header[name]}); "
                "name the right one"
            )


def resume(path, argv):
    """(options, header, arrays) of the run that the checkpoint `path` belongs to, with what `argv` changes. Raises BadRequest."""
    path = find_file("resume", path)
    header, arrays = read_checkpoint(path)
    parser = build_parser()
    words = list(map(str, header["command"]))
    try:
        saved = parser.parse_args(words)
    except (BadRequest, SystemExit) as error:
        raise BadRequest(f"--resume {path}: holds a command that cannot be run ({error}); start anew without --resume") from None
    options = parser.parse_args([*words, *argv])
    if options.initial_image:
        options.initial_image = os.path.abspath(options.initial_image)
    for name, value in vars(options).items():
        if name not in FREE_OPTIONS and value != getattr(saved, name):
            raise BadRequest(
                f"--{name} {value}: the run in {path} has {getattr(saved, name)}; leave it out, or start anew without --resume"
            )
    options.resume = path
    if "output_file" not in given_options(argv):
        options.output_file = output_of(path)
        if options.output_file is None:
            raise BadRequest(f"--resume {path}: name the picture to write with --output")
    return options, header, arrays


def run(options, signals, header=None, arrays=None):
    """Does what the options ask for; `header` and `arrays` are those of a checkpoint to go on from."""
    arrays = arrays or {}
    tell = teller(options)
    check_surroundings()
    notices = list(without_effect(options))
    check_output("output", options.output_file)
    if options.stats:
        check_output("stats", options.stats, ())
    for path in filter(os.path.isdir, files_of(options)):
        raise BadRequest(f"--output {options.output_file}: the run is to write {path}, which is a folder; choose another name")
    if options.iter_behavior & {"show", "plot", "plot_pix"}:
        check_matplotlib()
    picture = arrays.pop("picture", None)
    if header is None and options.initial_image is not None:
        picture, remarks = read_picture(find_file("image", options.initial_image), options.background)
        notices += remarks
    if picture is None and options.seed is None:
        options.seed = np.random.SeedSequence().entropy % 2**32
    network_name, mean, workers = set_up(options)
    spec = workers.spec
    check_apart(options, spec)
    if not (options.deploy_txt or options.caffe_model):
        notices = stand_in_notices(options.model, network_name) + notices
        options.model = network_name  # the command that makes it again is to find the same one
    if options.batch_size and not spec.use_gpu:
        notices.append("--batch_size has no effect on the CPU")
    if options.workers and spec.use_gpu and not options.gpu:
        notices.append("--workers has no effect on a GPU")
    resumed = [output_of(options.resume) or options.resume] if options.resume else []
    with workers, sole_writer([*files_of(options), *resumed]):
        identity = identify(spec, mean)
        if header is not None:
            check_same_network(options.resume, header, identity)
        workers.describe()
        dream = Dream(options, picture, mean, workers)
        if header is not None:
            try:
                dream.restore(header["numbers"], arrays)
            except (ValueError, KeyError, TypeError) as error:
                raise BadRequest(f"--resume {options.resume}: {one_line(error)}; start anew without --resume") from None
        check_sides(options.output_file, dream.sizes)
        for line in notices:  # not before all is known to be right: an error is to be the one line
            tell(f"note: {line}")
        tell(
            f"{network_name} ({spec.weights}), {spec.target} {'x'.join(map(str, workers.target_shape))}, {workers.device}, "
            f"sizes {' '.join(f'{h}x{w}' for h, w in dream.sizes)}" + (f", noise seed {options.seed}" if picture is None else "")
        )
        origin = {
            "program": f"cnn_vis.py {__version__}",
            "command": shlex.join(["python", "cnn_vis.py", *command_words(options)]),
            "network": network_name,
            "layer": spec.target,
            "sizes": dream.sizes,
            "seed": options.seed,
        } | identity
        run_header = {"seconds": 0} | (header or {}) | identity | {"command": command_words(options, portable=True)}
        output = Output(options, mean, origin, run_header, arrays)
        for path in output.files():
            tell(f"note: there is no display; see {path}")
        for path in filter(None, (output.path, options.stats)):
            remove_parts(path)
        old = set_aside(output.checkpoint, options.resume)
        if old:
            tell(f"note: an earlier run to {output.path} is unfinished; it goes on with --resume {shlex.quote(old)}")
        with np.errstate(all="ignore"):  # what is not finite is told in our own words
            loop(dream, output, signals)


def loop(dream, output, signals):
    """Runs the dream with its progress bar, or lines in a log, and writes what there is, whatever ends it. Raises RunFailed;
    Stopped after a signal."""
    from tqdm import tqdm

    options = dream.options
    counts = [len(all_tiles(size, dream.workers.tile_size)) for size in dream.sizes]
    total = sum(counts) * options.num_steps
    first = done = sum(counts[: dream.size_index]) * options.num_steps + counts[dream.size_index] * dream.step
    on_terminal = sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).columns > 0  # 0: nobody looks at it
    begun = time.monotonic()
    form = "{desc} |{bar}| {percentage:3.0f}% {rate_fmt}, {remaining} left"
    signals.held = True
    with tqdm(
        desc="starting", total=total, initial=done, unit=" tiles", disable=options.quiet or not on_terminal, leave=False,
        bar_format=form, dynamic_ncols=True,
    ) as bar:  # fmt: skip
        try:
            for progress in dream.run(output.wants_stats):
                output.after_step(dream, progress)
                done += counts[progress.size_index]
                bar.set_description_str(whereabouts(progress), refresh=False)
                bar.update(counts[progress.size_index])
                if signals.signum and done < total:
                    break
                if not (on_terminal or options.quiet) and output.is_due(progress.step):
                    rate = (done - first) / (time.monotonic() - begun)
                    left = tqdm.format_interval((total - done) / rate)
                    note(f"{whereabouts(progress)}: {rate:.1f} tiles/s, {left} left")
        except Stopped as stop:
            raise Stopped(stop.signum, f"stopped at once{output.hint()}") from None
        except (RunFailed, MemoryError, OSError) as error:  # amid a step: there is a picture, but nothing to go on from
            bar.close()
            if isinstance(error, MemoryError):
                error = "there is not enough memory; use smaller sizes, or fewer --workers"
            if dream.image is None:
                raise RunFailed(str(error)) from None
            hint = "" if isinstance(error, NotFinite) else output.hint()
            try:
                output.finish(dream)
            except RunFailed:
                raise RunFailed(f"{error}{hint}") from None
            raise RunFailed(f"{error}; the picture so far is in {output.path}{hint}") from None
        except Exception:  # a fault in this program, whose traceback is to be seen; the picture is kept all the same
            with contextlib.suppress(Exception):
                output.finish(dream)
            raise
    stopped = done < total
    if stopped and options.checkpoint_iter != 0:
        output.write_checkpoint(dream)
    try:
        output.finish(dream)
    except RunFailed as error:
        raise RunFailed(f"{error}{output.rescue(dream)}") from None
    if stopped:
        raise Stopped(signals.signum, f"stopped; the picture so far is in {output.path}{output.hint()}")
    teller(options)(f"{output.path}: done in {tqdm.format_interval(time.monotonic() - output.begun)}")
    for path in {output.checkpoint, options.resume} - {None}:
        if output_of(path) is not None:
            with contextlib.suppress(OSError):
                os.remove(path)


def dream(image=None, **options):
    """The program as a library: does a run, yielding a Progress after every step.

        for progress in cnn_vis.dream("in.jpg", layer="inception_4c/output", num_steps=20):
            picture = progress.picture()  # uint8 (H, W, 3)

    `image` is a file name, an array uint8 (H, W, 3), RGB (or what NumPy makes one of), or None for noise. The options are the
    command line's, by any of their names and with the same defaults; those of output have no effect. Workers are processes
    that import the calling script: it needs `if __name__ == "__main__":` around what it does. Raises BadRequest and RunFailed.
    """
    words = [
        f"--{name}" if value is True else f"--{name}={value}"
        for name, value in options.items()
        if value is not False and value is not None
    ]
    parsed = build_parser().parse_args(words)
    for name in ("resume", "reproduce", "download_model", "list_models", "list_layers"):
        if getattr(parsed, name):
            raise BadRequest(f"{name}: is of the command line only")
    image = parsed.initial_image if image is None else image
    if isinstance(image, (str, os.PathLike)):
        path = os.path.expanduser(os.path.expandvars(os.fspath(image)))
        image, _ = read_picture(find_file("image", path), parsed.background)
    elif image is not None:
        image = np.asarray(image)
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise BadRequest(f"image: an array {image.dtype} {image.shape}; it must be uint8 (H, W, 3)")
    name, mean, workers = set_up(parsed)
    for line in stand_in_notices(parsed.model, name):
        teller(parsed)(line)
    with workers:
        workers.describe()
        yield from Dream(parsed, image, mean, workers).run()


# ---- Commands ----------------------------------------------------------------------------------------------------------


def shell_word(word):
    """The word as a shell takes it, quoted if need be; what is not printable as escapes, which bash and its like read."""
    if word.isprintable():
        return shlex.quote(word)
    escaped = (c if c.isprintable() and c not in "'\\" else "".join(f"\\x{byte:02x}" for byte in os.fsencode(c)) for c in word)
    return f"$'{''.join(escaped)}'"


def list_models():
    """Prints the networks known by name: where found, size, how far verified."""
    for model in MODELS.values():
        path = model.find_weights()
        if path is None:
            say(f"{model.name:20} not installed; python cnn_vis.py --download_model {model.name}")
        else:
            say(f"{model.name:20} {os.path.getsize(path) / 1e6:5.1f} MB, {standing(path, model)}: {path}")


def list_layers(options):
    """Prints the layers that can be amplified, in order, each with its shape for one tile."""
    deploy, weights, fit, model = find_files(options)
    for line in stand_in_notices(options.model, model.name):
        note(line)
    for name, shape in in_a_worker(layer_shapes, deploy, weights if fit else None):
        say(f"{name:32} {'x'.join(map(str, shape))}")


def download_model(options):
    """Does --download_model."""
    model = MODELS[options.download_model]
    deploy = model.find_deploy()
    if deploy is None:
        raise BadRequest(f"--download_model {model.name}: Caffe is needed to check it; pip install ./pycaffe")
    download(model, options.model_url or model.url, functools.partial(in_a_worker, structure_error, deploy))
    place = model.cache_place()
    say(f"{model.name}: {standing(place, model)}, {file_hash(place, 'sha256')}, {place}")


def reproduce(path):
    """Prints the command that made a picture."""
    origin = read_origin(find_file("reproduce", path))
    note(printable(f"{origin['program']}, {origin['network']}, weights sha256 {origin['weights_sha256']}"))
    if origin["when"]:
        note(printable(f"note: the picture is one on the way, {origin['when']}; the command makes the finished one"))
    say(" ".join(map(shell_word, origin["words"])))


def mend_streams():
    """Opens those of stdin, stdout and stderr that are closed to nothing, so that no file of ours gets their place; what a
    terminal's encoding lacks is printed as escapes."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # which takes the lowest place free
    sys.stdout = sys.stdout or open(1, "w")  # noqa: SIM115, it is for the life of the process
    sys.stderr = sys.stderr or open(2, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def main(argv=None):
    """Runs the command line; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    mend_streams()
    try:
        with Signals() as signals:
            options = build_parser().parse_args(argv)
            if options.list_models:
                list_models()
            elif options.list_layers:
                list_layers(options)
            elif options.download_model:
                download_model(options)
            elif options.reproduce:
                reproduce(options.reproduce)
            elif options.resume:
                options, header, arrays = resume(options.resume, argv)
                run(options, signals, header, arrays)
            else:
                run(options, signals)
    except (BadRequest, RunFailed) as error:
        note(printable(f"cnn_vis.py: error: {error}"))
        return 2 if isinstance(error, BadRequest) else 1
    except OSError as error:  # of the system: no descriptors left, no /dev/shm, a folder that went away
        note(f"cnn_vis.py: error: {one_line(error)}; the system does not allow what is needed")
        return 1
    except MemoryError:
        note("cnn_vis.py: error: there is not enough memory; use smaller sizes, or fewer --workers")
        return 1
    except Stopped as stop:
        note(f"cnn_vis.py: {stop}")
        return 128 + stop.signum
    return 0


if __name__ == "__main__":
    sys.exit(main())
