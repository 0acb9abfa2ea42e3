"""Nothing lost, nothing cryptic: killed workers, killed runs, signals, full disks, and files from strangers. README.md beside
this file has a table of what is tried and how often."""

import contextlib
import csv
import fcntl
import io
import itertools
import json
import os
import pathlib
import pty
import random
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
import zipfile

import numpy as np
import pytest
from conftest import GOLDEN, ROOT, TINY, assert_one_line, cnn_vis, psnr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, PngImagePlugin

import cnn_vis as program

# Two sizes, odd caches and schedules, statistics: a run in which everything that a checkpoint holds matters.
RUN = [*TINY, "--layer=inception_a/output", "--initialization_scale=20", "--seed=5", "--initial_size=40x50", "--final_size=64x96",
       "--num_sizes=2", "--num_steps=60", "--learning_rate_decay_iter=7", "--learning_rate_decay_fraction=0.9", "--tv_reg=0.01",
       "--tv_reg_step=0.01", "--tv_reg_step_iter=9", "--p_reg=1e-9", "--stats=stats.csv", "--iter_behavior=gif"]  # fmt: skip
CHECKPOINT = "out.png.checkpoint"


def start(*arguments, cwd):
    """The program as a running process, its own session leader, to which SIGHUP matters though these tests run under nohup."""
    return subprocess.Popen([sys.executable, str(ROOT / "cnn_vis.py"), *map(str, arguments)], cwd=cwd, stdin=subprocess.DEVNULL,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
                            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL))  # fmt: skip


def under_way(*arguments, cwd):
    """As start, once there is a checkpoint."""
    running = start(*arguments, cwd=cwd)
    wait_for((cwd / CHECKPOINT).exists)
    return running


def descendants(pid):
    """The pids of all processes below `pid`."""
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        children = list(map(int, file.read().split()))
    return children + [pid for child in children for pid in descendants(child)]


def workers(pid):
    """The pids of the worker processes of a run."""
    found = []
    for child in descendants(pid):
        with open(f"/proc/{child}/cmdline") as file:
            if "spawn_main" in file.read():
                found.append(child)
    return found


def session(sid):
    """The pids of the processes in a session that are not zombies."""
    found = []
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/stat") as file:
                state, _, _, its = file.read().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(its) == sid and state not in "ZX":
            found.append(int(pid))
    return found


def wait_for(condition, seconds=20):
    """Waits until condition() is true, and returns what it gave."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        time.sleep(0.01)
    raise AssertionError("waited in vain")


def shared_memory():
    return set(os.listdir("/dev/shm"))


def pixels(path):
    return np.asarray(Image.open(path))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of RUN left alone, and how long it took."""
    folder = tmp_path_factory.mktemp("whole")
    begun = time.monotonic()
    done = cnn_vis(*RUN, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(folder)) == ["out.png", "out_run.gif", "stats.csv"]
    return folder, time.monotonic() - begun


def assert_same_run(folder, whole):
    """Picture, statistics and animation are those of the run left alone, and no checkpoint is left."""
    assert np.array_equal(pixels(folder / "out.png"), pixels(whole / "out.png"))
    assert (folder / "stats.csv").read_text() == (whole / "stats.csv").read_text()
    assert (folder / "out_run.gif").read_bytes() == (whole / "out_run.gif").read_bytes()
    assert sorted(os.listdir(folder)) == ["out.png", "out_run.gif", "stats.csv"]


# ---- Killed, stopped, resumed --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(2))
def test_kill_and_resume_at_random_moments(seed, whole, tmp_path):
    """kill -9 eight times, anywhere from the start of Python to the last step, then left to end: bitwise the same picture."""
    folder, seconds = whole
    moments = random.Random(seed)
    before = shared_memory()
    for _ in range(8):
        resume = [f"--resume={CHECKPOINT}"] if (tmp_path / CHECKPOINT).exists() else RUN
        running = start(*resume, "--checkpoint_iter=3", cwd=tmp_path)
        time.sleep(moments.uniform(0.3, 1) * seconds)
        running.kill()
        running.communicate()
        wait_for(lambda running=running: not session(running.pid))
    resume = [f"--resume={CHECKPOINT}"] if (tmp_path / CHECKPOINT).exists() else RUN
    done = cnn_vis(*resume, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path, folder)
    wait_for(lambda: shared_memory() <= before)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_save_and_say_how_to_go_on(signum, whole, tmp_path):
    before = shared_memory()
    running = under_way(*RUN, "--checkpoint_iter=5", "--quiet", cwd=tmp_path)
    running.send_signal(signum)
    _, said = running.communicate(timeout=20)
    assert running.returncode == 128 + signum
    (line,) = said.splitlines()
    assert "out.png" in line
    Image.open(tmp_path / "out.png").verify()
    wait_for(lambda: not session(running.pid))
    wait_for(lambda: shared_memory() <= before)
    command = shlex.split(line.partition("go on with: ")[2])
    assert command[:2] == ["python", "cnn_vis.py"]
    assert cnn_vis(*command[2:], cwd=tmp_path).returncode == 0
    assert_same_run(tmp_path, whole[0])


def test_ctrl_c_from_a_terminal(tmp_path):
    """A terminal sends Ctrl-C to workers too, at any moment: no traceback from any process."""
    for moment in (0.05, 0.2, 0.4, 0.6, 0.8, 1.2):
        running = start(*RUN, "--num_steps=100000", cwd=tmp_path)
        time.sleep(moment)
        os.killpg(running.pid, signal.SIGINT)
        out, said = running.communicate(timeout=20)
        if running.returncode == 130:
            assert "Traceback" not in said, said
            assert "stopped" in said
        else:  # Python itself was still starting
            assert ", in main\n" not in said, said
        wait_for(lambda running=running: not session(running.pid))


@pytest.mark.parametrize("signum", [signal.SIGHUP, signal.SIGTERM])
def test_signals_to_all_processes(signum, whole, tmp_path):
    """As the loss of a terminal sends them, and a cluster's scheduler: one line, and the run can go on."""
    running = under_way(*RUN, "--checkpoint_iter=5", "--quiet", cwd=tmp_path)
    os.killpg(running.pid, signum)
    _, said = running.communicate(timeout=20)
    assert running.returncode == 128 + signum, said
    (line,) = said.splitlines()
    assert "out.png" in line
    wait_for(lambda: not session(running.pid))
    assert cnn_vis(f"--resume={CHECKPOINT}", cwd=tmp_path).returncode == 0
    assert_same_run(tmp_path, whole[0])


def test_a_second_ctrl_c_ends_at_once(tmp_path):
    """While a step goes on that takes long, here because the workers are held up."""
    running = under_way(*RUN, "--num_steps=100000", "--checkpoint_iter=1", cwd=tmp_path)
    held = workers(running.pid)
    for pid in held:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(0.3)
    running.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert running.poll() is None
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=5)
    assert running.returncode == 130
    assert f"--resume {CHECKPOINT}" in said.splitlines()[-1]
    wait_for(lambda: not session(running.pid))
    assert (tmp_path / CHECKPOINT).exists()


