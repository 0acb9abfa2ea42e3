"""Several pictures on GPUs: tiles of several share a batch."""

import os
import signal
import time

import numpy as np
import pytest
from conftest import (
    assert_one_line,
    kill_workers,
    run_cli,
    session,
    start,
    wait_for,
    workers,
)
from test_gpu import (  # noqa: F401
    EVERYWHERE,
    GPU,
    IS_REAL,
    _there_is_a_gpu,
    assert_near,
    emulated,
    gpu_environment,
    logged,
    logs,
    take_counts,
)
from test_makers import folder  # noqa: F401, a fixture

from cnn_vis_lib import gpu_makers
from cnn_vis_lib.errors import RunFailed
from cnn_vis_lib.gpu_makers import Batches
from cnn_vis_lib.workers import Engine

BATCH = [*EVERYWHERE, "--learning_rate=4", "--iter_behavior=none", "--gpu=0", "--output=out/"]
DREAM = [*BATCH, "--layer=inception_a/output", "--image=in"]


def under_way(*words, cwd):
    """Starts a batch on the GPU; waits until three pictures have saved something."""
    running = start(*words, "--checkpoint_iter=10", cwd=cwd)
    wait_for(lambda: len(saved(cwd)) >= 3)
    return running


def saved(folder):  # noqa: F811
    """When each of the checkpoints in the folder was written."""
    return [path.stat().st_mtime for path in (folder / "out").glob("*.checkpoint")]


def test_pictures_made_together_are_those_made_alone(folder, logged):  # noqa: F811
    """With more tiles in a batch."""
    place, environment = logged
    words = [*DREAM, "--num_steps=3", "--layer=pool1/norm1:1,3"]
    done = run_cli(*words, cwd=folder, **environment)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(": done in") == 14
    assert "picture 1 of 14" in done.stderr
    (passes,) = take_counts(place, "to_device")
    for name in os.listdir(folder / "in"):
        image = [*words[:-1], f"--image=in/{name}", "--num_steps=3", f"--output={name}"]
        assert run_cli(*image, cwd=folder, **environment).returncode == 0
        assert_near(folder / name, folder / f"out/{name[0]}_inception_a-output.png")
    alone = 2 * sum(log["to_device"] for log in logs(place))
    assert passes < alone / 2


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_all_that_are_under_way(signum, gpu_environment, folder):  # noqa: F811
    """The same command goes on with each."""
    words = [*DREAM, "--num_steps=40"]
    assert run_cli(*words, "--output=whole/", cwd=folder, **GPU).returncode == 0
    running, before = under_way(*words, cwd=folder), time.time()
    os.killpg(running.pid, signum)
    said = running.communicate(timeout=60)[1].splitlines()
    assert running.returncode == 128 + signum, said
    assert "of 7 pictures are done; run the same command again" in said[-1]
    wait_for(lambda: not session(running.pid))
    times = saved(folder)
    assert len(times) >= 3
    assert max(times) > before
    done = run_cli(*words, cwd=folder, **GPU)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("goes on after") == len(times)
    assert sorted(os.listdir(folder / "out")) == sorted(os.listdir(folder / "whole"))
    for name in os.listdir(folder / "whole"):
        assert_near(folder / "out" / name, folder / "whole" / name)


def test_a_signal_does_not_wait_for_a_gpu_that_hangs(gpu_environment, folder):  # noqa: F811
    running, before = under_way(*DREAM, "--num_steps=100000", cwd=folder), time.time()
    for pid in workers(running.pid):
        os.kill(pid, signal.SIGSTOP)
    running.send_signal(signal.SIGINT)
    said = running.communicate(timeout=20)[1]
    assert running.returncode == 130, said
    assert "of 7 pictures are done; run the same command again" in said
    assert max(saved(folder)) > before
    wait_for(lambda: not session(running.pid))


def test_a_worker_that_is_killed_is_replaced(gpu_environment, folder):  # noqa: F811
    words = [*DREAM, "--num_steps=40"]
    assert run_cli(*words, "--output=whole/", cwd=folder, **GPU).returncode == 0
    running = under_way(*words, cwd=folder)
    assert kill_workers(running.pid, 1)
    said = running.communicate(timeout=60)[1]
    assert running.returncode == 0, said
    for name in os.listdir(folder / "whole"):
        assert_near(folder / "out" / name, folder / "whole" / name)


