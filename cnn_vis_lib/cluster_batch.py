"""A batch on a Dask cluster: each of its workers' threads makes whole pictures.

A picture is sent to a worker with all that it needs, and comes back with all that was written; in
between only lines and numbers cross the network, and each minute its checkpoint."""

import collections
import concurrent.futures
import contextlib
import dataclasses
import os
import queue
import tempfile
import threading
import time

from .cluster import Crew, connect
from .dask_maker import Parcel, if_lent, on_makers
from .errors import RunFailed, Stopped, log, one_line
from .files import read_bytes, sole_writer, whole_file
from .makers import Desk, are_few_and_large, stopped
from .network import NetworkSpec
from .options import PARSER
from .outputs import Files, check_apart, remove_parts
from .processes import in_a_worker
from .records import remove_record
from .resume import under_way
from .run import is_finished


@dataclasses.dataclass
class Job:
    """A picture under way: its options and number; the worker that it was sent to; what keeps other
    runs from writing it; the future of what the worker returns; when it was sent, or a checkpoint
    came back, and when that was saved; who writes its files holds `writing`."""

    options: object
    number: int
    address: str
    lock: object
    future: object = None
    begun: float = dataclasses.field(default_factory=time.monotonic)
    saved: int = 0
    writing: object = dataclasses.field(default_factory=threading.Lock)
    has_returned: bool = False


