"""Several pictures in one run of the program: each is made as if it were the only one, with its own
options."""

import collections
import contextlib
import copy
import itertools
import os
import re

from .cluster_batch import cluster_makers
from .engines import choose_gpus
from .errors import BadRequest, OutOfMemory, RunFailed, Stopped, log, one_line, refusal, some
from .files import existing_file, extension_of
from .find_network import find_network
from .gpu_makers import gpu_makers
from .makers import local_makers, make_one
from .options import PARSER, check_preset, listed, names_file, names_several
from .outputs import Files, check_output
from .processes import CaffeStopped, in_a_worker
from .reading import look_at, pictures_in
from .records import identify, inputs_of, kept_options, read_record
from .resume import is_layer_of
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
    identity = identify(network)
    left = [job for job in jobs if not is_made(job, identity)]
    number, sizes, unreadable = len(left), *look_at_all(left)
    left = [job for job in left if job.initial_image not in unreadable]
    batch = Batch(len(left))
    with contextlib.closing(batch.bar), makers_for(left, sizes, batch, network) as makers:
        check_layers(jobs, network, makers.call if makers else in_a_worker)
        for job in jobs:
            make_folder_of(job.output_file)
            check_output("output", job.output_file)
            if job.stats:
                check_output("stats", job.stats)
        if number < len(jobs):
            notices = [*notices, f"{len(jobs) - number} of {len(jobs)} pictures are there already"]
        for notice in notices:
            log.info(f"note: {notice}")
        for error in unreadable.values():
            log.error(f"error: {error}")
        failed = number - len(left)
        failures = failures_of(makers, left, signals, engines, batch, make_picture, network)
        with contextlib.closing(failures):
            for job, error in failures:
                is_general = isinstance(error, BadRequest) and not is_of_one(error)
                if is_general and not batch.is_announced:  # none has begun
                    raise error
                failed += 1
                error = OutOfMemory() if isinstance(error, MemoryError) else error
                log.error(f"error: {job.output_file}: {one_line(error)}")
    if failed:
        raise RunFailed(f"{failed} of {number} pictures could not be made; see above")


def look_at_all(jobs):
    """({path: size} of the jobs' start pictures, {path: BadRequest} of those that cannot be
    read)."""
    sizes, errors = {None: None}, {}
    for path in dict.fromkeys(job.initial_image for job in jobs if job.initial_image):
        try:
            sizes[path] = look_at(path)
        except BadRequest as error:
            errors[path] = error
    return sizes, errors


ALONE = {"show", "plot_pix", "web"}  # words of --iter_behavior that show one picture at a time


@contextlib.contextmanager
def makers_for(jobs, sizes, batch, network):
    """Context manager: the Makers for the jobs, or None if each picture is to be made on all
    devices, one after the other: if it shows itself while it is made, or has more tiles to compute
    at the same time than there are pictures. `sizes`, {path: (height, width)}, are those of their
    start pictures."""
    makers = None
    if jobs and not (jobs[0].scratch or ALONE & jobs[0].iter_behavior):
        if jobs[0].scheduler:
            makers = cluster_makers(jobs, sizes, batch, network)
        else:
            gpus, device = choose_gpus(jobs[0].gpu)
            if gpus:
                makers = gpu_makers(jobs, sizes, batch, network, len(gpus))
            else:
                makers = local_makers(jobs, sizes, batch, network, device)
    with makers or contextlib.nullcontext():
        yield makers


def failures_of(makers, jobs, *work):
    """Makes a picture for each of the jobs, by the Makers, or one after the other if they are None;
    yields (job, exception) for those that fail. Raises Stopped after a signal."""
    signals, *_, make_picture, _ = work
    try:
        if makers is None:
            yield from one_by_one(enumerate(jobs, 1), *work)
            return
        stopped = []
        for job, error in makers.failures(jobs, signals, make_picture):
            if isinstance(error, CaffeStopped):
                stopped.append((jobs.index(job) + 1, job))
            else:
                yield job, error
        yield from one_by_one(stopped, *work)  # an engine finds out why Caffe stopped
    except Stopped as stop:
        hint = "run the same command again to make the rest"
        raise Stopped(stop.signum, f"{stop}; {hint}") from None


def one_by_one(numbered, signals, engines, batch, make_picture, network):
    """Makes a picture for each (number, job); yields (job, exception) for those that fail."""
    for batch.number, job in numbered:
        try:
            make_one(make_picture, job, signals, engines, batch, network)
        except (BadRequest, RunFailed, MemoryError, OSError) as error:
            engines.end()
            batch.bar.end_picture(batch.number)
            yield job, error


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
