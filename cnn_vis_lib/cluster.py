"""The engine on a Dask cluster.

Workers of the cluster have this program installed, in the same version, and need not share a disk:
they are sent the network's files, once for each machine. Caffe runs in child processes, so a crash
in Caffe does not end the Dask worker."""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import logging
import os
import pickle
import re
import threading
import time
import warnings

import numpy as np

from .dask_worker import DESCRIBED, cache_place, end_loan, keep_part, missing_files, on_loan
from .errors import BadRequest, RunFailed, log, one_line, refusal
from .install import VERSION, fingerprint, missing_package
from .models import content_of
from .workers import Engine


class Call:
    """A function call that is pickled here and done when it is unpickled, in a worker. The
    scheduler, which inspects tasks, need not have this program."""

    def __init__(self, function, *arguments):
        self._call = (function, arguments)

    def __reduce__(self):
        return self._call


class Crew:
    """The workers of a Dask cluster, which may come and go. Before a worker is used, a separate
    thread here sends it the files that it lacks and tries the network there.

    `entry`, on_loan or the like, is what workers call for a task; `run` is the run's name for them.
    `known` holds the addresses of all workers; `threads`, {address: number}, the thread counts of
    those in use; `unfit`, {address: exception}, why others are not used; `found`, what the task
    `examine` returned on the first worker.
    """

    PART = 16 << 20  # bytes of a file sent in one message

    def __init__(self, client, address, spec, objective, entry=on_loan):
        self.client, self.address, self._objective = client, address, objective
        self._entry = entry
        self.known, self.threads, self.unfit, self.found = set(), {}, {}, None
        self.is_announced = False  # once True, unfit workers are reported when found
        self.run = os.urandom(16).hex()
        hashes = content_of(spec.files)
        self._files = {sha256: getattr(spec.files, name) for name, sha256 in hashes.items()}
        self._spec = dataclasses.replace(spec, files=dataclasses.replace(spec.files, **hashes))
        self._lock, self._sending = threading.Lock(), collections.defaultdict(threading.Lock)
        self._trials, self._closing = [], threading.Event()

    def check_scheduler(self):
        """Raises RunFailed if the scheduler is gone, and the client has given up on it."""
        if self.client.status in ("closing", "closed"):
            raise RunFailed(f"the scheduler {self.address} is gone")

    def start(self):
        """Starts watching the workers, in a thread, and waits until one can be used. Raises what is
        wrong if none can, and RunFailed."""
        threading.Thread(target=self._look_after, daemon=True).start()
        begun, is_told = time.monotonic(), False
        while True:
            self.check_scheduler()
            waited, pending = time.monotonic() - begun, self.pending()
            if self.found and (not pending or waited > 20):
                break
            if self.unfit and not pending and not self.found:
                raise next(iter(self.unfit.values()))
            if not self.known and not is_told and waited > 2:
                log.info(f"note: {self.address} has no workers yet; waiting for them")
                is_told = True
            time.sleep(0.05)
        self.is_announced = True

    def notices(self):
        """Lines for the user about the network, and about workers that are not used."""
        lines = map(self.with_files_here, self.found[0]["notices"])
        return [*lines, *(f"{problem}; this worker is not used" for problem in self.unfit.values())]

    def __str__(self):
        """What runs are on, for people."""
        workers, threads = len(self.threads), sum(self.threads.values())
        many = "s" * (workers > 1), "s" * (threads > 1)
        return f"{self.address}, {workers} worker{many[0]}, {threads} thread{many[1]}"

    def pending(self):
        """The addresses of workers that are being prepared."""
        with self._lock:
            return self.known - self.threads.keys() - self.unfit.keys()

    def end(self, futures):
        """Cancels futures and ends the run's Loans on the workers. Waits three seconds at most, as
        a worker that is cut off may never answer."""
        self._closing.set()

        def end():
            with contextlib.suppress(Exception):
                self.client.cancel(futures + self._trials)
                workers = list(self.known)
                self.client.run(end_loan, self.run, workers=workers, on_error="ignore")

        ending = threading.Thread(target=end, daemon=True)
        ending.start()
        ending.join(3)

    def submit(self, task, workers, *arguments):
        """Submits a task, a Loan method's name, to one of the workers; returns its future."""
        call = Call(self._entry, self.run, task, self._spec, self._objective, *arguments)
        arguments = (pickle.loads, pickle.dumps(call))
        return self.client.submit(*arguments, workers=list(workers), pure=False)

    def exception(self, error, address):
        """The exception to raise here for one that a worker raised: with the names of files here,
        and the worker's address unless an option is to blame."""
        here = self.with_files_here
        if isinstance(error, BadRequest) and error.option:
            value = here(str(error.value))
            return BadRequest(here(error.problem), error.remedy, error.option, value)
        kind = BadRequest if isinstance(error, BadRequest) else RunFailed
        return kind(f"worker {address}: {here(str(error))}")

    def with_files_here(self, message):
        """A worker's message, with the names that its files have on this machine."""
        for sha256, path in self._files.items():
            message = re.sub(rf"\S*{sha256}", lambda _, path=path: path, message)
        return message

    def _look_after(self):
        while not self._closing.wait(0.3):
            try:
                present = self.client.nthreads()
            except Exception:  # the scheduler does not answer
                present = {}
            if self._closing.is_set():
                return
            with self._lock:
                before = self.threads
                self.threads = {a: n for a, n in before.items() if a in present}
                for address in before.keys() - self.threads.keys() if self.threads else ():
                    log.warning(f"note: worker {address} is gone; {len(self.threads)} left")
                if before and not self.threads:
                    log.warning(f"note: all workers of {self.address} are gone; waiting for others")
                newcomers = present.keys() - self.known
                self.known = set(present)
            for address in newcomers:
                arguments = (address, present[address])
                threading.Thread(target=self._welcome, args=arguments, daemon=True).start()

    def _welcome(self, address, threads):
        """Prepares a new worker, and tries the network there."""
        problem, facts = None, None
        try:
            problem = self._other_version(address)
            if not problem:
                self._send_files(address)
                future = self.submit("examine", [address])
                self._trials.append(future)
                is_fit, facts = future.result()
                problem = None if is_fit else self.exception(facts, address)
        except Exception as error:
            if not self._is_present(address):
                with self._lock:  # if it comes back, it counts as new
                    self.known = self.known - {address}
                return
            problem = self.exception(RunFailed(one_line(error)), address)
        with self._lock:
            if address not in self.known or self._closing.is_set():
                return
            if problem:
                self.unfit = self.unfit | {address: problem}
                if self.is_announced:
                    log.warning(f"note: {problem}; this worker is not used")
                return
            self.threads = self.threads | {address: threads}
            self.found = self.found or facts
        if facts[1] != self.found[1]:
            log.warning(
                f"note: worker {address} ({facts[2]}) computes slightly different pixels from the "
                f"first ({self.found[2]}): the result depends on where it is computed"
            )

    def _is_present(self, address):
        """Whether the scheduler has the worker; not if the scheduler itself is gone."""
        try:
            return address in self.client.nthreads()
        except Exception:
            return False

    def on(self, address, function, *arguments):
        """Returns function(*arguments), called in a worker."""
        return self.client.run(function, *arguments, workers=[address])[address]

    def call_on(self, address, function, *arguments):
        """What `on` does, with a function that the scheduler does not have."""
        return self.on(address, pickle.loads, pickle.dumps(Call(function, *arguments)))

    def on_all(self, function, *arguments):
        """Calls function(*arguments) in all workers that are in use."""
        call = pickle.dumps(Call(function, *arguments))
        self.client.run(pickle.loads, call, workers=list(self.threads), on_error="ignore")

    def _other_version(self, address):
        """The RunFailed for a worker that has not this version of the program, or None."""
        try:
            version, code = self.call_on(address, fingerprint)
        except ModuleNotFoundError as error:
            if error.name not in ("cnn_vis", "cnn_vis_lib"):
                raise
            version = code = None
        if code == fingerprint()[1]:
            return None
        problem = f"has another cnn-vis ({version})" if version else "has no cnn-vis"
        remedy = f"install this one ({VERSION}) in its Python"
        return self.exception(RunFailed(f"its Python {problem}; {remedy}"), address)

    def _send_files(self, address):
        """Sends a worker's machine the files that it lacks."""
        on_worker = functools.partial(self.on, address)
        machine = on_worker(cache_place)
        with self._sending[machine]:  # others on the machine wait, then find the files
            for sha256 in on_worker(missing_files, list(self._files)):
                with open(self._files[sha256], "rb") as file:
                    size, ends = os.fstat(file.fileno()).st_size, (True, False)
                    while not ends[1]:
                        data = file.read(self.PART)
                        ends = (file.tell() == len(data), file.tell() >= size or not data)
                        on_worker(keep_part, sha256, self.run, data, *ends)


