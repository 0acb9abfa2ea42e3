"""Engines: neither where tiles are computed nor a killed process may change the picture."""

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
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
    Ascent,
    assert_one_line,
    assert_same_run,
    kill_workers,
    psnr,
    run_cli,
    session,
    under_way,
    wait_for,
    workers,
)
from PIL import Image

import cnn_vis
from cnn_vis_lib.cluster import Cluster
from cnn_vis_lib.engines import Engines
from cnn_vis_lib.errors import Stopped
from cnn_vis_lib.gpu_makers import Share, SharedEngines
from cnn_vis_lib.machine import visible_gpu
from cnn_vis_lib.models import NetworkFiles
from cnn_vis_lib.network import NetworkSpec
from cnn_vis_lib.processes import (
    CaffeProcesses,
    CaffeStopped,
    GpuFailed,
    Worker,
    WorkerDied,
    check_log,
)
from cnn_vis_lib.workers import Workers

FILES = NetworkFiles(f"{GOLDEN}/deploy.prototxt", f"{GOLDEN}/tiny_inception.caffemodel")
OBJECTIVE = cnn_vis.Objective((cnn_vis.Target("inception_a/output"),))
SPEC = NetworkSpec(FILES, OBJECTIVE.layers(), objective=OBJECTIVE.caffe_layer())
WORK = SPEC, OBJECTIVE


class Local:
    """Makes engines of this machine."""

    def __init__(self):
        self.others = set(workers(os.getpid()))  # of the test before

    def engine(self, spec, objective):
        return Workers(spec, objective, 2)

    def processes(self):
        """The pids of what computes tiles."""
        return [pid for pid in workers(os.getpid()) if pid not in self.others]


class OnDask:
    """Makes engines of a cluster."""

    def __init__(self, cluster):
        self.cluster = cluster
        for _ in range(2):
            cluster.add_worker()
        cluster.wait_for_workers(2)

    def engine(self, spec, objective):
        return Cluster(spec, objective, self.cluster.address)

    def processes(self):
        servers = [pid for nanny in self.cluster.workers for pid in workers(nanny.pid)]
        return [pid for server in servers for pid in workers(server)]


class OneOfSeveral(Share):
    """The engine of a picture that shares it with others."""

    def __init__(self, spec, objective):
        self.work = spec, objective
        self.shared = SharedEngines(Engines(None, lambda _, *work: Workers(*work, 2)))

    def describe(self):
        vars(self).update(vars(self.shared.join(*self.work)), is_used=True)

    def end(self, at_once=False):
        self.shared.stop(Stopped(2))
        if hasattr(self, "is_used"):
            self.shared.leave()
        self.shared.end()


class Shared(Local):
    """Makes engines of this machine that are shared."""

    def engine(self, spec, objective):
        return OneOfSeveral(spec, objective)


@pytest.fixture(params=["local", "shared", "cluster"])
def kind(request):
    """Tests that use this fixture run with every kind of engine."""
    if request.param != "cluster":
        return {"local": Local, "shared": Shared}[request.param]()
    return OnDask(request.getfixturevalue("dask_cluster"))


def some_tiles(count):
    return np.random.default_rng(1).normal(0, 50, (count, 3, 32, 32)).astype(np.float32)


@pytest.fixture(scope="module")
def expected():
    """Of each of some_tiles: (gradient, loss)."""
    network = Ascent(FILES, *OBJECTIVE.targets)
    found = []
    for tile in some_tiles(40):
        gradients, (loss,) = network.gradients(tile[np.newaxis])
        found.append((gradients[0].copy(), loss))
    return found


