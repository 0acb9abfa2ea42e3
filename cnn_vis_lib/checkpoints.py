#!/usr/bin/env python3
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
network's input size. Each step runs every tile forward and backward through Caffe, adds the
gradients of two p-norms and of total variation, and takes an RMSProp step. After num_steps steps
the picture is enlarged and the steps start again, from initial_size up to final_size.

The sections of this file:

    The algorithm     Pictures; Sizes and tiles; Objective, regularizers, step; The dream
    The rest          Options; Networks by name; The network; Engines;
                      The compiled step; A cluster; Files of a run;
                      Along the way; The web page; A run; Commands

A picture in memory ("image") is float64, shape (1, 3, H, W), channels B, G, R, minus the mean of
the mean image. A picture as people see it ("picture") is uint8, shape (H, W, 3), channels R, G, B.
"""

from __future__ import annotations  # np.ndarray in them would load NumPy

import signal
import sys

if __name__ == "__main__":
    # The program is the module of this name, in which workers find its classes. Until main(),
    # Ctrl-C ends it without a traceback; in the background of a script that stays ignored.
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    import cnn_vis

    sys.exit(cnn_vis.main())

import argparse
import collections
import concurrent.futures
import contextlib
import copy
import csv
import ctypes
import dataclasses
import difflib
import errno
import functools
import glob
import hashlib
import importlib.util
import io
import itertools
import json
import logging
import math
import mmap
import multiprocessing
import multiprocessing.connection
import multiprocessing.spawn
import os
import pickle
import queue
import re
import resource
import select
import shlex
import shutil
import socket
import stat
import subprocess
import tempfile
import threading
import time
import warnings
import zipfile
import zlib

HERE = os.path.dirname(os.path.abspath(__file__))
IS_INSTALLED = os.path.isdir(os.path.join(HERE, "cnn_vis_models"))  # with pip; False in a clone
INCLUDED = os.path.join(HERE, "cnn_vis_models" if IS_INSTALLED else "models")
PROGRAM, COMMAND = ("cnn-vis",) * 2 if IS_INSTALLED else ("cnn_vis.py", "python cnn_vis.py")


def how_to_install(what):
    """The command that installs `what` from the clone, a folder or a requirements file."""
    if IS_INSTALLED:
        return "see 'Other ways to install' in the README of cnn-vis"
    before = "PYCAFFE_CUDA=1 " * what.endswith("[cuda]") + "pip install "
    return before + "-r " * what.endswith(".txt") + shlex.quote(os.path.join(HERE, what))


def missing_package(error, what="requirements.txt"):
    """The message for a ModuleNotFoundError; installing `what` provides the missing package."""
    python = os.path.join(HERE, ".venv", "bin", "python")
    is_set_up = os.path.exists(python) and not os.path.samefile(sys.prefix, f"{HERE}/.venv")
    remedy = f"run cnn_vis.py with {python}" if is_set_up else how_to_install(what)
    return f"this Python ({sys.executable}) lacks {error.name}; {remedy}"


import numpy as np  # noqa: E402

VERSION = __version__ = "1.1.0"


@functools.cache
def fingerprint():
    """(version of this program, SHA-256 of its code): other code may give other pixels."""
    digest = hashlib.sha256()
    for path in [os.path.join(HERE, "cnn_vis.py"), *sorted(glob.glob(f"{HERE}/cnn_vis_lib/*.py"))]:
        with open(path, "rb") as file:
            digest.update(file.read())
    return VERSION, digest.hexdigest()


log = logging.getLogger("cnn_vis")


class BadRequest(Exception):
    """The user asked for something impossible. Exit status 2. The message is the `problem` and the
    `remedy`, after the `option` and `value` that are to blame; those can be None."""

    def __init__(self, problem, remedy=None, option=None, value=None):
        self.option, self.value, self.problem, self.remedy = option, value, problem, remedy
        where = f"{f'--{option} {value}'.rstrip()}: " if option else ""
        super().__init__(where + "; ".join(filter(None, (str(problem), remedy))))

    def __reduce__(self):
        return type(self), (self.problem, self.remedy, self.option, self.value)


def refusal(option, value, problem, remedy=None):
    """The BadRequest for an option's value."""
    return BadRequest(problem, remedy, option, value)


class RunFailed(Exception):
    """A valid run failed. Exit status 1."""


class NotFinite(RunFailed):
    """The picture overflowed with these options."""


class OutOfMemory(RunFailed):
    """The machine does not have enough memory."""

    def __init__(self, message="not enough memory; use smaller sizes or fewer --workers"):
        super().__init__(message)


class Stopped(KeyboardInterrupt):
    """A signal has ended the program; exit status 128 + signum."""

    def __init__(self, signum, message="stopped"):
        super().__init__(message)
        self.signum = signum


def one_line(error):
    """An exception's message on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def remedy_of(error):
    """What to say after an OSError: "; see ulimit -f", or ""."""
    return "; see ulimit -f" if getattr(error, "errno", None) == errno.EFBIG else ""


# ---- Pictures ---------------------------------------------------------------------------------

GAIN = 1.2  # contrast gain whenever an image becomes a picture
MAX_PIXELS = 178_956_970  # in a picture file; Pillow, too, rejects larger ones as an attack
DEPTHS = {8: "uint8", 16: "uint16"}  # of output pictures, by bits per channel
RAW = (".dng", ".cr2", ".nef", ".arw", ".orf", ".rw2", ".pef")  # extensions of camera raw files
NOT_PICTURES = {".ps", ".eps", ".h5", ".hdf", ".hdf5", ".mpg", ".mpeg"}  # which Pillow recognizes
HEIC = (".heic", ".heif", ".hif", ".avif")  # extensions of files that pillow-heif reads


def read_picture(path, background="white", option="image"):
    """Returns (picture, remarks): the picture in the file `path`, sRGB, uint8 (H, W, 3), and a list
    of remarks on how it was read. Transparent parts show the colour `background`. Raises
    BadRequest, naming the `option`."""
    picture, remarks = read_rgba(path, option)
    return flattened(picture, background), remarks


def flattened(picture, background):
    """An RGB or RGBA PIL picture as a uint8 array (H, W, 3); transparent parts show the colour
    `background`."""
    from PIL import Image

    if picture.mode != "RGB":
        behind = Image.new("RGBA", picture.size, background)
        picture = Image.alpha_composite(behind, picture).convert("RGB")
    return np.asarray(picture)


def read_masked(path, background, mask):
    """Returns (picture, mask, remarks): what read_picture and read_mask return for the start
    picture and its mask. Raises BadRequest."""
    rgba, remarks = read_rgba(path)
    picture = flattened(rgba, background)
    alpha = np.asarray(rgba.getchannel("A")) if rgba.mode == "RGBA" else None
    mask, more = read_mask(mask, picture, alpha, path)
    return picture, mask, [*remarks, *more]


def read_mask(name, picture, alpha=None, path="the array"):
    """Returns (mask, remarks) for --mask `name`. The mask is uint8 (H, W), of the start picture's
    size, or None without --mask. It is the brightness of the picture in the file `name`, where
    transparent parts count as black; for "alpha" it is `alpha`, the start picture's alpha channel,
    which is None if that picture is opaque. `path` names the start picture in errors. Raises
    BadRequest."""
    from PIL import Image

    if name is None:
        return None, []
    if picture is None:
        raise refusal("mask", name, "noise has nothing to keep", "add --image or drop --mask")
    size, remarks = picture.shape[:2], []
    if name == "alpha" and os.path.exists(name):
        remarks.append("--mask alpha is the alpha channel; for the file of that name use ./alpha")
    if name != "alpha":
        brightness, remarks = read_picture(existing_file("mask", name), "black", "mask")
        mask = np.asarray(Image.fromarray(brightness).convert("L"))
    else:
        if alpha is None:
            problem = f"{path} has no transparent parts"
            raise refusal("mask", name, problem, "use a mask file instead")
        mask = alpha
    if mask.shape != size:
        shapes = ["{}x{}".format(*shape) for shape in (mask.shape, size)]
        remarks.append(f"{name}: the mask, {shapes[0]}, is stretched to the picture's {shapes[1]}")
        mask = resize(mask, size, bilinear=True)
    if not mask.any():
        raise refusal("mask", name, "the mask is black everywhere", "paint white where to dream")
    return mask, remarks


def read_rgba(path, option="image"):
    """Returns (picture, remarks): the picture in the file `path` as an sRGB PIL picture, RGBA if
    parts are transparent and otherwise RGB, and a list of remarks on how it was read. What is in
    the file counts, not its name. Respects EXIF orientation, declared colours and depths other than
    8 bits; of several frames it uses the first. Raises BadRequest, naming the `option`."""
    from PIL import Image, ImageOps, PngImagePlugin

    PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 64 << 20  # default: 1 MB
    remarks, data = [], b""
    try:
        with warnings.catch_warnings(), contextlib.ExitStack() as stack:
            warnings.simplefilter("ignore")  # about damaged metadata, which does not matter
            for name in ("PIL", "tifffile"):
                logging.getLogger(name).setLevel(logging.CRITICAL)
            data = read_bytes(path)
            scan = stack.enter_context(open_picture(data, path, remarks))
            seen = to_srgb(scan, path, remarks)
            with contextlib.suppress(Exception):  # damaged EXIF data gives no orientation
                seen.getexif()[0x0112] = scan.picture.getexif()[0x0112]
                seen = ImageOps.exif_transpose(seen)
            return seen, remarks
    except Image.DecompressionBombError:
        raise refusal(option, path, "the picture is too large", "make it smaller first") from None
    except Exception as error:  # a damaged file can fail anywhere in Pillow's decoders, in any way
        reason, remedy = why_unreadable(error, data)
        raise refusal(option, path, f"cannot be read as a picture ({reason})", remedy) from None


@dataclasses.dataclass
class Scan:
    """A picture as its file has it: an open PIL picture, and what Pillow does not know of it.

    `values` are the colours as numbers (H, W, C), unless 8 bits hold them: grey, RGB or CMYK.
    `black` and `white` are the numbers that the file says are black and white; `white` is None if
    it does not say. `alpha` is opacity in numbers of the same kind, (H, W), and `holes` is where
    the file has no data, bool (H, W); None: only Pillow knows. `has_alpha` is False if what Pillow
    takes for opacity is something else. `cicp` is (number of the primaries, number of the curve,
    whether values use their full range) as in ITU-T H.273, or None. `exif_space` is what exif_space
    would return, if the PIL picture does not have the EXIF data.
    """

    picture: object
    values: np.ndarray | None = None
    black: float = 0
    white: float | None = None
    is_inverted: bool = False  # black is the higher number
    alpha: np.ndarray | None = None
    holes: np.ndarray | None = None
    has_alpha: bool = True
    cicp: tuple | None = None
    exif_space: str | None = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.picture.close()


def open_picture(data, path, remarks):
    """The Scan of `data`, the bytes of a picture file. Raises what Pillow and tifffile raise."""
    from PIL import Image

    if data.startswith(POSTSCRIPT):
        raise ValueError("PostScript is a program, not a picture")
    if data.startswith(PNG):
        data = without_damaged_chunks(data)
    import_plugins(data)
    if data[:4] in (*TIFF_MAGIC, *RAW_MAGIC):
        if picture := read_raw_preview(data, path, remarks):
            return Scan(picture)
        data = from_full_page(data)
        if scan := read_deep_tiff(data, path, remarks):
            return scan
    picture = Image.open(io.BytesIO(data))
    if picture.width * picture.height > MAX_PIXELS:
        raise Image.DecompressionBombError
    if picture.format != "MPO":  # a camera's JPEG: its other frames are previews
        tell_frames(getattr(picture, "n_frames", 1), path, remarks)
    scan = Scan(picture)
    if picture.format in READERS:
        READERS[picture.format](scan, data, functools.partial(tell, path, remarks))
    picture.load()
    if scan.values is None and picture.mode.startswith(("I", "F")):
        scan.values = np.asarray(picture)[..., np.newaxis]
    return scan


def tell(path, remarks, text):
    """Adds a remark on the file `path`."""
    remarks.append(f"{path}: {text}")


def tell_frames(count, path, remarks):
    """Adds the remark that a file has `count` frames, if it has several."""
    if count > 1:
        tell(path, remarks, f"the first of {count} frames is used")


# Formats that Pillow reads with another package: name, package to import, how a file begins, and
# what pip calls the package.
PLUGINS = (
    (
        "HEIC",
        "pillow_heif",
        re.compile(rb".{4}ftyp(he[iv][a-z]|mi[fa]1|msf1)", re.S),
        "pillow-heif",
    ),
    ("JPEG XL", "pillow_jxl", re.compile(rb"\xff\x0a|\0\0\0\x0cJXL "), "pillow-jxl-plugin"),
)
PNG = b"\x89PNG\r\n\x1a\n"
POSTSCRIPT = (b"%!PS", b"\xc5\xd0\xd3\xc6")
TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
RAW_MAGIC = (b"IIRO", b"IIRS", b"MMOR", b"IIU\0")  # Olympus, Panasonic: TIFFs except for this


def import_plugins(data):
    """Imports the PLUGINS, if they are installed, that Pillow may need for a file with the first
    bytes `data`."""
    for _, package, signature, _ in PLUGINS:
        if signature.match(data):
            with contextlib.suppress(ImportError):
                plugin = importlib.import_module(package)  # registers itself, or else:
                getattr(plugin, "register_heif_opener", bool)()


def why_unreadable(error, data):
    """(why, what to do about it) for a picture file with the bytes `data` that failed with
    `error`."""
    from PIL import UnidentifiedImageError

    reason, remedy = one_line(error), "use a PNG or JPEG file"
    if isinstance(error, UnidentifiedImageError):
        reason = "unsupported kind of TIFF" if data[:4] in TIFF_MAGIC else "unknown format"
    if "imagecodecs" in reason:
        return reason, f"pip install imagecodecs, or {remedy}"
    for name, package, signature, pip_name in PLUGINS:
        if signature.match(data) and importlib.util.find_spec(package) is None:
            return f"it may be {name}", f"pip install {pip_name}, or {remedy}"
    return reason, remedy


def from_full_page(data):
    """The bytes of a TIFF, changed to begin with its first page that is neither a reduced copy nor
    a mask of another, if it has one."""
    import tifffile

    try:
        first, *others = itertools.islice(all_pages(tifffile.TiffFile(io.BytesIO(data)).pages), 32)
        page = next(filter(is_full_page, (first, *others)), first)
    except Exception:  # a damaged file, of which readers may still make something
        return data
    if page is first:
        return data
    order = "little" if data[:2] == b"II" else "big"
    place = slice(8, 16) if 43 in data[2:4] else slice(4, 8)  # of the first page's address
    changed = bytearray(data)
    changed[place] = page.offset.to_bytes(place.stop - place.start, order)
    return bytes(changed)


def is_full_page(page):
    """Whether a tifffile page is neither a reduced copy nor a mask."""
    return not page.tags.valueof(254, default=0) & 5 and page.tags.valueof(255, default=1) != 2


def exif_space(picture):
    """The colour space that a PIL picture's EXIF data declare: "Adobe RGB", or None."""
    with contextlib.suppress(Exception):  # they can be damaged in any way
        exif = picture.getexif()
        space = exif.get_ifd(0x8769).get(0xA001)
        if space == 2 or space == 0xFFFF and exif.get_ifd(0xA005).get(1) == "R03":
            return "Adobe RGB"
    return None


def read_raw_preview(data, path, remarks):
    """The largest picture in `data`, the bytes of a camera raw file, as a PIL picture; None for any
    other TIFF. Raises ValueError if it contains no picture that can be shown."""
    import tifffile

    try:
        pages = all_pages(tifffile.TiffFile(io.BytesIO(data)).pages)
        pages = list(itertools.islice(pages, 32))  # a camera's file has a handful
    except Exception:  # a damaged file, which other readers may still read
        return None
    is_sensor = any(page.tags.valueof(262) in (32803, 34892) for page in pages)
    if not is_sensor and data[:4] not in RAW_MAGIC and data[8:11] != b"CR\2":  # Canon
        return None
    found = [picture for page in pages for picture in previews(data, page)]
    for picture in sorted(found, key=lambda picture: math.prod(picture.size), reverse=True):
        with contextlib.suppress(Exception):  # skips sensor data, which can be JPEG-compressed too
            picture.load()
            exif = picture.getexif()
            exif.setdefault(0x0112, pages[0].tags.valueof(0x0112, default=1))
            size = "x".join(map(str, picture.size[::-1]))
            tell(path, remarks, f"camera raw; the largest picture in it, {size}, is used")
            return picture
    raise ValueError("camera raw without an embedded picture; develop it first")


def all_pages(pages):
    """Yields the tifffile pages and all their subpages."""
    for page in pages:
        page = page.aspage()
        yield page
        if page.subifds:
            yield from all_pages(page.pages)


def previews(data, page):
    """Yields the PIL pictures that a tifffile page of a camera raw file holds or points to."""
    from PIL import Image

    starts, lengths = (np.ravel(page.tags.valueof(tag, default=())) for tag in (513, 514))
    places = [*zip(starts, lengths)]
    if len(page.dataoffsets) == 1:
        places += zip(page.dataoffsets, page.databytecounts)
    jpegs = [data[start : start + length] for start, length in places]
    panasonic = page.tags.valueof(46)
    jpegs += [panasonic] if isinstance(panasonic, bytes) else []
    for jpeg in jpegs:
        if jpeg.startswith(b"\xff\xd8"):
            with contextlib.suppress(Exception):
                yield Image.open(io.BytesIO(jpeg))
    if page.photometric in (1, 2) and page.dtype == np.uint8:
        with contextlib.suppress(Exception):
            yield Image.fromarray(page.asarray())


def png_chunks(data):
    """Yields (name, content, bytes of the whole chunk) for the chunks of a PNG that are sound or
    needed."""
    place = len(PNG)
    while place < len(data):
        end = place + 12 + int.from_bytes(data[place : place + 4], "big")
        chunk, checksum = data[place + 4 : end - 4], int.from_bytes(data[end - 4 : end], "big")
        is_needed = not chunk or chunk[0] < ord("a")  # its name begins with a capital letter
        if is_needed or zlib.crc32(chunk) == checksum:
            yield chunk[:4], chunk[4:], data[place:end]
        place = end


def without_damaged_chunks(data):
    """The bytes of a PNG without the chunks that have a wrong checksum and are not needed."""
    return PNG + b"".join(whole for _, _, whole in png_chunks(data))


def read_deep_tiff(data, path, remarks):
    """`data`, the bytes of a TIFF, as a Scan if it has several channels deeper than 8 bits, or a
    number type that Pillow misreads; None for any other TIFF, which Pillow reads. Raises ValueError
    if it cannot be shown correctly."""
    import tifffile
    from PIL import Image

    try:
        pages = tifffile.TiffFile(io.BytesIO(data)).pages
        page = pages.first
        is_plain = page.dtype in (bool, np.uint8, np.uint16, np.int32, np.float32)
        if page.samplesperpixel == 1 and is_plain or page.dtype == np.uint8:
            return None
        pixels = page.imagewidth * page.imagelength
    except Exception:  # a damaged one: Pillow may still make something of it
        return None
    if pixels > MAX_PIXELS:
        raise Image.DecompressionBombError
    tell_frames(len(pages), path, remarks)
    values = page.asarray()
    values = values[..., np.newaxis] if page.samplesperpixel == 1 else values
    values = np.moveaxis(values, 0, -1) if page.planarconfig == 2 else values
    kinds = [int(kind) for kind in page.extrasamples]
    colours = values.shape[-1] - len(kinds)
    if (int(page.photometric), colours) not in ((0, 1), (1, 1), (2, 3), (5, 4)) or values.ndim != 3:
        raise ValueError(f"unsupported deep TIFF: {page.photometric.name}")
    scan = Scan(Image.new("L", (1, 1)), values[..., :colours])
    if {1, 2}.intersection(kinds):  # alpha: premultiplied, or not
        number = next(i for i, kind in enumerate(kinds) if kind in (1, 2))
        scan.alpha = values[..., colours + number]
        if kinds[number] == 1:
            scan.values = unmultiplied(scan.values, scan.alpha)
    if profile := page.tags.valueof(34675):
        scan.picture.info["icc_profile"] = profile
    scan.picture.getexif()[0x0112] = page.tags.valueof(0x0112, default=1)  # orientation
    if (page.tags.valueof(34665) or {}).get("ColorSpace") == 2:
        scan.exif_space = "Adobe RGB"
    read_tiff_numbers(scan, page.tags.valueof)
    return scan


def unmultiplied(values, alpha):
    """Divides the premultiplied colours `values` (H, W, C) by `alpha` (H, W)."""
    if not alpha.any():
        return values
    top = np.iinfo(values.dtype).max if values.dtype.kind in "iu" else 1
    share = alpha[..., np.newaxis] / top
    with np.errstate(all="ignore"):
        found = np.where(share > 0, values / share, 0)
    if top > 1:
        found = np.minimum(found + 0.5, top)
    return found.astype(values.dtype)


def read_tiff(scan, data, tell):
    """What Pillow leaves out of a TIFF. Raises ValueError if it would show it wrongly."""
    picture, tag = scan.picture, scan.picture.tag_v2.get
    if (tag(262), tag(259)) == (6, 1) and tuple(tag(530, (2, 2))) != (1, 1):
        raise ValueError("uncompressed YCbCr with fewer colours than pixels is not supported")
    picture.load()
    if picture.mode == "P" and max(tag(320, [256])) < 256:  # the rule is 16 bits
        picture.putpalette(np.reshape(tag(320), (3, -1)).T.astype(np.uint8).tobytes())
    if picture.mode.startswith(("I", "F")):
        scan.values = np.asarray(picture)[..., np.newaxis]
        read_tiff_numbers(scan, tag)


def read_tiff_numbers(scan, tag):
    """What the values of a TIFF mean: which are black and white, and which stand for no data."""

    def numbers(*names):
        return next((list(np.ravel(v)) for v in map(tag, names) if v is not None), [])

    scan.is_inverted = tag(262) == 0
    low, high = min(numbers(340, 280), default=0), max(numbers(341, 281), default=0)
    bits = int(max(numbers(258), default=1))
    is_limit_of_type = high >= 1e30  # as some writers state
    if low < high and not is_limit_of_type and "icc_profile" not in scan.picture.info:
        scan.black, scan.white = float(low), float(high)
    elif 8 < bits < 16:
        scan.white = 2.0**bits - 1
    with contextlib.suppress(TypeError, ValueError):
        take_holes(scan, float(str(tag(42113)).strip(" \0")))  # as GDAL writes it


def take_holes(scan, number):
    """Makes the pixels of a Scan whose values are all `number` holes, if others are left."""
    with contextlib.suppress(OverflowError):
        kind = scan.values.dtype.type
        nothing = kind(number) if kind(number) == kind(number) else number
        is_exact = nothing != nothing or float(nothing) == number or scan.values.dtype.kind == "f"
        is_hole = np.isnan(scan.values) if nothing != nothing else scan.values == nothing
        if is_exact and is_hole.any() and not is_hole.all():
            scan.holes = is_hole.all(axis=-1)
            scan.values = np.where(is_hole, scan.values[~is_hole].min(), scan.values)


