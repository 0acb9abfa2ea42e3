"""Several pictures in one run of the program."""

import os
import re
import shutil
import signal

import numpy as np
import pytest
from conftest import CARD, TINY, assert_one_line, pixels, run_cli, start, wait_for, workers
from PIL import Image

from cnn_vis_lib.records import read_record

LAYERS = ["--layer=inception_a/output", "--layer=pool1/norm1:1,3"]
DREAM = [*TINY, "--workers=1", "--num_steps=3", "--learning_rate=4", "--iter_behavior=none"]
MADE = [
    f"{name}_{layer}.png" for layer in ("inception_a-output", "pool1-norm1-1,3") for name in "ab"
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
    """Each picture is as if made alone, and records the command that makes it. Existing pictures
    are not made again unless the settings differ."""
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
    files = {f"inception_a-output+{name}.jpg" for name in "ab"}
    files |= {f"{file}.json" for file in files}  # tells whether it is made again
    assert set(os.listdir(folder)) == files | {"a.csv", "b.csv", "in"}
    assert "2 of 2" in run_cli(*DREAM, *words, LAYERS[0], cwd=folder).stderr
    noise = run_cli(*DREAM, "--output={name}.png", "--seed=1", cwd=folder)
    assert_one_line(noise, 2, "--layer inception_4d/3x3_reduce", "no such layer")
    noise = run_cli(*DREAM, "--output={name}.png", LAYERS[0], "--initial_size=40x40", cwd=folder)
    assert noise.returncode == 0, noise.stderr
    assert (folder / "noise.png").exists()


def test_a_layer_is_in_names_and_records_as_it_was_typed(folder):
    """Also ranges, and more digits than one prints."""
    words = [*DREAM, "--image=in/a.png", "--output={layer}.png", "--num_steps=1"]
    for layer, name in (
        ("pool1/norm1:0-9", "pool1-norm1-0-9.png"),
        ("0.12345678901234567*inception_a/output+pool1/norm1",
         "0.12345678901234567-inception_a-output+pool1-norm1.png"),
    ):  # fmt: skip
        assert run_cli(*words, f"--layer={layer}", cwd=folder).returncode == 0
        assert read_record(str(folder / name))[0]["layer"] == layer
        assert "1 of 1 pictures are there" in run_cli(*words, f"--layer={layer}", cwd=folder).stderr


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
    """Stopped during the second picture: it is resumed, not started over."""
    words = [*DREAM, "--image=in", f"--layer={layer}", "--num_steps=60", "--checkpoint_iter=1"]
    assert run_cli(*words, "--output=whole/", cwd=folder).returncode == 0
    running = start(*words, "--output=out/", cwd=folder)
    name = f"b_{layer.replace('/', '-').replace(':', '-')}.png"
    wait_for((folder / f"out/{name}.checkpoint").exists, 60)
    running.send_signal(signal.SIGINT)
    said = running.communicate(timeout=60)[1]
    assert running.returncode == 130, said
    assert "run the same command again" in said
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
    done = run_cli(*DREAM, "--image=in", *LAYERS, "--output=out/", "--quiet", cwd=folder)
    assert done.returncode == 1
    first, *others, last = done.stderr.splitlines()  # what is no picture is told first, and once
    assert "error: --image in/aa.png: cannot be read" in first
    names = ["c_inception_a-output.png", "c_pool1-norm1-1,3.png"]
    assert [line.split(": ")[2] for line in others] == [f"out/{name}" for name in names]
    assert "4 of 8 pictures could not be made" in last
    assert len(os.listdir(folder / "out")) == 4


def test_a_batch_has_one_header_and_counts(folder):
    done = run_cli(*DREAM, "--image=in", LAYERS[0], "--output=out/", cwd=folder)
    headers = [line for line in done.stderr.splitlines() if "pixels" in line]
    assert re.match("picture 1 of 2, network, inception_a/output, CPU", headers[0])
    assert re.match(r"picture 2 of 2, out/b_inception_a-output\.png: \d+x\d+ pixels$", headers[1])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--image", "in/a.png", "in/b.png"], ["--output out.png", "2 pictures", "FOLDER/"]),
        (["--image=in"], ["--image in", "folder", "--output FOLDER/"]),
        (["--image=in", "--output={layer}.png"], ["2 pictures", "{name}"]),
        (["--image=in", "--output=in/{name}.png"], ["--output in/{name}.png", "another folder"]),
        (["--image=in", "--output=in/"], ["--output in/", "another folder"]),
        (["--image", "in/a.png", "in/b.png", "--output=in/{name}.png"], ["overwrite --image in/"]),
        (["--image", "in/a.png", "in/a_1_2.png", "--output={name}.png"], ["a_1_2.png"]),
        (["--image=in", "--output=o/", "--guide=nosuch.png"], ["--guide nosuch.png"]),
        (
            ["--image=in", "--output=o/", "--layer=pool1/norm1:99"],
            ["pool1/norm1:99", "12 channels"],
        ),
        (["--image=in", "--output=o/", "--layer=classifier:hen"], ["--layer classifier:hen"]),
        (["--image=in", "--output=o/", "--stats=s.csv"], ["--stats s.csv", "{name}"]),
        (["--image", "in", "nosuch.png", "--output=o/"], ["--image nosuch.png"]),
        (["--image=in", "--layer=nix", "--output=o/"], ["--layer nix"]),
        (["--image=empty", "--output=o/"], ["--image empty", "no pictures"]),
        (["--image=in", "--output={name}.xyz"], ["--output a.xyz", "extension"]),
        (["--image=in", "--output={name}.jpg", "--depth=16"], ["--depth 16", "a.jpg"]),
        (["--image=in", "--output=in/readme.txt/"], ["--output", "cannot be created"]),
    ],
)
def test_a_batch_that_cannot_be_is_refused(arguments, words, folder):
    """Before any work: nothing is written, not even a folder."""
    (folder / "empty").mkdir()
    CARD.save(folder / "in/a_1_2.png") if "in/a_1_2.png" in arguments else None
    assert_one_line(run_cli(*DREAM, LAYERS[0], *arguments, cwd=folder), 2, *words)
    assert sorted(os.listdir(folder)) == ["empty", "in"]


