#!/usr/bin/env python3
"""What the scripts here need done with pictures.

    picture.py fit PICTURE OUT SIDE            resizes it: its shorter side becomes SIDE pixels long
    picture.py zoom PICTURE OUT FACTOR LIKE    enlarges it about its middle, cut to the size of LIKE

cnn_vis.py writes 1.2 times the contrast that it reads. Where what it wrote becomes what it reads,
that would grow from frame to frame; so zoom gives PICTURE the brightness and contrast of LIKE.
"""

import argparse
import sys

import numpy as np
from PIL import Image, ImageOps


def read(path):
    """The picture file as an upright RGB Image."""
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
    """The Image with the mean and the standard deviation, over all pixels and channels, of the
    Image `model`."""
    values, wanted = np.asarray(picture, dtype=float), np.asarray(model)
    values = (values - values.mean()) * (wanted.std() / (values.std() or 1)) + wanted.mean()
    return Image.fromarray(np.clip(np.round(values), 0, 255).astype(np.uint8))


def zoom(picture, factor, model):
    """The middle of the Image, 1 / factor of its width and height, in the size and with the
    contrast of `model`."""
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
