"""Makers: processes that each make a whole picture at a time, tiles and all.

A picture with few tiles cannot keep many cores busy; as many pictures as there are cores can. Where
a picture is made does not matter to it: the function that makes it gets an engine, signals, and a
place in the batch, and here these lead to the main process."""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import logging
import math
import os
import queue
import signal
import threading
import time

import numpy as np

from .engines import Engines
from .errors import BadRequest, RunFailed, Stopped, log
from .machine import count_cores, free_memory, room_needed
from .network import load_network
from .options import end_sizes
from .processes import CaffeProcesses, CaffeStopped, WorkerDied, report
from .prototxt import import_caffe
from .resume import under_way
from .run import Batch
from .terminal import LineHandler, listeners, say
from .workers import (
    Engine,
    compute_batch,
    describe,
    map_counters,
    one_core,
    open_shared_memory,
    prepared,
)


def make_one(make_picture, options, signals, engines, batch, network, begun=under_way):
    """Makes one of several pictures, or goes on with it if an earlier run has begun it, as
    `begun`(options) says. Raises BadRequest, RunFailed, Stopped. `make_picture` is the script's,
    with its arguments."""
    signals.hold(False)
    resumed, checkpoint = begun(options)
    try:
        make_picture(resumed, signals, engines, checkpoint, batch, network)
    except BadRequest:
        if checkpoint is None:
            raise
        make_picture(options, signals, engines, None, batch, network)  # the checkpoint does not fit


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
    """What the script's Signals are in a maker: the main process says when to stop, by the second
    of two counters."""

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

    def __init__(self, pause=0.2, tell=report):
        self._told, self._pause, self._tell = 0.0, pause, tell  # seconds between reports

    def update(self, number, done, total, text):
        if time.monotonic() - self._told > self._pause:
            self._told = time.monotonic()
            self._tell("update", number, done, total)

    def end_picture(self, number):
        pass

    def close(self):
        pass


@dataclasses.dataclass
class Place(Batch):
    """The Batch of a maker. `tell` is `report`, or calls it."""

    tell: object = report

    def announce(self, first, others):
        self.tell("announce", first, others)


@functools.cache
def engines_of(device):
    """The Engines of this maker."""
    return Engines(None, lambda _, spec, objective: InProcess(spec, objective, device))


@functools.cache
def become_maker():
    """Task: prepares this process. The main process alone decides what a signal to all processes
    means."""
    import_caffe()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    log.addHandler(LineHandler())
    log.propagate = False


def make_here(make_picture, options, where, begun=under_way):
    """Task: makes a picture at the place `where`, (a Place, the device's name, the network, the
    descriptor of the memory that makers share). Returns whether it is done, or else the main
    process has stopped it. Raises what makes it fail. `begun` is as for make_one."""
    place, device, network, descriptor = where
    become_maker()
    listeners[:] = [lambda text, stream: place.tell("say", text, stream)]
    log.setLevel(logging.ERROR if options.quiet else logging.INFO)
    engines, orders = engines_of(device), Orders(map_counters(descriptor))
    try:
        with one_core(descriptor):
            make_one(make_picture, options, orders, engines, place, network, begun)
        return True
    except Stopped:
        return False
    except BaseException:
        engines.end()
        raise


# ---- In the main process ------------------------------------------------------------------------

TILE_SIZE = (224, 224)  # of most networks; for a guess


def maker_size(network):
    """How many bytes a maker takes for its program and for the NetworkFiles, about: the weights may
    be there twice, as some layers arrange them in another way."""
    return (200 << 20) + 2 * os.path.getsize(network.weights)


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


def are_few_and_large(jobs, sizes, number, places):
    """Whether the tiles of one picture after the other fill so many places, cores or threads,
    better than `number` pictures at the same time."""
    return number < places and number < min(tiles_at_once(job, sizes) for job in jobs)


def number_of_makers(jobs, sizes, most, each):
    """How many pictures to make at the same time: `most`, if there are as many and they fit in
    memory, where each takes `each` bytes besides its picture."""
    number, free = min(most, len(jobs)), free_memory()
    largest = sorted((memory_needed(job, sizes[job.initial_image]) for job in jobs), reverse=True)
    while number > 1 and sum(largest[:number]) + number * each > free:
        number -= 1
    return number


