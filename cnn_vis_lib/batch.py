"""Several pictures in one run of the program: each is made as if it were the only one, with its own
options."""

import collections
import copy
import itertools
import os
import re

from .behaviors import ARRAYS
from .checkpoints import Checkpoint
from .errors import BadRequest, OutOfMemory, RunFailed, Stopped, log, one_line, refusal, some
from .files import existing_file, extension_of
from .find_network import find_network
from .options import PARSER, check_preset, listed, names_file, names_several
from .outputs import Files, check_output
from .reading import pictures_in, unreadable
from .records import identify, inputs_of, kept_options, read_record
from .resume import check_unchanged, is_layer_of, repeated_layer, saved_options
from .run import Batch
from .writing import check_depth, check_format


def plan_batch(options):
    """(the options of each picture, in order, if `options` ask for several or their output name is
    a template, otherwise None; a list of notices). Raises BadRequest."""
    check_preset(options)
    images, layers, notices = [], listed(options.target_layer), []
    output = options.output_file
    for path in listed(options.initial_image):
        is_folder = path and os.path.isdir(path)
        if is_folder and not names_several(output):
            problem = "this is a folder"
            raise refusal(
                "image", path, problem, "to use every picture in it, add --output FOLDER/"
            )
        if is_folder and os.path.realpath(path) == os.path.realpath(os.path.dirname(output) or "."):
            problem = f"its pictures would mix with those of --image {path}"
            raise refusal("output", output, problem, "use another folder")
        pictures, skipped = pictures_in(path) if is_folder else ([path], [])
        images += pictures
        if skipped:
            why = "not a picture, or its reader is not installed"
            notices.append(f"{path}: skipped {some(skipped)}: {why}")
    images, layers = list(dict.fromkeys(images)), list(dict.fromkeys(layers))  # each once
    template = output + ("{name}_{layer}.png" if output.endswith("/") else "")
    unknown = set(re.findall(r"\{\w*\}", template)) - {"{name}", "{layer}"}
    if unknown and names_several(output):
        problem = f"{min(unknown)} stands for nothing"
        raise refusal("output", output, problem, "use {name} and {layer}")
    if len(images) * len(layers) == 1 and not names_several(output):
        options.initial_image = images[0]
        return None, notices
    jobs, taken, names = [], {}, names_of(images)
    for layer, image in itertools.product(layers, images):
        job = copy.copy(options)
        job.initial_image, job.target_layer = image, layer
        job.output_file = filled(template, names[image], layer)
        job.stats = job.stats and filled(job.stats, names[image], layer)
        job.sidecar = job.sidecar or extension_of(job.output_file) != ".png"  # is_made reads it
        for option, path in {"output": job.output_file, "stats": job.stats}.items():
            if path and taken.setdefault(os.path.realpath(path), job) is not job:
                if image:  # which may be an option with the wrong dashes
                    existing_file("image", image)
                problem = f"{len(images) * len(layers)} pictures, and several would write {path}"
                remedy = "use {name} and {layer} in the name"
                if option == "output" and "{name}" in template and "{layer}" in template:
                    remedy = "use pictures with different names"
                elif option == "output":
                    remedy += ", or FOLDER/"
                raise refusal(option, path, problem, remedy)
        jobs.append(job)
    check_batch_apart(jobs)
    return jobs, notices


def check_batch_apart(jobs):
    """Raises BadRequest if one picture's run could overwrite a file that another's reads or
    writes."""
    writers = collections.defaultdict(set)  # {name: the numbers of the jobs that may write it}
    for number, job in enumerate(jobs):
        for name in Files(os.path.realpath(job.output_file)).names():
            writers[name].add(number)
    for number, job in enumerate(jobs):
        named = {"image": job.initial_image, "output": job.output_file, "stats": job.stats}
        for option, path in named.items():
            if not path:
                continue
            names = Files.names_of(os.path.realpath(path))
            others = set().union(*(writers.get(name, ()) for name in names))
            if others - ({number} if option == "output" else set()):
                problem = f"the run would overwrite --{option} {path}"
                raise refusal("output", job.output_file, problem, "choose another name")


def filled(template, name, layer):
    """The file name `template`, with {name} and {layer} replaced by a start picture's name and the
    --layer, the latter without what shells or file systems reserve."""
    values = {"{name}": name, "{layer}": re.sub(r"[^\w.,+-]+", "-", str(layer))}
    return re.sub("|".join(values), lambda match: values[match[0]], template)


