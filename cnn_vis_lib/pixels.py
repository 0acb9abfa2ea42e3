"""Operations on pictures, uint8 or uint16 (H, W, 3), on images, float64 (1, 3, H, W), and on
arrays."""

import functools

import numpy as np

DEPTHS = {8: "uint8", 16: "uint16"}  # of output pictures, by bits per channel


def strips(height, rows=64):
    """Slices of `rows` rows each, from top to bottom. Computing strip by strip needs hardly any
    memory."""
    return [slice(y, y + rows) for y in range(0, height, rows)]


def planes(picture):
    """The picture as an image's planes: uint8 (1, 3, H, W), blue first."""
    return np.ascontiguousarray(picture[:, :, ::-1].transpose(2, 0, 1)[np.newaxis])


def from_planes(planes):
    """The picture whose planes these are, a view: uint8 (H, W, 3), red first."""
    return planes[0, ::-1].transpose(1, 2, 0)


def resize(picture, size, bilinear=False):
    """The picture at `size` (height, width) as PIL resizes it, bicubic unless `bilinear`."""
    from PIL import Image

    method = Image.Resampling.BILINEAR if bilinear else Image.Resampling.BICUBIC
    return np.asarray(Image.fromarray(picture).resize((size[1], size[0]), method))


def composed(picture, start, mask):
    """Blends two pictures of the same size and depth: `picture` where the mask, uint8 (H, W), is
    white, `start` where it is black."""
    blended = np.empty_like(picture)
    for rows in strips(len(picture)):
        share = mask[rows, :, np.newaxis].astype(np.uint32)
        blended[rows] = (picture[rows] * share + start[rows] * (255 - share) + 127) // 255
    return blended


def with_colors_of(start, picture):
    """`picture` in the colours of `start`, which has the same size and depth: the brightness of
    `picture` with the hue and saturation of `start` (in JPEG's YCbCr, where equal chroma is an
    equal distance from the brightness)."""
    coloured = np.empty_like(picture)
    for rows in strips(len(picture)):
        brighter = (picture[rows].astype(float) - start[rows]) @ (0.299, 0.587, 0.114)
        exact = start[rows] + brighter[:, :, np.newaxis]
        coloured[rows] = np.clip(exact.round(), 0, np.iinfo(coloured.dtype).max)
    return coloured


MAX_SIDE = 1_000_000
LEAST_SIDE = 16  # of a tile; a smaller input is not a picture, or is meant to be set at run time


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


def mixed(picture, start, keep_colors, mask):
    """`picture`, of any depth, in the colours of the picture `start`, if these are kept, and
    blended with it as the mask says, if there is one. `start` and `mask` are resized to fit."""
    if keep_colors or mask is not None:
        start = resize(start, picture.shape[:2], bilinear=True).astype(picture.dtype)
        start *= np.iinfo(picture.dtype).max // 255
    if keep_colors:
        picture = with_colors_of(start, picture)
    if mask is not None:
        picture = composed(picture, start, resize(mask, picture.shape[:2], bilinear=True))
    return picture


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
