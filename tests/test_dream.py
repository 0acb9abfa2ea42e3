"""The main loop. Tiles are computed ahead of their turn, which must not change the picture: the
scheduler with a fake engine is compared with a plain loop."""

import concurrent.futures
import contextlib

import numpy as np
import pytest
from conftest import GOLDEN, ONE, TINY, assert_one_line, run_cli
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import cnn_vis
from cnn_vis_lib.ahead import Steps, after_tiles, cut_tile, tile_gradients
from cnn_vis_lib.workers import Engine


def gradient(tile):
    """Stands for the network: depends on every pixel of the tile, and is float32 in and out."""
    tile = np.asarray(tile, np.float32)
    return tile * np.float32(0.25) + tile.mean(dtype=np.float32)


def pool_of(threads):
    """A pool of that many threads, as a context manager, which gives None for 0."""
    if threads:
        return concurrent.futures.ThreadPoolExecutor(threads)
    return contextlib.nullcontext()


def step(image, region, gradient):
    y0, y1, x0, x1 = region
    image[0, :, y0:y1, x0:x1] -= gradient + 0.01 * y0 + 0.003 * x0


class PretendedEngine(Engine):
    """A fake Engine with `slots` places. Fails if it is given more than it can hold, or
    asked for too much."""

    def __init__(self, slots, batch_size, number=1):
        self.slots, self.batch_size, self.number = slots, batch_size, number
        self.held, self.batches, self.is_asked_again = {}, [], True

    def expect(self, count):
        assert count > 0

    def has_room(self):
        return len(self.held) < self.slots

    def send(self, tiles_in, measure):
        assert self.has_room()
        assert 1 <= len(tiles_in) <= self.batch_size
        ticket = len(self.batches)
        self.held[ticket] = [
            (gradient(tile), float(np.sum(tile)) if measure else None) for tile in tiles_in
        ]
        self.batches.append(len(tiles_in))
        return ticket

    def is_done(self, ticket):
        self.is_asked_again = not self.is_asked_again
        return self.is_asked_again

    def receive(self, ticket):
        return self.held.pop(ticket)


@settings(max_examples=300, deadline=None)
@given(
    size=st.tuples(st.integers(4, 30), st.integers(4, 30)),
    tile=st.tuples(st.integers(2, 4), st.integers(2, 4)),
    steps=st.integers(1, 3),
    slots=st.integers(1, 9),
    batch_size=st.integers(1, 6),
    threads=st.integers(0, 3),
    seed=st.integers(0, 99),
)
def test_order_of_work_does_not_show(size, tile, steps, slots, batch_size, threads, seed):
    image = np.random.default_rng(seed).normal(size=(1, 3, *size))
    expected, order = image.copy(), []
    colours = [colour for colour in cnn_vis.tiles(size, tile) if colour] * steps
    for colour in colours:
        before = expected.copy()
        for region in colour:
            step(expected, region, gradient(cut_tile(before, region)))
            order.append(region)

    engine = PretendedEngine(slots, batch_size)
    measured = [seed % (number + 2) == 0 for number in range(len(colours))]
    regions, losses = [], []
    with pool_of(threads) as pool:
        steps, turns = Steps(pool), zip(colours, measured)
        for region, downhill, loss in tile_gradients(engine, image, turns, steps):
            regions.append(region)
            losses.append(loss)
            steps.take(region, step, image, region, downhill)
        steps.wait()
    assert regions == order
    asked = [measure for colour, measure in zip(colours, measured) for _ in colour]
    assert all(loss is not None for loss, measure in zip(losses, asked) if measure)
    assert image.tobytes() == expected.tobytes()
    assert not engine.held


@settings(max_examples=300, deadline=None)
@given(
    size=st.tuples(st.integers(4, 30), st.integers(4, 30)),
    tile=st.tuples(st.integers(2, 4), st.integers(2, 4)),
    slots=st.integers(1, 9),
    batch_size=st.integers(1, 6),
    threads=st.integers(0, 3),
    stops=st.lists(st.integers(1, 200), max_size=3),
)
def test_stops_between_tiles_do_not_show(size, tile, slots, batch_size, threads, stops):
    image = np.random.default_rng(0).normal(size=(1, 3, *size))
    turns = [(colour, False) for colour in cnn_vis.tiles(size, tile)] * 3
    expected, engine = image.copy(), PretendedEngine(slots, batch_size)
    left, steps = after_tiles(0, turns), Steps()
    for region, downhill, _ in tile_gradients(engine, expected, left, steps):
        step(expected, region, downhill)

    total, done, before = sum(len(colour) for colour, _ in turns), [], {}
    for stop in sorted([*stops, total + 1]):
        left = after_tiles(len(done), turns)
        before = {region: np.array(pixels) for region, pixels in before.items()}
        engine = PretendedEngine(slots, batch_size)
        with pool_of(threads) as pool:
            steps, is_stopping = Steps(pool), lambda stop=stop: len(done) >= stop
            for region, downhill, _ in tile_gradients(
                engine, image, left, steps, before, is_stopping
            ):
                steps.take(region, step, image, region, downhill)
                done.append(region)
            steps.wait()
        assert len(done) >= min(stop, total)
    assert len(done) == total
    assert image.tobytes() == expected.tobytes()