def read_png(scan, data, tell):
    """What Pillow leaves out of a PNG: the cICP chunk, a transparent level of less than 8 bits, and
    the lower half of 16 bits, if that can be seen."""
    picture, depth, colour = scan.picture, data[24], data[25]
    for name, content, _ in png_chunks(data):
        if name == b"cICP" and len(content) == 4 and content[2] == 0 and content[:2] != b"\2\2":
            scan.cicp = (content[0], content[1], bool(content[3]))
    key = picture.info.get("transparency")
    if colour == 0 and depth in (2, 4) and key is not None:
        picture.info["transparency"] = key * (255 // (2**depth - 1))  # as Pillow scales pixels
    if depth == 16 and colour == 0:  # which is of 32 bits in earlier versions of Pillow
        scan.values = np.asarray(picture).astype(np.uint16)[..., np.newaxis]
    if depth != 16 or colour == 0:
        return
    declares = scan.cicp or {"icc_profile", "gamma", "transparency"}.intersection(picture.info)
    highest = max(high for _, high in picture.getextrema()[:3])
    if declares or highest < 64:  # a lower half of less than 1 % of 64 * 256 cannot be seen
        values = both_halves(picture, data)
        colours = values.shape[-1] - 1 + values.shape[-1] % 2  # 1 of 2, 3 of 3 or 4
        scan.values = values[..., :colours]
        scan.alpha = values[..., colours] if values.shape[-1] > colours else None
        if key is not None:
            scan.holes = (scan.values == key).all(axis=-1)


def both_halves(picture, data):
    """The numbers, uint16 (H, W, C), of a PNG of 16 bits with several channels. Pillow keeps only
    the upper byte of each; it keeps the lower one of numbers that it takes for little-endian. Grey
    and alpha are read as four channels of 8 bits."""
    from PIL import Image

    if data[25] == 4:
        header = data[12:24] + bytes((8, 6)) + data[26:29]
        header += zlib.crc32(header).to_bytes(4, "big")
        with Image.open(io.BytesIO(data[:12] + header + data[33:])) as file:
            return np.asarray(file).astype(">u1").view(">u2").astype(np.uint16)
    halves = []
    for order in "BL":
        with Image.open(io.BytesIO(data)) as half:
            half.tile = [half.tile[0]._replace(args=f"{picture.mode};16{order}")]
            halves.append(np.asarray(half).astype(np.uint16))
    return halves[0] << 8 | halves[1]


def read_ppm(scan, data, tell):
    """Which number is white in a PGM of more than 8 bits: Pillow scales them."""
    scan.white = 65535


def read_psd(scan, data, tell):
    """What a further channel of a PSD is: opacity only if the number of layers is negative."""
    place = 26
    for _ in range(2):  # past the palette and the resources
        place += 4 + int.from_bytes(data[place : place + 4], "big")
    layers = int.from_bytes(data[place + 8 : place + 10], "big", signed=True)
    has_layers = int.from_bytes(data[place : place + 4], "big") > 0
    scan.has_alpha = has_layers and layers < 0
    if scan.has_alpha and scan.picture.mode != "RGBA":
        tell("its transparency is not read")
    for number, _, content in getattr(scan.picture, "resources", ()):
        if number == 1039:
            scan.picture.info["icc_profile"] = content


def read_bmp(scan, data, tell):
    """The profile in the fifth version of a BMP's header."""
    header = data[14:]
    if int.from_bytes(header[:4], "little") >= 124 and header[56:60] == b"DEBM":
        start, length = (int.from_bytes(header[i : i + 4], "little") for i in (112, 116))
        scan.picture.info["icc_profile"] = header[start : start + length]


def read_tga(scan, data, tell):
    """Whether the fourth channel of a TGA is opacity."""
    scan.has_alpha = bool(data[17] & 15)


def read_fits(scan, data, tell):
    """The numbers that a FITS file means, by its scale and offset."""
    found, place = {}, 0
    while not int(found.get(b"NAXIS", 0)) and place < len(data):  # the first header of a picture
        found = {}
        while place < len(data) and data[place : place + 8].rstrip() != b"END":
            card = data[place : place + 80]
            if number := re.match(rb"(\w+) *= +([-+]?[\d.]+(?:[ED][-+]?\d+)?) *(/|$)", card):
                found[number[1]] = float(number[2].replace(b"D", b"E"))
            place += 80
        place += 2880 - place % 2880
    if found.get(b"NAXIS3", 1) > 1:
        tell(f"the first of {found[b'NAXIS3']:g} planes is used")
    scale, zero = found.get(b"BSCALE", 1.0), found.get(b"BZERO", 0.0)
    values = np.asarray(scan.picture)
    values = values.view(np.int16) if values.dtype == np.uint16 else values
    scan.values = values[..., np.newaxis]
    if b"BLANK" in found:
        take_holes(scan, found[b"BLANK"])
    if (scale, zero) != (1, 0):
        is_unsigned = (scale, zero, values.dtype) == (1, 32768, np.int16)
        scan.values = (scan.values * scale + zero).astype(np.uint16 if is_unsigned else np.float64)
    elif scan.picture.mode == "L":
        scan.values = None  # Pillow's are right


def boxes(data):
    """Yields (name, content) of the boxes in ISO's container or JPEG 2000's."""
    place = 0
    while place + 8 <= len(data):
        size, name = int.from_bytes(data[place : place + 4], "big"), data[place + 4 : place + 8]
        start = place + 8
        if size == 1:
            size, start = int.from_bytes(data[start : start + 8], "big"), start + 8
        end = place + size if size else len(data)
        if end < start:
            return
        yield name, data[start:end]
        place = end


def read_iso(scan, data, tell):
    """The colours that an AVIF or HEIC declares by numbers for its main picture."""
    if "icc_profile" in scan.picture.info:
        return  # here the profile comes first
    meta = dict(boxes(dict(boxes(data)).get(b"meta", b"")[4:]))  # after its version
    properties = dict(boxes(meta.get(b"iprp", b"")))
    found = [*boxes(properties.get(b"ipco", b""))]
    for number in properties_of(meta.get(b"pitm", b""), properties.get(b"ipma", b"")):
        name, content = found[number - 1] if 0 < number <= len(found) else (b"", b"")
        if name == b"colr" and content[:4] == b"nclx":
            primaries, curve = (int.from_bytes(content[i : i + 2], "big") for i in (4, 6))
            scan.cicp = None if (primaries, curve) == (2, 2) else (primaries, curve, True)


def properties_of(pitm, ipma):
    """The numbers, from 1, of the properties that the box `ipma` gives the item that `pitm`
    names."""
    stream = io.BytesIO(ipma)

    def number(size):
        return int.from_bytes(stream.read(size), "big")

    main = int.from_bytes(pitm[4:8] if pitm[:1] != b"\0" else pitm[4:6], "big")
    is_long, has_wide = number(1) > 0, number(3) & 1
    for _ in range(min(number(4), 10_000)):
        item = number(4 if is_long else 2)
        numbers = [number(2 if has_wide else 1) for _ in range(number(1))]
        if item == main:
            return [n & (0x7FFF if has_wide else 0x7F) for n in numbers]  # without a flag
    return []


def read_jpeg_2000(scan, data, tell):
    """The profile of a JPEG 2000. Raises ValueError for one that Pillow shows wrongly."""
    header = [*boxes(dict(boxes(data)).get(b"jp2h", b""))]
    depths = [content[10:11] for name, content in header if name == b"ihdr"] or [data[42:43]]
    depths += [content for name, content in header if name == b"bpcc"] * (depths[0] == b"\xff")
    deepest = max((depth & 127) + 1 for depth in b"".join(depths[-1:]))
    if deepest > 8 and not scan.picture.mode.startswith("I"):  # its white would become black
        raise ValueError(f"JPEG 2000 with colours of {deepest} bits is not supported")
    for name, content in header:
        if name == b"colr" and content[:1] in (b"\2", b"\3"):
            scan.picture.info.setdefault("icc_profile", content[3:])


READERS = {  # by Pillow's names of formats; they get the Scan, the file's bytes, and `tell`
    "AVIF": read_iso,
    "BMP": read_bmp,
    "FITS": read_fits,
    "HEIF": read_iso,
    "JPEG2000": read_jpeg_2000,
    "PNG": read_png,
    "PPM": read_ppm,
    "PSD": read_psd,
    "TGA": read_tga,
    "TIFF": read_tiff,
}


# Colours are declared by numbers, by a profile, by a gamma and chromaticities, or by EXIF data.

SRGB = (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)  # x, y of white, red, green and blue
D65 = SRGB[:2]
PRIMARIES = {  # by their numbers in ITU-T H.273
    1: SRGB,
    4: (0.310, 0.316, 0.67, 0.33, 0.21, 0.71, 0.14, 0.08),
    5: (*D65, 0.64, 0.33, 0.29, 0.60, 0.15, 0.06),
    6: (*D65, 0.630, 0.340, 0.310, 0.595, 0.155, 0.070),
    7: (*D65, 0.630, 0.340, 0.310, 0.595, 0.155, 0.070),
    8: (0.310, 0.316, 0.681, 0.319, 0.243, 0.692, 0.145, 0.049),
    9: (*D65, 0.708, 0.292, 0.170, 0.797, 0.131, 0.046),  # BT.2020
    11: (0.314, 0.351, 0.680, 0.320, 0.265, 0.690, 0.150, 0.060),
    12: (*D65, 0.680, 0.320, 0.265, 0.690, 0.150, 0.060),  # Display P3
    22: (*D65, 0.630, 0.340, 0.295, 0.605, 0.155, 0.077),
}
ADOBE = (*D65, 0.64, 0.33, 0.21, 0.71, 0.15, 0.06)
REFERENCE_WHITE = 203  # candelas per square metre that HDR pictures give white paper (BT.2408)


def from_srgb(t):
    """Linear light 0..1 of sRGB values 0..1 (IEC 61966-2-1)."""
    return np.where(t <= 0.04045, t / 12.92, ((t + 0.055) / 1.055) ** 2.4)


def from_pq(t):
    """Light relative to REFERENCE_WHITE of PQ values 0..1 (SMPTE ST 2084)."""
    root = t ** (1 / 78.84375)
    share = np.maximum(root - 0.8359375, 0) / (18.8515625 - 18.6875 * root)
    return 10000 / REFERENCE_WHITE * share ** (1 / 0.1593017578125)


def from_hlg(t):
    """Light of the scene 0..1 of HLG values 0..1 (ARIB STD-B67)."""
    return np.where(t <= 0.5, t**2 / 3, (np.exp((t - 0.55991073) / 0.17883277) + 0.28466892) / 12)


# Transfer characteristics by their numbers in H.273. Films' curves are meant for dim rooms: on a
# screen, they look like sRGB.
CURVES = dict.fromkeys((1, 6, 7, 11, 12, 13, 14, 15), from_srgb) | {
    4: lambda t: t**2.2,
    5: lambda t: t**2.8,
    8: lambda t: t,
    16: from_pq,
    17: lambda t: t**2.6 * (52.37 / 48),
    18: from_hlg,
}


@dataclasses.dataclass(frozen=True)
class Colours:
    """What a picture's values 0..1 mean: the `curves`, one each for red, green and blue, make them
    linear light, of which `matrix` makes that of sRGB. `hdr` is None, "PQ" or "HLG": such light
    goes beyond 1."""

    curves: tuple
    matrix: np.ndarray
    hdr: str | None = None

    @classmethod
    def of(cls, curve, primaries, hdr=None):
        """The Colours with these primaries. Raises ArithmeticError if they are impossible."""
        with np.errstate(all="ignore"):
            try:
                matrix = np.linalg.solve(to_xyz(SRGB), to_xyz(primaries))
            except np.linalg.LinAlgError:
                matrix = np.full((3, 3), np.nan)
            shown = curve(np.linspace(0, 1, 256))
        if not (np.isfinite(matrix).all() and np.isfinite(shown).all()):
            raise ArithmeticError("its gAMA and cHRM chunks make no sense")
        return cls((curve,) * 3, matrix, hdr)

    def shown(self, values):
        """The uint8 sRGB picture (H, W, 3) of `values`, uint16 (H, W, 3) or (H, W, 1)."""
        steps = np.arange(65536) / 65535
        light = {curve: curve(steps) for curve in self.curves}
        made = np.empty((*values.shape[:2], 3), np.uint8)
        for rows in strips(len(values)):
            bands = np.broadcast_to(values[rows], made[rows].shape)
            linear = np.stack([light[c][bands[..., i]] for i, c in enumerate(self.curves)], axis=-1)
            if self.hdr == "HLG":  # brighter parts are shown on a screen with more contrast
                scene = linear @ (0.2627, 0.6780, 0.0593)
                linear = linear * (1000 / REFERENCE_WHITE * scene**0.2)[..., np.newaxis]
            linear = linear @ self.matrix.T
            if self.hdr:
                linear = compressed(np.maximum(linear, 0))
            linear = np.clip(linear, 0, 1)
            power_law = 1.055 * linear ** (1 / 2.4) - 0.055
            made[rows] = 255 * np.where(linear <= 0.0031308, 12.92 * linear, power_law) + 0.5
        return made


def to_xyz(primaries):
    """The matrix from linear light with these chromaticities to XYZ, both with white at 1."""
    x, y = np.reshape(primaries, (4, 2)).T
    white, *colours = np.stack([x / y, np.ones(4), (1 - x - y) / y]).T
    colours = np.stack(colours, axis=1)
    return colours * np.linalg.solve(colours, white) / white[:, np.newaxis]


def compressed(linear):
    """Compresses linear light (H, W, 3) of any strength to 0..1. Colours whose strongest channel is
    at most 0.5 stay the same; brighter ones approach 1 and keep their hue."""
    most = linear.max(axis=-1, keepdims=True)
    fitting = np.where(most > 0.5, 1 - 0.5 * np.exp(-(most - 0.5) / 0.5), most)
    return linear * (fitting / np.maximum(most, 1e-9))


def declared_colours(scan, tell):
    """(Colours, profile) that a Scan's file declares, either of them None; (None, None) stands for
    sRGB. What comes first in the third edition of the PNG specification counts."""
    info = scan.picture.info
    try:
        if scan.cicp is not None:
            return from_cicp(*scan.cicp), None
    except ArithmeticError as error:
        tell(f"its colour declaration is ignored ({error})")
    if profile := info.get("icc_profile"):
        channels = scan.values.shape[-1] if scan.values is not None else 0
        with contextlib.suppress(ValueError, LookupError):  # LittleCMS tells what is wrong
            return from_matrix_profile(profile, channels), profile
        return None, profile
    try:
        if "gamma" in info and "srgb" not in info:
            return from_gamma(info["gamma"], info.get("chromaticity", SRGB)), None
    except ArithmeticError as error:
        tell(f"its colour declaration is ignored ({error})")
    if (scan.exif_space or exif_space(scan.picture)) == "Adobe RGB":
        return Colours.of(lambda t: t ** (563 / 256), ADOBE), None
    return None, None


def from_gamma(gamma, primaries):
    """The Colours of a PNG's gamma and chromaticities, or None for those of sRGB. Raises
    ArithmeticError."""
    if abs(gamma - 1 / 2.2) < 0.01 and np.allclose(primaries, SRGB, atol=0.005):
        return None  # this is how programs declare sRGB
    if abs(gamma - 1 / 1.961) < 0.0001:  # and this is how ffmpeg declares the curves of films
        return Colours.of(from_srgb, primaries)
    return Colours.of(lambda t: t ** (1 / gamma) if gamma > 0 else t * np.nan, primaries)


def from_cicp(primaries, transfer, is_full):
    """The Colours of these numbers of H.273, or None for those of sRGB. Raises ArithmeticError."""
    primaries, transfer = (1 if primaries == 2 else primaries), (13 if transfer == 2 else transfer)
    if primaries not in PRIMARIES or transfer not in CURVES:
        raise ArithmeticError(f"primaries {primaries} and curve {transfer} are not supported")
    curve, hdr = CURVES[transfer], {16: "PQ", 18: "HLG"}.get(transfer)
    if curve is from_srgb and primaries == 1 and is_full:
        return None
    if is_full:
        return Colours.of(curve, PRIMARIES[primaries], hdr)
    narrow = functools.partial(in_narrow_range, curve)
    return Colours.of(narrow, PRIMARIES[primaries], hdr)


def in_narrow_range(curve, t):
    """A curve for values of which 16 of 255 are black and 235 are white."""
    return curve(np.clip((255 * t - 16) / 219, 0, 1))


# The matrix from sRGB to XYZ under D50, to which profiles refer (ICC.1:2022, Annex E).
SRGB_UNDER_D50 = [
    [0.43607, 0.38515, 0.14307],
    [0.22249, 0.71687, 0.06061],
    [0.01392, 0.09708, 0.71410],
]


def from_matrix_profile(profile, channels):
    """The Colours of an ICC profile (bytes) for values of 1 or 3 `channels` that consists of curves
    and a matrix, or of one curve for grey; None for any other. LittleCMS, as Pillow offers it,
    knows only 8 bits. Raises ValueError or LookupError if the profile is damaged."""

    def number(place):
        return int.from_bytes(profile[place : place + 4], "big", signed=True) / 65536

    space, count = profile[16:20], int.from_bytes(profile[128:132], "big")
    entries = (profile[132 + 12 * i : 144 + 12 * i] for i in range(min(count, 100)))
    place = {entry[:4]: int.from_bytes(entry[4:8], "big") for entry in entries}
    if b"A2B0" in place or channels not in (1, 3):
        return None
    if space == b"GRAY" and channels == 1 and b"kTRC" in place:
        return Colours((icc_curve(profile, place[b"kTRC"]),) * 3, np.eye(3))
    if space != b"RGB " or profile[20:24] != b"XYZ ":
        return None
    curves = tuple(icc_curve(profile, place[name]) for name in (b"rTRC", b"gTRC", b"bTRC"))
    columns = [
        [number(place[name] + 8 + 4 * i) for i in range(3)] for name in (b"rXYZ", b"gXYZ", b"bXYZ")
    ]
    return Colours(curves, np.linalg.solve(SRGB_UNDER_D50, np.transpose(columns)))


def icc_curve(profile, place):
    """The curve at a `place` of an ICC profile, as a function."""
    kind, count = profile[place : place + 4], int.from_bytes(profile[place + 8 : place + 12], "big")
    if kind == b"curv":
        table = np.frombuffer(profile, ">u2", count, place + 12) / 65535
        if count > 1:
            return lambda t: np.interp(t, np.linspace(0, 1, count), table)
        gamma = table[0] * 65535 / 256 if count else 1.0
        return lambda t: t**gamma
    form = int.from_bytes(profile[place + 8 : place + 10], "big")
    numbers = np.frombuffer(profile, ">i4", (1, 3, 4, 5, 7)[form], place + 12) / 65536
    g, a, b, c, d, e, f = (*numbers, *np.zeros(7 - len(numbers)))
    if form == 0:
        return lambda t: t**g
    if form < 3:
        low = c if form == 2 else 0.0
        return lambda t: np.where(a * t + b >= 0, np.maximum(a * t + b, 0) ** g + low, low)
    return lambda t: np.where(t >= d, np.maximum(a * t + b, 0) ** g + e, c * t + f)


def to_srgb(scan, path, remarks):
    """A Scan as an 8-bit sRGB PIL picture, mode RGB, or RGBA if parts are transparent."""
    from PIL import Image, ImageCms

    colours, profile = declared_colours(scan, functools.partial(tell, path, remarks))
    if colours and colours.hdr:
        tell(path, remarks, f"this is HDR ({colours.hdr}); its highlights are compressed")
    is_declared = colours or profile or scan.cicp or "srgb" in scan.picture.info
    limits = value_limits(scan, bool(is_declared), path, remarks)
    alpha = alpha_of(scan, limits, path, remarks)
    if colours and limits and scan.values.shape[-1] != 4:
        picture = Image.fromarray(colours.shown(scaled(scan, limits, np.uint16)))
    elif colours:
        pixels = np.asarray(eight_bits(scan, limits).convert("RGB"))
        picture = Image.fromarray(colours.shown(pixels.astype(np.uint16) * 257))
    else:
        picture = eight_bits(scan, limits)
        if profile:
            try:
                picture = from_profile(picture, profile)
            except (OSError, ImageCms.PyCMSError) as error:
                tell(path, remarks, f"its colour profile is ignored ({one_line(error)})")
        picture = picture.convert("RGB")
    if alpha is not None:
        picture.putalpha(alpha)
    return picture


def alpha_of(scan, limits, path, remarks):
    """The opacity of a Scan, whose values have these `limits`, as a PIL picture of mode L, or None.
    One that hides everything is taken for a mistake."""
    from PIL import Image

    picture, key, alpha = scan.picture, scan.picture.info.get("transparency"), None
    if scan.alpha is not None:
        alpha = Image.fromarray(alpha_to_8_bits(scan.alpha, limits))
    elif picture.mode.startswith(("I", "F")):
        if key is not None:
            alpha = Image.fromarray(np.uint8(255) * (np.asarray(picture) != key))
    elif scan.holes is None and scan.has_alpha and (key is not None or picture.mode in WITH_ALPHA):
        alpha = picture.convert("RGBA").getchannel("A")
    if scan.holes is not None:
        levels = np.full(scan.holes.shape, 255, np.uint8) if alpha is None else np.asarray(alpha)
        alpha = Image.fromarray(np.where(scan.holes, np.uint8(0), levels))
    if alpha is not None and alpha.getextrema()[1] == 0:
        tell(path, remarks, "it is transparent everywhere; shown opaque")
        return None
    return alpha


WITH_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")  # modes of PIL pictures


def alpha_to_8_bits(values, limits):
    """An alpha channel of any depth as uint8: floats span 0..1, integers their type's range, or
    that of the colours beside it, 0..2^n-1, if that is smaller and contains them."""
    if values.dtype.kind == "f":
        values = np.nan_to_num(values, posinf=1, neginf=0)
        top = max(1, values.max())
    else:
        top = np.iinfo(values.dtype).max
        if limits and values.max() <= limits[1] < top and math.log2(limits[1] + 1) % 1 == 0:
            top = limits[1]
    return np.clip(values * (255 / top) + 0.5, 0, 255).astype(np.uint8)


def eight_bits(scan, limits):
    """The colours of a Scan as an 8-bit PIL picture of mode L, RGB or CMYK. `limits` are those of
    its values, if it has any."""
    from PIL import Image

    picture = scan.picture
    is_whole = limits == (0, 65535) and picture.mode in ("RGB", "RGBA")  # Pillow's is right
    if limits and not is_whole:
        seen = scaled(scan, limits, np.uint8)
        mode = {1: "L", 3: "RGB", 4: "CMYK"}[seen.shape[-1]]
        picture = Image.frombytes(mode, seen.shape[1::-1], seen.tobytes())
    picture = picture.convert({"RGBa": "RGBA", "La": "LA"}.get(picture.mode, picture.mode))
    return picture.convert({"L": "L", "LA": "L", "CMYK": "CMYK"}.get(picture.mode, "RGB"))


def scaled(scan, limits, dtype):
    """The values of a Scan from one of the `limits` to the other, as integers of a type's full
    range."""
    (low, high), top = limits, np.iinfo(dtype).max
    if limits == (0, top) and scan.values.dtype == dtype:
        made = scan.values
    else:
        values = np.nan_to_num(scan.values.astype(np.float64), nan=low, posinf=low, neginf=low)
        made = np.clip((values - low) * (top / ((high - low) or 1)) + 0.5, 0, top).astype(dtype)
    return top - made if scan.is_inverted else made


def value_limits(scan, is_declared, path, remarks):
    """(black, white) among the values of a Scan; None if it has none. A remark reports a guess.

    What the file says counts, and if it declares its colours, integers have their type's range.
    """
    values = scan.values
    if values is None:
        return None
    is_integer = values.dtype.kind in "iu"
    finite = values if is_integer else values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    if scan.white is not None and scan.white >= high:
        return scan.black, scan.white
    if is_integer and is_declared and low >= 0:
        return 0, np.iinfo(values.dtype).max
    if is_integer and values.dtype.itemsize == 2 and low >= 0:
        limits = sixteen_bit_limits(high, np.iinfo(values.dtype).max)
    else:
        limits = number_limits(finite, low, high)
    if limits == (0, 65535) and high <= 255:
        tell(path, remarks, f"very dark: its values reach only {high:g} of 65535")
    elif limits not in ((0, 1), (0, 255), (0, 65535)):
        tell(path, remarks, "its values are taken as {:g} (black) to {:g} (white)".format(*limits))
    return limits


def sixteen_bit_limits(high, top):
    """(black, white) among integers up to `high`, of 16 bits, that their type limits to `top`: 10,
    12 or 14 bits if none is higher, but the type's range if 8 bits would do."""
    depths = (2**bits - 1 for bits in ((10, 12, 14) if high > 255 else ()))
    return 0, next((depth for depth in depths if high <= depth), top)


def number_limits(finite, low, high):
    """(black, white) among the numbers `finite`, which lie between `low` and `high`: the first of
    the ranges 0..1 (fractions only, of which a few may overshoot it), 0..255, and 0..65535 if they
    reach its upper half, that contains them; otherwise their own, from 0 if they are fractions up
    to 16."""
    is_fraction = finite.dtype.kind == "f" and (high <= 1 or bool((finite % 1).any()))
    is_small = is_fraction and low >= 0 and 1 < high <= 16
    if is_fraction and (low >= 0 and high <= 1 or np.percentile(finite, 99) <= 1 and low > -1):
        return 0, 1
    if low >= 0 and high <= 255 and not is_small:
        return 0, 255
    if low >= 0 and 32767 < high <= 65535:
        return 0, 65535
    return (0 if is_small else low), high


def from_profile(picture, profile):
    """A PIL picture converted from an ICC profile (bytes) to sRGB. It is left unchanged if the
    profile agrees with sRGB to within two levels, whatever its name."""
    from PIL import Image, ImageCms

    if profile[16:20] == b"RGB " and picture.mode == "L":
        picture = picture.convert("RGB")
    profile, srgb = ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
    transform = ImageCms.buildTransform(profile, srgb, picture.mode, "RGB")
    if picture.mode == "RGB":
        levels = np.linspace(0, 255, 18).astype(np.uint8)
        colours = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(18, -1, 3)
        shown = np.asarray(ImageCms.applyTransform(Image.fromarray(colours), transform))
        if np.abs(shown.astype(int) - colours).max() <= 2:
            return picture
    return ImageCms.applyTransform(picture, transform)


def to_picture(image, mean, rescale=False, depth=8):
    """The picture of an `image` (1, 3, H, W): uint8 (H, W, 3), truncated, or uint16 if `depth` is
    16. With `rescale` it is stretched to the full range instead of clipped."""
    picture = np.empty((*image.shape[2:], 3), DEPTHS[depth])
    low, high = (GAIN * end + mean for end in (image.min(), image.max())) if rescale else (0, 255)
    for rows in strips(image.shape[2]):
        strip = GAIN * image[0, ::-1, rows]
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


def strips(height, rows=64):
    """Slices of `rows` rows each, from top to bottom. Computing strip by strip needs hardly any
    memory."""
    return [slice(y, y + rows) for y in range(0, height, rows)]


def planes(picture):
    """The picture as an image's planes: uint8 (1, 3, H, W), blue first."""
    return np.ascontiguousarray(picture[:, :, ::-1].transpose(2, 0, 1)[np.newaxis])


def from_uint8(picture, mean, out=None):
    """The image (1, 3, H, W) of a picture, written to `out` if that is given. Applies no gain, so
    it is not the inverse of to_picture."""
    image = np.empty((1, 3, *picture.shape[:2])) if out is None else out
    image[0] = picture[:, :, ::-1].transpose(2, 0, 1)
    image -= mean
    return image


def resize(picture, size, bilinear=False):
    """The picture at `size` (height, width) as PIL resizes it, bicubic unless `bilinear`."""
    from PIL import Image

    method = Image.Resampling.BILINEAR if bilinear else Image.Resampling.BICUBIC
    return np.asarray(Image.fromarray(picture).resize((size[1], size[0]), method))


def composed(picture, start, mask):
    """Blends two pictures of the same size and depth: `picture` where the mask, uint8 (H, W), is
    white, `start` where it is black."""
    made = np.empty_like(picture)
    for rows in strips(len(picture)):
        share = mask[rows, :, np.newaxis].astype(np.uint32)
        made[rows] = (picture[rows] * share + start[rows] * (255 - share) + 127) // 255
    return made


def with_colors_of(start, picture):
    """`picture` in the colours of `start`, which has the same size and depth: the brightness of
    `picture` with the hue and saturation of `start` (in JPEG's YCbCr, where equal chroma is an
    equal distance from the brightness)."""
    made = np.empty_like(picture)
    for rows in strips(len(picture)):
        brighter = (picture[rows].astype(float) - start[rows]) @ (0.299, 0.587, 0.114)
        exact = start[rows] + brighter[:, :, np.newaxis]
        made[rows] = np.clip(exact.round(), 0, np.iinfo(made.dtype).max)
    return made


def start_image(settings, picture, size, mean, scratch=None):
    """The image at the first size, from the start picture or, if that is None, from noise; its
    array in the folder `scratch` if there is one."""
    image = zeros((1, 3, *size), scratch)
    if picture is not None:
        return from_uint8(resize(picture, size, bilinear=True), mean, image)
    scale, blur = settings.initialization_scale, settings.initialization_blur
    noise(image, scale, blur, mean, settings.seed)
    return image


def noise(image, scale, blur, mean, seed=None):
    """Fills `image` with noise to start from. The blur is the original's: on 8-bit pixels, and
    across channels too."""
    from scipy.ndimage import gaussian_filter

    random = np.random.RandomState(seed)
    for plane in image[0]:
        for rows in strips(len(plane)):
            plane[rows] = scale * random.randn(*plane[rows].shape)
    from_uint8(gaussian_filter(to_picture(image, mean), sigma=blur), mean, image)


def lacking(arrays, besides, scratch=None, held=0):
    """(what is lacking, remedy) if a run needs more bytes than are free: those of its `arrays`,
    which are in the folder `scratch` if there is one, and those `besides`; otherwise None. `held`
    bytes of the arrays are allocated already."""
    checks = [
        (arrays + besides, free_memory() + held, "memory", "use --scratch, or a smaller size")
    ]
    if scratch:
        free = shutil.disk_usage(scratch).free + held
        checks = [(besides, free_memory(), "memory", "use a smaller size")]
        remedy = "use another folder, or a smaller size"
        checks += [(arrays, free, f"disk space in --scratch {scratch}", remedy)]
    for needed, free, what, remedy in checks:
        if needed > free:
            amounts = f"{needed / 1e9:.2f} GB of {what}, but only {free / 1e9:.2f} GB is free"
            return amounts, remedy
    return None


def zeros(shape, folder=None, dtype="float64"):
    """An array of zeros, in memory or in an unnamed file in `folder`, which disappears with the
    process however that ends. Raises RunFailed if the file does not fit there."""
    if folder is None:
        return np.zeros(shape, dtype)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            size = max(1, math.prod(shape) * np.dtype(dtype).itemsize)
            os.posix_fallocate(file.fileno(), 0, size)  # else a full disk would kill the process
            memory = mmap.mmap(file.fileno(), size)
    except OSError as error:
        remedy = "use a folder on a disk with more free space"
        raise RunFailed(f"--scratch {folder}: {error.strerror}; {remedy}") from None
    return np.frombuffer(memory, dtype, math.prod(shape)).reshape(shape)


# ---- Sizes and tiles --------------------------------------------------------------------------
# A size is (height, width). A region is (y0, y1, x0, x1), the place of a tile in the picture.

MAX_SIDE = 1_000_000
LEAST_SIDE = 16  # of a tile; a smaller input is not a picture, or is meant to be set at run time
BYTES_A_PIXEL = 24  # of an image, and of a tile's cache
BYTES_BESIDES = 16  # a pixel, for 8-bit pictures: the start, and those for enlarging and writing


SIZE = re.compile(
    r"([0-9]{1,400}) *x *([0-9]{1,400})"  # height, width
    r"|x *((?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[-+]?[0-9]+)?)"  # factor
    r"|([0-9]{1,400})"  # longer side
)


def parse_size(text, base):
    """The size that an option gives: "HxW", "xF" (F times the size `base`), "N" (the proportions of
    `base` with the longer side N), or None (`base`). Raises ValueError."""
    if text is None:
        return tuple(base)
    found = SIZE.fullmatch(text.strip().lower())
    if not found:
        raise ValueError("this is not a size")
    height, width, factor, longer = found.groups()
    if longer:
        longer = min(int(longer), 2 * MAX_SIDE)
        size = tuple(min(longer, max(1, round(longer * b / max(base)))) for b in base)
    elif factor:
        size = tuple(int(min(float(factor), 2 * MAX_SIDE) * side) for side in base)
    else:
        size = (int(height), int(width))
    if min(size) < 1:
        raise ValueError(f"{size[0]}x{size[1]} has no pixels")
    if max(size) > MAX_SIDE:
        raise ValueError(f"no side may exceed {MAX_SIDE} pixels")
    return size


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


def tile_counts(size, tile_size):
    """How many tiles cover each pixel, float64 (H, W)."""
    counts = np.zeros(size)
    for y0, y1, x0, x1 in all_tiles(size, tile_size):
        counts[y0:y1, x0:x1] += 1
    return counts


def cut_tile(image, region):
    """The pixels (3, H, W) of a region, a view."""
    y0, y1, x0, x1 = region
    return image[0, :, y0:y1, x0:x1]


def overlap(a, b):
    """Whether two regions have pixels in common."""
    return a[0] < b[1] and b[0] < a[1] and a[2] < b[3] and b[2] < a[3]


def plan_sizes(settings, base, tile_size):
    """(sizes of a run, remarks); `base` is the size that factors refer to. A longer side with which
    the other would be below the network's input is raised. Raises BadRequest if a size is below
    that input for other reasons."""

    def refuse(name, *why):
        value = getattr(settings, name)
        return refusal(name, "unset" if value is None else value or "''", *why)

    ends, remarks = [], []
    enough = max(t / b for t, b in zip(tile_size, base))
    for name in ("initial_size", "final_size")[: settings.num_sizes]:
        text = getattr(settings, name)
        try:
            size = parse_size(text, base)
        except ValueError as error:
            remedy = "use HEIGHTxWIDTH (540x960), the longer side (960) or a factor (x0.5)"
            raise refuse(name, error, remedy) from None
        if text and text.strip().isdigit() and any(a < t for a, t in zip(size, tile_size)):
            least = tuple(max(t, round(b * enough)) for t, b in zip(tile_size, base))
            problem = "{}x{} is smaller than the network's input, so it is {}x{}"
            remarks.append(f"--{name} {text}: {problem.format(*size, *least)}")
            size = least
        ends.append(size)
    sizes = size_sequence(ends[0], ends[-1], settings.num_sizes, settings.resize_type)
    for size in sizes:
        if size[0] < tile_size[0] or size[1] < tile_size[1]:
            name = "initial_size" if size == sizes[0] else "final_size"
            factor = math.ceil(100 * enough) / 100
            least = f"{tile_size[0]}x{tile_size[1]}"
            problem = f"{size[0]}x{size[1]} is smaller than the network's input, {least}"
            raise refuse(name, problem, f"use x{factor:g} or more")
    return sizes, remarks


def check_room(settings, sizes, tile_size, scratch=None, held=0):
    """Raises BadRequest if the sizes of a run are too large for the memory, or for the folder
    `scratch`. `held` is how many of the bytes needed are allocated already."""
    needs = [memory_needed(*pair, tile_size) for pair in zip(sizes, [(0, 0), *sizes])]
    largest = max(range(len(sizes)), key=lambda i: sum(needs[i]))
    arrays, besides = needs[largest]
    extra = {"use_pixel_learning_rates": 8, "mask": 20, "keep_colors": 14}  # bytes a pixel
    extra = sum(size for name, size in extra.items() if getattr(settings, name))
    besides += extra * math.prod(sizes[largest])
    if lack := lacking(arrays, besides, scratch, held):
        name = "final_size" if largest else "initial_size"
        problem = f"{'x'.join(map(str, sizes[largest]))} needs {lack[0]}"
        raise refusal(name, getattr(settings, name) or "unset", problem, lack[1])


def memory_needed(size, smaller, tile_size):
    """The bytes that a run needs while it goes from the size `smaller` to `size`: (images and
    caches, which --scratch keeps in files; everything else)."""
    tiles = math.prod(len(tile_starts(n, tile)) for n, tile in zip(size, tile_size))
    pixels = math.prod(size) + math.prod(smaller) + tiles * math.prod(tile_size)
    return BYTES_A_PIXEL * pixels, BYTES_BESIDES * math.prod(size)


# ---- Objective, regularizers, step ------------------------------------------------------------
# A step minimizes a sum of terms. Each has loss(x), a number, and gradient(x), of x's shape. For a
# target, x is a layer's activations, float32 (N, C, ...); there are three forms of targets. For a
# regularizer, x is an image or a part of it, float64 (1, C, H, W), and its weight is included.


@dataclasses.dataclass(frozen=True)
class AmplifyLayer:
    """Makes every activation `a` grow. The loss is minus the sum of l1 a|a| / 2 + l2 a^2 / 2, where
    the square continues as a straight line beyond `clip`."""

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
        """The gradient of the loss with respect to `a`, of its shape and dtype. As in the
        original, the l1 part is |a| whatever the sign of `a`."""
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
        for n, places, products in self._products(a):
            nearest = self.features[:, products.argmax(axis=1)]
            gradient[n].reshape(a.shape[1], -1)[:, places] = -nearest
        return gradient

    def _products(self, a):
        """Yields (n, a slice of the places of a[n], their products with all y: (places, Q))."""
        block = max(1, self.BLOCK // self.features.shape[1])
        for n, x in enumerate(a.reshape(*a.shape[:2], -1)):
            for first in range(0, x.shape[1], block):
                places = slice(first, first + block)
                yield n, places, x[:, places].T @ self.features


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
        weight = "" if self.weight == 1 else f"{self.weight:.12g}*"
        channels = "" if self.channels is None else f":{','.join(map(str, self.channels))}"
        return f"{weight}{quoted(self.layer)}{channels}"

    def check(self, channels):
        """Raises BadRequest if the layer, which has `channels` channels, lacks any of the
        target's."""
        numbers = [n for n in self.channels or () if type(n) is int]
        asked = {("layer", f"{self.layer}:{n}"): n for n in numbers}
        if isinstance(self.form, AmplifyNeuron) and self.channels is None:
            asked = {("target_neuron", self.form.neuron): self.form.neuron}
        for (option, value), number in asked.items():
            if number >= channels:
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
    """A sum of Targets, to be minimized."""

    targets: tuple

    def __str__(self):
        """The terms as --layer takes them."""
        return " + ".join(map(str, self.targets))

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
        gradient is scaled to the L2 norm of the first target's (the first that is not zero there)
        and then weighted. If there is only one target, only the sign of its weight counts."""
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
        """The same objective with what it has to know of the Network: a guide's features."""
        guide = network.guide()
        if guide is None:
            return self
        features = guide_features(network, guide)
        forms = (Resemble(features[target.layer]).on(target.channels) for target in self.targets)
        pairs = zip(self.targets, forms)
        return Objective(tuple(dataclasses.replace(target, form=form) for target, form in pairs))


def guide_features(network, guide):
    """The activations of each layer, {layer: float32 (C, Q)}, at the Q places of the picture
    `guide`, uint8 (H, W, 3). It is scaled to just cover a tile of the Network; its longer side may
    take several tiles."""
    scale = max(n / side for n, side in zip(network.tile_size, guide.shape))
    sides = zip(network.tile_size, guide.shape)
    size = tuple(max(n, round(scale * side)) for n, side in sides)
    image = from_uint8(resize(guide, size, bilinear=True), network.mean())
    seen = collections.defaultdict(list)
    for region in all_tiles(size, network.tile_size):
        network.forward(cut_tile(image, region)[np.newaxis].astype(np.float32))
        for layer, a in network.activations().items():
            seen[layer].append(a[0].reshape(a.shape[1], -1).copy())
    return {layer: np.concatenate(parts, axis=1) for layer, parts in seen.items()}


def rows(a):
    """A view of the array with all axes after the first merged into one."""
    return a.reshape(len(a), -1)


CHANNELS = "numbers and ranges such as 17,40-47, or strong5"  # if the layer is not a classifier
_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
TERM = re.compile(  # weight, layer with or without quotes, channels, "+" or the end
    rf'\s*(?:({_NUMBER})\s*\*\s*)?(?:"([^"]+)"|([^"*+:]*[^"*+:\s]))\s*(?::([^"*+:]+))?(\+|$)'
)


def parse_terms(text):
    """The terms that --layer names, "[WEIGHT*]LAYER[:CHANNELS] + ...", a list of (weight, layer,
    channels or None). Raises BadRequest, pointing at the mistake."""
    terms, place, joint = [], 0, "+"
    while joint:
        term = TERM.match(text, place)
        if term is None:
            where = f"character {place + 1}, {text[place:].strip()[:40] or 'the end'}"
            form = "[WEIGHT*]LAYER[:CHANNELS], with quotes around names that contain +, * or :"
            raise refusal("layer", text, f"at {where}: a term is {form}")
        weight, quoted, plain, channels, joint = term.groups()
        weight, channels = float(weight or 1), channels and parse_channels(channels, term[0])
        if not 1e-6 <= abs(weight) <= 1e6:
            problem = "a weight must be between 1e-6 and 1e6, or between -1e6 and -1e-6"
            raise refusal("layer", term[0].strip(" +"), problem)
        terms.append((weight, quoted or plain, channels))
        place = term.end()
    return terms


def parse_channels(text, term):
    """The channels that a term of --layer names: numbers, and words that stand for numbers.
    Raises BadRequest."""
    found = {}
    for word in map(str.strip, text.split(",")):
        ends = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", word)
        numbers = range(int(ends[1]), int(ends[2] or ends[1]) + 1) if ends else ()
        if not (numbers or word) or ends and not numbers or re.fullmatch("strong0*", word):
            problem = f"at {word or text!r}: use {CHANNELS}"
            raise refusal("layer", term.strip(" +"), problem)
        found |= dict.fromkeys(numbers or [word])
    return tuple(found)


IMAGE_TYPES = {  # --image_type: the form that the settings ask for, on all channels or on some
    "amplify_layer": lambda settings, channels: AmplifyLayer(
        settings.amplify_l1_weight, settings.amplify_l2_weight, settings.amplify_grad_clip
    ),
    "amplify_neuron": lambda settings, channels: AmplifyNeuron(
        settings.target_neuron if channels is None else None
    ),
    "guide": lambda settings, channels: Resemble(),  # for --guide
}


def power(x, exponent):
    """x ** exponent for an array x >= 0; for exponent 1 this is x itself, not a copy. The usual
    exponents are multiples of a quarter, for which square roots and products are several times
    faster than a general power."""
    quarters = exponent * 4
    if not (quarters == int(quarters) and 0 <= quarters <= 48):
        return x**exponent
    whole, rest = divmod(int(quarters), 4)
    root = np.sqrt(x) if rest else None
    factors = [root] * (rest >= 2) + ([np.sqrt(root)] if rest % 2 else [])
    while whole:
        if whole % 2:
            factors.append(x)
        whole //= 2
        x = x * x if whole else x
    return functools.reduce(np.multiply, factors) if factors else np.ones_like(x)


@dataclasses.dataclass(frozen=True)
class PNorm:
    """weight * sum |x / scale|^p, with p >= 1."""

    weight: float
    p: float
    scale: float = 1.0

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
    and Vedaldi 2015, equation 4), with slopes dx and dy as one of TV_OPERATORS measures them."""

    weight: float
    beta: float
    operator: str = "naive"
    scale: float = 1.0

    def loss(self, x):
        """The total variation of x, a number."""
        return self.weight * float(power(self._slopes(x)[2], self.beta / 2).sum())

    def gradient(self, x):
        """Its gradient. As in the original, the floor is not masked out, so a flat place has a
        gradient of nearly 0."""
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


def step_tile(x, start, descent, cache, divisors, terms, decay, learning_rate):
    """Takes the step of a tile, x += step. Returns the step's mean absolute value, or None if it
    overflows; x is then left as it was in the channel that overflows and in those after it.

    `x`, float64 (3, H, W), is the tile's part of the image, and `start` the same part of the start
    image, or None. `descent` is the network's gradient, float32 (3, H, W). `cache`, float64
    (3, H, W), is RMSProp's, and is updated. The step is divided by `divisors`, float64 (H, W), or
    by nothing if None. `terms` are the regularizers, {name: term}, in the original's order.
    """
    total = 0.0
    for channel in range(3):  # channels are independent, and one's arrays fit the processor's cache
        place = np.s_[np.newaxis, channel : channel + 1]
        gradient = descent[place].astype(np.float64)
        for name, term in terms.items():
            from_start = None if start is None else start[place]
            gradient += term.gradient(argument(name, x[place], from_start))
        step = rmsprop(gradient, cache[place], decay, learning_rate)
        if divisors is not None:
            step /= divisors
        total += float(np.abs(step).sum())
        if not math.isfinite(total + cache[channel].sum()):
            return None
        x[channel] += step[0, 0]
    return total / x.size


def compiled_step_tile(x, start, descent, cache, divisors, terms, decay, learning_rate):
    """What step_tile does, by compiled_step."""
    p, aux = (terms.get(name, PNorm(0, 2)) for name in ("p", "aux"))
    tv = terms.get("tv", TotalVariation(0, 2))
    difference = TV_OPERATORS[tv.operator][0]
    norms = [number for norm in (p, aux) for number in (norm.weight, norm.p, norm.scale)]
    numbers = [*norms, tv.weight, tv.beta, tv.scale, decay, learning_rate]
    places = (difference.index(1), difference.index(-1), len(difference))
    step_size = compiled_step()(x, start, descent, cache, divisors, numbers, places)
    return None if step_size < 0 else step_size


def argument(name, x, start):
    """The x of the regularizer `name`: for "p" the change from the start image, if there is one;
    for all others the image."""
    return x - start if name == "p" and start is not None else x


# ---- The dream --------------------------------------------------------------------------------

Tile = collections.namedtuple("Tile", "turn region measure")  # turn: the number of its turn


class Steps:
    """Takes the steps of tiles in the threads of `pool`: those that overlap one after the other, in
    order, all others at the same time. So the image does not depend on the number of threads.
    Without a pool each step is taken immediately."""

    def __init__(self, pool=None):
        self._pool, self._pending = pool, []  # [(region, future), ...]

    def take(self, region, step, *arguments):
        """Runs step(*arguments), which changes the region of the image, or hands it to the pool."""
        if self._pool is None:
            step(*arguments)
            return

        def in_turn(earlier):
            concurrent.futures.wait(earlier)
            step(*arguments)

        done = [future for _, future in self._pending if future.done()]
        for future in done:
            future.result()  # raises what the step raised
        self._pending = [pair for pair in self._pending if pair[1] not in done]
        self._pending.append((region, self._pool.submit(in_turn, self._over(region))))

    def _over(self, region):
        return [future for other, future in self._pending if overlap(other, region)]

    def is_busy(self, region):
        """Whether a step that changes the region is unfinished."""
        return not all(future.done() for future in self._over(region))

    def wait(self, region=None):
        """Waits for the steps that change the region, or for all steps. Raises what they raise."""
        futures = self._over(region) if region else [future for _, future in self._pending]
        for future in futures:
            future.result()


class TileQueue:
    """The tiles of `turns`, in order: `unsent`, which the engine has not been given yet, and
    `unstepped`, which it has been given, but whose steps have not been taken. The arguments are
    those of tile_gradients."""

    def __init__(self, engine, image, turns, steps, before):
        self.engine, self.image, self.steps, self.before = engine, image, steps, before
        self.unsent, self.unstepped = collections.deque(), collections.deque()
        self._turns = enumerate(turns)
        self._most = 1  # the most tiles in a batch

    def send(self, is_idle):
        """Sends the engine the next batch. Returns (tiles, the engine's ticket), or None if no tile
        is ready, or the engine is not idle and there will be a fuller batch soon."""
        batch = self._ready()
        is_fuller_soon = len(batch) < min(self._most, len(self.unsent)) and not is_idle
        if not batch or is_fuller_soon:
            return None
        pixels = [self.before.get(tile.region, cut_tile(self.image, tile.region)) for tile in batch]
        self.unstepped += [self.unsent.popleft() for _ in batch]
        return batch, self.engine.send(pixels, any(tile.measure for tile in batch))

    def _ready(self):
        """The tiles that can be sent next, up to a full batch."""
        batch = []
        while len(batch) < self._most and (len(batch) < len(self.unsent) or self._add_turn(batch)):
            tile = self.unsent[len(batch)]
            unfinished = itertools.chain(self.unstepped, batch)
            earlier = (other for other in unfinished if other.turn < tile.turn)
            if any(overlap(other.region, tile.region) for other in earlier):
                break
            if tile.region not in self.before and self.steps.is_busy(tile.region):
                break
            batch.append(tile)
        return batch

    def _add_turn(self, batch):
        """Adds the tiles of the next turn to the unsent ones; returns whether there were any."""
        for turn, (regions, measure) in self._turns:
            if not regions:
                continue
            self.unsent += [Tile(turn, region, measure) for region in regions]
            # Four batches a turn for each device, so that none waits while one has all tiles.
            share = math.ceil(len(regions) / (4 * self.engine.number))
            self._most = min(self.engine.batch_size, max(share, self._most if batch else 1))
            return True
        return False

    def keep_before(self, tile):
        """Keeps the pixels that the step of `tile`, the first unstepped one, is about to change in
        tiles of its turn that come after it."""
        later = itertools.chain(itertools.islice(self.unstepped, 1, None), self.unsent)
        for other in itertools.takewhile(lambda other: other.turn == tile.turn, later):
            if other.region not in self.before and overlap(other.region, tile.region):
                self.steps.wait(other.region)
                self.before[other.region] = cut_tile(self.image, other.region).astype(np.float32)
        self.before.pop(tile.region, None)


def tile_gradients(engine, image, turns, steps, before=None, is_stopping=lambda: False):
    """Yields (region, gradient, loss) for every region of `turns`, in order. `turns` is an iterable
    of (list of regions, whether to measure the loss); a turn is one colour of one step. The
    gradient, float32 (3, H, W), is with respect to the tile; the loss is the objective's, None
    unless measured. The caller passes the step of a region to `steps`, a Steps, before asking for
    the next region.

    A tile's gradient is that of the image just before the first step of its turn. The tile is sent
    as soon as all tiles of earlier turns that overlap it have been stepped, so that the engine need
    not wait for the end of a turn.

    When is_stopping() becomes true, this ends between two tiles. The dict `before`, {region: pixels
    (3, H, W)}, then holds what is needed to continue, apart from the remaining turns: the pixels
    of tiles that others of their turn have begun to change, as they were before.
    """
    queue = TileQueue(engine, image, turns, steps, {} if before is None else before)
    sent = collections.deque()  # batches that the engine has: (tiles, ticket)
    while not is_stopping():
        while engine.has_room() and (batch := queue.send(is_idle=not sent)):
            sent.append(batch)
        if not sent and not queue.unsent:
            return
        if not sent:
            steps.wait(queue.unsent[0].region)
            continue
        tiles, ticket = sent.popleft()
        while not engine.is_done(ticket):
            if is_stopping():
                return
        for tile, (gradient, loss) in zip(tiles, engine.receive(ticket)):
            queue.keep_before(tile)
            yield tile.region, gradient, loss
            queue.unstepped.popleft()


@dataclasses.dataclass(frozen=True)
class Progress:
    """The state of a run after a step. `size` and `step` (at this size) count from 1. `image` is
    the run's own and must not be changed. `stats` is {name: number}, with the names in STATS, or
    None if the step was not measured. `is_silent` is true if the network's gradient was zero
    everywhere. `look` turns a picture of the run into the one that is shown and saved."""

    sizes: list
    size: int
    num_steps: int
    step: int
    image: np.ndarray
    mean: float
    stats: dict | None
    is_silent: bool = False
    look: object = None

    def __str__(self):
        height, width = self.sizes[self.size - 1]
        size = f"size {self.size}/{len(self.sizes)} {height}x{width}"
        return f"{size}, step {self.step}/{self.num_steps}"

    def steps_done(self):
        """The number of steps done so far, at all sizes."""
        return (self.size - 1) * self.num_steps + self.step

    def picture(self, rescale=False, depth=8):
        """The current picture, uint8 (H, W, 3), or uint16 if the depth is 16."""
        picture = to_picture(self.image, self.mean, rescale, depth)
        return self.look(picture) if self.look else picture


MOST_THREADS = 8  # for taking steps; enough for 8,000 tiles a second
NUMBERS = ("size", "step", "tile", "learning_rate", "tv_reg")  # the numbers in a Dream's state


class Dream:
    """One run: the current image and everything else that the next step depends on.

    `settings` are the Settings, `picture` is the start picture or None for noise, `mean` is the
    number subtracted from its pixels, `engine` is an Engine that has described its network, and
    `scratch` is a folder for arrays that do not fit in memory, or None. `mask` is None or uint8 of
    the picture's size: white areas dream, black ones stay as they are.
    `size` counts from 1, `step` is the number of steps done at this size, and `tile` is the number
    of tiles done in the next step. `remarks` are lines for the user about the sizes. Raises
    BadRequest for impossible sizes.
    """

    def __init__(self, settings, picture, mean, engine, scratch=None, mask=None):
        self.settings, self.picture, self.mean, self.engine = settings, picture, mean, engine
        self.scratch, self.mask = scratch, mask
        base = engine.tile_size if picture is None else picture.shape[:2]
        self.sizes, self.remarks = plan_sizes(settings, base, engine.tile_size)
        self._tiles = {}
        self.size, self.step, self.tile = 1, 0, 0
        self.learning_rate, self.tv_reg = settings.learning_rate, float(settings.tv_reg)
        self.image, self.caches, self.before = None, None, {}
        self.gauge, self.is_silent = None, False
        self.step_tile = compiled_step_tile if compiled_step() else step_tile

    def run(self, wants_stats=lambda step: False, is_stopping=lambda: False):
        """Does the run, or the rest of it, yielding a Progress after every step. wants_stats(step)
        says whether to measure a step. Ends when is_stopping() becomes true, even in the middle of
        a step. Raises NotFinite if a step overflows; the image then keeps its last finite values.
        Raises RunFailed if no step can change the picture."""
        keep_freed_memory()
        is_begun = self.image is not None
        with concurrent.futures.ThreadPoolExecutor(min(MOST_THREADS, count_cores())) as pool:
            while True:
                self.lay_out()
                if not is_begun:
                    self.begin_size()
                yield from self._steps(Steps(pool), wants_stats, is_stopping)
                if self.size == len(self.sizes) or is_stopping():
                    return
                self.size, self.step, is_begun = self.size + 1, 0, False

    def tiles(self, size):
        """The regions at a size, as dreaming_tiles returns them. Raises BadRequest if there are
        none."""
        size = tuple(size)
        if size not in self._tiles:
            colours = dreaming_tiles(size, self.engine.tile_size, self.mask)
            if not any(colours):
                problem = f"it is all black when resized to {size[0]}x{size[1]}"
                raise refusal("mask", self.settings.mask, problem, "use larger sizes")
            self._tiles[size] = colours
        return self._tiles[size]

    def check_mask(self):
        """Raises BadRequest if the mask leaves nothing to do at one of the sizes."""
        for size in self.sizes:
            self.tiles(size)

    def lay_out(self):
        """Prepares what depends only on the size: regions, start image and divisors of steps."""
        size, tile_size = self.sizes[self.size - 1], self.engine.tile_size
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
        s, size = self.settings, self.sizes[self.size - 1]
        picture = None
        if self.image is not None:
            picture = resize(to_picture(self.image, self.mean), size)
            if self.mask is not None:
                start = resize(self.picture, size, bilinear=True)
                picture = np.where(np.isinf(self.divisors)[:, :, np.newaxis], start, picture)
        self.caches = None  # frees memory; the image stays until the next one is complete
        caches = zeros((len(self.cache_index), 3, *self.engine.tile_size), self.scratch)
        if picture is None:
            image = start_image(s, self.picture, size, self.mean, self.scratch)
        else:
            image = from_uint8(picture, self.mean, zeros((1, 3, *size), self.scratch))
        self.image, self.caches = image, caches
        self.learning_rate, self.tv_reg = s.learning_rate, s.tv_reg

    def _steps(self, steps, wants_stats, is_stopping):
        """Does the remaining steps at this size, yielding a Progress after each."""
        numbers = range(self.step + 1, self.settings.num_steps + 1)
        colours = self.tiles(self.sizes[self.size - 1])
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
            terms = self._regularizers()
            with np.errstate(over="ignore"):  # in pixels that are sent: the step will detect it
                for region, gradient, loss in itertools.islice(gradients, count - self.tile):
                    self._step_tile(steps, region, gradient, loss, terms)
                    self.tile += 1
            steps.wait()
            if self.tile < count:
                assert is_stopping(), "tiles are missing"
                return
            self._advance_schedules()
            is_last = self.size == len(self.sizes)  # the gradient may be nonzero at a larger size
            if is_last and self.is_silent and self.is_still and not self.settings.tv_reg_step:
                raise RunFailed(
                    f"no step changes the picture: the gradient of {self.settings.target_layer} is "
                    "zero everywhere; choose another layer or channel, or another picture"
                )
            yield self.progress(self.gauge and self.gauge.summary(self.image))

    def _step_tile(self, steps, region, descent, loss, terms):
        """Takes the step of a tile, and measures it if there is a gauge."""
        self.is_silent = self.is_silent and not descent.any()
        if self.gauge is None:
            steps.take(region, self._take_step, region, descent, terms)
        else:
            steps.wait()
            x, start = cut_tile(self.image, region), self._start_of(region, terms)
            pairs = {n: (t, argument(n, x, start)[np.newaxis]) for n, t in terms.items()}
            self.gauge.add_tile(loss, x, descent, pairs)
            self.gauge.add(step_size=self._take_step(region, descent, terms))

    def _start_of(self, region, terms):
        """The region of the start image, less the mean, float64 (3, H, W); None if there is no
        start image or no term needs it."""
        if self.start is None or "p" not in terms:
            return None
        start = cut_tile(self.start, region).astype(np.float64)
        start -= self.mean
        return start

    def _take_step(self, region, descent, terms):
        """Takes the step of a tile; returns its mean absolute value. Raises RunFailed,
        NotFinite."""
        y0, y1, x0, x1 = region
        x, start = cut_tile(self.image, region), self._start_of(region, terms)
        cache = self.caches[self.cache_index[region]]
        divisors = None if self.divisors is None else self.divisors[y0:y1, x0:x1]
        rates = (self.settings.decay_rate, self.learning_rate)
        with np.errstate(all="ignore"):  # step_tile returns None on overflow
            step_size = self.step_tile(x, start, descent, cache, divisors, terms, *rates)
        if step_size is None:
            is_first = (self.size, self.step) == (1, 0) and np.abs(x).max() < 1e6
            if is_first and not np.isfinite(descent).all():  # no step has caused this
                raise NotFinite(
                    "the network's gradient of the start picture is not a number; unless "
                    "--l1_weight or --l2_weight is huge, check that the network's files belong "
                    "together"
                )
            raise NotFinite(
                f"the picture overflowed at step {self.step + 1} of size {self.size}; lower "
                "--learning_rate, the weights (--l1_weight, --l2_weight, --p_reg, --p_reg_aux, "
                "--tv_reg) or the exponents (--alpha, --alpha_aux, --beta)"
            )
        if step_size:
            self.is_still = False
        return step_size

    def _regularizers(self):
        """The regularizers whose weight is not 0, {name: term}, in the original's order."""
        s = self.settings
        terms = {
            "p": PNorm(s.p_reg, s.alpha, s.p_scale),
            "aux": PNorm(s.p_reg_aux, s.alpha_aux, s.p_scale_aux),
            "tv": TotalVariation(self.tv_reg, s.beta, s.tv_grad_operator, s.tv_reg_scale),
        }
        return {name: term for name, term in terms.items() if term.weight}

    def _advance_schedules(self):
        """Counts a step and advances both schedules, which count the steps at this size."""
        s = self.settings
        self.step, self.tile = self.step + 1, 0
        if self.step % s.learning_rate_decay_iter == 0:
            self.learning_rate *= s.learning_rate_decay_fraction
        if self.step % s.tv_reg_step_iter == 0:
            self.tv_reg += s.tv_reg_step

    def progress(self, stats=None):
        """The current Progress of the run."""
        where = (self.sizes, self.size, self.settings.num_steps, self.step)
        return Progress(*where, self.image, self.mean, stats, self.is_silent, self.look)

    def look(self, picture):
        """Turns a picture of the run into the one that is shown and saved: in the start picture's
        colours, if these are kept, and mixed with the start picture as the mask says. Grey in the
        mask matters only here; the run itself dreams wherever the mask is not black."""
        if self.picture is None or not (self.settings.keep_colors or self.mask is not None):
            return picture
        start = resize(self.picture, picture.shape[:2], bilinear=True).astype(picture.dtype)
        start *= np.iinfo(picture.dtype).max // 255
        if self.settings.keep_colors:
            picture = with_colors_of(start, picture)
        if self.mask is not None:
            picture = composed(picture, start, resize(self.mask, picture.shape[:2], bilinear=True))
        return picture

    def is_done(self):
        """Whether all steps have been done."""
        return self.size == len(self.sizes) and self.step == self.settings.num_steps

    def is_laid_out(self):
        """Whether there is a state to continue from; not while a size is being prepared."""
        size = tuple(self.sizes[self.size - 1])
        return self.caches is not None and self.image.shape[2:] == size

    def state(self):
        """Everything that the next step depends on, apart from settings, picture and network:
        ({name: number}, {name: array})."""
        numbers = {name: getattr(self, name) for name in NUMBERS}
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
        numbers = {"tile": 0} | numbers  # early versions saved checkpoints after whole steps only
        size, step, tile = (numbers[name] for name in ("size", "step", "tile"))
        is_whole = type(size) is type(step) is type(tile) is int
        if not (is_whole and 1 <= size <= len(self.sizes) and 0 <= step <= self.settings.num_steps):
            raise ValueError("its step is outside the run")
        height_width, tile_size = self.sizes[size - 1], self.engine.tile_size
        regions = [*itertools.chain(*self.tiles(height_width))]
        if not 0 <= tile <= (len(regions) - 1 if step < self.settings.num_steps else 0):
            raise ValueError("its tile is outside the run")
        places = numbers.get("before", [])
        shapes = {
            "image": ("float64", 1, 3, *height_width),
            "caches": ("float64", len(regions), 3, *tile_size),
        }
        if places:
            shapes["before"] = (np.float32, len(places), 3, *tile_size)
        check_arrays({name: arrays[name] for name in shapes}, shapes)
        with np.errstate(all="ignore"):
            if not all(np.isfinite(arrays[name].sum()) for name in shapes):
                raise ValueError("its numbers are not finite")
        for name in NUMBERS:
            setattr(self, name, type(getattr(self, name))(numbers[name]))
        self.image, self.caches = arrays["image"], arrays["caches"]
        self.before = {regions[i]: pixels for i, pixels in zip(places, arrays.get("before", ()))}
        self.gauge = Gauge(numbers["gauge"]) if numbers.get("gauge") else None


def after_tiles(done, turns):
    """Yields what is left of `turns`, as in tile_gradients, after the first `done` tiles."""
    for regions, measure in turns:
        yield regions[done:], measure
        done = max(0, done - len(regions))


STATS = (
    "objective", "p_loss", "aux_loss", "tv_loss", "p_gradient", "aux_gradient", "tv_gradient",
    "cnn_gradient", "step_size", "step_to_value", "image_mean", "image_std",
)  # fmt: skip


COLUMNS = ("size", "height", "width", "step", *STATS)  # of the table that --stats writes


class Gauge:
    """Measures one step over all its tiles; the original printed the statistics of the last tile
    only. Inputs the `state` of an earlier Gauge, it continues from there."""

    def __init__(self, state=()):
        self._sums = collections.Counter({name: float(n) for name, n in dict(state).items()})

    def state(self):
        """Everything measured so far, {name: number}."""
        return dict(self._sums)

    def add_tile(self, loss, x, descent, terms):
        """Adds a tile, before its step is taken: the objective's loss; x, float64 (3, H, W); the
        network's gradient; and {name of a regularizer: (the term, its argument)}."""
        self.add(tiles=1, objective=-loss, cnn_gradient=mean_size(descent), value=mean_size(x))
        for name, (term, argument) in terms.items():
            self.add(**{f"{name}_loss": term.loss(argument)})
            self.add(**{f"{name}_gradient": mean_size(term.gradient(argument))})

    def add(self, **numbers):
        """Adds the numbers to the sums of the same names."""
        self._sums.update(numbers)

    def summary(self, image):
        """The statistics, {name in STATS: number}: means over the tiles, or of the whole image."""
        return {name: self._sums[name] / self._sums["tiles"] for name in STATS} | {
            "step_to_value": self._sums["step_size"] / (self._sums["value"] or 1),
            "image_mean": float(image.mean()),
            "image_std": deviation(image),
        }


def deviation(image):
    """The standard deviation of an image's values."""
    mean, squares = image.mean(), 0.0
    for rows in strips(image.shape[2]):
        squares += float(np.square(image[:, :, rows] - mean).sum())
    return math.sqrt(squares / image.size)


def mean_size(array):
    """The mean absolute value."""
    return float(np.abs(array).mean(dtype=np.float64))


def keep_freed_memory():
    """Makes glibc keep up to 64 MB of freed memory for reuse. A tile's arrays are allocated and
    freed in every step; by default each is returned to the system and then mapped again page by
    page, which doubles the time of the computation."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 64 << 20)  # M_TRIM_THRESHOLD


###################################################################################################
# Above is the algorithm. Below is the rest: options, networks, processes, files, the command line.
###################################################################################################

# ---- Options ----------------------------------------------------------------------------------
# Each option is defined in one entry. Besides argparse's own arguments it can have:
#   free   True if a resumed run may change it. (The network's files may move; their content is
#          compared.) All other options are the fields of Settings, in the section "A run".
#   idle   a function of the options that returns with what, or "without ...", this one has no
#          effect, or a false value
#   file   "read" or "write" if the option names a file that a run reads or writes
#   words  values of such an option that are not file names
#   text   a function that writes the value for a command line; None: left out of recorded commands


class Parser(argparse.ArgumentParser):
    """argparse that accepts dashes in option names, negative numbers such as -1e-4, presets and
    files of options, reports errors in one line, and keeps the attributes listed above for each
    option. `options` lists the actions."""

    def __init__(self, **arguments):
        super().__init__(formatter_class=HelpFormatter, **arguments)
        self._negative_number_matcher = re.compile(r"^-(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$")
        self.options, self._args = [], []

    def group(self, title, description=None, settings=None):
        """Starts a group in the help; returns a function that adds an option to it. An option that
        is a field of the dataclass `settings` has its default, and is fixed: a resumed run cannot
        change it."""
        group = self.add_argument_group(title, description)
        fields = {field.name: field.default for field in dataclasses.fields(settings)}

        def add(*names, idle=None, file=None, words=(), text=str, **arguments):
            dest = names[0].removeprefix("--")
            if dest in fields and arguments.get("action") != "store_true":
                arguments["default"] = fields[dest]
            action = group.add_argument(*names, **arguments)
            action.free, action.idle, action.file, action.text = (
                dest not in fields,
                idle,
                file,
                text,
            )
            action.words = words
            self.options.append(action)

        return add

    @functools.cached_property
    def defaults(self):
        """The options of an empty command line."""
        return self.parse_args([])

    def parse_known_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else args
        self._args = self._read_files(args)  # once, because a pipe can be read only once
        preset, _ = PRESET.parse_known_args(self._args)
        if preset.preset in PRESETS:  # is applied first, so that all other options override it
            namespace, _ = super().parse_known_args(PRESETS[preset.preset].split(), namespace)
            settle(namespace)
        found, rest = super().parse_known_args(self._args, namespace)
        settle(found)
        return found, rest

    def _underscored(self, arg):
        name, equals, value = arg.partition("=")
        if value == "--" and name.startswith("--"):  # some versions of argparse drop it
            self.error(f"{name}: -- is not a value")
        name = name.replace("-", "_").replace("__", "--", 1)
        return name + equals + value if arg.startswith("--") else arg

    def _check_value(self, action, value):
        if action.choices is not None and value not in action.choices:
            name = action.option_strings[0].removeprefix("--")
            problem = "there is no such value"
            raise refusal(name, value, problem, suggestion(value, action.choices))

    def _read_files(self, words, outer=()):
        """The words, with each @FILE replaced by the words in that file."""
        found = []
        for word in words:
            if not word.startswith("@"):
                found.append(self._underscored(word))
                continue
            path = os.path.realpath(word[1:])
            try:
                if path in outer:
                    raise ValueError("it includes itself")
                with open(word[1:], encoding="utf-8-sig") as file:
                    inner = shlex.split(file.read(), comments=True)
            except (OSError, ValueError) as error:
                problem = getattr(error, "strerror", None) or one_line(error)
                if isinstance(error, UnicodeDecodeError):
                    problem = "this is not a text file in UTF-8"
                remedy = f"an argument that starts with @ names a file of options (use ./{word})"
                raise BadRequest(f"{word}: {problem}", remedy) from None
            found += self._read_files(inner, (*outer, path))
        return found

    def error(self, message):
        remedy = "see --help"
        message = message.replace("expected at least one argument", "expected one argument")
        if unknown := re.match(r"unrecognized arguments: (?:.* )?\W{1,2}(\w+)", message):
            known = self._option_string_actions
            close = difflib.get_close_matches(f"--{unknown[1]}", known, n=1, cutoff=0.75)
            remedy = f"did you mean {close[0]}?" if close else remedy
        if "expected one argument" in message:
            pairs = [*itertools.pairwise(self._args)]
            names = re.match("argument ([^:]*):", message)[1].split("/")
            values = (value for name, value in pairs if name in names)
            value = next((v for v in values if re.match("-(?!-)", v)), None)
            remedy = f"write {names[-1]}={value}" if value else remedy
        raise BadRequest(f"{message.removeprefix('argument ')}", remedy)

    def several(self, options):
        """The options that have several values, by name."""
        actions = (action for action in self.options if isinstance(action, Several))
        return [a.dest for a in actions if isinstance(getattr(options, a.dest), list)]

    def files_read(self, options, free=True):
        """The files that the options name for reading, {option: path}; unless `free`, only those
        that a resumed run may not change."""
        actions = [a for a in self.options if a.file == "read" and (free or not a.free)]
        named = [(a.option_strings[-1][2:], a, getattr(options, a.dest)) for a in actions]
        return {name: path for name, a, path in named if names_file(a, path)}

    def make_absolute(self, options, folder):
        """Makes the names of files in the options absolute; they are relative to `folder`."""
        for action in self.options:
            name = getattr(options, action.dest)
            if names_file(action, name):
                setattr(options, action.dest, os.path.abspath(os.path.join(folder, name)))

    def without_effect(self, options):
        """Yields a notice for each option that was set but has no effect, in the order of
        --help."""
        for action in self.options:
            changed = getattr(options, action.dest) != getattr(self.defaults, action.dest)
            reason = changed and action.idle and action.idle(options)
            if reason:
                with_reason = reason if reason.startswith("without ") else f"with {reason}"
                yield f"--{action.dest} has no effect {with_reason}"

    def words(self, options, **found):
        """The options that differ from their defaults, as words of a command line; `found` has the
        values that the run chose for options left open."""
        words = []
        for action in self.options:
            value = found.get(action.dest, getattr(options, action.dest))
            if action.text is None or value in (None, getattr(self.defaults, action.dest)):
                continue
            name = action.option_strings[0]
            words.append(name if action.nargs == 0 else f"{name}={action.text(value)}")
        return words

    def fixed_differences(self, old, new):
        """Yields (action, old value, new value) for the fixed options that differ."""
        for action in self.options:
            values = getattr(old, action.dest), getattr(new, action.dest)
            if not action.free and values[0] != values[1]:
                yield action, *values


PRESET = argparse.ArgumentParser(add_help=False)
PRESET.add_argument("--preset", nargs="?")


def names_file(action, value):
    """Whether the value of an option is the name of a file."""
    return bool(action.file) and value is not None and value not in action.words


class Uses(list):
    """The values of an option that can have several, at each of its uses so far."""


class Several(argparse.Action):
    """An option that can have several values. If it is given several times, all values count if the
    output names several pictures; otherwise only the last use counts, as for every option. One
    value is stored as it is, several as a list. They replace those of a preset or checkpoint."""

    def __call__(self, parser, namespace, values, option_string=None):
        earlier = getattr(namespace, self.dest)
        earlier = earlier if isinstance(earlier, Uses) else ()
        setattr(namespace, self.dest, Uses([*earlier, listed(values)]))


def settle(options):
    """Replaces the Uses in the options by the values that count."""
    for name, uses in vars(options).items():
        if isinstance(uses, Uses):
            uses = uses if names_several(options.output_file) else uses[-1:]
            values = [*itertools.chain(*uses)]
            setattr(options, name, values if len(values) > 1 else values[0])


def suggestion(word, known):
    """What to say to somebody who wrote `word` for one of the `known` words."""
    known = [str(other) for other in known]
    close = difflib.get_close_matches(str(word), known, n=2)
    return f"did you mean {' or '.join(close)}?" if close else f"choose from {', '.join(known)}"


def names_several(output):
    """Whether the value of --output names a picture for each start picture and layer."""
    return output is not None and (
        output.endswith("/") or "{name}" in output or "{layer}" in output
    )


def listed(value):
    """The values of an option that can have several, as a list."""
    return value if isinstance(value, list) else [value]


class HelpFormatter(argparse.HelpFormatter):
    """Adds an option's default to its help, unless it is None or False."""

    def _get_help_string(self, action):
        has_default = not any(action.default is none for none in (None, False, argparse.SUPPRESS))
        return f"{action.help} (default: %(default)s)" if has_default else action.help


def number(kind, low=None, high=None, above=None):
    """A type for argparse: an int or float within bounds; `above` is an exclusive lower bound."""
    limits = {"at least": low, "more than": above, "at most": high}
    bounds = " and ".join(
        f"{words} {limit}" for words, limit in limits.items() if limit is not None
    )

    def parse(text):
        value = kind(text)
        if kind is int and abs(value) > 10**15:
            raise argparse.ArgumentTypeError(f"{text[:30]} is too large; use a smaller number")
        if not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text} is not a finite number")
        is_low = low is not None and value < low or above is not None and value <= above
        if is_low or high is not None and value > high:
            raise argparse.ArgumentTypeError(f"{text} is out of range; it must be {bounds}")
        return value

    parse.__name__ = "whole number" if kind is int else "number"
    return parse


def not_empty(text):
    """A type for argparse: text that is not empty, as that of an unset shell variable would be."""
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r} must not be empty or contain a null character")
    return text