class ClusterMakers:
    """What Makers are on this machine: makes the pictures of a Batch on the workers of the cluster
    whose scheduler has the address. Pictures of lost workers are sent to others, which go on from
    the last checkpoint that came back; new workers are used as they join. A context manager."""

    MAX_LOSSES = 4
    FETCHED = 16  # pictures at the same time
    SECONDS_AT_RISK = 60  # between checkpoints of a picture that come back
    call = staticmethod(in_a_worker)

    def __init__(self, client, options, batch, network):
        self._batch, self._desk, self._network = batch, Desk(batch), network
        layers = tuple(options.target_layer.layers())
        spec = NetworkSpec(network, layers, input_size=options.input_size)
        self._crew = Crew(client, options.scheduler, spec, None, on_makers)
        self._news, self._under_way, self._losses = queue.Queue(), {}, collections.Counter()
        self._is_ending = threading.Event()
        self._fetching = concurrent.futures.ThreadPoolExecutor(self.FETCHED)

    def __enter__(self):
        topic = self._crew.run
        self._crew.client.subscribe_topic(topic, lambda event: self._news.put(list(event[1])))
        return self

    def __exit__(self, *_):
        self._is_ending.set()
        jobs = list(self._under_way.values())
        self._crew.end([job.future for job in jobs])
        for job in jobs:
            job.lock.close()
        self._crew.client.close(timeout=2)
        self._fetching.shutdown(wait=False, cancel_futures=True)

    def failures(self, jobs, signals, make_picture):
        """Makes a picture for each of the jobs; yields (job, exception) for those that fail.
        Raises Stopped after a signal, when all have stopped and sent what they have, and RunFailed
        if the scheduler is gone."""
        self._crew.start()
        for line in self._crew.notices():
            log.info(f"note: {line}")
        folders = {os.path.dirname(job.output_file) or "." for job in jobs}
        if any(name.endswith(".part") for folder in folders for name in os.listdir(folder)):
            for job in jobs:
                remove_parts(job.output_file)
        threading.Thread(target=self._fetch_checkpoints, daemon=True).start()
        waiting, is_told = collections.deque(enumerate(jobs, 1)), False
        signals.hold()
        while waiting or self._under_way:
            self._crew.check_scheduler()
            if signals.signum and not is_told:
                is_told = True
                waiting.clear()
                arguments = (signals.signum,)  # in a thread: one that is cut off may never answer
                threading.Thread(target=self._stop, args=arguments, daemon=True).start()
            for job in self._lost():
                if not signals.signum:
                    waiting.appendleft((job.number, job.options))
            for number, options, address in self._next(waiting):
                try:
                    self._send(number, options, address, make_picture)
                except Exception as error:
                    self._batch.bar.end_picture(number)
                    yield options, error
            for job, how in self._returned():
                if how is None and not signals.signum:
                    waiting.appendleft((job.number, job.options))
                elif isinstance(how, Exception):
                    yield job.options, how
        if signals.signum:
            raise Stopped(signals.signum, stopped(self._batch))

    def _stop(self, signum):
        with contextlib.suppress(Exception):  # a worker or the scheduler may be gone
            self._crew.on_all(if_lent, self._crew.run, "stop", signum)

    def _next(self, waiting):
        """Yields (number, options, address) of waiting pictures for workers that have less to do
        than threads, or as long as more pictures wait than there are threads, one more: it is there
        when another is finished."""
        threads = dict(self._crew.threads)
        loads = collections.Counter(job.address for job in self._under_way.values())
        for more in (0, 1):
            for address, number in threads.items():
                enough = 0 if more == 0 else sum(threads.values())
                while len(waiting) > enough and loads[address] < number + more:
                    loads[address] += 1
                    yield *waiting.popleft(), address

    def _send(self, number, options, address, make_picture):
        """Sends a picture to a worker. Raises BadRequest, OSError."""
        begun, _ = under_way(options)
        files = Files(options.output_file)
        check_apart(begun, files, self._network)
        lock = contextlib.ExitStack()
        lock.enter_context(sole_writer([options.output_file, *filter(None, [options.stats])]))
        checkpoint = read_bytes(files.checkpoint) if begun.resume else None
        if checkpoint is None:
            files.set_aside()
        pictures = {name: read_bytes(path) for name, path in PARSER.pictures_read(begun).items()}
        begun.resume = None
        count = self._batch.count
        parcel = Parcel(begun, os.getcwd(), pictures, checkpoint, number, count)
        job = Job(options, number, address, lock)
        job.future = self._crew.submit("make", [address], make_picture, parcel, str(self._crew))
        self._under_way[number] = job
        job.future.add_done_callback(lambda _: self._fetching.submit(self._fetch, job))

    def _fetch(self, job):
        """In a thread: gets what a worker returns, and writes it. (One after the other would take
        too long, as the scheduler passes each on.) Puts (Job, how) into the news: whether it is
        done, or the exception that made it fail, or None if it has to be made again."""
        how = None
        try:
            is_fit, found = job.future.result()
            how, written = found if is_fit else (found, {})
            if not isinstance(how, bool):
                how = self._crew.exception(how, job.address)
            with job.writing:
                job.has_returned = True
                self._write(job.options, written, how is True)
        except RunFailed as error:
            how = error
        except Exception as error:
            how = self._loss(job, error)
        self._news.put((job, how))

    def _loss(self, job, error):
        """What _fetch puts into the news after an exception in Dask: None if the picture was lost
        with its worker, or with the scheduler, but not too often."""
        import distributed

        lost = (distributed.KilledWorker, concurrent.futures.CancelledError, OSError)
        if not isinstance(error, (*lost, distributed.CancelledError)):
            return self._crew.exception(RunFailed(one_line(error)), job.address)
        self._losses[job.number] += 1
        if self._losses[job.number] < self.MAX_LOSSES:
            return None
        why = f"{self.MAX_LOSSES} times with its worker ({type(error).__name__})"
        return RunFailed(f"it was lost {why}")

    def _write(self, options, written, is_done):
        """Writes the files that came back; an unfinished picture does not replace a finished one
        that the checkpoint makes up for. Raises RunFailed; then they are in the temporary
        folder."""
        files = Files(options.output_file)
        pictures = written.get("output_file", {})
        is_saved = os.path.basename(files.checkpoint) in pictures
        if (
            not is_done
            and is_saved
            and os.path.exists(files.picture)
            and is_finished(files.picture)
        ):
            for path in (files.picture, files.sidecar):
                pictures.pop(os.path.basename(path), None)
        if os.path.basename(files.picture) in pictures:
            remove_record(files.sidecar)  # of an earlier picture
        try:
            for option, found in written.items():
                write_all(os.path.dirname(getattr(options, option) or ""), found)
        except RunFailed as error:
            raise RunFailed(f"{error}{rescued(written)}") from None

    def _lost(self):
        """Yields the pictures of workers that are gone."""
        for job in list(self._under_way.values()):
            if job.address not in self._crew.threads:
                self._forget(job)
                job.future.cancel(force=True)
                yield job

    def _forget(self, job):
        del self._under_way[job.number]
        job.lock.close()

    def _returned(self):
        """Does what makers have reported, and waits a fifth of a second if there is nothing; yields
        (Job, how), as in _fetch, of those that have ended."""
        with contextlib.suppress(queue.Empty):
            news = self._news.get(timeout=0.2)
            while True:
                if isinstance(news, list):
                    self._desk.heed(*self._with_files_here(news[1:]))
                elif self._under_way.get(news[0].number) is news[0]:
                    yield self._ended(*news)
                news = self._news.get_nowait()

    def _with_files_here(self, what):
        """What a worker reports, with the names of the network's files here."""
        if isinstance(what, (list, tuple)):
            return [self._with_files_here(part) for part in what]
        return self._crew.with_files_here(what) if isinstance(what, str) else what

    def _ended(self, job, how):
        """Counts a picture that has ended; returns the arguments."""
        self._forget(job)
        if how is not None:  # or it is made again
            self._batch.bar.end_picture(job.number)
        if how is True:
            Files(job.options.output_file).clean_up()
            self._batch.made.append(job.options.output_file)
        return job, how

    def _fetch_checkpoints(self):
        """In a thread: keeps checkpoints of pictures that take longer than a minute, one at a
        time."""
        while not self._is_ending.wait(1):
            for job in list(self._under_way.values()):
                if (
                    time.monotonic() - job.begun > self.SECONDS_AT_RISK
                    and job.options.checkpoint_iter != 0
                ):
                    with contextlib.suppress(Exception):  # the worker may be gone
                        self._fetch_checkpoint(job)

    def _fetch_checkpoint(self, job):
        job.begun = time.monotonic()
        arguments = (self._crew.run, "checkpoint", job.number, job.saved)
        found = self._crew.call_on(job.address, if_lent, *arguments)
        if found:
            job.saved, content = found
            path = Files(job.options.output_file).checkpoint
            with job.writing:
                if not job.has_returned:
                    with whole_file(path) as file:
                        file.write(content)


def write_all(folder, files):
    """Writes files, {name: content}, into a folder. Raises RunFailed."""
    for name, content in files.items():
        with whole_file(os.path.join(folder, name)) as file:
            file.write(content)


def rescued(written):
    """Writes files that cannot be written where they belong, {attribute: {name: content}}, into the
    temporary folder, if possible; returns what to say."""
    with contextlib.suppress(OSError, RunFailed):
        folder = tempfile.mkdtemp(prefix="cnn-vis-")
        for files in written.values():
            write_all(folder, files)
        return f"; what was made is in {folder}"
    return ""


def cluster_makers(jobs, sizes, batch, network):
    """The ClusterMakers for the jobs, or None if the cluster is to compute the tiles of one picture
    after the other: they are few and large. Raises BadRequest."""
    if len(jobs) < 2:
        return None
    client = connect(jobs[0].scheduler)
    with contextlib.ExitStack() as stack:
        stack.callback(client.close)
        threads = sum(client.nthreads().values())
        if are_few_and_large(jobs, sizes, len(jobs), threads):
            return None
        makers = ClusterMakers(client, jobs[0], batch, network)
        stack.pop_all()  # they close it
        return makers
