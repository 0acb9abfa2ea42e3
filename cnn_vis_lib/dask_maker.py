"""What a worker of a Dask cluster does for a batch: it lends it a maker for each of its threads.

A picture's start picture, mask, guide and checkpoint come as bytes, and what its run writes goes
back as bytes: for the run they are files in a folder of its own, and in what it prints and records
they have the names that they have where the command was typed."""

import argparse
import contextlib
import copy
import dataclasses
import os
import tempfile

import numpy as np

from .behaviors import ARRAYS
from .checkpoints import Checkpoint
from .dask_worker import DESCRIBED, Loan, a_picture, answer, examined, with_kept_files
from .errors import BadRequest, OutOfMemory, RunFailed, one_line
from .files import read_bytes
from .makers import MakerProcesses, Place, Reporter, make_here
from .network import load_network
from .outputs import Files
from .processes import report


@dataclasses.dataclass
class Parcel:
    """A picture to be made elsewhere: its options as they were typed in the `folder`; the content
    of the pictures that they name, {attribute: bytes}; that of its checkpoint, or None; its number
    and the number of all."""

    options: argparse.Namespace
    folder: str
    pictures: dict
    checkpoint: bytes | None
    number: int
    count: int

    def unpack(self, folder):
        """Writes the files into a folder here; returns (the options with their names, {name here:
        name where it was typed})."""
        options, names = copy.copy(self.options), {}

        def place(attribute):
            path = getattr(self.options, attribute)
            inside = os.path.join(folder, attribute)
            os.makedirs(inside, exist_ok=True)
            names[inside] = os.path.dirname(path) or "."
            setattr(options, attribute, os.path.join(inside, os.path.basename(path)))
            return getattr(options, attribute)

        for attribute, content in self.pictures.items():
            with open(place(attribute), "wb") as file:
                file.write(content)
        checkpoint = Files(place("output_file")).checkpoint
        if self.checkpoint and not os.path.exists(checkpoint):  # else of a maker that has died
            with open(checkpoint, "wb") as file:
                file.write(self.checkpoint)
        if options.stats:
            place("stats")
        return options, names


def as_typed(text, names):
    """The text, with names of files as they were typed."""
    for here, there in names.items():
        text = text.replace(f"{here}/", "" if there == "." else f"{there.rstrip('/')}/")
    return text


def error_as_typed(error, names):
    """The BadRequest or RunFailed for an exception, with names of files as they were typed."""
    if isinstance(error, BadRequest):
        parts = (error.problem, error.remedy, error.option, error.value)
        return BadRequest(*(p if p is None else as_typed(str(p), names) for p in parts))
    if isinstance(error, MemoryError):
        return OutOfMemory()
    return RunFailed(as_typed(one_line(error), names))


def saved_here(options):
    """(options, Checkpoint) to continue a picture whose checkpoint has been unpacked."""
    path = Files(options.output_file).checkpoint
    if not os.path.exists(path):
        return options, None
    options = copy.copy(options)
    options.resume = path
    return options, Checkpoint.read(path, ARRAYS)


def make_in_folder(make_picture, parcel, where, folder, pause):
    """Task: makes the picture in a Parcel, with its files in the folder. Returns whether it is
    done, or else was stopped; raises BadRequest or RunFailed. The Place in `where` is still
    missing."""
    try:
        options, names = parcel.unpack(folder)
    except OSError as error:
        raise RunFailed(f"{folder}: {one_line(error)}") from None

    def tell(what, *values):
        report(what, *(spelled(value, names) for value in values))

    place = Place(parcel.count, parcel.number, bar=Reporter(pause), tell=tell)
    place.typed, place.folder = parcel.options, parcel.folder
    try:
        return make_here(make_picture, options, (place, *where[1:]), saved_here)
    except (BadRequest, RunFailed, MemoryError, OSError) as error:
        raise error_as_typed(error, names) from None


def spelled(value, names):
    """A text, or a list of texts, with names of files as they were typed."""
    return (
        [as_typed(v, names) for v in value] if isinstance(value, list) else as_typed(value, names)
    )


def examine(spec):
    """Task: what a TileLoan's `examine` returns."""
    network = load_network(spec)
    network.forward(a_picture(network.tile_size)[np.newaxis].astype(np.float32))
    gradient = network.backward([(name, -a) for name, a in network.activations().items()])
    return examined({name: getattr(network, name) for name in DESCRIBED}, gradient)


class PictureLoan(Loan):
    """In a Dask worker: a maker for each of its threads."""

    PAUSE = 1  # seconds between reports about a picture

    def __init__(self, spec, topic, threads):
        import distributed

        super().__init__()
        self._spec, self._topic, self._worker = spec, topic, distributed.get_worker()
        self._folders = {}  # {number of a picture: where it is being made}
        self._makers = MakerProcesses(threads, threads, self._report)

    def _report(self, *what):
        with contextlib.suppress(Exception):  # the scheduler may be gone
            self._worker.log_event(self._topic, [self._worker.address, *what])

    def examine(self):
        """What Crew wants to know of a worker."""
        return self._makers.call(examine, self._spec)

    def make(self, make_picture, parcel, device):
        """Makes a picture. Returns (True if it is done, False if it was stopped, or the exception
        that made it fail; the content of the files that were written, {attribute: {name: bytes}},
        by the option that names their folder)."""
        place = self._worker.local_directory  # which Dask removes even if it is killed
        with tempfile.TemporaryDirectory("", "cnn-vis-", place, True) as folder:
            self._folders[parcel.number] = folder
            more = (device, self._spec.files, folder, self.PAUSE)
            task, make = self._worker.get_current_task(), self._makers.make

            def is_wanted():  # not if the run is gone, or has sent the picture elsewhere
                state = self._worker.state.tasks.get(task)
                return state is not None and state.state != "cancelled"

            try:
                how = make(make_in_folder, make_picture, parcel, None, *more, is_wanted=is_wanted)
            except (BadRequest, RunFailed) as error:
                how = error
            finally:
                del self._folders[parcel.number]
            return how, {name: contents(folder, name) for name in ("output_file", "stats")}

    def checkpoint(self, number, seen):
        """(when it was saved, the content) of the last checkpoint of a picture that is under way;
        None if there is none, or it has been `seen`."""
        with contextlib.suppress(OSError, ValueError, KeyError):
            folder = os.path.join(self._folders[number], "output_file")
            (name,) = [name for name in os.listdir(folder) if name.endswith(".checkpoint")]
            path = os.path.join(folder, name)
            time = os.stat(path).st_mtime_ns
            return None if time == seen else (time, read_bytes(path))

    def stop(self, signum):
        """Lets the makers save what they have."""
        self._makers.stop(signum)

    def give_back(self):
        self._makers.end()


def contents(folder, name):
    """{name: content} of the files in a folder's folder `name`."""
    inside = os.path.join(folder, name)
    names = os.listdir(inside) if os.path.isdir(inside) else []
    return {n: read_bytes(os.path.join(inside, n)) for n in names if not n.endswith(".part")}


def on_makers(run, task, spec, _, *arguments):
    """In a Dask worker: what the run's PictureLoan answers."""
    return answer(PictureLoan.of(run, with_kept_files(spec), run), task, arguments)


def if_lent(run, task, *arguments):
    """In a Dask worker, in its event loop: calls a method of the run's PictureLoan, if there is
    one."""
    loan = Loan.made.get(run)
    return getattr(loan, task)(*arguments) if loan else None