def expanded(path, is_literal):
    """The path, with ~ and variables expanded unless `is_literal`."""
    return path if is_literal else os.path.expanduser(os.path.expandvars(path))


def mask_name(text):
    """A type for argparse: a file to read, or alpha."""
    return text if text == "alpha" else file_name(text)


def file_name(text):
    """A type for argparse: a file to read. The name is taken literally if the file exists."""
    return expanded(text, os.path.exists(not_empty(text)))


def output_name(text):
    """A type for argparse: a file to write. The name is taken literally if its folder exists."""
    return expanded(text, os.path.isdir(os.path.dirname(not_empty(text)) or "."))


def scratch_folder(text):
    """A type for argparse: a folder in which files can be created."""
    path = os.path.abspath(expanded(text, os.path.isdir(not_empty(text))))
    if not (os.path.isdir(path) and os.access(path, os.W_OK | os.X_OK)):
        kind = "cannot be written to" if os.path.isdir(path) else "is not a folder"
        raise argparse.ArgumentTypeError(f"{path} {kind}; use a folder with enough disk space")
    return path


def gpu_numbers(text):
    """A type for argparse: a list of GPU numbers, [] for the CPU."""
    words = text.split(",")
    are_numbers = all(re.fullmatch(r"[0-9]{1,9}", word) for word in words)
    if are_numbers and len(set(map(int, words))) == len(words):
        return list(map(int, words))
    if re.fullmatch(r"-[0-9]+", text):
        return []
    remedy = "use different GPU numbers, such as 0,1, or just -1 for the CPU"
    raise argparse.ArgumentTypeError(f"{text!r}: {remedy}")


def input_size(text):
    """A type for argparse: (height, width) from "HxW" or "N"."""
    sides = re.fullmatch(r"(\d+)(?:x(\d+))?", text.strip())
    size = sides and (int(sides[1]), int(sides[2] or sides[1]))
    if not size or not LEAST_SIDE <= min(size) <= max(size) <= MAX_SIDE:
        problem = f"{text[:30]}: use HxW or N, with sides from {LEAST_SIDE} to {MAX_SIDE}"
        raise argparse.ArgumentTypeError(problem)
    return size


def objective(text):
    """A type for argparse: the Objective that --layer names, of targets in the default form."""
    terms = parse_terms(not_empty(text))
    return Objective(
        tuple(Target(layer, channels=channels, weight=weight) for weight, layer, channels in terms)
    )


def behaviors(text):
    """A type for argparse: words of BEHAVIORS joined by +, as a set; "none" is the empty set."""
    words, known = set(text.split("+")), (*BEHAVIORS, "none")
    if unknown := words.difference(known):
        word = min(unknown)
        problem = f"{text!r}: there is no {word!r} (words are joined by +)"
        raise argparse.ArgumentTypeError(f"{problem}; {suggestion(word, known)}")
    if "none" in words and len(words) > 1:
        raise argparse.ArgumentTypeError(f"{text!r}: none cannot be joined with other words")
    return words - {"none"}


def colour(text):
    """A type for argparse: a colour that PIL knows."""
    if text == "white":  # the default; importing PIL for it would slow down every start
        return text
    from PIL import ImageColor

    try:
        ImageColor.getrgb(text)
    except ValueError:
        remedy = "use a name or #rrggbb, such as black or #808080"
        raise argparse.ArgumentTypeError(f"{text!r} is not a colour; {remedy}") from None
    return text


def when(name, value):
    """A reason to be idle: another option has this value."""
    return lambda options: getattr(options, name) == value and f"--{name} {value}"


def too_few_steps(name):
    """A reason to be idle: another option's number of steps is never reached."""

    def reason(options):
        steps, every = options.num_steps, getattr(options, name)
        return every >= steps and f"--num_steps {steps} and --{name} {every}"

    return reason


# Named sets of options. First the settings in the original's README, except sizes that belong to
# its own pictures; then some for photographs.
_NOISE = "--initial_size=270x480 --final_size=1080x1920 --num_sizes=5 --num_steps=100 \
    --learning_rate=10 --decay_rate=0.25 --alpha=6 --p_reg=1e-10 --beta=2.5 --tv_reg=0.5"
_CLOSE = "--learning_rate=1 --decay_rate=0.9 --alpha=2 --p_reg=0.5 --beta=2.5 --tv_reg=0.05"
_EVEN = "--decay_rate=0.85 --alpha=2 --beta=2.5 --alpha_aux=8 --p_reg_aux=5e-11 \
    --use_pixel_learning_rates"
_PHOTO = "--initial_size=450 --final_size=900 --num_steps=40 --decay_rate=0.9 --alpha=2 \
    --beta=2.5 --use_pixel_learning_rates"
PRESETS = {
    "example1": f"--layer=inception_4d/3x3_reduce {_NOISE}",
    "example2": f"--layer=inception_4c/output {_NOISE}",
    "example3": f"--layer=inception_4e/output {_NOISE}",
    "example4": f"--layer=inception_4d/3x3_reduce {_NOISE} --num_steps=200 --p_reg=1e-11 \
        --tv_reg=0.01",
    "example5": f"--model=googlenet_places205 --layer=inception_4b/3x3_reduce {_NOISE} \
        --num_steps=200 --learning_rate=5 --decay_rate=0.95 --alpha=4 --p_reg=1e-9 --beta=2.0 \
        --tv_reg=0.3",
    "example6": f"--model=googlenet_places205 --layer=inception_4c/pool {_NOISE} \
        --initialization_scale=10 --initialization_blur=1 --num_steps=150 --learning_rate=2 \
        --decay_rate=0.9 --alpha=4 --p_reg=1e-9 --tv_reg=1",
    "example7": f"--layer=inception_3a/1x1 {_CLOSE} --initial_size=450 --final_size=840 \
        --num_sizes=2 --num_steps=30",
    "example8": f"--layer=inception_3a/3x3_reduce {_CLOSE} --initial_size=450 --final_size=840 \
        --num_sizes=2 --num_steps=30",
    "example9": f"--layer=inception_4d/output {_CLOSE} --initial_size=307 --final_size=640 \
        --num_sizes=3 --num_steps=50",
    "example10": f"--layer=inception_4d/pool {_CLOSE} --initial_size=340 --final_size=1280 \
        --num_sizes=4 --num_steps=50 --p_reg=5 --tv_reg=0.1",
    "example11": f"--layer=inception_4d/pool {_EVEN} --initial_size=230 --final_size=922 \
        --num_sizes=5 --num_steps=50 --learning_rate=1 --p_reg=10 --tv_reg=1",
    "example12": f"--layer=inception_4c/output {_EVEN} --initial_size=361 --final_size=902 \
        --num_sizes=3 --num_steps=100 --learning_rate=5 --p_reg=0.5 --tv_reg=5",
    "example13": f"--layer=inception_4b/5x5_reduce {_EVEN} --initial_size=307 --final_size=614 \
        --num_sizes=3 --num_steps=100 --learning_rate=5 --p_reg=0.5 --tv_reg=0.5",
    "animals": f"--layer=inception_4c/output {_PHOTO} --num_sizes=3 --learning_rate=2.5 \
        --p_reg=0.02 --tv_reg=0.3 --alpha_aux=8 --p_reg_aux=2e-12",
    "strokes": f"--layer=conv2/3x3 {_PHOTO} --num_sizes=2 --learning_rate=2 --p_reg=0.1 \
        --tv_reg=0.2",
    "soft": f"--layer=inception_4b/output {_PHOTO} --num_sizes=2 --learning_rate=1.5 --p_reg=0.1 \
        --tv_reg=0.3 --l1_weight=0",
}


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
    num_steps: int = 1000
    learning_rate: float = 1.0
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
        """The Settings among the options; draws a random seed if noise needs one."""
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
PARSER = Parser(
    prog=PROGRAM,
    description="Makes DeepDream pictures with Caffe, by amplifying what a layer of a network "
    "responds to in a picture or in noise.",
    epilog="Option names can be written with dashes. A size is HxW, height x width in pixels; "
    "or the longer side alone; or xF, F times the base size, which is the start picture's size "
    "or, for noise, the network's input size. No side may be smaller than the network's input. "
    "@FILE reads options from a file.",
)


def network_options(add):
    add("--preset", metavar="NAME", choices=tuple(PRESETS), text=None,
        help="use a named set of options: for photographs animals, strokes or soft, for all others "
        "see --list_presets; options that you add override it")
    add("--list_presets", action="store_true",
        help="print the presets and their options, and exit")
    add("--model", choices=tuple(MODELS),
        idle=lambda o: o.deploy_txt and o.caffe_model and o.mean_image and "all three files given",
        help="network to use; its weights are looked for in $CAFFE_ROOT, then in $CNN_VIS_MODELS "
        "or ~/.cache/cnn-vis (default: bvlc_googlenet if installed, else googlenet_mini)")
    add("--list_models", action="store_true",
        help="list these networks and whether they are installed, and exit")
    add("--list_layers", action="store_true",
        help="list the network's layers that can be amplified, and exit")
    add("--list_classes", action="store_true",
        help="list the classes of the network's classifier, and exit")
    add("--download_model", metavar="NAME",
        choices=tuple(model.name for model in MODELS.values() if model.url),
        help="download a network (%(choices)s), check it, and exit")
    add("--model_url", metavar="URL", type=not_empty,
        idle=lambda o: not o.download_model and "without --download_model",
        help="address to download the network from (default: the official one)")
    add("--deploy_txt", metavar="FILE", type=file_name, file="read",
        help="the network's description, a prototxt (default: the model's)")
    add("--caffe_model", metavar="FILE", type=file_name, file="read",
        help="the network's weights (default: the model's)")
    add("--mean_image", metavar="FILE", type=file_name, file="read",
        help="mean image (.npy, .binaryproto); its mean is subtracted from every pixel "
        "(default: the model's)")
    add("--input_size", metavar="SIZE", type=input_size,
        text=lambda size: "{}x{}".format(*size),
        help="tile size, HxW, or N for NxN; needed if the prototxt has none; a larger one gives "
        "more context to layers that accept any size (default: the prototxt's)")
    add("--input_scale", metavar="S", type=number(float, above=0),
        help="number by which the network's input is multiplied after the mean is subtracted, for "
        "networks trained on scaled pictures (default: 1, or what a training prototxt says)")
    add("--gpu", metavar="N", type=gpu_numbers,
        idle=lambda o: o.gpu and o.scheduler and "--scheduler",
        text=lambda gpus: ",".join(map(str, gpus)) or "-1",
        help="GPU to use, numbered from 0, or several, such as 0,1,2; -1 for the CPU "
        "(default: GPU 0 if Caffe can use it, else the CPU)")
    add("--batch_size", metavar="N", type=number(int, 1),
        idle=lambda o: o.scheduler and "--scheduler",
        help="maximum number of tiles that each of a GPU's two processes computes at once; always "
        "1 on the CPU (default: as many as fit in GPU memory, up to 32)")
    add("--tf32", action="store_true",
        idle=lambda o: o.scheduler and "--scheduler",
        help="let cuDNN multiply in TF32, with 10 bits of each factor: faster on recent GPUs, but "
        "a slightly different picture")
    add("--workers", metavar="N", type=number(int, 1, 1024),
        idle=lambda o: o.scheduler and "--scheduler",
        help="number of processes that compute on the CPU (default: one per core)")
    add("--scheduler", metavar="ADDRESS", type=not_empty, text=None,
        help="compute on the workers of the Dask cluster whose scheduler has this address, such "
        "as tcp://HOST:8786 (default: compute on this machine)")


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
    add("--target_layer", "--layer", metavar="TERMS", type=objective, action=Several,
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
        "or a folder to make a picture from each")
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
        help="first size: HxW, the longer side, or xF, see below (default: the base size)")
    add("--final_size", metavar="SIZE", idle=when("num_sizes", 1),
        help="last size, if --num_sizes is above 1 (default: the base size)")
    add("--num_sizes", metavar="N", type=number(int, 1, 10_000),
        help="number of sizes; 1: --initial_size only")
    add("--resize_type", choices=("geometric", "linear"),
        idle=when("num_sizes", 1), help="how the sizes from first to last are spaced")
    add("--scratch", metavar="FOLDER", type=scratch_folder, text=None,
        help="keep a run's largest arrays in unnamed files in this folder, so that large pictures "
        "need less memory (default: keep them in memory)")


def step_options(add):
    add("--num_steps", metavar="N", type=number(int, 1), help="steps at each size")
    add("--learning_rate", metavar="R", type=number(float, above=0),
        help="step size, roughly in grey levels")
    add("--decay_rate", metavar="D", type=number(float, 0, 1),
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


def output_options(add):
    def has_no_turn(options):
        words = options.iter_behavior
        has_turn = not words or any(BEHAVIORS[word].at_end for word in words)
        is_late = options.output_iter > options.num_steps
        reason = f"--num_steps {options.num_steps} and --output_iter {options.output_iter}"
        return is_late and not has_turn and reason

    def is_not_shown(options):
        return "show" not in options.iter_behavior and "without show in --iter_behavior"

    def has_no_page(options):
        return "web" not in options.iter_behavior and "without web in --iter_behavior"

    add("--output_file", "--output", metavar="FILE", type=output_name, default="out.png",
        file="write", help="file for the finished picture; for several pictures FOLDER/, or a "
        "name that contains {name} (the start picture's) and {layer}")
    add("--output_iter", metavar="N", type=number(int, 1), default=50,
        help="do --iter_behavior every N steps")
    add("--iter_behavior", metavar="WORDS", type=behaviors, default="save+print",
        idle=has_no_turn, text=lambda words: "+".join(sorted(words)) or "none",
        help=f"what to do during the run: {', '.join(BEHAVIORS)}, joined by +, or none; save "
        "writes NAME_1_50.EXT (size 1, step 50) next to it, plot writes NAME_plot.png, gif writes "
        "NAME_run.gif; without a display, show and plot_pix write NAME_show.png and "
        "NAME_plot_pix.png; web serves a page to watch the run in a browser")
    add("--web_port", metavar="N", type=number(int, 0, 65535), default=0,
        idle=has_no_page, help="port of the page that web serves; 0: any free one; it is printed")
    add("--web_host", metavar="HOST", type=not_empty, default="127.0.0.1", text=None,
        idle=has_no_page, help="address on which web listens; other machines cannot reach the "
        "default, and anyone who can reach another address can watch")
    add("--stats", metavar="FILE", type=output_name, file="write",
        help="measure every step, and write the statistics as CSV")
    add("--sidecar", action="store_true",
        help="write OUTPUT.json, a record of how the picture was made; a PNG always contains it")
    add("--reproduce", metavar="FILE", type=file_name,
        help="print the command that made a picture, and exit")
    add("--checkpoint_iter", metavar="N", type=number(int, 0),
        help="save OUTPUT.checkpoint, for --resume, every N steps; it is deleted when the run is "
        "complete; 0: never (default: --output_iter, at least 50)")
    add("--resume", metavar="FILE", type=file_name, text=None,
        help="continue from a checkpoint; the run's options need not be given again")
    add("--quiet", action="store_true", text=None,
        help="no progress bar, no notices (and, with --iter_behavior none, no statistics)")
    add("--show_width", metavar="W", type=number(float, 1, 100), default=5.0,
        idle=is_not_shown, help="width of the show window, in inches")
    add("--show_height", metavar="H", type=number(float, 1, 100), default=5.0,
        idle=is_not_shown, help="height of the show window, in inches")
    add("--depth", type=int, choices=tuple(DEPTHS),
        help="bits per channel in saved pictures; 16 only for .png and .tif")
    add("--rescale_image", action="store_true",
        help="stretch saved and shown pictures to the full range, instead of clipping")

# fmt: on


def fill_parser():
    """Adds the options to PARSER, in the groups of --help. An option's first name is the original
    program's; the others are those in its README."""
    PARSER.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    group = functools.partial(PARSER.group, settings=Settings)
    network_options(group("network"))
    target_options(group("target"))
    start_options(group("start picture"))
    size_options(group("sizes"))
    step_options(group("steps"))
    keep = "keep the picture smooth and its values in range"
    regularizer_options(group("regularizers", keep))
    output_options(group("output"))


# ---- Networks by name -------------------------------------------------------------------------

ILSVRC_MEAN = "imagenet/ilsvrc_2012_mean.npy"
GOOGLENET_DEPLOY = "models/bvlc_googlenet/deploy.prototxt"


@dataclasses.dataclass(frozen=True)
class Model:
    """A network known by name.

    `mean` is subtracted from its input; None means the mean of Caffe's ilsvrc mean image. `url` is
    the address of the weights, or of an archive that contains them as the file `member`. `hashes`
    ("sha1:..." or "sha256:...") are the known hashes of the weights.
    """

    name: str
    url: str | None = None
    hashes: tuple = ()
    mean: float | None = None
    member: str | None = None
    other_weights: tuple = ()  # more paths below $CAFFE_ROOT/models

    def weights_places(self):
        """The paths to search for the weights; the first one that exists is used."""
        below, root = f"{self.name}/{self.name}.caffemodel", os.environ.get("CAFFE_ROOT")
        in_caffe = (below, *self.other_weights) if root else ()
        places = [os.path.join(root, "models", path) for path in in_caffe]
        return [*places, self.cache_place(), os.path.join(INCLUDED, below)]

    def cache_place(self):
        """The path to which the weights are downloaded."""
        return os.path.join(cache_folder(), self.name, f"{self.name}.caffemodel")

    def find_weights(self):
        """The path of the weights, or None if they are not installed."""
        return next(filter(os.path.isfile, self.weights_places()), None)

    def find_deploy(self):
        """The path of the prototxt, or None. All full GoogLeNets share one prototxt."""
        own = os.path.join(INCLUDED, self.name, "deploy.prototxt")
        return own if os.path.isfile(own) else find_in_caffe(GOOGLENET_DEPLOY, GOOGLENET_DEPLOY)


MODELS = {
    model.name: model
    for model in (
        Model(
            "googlenet_mini",
            hashes=("sha256:bbfad4b4b68e138b40bde847d5058cf75736958081ca980ebf4ddb9730964455",),
        ),
        Model(
            "bvlc_googlenet",
            "http://dl.caffe.berkeleyvision.org/bvlc_googlenet.caffemodel",
            hashes=("sha1:405fc5acd08a3bb12de8ee5e23a96bec22f08204",),
        ),
        # We do not know whether the published sha1 of Places205 is the archive's or the weights'.
        # If it is the archive's, the weights do not match it and count as "structure checked".
        Model(
            "googlenet_places205",
            "http://places.csail.mit.edu/model/googlenet_places205.tar.gz",
            hashes=("sha1:d767debf686fa15df1e05fbc9b4598076127134a",),
            mean=sum([105.417, 113.753, 116.047]) / 3,
            member="googlelet_places205_train_iter_2400000.caffemodel",
            other_weights=("googlenet_places/googlelet_places205_train_iter_2400000.caffemodel",),
        ),
        Model(
            "googlenet_places365",
            "http://places2.csail.mit.edu/models_places365/googlenet_places365.caffemodel",
            mean=sum([104.051, 112.514, 116.676]) / 3,
        ),
    )
}


def cache_folder():
    """The folder for this user's networks: $CNN_VIS_MODELS, or cnn-vis in the cache folder."""
    home = os.path.expanduser("~")
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(home, ".cache")
    return os.environ.get("CNN_VIS_MODELS") or os.path.join(cache, "cnn-vis")


def find_in_caffe(below_root, below_package):
    """The path of a file that comes with Caffe: below $CAFFE_ROOT, or else in the installed Python
    package. None if neither has it."""
    root, package = os.environ.get("CAFFE_ROOT"), importlib.util.find_spec("caffe")
    places = [os.path.join(root, below_root)] if root else []
    if package is not None and package.submodule_search_locations:
        places.append(os.path.join(package.submodule_search_locations[0], below_package))
    return next(filter(os.path.isfile, places), None)


def check_caffe():
    """Raises BadRequest if Caffe itself is missing, which explains any missing file of Caffe's."""
    root = os.environ.get("CAFFE_ROOT")
    is_there = root and os.path.isdir(os.path.join(root, "python", "caffe"))
    if not is_there and importlib.util.find_spec("caffe") is None:
        raise BadRequest(missing_package(ModuleNotFoundError(name="caffe"), "pycaffe"))


def choose_model(name, given_files):
    """The Model called `name`. If that is None, it is BVLC GoogLeNet, or the included small network
    if BVLC GoogLeNet is not installed and the user named no files instead (`given_files`)."""
    model, small = MODELS[name or "bvlc_googlenet"], MODELS["googlenet_mini"]
    is_missing = name is None and not given_files and model.find_weights() is None
    return small if is_missing and small.find_weights() else model


def stand_in_notice(asked, name):
    """The notice that googlenet_mini replaces BVLC GoogLeNet, or None. `asked` is the model that
    the user chose, or None; `name` is the network in use."""
    if asked is None and name == "googlenet_mini":
        return (
            "BVLC GoogLeNet is not installed: using googlenet_mini, a small imitation. "
            f"To get the real one: {COMMAND} --download_model bvlc_googlenet"
        )
    return None


@dataclasses.dataclass(frozen=True)
class NetworkFiles:
    """The name of a network and the paths of its files. `fit_classifier` is whether the classifier
    takes its width from the weights; `mean` is the number to subtract from pixels, and `scale` the
    one by which the network's input is then multiplied; `guide` is the guide of a run, a file in
    .npy format, uint8 (H, W, 3), and `guide_sha256` is its hash. `notices` are lines for the user.
    """

    deploy: str
    weights: str | None
    name: str = "network"
    fit_classifier: bool = False
    mean: float | None = None
    scale: float = 1.0
    guide: str | None = None
    guide_sha256: str | None = None  # another run's guide may have the same path
    notices: tuple = dataclasses.field(default=(), compare=False)

    def paths(self):
        """{field: path} of the files."""
        named = {name: getattr(self, name) for name in ("weights", "deploy", "guide")}
        return {name: path for name, path in named.items() if path}


def find_files(options):
    """The NetworkFiles for the options. Its weights are None if they are not installed; its mean is
    None if it has yet to be read from the mean image. Raises BadRequest."""
    own = options.deploy_txt or options.caffe_model
    model = choose_model(options.model, own)
    weights, deploy = options.caffe_model, options.deploy_txt
    weights = existing_file("caffe_model", weights) if weights else model.find_weights()
    deploy = existing_file("deploy_txt", deploy) if deploy else model.find_deploy()
    if deploy is None:
        check_caffe()
        remedy = f"name one with --deploy_txt, or {how_to_install('pycaffe')}"
        raise refusal("model", model.name, "no deploy.prototxt found", remedy)
    mean = None if options.mean_image else model.mean
    name = "network" if own else model.name
    return NetworkFiles(deploy, weights, name, not options.deploy_txt, mean)


def find_network(options):
    """The complete NetworkFiles for a run with the options. Raises BadRequest."""
    files = find_files(options)
    if files.weights is None:
        model = choose_model(options.model, options.deploy_txt)
        places = " or ".join(model.weights_places()[:-1])
        remedy = f"use --download_model {model.name}, or name its weights with --caffe_model"
        raise refusal("model", model.name, f"not installed at {places}", remedy)
    files = as_in_training(files, options)
    if files.mean is not None:
        return files
    path = options.mean_image or find_in_caffe(f"python/caffe/{ILSVRC_MEAN}", ILSVRC_MEAN)
    if path is None:
        check_caffe()
        remedy = f"name the file, or {how_to_install('pycaffe')}"
        raise refusal("mean_image", "unset", "ilsvrc_2012_mean.npy was not found", remedy)
    return dataclasses.replace(files, mean=read_mean(existing_file("mean_image", path)))


def as_in_training(files, options):
    """The NetworkFiles with scale and mean from the options or, if these leave them open, as a
    training prototxt states them. Raises BadRequest."""
    scale, mean, notices = options.input_scale, files.mean, []
    found = {}
    content = read_bytes(files.deploy) if options.deploy_txt else b""
    if re.search(rb"\b(scale|mean_\w+)\s*:", content):
        found = known_training_input(files.deploy, content).copy()
    if "scale" in found and scale in (None, found["scale"]):
        scale = found["scale"]
        if not 0 < scale < math.inf:
            raise refusal(
                "deploy_txt", files.deploy, f"its scale is {scale:g}", "set --input_scale"
            )
        notices.append(f"the network's input is scaled by {scale:g}, as {files.deploy} says")
    if not options.mean_image and (path := found.get("mean_file")):
        if os.path.isfile(path):
            found["mean"] = read_mean(path)
        else:
            notices.append(f"{path}, named in {files.deploy}, does not exist; see --mean_image")
    if not options.mean_image and "mean" in found:
        mean = found["mean"]
        if not 0 <= mean <= 255:
            problem = f"its mean_value is {mean:g}, but pixels range from 0 to 255"
            raise refusal("deploy_txt", files.deploy, problem, "name a --mean_image")
        notices.append(f"{mean:g} is subtracted from pixels, as {files.deploy} says")
    return dataclasses.replace(files, mean=mean, scale=scale or 1.0, notices=tuple(notices))


@contextlib.contextmanager
def with_guide(files, guide):
    """Context manager: the NetworkFiles with the picture `guide`, uint8 (H, W, 3) or None, added as
    an unnamed file that exists until the context ends."""
    if guide is None:
        yield files
        return
    with open(os.memfd_create("guide"), "wb") as file:
        np.save(file, guide)
        file.flush()
        path = f"/proc/{os.getpid()}/fd/{file.fileno()}"
        yield dataclasses.replace(files, guide=path, guide_sha256=sha256_of(path))


def existing_file(option, path):
    """Returns `path` if it is a file; otherwise raises BadRequest, naming the `option`."""
    if not os.path.isfile(path):
        there = "this is a folder" if os.path.isdir(path) else "this is not a regular file"
        reason = there if os.path.exists(path) else "no such file"
        raise refusal(option, path, reason, "use another path")
    if not os.access(path, os.R_OK):
        raise refusal(option, path, "this file cannot be read", "run chmod u+r on it")
    return path


def read_mean(path):
    """The mean of the mean image (.npy or .binaryproto), computed in the file's dtype. Raises
    BadRequest."""
    try:
        if not read_bytes(path).startswith((b"\x93NUMPY", b"PK", b"\x80")):
            array = read_binaryproto(path)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about headers that Python 2 wrote
                array = np.load(path, allow_pickle=False)
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu" or not array.size:
            raise ValueError("it contains no numbers")
        mean = float(array.mean())
    except Exception as error:  # the file may contain anything
        problem = f"cannot be read as an array ({one_line(error)})"
        remedy = "use a .npy or .binaryproto file"
        raise refusal("mean_image", path, problem, remedy) from None
    if not 0 <= mean <= 255:
        problem = f"its mean is {mean:g}, but pixels range from 0 to 255"
        raise refusal("mean_image", path, problem, "use another file")
    return mean


CLASSES = {1000: "imagenet", 365: "places365", 205: "places205"}  # by a classifier's width


def class_names(width):
    """The class names of a classifier of this width, each a line of synonyms; None if unknown."""
    path = os.path.join(INCLUDED, "classes", f"{CLASSES.get(width)}.txt")
    return read_text(path).splitlines() if os.path.isfile(path) else None


def class_number(name, names):
    """The number of the class called `name`. Raises ValueError with the problem and the remedy as
    its message."""

    def plain(text):
        return " ".join(re.split(r"[\s_]+", text.strip().lower()))

    by_name = collections.defaultdict(list)
    for number, line in enumerate(names):
        for synonym in dict.fromkeys(map(plain, line.split(","))):
            by_name[synonym].append(number)
    found = by_name.get(plain(name), [])
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"classes {' and '.join(map(str, found))} have this name; use a number")
    close = difflib.get_close_matches(plain(name), by_name, n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(close)}?" if close else "see --list_classes"
    raise ValueError(f"no class has this name; {hint}")


