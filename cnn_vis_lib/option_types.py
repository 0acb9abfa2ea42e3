"""The types of the options' values, for argparse."""

import argparse
import math
import os
import re

from .files import expanded
from .pixels import LEAST_SIDE, MAX_SIDE


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
