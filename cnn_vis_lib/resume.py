"""Continuing a run from its checkpoint."""

import contextlib
import copy
import os

from .behaviors import ARRAYS
from .checkpoints import RUN_ARRAYS, Checkpoint, unusable
from .errors import BadRequest, one_line, refusal
from .files import existing_file
from .options import PARSER, listed, names_file, names_several
from .outputs import Files
from .records import identify, kept_options


def saved_options(path, checkpoint):
    """The options that the run in the Checkpoint `path` was started with, with absolute paths.
    Raises BadRequest."""
    try:
        saved = kept_options(checkpoint.record)
    except ValueError as error:
        raise unusable(path, str(error)) from None
    PARSER.make_absolute(saved, checkpoint.folder)
    saved.output_file = Files.of_checkpoint(path)
    return saved


def resume(path, argv, scratch=None):
    """(options, Checkpoint) of the run that the checkpoint `path` belongs to, with the changes that
    `argv` makes. Raises BadRequest."""
    checkpoint = Checkpoint.read(existing_file("resume", path), ARRAYS, scratch)
    saved = saved_options(path, checkpoint)
    options = PARSER.parse_args(argv, copy.copy(saved))
    options.target_layer = repeated_layer(options, saved, checkpoint)
    check_unchanged(path, saved, options)
    if options.output_file is None:
        raise refusal(
            "resume", path, "its name does not show which picture to write", "use --output"
        )
    if names_several(options.output_file):
        problem = "a resumed run makes one picture"
        raise refusal("output", options.output_file, problem, "use a file name")
    return options, checkpoint


def repeated_layer(options, saved, checkpoint):
    """The options' --layer; if it repeats the words for channels of the run that wrote the
    Checkpoint, with the numbers that this run found for them, which are in its `saved` options."""
    asked = options.target_layer
    return saved.target_layer if is_layer_of(checkpoint.record, asked) else asked


def is_layer_of(record, objective):
    """Whether a run with this record was started with `objective` as its --layer."""
    with contextlib.suppress(BadRequest):
        return PARSER.parse_args([f"--layer={record.get('layer')}"]).target_layer == objective
    return False


def check_unchanged(path, saved, options):
    """Raises BadRequest if one of the `options` that must stay the same differs from `saved`, the
    options of the run that wrote the checkpoint `path`."""
    for action, old, new in PARSER.fixed_differences(saved, options):
        if names_file(action, new) and not isinstance(new, list) and os.path.abspath(new) == old:
            continue
        old, new = (v if v is None else " ".join(map(action.text, listed(v))) for v in (old, new))
        name = action.option_strings[-1].removeprefix("--")
        drop = f"--preset {options.preset}" if options.preset else "the option"
        problem = f"cannot be changed when resuming ({path} has {old})"
        raise refusal(name, new, problem, f"drop {drop}")


def check_same_network(path, record, network):
    """Raises BadRequest if the run in the checkpoint `path` was started with another network."""
    identity = identify(network)
    options = {"weights_sha256": "caffe_model", "deploy_sha256": "deploy_txt", "mean": "mean_image"}
    for name, option in options.items():
        if record[name] != identity[name]:
            is_not = f"{name} {identity[name]}, not {record[name]}"
            problem = f"differs from what {path} was started with ({is_not})"
            raise refusal(option, "", problem, "pass the original file")


def go_on(dream, checkpoint, record, path):
    """Restores the dream's state, and in the record how long the run has taken, from the Checkpoint
    `path`, in which only the watchers' arrays are left. Returns notices. Raises BadRequest."""
    try:
        dream.restore(checkpoint.numbers, checkpoint.arrays)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise unusable(path, one_line(error)) from None
    for name in RUN_ARRAYS:
        checkpoint.arrays.pop(name, None)
    record["seconds"] = checkpoint.record["seconds"]
    begun_on, device = checkpoint.record.get("device", record["device"]), record["device"]
    differs = f"this run was started on a {begun_on}; a {device} rounds differently"
    goes_on = f"{path} goes on after {dream.progress()}"
    return [goes_on] if begun_on == device else [goes_on, differs]


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
