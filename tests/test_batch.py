"""Several pictures in one run of the program."""

import os
import signal

import numpy as np
import pytest
from conftest import CARD, TINY, assert_one_line, pixels, run_cli, start, wait_for, workers
from PIL import Image

LAYERS = ["--layer=inception_a/output", "--layer=pool1/norm1:1,3"]
DREAM = [*TINY, "--num_steps=3", "--learning_rate=4", "--iter_behavior=none"]
MADE = [
    f"{name}_{layer}.png" for layer in ("inception_a-output", "pool1-norm1:1,3") for name in "ab"
]


@pytest.fixture
def folder(tmp_path):
    """A folder with a.png, b.png in in/, and a file that is no picture."""
    (tmp_path / "in").mkdir()
    CARD.save(tmp_path / "in/a.png")
    CARD.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "in/b.png")
    (tmp_path / "in/readme.txt").write_text("no picture")
    return tmp_path


def alone(folder, *arguments):
    """The pixels of the picture that the program makes with these arguments alone."""
    done = run_cli(*DREAM, *arguments, "--output=alone.png", cwd=folder)
    assert done.returncode == 0, done.stderr
    return pixels(folder / "alone.png")


@pytest.mark.parametrize("images", [["--image=in"], ["--image", "in/a.png", "in/b.png"],
                                    ["--image=in/a.png", "--image=in/b.png"]])  # fmt: skip
def test_every_picture_through_every_layer(images, folder):
    """As one alone would be; a command in it tells how that is made. What is there is not made
    again, unless by other settings."""
    words = [*DREAM, *images, *LAYERS, "--output=new/dreams/"]
    done = run_cli(*words, cwd=folder)
    assert done.returncode == 0, done.stderr
    made = folder / "new/dreams"
    assert sorted(os.listdir(made)) == sorted(MADE)
    expected = alone(folder, "--image=in/b.png", LAYERS[1])
    assert np.array_equal(pixels(made / MADE[3]), expected)
    command = Image.open(made / MADE[3]).info["Comment"]
    assert "--target_layer=pool1/norm1:1,3" in command
    assert "--initial_image=in/b.png" in command
    before = {name: (made / name).stat().st_mtime_ns for name in MADE}
    again = run_cli(*words, cwd=folder)
    assert again.returncode == 0, again.stderr
    assert "4 of 4 pictures are there already" in again.stderr
    assert before == {name: (made / name).stat().st_mtime_ns for name in MADE}
    run_cli(*words, "--num_steps=1", cwd=folder)
    assert all(before[name] < (made / name).stat().st_mtime_ns for name in MADE)


def test_names_by_a_template(folder):
    words = ["--image=in", "--output={layer}+{name}.jpg", "--stats={name}.csv"]
    done = run_cli(*DREAM, *words, LAYERS[0], cwd=folder)
    assert done.returncode == 0, done.stderr
    files = {"inception_a-output+a.jpg", "inception_a-output+b.jpg", "a.csv", "b.csv", "in"}
    assert set(os.listdir(folder)) == files
    assert "2 of 2" in run_cli(*DREAM, *words, LAYERS[0], cwd=folder).stderr
    noise = run_cli(*DREAM, "--output={name}.png", "--seed=1", cwd=folder)
    assert_one_line(noise, 2, "--layer inception_4d/3x3_reduce", "no such layer")
    noise = run_cli(*DREAM, "--output={name}.png", LAYERS[0], "--initial_size=40x40", cwd=folder)
    assert noise.returncode == 0, noise.stderr
    assert (folder / "noise.png").exists()


def test_workers_are_started_once(folder):
    running = start(*DREAM, "--num_steps=60", "--image=in", *LAYERS, "--output=out/", cwd=folder)
    seen = set()

    def is_done():
        seen.update(workers(running.pid))
        return (folder / "out" / MADE[3]).exists()

    wait_for(is_done, 60)
    assert running.wait(20) == 0
    assert len(seen) <= 2 * os.cpu_count() + 1  # besides those that look at the network's files


@pytest.mark.parametrize("layer", ["pool1/norm1:1,3", "pool1/norm1:strong2"])
def test_a_stopped_batch_goes_on_where_it_stopped(layer, folder):
    """Amid the second picture: that is continued, not begun again."""
    words = [*DREAM, "--image=in", f"--layer={layer}", "--num_steps=150", "--checkpoint_iter=1"]
    assert run_cli(*words, "--output=whole/", cwd=folder).returncode == 0
    running = start(*words, "--output=out/", cwd=folder)
    name = f"b_{layer.replace('/', '-')}.png"
    wait_for((folder / f"out/{name}.checkpoint").exists, 60)
    running.send_signal(signal.SIGINT)
    said = running.communicate(timeout=60)[1]
    assert running.returncode == 130, said
    assert "the same command, given again, goes on" in said
    done = run_cli(*words, "--output=out/", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "1 of 2 pictures are there already" in done.stderr
    assert "was kept" not in done.stderr
    assert sorted(os.listdir(folder / "out")) == sorted(os.listdir(folder / "whole"))
    for file in os.listdir(folder / "whole"):
        assert np.array_equal(pixels(folder / "out" / file), pixels(folder / "whole" / file))


def test_one_that_fails_does_not_stop_the_others(folder):
    (folder / "in/aa.png").write_text("no picture")
    Image.new("RGB", (20, 20)).save(folder / "in/c.png")
    done = run_cli(*DREAM, "--image=in", LAYERS[0], "--output=out/", "--quiet", cwd=folder)
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert len(lines) == 3
    assert "out/aa_inception_a-output.png: --image in/aa.png: cannot be read" in lines[0]
    assert "out/c_inception_a-output.png: " in lines[1]
    assert "2 of 4 pictures could not be made" in lines[2]
    assert len(os.listdir(folder / "out")) == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--image", "in/a.png", "in/b.png"], ["--output out.png", "2 pictures", "FOLDER/"]),
        (["--image=in"], ["--image in", "folder", "--output FOLDER/"]),
        (["--image=in", "--output={layer}.png"], ["2 pictures", "{name}"]),
        (["--image=in", "--output=in/{name}.png"], ["would overwrite --image in/a.png"]),
        (["--image=in", "--output=o/", "--stats=s.csv"], ["--stats s.csv", "{name}"]),
        (["--image", "in", "nosuch.png", "--output=o/"], ["--image nosuch.png"]),
        (["--image=in", "--layer=nix", "--output=o/"], ["--layer nix"]),
        (["--image=empty", "--output=o/"], ["--image empty", "no pictures"]),
        (["--image=in", "--output={name}.xyz"], ["--output a.xyz", "extension"]),
        (["--image=in", "--output={name}.jpg", "--depth=16"], ["--depth 16", "a.jpg"]),
        (["--image=in", "--output=in/readme.txt/"], ["--output", "cannot be made"]),
    ],
)
def test_a_batch_that_cannot_be_is_refused(arguments, words, folder):
    """Before any work: nothing is written, not even a folder."""
    (folder / "empty").mkdir()
    assert_one_line(run_cli(*DREAM, LAYERS[0], *arguments, cwd=folder), 2, *words)
    assert sorted(os.listdir(folder)) == ["empty", "in"]


def test_the_last_layer_counts_for_one_picture(folder):
    """As with every option, so that scripts take options of their own."""
    done = run_cli(*DREAM, "--image=in/b.png", "--image=in/a.png", *LAYERS, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert np.array_equal(pixels(folder / "out.png"), alone(folder, "--image=in/a.png", LAYERS[1]))
