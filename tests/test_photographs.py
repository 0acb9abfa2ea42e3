"""What keeps a photograph as it is where nothing is dreamt: --contrast, --enlarge change and
--step_rule mean."""

import itertools

import numpy as np
import pytest
from conftest import GOLDEN, TINY, pixels, run_cli
from PIL import Image
from test_dream import PretendedEngine, gradient

import cnn_vis
from cnn_vis_lib.ahead import cut_tile
from cnn_vis_lib.pixels import planes, resize

MEAN = 112.5
PICTURE = np.random.default_rng(1).integers(0, 256, (40, 60, 3), np.uint8)


class SmallTiles(PretendedEngine):
    """An engine with tiles of 16x16 pixels, and gradients of any size."""

    tile_size = (16, 16)

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.is_asked_again = False


def dream(picture=PICTURE, slots=3, mask=None, **settings):
    """A Dream with no regularizer, unless the settings say otherwise, at one size."""
    settings = {"num_steps": 3, "p_reg": 0, "tv_reg": 0, "seed": 1} | settings
    settings = cnn_vis.Settings(**settings)
    return cnn_vis.Dream(settings, picture, MEAN, SmallTiles(slots, 1), mask=mask)


def image_after(run):
    for progress in run.run():
        image = progress.image
    return image.copy()


@pytest.mark.parametrize("strength", [1, 2.5])
@pytest.mark.parametrize("shares", [False, True])
def test_the_step_of_one_divisor(strength, shares):
    """Against a plain loop: the network's gradient divided by its mean size in the step before, in
    the first step by that of the tiles so far."""
    settings = {"step_rule": "mean", "strength": strength, "learning_rate": 1.5}
    found = image_after(dream(**settings, use_pixel_learning_rates=shares))
    size, tile = PICTURE.shape[:2], SmallTiles.tile_size
    image = planes(PICTURE) - MEAN
    counts = cnn_vis.tile_counts(size, tile) if shares else np.ones(size)
    divisor = None
    for _ in range(3):
        sizes = []
        for colour in cnn_vis.tiles(size, tile):
            before = image.copy()
            for region in colour:
                y0, y1, x0, x1 = region
                descent = gradient(cut_tile(before, region))
                sizes.append(np.abs(descent).mean(dtype=float))
                step = 1.5 * strength * descent / (divisor or np.mean(sizes))
                cut_tile(image, region)[:] -= step / counts[y0:y1, x0:x1]
        divisor = np.mean(sizes)
    assert np.abs(found - image).max() < 1e-4
    assert np.abs(found - (planes(PICTURE) - MEAN)).mean() > 1


def test_what_is_weak_stays_weak():
    """Beside strong places the mean rule leaves weak ones alone, which RMSProp moves as much."""
    picture = np.full((40, 120, 3), 110, np.uint8)
    picture[:, 80:] = PICTURE[:, :40]
    moved = {}
    for rule in ("mean", "rmsprop"):
        image = image_after(dream(picture, step_rule=rule, use_pixel_learning_rates=True))
        change = np.abs(image - (planes(picture) - MEAN))
        moved[rule] = change[..., :60].mean() / change[..., 100:].mean()
    assert moved["rmsprop"] > 1.5 * moved["mean"], moved


def test_the_mean_rule_needs_no_caches():
    run = dream(step_rule="mean")
    image_after(run)
    assert run.state()[1]["caches"].size == 0


@pytest.mark.parametrize("rule", ["mean", "rmsprop"])
def test_it_does_not_depend_on_the_engine(rule):
    images = [
        image_after(dream(slots=slots, step_rule=rule, num_sizes=2, initial_size="x0.7"))
        for slots in (1, 3, 8)
    ]
    assert len({image.tobytes() for image in images}) == 1


def test_a_run_goes_on_from_any_tile():
    """With all that the divisors depend on."""
    settings = {"step_rule": "mean", "enlarge": "change", "tv_reg": 0.01, "num_sizes": 2}
    settings |= {"initial_size": "x0.7", "num_steps": 2}
    whole = image_after(dream(**settings))
    for stop in (1, 5, 13, 40):
        first, tiles = dream(**settings), itertools.count()
        for _ in first.run(is_stopping=lambda: next(tiles) > stop):  # noqa: B023
            pass
        assert not first.is_done()
        numbers, arrays = first.state()
        again = dream(**settings)
        again.restore(numbers, {name: array.copy() for name, array in arrays.items()})
        assert image_after(again).tobytes() == whole.tobytes()


@pytest.mark.parametrize("has_start", [True, False])
def test_only_the_change_is_enlarged(has_start):
    random = np.random.default_rng(2)
    change = random.normal(0, 9, (1, 3, 10, 20))
    old, new = (random.integers(0, 256, (1, 3, *size), np.uint8) for size in ((10, 20), (15, 30)))
    image = change + (old - MEAN if has_start else 0)
    found, starts = np.empty((1, 3, 15, 30)), (old, new) if has_start else (None, None)
    cnn_vis.enlarge_change(image, *starts, MEAN, found)
    expected = [resize(plane.astype(np.float32), (15, 30)) for plane in change[0]]
    found -= new - MEAN if has_start else 0
    assert np.abs(found - expected).max() < 1e-3


def test_total_variation_is_that_of_the_change():
    """The photograph's own detail is not smoothed if only the change is enlarged."""
    settings = {"tv_reg": 0.1, "step_rule": "mean", "num_steps": 9, "learning_rate": 0.5}
    settings |= {"strength": 1e-9}
    kept = image_after(dream(**settings, enlarge="change"))
    smoothed = image_after(dream(**settings, enlarge="picture"))
    assert np.abs(kept - (planes(PICTURE) - MEAN)).max() < 1e-6
    assert np.abs(smoothed - (planes(PICTURE) - MEAN)).mean() > 9


@pytest.mark.parametrize("mask", [False, True])
def test_a_photograph_in_which_nothing_is_dreamt_stays_as_it_is(mask, tmp_path):
    """At any number of sizes; by the original's contrast it does not."""
    picture = np.asarray(Image.open(f"{GOLDEN}/input.png").convert("RGB"))
    words = [*TINY, f"--image={GOLDEN}/input.png", "--layer=inception_a/output", "--num_steps=1"]
    words += ["--num_sizes=3", "--initial_size=x0.8", "--final_size=x1", "--iter_behavior=none"]
    words += ["--learning_rate=1e-9", "--p_reg=0", "--tv_reg=0", "--step_rule=mean"]
    if mask:
        half = np.zeros(picture.shape[:2], np.uint8)
        half[:, :40] = 255
        Image.fromarray(half).save(tmp_path / "mask.png")
        words += ["--mask=mask.png"]
    new = ["--enlarge=change", "--contrast=1", "--output=kept.png"]
    for more in (new, ["--output=raised.png"]):
        done = run_cli(*words, *more, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    kept, raised = (pixels(tmp_path / f"{n}.png").astype(int) for n in ("kept", "raised"))
    assert np.abs(kept - picture).max() <= 1  # fractions are cut off
    part = np.s_[:, :30] if mask else np.s_[:]
    assert raised[part].std() > 1.15 * picture[part].std()
