"""How busy cores are with one picture: a part of benchmark.py. The program runs as always, with an
engine that sleeps instead of computing: for what a tile takes on as many cores as it would have."""

import bisect
import ctypes
import time

import numpy as np
from benchmark import SETTINGS, milliseconds, objective_of

import cnn_vis
from cnn_vis_lib.network import Network
from cnn_vis_lib.prototxt import caffe_library
from cnn_vis_lib.workers import Engine, compute_batch

SIZES = ((427, 640), (600, 900), (1080, 1920))
CORES = (2, 4, 8, 16, 32)


def measure_pieces(spec, tile):
    """In a process of its own: what is known of a tile's time, a dict of the ms that it takes with
    one core and with two, and the ms of the pieces of each part of its work, as a list of lists."""
    network, objective, library = Network(spec), objective_of(spec), caffe_library()

    def gradient():
        compute_batch(network, objective, tile, measure=False)

    times = {1: milliseconds(gradient, 25)}
    parts = []
    see = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.POINTER(ctypes.c_double))(
        lambda count, seconds: parts.append(seconds[:count])
    )
    library.cnn_vis_observe(see)
    for _ in range(5):
        gradient()
    library.cnn_vis_observe(None)
    each = len(parts) // 5
    passes = [parts[i * each : (i + 1) * each] for i in range(5)]
    pieces = [(1000 * np.median(same, axis=0)).tolist() for same in zip(*passes)]
    library.cores = ctypes.c_int(1)  # besides this one; helping threads keep its address
    library.cnn_vis_share_cores(ctypes.byref(library.cores))
    times[2] = milliseconds(gradient, 25)
    return {"one": times[1], "two": times[2], "pieces": pieces}


def makespan(pieces, cores):
    """When the last of the pieces is done, if each core takes the next one as soon as it can."""
    free = [0.0] * min(cores, len(pieces))
    for piece in pieces:
        bisect.insort(free, free.pop(0) + piece)
    return free[-1]


class TileTime:
    """The ms that a tile takes on a number of cores, from what measure_pieces found: what is not in
    pieces takes as long as on one core; each part of the work as long as its pieces when they are
    taken in order, and a moment more, for calling others and waiting for them. The moment is what
    the time that was measured for two cores leaves for it."""

    def __init__(self, one, two, pieces):
        self.pieces = [part for part in pieces if len(part) > 1]
        self.rest = one - sum(map(sum, self.pieces))
        self.moment = max(0, (two - self._without_moments(2)) / len(self.pieces))
        self.times = [one, *(self._on(cores) for cores in range(2, max(CORES) + 1))]

    def _without_moments(self, cores):
        return self.rest + sum(makespan(part, cores) for part in self.pieces)

    def _on(self, cores):
        return self._without_moments(cores) + len(self.pieces) * self.moment

    def __call__(self, cores):
        """Also for fractions, as the mean of a tile that has more and fewer in turn."""
        numbers = range(1, len(self.times) + 1)
        return 1 / np.interp(cores, numbers, [1 / ms for ms in self.times])


class Sleeping(Engine):
    """Pretends to compute tiles on so many cores, which those that are under way share."""

    def __init__(self, cores, tile_time, tile_size=(224, 224)):
        self.tile_size, self.batch_size, self.number = tile_size, 1, cores
        self.cores, self.tile_time, self.busy = cores, tile_time, 0.0
        self._left, self._now, self._tickets = {}, time.perf_counter(), 0
        self._gradient = np.ones((3, *tile_size), np.float32)

    def _underway(self):
        return list(self._left)[: self.cores]

    def _advance(self):
        """Does what has been done since the last call: rates change when a tile begins or ends."""
        now = time.perf_counter()
        while underway := self._underway():
            rate = 1 / self.tile_time(self.cores / len(underway)) * 1000  # tiles a second, each
            first = min(self._left[ticket] for ticket in underway) / rate
            step = min(first, now - self._now)
            self.busy += step * len(underway) * rate * self.tile_time(1) / 1000
            for ticket in underway:
                self._left[ticket] -= step * rate
            self._now += step
            if step < first:
                break
            self._left = {t: left for t, left in self._left.items() if left > 1e-9}
        self._now = now

    def has_room(self):
        return len(self._left) < 2 * self.cores + 1

    def send(self, tiles_in, measure=True):
        self._advance()
        self._tickets += 1
        self._left[self._tickets] = 1.0
        return self._tickets

    def is_done(self, ticket):
        self._advance()
        if ticket in self._left:
            time.sleep(1e-4)
        return ticket not in self._left

    def receive(self, ticket):
        return [(self._gradient.copy(), None)]


def occupancy(size, cores, tile_time, steps=4):
    """(share of the cores that computes, ms for each tile) at a size, over some steps."""
    engine = Sleeping(cores, tile_time)
    initial = "{}x{}".format(*size)
    settings = cnn_vis.Settings(
        **SETTINGS, initial_size=initial, num_steps=steps + 1, seed=1, initialization_scale=20.0
    )
    dream = cnn_vis.Dream(settings, None, 103, engine)
    for progress in dream.run():
        if progress.step == 1:
            begun, engine.busy = time.perf_counter(), 0.0
    passed = time.perf_counter() - begun
    count = steps * len(dream.cache_index)
    return engine.busy / passed / cores, 1000 * passed / count


def report(found):
    """Prints the tables, from what measure_pieces found."""
    tile_time = TileTime(**found)
    print(
        f"\nA tile takes {found['one']:.1f} ms on one core and {found['two']:.1f} on two, measured:"
    )
    print(f"{found['one'] / found['two']:.2f} times faster. Reckoned for more, with")
    print(f"{1000 * tile_time.moment:.1f} us for each of the {len(tile_time.pieces)} parts:")
    print("\n| cores for one tile | ms | times faster |\n|---|---|---|")
    for cores in (1, *CORES):
        print(f"| {cores} | {tile_time(cores):.1f} | {found['one'] / tile_time(cores):.1f} |")
    print("\n| busy cores; ms a tile |", " | ".join(f"{n} cores" for n in CORES), "|")
    print("|---" * (len(CORES) + 1) + "|")
    for height, width in SIZES:
        cells = [occupancy((height, width), cores, tile_time) for cores in CORES]
        cells = [f"{busy:.0%}; {ms:.1f}" for busy, ms in cells]
        print(f"| {width}x{height} |", " | ".join(cells), "|", flush=True)
