"""A Dream's picture on a GPU, as the main process sees it.

The picture, and what its steps need, goes to the GPU's worker and comes back through the memory
that both share. In between, this process has it as it was when it last came back; if the worker
dies, that goes to another one, which takes the same steps again."""

import concurrent.futures
import contextlib
import itertools
import math
import mmap
import os
import time

import numpy as np

from .ahead import overlap
from .compiled_step import step_numbers
from .errors import RunFailed, Stopped, one_line
from .gpu_picture import GpuPicture, Layout, can_hold_pictures, size_of
from .machine import free_memory
from .network import load_network
from .processes import WorkerDied

# ---- In the worker ------------------------------------------------------------------------------


def load_picture(spec, layout, memory, gradient_size):
    """Task: puts the picture in the shared `memory`, a (descriptor, offset), on the GPU. Returns
    whether it can be there."""
    network = load_network(spec)
    if not can_hold_pictures(network):
        return False
    if network.picture is None or network.picture.layout != layout:
        network.drop_picture()
        try:
            network.picture = GpuPicture(network, layout)
        except MemoryError:
            return False
    network.picture.load(map_arrays(layout.arrays(), *memory), gradient_size)
    return True


def with_picture(spec, method, *arguments):
    """Task: calls a method of the worker's GpuPicture."""
    return getattr(load_network(spec).picture, method)(*arguments)


def fetch_picture(spec, layout, memory):
    """Task: copies the picture to the shared memory; returns what GpuPicture.fetch does."""
    return load_network(spec).picture.fetch(map_arrays(layout.arrays(), *memory))


def map_arrays(kinds, descriptor, offset):
    """{name: array} in shared memory; `kinds` is {name: (dtype, shape)}."""
    memory = mmap.mmap(descriptor, size_of(kinds), offset=offset)
    arrays, at = {}, 0
    for name, (dtype, shape) in kinds.items():
        arrays[name] = np.frombuffer(memory, dtype, math.prod(shape), at).reshape(shape)
        at += size_of({name: (dtype, shape)})
    return arrays


# ---- In the main process ------------------------------------------------------------------------


def may_stay_on_gpu(spec, scratch):
    """Whether a GPU may hold pictures whose largest arrays are in the folder `scratch`, or in
    memory if None: the net computes the objective, and $CNN_VIS_CANVAS is not 0."""
    return bool(spec.objective) and not scratch and os.environ.get("CNN_VIS_CANVAS") != "0"


class CannotStay(RunFailed):
    """The picture must leave the GPU: it does not fit there, or a step overflows, which the Dream
    takes again in memory, and tells."""


