"""The terms of --layer: how they are written, and the words that stand for numbers of channels."""

import collections
import difflib
import functools
import math
import os
import re

from .errors import refusal
from .files import read_text
from .install import INCLUDED

CHANNELS = "numbers and ranges such as 17,40-47, or strong5"  # if the layer is not a classifier
_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
TERM = re.compile(  # weight, layer with or without quotes, channels, "+" or the end
    rf'\s*(?:({_NUMBER})\s*\*\s*)?(?:"([^"]+)"|([^"*+:]*[^"*+:\s]))\s*(?::([^"*+:]+))?(\+|$)'
)


def parse_terms(text):
    """The terms that --layer names, "[WEIGHT*]LAYER[:CHANNELS] + ...", a list of (weight, layer,
    channels or None). Raises BadRequest, pointing at the mistake."""
    terms, position, joint = [], 0, "+"
    while joint:
        term = TERM.match(text, position)
        if term is None:
            where = f"character {position + 1}, {text[position:].strip()[:40] or 'the end'}"
            form = "[WEIGHT*]LAYER[:CHANNELS], with quotes around names that contain +, * or :"
            raise refusal("layer", text, f"at {where}: a term is {form}")
        weight, quoted, plain, channels, joint = term.groups()
        weight, channels = float(weight or 1), channels and parse_channels(channels, term[0])
        if not 1e-6 <= abs(weight) <= 1e6:
            problem = "a weight must be between 1e-6 and 1e6, or between -1e6 and -1e-6"
            raise refusal("layer", term[0].strip(" +"), problem)
        terms.append((weight, quoted or plain, channels))
        position = term.end()
    return terms


def parse_channels(text, term):
    """The channels that a term of --layer names: numbers, and words that stand for numbers.
    Raises BadRequest."""
    channels = {}
    for word in map(str.strip, text.split(",")):
        ends = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", word)
        numbers = range(int(ends[1]), int(ends[2] or ends[1]) + 1) if ends else ()
        if not (numbers or word) or ends and not numbers or re.fullmatch("strong0*", word):
            problem = f"at {word or text!r}: use {CHANNELS}"
            raise refusal("layer", term.strip(" +"), problem)
        channels |= dict.fromkeys(numbers or [word])
    return tuple(channels)


CLASSES = {1000: "imagenet", 365: "places365", 205: "places205"}  # by a classifier's width


def class_names(width):
    """The class names of a classifier of this width, each a line of synonyms; None if unknown."""
    path = os.path.join(INCLUDED, "classes", f"{CLASSES.get(width)}.txt")
    return read_text(path).splitlines() if os.path.isfile(path) else None


def plain(name):
    """A class's name, without capitals and with single spaces."""
    return " ".join(re.split(r"[\s_]+", name.strip().lower()))


@functools.lru_cache(4)
def numbers_by_name(names):
    """{plain name: numbers of the classes that have it}; `names` are lines of synonyms."""
    by_name = collections.defaultdict(list)
    for number, line in enumerate(names):
        for synonym in dict.fromkeys(map(plain, line.split(","))):
            by_name[synonym].append(number)
    return by_name


def class_number(name, names):
    """The number of the class called `name`. Raises ValueError with the problem and the remedy as
    its message."""
    by_name = numbers_by_name(tuple(names))
    numbers = by_name.get(plain(name), [])
    if len(numbers) == 1:
        return numbers[0]
    if numbers:
        raise ValueError(f"classes {' and '.join(map(str, numbers))} have this name; use a number")
    close = difflib.get_close_matches(plain(name), by_name, n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(close)}?" if close else "see --list_classes"
    raise ValueError(f"no class has this name; {hint}")


def quoted(layer):
    """The name of a layer as --layer takes it."""
    return f'"{layer}"' if re.search(r"[+*:\s]", layer) else layer


def strong(word):
    """The N of "strongN", or None for any other channel of a Target."""
    match = re.fullmatch(r"strong(\d{1,6})", str(word))
    return match and int(match[1])


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