class MakerProcesses:
    """So many makers on so many cores. A maker with nothing to do lends its core to the others.
    `heed`, a function, gets what they report."""

    def __init__(self, number, cores, heed):
        self._cores, self._busy, self._is_ending = cores, set(), False
        self._memory, self._idle = open_shared_memory(), queue.LifoQueue()
        self._counters = map_counters(self._memory.fileno())
        arguments = {"shared": [self._memory], "heed": heed, "prepare": self._count_cores}
        with contextlib.ExitStack() as stack:
            stack.callback(self._memory.close)
            made = (stack.enter_context(CaffeProcesses(**arguments)) for _ in range(number))
            self._makers = list(made)
            self._stack = stack.pop_all()
        for maker in self._makers:
            maker.submit(become_maker)  # imports what it needs while this process prepares
            self._idle.put(maker)

    def _count_cores(self):
        """Sets the number of free cores when a maker starts, perhaps in place of a dead one."""
        self._counters[0] = self._cores - max(0, len(self._busy) - 1)

    def call(self, task, *arguments):
        """Returns task(*arguments), run in a maker. Raises what the task raises, and RunFailed."""
        maker = self._idle.get()
        try:
            return maker.call(task, *arguments)
        finally:
            self._idle.put(maker)

    def make(self, task, make_picture, options, place, device, network, *more, is_wanted=None):
        """Has a maker make a picture by make_here, or a task like it. If the maker dies, another
        goes on from the last checkpoint. Raises what makes it fail, and RunFailed when is_wanted()
        has become false."""
        maker = self._idle.get()
        maker.restarts = 0
        self._busy.add(maker)
        where = (place, device, network, self._memory.fileno())
        try:
            while True:
                future = maker.submit(task, make_picture, options, where, *more)
                while not concurrent.futures.wait([future], is_wanted and 1).done:
                    if not is_wanted():
                        maker.kill()
                try:
                    return future.result()
                except WorkerDied:
                    if self._is_ending:
                        raise
                    maker.restart()
                if is_wanted and not is_wanted():
                    raise RunFailed("nobody waits for this picture")
        finally:
            self._busy.discard(maker)
            self._idle.put(maker)

    def stop(self, signum):
        """Lets makers save what they have, and return."""
        self._counters[1] = signum

    def end(self):
        """Ends the makers immediately."""
        self._is_ending = True
        for maker in self._makers:
            maker.kill()
        while self._busy:  # it may have been starting another process
            time.sleep(0.05)
            for maker in list(self._busy):
                maker.kill()
        self._stack.close()


class Desk:
    """Where the reports about the pictures of a Batch arrive, from several threads."""

    def __init__(self, batch):
        self._batch, self._lock = batch, threading.Lock()

    def heed(self, what, *values):
        """Does what a report asks for."""
        with self._lock:
            if what == "say":
                say(*values)
            elif what == "announce":
                self._batch.announce(*values)
            else:
                text = f"{len(self._batch.made)} of {self._batch.count} pictures done"
                self._batch.bar.update(*values, text)


class Makers:
    """So many makers for the pictures of a Batch; a context manager. `crew` are the MakerProcesses
    or the like, and `make`(make_picture, options, place) has one of them make a picture. `sizes`,
    {path: (height, width)}, are those of the start pictures, which have `room` bytes."""

    def __init__(self, number, crew, make, batch, sizes, room):
        self._batch, self._sizes, self._room = batch, sizes, room
        self._number, self._under_way = number, {}  # {future: (options, number)}
        self._crew, self._make, self.call = crew, make, crew.call
        self._threads = concurrent.futures.ThreadPoolExecutor(number)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._crew.end()
        self._threads.shutdown()

    def failures(self, jobs, signals, make_picture):
        """Makes a picture for each of the jobs; yields (job, exception) for those that fail.
        Raises Stopped after a signal, when all have stopped and saved what they have."""
        waiting = collections.deque(enumerate(jobs, 1))
        signals.hold()
        while waiting or self._under_way:
            if signals.signum:
                self._crew.stop(signals.signum)
                waiting.clear()
            while waiting and self._fits(waiting[0][1]):
                number, job = waiting.popleft()
                place = Place(self._batch.count, number, bar=Reporter())
                future = self._threads.submit(self._make, make_picture, job, place)
                self._under_way[future] = job, number
            when = concurrent.futures.FIRST_COMPLETED
            for future in concurrent.futures.wait(self._under_way, 0.2, when).done:
                job, number = self._under_way.pop(future)
                if not isinstance(future.exception(), CaffeStopped):  # or it is made again
                    self._batch.bar.end_picture(number)
                if future.exception():
                    yield job, future.exception()
                elif future.result():
                    self._batch.made.append(job.output_file)
        if signals.signum:
            raise Stopped(signals.signum, stopped(self._batch))

    def _fits(self, options):
        """Whether there is a maker, and memory, for another picture; always, if none is under
        way."""
        jobs = [options, *(job for job, _ in self._under_way.values())]
        needed = sum(memory_needed(job, self._sizes[job.initial_image]) for job in jobs)
        return len(jobs) == 1 or len(jobs) <= self._number and needed < self._room


def stopped(batch):
    """What to say when a signal has stopped makers."""
    return f"stopped; {len(batch.made)} of {batch.count} pictures are done"


def local_makers(jobs, sizes, batch, network, device):
    """The Makers for the jobs, the pictures of a Batch, on this machine's cores, the `device`; None
    if their own tiles fill the cores better."""
    cores, each = jobs[0].workers or count_cores(), maker_size(network)
    number = number_of_makers(jobs, sizes, cores, each)
    if number < 2 or are_few_and_large(jobs, sizes, number, cores):
        return None
    crew = MakerProcesses(number, cores, Desk(batch).heed)
    device = f"{device}, {cores} core{'s' * (cores > 1)}"

    def make(make_picture, options, place):
        return crew.make(make_here, make_picture, options, place, device, network)

    return Makers(number, crew, make, batch, sizes, free_memory() - number * each)
