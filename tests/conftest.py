"""What the tests share: where things lie, and the command line run as a user runs it."""

import contextlib
import glob
import io
import json
import os
import pathlib
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback

import numpy as np
import pytest
from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
sys.path.insert(0, str(ROOT))

import cnn_vis  # noqa: E402
import cnn_vis_lib.processes  # noqa: E402
from cnn_vis_lib.engines import Engines  # noqa: E402
from cnn_vis_lib.errors import Stopped  # noqa: E402
from cnn_vis_lib.network import Network, NetworkSpec  # noqa: E402
from cnn_vis_lib.processes import CaffeProcesses, WorkerDied  # noqa: E402
from cnn_vis_lib.workers import Workers, compute_batch  # noqa: E402

TINY = [
    f"--deploy_txt={GOLDEN}/deploy.prototxt",
    f"--caffe_model={GOLDEN}/tiny_inception.caffemodel",
    f"--mean_image={GOLDEN}/mean.npy",
    "--gpu=-1",
]


# Caffe for emulated GPUs (cuda_on_cpu/README.md), and the environment that finds it.
CUDA_ON_CPU = pathlib.Path(sys.prefix) / "cuda_on_cpu"
EMULATION = {
    "PYTHONPATH": str(CUDA_ON_CPU),
    "LD_LIBRARY_PATH": str(CUDA_ON_CPU / "caffe" / "driver"),
}


def words_of(arguments):
    """The arguments as words. A test's own --layer or --image replaces an earlier one, of QUICK,
    say, unless --output names several pictures."""
    words = [*map(str, arguments)]
    outputs = [word for word in words if word.startswith("--output=")]
    if outputs and re.search("/$|{", outputs[-1]):
        return words
    for option in ("--(target_)?layer=", "--(initial_)?image="):
        *earlier, _ = [i for i, word in enumerate(words) if re.match(option, word)] or [None]
        words = [word for i, word in enumerate(words) if i not in earlier]
    return words


def run_process(*arguments, cwd, timeout=110, limit=None, **environment):
    """Runs the script in a separate process, in this environment with changes (None removes a
    variable) and with a `limit`, as for ulimit; returns the finished process with its stdout and
    stderr as text."""
    environment = {
        name: value for name, value in (os.environ | environment).items() if value is not None
    }
    limited = ["bash", "-c", f'ulimit {limit}; exec "$@"', "bash"] if limit else []
    return subprocess.run(
        [*limited, sys.executable, str(ROOT / "cnn_vis.py"), *words_of(arguments)],
        cwd=cwd,
        timeout=timeout,
        capture_output=True,
        text=True,
        env=environment,
        stdin=subprocess.DEVNULL,
    )


def run_cli(*arguments, cwd, **more):
    """The same, in this process, which takes a thirtieth of the time: `main`, with workers that go
    on to the next run. With pytest's option --real, or a timeout or environment, it is
    run_process."""
    if IS_REAL_RUN or more:
        return run_process(*arguments, cwd=cwd, **more)
    arguments, before = words_of(arguments), os.getcwd()
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
    os.chdir(cwd)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                status = cnn_vis.main(arguments)
            except SystemExit as end:  # --help
                status = end.code or 0
            except BaseException:
                traceback.print_exc()
                status = 1
    finally:
        os.chdir(before)
    texts = [stream.buffer.getvalue().decode() for stream in (out, err)]
    return subprocess.CompletedProcess(["cnn_vis.py", *arguments], status, *texts)


IS_REAL_RUN = False
# A worker that goes on to another run is in its folder, and forgets files that may have changed.
GO_ON = (
    "import os; from cnn_vis_lib import network, workers; os.chdir({!r}); "
    "network.kept_network.clear(); workers.prepared.cache_clear()"
)


