"""Makers: processes that each make a whole picture at a time, tiles and all.

A picture with few tiles cannot keep many cores busy; as many pictures as there are cores can. Where
a picture is made does not matter to it: the function that makes it gets an engine, signals, and a
place in the batch, and here these lead to the main process."""

import collections
import concurrent.futures
import contextlib
import functools
import logging
import math
import signal
import threading
import time

import numpy as np

from .engines import Engines
from .errors import BadRequest, Stopped, log
from .machine import free_memory, room_needed
from .options import end_sizes
from .processes import CaffeProcesses, WorkerDied, report
from .prototxt import import_caffe
from .resume import under_way
from .run import Batch
from .terminal import LineHandler, listeners, say
from .workers import (
    Engine,
    compute_batch,
    describe,
    load_network,
    map_counters,
    one_core,
    open_shared_memory,
    prepared,
)


def make_one(make_picture, options, signals, engines, batch):
    """Makes one of several pictures, or goes on with it if an earlier run has begun it. Raises
    BadRequest, RunFailed, Stopped. `make_picture` is the script's, with its arguments."""
    signals.hold(False)
    begun, checkpoint = under_way(options)
    try:
        make_picture(begun, signals, engines, checkpoint, batch)
    except BadRequest:
        if checkpoint is None:
            raise
        make_picture(options, signals, engines, None, batch)  # the checkpoint does not fit


# ---- In a maker ---------------------------------------------------------------------------------


class InProcess(Engine):
    """The engine within a maker: computes a tile when it is sent."""

    batch_size = number = 1
    is_elsewhere = False

    def __init__(self, spec, objective, device):
        self.spec, self.objective, self.device, self.notices = spec, objective, device, []
        self._found = {}  # {ticket: what receive returns}

    def describe(self):
        self.tile_size, self.shapes, self.notices = describe(self.spec, self.objective)

    def change(self, spec, objective):
        self.spec, self.objective = spec, objective
        self.describe()
        return True

    def has_room(self):
        return not self._found

    def send(self, tiles_in, measure=True):
        (tile,) = tiles_in
        network, objective = load_network(self.spec), prepared(self.objective, self.spec)
        batch = np.array(tile, np.float32)[np.newaxis]
        gradients, losses = compute_batch(network, objective, batch, measure)
        self._found[0] = [(gradients[0].copy(), losses[0])]
        return 0

    def is_done(self, ticket):
        return True

    def receive(self, ticket):
        return self._found.pop(ticket)

    def end(self, at_once=False):
        self._found.clear()


class Orders:
    """What the script's Signals are in a maker: the main process says when to stop."""

    held, is_saving = False, False

    def __init__(self, counters):
        self._counters = counters

    @property
    def signum(self):
        return int(self._counters[1])

    def hold(self, held=True):
        """Raises Stopped if this maker is to stop."""
        if self.signum:
            raise Stopped(self.signum)


class Reporter:
    """What the ProgressBar is in a maker: it reports how far its picture is, at times."""

    PAUSE = 0.2  # seconds between reports

    def __init__(self):
        self._told = 0.0

    def update(self, number, done, total, text):
        if time.monotonic() - self._told > self.PAUSE:
            self._told = time.monotonic()
            report("update", number, done, total)

    def end_picture(self, number):
        pass

    def close(self):
        pass


class Place(Batch):
    """The Batch of a maker."""

    def announce(self, first, others):
        report("announce", first, others)


@functools.cache
def engines_of(device):
    """The Engines of this maker."""
    return Engines(None, lambda _, spec, objective: InProcess(spec, objective, device))


@functools.cache
def become_maker():
    """Task: prepares this process: what is printed goes to the main process, which alone decides
    what a signal to all processes means."""
    import_caffe()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    listeners.append(lambda text, stream: report("say", text, stream))
    log.addHandler(LineHandler())
    log.propagate = False


def make_here(make_picture, options, number, count, device, descriptor):
    """Task: makes a picture; returns whether it is done, or else the main process has stopped it.
    Raises what makes it fail."""
    become_maker()
    log.setLevel(logging.ERROR if options.quiet else logging.INFO)
    orders, place = Orders(map_counters(descriptor)), Place(count, number, bar=Reporter())
    engines = engines_of(device)
    try:
        with one_core(descriptor):
            make_one(make_picture, options, orders, engines, place)
        return True
    except Stopped:
        return False
    except BaseException:
        engines.end()
        raise


# ---- In the main process ------------------------------------------------------------------------

TILE_SIZE = (224, 224)  # of most networks; for a guess
BYTES_A_MAKER = 300 << 20  # with GoogLeNet


def memory_needed(options, base):
    """How many bytes the run of a picture of the size `base` takes, about; None as base: noise."""
    try:
        sizes = end_sizes(options, base or TILE_SIZE, TILE_SIZE)[:2]
    except BadRequest:  # its run will tell
        return 0
    cached = [(height + TILE_SIZE[0]) * (width + TILE_SIZE[1]) for height, width in sizes]
    arrays, besides, _ = room_needed(options, sizes, cached)
    return besides + (0 if options.scratch else arrays)