def test_killed_workers_are_replaced(whole, tmp_path):
    """Up to three times, with the same picture in the end."""
    running = under_way(*RUN, "--checkpoint_iter=1", cwd=tmp_path)
    killed = 0
    while killed < 3 and running.poll() is None:
        for pid in workers(running.pid)[:1]:
            os.kill(pid, signal.SIGKILL)
            killed += 1
        time.sleep(0.4)
    assert killed
    _, said = running.communicate(timeout=60)
    assert running.returncode == 0, said
    assert_same_run(tmp_path, whole[0])


def test_workers_killed_too_often(tmp_path):
    running = under_way(*RUN, "--num_steps=100000", "--checkpoint_iter=1", "--quiet", cwd=tmp_path)
    while running.poll() is None:
        for pid in workers(running.pid):
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.2)
    _, said = running.communicate()
    assert running.returncode == 1
    (line,) = said.splitlines()
    assert "killed 4 times" in line
    assert f"--resume {CHECKPOINT}" in line
    Image.open(tmp_path / "out.png").verify()
    wait_for(lambda: not session(running.pid))


def test_kill_of_the_whole_group_leaves_nothing(tmp_path):
    """As a cluster ends a job: nobody is left to tidy up, and there is nothing large to tidy."""
    running = under_way(*RUN, "--num_steps=100000", "--checkpoint_iter=1", cwd=tmp_path)
    before = {name for name in shared_memory() if not name.startswith("sem.")}
    os.killpg(running.pid, signal.SIGKILL)
    running.communicate()
    wait_for(lambda: not session(running.pid))
    assert {name for name in shared_memory() if not name.startswith("sem.")} <= before


def test_resume_refuses_what_changes_the_picture(tmp_path):
    running = under_way(*RUN, "--num_steps=100000", "--checkpoint_iter=1", cwd=tmp_path)
    running.send_signal(signal.SIGTERM)
    running.communicate(timeout=20)
    for option in ("--tv_reg=3", "--num_steps=7", "--seed=6", "--layer=pool1", "--image=in.png", "--use_pixel_learning_rates"):
        name = option.partition("=")[0]
        done = cnn_vis(f"--resume={CHECKPOINT}", option, cwd=tmp_path)
        assert_one_line(done, 2, "target_layer" if name == "--layer" else name.replace("--image", "--initial_image"), CHECKPOINT)
    other = tmp_path / "other.caffemodel"
    other.write_bytes((GOLDEN / "tiny_inception.caffemodel").read_bytes() + b"\x0a\x01x")
    assert_one_line(
        cnn_vis(f"--resume={CHECKPOINT}", "--caffe_model=other.caffemodel", cwd=tmp_path), 2, "--caffe_model", "sha256"
    )
    assert (tmp_path / CHECKPOINT).exists()


def test_a_new_run_keeps_the_checkpoint_of_an_unfinished_one(tmp_path):
    (tmp_path / CHECKPOINT).write_bytes(b"hours of work")
    done = cnn_vis(*RUN, "--num_steps=1", "--num_sizes=1", cwd=tmp_path)
    assert done.returncode == 0
    assert f"{CHECKPOINT}.old1" in done.stderr
    (tmp_path / CHECKPOINT).write_bytes(b"more work")
    assert cnn_vis(*RUN, "--num_steps=1", "--num_sizes=1", cwd=tmp_path).returncode == 0
    assert (tmp_path / f"{CHECKPOINT}.old1").read_bytes() == b"hours of work"
    assert (tmp_path / f"{CHECKPOINT}.old2").read_bytes() == b"more work"


def test_checkpoints_count_the_steps_of_all_sizes(tmp_path):
    running = start(*TINY, "--layer=inception_a/output", f"--image={GOLDEN}/input.png", "--num_sizes=500", "--num_steps=2",
                    "--final_size=x2", "--checkpoint_iter=5", cwd=tmp_path)  # fmt: skip
    wait_for((tmp_path / CHECKPOINT).exists)
    running.kill()
    running.communicate()
    numbers = program.read_checkpoint(str(tmp_path / CHECKPOINT))[0]["numbers"]
    assert (numbers["size_index"] * 2 + numbers["step"]) % 5 == 0


def test_one_run_at_a_time_writes_an_output(tmp_path):
    running = under_way(*RUN, "--num_steps=100000", "--checkpoint_iter=1", cwd=tmp_path)
    assert_one_line(cnn_vis(*RUN, "--quiet", cwd=tmp_path), 2, "--output", "out.png", "another run")
    others = (["--output=out.jpg"], ["--output=x.png"], ["--output=y.png", "--stats=stats.csv", "--iter_behavior=none"])
    for (other, *more), taken in zip(others, ("out_run.gif", "stats.csv", "stats.csv")):
        assert_one_line(cnn_vis(*RUN, other, *more, cwd=tmp_path), 2, "another run", taken)
    assert_one_line(
        cnn_vis(f"--resume={CHECKPOINT}", "--output=z.png", "--stats=z.csv", cwd=tmp_path), 2, "another run", "out.png"
    )
    running.send_signal(signal.SIGTERM)
    _, said = running.communicate(timeout=20)
    assert "--resume" in said
    assert sorted(os.listdir(tmp_path)) == ["out.png", CHECKPOINT, "out_run.gif", "stats.csv"]


def test_pixels_are_plotted_from_the_first_step_on(tmp_path):
    """Also after --resume."""
    running = under_way(*RUN, "--num_steps=2000", "--iter_behavior=plot_pix", "--checkpoint_iter=3", cwd=tmp_path)
    running.send_signal(signal.SIGTERM)
    running.communicate(timeout=20)
    header, arrays = program.read_checkpoint(str(tmp_path / CHECKPOINT))
    assert "pixels" in arrays
    history = program.PlotPix([(1, 100, 100, 5, 6, 7)])
    image = np.zeros((1, 3, 120, 120))
    history.record(program.Progress([(120, 120)] * 2, 1, 0, 10, image, 0, None))
    assert history.history == [(1, 100, 100, 5, 6, 7), (11, 100, 100, 0, 0, 0)]


def test_overflow_is_not_finite(tmp_path):
    """In the running square first, where it would stop the picture's pixels and say nothing."""
    done = cnn_vis(*TINY, "--layer=inception_a/output", "--initialization_scale=30", "--seed=1", "--alpha=140", "--p_reg=1",
                   "--num_steps=9", "--quiet", cwd=tmp_path)  # fmt: skip
    assert_one_line(done, 1, "no longer finite", "--alpha", "out.png")