class KeptEngines(Engines):
    """Engines whose processes on the CPU go on to the next run in this process."""

    kept = {}

    def get(self, spec, objective):
        is_plain = self.options.gpu == [] and not self.options.scheduler
        if self._engine is None and is_plain and self.options.workers in self.kept:
            engine = self._engine = self.kept.pop(self.options.workers)
            processes = engine.processes
            wait_for(lambda: processes._idle.qsize() == processes.number)
            try:
                processes.on_each(exec, GO_ON.format(os.getcwd()))
                engine.change(spec, objective)
                return engine
            except WorkerDied:
                self.end(at_once=True)
        return super().get(spec, objective)

    def __exit__(self, kind, *_):
        engine = self._engine
        is_plain = isinstance(engine, Workers) and not engine.gpus and not engine._jobs
        if is_plain and kind in (None, cnn_vis.BadRequest):
            self.kept[self.options.workers], self._engine = engine, None
        self.end(kind is Stopped)


KEPT_PROCESSES = []


@contextlib.contextmanager
def kept_processes():
    """CaffeProcesses that go on to the next task of in_a_worker."""
    processes = KEPT_PROCESSES.pop() if KEPT_PROCESSES else CaffeProcesses()
    try:
        processes.restarts = 0
        processes.call(exec, GO_ON.format(os.getcwd()))
        yield processes
    except (cnn_vis.RunFailed, Stopped):
        processes.end(at_once=True)
        raise
    except BaseException:
        KEPT_PROCESSES.append(processes)
        raise
    KEPT_PROCESSES.append(processes)


def pytest_addoption(parser):
    parser.addoption("--real", action="store_true", help="run the program in processes of its own")
    parser.addoption("--times", metavar="CSV", help="write each test's seconds and CPU seconds")


# The tests that start many processes of the program, or other programs.
SLOW = (
    "batch",
    "cluster",
    "cluster_batch",
    "commands",
    "engines",
    "examples",
    "files",
    "gpu",
    "gpu_makers",
)
SLOW += ("install", "makers", "models", "network", "readme", "run", "video", "watchers", "web")


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.stem.removeprefix("test_") in SLOW:
            item.add_marker("slow")


def pytest_configure(config):
    global IS_REAL_RUN
    IS_REAL_RUN = config.getoption("--real")
    cnn_vis.Engines, cnn_vis_lib.processes.CaffeProcesses = KeptEngines, kept_processes


def pytest_unconfigure():
    while KEPT_PROCESSES:
        KEPT_PROCESSES.pop().end()
    while KeptEngines.kept:
        KeptEngines.kept.popitem()[1].end()


def cpu_seconds():
    """CPU seconds of this process and its finished children."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(each.ru_utime + each.ru_stime for each in used)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    path, begun, used = item.config.getoption("--times"), time.monotonic(), cpu_seconds()
    found = yield
    if path:
        with open(path, "a") as file:
            seconds = time.monotonic() - begun
            file.write(f"{seconds:.2f},{cpu_seconds() - used:.2f},{item.nodeid}\n")
    return found


def run_script(code, cwd):
    """Runs Python code that imports the program as a library, as a script of its own."""
    (cwd / "script.py").write_text(code)
    return subprocess.run(
        [sys.executable, "script.py"],
        cwd=cwd, timeout=100, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def psnr(a, b):
    """Peak signal-to-noise ratio of two 8-bit picture files, in dB; infinite where they are
    equal."""
    a, b = (np.asarray(Image.open(path)).astype(float) for path in (a, b))
    assert a.shape == b.shape
    error = ((a - b) ** 2).mean()
    return 10 * np.log10(255**2 / error) if error else np.inf


def assert_one_line(process, status, *words):
    """Asserts that the process ended with `status` and one line on stderr that contains all
    `words`."""
    assert process.returncode == status, process.stderr
    lines = process.stderr.splitlines()
    assert len(lines) == 1, process.stderr
    assert lines[0].startswith("cnn_vis.py: error: ")
    for word in words:
        assert word in lines[0], lines[0]


@pytest.fixture(scope="session")
def photographs(tmp_path_factory):
    """A folder with scikit-image's chelsea.png and coffee.png, and in.jpg of 640x427 pixels."""
    import skimage.data

    folder = tmp_path_factory.mktemp("photographs")
    for name in ("chelsea", "coffee"):
        Image.fromarray(getattr(skimage.data, name)()).save(folder / f"{name}.png")
    Image.fromarray(skimage.data.coffee()).resize((640, 427)).save(folder / "in.jpg", quality=95)
    return folder


