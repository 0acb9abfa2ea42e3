#!/usr/bin/env python3
# PYTHON_ARGCOMPLETE_OK
"""DeepDream pictures on real Caffe: amplifies what a layer of GoogLeNet responds to in a picture.

    python cnn_vis.py --image in.jpg --layer inception_4c/output
    python cnn_vis.py --image in.jpg --layer inception_3b/output \\
        --initial_size x0.5 --final_size x2 --num_sizes 4
    python cnn_vis.py --initial_size 270x480 --final_size 1080x1920 --num_sizes 5 \\
        --num_steps 100 --learning_rate 10 --decay_rate .25 --p_reg 1e-10 --beta 2.5  # from noise
    python cnn_vis.py --image in.jpg --image_type amplify_neuron \\
        --layer inception_4b/output --target_neuron 17
    python cnn_vis.py --help

Faithful to Justin Johnson's cnn-vis (2015): the picture is cut into overlapping tiles of the
network's input size. A step runs the even tiles, then the odd ones, forward and backward through
Caffe; each tile's gradient, with those of two p-norms and of total variation, is its own step, by
RMSProp (or, as a choice, divided by one number for all tiles). After num_steps steps the picture is
enlarged and the steps start again, from initial_size up to final_size.

This file is the method, from the numbers up to the command line: pictures in memory; sizes and
tiles; the objective; regularizers and step; the dream; the options; making a picture. Everything
else is in cnn_vis_lib, one file for each subject, of which only __main__, which starts the program,
imports this file.

An image is a picture in memory: float64 (1, 3, H, W), channels B, G, R, minus the mean of the mean
image. A picture is what people see: uint8 (H, W, 3), channels R, G, B.
"""

import os
import sys

if __name__ == "__main__":
    folder = os.path.dirname(os.path.realpath(__file__))
    if not os.path.isdir(os.path.join(folder, "cnn_vis_lib")):
        problem = "the folder cnn_vis_lib must lie beside cnn_vis.py; take the whole repository"
        print(f"cnn_vis.py: error: {problem}", file=sys.stderr)
        sys.exit(2)
    # Runs the module cnn_vis instead of this one, so that workers find its classes by that name.
    sys.path.insert(0, folder)  # with -P or -I, Python omits it
    from cnn_vis_lib.__main__ import start

    sys.exit(start())
if os.path.dirname(os.path.realpath(__file__)) not in sys.path:  # imported through a link
    sys.path.append(os.path.dirname(os.path.realpath(__file__)))

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import logging
import math

import numpy as np

from cnn_vis_lib.ahead import Steps, after_tiles, cut_tile, tile_gradients
from cnn_vis_lib.batch import make_pictures, plan_batch
from cnn_vis_lib.behaviors import Watchers
from cnn_vis_lib.checkpoints import check_arrays
from cnn_vis_lib.commands import COMMANDS, keyword_options
from cnn_vis_lib.compiled_step import compiled_step, compiled_step_tile
from cnn_vis_lib.engines import Engines, idle
from cnn_vis_lib.errors import (
    BadRequest,
    NotFinite,
    OutOfMemory,
    RunFailed,
    Stopped,
    log,
    one_line,
    refusal,
    remedy_of,
)
from cnn_vis_lib.files import sole_writer
from cnn_vis_lib.find_network import find_network
from cnn_vis_lib.gauge import Gauge
from cnn_vis_lib.inputs import checked_array, kept_inputs, read_inputs
from cnn_vis_lib.install import PROGRAM, missing_package
from cnn_vis_lib.install import VERSION as __version__
from cnn_vis_lib.machine import (
    check_room,
    check_surroundings,
    count_cores,
    keep_freed_memory,
    zeros,
)
from cnn_vis_lib.models import stand_in_notice, with_guide
from cnn_vis_lib.network import Network, NetworkSpec, check_targets
from cnn_vis_lib.option_types import colour, file_name, mask_name, not_empty, number, scratch_folder
from cnn_vis_lib.options import (
    PARSER,
    USAGE,
    Several,
    check_preset,
    end_sizes,
    listed,
    size_refusal,
    too_few_steps,
    when,
)
from cnn_vis_lib.outputs import Files, check_apart, make_room, plan_outputs
from cnn_vis_lib.pixels import DEPTHS, from_planes, mixed, planes, power, resize, strips
from cnn_vis_lib.processes import CaffeStopped, in_a_worker
from cnn_vis_lib.records import make_record
from cnn_vis_lib.resume import check_same_network, go_on, resume
from cnn_vis_lib.run import Batch, Run, Signals, announce, watch
from cnn_vis_lib.run_options import device_options, network_options, output_options
from cnn_vis_lib.terminal import LineHandler, mend_streams, say
from cnn_vis_lib.terms import class_of, parse_terms, quoted, strong
from cnn_vis_lib.writing import check_sides

# ---- Pictures in memory -----------------------------------------------------------------------

CONTRAST = 1.2  # the original's


def to_picture(image, mean, contrast=CONTRAST, rescale=False, depth=8):
    """The picture of an `image` (1, 3, H, W), which is multiplied by `contrast`: uint8 (H, W, 3),
    truncated, or uint16 if `depth` is 16. With `rescale` it is stretched to the full range instead
    of clipped."""
    picture = np.empty((*image.shape[2:], 3), DEPTHS[depth])
    ends = (image.min(), image.max()) if rescale else ()
    low, high = (contrast * end + mean for end in ends) if rescale else (0, 255)
    for rows in strips(image.shape[2]):
        strip = contrast * image[0, ::-1, rows]
        strip += mean
        if rescale:
            strip -= low
            strip *= 255
            strip /= (high - low) or 1
        np.clip(strip, 0, 255, out=strip)
        if depth == 16:
            strip *= 257
        picture[rows] = strip.transpose(1, 2, 0)
    return picture


def from_uint8(picture, mean, out=None):
    """The image (1, 3, H, W) of a picture, written to `out` if that is given. Knows no contrast, so
    it is not the inverse of to_picture."""
    image = np.empty((1, 3, *picture.shape[:2])) if out is None else out
    image[0] = picture[:, :, ::-1].transpose(2, 0, 1)
    image -= mean
    return image


def start_image(settings, start, size, mean, scratch=None):
    """The image at the first size, from the start picture of that size or, if it is None, from
    noise; its array in the folder `scratch` if there is one."""
    image = zeros((1, 3, *size), scratch)
    if start is not None:
        return from_uint8(start, mean, image)
    fill_with_noise(image, settings, mean)
    return image


def fill_with_noise(image, settings, mean):
    """Fills `image` with noise to start from. The blur is the original's: on 8-bit pixels, and
    across channels too."""
    from scipy.ndimage import gaussian_filter

    random = np.random.RandomState(settings.seed)
    for plane in image[0]:
        for rows in strips(len(plane)):
            plane[rows] = settings.initialization_scale * random.randn(*plane[rows].shape)
    picture = to_picture(image, mean, settings.contrast)
    from_uint8(gaussian_filter(picture, sigma=settings.initialization_blur), mean, image)


def enlarge_change(image, start, new_start, mean, out):
    """Writes to `out`, an image of another size, the start picture of that size plus the change
    from that of the size before, enlarged. The start pictures are uint8 (1, 3, H, W), with the
    mean; or None, and then all is change. (Mordvintsev, Olah and Tyka 2015 enlarge so.)"""
    for channel in range(3):
        change = image[0, channel].astype(np.float32)
        if start is not None:
            change += np.float32(mean)
            change -= start[0, channel]
        out[0, channel] = resize(change, out.shape[2:])
        if new_start is not None:
            out[0, channel] += new_start[0, channel]
            out[0, channel] -= mean


# ---- Sizes and tiles --------------------------------------------------------------------------
# A size is (height, width). A region is (y0, y1, x0, x1), the place of a tile in the picture.


def size_sequence(initial, final, number, resize_type):
    """`number` sizes from initial to final, geometric or linear, rounded half to even."""
    if number == 1:
        return [tuple(initial)]
    if resize_type == "geometric":
        sides = [np.logspace(np.log10(a), np.log10(b), number) for a, b in zip(initial, final)]
    else:
        sides = [np.linspace(a, b, number) for a, b in zip(initial, final)]
    return [(int(h), int(w)) for h, w in zip(*np.round(sides))]


