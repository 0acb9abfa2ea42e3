"""The names of the files that a run writes, and whether it can and may write them."""

import contextlib
import functools
import itertools
import os
import re

from .errors import log, refusal
from .files import is_protected, remove_parts, try_folder, unwritable
from .gauge import COLUMNS
from .install import COMMAND
from .options import PARSER
from .records import is_made_by, is_record
from .terminal import shell_path
from .writing import check_depth, check_format

ENDINGS = ("_show.png", "_plot_pix.png", "_plot.png", "_run.gif")  # of watchers' files


class Files:
    """The names of all files that a run may write: the picture and the files beside it.
    `resumed` is the checkpoint that the run continues from, or None."""

    def __init__(self, picture, resumed=None):
        self.picture, self.resumed = picture, resumed
        self.stem, self.extension = os.path.splitext(picture)
        self.checkpoint, self.sidecar = f"{picture}.checkpoint", f"{picture}.json"

    def on_the_way(self, size, step):
        """The name of an intermediate picture: NAME_SIZE_STEP.EXT."""
        return f"{self.stem}_{size}_{step}{self.extension}"

    def beside(self, ending):
        """The name of a watcher's file: NAME + ending."""
        return f"{self.stem}{ending}"

    def names(self):
        """All names that a run may write, whatever its options. Those to which it adds numbers, of
        intermediate pictures and of checkpoints set aside, are pairs, without the numbers."""
        numbered = {("numbered", self.picture), ("numbered", self.checkpoint)}
        beside = map(self.beside, ENDINGS)
        return {self.picture, self.checkpoint, self.sidecar, *beside} | numbered

    @staticmethod
    def names_of(path):
        """The names that the file `path` may have among `names`: its own, and without numbers."""
        plain = re.sub(r"_\d+_\d+(?=\.[^./]*$)|(?<=\.checkpoint)\.old\d*$", "", path)
        return {path} if plain == path else {path, ("numbered", plain)}

    def may_write(self, path):
        """Whether a run that makes this picture could write `path`, whatever its options."""
        ours = Files(os.path.realpath(self.picture)).names()
        return not ours.isdisjoint(Files.names_of(os.path.realpath(path)))

    @staticmethod
    def of_checkpoint(path):
        """The picture that a checkpoint belongs to, judging by its name; None if somebody renamed
        it."""
        match = re.fullmatch(r"(.+)\.checkpoint(\.old\d*)?", path, re.DOTALL)
        return match and match[1]

    def resumed_from(self):
        """The picture of the run that this one continues, as a list; empty if it continues none.
        The earlier run must no longer be writing it."""
        return [Files.of_checkpoint(self.resumed) or self.resumed] if self.resumed else []

    def set_aside(self):
        """Renames the checkpoint of an earlier run, if there is one and this run does not continue
        it, and says so. Raises BadRequest."""
        path, resumed = self.checkpoint, self.resumed
        if not os.path.exists(path) or (resumed and os.path.samefile(path, resumed)):
            return
        names = (f"{path}.old{n}" for n in itertools.count(1))
        old = next(name for name in names if not os.path.exists(name))
        try:
            os.replace(path, old)
        except OSError as error:
            problem = f"{path}, of another run, cannot be renamed ({error.strerror})"
            raise refusal("output", self.picture, problem, "choose another name") from None
        hint = f"continue it with --resume {shell_path(old)}"
        log.info(f"note: an unfinished earlier run for {self.picture} was kept; {hint}")

    def hint(self):
        """How to continue a run that ended early, if there is a checkpoint."""
        candidates = filter(None, (self.checkpoint, self.resumed))
        path = next(filter(os.path.exists, candidates), None)
        return f"; to continue: {COMMAND} --resume {shell_path(path)}" if path else ""

    def clean_up(self):
        """Removes the checkpoints of a run that has succeeded."""
        for path in {self.checkpoint, self.resumed} - {None}:
            if Files.of_checkpoint(path) is not None:
                with contextlib.suppress(OSError):
                    os.remove(path)