def connect(address):
    """The Client of the scheduler at the address. Raises BadRequest."""
    try:
        import dask
        import distributed
    except ModuleNotFoundError as error:
        problem = missing_package(error, "requirements-cluster.txt")
        raise refusal("scheduler", address, problem) from None
    except Exception as error:  # an invalid configuration, for example
        problem = f"Dask cannot be imported ({one_line(error)})"
        raise refusal("scheduler", address, problem, "check its configuration") from None
    for name in filter(re.compile("distributed").match, logging.root.manager.loggerDict):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # we report what matters
    dask.config.set({"distributed.admin.large-graph-warning-threshold": "1GB"})  # for tiles
    greet(address)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about package versions that differ
        return distributed.Client(address, set_as_default=False)


def greet(address):
    """Raises BadRequest unless a scheduler answers within five seconds. (A Client waits forever if
    something else accepts the connection.)"""
    import asyncio

    import distributed

    async def identity():
        arguments = distributed.Security().get_connection_args("client")
        async with distributed.rpc(address, connection_args=arguments) as scheduler:
            return await asyncio.wait_for(scheduler.identity(), 5)

    try:
        with concurrent.futures.ThreadPoolExecutor(1) as pool:  # a loop may be running here
            kind = pool.submit(asyncio.run, identity()).result()["type"]
        problem = f"this is a {kind}, not a scheduler" if kind != "Scheduler" else None
    except Exception as error:  # anything at all may answer
        problem = f"no scheduler answers at this address ({one_line(error)})"
    if problem:
        raise refusal("scheduler", address, problem, "start one with: dask scheduler") from None