def file_hash(path, algorithm):
    """The hash of a file as "algorithm:hex"."""
    digest = hashlib.new(algorithm)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return f"{algorithm}:{digest.hexdigest()}"


def sha256_of(path):
    """The SHA-256 of a file, in hex."""
    return file_hash(path, "sha256").partition(":")[2]


def content_of(network):
    """{field: SHA-256} of the NetworkFiles, which identifies them wherever they are stored."""
    return {name: sha256_of(path) for name, path in network.paths().items()}


def has_known_hash(path, model):
    """Whether the file has one of the model's known hashes."""
    return any(file_hash(path, known.partition(":")[0]) == known for known in model.hashes)


def standing(path, model):
    """How far the weights `path` can be trusted to be the model's, in a few words."""
    if has_known_hash(path, model):
        return "verified"
    with contextlib.suppress(OSError):
        is_same = file_hash(path, "sha256") == read_text(f"{path}.checked").strip()
        return "structure checked" if is_same else "changed since it was downloaded"
    return "not verified"


TIMEOUT = 30  # seconds to wait for the server to respond
HTML = (b"<!doctype", b"<html", b"<head", b"<!--", b"<?xml")  # how a web page starts, in lower case


def fetch(url, path):
    """Downloads `url` to `path`, with a progress bar. Raises RunFailed."""
    import pooch
    from requests import exceptions

    folder, name = os.path.split(path)
    pooch.get_logger().setLevel("WARNING")
    bar = sys.stderr.isatty()
    downloader = pooch.HTTPDownloader(progressbar=bar, chunk_size=1 << 16, timeout=TIMEOUT)
    try:
        pooch.retrieve(url, known_hash=None, fname=name, path=folder, downloader=downloader)
    except (exceptions.RequestException, ValueError) as error:
        answer = getattr(error, "response", None)
        words = {
            exceptions.HTTPError: answer is not None
            and f"the server says {answer.status_code} {answer.reason}",
            exceptions.Timeout: f"the server did not respond within {TIMEOUT} s",
            exceptions.ChunkedEncodingError: "the download was interrupted",
            exceptions.ConnectionError: "no connection; is this machine online?",
        }
        known = (text for kind, text in words.items() if isinstance(error, kind))
        reason = next(known, f"cannot be downloaded ({one_line(error)})")
        raise RunFailed(f"{url}: {reason}; try again, or use --model_url") from None


def unpack(archive, member, path):
    """Extracts the file called `member`, in any folder of the tar archive, to `path`. Raises
    RunFailed."""
    import tarfile

    try:
        with tarfile.open(archive) as tar:
            files = (item for item in tar if item.isfile())
            found = next((item for item in files if os.path.basename(item.name) == member), None)
            if found is None:
                raise RunFailed(f"the archive does not contain {member}")
            with tar.extractfile(found) as source, open(path, "wb") as target:
                shutil.copyfileobj(source, target)
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise RunFailed(f"the archive cannot be read ({one_line(error)})") from None


def download(model, url, check_structure):
    """Downloads the model's weights to its cache_place(). They are moved there only once they have
    been checked: they have a known hash, or else check_structure(path), which returns what is wrong
    or None, has found no fault. Raises RunFailed."""
    place = model.cache_place()
    folder = os.path.dirname(place)
    if problem := unwritable(place):
        raise RunFailed(f"{place} is {problem}; remove it, or set CNN_VIS_MODELS to another folder")
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as temporary:
            fetched = weights = os.path.join(temporary, "fetched")
            fetch(url, fetched)
            with open(fetched, "rb") as file:
                start = file.read(512).lstrip().lower()
            if start.startswith(HTML):
                problem = "got a web page, not a network: does this connection need a login?"
                raise RunFailed(f"{url}: {problem}")
            if model.member is not None:
                weights = os.path.join(temporary, "weights")
                try:
                    unpack(fetched, model.member, weights)
                except RunFailed as error:
                    raise RunFailed(f"{url}: {error}; try again, or use --model_url") from None
            is_known = has_known_hash(weights, model)
            if not is_known:
                check_unknown(model, url, weights, check_structure)
            put_in_place(weights, place)
            if not is_known:
                put_in_place(f"{weights}.checked", f"{place}.checked")
    except OSError as error:
        remedy = "free some space, or set CNN_VIS_MODELS to another folder"
        raise RunFailed(f"{folder}: {error.strerror or error}; {remedy}") from None


def check_unknown(model, url, weights, check_structure):
    """Checks downloaded weights that match no known hash, and writes their SHA-256 to a file named
    like them plus ".checked". Raises RunFailed."""
    if model.member is None and model.hashes:
        expected, found = model.hashes[0], file_hash(weights, "sha1")
        raise RunFailed(f"{url}: wrong file, deleted: expected {expected}, got {found}")
    error = check_structure(weights)
    if error is not None:
        raise RunFailed(f"{url}: not {model.name} weights, deleted: {error}")
    with open(f"{weights}.checked", "w") as file:
        file.write(file_hash(weights, "sha256"))


# ---- The network ------------------------------------------------------------------------------
# What uses Caffe runs only in worker processes, because any error in Caffe kills its process. First
# a network's files are read and checked, then the network is cut, then it is run.

ANOTHER_LAYER = "choose another layer from --list_layers"


def import_caffe():
    """Imports Caffe, with its log silenced, from the Python path or else from $CAFFE_ROOT/python.
    Returns the module. Raises BadRequest."""
    os.environ.setdefault("GLOG_minloglevel", "2")
    if root := os.environ.get("CAFFE_ROOT"):
        path = os.path.join(root, "python")
        sys.path += [path] if path not in sys.path else []
    try:
        import caffe
    except ModuleNotFoundError as error:
        what = "pycaffe" if error.name == "caffe" else "requirements.txt"
        raise BadRequest(missing_package(error, what)) from None
    except Exception as error:  # the user's own Caffe may fail in any way
        if re.search(NO_MEMORY, str(error)):
            raise OutOfMemory from None
        extra = "[cuda]" if re.search("lib(cublas|curand|cudnn)", str(error)) else ""
        remedy = how_to_install(f"pycaffe{extra}")
        raise BadRequest(f"Caffe cannot be imported ({one_line(error)})", remedy) from None
    return caffe


def caffe_net(net):
    """The NetParameter as a caffe.Net in TEST phase, without weights."""
    caffe = import_caffe()
    with open(os.memfd_create("net"), "w") as file:  # Caffe reads nets from files only
        file.write(str(net))
        file.flush()
        return caffe.Net(f"/proc/self/fd/{file.fileno()}", caffe.TEST)


def parse_prototxt(path):
    """The prototxt `path` as a caffe_pb2.NetParameter. Raises BadRequest."""
    import_caffe()
    from google.protobuf import text_format

    try:
        with open(path, "rb") as file:
            data = file.read().removeprefix(b"\xef\xbb\xbf")  # a byte-order mark
        try:
            text = data.decode()
        except UnicodeDecodeError:
            text = data.decode("latin-1")  # allows comments in any encoding
        return parse_net(text)
    except (OSError, text_format.ParseError, RecursionError) as error:
        problem = f"not a network description ({one_line(error)[:200]})"
        raise refusal("deploy_txt", path, problem, "use a deploy.prototxt") from None


def parse_net(text):
    """The text as a NetParameter. Unknown parameters are dropped from layers of types that this
    Caffe lacks. Raises text_format.ParseError, whose message names the layer at fault."""
    from caffe.proto import caffe_pb2
    from google.protobuf import text_format

    text = in_this_dialect(text)
    try:
        return text_format.Parse(text, caffe_pb2.NetParameter())
    except text_format.ParseError:
        known, net = set(import_caffe().layer_type_list()), caffe_pb2.NetParameter()
        for block in blocks(text):
            one = text_format.Parse(block, caffe_pb2.NetParameter(), allow_unknown_field=True)
            layer = next(iter([*one.layer, *one.layers]), None)
            if not one.layer or layer.type in known:
                try:
                    one = text_format.Parse(block, caffe_pb2.NetParameter())
                except text_format.ParseError as error:
                    where = f"layer {layer.name}: " if layer else ""
                    raise text_format.ParseError(f"{where}{error}") from None
            net.MergeFrom(one)
        return net


def in_this_dialect(text):
    """The prototxt with the `ceil_mode` of other Caffes as this one's `round_mode`."""
    from caffe.proto import caffe_pb2

    fields = caffe_pb2.PoolingParameter.DESCRIPTOR.fields_by_name
    if "ceil_mode" in fields or "round_mode" not in fields:
        return text

    def translated(found):
        if found[1] is None:  # a string or a comment
            return found[0]
        return f"round_mode: {'CEIL' if found[1].lower() in ('true', 't', '1') else 'FLOOR'}"

    truth = r"\bceil_mode\s*:\s*([Tt]rue|[Ff]alse|[tf]|[01])\b"
    return re.sub(f"{UNSPOKEN}|{truth}", translated, text)


UNSPOKEN = r"\"(?:\\.|[^\"\\])*\"|'(?:\\.|[^'\\])*'|#[^\n]*"  # strings and comments of a prototxt


def blocks(text):
    """Cuts a prototxt after every brace that closes an outermost block; yields the pieces, each
    after as many empty lines as there are lines before it, so that errors have the right line."""
    depth, begun = 0, 0
    for token in re.finditer(rf"{UNSPOKEN}|[{{}}]", text):
        depth += {"{": 1, "}": -1}.get(token[0], 0)
        if token[0] == "}" and depth == 0:
            yield "\n" * text.count("\n", 0, begun) + text[begun : token.end()]
            begun = token.end()
    yield "\n" * text.count("\n", 0, begun) + text[begun:]


def upgraded(net):
    """A NetParameter in an older format (V0 or V1: `layers`), converted to the current one."""
    from caffe.proto import caffe_pb2

    if any(layer.HasField("layer") for layer in net.layers):  # V0; Caffe upgrades it on loading
        with tempfile.NamedTemporaryFile() as file:
            caffe_net(net).save(file.name)
            net = caffe_pb2.NetParameter.FromString(file.read())
        for layer in net.layer:
            del layer.blobs[:]
        return net
    kinds = {name.lower(): name for name in import_caffe().layer_type_list()}
    kinds["softmaxloss"] = "SoftmaxWithLoss"
    for old in net.layers:
        new, kind = net.layer.add(), old.LayerType.Name(old.type)
        new.type = kinds.get(kind.replace("_", "").lower(), kind.title().replace("_", ""))
        for name in old.param:
            new.param.add(name=name)
        for field, value in old.ListFields():
            own = ("type", "param", "blobs", "blobs_lr", "weight_decay", "blob_share_mode")
            if field.name in own:
                continue
            if isinstance(value, str):
                setattr(new, field.name, value)
            elif hasattr(value, "extend"):
                getattr(new, field.name).extend(value)
            elif field.name in new.DESCRIPTOR.fields_by_name:
                getattr(new, field.name).CopyFrom(value)
    net.ClearField("layers")
    return net


def keep_test_layers(net):
    """Removes the layers that Caffe omits in its TEST phase, at the level and stages of the
    NetParameter `net`, plus the stage "deploy" if an Input layer includes it. If no remaining layer
    reads pictures, keeps those that do in the TRAIN phase."""
    from caffe import TEST

    stages, level = set(net.state.stage), net.state.level
    inputs = (layer for layer in net.layer if layer.type == "Input")
    stages.update("deploy" for layer in inputs for rule in layer.include if "deploy" in rule.stage)

    def is_met(rule):
        phase = not rule.HasField("phase") or rule.phase == TEST
        least = not rule.HasField("min_level") or level >= rule.min_level
        most = not rule.HasField("max_level") or level <= rule.max_level
        has_stages = stages.issuperset(rule.stage) and stages.isdisjoint(rule.not_stage)
        return phase and least and most and has_stages

    def is_kept(layer):
        if layer.include:
            return any(map(is_met, layer.include))
        return not any(map(is_met, layer.exclude))

    kept, layers = list(map(is_kept, net.layer)), list(net.layer)
    reads = net.input or any(
        is_in and layer.top and not layer.bottom for is_in, layer in zip(kept, layers)
    )
    del net.layer[:]
    for is_in, layer in zip(kept, layers):
        if is_in or not (reads or layer.bottom):
            del layer.include[:], layer.exclude[:]
            net.layer.append(layer)
    net.ClearField("state")


def data_layers(net):
    """The data layers of a NetParameter, which read pictures for training instead of an input."""
    has_input = net.input or any(layer.type == "Input" for layer in net.layer)
    others = {"Input", "Parameter"} | ({"DummyData"} if has_input else set())
    sources = (layer for layer in net.layer if layer.top and not layer.bottom)
    return [layer for layer in sources if layer.type not in others]


def data_param(layer):
    """The parameters of a data layer's own type, or None."""
    return {
        "Data": layer.data_param,
        "DummyData": layer.dummy_data_param,
        "ImageData": layer.image_data_param,
        "MemoryData": layer.memory_data_param,
        "WindowData": layer.window_data_param,
    }.get(layer.type)


def picture_shape(layer):
    """The (channels, height, width) of the pictures that a data layer reads; height and width are 0
    if it does not state them."""
    own = data_param(layer)
    if layer.type == "MemoryData":
        return own.channels, own.height, own.width
    if layer.type == "DummyData":
        old = (own.channels[:1], own.height[:1], own.width[:1])
        return tuple(own.shape[0].dim[1:]) if own.shape else tuple(itertools.chain(*old))
    side = layer.transform_param.crop_size or getattr(own, "crop_size", 0)
    if layer.type == "ImageData" and not side:
        return 3, own.new_height, own.new_width
    return 3, side, side


def take_inputs(net):
    """Removes the inputs and data layers from the NetParameter `net`. Returns {blob: shape for one
    tile, with sides of 0 if they are not stated}, the list of data layers, and the set of blobs
    that exist only in training."""
    shapes = [tuple(shape.dim) for shape in net.input_shape]
    shapes += [tuple(net.input_dim[i : i + 4]) for i in range(0, len(net.input_dim), 4)]
    inputs = dict(itertools.zip_longest(net.input, shapes[: len(net.input)], fillvalue=()))
    for layer in net.layer:
        if layer.type == "Input":
            shapes = [tuple(shape.dim) for shape in layer.input_param.shape] or [()]
            inputs |= zip(layer.top, shapes * len(layer.top))
    reading, labels = data_layers(net), set()
    for layer in reading:
        inputs[layer.top[0]] = (1, *picture_shape(layer))
        labels.update(layer.top[1:])
    for layer in list(net.layer):
        if not layer.bottom and inputs.keys() & set(layer.top):
            net.layer.remove(layer)
    for name in ("input", "input_shape", "input_dim"):
        net.ClearField(name)
    inputs = {blob: (1, *shape[1:]) if shape else (1, 3, 0, 0) for blob, shape in inputs.items()}
    return inputs, reading, labels


@functools.cache
def known_training_input(path, content):
    """training_input(path), found once for each `content` of the file."""
    return in_a_worker(training_input, path)


def training_input(path):
    """Task: what the data layer of the training prototxt `path` does to pictures, a dict with some
    of "scale", by which they are multiplied; "mean", the mean of what is subtracted from their
    channels before that; and "mean_file", where it is stored instead. Raises BadRequest."""
    net = parse_prototxt(path)
    net = upgraded(net) if net.layers else net
    keep_test_layers(net)
    found = {}
    layers = data_layers(net)
    sized = [layer for layer in layers if min(picture_shape(layer)[1:], default=0)]
    for layer in (sized or layers)[:1]:
        own, new = data_param(layer), layer.transform_param  # the older place, and today's
        scale = new.scale if new.HasField("scale") else getattr(own, "scale", 1)
        if scale != 1:
            found["scale"] = float(f"{scale:.7g}")  # a float32, as it was written
        if new.mean_value:
            found["mean"] = sum(new.mean_value) / len(new.mean_value)
        elif mean_file := new.mean_file or getattr(own, "mean_file", ""):
            found["mean_file"] = mean_file
    return found


NO_GRADIENT = {"Accuracy", "ArgMax", "Embed", "Threshold"}  # layer types without a gradient


class Description:
    """A network as its prototxt describes it, ready to be cut and run. `input_size`, if given, is
    the (height, width) of its pictures. Raises BadRequest.

    Attributes: path; net, a NetParameter in the current format, without the layers that this Caffe
    cannot create; inputs, {blob: shape for one tile}; starts, {blob that can be amplified: the
    layer from which backward starts}, in order; aliases, {layer: the only blob that it makes};
    holders, {layer that works in place: its blob}; problems, {any other blob or layer: why it
    cannot be amplified}; notices, a list of lines for the user.
    """

    def __init__(self, path, input_size=None):
        self.path, self.notices, net = path, [], parse_prototxt(path)
        if net.layers:
            net = upgraded(net)
        keep_test_layers(net)
        names = {""}
        for number, layer in enumerate(net.layer):
            del layer.propagate_down[:]  # meant for training
            if layer.name in names:  # Caffe would always find the first one
                layer.name = f"{layer.name}#{number}"
            names.add(layer.name)
            for field, value in layer.ListFields():
                if field.message_type and "engine" in field.message_type.fields_by_name:
                    value.ClearField("engine")  # this Caffe may lack it; let it choose
        self.inputs, reading, labels = take_inputs(net)
        self._choose_pictures(input_size, reading)
        for blob, shape in reversed(self.inputs.items()):
            layer = net.layer.add(name=blob, type="Input", top=[blob])
            layer.input_param.shape.add(dim=shape)
            net.layer.insert(0, net.layer.pop())
        self.net, self.starts, self.problems = net, {}, {}
        self.aliases, self.holders = {}, {}
        self._of_inputs = set()  # those problems that are about several inputs
        self._sort_out(labels)

    def _choose_pictures(self, input_size, reading):
        """Finds the inputs that take pictures, and gives them their size."""

        def refuse(*why):
            return refusal("deploy_txt", self.path, *why)

        shapes, kinds = self.inputs, ", ".join(f"{layer.name} ({layer.type})" for layer in reading)
        pictures = [blob for blob, shape in shapes.items() if len(shape) == 4 and shape[1] == 3]
        if not pictures:
            found = f"its input has shape {[*shapes.values()][0]}" if shapes else "it has no input"
            raise refuse(found, "it must take 3-channel pictures")
        large = [blob for blob in pictures if min(shapes[blob][2:]) >= LEAST_SIDE]
        self.pictures = large or pictures
        if input_size:
            shapes.update(dict.fromkeys(self.pictures, (1, 3, *input_size)))
        elif not large:
            height, width = shapes[pictures[0]][2:]
            if kinds and not height:
                problem = f"this is for training, and {kinds} does not state the picture size"
                raise refuse(problem, "use the deploy.prototxt, or --input_size")
            found = f"is only {height}x{width}" if height else "has no size"
            raise refuse(f"its input {found}", "choose a size, such as --input_size 224")
        if kinds:
            height, width = shapes[self.pictures[0]][2:]
            becomes = f"{kinds} is replaced by an input of {height}x{width}"
            self.notices.append(f"{self.path} is a training prototxt; {becomes}")

    def _sort_out(self, labels):
        """Finds what can be amplified: blobs that depend on a single input, one for pictures."""
        known, problems = set(import_caffe().layer_type_list()), self.problems
        sources = {}  # {blob: the inputs that it depends on}
        for layer in list(self.net.layer):
            lost = next((blob for blob in layer.bottom if blob not in sources), None)
            if layer.type not in known:
                problem = f"{layer.name} is a {layer.type} layer, which this Caffe lacks"
            elif layer.type in NO_GRADIENT:
                problem = f"{layer.name}: Caffe cannot compute a gradient for {layer.type} layers"
            elif lost in labels:
                problem = f"{layer.name} needs {lost}, which exists only in training"
            elif lost is not None:
                problem = problems.get(lost, f"{layer.name} needs {lost}, which no layer makes")
            else:
                inputs = set().union(*(sources[blob] for blob in layer.bottom))
                inputs.update([layer.name] if layer.type == "Input" else [])
                sources.update(dict.fromkeys(layer.top, inputs))
                self._add_targets(layer, inputs)
                continue
            problems |= dict.fromkeys([layer.name, *layer.top], problem)
            for top in layer.top:
                sources.pop(top, None)
                self.starts.pop(top, None)
            self.net.layer.remove(layer)

    def _add_targets(self, layer, inputs):
        """Adds the blobs that a layer writes to `starts`, or to `problems` if they cannot be
        amplified. `inputs` are the inputs that they depend on."""
        problem = None
        if len(inputs) > 1:
            names = " and ".join(blob for blob in self.inputs if blob in inputs)
            earlier = filter(None, map(self.problems.get, layer.bottom))
            problem = f"{layer.name} depends on {len(inputs)} inputs, {names}, not on one picture"
            problem = next((text for text in earlier if text in self._of_inputs), problem)
            self._of_inputs.add(problem)
        elif not inputs:
            problem = f"{layer.name} does not depend on the picture"
        elif inputs.isdisjoint(self.pictures):
            shape = "x".join(map(str, self.inputs[min(inputs)][1:]))
            problem = (
                f"{layer.name} depends on {min(inputs)} alone, which takes no pictures ({shape})"
            )
        if layer.bottom and problem:
            self.problems |= dict.fromkeys([layer.name, *layer.top], problem)
        elif layer.bottom and layer.top:
            made = [top for top in layer.top if top not in layer.bottom]
            made = made[:1] if layer.type == "Pooling" else made  # the second is only positions
            for top in [*made, *([layer.name] if layer.name in layer.top else [])]:
                self.starts[top] = layer.name
            self.aliases |= {layer.name: made[0]} if len(made) == 1 else {}
            self.holders |= {} if made else {layer.name: layer.top[0]}

    def find(self, name):
        """The blob to amplify for `name`, which names a blob or a layer. Raises BadRequest."""
        blob = name if name in self.starts else self.aliases.get(name)
        if blob in self.starts:
            return blob
        if not self.starts:
            why = next((f" ({problem})" for problem in self.problems.values()), "")
            problem = f"this has no layer to amplify{why}"
            raise refusal("deploy_txt", self.path, problem, "use another deploy.prototxt")
        if self.holders.get(name) in self.starts:
            problem = f"it works in place on {self.holders[name]}"
            raise refusal("layer", name, problem, f"use --layer {self.holders[name]}")
        if name in self.inputs or name in self.problems:
            problem = self.problems.get(name, "this is the input, not a layer")
            raise refusal("layer", name, problem, ANOTHER_LAYER)
        close = self._close_names(name)
        hint = f"did you mean {' or '.join(close)}?" if close else "see --list_layers"
        raise refusal("layer", name, f"{self.path} has no such layer", hint)

    def _close_names(self, name):
        """At most three blobs that `name` may have been meant for. Capitals and punctuation are
        ignored, a layer that works in place stands for its blob, and part of a name is enough."""

        def plain(text):
            return re.sub("[^a-z0-9]", "", text.lower())

        names = self.holders | self.aliases | {blob: blob for blob in self.starts}
        by_key, key = {}, plain(name)
        for other, blob in names.items():
            by_key.setdefault(plain(other), []).append(blob)
        parts = [other for other in reversed(by_key) if key and key in other]  # outputs come last
        close = difflib.get_close_matches(key, by_key, n=3, cutoff=0.5)
        keys = [key] if key in by_key else parts or close
        blobs = dict.fromkeys(blob for key in keys for blob in by_key[key])
        return [blob for blob in blobs if blob in self.starts][:3]


# Only the names and shapes of weights are read here, directly from protobuf's wire format. Python's
# protobuf would read all the numbers, which takes seconds, and 20 times longer in pure Python.


def varint(data, start):
    """Returns (the integer that starts at data[start], the position after it)."""
    value = 0
    for place in range(10):
        byte = data[start + place]
        value |= (byte & 127) << 7 * place
        if byte < 128:
            return value, start + place + 1
    raise ValueError("it is damaged or in another format")


def wire_fields(data):
    """Yields (number, value) for each field of a message in wire format, a memoryview. Values are
    integers, or memoryviews if they have a length or a fixed size. Raises ValueError."""
    place = 0
    try:
        while place < len(data):
            tag, place = varint(data, place)
            number, kind = divmod(tag, 8)
            if kind == 0:
                value, place = varint(data, place)
                yield number, value
                continue
            length, place = varint(data, place) if kind == 2 else ({1: 8, 5: 4}[kind], place)
            if place + length > len(data):
                raise IndexError
            yield number, data[place : place + length]
            place += length
    except IndexError:
        raise ValueError("it ends too early") from None
    except KeyError:
        raise ValueError("it is damaged or in another format") from None


def wire_shape(blob):
    """The shape of a BlobProto in wire format. In the older format it always has four axes, padded
    with leading ones. A blob that says nothing about its shape has no axes: it is one number."""
    older = {}
    for number, value in wire_fields(blob):
        if number == 7:
            return tuple(wire_integers(value))
        if number in (1, 2, 3, 4):
            older[number] = value
    return tuple(older.get(number, 0) for number in (1, 2, 3, 4)) if older else ()


def wire_integers(shape):
    """The dimensions in a BlobShape in wire format, packed or one by one."""
    for number, value in wire_fields(shape):
        if number != 1:
            continue
        place = 0
        while isinstance(value, memoryview) and place < len(value):
            side, place = varint(value, place)
            yield side
        if not isinstance(value, memoryview):
            yield value


LAYERS = {100: (1, 7), 2: (4, 6)}  # field numbers: {layers: (their name, their blobs)}
V0_LAYER = (1, 50)


def wire_layer(layer, name_number, blobs_number):
    """(name, shapes of its blobs) of a layer in wire format."""
    name, shapes = "", []
    for number, value in wire_fields(layer):
        if (name_number, number) == (4, 1):  # a V0 layer inside a V1 layer
            return wire_layer(value, *V0_LAYER)
        if number == name_number:
            name = bytes(value).decode(errors="replace")
        if number == blobs_number:
            shapes.append(wire_shape(value))
    return name, shapes


def read_weights(path):
    """The layers of the caffemodel `path` as {name: shapes of its blobs}. Raises BadRequest."""
    try:
        with open(path, "rb") as file:
            start = file.read(100).lstrip().lower()
            problem = next((NOT_WEIGHTS[key] for key in NOT_WEIGHTS if start.startswith(key)), None)
            if problem:
                raise refusal("caffe_model", path, problem)
            if re.match(rb"pk\x03\x04|\x80[\x02-\x05]", start):  # archives and pickles
                raise foreign_weights(path)
            if not start:
                return {}
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            fields = wire_fields(data)
            layers = dict(wire_layer(value, *LAYERS[n]) for n, value in fields if n in LAYERS)
            if not layers and extension_of(path) in FOREIGN:
                raise foreign_weights(path)
            return layers
    except OSError as error:
        problem = error.strerror
        raise refusal(
            "caffe_model", path, problem, "make it readable, or use another file"
        ) from None
    except (ValueError, TypeError) as error:  # the file may contain anything
        reason = one_line(error) if isinstance(error, ValueError) else "it is in another format"
        problem = f"cannot be read as Caffe weights ({reason})"
        if extension_of(path) in FOREIGN:
            raise foreign_weights(path) from None
        remedy = "use a complete .caffemodel; was the download cut short?"
        raise refusal("caffe_model", path, problem, remedy) from None


def foreign_weights(path):
    """The refusal of another program's weights."""
    program = FOREIGN.get(extension_of(path), "another program")
    problem = f"these are {program}'s weights, not Caffe's"
    return refusal("caffe_model", path, problem, "use a .caffemodel")


WEB_PAGE = "this is a web page, not weights; download the file itself"
FOREIGN = {  # other programs, by the endings of their files
    ".h5": "Keras",
    ".keras": "Keras",
    ".onnx": "ONNX",
    ".pb": "TensorFlow",
    ".pt": "PyTorch",
    ".pth": "PyTorch",
    ".safetensors": "PyTorch",
    ".t7": "Torch",
    ".tflite": "TensorFlow",
}
NOT_WEIGHTS = {  # how a file starts, in lower case: what it is, and the remedy
    b"version https://git-lfs": "this is a Git LFS pointer, not the weights; run: git lfs pull",
    b"\x89hdf": "these are HDF5 weights; save them as .caffemodel with a Caffe that has HDF5",
    **dict.fromkeys(HTML, WEB_PAGE),
}


def read_binaryproto(path):
    """The numbers in the BlobProto `path`, float32 (N,). Raises ValueError."""
    found = {5: [], 8: []}  # single and double precision
    for number, value in wire_fields(memoryview(read_bytes(path))):
        if number in found and isinstance(value, memoryview):
            found[number].append(value)
    single, double = (b"".join(parts) for parts in found.values())
    return np.frombuffer(single, "<f4") if single else np.frombuffer(double, "<f8").astype("f4")


def without_leading_ones(shape):
    """The shape without the leading ones of the older format, so that shapes from both formats can
    be compared."""
    return tuple(itertools.dropwhile(lambda side: side == 1, shape))


def fit_classifier(net, weights):
    """Sets the width of the classifier in the NetParameter `net`, in place, to that of `weights`
    (from read_weights), so that one GoogLeNet prototxt serves all data sets."""
    for layer in net.layer:
        shapes = weights.get(layer.name)
        if layer.type == "InnerProduct" and shapes and len(shapes[0]) > 1:
            layer.inner_product_param.num_output = shapes[0][-2]


def misfits(net, weights):
    """{layer: (shapes of its blobs in `weights`, shapes that it needs)} for the layers of the
    caffe.Net for which they differ. `weights` comes from read_weights."""
    found = {}
    for name, blobs in net.params.items():
        given, taken = weights.get(name, []), [tuple(blob.shape) for blob in blobs]
        if list(map(without_leading_ones, given)) != list(map(without_leading_ones, taken)):
            found[name] = given, taken
    return found


def structure_error(deploy, path):
    """What is wrong with the weights `path` for the network `deploy`, in one line, or None. Every
    layer must have all its blobs, in the right shapes, and Caffe must be able to load the file."""
    try:
        weights = read_weights(path)
    except BadRequest:
        return "it cannot be read as Caffe weights"
    net = Description(deploy).net
    fit_classifier(net, weights)
    loaded = caffe_net(net)
    for name, (given, taken) in misfits(loaded, weights).items():
        return f"layer {name} has weights of shape {given or None}, not {taken}"
    loaded.copy_from(path)
    return None


def check_targets(files, input_size, targets):
    """Task: raises BadRequest if the network lacks a layer or a channel of the Targets."""
    description = Description(files.deploy, input_size)
    blobs = [description.find(target.layer) for target in targets]
    shapes = {blob: shape for blob, shape, _ in layer_shapes(files, input_size)[0]}
    for target, blob in zip(targets, blobs):
        for word in target.channels or ():
            if blob in shapes and not strong(word):
                class_of(target.layer, word, shapes[blob])
        if blob in shapes:
            target.check(shapes[blob][0])


def layer_shapes(files, input_size=None, without=(), first=None):
    """Task: returns three lists: (blob, shape of one tile's activations, layer that makes it) for
    everything that can be amplified; notices of what cannot; the names of all layers except those
    in `without` and the layers that need them. Loads only the `first` layers of these, or all."""
    description = Description(files.deploy, input_size)
    net, starts = description.net, description.starts
    weights = read_weights(files.weights) if files.weights else {}
    if files.fit_classifier:
        fit_classifier(net, weights)
    lost = followers(net, without)
    kept = [layer for layer in net.layer if layer.name not in without]
    kept = [layer for layer in kept if lost.isdisjoint(layer.bottom)]
    del net.layer[:]
    net.layer.extend(kept[:first])
    problems = dict.fromkeys(description.problems.values())
    notices = [*description.notices, *(f"{LEFT_OUT}: {problem}" for problem in problems)]
    loaded = caffe_net(net)
    if input_size:
        wrong = [name for name, (given, _) in misfits(loaded, weights).items() if given]
        lost |= followers(net, wrong)
        notices += [f"{LEFT_OUT}: {name} works only at the prototxt's size" for name in wrong]
    there = [blob for blob in starts if blob in loaded.blobs and blob not in lost]
    shapes = {blob: tuple(loaded.blobs[blob].shape)[1:] for blob in there}
    listed = [(blob, shape, starts[blob]) for blob, shape in shapes.items() if shape]
    return listed, notices, [layer.name for layer in kept]


LEFT_OUT = "left out, with all layers that need it"


