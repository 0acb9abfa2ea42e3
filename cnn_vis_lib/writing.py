"""Writing pictures: formats and what they can hold."""

import io
import json
import os
import zlib

import numpy as np

from .errors import refusal
from .files import extension_of, whole_file
from .pixels import MAX_SIDE, strips

# Formats of the finished picture, by the file name's extension: PIL's name, the longest side
# allowed in pixels, PIL's options. PNG and TIFF can have 16 bits.
FORMATS = {
    ".png": ("PNG", MAX_SIDE, {"compress_level": 4}),  # 6 takes twice as long for 1% less
    ".jpg": ("JPEG", 65_500, {"quality": 95, "subsampling": 0}),
    ".jpeg": ("JPEG", 65_500, {"quality": 95, "subsampling": 0}),
    ".webp": ("WEBP", 16_383, {"quality": 95}),
    ".tif": ("TIFF", MAX_SIDE, {"compression": "tiff_deflate"}),
    ".tiff": ("TIFF", MAX_SIDE, {"compression": "tiff_deflate"}),
}


def check_format(path):
    """Raises BadRequest if --output `path` does not have the extension of a picture format."""
    extension = extension_of(path)
    if extension not in FORMATS:
        problem = f"unknown file extension{extension and f' {extension}'}"
        raise refusal("output", path, problem, f"use one of {', '.join(FORMATS)}")


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


RECORD_KEY = "cnn-vis"  # the keyword of the PNG's text chunk


def encode_jpeg(picture):
    """The bytes of a picture as a JPEG for viewing."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=90)
    return file.getvalue()
