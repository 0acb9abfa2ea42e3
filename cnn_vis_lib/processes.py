"""Processes that run tasks with Caffe: any error in Caffe ends its process, and a process that dies
is replaced."""

import concurrent.futures
import contextlib
import math
import multiprocessing
import multiprocessing.connection
import multiprocessing.spawn
import os
import queue
import re
import resource
import select
import signal
import subprocess
import sys
import threading

from .errors import NO_MEMORY, BadRequest, OutOfMemory, RunFailed, Stopped, one_line
from .install import HERE
from .machine import ONE_THREAD, free_memory, huge_pages, visible_gpu


@contextlib.contextmanager
def signals_held_back():
    """While processes are started: holds signals back, so that they cannot interrupt the start
    halfway, and blocks Ctrl-C and hangup in the child processes, which inherit the block."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    if threading.current_thread() is not threading.main_thread():
        numbers = ()
    came = []
    before = {n: signal.signal(n, lambda signum, _: came.append(signum)) for n in numbers}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in came:
            signal.raise_signal(number)


# What a worker does first. It sees exactly the folders that the main process imports from: neither
# its main script nor, as "python -c" otherwise would, files of the current folder that are named
# like modules.
BOOTSTRAP = (
    "import sys; sys.path[:] = sys.argv[4:]; from cnn_vis_lib.processes import serve; "
    "serve(*map(int, sys.argv[1:4]))"
)


parents = []  # in a worker: the socket to the process that it works for


def report(*what):
    """In a worker, during a task: calls heed(*what) of its CaffeProcesses."""
    parents[0].send((None, what))


def serve(descriptor, parent_pid, memory):
    """The life of a worker: runs tasks that come through a socket, until None comes. A bad file
    cannot make it use more than `memory` bytes; 0: as many as it likes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    arguments = (descriptor, parent_pid)
    threading.Thread(target=end_with_parent, args=arguments, daemon=True).start()
    if memory:
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        limit = memory if hard == resource.RLIM_INFINITY else min(memory, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    parent = multiprocessing.connection.Connection(descriptor)
    parents.append(parent)
    for task, arguments in iter(parent.recv, None):
        try:
            answer = True, task(*arguments)
        except Exception as error:
            answer = False, error
        parent.send(answer)
    os._exit(0)  # Python's own end, and CUDA's, take a tenth of a second or more


def end_with_parent(descriptor, parent_pid):
    """Ends this process when the other end of its socket is closed or its parent is gone. A program
    that uses this one as a library may fork, and then its child holds that end too."""
    poll = select.poll()
    poll.register(descriptor, 0)  # reports only that it is closed
    while not poll.poll(1000) and os.getppid() == parent_pid:
        pass
    os._exit(0)


def python_command():
    """The command that runs this Python, with the options that restrict what it imports. Raises
    RunFailed."""
    flags = {
        "-I": sys.flags.isolated,
        "-E": sys.flags.ignore_environment,
        "-s": sys.flags.no_user_site,
    }
    python = multiprocessing.spawn.get_executable()
    if not python:
        problem = "this Python does not know its own program"
        raise RunFailed(f"workers cannot be started: {problem}; see multiprocessing.set_executable")
    return [os.fsdecode(python), *(flag for flag, is_set in flags.items() if is_set)]


class WorkerDied(Exception):
    """A worker's process has ended, in the middle of a task or before it."""


class Worker:
    """A process that runs tasks, one at a time; it sees one GPU, or none if `gpu` is None. Its
    output goes to the file `log`, it inherits the `shared` files, `memory` is as for `serve`, and
    `heed` is called with what it reports. Raises OSError."""

    PATIENCE = 10  # seconds that a killed process has to end

    def __init__(self, log, gpu, memory, shared=(), heed=None):
        self._owner, self.has_answered, self._heed = os.getpid(), False, heed
        self._is_lost = False  # it has been killed, but the system cannot end it
        self._connection, other_end = multiprocessing.Pipe()
        # Even on the CPU, a Caffe built with CUDA takes a few hundred MB of the first GPU it sees.
        visible = {"CUDA_VISIBLE_DEVICES": "" if gpu is None else visible_gpu(gpu)}
        numbers = map(str, (other_end.fileno(), os.getpid(), memory))
        folders = (place for place in sys.path if isinstance(place, str) and "\0" not in place)
        words = (*numbers, *folders, HERE)
        with other_end:
            self._process = subprocess.Popen(
                [*python_command(), "-c", BOOTSTRAP, *words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[other_end.fileno(), *(file.fileno() for file in shared)],
                env=os.environ | ONE_THREAD | huge_pages() | visible,
            )

    def run(self, task, *arguments):
        """Returns task(*arguments). Raises what the task raises, and WorkerDied."""
        try:
            self._connection.send((task, arguments))
            is_done, answer = self._receive()
            while is_done is None:
                self._heed(*answer)
                is_done, answer = self._receive()
        except (EOFError, OSError):
            raise WorkerDied from None
        self.has_answered = True
        if isinstance(answer, MemoryError):
            raise OutOfMemory
        if not is_done:
            raise answer
        return answer

    def _receive(self):
        while not self._connection.poll(1):
            if self._is_lost or self._process.poll() is not None:  # another process holds its end
                raise EOFError
        return self._connection.recv()

    def end(self):
        """Ends the process, which must have no task. Does nothing in a fork of its owner."""
        if self._owner != os.getpid():
            return
        with contextlib.suppress(OSError):  # it may have died
            self._connection.send(None)
        self._connection.close()
        if not self._is_lost:
            self._process.wait()

    def kill(self):
        """Kills the process; returns the exit status that it has, negative for a signal's. Does
        nothing in a fork of its owner."""
        if self._owner != os.getpid():
            return 0
        self._process.kill()
        try:
            return self._process.wait(0 if self._is_lost else self.PATIENCE)
        except subprocess.TimeoutExpired:  # it waits for a broken GPU in the driver
            self._is_lost = True
            return -signal.SIGKILL


class CaffeStopped(RunFailed):
    """Caffe ended its process; the message says why."""


class LayerFailed(CaffeStopped):
    """Caffe ended its process in a layer that it cannot run."""


class GpuFailed(RunFailed):
    """A GPU or its driver failed; the message says what to do about the `problem`."""

    def __init__(self, problem, remedy):
        super().__init__(f"{problem}; {remedy} --gpu -1 for the CPU")
        self.problem = problem


class GraphFailed(RunFailed):
    """A GPU's driver, or its libraries, cannot make a graph of a pass; the message says so."""


GPU_ERRORS = {  # by CUDA error number: the problem, and what can be done besides using the CPU
    2: ("its memory is full", "use a smaller --batch_size, another --gpu, or"),
    35: ("its driver is older than Caffe's CUDA", "update the driver, or use"),
    46: (
        "another program has it in exclusive use",
        "wait for that to end, or use another --gpu, or",
    ),
    209: ("Caffe was built for other GPUs", "rebuild it with PYCAFFE_CUDA_ARCH=native, or use"),
}


def check_log(text):
    """Raises CaffeStopped, GpuFailed or OutOfMemory if a worker's log shows that Caffe ended it."""
    if re.search(NO_MEMORY, text, re.MULTILINE):
        raise OutOfMemory
    fatal = re.search(r"^F\d{4,8} [^\]]*\] (.*)", text, re.MULTILINE)
    cuda = fatal and re.search(r"cudaSuccess \((\d+) vs\. 0\) (.*)|.*(CU\w+_STATUS_\w+)", fatal[1])
    if cuda:
        number = 2 if cuda[3] and "ALLOC" in cuda[3] else int(cuda[1] or 0)
        other = one_line(cuda[2] or cuda[3]), "if it happens again, use"
        problem, remedy = GPU_ERRORS.get(number, other)
        if text.rfind("] capturing\n") > text.rfind("] captured\n"):
            raise GraphFailed(f"passes are not CUDA graphs, which takes longer: {problem}")
        raise GpuFailed(f"the GPU failed: {problem}", remedy)
    if fatal:
        kind = LayerFailed if "Not Implemented Yet" in fatal[1] else CaffeStopped
        raise kind(f"Caffe stopped: {one_line(fatal[1])[:300]}")


@contextlib.contextmanager
def system_limits():
    """Within this context, what prevents processes or threads from starting becomes a RunFailed."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        if program := getattr(error, "filename", None):
            raise RunFailed(f"workers cannot be started: {program}: {reason}") from None
        limits = "see ulimit -n, for open files, and ulimit -u, for processes"
        raise RunFailed(f"workers cannot be started ({reason}); {limits}") from None


CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL)


class CaffeProcesses:
    """Processes that run tasks with Caffe; a context manager. There is one for each entry of
    `gpus`, in which a GPU may occur twice, or there are `number` on the CPU, which can become
    `most`. They inherit the `shared` files. If one dies, all are restarted. `prepare` is called
    whenever all start, and `heed` with what a task reports, in some thread."""

    MAX_RESTARTS = 3
    LOG_SIZE = 1 << 16  # bytes, of which the end is kept

    def __init__(self, number=1, gpus=(), shared=(), most=0, prepare=lambda: None, heed=None):
        self.number, self.gpus, self.shared, self.restarts = len(gpus) or number, gpus, shared, 0
        self.most, self._prepare, self._heed = max(self.number, most), prepare, heed
        if not os.path.isdir("/proc/self/fd"):
            raise BadRequest("Caffe's processes need /proc", "run: mount -t proc proc /proc")
        with system_limits():
            reading, writing = os.pipe()
        self._log, self._log_end = os.fdopen(reading, "rb", 0), os.fdopen(writing, "wb", 0)
        self._text = b""  # the end of what the processes have printed
        for end in (self._log, self._log_end):
            os.set_blocking(end.fileno(), False)  # a full log must not hold a worker up
        # A thread for each process waits for it: that is all it takes to see it die.
        self._threads = concurrent.futures.ThreadPoolExecutor(self.most)
        self.start()

    def start(self):
        """Starts the processes. Raises RunFailed."""
        self._prepare()
        started = self._started(self.gpus or [None] * self.number)
        # Until now, tasks find the dead ones, and fail. From now on, the one that was used last
        # comes first: its network is in the processor's cache.
        self._workers, self._idle = [], queue.LifoQueue()
        self._add(started)

    def grow(self, number):
        """Starts more processes on the CPU, up to `number`. Raises RunFailed."""
        self._add(self._started([None] * (number - self.number)))
        self.number = max(number, self.number)

    def _started(self, gpus):
        """A list of new Workers, one for each of the GPUs or None. Raises RunFailed."""
        free, started = free_memory(), []
        memory = 0 if self.gpus or not math.isfinite(free) else max(1, int(free))
        try:
            with system_limits(), signals_held_back():
                for gpu in gpus:
                    started.append(Worker(self._log_end, gpu, memory, self.shared, self._heed))
        except BaseException:
            for worker in started:
                worker.kill()
            raise
        return started

    def _add(self, workers):
        self._workers += workers
        for worker in workers:
            self._idle.put(worker)

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        self.end(kind is Stopped)

    def end(self, at_once=False):
        """Ends the processes, after the tasks that have started, or `at_once`."""
        if at_once:
            self.kill()
        self._threads.shutdown(cancel_futures=True)  # waits for tasks that have started
        for worker in self._workers:
            worker.end()
        self._log.close()
        self._log_end.close()

    def kill(self):
        """Kills the processes; returns their exit statuses."""
        return [worker.kill() for worker in self._workers]

    def submit(self, task, *arguments):
        """Submits a task; returns its future. That raises WorkerDied if the process that has the
        task dies; then call `restart`, and submit it again. Raises RunFailed."""
        if self._log.closed:
            raise RunFailed("the run has ended")
        self._read_log()  # a full pipe would take no more
        with system_limits(), signals_held_back():
            return self._threads.submit(self._run, task, *arguments)

    def _run(self, task, *arguments):
        idle = self._idle  # start() makes another one
        worker = idle.get()
        try:
            return worker.run(task, *arguments)
        finally:
            idle.put(worker)

    def on_each(self, task, *arguments):
        """The results of a task that every process runs once. No other may be under way. Raises
        what the task raises, and WorkerDied."""
        with system_limits(), signals_held_back():
            futures = [self._threads.submit(w.run, task, *arguments) for w in self._workers]
        concurrent.futures.wait(futures)
        return [future.result() for future in futures]

    def restart(self):
        """Restarts the processes after one has died. Raises what check_log raises if Caffe ended
        it, RunFailed if it could not even start, and RunFailed after too many deaths."""
        statuses, text = self.kill(), self._take_log()
        check_log(text)
        if max(statuses) >= 0 and not any(worker.has_answered for worker in self._workers):
            last = (text.strip() or f"it ended with status {max(statuses)}").splitlines()[-1]
            raise RunFailed(f"{python_command()[0]} cannot run the workers: {one_line(last)[:300]}")
        self.restarts += 1
        crash = next((signal.Signals(-s).name for s in statuses if -s in CRASHES), None)
        if self.restarts > self.MAX_RESTARTS and crash:
            raise LayerFailed(f"Caffe stopped: it crashed {self.restarts} times ({crash})")
        if self.restarts > self.MAX_RESTARTS:
            remedy = "use smaller sizes" if self.gpus else "use fewer --workers, or smaller sizes"
            raise RunFailed(
                f"workers were killed {self.restarts} times, possibly out of memory; {remedy}"
            )
        self.start()

    def _read_log(self):
        with contextlib.suppress(BlockingIOError):
            while block := os.read(self._log.fileno(), self.LOG_SIZE):
                self._text = (self._text + block)[-self.LOG_SIZE :]

    def _take_log(self):
        """The end of what the processes have printed since the last call."""
        self._read_log()
        text, self._text = self._text, b""
        return text.decode(errors="replace")

    def call(self, task, *arguments):
        """Returns task(*arguments), run in one of the processes. Raises what the task and
        `restart` raise."""
        return self.restarting(lambda: self.submit(task, *arguments).result())

    def restarting(self, function, restart=None):
        """Returns function(), which is called again after a `restart`, or the function given
        instead, if it raises WorkerDied."""
        while True:
            try:
                return function()
            except WorkerDied:
                (restart or self.restart)()


def in_a_worker(task, *arguments):
    """Runs a task that needs Caffe, in a separate process."""
    with CaffeProcesses() as processes:
        return processes.call(task, *arguments)