class Canvas:
    """The picture of `dream`, a Dream, on the GPU of the only process of `workers`, a Workers.
    `memory` is the (file, offset) of the memory that it may share, from there on. When
    is_stopping() has become true, it no longer waits for a GPU that hangs.

    While the picture is there, `image` and `caches` of the Dream are those of some step before;
    what was true then is kept, and is true again if the GPU fails. Nothing is lost if an exception,
    such as a signal's, interrupts a method."""

    PARTS_AT_ONCE = 8  # at most, in about SECONDS_AT_ONCE; after these, a run can be stopped
    SECONDS_AT_ONCE = 1
    AT_RISK = 5  # seconds of work, in whole steps, that may be lost; then the picture is fetched
    PATIENCE = 10  # seconds that a stopped run waits for the GPU
    PATIENCE_LOADING = 60  # the network, and the picture

    def __init__(self, workers, dream, memory, is_stopping):
        self._workers, self._dream, self._is_stopping = workers, dream, is_stopping
        self._file, self._memory = memory[0], (memory[0].fileno(), memory[1])
        self._arrays, self._shared, self._is_lost = arrays_of(dream), None, True
        turns, has = tuple(map(tuple, dream.tiles(dream.size))), frozenset(self._arrays)
        sizes, strength = (tuple(dream.size), workers.tile_size), dream.settings.strength
        self._layout = Layout(*sizes, turns, has, strength, workers.batch_size)
        self._parts = self._layout.parts()
        self._number = 1  # of the next parts to do at once
        self._since = []  # the arguments of GpuPicture.advance since the picture was here
        self._arrived = None  # what will be `_kept`, and how many of `_since` that includes

    def load(self):
        """Puts the picture, after a whole step, on the GPU. Returns whether it can be there; if
        not, the Dream has no canvas any more. Raises RunFailed."""
        self._kept, self._since, self._is_lost = self._state(), [], True
        self._fetched = time.monotonic()
        try:
            self._share()
            self._in_worker(lambda: None)
        except CannotStay:
            self.close()
            return False
        return True

    def close(self):
        """Leaves the Dream, which has the picture, without a canvas, and frees shared memory."""
        self._dream.canvas = self._shared = None
        if not self._file.closed:
            os.truncate(*self._memory)

    def _share(self):
        """Makes room for the arrays in the shared memory, once. Raises CannotStay."""
        kinds = self._layout.arrays()
        if self._shared is not None:
            return
        if size_of(kinds) > free_memory() / 2:  # saving and enlarging need some, too
            raise CannotStay("there is not enough memory to share")
        try:
            os.truncate(self._memory[0], self._memory[1] + size_of(kinds))
            self._shared = map_arrays(kinds, *self._memory)
        except OSError as error:  # a limit
            raise CannotStay(one_line(error)) from None

    def not_there(self, numbers, wants_stats):
        """Those of the next steps, by their `numbers`, that the Dream has to take in memory before
        the GPU can go on: one that is under way, and those that are measured."""
        begun = self._dream.step + 1 if self._dream.tile else 0
        return [*itertools.takewhile(lambda step: step == begun or wants_stats(step), numbers)]

    def steps(self, wants_stats):
        """Does the Dream's steps on the GPU, after `load`, until one is to be measured, yielding a
        Progress after each; then the picture is here again. Ends when is_stopping() becomes true,
        even in the middle of a step. If one overflows, or the GPU has lost the picture and has no
        room for it any more, the Dream goes on without a canvas, from where it was here. Raises
        RunFailed."""
        try:
            yield from self._steps(wants_stats)
        except CannotStay:  # but the Dream can go on
            pass
        except Stopped:
            raise
        except BaseException:  # this run ends here, but its last picture may still be asked for
            with contextlib.suppress(RunFailed):
                self.fetch()
                self.close()
            raise

    def _steps(self, wants_stats):
        dream = self._dream
        dream.gauge = None
        # (If picture() has failed since the last step, the Dream has no canvas any more.)
        last = dream.settings.num_steps
        while dream.canvas is self and dream.step < last and not wants_stats(dream.step + 1):
            told = self._step()
            if told is None:
                break
            dream.is_silent, dream.is_still = not told["has_gradient"], not told["has_step"]
            progress = dream.end_step()
            if time.monotonic() - self._fetched > self.AT_RISK:
                self.fetch()
            yield progress
        self.fetch()

    def _step(self):
        """Does a step; returns what GpuPicture.advance does, or None if the run is stopping before
        its end: the Dream then is amid this step. Raises CannotStay if it overflows, RunFailed."""
        dream, count = self._dream, len(self._parts)
        rates = (dream.settings.decay_rate, dream.learning_rate)
        words = b"".join(map(bytes, step_numbers(dream.regularizers(), *rates, dream.mean)))
        done = 0
        while done < count:
            if self._is_stopping():
                if done:
                    self._stop_before(self._parts[done].first)
                return None
            until, begun = min(done + self._number, count), time.monotonic()
            told = self._ask(with_picture, "advance", done, until, words)
            self._since.append((done, until, words))
            fitting = int(self.SECONDS_AT_ONCE * (until - done) / (time.monotonic() - begun))
            self._number = max(1, min(2 * self._number, fitting, self.PARTS_AT_ONCE))
            done = until
        self._check(told)
        return told

    def _check(self, told):
        """Raises CannotStay if a step has met what is not finite: the Dream, which takes it again,
        will say so."""
        if told["is_not_finite"]:
            self._go_back()
            raise CannotStay("a step overflows")

    def _stop_before(self, tile):
        """Makes the Dream one that is amid a step, before the tile with this number."""
        dream, numbers = self._dream, {}
        self._check(self._ask(with_picture, "flags"))
        for turn, first in zip(self._layout.turns, (0, len(self._layout.turns[0]))):
            stepped = turn[: max(0, tile - first)]
            for number, region in enumerate(turn[len(stepped) :], len(stepped)):
                if any(overlap(region, other) for other in stepped):
                    numbers[region] = number
        pixels = self._ask(with_picture, "cuts", list(numbers.values()))
        dream.tile, dream.before = tile, dict(zip(numbers, pixels))

    def fetch(self):
        """Brings the picture to the Dream, if the GPU has done something since it was there. Raises
        RunFailed."""
        self._take()
        if not self._since:
            return
        sizes = self._ask(fetch_picture, self._layout, self._memory)
        kept = self._state() | dict(zip(("gradient_size", "gradient_sum"), sizes))
        self._arrived = kept, len(self._since)
        self._take()

    def _take(self):
        """Copies what has arrived in the shared memory to the Dream. If that is interrupted, it is
        done again before the shared memory is used for anything else."""
        if self._arrived is None:
            return
        kept, count = self._arrived
        for name in {"image", "caches"} & set(self._arrays):
            self._arrays[name][...] = self._shared[name]
        if count == len(self._since):  # no step has followed
            vars(self._dream).update(kept)
        self._fetched = time.monotonic()
        self._kept, self._since, self._arrived = kept, self._since[count:], None

    def _state(self):
        """What is true of the Dream now besides its arrays, {name: value}."""
        names = ("step", "tile", "before", *self._dream.NUMBERS)
        return {name: getattr(self._dream, name) for name in names}

    def _go_back(self):
        """Makes the Dream what it was when the picture was last here, without a canvas."""
        self._take()
        vars(self._dream).update(self._kept)
        self._since = []
        self.close()

    def _ask(self, task, *arguments):
        """Returns what a task of the worker that has the picture returns."""
        return self._in_worker(lambda: self._run(task, *arguments))

    def _in_worker(self, do):
        """Returns do(), called when the worker has the picture, and again if that dies. If this
        fails, the Dream is what it was when the picture was last here, without a canvas."""
        try:
            while True:
                try:
                    if self._is_lost:
                        self._restore()
                    return do()
                except WorkerDied:
                    self._is_lost = True
                    self._workers.restart()
        except RunFailed:
            self._go_back()
            raise

    def _restore(self):
        """Puts the picture on the GPU and takes the steps that were taken since it was here."""
        self._take()
        for name, array in self._arrays.items():
            self._shared[name][...] = array
        state = (self._layout, self._memory, self._kept["gradient_size"])
        if not self._run(load_picture, *state):
            raise CannotStay("the picture no longer fits in the GPU's memory")
        for what in self._since:
            self._run(with_picture, "advance", *what)
        self._is_lost = False

    def _run(self, task, *arguments):
        patience = self.PATIENCE_LOADING if task is load_picture else self.PATIENCE
        future, stopped = self._workers.submit(task, *arguments), None
        while concurrent.futures.wait([future], timeout=1).not_done:
            stopped = stopped or self._is_stopping() and time.monotonic()
            if stopped and time.monotonic() - stopped > patience:
                self._workers.kill()  # or the end of the engine would wait for it
                raise RunFailed("the GPU does not answer")
        return future.result()


def arrays_of(dream):
    """{name: array} as in Layout.arrays: what a Dream's steps need besides numbers."""
    start = None if dream.start is None else dream.start[0]
    caches = dream.caches if dream.has_caches else None
    arrays = {"image": dream.image[0], "caches": caches, "divisors": dream.divisors, "start": start}
    return {name: array for name, array in arrays.items() if array is not None}
