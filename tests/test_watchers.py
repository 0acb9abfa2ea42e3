"""What a run does along the way."""

import contextlib
import csv
import fcntl
import itertools
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time

import numpy as np
import pytest
from conftest import (
    CHECKPOINT,
    GOLDEN,
    ONE,
    QUICK,
    ROOT,
    RUN,
    TINY,
    assert_one_line,
    psnr,
    run_cli,
    start,
)
from PIL import Image

from cnn_vis_lib import bar
from cnn_vis_lib.behaviors import ARRAYS, BEHAVIORS
from cnn_vis_lib.checkpoints import Checkpoint
from cnn_vis_lib.run import duration


def test_none_writes_only_the_picture(picture, tmp_path):
    done = run_cli(
        *QUICK, f"--image={picture}", "--iter_behavior=none", "--output_iter=1", cwd=tmp_path
    )
    assert (done.returncode, done.stdout) == (0, "")
    assert sorted(os.listdir(tmp_path)) == ["in.png", "out.png"]


def test_print_shows_statistics(picture, tmp_path):
    done = run_cli(
        *QUICK, f"--image={picture}", "--iter_behavior=print", "--output_iter=1", cwd=tmp_path
    )
    assert done.stdout.count("objective") == 2
    assert sorted(os.listdir(tmp_path)) == ["in.png", "out.png"]


def test_what_would_be_shown_goes_to_files_without_a_display(picture, tmp_path):
    """What would be shown goes to files."""
    screenless = {"DISPLAY": None, "WAYLAND_DISPLAY": None}
    options = ["--iter_behavior=show+plot_pix", "--output_iter=1"]
    done = run_cli(*QUICK, f"--image={picture}", *options, cwd=tmp_path, **screenless)
    assert done.returncode == 0, done.stderr
    for name in ("out_show.png", "out_plot_pix.png"):
        assert name in done.stderr
        Image.open(tmp_path / name).verify()


def test_quiet_says_nothing(tmp_path):
    options = [
        "--layer=inception_a/output",
        f"--image={GOLDEN}/input.png",
        "--num_steps=2",
        "--output_iter=1",
        "--alpha_aux=3",
    ]
    done = run_cli(*TINY, *options, "--quiet", "--iter_behavior=save", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert run_cli(*TINY, *options, cwd=tmp_path).stderr
    assert psnr(tmp_path / "out.png", tmp_path / "out_1_2.png") == np.inf


def on_terminal(columns, *arguments, cwd):
    """What the program writes to a terminal of so many columns."""
    try:
        ours, theirs = pty.openpty()
    except OSError as error:
        pytest.skip(f"there are no terminals here ({error})")
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 30, columns, 0, 0))
    command = [sys.executable, str(ROOT / "cnn_vis.py"), *map(str, arguments)]
    running, said = (
        subprocess.Popen(command, cwd=cwd, stdin=theirs, stdout=theirs, stderr=theirs),
        b"",
    )
    os.close(theirs)
    with contextlib.suppress(OSError):  # reading a closed terminal raises it
        while data := os.read(ours, 1 << 16):
            said += data
    os.close(ours)
    assert running.wait() == 0, said
    return said.decode()


def test_statistics_pass_by_the_bar(tmp_path):
    """A terminal shows a progress bar, with statistics printed above it, which is erased when the
    run is done."""
    options = [*RUN, "--iter_behavior=print", "--output_iter=20"]
    said = on_terminal(120, *options, cwd=tmp_path)
    bars = re.findall(r"size . of 2, step \d+ of 60 \|[^|]{20,}\| +\d+%, [\d:]+ left", said)
    assert len(bars) > 5
    assert {line.split()[1] for line in bars} == {"1", "2"}
    seen = [
        line.rstrip("\r").rpartition("\r")[2] for line in said.split("\n")
    ]  # without what is written over
    assert (
        sum(
            bool(re.fullmatch(r"size . of 2, step \d+ of 60, objective \S+", line)) for line in seen
        )
        == 6
    )
    assert not any(" left" in line for line in seen)
    assert on_terminal(120, *options[:-2], "--iter_behavior=none", "--quiet", cwd=tmp_path) == ""


