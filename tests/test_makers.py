"""Several pictures at the same time, each made by a process of its own."""

import contextlib
import dataclasses
import gc
import os
import re
import shutil
import signal
import time

import numpy as np
import pytest
from conftest import (
    CARD,
    GOLDEN,
    TINY,
    assert_one_line,
    kill_workers,
    run_cli,
    session,
    start,
    wait_for,
    wait_for_line,
    workers,
)
from PIL import Image
from test_engines import SPEC, WORK, WRONG, expected, some_tiles  # noqa: F401, a fixture

import cnn_vis
from cnn_vis_lib import makers
from cnn_vis_lib.bar import ProgressBar
from cnn_vis_lib.makers import InProcess, number_of_makers, tiles_at_once
from cnn_vis_lib.options import PARSER

LAYER = "--layer=inception_a/output"
DREAM = [*TINY, "--num_steps=3", "--learning_rate=4", "--iter_behavior=none", "--image=in"]
TOGETHER = [*DREAM, "--workers=3"]


@pytest.fixture
def folder(tmp_path):
    """A folder with seven pictures of different sizes in in/."""
    (tmp_path / "in").mkdir()
    for number in range(7):
        CARD.rotate(50 * number).resize((70 + 9 * number, 60)).save(tmp_path / f"in/{number}.png")
    return tmp_path


def assert_same_files(made, wanted):
    """That two folders have the same pictures, and tables of the same numbers."""
    assert sorted(os.listdir(made)) == sorted(os.listdir(wanted))
    for name in os.listdir(wanted):
        if name.endswith(".json"):
            continue
        first, second = (folder / name for folder in (made, wanted))
        if name.endswith(".csv"):
            assert first.read_bytes() == second.read_bytes()
        else:
            assert np.array_equal(*(np.asarray(Image.open(path)) for path in (first, second)))