def test_the_engine_is_kept_busy():
    """In a picture of many tiles, an engine with few slots always has its next tile before it
    finishes the current one, and batches are full if there are enough tiles."""
    size, tile = (1080, 1920), (224, 224)
    colours = [colour for colour in cnn_vis.tiles(size, tile) if colour] * 4
    image = np.zeros((1, 3, *size))
    turns = [(colour, False) for colour in colours]
    engine, idle = PretendedEngine(slots=3, batch_size=1), 0
    for _ in tile_gradients(engine, image, turns, Steps()):
        idle += not engine.held
    assert idle == 1  # at the end
    engine = PretendedEngine(slots=3, batch_size=5)
    for _ in tile_gradients(engine, image, turns, Steps()):
        pass
    assert np.mean(engine.batches) > 3  # of colours of 11 to 15 tiles


class Clockwork(PretendedEngine):
    """GPUs that take 20 ms a tile, in pretended time."""

    def __init__(self, number):
        super().__init__(2 * number + 1, 32, number)
        self.now, self.free, self.ends = 0, [0] * number, {}

    def send(self, tiles_in, measure):
        ticket = super().send(tiles_in, measure)
        gpu = self.free.index(min(self.free))
        self.free[gpu] = self.ends[ticket] = max(self.now, self.free[gpu]) + 20 * len(tiles_in)
        return ticket

    def receive(self, ticket):
        self.now = max(self.now, self.ends.pop(ticket))
        return super().receive(ticket)


@pytest.mark.parametrize("number", [1, 2, 4])
def test_gpus_share_the_tiles_of_a_turn(number):
    """However large a batch may be, no GPU takes all tiles while the others wait."""
    size = (1080, 1920)
    turns = [(colour, False) for colour in cnn_vis.tiles(size, (224, 224))] * 4
    engine = Clockwork(number)
    for _ in tile_gradients(engine, np.zeros((1, 3, *size)), turns, Steps()):
        pass
    assert engine.now / sum(len(colour) for colour, _ in turns) < 1.06 * 20 / number


SILENT = """
layer {{ name: "data" type: "Input" top: "data"
         input_param {{ shape {{ dim: 1 dim: 3 dim: 32 dim: 32 }} }} }}
layer {{ name: "low" type: "Power" bottom: "data" top: "low" power_param {{ shift: {shift} }} }}
layer {{ name: "relu" type: "ReLU" bottom: "low" top: "relu" }}
layer {{ name: "after" type: "Power" bottom: "relu" top: "after" power_param {{ power: 2 }} }}
"""


def test_a_gradient_of_zeros_is_told_and_ends_a_run_that_nothing_changes(tmp_path):
    """A ReLU that is off everywhere is reported; the run goes on if there are regularizers, else it
    ends. The same network with the ReLU on reports nothing."""
    (tmp_path / "no.caffemodel").write_bytes(b"")
    for shift in (-1000, 1000):
        (tmp_path / f"{shift}.prototxt").write_text(SILENT.format(shift=shift))
    common = ["--caffe_model=no.caffemodel", TINY[2], "--gpu=-1", "--layer=after", "--num_steps=3"]
    common += ["--initial_size=40x40", "--seed=1", "--initialization_scale=9"]
    common += ["--iter_behavior=none"]
    off = ["--p_reg=0", "--p_reg_aux=0", "--tv_reg=0"]
    for shift, regularizers, status in (
        (1000, off, 0),
        (-1000, ["--tv_reg=1"], 0),
        (-1000, off, 1),
    ):
        options = [f"--deploy_txt={shift}.prototxt", *regularizers]
        done = run_cli(*common, *options, cwd=tmp_path)
        assert done.returncode == status, done.stderr
        assert done.stderr.count("the gradient of after is zero") == (shift < 0), done.stderr
        assert ("no step changes the picture" in done.stderr) == bool(status)
    assert_one_line(run_cli(*common, *options, "--quiet", cwd=tmp_path), 1, "after", "out.png")


def test_overflow_of_the_running_square_is_reported(tmp_path):
    """The running square overflows first, which would silently freeze the picture's pixels."""
    done = run_cli(
        *TINY,
        "--layer=inception_a/output",
        "--initialization_scale=30",
        "--seed=1",
        "--alpha=140",
        "--p_reg=1",
        "--num_steps=9",
        "--quiet",
        cwd=tmp_path,
    )
    assert_one_line(done, 1, "overflowed", "--alpha", "out.png")


def test_overflow_ends_the_run_and_keeps_the_last_good_picture(tmp_path):
    """The run stops, names the options, and keeps the last good picture."""
    done = run_cli(
        *TINY,
        "--layer=inception_a/output",
        f"--image={GOLDEN}/input.png",
        "--p_reg=1e308",
        "--alpha=12",
        "--num_steps=9",
        "--learning_rate=1e30",
        "--quiet",
        cwd=tmp_path,
    )
    assert_one_line(done, 1, "overflowed", "--learning_rate", "--p_reg", "out.png")
    Image.open(tmp_path / "out.png").verify()


@pytest.mark.parametrize(
    ("option", "words"),
    [("--learning_rate=1e39", "overflowed"), ("--l1_weight=1e38", "gradient of the start picture")],
)
def test_absurd_values_are_one_line(option, words, tmp_path):
    """With overlapping tiles: the next tile includes the pixels that the previous one drove up."""
    words_of_one = [word for word in ONE if "size" not in word]
    options = [*words_of_one, "--num_steps=3", "--initial_size=64x96", option]
    done = run_cli(*options, "--initialization_scale=20", cwd=tmp_path)
    assert_one_line(done, 1, words, "--l1_weight", "out.png")
    assert not (tmp_path / "out.png.checkpoint").exists()


def test_final_size_is_not_looked_at_with_one_size(tmp_path):
    assert run_cli(*ONE, "--final_size=0x0", cwd=tmp_path).returncode == 0