def test_not_finite(tmp_path):
    """The run stops, names the options, and keeps the last good picture."""
    done = cnn_vis(*TINY, "--layer=inception_a/output", f"--image={GOLDEN}/input.png", "--p_reg=1e308", "--alpha=12",
                   "--num_steps=9", "--learning_rate=1e30", "--quiet", cwd=tmp_path)  # fmt: skip
    assert_one_line(done, 1, "no longer finite", "--learning_rate", "--p_reg", "out.png")
    Image.open(tmp_path / "out.png").verify()


# ---- Places that cannot be written to ------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 KB."""
    folder = tmp_path / "small"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here (that takes root)")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_disk_full(small_disk, tmp_path):
    """One clear line, and the good file that was there stays."""
    shutil.copy(GOLDEN / "input.png", small_disk / "out.png")
    good = (small_disk / "out.png").read_bytes()
    (small_disk / "filler").write_bytes(bytes(64 * 1024 - len(good) - 8192))
    done = cnn_vis(*RUN, "--num_steps=3", "--stats=/dev/full/no", f"--output={small_disk}/out.png", cwd=tmp_path)
    assert_one_line(done, 2, "--stats")
    done = cnn_vis(*TINY, "--layer=inception_a/output", "--initial_size=300x300", "--initialization_scale=60", "--num_steps=2",
                   "--tv_reg=0", "--quiet", f"--output={small_disk}/out.png", cwd=tmp_path, TMPDIR=str(tmp_path))  # fmt: skip
    assert_one_line(done, 1, "--output", "No space left", "unchanged")
    assert (small_disk / "out.png").read_bytes() == good
    assert sorted(os.listdir(small_disk)) == ["filler", "out.png"]
    command = shlex.split(done.stderr.partition("go on with: ")[2])  # the checkpoint is among the temporary files
    assert cnn_vis(*command[2:], cwd=tmp_path).returncode == 0
    assert Image.open(tmp_path / "ANOTHER.png").size == (300, 300)


def test_disk_full_on_the_way(small_disk, tmp_path):
    """What is saved on the way and cannot be is told; the run goes on, and ends well where there is room again."""
    (small_disk / "filler").write_bytes(bytes(50 * 1024))
    running = start(*TINY, "--layer=inception_a/output", "--initial_size=90x90", "--initialization_scale=60", "--num_steps=400",
                    "--tv_reg=0", "--quiet", "--output_iter=1", "--iter_behavior=save", "--checkpoint_iter=0",
                    f"--output={small_disk}/out.png", cwd=tmp_path)  # fmt: skip
    assert "No space left" in running.stderr.readline()
    os.remove(small_disk / "filler")
    for path in small_disk.glob("out_*"):
        path.unlink()
    while running.poll() is None:
        for path in small_disk.glob("out_*.png"):
            path.unlink(missing_ok=True)
        time.sleep(0.01)
    running.communicate()
    assert running.returncode == 0
    Image.open(small_disk / "out.png").verify()


@pytest.mark.parametrize("extension", ["png", "jpg", "jpeg", "webp", "tif", "tiff"])
def test_formats(extension, tmp_path):
    """The format is the extension's, tagged as sRGB."""
    name = f"out.{extension}"
    done = cnn_vis(
        *TINY, "--layer=inception_a/output", f"--image={GOLDEN}/input.png", "--num_steps=1", f"--output={name}", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / name) as picture:
        assert program.FORMATS[f".{extension}"][0] == picture.format
        assert "sRGB" in ImageCms.getProfileDescription(ImageCms.ImageCmsProfile(io.BytesIO(picture.info["icc_profile"])))
        picture.load()


@pytest.mark.parametrize(("extension", "side"), [("jpg", 65501), ("webp", 16384)])
def test_sides_that_a_format_does_not_hold(extension, side, tmp_path):
    """Told before work begins; one pixel less is written."""
    options = [*TINY, "--layer=inception_a/output", f"--output=out.{extension}"]
    done = cnn_vis(*options, f"--initial_size=32x{side}", cwd=tmp_path)
    assert_one_line(done, 2, "--output", str(side - 1), ".png")
    path = tmp_path / f"long.{extension}"
    program.write_picture(np.zeros((2, side - 1, 3), np.uint8), str(path))
    assert Image.open(path).width == side - 1


# ---- How a picture was made ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extension", ["png", "jpg"])
def test_reproduce(extension, tmp_path):
    """The command that --reproduce prints makes the same picture again; noise without --seed is no exception."""
    folder = tmp_path / "a folder"
    folder.mkdir()
    done = cnn_vis(*TINY, "--layer=inception_a/output", "--initialization_scale=30", "--num_steps=3", "--batch_size=2",
                   "--sidecar", f"--output=an out.{extension}", "--iter_behavior=none", cwd=folder)  # fmt: skip
    assert done.returncode == 0, done.stderr
    origin = json.loads((folder / f"an out.{extension}.json").read_text())
    assert origin["seed"] is not None
    assert len(origin["weights_sha256"]) == 64
    assert origin["sizes"] == [[32, 32]]
    assert origin["versions"]["numpy"] == np.__version__
    if extension == "png":
        os.remove(folder / "an out.png.json")
        assert json.loads(Image.open(folder / "an out.png").info["cnn-vis"]) == origin
    done = cnn_vis(f"--reproduce=an out.{extension}", cwd=folder)
    assert done.returncode == 0, done.stderr
    command = shlex.split(done.stdout)
    first = pixels(folder / f"an out.{extension}")
    os.remove(folder / f"an out.{extension}")
    assert cnn_vis(*command[2:], cwd=folder).returncode == 0
    assert np.array_equal(pixels(folder / f"an out.{extension}"), first)


def test_reproduce_of_a_stranger_s_picture(tmp_path):
    """What a terminal would obey comes out as escapes, which a shell reads as what they were."""
    name = "a \x1b]0;title\x07 'quoted' \\ name.png"
    origin = {"command": shlex.join(["python", "cnn_vis.py", f"--output_file={name}"]), "program": "\x1b[2J", "network": "n"}
    for command, expected in ((origin["command"], 0), ("python 'unfinished", 2), (7, 2)):
        text = PngImagePlugin.PngInfo()
        text.add_itxt("cnn-vis", json.dumps(origin | {"command": command, "weights_sha256": "0"}))
        CARD.save(tmp_path / "stranger.png", pnginfo=text)
        done = cnn_vis("--reproduce=stranger.png", cwd=tmp_path)
        assert done.returncode == expected
        assert (done.stdout + done.stderr).replace("\n", "").isprintable()
        if expected:
            assert_one_line(done, 2, "--reproduce", "stranger.png")
        else:
            words = subprocess.check_output(["bash", "-c", f"printf '%s\\0' {done.stdout}"], text=True)
            assert words.split("\0")[:-1] == ["python", "cnn_vis.py", f"--output_file={name}"]


