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
import dataclasses
import difflib
import functools
import importlib.util
import itertools
import math
import multiprocessing
import multiprocessing.shared_memory
import os
import re
import shutil
import signal
import sys
import tempfile
import zlib

import numpy as np

__version__ = "1.0.0"

FLOOR = 1e-3  # under the squared gradient in total variation
EPSILON = 1e-8  # under RMSProp's square root
GAIN = 1.2  # contrast gained whenever a picture becomes 8-bit
TV_OPERATORS = {  # slopes: (difference along the axis, smoothing across it), both as correlation kernels
    "naive": ((1, -1), (1, 0)),
    "sobel": ((-1, 0, 1), (1, 2, 1)),
    "sobel_squish": ((-1, 1, 0), (1, 2, 1)),
}


class BadRequest(Exception):
    """What the user asked for cannot be done; the message names the option, the value and the remedy. Exit status 2."""


class RunFailed(Exception):
    """A run that was asked for rightly went wrong. Exit status 1."""


# ---- Pictures in --------------------------------------------------------------------------------------------------------


def read_picture(path):
    """The picture in the file `path`: uint8 (H, W, 3), RGB. Raises BadRequest."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as file:
            return np.asarray(ImageOps.exif_transpose(file).convert("RGB"))
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise BadRequest(f"--image {path}: cannot be read as a picture ({one_line(error)}); give a PNG or JPEG file") from None


def to_uint8(image, mean, rescale=False):
    """What one sees of `image` (1, 3, H, W): uint8 (H, W, 3) RGB, truncated; with `rescale` stretched instead of clipped."""
    picture = GAIN * image[0, ::-1].transpose(1, 2, 0) + mean
    if rescale:
        low, high = picture.min(), picture.max()
        picture = 255 * (picture - low) / ((high - low) or 1)
    return np.clip(picture, 0, 255).astype(np.uint8)


def from_uint8(picture, mean):
    """uint8 (H, W, 3) RGB to float64 (1, 3, H, W) BGR without the mean. No gain, so not the inverse of to_uint8."""
    return np.ascontiguousarray(picture[:, :, ::-1].transpose(2, 0, 1)[np.newaxis], dtype=np.float64) - mean


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


# ---- Sizes and tiles ----------------------------------------------------------------------------------------------------


def parse_size(text, base):
    """A size as an option gives it ("HxW", "xF" or None) as (height, width); `base` is (height, width). Raises ValueError."""
    if text is None:
        return tuple(base)
    height, _, width = text.partition("x")
    size = (int(height), int(width)) if height else tuple(int(float(width) * side) for side in base)
    if min(size) < 1:
        raise ValueError(f"{size[0]}x{size[1]} has no pixels")
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


def tile_counts(size, tile):
    """How many tiles cover each pixel, float64 (H, W)."""
    counts = np.zeros(size)
    for y0, y1, x0, x1 in sum(tiles(size, tile), []):
        counts[y0:y1, x0:x1] += 1
    return counts


# ---- Regularizers -------------------------------------------------------------------------------------------------------
# Losses and gradients by x, an array (1, 3, H, W), float64. Exponents in use are halves and quarters of whole numbers, which
# square roots and products give several times faster than a general power.


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


# ---- Objective ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is to grow. With `neuron` None, every activation a of the target: l1 a|a| / 2 + l2 a^2 / 2, the square going on
    as a straight line beyond `clip`. Else the sum of channel `neuron`."""

    neuron: int | None = None
    l1: float = 1.0
    l2: float = 1.0
    clip: float = 5.0

    def value(self, a):
        """The objective of the activations `a` (N, C, ...), a number."""
        if self.neuron is not None:
            return float(a[:, self.neuron].sum(dtype=np.float64))
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


# ---- Network: which one -------------------------------------------------------------------------------------------------

ILSVRC_MEAN = "imagenet/ilsvrc_2012_mean.npy"
GOOGLENET_DEPLOY = "models/bvlc_googlenet/deploy.prototxt"


@dataclasses.dataclass(frozen=True)
class Model:
    """A network known by name.

    `mean` is taken off its input; None: the mean of Caffe's ilsvrc mean image. `url` is where the weights are to be had, or
    an archive with a file `member` in it; `hashes` ("sha1:..." or "sha256:...") are those of the right weights or archive.
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


HERE = os.path.dirname(os.path.abspath(__file__))
MODELS = {
    model.name: model
    for model in (
        Model("googlenet_mini", hashes=("sha256:a8bbb582c8269f3628181e4b45107f1f4a6caa3b4f26eea638a092fc2cf5263f",)),
        Model("bvlc_googlenet", "http://dl.caffe.berkeleyvision.org/bvlc_googlenet.caffemodel",
              ("sha1:405fc5acd08a3bb12de8ee5e23a96bec22f08204",)),
        # The published sha1 of Places205 does not say whether it is the archive's or the weights'.
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
    """The Model that `name` (or None) stands for. Without a name it is BVLC GoogLeNet, or the small network that comes
    along where BVLC GoogLeNet is not installed and no file (`given_files`) was named in its place."""
    model = MODELS[name or "bvlc_googlenet"]
    if name is None and not given_files and model.find_weights() is None and MODELS["googlenet_mini"].find_weights():
        print(
            "BVLC GoogLeNet is not installed: using googlenet_mini, a small imitation. "
            "To get the real one: python cnn_vis.py --download_model bvlc_googlenet",
            file=sys.stderr,
        )
        return MODELS["googlenet_mini"]
    return model


def find_file(option, value):
    """The file that an option names, with ~ and variables expanded. Raises BadRequest."""
    path = os.path.expanduser(os.path.expandvars(value))
    if not os.path.isfile(path):
        reason = "is a folder, not a file" if os.path.isdir(path) else "no such file"
        raise BadRequest(f"--{option} {path}: {reason}; give another path")
    return path


def read_mean(path):
    """The mean of the mean image (.npy), in the file's own dtype. Raises BadRequest."""
    try:
        mean = float(np.load(path).mean())
    except (OSError, ValueError, TypeError, EOFError) as error:
        raise BadRequest(f"--mean_image {path}: cannot be read as an array ({one_line(error)}); give a .npy file") from None
    if not math.isfinite(mean):
        raise BadRequest(f"--mean_image {path}: its mean is {mean}; give another file")
    return mean


