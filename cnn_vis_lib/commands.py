"""Options that replace a run."""

import contextlib
import functools
import os
import re

from .download import download
from .errors import BadRequest, log, refusal, some
from .files import existing_file, file_hash
from .install import COMMAND, how_to_install
from .models import MODELS, find_files, stand_in_notice, standing
from .network import LEFT_OUT, layer_shapes, structure_error
from .options import PARSER
from .presets import PRESETS
from .processes import CaffeStopped, in_a_worker
from .records import read_record, short_words
from .terminal import printable, say, shell_word
from .terms import CLASSES, class_names, is_flat, quoted


def keyword_options(options):
    """The options that the keyword arguments of dream() stand for. Raises BadRequest."""
    for name in ("mask", "guide"):
        if not isinstance(options.get(name), (str, os.PathLike, type(None))):
            raise BadRequest(f"{name}: this must be a file name", "save an array as a PNG")
    words = [
        f"--{name}" if value is True else f"--{name}={value}"
        for name, value in options.items()
        if value is not False and value is not None
    ]
    for name in ("help", "version", "resume", *COMMANDS):
        if options.get(name):
            raise BadRequest(f"{name}: only available on the command line")
    parsed = PARSER.parse_args(words)
    if PARSER.several(parsed):
        raise BadRequest("layer, image: only one at a time", "call dream() for each")
    return parsed


def list_presets(options):
    """Prints the presets: what their pictures look like, and their options."""
    for name, preset in PRESETS.items():
        say(f"{name:10} {preset.about}\n{'':10} {' '.join(preset.options.split())}")


def list_models(options):
    """Prints the networks known by name, with size, whether verified, and path."""
    for model in MODELS.values():
        path = model.find_weights()
        if path is None:
            command = f"{COMMAND} --download_model {model.name}"
            say(f"{model.name:20} not installed; {command}")
        else:
            size = os.path.getsize(path) / 1e6
            say(f"{model.name:20} {size:5.1f} MB, {standing(path, model)}: {path}")


def list_layers(options):
    """Prints the layers that can be amplified, in order, each with its shape for one tile."""
    for name, shape, layer in find_layers(options):
        other = "" if layer == name else f"  (layer {layer})"
        say(printable(f"{quoted(name):32} {'x'.join(map(str, shape))}{other}"))


def list_classes(options):
    """Prints the classes of the network's classifier, with their numbers, as --layer takes them."""
    layers = [(name, shape[0]) for name, shape, _ in find_layers(options) if is_flat(shape)]
    width = next((width for _, width in layers if class_names(width)), None)
    if width:
        log.info(f"note: channels of {some([name for name, n in layers if n == width])}")
        for number, line in enumerate(class_names(width)):
            say(f"{number:4} {line}")
        return
    known = some([f"{name} ({width})" for width, name in CLASSES.items()])
    problem = f"this network has no classifier with known classes, which are those of {known}"
    raise refusal("list_classes", "", problem, "use another --model")


def find_layers(options):
    """[(blob, shape of one tile's activations, layer that makes it), ...] for everything that can
    be amplified in the network of the options; logs what cannot. Raises BadRequest."""
    files = find_files(options)
    without, stops = [], []
    while True:
        try:
            arguments = (layer_shapes, files, options.input_size, tuple(without))
            layers, notices, _ = in_a_worker(*arguments)
            break
        except CaffeStopped as error:
            if len(without) == 9:
                problem = f"Caffe cannot load it ({error})"
                raise refusal("deploy_txt", files.deploy, problem, "check the file") from None
            without.append(first_to_fail(*arguments))
            stops.append(f"{LEFT_OUT}: {without[-1]} ({error})")
    stand_in = stand_in_notice(options.model, files.name)
    for notice in filter(None, [stand_in, *notices, *stops]):
        log.info(f"note: {notice}")
    return layers


def first_to_fail(*arguments):
    """The name of the first layer at which Caffe ends its process; `arguments` are those with which
    in_a_worker failed. Found by bisection, because the process ends before it can report it."""
    names = in_a_worker(*arguments, 0)[2]
    low, high = 0, len(names)  # the first `low` layers load, the first `high` do not
    while high - low > 1:
        middle = (low + high) // 2
        try:
            in_a_worker(*arguments, middle)
            low = middle
        except CaffeStopped:
            high = middle
    return names[high - 1]


def download_model(options):
    """Downloads a network and checks it."""
    model = MODELS[options.download_model]
    deploy = model.find_deploy()
    if deploy is None:
        remedy = f"Caffe is needed to check the download; {how_to_install('pycaffe')}"
        raise refusal("download_model", model.name, remedy)
    check = functools.partial(in_a_worker, structure_error, deploy)
    url = options.model_url or model.url
    if not re.match("https?://.", url, re.IGNORECASE):
        raise refusal("model_url", url, "use the address of a file, http://... or https://...")
    download(model, url, check)
    path = model.cache_place()
    say(f"{model.name}: {standing(path, model)}, {file_hash(path, 'sha256')}, {path}")


def reproduce(options):
    """Prints the command that made a picture: briefly, or with --verbose with all options."""
    record, words = read_record(existing_file("reproduce", options.reproduce))
    if not options.verbose:
        with contextlib.suppress(ValueError):  # of another program
            words = short_words(record)
    weights = record["weights_sha256"]
    log.info(f"{record['program']}, {record['network']}, weights sha256 {weights}")
    if "step" in record:
        when = f"after step {record['step']} of size {record.get('size')}"
        log.info(f"note: this is an intermediate picture, {when}; the command makes the final one")
    say(" ".join([COMMAND, *map(shell_word, words)]))


COMMANDS = {  # options that replace a run
    "list_presets": list_presets,
    "list_models": list_models,
    "list_layers": list_layers,
    "list_classes": list_classes,
    "download_model": download_model,
    "reproduce": reproduce,
}