def check_output(option, path):
    """Raises BadRequest if the picture, or table of statistics, `path` cannot be written; the test
    leaves existing files untouched."""
    refuse = functools.partial(refusal, option, path)
    folder = os.path.dirname(os.path.realpath(path))
    if option == "output":
        check_format(path)
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise refuse(f"{folder} is not a folder", "choose another name")
    if not os.path.isdir(folder):
        raise refuse(f"the folder {folder} does not exist", "create it first")
    if os.path.isdir(path) or path.endswith("/"):
        remedy = f", or {path.rstrip('/')}/" if option == "output" else ""
        raise refuse("this is a folder", f"give a file name{remedy}")
    files = Files(path)
    if os.path.isdir(files.checkpoint):
        raise refuse(f"its checkpoint would be {files.checkpoint}, a folder", "choose another name")
    try:
        for name in (path, files.checkpoint, files.on_the_way(99, 99999)):
            with contextlib.suppress(FileNotFoundError):
                os.stat(name)  # fails if the name is too long, or links form a loop
        if problem := unwritable(path):
            remedy = ", or run chmod u+w on it" if is_protected(path) else ""
            raise refuse(f"this is {problem}", f"choose another name{remedy}")
        if not os.path.exists(path):
            try_folder(folder)
    except OSError as error:
        raise refuse(f"cannot be written ({error.strerror})", "use another path") from None
    if option == "stats":
        check_table(path)


def check_table(path):
    """Raises BadRequest if the file `path` exists and is not a table of statistics."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        first = file.readline(1000)
        if first and not first.startswith(COLUMNS[0].encode() + b","):
            problem = "this is not a table of statistics, and would be lost"
            raise refusal("stats", path, problem, "use another name")


def plan_outputs(options, files, watchers):
    """The paths that the run writes, except checkpoints and intermediate pictures. Raises
    BadRequest if one cannot be written."""
    check_output("output", files.picture)
    check_depth(files.picture, options.depth)
    if options.stats:
        check_output("stats", options.stats)
    writes_record = options.sidecar or is_record(files.sidecar)  # one that is out of date goes
    outputs = [files.picture, *([files.sidecar] if writes_record else []), *watchers.writes()]
    for path in outputs:
        if problem := unwritable(path):
            problem = f"the run needs to write {path}, but that is {problem}"
            raise refusal("output", files.picture, problem, "choose another name")
    try:
        folder = os.path.dirname(os.path.realpath(files.picture))
        others = {*outputs} - {options.stats}  # whose folder has been tried
        is_new = not all(map(os.path.exists, others))
        if is_new or options.checkpoint_iter != 0 or "save" in options.iter_behavior:
            try_folder(folder)
    except OSError as error:
        problem = f"{folder}, where the run saves more, cannot be written ({error.strerror})"
        remedy = "add --checkpoint_iter 0 --iter_behavior none, or choose another name"
        raise refusal("output", files.picture, problem, remedy) from None
    return outputs


def check_apart(options, files, network):
    """Raises BadRequest if the run would overwrite a file that it reads, or write two files under
    one name."""
    read = PARSER.files_read(options)
    read |= {"caffe_model": network.weights, "deploy_txt": network.deploy, "resume": files.resumed}
    read = {name: path for name, path in read.items() if path}
    for name, path in read.items():
        is_own_checkpoint = name == "resume" and Files.of_checkpoint(path) is not None
        if not is_own_checkpoint and files.may_write(path):
            problem = f"the run would overwrite --{name} {path}"
            raise refusal("output", files.picture, problem, "choose another name")
    if options.stats:
        taken = {os.path.realpath(path) for path in read.values()}
        if files.may_write(options.stats) or os.path.realpath(options.stats) in taken:
            problem = "the run uses another file of this name"
            raise refusal("stats", options.stats, problem, "choose another name")


def make_room(options, files, record):
    """Removes the unfinished files that killed runs for the same picture left, and renames the
    checkpoint of an unfinished run. Says so if the picture of another command will be replaced:
    one that has not the command of the run's `record`."""
    is_new = files.resumed or not os.path.exists(files.picture)
    if not is_new and not is_made_by(files.picture, record):
        log.info(f"note: {files.picture} exists, from another command, and will be replaced")
    for path in filter(None, (files.picture, options.stats)):
        remove_parts(path)
    files.set_aside()