def test_an_engine_gives_each_ticket_its_own_tile(kind, expected):
    """Whatever the order in which they are asked for; losses where they are wanted."""
    with kind.engine(*WORK) as engine:
        engine.describe()
        assert engine.tile_size == (32, 32)
        assert engine.shapes == {"inception_a/output": (18, 16, 16)}
        assert engine.device
        left = list(enumerate(zip(some_tiles(40), expected)))
        while left:
            sent = {}
            while engine.has_room() and left:
                number, (tile, result) = left.pop()
                sent[engine.send([tile], number % 2 == 0)] = number, result
            assert len(sent) >= min(4, len(sent) + len(left))  # what two processes need
            for ticket in sorted(sent, key=str, reverse=len(left) % 2):
                number, (gradient, loss) = sent[ticket]
                while not engine.is_done(ticket):
                    pass
                ((its_gradient, its_loss),) = engine.receive(ticket)
                assert its_gradient.dtype == np.float32
                assert its_gradient.tobytes() == gradient.tobytes()
                assert its_loss == (loss if number % 2 == 0 else None)


def test_an_engine_makes_up_for_processes_that_are_killed(kind, expected):
    """Processes are killed in two rounds. If a round's tiles were done before the kills, these are
    noticed only with the next tiles, and that round, with nobody to kill, does not count."""
    rounds = 0
    with kind.engine(*WORK) as engine:
        engine.describe()
        while rounds < 2:
            tickets = {}
            for tile, result in zip(some_tiles(40), expected):
                if engine.has_room():
                    tickets[engine.send([tile])] = result
            killed = 0
            for pid in kind.processes():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    killed += 1
            rounds += killed > 0
            for ticket, (gradient, loss) in tickets.items():
                ((its_gradient, its_loss),) = engine.receive(ticket)
                assert its_gradient.tobytes() == gradient.tobytes()
                assert its_loss == loss


WRONG = {
    "target_neuron 99": cnn_vis.Target("inception_a/output", cnn_vis.AmplifyNeuron(99)),
    "layer nosuch": cnn_vis.Target("nosuch"),
    "layer data": cnn_vis.Target("data"),
}


@pytest.mark.parametrize("said", WRONG)
def test_an_engine_says_what_is_wrong_with_a_request(kind, said):
    wrong = cnn_vis.Objective((WRONG[said],))
    spec = dataclasses.replace(SPEC, layers=wrong.layers())
    with pytest.raises(cnn_vis.BadRequest, match=said), kind.engine(spec, wrong) as engine:
        engine.describe()


def test_an_engine_tells_why_caffe_stopped(kind, tmp_path):
    """In one message that names this machine's files."""
    deploy = tmp_path / "deploy.prototxt"
    text = (GOLDEN / "deploy.prototxt").read_text()
    deploy.write_text(text.replace("kernel_size: 3", "kernel_size: 0", 1))
    spec = dataclasses.replace(SPEC, files=dataclasses.replace(FILES, deploy=str(deploy)))
    with pytest.raises(cnn_vis.RunFailed) as raised, kind.engine(spec, OBJECTIVE) as engine:
        engine.describe()
    assert "Caffe stopped: " in str(raised.value)
    assert f"{deploy} and {FILES.weights}" in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("error", [None, cnn_vis.RunFailed, Stopped])