def followers(net, names):
    """The blobs that are written by the layers `names` of the NetParameter `net`, or by layers that
    depend on them."""
    found = set()
    for layer in net.layer:
        if layer.name in names or not found.isdisjoint(layer.bottom):
            found.update(layer.top)
    return found


def check_fit(spec, net, weights):
    """Raises BadRequest if `weights` (from read_weights) does not have all parameters of the
    caffe.Net, in the right shapes: layers without them would use random or empty ones."""
    path, deploy, wrong = spec.files.weights, spec.files.deploy, misfits(net, weights)
    missing = [name for name in wrong if not weights.get(name)]
    if missing:
        problem = f"this has no weights for {some(missing)} in {deploy}"
        raise refusal("caffe_model", path, problem, "use a complete file")
    for name, shapes in wrong.items():
        given, taken = (
            " and ".join("x".join(map(str, s)) or "one number" for s in shape) for shape in shapes
        )
        if spec.input_size and net.layer_dict[name].type == "InnerProduct":
            problem = f"{name} works only at the prototxt's size"
            raise input_size_refusal(spec.input_size, problem, "choose an earlier layer")
        problem = f"{name} has weights of shape {given}, but {deploy} needs {taken}"
        raise refusal("caffe_model", path, problem, "use files that belong together")


