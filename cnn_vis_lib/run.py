"""A run in progress: its watchers, its signals, and what is written however it ends."""

import argparse
import contextlib
import dataclasses
import json
import logging
import math
import os
import signal
import sys
import tempfile
import time

import numpy as np

from .bar import ProgressBar
from .behaviors import Watchers
from .checkpoints import Checkpoint
from .engines import idle
from .errors import BadRequest, NotFinite, OutOfMemory, RunFailed, Stopped, log
from .files import whole_file
from .inputs import Inputs
from .models import stand_in_notice
from .outputs import Files
from .records import read_record, remove_record
from .watchers import Pace
from .writing import write_picture


class Signals:
    """A context manager that handles Ctrl-C, SIGTERM and SIGHUP. A signal raises Stopped, unless
    `held`: then the first is only remembered, as `signum`, so that the run ends at a point where it
    can be continued; another Ctrl-C raises Stopped. The third ends the process.

    See also signals_held_back, which is used while processes start."""

    def __init__(self):
        self.held, self.signum, self._count = False, None, 0
        self.is_saving = True  # whether the run that a signal ends is to be saved

    def __enter__(self):
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        handlers = {number: signal.getsignal(number) for number in numbers}
        # Signals that are ignored already stay so: by nohup, or by a shell for background jobs.
        self._before = {n: handler for n, handler in handlers.items() if handler != signal.SIG_IGN}
        for number in self._before:
            signal.signal(number, self._handle)
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def hold(self, held=True):
        """From now on the first signal is only remembered, or with False raises Stopped. Raises
        Stopped if a signal has come already: C code may have swallowed its exception."""
        self.held, self.is_saving = held, True
        if self.signum:
            raise Stopped(self.signum)

    def _handle(self, signum, _):
        self._count += signum == signal.SIGINT or not self.held or not self.signum
        if self._count > 2:
            os._exit(128 + signum)
        if self.held and self.signum and signum != signal.SIGINT:
            return  # supervisors often signal the process, then its group
        is_first, self.signum = not self.signum, self.signum or signum
        if not (self.held and is_first):
            raise Stopped(signum)
        if sys.stderr.isatty() and self.is_saving:
            text = "Saving the run; press Ctrl-C again to stop immediately."
            os.write(2, f"\n{text}\n".encode())


@dataclasses.dataclass
class Batch:
    """The place of a run among several: how many there are; its number, from 1; the port on which
    web showed the earlier ones; whether what they have in common was told; the files of those that
    are finished; and the progress bar of all. On another machine, `typed` are the options with the
    names of files where they were typed, and `folder` is the current folder there."""

    count: int = 1
    number: int = 1
    port: int = 0
    is_announced: bool = False
    made: list = dataclasses.field(default_factory=list)
    bar: object = None
    typed: argparse.Namespace | None = None
    folder: str | None = None

    def __post_init__(self):
        self.bar = self.bar or ProgressBar(self.count)

    def announce(self, first, others):
        """Logs the lines about a run that begins: `first`, or `others` if others have begun."""
        lines, self.is_announced = others if self.is_announced else first, True
        for line in lines:
            log.info(line)

    def is_last(self):
        """Whether no picture comes after it."""
        return self.number == self.count

    def __str__(self):
        return f"picture {self.number} of {self.count}, " if self.count > 1 else ""


@dataclasses.dataclass
class Run:
    """A run in progress: what its stages and watchers share. `kept` holds the arrays that watchers
    stored in the checkpoint that it continues from."""

    options: argparse.Namespace
    files: Files
    watchers: Watchers
    inputs: Inputs
    dream: object
    record: dict
    kept: dict
    batch: Batch
    error: BaseException | None = None  # how it ended, unless it is done
    is_stopping: object = lambda: False  # whether a signal has come

    def __post_init__(self):
        self.begun = time.monotonic() - self.record["seconds"]
        self.folder = self.batch.folder or os.getcwd()  # which may be deleted during the run

    def made(self, **more):
        """The record of how the picture as it stands was made."""
        return self.record | {"seconds": round(time.monotonic() - self.begun, 1)} | more

    def checkpoint(self):
        """The run so far, as a Checkpoint."""
        numbers, arrays = self.dream.state()
        arrays |= self.inputs.arrays() | self.kept | self.watchers.keep()
        return Checkpoint(self.made(), self.folder, numbers, arrays)