def test_pictures_made_together_are_those_made_alone(folder):
    """With everything that is written beside them, and what is printed."""
    words = [
        *DREAM,
        LAYER,
        "--layer=pool1/norm1:1,3",
        "--sidecar",
        "--iter_behavior=save+print+gif",
    ]
    words += ["--output_iter=2", "--use_pixel_learning_rates"]
    told = []
    for number in (1, 3):
        out = f"--output={number}/", f"--stats={number}/{{name}}{{layer}}.csv"
        (folder / str(number)).mkdir()
        done = run_cli(*words, f"--workers={number}", *out, cwd=folder)
        assert done.returncode == 0, done.stderr
        told.append(done)
    assert len(os.listdir(folder / "3")) == 14 * 5
    assert_same_files(folder / "3", folder / "1")
    for streams in ("stdout", "stderr"):
        alone, together = (getattr(done, streams).splitlines() for done in told)
        assert len(alone) == len(together)
    assert sum("pixels (width x height), 3 steps" in line for line in together) == 1
    assert sum(": done in" in line for line in together) == 14
    statistics = [line for line in told[1].stdout.splitlines() if "objective" in line]
    assert len(statistics) == 14
    assert all(re.match(r"picture \d+ of 14, size 1 of 1, step 2 of 3,", s) for s in statistics)
    again = run_cli(*words, "--workers=3", *out, cwd=folder)
    assert "14 of 14 pictures are there already" in again.stderr


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_all_that_are_under_way(signum, folder):
    """Even one to all processes at once; the same command goes on with each."""
    words = [*TOGETHER, LAYER, "--num_steps=150", "--checkpoint_iter=10000"]
    assert run_cli(*words, "--output=whole/", cwd=folder).returncode == 0
    running = start(*words, "--output=out/", cwd=folder)
    wait_for_line(running, "picture 3 of 7")
    time.sleep(0.3)
    os.killpg(running.pid, signum)
    said = running.communicate(timeout=60)[1].splitlines()
    assert running.returncode == 128 + signum, said
    assert "run the same command again" in said[-1]
    assert "of 7 pictures are done" in said[-1]
    wait_for(lambda: not session(running.pid))
    saved = [name for name in os.listdir(folder / "out") if name.endswith(".checkpoint")]
    assert len(saved) >= 2
    done = run_cli(*words, "--output=out/", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("goes on after") == len(saved)
    assert "was kept" not in done.stderr
    assert_same_files(folder / "out", folder / "whole")


def test_a_second_ctrl_c_ends_all_at_once(folder):
    running = start(*TOGETHER, LAYER, "--num_steps=100000", "--output=out/", cwd=folder)
    wait_for_line(running, "picture 3 of 7")
    for pid in workers(running.pid):
        os.kill(pid, signal.SIGSTOP)  # so that they cannot answer to the first
    running.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert running.poll() is None
    running.send_signal(signal.SIGINT)
    said = running.communicate(timeout=20)[1]
    assert running.returncode == 130, said
    assert "Traceback" not in said
    wait_for(lambda: not session(running.pid))


def test_a_maker_that_is_killed_is_replaced(folder):
    """And the others are not disturbed. Its picture goes on from the last checkpoint."""
    words = [*TOGETHER, LAYER, "--num_steps=100", "--checkpoint_iter=1"]
    assert run_cli(*words, "--output=whole/", cwd=folder).returncode == 0
    running = start(*words, "--output=out/", cwd=folder)
    wait_for(lambda: len([*folder.glob("out/*.checkpoint")]) == 3, 60)  # all have something to lose
    assert kill_workers(running.pid, 1) == 1
    said = running.communicate(timeout=60)[1]
    assert running.returncode == 0, said
    assert "goes on after" in said
    assert_same_files(folder / "out", folder / "whole")


def test_makers_that_are_always_killed_fail_only_their_pictures(folder):
    running = start(*TOGETHER, LAYER, "--num_steps=100000", "--output=out/", cwd=folder)
    wait_for_line(running, "picture 3 of 7")
    while running.poll() is None:
        kill_workers(running.pid)
        time.sleep(0.05)
    said = running.communicate()[1].splitlines()
    assert running.returncode == 1
    assert "7 of 7 pictures could not be made" in said[-1]
    assert sum("killed 4 times" in line for line in said) >= 3
    wait_for(lambda: not session(running.pid))


def test_makers_end_with_a_program_that_is_killed(folder):
    running = start(*TOGETHER, LAYER, "--num_steps=100000", "--output=out/", cwd=folder)
    wait_for_line(running, "picture 3 of 7")
    running.kill()
    wait_for(lambda: not session(running.pid))


def test_one_that_fails_does_not_stop_the_others(folder):
    (folder / "in/3.png").write_bytes((folder / "in/3.png").read_bytes()[:900])  # breaks off
    Image.new("RGB", (20, 20)).save(folder / "in/small.png")
    done = run_cli(*TOGETHER, LAYER, "--output=out/", "--quiet", cwd=folder)
    assert done.returncode == 1
    *lines, last = sorted(done.stderr.splitlines(), key=lambda line: "see above" in line)
    assert len(lines) <= 2
    assert any("out/small_inception_a-output.png: --initial_size" in line for line in lines)
    assert f"{len(lines)} of 8 pictures could not be made" in last
    assert len(os.listdir(folder / "out")) == 8 - len(lines)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([LAYER, "--image_type=amplify_neuron", "--target_neuron=99"], ["--target_neuron 99"]),
        (["--layer=nosuch"], ["--layer nosuch"]),
        ([LAYER, "--mask=alpha"], ["7 of 7 pictures could not be made"]),
    ],
)
def test_what_is_wrong_with_all_is_told_once(options, words, folder):
    done = run_cli(*TOGETHER, *options, "--output=out/", cwd=folder)
    if "alpha" in options[-1]:  # which depends on the picture
        assert words[0] in done.stderr
        assert done.returncode == 1
        return
    assert_one_line(done, 2, *words)


def test_a_network_that_caffe_stops_at_is_told_once(folder):
    """Found out by an engine, as for one picture."""
    deploy = folder / "deploy.prototxt"
    text = (GOLDEN / "deploy.prototxt").read_text()
    deploy.write_text(text.replace("kernel_size: 3", "kernel_size: 0", 1))
    done = run_cli(*TOGETHER, LAYER, f"--deploy_txt={deploy}", "--output=out/", cwd=folder)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "Caffe stopped: " in done.stderr
    assert "do " in done.stderr


def test_who_shows_a_picture_makes_one_at_a_time(folder):
    words = [*TOGETHER, LAYER, "--iter_behavior=show", "--output=out/"]
    running = start(*words, "--num_steps=30", cwd=folder)
    seen, under_way = 0, []
    while running.poll() is None:
        with contextlib.suppress(OSError):
            under_way = [n for n in os.listdir(folder / "out") if n.endswith(".checkpoint")]
        seen = max(seen, len(under_way))
        time.sleep(0.02)
    assert running.returncode == 0
    assert seen <= 1


def options(*words):
    return PARSER.parse_args([*TINY, *words])


