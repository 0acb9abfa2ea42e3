"""How busy the workers of a Dask cluster are with a batch: they sleep instead of making pictures,
and all else is real, on loopback.

    python tests/cluster_occupancy.py [WORKERS [PICTURES [SECONDS [KILOBYTES]]]]

Prints the share of the time that the workers are busy, and what the scheduler and this process
take.
"""

import argparse
import asyncio
import logging
import os
import subprocess
import sys
import tempfile
import time

import numpy as np

ROOT = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "tests")]

EACH = 25  # workers in a process


def sleeping(run, task, spec, _, *arguments):
    """What on_makers is in a real worker."""
    if task == "examine":
        return True, ({"tile_size": (224, 224), "shapes": {}, "notices": []}, "", "")
    _, parcel, _ = arguments
    time.sleep(float(os.environ["SLEEP_SECONDS"]))
    name = os.path.basename(parcel.options.output_file)
    return True, (True, {"output_file": {name: parcel.pictures["initial_image"]}})


async def host(address, number):
    """The life of a process with so many workers."""
    from distributed import Worker

    logging.disable()
    workers = [await Worker(address, nthreads=1, dashboard=False) for _ in range(number)]
    await asyncio.gather(*(worker.finished() for worker in workers))


def usage(pid):
    """(CPU seconds, resident MB) of a process so far."""
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    with open(f"/proc/{pid}/statm") as file:
        pages = int(file.read().split()[1])
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"), pages * 4096 / 1e6


class Unstopped:
    """Signals that never come."""

    signum = None

    def hold(self, held=True):
        pass


def measure(workers=200, pictures=2000, seconds=2.0, kilobytes=100):
    """Prints how a batch of so many pictures of so many kilobytes, `seconds` each, goes."""
    import cluster_occupancy

    import cnn_vis  # noqa: F401, fills PARSER
    from cnn_vis_lib import cluster_batch
    from cnn_vis_lib.cluster import connect
    from cnn_vis_lib.find_network import find_network
    from cnn_vis_lib.options import PARSER
    from cnn_vis_lib.run import Batch

    environment = os.environ | {"SLEEP_SECONDS": str(seconds), "PYTHONPATH": f"{ROOT}:{ROOT}/tests"}
    with tempfile.TemporaryDirectory() as folder:
        environment["CNN_VIS_MODELS"] = f"{folder}/cache"
        words = ["-m", "dask", "scheduler", "--no-dashboard", "--port=0", "--host=127.0.0.1"]
        words += [f"--scheduler-file={folder}/file"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": environment}
        scheduler = subprocess.Popen([sys.executable, *words], **quiet)
        started = [scheduler]
        while not os.path.exists(f"{folder}/file"):
            time.sleep(0.1)
        time.sleep(0.5)
        from distributed import Client

        address = Client(scheduler_file=f"{folder}/file").scheduler.address
        for first in range(0, workers, EACH):
            number = str(min(EACH, workers - first))
            script = os.path.realpath(__file__)
            started.append(
                subprocess.Popen([sys.executable, script, "--host", address, number], **quiet)
            )
        with open(f"{folder}/a.png", "wb") as file:
            file.write(np.random.default_rng(0).bytes(1000 * kilobytes))
        jobs = []
        for number in range(pictures):
            out = f"--output={folder}/out{number}.png"
            jobs.append(PARSER.parse_args(["--layer=inception_4c/output", "--gpu=-1", out]))
            jobs[-1].initial_image, jobs[-1].scheduler = f"{folder}/a.png", address
        try:
            client = connect(address)
            while len(client.nthreads()) < workers:
                time.sleep(0.2)
            cluster_batch.on_makers = cluster_occupancy.sleeping
            batch = Batch(pictures)
            makers = cluster_batch.ClusterMakers(client, jobs[0], batch, find_network(jobs[0]))
            with makers:
                makers._crew.start()
                while makers._crew.pending():
                    time.sleep(0.1)
                makers._crew.start = lambda: None
                begun, before = time.monotonic(), [usage(p) for p in (scheduler.pid, os.getpid())]
                errors = list(makers.failures(jobs, Unstopped(), None))
                passed = time.monotonic() - begun
                after = [usage(p) for p in (scheduler.pid, os.getpid())]
            assert not errors and len(batch.made) == pictures, errors[:1]
        finally:
            for process in started:
                process.kill()
    busy = pictures * seconds / workers / passed
    print(f"{workers} workers, {pictures} pictures of {kilobytes} kB, {seconds:g} s each:")
    print(f"{passed:.1f} s, workers busy {busy:.0%}")
    for name, a, b in zip(("scheduler", "main process"), before, after):
        print(f"{name}: {1000 * (b[0] - a[0]) / pictures:.1f} ms a picture, {b[1]:.0f} MB")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--host"]:
        asyncio.run(host(sys.argv[2], int(sys.argv[3])))
    else:
        parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
        for name, kind in {"workers": int, "pictures": int, "seconds": float, "kB": int}.items():
            parser.add_argument(name, type=kind, nargs="?")
        given = [value for value in vars(parser.parse_args()).values() if value is not None]
        measure(*given)