@pytest.mark.parametrize("option", ["layer", "image"])
def test_two_values_are_not_one_picture(option, folder):
    """None is dropped without a word. The same value twice is one."""
    first, second = {"layer": LAYERS, "image": ["--image=in/b.png", "--image=in/a.png"]}[option]
    words = [*DREAM, LAYERS[0], "--image=in/b.png"]
    done = run_cli(*words, *second.split("=", 1), cwd=folder)
    assert_one_line(done, 2, "--output out.png", "2 pictures", "FOLDER/")
    done = run_cli(*words, *first.split("=", 1), cwd=folder)
    assert done.returncode == 0, done.stderr
    assert np.array_equal(pixels(folder / "out.png"), alone(folder, "--image=in/b.png", LAYERS[0]))


def stop_in_the_first(words, folder, name):
    """Runs the program until there is a new checkpoint of the picture out/NAME, and stops it."""
    path = folder / f"out/{name}.checkpoint"
    before = path.stat().st_mtime_ns if path.exists() else 0
    running = start(*words, cwd=folder)
    wait_for(lambda: path.exists() and path.stat().st_mtime_ns > before, 60)
    running.send_signal(signal.SIGINT)
    said = running.communicate(timeout=60)[1]
    assert running.returncode == 130, said


@pytest.mark.parametrize("ending", ["png", "jpg", "tif"])
def test_one_that_is_stopped_twice_is_continued_in_every_format(ending, folder):
    """It keeps the channels that `strong2` selected; an unfinished picture is not taken for a
    finished one."""
    words = [*DREAM, "--image=in/a.png", "--layer=pool1/norm1:strong2", "--num_steps=40"]
    words.append("--initial_size=x0.5")
    whole = [*words, f"--output=whole/{{name}}.{ending}"]
    assert run_cli(*whole, cwd=folder).returncode == 0
    words += ["--checkpoint_iter=1", f"--output=out/{{name}}.{ending}"]
    for _ in range(2):
        stop_in_the_first(words, folder, f"a.{ending}")
    done = run_cli(*words, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "was kept" not in done.stderr
    expected = pixels(folder / f"whole/a.{ending}")
    assert np.array_equal(pixels(folder / f"out/a.{ending}"), expected)
    assert "1 of 1 pictures are there" in run_cli(*words, cwd=folder).stderr


def test_another_photograph_of_the_same_name_is_made(folder):
    words = [*DREAM, LAYERS[0], "--output=out/"]
    assert run_cli(*words, "--image=in/a.png", cwd=folder).returncode == 0
    (folder / "other").mkdir()
    CARD.rotate(180).save(folder / "other/a.png")
    done = run_cli(*words, "--image=other/a.png", cwd=folder)
    assert done.returncode == 0, done.stderr
    expected = alone(folder, "--image=other/a.png", LAYERS[0])
    assert np.array_equal(pixels(folder / "out/a_inception_a-output.png"), expected)
    os.rename(folder / "other/a.png", folder / "a.png")
    assert "1 of 1 pictures are there" in run_cli(*words, "--image=a.png", cwd=folder).stderr


def test_a_checkpoint_that_does_not_fit_is_set_aside(folder):
    words = [*DREAM, LAYERS[0], "--image=in/a.png", "--num_steps=100", "--checkpoint_iter=1"]
    stop_in_the_first([*words, "--output=out/{name}.png"], folder, "a.png")
    path = folder / "out/a.png.checkpoint"
    with np.load(path) as file:
        arrays = dict(file)
    del arrays["picture"]
    with open(path, "wb") as file:
        np.savez(file, **arrays)
    done = run_cli(*words, "--output=out/{name}.png", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "was kept" in done.stderr
    expected = alone(folder, LAYERS[0], "--image=in/a.png", "--num_steps=100")
    assert np.array_equal(pixels(folder / "out/a.png"), expected)


def test_a_sidecar_of_an_earlier_picture_does_not_stay(folder):
    words = [*DREAM, LAYERS[0], "--image=in/a.png", "--output=a.jpg"]
    run_cli(*words, "--sidecar", cwd=folder)
    assert (folder / "a.jpg.json").exists()
    run_cli(*words, "--num_steps=1", cwd=folder)
    assert not (folder / "a.jpg.json").exists()
    (folder / "a.jpg.json").write_text('{"my": "own"}')
    run_cli(*words, cwd=folder)
    assert (folder / "a.jpg.json").exists()


def test_a_resumed_run_makes_one_picture(folder):
    words = [*DREAM, LAYERS[0], "--image=in/a.png", "--num_steps=100", "--checkpoint_iter=1"]
    stop_in_the_first([*words, "--output=out/{name}.png"], folder, "a.png")
    done = run_cli("--resume=out/a.png.checkpoint", "--output=b/", cwd=folder)
    assert_one_line(done, 2, "--output b/", "one picture")


def test_another_network_makes_all_again(folder):
    words = [*DREAM, LAYERS[0], "--image=in", "--output=out/"]
    assert run_cli(*words, cwd=folder).returncode == 0
    np.save(folder / "mean.npy", np.full((3, 4, 4), 90.0))
    words += ["--mean_image=mean.npy"]
    done = run_cli(*words, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "already" not in done.stderr
    expected = alone(folder, LAYERS[0], "--image=in/b.png", "--mean_image=mean.npy")
    assert np.array_equal(pixels(folder / "out/b_inception_a-output.png"), expected)
    assert "2 of 2 pictures are there" in run_cli(*words, cwd=folder).stderr


def test_noise_without_a_seed_goes_on_as_it_began(folder):
    words = [*DREAM, LAYERS[0], "--initial_size=60x60", "--num_steps=100", "--checkpoint_iter=1"]
    words += ["--output=out/{name}.png"]
    stop_in_the_first(words, folder, "noise.png")
    done = run_cli(*words, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "was kept" not in done.stderr
    command = Image.open(folder / "out/noise.png").info["Comment"]
    seed = command.partition("--seed=")[2].split()[0]
    more = ["--initial_size=60x60", "--num_steps=100", f"--seed={seed}"]
    expected = alone(folder, LAYERS[0], *more)
    assert np.array_equal(pixels(folder / "out/noise.png"), expected)


@pytest.mark.parametrize("output", ["new/", "new/{name}_{layer}.png"])
def test_names_that_differ_only_in_their_ending(output, folder):
    """As in a camera's folder: the ending joins the names, but only where that is needed."""
    CARD.save(folder / "in/a.JPG")
    CARD.save(folder / "in/b.tif.png")
    done = run_cli(*DREAM, "--image=in", LAYERS[0], f"--output={output}", cwd=folder)
    assert done.returncode == 0, done.stderr
    stems = ["a_JPG", "a_png", "b.tif", "b"]
    assert sorted(os.listdir(folder / "new")) == [f"{s}_inception_a-output.png" for s in stems]
    assert (
        "4 of 4"
        in run_cli(*DREAM, "--image=in", LAYERS[0], f"--output={output}", cwd=folder).stderr
    )


def test_what_a_folder_holds_goes_by_content(folder):
    """A picture without an ending counts; what may be one, but cannot be read, is told."""
    shutil.copy(folder / "in/a.png", folder / "in/IMG_1")
    (folder / "in/notes").write_text("no picture")
    (folder / "in/new.jxl").write_bytes(b"\xff\x0a" + bytes(50))
    done = run_cli(*DREAM, "--image=in", LAYERS[0], "--output={name}.png", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "note: in: skipped new.jxl, notes: not a picture, or its reader" in done.stderr
    assert {"IMG_1.png", "a.png", "b.png"} <= set(os.listdir(folder))
    for name in ("a.png", "b.png", "IMG_1"):
        (folder / "in" / name).unlink()
    done = run_cli(*DREAM, "--image=in", LAYERS[0], "--output=new/", cwd=folder)
    assert_one_line(done, 2, "--image in", "no pictures in this folder, only new.jxl, notes")