def announce(options, network, dream, remarks, batch):
    """Tells what is about to be done; what holds for all pictures of a Batch, only at the first
    one. Called after all checks, so that an error is the only line printed."""
    engine, settings = dream.engine, dream.settings
    general = [stand_in_notice(options.model, network.name), *idle(options, engine)]
    general += network.notices
    if dream.picture is not None and not options.preset and has_original_steps(settings):
        general.append(
            f"without a preset, there are {settings.num_steps} steps, as in the original; for "
            "a picture in a minute: --preset dream"
        )
    own = [f"note: {line}" for line in [*remarks, *engine.notices]]
    seed = f", noise seed {settings.seed}" if dream.picture is None else ""
    shown = [f"{width}x{height}" for height, width in dream.sizes]
    sizes, steps = shown[0], f"{settings.num_steps} step{'s' * (settings.num_steps > 1)}"
    if shown[1:]:
        sizes, steps = f"{len(shown)} sizes from {shown[0]} to {shown[-1]}", f"{steps} each"
    time_left = "" if batch.count > 1 else expected_time(dream)
    first = [f"note: {line}" for line in general if line] + own
    first.append(
        f"{batch}{network.name}, {settings.target_layer}, {engine.device}: {sizes} pixels (width x "
        f"height), {steps}{seed}{time_left}"
    )
    if options.verbose:
        layers = [target.layer for target in settings.target_layer.targets]
        shapes = (f"{layer} {'x'.join(map(str, engine.shapes[layer]))}" for layer in layers)
        first.append(f"{network.weights}; {', '.join(shapes)} a tile; sizes {' '.join(shown)}")
    others = [*own, f"{batch}{options.output_file}: {sizes} pixels{seed}"]
    batch.announce(first, others)


def has_original_steps(settings):
    """Whether the number of steps and how they are taken are the original's defaults."""
    names = ("num_steps", "learning_rate", "step_rule")
    return all(getattr(settings, name) == getattr(type(settings), name) for name in names)


FEW_TILES = 300  # take no time worth telling


def expected_time(dream):
    """How long the rest of a run takes, as ", about 3 minutes", judged by a batch of tiles on each
    device; "" if it has only a few tiles, or nobody would be told."""
    engine, steps = dream.engine, dream.settings.num_steps
    pace, most, rounds = Pace(dream), 1, 0
    if pace.total - pace.done < FEW_TILES or not log.isEnabledFor(logging.INFO):
        return ""
    engine.expect(max(map(len, dream.tiles(dream.size))))
    for number, size in enumerate(dream.sizes[dream.size_number - 1 :]):
        left = steps if number else steps - dream.step
        turns = [math.ceil(len(colour) / engine.number) for colour in dream.tiles(size)]
        most = max(most, min(engine.batch_size, max(turns)))
        rounds += left * sum(math.ceil(tiles / engine.batch_size) for tiles in turns)
    batch = [np.zeros((3, *engine.tile_size), np.float32)] * most
    for _ in range(2):  # the first also prepares
        begun = time.monotonic()
        for ticket in [engine.send(batch, measure=False) for _ in range(engine.number)]:
            engine.receive(ticket)
    return f", about {duration(rounds * (time.monotonic() - begun))}"


def duration(seconds):
    """A rough duration in words."""
    if seconds < 90:
        return f"{max(5, 5 * round(seconds / 5))} seconds"
    minutes = round(seconds / 60)
    return f"{minutes} minutes" if minutes < 90 else f"{minutes / 60:.1f} hours"


# How a run can end: whether its checkpoint is saved then, and whether its picture is, if that is
# worth more than an earlier one.
ENDS = {
    "done": (False, True),
    "stopped": (True, True),
    "stopped twice": (False, False),
    "overflowed": (False, True),
    "out of memory": (False, True),
    "failed": (True, True),
}


def watch(run, signals):
    """Does the run with its watchers. However it ends, the picture so far is written, unless it
    would replace one that is worth more. Raises RunFailed, or Stopped after a signal."""
    signals.hold()
    run.is_stopping = lambda: signals.signum
    with contextlib.ExitStack() as stack:
        stack.callback(run.watchers.clear)  # they refer to the run: it would not be freed at once
        for watcher in run.watchers:
            watcher.begin(run)
            stack.callback(watcher.close)
        try:
            conclude(run, *take_steps(run), signals)
        except BaseException as error:
            run.error = error  # for watchers, when they are closed
            raise