QUICK = [*TINY, "--layer=inception_a/output", "--num_steps=2", "--workers=1"]


ONE = [
    *TINY,
    "--layer=inception_a/output",
    "--num_steps=1",
    "--initial_size=32x32",
    "--seed=1",
    "--workers=1",
    "--quiet",
    "--iter_behavior=none",
]


# Two sizes, odd caches and schedules, statistics: a run in which everything that a checkpoint holds
# matters.
RUN = [
    *TINY,
    "--layer=inception_a/output",
    "--workers=1",
    "--initialization_scale=20",
    "--seed=5",
    "--initial_size=40x50",
    "--final_size=64x96",
    "--num_sizes=2",
    "--num_steps=60",
    "--learning_rate_decay_iter=7",
    "--learning_rate_decay_fraction=0.9",
    "--tv_reg=0.01",
    "--tv_reg_step=0.01",
    "--tv_reg_step_iter=9",
    "--p_reg=1e-9",
    "--stats=stats.csv",
    "--iter_behavior=gif",
]


CHECKPOINT = "out.png.checkpoint"


CARD = Image.fromarray(np.random.RandomState(3).randint(0, 256, (40, 50, 3), np.uint8)).resize(
    (200, 160)
)


def start(*arguments, cwd, code=None):
    """Starts the program, or Python code that calls it, as a session leader and returns the
    process, which is killed when the test ends. SIGHUP has its default effect, even if the tests
    run under nohup."""
    before = f"import sys; sys.path.insert(0, {str(ROOT)!r}); "
    program = ["-c", before + code] if code else [str(ROOT / "cnn_vis.py")]
    running = subprocess.Popen(
        [sys.executable, *program, *words_of(arguments)],
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    )
    STARTED.append(running)
    return running


def wait_for_line(running, text):
    """Reads what a started program prints on stderr, up to a line with the text."""
    line = ""
    while text not in line:
        line = running.stderr.readline()
        assert line, f"it ended without a line with {text!r}"


# Otherwise, programs that tests start would compile the program each time, and start threads that
# they do not need: a third of the time of a start.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
os.environ["OPENBLAS_NUM_THREADS"] = "1"

# Programs that tests start would inherit that Ctrl-C is ignored in the background of a script.
signal.signal(signal.SIGINT, signal.default_int_handler)
STARTED = []


@pytest.fixture(autouse=True)
def _no_run_outlives_its_test():
    yield
    while STARTED:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(STARTED.pop().pid, signal.SIGKILL)


def under_way(*arguments, cwd):
    """As start, once there is a checkpoint."""
    running = start(*arguments, cwd=cwd)
    wait_for((cwd / CHECKPOINT).exists)
    return running


def descendants(pid):
    """The pids of all processes below `pid`."""
    children = []
    for path in glob.glob(f"/proc/{pid}/task/*/children"):  # of each thread
        with contextlib.suppress(OSError), open(path) as file:
            children += map(int, file.read().split())
    return children + [pid for child in children for pid in descendants(child)]


def workers(pid):
    """The pids of the worker processes of a run."""
    found = []
    for child in descendants(pid):
        with contextlib.suppress(OSError), open(f"/proc/{child}/cmdline") as file:
            if re.search("cnn_vis|spawn_main", file.read().partition("\0-c")[2]):  # ours; Dask's
                found.append(child)
    return found


def kill_workers(pid, number=None):
    """Kills the workers of a run, or `number` of them; returns how many were there to be killed."""
    killed = 0
    for worker in workers(pid)[:number]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker, signal.SIGKILL)
            killed += 1
    return killed


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
    raise AssertionError("timed out")


