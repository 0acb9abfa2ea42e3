#!/usr/bin/env python3
"""Prepares pictures for the scripts here.

    picture.py fit PICTURE OUT SIDE            resizes it so that its shorter side is SIDE pixels
    picture.py zoom PICTURE OUT FACTOR LIKE    enlarges its middle, cropped to the size of LIKE

cnn_vis.py writes 1.2 times the contrast that it reads. As each frame of a zoom starts from the one
before, contrast would keep growing, so zoom gives PICTURE the brightness and contrast of LIKE.
"""

import argparse
import sys

import numpy as np
from PIL import Image, ImageOps


def read(path):
    """The picture file as an RGB Image, turned upright."""
    try:
        with Image.open(path) as file:
            return ImageOps.exif_transpose(file).convert("RGB")
    except OSError as error:
        sys.exit(f"{path}: cannot be read as a picture ({error})")


def fit(picture, side):
    """The Image resized so that its shorter side is `side` pixels long."""
    factor = side / min(picture.size)
    return picture.resize(
        [round(length * factor) for length in picture.size], Image.Resampling.LANCZOS
    )


def match(picture, model):
    """The Image, adjusted to the mean and standard deviation of the Image `model`, both over all
    pixels and channels."""
    values, wanted = np.asarray(picture, dtype=float), np.asarray(model)
    values = (values - values.mean()) * (wanted.std() / (values.std() or 1)) + wanted.mean()
    return Image.fromarray(np.clip(np.round(values), 0, 255).astype(np.uint8))


def zoom(picture, factor, model):
    """The middle 1 / factor of the Image's width and height, with the size and the contrast of
    `model`."""
    width, height = picture.size
    x, y = (length * (1 - 1 / factor) / 2 for length in picture.size)
    return match(
        picture.resize(model.size, Image.Resampling.BICUBIC, (x, y, width - x, height - y)), model
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for function, *names in ((fit, "side"), (zoom, "factor", "like")):
        command = commands.add_parser(function.__name__)
        command.set_defaults(function=function)
        command.add_argument("picture", type=read)
        command.add_argument("out")
        for name, kind in zip(names, (float, read)):
            command.add_argument("values", metavar=name.upper(), type=kind, action="append")
    options = parser.parse_args()
    options.function(options.picture, *options.values).save(options.out)


if __name__ == "__main__":
    main()