def test_reproduce_of_other_files(tmp_path):
    CARD.save(tmp_path / "photo.jpg")
    for name in ("none.png", GOLDEN / "input.png", GOLDEN / "cases.json", ".", "photo.jpg"):
        done = cnn_vis(f"--reproduce={name}", cwd=tmp_path)
        words = {"none.png": "no such file;", ".": "is a folder"}.get(name, "holds no word")
        assert_one_line(done, 2, f"--reproduce {name}:", words)
    os.mkfifo(tmp_path / "fifo.png")
    assert_one_line(cnn_vis("--reproduce=fifo.png", cwd=tmp_path), 2, "--reproduce", "no ordinary file")


# ---- Pictures as people have them ----------------------------------------------------------------------------------------

CARD = Image.fromarray(np.random.RandomState(3).randint(0, 256, (40, 50, 3), np.uint8)).resize((200, 160))


def encoded(picture, form, **options):
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


def read(data, tmp_path, name="in.png", background="white"):
    (tmp_path / name).write_bytes(data)
    return program.read_picture(str(tmp_path / name), background)


def test_transparent_on_a_background(tmp_path):
    picture = CARD.convert("RGBA")
    picture.putalpha(Image.fromarray(np.repeat(np.uint8([0, 255]), 100)[None].repeat(160, 0)))
    for mode in ("RGBA", "PA"):
        data = encoded(picture if mode == "RGBA" else picture.quantize(256), "PNG")
        seen, _ = read(data, tmp_path, background="#ff8000")
        assert (seen[:, :100] == (255, 128, 0)).all()
        assert np.abs(seen[:, 100:].astype(int) - np.asarray(CARD)[:, 100:]).mean() < (1 if mode == "RGBA" else 20)
    grey = CARD.convert("L").convert("LA")
    grey.putalpha(0)
    assert (read(encoded(grey, "PNG"), tmp_path, background="black")[0] == 0).all()


def test_sixteen_bits(tmp_path):
    ramp = np.arange(160 * 200, dtype=np.uint16).reshape(160, 200) * 2
    for form, name in (("PNG", "in.png"), ("TIFF", "in.tif")):
        seen, _ = read(encoded(Image.fromarray(ramp), form), tmp_path, name)
        assert np.abs(seen[:, :, 1] - ramp / 257).max() <= 0.5
    dark = np.full((40, 40), 200, np.uint16)  # nearly black, and not to be stretched
    assert (read(encoded(Image.fromarray(dark), "PNG"), tmp_path)[0] == 1).all()
    for scale in (1.0, 255.0, 3000.0):
        fractions = np.linspace(0, scale, 160 * 200, dtype=np.float32).reshape(160, 200)
        seen, _ = read(encoded(Image.fromarray(fractions), "TIFF"), tmp_path, "in.tif")
        assert seen.min() == 0
        assert seen.max() == (255 if scale != 3000 else 12)
    assert read(encoded(Image.fromarray(np.full((9, 9), np.nan, np.float32)), "TIFF"), tmp_path, "in.tif")[0].max() == 0


def test_colour_profiles(tmp_path):
    """A profile is heeded: the values of a profile other than sRGB change, those of sRGB don't. A broken one is told."""
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert np.array_equal(read(encoded(CARD, "PNG", icc_profile=srgb), tmp_path)[0], np.asarray(CARD))
    for profile in (b"nonsense" * 40, lab):
        seen, remarks = read(encoded(CARD, "PNG", icc_profile=profile), tmp_path)
        assert np.array_equal(seen, np.asarray(CARD))
        assert "profile" in remarks[0]


def test_frames(tmp_path):
    """Of animations the first frame, and said so."""
    others = [CARD.rotate(90), CARD.rotate(180)]
    for form in ("GIF", "WEBP", "PNG"):
        data = encoded(CARD, form, save_all=True, append_images=others)
        seen, remarks = read(data, tmp_path, f"in.{form.lower()}")
        assert "first of 3 frames" in remarks[0]
        assert np.abs(seen.astype(int) - np.asarray(CARD)).mean() < 20


def test_very_wide(tmp_path):
    """30,000 pixels wide and read; the size that can be worked on is another question, answered before memory is asked for."""
    seen, _ = read(encoded(Image.new("RGB", (30000, 40)), "PNG"), tmp_path)
    assert seen.shape == (40, 30000, 3)
    done = cnn_vis(*TINY, "--image=in.png", "--layer=inception_a/output", "--initial_size=30000x300000", cwd=tmp_path)
    assert_one_line(done, 2, "--initial_size", "30000x300000", "GB")


def bomb(width, height):
    """A PNG of few bytes that claims to be of many pixels."""
    data = bytearray(encoded(Image.new("L", (1, 1)), "PNG"))
    data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    import zlib

    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


