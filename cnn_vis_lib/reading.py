"""Reading pictures, masks and folders of pictures."""

import contextlib
import functools
import importlib.util
import io
import logging
import os
import re
import warnings

import numpy as np

from .colours import tell, tell_frames, to_srgb
from .errors import one_line, refusal, some
from .files import existing_file, extension_of, read_bytes
from .formats import (
    MAX_PIXELS,
    PNG,
    RAW_MAGIC,
    READERS,
    TIFF_MAGIC,
    Scan,
    from_full_page,
    read_deep_tiff,
    read_raw_preview,
    without_damaged_chunks,
)
from .pixels import resize

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
        ours, theirs = ("{1}x{0}".format(*shape) for shape in (mask.shape, size))
        told = f"{ours} pixels (width x height), is stretched to the picture's {theirs}"
        remarks.append(f"{name}: the mask, {told}")
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


def look_at(path):
    """The (height, width) of the start picture `path`, before it is turned upright. Looks only at
    the beginning of most files, so that a damaged one may pass. Raises BadRequest if it cannot be
    read."""
    from PIL import Image

    with contextlib.suppress(Exception), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about size and metadata
        with Image.open(path) as picture:
            return picture.size[::-1]
    return read_rgba(path)[0].size[::-1]


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


POSTSCRIPT = (b"%!PS", b"\xc5\xd0\xd3\xc6")


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
    """Whether a file, whatever its name, begins like a picture that can be read. Kinds that Pillow
    alone does not always open are read as --image reads them."""
    from PIL import Image

    try:
        with open(path, "rb") as file:
            start = file.read(64)
        import_plugins(start)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if start.startswith((PNG, *TIFF_MAGIC, *RAW_MAGIC)):
                with open_picture(read_bytes(path), path, []):
                    return True
            with Image.open(path) as picture:
                return f".{picture.format.lower()}" not in NOT_PICTURES
    except Exception:  # it may contain anything
        return False