def free_port():
    """A port that nothing listens at."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def shared_memory(pid):
    """The paths of the named shared memory that the processes of a run have mapped, which would be
    left behind if they were killed."""
    paths = set()
    for one in (pid, *descendants(pid)):
        with contextlib.suppress(OSError), open(f"/proc/{one}/maps") as file:
            paths.update(re.findall(r"/dev/shm/\S+$", file.read(), re.MULTILINE))  # not "(deleted)"
    return paths


def pixels(path):
    return np.asarray(Image.open(path))


def encoded(picture, form, **options):
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


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


def assert_same_run(folder, whole):
    """Asserts that picture, statistics and animation equal those of the uninterrupted run, and that
    no checkpoint is left."""
    assert np.array_equal(pixels(folder / "out.png"), pixels(whole / "out.png"))
    assert (folder / "stats.csv").read_text() == (whole / "stats.csv").read_text()
    assert (folder / "out_run.gif").read_bytes() == (whole / "out_run.gif").read_bytes()
    assert sorted(os.listdir(folder)) == ["out.png", "out_run.gif", "stats.csv"]


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """The folder of RUN left alone, and how long it took."""
    folder = tmp_path_factory.mktemp("whole")
    begun = time.monotonic()
    done = run_process(*RUN, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(folder)) == ["out.png", "out_run.gif", "stats.csv"]
    return folder, time.monotonic() - begun


class Ascent:
    """A Network and an Objective, prepared for each other as in a worker."""

    def __init__(self, files, *targets, **spec):
        objective = cnn_vis.Objective(targets)
        layer = objective.caffe_layer()
        self.spec = NetworkSpec(files, objective.layers(), objective=layer, **spec)
        self.network = Network(self.spec)
        self.objective = objective.prepared(self.network)
        self.tile_size = self.network.tile_size

    def activations(self, batch):
        """{layer: activations} of the tiles."""
        self.network.forward(batch)
        return self.network.activations()

    def gradients(self, batch, measure=True):
        """(gradient, losses) of the tiles."""
        return compute_batch(self.network, self.objective, batch, measure)


@pytest.fixture
def picture(tmp_path):
    return shutil.copy(GOLDEN / "input.png", tmp_path / "in.png")


class DaskCluster:
    """A Dask scheduler and workers, started as its documentation says."""

    def __init__(self, folder, host="127.0.0.1", **environment):
        self.folder, self.workers = folder, []
        self.environment = environment | {
            "DASK_DISTRIBUTED__COMM__TIMEOUTS__TCP": "12s",
            "PYTHONPATH": str(ROOT),  # where the program is installed
        }
        self.host = host
        self.start_scheduler()

    def start_scheduler(self, port=0):
        """Starts the scheduler; `address` is its address."""
        file = self.folder / "scheduler.json"
        file.unlink(missing_ok=True)
        words = [f"--host={self.host}", f"--port={port}", "--no-dashboard"]
        self.scheduler = self._start("scheduler", *words, f"--scheduler-file={file}")
        wait_for(lambda: file.exists() and file.read_text().endswith("}"))
        self.address = json.loads(file.read_text())["address"]

    def _start(self, *words, within=(), **environment):
        path = self.folder / f"{words[0]}{len(STARTED)}.log"
        with open(path, "wb") as log:
            running = subprocess.Popen(
                [*within, sys.executable, "-m", "dask", *words],
                cwd=self.folder,
                env=os.environ | self.environment | environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        STARTED.append(running)
        running.log = path
        return running

    def restart(self):
        """Kills the scheduler and all workers, and starts a scheduler at the same address, and a
        worker."""
        for process in [*self.workers, self.scheduler]:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self.start_scheduler(self.address.rpartition(":")[2])
        self.add_worker()

    def wait_for_workers(self, number):
        """Waits until `number` workers have registered with the scheduler."""

        def registered():
            return sum("Registered to" in worker.log.read_text() for worker in self.workers)

        wait_for(lambda: registered() == number, 60)

    def add_worker(self, threads=1, *words, **environment):
        """Starts a worker, `within` a command if one is given; one machine's workers share a cache,
        as CNN_VIS_MODELS says."""
        environment = {"CNN_VIS_MODELS": str(self.folder / "cache")} | environment
        folder = f"--local-directory={self.folder}/worker{len(self.workers)}"
        words = [self.address, f"--nthreads={threads}", "--no-dashboard", folder, *words]
        self.workers.append(self._start("worker", *words, **environment))
        return self.workers[-1]

    def logs(self):
        """All that the scheduler and workers have said."""
        return "".join(path.read_text() for path in self.folder.glob("*.log"))


@pytest.fixture
def dask_cluster(tmp_path_factory):
    return DaskCluster(tmp_path_factory.mktemp("dask"))
