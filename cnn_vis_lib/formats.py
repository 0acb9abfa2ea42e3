"""What picture files contain that Pillow does not read, or reads wrongly, for each of their
formats."""

import contextlib
import dataclasses
import io
import itertools
import math
import re
import zlib

import numpy as np

from .colours import tell, tell_frames

MAX_PIXELS = 178_956_970  # in a picture file; Pillow, too, rejects larger ones as an attack


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


PNG = b"\x89PNG\r\n\x1a\n"

TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
RAW_MAGIC = (b"IIRO", b"IIRS", b"MMOR", b"IIU\0")  # Olympus, Panasonic: TIFFs except for this


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
    address = slice(8, 16) if 43 in data[2:4] else slice(4, 8)  # of the first page's address
    changed = bytearray(data)
    changed[address] = page.offset.to_bytes(address.stop - address.start, order)
    return bytes(changed)


def is_full_page(page):
    """Whether a tifffile page is neither a reduced copy nor a mask."""
    return not page.tags.valueof(254, default=0) & 5 and page.tags.valueof(255, default=1) != 2


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
    pictures = [picture for page in pages for picture in previews(data, page)]
    for picture in sorted(pictures, key=lambda picture: math.prod(picture.size), reverse=True):
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
    parts = [*zip(starts, lengths)]
    if len(page.dataoffsets) == 1:
        parts += zip(page.dataoffsets, page.databytecounts)
    jpegs = [data[start : start + length] for start, length in parts]
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
    start = len(PNG)
    while start < len(data):
        end = start + 12 + int.from_bytes(data[start : start + 4], "big")
        chunk, checksum = data[start + 4 : end - 4], int.from_bytes(data[end - 4 : end], "big")
        is_needed = not chunk or chunk[0] < ord("a")  # its name begins with a capital letter
        if is_needed or zlib.crc32(chunk) == checksum:
            yield chunk[:4], chunk[4:], data[start:end]
        start = end


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
        colours = np.where(share > 0, values / share, 0)
    if top > 1:
        colours = np.minimum(colours + 0.5, top)
    return colours.astype(values.dtype)


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
    start = 26
    for _ in range(2):  # past the palette and the resources
        start += 4 + int.from_bytes(data[start : start + 4], "big")
    layers = int.from_bytes(data[start + 8 : start + 10], "big", signed=True)
    has_layers = int.from_bytes(data[start : start + 4], "big") > 0
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
    header, start = {}, 0
    while not int(header.get(b"NAXIS", 0)) and start < len(data):  # the first header of a picture
        header = {}
        while start < len(data) and data[start : start + 8].rstrip() != b"END":
            card = data[start : start + 80]
            if number := re.match(rb"(\w+) *= +([-+]?[\d.]+(?:[ED][-+]?\d+)?) *(/|$)", card):
                header[number[1]] = float(number[2].replace(b"D", b"E"))
            start += 80
        start += 2880 - start % 2880
    if header.get(b"NAXIS3", 1) > 1:
        tell(f"the first of {header[b'NAXIS3']:g} planes is used")
    scale, zero = header.get(b"BSCALE", 1.0), header.get(b"BZERO", 0.0)
    values = np.asarray(scan.picture)
    values = values.view(np.int16) if values.dtype == np.uint16 else values
    scan.values = values[..., np.newaxis]
    if b"BLANK" in header:
        take_holes(scan, header[b"BLANK"])
    if (scale, zero) != (1, 0):
        is_unsigned = (scale, zero, values.dtype) == (1, 32768, np.int16)
        scan.values = (scan.values * scale + zero).astype(np.uint16 if is_unsigned else np.float64)
    elif scan.picture.mode == "L":
        scan.values = None  # Pillow's are right


def boxes(data):
    """Yields (name, content) of the boxes in ISO's container or JPEG 2000's."""
    position = 0
    while position + 8 <= len(data):
        size = int.from_bytes(data[position : position + 4], "big")
        name = data[position + 4 : position + 8]
        start = position + 8
        if size == 1:
            size, start = int.from_bytes(data[start : start + 8], "big"), start + 8
        end = position + size if size else len(data)
        if end < start:
            return
        yield name, data[start:end]
        position = end


def read_iso(scan, data, tell):
    """The colours that an AVIF or HEIC declares by numbers for its main picture."""
    if "icc_profile" in scan.picture.info:
        return  # here the profile comes first
    meta = dict(boxes(dict(boxes(data)).get(b"meta", b"")[4:]))  # after its version
    properties = dict(boxes(meta.get(b"iprp", b"")))
    entries = [*boxes(properties.get(b"ipco", b""))]
    for number in properties_of(meta.get(b"pitm", b""), properties.get(b"ipma", b"")):
        name, content = entries[number - 1] if 0 < number <= len(entries) else (b"", b"")
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