def test_all_behaviors_work_together(tmp_path):
    everything = "+".join(word for word in BEHAVIORS if word != "none")
    done = run_cli(
        *TINY,
        "--layer=inception_a/output",
        f"--image={GOLDEN}/input.png",
        "--num_steps=4",
        "--output_iter=2",
        "--final_size=x1.2",
        "--num_sizes=2",
        f"--iter_behavior={everything}",
        cwd=tmp_path,
        DISPLAY=None,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("objective") == 4
    for word in ("plot", "show", "plot_pix"):
        Image.open(tmp_path / f"out_{word}.png").verify()
    with Image.open(tmp_path / "out_run.gif") as animation:
        assert animation.n_frames == 4
        assert animation.size == Image.open(tmp_path / "out.png").size


def test_stats_have_a_row_for_every_step(tmp_path):
    """A row for every step, with the figures that print shows."""
    done = run_cli(
        *TINY,
        "--layer=inception_a/output",
        f"--image={GOLDEN}/input.png",
        "--num_steps=3",
        "--final_size=x1.2",
        "--num_sizes=2",
        "--stats=s.csv",
        "--output_iter=1",
        "--iter_behavior=print",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "s.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["size"], row["step"]) for row in rows] == list(itertools.product("12", "123"))
    printed = [float(value) for value in re.findall(r"objective (\S+)", done.stdout)]
    assert [float(row["objective"]) for row in rows] == pytest.approx(printed, rel=1e-3)


def test_a_matplotlib_that_does_not_work_is_one_line(tmp_path):
    for word in ("plot", "show", "plot_pix"):
        done = run_cli(*ONE[:-1], f"--iter_behavior={word}", cwd=tmp_path, MPLBACKEND="nonsense")
        assert_one_line(done, 2, "--iter_behavior", "nonsense")


def test_pixels_are_plotted_from_the_first_step_on(tmp_path):
    """Also after --resume, and only those that the picture has."""
    options = ["--num_sizes=1", "--initial_size=104x110", "--num_steps=100000"]
    options += ["--iter_behavior=plot_pix", "--checkpoint_iter=3"]
    seen = written = 0

    def changed():
        path = tmp_path / CHECKPOINT
        return path.stat().st_mtime_ns if path.exists() else 0

    for words in ([*RUN, *options], [f"--resume={CHECKPOINT}"]):
        running = start(*words, cwd=tmp_path)
        while changed() <= written:
            time.sleep(0.01)
        arrays = Checkpoint.read(str(tmp_path / CHECKPOINT), ARRAYS).arrays  # of a whole step
        running.send_signal(signal.SIGTERM)
        running.communicate(timeout=20)
        written, kept = changed(), arrays["pixels"]
        assert kept[:, 0].tolist() == list(range(1, len(kept) + 1))
        assert (kept[:, 1:3] == 100).all()
        assert (kept[-1, 3:] == arrays["image"][0, :, 100, 100]).all()
        assert len(kept) > seen
        seen = len(kept)


def test_a_log_has_a_line_every_tenth_of_a_long_run(tmp_path, monkeypatch):
    """Where there is no terminal, or one that reports no columns; with any --iter_behavior."""
    words = [*TINY, "--layer=inception_a/output", "--initial_size=40x40", "--seed=1"]
    words += ["--num_steps=40", "--iter_behavior=none"]
    told = r"size 1 of 1, step \d+ of 40: \d+%, [\d:]+ left"
    assert not re.findall(told, run_cli(*words, cwd=tmp_path).stderr)  # it is over in a second
    monkeypatch.setattr(bar, "SECONDS_BETWEEN", 0)
    assert len(re.findall(told, run_cli(*words, cwd=tmp_path).stderr)) == 10
    assert run_cli(*words, "--quiet", cwd=tmp_path).stderr == ""


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(1, "5 seconds"), (33, "35 seconds"), (89, "90 seconds"), (95, "2 minutes"),
     (5000, "83 minutes"), (5400, "1.5 hours"), (100_000, "27.8 hours")],
)  # fmt: skip
def test_times_are_told_roughly(seconds, words):
    assert duration(seconds) == words


def test_a_long_run_is_announced_with_its_time(tmp_path):
    """Judged by a trial, which changes nothing."""
    words = [*TINY, "--layer=inception_a/output", "--initial_size=96x96", "--seed=1"]
    words += ["--iter_behavior=none", "--learning_rate=3"]
    said = run_cli(*words, "--num_steps=40", cwd=tmp_path).stderr
    assert "96x96 pixels (width x height), 40 steps, noise seed 1, about 5 seconds\n" in said
    assert "about" not in run_cli(*words, "--num_steps=2", cwd=tmp_path).stderr


def test_the_original_settings_are_told(tmp_path):
    words = [*TINY, f"--image={GOLDEN}/input.png", "--layer=inception_a/output"]
    running = start(*words, "--checkpoint_iter=0", cwd=tmp_path)
    assert "1000 steps, as in the original; " in running.stderr.readline()
    running.send_signal(signal.SIGINT)
    running.communicate(timeout=20)
    said = run_cli(*words, "--num_steps=1", cwd=tmp_path).stderr
    assert "original" not in said
