"""A batch on a Dask cluster: each of its workers' threads makes whole pictures.

A picture is sent to a worker with all that it needs, and comes back with all that was written; in
between only lines and numbers cross the network, and each minute its checkpoint."""

import collections
import contextlib
import dataclasses
import os
import queue
import threading
import time

from .cluster import Crew, connect
from .dask_maker import Parcel, if_lent, on_makers
from .errors import RunFailed, Stopped
from .files import read_bytes, sole_writer, whole_file
from .makers import Desk, stopped, tiles_at_once
from .network import NetworkSpec
from .options import PARSER
from .outputs import Files, remove_parts
from .processes import in_a_worker
from .resume import under_way


@dataclasses.dataclass
class Job:
    """A picture under way: its options and number, the worker that it was sent to, the future of
    what the worker returns, when it was sent, and when the last checkpoint was saved that came
    back."""

    options: object
    number: int
    address: str
    lock: object
    future: object = None
    begun: float = dataclasses.field(default_factory=time.monotonic)
    saved: int = 0


class ClusterMakers:
    """What Makers are on this machine: makes the pictures of a Batch on the workers of the cluster
    whose scheduler has the address. Pictures of lost workers are sent to others, which go on from
    the last checkpoint that came back; new workers are used as they join. A context manager."""

    MAX_LOSSES = 4
    SECONDS_AT_RISK = 60  # between checkpoints of a picture that come back
    call = staticmethod(in_a_worker)

    def __init__(self, client, options, batch, network):
        self._batch, self._desk, self._network = batch, Desk(batch), network
        layers = tuple(options.target_layer.layers())
        spec = NetworkSpec(network, layers, input_size=options.input_size)
        self._crew = Crew(client, options.scheduler, spec, None, on_makers)
        self._news, self._under_way, self._losses = queue.Queue(), {}, collections.Counter()
        self._is_ending = threading.Event()

    def __enter__(self):
        topic = self._crew.run
        self._crew.client.subscribe_topic(topic, lambda event: self._news.put(event[1]))
        return self

    def __exit__(self, *_):
        self._is_ending.set()
        jobs = list(self._under_way.values())
        self._crew.end([job.future for job in jobs])
        for job in jobs:
            job.lock.close()
        self._crew.client.close(timeout=2)

    def failures(self, jobs, signals, make_picture):
        """Makes a picture for each of the jobs; yields (job, exception) for those that fail.
        Raises Stopped after a signal, when all have stopped and sent what they have, and RunFailed
        if the scheduler is gone."""
        self._crew.start()
        threading.Thread(target=self._fetch_checkpoints, daemon=True).start()
        waiting, is_told = collections.deque(enumerate(jobs, 1)), False
        signals.hold()
        while waiting or self._under_way:
            self._crew.check_scheduler()
            if signals.signum and not is_told:
                is_told = True
                waiting.clear()
                self._stop(signals.signum)
            for job in self._lost():
                if not signals.signum:
                    waiting.appendleft((job.number, job.options))
            for number, options, address in self._next(waiting):
                try:
                    self._send(number, options, address, make_picture)
                except Exception as error:
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
        lock = contextlib.ExitStack()
        lock.enter_context(sole_writer([options.output_file]))
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
        job.future.add_done_callback(lambda _: self._news.put(number))

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
        """Does what makers have reported, for a fifth of a second at least if there is nothing;
        yields (Job, whether it is done, or the exception that made it fail, or None if it has to be
        made again) of those that have ended."""
        with contextlib.suppress(queue.Empty):
            news = self._news.get(timeout=0.2)
            while True:
                if isinstance(news, int):
                    job = self._under_way.get(news)
                    if job and job.future.done():
                        how = self._result(job)
                        self._forget(job)
                        self._batch.bar.end_picture(job.number)
                        yield job, how
                else:
                    self._desk.heed(*news[1:])
                news = self._news.get_nowait()

    def _result(self, job):
        """Writes what a worker has sent back; returns as for _returned."""
        try:
            is_fit, found = job.future.result()
        except Exception as error:  # it was lost with its worker, or with the scheduler
            self._losses[job.number] += 1
            if self._losses[job.number] < self.MAX_LOSSES:
                return None
            return RunFailed(
                f"it was lost {self.MAX_LOSSES} times, last with {type(error).__name__}"
            )
        if not is_fit:
            return self._crew.exception(found, job.address)
        how, written = found
        how = how if isinstance(how, bool) else self._crew.exception(how, job.address)
        try:
            self._write(job, written, how is True)
        except RunFailed as error:
            return error
        return how

    def _write(self, job, written, is_done):
        """Writes the files that came back."""
        options = job.options
        remove_parts(options.output_file)
        for option, files in written.items():
            folder = os.path.dirname(getattr(options, option) or "")
            for name, content in files.items():
                with whole_file(os.path.join(folder, name)) as file:
                    file.write(content)
        if is_done:
            Files(options.output_file).clean_up()
            self._batch.made.append(options.output_file)

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
        if found and self._under_way.get(job.number) is job:
            job.saved, content = found
            with whole_file(Files(job.options.output_file).checkpoint) as file:
                file.write(content)


def cluster_makers(jobs, sizes, batch, network):
    """The ClusterMakers for the jobs, or None if the cluster is to compute the tiles of one picture
    after the other: they are few and large. Raises BadRequest."""
    if len(jobs) < 2:
        return None
    client = connect(jobs[0].scheduler)
    threads = sum(client.nthreads().values())
    if len(jobs) < threads and len(jobs) < min(tiles_at_once(job, sizes) for job in jobs):
        client.close()
        return None
    return ClusterMakers(client, jobs[0], batch, network)
