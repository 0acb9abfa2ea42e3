"""The order in which tiles are computed and stepped: each as early as possible, with the result of
computing one turn after the other."""

import collections
import concurrent.futures
import itertools
import math

import numpy as np


def cut_tile(image, region):
    """The pixels (3, H, W) of a region, a view."""
    y0, y1, x0, x1 = region
    return image[0, :, y0:y1, x0:x1]


def overlap(a, b):
    """Whether two regions have pixels in common."""
    return a[0] < b[1] and b[0] < a[1] and a[2] < b[3] and b[2] < a[3]


Tile = collections.namedtuple("Tile", "turn region measure")  # turn: the number of its turn


class Steps:
    """Takes the steps of tiles in the threads of `pool`: those that overlap one after the other, in
    order, all others at the same time. So the image does not depend on the number of threads.
    Without a pool each step is taken immediately."""

    def __init__(self, pool=None):
        self._pool, self._pending = pool, []  # [(region, future), ...]

    def take(self, region, step, *arguments):
        """Runs step(*arguments), which changes the region of the image, or hands it to the pool."""
        if self._pool is None:
            step(*arguments)
            return

        def in_turn(earlier):
            concurrent.futures.wait(earlier)
            step(*arguments)

        done = [future for _, future in self._pending if future.done()]
        for future in done:
            future.result()  # raises what the step raised
        self._pending = [pair for pair in self._pending if pair[1] not in done]
        self._pending.append((region, self._pool.submit(in_turn, self._over(region))))

    def _over(self, region):
        return [future for other, future in self._pending if overlap(other, region)]

    def is_busy(self, region):
        """Whether a step that changes the region is unfinished."""
        return not all(future.done() for future in self._over(region))

    def wait(self, region=None):
        """Waits for the steps that change the region, or for all steps. Raises what they raise."""
        futures = self._over(region) if region else [future for _, future in self._pending]
        for future in futures:
            future.result()


class TileQueue:
    """The tiles of `turns`, in order: `unsent`, which the engine has not been given yet, and
    `unstepped`, which it has been given, but whose steps have not been taken. The arguments are
    those of tile_gradients."""

    def __init__(self, engine, image, turns, steps, before):
        self.engine, self.image, self.steps, self.before = engine, image, steps, before
        self.unsent, self.unstepped = collections.deque(), collections.deque()
        self._turns = enumerate(turns)
        self._most = 1  # the most tiles in a batch

    def send(self, is_idle):
        """Sends the engine the next batch. Returns (tiles, the engine's ticket), or None if no tile
        is ready, or the engine is not idle and there will be a fuller batch soon."""
        batch = self._ready()
        is_fuller_soon = len(batch) < min(self._most, len(self.unsent)) and not is_idle
        if not batch or is_fuller_soon:
            return None
        pixels = [self.before.get(tile.region, cut_tile(self.image, tile.region)) for tile in batch]
        self.unstepped += [self.unsent.popleft() for _ in batch]
        return batch, self.engine.send(pixels, any(tile.measure for tile in batch))

    def _ready(self):
        """The tiles that can be sent next, up to a full batch."""
        batch = []
        while len(batch) < self._most and (len(batch) < len(self.unsent) or self._add_turn(batch)):
            tile = self.unsent[len(batch)]
            unfinished = itertools.chain(self.unstepped, batch)
            earlier = (other for other in unfinished if other.turn < tile.turn)
            if any(overlap(other.region, tile.region) for other in earlier):
                break
            if tile.region not in self.before and self.steps.is_busy(tile.region):
                break
            batch.append(tile)
        return batch

    def _add_turn(self, batch):
        """Adds the tiles of the next turn to the unsent ones; returns whether there were any."""
        for turn, (regions, measure) in self._turns:
            if not regions:
                continue
            self.unsent += [Tile(turn, region, measure) for region in regions]
            # Four batches a turn for each device, so that none waits while one has all tiles.
            share = math.ceil(len(regions) / (4 * self.engine.number))
            self._most = min(self.engine.batch_size, max(share, self._most if batch else 1))
            return True
        return False

    def keep_before(self, tile):
        """Keeps the pixels that the step of `tile`, the first unstepped one, is about to change in
        tiles of its turn that come after it."""
        later = itertools.chain(itertools.islice(self.unstepped, 1, None), self.unsent)
        for other in itertools.takewhile(lambda other: other.turn == tile.turn, later):
            if other.region not in self.before and overlap(other.region, tile.region):
                self.steps.wait(other.region)
                self.before[other.region] = cut_tile(self.image, other.region).astype(np.float32)
        self.before.pop(tile.region, None)


def tile_gradients(engine, image, turns, steps, before=None, is_stopping=lambda: False):
    """Yields (region, gradient, loss) for every region of `turns`, in order. `turns` is an iterable
    of (list of regions, whether to measure the loss); a turn is one colour of one step. The
    gradient, float32 (3, H, W), is with respect to the tile; the loss is the objective's, None
    unless measured. The caller passes the step of a region to `steps`, a Steps, before asking for
    the next region.

    A tile's gradient is that of the image just before the first step of its turn. The tile is sent
    as soon as all tiles of earlier turns that overlap it have been stepped, so that the engine need
    not wait for the end of a turn.

    When is_stopping() becomes true, this ends between two tiles. The dict `before`, {region: pixels
    (3, H, W)}, then holds what is needed to continue, apart from the remaining turns: the pixels
    of tiles that others of their turn have begun to change, as they were before.
    """
    queue = TileQueue(engine, image, turns, steps, {} if before is None else before)
    sent = collections.deque()  # batches that the engine has: (tiles, ticket)
    while not is_stopping():
        while engine.has_room() and (batch := queue.send(is_idle=not sent)):
            sent.append(batch)
        if not sent and not queue.unsent:
            return
        if not sent:
            steps.wait(queue.unsent[0].region)
            continue
        tiles, ticket = sent.popleft()
        while not engine.is_done(ticket):
            if is_stopping():
                return
        for tile, (gradient, loss) in zip(tiles, engine.receive(ticket)):
            queue.keep_before(tile)
            yield tile.region, gradient, loss
            queue.unstepped.popleft()


def after_tiles(done, turns):
    """Yields what is left of `turns`, as in tile_gradients, after the first `done` tiles."""
    for regions, measure in turns:
        yield regions[done:], measure
        done = max(0, done - len(regions))