def test_as_many_pictures_as_fit_in_memory(monkeypatch):
    """A picture of 2000x2000 takes about half a gigabyte."""
    jobs = [options("--image=a.png") for _ in range(9)]
    sizes = {"a.png": (2000, 2000)}
    numbers = []
    for free in (0, 1e9, 2e9, 4e9, 1e12):
        monkeypatch.setattr(makers, "free_memory", lambda free=free: free)
        numbers.append(number_of_makers(jobs, sizes, 8, 3e8))
    assert numbers[0] <= 1
    assert numbers == sorted(numbers)
    assert 2 <= numbers[2] < numbers[3] < 8
    assert numbers[4] == 8
    assert number_of_makers(jobs[:3], sizes, 8, 3e8) == 3


def test_few_large_pictures_are_made_one_after_the_other():
    """Their own tiles fill the cores."""
    sizes = {"a.png": (2000, 2000), "b.png": (240, 300)}
    assert tiles_at_once(options("--image=a.png"), sizes) == 40
    assert tiles_at_once(options("--image=b.png"), sizes) == 2
    assert tiles_at_once(options("--initial_size=448x448"), {None: None}) == 2


def test_a_picture_is_freed_when_it_is_finished(folder):
    """Not only when Python looks for what refers to itself: the next one may need the memory."""
    words = [*DREAM, LAYER, "--workers=1", "--output=out/"]
    gc.collect()
    gc.disable()
    try:
        assert run_cli(*words, cwd=folder).returncode == 0
        assert not [o for o in gc.get_objects() if isinstance(o, cnn_vis.Dream)]
    finally:
        gc.enable()


def test_the_bar_counts_pictures_that_have_not_begun(caplog, monkeypatch):
    monkeypatch.setattr("cnn_vis_lib.bar.SECONDS_BETWEEN", 0)
    bar = ProgressBar(4)
    with caplog.at_level("INFO", "cnn_vis"):
        bar.update(1, 10, 100, "first")  # goes on from a checkpoint
        bar.update(1, 60, 100, "first")
        bar.update(2, 0, 300, "second")
        bar.update(2, 300, 300, "second")
        bar.end_picture(1)  # it failed
        bar.update(3, 180, 180, "third")
    shares = [record.message.rsplit(": ")[1].split(",")[0] for record in caplog.records]
    assert shares == ["15%", "45%", "75%"]


def test_a_stopped_batch_goes_on_with_another_number_of_cores(folder):
    words = [*DREAM, LAYER, "--num_steps=150"]
    assert run_cli(*words, "--workers=1", "--output=whole/", cwd=folder).returncode == 0
    running = start(*words, "--workers=3", "--output=out/", cwd=folder)
    wait_for_line(running, "picture 3 of 7")
    time.sleep(0.3)
    running.send_signal(signal.SIGINT)
    running.communicate(timeout=60)
    assert run_cli(*words, "--workers=1", "--output=out/", cwd=folder).returncode == 0
    assert_same_files(folder / "out", folder / "whole")


def test_two_runs_do_not_write_the_same_picture(folder):
    words = [word for word in TOGETHER if word != "--image=in"]
    words += [LAYER, "--output=out/", "--num_steps=100000"]
    running = start(*words, "--image=in", cwd=folder)
    wait_for_line(running, "picture 3 of 7")
    shutil.copytree(folder / "in", folder / "some")
    for number in range(3, 7):
        (folder / f"some/{number}.png").unlink()
    done = run_cli(*words, "--image=some", cwd=folder)
    running.kill()
    assert done.returncode == 1
    assert done.stderr.count("another run is writing") == 3


def test_a_makers_engine_keeps_the_contract_of_engines(expected):  # noqa: F811
    """It computes at once, one tile at a time."""
    with InProcess(*WORK, "CPU") as engine:
        engine.describe()
        assert engine.tile_size == (32, 32)
        assert engine.shapes == {"inception_a/output": (18, 16, 16)}
        kept = []
        for number, (tile, (gradient, loss)) in enumerate(zip(some_tiles(9), expected)):
            assert engine.has_room()
            ticket = engine.send([tile], number % 2 == 0)
            assert not engine.has_room()
            assert engine.is_done(ticket)
            ((its_gradient, its_loss),) = engine.receive(ticket)
            kept.append((its_gradient, gradient))
            assert its_loss == (loss if number % 2 == 0 else None)
        assert all(its.tobytes() == gradient.tobytes() for its, gradient in kept)


@pytest.mark.parametrize("said", WRONG)
def test_a_makers_engine_says_what_is_wrong_with_a_request(said):
    wrong = cnn_vis.Objective((WRONG[said],))
    spec = dataclasses.replace(SPEC, layers=wrong.layers())
    with pytest.raises(cnn_vis.BadRequest, match=said), InProcess(spec, wrong, "CPU") as engine:
        engine.describe()
