"""Makers on GPUs: threads that each make a whole picture.

A GPU computes 32 tiles in little more time than one, but a picture has few that can be computed at
the same time. So tiles of several pictures share each batch."""

import collections
import dataclasses
import functools
import math
import signal
import threading

import numpy as np

from .engines import Engines, open_engine
from .errors import Stopped
from .machine import free_memory
from .makers import (
    Desk,
    Makers,
    Orders,
    Reporter,
    make_one,
    maker_size,
    number_of_makers,
    tiles_at_once,
)
from .network import FULL_BATCH
from .processes import in_a_worker
from .resume import under_way
from .terms import strong
from .workers import EACH, Engine


@dataclasses.dataclass(eq=False)
class Group:
    """Tiles that a picture has sent: float32 (N, 3, H, W), and whether they are measured; what
    `receive` returns for them, once `done` is set."""

    tiles: np.ndarray
    measure: bool
    done: threading.Event = dataclasses.field(default_factory=threading.Event)
    found: list | None = None


class Batches:
    """Sends an Engine the tiles of several pictures, which come from several threads: as many as
    there are, up to a full batch, whenever a device has less than one batch to do next. A thread
    does that, so that no other waits for the engine longer than it likes."""

    def __init__(self, engine):
        self.engine, self.error, self._expected = engine, None, 0
        self._changed, self._waiting = threading.Condition(), collections.deque()
        self._sent = collections.OrderedDict()  # {the engine's ticket: groups}
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def expect(self, count):
        """Prepares for that many more tiles that can be computed at the same time."""
        with self._changed:
            self._expected += count
            self.engine.expect(self._expected)

    def send(self, tiles, measure):
        """Adds tiles; returns their Group."""
        group = Group(np.array(tiles, np.float32), measure)  # pictures change before it is sent
        with self._changed:
            self._waiting.append(group)
            self._changed.notify()
        return group

    def _run(self):
        try:
            while self._wait():
                while groups := self._next():
                    tiles = [tile for group in groups for tile in group.tiles]
                    ticket = self.engine.send(tiles, any(group.measure for group in groups))
                    self._sent[ticket] = groups
                ticket = next(iter(self._sent))
                if self.engine.is_done(ticket):
                    self._give_out(ticket, iter(self.engine.receive(ticket)))
        except Exception as error:
            self.stop(error)

    def _wait(self):
        """Waits until there is something to do; returns whether there is, or else it has been
        stopped."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._sent or self.error is not None)
            return self.error is None

    def _next(self):
        """The groups of the next batch; none if it is not worth sending now."""
        with self._changed:
            count, groups = 0, []
            for group in self._waiting:
                if count + len(group.tiles) > self.engine.batch_size:
                    break
                groups.append(group)
                count += len(group.tiles)
            is_full = len(groups) < len(self._waiting) or count == self.engine.batch_size
            is_busy = len(self._sent) >= 2 * self.engine.number and not is_full
            if not groups or is_busy or not self.engine.has_room():
                return []
            return [self._waiting.popleft() for _ in groups]

    def _give_out(self, ticket, found):
        for group in self._sent.pop(ticket):
            answers = [next(found) for _ in group.tiles]
            group.found = [(g, loss if group.measure else None) for g, loss in answers]
            group.done.set()

    def stop(self, error):
        """From now on, raises this exception in all threads that wait for tiles."""
        with self._changed:
            self.error = self.error or error
            for groups in [self._waiting, *list(self._sent.values())]:
                for group in groups:
                    group.done.set()
            self._changed.notify_all()

    def end(self):
        """Returns whether the engine can be used for something else."""
        is_free = not (self._waiting or self._sent) and self.error is None
        self.stop(Stopped(signal.SIGTERM))
        self._thread.join(2)  # more than it waits for tiles; an engine that hangs is killed
        return is_free and not self._thread.is_alive()


class Share(Engine):
    """A picture's Engine, whose tiles share the Batches of several."""

    is_elsewhere = False  # steps are taken in the picture's own thread; there are many of them
    number = 1

    def __init__(self, batches, notices=()):
        self._batches, self.notices = batches, list(notices)
        for name in ("spec", "objective", "device", "batch_size", "tile_size", "shapes"):
            setattr(self, name, getattr(batches.engine, name))

    def describe(self):
        pass  # the shared engine is described already

    def expect(self, count):
        self._batches.expect(count)

    def has_room(self):
        return True

    def send(self, tiles_in, measure=True):
        return self._batches.send(tiles_in, measure)

    def is_done(self, ticket):
        if not ticket.found and self._batches.error is not None:
            raise self._batches.error.with_traceback(None)  # which would hold pictures
        return ticket.done.wait(1) and ticket.found is not None

    def receive(self, ticket):
        while not self.is_done(ticket):
            pass
        return ticket.found

    def end(self, at_once=False):
        pass