# ---- Network: fetching one ----------------------------------------------------------------------------------------------

TIMEOUT = 30  # seconds without a word from the server


def file_hash(path, algorithm):
    """The hash of a file as "algorithm:hex"."""
    import pooch

    return f"{algorithm}:{pooch.file_hash(path, alg=algorithm)}"


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
            verified = has_known_hash(fetched, model)
            if model.member is not None:
                weights = os.path.join(temporary, "weights")
                unpack(fetched, model.member, weights)
                verified = verified or has_known_hash(weights, model)
            elif model.hashes and not verified:
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


# ---- Network ------------------------------------------------------------------------------------------------------------
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


def import_caffe():
    """Caffe, quiet, from the Python path or else from $CAFFE_ROOT/python. Raises BadRequest."""
    os.environ.setdefault("GLOG_minloglevel", "2")
    try:
        import caffe
    except ImportError as error:
        root = os.environ.get("CAFFE_ROOT")
        if not root or (path := os.path.join(root, "python")) in sys.path:
            raise BadRequest(f"Caffe cannot be imported ({one_line(error)}); install it with: pip install ./pycaffe") from None
        sys.path.append(path)
        return import_caffe()
    return caffe


def read_prototxt(path):
    """The prototxt `path` as a caffe_pb2.NetParameter. Raises BadRequest."""
    import_caffe()
    from caffe.proto import caffe_pb2
    from google.protobuf import text_format

    try:
        with open(path, encoding="utf-8") as file:
            return text_format.Parse(file.read(), caffe_pb2.NetParameter())
    except (OSError, UnicodeDecodeError, text_format.ParseError) as error:
        raise BadRequest(f"--deploy_txt {path}: not a network description ({one_line(error)}); give a deploy.prototxt") from None


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
    """A BlobProto's shape, without the leading ones that the older format filled up to four axes with."""
    shape = list(blob.shape.dim) or [blob.num, blob.channels, blob.height, blob.width]
    return tuple(itertools.dropwhile(lambda side: side == 1, shape))


def fit_classifier(net, weights):
    """Gives the classifier of the NetParameter `net` the width that `weights` (of read_weights) have: one GoogLeNet
    prototxt serves all data sets. Changes `net` in place."""
    for layer in net.layer:
        if layer.type == "InnerProduct" and weights.get(layer.name):
            layer.inner_product_param.num_output = weights[layer.name][-1][-1]  # as many biases as outputs


@contextlib.contextmanager
def caffe_net(net):
    """The NetParameter as a caffe.Net in TEST phase, without weights."""
    with tempfile.NamedTemporaryFile("w", suffix=".prototxt") as file:
        file.write(str(net))
        file.flush()
        yield import_caffe().Net(file.name, import_caffe().TEST)


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
            expected = [tuple(itertools.dropwhile(lambda side: side == 1, blob.data.shape)) for blob in blobs]
            if weights.get(name) != expected:
                return f"layer {name} has weights of shape {weights.get(name)}, not {expected}"
        loaded.copy_from(path)
    return None


def layer_shapes(deploy, weights):
    """[(name, shape of one tile's activations), ...] of all layers of `deploy` that can be targets. With `weights` (a path or
    None) the classifier has their width."""
    net = read_prototxt(deploy)
    if weights is not None:
        fit_classifier(net, read_weights(weights))
    with caffe_net(net) as loaded:
        return [(name, tuple(loaded.blobs[name].shape)[1:]) for name in targets(net)]


def runs_in_test(layer):
    """Whether Caffe keeps this LayerParameter in its TEST phase."""
    from caffe import TEST

    included = [rule.phase for rule in layer.include if rule.HasField("phase")]
    excluded = [rule.phase for rule in layer.exclude if rule.HasField("phase")]
    return TEST not in excluded and (not included or TEST in included)


def targets(net):
    """The layers of a caffe_pb2.NetParameter that can be amplified: those with a blob of their own name, in order."""
    layers = net.layer or net.layers
    return [layer.name for layer in layers if layer.name in layer.top and layer.bottom]


