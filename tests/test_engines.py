"""Engines: where tiles are computed must not show in the picture, nor that a process was killed."""

import shlex
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import (
    CHECKPOINT,
    ONE,
    QUICK,
    ROOT,
    RUN,
    assert_one_line,
    assert_same_run,
    kill_workers,
    psnr,
    run_cli,
    session,
    under_way,
    wait_for,
)
from PIL import Image

import cnn_vis


@pytest.mark.parametrize("options", [["--workers=1"], ["--workers=3", "--batch_size=2"]])
def test_workers_change_nothing(options, picture, tmp_path):
    common = [*QUICK, f"--image={picture}", "--initial_size=100x130", "--iter_behavior=none"]
    assert run_cli(*common, "--output=a.png", cwd=tmp_path).returncode == 0
    assert run_cli(*common, *options, "--output=b.png", cwd=tmp_path).returncode == 0
    assert psnr(tmp_path / "a.png", tmp_path / "b.png") == np.inf


def test_killed_workers_are_replaced(whole, tmp_path):
    """Up to three times, with the same picture in the end."""
    running = under_way(*RUN, "--checkpoint_iter=1", cwd=tmp_path)
    killed = 0
    while killed < 3 and running.poll() is None:
        killed += kill_workers(running.pid, 1)
        time.sleep(0.4)
    assert killed
    _, said = running.communicate(timeout=60)
    assert running.returncode == 0, said
    assert_same_run(tmp_path, whole[0])


def test_a_run_ends_when_workers_are_killed_too_often(tmp_path):
    running = under_way(*RUN, "--num_steps=100000", "--checkpoint_iter=1", "--quiet", cwd=tmp_path)
    while running.poll() is None:
        kill_workers(running.pid)
        time.sleep(0.2)
    _, said = running.communicate()
    assert running.returncode == 1
    (line,) = said.splitlines()
    assert "killed 4 times" in line
    assert f"--resume {CHECKPOINT}" in line
    Image.open(tmp_path / "out.png").verify()
    wait_for(lambda: not session(running.pid))


def test_gpus_are_those_that_this_process_sees(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [cnn_vis.visible_gpu(number) for number in (0, 2)] == ["0", "2"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, GPU-8a1f")
    assert [cnn_vis.visible_gpu(number) for number in (0, 1)] == ["3", "GPU-8a1f"]


def test_a_caffe_that_does_not_work_is_one_line(tmp_path):
    (tmp_path / "caffe").mkdir()
    (tmp_path / "caffe" / "__init__.py").write_text("1 / 0")
    assert_one_line(
        run_cli(*ONE, cwd=tmp_path, PYTHONPATH=str(tmp_path)),
        2,
        "Caffe cannot be imported",
        "division by zero",
    )


def run_limited(limit, *arguments, cwd):
    """Runs the script under a ulimit."""
    command = shlex.join([sys.executable, str(ROOT / "cnn_vis.py"), *arguments])
    words = ["bash", "-c", f"ulimit {limit}; {command}"]
    return subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("limit", ["-d 160000", "-v 450000"])
def test_too_little_memory_to_start_in_is_one_line(limit, tmp_path):
    assert_one_line(run_limited(limit, *ONE, cwd=tmp_path), 2, f"ulimit {limit}")


@pytest.mark.parametrize("number", [14, 30])
def test_too_few_descriptors_are_one_line(number, tmp_path):
    done = run_limited(f"-n {number}", *ONE, "--workers=40", cwd=tmp_path)
    assert_one_line(done, 1, "Too many open files", "ulimit -n")