def tile_starts(total, tile):
    """The positions at which tiles of `tile` pixels start, evenly spread and rounded half up, so
    that as few as possible cover `total` pixels."""
    count = -(-total // tile)
    return [math.floor(start + 0.5) for start in np.linspace(0, total - tile, count)]


def tiles(size, tile_size):
    """The regions of a picture's tiles, as two lists (even, odd): a chequerboard, columns first."""
    colours = ([], [])
    for i, x in enumerate(tile_starts(size[1], tile_size[1])):
        for j, y in enumerate(tile_starts(size[0], tile_size[0])):
            colours[(i + j) % 2].append((y, y + tile_size[0], x, x + tile_size[1]))
    return colours


def dreaming_tiles(size, tile_size, mask=None):
    """What `tiles` returns, without the tiles that are all black in the mask, uint8 of any size."""
    colours = tiles(size, tile_size)
    if mask is not None:
        dreams = resize(mask, size, bilinear=True) > 0
        colours = [[r for r in c if dreams[r[0] : r[1], r[2] : r[3]].any()] for c in colours]
    return colours


def all_tiles(size, tile_size):
    """The regions of both colours in one list, the even ones first."""
    even, odd = tiles(size, tile_size)
    return even + odd


def tile_number(size, tile_size):
    """How many tiles a picture has."""
    return math.prod(len(tile_starts(side, tile)) for side, tile in zip(size, tile_size))


def tile_counts(size, tile_size):
    """How many tiles cover each pixel, float64 (H, W)."""
    counts = np.zeros(size)
    for y0, y1, x0, x1 in all_tiles(size, tile_size):
        counts[y0:y1, x0:x1] += 1
    return counts


def plan_sizes(settings, base, tile_size):
    """(sizes of a run, remarks); `base` is the size that factors refer to. Raises BadRequest if a
    size is below the network's input."""
    first, last, remarks = end_sizes(settings, base, tile_size)
    sizes = size_sequence(first, last, settings.num_sizes, settings.resize_type)
    for size in sizes:
        if size[0] < tile_size[0] or size[1] < tile_size[1]:
            name = "initial_size" if size == sizes[0] else "final_size"
            factor = math.ceil(100 * max(t / b for t, b in zip(tile_size, base))) / 100
            least = f"{tile_size[0]}x{tile_size[1]}"
            problem = f"{size[0]}x{size[1]} is smaller than the network's input, {least}"
            raise size_refusal(settings, name, problem, f"use x{factor:g} or more")
    if sum(last) < sum(first):
        remarks.append("the sizes shrink: --final_size is below --initial_size")
    return sizes, remarks


# ---- Objective --------------------------------------------------------------------------------
# Terms have loss(x), a number, and gradient(x), of x's shape. For a target, x is a layer's
# activations, float32 (N, C, ...); there are three forms of targets. For a regularizer, x is an
# image or a part of it, float64 (1, C, H, W), or its change from the start image if the term is
# `of_change`; its weight is included. Steps follow the gradients downhill; losses are for
# statistics.
#
# A worker has the network: its compute_batch (cnn_vis_lib/workers.py) runs tiles forward to the
# layers, calls Objective.gradients with their activations, and runs those backward to the tiles. If
# a layer works in place on a target's (as ReLU does), the activations are those after it, and the
# target's own gradient enters before it.


@dataclasses.dataclass(frozen=True)
class AmplifyLayer:
    """Makes activations `a` grow (l1), or move away from 0 (l2). The loss is minus the sum of
    l1 a|a| / 2 + l2 a^2 / 2, where the square continues as a straight line beyond `clip`. The layer
    of this name in pycaffe takes the fields in this order."""

    l1: float = 1.0
    l2: float = 1.0
    clip: float = 5.0

    def loss(self, a):
        """The loss of activations (N, C, ...)."""
        return sum(map(self._loss, a), 0.0)  # one tile at a time stays in the processor's cache

    def _loss(self, a):
        a = a.ravel().astype(np.float64)
        size = np.abs(a)
        slope = np.minimum(size, self.clip)
        return -float(self.l1 * (a @ size) / 2 + self.l2 * (slope @ (size - slope / 2)))

    def gradient(self, a):
        """The gradient of the loss with respect to `a`, of its shape and dtype."""
        return -self.l1 * np.abs(a) - self.l2 * np.clip(a, -self.clip, self.clip)


@dataclasses.dataclass(frozen=True)
class AmplifyNeuron:
    """Makes one channel grow, or all if None. The loss is minus the sum of the activations."""

    neuron: int | None = 0

    def _place(self):
        return np.s_[:] if self.neuron is None else np.s_[:, self.neuron]

    def loss(self, a):
        """The loss of activations (N, C, ...)."""
        return -float(a[self._place()].sum(dtype=np.float64))

    def gradient(self, a):
        """The gradient of the loss with respect to `a`, of its shape and dtype."""
        gradient = np.zeros_like(a)
        gradient[self._place()] = -1
        return gradient


@dataclasses.dataclass(frozen=True)
class Resemble:
    """Makes the activations x at every place grow towards the activations y of a guide that
    they resemble most. The loss is minus the sum over x of the largest x . y among the guide's
    places, as in Google's DeepDream notebook (Mordvintsev, Tyka and Olah, 2015). `features` are
    the y, float32 (C, Q); a network adds them once it has seen the guide."""

    features: np.ndarray | None = None
    BLOCK = 1 << 22  # products in memory at a time

    def on(self, channels):
        """The same target for some of the channels only; None: for all."""
        return self if channels is None else Resemble(self.features[list(channels)])

    def loss(self, a):
        """The loss of activations (N, C, ...)."""
        return -float(sum(products.max(axis=1).sum() for _, _, products in self._products(a)))

    def gradient(self, a):
        """The gradient of the loss with respect to `a`, of its shape and dtype."""
        gradient = np.empty(a.shape, a.dtype)
        for n, columns, products in self._products(a):
            nearest = self.features[:, products.argmax(axis=1)]
            gradient[n].reshape(a.shape[1], -1)[:, columns] = -nearest
        return gradient

    def _products(self, a):
        """Yields (n, a slice of the places of a[n], their products with all y: (places, Q))."""
        block = max(1, self.BLOCK // self.features.shape[1])
        for n, x in enumerate(a.reshape(*a.shape[:2], -1)):
            for first in range(0, x.shape[1], block):
                columns = slice(first, first + block)
                yield n, columns, x[:, columns].T @ self.features


@dataclasses.dataclass(frozen=True)
class Target:
    """One term of the objective: `form` on the `channels` of a layer. These are numbers, or words
    from --layer until `numbered` has replaced them by numbers; None: all channels."""

    layer: str
    form: object = AmplifyLayer()
    channels: tuple | None = None
    weight: float = 1.0

    def __str__(self):
        """The term as --layer takes it."""
        weight = "" if self.weight == 1 else f"{float(self.weight)!r}*".replace(".0*", "*")
        channels = "" if self.channels is None else f":{','.join(map(str, self.channels))}"
        return f"{weight}{quoted(self.layer)}{channels}"

    def check(self, channels):
        """Raises BadRequest if the layer, which has `channels` channels, lacks any of the
        target's."""
        numbers = [n for n in self.channels or () if type(n) is int]
        asked = {("layer", f"{self.layer}:{n}"): n for n in numbers}
        if isinstance(self.form, AmplifyNeuron) and self.channels is None:
            asked = {("target_neuron", self.form.neuron): self.form.neuron}
        for (option, value), channel in asked.items():
            if channel >= channels:
                problem = f"{self.layer} has {channels} channels, numbered from 0"
                raise refusal(option, value, problem)

    def loss(self, a):
        """The loss of activations (N, C, ...), without the weight."""
        return self.form.loss(a if self.channels is None else a[:, list(self.channels)])

    def gradient(self, a):
        """The gradient of that loss with respect to `a`, of its shape and dtype."""
        if self.channels is None:
            return self.form.gradient(a)
        gradient = np.zeros_like(a)
        gradient[:, list(self.channels)] = self.form.gradient(a[:, list(self.channels)])
        return gradient


@dataclasses.dataclass(frozen=True)
class Objective:
    """A sum of Targets, to be minimized, and the text that it was read from, if any."""

    targets: tuple
    text: str = dataclasses.field(default="", compare=False)

    def __str__(self):
        """The terms as --layer takes them."""
        return self.text or " + ".join(map(str, self.targets))

    def layers(self):
        """The names of the targets' layers, each once."""
        return tuple(dict.fromkeys(target.layer for target in self.targets))

    def check(self, shapes):
        """Raises BadRequest if a layer lacks a channel of a target. `shapes`, {layer: (C, ...)},
        are those of one tile's activations."""
        for target in self.targets:
            target.check(shapes[target.layer][0])

    def caffe_layer(self):
        """(type, parameters) of the layer in this program's build of Caffe that computes gradients,
        so that on a GPU activations need not leave it; None if there is none."""
        first = self.targets[0]
        is_plain = len(self.targets) == 1 and first.channels is None and first.weight > 0
        if not is_plain or not isinstance(first.form, (AmplifyLayer, AmplifyNeuron)):
            return None
        return type(first.form).__name__, " ".join(map(str, dataclasses.astuple(first.form)))

    def gradients(self, activations):
        """[(layer, gradient of the loss with respect to its activations), ...] for each target, in
        order. `activations` are {layer: float32 (N, C, ...)}. In each of the N tiles a target's
        gradient is scaled to the L2 norm of the first one that is not zero there, and weighted; so
        together these are not the gradient of `loss`. If there is only one target, only the sign of
        its weight counts."""
        gradients = [target.gradient(activations[target.layer]) for target in self.targets]
        if len(gradients) == 1:
            gradients = gradients if self.targets[0].weight > 0 else [-gradients[0]]
        else:
            norms = [np.sqrt(np.square(rows(g), dtype=np.float64).sum(axis=1)) for g in gradients]
            scale = functools.reduce(lambda first, norm: np.where(first > 0, first, norm), norms)
            for target, gradient, norm in zip(self.targets, gradients, norms):
                rows(gradient)[...] *= (target.weight * scale / (norm + EPSILON))[:, np.newaxis]
        return [(target.layer, g) for target, g in zip(self.targets, gradients)]

    def loss(self, activations):
        """The weighted sum of the targets' losses for the activations {layer: (N, C, ...)}. If
        there is only one target, only the sign of its weight counts."""
        weights = [t.weight if len(self.targets) > 1 else np.sign(t.weight) for t in self.targets]
        losses = (target.loss(activations[target.layer]) for target in self.targets)
        return sum(weight * loss for weight, loss in zip(weights, losses))

    def prepared(self, network):
        """This objective, completed with what it needs of the Network: with a guide, all targets
        have the form Resemble, with the guide's features."""
        guide = network.guide()
        if guide is None:
            return self
        features = guide_features(network, guide)
        forms = (Resemble(features[target.layer]).on(target.channels) for target in self.targets)
        pairs = zip(self.targets, forms)
        return Objective(tuple(dataclasses.replace(target, form=form) for target, form in pairs))


def guide_features(network, guide):
    """The activations of each layer, {layer: float32 (C, Q)}, at the Q places of the picture
    `guide`, uint8 (H, W, 3), scaled to just cover a tile; its longer side may take several."""
    sides = [*zip(network.tile_size, guide.shape)]
    scale = max(n / side for n, side in sides)
    size = tuple(max(n, round(scale * side)) for n, side in sides)
    image = from_uint8(resize(guide, size, bilinear=True), network.mean)
    seen = collections.defaultdict(list)
    for layer, a in tile_activations(network, image, all_tiles(size, network.tile_size)):
        seen[layer].append(a.copy())
    return {layer: np.concatenate(parts, axis=1) for layer, parts in seen.items()}


def tile_activations(network, image, regions):
    """Yields (layer, its activations, float32 (C, places)) for each region of an image."""
    for region in regions:
        network.forward(cut_tile(image, region)[np.newaxis].astype(np.float32))
        for layer, a in network.activations().items():
            yield layer, a[0].reshape(a.shape[1], -1)


def rows(a):
    """A view of the array with all axes after the first merged into one."""
    return a.reshape(len(a), -1)


IMAGE_TYPES = {  # --image_type: the form that the settings ask for, on all channels or on some
    "amplify_layer": lambda settings, channels: AmplifyLayer(
        settings.amplify_l1_weight, settings.amplify_l2_weight, settings.amplify_grad_clip
    ),
    "amplify_neuron": lambda settings, channels: AmplifyNeuron(
        settings.target_neuron if channels is None else None
    ),
    "guide": lambda settings, channels: Resemble(),  # for --guide
}


# ---- Regularizers and step --------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class PNorm:
    """weight * sum |x / scale|^p, with p >= 1."""

    weight: float
    p: float
    scale: float = 1.0
    of_change: bool = False

    def loss(self, x):
        """The p-norm of x, a number."""
        return self.weight * float(power(np.abs(x) / self.scale, self.p).sum())

    def gradient(self, x):
        """Its gradient: weight * p / scale * sign(x) * |x / scale|^(p - 1)."""
        scaled = x if self.scale == 1 else x / self.scale
        if self.p == 2:
            return scaled * (self.weight * 2 / self.scale)
        if self.p % 2 == 0:  # an odd power keeps the sign
            gradient = power(scaled * scaled, (self.p - 2) / 2)
            gradient *= scaled
        else:
            gradient = power(np.abs(scaled), self.p - 1)
            gradient *= np.sign(scaled)
        gradient *= self.weight * self.p / self.scale
        return gradient


TV_FLOOR = 1e-3  # lower limit of the squared slope in total variation
TV_OPERATORS = {  # (difference along the axis, smoothing across it), both as correlation kernels
    "naive": ((1, -1), (1, 0)),
    "sobel": ((-1, 0, 1), (1, 2, 1)),
    "sobel_squish": ((-1, 1, 0), (1, 2, 1)),
}


@dataclasses.dataclass(frozen=True)
class TotalVariation:
    """weight * sum (dx^2 + dy^2)^(beta / 2) of x / scale, for each channel separately (Mahendran
    and Vedaldi 2015, equation 4), with slopes dx and dy as one of TV_OPERATORS measures them, and
    at least TV_FLOOR for dx^2 + dy^2."""

    weight: float
    beta: float
    operator: str = "naive"
    scale: float = 1.0
    of_change: bool = False

    @property
    def difference(self):
        """The operator's correlation kernel along the axis of a slope."""
        return TV_OPERATORS[self.operator][0]

    def loss(self, x):
        """The total variation of x, a number."""
        return self.weight * float(power(self._slopes(x)[2], self.beta / 2).sum())

    def gradient(self, x):
        """Its gradient. As in the original, it does not become 0 below the floor, where the loss is
        constant."""
        dx, dy, factor = self._slopes(x)
        factor = power(factor, self.beta / 2 - 1)
        factor *= self.weight * self.beta / self.scale
        dx *= factor
        dy *= factor
        gradient = np.zeros_like(x)
        _spread_slope(gradient, dx, self.operator, 3)
        _spread_slope(gradient, dy, self.operator, 2)
        return gradient

    def _slopes(self, x):
        """dx, dy of x / scale, and max(dx^2 + dy^2, TV_FLOOR)."""
        dx, dy = (_slope(x, self.operator, axis) for axis in (3, 2))
        if self.scale != 1:
            dx /= self.scale
            dy /= self.scale
        squared = dx * dx
        squared += dy * dy
        np.maximum(squared, TV_FLOOR, out=squared)
        return dx, dy, squared


def _window(x, axis, start, length):
    """The `length` entries of x from `start` along axis 2 or 3."""
    return x[:, :, start : start + length] if axis == 2 else x[..., start : start + length]


def _slope(x, operator, axis):
    """The slopes of x along axis 2 or 3 that the operator measures, wherever its kernel fits."""
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
            part = _window(spread, across, i, slope.shape[across])
            part += slope if factor == 1 else factor * slope
    else:
        spread, x = slope, _window(x, across, 0, x.shape[across] - n)
    up, down = (_window(x, axis, difference.index(sign), spread.shape[axis]) for sign in (1, -1))
    up += spread
    down -= spread


EPSILON = 1e-8  # prevents division by 0, also under RMSProp's square root


def rmsprop(gradient, cache, decay, learning_rate):
    """The step -gradient / sqrt(cache + EPSILON) * learning_rate. Updates `cache`, and
    overwrites `gradient` with the step."""
    scratch = gradient * gradient
    scratch *= 1 - decay
    cache *= decay
    cache += scratch
    np.add(cache, EPSILON, out=scratch)
    np.sqrt(scratch, out=scratch)
    gradient /= scratch
    gradient *= -learning_rate
    return gradient


def step_tile(x, start, mean, descent, cache, divisors, terms, decay, learning_rate):
    """Takes the step of a tile, x += step. Returns the step's mean absolute value, or None if it
    overflows; x is then left as it was in the channel that overflows and in those after it.

    `x`, float64 (3, H, W), is the tile's part of the image, and `start`, uint8 (3, H, W), the same
    part of the start picture, from which `mean` is to be subtracted, or None. `descent` is the
    network's gradient, float32 (3, H, W). `cache`, float64 (3, H, W), is RMSProp's, and is updated;
    with None, the step is -learning_rate times the gradient. The step is divided by `divisors`,
    float64 (H, W), or by nothing if None. `terms` are the regularizers, {name: term}, in the
    original's order.
    """
    total = 0.0
    for channel in range(3):  # channels are independent, and one's arrays fit the processor's cache
        part = np.s_[np.newaxis, channel : channel + 1]
        gradient = descent[part].astype(np.float64)
        for term in terms.values():
            from_start = None if start is None else start[part]
            gradient += term.gradient(argument(term, x[part], from_start, mean))
        if cache is None:
            step = gradient
            step *= -learning_rate
        else:
            step = rmsprop(gradient, cache[part], decay, learning_rate)
        if divisors is not None:
            step /= divisors
        total += float(np.abs(step).sum())
        if not math.isfinite(total + (0 if cache is None else cache[channel].sum())):
            return None
        x[channel] += step[0, 0]
    return total / x.size


def argument(term, x, start, mean):
    """The x of a regularizer: the image, or its change from the start image, if there is one, whose
    picture with the `mean` is `start`."""
    return x - (start.astype(np.float64) - mean) if term.of_change and start is not None else x


# ---- The dream --------------------------------------------------------------------------------
# A turn is one colour of tiles in one step. The network's gradients of its tiles are all of the
# image as it was before the turn's first step; steps and regularizers see the image as it is when
# their tile's step is taken, changed by the turn's earlier tiles where they overlap. In
# cnn_vis_lib/ahead.py, tile_gradients sends tiles as early as this allows.


@dataclasses.dataclass(frozen=True)
class Progress:
    """The state of a run after a step, valid until the next one. `size_number` and `step`, at this
    size, count from 1. `get_image` returns the `image`. `stats` is {name: number}, with the names
    in STATS, or None if the step was not measured. `is_silent` is true if the network's gradient
    was zero everywhere. `look` turns a picture of the run into the one that is shown and saved."""

    sizes: list
    size_number: int
    num_steps: int
    step: int
    get_image: object
    mean: float
    stats: dict | None
    is_silent: bool = False
    look: object = None
    contrast: float = CONTRAST

    def __str__(self):
        size = f"size {self.size_number} of {len(self.sizes)}"
        return f"{size}, step {self.step} of {self.num_steps}"

    @property
    def size(self):
        """The (height, width) of the picture."""
        return self.sizes[self.size_number - 1]

    @property
    def image(self):
        """The image, which is the run's own and must not be changed."""
        return self.get_image()

    def steps_done(self):
        """The number of steps done so far, at all sizes."""
        return (self.size_number - 1) * self.num_steps + self.step

    def picture(self, rescale=False, depth=8):
        """The current picture, uint8 (H, W, 3), or uint16 if the depth is 16."""
        picture = to_picture(self.image, self.mean, self.contrast, rescale, depth)
        return self.look(picture) if self.look else picture


MUCH_ENLARGED = 8  # times; then it is told
MOST_THREADS = 8  # for taking steps; enough for 8,000 tiles a second


class Dream:
    """One run: the current image and everything else that the next step depends on.

    `settings` are the Settings, `picture` is the start picture or None for noise, `mean` is the
    number subtracted from its pixels, `engine` is an Engine that has described its network, and
    `scratch` is a folder for arrays that do not fit in memory, or None. `mask` is None or uint8 of
    the picture's size: white areas dream, black ones stay as they are.
    `remarks` are lines for the user about the sizes. Raises BadRequest for impossible sizes.

    `size_number` counts from 1, `step` is the number of steps done at this size, and `tile` is how
    many tiles of the next step have been stepped. `image` is float64 (1, 3, H, W); `caches` are
    RMSProp's, float64 (tiles, 3, h, w), where `cache_index` says which is a region's, or none with
    another --step_rule; `before` is {region: pixels, float32 (3, h, w), as they were before the
    turn} for tiles still to come that others of their turn have begun to change. `gradient_size` is
    the mean absolute value of the network's gradient in the step before this one, 0 if there was
    none, and `gradient_sum` the sum over this step's tiles so far. Of this size only: `start`, the
    start picture, uint8 (1, 3, H, W), blue first and with the mean; `divisors` of steps, float64
    (H, W), infinite where the mask is black; both can be None. Of this step only: `gauge` measures
    it, `is_silent` is true while no gradient was nonzero, and `is_still` while no step was.

    While steps are taken on a GPU, where the picture is on the `canvas`, the `image` and `caches`
    are those of some step before; current_image() and state() bring them up to date.
    """

    NUMBERS = ("learning_rate", "tv_reg", "gradient_size", "gradient_sum")  # in a checkpoint

    def __init__(self, settings, picture, mean, engine, scratch=None, mask=None):
        self.settings, self.picture, self.mean, self.engine = settings, picture, mean, engine
        self.scratch, self.mask = scratch, mask
        base = engine.tile_size if picture is None else picture.shape[:2]
        self.sizes, self.remarks = plan_sizes(settings, base, engine.tile_size)
        times = max(self.sizes[-1]) / max(base)
        if picture is not None and times >= MUCH_ENLARGED:
            told = f"{base[1]} pixels wide and {base[0]} high, is enlarged {times:.0f} times"
            self.remarks.append(f"the start picture, {told}")
        self._tiles = {}
        self.size_number, self.step, self.tile = 1, 0, 0
        self.learning_rate, self.tv_reg = settings.learning_rate, settings.tv_reg
        self.image, self.caches, self.cache_index, self.before = None, None, {}, {}
        self.start, self.divisors = None, None
        self.gradient_size, self.gradient_sum = 0.0, 0.0
        self.gauge, self.canvas, self.is_silent, self.is_still = None, None, False, False
        self.step_tile = compiled_step_tile if compiled_step() else step_tile

    @property
    def size(self):
        """The (height, width) of the picture."""
        return self.sizes[self.size_number - 1]

    def run(self, wants_stats=lambda step: False, is_stopping=lambda: False):
        """Does the run, or the rest of it, yielding a Progress after every step; steps that are
        lost with a GPU are yielded again. wants_stats(step) says whether to measure a step. Ends
        when is_stopping() becomes true, even amid a step. Raises NotFinite if a step overflows (the
        image keeps its last finite values), and RunFailed if no step can change the picture."""
        keep_freed_memory()
        is_begun = self.image is not None
        with concurrent.futures.ThreadPoolExecutor(min(MOST_THREADS, count_cores())) as pool:
            while True:
                self.lay_out()
                if not is_begun:
                    self.begin_size()
                steps = Steps(pool if self.engine.is_elsewhere else None)
                yield from self._steps(steps, wants_stats, is_stopping)
                if self.size_number == len(self.sizes) or is_stopping():
                    return
                self.size_number, self.step, is_begun = self.size_number + 1, 0, False

    def tiles(self, size):
        """The regions at a size, by dreaming_tiles. Raises BadRequest if there are none."""
        size = tuple(size)
        if size not in self._tiles:
            colours = dreaming_tiles(size, self.engine.tile_size, self.mask)
            if not any(colours):
                problem = f"it is all black when resized to {size[0]}x{size[1]}"
                raise refusal("mask", self.settings.mask, problem, "use larger sizes")
            self._tiles[size] = colours
        return self._tiles[size]

    def lay_out(self):
        """Prepares what depends only on the size: regions, start image and divisors of steps."""
        size, tile_size = self.size, self.engine.tile_size
        regions = itertools.chain(*self.tiles(size))
        self.cache_index = {region: i for i, region in enumerate(regions)}
        self.start = None
        if self.picture is not None:
            self.start = planes(resize(self.picture, size, bilinear=True))  # includes the mean
        has_own_rates = self.settings.use_pixel_learning_rates
        self.divisors = tile_counts(size, tile_size) if has_own_rates else None
        if self.mask is not None:
            self.divisors = np.ones(size) if self.divisors is None else self.divisors
            self.divisors[resize(self.mask, size, bilinear=True) == 0] = np.inf  # no step at all

    def begin_size(self):
        """Brings the image to the size that lay_out prepared; caches and schedules start over."""
        s = self.settings
        self.caches = None  # frees memory; the image stays until the next one is complete
        if self.image is None:
            start = None if self.start is None else from_planes(self.start)
            self.image = start_image(s, start, self.size, self.mean, self.scratch)
        else:
            self.image = self._enlarged()
        caches = len(self.cache_index) if self.has_caches else 0
        self.caches = zeros((caches, 3, *self.engine.tile_size), self.scratch)
        self.learning_rate, self.tv_reg = s.learning_rate, s.tv_reg

    def _enlarged(self):
        """The image, which is that of the size before, at this size."""
        image, mean = zeros((1, 3, *self.size), self.scratch), self.mean
        if self.settings.enlarge == "change":
            old = self.picture
            if old is not None:
                old = planes(resize(old, self.image.shape[2:], bilinear=True))
            enlarge_change(self.image, old, self.start, mean, image)
        else:
            picture = to_picture(self.image, mean, self.settings.contrast)
            from_uint8(resize(picture, self.size), mean, image)
        if self.mask is not None:  # what must stay gains no contrast
            for channel, start in enumerate(self.start[0]):
                np.copyto(image[0, channel], start - mean, where=np.isinf(self.divisors))
        return image

    @property
    def has_caches(self):
        """Whether the step needs RMSProp's caches."""
        return self.settings.step_rule == "rmsprop"

    def _steps(self, steps, wants_stats, is_stopping):
        """Does the remaining steps at this size, yielding a Progress after each."""
        self.engine.expect(max(map(len, self.tiles(self.size))))
        self.canvas = self.engine.canvas(self, is_stopping)
        while self.step < self.settings.num_steps and not is_stopping():
            left = range(self.step + 1, self.settings.num_steps + 1)
            if here := self.canvas.not_there(left, wants_stats) if self.canvas else left:
                yield from self._steps_here(here, steps, wants_stats, is_stopping)
            elif self.canvas.load():
                yield from self.canvas.steps(wants_stats)
        if self.canvas is not None:  # it is for this size
            self.canvas.close()

    def _steps_here(self, numbers, steps, wants_stats, is_stopping):
        """Does steps, by their numbers, with the image in memory."""
        colours = self.tiles(self.size)
        turns = ((colour, wants_stats(step)) for step in numbers for colour in colours)
        turns = after_tiles(self.tile, turns)
        gradients = tile_gradients(self.engine, self.image, turns, steps, self.before, is_stopping)
        for step in numbers:
            is_whole, count = self.tile == 0, len(self.cache_index)
            if not wants_stats(step):
                self.gauge = None
            elif is_whole or self.gauge is None:
                self.gauge = Gauge()
            self.is_silent = self.is_still = is_whole
            terms = self.regularizers()
            with np.errstate(over="ignore"):  # tiles are sent as float32; the step will detect it
                for region, gradient, loss in itertools.islice(gradients, count - self.tile):
                    self._step_tile(steps, region, gradient, loss, terms)
                    self.tile += 1
            steps.wait()
            if self.tile < count:
                assert is_stopping(), "tiles are missing"
                return
            yield self.end_step(self.gauge and self.gauge.summary(self.image))

    def _step_tile(self, steps, region, descent, loss, terms):
        """Takes the step of a tile, and measures it if there is a gauge."""
        self.is_silent = self.is_silent and not descent.any()
        scaled = descent
        if self.settings.step_rule == "mean":
            self.gradient_sum += float(np.abs(descent).mean(dtype=np.float64))
            size = self.gradient_size or self.gradient_sum / (self.tile + 1)
            scaled = descent * np.float32(self.settings.strength / (size or 1))
        if self.gauge is None:
            steps.take(region, self._take_step, region, scaled, terms)
        else:
            steps.wait()
            x, start = cut_tile(self.image, region), self._start_of(region, terms)
            pairs = {
                name: (term, argument(term, x, start, self.mean)[np.newaxis])
                for name, term in terms.items()
            }
            self.gauge.add_tile(loss, x, descent, pairs)
            self.gauge.add(step_size=self._take_step(region, scaled, terms))

    def _start_of(self, region, terms):
        """The region of the start picture, uint8 (3, H, W); None if there is no start picture or no
        term needs it."""
        if self.start is None or not any(term.of_change for term in terms.values()):
            return None
        return cut_tile(self.start, region)

    def _take_step(self, region, descent, terms):
        """Takes a tile's step; returns its mean absolute value. Raises RunFailed, NotFinite."""
        y0, y1, x0, x1 = region
        x, start = cut_tile(self.image, region), self._start_of(region, terms)
        cache = self.caches[self.cache_index[region]] if self.has_caches else None
        divisors = None if self.divisors is None else self.divisors[y0:y1, x0:x1]
        arrays = (x, start, self.mean, descent, cache, divisors)
        rates = (self.settings.decay_rate, self.learning_rate)
        with np.errstate(all="ignore"):  # step_tile returns None on overflow
            step_size = self.step_tile(*arrays, terms, *rates)
        if step_size is None:
            raise self._overflow(x, np.isfinite(descent).all())
        if step_size:
            self.is_still = False
        return step_size

    def _overflow(self, x, is_finite):
        """The NotFinite for a step after x; `is_finite` is whether the network's gradient was."""
        is_first = (self.size_number, self.step) == (1, 0) and np.abs(x).max() < 1e6
        if is_first and not is_finite:  # no step has caused this
            return NotFinite(
                "the network's gradient of the start picture is not a number; unless --l1_weight "
                "or --l2_weight is huge, check that the network's files belong together"
            )
        return NotFinite(
            f"the picture overflowed at step {self.step + 1} of size {self.size_number}; lower "
            "--learning_rate, --strength, the weights (--p_reg, --p_reg_aux, --tv_reg, "
            "--l1_weight, --l2_weight) or the exponents (--alpha, --alpha_aux, --beta)"
        )

    def regularizers(self):
        """The regularizers whose weight is not 0, {name: term}, in the original's order."""
        s = self.settings
        terms = {
            "p": PNorm(s.p_reg, s.alpha, s.p_scale, of_change=True),
            "aux": PNorm(s.p_reg_aux, s.alpha_aux, s.p_scale_aux),
            "tv": TotalVariation(
                self.tv_reg, s.beta, s.tv_grad_operator, s.tv_reg_scale, s.enlarge == "change"
            ),
        }
        return {name: term for name, term in terms.items() if term.weight}

    def end_step(self, stats=None):
        """Counts a step and advances both schedules, which count the steps at this size. Returns
        the Progress. Raises RunFailed if no step can change the picture."""
        s = self.settings
        self.gradient_size, self.gradient_sum = self.gradient_sum / len(self.cache_index), 0.0
        self.step, self.tile = self.step + 1, 0
        if self.step % s.learning_rate_decay_iter == 0:
            self.learning_rate *= s.learning_rate_decay_fraction
        if self.step % s.tv_reg_step_iter == 0:
            self.tv_reg += s.tv_reg_step
        # At a size before the last, the gradient may be nonzero at a larger one.
        is_last = self.size_number == len(self.sizes)
        if is_last and self.is_silent and self.is_still and not s.tv_reg_step:
            raise RunFailed(
                f"no step changes the picture: the gradient of {s.target_layer} is zero "
                "everywhere; choose another layer or channel, or another picture"
            )
        return self.progress(stats)

    def current_image(self):
        """The image as it stands. Raises RunFailed."""
        if self.canvas is not None:
            self.canvas.fetch()
        return self.image

    def progress(self, stats=None):
        """The current Progress of the run."""
        where = (self.sizes, self.size_number, self.settings.num_steps, self.step)
        seen = (stats, self.is_silent, self.look, self.settings.contrast)
        return Progress(*where, self.current_image, self.mean, *seen)

    def look(self, picture):
        """Turns a picture of the run into the one that is shown and saved: in the start picture's
        colours, if these are kept, and mixed with the start picture as the mask says. Grey in the
        mask matters only here; the run itself dreams wherever the mask is not black."""
        if self.picture is None:
            return picture
        return mixed(picture, self.picture, self.settings.keep_colors, self.mask)

    def is_done(self):
        """Whether all steps have been done."""
        return self.size_number == len(self.sizes) and self.step == self.settings.num_steps

    def has_state(self):
        """Whether there is a state to continue from; not while a size is being prepared."""
        return self.caches is not None and self.image.shape[2:] == tuple(self.size)

    def state(self):
        """Everything that the next step depends on, apart from settings, picture and network:
        ({name: number}, {name: array})."""
        self.current_image()
        numbers = {"size": self.size_number, "step": self.step, "tile": self.tile}
        numbers |= {name: getattr(self, name) for name in self.NUMBERS}
        if self.tile:
            numbers["gauge"] = self.gauge and self.gauge.state()
            numbers["before"] = [self.cache_index[region] for region in self.before]
        arrays = {"image": self.image, "caches": self.caches}
        if self.before:
            arrays["before"] = np.stack(list(self.before.values())).astype(np.float32)
        return numbers, arrays

    def restore(self, numbers, arrays):
        """Continues from a `state`. Raises ValueError, KeyError or TypeError if it does not fit the
        run."""
        # Early versions saved checkpoints after whole steps only, and knew no step_rule.
        numbers = {"tile": 0, "gradient_size": 0, "gradient_sum": 0} | numbers
        size_number, step, tile = (numbers[name] for name in ("size", "step", "tile"))
        most_steps = self.settings.num_steps
        is_whole = type(size_number) is type(step) is type(tile) is int
        if not (is_whole and 1 <= size_number <= len(self.sizes) and 0 <= step <= most_steps):
            raise ValueError("its step is outside the run")
        size, tile_size = self.sizes[size_number - 1], self.engine.tile_size
        regions = [*itertools.chain(*self.tiles(size))]
        if not 0 <= tile <= (len(regions) - 1 if step < most_steps else 0):
            raise ValueError("its tile is outside the run")
        indices = numbers.get("before", [])
        shapes = {
            "image": ("float64", 1, 3, *size),
            "caches": ("float64", len(regions) if self.has_caches else 0, 3, *tile_size),
        }
        if indices:
            shapes["before"] = (np.float32, len(indices), 3, *tile_size)
        check_arrays({name: arrays[name] for name in shapes}, shapes)
        with np.errstate(all="ignore"):
            if not all(np.isfinite(arrays[name].sum()) for name in shapes):
                raise ValueError("its numbers are not finite")
        for name in self.NUMBERS:
            setattr(self, name, float(numbers[name]))
        self.size_number, self.step, self.tile = size_number, step, tile
        self.image, self.caches = arrays["image"], arrays["caches"]
        self.before = {regions[i]: pixels for i, pixels in zip(indices, arrays.get("before", ()))}
        self.gauge = Gauge(numbers["gauge"]) if numbers.get("gauge") else None


# ---- Options ----------------------------------------------------------------------------------
# An option is defined once: its default in Settings, if it determines the picture, and all else in
# its entry below. cnn_vis_lib/options.py says what an entry can have besides argparse's arguments.


def layer_terms(text):
    """A type for argparse: the Objective that --layer names. Settings.objective sets its form."""
    terms = parse_terms(not_empty(text))
    targets = (Target(layer, channels=channels, weight=weight) for weight, layer, channels in terms)
    return Objective(tuple(targets), text)


@dataclasses.dataclass(frozen=True)
class Settings:
    """The options, by name, that determine the picture, apart from the network. A resumed run
    cannot change them."""

    input_size: tuple | None = None  # (height, width)
    input_scale: float | None = None
    tf32: bool = False
    image_type: str = "amplify_layer"
    target_layer: Objective = Objective((Target("inception_4d/3x3_reduce"),))
    target_neuron: int = 0
    guide: str | None = None
    amplify_l1_weight: float = 1.0
    amplify_l2_weight: float = 1.0
    amplify_grad_clip: float = 5.0
    initial_image: str | None = None
    background: str = "white"
    mask: str | None = None
    keep_colors: bool = False
    initialization_scale: float = 1.0
    initialization_blur: float = 0.0
    seed: int | None = None
    initial_size: str | None = None
    final_size: str | None = None
    num_sizes: int = 1
    resize_type: str = "geometric"
    enlarge: str = "picture"
    contrast: float = CONTRAST
    num_steps: int = 1000
    learning_rate: float = 1.0
    step_rule: str = "rmsprop"
    strength: float = 1.0
    decay_rate: float = 0.95
    learning_rate_decay_iter: int = 100
    learning_rate_decay_fraction: float = 1.0
    use_pixel_learning_rates: bool = False
    alpha: float = 6.0
    p_scale: float = 1.0
    p_reg: float = 1e-4
    alpha_aux: float = 6.0
    p_scale_aux: float = 1.0
    p_reg_aux: float = 0.0
    beta: float = 2.0
    tv_reg: float = 0.5
    tv_reg_scale: float = 1.0
    tv_reg_step: float = 0.0
    tv_reg_step_iter: int = 50
    tv_grad_operator: str = "naive"
    depth: int = 8
    rescale_image: bool = False

    @classmethod
    def of(cls, options):
        """The Settings among the parsed options; draws a random seed if noise needs one."""
        values = {field.name: getattr(options, field.name) for field in dataclasses.fields(cls)}
        if values["initial_image"] is None and values["seed"] is None:
            values["seed"] = np.random.SeedSequence().entropy % 2**32
        return cls(**values)

    def objective(self):
        """The Objective, with its targets in the form that the settings ask for."""
        form = IMAGE_TYPES["guide" if self.guide else self.image_type]
        targets = self.target_layer.targets
        return Objective(
            tuple(dataclasses.replace(t, form=form(self, t.channels)) for t in targets)
        )


# fmt: off
def target_options(add):
    def names_all_channels(options):
        layers = listed(options.target_layer)
        return all(target.channels for layer in layers for target in layer.targets)

    def is_not(image_type):
        return lambda o: (
            o.guide and "--guide" or o.image_type != image_type and f"--image_type {o.image_type}"
        )

    add("--image_type", choices=("amplify_layer", "amplify_neuron"),
        idle=lambda o: o.guide and "--guide",
        help="amplify the whole layer, or one channel of it")
    add("--target_layer", "--layer", metavar="TERMS", type=layer_terms, action=Several,
        help="layer to amplify, or a sum of terms: [WEIGHT*]LAYER[:CHANNELS] + ...; CHANNELS are "
        "numbers and ranges, such as 17,40-47; or strong5, the five strongest in the start "
        "picture; or, in a classifier, names of classes; with --output FOLDER/, repeat the option "
        "to make a picture for each layer")
    add("--target_neuron", metavar="N", type=number(int, 0),
        idle=lambda o: is_not("amplify_neuron")(o)
        or names_all_channels(o) and f"--layer {o.target_layer}",
        help="channel for amplify_neuron, numbered from 0, if --layer names none")
    add("--guide", metavar="FILE", type=file_name, file="read",
        help="picture to be guided by: each place of the dream becomes more like the place in it "
        "that the layer finds most similar")
    add("--amplify_l1_weight", "--l1_weight", metavar="W", type=number(float),
        idle=is_not("amplify_layer"),
        help="for amplify_layer: weight of the absolute activations in the target's gradient")
    add("--amplify_l2_weight", "--l2_weight", metavar="W", type=number(float),
        idle=is_not("amplify_layer"),
        help="for amplify_layer: weight of the clipped activations in the target's gradient")
    add("--amplify_grad_clip", "--grad_clip", metavar="A", type=number(float, 0),
        idle=is_not("amplify_layer"),
        help="for amplify_layer: activation at which the l2 part is clipped")


def start_options(add):
    def has_image(options):
        return options.initial_image and "--image"

    add("--initial_image", "--image", metavar="FILE", type=file_name, file="read", nargs="+",
        action=Several,
        help="picture to start from (default: noise); with --output FOLDER/, give several files "
        "or a folder to make a picture from each; --image itself can be left out")
    add("--background", metavar="COLOUR", type=colour,
        idle=lambda o: not (o.initial_image or o.guide) and "without --image",
        help="colour to put behind a transparent picture: a name or #rrggbb")
    add("--mask", metavar="FILE", type=mask_name, file="read", words=("alpha",),
        help="picture that shows where to dream: white areas dream, black areas stay as in "
        "--image, grey is a mixture; or alpha: dream where --image is opaque (default: everywhere)")
    add("--keep_colors", "--keep_colours", action="store_true",
        idle=lambda o: not o.initial_image and "without --image",
        help="show and save the dream in the colours of --image")
    add("--initialization_scale", metavar="S", type=number(float), idle=has_image,
        help="standard deviation of the noise, in grey levels")
    add("--initialization_blur", metavar="S", type=number(float, 0, 1000),
        idle=has_image, help="sigma of the Gaussian blur of the noise, in pixels")
    add("--seed", metavar="N", type=number(int, 0, 2**32 - 1), idle=has_image,
        help="random seed for the noise, to repeat a run (default: random, and printed)")


def size_options(add):
    add("--initial_size", metavar="SIZE",
        help="first size: HxW, the longer side, xF or smallest, see below (default: the base size)")
    add("--final_size", metavar="SIZE", idle=when("num_sizes", 1),
        help="last size, if --num_sizes is above 1, as HxW (height x width), or the longer side "
        "(default: the base size)")
    add("--num_sizes", metavar="N", type=number(int, 1, 10_000),
        help="number of sizes; 1: --initial_size only")
    add("--resize_type", choices=("geometric", "linear"),
        idle=when("num_sizes", 1), help="how the sizes from first to last are spaced")
    add("--enlarge", choices=("picture", "change"),
        help="what is enlarged to the next size: the picture, in 8 bits; or only its change from "
        "--image, which is then added to --image at that size, so that the photograph stays sharp; "
        "with change, total variation too is that of the change")
    add("--contrast", metavar="F", type=number(float, high=1000, above=0),
        help="multiply contrast by F when the picture is saved or, with --enlarge picture, "
        "enlarged, and that of noise at the start; 1 leaves a photograph's contrast as it is")
    add("--scratch", metavar="FOLDER", type=scratch_folder, text=None,
        help="keep a run's largest arrays in unnamed files in this folder, so that large pictures "
        "need less memory (default: keep them in memory)")


def step_options(add):
    add("--num_steps", metavar="N", type=number(int, 1), help="steps at each size")
    add("--learning_rate", metavar="R", type=number(float, above=0),
        help="step size, roughly in grey levels")
    add("--step_rule", choices=("rmsprop", "mean"),
        help="divide the gradient, for each pixel, by the size that it has had there, so that all "
        "pixels change about equally; or the network's gradient by its mean size in all tiles, so "
        "that the dream grows where the network sees something, with --p_reg 0 and low --tv_reg")
    add("--strength", metavar="F", type=number(float, high=1000, above=0),
        idle=lambda o: o.step_rule != "mean" and f"--step_rule {o.step_rule}",
        help="multiply the network's gradient by F, with --step_rule mean: 0.5 for a weak dream, 2 "
        "for a strong one")
    add("--decay_rate", metavar="D", type=number(float, 0, 1), idle=when("step_rule", "mean"),
        help="decay rate of RMSProp's running average of squared gradients")
    add("--learning_rate_decay_iter", metavar="N", type=number(int, 1),
        idle=when("learning_rate_decay_fraction", 1),
        help="multiply the learning rate by --learning_rate_decay_fraction every N steps")
    add("--learning_rate_decay_fraction", "--learning_rate_decay_factor", metavar="F",
        type=number(float, above=0),
        idle=too_few_steps("learning_rate_decay_iter"),
        help="multiply the learning rate by F every --learning_rate_decay_iter steps; 1: constant")
    add("--use_pixel_learning_rates", action="store_true",
        help="divide each pixel's steps by the number of tiles that cover it")


def regularizer_options(add):
    def has_no_tv(options):
        return not (options.tv_reg or options.tv_reg_step) and "--tv_reg 0"

    add("--alpha", metavar="P", type=number(float, 1), idle=when("p_reg", 0),
        help="exponent of the p-norm of the change from the start picture (of the picture itself "
        "if the run starts from noise)")
    add("--p_scale", metavar="S", type=number(float, above=0), idle=when("p_reg", 0),
        help="unit of the p-norm, in grey levels")
    add("--p_reg", metavar="W", type=number(float),
        help="weight of the p-norm; 0: none")
    add("--alpha_aux", metavar="P", type=number(float, 1), idle=when("p_reg_aux", 0),
        help="exponent of the second p-norm, always of the picture itself")
    add("--p_scale_aux", metavar="S", type=number(float, above=0),
        idle=when("p_reg_aux", 0), help="unit of the second p-norm, in grey levels")
    add("--p_reg_aux", metavar="W", type=number(float),
        help="weight of the second p-norm; 0: none")
    add("--beta", metavar="B", type=number(float, above=0), idle=has_no_tv,
        help="exponent of total variation")
    add("--tv_reg", metavar="W", type=number(float),
        help="weight of total variation; 0: none")
    add("--tv_reg_scale", metavar="S", type=number(float, above=0), idle=has_no_tv,
        help="unit of total variation, in grey levels")
    add("--tv_reg_step", metavar="W", type=number(float),
        idle=too_few_steps("tv_reg_step_iter"),
        help="added to --tv_reg every --tv_reg_step_iter steps")
    add("--tv_reg_step_iter", metavar="N", type=number(int, 1),
        idle=when("tv_reg_step", 0), help="add --tv_reg_step to --tv_reg every N steps")
    add("--tv_grad_operator", choices=tuple(TV_OPERATORS), idle=has_no_tv,
        help="how total variation measures slopes")


# fmt: on


def fill_parser():
    """Adds the options to PARSER, in the groups of --help. An option's first name is the original
    program's; the others are those in its README."""
    PARSER.clear()  # this module may be loaded again
    version = f"{PROGRAM} {__version__}"
    PARSER.add_argument("--version", action="version", version=version, help="show the version")
    group = functools.partial(PARSER.group, settings=Settings)
    network = group("network")
    network_options(network)
    device_options(network)
    target_options(group("target"))
    start_options(group("start picture"))
    size_options(group("sizes"))
    step_options(group("steps"))
    keep = "keep the picture smooth and its values in range"
    regularizer_options(group("regularizers", keep))
    output_options(group("output"))


fill_parser()


# ---- Making a picture -------------------------------------------------------------------------


def numbered(spec, objective, settings, inputs, scratch=None):
    """(In a worker.) The Objective with words for channels replaced by numbers: "strongN" by the N
    channels with the largest total_activity, class names by their numbers. Raises BadRequest."""
    network, targets = Network(spec), []
    is_strong = any(strong(word) for target in objective.targets for word in target.channels or ())
    activity = total_activity(network, settings, inputs, scratch) if is_strong else {}
    for target in objective.targets:
        numbers = {}
        for word in target.channels or ():
            if number := strong(word):
                order = np.argsort(-activity[target.layer], kind="stable")
                numbers |= dict.fromkeys(sorted(map(int, order[:number])))
            else:
                numbers[class_of(target.layer, word, network.shapes[target.layer])] = None
        channels = tuple(numbers) if target.channels else None
        targets.append(dataclasses.replace(target, channels=channels))
    return Objective(tuple(targets))


def total_activity(network, settings, inputs, scratch=None):
    """The mean absolute activation of each layer's channels, {layer: array (C,)}, summed over the
    tiles of the start image at the first size, except those that are all black in the mask."""
    base = network.tile_size if inputs.picture is None else inputs.picture.shape[:2]
    size = plan_sizes(settings, base, network.tile_size)[0][0]
    start = None if inputs.picture is None else resize(inputs.picture, size, bilinear=True)
    image = start_image(settings, start, size, network.mean, scratch)
    regions = itertools.chain(*dreaming_tiles(size, network.tile_size, inputs.mask))
    activity = {layer: np.zeros(shape[0]) for layer, shape in network.shapes.items()}
    for layer, a in tile_activations(network, image, regions):
        activity[layer] += np.abs(a).mean(axis=1, dtype=np.float64)
    return activity


def with_numbers(settings, network, inputs, scratch=None):
    """(settings, remarks), with the words for channels in --layer replaced by the channels'
    numbers. Raises BadRequest, RunFailed."""
    objective = settings.target_layer
    if not any(type(word) is str for target in objective.targets for word in target.channels or ()):
        return settings, []
    spec = NetworkSpec(network, objective.layers(), input_size=settings.input_size)
    objective = in_a_worker(numbered, spec, objective, settings, inputs, scratch)
    remark = f"--layer {settings.target_layer} is {objective}"
    return dataclasses.replace(settings, target_layer=objective), [remark]


@contextlib.contextmanager
def prepared_dream(settings, inputs, network, engines, options, held=0):
    """Context manager: (the Dream of a run, the NetworkFiles with its guide, remarks), with the
    engine started and all checked that is not about the run's output. `held` is as for check_room.
    Raises BadRequest, RunFailed."""
    settings, remarks = with_numbers(settings, network, inputs, options.scratch)
    objective = settings.objective()
    with with_guide(network, inputs.guide) as network:
        spec = NetworkSpec(
            network,
            objective.layers(),
            input_size=settings.input_size,
            tf32=settings.tf32,
            objective=objective.caffe_layer(),
        )
        engine = engines.get(spec, objective)
        dream = Dream(settings, inputs.picture, network.mean, engine, options.scratch, inputs.mask)
        # All tiles, even if a mask spares some: to know which, one needs memory for a mask.
        tile = math.prod(engine.tile_size) if dream.has_caches else 0
        cached = [tile * tile_number(size, engine.tile_size) for size in dream.sizes]
        check_room(settings, dream.sizes, cached, options.scratch, held)
        for size in dream.sizes:
            dream.tiles(size)  # checks the mask
        yield dream, network, [*remarks, *dream.remarks]


def make_picture(options, signals, engines, checkpoint=None, batch=None, network=None):
    """Makes the picture that the options ask for, continuing from `checkpoint` if there is one.
    `batch` is its place among several pictures; `network` is what find_network finds."""
    files = Files(options.output_file, options.resume)
    watchers = Watchers(options, files)
    outputs = plan_outputs(options, files, watchers)
    settings, batch = Settings.of(options), batch or Batch()
    if checkpoint is None:
        inputs, remarks = read_inputs(settings)
    else:
        inputs, remarks = kept_inputs(settings, checkpoint, options.resume), []
    network = network or find_network(options)
    check_apart(options, files, network)
    with contextlib.ExitStack() as stack:
        stack.enter_context(sole_writer(outputs + files.resumed_from()))
        held = 0
        if checkpoint is not None:
            check_same_network(options.resume, checkpoint.record, network)
            held = checkpoint.held()
        prepared = prepared_dream(settings, inputs, network, engines, options, held)
        dream, network, more = stack.enter_context(prepared)
        earlier = checkpoint and checkpoint.record
        facts = (dream.settings, network, dream.sizes, earlier, batch.typed)
        record = make_record(options, *facts)
        record["device"] = "GPU" if dream.engine.spec.use_gpu else "CPU"
        if checkpoint is not None:
            more += go_on(dream, checkpoint, record, options.resume)
        kept = {} if checkpoint is None else checkpoint.arrays
        check_sides(files.picture, dream.sizes)
        announce(options, network, dream, [*remarks, *more], batch)
        make_room(options, files, record)
        watch(Run(options, files, watchers, inputs, dream, record, kept, batch), signals)


def check_layers(jobs, network, call):
    """Raises BadRequest if the network lacks a layer or channel that one of the jobs asks for.
    `call` is in_a_worker or the like."""
    targets = dict.fromkeys(t for job in jobs for t in Settings.of(job).objective().targets)
    with contextlib.suppress(CaffeStopped):  # a layer that is not needed may stop it
        call(check_targets, network, jobs[0].input_size, tuple(targets))


def dream(image=None, **options):
    """The program as a library: performs a run and yields a Progress after every step.

        for progress in cnn_vis.dream("in.jpg", layer="inception_4c/output", num_steps=20):
            picture = progress.picture()  # uint8 (H, W, 3)

    `image` is a file name, an RGB array, uint8 (H, W, 3) (or what NumPy can convert to one), or
    None for noise. The options are those of the command line, by any of their names and with the
    same defaults; of those for output only `quiet` has an effect. A Progress is valid until the
    next one is requested; close the generator to end a run early. Notices go to the logger
    "cnn_vis". Raises BadRequest, when the first step is requested, and RunFailed."""
    if isinstance(image, (str, os.PathLike)):
        options["image"], image = os.fspath(image), None
    elif image is not None:
        options["image"], image = "an array", checked_array(image)  # the name is for notices
    parsed = keyword_options(options)
    check_preset(parsed)
    settings = Settings.of(parsed)
    inputs, remarks = read_inputs(settings, image)
    network = find_network(parsed)
    if not parsed.quiet and (notice := stand_in_notice(parsed.model, network.name)):
        log.warning(notice)
    if inputs.picture is None:
        remarks.append(f"noise seed {settings.seed}")
    with (
        Engines(parsed) as engines,
        prepared_dream(settings, inputs, network, engines, parsed) as (run, network, more),
    ):
        engine = run.engine
        for line in [*idle(parsed, engine), *network.notices, *remarks, *more, *engine.notices]:
            log.info(line)
        yield from run.run()


# ---- Command line -----------------------------------------------------------------------------


def command_line(argv, signals):
    """Executes a command line."""
    argv = PARSER.read_files(argv)
    options = PARSER.parse_args(argv)
    log.setLevel(logging.ERROR if options.quiet else logging.INFO)
    for name, command in COMMANDS.items():
        if getattr(options, name):
            command(options)
            return
    checkpoint = None
    if options.resume:
        options, checkpoint = resume(options.resume, argv, options.scratch)
    check_surroundings()
    jobs, notices = (None, []) if checkpoint else plan_batch(options)
    with Engines(options) as engines:
        if jobs:
            make_pictures(jobs, notices, signals, engines, make_picture, check_layers)
        else:
            make_picture(options, signals, engines, checkpoint)


def main(argv=None):
    """Runs the command line; returns the exit status."""
    mend_streams()
    argv = sys.argv[1:] if argv is None else argv
    if not argv:
        say(f"What is to be made? For example:\n{USAGE}", "stderr")
        return 2
    handler, before = LineHandler(), (log.level, log.propagate)
    log.addHandler(handler)
    log.propagate = False  # a caller's own logging would print the lines again
    try:
        with Signals() as signals:
            command_line(argv, signals)
    except (BadRequest, RunFailed, OSError, MemoryError, ModuleNotFoundError) as error:
        if isinstance(error, ModuleNotFoundError):
            error = BadRequest(missing_package(error))
        error = OutOfMemory() if isinstance(error, MemoryError) else error
        log.error(f"error: {one_line(error)}{remedy_of(error)}")
        return 2 if isinstance(error, BadRequest) else 1
    except Stopped as stop:
        log.error(str(stop))
        return 128 + stop.signum
    finally:
        log.removeHandler(handler)
        log.level, log.propagate = before
    return 0