def test_an_engine_leaves_nothing_behind(kind, error):
    """However it ends, with tiles under way."""
    assert not kind.processes()
    with contextlib.suppress(cnn_vis.RunFailed, Stopped), kind.engine(*WORK) as engine:
        engine.describe()
        for tile in some_tiles(4):
            engine.send([tile])
        assert kind.processes()
        if error:
            raise error(2)
    wait_for(lambda: not kind.processes(), 60)


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
    assert [visible_gpu(number) for number in (0, 2)] == ["0", "2"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, GPU-8a1f")
    assert [visible_gpu(number) for number in (0, 1)] == ["3", "GPU-8a1f"]


def test_a_caffe_that_does_not_work_is_one_line(tmp_path):
    (tmp_path / "caffe").mkdir()
    (tmp_path / "caffe" / "__init__.py").write_text("1 / 0")
    assert_one_line(
        run_cli(*ONE, cwd=tmp_path, PYTHONPATH=str(tmp_path)),
        2,
        "Caffe cannot be imported",
        "division by zero",
    )


@pytest.mark.parametrize("limit", ["-d 160000", "-v 450000"])
def test_too_little_memory_to_start_in_is_one_line(limit, tmp_path):
    assert_one_line(run_cli(*ONE, cwd=tmp_path, limit=limit), 2, f"ulimit {limit}")


@pytest.mark.parametrize("number", [14, 30])
def test_too_few_descriptors_are_one_line(number, tmp_path):
    many = [*ONE, "--initial_size=800x800", "--workers=40"]  # more tiles at the same time
    done = run_cli(*many, cwd=tmp_path, limit=f"-n {number}")
    assert_one_line(done, 1, "Too many open files", "ulimit -n")


@pytest.mark.parametrize(
    ("log", "words"),
    [
        ("Check failed: error == cudaSuccess (2 vs. 0) out of memory", "--batch_size"),
        ("Check failed: error == cudaSuccess (35 vs. 0) CUDA driver version", "driver"),
        ("Check failed: error == cudaSuccess (209 vs. 0) no kernel image", "PYCAFFE_CUDA_ARCH"),
        ("Check failed: error == cudaSuccess (719 vs. 0) launch failure", "launch failure"),
        (
            "Check failed: status == CUBLAS_STATUS_SUCCESS (3 vs. 0)  CUBLAS_STATUS_ALLOC_FAILED",
            "memory",
        ),
    ],
)
def test_what_a_gpu_fails_with_is_told_with_its_remedy(log, words):
    with pytest.raises(GpuFailed, match=words) as raised:
        check_log(f"F1125 12:00:00.000000 1 syncedmem.cpp:71] {log}\n*** Check failure")
    assert "--gpu" in str(raised.value)
    assert "belong together" not in str(raised.value)


def test_a_batch_beyond_all_memory_is_a_bad_request():
    with Workers(*WORK) as engine:
        engine.describe()
        engine.batch_size = 10**13
        with pytest.raises(cnn_vis.BadRequest, match="--batch_size 10000000000000: needs"):
            engine._map_slots()


def test_killed_workers_are_replaced_where_nobody_may_wait_for_them(tmp_path):
    """In a program that ignores the end of its children, and so does not learn their status."""
    code = f"""
import os, signal, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import conftest, test_engines
from cnn_vis_lib.workers import Workers
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
with Workers(*test_engines.WORK, 2) as engine:
    engine.describe()
    conftest.kill_workers(os.getpid())
    (tile,) = test_engines.some_tiles(1)
    ((gradient, loss),) = engine.receive(engine.send([tile]))
    print(gradient.any())
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert (done.stdout, done.stderr) == ("True\n", "")


def test_the_reason_is_found_after_much_output():
    fatal = b"F1125 12:00:00.000000 1 net.cpp:71] Check failed: the reason\n"
    with CaffeProcesses() as processes:
        for text in (*[b"x\n" * 20000] * 5, fatal):
            assert processes.call(os.write, 2, text) == len(text)
        with pytest.raises(CaffeStopped, match="the reason"):
            processes.call(os._exit, 1)


def test_a_process_that_cannot_be_ended_is_given_up(monkeypatch):
    """As one that waits in the driver of a broken GPU."""
    monkeypatch.setattr(Worker, "PATIENCE", 0.1)
    monkeypatch.setattr(subprocess.Popen, "kill", lambda process: None)
    with CaffeProcesses() as processes:
        pid, future = processes.call(os.getpid), processes.submit(time.sleep, 600)
        begun = time.monotonic()
        assert processes.kill() == [-signal.SIGKILL]
        with pytest.raises(WorkerDied):
            future.result()
    assert time.monotonic() - begun < 10
    os.kill(pid, signal.SIGKILL)