def names_of(images):
    """What {name} stands for, {path of a start picture: name}: the file's name without its ending,
    which joins it where another picture's differs only in that (IMG_1.JPG, IMG_1.HEIC)."""
    parts = {image: os.path.splitext(os.path.basename(image or "noise")) for image in images}
    endings = collections.defaultdict(set)
    for stem, ending in parts.values():
        endings[stem].add(ending)
    return {
        image: stem + ending.replace(".", "_") if len(endings[stem]) > 1 else stem
        for image, (stem, ending) in parts.items()
    }


def make_pictures(jobs, notices, signals, engines, make_picture, check_layers):
    """Makes a picture for each of the `jobs`, which are its options, and continues where an earlier
    run of the same command stopped. Logs the `notices` once all is checked. If some pictures fail,
    makes all others, then raises RunFailed. make_picture and check_layers are the script's."""
    for job in jobs:
        check_format(job.output_file)
        check_depth(job.output_file, job.depth)
        for name, path in PARSER.files_read(job, free=False).items():
            existing_file(name, path)
    network = find_network(jobs[0])
    for job in jobs if network.scale != 1 else ():
        job.input_scale = network.scale  # as records of finished pictures have it
    check_layers(jobs, network)
    for job in jobs:
        make_folder_of(job.output_file)
        check_output("output", job.output_file)
        if job.stats:
            check_output("stats", job.stats)
    for notice in notices:
        log.info(f"note: {notice}")
    identity = identify(network)
    left = [job for job in jobs if not is_made(job, identity)]
    if len(left) < len(jobs):
        log.info(f"note: {len(jobs) - len(left)} of {len(jobs)} pictures are there already")
    number, left = len(left), readable(left)
    failed, batch = number - len(left), Batch(len(left))
    for batch.number, job in enumerate(left, 1):
        try:
            signals.hold(False)
            begun, checkpoint = under_way(job)
            try:
                make_picture(begun, signals, engines, checkpoint, batch)
            except BadRequest:
                if checkpoint is None:
                    raise
                make_picture(job, signals, engines, None, batch)  # the checkpoint does not fit
        except Stopped as stop:
            hint = "run the same command again to make the rest"
            raise Stopped(stop.signum, f"{stop}; {hint}") from None
        except (BadRequest, RunFailed, MemoryError, OSError) as error:
            engines.end()
            if batch.number == 1 and isinstance(error, BadRequest) and not is_of_one(error):
                raise
            failed += 1
            error = OutOfMemory() if isinstance(error, MemoryError) else error
            log.error(f"error: {job.output_file}: {one_line(error)}")
    if failed:
        raise RunFailed(f"{failed} of {number} pictures could not be made; see above")


def readable(jobs):
    """Those of the jobs whose start pictures can be read; logs the other pictures, each once."""
    errors = {}
    for path in {job.initial_image: None for job in jobs if job.initial_image}:
        errors[path] = unreadable(path)
        if errors[path]:
            log.error(f"error: {errors[path]}")
    return [job for job in jobs if not errors.get(job.initial_image)]


def is_of_one(error):
    """Whether a BadRequest is about one picture; others of a batch can be made nevertheless."""
    options = {"image", "initial_size", "final_size", "output"}
    return error.option in options or (error.option, error.value) == ("mask", "alpha")


def make_folder_of(path):
    """Creates the folder of the file `path` if it does not exist. Raises BadRequest."""
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    except OSError as error:
        problem = f"its folder cannot be created ({error.strerror})"
        raise refusal("output", path, problem, "choose another") from None


def is_made(options, identity):
    """Whether the picture that the options ask for exists, and according to its record is finished
    and was made from the same pictures with the same settings and the network `identity`."""
    path = options.output_file
    try:
        record, _ = read_record(path)
        saved = kept_options(record)
    except (BadRequest, ValueError):
        return False
    for action, old, new in PARSER.fixed_differences(saved, options):
        are_files = names_file(action, old) and names_file(action, new)
        is_open = action.dest == "seed" and new is None
        is_repeated = action.dest == "target_layer" and is_layer_of(record, new)
        if not (are_files or is_open or is_repeated):
            return False
    expected = identity | {"inputs": inputs_of(options)}
    is_same = all(record.get(name) == value for name, value in expected.items())
    return os.path.isfile(path) and "step" not in record and is_same


def under_way(options):
    """(options, Checkpoint) to continue one of several pictures, if it was started with the same
    options; otherwise the options unchanged, and None."""
    path, begun = Files(options.output_file).checkpoint, copy.copy(options)
    if not os.path.isfile(path):
        return options, None
    try:
        checkpoint = Checkpoint.read(path, ARRAYS, options.scratch)
        saved = saved_options(path, checkpoint)
        begun.seed = saved.seed if begun.seed is None else begun.seed
        begun.target_layer = repeated_layer(begun, saved, checkpoint)
        check_unchanged(path, saved, begun)
        begun.resume = path
        return begun, checkpoint
    except BadRequest:
        return options, None