@dataclasses.dataclass
class Job:
    """A tile being computed: the arguments of Loan.compute; the future, the workers that it may go
    to, and how often it was lost with them; what on_loan returned."""

    arguments: tuple
    future: object = None
    workers: frozenset = frozenset()
    losses: int = 0
    found: tuple | None = None


class Cluster(Engine):
    """The engine on a Dask cluster. It keeps two tiles in progress for each worker thread. Tiles of
    lost workers are computed again, new workers are used as they join, and the run waits while
    there are none."""

    MAX_LOSSES = 4  # Dask reports each only after several workers have died
    batch_size = 1

    def __init__(self, spec, objective, address):
        self.spec, self.objective, self.address, self.notices = spec, objective, address, []
        self._crew, self._jobs, self._tickets = None, {}, itertools.count()

    @property
    def number(self):
        return max(1, sum(self._crew.threads.values()))

    def describe(self):
        client = connect(self.address)
        self._crew = Crew(client, self.address, self.spec, self.objective)
        self._crew.start()
        for name in DESCRIBED:
            setattr(self, name, self._crew.found[0][name])
        self.notices, self.device = self._crew.notices(), str(self._crew)

    def has_room(self):
        return len(self._jobs) < 2 * self.number

    def send(self, tiles_in, measure=True):
        (tile,), ticket = tiles_in, next(self._tickets)
        self._jobs[ticket] = Job((np.array(tile, np.float32), measure))
        self._place_jobs()
        return ticket

    def _place_jobs(self):
        """Submits the jobs that are not with any of the workers in use."""
        workers = frozenset(self._crew.threads)
        for job in self._jobs.values():
            if workers and (job.future is None or job.workers.isdisjoint(workers)):
                job.workers = workers
                job.future = self._crew.submit("compute", workers, *job.arguments)

    def is_done(self, ticket):
        import distributed

        job = self._jobs[ticket]
        if job.found:
            return True
        self._place_jobs()
        self._crew.check_scheduler()
        if job.future is None:
            time.sleep(0.3)
            return False
        try:
            job.found = job.future.result(timeout=1)
        except (TimeoutError, distributed.TimeoutError):
            pass
        except (distributed.CancelledError, OSError):  # lost with the scheduler or in transit
            job.future = None
        except distributed.KilledWorker as error:
            job.future, job.losses = None, job.losses + 1
            if job.losses == self.MAX_LOSSES:
                raise RunFailed(f"{self.address}: {one_line(error)}") from None
        except Exception as error:
            raise RunFailed(f"{self.address}: {one_line(error)}") from None
        return job.found is not None

    def receive(self, ticket):
        while not self.is_done(ticket):
            pass
        is_done, answer = self._jobs.pop(ticket).found
        if not is_done:
            raise self._crew.exception(answer, f"of {self.address}")
        return [answer]

    def end(self, at_once=False):
        if self._crew is not None:
            self._crew.end([job.future for job in self._jobs.values() if job.future])
            self._crew.client.close(timeout=2)