def test_workers_that_are_always_killed_lose_no_work(gpu_environment, folder):  # noqa: F811
    running, before = under_way(*DREAM, "--num_steps=100000", cwd=folder), time.time()
    while running.poll() is None:
        kill_workers(running.pid)
        time.sleep(0.2)
    said = running.communicate()[1]
    assert running.returncode == 1
    assert "7 of 7 pictures could not be made" in said
    assert "Traceback" not in said
    assert max(saved(folder)) > before
    wait_for(lambda: not session(running.pid))


def test_a_picture_that_fails_does_not_disturb_the_others(gpu_environment, folder):  # noqa: F811
    """And a mistake in the command is told before any begins."""
    broken = folder / "in/3.png"
    broken.write_bytes(broken.read_bytes()[:900])
    done = run_cli(*DREAM, "--num_steps=3", cwd=folder, **GPU)
    assert done.returncode == 1
    assert "1 of 7 pictures could not be made" in done.stderr
    assert len(os.listdir(folder / "out")) == 6
    wrong = run_cli(*DREAM, "--image_type=amplify_neuron", "--target_neuron=99", cwd=folder, **GPU)
    assert_one_line(wrong, 2, "--target_neuron 99", "18 channels")


@emulated
@pytest.mark.parametrize("failure", ["700@3", "2@3", "700@300"])
def test_a_gpu_that_fails_ends_the_batch(failure, gpu_environment, folder, monkeypatch):  # noqa: F811
    """Whether it fails when the network is tried, or amid the pictures."""
    monkeypatch.setenv("CUDA_ON_CPU_FAIL", failure)
    words = [*DREAM, "--num_steps=30"]
    done = run_cli(*words, cwd=folder, **GPU, CUDA_ON_CPU_FAIL=failure)
    assert done.returncode == 1
    assert done.stderr.count("the GPU failed") == 7
    assert "7 of 7 pictures could not be made" in done.stderr
    assert "Traceback" not in done.stderr


class Slow(Engine):
    """An engine that computes what it has been sent when it is told to."""

    batch_size, number = 4, 1
    spec = objective = device = tile_size = shapes = None

    def __init__(self):
        self.sent, self.is_ready, self.error = [], False, None

    def has_room(self):
        return True

    def send(self, tiles_in, measure=True):
        self.sent.append([float(tile[0, 0, 0]) for tile in tiles_in])
        return len(self.sent) - 1

    def is_done(self, ticket):
        time.sleep(0.01)
        return self.is_ready

    def receive(self, ticket):
        if self.error:
            raise self.error
        return [(value, value) for value in self.sent[ticket]]


def tiles(*numbers):
    return [np.full((3, 2, 2), number) for number in numbers]


def test_what_gathers_while_a_batch_is_computed_is_the_next_one():
    """In order, and never a batch that is too large."""
    engine = Slow()
    batches = Batches(engine)
    groups = []
    for number, there in enumerate([[0, 0], [1, 1], None, [2, 2, 3, 3], None]):
        groups.append(batches.send(tiles(number, number), True))
        if there:
            wait_for(lambda: engine.sent[-1:] == [there])  # noqa: B023
    assert engine.sent == [[0, 0], [1, 1], [2, 2, 3, 3]]
    engine.is_ready = True
    for number, group in enumerate(groups):
        assert group.done.wait(5)
        assert [value for value, _ in group.found] == [number, number]
    assert engine.sent[3:] == [[4, 4]]
    batches.end()


def test_an_engine_that_fails_fails_all_that_wait():
    engine = Slow()
    engine.error = RunFailed("it broke")
    batches = Batches(engine)
    share = gpu_makers.Share(batches)
    tickets = [share.send(tiles(n)) for n in range(6)]
    engine.is_ready = True
    for ticket in tickets:
        with pytest.raises(RunFailed, match="it broke"):
            share.receive(ticket)
    batches.end()
