"""What a worker of a Dask cluster does for a run: it keeps the network's files, and lends the run
an engine with a process for each of its threads."""

import contextlib
import dataclasses
import glob
import hashlib
import os
import re
import socket
import threading
import time

import numpy as np

from .errors import BadRequest, RunFailed, one_line
from .files import put_in_place, read_text, sha256_of
from .machine import versions
from .models import cache_folder
from .workers import Workers


def kept_path(sha256):
    """Where a worker's machine keeps the file with this hash."""
    return os.path.join(cache_folder(), "cluster", sha256)


def cache_place():
    """In a Dask worker: what identifies its machine and cache."""
    return socket.gethostname(), os.path.realpath(cache_folder())


def missing_files(hashes):
    """In a Dask worker: the hashes of those files that are missing or damaged in the cache."""
    paths = {sha256: kept_path(sha256) for sha256 in hashes}
    return [
        sha256
        for sha256, path in paths.items()
        if not os.path.isfile(path) or sha256_of(path) != sha256
    ]


def keep_part(sha256, sender, data, is_first, is_last):
    """In a Dask worker: appends data to a file in the cache. Raises RunFailed."""
    path = kept_path(sha256)
    part = f"{path}.{socket.gethostname()}.{sender}"  # machines may share a cache
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if is_first:  # remove leftovers of killed senders
        for other in glob.glob(f"{glob.escape(path)}.*"):
            if time.time() - os.path.getmtime(other) > 3600:
                os.remove(other)
    try:
        with open(part, "wb" if is_first else "ab") as file:
            file.write(data)
        if is_last and sha256_of(part) != sha256:
            raise OSError("it was damaged in transit")
        if is_last:
            put_in_place(part, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.remove(part)
        raise RunFailed(f"{path} cannot be written ({one_line(error.strerror or error)})") from None


class Loan:
    """In a Dask worker: what it lends to one run. It ends with the run, or after five minutes
    without use."""

    SILENCE = 300
    lock, made = threading.Lock(), {}  # {run: Loan, or None if the run has ended}

    def __init__(self):
        self._lock, self._has_ended = threading.Lock(), False
        self._users, self._last = 0, time.monotonic()

    @classmethod
    @contextlib.contextmanager
    def of(cls, run, *arguments):
        """The Loan for a run, which counts as used within this context; made with these arguments
        and the number of the worker's threads if there is none. Raises what that raises, and
        RunFailed."""
        import distributed

        with cls.lock:
            if run not in cls.made:
                cls.made[run] = loan = cls(*arguments, distributed.get_worker().state.nthreads)
                threading.Thread(target=loan._end_if_silent, args=(run,), daemon=True).start()
            loan = cls.made[run]
            if loan is None:
                raise RunFailed("the run has ended")
            loan._users += 1
        try:
            yield loan
        finally:
            with cls.lock:
                loan._users, loan._last = loan._users - 1, time.monotonic()

    def _end_if_silent(self, run):
        is_silent = False
        while not is_silent:
            time.sleep(min(5, self.SILENCE / 10))
            with Loan.lock:
                if self.made.get(run) is not self:
                    return
                is_silent = not self._users and time.monotonic() > self._last + self.SILENCE
                if is_silent:  # if the run calls again, it gets a new one
                    del self.made[run]
        self.end()

    def end(self):
        """Ends it immediately."""
        with self._lock:
            if not self._has_ended:
                self._has_ended = True
                self.give_back()

    def give_back(self):
        """Ends what was lent."""
        raise NotImplementedError


class TileLoan(Loan):
    """An engine with a process for each thread of the worker; all of those threads use it."""

    def __init__(self, spec, objective, threads):
        super().__init__()
        self._workers = Workers(spec, objective, threads)
        try:
            self._workers.describe()
            self._workers.expect(threads)
        except BaseException:
            self.end()
            raise

    def examine(self):
        """What `describe` found; the hash of the network's gradient for one picture; and the
        pycaffe version and processor, on which that depends."""
        facts = {name: getattr(self._workers, name) for name in DESCRIBED}
        gradient, _ = self.compute(a_picture(facts["tile_size"]))
        return examined(facts, gradient)

    def compute(self, tile, measure=False):
        """The gradient of one tile, and its loss."""
        with self._while_it_lasts():
            ticket = self._workers.send([tile], measure)
        while not self._workers.is_done(ticket):
            with self._while_it_lasts():
                pass
        with self._while_it_lasts():
            return self._workers.receive(ticket)[0]

    @contextlib.contextmanager
    def _while_it_lasts(self):
        with self._lock:
            if self._has_ended:
                raise RunFailed("the run has ended")
            yield

    def give_back(self):
        self._workers.end(at_once=True)


def a_picture(size):
    """A picture (3, H, W) to try a network with, the same on all workers."""
    return np.random.default_rng(0).normal(0, 50, (3, *size))


def examined(facts, gradient):
    """What the task `examine` returns: the facts, DESCRIBED; the hash of the gradient of a_picture;
    and what that depends on."""
    return facts, hashlib.sha256(gradient.tobytes()).hexdigest(), made_by()


def made_by():
    """The pycaffe version and the processor, on which pixels depend."""
    cpu = re.search(r"^model name\s*: (.*)", read_text("/proc/cpuinfo"), re.MULTILINE)
    cpu = cpu[1] if cpu else "unknown processor"
    return f"pycaffe {versions().get('pycaffe', 'unknown')}, {cpu}"


DESCRIBED = ("tile_size", "shapes", "notices")  # set by Engine.describe()


def end_loan(run):
    """In a Dask worker: ends the Loan for a run. Does not wait for that, as Dask calls this in its
    event loop."""

    def end():
        with Loan.lock:
            loan, Loan.made[run] = Loan.made.get(run), None
        if loan:
            loan.end()

    threading.Thread(target=end).start()


def with_kept_files(spec):
    """The NetworkSpec with this machine's files: the one that came has hashes, see Crew."""
    kept = {name: kept_path(sha256) for name, sha256 in spec.files.paths().items()}
    return dataclasses.replace(spec, files=dataclasses.replace(spec.files, **kept))


def answer(lent, task, arguments):
    """In a Dask worker: calls the method `task` of the Loan that the context manager `lent` has;
    returns (True, its result), or (False, the BadRequest or RunFailed that it raised)."""
    try:
        with lent as loan:
            return True, getattr(loan, task)(*arguments)
    except (BadRequest, RunFailed) as error:
        return False, error


def on_loan(run, task, spec, objective, *arguments):
    """In a Dask worker: what the run's TileLoan answers."""
    return answer(TileLoan.of(run, with_kept_files(spec), objective), task, arguments)
