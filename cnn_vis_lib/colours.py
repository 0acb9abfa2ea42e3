"""The colours of a picture file as 8-bit sRGB: what its numbers mean, and which are black and
white.

Colours are declared by numbers, by a profile, by a gamma and chromaticities, or by EXIF data."""

import contextlib
import dataclasses
import functools
import io
import math

import numpy as np

from .errors import one_line
from .pixels import strips


def tell(path, remarks, text):
    """Adds a remark on the file `path`."""
    remarks.append(f"{path}: {text}")


def tell_frames(count, path, remarks):
    """Adds the remark that a file has `count` frames, if it has several."""
    if count > 1:
        tell(path, remarks, f"the first of {count} frames is used")


def exif_space(picture):
    """The colour space that a PIL picture's EXIF data declare: "Adobe RGB", or None."""
    with contextlib.suppress(Exception):  # they can be damaged in any way
        exif = picture.getexif()
        space = exif.get_ifd(0x8769).get(0xA001)
        if space == 2 or space == 0xFFFF and exif.get_ifd(0xA005).get(1) == "R03":
            return "Adobe RGB"
    return None


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
        picture = np.empty((*values.shape[:2], 3), np.uint8)
        for rows in strips(len(values)):
            bands = np.broadcast_to(values[rows], picture[rows].shape)
            linear = np.stack([light[c][bands[..., i]] for i, c in enumerate(self.curves)], axis=-1)
            if self.hdr == "HLG":  # brighter parts are shown on a screen with more contrast
                scene = linear @ (0.2627, 0.6780, 0.0593)
                linear = linear * (1000 / REFERENCE_WHITE * scene**0.2)[..., np.newaxis]
            linear = linear @ self.matrix.T
            if self.hdr:
                linear = compressed(np.maximum(linear, 0))
            linear = np.clip(linear, 0, 1)
            power_law = 1.055 * linear ** (1 / 2.4) - 0.055
            picture[rows] = 255 * np.where(linear <= 0.0031308, 12.92 * linear, power_law) + 0.5
        return picture


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

    def number(offset):
        return int.from_bytes(profile[offset : offset + 4], "big", signed=True) / 65536

    space, count = profile[16:20], int.from_bytes(profile[128:132], "big")
    entries = (profile[132 + 12 * i : 144 + 12 * i] for i in range(min(count, 100)))
    offsets = {entry[:4]: int.from_bytes(entry[4:8], "big") for entry in entries}
    if b"A2B0" in offsets or channels not in (1, 3):
        return None
    if space == b"GRAY" and channels == 1 and b"kTRC" in offsets:
        return Colours((icc_curve(profile, offsets[b"kTRC"]),) * 3, np.eye(3))
    if space != b"RGB " or profile[20:24] != b"XYZ ":
        return None
    curves = tuple(icc_curve(profile, offsets[name]) for name in (b"rTRC", b"gTRC", b"bTRC"))
    columns = [
        [number(offsets[name] + 8 + 4 * i) for i in range(3)]
        for name in (b"rXYZ", b"gXYZ", b"bXYZ")
    ]
    return Colours(curves, np.linalg.solve(SRGB_UNDER_D50, np.transpose(columns)))


def icc_curve(profile, offset):
    """The curve at an `offset` of an ICC profile, as a function."""
    kind = profile[offset : offset + 4]
    count = int.from_bytes(profile[offset + 8 : offset + 12], "big")
    if kind == b"curv":
        table = np.frombuffer(profile, ">u2", count, offset + 12) / 65535
        if count > 1:
            return lambda t: np.interp(t, np.linspace(0, 1, count), table)
        gamma = table[0] * 65535 / 256 if count else 1.0
        return lambda t: t**gamma
    form = int.from_bytes(profile[offset + 8 : offset + 10], "big")
    numbers = np.frombuffer(profile, ">i4", (1, 3, 4, 5, 7)[form], offset + 12) / 65536
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
        levels = scan.values
    else:
        values = np.nan_to_num(scan.values.astype(np.float64), nan=low, posinf=low, neginf=low)
        levels = np.clip((values - low) * (top / ((high - low) or 1)) + 0.5, 0, top).astype(dtype)
    return top - levels if scan.is_inverted else levels


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
