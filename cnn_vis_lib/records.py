"""Records of how a picture was made: the same dict is in PNGs, sidecars and checkpoints."""

import contextlib
import io
import itertools
import json
import os
import shlex

from .errors import BadRequest, one_line, refusal
from .files import read_text, sha256_of
from .install import PROGRAM, USUAL_COMMAND, VERSION
from .machine import versions
from .models import content_of
from .options import PARSER
from .writing import RECORD_KEY

RECORD_FIELDS = {  # required when a record is read
    "program": str,
    "command": str,
    "network": str,
    "weights_sha256": str,
    "deploy_sha256": str,
    "mean": float,
    "seconds": float,
}


def make_record(options, settings, network, sizes, earlier=None, typed=None):
    """The record of a run: program and versions; the command, including values that the program
    chose, and the preset that it was typed with; what identifies the network and the input
    pictures; the layer as requested; the sizes and the seed. If the run is resumed, `earlier` is
    its earlier record. `typed` are the options as they were typed on another machine, if any."""
    chosen = {"seed": settings.seed, "target_layer": settings.target_layer}
    if network.scale != 1:
        chosen["input_scale"] = network.scale
    if network.known_name():
        chosen["model"] = network.name
    return {
        "program": f"cnn_vis.py {VERSION}",
        "command": f"{USUAL_COMMAND} {shlex.join(PARSER.words(typed or options, **chosen))}",
        "preset": earlier.get("preset") if earlier else options.preset,
        "network": network.name,
        "layer": (earlier or {}).get("layer", str(options.target_layer)),
        "inputs": earlier.get("inputs") if earlier else inputs_of(options),
        "sizes": sizes,
        "seed": settings.seed,
        **identify(network),
        "versions": versions(),
        "seconds": 0.0,
    }


def short_words(record):
    """The words of the command in `record`, for people: with its preset, and without what is in
    that."""
    return PARSER.short_words(kept_options(record), record.get("preset"))


def inputs_of(options):
    """{option: SHA-256} of the input pictures that the options name."""
    return {name: sha256_of(path) for name, path in PARSER.files_read(options, free=False).items()}


def identify(network):
    """What identifies a network, as a dict."""
    hashes = {f"{name}_sha256": sha256 for name, sha256 in content_of(network).items()}
    return hashes | {"mean": float(network.mean)}


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


def is_made_by(path, record):
    """Whether the command in `record` made the picture `path`."""
    with contextlib.suppress(BadRequest):
        return read_record(path)[0]["command"] == record["command"]
    return False