def cut(net, target, blob_counts):
    """Cuts the NetParameter `net` down to what the gradient of `target` by the input takes; changes it in place.

    Kept are the target's ancestors and the layers that work in place on it. Caffe's force_backward would also compute the
    gradient of every weight. Instead one weight only is left to learn, the first layer's bias: then Caffe runs backward
    from a loss (put on the last writer of the target) down to that layer, and propagate_down takes it on to the input.
    Where that cannot be had (a first layer without bias, several of them, V1 layers) force_backward does the same slowly.
    `blob_counts` is {layer name: number of its weight blobs}.
    """
    if net.layers:
        net.force_backward = True
        return
    kept, needed = [], {target}
    for layer in reversed(net.layer):
        if runs_in_test(layer) and not needed.isdisjoint(layer.top):
            kept.insert(0, layer)
            needed.update(layer.bottom)
    inputs = set(net.input).union(*(layer.top for layer in kept if layer.type == "Input"))
    first = [layer for layer in kept if not inputs.isdisjoint(layer.bottom)]
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


def use_fast_layers(net):
    """Changes the NetParameter `net` to use the layers that this program's build of Caffe has and computes the same with, in
    less time. Another Caffe keeps its own."""
    from caffe import layer_type_list
    from caffe.proto.caffe_pb2 import PoolingParameter

    if "MaxPooling" in list(layer_type_list()):
        for layer in net.layer:
            if layer.type == "Pooling" and layer.pooling_param.pool == PoolingParameter.MAX:
                layer.type = "MaxPooling"


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
        self._input = self._net.blobs["data" if "data" in self._net.inputs else self._net.inputs[0]]
        shape = tuple(self._input.shape)
        if len(shape) != 4 or shape[1] != 3:
            raise BadRequest(f"--deploy_txt {spec.deploy}: its input has shape {shape}; it must take 3-channel pictures")
        self.tile_size = shape[2:]
        self.target_shape = tuple(self._net.blobs[spec.target].shape)[1:]
        if spec.objective.neuron is not None and spec.objective.neuron >= self.target_shape[0]:
            raise BadRequest(
                f"--target_neuron {spec.objective.neuron}: {spec.target} has {self.target_shape[0]} channels, counted from 0"
            )

    @staticmethod
    def _check(spec, net, weights):
        names = targets(net)
        if spec.target not in names:
            close = difflib.get_close_matches(spec.target, names, n=3, cutoff=0.4)
            hint = f"did you mean {' or '.join(close)}?" if close else f"choose one of {', '.join(names)}"
            raise BadRequest(f"--layer {spec.target}: {spec.deploy} has no such layer; {hint}")
        layers = net.layer or net.layers
        if layers and not any(weights.get(layer.name) for layer in layers):
            raise BadRequest(f"--caffe_model {spec.weights}: holds weights for none of the layers in {spec.deploy}")

    def batch_for_memory(self):
        """How many tiles at once the free memory of the GPU holds, at most 32; 1 on the CPU, where more bring nothing."""
        if not self._spec.use_gpu:
            return 1
        import ctypes

        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        ctypes.CDLL("libcuda.so.1").cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total))
        tile = sum(2 * 4 * math.prod(blob.shape) // blob.shape[0] for blob in self._net.blobs.values())  # data and diff
        return min(32, max(1, int(0.7 * free.value) // tile))

    def gradients(self, batch):
        """Minus the objective's gradient by the tiles `batch`, float32 (N, 3, H, W); and the objective's value."""
        if tuple(self._input.shape) != batch.shape:
            self._input.reshape(*batch.shape)
            self._net.reshape()
        self._input.data[...] = batch
        self._net.forward()
        blob = self._net.blobs[self._spec.target]
        blob.diff[...] = self._spec.objective.descent(blob.data)
        # From the layer of the target's name: an in-place ReLU after it has shaped the activations but is not passed backward.
        self._net.backward(start=self._spec.target)
        return self._input.diff, self._spec.objective.value(blob.data)


# ---- Workers ------------------------------------------------------------------------------------------------------------
# A device is a process with a Caffe of its own. Tiles and gradients travel through one shared memory, cut into slots.


@functools.cache
def load_network(spec):
    """The worker's network: loaded at its first task, kept for all others."""
    return Network(spec)


@functools.cache
def attach(name):
    """The shared memory `name`, held open for the life of the worker."""
    return multiprocessing.shared_memory.SharedMemory(name)


def describe(spec):
    """Task: (tile_size, target_shape, batch size that suits the device) of the network."""
    network = load_network(spec)
    return network.tile_size, network.target_shape, network.batch_for_memory()


def slot_view(memory, slot, shape):
    """The slot as an array of `shape` (batch, 3, H, W)."""
    return np.ndarray(shape, np.float32, memory.buf, offset=slot * 4 * math.prod(shape))


def compute_slot(spec, memory_name, slot, shape, count):
    """Task: replaces the first `count` tiles of the slot by their gradients; returns the objective's value.

    On the CPU one tile after the other: nothing is lost, and a sum cannot come out otherwise for the company a tile is in.
    """
    tiles_at_once = slot_view(attach(memory_name), slot, shape)[:count]
    total = 0.0
    for batch in np.split(tiles_at_once, 1 if spec.use_gpu else count):
        batch[...], value = load_network(spec).gradients(batch)
        total += value
    return total


def can_use_gpu():
    """Task: whether this Caffe was built with CUDA, asked of its library: Caffe itself ends the process that asks in vain."""
    import ctypes

    import_caffe()
    import caffe._caffe

    return hasattr(ctypes.CDLL(caffe._caffe.__file__), "_ZN5caffe20cublasGetErrorStringE14cublasStatus_t")


def count_gpus():
    """How many GPUs the NVIDIA driver shows this process; 0 without a driver."""
    import ctypes

    count = ctypes.c_int(0)
    with contextlib.suppress(OSError):
        driver = ctypes.CDLL("libcuda.so.1")
        if driver.cuInit(0) == 0:
            driver.cuDeviceGetCount(ctypes.byref(count))
    return count.value


def count_cores():
    """How many cores this process may use, by its affinity and its cgroup's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        with open("/sys/fs/cgroup/cpu.max") as file:
            quota, period = file.read().split()
        cores = min(cores, max(1, int(quota) // int(period)))
    return cores


def start_worker(log, gpus):
    """Makes a fresh process a worker: its output goes to the file `log`, Ctrl-C is the parent's, and it sees one GPU."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    if gpus is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus.get()


def caffe_reason(log):
    """What Caffe wrote before it ended its process, in one line."""
    with open(log, errors="replace") as file:
        lines = [line.strip() for line in file]
    fatal = [line.partition("] ")[2] for line in lines if re.match(r"F\d{4,8} ", line)]
    return " ".join(fatal[-1].split()) if fatal else (lines[-1] if lines else "it left no message")


class Workers:
    """Processes that compute gradients of tiles; a context manager. One for each GPU in `gpus`, or `number` on the CPU."""

    def __init__(self, spec, number, gpus=(), batch_size=None):
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory(prefix="cnn_vis-")
        self._log = os.path.join(self._folder.name, "caffe.log")
        open(self._log, "w").close()
        queue = context.SimpleQueue() if gpus else None
        for gpu in gpus:
            queue.put(str(gpu))
        self.number = len(gpus) or number
        self._executor = concurrent.futures.ProcessPoolExecutor(self.number, context, start_worker, (self._log, queue))
        self._spec, self._batch_size, self._memory = spec, batch_size, None
        self._slots = 2 * self.number + 1

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._executor.shutdown(cancel_futures=True)
        if self._memory is not None:
            self._memory.close()
            self._memory.unlink()
        self._folder.cleanup()

    def result(self, future):
        """The future's result; RunFailed with Caffe's own words where its process is gone."""
        try:
            return future.result()
        except concurrent.futures.process.BrokenProcessPool:
            raise RunFailed(f"Caffe stopped: {caffe_reason(self._log)}") from None

    def describe(self):
        """(tile_size, target_shape) of the network. Starts the workers."""
        futures = [self._executor.submit(describe, self._spec) for _ in range(self.number)]
        self.tile_size, self.target_shape, suits = self.result(futures[0])
        self._batch_size = self._batch_size or suits
        self._shape = (self._batch_size, 3, *self.tile_size)
        size = self._slots * 4 * math.prod(self._shape)
        self._memory = multiprocessing.shared_memory.SharedMemory(create=True, size=size)
        return self.tile_size, self.target_shape

    def gradients(self, image, regions):
        """Yields (region, gradient, objective's value of its batch) for `regions` (y0, y1, x0, x1) of `image`, in order.

        The gradient, float32 (3, H, W), is gone with the next one. The image is float32 and must not change meanwhile.
        """
        pending = collections.deque()
        free = list(range(self._slots))
        for first in range(0, len(regions), self._batch_size):
            batch = regions[first : first + self._batch_size]
            if not free:
                yield from self._finish(pending, free)
            slot = free.pop()
            view = slot_view(self._memory, slot, self._shape)
            for place, (y0, y1, x0, x1) in enumerate(batch):
                view[place] = image[0, :, y0:y1, x0:x1]
            arguments = (self._spec, self._memory.name, slot, self._shape, len(batch))
            pending.append((batch, slot, self._executor.submit(compute_slot, *arguments)))
        while pending:
            yield from self._finish(pending, free)

    def _finish(self, pending, free):
        batch, slot, future = pending.popleft()
        value = self.result(future) / len(batch)
        view = slot_view(self._memory, slot, self._shape)
        for place, region in enumerate(batch):
            yield region, view[place], value
        free.append(slot)


# ---- The optimisation loop ----------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Progress:
    """Where a run is after a step. `size_index` and `step` count from 0; `stats` is {name: number} or None when not asked for."""

    sizes: list
    size_index: int
    step: int
    num_steps: int
    image: np.ndarray
    stats: dict | None


class Dream:
    """One run: the picture as it stands and all that the next step depends on.

    `options` are those of the command line, `picture` the uint8 (H, W, 3) start picture or None for noise, `mean` the scalar
    taken off, `workers` an entered Workers that has described its network. Raises BadRequest for sizes below the network's.
    """

    def __init__(self, options, picture, mean, workers):
        self.options, self.picture, self.mean, self.workers = options, picture, mean, workers
        self.sizes = plan_sizes(options, picture, workers.tile_size)
        self.image = None

    def run(self, wants_stats=lambda step: False):
        """Does the run, yielding a Progress after every step; wants_stats(step) tells which ones are to be measured."""
        for size_index in range(len(self.sizes)):
            self._begin_size(size_index)
            for step in range(self.options.num_steps):
                stats = self._step(wants_stats(step))
                self._advance_schedules(step)
                yield Progress(self.sizes, size_index, step, self.options.num_steps, self.image, stats)

    def _begin_size(self, size_index):
        """Brings the picture to its next size and starts caches and schedules over."""
        size, options = self.sizes[size_index], self.options
        self.start = None
        if self.picture is not None:
            self.start = from_uint8(resize(self.picture, size, bilinear=True), self.mean)
        if self.image is not None:
            self.image = from_uint8(resize(to_uint8(self.image, self.mean), size), self.mean)
        elif self.start is not None:
            self.image = self.start.copy()
        else:
            self.image = noise(size, options.initialization_scale, options.initialization_blur, self.mean, options.seed)
        self.colours = tiles(size, self.workers.tile_size)
        self.counts = tile_counts(size, self.workers.tile_size) if options.use_pixel_learning_rates else None
        self.caches = {}
        self.learning_rate, self.tv_reg = options.learning_rate, options.tv_reg

    def _step(self, measure):
        """One step on all tiles, the even ones first. Returns what was measured, or None."""
        gauge = Gauge() if measure else None
        for regions in filter(None, self.colours):
            # The network sees the picture as it stands; the regularizers see what the tiles before have made of it.
            snapshot = self.image.astype(np.float32)
            for region, gradient, value in self.workers.gradients(snapshot, regions):
                self._update_tile(region, gradient, value, gauge)
        return gauge and gauge.summary(self.image)

    def _update_tile(self, region, cnn, value, gauge):
        """Regularizes one tile's gradient and takes its RMSProp step.

        One channel at a time: they do not meet here, and the arrays of one stay in the processor's cache.
        """
        o, (y0, y1, x0, x1) = self.options, region
        if region not in self.caches:
            self.caches[region] = np.zeros((1, *cnn.shape))
        cache = self.caches[region]
        if gauge is not None:
            gauge.add_tile(value)
        for channel in range(len(cnn)):
            place = np.s_[:, channel : channel + 1, y0:y1, x0:x1]
            plane = self.image[place]
            pulled = plane if self.start is None else plane - self.start[place]
            gradient = cnn[np.newaxis, channel : channel + 1].astype(np.float64)
            parts = {}
            if o.p_reg:
                parts["p"] = p_norm_gradient(pulled, o.alpha, o.p_scale, o.p_reg)
            if o.p_reg_aux:
                parts["aux"] = p_norm_gradient(plane, o.alpha_aux, o.p_scale_aux, o.p_reg_aux)
            if self.tv_reg:
                parts["tv"] = tv_gradient(plane, o.beta, o.tv_grad_operator, o.tv_reg_scale, self.tv_reg)
            if gauge is not None:
                gauge.add_means(cnn_gradient=gradient, **{f"{name}_gradient": part for name, part in parts.items()})
                gauge.add_losses(
                    p=o.p_reg and o.p_reg * p_norm_loss(pulled, o.alpha, o.p_scale),
                    aux=o.p_reg_aux and o.p_reg_aux * p_norm_loss(plane, o.alpha_aux, o.p_scale_aux),
                    tv=self.tv_reg and self.tv_reg * tv_loss(plane, o.beta, o.tv_grad_operator, o.tv_reg_scale),
                )
            for part in parts.values():
                gradient += part
            step = rmsprop(gradient, cache[:, channel : channel + 1], o.decay_rate, self.learning_rate)
            if self.counts is not None:
                step /= self.counts[y0:y1, x0:x1]
            if gauge is not None:
                gauge.add_means(step=step, value=plane)
            plane += step

    def _advance_schedules(self, step):
        """Both schedules count the steps at this size."""
        if (step + 1) % self.options.learning_rate_decay_iter == 0:
            self.learning_rate *= self.options.learning_rate_decay_fraction
        if (step + 1) % self.options.tv_reg_step_iter == 0:
            self.tv_reg += self.options.tv_reg_step


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
        names = ("objective", "p_loss", "aux_loss", "tv_loss", "p_gradient", "aux_gradient", "tv_gradient", "cnn_gradient")
        stats = {name: self._sums[name] / self._tiles for name in (*names, "step")}
        stats["step_to_value"] = self._sums["step"] / (self._sums["value"] or 1)
        return stats | {"image_mean": float(image.mean()), "image_std": float(image.std())}


def plan_sizes(options, picture, tile_size):
    """The sizes of a run, [(height, width), ...], all at least the network's input. Raises BadRequest."""
    base = tile_size if picture is None else picture.shape[:2]
    ends = []
    for name in ("initial_size", "final_size"):
        try:
            ends.append(parse_size(getattr(options, name), base))
        except (ValueError, OverflowError) as error:
            value = getattr(options, name)
            raise BadRequest(f"--{name} {value}: {one_line(error)}; give HxW in pixels or xF, as 540x960 or x0.5") from None
    sizes = size_sequence(*ends, options.num_sizes, options.resize_type)
    for size in sizes:
        if size[0] < tile_size[0] or size[1] < tile_size[1]:
            name = "initial_size" if size == sizes[0] else "final_size"
            factor = max(math.ceil(100 * t / b) / 100 for t, b in zip(tile_size, base))
            raise BadRequest(
                f"--{name} {getattr(options, name) or 'unset'}: {size[0]}x{size[1]} is smaller than the network's input, "
                f"{tile_size[0]}x{tile_size[1]}; x{factor:g} or more will do"
            )
    return sizes


# ---- Pictures out -------------------------------------------------------------------------------------------------------


def numbered(path, size_index, step):
    """The name of a picture along the way: NAME_SIZE_STEP.EXT, counted from 1."""
    stem, extension = os.path.splitext(path)
    return f"{stem}_{size_index + 1}_{step + 1}{extension}"


def write_picture(picture, path):
    """Writes uint8 (H, W, 3) to `path`, whole or not at all; the format is by the extension. Raises RunFailed."""
    from PIL import Image

    folder, name = os.path.split(path)
    part = os.path.join(folder, f".{os.path.splitext(name)[0]}.{os.getpid()}{os.path.splitext(name)[1]}")
    try:
        options = {"quality": 95} if path.lower().endswith((".jpg", ".jpeg", ".webp")) else {}
        Image.fromarray(picture).save(part, **options)
        os.replace(part, path)
    except (OSError, ValueError) as error:
        raise RunFailed(f"--output {path}: cannot be written ({one_line(error)})") from None
    finally:
        with contextlib.suppress(OSError):
            os.remove(part)


def check_output(path):
    """Raises BadRequest where no picture can be written to `path`."""
    from PIL import Image

    extension = os.path.splitext(path)[1].lower()
    if extension not in Image.registered_extensions():
        raise BadRequest(f"--output {path}: no picture format has the ending {extension!r}; use .png or .jpg")
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        raise BadRequest(f"--output {path}: the folder {folder} does not exist; make it first")
    if os.path.isdir(path) or not os.access(folder, os.W_OK):
        raise BadRequest(f"--output {path}: cannot be written there; choose another place")


def format_stats(progress):
    """The statistics of a Progress as lines for people."""
    height, width = progress.sizes[progress.size_index]
    s = progress.stats
    return (
        f"size {progress.size_index + 1}/{len(progress.sizes)} {height}x{width}, "
        f"step {progress.step + 1}/{progress.num_steps}, objective {s['objective']:.4g}\n"
        f"  losses: p {s['p_loss']:.4g}, aux {s['aux_loss']:.4g}, tv {s['tv_loss']:.4g}\n"
        f"  mean gradients: cnn {s['cnn_gradient']:.4g}, p {s['p_gradient']:.4g}, aux {s['aux_gradient']:.4g}, "
        f"tv {s['tv_gradient']:.4g}\n"
        f"  step: mean {s['step']:.4g}, to value {s['step_to_value']:.4g}; "
        f"image: mean {s['image_mean']:.4g}, std {s['image_std']:.4g}"
    )


def import_pyplot(behavior):
    """matplotlib.pyplot with a backend that can open windows. Raises BadRequest."""
    remedy = f"use --iter_behavior save instead of {behavior}"
    try:
        import matplotlib.pyplot as pyplot
    except ImportError as error:
        raise BadRequest(f"--iter_behavior {behavior}: needs matplotlib ({one_line(error)}); pip install matplotlib") from None
    try:
        figure = pyplot.figure()
    except Exception as error:  # each toolkit fails in its own way without a display
        raise BadRequest(f"--iter_behavior {behavior}: no window can be opened ({one_line(error)}); {remedy}") from None
    windowed = figure.canvas.required_interactive_framework is not None
    pyplot.close(figure)
    if not windowed:
        raise BadRequest(f"--iter_behavior {behavior}: there is no display to open a window on; {remedy}")
    return pyplot


class Show:
    """The picture in a window, behavior `show`; width and height in inches."""

    def __init__(self, width, height):
        self._pyplot = import_pyplot("show")
        self._figure = self._pyplot.figure("cnn-vis", figsize=(width, height))

    def __call__(self, picture):
        """Shows uint8 (H, W, 3)."""
        self._figure.clf()
        axes = self._figure.add_axes((0, 0, 1, 1))
        axes.imshow(picture)
        axes.axis("off")
        self._pyplot.pause(0.01)


class PlotPix:
    """A few pixels' values over time in a window, behavior `plot_pix`: the original's four pixels, those that the picture has."""

    PIXELS = ((100, 100), (200, 200), (100, 200), (200, 100))

    def __init__(self):
        self._pyplot = import_pyplot("plot_pix")
        self._figure = self._pyplot.figure("cnn-vis pixels")
        self._history = collections.defaultdict(list)
        self._steps = 0

    def record(self, image):
        """Takes down the pixels of `image` (1, 3, H, W); to be called at every step."""
        self._steps += 1
        for y, x in self.PIXELS:
            if y < image.shape[2] and x < image.shape[3]:
                self._history[y, x].append((self._steps, *image[0, :, y, x]))

    def __call__(self):
        self._figure.clf()
        for place, pixel in enumerate(self.PIXELS, 1):
            axes = self._figure.add_subplot(2, 2, place, title=f"pixel {pixel}", xlabel="step")
            if self._history[pixel]:
                steps, *channels = zip(*self._history[pixel])
                for colour, values in zip("bgr", channels):
                    axes.plot(steps, values, colour)
        self._figure.tight_layout()
        self._pyplot.pause(0.01)


# ---- Command line -------------------------------------------------------------------------------------------------------

BEHAVIORS = ("print", "save", "show", "plot_pix", "none")


class Parser(argparse.ArgumentParser):
    """argparse with dashes for underscores in option names, and errors in one line."""

    def parse_known_args(self, args=None, namespace=None):
        def underscored(arg):
            name, equals, value = arg.partition("=")
            return name.replace("-", "_").replace("__", "--", 1) + equals + value if arg.startswith("--") else arg

        return super().parse_known_args([underscored(a) for a in (sys.argv[1:] if args is None else args)], namespace)

    def error(self, message):
        raise BadRequest(f"{message.removeprefix('argument ')}; see --help")


def say(text):
    """Prints a line; if nobody reads any more (| head) this and all later ones go nowhere, and the run goes on."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class HelpFormatter(argparse.HelpFormatter):
    """Adds an option's default to its help where there is one and the text does not tell it."""

    def _get_help_string(self, action):
        has_default = not any(action.default is none for none in (None, False, argparse.SUPPRESS))
        return f"{action.help} (default: %(default)s)" if has_default else action.help


def number(kind, low=None, high=None, above=None):
    """A type for argparse: an int or float between bounds; `above` is an open lower bound."""

    def parse(text):
        value = kind(text)
        if not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text} is not a finite number")
        if low is not None and value < low or above is not None and value <= above or high is not None and value > high:
            bounds = [f"at least {low}" if low is not None else None, f"more than {above}" if above is not None else None]
            bounds.append(f"at most {high}" if high is not None else None)
            raise argparse.ArgumentTypeError(f"{text} is out of range; it must be {' and '.join(filter(None, bounds))}")
        return value

    parse.__name__ = "whole number" if kind is int else "number"
    return parse


def gpu_numbers(text):
    """A type for argparse: GPUs as a list, [] for the CPU."""
    numbers = [int(word) for word in text.split(",")]
    if min(numbers) >= 0 and len(set(numbers)) == len(numbers):
        return numbers
    if len(numbers) == 1:
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


def build_parser():
    """The options: the original's names first, then the other names that its README used."""
    parser = Parser(
        prog="cnn_vis.py",
        description="Inceptionism pictures on real Caffe: amplifies what one layer of a network sees in a picture, or in noise.",
        epilog="Names may be written with dashes. Sizes are height x width: HxW in pixels, or xF times the base size "
        "(the start picture's, or the network's input for noise).",
        formatter_class=HelpFormatter,
    )
    # fmt: off
    parser.add_argument("--version", action="version", version=f"cnn_vis.py {__version__}")

    group = parser.add_argument_group("network")
    add = group.add_argument
    add("--model", choices=tuple(MODELS), help="network to use; its three files are looked for in "
        "$CAFFE_ROOT, then in ~/.cache/cnn-vis or $CNN_VIS_MODELS (default: bvlc_googlenet if installed, else googlenet_mini)")
    add("--list_models", action="store_true", help="list these networks, and which are installed, and stop")
    add("--list_layers", action="store_true", help="list the layers of the network that can be amplified, and stop")
    add("--download_model", metavar="NAME", choices=tuple(m.name for m in MODELS.values() if m.url),
        help="download a network (%(choices)s), check it, and stop")
    add("--model_url", metavar="URL", help="where to download it from, for a mirror (default: the official place)")
    add("--deploy_txt", metavar="FILE", help="network description (default: the model's)")
    add("--caffe_model", metavar="FILE", help="the network's weights (default: the model's)")
    add("--mean_image", metavar="FILE",
        help="mean image (.npy), whose mean is taken off every pixel (default: the model's)")
    add("--gpu", metavar="N", type=gpu_numbers, help="GPU to run on, counted from 0, or several: 0,1,2; negative: CPU "
        "(default: GPU 0 where Caffe can use one, else CPU)")
    add("--batch_size", metavar="N", type=number(int, 1), help="tiles that go to a worker at once; the picture does not depend "
        "on it (default: 1, and on a GPU what its memory holds)")
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
    add("--initial_image", "--image", metavar="FILE", help="picture to start from (default: noise)")
    add("--initialization_scale", metavar="S", type=number(float), default=1.0, help="noise: standard deviation in grey levels")
    add("--initialization_blur", metavar="S", type=number(float, 0), default=0.0, help="noise: sigma of a blur in pixels")
    add("--seed", metavar="N", type=number(int, 0, 2**32 - 1), help="noise: makes it the same every time (default: it differs)")

    group = parser.add_argument_group("sizes")
    add = group.add_argument
    add("--initial_size", metavar="SIZE", help="first size, HxW or xF (default: the base size)")
    add("--final_size", metavar="SIZE", help="last size, where there are several (default: the base size)")
    add("--num_sizes", metavar="N", type=number(int, 1), default=1, help="number of sizes; 1: only the first")
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
    add("--output_file", "--output", metavar="FILE", default="out.png", help="the finished picture")
    add("--output_iter", metavar="N", type=number(int, 1), default=50, help="steps after which iter_behavior is done")
    add("--iter_behavior", metavar="WORDS", type=behaviors, default="save+print",
        help=f"what is done: {', '.join(BEHAVIORS)}, joined by +; save writes NAME_SIZE_STEP.EXT beside the output")
    add("--show_width", metavar="W", type=number(float, above=0), default=5.0, help="of the window of show, in inches")
    add("--show_height", metavar="H", type=number(float, above=0), default=5.0, help="of the window of show, in inches")
    add("--rescale_image", action="store_true", help="stretch the pictures saved or shown to the full range, instead of clipping")

    # fmt: on
    return parser


def one_line(error):
    """An exception's message in one line."""
    return " ".join(str(error).split()) or type(error).__name__


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
    """The GPUs to run on: [] for the CPU. `gpus` is the option's list, or None. Raises BadRequest."""
    if gpus == []:
        return []
    present = count_gpus()
    cuda = (present or gpus) and in_a_worker(can_use_gpu)
    if gpus is None:
        if present and cuda:
            return [0]
        reason = "Caffe was built without CUDA" if present else "no GPU found"
        print(f"{reason}: running on the CPU", file=sys.stderr)
        return []
    asked = ",".join(map(str, gpus))
    if not cuda:
        raise BadRequest(f"--gpu {asked}: Caffe was built without CUDA; use --gpu -1 for the CPU, or build with PYCAFFE_CUDA=1")
    if max(gpus) >= present:
        found = f"only {present} found, counted from 0" if present else "none found"
        raise BadRequest(f"--gpu {asked}: there is no such GPU, {found}; use another number, or -1 for the CPU")
    return gpus


def in_a_worker(task, *arguments):
    """Runs a task that needs Caffe in a process of its own. Raises what the task raises; RunFailed where Caffe stops."""
    with tempfile.TemporaryDirectory(prefix="cnn_vis-") as folder:
        log = os.path.join(folder, "caffe.log")
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(1, context, start_worker, (log, None)) as executor:
            try:
                return executor.submit(task, *arguments).result()
            except concurrent.futures.process.BrokenProcessPool:
                raise RunFailed(f"Caffe stopped: {caffe_reason(log)}") from None


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
    deploy, weights, fit, _ = find_files(options)
    for name, shape in in_a_worker(layer_shapes, deploy, weights if fit else None):
        say(f"{name:32} {'x'.join(map(str, shape))}")


def download_model(options):
    """Does --download_model."""
    model = MODELS[options.download_model]
    if model.url is None:
        raise BadRequest(f"--download_model {model.name}: it comes with this program; there is nothing to download")
    deploy = model.find_deploy()
    if deploy is None:
        raise BadRequest(f"--download_model {model.name}: Caffe is needed to check it; pip install ./pycaffe")
    download(model, options.model_url or model.url, functools.partial(in_a_worker, structure_error, deploy))
    place = model.cache_place()
    print(f"{model.name}: {standing(place, model)}, {file_hash(place, 'sha256')}, {place}")


def run(options):
    """Does what the options ask for."""
    check_output(options.output_file)
    picture = None if options.initial_image is None else read_picture(os.path.expanduser(options.initial_image))
    spec, network_name, mean = find_network(options)
    behavior = options.iter_behavior
    show = Show(options.show_width, options.show_height) if "show" in behavior else None
    plot_pix = PlotPix() if "plot_pix" in behavior else None
    gpus = choose_gpus(options.gpu)
    spec = dataclasses.replace(spec, use_gpu=bool(gpus))

    with Workers(spec, options.workers or count_cores(), gpus, options.batch_size) as workers:
        workers.describe()
        dream = Dream(options, picture, mean, workers)
        device = f"GPU {','.join(map(str, gpus))}" if gpus else f"CPU, {workers.number} worker{'s' * (workers.number > 1)}"
        print(
            f"{network_name} ({spec.weights}), {spec.target} {'x'.join(map(str, workers.target_shape))}, {device}, "
            f"sizes {' '.join(f'{h}x{w}' for h, w in dream.sizes)}",
            file=sys.stderr,
        )

        def is_due(step):
            return (step + 1) % options.output_iter == 0

        for progress in dream.run(lambda step: "print" in behavior and is_due(step)):
            if plot_pix is not None:
                plot_pix.record(progress.image)
            if not is_due(progress.step):
                continue
            seen = functools.partial(to_uint8, progress.image, mean, options.rescale_image)
            if "print" in behavior:
                say(format_stats(progress))
            if "save" in behavior:
                write_picture(seen(), numbered(options.output_file, progress.size_index, progress.step))
            if show is not None:
                show(seen())
            if plot_pix is not None:
                plot_pix()
        write_picture(to_uint8(dream.image, mean, options.rescale_image), options.output_file)


def main(argv=None):
    """Runs the command line; returns the exit status."""
    try:
        options = build_parser().parse_args(argv)
        if options.list_models:
            list_models()
        elif options.list_layers:
            list_layers(options)
        elif options.download_model:
            download_model(options)
        else:
            run(options)
    except (BadRequest, RunFailed) as error:
        print(f"cnn_vis.py: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, BadRequest) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
