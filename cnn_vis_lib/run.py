"""A run in progress: its watchers, its signals, and what is written however it ends."""

import argparse
import contextlib
import dataclasses
import json
import os
import signal
import sys
import tempfile
import time

from .behaviors import Watchers
from .checkpoints import Checkpoint
from .engines import idle
from .errors import NotFinite, OutOfMemory, RunFailed, Stopped, log
from .files import whole_file
from .inputs import Inputs
from .models import stand_in_notice
from .outputs import Files
from .records import remove_record
from .writing import write_picture


class Signals:
    """A context manager that handles Ctrl-C, SIGTERM and SIGHUP. A signal raises Stopped, unless
    `held`: then the first is only remembered, as `signum`, so that the run ends at a point where it
    can be continued; another Ctrl-C raises Stopped. The third ends the process.

    See also signals_held_back, which is used while processes start."""

    def __init__(self):
        self.held, self.signum, self._count = False, None, 0

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
        self.held = held
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
        if sys.stderr.isatty():
            text = "Saving the run; press Ctrl-C again to stop immediately."
            os.write(2, f"\n{text}\n".encode())


@dataclasses.dataclass
class Batch:
    """The place of a run among several: how many there are; its number, from 1; how many tiles
    the earlier ones had; and the port on which web showed them."""

    count: int = 1
    number: int = 1
    done: int = 0
    port: int = 0

    def __str__(self):
        return f"picture {self.number}/{self.count}, " if self.count > 1 else ""


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

    def __post_init__(self):
        self.begun = time.monotonic() - self.record["seconds"]
        self.folder = os.getcwd()  # now, because it may be deleted during the run

    def made(self, **more):
        """The record of how the picture as it stands was made."""
        return self.record | {"seconds": round(time.monotonic() - self.begun, 1)} | more

    def checkpoint(self):
        """The run so far, as a Checkpoint."""
        numbers, arrays = self.dream.state()
        arrays |= self.inputs.arrays() | self.kept | self.watchers.keep()
        return Checkpoint(self.made(), self.folder, numbers, arrays)


def announce(options, network, dream, remarks, batch):
    """Logs what is about to be done; what holds for all pictures of a Batch, only at the first one.
    Called after all checks, so that an error is the only line printed."""
    engine, notices = dream.engine, []
    if batch.number == 1:
        stand_in = stand_in_notice(options.model, network.name)
        notices = [stand_in, *idle(options, engine), *network.notices]
    for line in filter(None, [*notices, *remarks, *engine.notices]):
        log.info(f"note: {line}")
    seed = f", noise seed {dream.settings.seed}" if dream.picture is None else ""
    layers = [target.layer for target in dream.settings.target_layer.targets]
    shapes = " + ".join("x".join(map(str, engine.shapes[layer])) for layer in layers)
    log.info(
        f"{network.name} ({network.weights}), {dream.settings.target_layer} "
        f"{shapes}, "
        f"{engine.device}, "
        f"sizes {' '.join(f'{h}x{w}' for h, w in dream.sizes)}{seed}"
    )


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
    """Does the run with its watchers. However it ends, the picture so far is written, but not in
    place of another one before the first step. Raises RunFailed, or Stopped after a signal."""
    signals.hold()
    with contextlib.ExitStack() as stack:
        for watcher in run.watchers:
            watcher.begin(run)
            stack.callback(watcher.close)
        try:
            conclude(run, *take_steps(run, signals), signals)
        except BaseException as error:
            run.error = error  # for watchers, when they are closed
            raise


def take_steps(run, signals):
    """Does the steps of a run; returns (how it ended, as in ENDS; the error, if it was one)."""
    try:
        for progress in run.dream.run(run.watchers.wants_stats, lambda: signals.signum):
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
    is_written = saves_picture and (end == "done" or has_begun(run))
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
        return
    where = f"; the picture so far is in {files.picture}" if is_written else ""
    hint = "" if end == "overflowed" or run.dream.image is None else files.hint()
    if end == "stopped twice":
        raise Stopped(error.signum, f"stopped immediately{hint}") from None
    if end == "stopped":
        told = "stopped" if is_written else "stopped before the first step"
        raise Stopped(signals.signum, f"{told}{where}{hint}")
    raise RunFailed(f"{error}{where}{hint}") from None


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


def has_begun(run):
    """Whether the picture is worth more than the file, if any, that it would replace."""
    if run.dream.image is None:
        return False
    return run.dream.progress().steps_done() or not os.path.exists(run.files.picture)


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
