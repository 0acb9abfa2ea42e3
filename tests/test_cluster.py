"""--scheduler: runs on a Dask cluster of real processes. See also test_engines.py."""

import contextlib
import os
import platform
import shutil
import signal
import socket
import subprocess
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
    DaskCluster,
    assert_one_line,
    assert_same_run,
    psnr,
    run_cli,
    run_script,
    start,
    under_way,
    wait_for,
    wait_for_line,
    workers,
)
from test_engines import WORK

from cnn_vis_lib.cluster import Cluster, Crew

LONG = [*RUN, "--num_steps=100000", "--checkpoint_iter=1", "--iter_behavior=none"]


def end_hard(process):
    """Kills all processes of a session at once."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_a_cluster_gives_this_machines_pixels(dask_cluster, picture, tmp_path):
    """Each machine gets the network's files once, by content."""
    for _ in range(2):
        dask_cluster.add_worker(threads=2)
    common = [*QUICK, f"--image={picture}", "--initial_size=100x130", "--iter_behavior=none"]
    assert run_cli(*common, "--output=a.png", cwd=tmp_path).returncode == 0
    cluster = f"--scheduler={dask_cluster.address}"
    done = run_cli(*common, cluster, "--workers=3", "--output=b.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "--workers has no effect with --scheduler" in done.stderr
    assert dask_cluster.address in done.stderr
    assert psnr(tmp_path / "a.png", tmp_path / "b.png") == np.inf
    kept = sorted(path.read_bytes() for path in (dask_cluster.folder / "cache/cluster").iterdir())
    files = [GOLDEN / "deploy.prototxt", GOLDEN / "tiny_inception.caffemodel"]
    assert kept == sorted(path.read_bytes() for path in files)
    assert dask_cluster.logs().count("'keep_part'") == 2
    assert not [line for line in dask_cluster.logs().splitlines() if "ERROR" in line]


def test_workers_come_and_go(dask_cluster, whole, tmp_path):
    """Workers are killed during the run and others join: the result is the same."""
    first, second = dask_cluster.add_worker(), dask_cluster.add_worker()
    cluster = f"--scheduler={dask_cluster.address}"
    running = under_way(*RUN, "--checkpoint_iter=1", cluster, cwd=tmp_path)
    end_hard(first)
    wait_for_line(running, "is gone; 1 left")
    dask_cluster.add_worker(threads=2)
    dask_cluster.wait_for_workers(3)
    assert running.poll() is None
    end_hard(second)
    said = running.communicate(timeout=60)[1]
    assert running.returncode == 0, said
    assert_same_run(tmp_path, whole[0])


def test_without_workers_a_run_waits(dask_cluster, whole, tmp_path):
    """A run moves to the cluster and back, and is stopped while all workers are gone."""
    running = under_way(*RUN, "--checkpoint_iter=1", cwd=tmp_path)
    running.send_signal(signal.SIGINT)
    assert running.wait() == 128 + signal.SIGINT

    cluster = ["--resume", CHECKPOINT, f"--scheduler={dask_cluster.address}"]
    running = start(*cluster, cwd=tmp_path)
    assert "has no workers yet; waiting" in running.stderr.readline()
    worker = dask_cluster.add_worker()
    wait_for_line(running, "1 worker, ")
    time.sleep(0.5)
    end_hard(worker)
    wait_for_line(running, f"all workers of {dask_cluster.address} are gone")
    running.send_signal(signal.SIGINT)
    begun = time.monotonic()
    said = running.communicate(timeout=20)[1]
    assert time.monotonic() - begun < 5
    assert running.returncode == 128 + signal.SIGINT, said
    assert f"--resume {CHECKPOINT}" in said

    done = run_cli("--resume", CHECKPOINT, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert dask_cluster.address not in done.stderr
    assert_same_run(tmp_path, whole[0])


def test_a_scheduler_that_is_killed_loses_nothing(dask_cluster, whole, tmp_path, monkeypatch):
    monkeypatch.setenv("DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT", "3s")  # until it gives up
    dask_cluster.add_worker()
    cluster = f"--scheduler={dask_cluster.address}"
    running = start(*RUN, "--checkpoint_iter=100000", cluster, cwd=tmp_path)
    wait_for_line(running, "1 worker, ")
    time.sleep(0.5)
    end_hard(dask_cluster.scheduler)
    said = running.communicate(timeout=100)[1]
    assert running.returncode == 1
    line = said.splitlines()[-1]
    assert f"the scheduler {dask_cluster.address} is gone" in line
    assert f"--resume {CHECKPOINT}" in line
    assert run_cli("--resume", CHECKPOINT, cwd=tmp_path).returncode == 0
    assert_same_run(tmp_path, whole[0])


def test_a_scheduler_that_is_killed_ends_the_wait_for_workers(dask_cluster, tmp_path, monkeypatch):
    monkeypatch.setenv("DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT", "3s")
    running = start(*RUN, f"--scheduler={dask_cluster.address}", cwd=tmp_path)
    assert "has no workers yet; waiting" in running.stderr.readline()
    end_hard(dask_cluster.scheduler)
    said = running.communicate(timeout=100)[1]
    assert running.returncode == 1
    assert said == f"cnn_vis.py: error: the scheduler {dask_cluster.address} is gone\n"


@pytest.fixture
def silent_port():
    """The address of something that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"tcp://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:9", "nonsense://1:2", "127.0.0.1", "silent"])
def test_without_a_scheduler_there_is_one_line(address, silent_port, tmp_path):
    address = silent_port if address == "silent" else address
    done = run_cli(*ONE, "--scheduler", address, cwd=tmp_path)
    assert_one_line(done, 2, f"--scheduler {address}", "dask scheduler")
    assert not os.listdir(tmp_path)


def test_without_dask_there_is_one_line(tmp_path):
    (tmp_path / "distributed.py").write_text("import nosuch_package")
    done = run_cli(*ONE, "--scheduler=tcp://h:1", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert_one_line(done, 2, "lacks nosuch_package", "requirements-cluster.txt")


def test_a_worker_without_caffe_is_not_used(dask_cluster, tmp_path):
    """If it is the only worker, that is an error; otherwise a notice."""
    broken = tmp_path / "broken"
    shutil.copytree(GOLDEN, broken / "caffe")
    (broken / "caffe" / "__init__.py").write_text("1 / 0")
    dask_cluster.add_worker(PYTHONPATH=f"{broken}:{ROOT}")
    cluster = f"--scheduler={dask_cluster.address}"
    done = run_cli(*ONE, cluster, cwd=tmp_path)
    assert_one_line(done, 2, "tcp://", "Caffe cannot be imported", "division by zero")
    dask_cluster.add_worker()
    dask_cluster.wait_for_workers(2)
    done = run_cli(*[word for word in ONE if word != "--quiet"], cluster, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Caffe cannot be imported" in done.stderr
    assert done.stderr.count("; this worker is not used") == 1
    assert "1 worker, 1 thread" in done.stderr


def test_a_worker_with_other_pixels_is_told_of(dask_cluster, tmp_path):
    """Here one that is made to use other matrix products, in one of Caffe's own layers."""
    if platform.machine() != "x86_64":
        pytest.skip("the matrix products named here are for x86")
    for core in ("Haswell", "Prescott"):
        dask_cluster.add_worker(OPENBLAS_CORETYPE=core)
    dask_cluster.wait_for_workers(2)
    words = [word for word in ONE if word != "--quiet" and not word.startswith("--layer")]
    words += ["--layer=classifier", f"--scheduler={dask_cluster.address}"]
    done = run_cli(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("computes slightly different pixels") == 1
    assert "pycaffe 1.0" in done.stderr


def test_a_bad_request_is_one_line(dask_cluster, tmp_path):
    dask_cluster.add_worker()
    words = [*ONE, "--layer=inception_b/outpt", f"--scheduler={dask_cluster.address}"]
    assert_one_line(run_cli(*words, cwd=tmp_path), 2, "--layer inception_b/outpt", "did you mean")


@pytest.fixture
def namespaces():
    """The names of two network namespaces, and of the links to them, behind a bridge that has the
    address 10.203.7.1."""
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("network namespaces need root and iproute2's ip")

    bridge, names = f"cv{os.getpid()}", [f"cv{os.getpid()}-{n}" for n in (2, 3)]

    def ip(words):
        subprocess.run(["ip", *words.split()], check=True)

    with contextlib.ExitStack() as stack:
        ip(f"link add {bridge} type bridge")
        stack.callback(ip, f"link del {bridge}")
        ip(f"addr add 10.203.7.1/24 dev {bridge}")
        ip(f"link set {bridge} up")
        for name in names:
            ip(f"netns add {name}")
            stack.callback(ip, f"netns del {name}")
            ip(f"link add {name} type veth peer name eth0 netns {name}")
            ip(f"link set {name} master {bridge} up")
            ip(f"-n {name} addr add 10.203.7.{name[-1]}/24 dev eth0")
            ip(f"-n {name} link set eth0 up")
            ip(f"-n {name} link set lo up")
        yield names


def test_a_machine_that_is_cut_off_does_not_matter(namespaces, whole, tmp_path):
    """Its cable is pulled amid the run: its tiles are computed elsewhere."""
    cluster = DaskCluster(tmp_path, "10.203.7.1")
    for number, name in enumerate(namespaces):
        where = {"CNN_VIS_MODELS": str(tmp_path / name)}  # no shared disk
        cluster.add_worker(2, within=["ip", "netns", "exec", name], **where)
        cluster.wait_for_workers(number + 1)
    folder = tmp_path / "run"
    folder.mkdir()
    scheduler = f"--scheduler={cluster.address}"
    running = under_way(*RUN, "--checkpoint_iter=1", scheduler, cwd=folder)
    assert running.poll() is None
    assert all(len(os.listdir(tmp_path / name / "cluster")) == 2 for name in namespaces)
    subprocess.run(["ip", "link", "set", namespaces[1], "down"], check=True)
    said = running.communicate(timeout=90)[1]
    assert running.returncode == 0, said
    assert_same_run(folder, whole[0])


@pytest.mark.skipif(not shutil.which("openssl"), reason="makes certificates with openssl")
def test_encryption_is_dasks_configuration(tmp_path, monkeypatch):
    words = "req -x509 -newkey rsa:2048 -nodes -keyout key.pem -out cert.pem -days 2 -subj /CN=cnn"
    subprocess.run(["openssl", *words.split()], cwd=tmp_path, check=True, capture_output=True)
    tls = "DASK_DISTRIBUTED__COMM__TLS"
    configuration = {"DASK_DISTRIBUTED__COMM__REQUIRE_ENCRYPTION": "True"}
    configuration[f"{tls}__CA_FILE"] = str(tmp_path / "cert.pem")
    for who in ("SCHEDULER", "WORKER", "CLIENT"):
        configuration[f"{tls}__{who}__CERT"] = str(tmp_path / "cert.pem")
        configuration[f"{tls}__{who}__KEY"] = str(tmp_path / "key.pem")
    (tmp_path / "dask").mkdir()
    cluster = DaskCluster(tmp_path / "dask", "tls://127.0.0.1", **configuration)
    cluster.add_worker()
    assert cluster.address.startswith("tls://")
    words = [*ONE, f"--scheduler={cluster.address}"]
    assert run_cli(*words, cwd=tmp_path, **configuration).returncode == 0
    assert_one_line(run_cli(*words, cwd=tmp_path), 2, "no scheduler answers", "TLS")


def test_a_damaged_file_of_the_cache_is_sent_again(dask_cluster, tmp_path):
    dask_cluster.add_worker()
    cluster = f"--scheduler={dask_cluster.address}"
    assert run_cli(*ONE, cluster, cwd=tmp_path).returncode == 0
    for path in (dask_cluster.folder / "cache/cluster").iterdir():
        path.write_bytes(path.read_bytes()[:-5])
    done = run_cli(*ONE, cluster, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_machines_may_share_a_cache(dask_cluster, tmp_path, monkeypatch):
    """As where homes are on one server: here two host names, and a file of many parts."""
    if os.geteuid() or not shutil.which("unshare"):
        pytest.skip("another host name needs root and util-linux's unshare")
    name = ["unshare", "--uts", "sh", "-c", 'hostname other; exec "$@"', "sh"]
    dask_cluster.add_worker()
    dask_cluster.add_worker(within=name)
    dask_cluster.wait_for_workers(2)
    monkeypatch.setattr(Crew, "PART", 2048)
    with Cluster(*WORK, dask_cluster.address) as engine:
        engine.describe()
        assert not engine.notices
        assert "2 workers" in engine.device
    assert len(os.listdir(dask_cluster.folder / "cache/cluster")) == 2


def test_another_scheduler_at_the_same_address_is_used(dask_cluster, whole, tmp_path):
    """The scheduler is restarted amid the run, and its workers with it."""
    dask_cluster.add_worker()
    cluster = f"--scheduler={dask_cluster.address}"
    running = under_way(*RUN, "--checkpoint_iter=1", cluster, cwd=tmp_path)
    dask_cluster.restart()
    said = running.communicate(timeout=90)[1]
    assert running.returncode == 0, said
    assert_same_run(tmp_path, whole[0])


def test_from_python_where_a_loop_is_running(dask_cluster, tmp_path):
    dask_cluster.add_worker()
    words = {word.partition("=")[0][2:]: word.partition("=")[2] or True for word in ONE}
    done = run_script(
        f"""
import asyncio, cnn_vis

async def main():
    for progress in cnn_vis.dream(scheduler="{dask_cluster.address}", **{words}):
        print(progress)

if __name__ == "__main__":
    asyncio.run(main())
""",
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "step 1 of 1" in done.stdout


def test_a_silent_loan_ends_and_another_follows(dask_cluster):
    """When a run falls silent, its Caffe processes end; if it continues, it gets new ones."""
    worker = dask_cluster.add_worker()
    with Cluster(*WORK, dask_cluster.address) as engine:
        engine.describe()
        (server,) = [pid for pid in workers(worker.pid) if workers(pid)]
        shorten = "from cnn_vis_lib.dask_worker import Loan; Loan.SILENCE = 0.5"
        engine._crew.client.run(exec, shorten)
        tile = np.zeros((3, 32, 32), np.float32)
        first = engine.receive(engine.send([tile]))
        wait_for(lambda: not workers(server), 60)
        ((gradient, _),) = engine.receive(engine.send([tile]))
        assert gradient.tobytes() == first[0][0].tobytes()
        assert workers(server)


def test_a_worker_that_cannot_keep_files_is_not_used(dask_cluster, tmp_path):
    dask_cluster.add_worker(within=["bash", "-c", 'ulimit -f 20; exec "$@"', "bash"])
    cluster = f"--scheduler={dask_cluster.address}"
    done = run_cli(*ONE, cluster, cwd=tmp_path)
    assert done.returncode in (1, 2)
    assert len(done.stderr.splitlines()) == 1
    assert "worker tcp://" in done.stderr
    dask_cluster.add_worker()
    dask_cluster.wait_for_workers(2)
    assert run_cli(*ONE, cluster, cwd=tmp_path).returncode == 0
