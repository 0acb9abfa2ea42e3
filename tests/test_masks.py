"""--mask and --keep_colors: what stays of the start picture."""

import signal

import numpy as np
import pytest
from conftest import (
    CARD,
    CHECKPOINT,
    TINY,
    assert_one_line,
    pixels,
    run_cli,
    start,
    wait_for,
)
from PIL import Image

import cnn_vis

DREAM = [
    *TINY,
    "--image=in.png",
    "--layer=inception_a/output",
    "--num_steps=4",
    "--learning_rate=4",
    "--iter_behavior=none",
]
SIZE = CARD.size[::-1]


@pytest.fixture
def folder(tmp_path):
    """A folder with in.png, and mask.png: white at the right, black at the left, a ramp between."""
    CARD.save(tmp_path / "in.png")
    Image.fromarray(ramp()).save(tmp_path / "mask.png")
    return tmp_path


def ramp():
    """The mask, uint8 (H, W)."""
    height, width = SIZE
    columns = np.clip((np.arange(width) - 80) * 8, 0, 255).astype(np.uint8)
    return np.tile(columns, (height, 1))


def dream(*arguments, cwd):
    done = run_cli(*DREAM, *arguments, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.parametrize("more", [[], ["--num_sizes=3", "--initial_size=x0.5"]])
def test_what_is_black_is_kept_to_the_last_bit(more, folder):
    """At whatever sizes the run went along; what is white dreams."""
    dream("--mask=mask.png", *more, cwd=folder)
    ours, before = pixels(folder / "out.png"), pixels(folder / "in.png")
    assert np.array_equal(ours[ramp() == 0], before[ramp() == 0])
    assert np.abs(ours[ramp() == 255].astype(int) - before[ramp() == 255]).mean() > 5


def test_a_white_mask_changes_nothing(folder):
    Image.new("L", CARD.size, 255).save(folder / "white.png")
    dream("--output=plain.png", cwd=folder)
    dream("--mask=white.png", cwd=folder)
    assert np.array_equal(pixels(folder / "out.png"), pixels(folder / "plain.png"))


@pytest.mark.parametrize("more", [[], ["--num_sizes=2", "--initial_size=x0.5"]])
def test_grey_is_between(more, folder):
    """A mix of the photograph and the dream under a white mask, in proportion to the grey."""
    Image.new("L", CARD.size, 64).save(folder / "grey.png")
    dream("--output=white.png", *more, cwd=folder)
    dream("--mask=grey.png", *more, cwd=folder)
    ours, white, before = (
        pixels(folder / name).astype(float) for name in ("out.png", "white.png", "in.png")
    )
    assert np.abs(white - before).mean() > 5
    assert np.abs(ours - (before + (white - before) * 64 / 255)).max() <= 1


def test_tiles_that_are_kept_are_not_computed():
    """And the bar, which counts a Dream's tiles, does not wait for them."""
    settings = cnn_vis.Settings(mask="mask.png", initial_size="x1")

    class Engine:
        tile_size = (32, 32)

    dreams = [
        cnn_vis.Dream(settings, np.asarray(CARD), 0, Engine, mask=mask) for mask in (None, ramp())
    ]
    every, ours = ([tile for colour in d.tiles(SIZE) for tile in colour] for d in dreams)
    assert ours == [tile for tile in every if ramp()[:, : tile[3]].any()]
    assert 0 < len(ours) < len(every)


def test_a_masked_run_is_stopped_resumed_and_reproduced(folder):
    """The mask's file is not needed to go on."""
    masked = ["--mask=mask.png", "--keep_colours", "--num_sizes=2", "--initial_size=x0.5"]
    dream(*masked, "--num_steps=40", "--output=whole.png", cwd=folder)
    long = [*DREAM, *masked, "--num_steps=40", "--checkpoint_iter=1"]
    running = start(*long, cwd=folder)
    wait_for((folder / CHECKPOINT).exists)
    running.send_signal(signal.SIGINT)
    running.communicate(timeout=60)
    (folder / "mask.png").unlink()
    done = run_cli("--resume", CHECKPOINT, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert np.array_equal(pixels(folder / "out.png"), pixels(folder / "whole.png"))
    printed = run_cli("--reproduce=out.png", cwd=folder).stdout
    assert "mask.png" in printed
    assert "--keep_colours" in printed


@pytest.mark.parametrize(
    "change",
    [
        lambda arrays: arrays.pop("mask"),
        lambda arrays: arrays.pop("picture"),
        lambda arrays: arrays.update(mask=np.full((1, 1), 255, np.uint8)),
        lambda arrays: arrays.update(mask=arrays["mask"].T.copy()),
        lambda arrays: arrays.update(mask=np.zeros_like(arrays["mask"])),
    ],
)
def test_a_checkpoint_with_another_mask_is_refused(change, folder):
    """Nothing that was to be kept is dreamt over."""
    running = start(
        *DREAM, "--mask=mask.png", "--num_steps=9999", "--checkpoint_iter=1", cwd=folder
    )
    wait_for((folder / CHECKPOINT).exists)
    running.send_signal(signal.SIGINT)
    running.communicate(timeout=60)
    with np.load(folder / CHECKPOINT) as file:
        arrays = dict(file)
    change(arrays)
    with open(folder / CHECKPOINT, "wb") as file:
        np.savez(file, **arrays)
    assert_one_line(run_cli("--resume", CHECKPOINT, cwd=folder), 2, "--resume", CHECKPOINT, "its ")


def test_the_alpha_channel_can_be_the_mask(folder):
    """Opaque areas dream. `alpha` is not taken for a file name, even when a run is resumed
    elsewhere."""
    cut = CARD.copy()
    cut.putalpha(Image.fromarray(ramp()))
    cut.save(folder / "cut.png")
    dream("--image=cut.png", "--mask=alpha", "--background=black", cwd=folder)
    ours = pixels(folder / "out.png")
    assert not ours[ramp() == 0].any()
    assert ours[ramp() == 255].std() > 20


def test_a_mask_of_another_shape_is_stretched_and_told(folder):
    Image.fromarray(ramp()).resize((50, 90)).save(folder / "mask.png")
    said = dream("--mask=mask.png", cwd=folder)
    told = "the mask, 50x90 pixels (width x height), is stretched to the picture's 200x160"
    assert f"note: mask.png: {told}" in said
    assert np.array_equal(pixels(folder / "out.png")[:, :60], pixels(folder / "in.png")[:, :60])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--image=in.png", "--mask=black.png"], ["black everywhere"]),
        (["--mask=mask.png"], ["noise", "--image"]),
        (["--image=in.png", "--mask=alpha"], ["in.png has no transparent parts"]),
        (["--image=in.png", "--mask=nosuch.png"], ["--mask nosuch.png"]),
        (["--image=in.png", "--mask=text.png"], ["--mask text.png", "cannot be read"]),
        (["--image=in.png", "--mask=dot.png", "--initial_size=x0.2"], ["--mask dot.png", "32x40"]),
        (["--image=in.png", "--mask=out.png"], ["would overwrite --mask"]),
        (
            ["--image=in.png", "--mask=mask.png", "--final_size=300000", "--num_sizes=2"],
            ["--final_size 300000", "needs"],
        ),
    ],
)
def test_masks_that_cannot_be_are_refused(arguments, words, folder):
    Image.new("L", CARD.size).save(folder / "black.png")
    Image.fromarray(ramp()).save(folder / "out.png")
    dot = np.zeros(SIZE, np.uint8)
    dot[50, 60] = 9
    Image.fromarray(dot).save(folder / "dot.png")
    (folder / "text.png").write_text("no picture")
    common = [word for word in DREAM if "image=in" not in word]
    assert_one_line(run_cli(*common, *arguments, cwd=folder), 2, "--", *words)


def test_colors_are_kept(folder):
    """Brightness is the dream's, all else the photograph's, as far as 8 bits of RGB can hold it."""
    dream("--output=plain.png", cwd=folder)
    dream("--keep_colors", cwd=folder)
    ours, plain, before = (
        np.asarray(Image.open(folder / name).convert("YCbCr")).astype(int)
        for name in ("out.png", "plain.png", "in.png")
    )
    inside = ((pixels(folder / "out.png") > 0) & (pixels(folder / "out.png") < 255)).all(axis=2)
    assert inside.mean() > 0.3
    assert np.abs(ours - plain)[inside, 0].max() <= 2
    assert np.abs(ours - before)[inside, 1:].max() <= 2


def test_colors_are_not_kept_in_the_run_itself(folder):
    """The same steps, whatever is shown of them."""
    for more in ([], ["--keep_colors"]):
        dream(*more, f"--stats={len(more)}.csv", "--num_sizes=2", "--final_size=x1.2", cwd=folder)
    assert (folder / "0.csv").read_text() == (folder / "1.csv").read_text()