def take_steps(run):
    """Does the steps of a run; returns (how it ended, as in ENDS; the error, if it was one)."""
    try:
        for progress in run.dream.run(run.watchers.wants_stats, run.is_stopping):
            run.watchers.after_step(progress)
        return ("done" if run.dream.is_done() else "stopped"), None
    except Stopped as error:
        return "stopped twice", error
    except NotFinite as error:
        return "overflowed", error
    except (OutOfMemory, MemoryError):
        return "out of memory", OutOfMemory()
    except (RunFailed, OSError) as error:
        return "failed", error
    except Exception:  # a bug in this program: save the picture, show the traceback
        with contextlib.suppress(Exception):
            finish(run)
        raise


def conclude(run, end, error, signals):
    """Saves what is to be saved when a run has ended in one of the ways in ENDS. Raises RunFailed
    or Stopped, which tell how to continue, unless the run is done."""
    files, (saves_checkpoint, saves_picture) = run.files, ENDS[end]
    if saves_checkpoint and run.options.checkpoint_iter != 0 and run.dream.has_state():
        try:
            run.checkpoint().write(files.checkpoint)
        except RunFailed as problem:
            if error is None:
                log.error(str(problem))
    is_written = saves_picture and (end == "done" or is_worth_more(run))
    if is_written:
        try:
            finish(run)
        except RunFailed as problem:
            if error is None:
                raise RunFailed(f"{problem}{rescue(run)}") from None
            is_written = False
    if end == "done":
        seconds = int(time.monotonic() - run.begun)
        log.info(f"{files.picture}: done in {seconds // 60:02}:{seconds % 60:02}")
        files.clean_up()
        run.batch.made.append(files.picture)
        signals.is_saving = False
        return
    where = f"; the picture so far is in {files.picture}" if is_written else ""
    hint = "" if end == "overflowed" or run.dream.image is None else files.hint()
    if end == "stopped twice":
        raise Stopped(error.signum, f"stopped immediately{hint}") from None
    if end == "stopped":
        told = "stopped" if is_written else "stopped before the first step"
        raise Stopped(signals.signum, f"{told}{where}{hint}")
    told = f"{error}{where}{hint}"
    raise (Stopped(signals.signum, told) if signals.signum else RunFailed(told)) from None


def finish(run):
    """Writes the picture as it stands, and everything that goes with it. Raises RunFailed."""
    dream, files = run.dream, run.files
    progress = dream.progress()
    picture = progress.picture(run.options.rescale_image, run.options.depth)
    where = {} if dream.is_done() else {"size": dream.size_number, "step": dream.step}
    record = run.made(**where)
    write_picture(picture, files.picture, record, f"--output {files.picture}")
    if run.options.sidecar or not remove_record(files.sidecar):
        with whole_file(files.sidecar) as file:
            file.write(json.dumps(record, indent=1).encode())
    failures = []
    for watcher in run.watchers:
        try:
            watcher.finish(progress)
        except RunFailed as error:
            failures.append(str(error))
    if failures:
        raise RunFailed("; ".join(failures))


def is_finished(path):
    """Whether the picture `path` is finished, as far as its record tells."""
    try:
        return "step" not in read_record(path)[0]
    except BadRequest:
        return True


def is_worth_more(run):
    """Whether the unfinished picture is worth more than the file, if any, that it would replace:
    not than a finished one, unless that is this run's own, or no checkpoint holds the unfinished
    one as well."""
    files = run.files
    if run.dream.image is None:
        return False
    if not os.path.exists(files.picture):
        return True
    is_saved = os.path.exists(files.checkpoint)
    if is_saved and not files.resumed and is_finished(files.picture):
        return False
    return run.dream.progress().steps_done() > 0


def rescue(run):
    """Saves the checkpoint of a run whose picture could not be written, in the temporary folder if
    need be; returns how to continue."""
    files = run.files
    with contextlib.suppress(RunFailed):
        run.checkpoint().write(files.checkpoint)
        return files.hint()
    stats = run.options.stats
    is_gone = stats and not os.path.isdir(os.path.dirname(os.path.realpath(stats)))
    with contextlib.suppress(OSError):
        folder = tempfile.mkdtemp(prefix="cnn-vis-")
        files.checkpoint = os.path.join(folder, os.path.basename(files.checkpoint))
        try:
            run.checkpoint().write(files.checkpoint)
        except RunFailed:
            os.rmdir(folder)
            return ""
        more = " --stats ANOTHER.csv" if is_gone else ""
        return f"{files.hint()} --output ANOTHER.png{more}"
    return ""