BROKEN = {
    "empty.png": b"",
    "text.jpg": b"not a picture at all",
    "truncated.png": encoded(CARD, "PNG")[:2000],
    "truncated.jpg": encoded(CARD, "JPEG")[:2000],
    "truncated.webp": encoded(CARD, "WEBP")[:500],
    "header.png": encoded(CARD, "PNG")[:8],
    "bomb.png": bomb(60000, 60000),
    "bomb2.png": bomb(2**31 - 1, 2**31 - 1),
    "large.png": bomb(14000, 14000),
    "photo.heic": b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic" + bytes(100),
    "page.svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "archive.gif": b"GIF89a" + bytes(20),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_pictures(name, tmp_path):
    (tmp_path / name).write_bytes(BROKEN[name])
    done = cnn_vis(*TINY, f"--image={name}", cwd=tmp_path)
    assert_one_line(done, 2, "--image", name, "JPEG" if name.endswith("heic") else "; ")
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"])
def test_fuzzed_pictures(form, tmp_path):
    """Random bytes changed: read, or refused in one line."""
    data, randomly = encoded(CARD, form), random.Random(form)
    for _ in range(150):
        try:
            seen, _ = read(mutated(data, randomly), tmp_path)
            assert seen.dtype == np.uint8
            assert seen.shape[2] == 3
        except program.BadRequest as error:
            assert len(str(error).splitlines()) == 1


# ---- Files from strangers ------------------------------------------------------------------------------------------------


def mutated(data, randomly):
    """The bytes with a few changed, cut out or put in twice."""
    data = bytearray(data)
    for _ in range(randomly.choice((1, 1, 2, 8))):
        place, length = randomly.randrange(len(data)), randomly.choice((1, 1, 4, 40))
        kind = randomly.randrange(4)
        if kind < 2:
            data[place : place + length] = randomly.randbytes(min(length, len(data) - place))
        elif kind == 2 and len(data) > length + 1:
            del data[place : place + length]
        else:
            data[place:place] = data[place : place + length]
    return bytes(data)


@pytest.mark.parametrize("kind", ["deploy", "weights"])
def test_fuzzed_networks(kind, tmp_path, monkeypatch):
    """Two hundred broken prototxts and caffemodels each: loaded and tried, or refused in one line."""
    monkeypatch.setattr(program.Workers, "MAX_RESTARTS", 10**6)
    files = {"deploy": GOLDEN / "deploy.prototxt", "weights": GOLDEN / "tiny_inception.caffemodel"}
    data, randomly, outcomes = files[kind].read_bytes(), random.Random(kind), []
    with program.Workers() as workers:
        for number in range(200):
            path = tmp_path / str(number)
            path.write_bytes(mutated(data, randomly))
            given = {name: str(path if name == kind else file) for name, file in files.items()}
            fit = bool(number % 2)
            spec = program.NetworkSpec(**given, target="inception_a/output", objective=program.Objective(), fit_classifier=fit)
            try:
                workers.call(program.describe, spec)
                outcomes.append("loaded")
            except (program.BadRequest, program.RunFailed) as error:
                assert len(str(error).splitlines()) == 1, error
                outcomes.append(type(error).__name__)
            if outcomes[-1] == "RunFailed":
                workers._executor.shutdown()
                workers._start()
    assert len(set(outcomes)) >= 2, outcomes


def test_a_network_that_asks_for_all_memory(tmp_path):
    text = (GOLDEN / "deploy.prototxt").read_text().replace("num_output: 12", "num_output: 2000000000", 1)
    (tmp_path / "huge.prototxt").write_text(text)
    done = cnn_vis(*TINY, "--deploy_txt=huge.prototxt", "--layer=inception_a/output", f"--image={GOLDEN}/input.png", cwd=tmp_path)
    assert_one_line(done, 1, "Caffe stopped")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The bytes of a checkpoint."""
    folder = tmp_path_factory.mktemp("checkpoint")
    running = under_way(*RUN, "--num_steps=100000", "--checkpoint_iter=1", cwd=folder)
    running.send_signal(signal.SIGTERM)
    running.communicate(timeout=20)
    return (folder / CHECKPOINT).read_bytes()


def test_fuzzed_checkpoints(checkpoint, tmp_path):
    """Changed anywhere, a checkpoint is refused; where the change does not matter to anyone, it is read as it was."""
    path, randomly = tmp_path / CHECKPOINT, random.Random(8)
    path.write_bytes(checkpoint)
    header, arrays = program.read_checkpoint(str(path))
    refused = 0
    for _ in range(500):
        path.write_bytes(mutated(checkpoint, randomly))
        try:
            same_header, same_arrays = program.read_checkpoint(str(path))
        except program.BadRequest as error:
            assert len(str(error).splitlines()) == 1
            refused += 1
            continue
        assert same_header == header
        for name, array in same_arrays.items():
            np.testing.assert_array_equal(array, arrays[name])
    assert refused > 400


def forged(checkpoint, change):
    """A sound archive with something else in it: change(header, arrays) edits them."""
    with zipfile.ZipFile(io.BytesIO(checkpoint)) as file:
        arrays = {name[:-4]: np.load(io.BytesIO(file.read(name))) for name in file.namelist()}
    header = json.loads(arrays.pop("header").tobytes())
    change(header, arrays)
    buffer = io.BytesIO()
    np.savez(buffer, header=np.frombuffer(json.dumps(header).encode(), np.uint8), **arrays)
    return buffer.getvalue()


FORGERIES = {
    "no header fields": lambda header, arrays: header.clear(),
    "command is a number": lambda header, arrays: header.update(command=3),
    "command holds numbers": lambda header, arrays: header.update(command=[3]),
    "a number in the command": lambda header, arrays: header.update(command=["--seed", 5, "--nonsense"]),
    "help": lambda header, arrays: header.update(command=["--help"]),
    "bad option": lambda header, arrays: header.update(command=["--nonsense"]),
    "step too large": lambda header, arrays: header["numbers"].update(step=10**9),
    "step is text": lambda header, arrays: header["numbers"].update(step="3"),
    "step is a fraction": lambda header, arrays: header["numbers"].update(step=1.5),
    "size index": lambda header, arrays: header["numbers"].update(size_index=-1),
    "seconds is text": lambda header, arrays: header.update(seconds="long"),
    "learning rate": lambda header, arrays: header["numbers"].update(learning_rate="fast"),
    "image too small": lambda header, arrays: arrays.update(image=arrays["image"][:, :, 1:]),
    "image of whole numbers": lambda header, arrays: arrays.update(image=arrays["image"].astype(int)),
    "image not finite": lambda header, arrays: arrays.update(image=arrays["image"] * np.nan),
    "no caches": lambda header, arrays: arrays.pop("caches"),
    "rows": lambda header, arrays: arrays.update(rows=np.zeros(3)),
    "picture": lambda header, arrays: arrays.update(picture=np.zeros(3)),
    "frames": lambda header, arrays: arrays.update(frames=np.zeros(3)),
}


@pytest.mark.parametrize("change", FORGERIES)
def test_forged_checkpoints(change, checkpoint, tmp_path):
    (tmp_path / CHECKPOINT).write_bytes(forged(checkpoint, FORGERIES[change]))
    done = cnn_vis(f"--resume={CHECKPOINT}", "--quiet", cwd=tmp_path)
    assert_one_line(done, 2, "--resume", CHECKPOINT)


def test_checkpoints_hold_no_pickles(checkpoint, tmp_path):
    def change(header, arrays):
        arrays["image"] = np.array([print], dtype=object)

    (tmp_path / CHECKPOINT).write_bytes(forged(checkpoint, change))
    assert_one_line(cnn_vis(f"--resume={CHECKPOINT}", cwd=tmp_path), 2, "--resume", "pickle")


# ---- Whatever one types --------------------------------------------------------------------------------------------------

VALUE_OPTIONS = [
    action.option_strings[0]
    for action in program.build_parser()._actions
    if action.nargs is None and action.dest not in ("download_model", "model_url", "resume", "reproduce", "output_file", "stats")
]
VALUES = st.one_of(
    st.text(max_size=12), st.integers(-(10**20), 10**20).map(str), st.floats().map(str),
    st.sampled_from(["0", "-1", "1e999", "0x0", "x0", "x-1", "axb", "1x", "x", "nan", "5x5x5", "", " ", "--", "é", "1_0",
                     "x1e300", "99999999999x1", "0,1", "save+none", "x\x00y", "amplify_neuron", "inception_a/output"]),
)  # fmt: skip


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=st.lists(st.tuples(st.sampled_from(VALUE_OPTIONS), VALUES), min_size=1, max_size=4))
def test_any_values(values, capsys, monkeypatch, tmp_path_factory):
    """Whatever the values, a request that cannot be met is one line and exit status 2, without a traceback. Workers are left
    out here: what one reaches them with counts as good."""

    def refuse(*_, **__):
        raise program.RunFailed("as far as this test goes")

    monkeypatch.setattr(program, "Workers", refuse)
    monkeypatch.chdir(tmp_path_factory.getbasetemp())
    status = program.main([*TINY, f"--image={GOLDEN}/input.png", "--quiet", *(f"{name}={value}" for name, value in values)])
    said = capsys.readouterr().err
    assert status in (1, 2), said
    assert len(said.splitlines()) == 1, said
    assert "Traceback" not in said


@pytest.mark.parametrize("value", ["0x0", "x-1", "axb", "31x31", "x1e300", "x0.0001", "99999999x99999999", "1x", "xnan", "xinf"])
def test_sizes(value, tmp_path):
    for name in ("initial_size", "final_size"):
        options = ["--num_sizes=2", f"--{name}={value}", f"--image={GOLDEN}/input.png", "--layer=inception_a/output"]
        assert_one_line(cnn_vis(*TINY, *options, cwd=tmp_path), 2, f"--{name}", value)


def test_options_without_effect_are_told(tmp_path):
    """Told, and the picture is made."""
    done = cnn_vis(*TINY, "--layer=inception_a/output", f"--image={GOLDEN}/input.png", "--final_size=x2", "--target_neuron=3",
                   "--seed=4", "--p_reg=0", "--alpha=3", "--num_steps=1", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0
    for name in ("final_size", "target_neuron", "seed", "alpha"):
        assert f"--{name} has no effect with" in done.stderr
    words = ["--num_steps=40", "--tv_reg_step=1", "--learning_rate_decay_fraction=.5", "--iter_behavior=save"]
    told = list(program.without_effect(program.build_parser().parse_args(words)))
    assert [line.split()[0] for line in told] == ["--tv_reg_step", "--learning_rate_decay_fraction", "--iter_behavior"]
    assert not list(program.without_effect(program.build_parser().parse_args(["--num_steps=101", *words[1:]])))


def test_a_matplotlib_that_does_not_work(tmp_path):
    for word in ("plot", "show", "plot_pix"):
        done = cnn_vis(*ONE[:-1], f"--iter_behavior={word}", cwd=tmp_path, MPLBACKEND="nonsense")
        assert_one_line(done, 2, "--iter_behavior", "nonsense")


def test_final_size_is_not_looked_at_with_one_size(tmp_path):
    assert cnn_vis(*ONE, "--final_size=0x0", cwd=tmp_path).returncode == 0


def test_layers_of_training_and_numbers_without_channels(tmp_path):
    text = (GOLDEN / "deploy.prototxt").read_text()
    text += 'layer { name: "drop" type: "Dropout" bottom: "classifier" top: "drop" include { phase: TRAIN } }\n'
    text += 'layer { name: "stage" type: "Power" bottom: "classifier" top: "stage" include { stage: "deploy" } }\n'
    text += 'layer { name: "sums" type: "Reduction" bottom: "classifier" top: "sums" reduction_param { axis: 1 } }\n'
    text += 'layer { name: "sum" type: "Reduction" bottom: "classifier" top: "sum" }\n'
    (tmp_path / "more.prototxt").write_text(text)
    done = cnn_vis("--deploy_txt=more.prototxt", "--list_layers", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert not {"drop", "stage", "sums", "sum"} & {line.split()[0] for line in done.stdout.splitlines()}
    for layer, words in (("drop", "no such layer"), ("stage", "no such layer"), ("sums", "channels"), ("sum", "channels")):
        for neuron in ([], ["--image_type=amplify_neuron"]):
            done = cnn_vis(*ONE, "--deploy_txt=more.prototxt", f"--layer={layer}", *neuron, cwd=tmp_path)
            assert_one_line(done, 2, f"--layer {layer}", words)


def test_a_layer_without_gradient(tmp_path):
    text = (GOLDEN / "deploy.prototxt").read_text()
    text += 'layer { name: "best" type: "ArgMax" bottom: "classifier" top: "best" }\n'
    text += 'layer { name: "apart" type: "DummyData" top: "dummy" dummy_data_param { shape { dim: 1 dim: 3 } } }\n'
    text += 'layer { name: "lonely" type: "Power" bottom: "dummy" top: "lonely" }\n'
    (tmp_path / "more.prototxt").write_text(text)
    for layer, words in (("best", "no gradient"), ("lonely", "does not depend")):
        done = cnn_vis(*TINY, "--deploy_txt=more.prototxt", f"--layer={layer}", f"--image={GOLDEN}/input.png", cwd=tmp_path)
        assert_one_line(done, 2, "--layer", layer, words)


def test_quiet(tmp_path):
    options = ["--layer=inception_a/output", f"--image={GOLDEN}/input.png", "--num_steps=2", "--output_iter=1", "--alpha_aux=3"]
    done = cnn_vis(*TINY, *options, "--quiet", "--iter_behavior=save", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    loud = cnn_vis(*TINY, *options, cwd=tmp_path)
    assert [line for line in loud.stderr.splitlines() if "tiles/s" in line]
    assert psnr(tmp_path / "out.png", tmp_path / "out_1_2.png") == np.inf


def on_terminal(columns, *arguments, cwd):
    """What the program writes to a terminal of so many columns."""
    try:
        ours, theirs = pty.openpty()
    except OSError as error:
        pytest.skip(f"there are no terminals here ({error})")
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 30, columns, 0, 0))
    command = [sys.executable, str(ROOT / "cnn_vis.py"), *map(str, arguments)]
    running, said = subprocess.Popen(command, cwd=cwd, stdin=theirs, stdout=theirs, stderr=theirs), b""
    os.close(theirs)
    with contextlib.suppress(OSError):  # which is how a terminal ends
        while data := os.read(ours, 1 << 16):
            said += data
    os.close(ours)
    assert running.wait() == 0, said
    return said.decode()


def test_progress_bar(tmp_path):
    """On a terminal a bar, which statistics pass by and which goes when the run is done; without columns to draw it in, lines."""
    options = [*RUN, "--iter_behavior=print", "--output_iter=20"]
    said = on_terminal(120, *options, cwd=tmp_path)
    bars = re.findall(r"size ./2 \d+x\d+, step \d+/60 \|[^|]{20,}\| +\d+% +\d+\.\d+ tiles/s, [\d:]+ left", said)
    assert len(bars) > 5
    assert {line.split()[1] for line in bars} == {"1/2", "2/2"}
    seen = [line.rstrip("\r").rpartition("\r")[2] for line in said.split("\n")]  # without what is written over
    assert sum(bool(re.fullmatch(r"size ./2 \d+x\d+, step \d+/60, objective \S+", line)) for line in seen) == 6
    assert not any("tiles/s" in line for line in seen)
    plain = on_terminal(0, *options, cwd=tmp_path)
    assert len(re.findall(r"step \d+/60: \d+\.\d+ tiles/s, [\d:]+ left", plain)) == 6
    assert on_terminal(120, *options[:-2], "--iter_behavior=none", "--quiet", cwd=tmp_path) == ""


def test_all_behaviors_together(tmp_path):
    everything = "+".join(word for word in program.BEHAVIORS if word != "none")
    done = cnn_vis(*TINY, "--layer=inception_a/output", f"--image={GOLDEN}/input.png", "--num_steps=4", "--output_iter=2",
                   "--final_size=x1.2", "--num_sizes=2", f"--iter_behavior={everything}", cwd=tmp_path, DISPLAY=None)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("objective") == 4
    for word in ("plot", "show", "plot_pix"):
        Image.open(tmp_path / f"out_{word}.png").verify()
    with Image.open(tmp_path / "out_run.gif") as animation:
        assert animation.n_frames == 4
        assert animation.size == Image.open(tmp_path / "out.png").size


def test_stats(tmp_path):
    """A row for every step, with the figures that print shows."""
    done = cnn_vis(*TINY, "--layer=inception_a/output", f"--image={GOLDEN}/input.png", "--num_steps=3", "--final_size=x1.2",
                   "--num_sizes=2", "--stats=s.csv", "--output_iter=1", "--iter_behavior=print", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "s.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["size"], row["step"]) for row in rows] == list(itertools.product("12", "123"))
    printed = [float(value) for value in re.findall(r"objective (\S+)", done.stdout)]
    assert [float(row["objective"]) for row in rows] == pytest.approx(printed, rel=1e-3)


# ---- What a hostile tester found -----------------------------------------------------------------------------------------

ONE = [
    *TINY,
    "--layer=inception_a/output",
    "--num_steps=1",
    "--initial_size=32x32",
    "--seed=1",
    "--quiet",
    "--iter_behavior=none",
]


@pytest.mark.parametrize("option", ["caffe_model", "deploy_txt", "mean_image", "image"])
def test_inputs_are_not_overwritten(option, tmp_path):
    files = {"caffe_model": "tiny_inception.caffemodel", "deploy_txt": "deploy.prototxt", "mean_image": "mean.npy",
             "image": "input.png"}  # fmt: skip
    file = shutil.copy(GOLDEN / files[option], tmp_path)
    before = pathlib.Path(file).read_bytes()
    done = cnn_vis(*ONE, f"--{option}={file}", f"--stats={file}", cwd=tmp_path)
    assert_one_line(done, 2, "--stats", file)
    linked = tmp_path / "linked.png"
    linked.symlink_to(file)
    assert_one_line(cnn_vis(*ONE, f"--{option}={file}", "--output=linked.png", cwd=tmp_path), 2, "--output", f"--{option}")
    assert pathlib.Path(file).read_bytes() == before


def test_a_checkpoint_is_not_overwritten(tmp_path):
    """By the picture of the run that goes on from it."""
    running = under_way(*RUN, "--num_steps=100000", "--checkpoint_iter=1", cwd=tmp_path)
    running.kill()
    running.communicate()
    (tmp_path / CHECKPOINT).rename(tmp_path / "c.png")
    before = (tmp_path / "c.png").read_bytes()
    assert_one_line(cnn_vis("--resume=c.png", "--output=c.png", cwd=tmp_path), 2, "--output", "--resume")
    assert (tmp_path / "c.png").read_bytes() == before


@pytest.mark.parametrize("stats", ["in.png", "o.png", "o.png.checkpoint", "o_plot.png", "o_1_1.png", "o.png.json", "./o.png"])
def test_stats_overwrite_nothing(stats, tmp_path):
    shutil.copy(GOLDEN / "input.png", tmp_path / "in.png")
    done = cnn_vis(*ONE, "--image=in.png", "--output=o.png", f"--stats={stats}", cwd=tmp_path)
    assert_one_line(done, 2, "--stats", stats)
    assert (tmp_path / "in.png").read_bytes() == (GOLDEN / "input.png").read_bytes()


def test_the_image_is_not_overwritten(tmp_path):
    shutil.copy(GOLDEN / "input.png", tmp_path / "in_1_1.png")
    assert_one_line(cnn_vis(*ONE, "--image=in_1_1.png", "--output=in.png", cwd=tmp_path), 2, "--output", "in.png")


def test_file_names(tmp_path):
    """Of any bytes; the ones that are too long are refused before work begins."""
    for name in (b"caf\xe9.png", "é ü 😀.png".encode(), b"new\nline.png"):
        done = cnn_vis(*ONE, os.fsdecode(b"--output=" + name), cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert name in os.listdir(os.fsencode(tmp_path))
        assert cnn_vis(b"--reproduce=".decode() + os.fsdecode(name), cwd=tmp_path).returncode == 0
    for name in ("x" * 300 + ".png", "x" * 248 + ".png"):
        assert_one_line(cnn_vis(*ONE, f"--output={name}", cwd=tmp_path), 2, "--output", "too long")
    assert cnn_vis(*ONE, f"--output={'😀' * 55}.png", cwd=tmp_path).returncode == 0


def test_links_and_devices_as_output(tmp_path):
    (tmp_path / "link.png").symlink_to("real.png")
    assert cnn_vis(*ONE, "--output=link.png", cwd=tmp_path).returncode == 0
    assert (tmp_path / "link.png").is_symlink()
    Image.open(tmp_path / "real.png").verify()
    os.mkfifo(tmp_path / "fifo.png")
    assert_one_line(cnn_vis(*ONE, "--output=fifo.png", cwd=tmp_path), 2, "--output", "fifo.png")


def test_resume_of_one_set_aside(tmp_path):
    """It goes on by the line that was printed, and leaves a newer unfinished run's checkpoint alone."""
    for seed in (1, 2):
        running = start(*RUN, f"--seed={seed}", "--num_steps=4000", "--checkpoint_iter=1", cwd=tmp_path)
        wait_for((tmp_path / f"{CHECKPOINT}.old1").exists if seed == 2 else (tmp_path / CHECKPOINT).exists)
        wait_for((tmp_path / CHECKPOINT).exists)
        running.send_signal(signal.SIGTERM)
        running.communicate(timeout=20)
    second = program.read_checkpoint(str(tmp_path / CHECKPOINT))[0]
    running = start(f"--resume={CHECKPOINT}.old1", cwd=tmp_path)
    wait_for((tmp_path / f"{CHECKPOINT}.old2").exists)
    running.kill()
    running.communicate()
    assert program.read_checkpoint(str(tmp_path / f"{CHECKPOINT}.old2"))[0] == second
    assert "--seed=1" in program.read_checkpoint(str(tmp_path / f"{CHECKPOINT}.old1"))[0]["command"]


@pytest.mark.parametrize("redirection", [">&-", ">/dev/full", "2>&-", "2>/dev/full", ">&- 2>&- <&-"])
def test_closed_and_full_streams(redirection, tmp_path):
    command = shlex.join([sys.executable, str(ROOT / "cnn_vis.py"), *ONE[:-2], "--output_iter=1"])
    done = subprocess.run(["sh", "-c", f"{command} {redirection}"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    Image.open(tmp_path / "out.png").verify()


def test_errors_on_a_full_stderr(tmp_path):
    """Nobody reads the line; the exit status says it."""
    command = shlex.join([sys.executable, str(ROOT / "cnn_vis.py"), *TINY, "--image=nope.jpg"])
    assert subprocess.run(["sh", "-c", f"{command} 2>/dev/full"], cwd=tmp_path).returncode == 2


def test_paths_are_expanded(tmp_path):
    """All of them alike, also where the shell did not do it, as in --output=~/o.png."""
    done = cnn_vis(*ONE, "--output=~/o.png", "--stats=$PLACE/s.csv", cwd="/", HOME=str(tmp_path), PLACE=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(tmp_path)) == ["o.png", "s.csv"]


def test_parts_of_killed_runs_are_removed(tmp_path):
    """Those of this output and of processes of this machine that are no more."""
    dead = subprocess.Popen(["true"])
    dead.wait()
    stale = [program.part_name(str(tmp_path / name), dead.pid) for name in ("out.png", "out.png.checkpoint", "out_1_50.png")]
    kept = [
        program.part_name(str(tmp_path / "out.png"), os.getpid()),
        program.part_name(str(tmp_path / "other.png"), dead.pid),
        program.part_name(str(tmp_path / "out.png"), dead.pid).replace(os.uname().nodename, "elsewhere"),
    ]
    for path in stale + kept:
        open(path, "w").close()
    assert cnn_vis(*ONE, cwd=tmp_path).returncode == 0
    assert {path for path in stale + kept if os.path.exists(path)} == set(kept)


def test_reproduce_prefers_what_the_picture_says(tmp_path):
    assert cnn_vis(*ONE, "--sidecar", cwd=tmp_path).returncode == 0
    assert cnn_vis(*ONE, "--seed=7", cwd=tmp_path).returncode == 0
    assert "--seed=7" in cnn_vis("--reproduce=out.png", cwd=tmp_path).stdout


def test_reproduce_tells_pictures_on_the_way(tmp_path):
    assert cnn_vis(*ONE, "--iter_behavior=save", "--output_iter=1", "--num_steps=2", cwd=tmp_path).returncode == 0
    assert "after step 1 of size 1" in cnn_vis("--reproduce=out_1_1.png", cwd=tmp_path).stderr
    assert "on the way" not in cnn_vis("--reproduce=out.png", cwd=tmp_path).stderr


@pytest.mark.parametrize("name", ["resume", "reproduce", "stats", "caffe_model", "deploy_txt", "mean_image", "image", "output"])
def test_empty_values(name, tmp_path):
    assert_one_line(cnn_vis(*ONE, f"--{name}=", cwd=tmp_path), 2, name)
    assert os.listdir(tmp_path) == []


def test_means_that_are_none(tmp_path):
    np.savez(tmp_path / "several.npz", a=np.zeros(3))
    for name, array in (
        ("empty", np.zeros(0)),
        ("complex", np.zeros(3) * 1j),
        ("text", np.array(["a"])),
        ("far", np.full(3, 1e300)),
    ):
        np.save(tmp_path / name, array)
    (tmp_path / "zip.npy").write_bytes(b"PK\x03\x04 and no more")
    for name in ("several.npz", "empty.npy", "complex.npy", "text.npy", "far.npy", "zip.npy"):
        assert_one_line(cnn_vis(*ONE, f"--mean_image={name}", cwd=tmp_path), 2, "--mean_image", name)


@pytest.mark.parametrize("option", ["num_steps", "num_sizes", "output_iter", "checkpoint_iter", "seed", "workers", "gpu"])
def test_numbers_of_400_digits(option, tmp_path):
    assert_one_line(cnn_vis(*ONE, f"--{option}={'9' * 400}", cwd=tmp_path), 2, f"--{option}")


@pytest.mark.parametrize("value", ["-1e-4", "-.5", "-2", "-1.5e3"])
def test_negative_numbers(value, tmp_path):
    assert cnn_vis(*ONE, "--amplify_l1_weight", value, cwd=tmp_path).returncode == 0


def test_folders_where_files_are_to_come(tmp_path):
    for name, option in (
        ("o.png.json", "--sidecar"),
        ("o_run.gif", "--iter_behavior=gif"),
        ("o_plot.png", "--iter_behavior=plot"),
    ):
        (tmp_path / name).mkdir()
        assert_one_line(cnn_vis(*ONE[:-1], option, "--output=o.png", cwd=tmp_path), 2, "--output", name)


def test_a_folder_that_goes_away(tmp_path):
    """The picture cannot be written where it was to be; the work is kept, and can be gone on with."""
    folder = tmp_path / "folder"
    folder.mkdir()
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    command = [sys.executable, str(ROOT / "cnn_vis.py"), *RUN, "--stats=s.csv", "--quiet", "--checkpoint_iter=1"]
    running = subprocess.Popen([*command, f"--output={folder}/out.png"], cwd=tmp_path, env=environment, text=True,
                               stderr=subprocess.PIPE)  # fmt: skip
    wait_for((folder / CHECKPOINT).exists)
    shutil.rmtree(folder)
    _, said = running.communicate(timeout=60)
    assert running.returncode == 1
    line = said.splitlines()[-1]
    assert "Traceback" not in said
    command = shlex.split(line.partition("go on with: ")[2])
    assert cnn_vis(*command[2:], cwd=tmp_path).returncode == 0
    Image.open(tmp_path / "ANOTHER.png").verify()


def test_a_current_folder_that_is_no_more(tmp_path):
    command = shlex.join([sys.executable, str(ROOT / "cnn_vis.py"), *ONE, f"--output={tmp_path}/o.png"])
    done = subprocess.run(
        ["sh", "-c", f"mkdir gone; cd gone; rmdir ../gone; {command}"], cwd=tmp_path, capture_output=True, text=True
    )
    assert_one_line(done, 2, "current folder")


def test_a_caffe_that_does_not_work(tmp_path):
    (tmp_path / "caffe").mkdir()
    (tmp_path / "caffe" / "__init__.py").write_text("1 / 0")
    assert_one_line(cnn_vis(*ONE, cwd=tmp_path, PYTHONPATH=str(tmp_path)), 2, "Caffe cannot be imported", "division by zero")


@pytest.mark.parametrize("limit", ["-d 160000", "-v 450000"])
def test_little_memory_to_start_in(limit, tmp_path):
    command = shlex.join([sys.executable, str(ROOT / "cnn_vis.py"), *ONE])
    done = subprocess.run(["bash", "-c", f"ulimit {limit}; {command}"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert_one_line(done, 2, f"ulimit {limit}")


def test_few_descriptors(tmp_path):
    command = shlex.join([sys.executable, str(ROOT / "cnn_vis.py"), *ONE, "--workers=40"])
    done = subprocess.run(["sh", "-c", f"ulimit -n 30; {command}"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert_one_line(done, 1, "Too many open files")


def test_damaged_exif_is_no_hindrance(tmp_path):
    CARD.save(tmp_path / "in.png", exif=b"garbage")
    assert np.array_equal(program.read_picture(str(tmp_path / "in.png"))[0], np.asarray(CARD))
