"""Several pictures on a Dask cluster of real processes: each is made by one thread of a worker."""

import os
import signal
import subprocess
import time

import pytest
from conftest import (
    CARD,
    TINY,
    DaskCluster,
    assert_one_line,
    kill_workers,
    run_cli,
    start,
    wait_for,
    wait_for_line,
    workers,
)
from PIL import Image
from test_cluster import end_hard, namespaces  # noqa: F401, a fixture
from test_makers import assert_same_files

from cnn_vis_lib.records import read_record

LAYER = "--layer=inception_a/output"
DREAM = [*TINY, "--learning_rate=4", "--iter_behavior=none", "--image=in", LAYER]
LONG = [*DREAM, "--num_steps=400"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder with six pictures in in/, and what becomes of them on this machine in whole/."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "in").mkdir()
    for number in range(6):
        CARD.rotate(50 * number).resize((70 + 9 * number, 60)).save(folder / f"in/{number}.png")
    assert run_cli(*LONG, "--output=whole/", cwd=folder).returncode == 0
    return folder


@pytest.fixture
def folder(pictures, tmp_path):
    """A folder with the same pictures in in/."""
    (tmp_path / "in").symlink_to(pictures / "in")
    return tmp_path


def test_a_cluster_makes_the_same_pictures(dask_cluster, folder):
    """With all files that a run writes, and with records of the command as it was typed."""
    for threads in (1, 2):
        dask_cluster.add_worker(threads)
    dask_cluster.wait_for_workers(2)
    CARD.save(folder / "guide.png")
    words = [*DREAM, "--layer=pool1/norm1:strong2", "--num_steps=4", "--guide=guide.png"]
    words += ["--iter_behavior=save+gif+print", "--output_iter=2", "--use_pixel_learning_rates"]
    for name, more in {"a": [], "b": [f"--scheduler={dask_cluster.address}"]}.items():
        (folder / name).mkdir()
        out = [f"--output={name}/{{name}}_{{layer}}.jpg", f"--stats={name}/{{layer}}{{name}}.csv"]
        done = run_cli(*words, *out, *more, cwd=folder)
        assert done.returncode == 0, done.stderr
    assert_same_files(folder / "b", folder / "a")
    assert f"{dask_cluster.address}, 2 workers, 3 threads" in done.stderr
    assert done.stderr.count(": done in") == 12
    assert "cnn-vis-" not in done.stderr  # a folder there
    records = [read_record(str(folder / f"{n}/3_pool1-norm1-strong2.jpg"))[0] for n in "ab"]
    commands = [record["command"].replace("=b/", "=a/") for record in records]
    assert commands[0] == commands[1]
    assert records[0]["inputs"] == records[1]["inputs"]
    again = run_cli(*words, *out, *more, cwd=folder)
    assert "12 of 12 pictures are there already" in again.stderr
    assert not [line for line in dask_cluster.logs().splitlines() if "ERROR" in line]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_all_that_are_under_way(signum, dask_cluster, pictures, folder):
    """The same command goes on, there or here."""
    dask_cluster.add_worker(2)
    words = [*LONG, "--output=out/"]
    scheduler = f"--scheduler={dask_cluster.address}"
    running = start(*words, scheduler, cwd=folder)
    wait_for_line(running, "picture 3 of 6")
    time.sleep(0.5)
    running.send_signal(signum)
    said = running.communicate(timeout=60)[1]
    assert running.returncode == 128 + signum, said
    assert "of 6 pictures are done; run the same command again" in said
    saved = [name for name in os.listdir(folder / "out") if name.endswith(".checkpoint")]
    assert saved
    done = run_cli(*words, *([scheduler] if signum == signal.SIGINT else []), cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("goes on after") == len(saved)
    assert "was kept" not in done.stderr
    assert_same_files(folder / "out", pictures / "whole")


def test_pictures_of_a_lost_worker_are_made_by_another(dask_cluster, pictures, folder):
    """From the last checkpoint that came back."""
    worker = dask_cluster.add_worker(2)
    words = [*LONG, "--checkpoint_iter=1", "--output=out/", f"--scheduler={dask_cluster.address}"]
    code = (
        "import sys; from cnn_vis_lib.cluster_batch import ClusterMakers as C; "
        "C.SECONDS_AT_RISK = 0; import cnn_vis; sys.exit(cnn_vis.main(sys.argv[1:]))"
    )
    running = start(*words, cwd=folder, code=code)
    wait_for(lambda: any("checkpoint" in name for name in os.listdir(folder / "out"))
             if (folder / "out").exists() else False, 60)  # fmt: skip
    end_hard(worker)
    dask_cluster.add_worker()
    said = running.communicate(timeout=90)[1]
    assert running.returncode == 0, said
    assert "goes on after" in said
    assert_same_files(folder / "out", pictures / "whole")


def test_a_maker_that_is_killed_is_replaced(dask_cluster, pictures, folder):
    worker = dask_cluster.add_worker(2)
    running = start(
        *LONG, "--output=out/", f"--scheduler={dask_cluster.address}", cwd=folder
    )  # fmt: skip
    wait_for_line(running, "picture 3 of 6")
    (server,) = [pid for pid in workers(worker.pid) if workers(pid)]
    assert kill_workers(server, 1)
    said = running.communicate(timeout=60)[1]
    assert running.returncode == 0, said
    assert_same_files(folder / "out", pictures / "whole")


def test_the_makers_of_a_killed_run_stop(dask_cluster, folder):
    """Even in the middle of a picture that nobody waits for."""
    worker = dask_cluster.add_worker(2)
    words = [*DREAM, "--num_steps=1000000", "--output=out/"]
    running = start(*words, f"--scheduler={dask_cluster.address}", cwd=folder)
    wait_for_line(running, "picture 2 of 6")
    (server,) = [pid for pid in workers(worker.pid) if workers(pid)]
    makers = set(workers(server))
    end_hard(running)
    wait_for(lambda: makers.isdisjoint(workers(server)), 30)  # idle ones have replaced them
    done = run_cli(*words, "--num_steps=2", f"--scheduler={dask_cluster.address}", cwd=folder)
    assert done.returncode == 0, done.stderr


def test_a_machine_that_is_cut_off_does_not_matter(namespaces, pictures, folder, tmp_path):  # noqa: F811
    cluster = DaskCluster(tmp_path, "10.203.7.1")
    for number, name in enumerate(namespaces):
        where = {"CNN_VIS_MODELS": str(tmp_path / name)}  # no shared disk
        cluster.add_worker(2, within=["ip", "netns", "exec", name], **where)
        cluster.wait_for_workers(number + 1)
    running = start(*LONG, "--output=out/", f"--scheduler={cluster.address}", cwd=folder)
    wait_for_line(running, "picture 4 of 6")
    subprocess.run(["ip", "link", "set", namespaces[1], "down"], check=True)
    said = running.communicate(timeout=100)[1]
    assert running.returncode == 0, said
    assert_same_files(folder / "out", pictures / "whole")


def test_a_scheduler_that_is_restarted_gets_the_rest(dask_cluster, pictures, folder):
    dask_cluster.add_worker()
    running = start(*LONG, "--output=out/", f"--scheduler={dask_cluster.address}", cwd=folder)
    wait_for_line(running, "picture 3 of 6")
    dask_cluster.restart()
    said = running.communicate(timeout=90)[1]
    assert running.returncode == 0, said
    assert_same_files(folder / "out", pictures / "whole")


def test_a_scheduler_that_is_gone_leaves_what_is_finished(
    dask_cluster, pictures, folder, monkeypatch
):
    monkeypatch.setenv("DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT", "3s")  # until it gives up
    dask_cluster.add_worker()
    words = [*LONG, "--output=out/"]
    running = start(*words, f"--scheduler={dask_cluster.address}", cwd=folder)
    wait_for_line(running, "picture 3 of 6")
    end_hard(dask_cluster.scheduler)
    said = running.communicate(timeout=100)[1]
    assert running.returncode == 1
    assert f"the scheduler {dask_cluster.address} is gone" in said.splitlines()[-1]
    made = [name for name in os.listdir(folder / "out") if name.endswith(".png")]
    assert made
    done = run_cli(*words, cwd=folder)
    assert f"{len(made)} of 6 pictures are there already" in done.stderr
    assert_same_files(folder / "out", pictures / "whole")


def test_errors_are_told_as_on_one_machine(dask_cluster, folder):
    dask_cluster.add_worker()
    (folder / "in").unlink()
    (folder / "in").mkdir()
    for name in "ab":
        CARD.save(folder / f"in/{name}.png")
    (folder / "in/a.png").write_bytes((folder / "in/a.png").read_bytes()[:900])  # breaks off
    CARD.resize((20, 20)).save(folder / "in/small.png")
    words = [*DREAM, "--num_steps=2", "--output=out/", f"--scheduler={dask_cluster.address}"]
    done = run_cli(*words, "--quiet", cwd=folder)
    assert done.returncode == 1
    assert "out/small_inception_a-output.png: --initial_size unset: 20x20 is smaller" in done.stderr
    assert "of 3 pictures could not be made" in done.stderr
    wrong = run_cli(*words, "--image_type=amplify_neuron", "--target_neuron=99", cwd=folder)
    assert_one_line(wrong, 2, "--target_neuron 99", "18 channels")


def test_a_guide_or_a_finished_picture_is_not_overwritten(dask_cluster, folder):
    dask_cluster.add_worker(2)
    scheduler = f"--scheduler={dask_cluster.address}"
    (folder / "out").mkdir()
    CARD.save(folder / "out/2.png")
    words = [*DREAM, "--num_steps=2", "--output=out/{name}.png", scheduler]
    done = run_cli(*words, "--guide=out/2.png", cwd=folder)
    assert done.returncode == 1
    assert "the run would overwrite --guide out/2.png" in done.stderr
    assert Image.open(folder / "out/2.png").size == CARD.size
    hidden = [*DREAM, "--num_steps=2", "--output=out/.{name}.png", scheduler]
    assert run_cli(*hidden, cwd=folder).returncode == 0
    finished = (folder / "out/.0.png").read_bytes()
    running = start(*hidden, "--num_steps=100000", cwd=folder)
    wait_for_line(running, "picture 2 of 6")
    time.sleep(1)
    running.send_signal(signal.SIGINT)
    said = running.communicate(timeout=60)[1]
    assert running.returncode == 130, said
    assert (folder / "out/.0.png.checkpoint").exists()
    assert (folder / "out/.0.png").read_bytes() == finished


def test_few_large_pictures_are_computed_by_tiles(dask_cluster, tmp_path):
    """As one picture is: all workers compute tiles of it."""
    dask_cluster.add_worker(3)
    dask_cluster.wait_for_workers(1)
    (tmp_path / "in").mkdir()
    for name in "ab":
        CARD.resize((700, 700)).save(tmp_path / f"in/{name}.png")
    words = [*DREAM, "--num_steps=1", "--output=out/", f"--scheduler={dask_cluster.address}"]
    done = run_cli(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "'on_makers'" not in dask_cluster.logs()
    assert [line for line in done.stderr.splitlines() if "picture 1 of 2, network" in line]
