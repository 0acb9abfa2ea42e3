"""Tiles are computed ahead of their turn; the picture must not know. The scheduler with workers that only pretend, against
a plain loop."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

import cnn_vis


def gradient(tile):
    """Stands for the network: depends on every pixel of the tile, and is float32 in and out."""
    tile = np.asarray(tile, np.float32)
    return tile * np.float32(0.25) + tile.mean(dtype=np.float32)


def step(image, region, gradient):
    y0, y1, x0, x1 = region
    image[0, :, y0:y1, x0:x1] -= gradient + 0.01 * y0 + 0.003 * x0


class PretendedWorkers:
    """As cnn_vis.Workers, with `slots` places; tells when it is given more than it can hold, or asked for too much."""

    def __init__(self, slots, batch_size):
        self.slots, self.batch_size = slots, batch_size
        self.held, self.batches = {}, []

    def has_room(self):
        return len(self.held) < self.slots

    def send(self, tiles_in, measure):
        assert self.has_room()
        assert 1 <= len(tiles_in) <= self.batch_size
        ticket = len(self.batches)
        self.held[ticket] = [(gradient(tile), float(np.sum(tile)) if measure else None) for tile in tiles_in]
        self.batches.append(len(tiles_in))
        return ticket

    def receive(self, ticket):
        return self.held.pop(ticket)


@settings(max_examples=300, deadline=None)
@given(size=st.tuples(st.integers(4, 30), st.integers(4, 30)), tile=st.tuples(st.integers(2, 4), st.integers(2, 4)),
       steps=st.integers(1, 3), slots=st.integers(1, 9), batch_size=st.integers(1, 6), seed=st.integers(0, 99))  # fmt: skip
def test_order_of_work_does_not_show(size, tile, steps, slots, batch_size, seed):
    image = np.random.default_rng(seed).normal(size=(1, 3, *size))
    expected, order = image.copy(), []
    colours = [colour for colour in cnn_vis.tiles(size, tile) if colour] * steps
    for colour in colours:
        before = expected.copy()
        for region in colour:
            step(expected, region, gradient(cnn_vis.cut_tile(before, region)))
            order.append(region)

    workers = PretendedWorkers(slots, batch_size)
    measured = [seed % (number + 2) == 0 for number in range(len(colours))]
    regions, values = [], []
    for region, receive in cnn_vis.tile_gradients(workers, image, zip(colours, measured)):
        regions.append(region)
        downhill, value = receive()
        values.append(value)
        step(image, region, downhill)
    assert regions == order
    asked = [measure for colour, measure in zip(colours, measured) for _ in colour]
    assert all(value is not None for value, measure in zip(values, asked) if measure)
    assert image.tobytes() == expected.tobytes()
    assert not workers.held


def test_workers_are_kept_busy():
    """In a picture of many tiles a single worker always has the next tile before it is done with the one in hand, and full
    batches are made where there are tiles for them."""
    size, tile = (1080, 1920), (224, 224)
    colours = [colour for colour in cnn_vis.tiles(size, tile) if colour] * 4
    image = np.zeros((1, 3, *size))
    workers, idle = PretendedWorkers(slots=3, batch_size=1), 0
    for _, receive in cnn_vis.tile_gradients(workers, image, ((colour, False) for colour in colours)):
        receive()
        idle += not workers.held
    assert idle == 1  # at the end
    workers = PretendedWorkers(slots=3, batch_size=5)
    for _, receive in cnn_vis.tile_gradients(workers, image, ((colour, False) for colour in colours)):
        receive()
    assert np.mean(workers.batches) > 4