class SharedEngines:
    """The Engines of pictures that are made at the same time. Those with the same network and
    objective share the engine; others wait until it is free."""

    def __init__(self, engines):
        self._engines, self._changed = engines, threading.Condition()
        self._batches, self._users, self._stopped, self._is_opening = None, 0, None, False

    def join(self, spec, objective):
        """A Share of the engine for a NetworkSpec and objective. Raises BadRequest, RunFailed,
        Stopped."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._is_free(spec, objective))
            if self._stopped:
                raise self._stopped.with_traceback(None)
            is_new = self._is_opening = not self._users
            self._users += 1
        try:
            engine = self._engines.get(spec, objective)
            if is_new:
                self._batches = Batches(engine)
            return Share(self._batches, engine.notices if is_new else ())
        except BaseException:
            self.leave()
            raise
        finally:
            with self._changed:
                self._is_opening = self._is_opening and not is_new
                self._changed.notify_all()

    def _is_free(self, spec, objective):
        """Whether the engine can be used, or changed, for these."""
        if not self._users or self._is_opening:
            return not self._is_opening
        return self._engines.are_for(spec, objective) and self._batches.error is None

    def leave(self):
        """Gives a Share back."""
        with self._changed:
            try:
                if self._users == 1 and self._batches is not None:
                    batches, self._batches = self._batches, None
                    if not batches.end():
                        self._engines.end(at_once=True)
            finally:
                self._users -= 1
                self._changed.notify_all()

    def stop(self, error):
        """Raises this exception in all threads that wait for an engine."""
        with self._changed:
            self._stopped = self._stopped or error
            self._changed.notify_all()

    def end(self):
        """Ends the engine: pictures that use it are stopped."""
        error = Stopped(signal.SIGTERM)
        self.stop(error)
        with self._changed:
            if self._batches is not None:
                self._batches.stop(error)
            if self._is_opening:  # perhaps a GPU hangs
                self._engines.end(at_once=True)
            self._changed.wait_for(lambda: not self._users)
            self._engines.end(at_once=True)


class Seat:
    """The Engines of one picture."""

    def __init__(self, shared):
        self._shared, self._share = shared, None

    def get(self, spec, objective):
        """A Share of the engine. Raises BadRequest, RunFailed, Stopped."""
        self.end()
        self._share = self._shared.join(spec, objective)
        return self._share

    def end(self):
        """Gives it back, if there is one."""
        if self._share is not None:
            self._share = None
            self._shared.leave()


class MakerThreads:
    """What MakerProcesses are on the CPU, for GPUs: threads make the pictures, with the engine for
    the `options`. `heed` is as there, and `network` is the NetworkFiles."""

    call = staticmethod(in_a_worker)

    def __init__(self, options, heed, network):
        opened = functools.partial(open_engine, is_shared=True)
        self._shared, self._counters = SharedEngines(Engines(options, opened)), [0, 0]
        self._heed, self._network, self._one = heed, network, threading.Lock()

    def make(self, make_picture, options, place):
        """In a thread: makes a picture at a Place; returns whether it is done, or was stopped.
        Raises what makes it fail."""
        place.tell, place.bar = self._heed, Reporter(tell=self._heed)
        orders, seat = Orders(self._counters), Seat(self._shared)
        try:
            make_one(make_picture, options, orders, seat, place, self._network, self._begun)
            return True
        except Stopped:
            return False
        finally:
            seat.end()

    def _begun(self, options):
        with self._one:  # parsing options redirects the whole program's output
            return under_way(options)

    def stop(self, signum):
        """Lets the threads save what they have, and return."""
        self._counters[1] = signum
        self._shared.stop(Stopped(signum))

    def end(self):
        """Ends all: immediately, except that nothing is left half written."""
        self._shared.end()


def gpu_makers(jobs, sizes, batch, network, gpus):
    """The Makers for the jobs on so many GPUs; None if they are to be made one after the other: if
    the tiles of one fill the GPUs, memory is short, they plot (matplotlib works in one thread), or
    each has an objective of its own, found from its start picture or from a guide. The arguments
    are as for local_makers."""
    words = [word for target in jobs[0].target_layer.targets for word in target.channels or ()]
    if jobs[0].guide or any(map(strong, words)) or "plot" in jobs[0].iter_behavior:
        return None
    tiles = min(tiles_at_once(job, sizes) for job in jobs)
    full = 2 * (jobs[0].batch_size or FULL_BATCH) * gpus  # one batch is computed, one gathered
    number = number_of_makers(jobs, sizes, math.ceil(full / max(1, tiles)), each=0)
    room = free_memory() - EACH * gpus * maker_size(network)
    if number < 2:
        return None
    crew = MakerThreads(jobs[0], Desk(batch).heed, network)
    return Makers(number, crew, crew.make, batch, sizes, room)