def tiles_at_once(options, sizes):
    """How many tiles of a picture are computed at the same time at its last size, about."""
    try:
        size = end_sizes(options, sizes[options.initial_image] or TILE_SIZE, TILE_SIZE)[1]
    except BadRequest:
        return 0
    return math.prod(math.ceil(side / tile) for side, tile in zip(size, TILE_SIZE)) // 2


def number_of_makers(jobs, sizes, cores):
    """How many pictures to make at the same time: one for each core, if there are as many and they
    fit in memory."""
    number, free = min(cores, len(jobs)), free_memory()
    largest = sorted((memory_needed(job, sizes[job.initial_image]) for job in jobs), reverse=True)
    while number > 1 and sum(largest[:number]) + number * BYTES_A_MAKER > free:
        number -= 1
    return number


class Makers:
    """`number` makers on so many cores of the `device`, for the pictures of a Batch; a context
    manager. A maker with nothing to do lends its core to the others. `sizes`, {path: (height,
    width)}, are those of the start pictures."""

    def __init__(self, number, cores, device, batch, sizes):
        self._batch, self._cores, self._lock = batch, cores, threading.Lock()
        self._sizes, self._room = sizes, free_memory() - number * BYTES_A_MAKER
        self._device = f"{device}, {cores} core{'s' * (cores > 1)}"
        self._under_way, self._is_ending = {}, False  # {future: (options, number, maker)}
        self._memory = open_shared_memory()
        self._counters = map_counters(self._memory.fileno())
        arguments = {"shared": [self._memory], "heed": self._heed, "prepare": self._count_cores}
        with contextlib.ExitStack() as stack:
            stack.callback(self._memory.close)
            makers = [stack.enter_context(CaffeProcesses(**arguments)) for _ in range(number)]
            self._stack = stack.pop_all()
        self._all, self._idle = makers, makers.copy()
        self._threads = concurrent.futures.ThreadPoolExecutor(number)
        self.call = makers[0].call
        for maker in makers:
            maker.submit(become_maker)  # imports what it needs while this process prepares

    def _count_cores(self):
        """Sets the number of free cores when a maker starts, perhaps in place of a dead one."""
        self._counters[0] = self._cores - max(0, len(self._under_way) - 1)

    def _heed(self, what, *values):
        """Does what a maker reports, in the thread that waits for it."""
        with self._lock:
            if what == "say":
                say(*values)
            elif what == "announce":
                self._batch.announce(*values)
            else:
                text = f"{len(self._batch.made)} of {self._batch.count} pictures done"
                self._batch.bar.update(*values, text)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._is_ending = True
        while concurrent.futures.wait(self._under_way, 0.1).not_done:
            for maker in self._all:
                maker.kill()
        self._threads.shutdown()
        self._stack.close()

    def failures(self, jobs, signals, make_picture):
        """Makes a picture for each of the jobs; yields (job, exception) for those that fail.
        Raises Stopped after a signal, when all have stopped and saved what they have."""
        waiting = collections.deque(enumerate(jobs, 1))
        signals.hold()
        while waiting or self._under_way:
            if signals.signum:
                self._counters[1] = signals.signum
                waiting.clear()
            while waiting and self._idle and self._fits(waiting[0][1]):
                self._begin(*waiting.popleft(), make_picture)
            when = concurrent.futures.FIRST_COMPLETED
            for future in concurrent.futures.wait(self._under_way, 0.2, when).done:
                job, number, maker = self._under_way.pop(future)
                self._idle.append(maker)
                self._batch.bar.end_picture(number)
                if future.exception():
                    yield job, future.exception()
                elif future.result():
                    self._batch.made.append(job.output_file)
        if signals.signum:
            told = f"stopped; {len(self._batch.made)} of {len(jobs)} pictures are done"
            raise Stopped(signals.signum, told)

    def _fits(self, options):
        """Whether there is memory for another picture; always, if none is under way."""
        jobs = [options, *(job for job, _, _ in self._under_way.values())]
        needed = sum(memory_needed(job, self._sizes[job.initial_image]) for job in jobs)
        return len(jobs) == 1 or needed < self._room

    def _begin(self, number, options, make_picture):
        maker = self._idle.pop()
        where = (number, self._batch.count, self._device, self._memory.fileno())
        future = self._threads.submit(self._make, maker, make_picture, options, *where)
        self._under_way[future] = options, number, maker

    def _make(self, maker, *arguments):
        """Has a maker make a picture; if it dies, another goes on from the last checkpoint."""
        maker.restarts = 0
        while True:
            try:
                return maker.submit(make_here, *arguments).result()
            except WorkerDied:
                if self._is_ending:
                    raise
                maker.restart()