def some(names):
    """The names as text: at most five, and how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if names[5:] else "")


def input_size_refusal(size, *why):
    """The refusal of an input size (height, width)."""
    return refusal("input_size", "{}x{}".format(*size), *why)


def check_values(spec, net):
    """Raises BadRequest if the caffe.Net has weights that are not finite; returns notices about
    weights that look wrong."""
    types = {name: layer.type for name, layer in zip(net._layer_names, net.layers)}
    empty = []
    for name, blobs in net.params.items():
        if not all(np.isfinite(blob.data).all() for blob in blobs):
            problem = f"the weights of {name} are not all finite"
            raise refusal("caffe_model", spec.files.weights, problem, "use an intact file")
        if types[name] == "BatchNorm" and not blobs[2].data.any():
            empty.append(name)
    what = "BatchNorm without statistics, which only magnifies its input"
    return [f"{some(empty)}: {what}"] if empty else []


def cut(net, targets, blob_counts):
    """Cuts the NetParameter `net`, in place, down to the layers needed for the gradient of the
    blobs `targets` with respect to the input. Returns the targets that its layers read, not
    counting those that work in place.

    It keeps the layers that the targets depend on, and those that work in place on the targets.
    Caffe's force_backward would also compute the gradient of every weight. Instead, only the first
    layer's bias is left to learn. Caffe then runs backward from a loss (set on the last layer that
    writes each target that no other layer reads) to the first layer, and propagate_down extends
    this to the input. If that is impossible (the first layer has no bias or has shared weights, or
    there are several first layers), force_backward does the same more slowly. `blob_counts` is
    {layer name: number of its weight blobs}.
    """
    kept, needed = [], set(targets)
    for layer in reversed(net.layer):
        if not needed.isdisjoint(layer.top):
            kept.insert(0, layer)
            needed.update(layer.bottom)
    inputs = set().union(*(layer.top for layer in kept if layer.type == "Input"))
    first = [layer for layer in kept if not inputs.isdisjoint(layer.bottom)]
    has_bias = len(first) == 1 and blob_counts.get(first[0].name, 0) == 2
    has_bias = has_bias and first[0].type in ("Convolution", "InnerProduct")
    has_bias = has_bias and not any(param.name for param in first[0].param)  # perhaps shared
    net.force_backward = not has_bias
    if has_bias:
        for layer in kept:
            while len(layer.param) < blob_counts.get(layer.name, 0):
                layer.param.add()
            for param in layer.param:
                param.lr_mult = 0
        first[0].param[1].lr_mult = 1
        first[0].propagate_down[:] = [True]
    read = {blob for layer in kept for blob in layer.bottom if blob not in layer.top}
    ends = set(targets) - read
    for layer in reversed(kept if has_bias else ()):
        if not ends.isdisjoint(layer.top):
            layer.loss_weight[:] = [1.0 if top in ends else 0.0 for top in layer.top]
            ends.difference_update(layer.top)
    names = {layer.name for layer in kept}
    for layer in [layer for layer in net.layer if layer.name not in names]:
        net.layer.remove(layer)
    return read.intersection(targets)


# Layers of this program's build of Caffe that are faster than Caffe's own and give the same results
# except for rounding: on the CPU, on a GPU with cuDNN, and there with less precise products.
CPU_LAYERS = {"Convolution": "WinogradConvolution", "LRN": "FastLRN", "Pooling": "MaxPooling"}
GPU_LAYERS = {"Convolution": "CudnnConvolution"}
TF32_LAYERS = {"Convolution": "CudnnTF32Convolution"}


def use_fast_layers(net, fast):
    """Replaces layer types in the NetParameter `net` as in `fast`, {Caffe's type: ours}, if this
    Caffe has ours."""
    known = set(import_caffe().layer_type_list())
    for layer in net.layer:
        if fast.get(layer.type) in known:
            layer.type = fast[layer.type]


def end_in_objective(net, blob, kind, parameters):
    """Appends the layer of type `kind` that computes an objective to the NetParameter `net`, cut at
    `blob`, if this Caffe has such layers; returns whether it has. The forward pass then writes the
    gradient of the loss where backward starts, so that on a GPU the activations need not leave it.
    """
    if kind not in import_caffe().layer_type_list():
        return False
    net.layer[-1].ClearField("loss_weight")  # the objective starts backward instead
    layer = net.layer.add(name="cnn_vis/objective", type=kind, bottom=[blob], loss_weight=[1])
    layer.top[:] = [layer.name]
    layer.python_param.param_str = parameters
    return True


@dataclasses.dataclass(frozen=True)
class NetworkSpec:
    """All that a worker needs to load the network: its files; the names of the layers whose
    activations are wanted; whether it runs on a GPU; the (height, width) of its input, if that is
    not the prototxt's; whether a GPU may multiply in TF32; the (type, parameters) of a layer that
    computes the objective, or None."""

    files: NetworkFiles
    layers: tuple
    use_gpu: bool = False
    input_size: tuple | None = None
    tf32: bool = False
    objective: tuple | None = None

    def fast_layers(self):
        """The layers to use instead of Caffe's own, for use_fast_layers."""
        if not self.use_gpu:
            return CPU_LAYERS
        return TF32_LAYERS if self.tf32 else GPU_LAYERS


def start_caffe(spec):
    """Imports Caffe and chooses its device. Raises BadRequest."""
    os.environ.update(ONE_THREAD)  # in case the process was started without it
    caffe = import_caffe()
    if not spec.use_gpu:
        caffe.set_mode_cpu()
        return
    if spec.tf32 and TF32_LAYERS["Convolution"] not in caffe.layer_type_list():
        remedy = f"drop the option, or rebuild Caffe: {how_to_install('pycaffe[cuda]')}"
        raise refusal("tf32", "", "Caffe was built without cuDNN", remedy)
    caffe.set_mode_gpu()
    caffe.set_device(0)  # the only one that this worker sees


# Where a Network's backward pass takes up the gradient of a layer: the name of the layer's blob,
# the caffe.Blob, the number of the Caffe layer that makes it, and whether other layers read it.
End = collections.namedtuple("End", "name blob start is_read")


class Network:
    """A Caffe net from its input to some layers. Raises BadRequest if `spec` cannot be loaded.

    Attributes: tile_size, (height, width) of the input; shapes, {layer: (C, ...) of one tile's
    activations}; has_objective, whether the net itself computes the objective's gradient; notices,
    a list of lines for the user.
    """

    def __init__(self, spec):
        start_caffe(spec)
        weights = read_weights(spec.files.weights)
        description = Description(spec.files.deploy, spec.input_size)
        net, blobs = description.net, [description.find(layer) for layer in spec.layers]
        if spec.files.fit_classifier:
            fit_classifier(net, weights)
        read = cut(net, blobs, {name: len(shapes) for name, shapes in weights.items()})
        use_fast_layers(net, spec.fast_layers())
        is_one = spec.objective is not None
        self.has_objective = is_one and end_in_objective(net, blobs[0], *spec.objective)
        self.spec, self._net = spec, caffe_net(net)
        check_fit(spec, self._net, weights)
        self._net.copy_from(spec.files.weights)
        self.notices = description.notices + check_values(spec, self._net)
        (name,) = self._net.inputs
        self._input = self._net.blobs[name]
        self.tile_size, self._ends = tuple(self._input.shape)[2:], {}
        # An in-place ReLU after the layer that makes a blob has changed the activations, but the
        # gradient of the blob itself does not pass back through it; those from later layers do.
        order = list(self._net._layer_names)
        for layer, blob in zip(spec.layers, blobs):
            start = order.index(description.starts[blob])
            self._ends[layer] = End(blob, self._net.blobs[blob], start, blob in read)
        self.shapes = {layer: tuple(end.blob.shape)[1:] for layer, end in self._ends.items()}
        for layer in [layer for layer, shape in self.shapes.items() if not shape]:
            problem = "this layer's output is a single number, without channels"
            raise refusal("layer", layer, problem, ANOTHER_LAYER)

    def forward(self, batch):
        """Computes the activations for the tiles `batch`, float32 (N, 3, H, W)."""
        if tuple(self._input.shape) != batch.shape:
            self._input.reshape(*batch.shape)
            self._net.reshape()
        scale = self.spec.files.scale
        self._input.data[...] = batch if scale == 1 else batch * np.float32(scale)
        self._net.forward()

    def activations(self):
        """The activations of each layer, {layer: float32 (N, C, ...)}, valid until `forward`."""
        return {layer: read_only(end.blob, "data") for layer, end in self._ends.items()}

    def backward(self, gradients=()):
        """The gradient with respect to the tiles, float32 (N, 3, H, W), valid until the next call,
        after `forward`. `gradients` are [(layer, the gradient of its activations), ...], none if
        the net has the objective."""
        filled = set()
        starts = sorted({end.start for end in self._ends.values()}, reverse=True)
        for start, following in itertools.pairwise([*starts, -1]):
            for layer, gradient in gradients:
                end = self._ends[layer]
                if end.start == start:
                    diff = end.blob.diff
                    if end.is_read or end.name in filled:
                        diff += gradient
                    else:
                        diff[...] = gradient
                    filled.add(end.name)
            self._net._backward(start, following + 1)
        gradient, scale = read_only(self._input, "diff"), self.spec.files.scale
        return gradient if scale == 1 else gradient * np.float32(scale)

    def mean(self):
        """The number that is subtracted from pixels."""
        return self.spec.files.mean

    def guide(self):
        """The guide of the run, uint8 (H, W, 3), or None."""
        path = self.spec.files.guide
        return np.load(path, allow_pickle=False) if path else None

    def batch_for_memory(self, share):
        """How many tiles, at most 32, fit at the same time in this process's part of the GPU's free
        memory, which is shared by `share` processes that have all run one tile already."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        driver = ctypes.CDLL("libcuda.so.1")
        driver.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total))
        tile = sum(2 * 4 * math.prod(blob.shape) for blob in self._net.blobs.values())
        return min(32, max(1, int(0.7 * free.value / share) // tile))

    def layers(self):
        """The names of its layers, in order."""
        return list(self._net._layer_names)

    def run_layer(self, number, backward):
        """Runs one layer, forward or backward."""
        (self._net._backward if backward else self._net._forward)(number, number)


def numbered(spec, objective, settings, inputs, scratch=None):
    """Task: the Objective with all words for channels replaced by numbers: "strongN" by the N
    channels with the largest mean absolute activation in the start image at the first size, and
    class names by their numbers. The other arguments are those of start_image. Raises
    BadRequest."""
    network, targets = Network(spec), []
    is_strong = any(strong(word) for target in objective.targets for word in target.channels or ())
    activity = mean_activity(network, settings, inputs, scratch) if is_strong else {}
    for target in objective.targets:
        found = {}
        for word in target.channels or ():
            if number := strong(word):
                order = np.argsort(-activity[target.layer], kind="stable")
                found |= dict.fromkeys(sorted(map(int, order[:number])))
            else:
                found[class_of(target.layer, word, network.shapes[target.layer])] = None
        channels = tuple(found) if target.channels else None
        targets.append(dataclasses.replace(target, channels=channels))
    return Objective(tuple(targets))


def quoted(layer):
    """The name of a layer as --layer takes it."""
    return f'"{layer}"' if re.search(r"[+*:\s]", layer) else layer


def strong(word):
    """The N of "strongN", or None for any other channel of a Target."""
    found = re.fullmatch(r"strong(\d{1,6})", str(word))
    return found and int(found[1])


def class_of(layer, word, shape):
    """The channel of the layer that `word`, a number or a class name, names. Raises BadRequest."""
    if type(word) is int:
        return word
    names = class_names(shape[0]) if is_flat(shape) else None
    if names is None:
        problem = f"channels are {CHANNELS}"
        remedy = "class names work only with ImageNet and Places classifiers"
        raise refusal("layer", f"{layer}:{word}", problem, remedy)
    try:
        return class_number(word, names)
    except ValueError as error:
        raise refusal("layer", f"{layer}:{word}", str(error)) from None


def is_flat(shape):
    """Whether activations (C, ...) have one number per channel, as a classifier's do."""
    return math.prod(shape) == shape[0]


def mean_activity(network, settings, inputs, scratch=None):
    """The mean absolute activation of each layer's channels, {layer: array (C,)}, over the tiles of
    the start image at the first size."""
    base = network.tile_size if inputs.picture is None else inputs.picture.shape[:2]
    size = plan_sizes(settings, base, network.tile_size)[0][0]
    image = start_image(settings, inputs.picture, size, network.mean(), scratch)
    activity = {layer: np.zeros(shape[0]) for layer, shape in network.shapes.items()}
    for region in itertools.chain(*dreaming_tiles(size, network.tile_size, inputs.mask)):
        network.forward(cut_tile(image, region)[np.newaxis].astype(np.float32))
        for layer, a in network.activations().items():
            activity[layer] += np.abs(a[0].reshape(a.shape[1], -1)).mean(axis=1, dtype=np.float64)
    return activity


def read_only(blob, kind):
    """The "data" or "diff" of a caffe.Blob for reading only, so that a Caffe with our patches need
    not copy it to the GPU again."""
    array = getattr(blob, f"cpu_{kind}", None)
    return getattr(blob, kind) if array is None else array


# ---- Engines ----------------------------------------------------------------------------------


class Engine:
    """Computes the gradients of tiles for the dream's loop; a context manager.

    `spec` is its NetworkSpec and `objective` what it computes the gradients of; `device` describes
    where it runs; `notices` is a list of lines for the user. After `describe` it also has
    tile_size, the (height, width) of a tile; shapes, {layer: (C, ...) of a tile's activations};
    batch_size, the most tiles that `send` accepts; number, how many devices compute batches: each
    should get a share of every turn.

    An objective has layers(), check(shapes), prepared(network), gradients(activations) and
    loss(activations), as the script's Objective; it can be pickled and compared.

    A tile's gradient must not depend on where it is computed or with which other tiles. A failure
    that the engine cannot recover from raises RunFailed, or BadRequest if an option caused it.
    """

    def describe(self):
        """Loads the network and tries it once. Must be called first."""
        raise NotImplementedError

    def has_room(self):
        """Whether `send` can be called."""
        raise NotImplementedError

    def send(self, tiles_in, measure=True):
        """Starts computing the gradients of up to batch_size tiles, arrays (3, H, W), and with
        `measure` also their losses; returns a ticket."""
        raise NotImplementedError

    def is_done(self, ticket):
        """Waits for the tiles of a ticket, one second at most; returns whether they are done, so
        that `receive` will not wait."""
        raise NotImplementedError

    def receive(self, ticket):
        """Waits for the tiles of a ticket; returns [(gradient of the objective's loss, float32
        (3, H, W); the loss, None unless measured), ...]."""
        raise NotImplementedError

    def begin_run(self):
        """Prepares for another run with the same network: forgets the last run's notices."""
        self.notices = []

    def change(self, spec, objective):
        """Switches to another network and objective on the same device and describes them. Returns
        whether this kind of engine can do that."""
        return False

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        """Ends the engine and leaves nothing behind; immediately if `kind` is Stopped."""


# Tasks of the worker processes. Tiles and gradients travel through one block of shared memory,
# divided into slots. Neither it nor the pipe for Caffe's messages has a name, so nothing is left
# behind, however a process ends.


kept_network = {}  # in a worker: {NetworkSpec: Network}, at most one


def load_network(spec):
    """The worker's network: loaded for its first task, then kept as long as `spec` is the same."""
    if spec not in kept_network:
        kept_network.clear()  # two may not fit in memory
        kept_network[spec] = Network(spec)
    return kept_network[spec]


def map_memory(descriptor, shape):
    """The shared memory that is open as `descriptor`, here and in the worker processes, as a
    float32 array of `shape` (slots, 2, batch, 3, H, W): each slot holds tiles and their gradients.
    """
    memory = mmap.mmap(descriptor, 4 * math.prod(shape))
    return np.frombuffer(memory, np.float32).reshape(shape)


attach = functools.cache(map_memory)  # a worker has only one shared memory


@functools.lru_cache(1)
def prepared(objective, spec):
    """The objective with what it has to know of the worker's network."""
    return objective.prepared(load_network(spec))


def compute_batch(network, objective, batch, measure=True):
    """(gradient, losses) for the tiles `batch`, float32 (N, 3, H, W): the gradient of the
    objective's loss with respect to the tiles, valid until the next call, and a list of the loss of
    each tile, or of None unless `measure`. The objective is prepared for the Network."""
    network.forward(batch)
    own = () if network.has_objective else objective.gradients(network.activations())
    gradient, losses = network.backward(own), [None] * len(batch)
    if measure:
        layers = network.activations().items()
        parts = ({layer: a[i : i + 1] for layer, a in layers} for i in range(len(batch)))
        losses = [objective.loss(part) for part in parts]
    return gradient, losses


def describe(spec, objective):
    """Task: (tile_size, shapes, notices) of the network, after a trial with one tile: it allocates
    the memory it needs, and if it is going to fail, it fails now. Raises BadRequest if the
    objective does not fit the network."""
    network = load_network(spec)
    objective.check(network.shapes)
    try_batch(spec, objective, 1)
    return network.tile_size, network.shapes, network.notices


def try_batch(spec, objective, count):
    """Task: tries the network with `count` tiles."""
    network = load_network(spec)
    batch = np.zeros((count, 3, *network.tile_size), np.float32)
    compute_batch(network, prepared(objective, spec), batch)


def with_network(spec, method, *arguments):
    """Task: calls a method of the worker's Network."""
    return getattr(load_network(spec), method)(*arguments)


def check_batch(batch_size, slots, tile_size):
    """Raises BadRequest if the slots, each for a batch of tiles, do not fit in memory."""
    needed = 4 * slots * 2 * batch_size * 3 * math.prod(tile_size)
    if needed > free_memory():
        problem = f"needs {needed / 1e9:.1f} GB of memory for tiles and gradients"
        raise refusal("batch_size", batch_size, problem, "use a smaller one")


def compute_slot(spec, objective, memory, slot, count, measure):
    """Task: computes the gradients of the slot's first `count` tiles; returns their losses, None
    unless `measure`."""
    tiles_in, gradients_out = attach(*memory)[slot, :, :count]
    work = load_network(spec), prepared(objective, spec)
    gradients_out[...], losses = compute_batch(*work, tiles_in, measure)
    return losses


def can_use_gpu():
    """Task: whether this Caffe was built with CUDA, judged by the symbols in its library. (Asking
    Caffe for a GPU would end the process if there is none.)"""
    import_caffe()
    import caffe._caffe

    library = ctypes.CDLL(caffe._caffe.__file__)
    return hasattr(library, "_ZN5caffe20cublasGetErrorStringE14cublasStatus_t")


def count_gpus():
    """The number of GPUs that the NVIDIA driver offers this process; 0 without a driver."""
    count = ctypes.c_int(0)
    with contextlib.suppress(OSError):
        driver = ctypes.CDLL("libcuda.so.1")
        if driver.cuInit(0) == 0:
            driver.cuDeviceGetCount(ctypes.byref(count))
    return count.value


def visible_gpu(number):
    """What to set CUDA_VISIBLE_DEVICES to for the number-th GPU that this process sees."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[number].strip() if visible else str(number)


CGROUPS = "/sys/fs/cgroup"


def cgroup_folders(controller):
    """Yields the folders with this process's limits by a controller, "cpu" or "memory": those of
    its cgroup and its parents, of version 1 and version 2."""
    with contextlib.suppress(OSError):
        places = {"": "/", controller: "/"}
        for line in read_text("/proc/self/cgroup").splitlines():
            _, together, path = line.split(":", 2)  # version 2's line names no controllers
            if {"", controller}.intersection(together.split(",")):
                places |= {together: path, together and controller: path}
        for name, path in places.items():
            parts = path.strip("/").split("/")
            for depth in range(len(parts), -1, -1):
                yield os.path.join(CGROUPS, name, *parts[:depth])


def count_cores():
    """The number of cores that this process may use, given its affinity and cgroup quotas."""
    cores = len(os.sched_getaffinity(0))
    for folder in cgroup_folders("cpu"):
        for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
            with contextlib.suppress(OSError, ValueError):
                texts = (read_text(f"{folder}/{name}") for name in names)
                quota, period = map(int, " ".join(texts).split())  # "max" is not a number
                cores = min(cores, max(1, quota // period)) if quota > 0 else cores
    return cores


def free_memory():
    """Free memory in bytes, also respecting cgroup limits; infinite if unknown."""
    free = [math.inf]
    with contextlib.suppress(OSError):
        available = re.findall(r"MemAvailable: *(\d+) kB", read_text("/proc/meminfo"))
        free += [1024 * int(kilobytes) for kilobytes in available]
    for folder in cgroup_folders("memory"):
        for names in (("max", "current"), ("limit_in_bytes", "usage_in_bytes")):
            with contextlib.suppress(OSError, ValueError):
                limit, used = (int(read_text(f"{folder}/memory.{name}")) for name in names)
                # Cached files count as used, but that memory is freed on demand.
                stat = read_text(f"{folder}/memory.stat")
                cached = dict(line.split() for line in stat.splitlines())
                name = "inactive_file" if names[0] == "max" else "total_inactive_file"
                free.append(limit - used + int(cached.get(name, 0)))
    return max(0, min(free))


def read_text(path):
    """The text of a small file."""
    with open(path) as file:
        return file.read()


def read_bytes(path):
    """The content of a file."""
    with open(path, "rb") as file:
        return file.read()


# Workers' BLAS has one thread: processes scale much better than threads, and sums then do not
# depend on the number of workers.
ONE_THREAD = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")


@contextlib.contextmanager
def signals_held_back():
    """While processes are started: holds signals back, so that they cannot interrupt the start
    halfway, and blocks Ctrl-C and hangup in the child processes, which inherit the block."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    if threading.current_thread() is not threading.main_thread():
        numbers = ()
    came = []
    before = {n: signal.signal(n, lambda signum, _: came.append(signum)) for n in numbers}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in came:
            signal.raise_signal(number)


# What a worker does first. It sees exactly the folders that the main process imports from: neither
# its main script nor, as "python -c" otherwise would, files of the current folder that are named
# like modules.
BOOTSTRAP = (
    "import sys; sys.path[:] = sys.argv[4:]; from cnn_vis import serve; "
    "serve(*map(int, sys.argv[1:4]))"
)


def serve(descriptor, parent_pid, memory):
    """The life of a worker: runs tasks that come through a socket, until None comes. A bad file
    cannot make it use more than `memory` bytes; 0: as many as it likes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    arguments = (descriptor, parent_pid)
    threading.Thread(target=end_with_parent, args=arguments, daemon=True).start()
    if memory:
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        limit = memory if hard == resource.RLIM_INFINITY else min(memory, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    parent = multiprocessing.connection.Connection(descriptor)
    for task, arguments in iter(parent.recv, None):
        try:
            answer = True, task(*arguments)
        except Exception as error:
            answer = False, error
        parent.send(answer)


def end_with_parent(descriptor, parent_pid):
    """Ends this process when the other end of its socket is closed or its parent is gone. A program
    that uses this one as a library may fork, and then its child holds that end too."""
    poll = select.poll()
    poll.register(descriptor, 0)  # reports only that it is closed
    while not poll.poll(1000) and os.getppid() == parent_pid:
        pass
    os._exit(0)


def python_command():
    """The command that runs this Python, with the options that restrict what it imports. Raises
    RunFailed."""
    flags = {
        "-I": sys.flags.isolated,
        "-E": sys.flags.ignore_environment,
        "-s": sys.flags.no_user_site,
    }
    python = multiprocessing.spawn.get_executable()
    if not python:
        problem = "this Python does not know its own program"
        raise RunFailed(f"workers cannot be started: {problem}; see multiprocessing.set_executable")
    return [os.fsdecode(python), *(flag for flag, is_set in flags.items() if is_set)]


class WorkerDied(Exception):
    """A worker's process has ended, in the middle of a task or before it."""


class Worker:
    """A process that runs tasks, one at a time; it sees one GPU, or none if `gpu` is None. Its
    output goes to the file `log`, it inherits the `shared` files, and `memory` is as for `serve`.
    Raises OSError."""

    def __init__(self, log, gpu, memory, shared=()):
        self._owner, self.has_answered = os.getpid(), False
        self._connection, there = multiprocessing.Pipe()
        # Even on the CPU, a Caffe built with CUDA takes a few hundred MB of the first GPU it sees.
        visible = {"CUDA_VISIBLE_DEVICES": "" if gpu is None else visible_gpu(gpu)}
        numbers = map(str, (there.fileno(), os.getpid(), memory))
        places = (place for place in sys.path if isinstance(place, str) and "\0" not in place)
        words = (*numbers, *places, HERE)
        with there:
            self._process = subprocess.Popen(
                [*python_command(), "-c", BOOTSTRAP, *words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[there.fileno(), *(file.fileno() for file in shared)],
                env=os.environ | ONE_THREAD | visible,
            )

    def run(self, task, *arguments):
        """Returns task(*arguments). Raises what the task raises, and WorkerDied."""
        try:
            self._connection.send((task, arguments))
            while not self._connection.poll(1):
                if self._process.poll() is not None:  # with another process holding its end
                    raise EOFError
            is_done, answer = self._connection.recv()
        except (EOFError, OSError):
            raise WorkerDied from None
        self.has_answered = True
        if isinstance(answer, MemoryError):
            raise OutOfMemory
        if not is_done:
            raise answer
        return answer

    def end(self):
        """Ends the process, which must have no task. Does nothing in a fork of its owner."""
        if self._owner != os.getpid():
            return
        with contextlib.suppress(OSError):  # it may have died
            self._connection.send(None)
        self._connection.close()
        self._process.wait()

    def kill(self):
        """Kills the process; returns the exit status that it has, negative for a signal's. Does
        nothing in a fork of its owner."""
        if self._owner != os.getpid():
            return 0
        self._process.kill()
        return self._process.wait()


class CaffeStopped(RunFailed):
    """Caffe ended its process; the message says why."""


class LayerFailed(CaffeStopped):
    """Caffe ended its process in a layer that it cannot run."""


class GpuFailed(RunFailed):
    """A GPU or its driver failed; the message says what to do about the `problem`."""

    def __init__(self, problem, remedy):
        super().__init__(f"{problem}; {remedy} --gpu -1 for the CPU")
        self.problem = problem


GPU_ERRORS = {  # by CUDA error number: the problem, and what can be done besides using the CPU
    2: ("its memory is full", "use a smaller --batch_size, another --gpu, or"),
    35: ("its driver is older than Caffe's CUDA", "update the driver, or use"),
    46: (
        "another program has it in exclusive use",
        "wait for that to end, or use another --gpu, or",
    ),
    209: ("Caffe was built for other GPUs", "rebuild it with PYCAFFE_CUDA_ARCH=native, or use"),
}


# What programs print when they get no memory: C++, Python, OpenBLAS, Caffe, the system's loader.
NO_MEMORY = (
    "std::bad_alloc|^MemoryError|OpenBLAS error: Memory alloc|host allocation of size|"
    "failed to map segment|[Cc]annot allocate memory"
)


def check_log(text):
    """Raises CaffeStopped, GpuFailed or OutOfMemory if a worker's log shows that Caffe ended it."""
    if re.search(NO_MEMORY, text, re.MULTILINE):
        raise OutOfMemory
    fatal = re.search(r"^F\d{4,8} [^\]]*\] (.*)", text, re.MULTILINE)
    cuda = fatal and re.search(r"cudaSuccess \((\d+) vs\. 0\) (.*)|.*(CU\w+_STATUS_\w+)", fatal[1])
    if cuda:
        number = 2 if cuda[3] and "ALLOC" in cuda[3] else int(cuda[1] or 0)
        other = one_line(cuda[2] or cuda[3]), "if it happens again, use"
        problem, remedy = GPU_ERRORS.get(number, other)
        raise GpuFailed(f"the GPU failed: {problem}", remedy)
    if fatal:
        kind = LayerFailed if "Not Implemented Yet" in fatal[1] else CaffeStopped
        raise kind(f"Caffe stopped: {one_line(fatal[1])[:300]}")


@contextlib.contextmanager
def system_limits():
    """Within this context, what prevents processes or threads from starting becomes a RunFailed."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        if program := getattr(error, "filename", None):
            raise RunFailed(f"workers cannot be started: {program}: {reason}") from None
        limits = "see ulimit -n, for open files, and ulimit -u, for processes"
        raise RunFailed(f"workers cannot be started ({reason}); {limits}") from None


CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL)


class CaffeProcesses:
    """Processes that run tasks with Caffe; a context manager. There is one for each entry of
    `gpus`, in which a GPU may occur twice, or there are `number` on the CPU. They inherit the
    `shared` files. If one dies, all are restarted."""

    MAX_RESTARTS = 3

    def __init__(self, number=1, gpus=(), shared=()):
        self.number, self.gpus, self.shared, self.restarts = len(gpus) or number, gpus, shared, 0
        if not os.path.isdir("/proc/self/fd"):
            raise BadRequest("Caffe's processes need /proc", "run: mount -t proc proc /proc")
        with system_limits():
            reading, writing = os.pipe()
        self._log, self._log_end = os.fdopen(reading, "rb", 0), os.fdopen(writing, "wb", 0)
        for end in (self._log, self._log_end):
            os.set_blocking(end.fileno(), False)  # a full log must not hold a worker up
        # A thread for each process waits for it: that is all it takes to see it die.
        self._threads = concurrent.futures.ThreadPoolExecutor(self.number)
        self.start()

    def start(self):
        """Starts the processes. Raises RunFailed."""
        free, started, idle = free_memory(), [], queue.SimpleQueue()
        memory = 0 if self.gpus or not math.isfinite(free) else max(1, int(free))
        try:
            with system_limits(), signals_held_back():
                for gpu in self.gpus or [None] * self.number:
                    started.append(Worker(self._log_end, gpu, memory, self.shared))
        except BaseException:
            for worker in started:
                worker.kill()
            raise
        for worker in started:
            idle.put(worker)
        self._workers, self._idle = started, idle  # until now, tasks find the dead ones, and fail

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if kind is Stopped:
            self._kill()
        self._threads.shutdown(cancel_futures=True)  # waits for tasks that have started
        for worker in self._workers:
            worker.end()
        self._log.close()
        self._log_end.close()

    def _kill(self):
        """Kills the processes; returns their exit statuses."""
        return [worker.kill() for worker in self._workers]

    def submit(self, task, *arguments):
        """Submits a task; returns its future. That raises WorkerDied if the process that has the
        task dies; then call `restart`, and submit it again."""
        with system_limits(), signals_held_back():
            return self._threads.submit(self._run, task, *arguments)

    def _run(self, task, *arguments):
        idle = self._idle  # start() makes another one
        worker = idle.get()
        try:
            return worker.run(task, *arguments)
        finally:
            idle.put(worker)

    def on_each(self, task, *arguments):
        """The results of a task that every process runs once. No other may be under way. Raises
        what the task raises, and WorkerDied."""
        with system_limits(), signals_held_back():
            futures = [self._threads.submit(w.run, task, *arguments) for w in self._workers]
        concurrent.futures.wait(futures)
        return [future.result() for future in futures]

    def restart(self):
        """Restarts the processes after one has died. Raises what check_log raises if Caffe ended
        it, RunFailed if it could not even start, and RunFailed after too many deaths."""
        statuses, text = self._kill(), self._read_log()
        check_log(text)
        if max(statuses) >= 0 and not any(worker.has_answered for worker in self._workers):
            last = (text.strip() or f"it ended with status {max(statuses)}").splitlines()[-1]
            raise RunFailed(f"{python_command()[0]} cannot run the workers: {one_line(last)[:300]}")
        self.restarts += 1
        crash = next((signal.Signals(-s).name for s in statuses if -s in CRASHES), None)
        if self.restarts > self.MAX_RESTARTS and crash:
            raise LayerFailed(f"Caffe stopped: it crashed {self.restarts} times ({crash})")
        if self.restarts > self.MAX_RESTARTS:
            remedy = "use smaller sizes" if self.gpus else "use fewer --workers, or smaller sizes"
            raise RunFailed(
                f"workers were killed {self.restarts} times, possibly out of memory; {remedy}"
            )
        self.start()

    def _read_log(self):
        """What the processes have printed since the last call."""
        text = b""
        with contextlib.suppress(BlockingIOError):
            while block := os.read(self._log.fileno(), 1 << 16):
                text += block
        return text.decode(errors="replace")

    def call(self, task, *arguments):
        """Returns task(*arguments), run in one of the processes. Raises what the task and
        `restart` raise."""
        return self.restarting(lambda: self.submit(task, *arguments).result())

    def restarting(self, function):
        """Returns function(), which is called again after a `restart` if it raises WorkerDied."""
        while True:
            try:
                return function()
            except WorkerDied:
                self.restart()


def in_a_worker(task, *arguments):
    """Runs a task that needs Caffe, in a separate process."""
    with CaffeProcesses() as processes:
        return processes.call(task, *arguments)


class Workers(Engine):
    """The engine on this machine: processes on the GPUs in `gpus`, or `number` on the CPU. A worker
    that is killed from outside is replaced, and its tiles are computed again. With `or_cpu`, the
    CPU is used if the GPUs fail in `describe`."""

    EACH = 2  # processes per GPU: one computes while the other transfers its tiles

    def __init__(
        self, spec, objective, number=1, gpus=(), batch_size=None, device="CPU", or_cpu=False
    ):
        self.spec, self.objective, self.notices = spec, objective, []
        self._batch_size, self._cpu_number, self._or_cpu = batch_size, number, or_cpu
        with system_limits():
            self._memory_file = os.fdopen(os.memfd_create("cnn_vis"), "r+b")
        self._set_out(gpus, self.EACH, device)
        self._jobs = {}  # slot: (number of tiles, whether they are measured, future of the losses)

    @property
    def number(self):
        return len(self.gpus) or self.processes.number

    def _set_out(self, gpus, each, device):
        self.gpus, self._each = gpus, each
        self.spec = dataclasses.replace(self.spec, use_gpu=bool(gpus))
        shared = [self._memory_file]
        self.processes = CaffeProcesses(self._cpu_number, list(gpus) * each, shared)
        many = "s" * (self.number > 1)
        self.device = device if gpus else f"{device}, {self.number} worker{many}"

    def __exit__(self, kind, *_):
        self.processes.__exit__(kind)
        self._memory_file.close()

    def describe(self):
        while True:
            try:
                self._try_network()
                break
            except GpuFailed as error:
                if self._each > 1:
                    instead = (self.gpus, 1, self.device)  # one process may fit
                elif self._or_cpu:
                    instead = ((), 1, f"CPU ({error.problem})")
                else:
                    raise
                self.processes.__exit__(None)
                self._set_out(*instead)
        self._map_slots()

    def begin_run(self):
        super().begin_run()
        self.processes.restarts = 0

    def change(self, spec, objective):
        self.begin_run()
        self.spec = dataclasses.replace(spec, use_gpu=self.spec.use_gpu)
        self.objective = objective
        self.describe()
        return True

    def _try_network(self):
        try:
            found = self.processes.restarting(self._described)
        except LayerFailed:
            raise self._bad_layer() from None
        except CaffeStopped as error:
            if self.spec.input_size:
                problem = f"the network cannot use this size ({error})"
                raise input_size_refusal(self.spec.input_size, problem, "drop the option") from None
            files = f"{self.spec.files.deploy} and {self.spec.files.weights}"
            raise RunFailed(f"{error}; do {files} belong together?") from None
        self.tile_size, self.shapes, notices = found
        self.notices += notices

    def _bad_layer(self):
        """The BadRequest for a network with a layer that Caffe cannot run, or not backward."""
        culprit = "this layer"
        with CaffeProcesses(1, self.gpus[:1]) as processes:
            names = processes.call(with_network, self.spec, "layers")
            passes = [(i, False) for i in range(len(names))]
            passes += [(i, True) for i in reversed(range(len(names)))]
            try:
                for number, backward in passes:
                    arguments = (self.spec, "run_layer", number, backward)
                    processes.submit(with_network, *arguments).result()
            except WorkerDied:
                culprit = names[number]
        problem = f"Caffe cannot compute a gradient for {culprit}"
        return refusal("layer", self.objective, problem, ANOTHER_LAYER)

    def _described(self):
        """What `describe` found. Finds the batch size. Raises what a task raises, WorkerDied."""
        work = (self.spec, self.objective)
        if not self.gpus:
            # Batches would not help, and a sum might depend on the other tiles of one.
            self.batch_size = 1
            for _ in range(self._cpu_number - 1):  # the others load the network meanwhile
                self.processes.submit(describe, *work)
            return self.processes.submit(describe, *work).result()
        found = self.processes.on_each(describe, *work)[0]
        arguments = (self.spec, "batch_for_memory", self._each)
        fitting = self.processes.on_each(with_network, *arguments)
        self.batch_size = self._batch_size or min(fitting)
        check_batch(self.batch_size, 1, found[0])
        self.processes.on_each(try_batch, *work, self.batch_size)
        return found

    def _map_slots(self):
        """Makes two slots for each worker, one being computed and one to do next, and a spare."""
        slots = 2 * self.processes.number + 1
        shape = (slots, 2, self.batch_size, 3, *self.tile_size)
        check_batch(self.batch_size, slots, self.tile_size)
        try:
            os.truncate(self._memory_file.fileno(), 4 * math.prod(shape))
        except OSError as error:
            problem = f"{one_line(error)}{remedy_of(error)}"
            raise RunFailed(f"memory shared with workers: {problem}") from None
        self._memory = (self._memory_file.fileno(), shape)
        self._slots = map_memory(*self._memory)
        self._free = list(range(slots))

    def has_room(self):
        return bool(self._free)

    def send(self, tiles_in, measure=True):
        slot = self._free.pop()
        for i, tile in enumerate(tiles_in):
            self._slots[slot, 0, i] = tile
        self._compute(slot, len(tiles_in), measure)
        return slot

    def _compute(self, slot, count, measure):
        arguments = (self.spec, self.objective, self._memory, slot, count, measure)
        self._jobs[slot] = (count, measure, self.processes.submit(compute_slot, *arguments))

    def is_done(self, ticket):
        return not concurrent.futures.wait([self._jobs[ticket][2]], timeout=1).not_done

    def receive(self, ticket):
        while True:
            count, _, future = self._jobs[ticket]
            try:
                losses = future.result()
                break
            except WorkerDied:
                self.processes.restart()
                for slot, (*job, future) in list(self._jobs.items()):
                    if future.exception() is not None:
                        self._compute(slot, *job)
        del self._jobs[ticket]
        self._free.append(ticket)
        return list(zip(self._slots[ticket, 1, :count].copy(), losses))


def choose_gpus(gpus):
    """Returns the GPUs to run on, [] for the CPU, and a description of the device, which says why
    if the CPU is used without having been asked for. `gpus` is the list from --gpu, or None. Raises
    BadRequest."""
    if gpus == []:
        return [], "CPU"
    present = count_gpus()
    cuda = (present or gpus) and in_a_worker(can_use_gpu)
    if gpus is None:
        if cuda:
            return [0], "GPU 0"
        return [], f"CPU ({'Caffe was built without CUDA' if present else 'no GPU found'})"
    asked = ",".join(map(str, gpus))
    if not cuda:
        remedy = "use --gpu -1 for the CPU, or build with PYCAFFE_CUDA=1"
        raise refusal("gpu", asked, "Caffe was built without CUDA", remedy)
    if max(gpus) >= present:
        found = f"{present} found, numbered from 0" if present else "none found"
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        found += f" with CUDA_VISIBLE_DEVICES={visible}" if visible is not None else ""
        remedy = "use another number, or -1 for the CPU"
        raise refusal("gpu", asked, f"no such GPU ({found})", remedy)
    return gpus, f"GPU{'s' * (len(gpus) > 1)} {asked}"


def open_engine(options, spec, objective):
    """Creates the Engine that the options select, not yet entered. Raises BadRequest."""
    if options.scheduler:
        return Cluster(dataclasses.replace(spec, tf32=False), objective, options.scheduler)
    gpus, device = choose_gpus(options.gpu)
    spec = dataclasses.replace(spec, use_gpu=bool(gpus))
    number, batch_size = options.workers or count_cores(), options.batch_size
    is_optional = options.gpu is None
    return Workers(spec, objective, number, gpus, batch_size, device, or_cpu=is_optional)


class Engines:
    """Provides the engines for a series of runs that differ only in their start pictures and
    objectives; a context manager. Running processes are reused."""

    def __init__(self, options):
        self.options, self._engine = options, None

    def get(self, spec, objective):
        """The Engine for a run, with the network described. Raises BadRequest, RunFailed."""
        engine = self._engine
        if engine is not None and objective == engine.objective:
            device = {"use_gpu": engine.spec.use_gpu, "tf32": engine.spec.tf32}
            if dataclasses.replace(spec, **device) == engine.spec:
                engine.begin_run()
                return engine
        if engine is None or not engine.change(spec, objective):
            self.close()
            self._engine = open_engine(self.options, spec, objective)
            self._engine.describe()
        return self._engine

    def close(self, kind=None):
        """Ends the engine; immediately if `kind` is Stopped."""
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.__exit__(kind, None, None)

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        self.close(kind)


def idle(options, engine):
    """Yields notices of options that were set but have no effect, on any device or on this one."""
    yield from PARSER.without_effect(options)
    targets = engine.objective.targets
    if len(targets) == 1 and abs(targets[0].weight) != 1:
        yield f"--layer {targets[0]}: a single term's weight has no effect"
    use_gpu = engine.spec.use_gpu
    for name in ("workers",) if use_gpu else ("batch_size", "tf32"):
        if getattr(options, name) and not options.scheduler:
            yield f"--{name} has no effect on {'a GPU' if use_gpu else 'the CPU'}"


# ---- The compiled step ------------------------------------------------------------------------


@functools.cache
def compiled_step():
    """The function that steps a tile in the library that is installed with this program's Caffe, or
    None without that library. It is four times as fast as NumPy. Its results are identical to the
    last bit if `power` uses square roots and products, and nearly identical otherwise.

    It takes x, start, descent, cache and divisors, as for the script's step_tile; numbers, weight,
    exponent and scale of two p-norms and of total variation, then decay and learning rate; places,
    where the operator of total variation has 1 and -1, and its length. It returns the mean size of
    the step, negative if that overflows.
    """
    path = find_in_caffe("python/caffe/libstep_tile.so", "libstep_tile.so")
    if path is None:
        return None
    try:
        function = ctypes.CDLL(path).cnn_vis_step_tile_2  # 2: with its second signature
    except (OSError, AttributeError):  # built for another machine, or too old
        return None
    function.argtypes = [ctypes.c_int64] * 4 + [ctypes.c_void_p] * 7
    function.restype = ctypes.c_double

    def step(x, start, descent, cache, divisors, numbers, places):
        numbers, places = np.array(numbers, np.float64), np.array(places, np.int64)
        descent = np.ascontiguousarray(descent, np.float32)
        start = None if start is None else np.ascontiguousarray(start, np.float64)
        arrays = (x, start, descent, cache, divisors, numbers, places)
        addresses = (None if array is None else array.ctypes.data for array in arrays)
        plane, row = (stride // 8 for stride in x.strides[:2])
        return function(*x.shape[1:], row, plane, *addresses)

    return step


# ---- A cluster --------------------------------------------------------------------------------
# Workers of a Dask cluster have this program installed, in the same version, and need not share a
# disk: they are sent the network's files, once for each machine. Caffe runs in child processes, so
# a crash in Caffe does not end the Dask worker.


def kept_path(sha256):
    """Where a worker's machine keeps the file with this hash."""
    return os.path.join(cache_folder(), "cluster", sha256)


def cache_place():
    """In a Dask worker: what identifies its machine and cache."""
    return socket.gethostname(), os.path.realpath(cache_folder())


def missing_files(hashes):
    """In a Dask worker: the hashes of those files that are missing or damaged in the cache."""
    paths = {sha256: kept_path(sha256) for sha256 in hashes}
    return [
        sha256
        for sha256, path in paths.items()
        if not os.path.isfile(path) or sha256_of(path) != sha256
    ]


def keep_part(sha256, sender, data, is_first, is_last):
    """In a Dask worker: appends data to a file in the cache. Raises RunFailed."""
    path = kept_path(sha256)
    part = f"{path}.{socket.gethostname()}.{sender}"  # machines may share a cache
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if is_first:  # remove leftovers of killed senders
        for other in glob.glob(f"{glob.escape(path)}.*"):
            if time.time() - os.path.getmtime(other) > 3600:
                os.remove(other)
    try:
        with open(part, "wb" if is_first else "ab") as file:
            file.write(data)
        if is_last and sha256_of(part) != sha256:
            raise OSError("it was damaged in transit")
        if is_last:
            put_in_place(part, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.remove(part)
        raise RunFailed(f"{path} cannot be written ({one_line(error.strerror or error)})") from None


class Loan:
    """In a Dask worker: the engine for one run, with a process for each thread of the worker; all
    of those threads use it. It ends with the run, or after five minutes without use."""

    SILENCE = 300
    lock, made = threading.Lock(), {}  # {run: Loan, or None if the run has ended}

    def __init__(self, run, spec, objective, threads):
        self._run, self._lock, self._has_ended = run, threading.Lock(), False
        self._users, self._last = 0, time.monotonic()
        self._workers = Workers(spec, objective, threads)
        try:
            self._workers.describe()
        except BaseException:
            self.end()
            raise
        threading.Thread(target=self._end_if_silent, daemon=True).start()

    @classmethod
    @contextlib.contextmanager
    def of(cls, run, spec, objective):
        """The Loan for a run, which counts as used within this context. Raises what
        Workers.describe raises, and RunFailed."""
        import distributed

        with cls.lock:
            if run not in cls.made:
                threads = distributed.get_worker().state.nthreads
                cls.made[run] = cls(run, spec, objective, threads)
            loan = cls.made[run]
            if loan is None:
                raise RunFailed("the run has ended")
            loan._users += 1
        try:
            yield loan
        finally:
            with cls.lock:
                loan._users, loan._last = loan._users - 1, time.monotonic()

    def examine(self):
        """What `describe` found; the hash of the network's gradient for one picture; and the
        pycaffe version and processor, on which that depends."""
        found = {name: getattr(self._workers, name) for name in DESCRIBED}
        gradient, _ = self.compute(np.random.default_rng(0).normal(0, 50, (3, *found["tile_size"])))
        cpu = re.search(r"^model name\s*: (.*)", read_text("/proc/cpuinfo"), re.MULTILINE)
        cpu = cpu[1] if cpu else "unknown processor"
        made_by = f"pycaffe {versions().get('pycaffe', 'unknown')}, {cpu}"
        return found, hashlib.sha256(gradient.tobytes()).hexdigest(), made_by

    def compute(self, tile, measure=False):
        """The gradient of one tile, and its loss."""
        with self._while_it_lasts():
            ticket = self._workers.send([tile], measure)
        while not self._workers.is_done(ticket):
            with self._while_it_lasts():
                pass
        with self._while_it_lasts():
            return self._workers.receive(ticket)[0]

    @contextlib.contextmanager
    def _while_it_lasts(self):
        with self._lock:
            if self._has_ended:
                raise RunFailed("the run has ended")
            yield

    def _end_if_silent(self):
        is_silent = False
        while not is_silent:
            time.sleep(min(5, self.SILENCE / 10))
            with Loan.lock:
                if self.made.get(self._run) is not self:
                    return
                is_silent = not self._users and time.monotonic() > self._last + self.SILENCE
                if is_silent:  # if the run calls again, it gets a new one
                    del self.made[self._run]
        self.end()

    def end(self):
        """Ends the engine immediately."""
        with self._lock:
            if not self._has_ended:
                self._has_ended = True
                self._workers.__exit__(Stopped)


DESCRIBED = ("tile_size", "shapes", "notices")  # set by Engine.describe()


def end_loan(run):
    """In a Dask worker: ends the Loan for a run. Does not wait for that, as Dask calls this in its
    event loop."""

    def end():
        with Loan.lock:
            loan, Loan.made[run] = Loan.made.get(run), None
        if loan:
            loan.end()

    threading.Thread(target=end).start()


def on_loan(run, task, spec, objective, *arguments):
    """In a Dask worker: calls the method `task` of the run's Loan; returns (True, its result), or
    (False, the BadRequest or RunFailed that it raised)."""
    files = spec.files  # hashes instead of paths, see Crew
    kept = {name: kept_path(sha256) for name, sha256 in files.paths().items()}
    spec = dataclasses.replace(spec, files=dataclasses.replace(files, **kept))
    try:
        with Loan.of(run, spec, objective) as loan:
            return True, getattr(loan, task)(*arguments)
    except (BadRequest, RunFailed) as error:
        return False, error


class Call:
    """A function call that is pickled here and done when it is unpickled, in a worker. The
    scheduler, which inspects tasks, need not have this program."""

    def __init__(self, function, *arguments):
        self._call = (function, arguments)

    def __reduce__(self):
        return self._call


class Crew:
    """The workers of a Dask cluster, which may come and go. Before a worker is used, a separate
    thread here sends it the files that it lacks and tries the network there.

    `known` holds the addresses of all workers; `threads`, {address: number}, the thread counts of
    those in use; `unfit`, {address: exception}, why others are not used; `found`, what Loan.examine
    returned on the first worker.
    """

    PART = 16 << 20  # bytes of a file sent in one message

    def __init__(self, client, address, spec, objective):
        self.client, self.address, self._objective = client, address, objective
        self.known, self.threads, self.unfit, self.found = set(), {}, {}, None
        self.is_announced = False  # once True, unfit workers are reported when found
        self._run = os.urandom(16).hex()
        hashes = content_of(spec.files)
        self._files = {sha256: getattr(spec.files, name) for name, sha256 in hashes.items()}
        self._spec = dataclasses.replace(spec, files=dataclasses.replace(spec.files, **hashes))
        self._lock, self._sending = threading.Lock(), collections.defaultdict(threading.Lock)
        self._trials, self._closing = [], threading.Event()

    def start(self):
        """Starts watching the workers, in a thread."""
        threading.Thread(target=self._look_after, daemon=True).start()

    def pending(self):
        """The addresses of workers that are being prepared."""
        with self._lock:
            return self.known - self.threads.keys() - self.unfit.keys()

    def end(self, futures):
        """Cancels futures and ends the run's Loans on the workers. Waits three seconds at most, as
        a worker that is cut off may never answer."""
        self._closing.set()

        def end():
            with contextlib.suppress(Exception):
                self.client.cancel(futures + self._trials)
                workers = list(self.known)
                self.client.run(end_loan, self._run, workers=workers, on_error="ignore")

        ending = threading.Thread(target=end, daemon=True)
        ending.start()
        ending.join(3)

    def submit(self, task, workers, *arguments):
        """Submits a task, a Loan method's name, to one of the workers; returns its future."""
        call = Call(on_loan, self._run, task, self._spec, self._objective, *arguments)
        arguments = (pickle.loads, pickle.dumps(call))
        return self.client.submit(*arguments, workers=list(workers), pure=False)

    def exception(self, error, address):
        """The exception to raise here for one that a worker raised: with the names of files here,
        and the worker's address unless an option is to blame."""
        where = f"worker {address}: "
        if not isinstance(error, BadRequest):
            return RunFailed(where + self.with_files_here(str(error)))
        problem, value = (
            self.with_files_here(str(error.problem)),
            self.with_files_here(str(error.value)),
        )
        return BadRequest(
            problem if error.option else where + problem, error.remedy, error.option, value
        )

    def with_files_here(self, message):
        """A worker's message, with the names that its files have on this machine."""
        for sha256, path in self._files.items():
            message = re.sub(rf"\S*{sha256}", lambda _, path=path: path, message)
        return message

    def _look_after(self):
        while not self._closing.wait(0.3):
            try:
                present = self.client.nthreads()
            except Exception:  # the scheduler does not answer
                present = {}
            if self._closing.is_set():
                return
            with self._lock:
                before = self.threads
                self.threads = {a: n for a, n in before.items() if a in present}
                for address in before.keys() - self.threads.keys() if self.threads else ():
                    log.warning(f"note: worker {address} is gone; {len(self.threads)} left")
                if before and not self.threads:
                    log.warning(f"note: all workers of {self.address} are gone; waiting for others")
                newcomers = present.keys() - self.known
                self.known = set(present)
            for address in newcomers:
                arguments = (address, present[address])
                threading.Thread(target=self._welcome, args=arguments, daemon=True).start()

    def _welcome(self, address, threads):
        """Prepares a new worker, and tries the network there."""
        problem, found = None, None
        try:
            self._check_version(address)
            self._send_files(address)
            future = self.submit("examine", [address])
            self._trials.append(future)
            is_fit, found = future.result()
            problem = None if is_fit else self.exception(found, address)
        except RunFailed as error:
            problem = error
        except Exception as error:
            with contextlib.suppress(Exception):
                if address not in self.client.nthreads():
                    return  # it is gone; if it comes back, it counts as new
            problem = self.exception(RunFailed(one_line(error)), address)
        with self._lock:
            if address not in self.known or self._closing.is_set():
                return
            if problem:
                self.unfit = self.unfit | {address: problem}
                if self.is_announced:
                    log.warning(f"note: {problem}; this worker is not used")
                return
            self.threads = self.threads | {address: threads}
            self.found = self.found or found
        if found[1] != self.found[1]:
            log.warning(
                f"note: worker {address} ({found[2]}) computes slightly different pixels from the "
                f"first ({self.found[2]}): the picture will depend on which tiles go where"
            )

    def _on(self, address, function, *arguments):
        """Returns function(*arguments), called in a worker."""
        call = pickle.dumps(Call(function, *arguments))
        return self.client.run(pickle.loads, call, workers=[address])[address]

    def _check_version(self, address):
        """Raises RunFailed unless a worker has this version of the program installed."""
        try:
            version, code = self._on(address, fingerprint)
        except ModuleNotFoundError as error:
            if error.name not in ("cnn_vis", "cnn_vis_lib"):
                raise
            version = code = None
        if code != fingerprint()[1]:
            found = f"has another cnn-vis ({version})" if version else "has no cnn-vis"
            remedy = f"install this one ({VERSION}) in its Python"
            raise RunFailed(f"worker {address}: its Python {found}; {remedy}")

    def _send_files(self, address):
        """Sends a worker's machine the files that it lacks."""
        there = functools.partial(self._on, address)
        with self._sending[there(cache_place)]:  # others on the machine wait, then find the files
            for sha256 in there(missing_files, list(self._files)):
                with open(self._files[sha256], "rb") as file:
                    size, ends = os.fstat(file.fileno()).st_size, (True, False)
                    while not ends[1]:
                        data = file.read(self.PART)
                        ends = (file.tell() == len(data), file.tell() >= size or not data)
                        there(keep_part, sha256, self._run, data, *ends)


@dataclasses.dataclass
class Job:
    """A tile being computed: the arguments of Loan.compute; the future, the workers that it may go
    to, and how often it was lost with them; what on_loan returned."""

    arguments: tuple
    future: object = None
    workers: frozenset = frozenset()
    losses: int = 0
    found: tuple | None = None


class Cluster(Engine):
    """The engine on a Dask cluster. It keeps two tiles in progress for each worker thread. Tiles of
    lost workers are computed again, new workers are used as they join, and the run waits while
    there are none."""

    MAX_LOSSES = 4  # Dask reports each only after several workers have died
    batch_size = 1

    def __init__(self, spec, objective, address):
        self.spec, self.objective, self.address, self.notices = spec, objective, address, []
        self._crew, self._jobs, self._tickets = None, {}, itertools.count()

    @property
    def number(self):
        return max(1, sum(self._crew.threads.values()))

    def describe(self):
        client = self._connect()
        crew = self._crew = Crew(client, self.address, self.spec, self.objective)
        crew.start()
        begun, is_told = time.monotonic(), False
        while True:
            waited, pending = time.monotonic() - begun, crew.pending()
            if crew.found and (not pending or waited > 20):
                break
            if crew.unfit and not pending and not crew.found:
                raise next(iter(crew.unfit.values()))
            if not crew.known and not is_told and waited > 2:
                log.info(f"note: {self.address} has no workers yet; waiting for them")
                is_told = True
            time.sleep(0.05)
        for name in DESCRIBED:
            setattr(self, name, crew.found[0][name])
        self.notices = [*map(crew.with_files_here, self.notices)]
        self.notices += [f"{problem}; this worker is not used" for problem in crew.unfit.values()]
        crew.is_announced = True
        workers, threads = len(crew.threads), sum(crew.threads.values())
        many = "s" * (workers > 1), "s" * (threads > 1)
        self.device = f"{self.address}, {workers} worker{many[0]}, {threads} thread{many[1]}"

    def _connect(self):
        """The Client of the scheduler. Raises BadRequest."""
        try:
            import dask
            import distributed
        except ModuleNotFoundError as error:
            problem = missing_package(error, "requirements-cluster.txt")
            raise refusal("scheduler", self.address, problem) from None
        except Exception as error:  # an invalid configuration, for example
            problem = f"Dask cannot be imported ({one_line(error)})"
            raise refusal("scheduler", self.address, problem, "check its configuration") from None
        for name in filter(re.compile("distributed").match, logging.root.manager.loggerDict):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # we report what matters
        dask.config.set({"distributed.admin.large-graph-warning-threshold": "1GB"})  # for tiles
        self._greet(distributed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about package versions that differ
            return distributed.Client(self.address, set_as_default=False)

    def _greet(self, distributed):
        """Raises BadRequest unless a scheduler answers within five seconds. (A Client waits forever
        if something else accepts the connection.)"""
        import asyncio

        async def identity():
            arguments = distributed.Security().get_connection_args("client")
            async with distributed.rpc(self.address, connection_args=arguments) as there:
                return await asyncio.wait_for(there.identity(), 5)

        try:
            with concurrent.futures.ThreadPoolExecutor(1) as pool:  # a loop may be running here
                kind = pool.submit(asyncio.run, identity()).result()["type"]
            problem = f"this is a {kind}, not a scheduler" if kind != "Scheduler" else None
        except Exception as error:  # anything at all may answer
            problem = f"no scheduler answers at this address ({one_line(error)})"
        if problem:
            remedy = "start one with: dask scheduler"
            raise refusal("scheduler", self.address, problem, remedy) from None

    def has_room(self):
        return len(self._jobs) < 2 * self.number

    def send(self, tiles_in, measure=True):
        (tile,), ticket = tiles_in, next(self._tickets)
        self._jobs[ticket] = Job((np.array(tile, np.float32), measure))
        self._place_jobs()
        return ticket

    def _place_jobs(self):
        """Submits the jobs that are not with any of the workers in use."""
        workers = frozenset(self._crew.threads)
        for job in self._jobs.values():
            if workers and (job.future is None or job.workers.isdisjoint(workers)):
                job.workers = workers
                job.future = self._crew.submit("compute", workers, *job.arguments)

    def is_done(self, ticket):
        import distributed

        job = self._jobs[ticket]
        if job.found:
            return True
        self._place_jobs()
        if self._crew.client.status in ("closing", "closed"):
            raise RunFailed(f"the scheduler {self.address} is gone")
        if job.future is None:
            time.sleep(0.3)
            return False
        try:
            job.found = job.future.result(timeout=1)
        except (TimeoutError, distributed.TimeoutError):
            pass
        except (distributed.CancelledError, OSError):  # lost with the scheduler or in transit
            job.future = None
        except distributed.KilledWorker as error:
            job.future, job.losses = None, job.losses + 1
            if job.losses == self.MAX_LOSSES:
                raise RunFailed(f"{self.address}: {one_line(error)}") from None
        except Exception as error:
            raise RunFailed(f"{self.address}: {one_line(error)}") from None
        return job.found is not None

    def receive(self, ticket):
        while not self.is_done(ticket):
            pass
        is_done, found = self._jobs.pop(ticket).found
        if not is_done:
            raise self._crew.exception(found, f"of {self.address}")
        return [found]

    def __exit__(self, kind, *_):
        if self._crew is not None:
            self._crew.end([job.future for job in self._jobs.values() if job.future])
            self._crew.client.close(timeout=2)


# ---- Files of a run ---------------------------------------------------------------------------


class Undescribed(io.BufferedRandom):
    """A file that denies having a descriptor, so that libraries write to it through Python. Pillow
    and libtiff would otherwise write to the descriptor and not notice, or print, that a disk is
    full."""

    def fileno(self):
        raise io.UnsupportedOperation("fileno")


@contextlib.contextmanager
def whole_file(path, name=None):
    """A binary file to write that replaces `path` (or its target, if it is a link) only once all
    is written and on disk, and is removed if that fails. Raises RunFailed, whose message calls the
    file `name`."""
    try:
        place = os.path.realpath(path)
        if os.path.exists(place) and not os.path.isfile(place):
            raise OSError("it is not a regular file")
        with open_part(place) as raw:
            try:
                with Undescribed(raw) as file:
                    yield file
                put_in_place(raw.name, place)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.remove(raw.name)
                raise
    except OSError as error:
        problem = f"cannot be written ({one_line(error)}){remedy_of(error)}"
        raise RunFailed(f"{name or path}: {problem}; an existing file is unchanged") from None


def open_part(place):
    """A new file, unbuffered, for put_in_place: beside `place`, or in the temporary folder if
    `place` exists in a folder that cannot be written."""
    try:
        return open(part_name(place, os.getpid()), "w+b", buffering=0)
    except OSError:
        if not os.path.isfile(place):
            raise
        elsewhere = os.path.join(tempfile.gettempdir(), os.path.basename(place))
        return open(part_name(elsewhere, os.getpid()), "x+b", buffering=0)


def put_in_place(part, place):
    """Moves the complete file `part` to `place`, which it replaces as a whole once its content is
    on disk. Some files can be written but not replaced: one that is mounted into a container, or
    another user's in a sticky folder. They are overwritten. Raises OSError if nothing has been
    changed, and RunFailed, which names a complete copy, if that failed halfway."""
    with open(part, "r+b") as file:
        with contextlib.suppress(OSError):  # no file to replace, or a file system without modes
            os.fchmod(file.fileno(), stat.S_IMODE(os.stat(place).st_mode))
        to_disk(file)
    try:
        os.replace(part, place)
    except OSError:
        if not os.path.isfile(place):
            raise
        with open(part, "rb") as source, open(place, "r+b") as target:
            sizes = [os.fstat(file.fileno()).st_size for file in (source, target)]
            try:  # a full disk must be found before anything is lost
                os.posix_fallocate(target.fileno(), 0, max(1, *sizes))
            except OSError:
                target.truncate(sizes[1])
                raise
            try:
                shutil.copyfileobj(source, target)
                target.truncate()
                to_disk(target)
            except OSError as error:
                copy = shutil.move(part, os.path.join(tempfile.mkdtemp(), os.path.basename(place)))
                problem = f"writing it failed halfway ({one_line(error)})"
                raise RunFailed(f"{place}: {problem}; a complete copy is {copy}") from None
        os.remove(part)


def to_disk(file):
    """Waits until what was written to an open file is on disk, if its file system can tell."""
    file.flush()
    try:
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise


def part_name(path, pid):
    """The temporary file in which process `pid` on this machine writes `path`."""
    folder, name = os.path.split(path)
    name = os.fsdecode(os.fsencode(name)[:100])
    return os.path.join(folder, f".{name}.{os.uname().nodename}.{pid}.part")


@contextlib.contextmanager
def sole_writer(paths):
    """Keeps other runs on this machine from writing to any of `paths`. Raises BadRequest if one
    already does.

    Each path is locked by a socket in Linux's abstract namespace, which leaves nothing behind
    however the process ends.
    """
    with contextlib.ExitStack() as stack:
        for path in sorted({os.path.realpath(path) for path in paths}):
            lock = stack.enter_context(socket.socket(socket.AF_UNIX))
            try:
                lock.bind(f"\0cnn-vis {hashlib.sha256(os.fsencode(path)).hexdigest()}")
            except OSError:
                problem = f"another run is writing {path}; choose another name, or stop that run"
                raise refusal("output", "", problem) from None
        yield


ENDINGS = ("_show.png", "_plot_pix.png", "_plot.png", "_run.gif")  # of watchers' files


class Files:
    """The names of all files that a run may write: the picture and the files beside it.
    `resumed` is the checkpoint that the run continues from, or None."""

    def __init__(self, picture, resumed=None):
        self.picture, self.resumed = picture, resumed
        self.stem, self.extension = os.path.splitext(picture)
        self.checkpoint, self.sidecar = f"{picture}.checkpoint", f"{picture}.json"

    def on_the_way(self, size, step):
        """The name of an intermediate picture: NAME_SIZE_STEP.EXT."""
        return f"{self.stem}_{size}_{step}{self.extension}"

    def beside(self, ending):
        """The name of a watcher's file: NAME + ending."""
        return f"{self.stem}{ending}"

    def may_write(self, path):
        """Whether a run that makes this picture could write `path`, whatever its options."""
        pictures, stems = Files.owners(os.path.realpath(path))
        ours = Files(os.path.realpath(self.picture))
        return ours.picture in pictures or ours.stem in stems

    @staticmethod
    def owners(path):
        """The pictures whose runs could write `path`, whatever their options, as two sets: full
        paths, and paths without extension if any extension will do."""
        stem, extension = os.path.splitext(path)
        pictures = {path, re.sub(r"_\d+_\d+$", "", stem) + extension}
        pictures |= {stem} if extension == ".json" else set()
        pictures.add(Files.of_checkpoint(path) or path)
        return pictures, {path.removesuffix(e) for e in ENDINGS if path.endswith(e)}

    @staticmethod
    def of_checkpoint(path):
        """The picture that a checkpoint belongs to, judging by its name; None if somebody renamed
        it."""
        match = re.fullmatch(r"(.+)\.checkpoint(\.old\d*)?", path, re.DOTALL)
        return match and match[1]

    def resumed_from(self):
        """The picture of the run that this one continues, as a list; empty if it continues none.
        The earlier run must no longer be writing it."""
        return [Files.of_checkpoint(self.resumed) or self.resumed] if self.resumed else []

    def set_aside(self):
        """Renames the checkpoint of an earlier run, if there is one and this run does not continue
        it; returns the new name, or None. Raises BadRequest."""
        path, resumed = self.checkpoint, self.resumed
        if not os.path.exists(path) or (resumed and os.path.samefile(path, resumed)):
            return None
        names = (f"{path}.old{n}" for n in itertools.count(1))
        old = next(name for name in names if not os.path.exists(name))
        try:
            os.replace(path, old)
        except OSError as error:
            problem = f"{path}, of another run, cannot be renamed ({error.strerror})"
            raise refusal("output", self.picture, problem, "choose another name") from None
        return old

    def hint(self):
        """How to continue a run that ended early, if there is a checkpoint."""
        candidates = filter(None, (self.checkpoint, self.resumed))
        path = next(filter(os.path.exists, candidates), None)
        return f"; to continue: {COMMAND} --resume {shell_path(path)}" if path else ""

    def clean_up(self):
        """Removes the checkpoints of a run that has succeeded."""
        for path in {self.checkpoint, self.resumed} - {None}:
            if Files.of_checkpoint(path) is not None:
                with contextlib.suppress(OSError):
                    os.remove(path)


def remove_parts(path):
    """Removes the temporary files of runs to `path` that were killed while writing."""
    stem = os.path.splitext(os.path.realpath(path))[0]
    elsewhere = os.path.join(tempfile.gettempdir(), os.path.basename(stem))
    patterns = [part_name(f"{glob.escape(stem)}*", "*") for stem in (stem, elsewhere)]
    for part in itertools.chain(*map(glob.glob, patterns)):
        pid = part.split(".")[-2]
        if pid.isdecimal() and not os.path.exists(f"/proc/{pid}"):
            with contextlib.suppress(OSError):
                os.remove(part)


# Formats of the finished picture, by the file name's extension: PIL's name, the longest side
# allowed in pixels, PIL's options. PNG and TIFF can have 16 bits.
FORMATS = {
    ".png": ("PNG", MAX_SIDE, {}),
    ".jpg": ("JPEG", 65_500, {"quality": 95, "subsampling": 0}),
    ".jpeg": ("JPEG", 65_500, {"quality": 95, "subsampling": 0}),
    ".webp": ("WEBP", 16_383, {"quality": 95}),
    ".tif": ("TIFF", MAX_SIDE, {"compression": "tiff_deflate"}),
    ".tiff": ("TIFF", MAX_SIDE, {"compression": "tiff_deflate"}),
}


def extension_of(path):
    """A file name's extension in lower case, as in FORMATS."""
    return os.path.splitext(path)[1].lower()


def check_format(path):
    """Raises BadRequest if --output `path` does not have the extension of a picture format."""
    extension = extension_of(path)
    if extension not in FORMATS:
        problem = f"unknown file extension{extension and f' {extension}'}"
        raise refusal("output", path, problem, f"use one of {', '.join(FORMATS)}")


def check_output(option, path):
    """Raises BadRequest if the picture, or table of statistics, `path` cannot be written; the test
    leaves existing files untouched."""
    refuse = functools.partial(refusal, option, path)
    folder = os.path.dirname(os.path.realpath(path))
    if option == "output":
        check_format(path)
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise refuse(f"{folder} is not a folder", "choose another name")
    if not os.path.isdir(folder):
        raise refuse(f"the folder {folder} does not exist", "create it first")
    if os.path.isdir(path) or path.endswith("/"):
        remedy = f", or {path.rstrip('/')}/" if option == "output" else ""
        raise refuse("this is a folder", f"give a file name{remedy}")
    files = Files(path)
    if os.path.isdir(files.checkpoint):
        raise refuse(f"its checkpoint would be {files.checkpoint}, a folder", "choose another name")
    try:
        for name in (path, files.checkpoint, files.on_the_way(99, 99999)):
            with contextlib.suppress(FileNotFoundError):
                os.stat(name)  # fails if the name is too long, or links form a loop
        if problem := unwritable(path):
            remedy = ", or run chmod u+w on it" if is_protected(path) else ""
            raise refuse(f"this is {problem}", f"choose another name{remedy}")
        if not os.path.exists(path):
            try_folder(folder)
    except OSError as error:
        raise refuse(f"cannot be written ({error.strerror})", "use another path") from None
    if option == "stats":
        check_table(path)


def check_table(path):
    """Raises BadRequest if the file `path` exists and is not a table of statistics."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        first = file.readline(1000)
        if first and not first.startswith(COLUMNS[0].encode() + b","):
            problem = "this is not a table of statistics, and would be lost"
            raise refusal("stats", path, problem, "use another name")


def try_folder(folder):
    """Raises OSError if no file can be written in the folder."""
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(bytes(4096))


def unwritable(path):
    """What keeps a run from writing the file `path`, as "..." in "it is ..."; None if nothing does,
    or it does not exist."""
    if os.path.isdir(path):
        return "a folder"
    if os.path.exists(path) and not os.path.isfile(path):
        return "not a regular file"
    if is_protected(path):
        return "write-protected"
    try:
        with open(path, "r+b"):
            return None
    except OSError as error:
        if not os.path.lexists(path) or error.errno == errno.ENOENT:
            return None
        return f"not writable ({error.strerror})"


def is_protected(path):
    """Whether there is a file that this user may not write, or that nobody may (not even root)."""
    with contextlib.suppress(OSError):
        return not (os.stat(path).st_mode & 0o222 and os.access(path, os.W_OK))
    return False


def check_depth(path, depth):
    """Raises BadRequest if the format of `path` cannot hold `depth` bits per channel."""
    form = FORMATS[extension_of(path)][0]
    if depth == 16 and form not in ("PNG", "TIFF"):
        raise refusal("depth", depth, f"{path}: {form} has only 8 bits", "use .png or .tif")


def check_sides(path, sizes):
    """Raises BadRequest if the format of `path` cannot hold pictures as large as the `sizes`."""
    name, greatest, _ = FORMATS[extension_of(path)]
    if max(map(max, sizes)) > greatest:
        problem = f"a {name} side can be at most {greatest} pixels"
        raise refusal("output", path, problem, "use .png")


def write_picture(picture, path, record=None, name=None):
    """Writes a picture, uint8 or uint16 (H, W, 3), to `path`, tagged as sRGB, whole or not at all;
    the extension decides the format. A PNG also stores the dict `record` of how it was made.
    Raises RunFailed, whose message calls the file `name`."""
    from PIL import Image, ImageCms, PngImagePlugin

    form, _, extra = FORMATS[extension_of(path)]
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    info = PngImagePlugin.PngInfo()
    if record:
        command = os.fsencode(record["command"]).decode(errors="backslashreplace")
        info.add_text("Software", record["program"])
        info.add_itxt("Comment", command)
        info.add_itxt(RECORD_KEY, json.dumps(record))
    extra = extra | {"icc_profile": profile} | ({"pnginfo": info} if form == "PNG" else {})
    with whole_file(path, name) as file:
        if picture.dtype == np.uint8:
            Image.fromarray(picture).save(file, form, **extra)
        elif form == "PNG":
            write_deep_png(picture, file, profile, info.chunks)
        else:
            import tifffile

            options = {"photometric": "rgb", "compression": "zlib", "iccprofile": profile}
            tifffile.imwrite(file, picture, **options)


def write_deep_png(picture, file, profile, texts):
    """Writes a uint16 picture (H, W, 3) as a PNG, which Pillow cannot do; `texts` are the (kind,
    data) of text chunks."""

    def write(kind, data):
        checksum = zlib.crc32(kind + data).to_bytes(4, "big")
        file.write(len(data).to_bytes(4, "big") + kind + data + checksum)

    height, width = picture.shape[:2]
    sides = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    file.write(b"\x89PNG\r\n\x1a\n")
    write(b"IHDR", sides + bytes((16, 2, 0, 0, 0)))  # 16 bits, RGB
    write(b"iCCP", b"sRGB\0\0" + zlib.compress(profile))
    for kind, data, *_ in texts:
        write(kind, data)
    compressor, above = zlib.compressobj(6), np.zeros(6 * width, np.uint8)
    for part in strips(height):
        rows = picture[part].astype(">u2").view(np.uint8).reshape(-1, 6 * width)
        lines = np.full((len(rows), 1 + 6 * width), 2, np.uint8)  # 2: minus the line above
        lines[:, 1:] = rows - np.vstack((above, rows[:-1]))
        above = rows[-1]
        write(b"IDAT", compressor.compress(lines.tobytes()))
    write(b"IDAT", compressor.flush())
    write(b"IEND", b"")


# PNGs, sidecars and checkpoints all store how a picture was made in the same record, a dict.

RECORD_KEY = "cnn-vis"  # the keyword of the PNG's text chunk
RECORD_FIELDS = {  # required when a record is read
    "program": str,
    "command": str,
    "network": str,
    "weights_sha256": str,
    "deploy_sha256": str,
    "mean": float,
    "seconds": float,
}


def make_record(options, settings, network, sizes, earlier=None):
    """The record of a run: program and versions; the command, including values that the program
    chose; what identifies the network and the input pictures; the layer as requested; the sizes
    and the seed. If the run is resumed, `earlier` is its earlier record."""
    found = {"seed": settings.seed, "target_layer": settings.target_layer}
    if network.scale != 1:
        found["input_scale"] = network.scale
    if network.name in MODELS:
        found["model"] = network.name
    return {
        "program": f"cnn_vis.py {__version__}",
        "command": f"{COMMAND} {shlex.join(PARSER.words(options, **found))}",
        "network": network.name,
        "layer": (earlier or {}).get("layer", str(options.target_layer)),
        "inputs": earlier.get("inputs") if earlier else inputs_of(options),
        "sizes": sizes,
        "seed": settings.seed,
        **identify(network),
        "versions": versions(),
        "seconds": 0.0,
    }


def inputs_of(options):
    """{option: SHA-256} of the input pictures that the options name."""
    return {name: sha256_of(path) for name, path in PARSER.files_read(options, free=False).items()}


def identify(network):
    """What identifies a network, as a dict."""
    hashes = {f"{name}_sha256": sha256 for name, sha256 in content_of(network).items()}
    return hashes | {"mean": float(network.mean)}


@functools.cache
def versions():
    """The versions of the software that makes the pictures, as a dict."""
    import importlib.metadata
    import platform

    found = {"python": platform.python_version()}
    for name in ("numpy", "scipy", "pillow", "pycaffe"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def check_record(record):
    """The words of the options in the command of `record`, a dict. Raises ValueError if it is not
    a record as made by make_record."""
    for name, kind in RECORD_FIELDS.items():
        if type(record.get(name)) is not kind:
            raise ValueError(f"its {name} is missing or of the wrong type")
    words = shlex.split(record["command"])
    return list(itertools.dropwhile(lambda word: not word.startswith("-"), words))


def kept_options(record):
    """The parsed options of the command in `record`, a dict. Raises ValueError if that command
    cannot be run."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # silences --help
            options = PARSER.parse_args(check_record(record))
    except (BadRequest, SystemExit) as error:
        raise ValueError(f"its command cannot be run ({error})") from None
    if PARSER.several(options):
        raise ValueError("its command makes several pictures")
    return options


def read_record(path):
    """(record, words of its command's options) from the PNG `path`, or the JSON file `path` or
    `path`.json. Raises BadRequest."""
    from PIL import Image

    try:
        text, sidecar = None, path
        if not path.lower().endswith(".json"):
            with Image.open(path) as file:
                text = file.info.get(RECORD_KEY)
            sidecar = f"{path}.json"
        if text is None:
            text = read_text(sidecar)
        record = json.loads(text)
        return record, check_record(record)
    except Exception as error:  # other programs' files can fail in any way
        remedy = f"use a PNG that {PROGRAM} wrote, or the file that --sidecar wrote"
        reason = one_line(error)
        if isinstance(error, FileNotFoundError):
            reason = f"there is no {error.filename}"
        problem = f"has no record of how it was made ({reason})"
        raise refusal("reproduce", path, problem, remedy) from None


# A checkpoint is a NumPy archive (.npz) of arrays: the state of a Dream, the start picture, what
# watchers keep, and the rest as JSON in one more array.

RUN_ARRAYS = {  # dtype, *shape; None: any length
    "image": ("float64", 1, 3, None, None),
    "caches": ("float64", None, 3, None, None),
    "before": ("float32", None, 3, None, None),
    "picture": ("uint8", None, None, 3),
    "mask": ("uint8", None, None),
    "guide": ("uint8", None, None, 3),
}


@dataclasses.dataclass
class Checkpoint:
    """A run so far: the numbers and arrays of its Dream and its watchers, the record of how its
    picture is made, and the folder in which its command was run."""

    record: dict
    folder: str
    numbers: dict
    arrays: dict

    def held(self):
        """The bytes of the arrays that the run goes on with."""
        return sum(self.arrays[n].nbytes for n in ("image", "caches") if n in self.arrays)

    def write(self, path):
        """Writes it to `path`, whole or not at all. Raises RunFailed."""
        header = {"record": self.record, "folder": self.folder, "numbers": self.numbers}
        text = np.frombuffer(json.dumps(header).encode(), np.uint8)
        with whole_file(path) as file:
            np.savez(file, header=text, **self.arrays)

    @classmethod
    def read(cls, path, known, scratch=None):
        """The Checkpoint in `path`, with its arrays in the folder `scratch` if there is one; all
        types and dimensions are checked against the `known` arrays, {name: (dtype, *shape)}. Raises
        BadRequest, RunFailed.

        All bytes of every array are read, and so checked against their CRC, before their contents
        are trusted. Pickles are rejected.
        """
        try:
            with zipfile.ZipFile(path) as file:
                if sum(entry.file_size for entry in file.infolist()) > os.path.getsize(path):
                    raise ValueError("it claims to contain more data than it does")
                arrays = {
                    os.path.splitext(entry.filename)[0]: read_array(file, entry, scratch)
                    for entry in file.infolist()
                }
            header = json.loads(arrays.pop("header").tobytes())
            if "command" in header:
                raise ValueError("it was written by version 1.0; finish it with that version")
            for name, kind in {"record": dict, "folder": str, "numbers": dict}.items():
                if type(header.get(name)) is not kind:
                    raise ValueError(f"its {name} is missing or of the wrong type")
            check_record(header["record"])
            check_arrays(arrays, known)
            return cls(**header, arrays=arrays)
        except RunFailed:
            raise
        except Exception as error:  # damage can surface anywhere in zipfile, NumPy or json
            raise unusable(path, f"not a readable checkpoint ({one_line(error)})") from None


def check_arrays(arrays, known):
    """Raises ValueError or KeyError if one of the arrays has not the type and dimensions as in
    `known`, where None is any length."""
    for name, array in arrays.items():
        dtype, *shape = known[name]
        fits = array.dtype == dtype and array.ndim == len(shape)
        if not fits or any(n not in (None, side) for n, side in zip(shape, array.shape)):
            raise ValueError(f"its {name} has the wrong type or shape")


def read_array(file, entry, scratch=None):
    """Reads an array in NumPy's .npy format from an open ZipFile, into the folder `scratch` if it
    is large. Raises ValueError if its size is not as stated, and whatever zipfile and NumPy raise.
    """
    with file.open(entry) as stream:
        version = np.lib.format.read_magic(stream)
        header = {(1, 0): "read_array_header_1_0", (2, 0): "read_array_header_2_0"}[version]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about headers that Python 2 wrote
            shape, is_fortran, dtype = getattr(np.lib.format, header)(stream)
        size = math.prod(shape) * dtype.itemsize
        if dtype.hasobject:
            raise ValueError("it contains a pickle")
        if is_fortran or size != entry.file_size - stream.tell():
            raise ValueError(f"its {entry.filename} has the wrong length")
        array = zeros(shape, scratch if size > 1 << 20 else None, dtype)
        left = memoryview(array.reshape(-1).view(np.uint8))
        while count := stream.readinto(left[: 1 << 24]):
            left = left[count:]
        if stream.read(1) or left:  # reading to the end makes zipfile check the CRC
            raise ValueError(f"its {entry.filename} has the wrong length")
    return array


def unusable(path, problem):
    """The BadRequest for a checkpoint that a run cannot continue from."""
    checkpoint = f"{path}.checkpoint"
    remedy = "start over without --resume"
    if os.path.isfile(checkpoint):
        remedy = f"did you mean {checkpoint}?"
    return refusal("resume", path, problem, remedy)


# ---- Along the way ----------------------------------------------------------------------------


def say(text, stream="stdout"):
    """Prints a line on sys.stdout or sys.stderr, above the progress bar if there is one. If the
    reader has gone (| head) or the log's disk is full, this and all later lines are discarded, and
    the run continues."""
    file, tqdm = getattr(sys, stream), sys.modules.get("tqdm")
    try:
        tqdm.tqdm.write(text, file) if tqdm else print(text, file=file)
        file.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())
        with contextlib.suppress(OSError):
            file.flush()


class Watcher:
    """Something that a run does along the way. To add one, write a class and put it in BEHAVIORS
    under its word for --iter_behavior.

    A RunFailed from after_step or when_due is reported, and the run continues; any other failure
    ends it. Once the run has begun, `self.run` is the Run: its options, files, record and so on.
    `say` prints a line above the progress bar.
    """

    ending = None  # it writes a file NAME + ending beside the picture
    at_end = False  # whether it also does something at the end
    arrays = {}  # what it keeps in a checkpoint: {name: (dtype, *shape)}, None for any length

    def __init__(self, options, files):
        """Called before the run; raises BadRequest if the watcher cannot work."""
        self.options, self.files = options, files

    def writes(self):
        """The paths that it writes, except those of intermediate pictures."""
        return [self.files.beside(self.ending)] if self.ending else []

    def wants_stats(self, step):
        """Whether a step, counted from 1, is to be measured."""
        return False

    def begin(self, run):
        """Called when everything has been checked, before the first step; run.kept holds the
        arrays of the checkpoint that the run continues from."""
        self.run = run

    def after_step(self, progress):
        """Called after every step."""

    def when_due(self, progress):
        """Called after every --output_iter steps at a size."""

    def finish(self, progress):
        """Called when the finished picture has been written. A RunFailed ends the run."""

    def close(self):
        """Called at the end, however the run ends."""

    def keep(self):
        """Its `arrays`, {name: array}, for a checkpoint."""
        return {}


class Silence(Watcher):
    """Reports, once, that the network's gradient is zero."""

    is_told = False

    def after_step(self, progress):
        if progress.is_silent and not self.is_told:
            self.is_told = True
            layer = self.options.target_layer
            log.info(
                f"note: the gradient of {layer} is zero; only the regularizers change the picture"
            )


class Print(Watcher):
    """print: statistics as readable lines."""

    def wants_stats(self, step):
        return step % self.options.output_iter == 0

    def when_due(self, progress):
        s = progress.stats
        say(
            f"{progress}, objective {s['objective']:.4g}\n"
            f"  losses: p {s['p_loss']:.4g}, aux {s['aux_loss']:.4g}, tv {s['tv_loss']:.4g}\n"
            f"  mean gradients: cnn {s['cnn_gradient']:.4g}, p {s['p_gradient']:.4g}, "
            f"aux {s['aux_gradient']:.4g}, tv {s['tv_gradient']:.4g}\n"
            f"  step: mean {s['step_size']:.4g}, relative to value {s['step_to_value']:.4g}; "
            f"image: mean {s['image_mean']:.4g}, std {s['image_std']:.4g}"
        )


class Save(Watcher):
    """save: NAME_SIZE_STEP.EXT."""

    def when_due(self, progress):
        picture = progress.picture(self.options.rescale_image, self.options.depth)
        path = self.files.on_the_way(progress.size, progress.step)
        write_picture(picture, path, self.run.made(size=progress.size, step=progress.step))


class Drawing(Watcher):
    """A watcher that draws with matplotlib: in a window, or in a file if there is no display."""

    def __init__(self, options, files):
        super().__init__(options, files)
        try:
            import matplotlib.figure
            import matplotlib.pyplot  # noqa: F401
        except (ImportError, ValueError) as error:
            remedy = "pip install matplotlib, and check $MPLBACKEND"
            problem = f"matplotlib does not work ({one_line(error)})"
            raise refusal("iter_behavior", "", problem, remedy) from None

    def open_window(self, **arguments):
        """Makes self.figure, in a window if there is a display."""
        import matplotlib.figure
        import matplotlib.pyplot

        self._window = matplotlib.pyplot
        try:
            self.figure = matplotlib.pyplot.figure(**arguments)
            has_display = self.figure.canvas.required_interactive_framework is not None
        except Exception:  # each toolkit fails in its own way without a display
            has_display = False
        if not has_display:
            arguments.pop("num", None)
            self.figure, self._window = matplotlib.figure.Figure(**arguments), None
            log.info(f"note: there is no display; see {self.files.beside(self.ending)}")

    def update_window(self):
        """Shows the figure as it is, or writes it. Raises RunFailed."""
        if self._window:
            self._window.pause(0.01)
        else:
            self.write(self.figure)

    def write(self, figure):
        """Writes a figure as a PNG. Raises RunFailed."""
        with whole_file(self.files.beside(self.ending)) as file:
            figure.savefig(file, format="png")


class Show(Drawing):
    """show: the picture as it stands."""

    ending = "_show.png"

    def begin(self, run):
        super().begin(run)
        size = (self.options.show_width, self.options.show_height)
        self.open_window(num="cnn-vis", figsize=size)

    def when_due(self, progress):
        self.figure.clf()
        axes = self.figure.add_axes((0, 0, 1, 1))
        axes.imshow(progress.picture(self.options.rescale_image))
        axes.axis("off")
        self.update_window()


class PlotPix(Drawing):
    """plot_pix: the values of a few pixels over time: those of the original's four that lie inside
    the picture."""

    ending = "_plot_pix.png"
    arrays = {"pixels": ("float64", None, 6)}
    PIXELS = ((100, 100), (200, 200), (100, 200), (200, 100))  # (y, x)

    def begin(self, run):
        super().begin(run)
        self.open_window(num="cnn-vis pixels")
        self.history = run.kept.get("pixels", np.empty((0, 6))).tolist()  # step, y, x, b, g, r

    def after_step(self, progress):
        image = progress.image
        for y, x in self.PIXELS:
            if y < image.shape[2] and x < image.shape[3]:
                self.history.append([progress.steps_done(), y, x, *image[0, :, y, x]])

    def when_due(self, progress):
        self.figure.clf()
        history = np.array(self.history).reshape(-1, 6)
        for place, (y, x) in enumerate(self.PIXELS, 1):
            axes = self.figure.add_subplot(2, 2, place, title=f"pixel {(y, x)}", xlabel="step")
            rows = history[(history[:, 1:3] == (y, x)).all(axis=1)]
            for colour, channel in zip("bgr", (3, 4, 5)):
                axes.plot(rows[:, 0], rows[:, channel], colour)
        self.figure.tight_layout()
        self.update_window()

    def keep(self):
        return {"pixels": np.array(self.history, np.float64).reshape(-1, 6)}


class Statistics(Watcher):
    """A watcher that keeps the statistics of every step as a row with the COLUMNS."""

    at_end = True
    arrays = {"rows": ("float64", None, len(COLUMNS))}

    def wants_stats(self, step):
        return True

    def begin(self, run):
        super().begin(run)
        self.rows = run.kept["rows"].tolist() if "rows" in run.kept else []

    def after_step(self, progress):
        size = progress.sizes[progress.size - 1]
        stats = (progress.stats[name] for name in STATS)
        self.rows.append([progress.size, *size, progress.step, *stats])

    def finish(self, progress):
        if self.rows:
            self.when_due(progress)

    def keep(self):
        return {"rows": np.array(self.rows, np.float64).reshape(-1, len(COLUMNS))}


class Stats(Statistics):
    """--stats: the statistics as CSV."""

    def writes(self):
        return [self.options.stats]

    def when_due(self, progress):
        with whole_file(self.options.stats, f"--stats {self.options.stats}") as file:
            text = io.TextIOWrapper(file, encoding="utf-8", newline="")
            rows = ([*map(int, row[:4]), *row[4:]] for row in self.rows)
            csv.writer(text).writerows([COLUMNS, *rows])
            text.detach()


class Plot(Statistics, Drawing):
    """plot: objective, losses and step size over all steps; size changes marked."""

    ending = "_plot.png"
    GROUPS = {
        "objective": ["objective"],
        "loss": ["p_loss", "aux_loss", "tv_loss"],
        "mean step": ["step_size"],
    }

    def when_due(self, progress):
        from matplotlib.figure import Figure

        columns = dict(zip(COLUMNS, np.array(self.rows, float).T))
        steps = (columns["size"] - 1) * self.options.num_steps + columns["step"]
        changes = steps[1:][np.diff(columns["size"]) > 0] - 0.5
        figure = Figure(figsize=(8, 9), layout="constrained")
        for axes, (label, names) in zip(figure.subplots(3, sharex=True), self.GROUPS.items()):
            for name in filter(lambda name: columns[name].any(), names):
                axes.plot(steps, columns[name], label=name.replace("_", " "))
            for change in changes:
                axes.axvline(change, color="grey", linewidth=0.7, linestyle=":")
            axes.set_ylabel(label)
            if any((columns[name] > 0).any() for name in names[1:]):
                axes.set_yscale("log")
            if len(names) > 1 and axes.lines:
                axes.legend()
        axes.set_xlabel("step, over all sizes (dotted: size changes)")
        self.write(figure)


class Gif(Watcher):
    """gif: an animation at ten pictures a second that pauses on the last."""

    ending, at_end = "_run.gif", True
    arrays = {"frames": ("uint8", None, None, None, 3)}
    SIDE = 480  # pixels, at most

    def begin(self, run):
        super().begin(run)
        self.frames = list(run.kept.get("frames", []))

    def _frame(self, picture, last_size):
        """The picture resized to the proportions of the last size: uint8 (h, w, 3)."""
        scale = min(1, self.SIDE / max(last_size))
        return resize(picture, tuple(max(1, round(scale * side)) for side in last_size))

    def when_due(self, progress):
        picture = progress.picture(self.options.rescale_image)
        self.frames.append(self._frame(picture, progress.sizes[-1]))

    def finish(self, progress):
        from PIL import Image

        last = self._frame(progress.picture(self.options.rescale_image), progress.sizes[-1])
        is_there = self.frames and np.array_equal(self.frames[-1], last)
        first, *others = map(Image.fromarray, self.frames if is_there else [*self.frames, last])
        durations = [100] * len(others) + [2000]
        with whole_file(self.files.beside(self.ending)) as file:
            first.save(file, "GIF", save_all=True, append_images=others, duration=durations, loop=0)

    def keep(self):
        return {"frames": np.stack(self.frames)} if self.frames else {}


class Checkpoints(Watcher):
    """--checkpoint_iter: saves the run every N steps, counted over all sizes."""

    def after_step(self, progress):
        every = self.options.checkpoint_iter
        if every is None:
            every = max(50, self.options.output_iter)
        if every and progress.steps_done() % every == 0:
            self.run.checkpoint().write(self.files.checkpoint)


class Pace:
    """How far a run has got, in tiles, and how fast it is."""

    def __init__(self, dream):
        steps, at_size = dream.settings.num_steps, dream.size - 1
        self.counts = [sum(map(len, dream.tiles(size))) for size in dream.sizes]
        self.total = steps * sum(self.counts)
        self.done = steps * sum(self.counts[:at_size]) + dream.step * self.counts[at_size]
        self._done_before, self._begun = self.done, time.monotonic()

    def advance(self, progress):
        """Counts the tiles of a step; returns their number."""
        count = self.counts[progress.size - 1]
        self.done += count
        return count

    def rate(self):
        """Tiles per second, on average."""
        return (self.done - self._done_before) / (time.monotonic() - self._begun)

    def seconds_left(self):
        """How long the rest will take at this rate; None before the first step."""
        rate = self.rate()
        return (self.total - self.done) / rate if rate else None


class Snapshot:
    """An intermediate picture for browsers: a copy of the image in a Progress, with blocks of
    pixels averaged if a side is above SIDE. It is encoded as a JPEG on the first request."""

    SIDE = 2048

    def __init__(self, progress):
        image, side = progress.image, max(progress.image.shape[2:])
        step = math.ceil(side / self.SIDE)
        image = block_means(image, step) if step > 1 else image.copy()
        self.steps = progress.steps_done()
        self._progress = dataclasses.replace(progress, image=image)
        self._encoding, self._jpeg = threading.Lock(), None

    def jpeg(self, rescale):
        """The picture as the bytes of a JPEG."""
        with self._encoding:
            if self._jpeg is None:
                self._jpeg = encode_jpeg(self._progress.picture(rescale))
                self._progress = None  # frees the copy
            return self._jpeg


def block_means(image, side):
    """The image (1, 3, H, W) with each block of side x side pixels, smaller at the edges, replaced
    by one pixel: its mean."""
    for _ in range(2):  # rows, then columns
        total = image[:, :, ::side].copy("K")
        for i in range(1, side):
            part = image[:, :, i::side]
            total[:, :, : part.shape[2]] += part
        starts = range(0, image.shape[2], side)
        total /= np.diff([*starts, image.shape[2]])[:, np.newaxis]
        image = total.swapaxes(2, 3)
    return image


def encode_jpeg(picture):
    """The bytes of a picture as a JPEG for viewing."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=90)
    return file.getvalue()


class Web(Watcher):
    """web: a page that shows the run in a browser while it lasts.

    The run's thread only records how far it is, and copies the image if a request is waiting for a
    picture; everything else is done in the server's threads. `_changed` guards what they share.
    Steps are measured every --output_iter steps, and while somebody is watching as often as PAUSE
    allows.
    """

    at_end = True  # the page follows the run from the first step to the last
    PAUSE = 0.25  # seconds, at least, between events and between measured steps
    PATIENCE = 15  # seconds after which a waiting request is answered even if nothing is new
    FAREWELL = 2  # seconds, at most, that listeners have to fetch the last event
    POINTS = 500  # in the curve, at most

    def __init__(self, options, files):
        super().__init__(options, files)
        self._changed = threading.Condition()
        self._version, self._seen, self._end = 0, None, None
        self._snapshot, self._curve = None, []  # curve: [[steps done, objective], ...]
        self._is_wanted = False  # whether a request is waiting for a picture
        self._visitors = 0  # requests that the end of the run waits for
        self._looked = self._measured = -math.inf  # times of the last request and measured step
        self._asked = {}  # {step: what wants_stats answered}; must not change during a step
        open_web_server(self, options.web_host, options.web_port).server_close()  # fails early

    def wants_stats(self, step):
        if step not in self._asked:
            now = time.monotonic()
            is_watched = self._is_wanted or now - self._looked < 10 * self.PAUSE
            is_wanted = is_watched and now - self._measured >= self.PAUSE
            self._measured = now if is_wanted else self._measured
            self._asked[step] = is_wanted or step % self.options.output_iter == 0
        return self._asked[step]

    def begin(self, run):
        super().begin(run)
        self._pace, self._server = Pace(run.dream), self._open()
        run.batch.port = self._server.port
        threading.Thread(target=self._server.serve_forever, args=(0.1,), daemon=True).start()
        lines = [f"watch the run at {self._server.url}"]
        if not self._server.is_local:
            place = f"port {self._server.port} of this machine"
            lines.append(f"whoever can reach {place} can see the picture and the command")
        for line in lines:  # even with --quiet: nobody can find the page without its address
            say(printable(f"note: {line}"), "stderr")

    def _open(self):
        """A server at the requested port; if any port will do, at the previous picture's, so that
        an open page continues with this one."""
        host, port = self.options.web_host, self.options.web_port
        if self.run.batch.port and not port:
            with contextlib.suppress(BadRequest):
                return open_web_server(self, host, self.run.batch.port)
        return open_web_server(self, host, port)

    def after_step(self, progress):
        self._pace.advance(progress)
        self._asked = {step: asked for step, asked in self._asked.items() if step > progress.step}
        with self._changed:
            if progress.stats and math.isfinite(progress.stats["objective"]):
                if len(self._curve) == self.POINTS:
                    del self._curve[1::2]
                objective = float(f"{progress.stats['objective']:.5g}")
                self._curve.append([progress.steps_done(), objective])
            self._tell(progress, self._is_wanted)

    def close(self):
        """Lets viewers fetch the last event and picture, and stops the server."""
        dream, error = self.run.dream, sys.exc_info()[1]
        end = "done" if dream.is_done() and not error else "stopped"
        is_failure = error and not isinstance(error, Stopped)
        with self._changed:
            self._end = ["failed", one_line(error)] if is_failure else [end, ""]
            self._snapshot = None
            self._tell(dream.progress(), self._visitors and dream.image is not None)
            self._changed.wait_for(lambda: not self._visitors, self.FAREWELL)
        self._server.shutdown()
        self._server.server_close()

    def _tell(self, progress, with_picture):
        """Records how far the run is, for viewers."""
        self._version += 1
        self._seen = dataclasses.replace(progress, image=None)
        if with_picture:
            with contextlib.suppress(MemoryError):  # a snapshot is not worth failing the run
                self._snapshot = Snapshot(progress)
            self._is_wanted = False
        self._changed.notify_all()

    # The methods below run in the server's threads.

    @contextlib.contextmanager
    def visitor(self):
        """Makes the end of the run wait while a request is being answered."""
        with self._changed:
            self._visitors += 1
        try:
            yield
        finally:
            with self._changed:
                self._visitors -= 1
                self._changed.notify_all()

    def picture(self, after):
        """Waits until more than `after` steps are done, or the run ends, and returns (steps done,
        JPEG) of the picture as it stands; None if there is none within PATIENCE."""
        with self._changed:
            before = self._snapshot

            def is_there():
                shot = self._snapshot
                is_new = shot is not before or (shot and shot.steps == self._seen.steps_done())
                return self._end or (is_new and shot.steps > after)

            self._looked = time.monotonic()
            self._is_wanted = self._is_wanted or not is_there()
            is_answered = self._changed.wait_for(is_there, self.PATIENCE)
            self._looked, snapshot = time.monotonic(), self._snapshot
        if not is_answered or snapshot is None:
            return None
        return snapshot.steps, snapshot.jpeg(self.options.rescale_image)

    def events(self):
        """Yields news for the page as dicts: first everything, then changes, or empty dicts to see
        whether the listener is still there. The last one says how the run ended."""
        news, version, drawn = self._plan(), None, None
        while True:
            with self._changed:
                if self._version == version:
                    self._changed.wait(self.PATIENCE)
                news |= {} if self._version == version else self._state()
                if self._curve and self._curve[-1] != drawn:
                    news["curve"], drawn = self._curve.copy(), self._curve[-1]
                version, has_ended = self._version, self._end is not None
            yield news
            if has_ended:
                return
            news = {}
            with self._changed:
                self._changed.wait_for(lambda: self._end, self.PAUSE)

    def _plan(self):
        """What is known before the first step."""
        dream = self.run.dream
        plan = {"command": self.run.record["command"], "sizes": dream.sizes, "curve": []}
        plan |= {"steps": dream.settings.num_steps, "tiles": self._pace.counts}
        return plan | {"batch": str(self.run.batch)}

    def _state(self):
        """Where the run is."""
        seen = self._seen or self.run.dream
        return {
            "size": seen.size,
            "step": seen.step,
            "rate": self._pace.rate(),
            "left": self._pace.seconds_left(),
            "seconds": time.monotonic() - self.run.begun,
            "end": self._end,
        }


def web_handler(web):
    """The class that answers requests for the page of a Web: GET and HEAD of three paths.

    Other sites open in the same browser must not read the answers, not even through a name that
    they have pointed at this machine (DNS rebinding). So the Host of a request has to be the
    server's: an IP address, which nobody can redirect, localhost or the value of --web_host; and
    the Origin, if there is one, has to match the Host.
    """
    import http.server

    class Handler(http.server.BaseHTTPRequestHandler):
        timeout = 10  # seconds that a thread waits for a client to send or receive

        def do_GET(self):
            path, _, query = self.path.partition("?")
            answers = {"/": self.page, "/events": self.events, "/picture.jpg": self.picture}
            if not self.is_for_us():
                problem = f"open {self.server.url}"
                self.reply(403, problem.encode())
            elif self.command not in ("GET", "HEAD"):
                self.reply(405, b"only GET and HEAD are allowed", Allow="GET, HEAD")
            elif path in answers:
                answers[path](query)
            else:
                self.reply(404, b"not found; the page is at /")

        def __getattr__(self, name):
            if name.startswith("do_"):  # any other method
                return self.do_GET
            raise AttributeError(name)

        def is_for_us(self):
            """Whether a request may be answered, judging by its headers."""
            host, *others = self.headers.get_all("Host", [""])
            origins = self.headers.get_all("Origin", [])
            site, mode = (self.headers.get(f"Sec-Fetch-{name}") for name in ("Site", "Mode"))
            is_own = site in (None, "same-origin", "none") or mode == "navigate"  # a link
            is_same = all(origin == f"http://{host}" for origin in origins)
            return not others and self.server.has_name(host) and is_same and is_own

        def page(self, _):
            self.reply(200, PAGE.encode(), "text/html; charset=utf-8")

        def picture(self, query):
            if self.command == "HEAD":  # without making a picture
                self.reply(200, None, "image/jpeg")
                return
            after = re.fullmatch(r"after=(\d{1,15})", query)
            with web.visitor():
                found = web.picture(int(after[1]) if after else -1)
                if found:
                    self.reply(200, found[1], "image/jpeg", Steps=found[0])
                else:
                    self.reply(204)

        def events(self, _):
            self.reply(200, None, "text/event-stream")
            if self.command == "HEAD":
                return
            with web.visitor():
                for news in web.events():
                    line = f"data: {json.dumps(news)}" if news else ": nothing new"
                    self.wfile.write(f"{line}\n\n".encode())
                self.rfile.read(1)  # waits until the page has everything and hangs up

        def reply(self, status, body=b"", kind="text/plain; charset=utf-8", **more):
            """Sends an answer, only its headers if `body` is None."""
            self.send_response(status)
            headers = more | page_headers() | {"Content-Type": kind}
            if body is not None and status != 204:
                headers["Content-Length"] = len(body)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            if body and self.command != "HEAD":
                self.wfile.write(body)

        def send_error(self, code, *_):  # for malformed requests
            self.reply(code, b"invalid request")

        def version_string(self):
            return "cnn-vis"

        def log_message(self, *_):
            pass

    return Handler


def web_server(handler, host):
    """A class of servers for `host` whose `handler` answers up to `most` requests at a time."""
    import ipaddress
    import socketserver

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = allow_reuse_address = True
        request_queue_size = most = 64  # connections at once

        def __init__(self, family, address):
            self.address_family, self._places = family, threading.Semaphore(self.most)
            super().__init__(address, handler)
            self.port, bound = self.server_address[1], ipaddress.ip_address(self.server_address[0])
            self.is_local, self._names = bound.is_loopback, {"localhost", host.lower()}
            shown = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(str(bound), host)
            shown = f"[{shown}]" if ":" in shown else shown
            self.url = f"http://{shown}:{self.port}/"

        def has_name(self, text):
            """Whether a Host header names this server."""
            text = text.lower() + (":80" if self.port == 80 and text[-3:] != ":80" else "")
            name, _, port = text.rpartition(":")
            with contextlib.suppress(ValueError):
                address = ipaddress.ip_address(name.strip("[]"))
                name = "localhost" if address.is_loopback or not self.is_local else name
            return name in self._names and port == str(self.port)

        def process_request(self, *request):
            if self._places.acquire(blocking=False):
                super().process_request(*request)
            else:
                self.shutdown_request(request[0])

        def process_request_thread(self, *request):
            try:
                super().process_request_thread(*request)
            finally:
                self._places.release()

        def handle_error(self, *_):
            error = sys.exc_info()[1]
            if not isinstance(error, OSError):  # an OSError means that the client has gone
                log.error(f"--iter_behavior web: {one_line(error)}")

    return Server


def open_web_server(web, host, port):
    """A server for the page of a Web, bound but not yet answering. Raises BadRequest."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return web_server(web_handler(web), host)(family, address)
    except (OSError, ValueError) as error:
        if getattr(error, "errno", None) in (errno.EADDRINUSE, errno.EACCES):
            remedy = "choose another port, or omit this option"
            raise refusal("web_port", port, error.strerror, remedy) from None
        problem = f"cannot listen there ({getattr(error, 'strerror', None) or one_line(error)})"
        remedy = "use an address or name of this machine, or omit this option"
        raise refusal("web_host", host, problem, remedy) from None


class Bar(Watcher):
    """The progress bar on a terminal, or lines in a log."""

    def begin(self, run):
        from tqdm import tqdm

        super().begin(run)
        self._pace, batch = Pace(run.dream), run.batch
        others = batch.done + (batch.count - batch.number) * self._pace.total  # a guess
        has_columns = sys.stderr.isatty() and os.get_terminal_size(2).columns > 0
        self._bar = tqdm(
            desc="starting", total=self._pace.total + others, initial=batch.done + self._pace.done,
            bar_format="{desc} |{bar}| {percentage:3.0f}% {rate_fmt}, {remaining} left",
            unit=" tiles", leave=False, dynamic_ncols=True, disable=not has_columns,
        )  # fmt: skip

    def after_step(self, progress):
        self._bar.set_description_str(f"{self.run.batch}{progress}", refresh=False)
        self._bar.update(self._pace.advance(progress))

    def when_due(self, progress):
        if self._bar.disable:
            left = self._bar.format_interval(self._pace.seconds_left())
            log.info(f"{self.run.batch}{progress}: {self._pace.rate():.1f} tiles/s, {left} left")

    def close(self):
        self._bar.close()
        self.run.batch.done += self._pace.total


BEHAVIORS = {  # words of --iter_behavior
    "print": Print,
    "save": Save,
    "show": Show,
    "plot_pix": PlotPix,
    "plot": Plot,
    "gif": Gif,
    "web": Web,
}


ARRAYS = RUN_ARRAYS | {  # all that a checkpoint can hold
    name: kind for watcher in (*BEHAVIORS.values(), Stats) for name, kind in watcher.arrays.items()
}


class Watchers(list):
    """The watchers that the options ask for, in the order in which they act. Raises BadRequest if
    one cannot work."""

    def __init__(self, options, files):
        self.output_iter = options.output_iter
        asked = [watcher for word, watcher in BEHAVIORS.items() if word in options.iter_behavior]
        asked += [Stats] if options.stats else []
        asked += [Silence, Checkpoints] + ([] if options.quiet else [Bar])
        super().__init__(watcher(options, files) for watcher in asked)

    def writes(self):
        """The paths that they write, except those of intermediate pictures."""
        return [path for watcher in self for path in watcher.writes()]

    def wants_stats(self, step):
        """Whether a step, counted from 1, is to be measured."""
        return any(watcher.wants_stats(step) for watcher in self)

    def after_step(self, progress):
        """Does what is due after a step. A RunFailed is reported, and the run continues."""
        for watcher in self:
            try:
                watcher.after_step(progress)
                if progress.step % self.output_iter == 0:
                    watcher.when_due(progress)
            except RunFailed as error:
                log.error(str(error))

    def keep(self):
        """What they keep in a checkpoint, {name: array}."""
        return {name: array for watcher in self for name, array in watcher.keep().items()}


# ---- The web page -----------------------------------------------------------------------------
# Everything it shows, except the picture, arrives in events and is inserted as text, not as HTML.
PAGE = """\
<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>cnn-vis</title>
<link rel="icon" href="data:,">
<style>
:root {
  color-scheme: light dark;
  --back: #f4f2ee; --panel: #fff; --ink: #201e1b; --dim: #716c64; --line: #e0dcd4;
  --accent: #b3501b; --good: #2f7d4f; --bad: #b3261e;
}
@media (prefers-color-scheme: dark) {
  :root {
    --back: #121110; --panel: #1b1a18; --ink: #ece8e1; --dim: #9b958b; --line: #34312d;
    --accent: #f0925a; --good: #6cc48f; --bad: #f2857d;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--back); color: var(--ink);
  font: 15px/1.45 system-ui, sans-serif; font-variant-numeric: tabular-nums;
  display: grid; grid-template-columns: minmax(0, 1fr) 22rem; height: 100vh;
}
main { container-type: size; margin: 1.75rem; display: grid; place-items: center; }
#picture {
  display: block; width: min(100cqw, 100cqh * var(--ratio)); aspect-ratio: var(--ratio);
  border-radius: 4px; box-shadow: 0 2px 18px #0005;
}
#wait { color: var(--dim); }
aside {
  background: var(--panel); border-left: 1px solid var(--line); padding: 1.5rem;
  overflow-y: auto; display: flex; flex-direction: column; gap: 1.5rem;
}
header { display: flex; justify-content: space-between; align-items: center; }
h1 { font-size: 1.05rem; margin: 0; }
h2 { font-size: .8rem; font-weight: 500; color: var(--dim); margin: 0 0 .4rem; }
#state { font-size: .8rem; color: var(--accent); }
#state::before {
  content: ""; display: inline-block; width: .55em; height: .55em; margin-right: .5em;
  border-radius: 50%; background: currentColor;
}
#state.running::before { animation: beat 1.6s ease-in-out infinite; }
#state.done { color: var(--good); }
#state.failed { color: var(--bad); }
#state.stopped, #state.gone { color: var(--dim); }
@keyframes beat { 50% { opacity: .25; } }
@media (prefers-reduced-motion: reduce) { #state::before { animation: none !important; } }
#message { margin: -.75rem 0 0; overflow-wrap: anywhere; }
#message:empty { display: none; }
#where { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .8rem; }
#where small { display: block; font-size: .95rem; line-height: 1.6; color: var(--dim); }
#sizes { display: flex; gap: 3px; height: 8px; }
#sizes i { background: var(--line); border-radius: 4px; min-width: 3px; overflow: hidden; }
#sizes b { display: block; height: 100%; background: var(--accent); }
dl { display: grid; grid-template-columns: repeat(3, 1fr); gap: .5rem; margin: 0; }
dt { font-size: .8rem; color: var(--dim); }
dd { margin: 0; font-size: 1.15rem; }
#curve { display: block; width: 100%; height: 11rem; overflow: visible; }
#curve path { fill: none; stroke: var(--accent); stroke-width: 2; stroke-linecap: round; }
#curve circle { fill: var(--accent); }
#curve line { stroke: var(--line); }
#curve .size { stroke: var(--dim); stroke-dasharray: 1 4; }
#curve text { fill: var(--dim); font-size: 11px; }
#command {
  font: 12px/1.6 ui-monospace, monospace; margin: 0; padding: .8rem; background: var(--back);
  border-radius: 4px; white-space: pre-wrap; user-select: all;
}
#command span { display: inline-block; max-width: 100%; overflow-wrap: anywhere; }
@media (max-width: 55rem) {
  body { display: block; height: auto; }
  main { container-type: inline-size; min-height: 8rem; margin: 1rem; }
  aside { border: 0; }
}
</style>
<main><p id="wait">The picture appears after the next step.</p></main>
<aside>
  <header><h1>cnn-vis</h1><span id="state" role="status" class="gone">connecting</span></header>
  <p id="message"></p>
  <section><p id="where">&nbsp;</p><div id="sizes"></div></section>
  <dl>
    <div><dt>tiles/s</dt><dd id="rate">–</dd></div>
    <div><dt>time left</dt><dd id="left">–</dd></div>
    <div><dt>elapsed</dt><dd id="seconds">–</dd></div>
  </dl>
  <section>
    <h2 id="objective">Objective</h2>
    <svg id="curve" role="img" aria-labelledby="objective"></svg>
  </section>
  <section><h2>Command</h2><pre id="command"></pre></section>
</aside>
<script>
"use strict";
const $ = id => document.getElementById(id);
const run = {};
let source, shown, isAsking = false, isOver;

// Follows a run; when it has ended, waits for the next one at the same address.
function listen() {
  source = new EventSource("events");
  source.onmessage = event => {
    const news = JSON.parse(event.data);
    if (news.command) [shown, isOver] = [-1, false];  // a run's first event
    Object.assign(run, news);
    draw();
    ask();
  };
  source.onerror = () => run.end || say("gone", "not reachable");
}

function say(name, text) {
  $("state").className = name;
  $("state").textContent = text;
}

// Keeps one request for a picture waiting at the server, but none while the page is hidden. The
// last picture is requested even then.
function ask() {
  if (isAsking || isOver || (document.hidden && !run.end)) return;
  const isLast = Boolean(run.end);
  isAsking = true;
  fetch("picture.jpg?after=" + (isLast ? -1 : shown)).then(show).catch(() => 3000).then(pause => {
    isAsking = false;
    isOver = isLast;
    if (isOver) {
      source.close();
      setTimeout(listen, 1000);
    } else {
      setTimeout(ask, run.end ? 0 : pause);
    }
  });
}
document.addEventListener("visibilitychange", ask);

// Shows the picture in a response; returns how many milliseconds to wait before the next request.
async function show(answer) {
  if (answer.status !== 200) return answer.ok ? 0 : 3000;
  const blob = await answer.blob(), next = new Image();
  await new Promise((done, failed) => {
    Object.assign(next, { onload: done, onerror: failed, src: URL.createObjectURL(blob) });
  });
  shown = Number(answer.headers.get("Steps"));
  next.id = "picture";
  next.alt = "The picture after step " + shown;
  next.style.setProperty("--ratio", next.naturalWidth / next.naturalHeight);
  const last = document.querySelector("main > *");
  last.replaceWith(next);
  if (last.src) URL.revokeObjectURL(last.src);
  return 250;
}

function time(seconds) {
  if (seconds === null) return "–";
  const s = Math.round(seconds), two = n => String(n).padStart(2, "0");
  const h = Math.floor(s / 3600), m = Math.floor(s / 60) % 60;
  return h ? h + ":" + two(m) + ":" + two(s % 60) : m + ":" + two(s % 60);
}

function draw() {
  const [height, width] = run.sizes[run.size - 1], count = run.sizes.length;
  const [end, message] = run.end || ["running", ""];
  say(end, end);
  $("message").textContent = message;
  const size = count > 1 ? "size " + run.size + " of " + count + ", " : "";
  const small = document.createElement("small");
  small.textContent = run.batch + size + width + " × " + height;
  $("where").replaceChildren("Step " + run.step + " of " + run.steps, small);
  drawSizes();
  $("rate").textContent = run.rate ? run.rate.toFixed(1) : "–";
  $("left").textContent = run.end ? "–" : time(run.left);
  $("seconds").textContent = time(run.seconds);
  drawCommand();
  drawCurve();
  const sum = list => list.reduce((a, b) => a + b, 0);
  const before = sum(run.tiles.slice(0, run.size - 1)) * run.steps;
  const part = (before + run.step * run.tiles[run.size - 1]) / (sum(run.tiles) * run.steps);
  document.title = (run.end ? end : Math.floor(100 * part) + "%") + " · cnn-vis";
}

// Lines break between options only.
function drawCommand() {
  if ($("command").textContent === run.command) return;
  $("command").replaceChildren(...run.command.split(/(?<= )(?=--)/).map(words => {
    const span = document.createElement("span");
    span.textContent = words;
    return span;
  }));
}

// A bar for each size, as long as its share of the work.
function drawSizes() {
  const bars = $("sizes").children;
  while (bars.length > run.tiles.length) bars[0].remove();
  while (bars.length < run.tiles.length) {
    const bar = document.createElement("i");
    bar.append(document.createElement("b"));
    $("sizes").append(bar);
  }
  run.tiles.forEach((tiles, i) => {
    bars[i].style.flexGrow = tiles;
    const part = i + 1 < run.size ? 1 : i + 1 > run.size ? 0 : run.step / run.steps;
    bars[i].firstChild.style.width = 100 * part + "%";
  });
}

// About `number` round numbers from low to high.
function ticks(low, high, number) {
  const raw = (high - low) / number, power = 10 ** Math.floor(Math.log10(raw));
  const step = power * [1, 2, 5, 10].find(n => n * power >= raw), found = [];
  for (let n = Math.ceil(low / step); n * step <= high; n++) found.push(n * step);
  return found;
}

function drawCurve() {
  const svg = $("curve"), points = run.curve, left = 44, bottom = 18;
  const width = svg.clientWidth - 6, height = svg.clientHeight - bottom;
  svg.replaceChildren();
  if (!points.length) return;
  const round = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 });
  const add = (name, values, text = "") => {
    const item = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const key in values) item.setAttribute(key, values[key]);
    item.textContent = text;
    svg.append(item);
  };
  const [xs, ys] = [0, 1].map(i => points.map(point => point[i]));
  const first = xs[0], last = Math.max(xs[xs.length - 1], first + 1);
  let low = Math.min(...ys), high = Math.max(...ys);
  const room = (high - low) * .06 || Math.abs(high) * .1 || 1;
  low -= room;
  high += room;
  const x = step => left + (width - left) * (step - first) / (last - first);
  const y = value => 4 + (height - 4) * (high - value) / (high - low);
  for (const value of ticks(low, high, 5)) {
    add("line", { x1: left, x2: width, y1: y(value), y2: y(value) });
    add("text", { x: left - 8, y: y(value) + 4, "text-anchor": "end" }, round.format(value));
  }
  for (let n = run.steps + .5; n < last && run.sizes.length < 50; n += run.steps) {
    if (n > first) add("line", { class: "size", x1: x(n), x2: x(n), y1: 4, y2: height });
  }
  add("text", { x: left, y: height + 15 }, "step " + first);
  add("text", { x: width, y: height + 15, "text-anchor": "end" }, xs[xs.length - 1]);
  const sizeOf = point => point ? Math.ceil(point[0] / run.steps) : 0;
  const pen = (point, i) => sizeOf(point) === sizeOf(points[i - 1]) ? "L" : "M";
  const path = points.map((p, i) => pen(p, i) + x(p[0]).toFixed(1) + " " + y(p[1]).toFixed(1));
  add("path", { d: path.join("") });
  add("circle", { cx: x(xs[xs.length - 1]), cy: y(ys[ys.length - 1]), r: 3.5 });
  $("objective").textContent = "Objective: " + round.format(ys[ys.length - 1]);
}
addEventListener("resize", () => run.curve && drawCurve());
listen();
</script>
</html>
"""


@functools.cache
def page_headers():
    """The headers of every response: nothing is cached, and the page loads only from its server."""
    import base64

    rules = ["default-src 'none'", "connect-src 'self'", "img-src blob: data:"]
    for kind, text in re.findall(r"<(style|script)>(.*?)</", PAGE, re.DOTALL):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        rules.append(f"{kind}-src 'sha256-{digest}'")
    rules += ["frame-ancestors 'none'", "base-uri 'none'", "form-action 'none'"]
    return {
        "Cache-Control": "no-store",
        "Content-Security-Policy": "; ".join(rules),
        "Cross-Origin-Resource-Policy": "same-origin",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }


# ---- A run ------------------------------------------------------------------------------------

fill_parser()


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
        check_room(settings, dream.sizes, engine.tile_size, options.scratch, held)
        dream.check_mask()
        yield dream, network, [*remarks, *dream.remarks]


class Signals:
    """A context manager that handles Ctrl-C, SIGTERM and SIGHUP. A signal raises Stopped, unless
    `held`: then the first is only remembered, as `signum`, so that the run ends at a point where it
    can be continued; another Ctrl-C raises Stopped. The third ends the process.

    See also signals_held_back, which is used while processes start."""

    def __init__(self):
        self.held, self.signum, self._count = False, None, 0

    def __enter__(self):
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        handlers = {number: signal.getsignal(number) for number in numbers}
        # Signals that are ignored already stay so: by nohup, or by a shell for background jobs.
        self._before = {n: handler for n, handler in handlers.items() if handler != signal.SIG_IGN}
        for number in self._before:
            signal.signal(number, self._handle)
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def hold(self, held=True):
        """From now on the first signal is only remembered, or with False raises Stopped. Raises
        Stopped if a signal has come already: C code may have swallowed its exception."""
        self.held = held
        if self.signum:
            raise Stopped(self.signum)

    def _handle(self, signum, _):
        self._count += signum == signal.SIGINT or not self.held or not self.signum
        if self._count > 2:
            os._exit(128 + signum)
        if self.held and self.signum and signum != signal.SIGINT:
            return  # supervisors often signal the process, then its group
        is_first, self.signum = not self.signum, self.signum or signum
        if not (self.held and is_first):
            raise Stopped(signum)
        if sys.stderr.isatty():
            text = "Saving the run; press Ctrl-C again to stop immediately."
            os.write(2, f"\n{text}\n".encode())


LEAST_LIMITS = {  # ulimit's letter: (the resource, the fewest bytes that libraries need)
    "v": (resource.RLIMIT_AS, 600 << 20),
    "d": (resource.RLIMIT_DATA, 250 << 20),
}


def check_surroundings():
    """Raises BadRequest if the current directory is gone or the shell's memory limits are too
    low."""
    try:
        os.getcwd()
    except OSError:
        raise BadRequest("the current directory no longer exists", "change to another") from None
    for letter, (limit, least) in LEAST_LIMITS.items():
        soft = resource.getrlimit(limit)[0]
        if soft != resource.RLIM_INFINITY and soft < least:
            problem = "too little memory to start; allow at least"
            raise BadRequest(f"ulimit -{letter} {soft >> 10}: {problem} {least >> 10}")


def plan_outputs(options, files, watchers):
    """The paths that the run writes, except checkpoints and intermediate pictures. Raises
    BadRequest if one cannot be written."""
    check_output("output", files.picture)
    check_depth(files.picture, options.depth)
    if options.stats:
        check_output("stats", options.stats)
    writes_record = options.sidecar or is_record(files.sidecar)  # one that is out of date goes
    outputs = [files.picture, *([files.sidecar] if writes_record else []), *watchers.writes()]
    for path in outputs:
        if problem := unwritable(path):
            problem = f"the run needs to write {path}, but that is {problem}"
            raise refusal("output", files.picture, problem, "choose another name")
    try:
        folder = os.path.dirname(os.path.realpath(files.picture))
        others = {*outputs} - {options.stats}  # whose folder has been tried
        is_new = not all(map(os.path.exists, others))
        if is_new or options.checkpoint_iter != 0 or "save" in options.iter_behavior:
            try_folder(folder)
    except OSError as error:
        problem = f"{folder}, where the run saves more, cannot be written ({error.strerror})"
        remedy = "add --checkpoint_iter 0 --iter_behavior none, or choose another name"
        raise refusal("output", files.picture, problem, remedy) from None
    return outputs


def check_apart(options, files, network):
    """Raises BadRequest if the run would overwrite a file that it reads, or write two files under
    one name."""
    read = PARSER.files_read(options)
    read |= {"caffe_model": network.weights, "deploy_txt": network.deploy, "resume": files.resumed}
    read = {name: path for name, path in read.items() if path}
    for name, path in read.items():
        is_own_checkpoint = name == "resume" and Files.of_checkpoint(path) is not None
        if not is_own_checkpoint and files.may_write(path):
            problem = f"the run would overwrite --{name} {path}"
            raise refusal("output", files.picture, problem, "choose another name")
    if options.stats:
        taken = {os.path.realpath(path) for path in read.values()}
        if files.may_write(options.stats) or os.path.realpath(options.stats) in taken:
            problem = "the run uses another file of this name"
            raise refusal("stats", options.stats, problem, "choose another name")


def saved_options(path, checkpoint):
    """The options that the run in the Checkpoint `path` was started with, with absolute paths.
    Raises BadRequest."""
    try:
        saved = kept_options(checkpoint.record)
    except ValueError as error:
        raise unusable(path, str(error)) from None
    PARSER.make_absolute(saved, checkpoint.folder)
    saved.output_file = Files.of_checkpoint(path)
    return saved


def resume(path, argv, scratch=None):
    """(options, Checkpoint) of the run that the checkpoint `path` belongs to, with the changes that
    `argv` makes. Raises BadRequest."""
    checkpoint = Checkpoint.read(existing_file("resume", path), ARRAYS, scratch)
    saved = saved_options(path, checkpoint)
    options = PARSER.parse_args(argv, copy.copy(saved))
    options.target_layer = repeated_layer(options, saved, checkpoint)
    check_unchanged(path, saved, options)
    if options.output_file is None:
        raise refusal(
            "resume", path, "its name does not show which picture to write", "use --output"
        )
    if names_several(options.output_file):
        problem = "a resumed run makes one picture"
        raise refusal("output", options.output_file, problem, "use a file name")
    return options, checkpoint


def repeated_layer(options, saved, checkpoint):
    """The options' --layer; if it repeats the words for channels of the run that wrote the
    Checkpoint, with the numbers that this run found for them, which are in its `saved` options."""
    asked = options.target_layer
    return saved.target_layer if is_layer_of(checkpoint.record, asked) else asked


def is_layer_of(record, objective):
    """Whether a run with this record was started with `objective` as its --layer."""
    return PARSER.parse_args([f"--layer={record.get('layer')}"]).target_layer == objective


def check_unchanged(path, saved, options):
    """Raises BadRequest if one of the `options` that must stay the same differs from `saved`, the
    options of the run that wrote the checkpoint `path`."""
    for action, old, new in PARSER.fixed_differences(saved, options):
        if names_file(action, new) and not isinstance(new, list) and os.path.abspath(new) == old:
            continue
        old, new = (v if v is None else " ".join(map(action.text, listed(v))) for v in (old, new))
        name = action.option_strings[-1].removeprefix("--")
        drop = f"--preset {options.preset}" if options.preset else "the option"
        problem = f"cannot be changed when resuming ({path} has {old})"
        raise refusal(name, new, problem, f"drop {drop}")


def check_same_network(path, record, network):
    """Raises BadRequest if the run in the checkpoint `path` was started with another network."""
    found = identify(network)
    options = {"weights_sha256": "caffe_model", "deploy_sha256": "deploy_txt", "mean": "mean_image"}
    for name, option in options.items():
        if record[name] != found[name]:
            is_not = f"{name} {found[name]}, not {record[name]}"
            problem = f"differs from what {path} was started with ({is_not})"
            raise refusal(option, "", problem, "pass the original file")


@dataclasses.dataclass
class Inputs:
    """A run's input pictures, None for those that it does not have: the start picture, uint8
    (H, W, 3); its mask, uint8 (H, W); the guide, uint8 (H, W, 3)."""

    picture: np.ndarray | None = None
    mask: np.ndarray | None = None
    guide: np.ndarray | None = None

    def arrays(self):
        """Those that are not None, {name: array}."""
        return {name: array for name, array in vars(self).items() if array is not None}


def read_inputs(settings, image=None):
    """(Inputs, remarks on how it was read) for the settings. If the array `image` is passed, it is
    the start picture. Raises BadRequest."""
    if image is not None or settings.initial_image is None:
        picture, (mask, remarks) = image, read_mask(settings.mask, image)
    else:
        path = existing_file("image", settings.initial_image)
        picture, mask, remarks = read_masked(path, settings.background, settings.mask)
    guide = None
    if settings.guide is not None:
        path = existing_file("guide", settings.guide)
        guide, more = read_picture(path, settings.background, "guide")
        remarks = [*remarks, *more]
        if max(guide.shape[:2]) > 16 * min(guide.shape[:2]):
            problem = "one side is more than 16 times as long as the other"
            raise refusal("guide", path, problem, "crop the picture")
    return Inputs(picture, mask, guide), remarks


def kept_inputs(settings, checkpoint, path):
    """The Inputs of a resumed run, removed from its Checkpoint `path`. Raises BadRequest."""
    asked = {"picture": settings.initial_image, "mask": settings.mask, "guide": settings.guide}
    inputs = Inputs(**{name: checkpoint.arrays.pop(name, None) for name in asked})
    for name, option in asked.items():
        array = getattr(inputs, name)
        if (array is None) != (option is None) or (array is not None and not array.size):
            raise unusable(path, f"its {name} is missing, empty or unexpected")
    mask, picture = inputs.mask, inputs.picture
    fits = mask is None or picture is not None and mask.shape == picture.shape[:2] and mask.any()
    if not fits:
        raise unusable(path, "its mask is black everywhere or does not fit its picture")
    return inputs


@dataclasses.dataclass
class Batch:
    """The place of a run among several: how many there are; its number, from 1; how many tiles
    the earlier ones had; and the port on which web showed them."""

    count: int = 1
    number: int = 1
    done: int = 0
    port: int = 0

    def __str__(self):
        return f"picture {self.number}/{self.count}, " if self.count > 1 else ""


@dataclasses.dataclass
class Run:
    """A run in progress: what its stages and watchers share. `kept` holds the arrays that watchers
    stored in the checkpoint that it continues from."""

    options: argparse.Namespace
    files: Files
    watchers: Watchers
    inputs: Inputs
    dream: object
    record: dict
    kept: dict
    batch: Batch

    def __post_init__(self):
        self.begun = time.monotonic() - self.record["seconds"]
        self.folder = os.getcwd()  # now, because it may be deleted during the run

    def made(self, **more):
        """The record of how the picture as it stands was made."""
        return self.record | {"seconds": round(time.monotonic() - self.begun, 1)} | more

    def checkpoint(self):
        """The run so far, as a Checkpoint."""
        numbers, arrays = self.dream.state()
        arrays |= self.inputs.arrays() | self.kept | self.watchers.keep()
        return Checkpoint(self.made(), self.folder, numbers, arrays)


def make_picture(options, signals, engines, checkpoint=None, batch=None):
    """Makes the picture that the options ask for, continuing from `checkpoint` if there is one.
    `batch` is its place among several pictures."""
    files = Files(options.output_file, options.resume)
    watchers = Watchers(options, files)
    outputs = plan_outputs(options, files, watchers)
    settings, batch = Settings.of(options), batch or Batch()
    if checkpoint is None:
        inputs, remarks = read_inputs(settings)
    else:
        inputs, remarks = kept_inputs(settings, checkpoint, options.resume), []
    network = find_network(options)
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
        record = make_record(options, dream.settings, network, dream.sizes, earlier)
        record["device"] = "GPU" if dream.engine.spec.use_gpu else "CPU"
        kept = {}
        if checkpoint is not None:
            record["seconds"], kept = checkpoint.record["seconds"], checkpoint.arrays
            begun_on = checkpoint.record.get("device", record["device"])
            if begun_on != record["device"]:
                rounding = f"a {record['device']} rounds differently"
                more = [*more, f"this run was started on a {begun_on}; {rounding}"]
            restore(dream, checkpoint, options.resume)
        check_sides(files.picture, dream.sizes)
        announce(options, network, dream, [*remarks, *more], batch)
        make_room(options, files)
        watch(Run(options, files, watchers, inputs, dream, record, kept, batch), signals)


def check_layers(jobs, network):
    """Raises BadRequest if the network lacks a layer or channel that one of the `jobs`, which are
    options, asks for."""
    targets = dict.fromkeys(t for job in jobs for t in Settings.of(job).objective().targets)
    with contextlib.suppress(CaffeStopped):  # a layer that is not needed may stop it
        in_a_worker(check_targets, network, jobs[0].input_size, tuple(targets))


# Several pictures in one run of the program: each is made as if it were the only one, with its own
# options.


def plan_batch(options):
    """(the options of each picture, in order, if `options` ask for several or their output name is
    a template, otherwise None; a list of notices). Raises BadRequest."""
    images, layers, notices = [], listed(options.target_layer), []
    output = options.output_file
    for path in listed(options.initial_image):
        is_folder = path and os.path.isdir(path)
        if is_folder and not names_several(output):
            problem = "this is a folder"
            raise refusal(
                "image", path, problem, "to use every picture in it, add --output FOLDER/"
            )
        if is_folder and os.path.realpath(path) == os.path.realpath(os.path.dirname(output) or "."):
            problem = f"its pictures would mix with those of --image {path}"
            raise refusal("output", output, problem, "use another folder")
        found, skipped = pictures_in(path) if is_folder else ([path], [])
        images += found
        if skipped:
            why = "not a picture, or its reader is not installed"
            notices.append(f"{path}: skipped {some(skipped)}: {why}")
    images, layers = list(dict.fromkeys(images)), list(dict.fromkeys(layers))  # each once
    template = output + ("{name}_{layer}.png" if output.endswith("/") else "")
    unknown = set(re.findall(r"\{\w*\}", template)) - {"{name}", "{layer}"}
    if unknown and names_several(output):
        problem = f"{min(unknown)} stands for nothing"
        raise refusal("output", output, problem, "use {name} and {layer}")
    if len(images) * len(layers) == 1 and not names_several(output):
        options.initial_image = images[0]
        return None, notices
    jobs, taken, names = [], {}, names_of(images)
    for layer, image in itertools.product(layers, images):
        job = copy.copy(options)
        job.initial_image, job.target_layer = image, layer
        job.output_file = filled(template, names[image], layer)
        job.stats = job.stats and filled(job.stats, names[image], layer)
        job.sidecar = job.sidecar or extension_of(job.output_file) != ".png"  # is_made reads it
        for option, path in {"output": job.output_file, "stats": job.stats}.items():
            if path and taken.setdefault(os.path.realpath(path), job) is not job:
                if image:  # which may be an option with the wrong dashes
                    existing_file("image", image)
                problem = f"{len(images) * len(layers)} pictures, and several would write {path}"
                remedy = "use {name} and {layer} in the name"
                if option == "output" and "{name}" in template and "{layer}" in template:
                    remedy = "use pictures with different names"
                elif option == "output":
                    remedy += ", or FOLDER/"
                raise refusal(option, path, problem, remedy)
        jobs.append(job)
    check_batch_apart(jobs)
    return jobs, notices


def check_batch_apart(jobs):
    """Raises BadRequest if one picture's run could overwrite a file that another's reads or
    writes."""
    outputs = {os.path.realpath(job.output_file) for job in jobs}
    stems = {os.path.splitext(path)[0] for path in outputs}
    for job in jobs:
        named = {"image": job.initial_image, "output": job.output_file, "stats": job.stats}
        for option, path in named.items():
            if not path:
                continue
            real = os.path.realpath(path)
            pictures, their_stems = Files.owners(real)
            own = {real} if option == "output" else set()
            if outputs & pictures - own or stems & their_stems:
                problem = f"the run would overwrite --{option} {path}"
                raise refusal("output", job.output_file, problem, "choose another name")


def filled(template, name, layer):
    """The file name `template`, with {name} and {layer} replaced by a start picture's name and the
    --layer, the latter without what shells or file systems reserve."""
    values = {"{name}": name, "{layer}": re.sub(r"[^\w.,+-]+", "-", str(layer))}
    return re.sub("|".join(values), lambda found: values[found[0]], template)


def names_of(images):
    """What {name} stands for, {path of a start picture: name}: the file's name without its ending,
    which joins it where another picture's differs only in that (IMG_1.JPG, IMG_1.HEIC)."""
    parts = {image: os.path.splitext(os.path.basename(image or "noise")) for image in images}
    endings = collections.defaultdict(set)
    for stem, ending in parts.values():
        endings[stem].add(ending)
    return {
        image: stem + ending.replace(".", "_") if len(endings[stem]) > 1 else stem
        for image, (stem, ending) in parts.items()
    }


def pictures_in(folder):
    """(paths of the pictures in a folder, names of files that may be pictures but are skipped),
    both sorted. Files without an ending count if they contain a picture. Raises BadRequest."""
    from PIL import Image

    Image.init()
    known = {ending for ending, form in Image.EXTENSION.items() if form in Image.OPEN}
    known = known - NOT_PICTURES | {*HEIC, *RAW}
    known |= {".jxl"} if importlib.util.find_spec("pillow_jxl") else set()
    try:
        names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError as error:
        raise refusal("image", folder, error.strerror, "use another folder") from None
    paths, skipped = [], []
    for name in names:
        path, ending = os.path.join(folder, name), extension_of(name)
        if not os.path.isfile(path):
            continue
        if ending in known or ending in ("", ".") and is_picture(path):
            paths.append(path)
        elif ending in ("", ".", ".jxl"):
            skipped.append(name)
    if not paths:
        also = f", only {some(skipped)}" if skipped else ""
        problem = f"there are no pictures in this folder{also}"
        raise refusal("image", folder, problem, "use another")
    return paths, skipped


def is_picture(path):
    """Whether a file, whatever its name, begins like a picture that can be read."""
    from PIL import Image

    try:
        with open(path, "rb") as file:
            import_plugins(file.read(64))
        with warnings.catch_warnings(), Image.open(path) as picture:
            warnings.simplefilter("ignore")
            return f".{picture.format.lower()}" not in NOT_PICTURES
    except Exception:  # it may contain anything
        return False


def make_pictures(jobs, notices, signals, engines, make_picture, check_layers):
    """Makes a picture for each of the `jobs`, which are its options, and continues where an earlier
    run of the same command stopped. Logs the `notices` once all is checked. If some pictures fail,
    makes all others, then raises RunFailed. make_picture and check_layers are the script's."""
    for job in jobs:
        check_format(job.output_file)
        check_depth(job.output_file, job.depth)
        for name, path in PARSER.files_read(job, free=False).items():
            existing_file(name, path)
    network = find_network(jobs[0])
    for job in jobs if network.scale != 1 else ():
        job.input_scale = network.scale  # as records of finished pictures have it
    check_layers(jobs, network)
    for job in jobs:
        make_folder_of(job.output_file)
        check_output("output", job.output_file)
        if job.stats:
            check_output("stats", job.stats)
    for notice in notices:
        log.info(f"note: {notice}")
    identity = identify(network)
    left = [job for job in jobs if not is_made(job, identity)]
    if len(left) < len(jobs):
        log.info(f"note: {len(jobs) - len(left)} of {len(jobs)} pictures are there already")
    failed, batch = 0, Batch(len(left))
    for batch.number, job in enumerate(left, 1):
        try:
            signals.hold(False)
            begun, checkpoint = under_way(job)
            try:
                make_picture(begun, signals, engines, checkpoint, batch)
            except BadRequest:
                if checkpoint is None:
                    raise
                make_picture(job, signals, engines, None, batch)  # the checkpoint does not fit
        except Stopped as stop:
            hint = "run the same command again to make the rest"
            raise Stopped(stop.signum, f"{stop}; {hint}") from None
        except (BadRequest, RunFailed, MemoryError) as error:
            engines.close()
            if batch.number == 1 and isinstance(error, BadRequest) and not is_of_one(error):
                raise
            failed += 1
            error = OutOfMemory() if isinstance(error, MemoryError) else error
            log.error(f"error: {job.output_file}: {one_line(error)}")
    if failed:
        raise RunFailed(f"{failed} of {len(left)} pictures could not be made; see above")


def is_of_one(error):
    """Whether a BadRequest is about one picture; others of a batch can be made nevertheless."""
    options = {"image", "initial_size", "final_size", "output"}
    return error.option in options or (error.option, error.value) == ("mask", "alpha")


def make_folder_of(path):
    """Creates the folder of the file `path` if it does not exist. Raises BadRequest."""
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    except OSError as error:
        problem = f"its folder cannot be created ({error.strerror})"
        raise refusal("output", path, problem, "choose another") from None


def is_made(options, identity):
    """Whether the picture that the options ask for exists, and according to its record is finished
    and was made from the same pictures with the same settings and the network `identity`."""
    path = options.output_file
    try:
        record, _ = read_record(path)
        saved = kept_options(record)
    except (BadRequest, ValueError):
        return False
    for action, old, new in PARSER.fixed_differences(saved, options):
        are_files = names_file(action, old) and names_file(action, new)
        is_open = action.dest == "seed" and new is None
        is_repeated = action.dest == "target_layer" and is_layer_of(record, new)
        if not (are_files or is_open or is_repeated):
            return False
    expected = identity | {"inputs": inputs_of(options)}
    is_same = all(record.get(name) == value for name, value in expected.items())
    return os.path.isfile(path) and "step" not in record and is_same


def under_way(options):
    """(options, Checkpoint) to continue one of several pictures, if it was started with the same
    options; otherwise the options unchanged, and None."""
    path, begun = Files(options.output_file).checkpoint, copy.copy(options)
    if not os.path.isfile(path):
        return options, None
    try:
        checkpoint = Checkpoint.read(path, ARRAYS, options.scratch)
        saved = saved_options(path, checkpoint)
        begun.seed = saved.seed if begun.seed is None else begun.seed
        begun.target_layer = repeated_layer(begun, saved, checkpoint)
        check_unchanged(path, saved, begun)
        begun.resume = path
        return begun, checkpoint
    except BadRequest:
        return options, None


def restore(dream, checkpoint, path):
    """Restores the dream's state from the checkpoint, and removes all but the watchers' arrays from
    the checkpoint. Raises BadRequest."""
    try:
        dream.restore(checkpoint.numbers, checkpoint.arrays)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise unusable(path, one_line(error)) from None
    for name in RUN_ARRAYS:
        checkpoint.arrays.pop(name, None)


def announce(options, network, dream, remarks, batch):
    """Logs what is about to be done; what holds for all pictures of a Batch, only at the first one.
    Called after all checks, so that an error is the only line printed."""
    engine, notices = dream.engine, []
    if batch.number == 1:
        stand_in = stand_in_notice(options.model, network.name)
        notices = [stand_in, *idle(options, engine), *network.notices]
    for line in filter(None, [*notices, *remarks, *engine.notices]):
        log.info(f"note: {line}")
    seed = f", noise seed {dream.settings.seed}" if dream.picture is None else ""
    layers = [target.layer for target in dream.settings.target_layer.targets]
    shapes = " + ".join("x".join(map(str, engine.shapes[layer])) for layer in layers)
    log.info(
        f"{network.name} ({network.weights}), {dream.settings.target_layer} "
        f"{shapes}, "
        f"{engine.device}, "
        f"sizes {' '.join(f'{h}x{w}' for h, w in dream.sizes)}{seed}"
    )


def make_room(options, files):
    """Removes the unfinished files that killed runs for the same picture left, and renames the
    checkpoint of an unfinished run."""
    for path in filter(None, (files.picture, options.stats)):
        remove_parts(path)
    old = files.set_aside()
    if old:
        hint = f"continue it with --resume {shell_path(old)}"
        log.info(f"note: an unfinished earlier run for {files.picture} was kept; {hint}")


def watch(run, signals):
    """Does the run with its watchers. However it ends, the picture so far is written, but not in
    place of another one before the first step. Raises RunFailed, or Stopped after a signal."""
    dream = run.dream
    signals.hold()
    with contextlib.ExitStack() as stack:
        for watcher in run.watchers:
            watcher.begin(run)
            stack.callback(watcher.close)
        try:
            for progress in dream.run(run.watchers.wants_stats, lambda: signals.signum):
                run.watchers.after_step(progress)
        except Stopped as stop:
            raise Stopped(stop.signum, f"stopped immediately{run.files.hint()}") from None
        except (RunFailed, MemoryError, OSError) as error:
            raise RunFailed(salvage(run, error)) from None
        except Exception:  # a bug in this program: save the picture, show the traceback
            with contextlib.suppress(Exception):
                finish(run)
            raise
        stopped = not dream.is_done()
        if stopped and run.options.checkpoint_iter != 0:
            try:
                run.checkpoint().write(run.files.checkpoint)
            except RunFailed as error:
                log.error(str(error))
        if stopped and not has_begun(run):
            raise Stopped(signals.signum, f"stopped before the first step{run.files.hint()}")
        try:
            finish(run)
        except RunFailed as error:
            raise RunFailed(f"{error}{rescue(run)}") from None
    if stopped:
        where = f"the picture so far is in {run.files.picture}"
        raise Stopped(signals.signum, f"stopped; {where}{run.files.hint()}")
    seconds = int(time.monotonic() - run.begun)
    log.info(f"{run.files.picture}: done in {seconds // 60:02}:{seconds % 60:02}")
    run.files.clean_up()


def finish(run):
    """Writes the picture as it stands, and everything that goes with it. Raises RunFailed."""
    dream, files = run.dream, run.files
    progress = dream.progress()
    picture = progress.picture(run.options.rescale_image, run.options.depth)
    where = {} if dream.is_done() else {"size": dream.size, "step": dream.step}
    record = run.made(**where)
    write_picture(picture, files.picture, record, f"--output {files.picture}")
    if run.options.sidecar or not remove_record(files.sidecar):
        with whole_file(files.sidecar) as file:
            file.write(json.dumps(record, indent=1).encode())
    failures = []
    for watcher in run.watchers:
        try:
            watcher.finish(progress)
        except RunFailed as error:
            failures.append(str(error))
    if failures:
        raise RunFailed("; ".join(failures))


def remove_record(path):
    """Removes the sidecar `path` of an earlier picture, unless it is some other kind of file;
    returns False if it cannot be removed."""
    with contextlib.suppress(OSError):
        if is_record(path):
            os.remove(path)
    return not is_record(path)


def is_record(path):
    """Whether the file `path` is the sidecar of a picture."""
    try:
        return os.path.isfile(path) and bool(read_record(path))
    except BadRequest:
        return False


def has_begun(run):
    """Whether the picture is worth more than the file, if any, that it would replace."""
    return run.dream.progress().steps_done() or not os.path.exists(run.files.picture)


def salvage(run, error):
    """Writes the picture so far, if any, of a run that failed during a step; returns the message
    to show."""
    error = OutOfMemory() if isinstance(error, MemoryError) else error
    if run.dream.image is None:
        return str(error)
    is_sound = not isinstance(error, (NotFinite, OutOfMemory)) and run.dream.is_laid_out()
    if is_sound and run.options.checkpoint_iter != 0:
        with contextlib.suppress(RunFailed):
            run.checkpoint().write(run.files.checkpoint)
    hint = "" if isinstance(error, NotFinite) else run.files.hint()
    if not has_begun(run):
        return f"{error}{hint}"
    try:
        finish(run)
    except RunFailed:
        return f"{error}{hint}"
    return f"{error}; the picture so far is in {run.files.picture}{hint}"


def rescue(run):
    """Saves the checkpoint of a run whose picture could not be written, in the temporary folder if
    need be; returns how to continue."""
    files = run.files
    with contextlib.suppress(RunFailed):
        run.checkpoint().write(files.checkpoint)
        return files.hint()
    stats = run.options.stats
    is_gone = stats and not os.path.isdir(os.path.dirname(os.path.realpath(stats)))
    with contextlib.suppress(OSError):
        folder = tempfile.mkdtemp(prefix="cnn-vis-")
        files.checkpoint = os.path.join(folder, os.path.basename(files.checkpoint))
        try:
            run.checkpoint().write(files.checkpoint)
        except RunFailed:
            os.rmdir(folder)
            return ""
        more = " --stats ANOTHER.csv" if is_gone else ""
        return f"{files.hint()} --output ANOTHER.png{more}"
    return ""


def keyword_options(options):
    """The options that the keyword arguments of dream() stand for. Raises BadRequest."""
    for name in ("mask", "guide"):
        if not isinstance(options.get(name), (str, os.PathLike, type(None))):
            raise BadRequest(f"{name}: this must be a file name", "save an array as a PNG")
    words = [
        f"--{name}" if value is True else f"--{name}={value}"
        for name, value in options.items()
        if value is not False and value is not None
    ]
    for name in ("help", "version", "resume", *COMMANDS):
        if options.get(name):
            raise BadRequest(f"{name}: only available on the command line")
    parsed = PARSER.parse_args(words)
    if PARSER.several(parsed):
        raise BadRequest("layer, image: only one at a time", "call dream() for each")
    return parsed


def checked_array(image):
    """An RGB picture as a NumPy array, uint8 (H, W, 3). Raises BadRequest if it is none."""
    try:
        image = np.asarray(image)
    except (ValueError, TypeError) as error:
        raise BadRequest(f"image: {one_line(error)}", "it must be uint8 (H, W, 3)") from None
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        kind = f"the array is {image.dtype} {image.shape}"
        raise BadRequest(f"image: {kind}", "it must be uint8 (H, W, 3)")
    return image


def dream(image=None, **options):
    """The program as a library: performs a run and yields a Progress after every step.

        for progress in cnn_vis.dream("in.jpg", layer="inception_4c/output", num_steps=20):
            picture = progress.picture()  # uint8 (H, W, 3)

    `image` is a file name, an RGB array, uint8 (H, W, 3) (or what NumPy can convert to one), or
    None for noise. The options are those of the command line, by any of their names and with the
    same defaults; output options have no effect. Notices go to the logger "cnn_vis". Raises
    BadRequest, when the first step is requested, and RunFailed.
    """
    parsed = keyword_options(options)
    image = parsed.initial_image if image is None else image
    if isinstance(image, (str, os.PathLike)):
        parsed.initial_image = expanded(os.fspath(image), os.path.exists(image))
        image = None
    settings = Settings.of(parsed)
    if image is not None:
        image = checked_array(image)
        parsed.initial_image = "an array"  # for notices
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


# ---- Commands ---------------------------------------------------------------------------------


def list_presets(options):
    """Prints the presets with their options."""
    for name, words in PRESETS.items():
        say(f"{name:10} {' '.join(words.split())}")


def list_models(options):
    """Prints the networks known by name, with size, whether verified, and path."""
    for model in MODELS.values():
        path = model.find_weights()
        if path is None:
            command = f"{COMMAND} --download_model {model.name}"
            say(f"{model.name:20} not installed; {command}")
        else:
            size = os.path.getsize(path) / 1e6
            say(f"{model.name:20} {size:5.1f} MB, {standing(path, model)}: {path}")


def list_layers(options):
    """Prints the layers that can be amplified, in order, each with its shape for one tile."""
    for name, shape, layer in find_layers(options):
        other = "" if layer == name else f"  (layer {layer})"
        say(printable(f"{quoted(name):32} {'x'.join(map(str, shape))}{other}"))


def list_classes(options):
    """Prints the classes of the network's classifier, with their numbers, as --layer takes them."""
    layers = [(name, shape[0]) for name, shape, _ in find_layers(options) if is_flat(shape)]
    width = next((width for _, width in layers if class_names(width)), None)
    if width:
        log.info(f"note: channels of {some([name for name, n in layers if n == width])}")
        for number, line in enumerate(class_names(width)):
            say(f"{number:4} {line}")
        return
    known = some([f"{name} ({width})" for width, name in CLASSES.items()])
    problem = f"this network has no classifier with known classes, which are those of {known}"
    raise refusal("list_classes", "", problem, "use another --model")


def find_layers(options):
    """[(blob, shape of one tile's activations, layer that makes it), ...] for everything that can
    be amplified in the network of the options; logs what cannot. Raises BadRequest."""
    files = find_files(options)
    without, stops = [], []
    while True:
        try:
            arguments = (layer_shapes, files, options.input_size, tuple(without))
            layers, notices, _ = in_a_worker(*arguments)
            break
        except CaffeStopped as error:
            if len(without) == 9:
                problem = f"Caffe cannot load it ({error})"
                raise refusal("deploy_txt", files.deploy, problem, "check the file") from None
            without.append(first_to_fail(*arguments))
            stops.append(f"{LEFT_OUT}: {without[-1]} ({error})")
    stand_in = stand_in_notice(options.model, files.name)
    for notice in filter(None, [stand_in, *notices, *stops]):
        log.info(f"note: {notice}")
    return layers


def first_to_fail(*arguments):
    """The name of the first layer at which Caffe ends its process; `arguments` are those with which
    in_a_worker failed. Found by bisection, because the process ends before it can report it."""
    names = in_a_worker(*arguments, 0)[2]
    low, high = 0, len(names)  # the first `low` layers load, the first `high` do not
    while high - low > 1:
        middle = (low + high) // 2
        try:
            in_a_worker(*arguments, middle)
            low = middle
        except CaffeStopped:
            high = middle
    return names[high - 1]


def download_model(options):
    """Downloads a network and checks it."""
    model = MODELS[options.download_model]
    deploy = model.find_deploy()
    if deploy is None:
        remedy = f"Caffe is needed to check the download; {how_to_install('pycaffe')}"
        raise refusal("download_model", model.name, remedy)
    check = functools.partial(in_a_worker, structure_error, deploy)
    url = options.model_url or model.url
    if not re.match("https?://.", url, re.IGNORECASE):
        raise refusal("model_url", url, "use the address of a file, http://... or https://...")
    download(model, url, check)
    place = model.cache_place()
    say(f"{model.name}: {standing(place, model)}, {file_hash(place, 'sha256')}, {place}")


def reproduce(options):
    """Prints the command that made a picture."""
    record, words = read_record(existing_file("reproduce", options.reproduce))
    weights = record["weights_sha256"]
    log.info(f"{record['program']}, {record['network']}, weights sha256 {weights}")
    if "step" in record:
        when = f"after step {record['step']} of size {record.get('size')}"
        log.info(f"note: this is an intermediate picture, {when}; the command makes the final one")
    say(" ".join([COMMAND, *map(shell_word, words)]))


def printable(text):
    """The text with control characters and other unprintable characters as escapes."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def shell_word(word):
    """The word quoted for a shell, if need be. Unprintable characters become escapes that bash, zsh
    and ksh understand."""
    if word.isprintable():
        return shlex.quote(word)

    def escaped(c):
        if c.isprintable() and c not in "'\\":
            return c
        return "".join(f"\\x{byte:02x}" for byte in os.fsencode(c))

    return f"$'{''.join(map(escaped, word))}'"


def shell_path(path):
    """The path quoted for a shell, and written so that it cannot be mistaken for an option."""
    return shell_word(f"./{path}" if path.startswith("-") else path)


def mend_streams():
    """Reopens closed standard streams on the null device, so that no file opened later gets their
    descriptors. Characters that the terminal's encoding lacks are printed as escapes."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free descriptor
    sys.stdout = sys.stdout or open(1, "w")  # noqa: SIM115, for the life of the process
    sys.stderr = sys.stderr or open(2, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


class LineHandler(logging.Handler):
    """Prints log messages as lines on stderr."""

    def emit(self, record):
        prefix = f"{PROGRAM}: " if record.levelno >= logging.ERROR else ""
        say(printable(prefix + record.getMessage()), "stderr")


COMMANDS = {  # options that replace a run
    "list_presets": list_presets,
    "list_models": list_models,
    "list_layers": list_layers,
    "list_classes": list_classes,
    "download_model": download_model,
    "reproduce": reproduce,
}


def command_line(argv, signals):
    """Executes a command line."""
    options = PARSER.parse_args(argv)
    log.setLevel(logging.ERROR if options.quiet else logging.INFO)
    for name, command in COMMANDS.items():
        if getattr(options, name):
            return command(options)
    checkpoint = None
    if options.resume:
        options, checkpoint = resume(options.resume, argv, options.scratch)
    check_surroundings()
    jobs, notices = (None, []) if checkpoint else plan_batch(options)
    with Engines(options) as engines:
        if jobs:
            work = (signals, engines, make_picture, check_layers)
            return make_pictures(jobs, notices, *work)
        return make_picture(options, signals, engines, checkpoint)


def main(argv=None):
    """Runs the command line; returns the exit status."""
    mend_streams()
    handler, before = LineHandler(), (log.level, log.propagate)
    log.addHandler(handler)
    log.propagate = False  # a caller's own logging would print the lines again
    try:
        with Signals() as signals:
            command_line(sys.argv[1:] if argv is None else argv, signals)
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
