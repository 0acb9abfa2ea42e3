"""Engines, which compute the gradients of tiles, and the engine on this machine.

Tiles and gradients travel through one block of shared memory, divided into slots. Neither it nor
the pipe for Caffe's messages has a name, so nothing is left behind, however a process ends."""

import concurrent.futures
import contextlib
import ctypes
import dataclasses
import functools
import math
import mmap
import os

import numpy as np

from .canvas import Canvas, may_stay_on_gpu
from .description import ANOTHER_LAYER
from .errors import RunFailed, Stopped, log, one_line, refusal, remedy_of
from .machine import free_memory
from .network import FULL_BATCH, input_size_refusal, load_network
from .processes import (
    CaffeProcesses,
    CaffeStopped,
    GpuFailed,
    GraphFailed,
    LayerFailed,
    WorkerDied,
    system_limits,
)
from .prototxt import caffe_library


class Engine:
    """Computes the gradients of tiles for the dream's loop; a context manager.

    `spec` is its NetworkSpec and `objective` what it computes the gradients of; `device` describes
    where it runs; `notices` is a list of lines for the user. After `describe` it also has
    tile_size, the (height, width) of a tile; shapes, {layer: (C, ...) of a tile's activations};
    batch_size, the most tiles that `send` accepts; number, how many devices compute batches: each
    should get a share of every turn.

    An objective has layers(), check(shapes), prepared(network), gradients(activations) and
    loss(activations), as the script's Objective; it can be pickled and compared.

    A tile's gradient must not depend on where it is computed or with which other tiles. A failure
    that the engine cannot recover from raises RunFailed, or BadRequest if an option caused it.
    """

    is_elsewhere = True  # whether tiles are computed while this process does other things

    def describe(self):
        """Loads the network and tries it once. Must be called first."""
        raise NotImplementedError

    def expect(self, count):
        """Prepares for up to `count` tiles that can be computed at the same time."""

    def has_room(self):
        """Whether `send` can be called."""
        raise NotImplementedError

    def send(self, tiles_in, measure=True):
        """Starts computing the gradients of up to batch_size tiles, arrays (3, H, W), and with
        `measure` also their losses; returns a ticket."""
        raise NotImplementedError

    def is_done(self, ticket):
        """Waits for the tiles of a ticket, one second at most; returns whether they are done, so
        that `receive` will not wait."""
        raise NotImplementedError

    def receive(self, ticket):
        """Waits for the tiles of a ticket; returns [(gradient of the objective's loss, float32
        (3, H, W); the loss, None unless measured), ...]."""
        raise NotImplementedError

    def canvas(self, dream, is_stopping):
        """A Canvas for the picture of a Dream at its size, which can be stopped; None if the steps
        are to be taken by the Dream itself."""
        return

    def begin_run(self):
        """Prepares for another run with the same network: forgets the last run's notices."""
        self.notices = []

    def change(self, spec, objective):
        """Switches to another network and objective on the same device and describes them. Returns
        whether this kind of engine can do that."""
        return False

    def end(self, at_once=False):
        """Ends the engine and leaves nothing behind; does not wait for its tiles if `at_once`."""
        raise NotImplementedError

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        self.end(kind is Stopped)


def map_slots(descriptor, shape):
    """The slots in the memory that is open as `descriptor`, here and in the worker processes, as a
    float32 array of `shape` (slots, 2, batch, 3, H, W): each holds tiles and their gradients."""
    memory = mmap.mmap(descriptor, slots_size(shape))
    slots = np.frombuffer(memory, np.float32, math.prod(shape), mmap.PAGESIZE)
    return slots.reshape(shape)


def slots_size(shape):
    """The bytes that the memory needs for such slots, and a page before them."""
    return mmap.PAGESIZE + 4 * math.prod(shape)


attach = functools.lru_cache(1)(map_slots)  # in a worker


def open_shared_memory():
    """An unnamed file in memory, for processes to share; it has the first page. Raises
    RunFailed."""
    with system_limits():
        file = os.fdopen(os.memfd_create("cnn_vis"), "r+b")
        os.truncate(file.fileno(), mmap.PAGESIZE)
        return file


def map_counters(descriptor):
    """Two numbers in the first page of that memory, an array: that of the cores that nobody uses,
    and that of the signal that is to stop makers, or 0."""
    return np.frombuffer(mmap.mmap(descriptor, mmap.PAGESIZE), np.int32, 2)


@functools.cache
def share_cores(descriptor):
    """In a worker: lets layers of this program's build of Caffe use cores that are free, from now
    on. Returns Caffe's library, or None if it cannot."""
    library, counters = caffe_library(), map_counters(descriptor)
    if not hasattr(library, "cnn_vis_share_cores"):
        return None
    library.cnn_vis_share_cores(ctypes.c_void_p(counters.ctypes.data))
    library.counters = counters  # stays mapped
    return library


@contextlib.contextmanager
def one_core(descriptor):
    """In a worker: within this context, it uses one core more."""
    library = share_cores(descriptor)
    if library:
        library.cnn_vis_take_core()
    try:
        yield
    finally:
        if library:
            library.cnn_vis_return_core()


@functools.lru_cache(1)
def prepared(objective, spec):
    """The objective with what it has to know of the worker's network."""
    return objective.prepared(load_network(spec))


def compute_batch(network, objective, batch, measure=True):
    """(gradient, losses) for the tiles `batch`, float32 (N, 3, H, W): the gradient of the
    objective's loss with respect to the tiles, valid until the next call, and a list of the loss of
    each tile, or of None unless `measure`. The objective is prepared for the Network."""
    if network.has_objective:
        gradient = network.gradient(batch, reads=measure)
    else:
        network.forward(batch)
        gradient = network.backward(objective.gradients(network.activations()))
    losses = [None] * len(batch)
    if measure:
        layers = network.activations().items()
        parts = ({layer: a[i : i + 1] for layer, a in layers} for i in range(len(batch)))
        losses = [objective.loss(part) for part in parts]
    return gradient, losses


def describe(spec, objective):
    """Task: (tile_size, shapes, notices) of the network, after a trial with one tile: it allocates
    the memory it needs, and if it is going to fail, it fails now. Raises BadRequest if the
    objective does not fit the network."""
    network = load_network(spec)
    objective.check(network.shapes)
    try_batch(spec, objective, 1)
    return network.tile_size, network.shapes, network.notices


def try_batch(spec, objective, count, measure=True):
    """Task: tries the network with `count` tiles."""
    network = load_network(spec)
    batch = np.zeros((count, 3, *network.tile_size), np.float32)
    compute_batch(network, prepared(objective, spec), batch, measure)


def with_network(spec, method, *arguments):
    """Task: calls a method of the worker's Network."""
    return getattr(load_network(spec), method)(*arguments)


def check_batch(batch_size, slots, tile_size):
    """Raises BadRequest if the slots, each for a batch of tiles, do not fit in memory."""
    needed = 4 * slots * 2 * batch_size * 3 * math.prod(tile_size)
    if needed > free_memory():
        problem = f"needs {needed / 1e9:.1f} GB of memory for tiles and gradients"
        raise refusal("batch_size", batch_size, problem, "use a smaller one")


def compute_slot(spec, objective, memory, slot, count, measure):
    """Task: computes the gradients of the slot's first `count` tiles; returns their losses, None
    unless `measure`."""
    tiles_in, gradients_out = attach(*memory)[slot, :, :count]
    work = load_network(spec), prepared(objective, spec)
    with contextlib.nullcontext() if spec.use_gpu else one_core(memory[0]):
        gradients_out[...], losses = compute_batch(*work, tiles_in, measure)
    return losses


EACH = 2  # processes for a GPU, unless it is to hold a picture


class Workers(Engine):
    """The engine on this machine: processes on the GPUs in `gpus`, or on `cores` cores of the CPU.
    On the CPU, one process computes one tile; as many run as there are tiles to compute at once, at
    least two if there are two cores. Idle cores help: a layer's work is done in pieces, which are
    the same for any number of cores, and so are the results. A worker that is killed from outside
    is replaced, and its tiles are computed again. With `or_cpu`, the CPU is used if the GPUs fail
    in `describe`. There are `each` processes for a GPU: with two, one computes while the other
    transfers its tiles; with one, that can hold a picture."""

    def __init__(
        self,
        spec,
        objective,
        cores=1,
        gpus=(),
        batch_size=None,
        device="CPU",
        or_cpu=False,
        each=EACH,
    ):
        self.spec, self.objective, self.notices = spec, objective, []
        self._batch_size, self._cores, self._or_cpu = batch_size, cores, or_cpu
        self._memory_file = open_shared_memory()
        self._counters = map_counters(self._memory_file.fileno())
        self._set_out(gpus, each, device)
        self._jobs = {}  # slot: (number of tiles, whether they are measured, future of the losses)

    @property
    def number(self):
        return len(self.gpus) or self.processes.number

    def _set_out(self, gpus, each, device):
        """Starts `each` processes for each of the GPUs, or those for the CPU."""
        self.gpus, self._each = gpus, each
        self.spec = dataclasses.replace(self.spec, use_gpu=bool(gpus))
        most = 0 if gpus else self._cores
        shared, prepare = [self._memory_file], self._free_all_cores
        number = min(2, self._cores)
        self.processes = CaffeProcesses(number, list(gpus) * each, shared, most, prepare)
        many = "s" * (self._cores > 1)
        self.device = device if gpus else f"{device}, {self._cores} core{many}"

    def _free_all_cores(self):
        self._counters[0] = self._cores

    def end(self, at_once=False):
        self.processes.end(at_once)
        self._memory_file.close()

    def describe(self):
        while True:
            try:
                self._try_network()
                break
            except GpuFailed as error:
                self._fall_back(error)
        self._map_slots()

    def _fall_back(self, error):
        """Goes on with one process for each GPU, which may fit, or on the CPU. Raises the GpuFailed
        if that has been tried or is not allowed."""
        if self._each > 1:
            less = (self.gpus, 1, self.device)
        elif self._or_cpu:
            less = ((), 1, f"CPU ({error.problem})")
        else:
            raise error
        self.processes.end()
        self._set_out(*less)

    def restart(self):
        """Restarts the processes after one has died. Raises what that raises."""
        try:
            self.processes.restart()
        except GraphFailed as error:
            log.warning(f"note: {error}")
            self.spec = dataclasses.replace(self.spec, graphs=False)
            self.processes.start()

    def kill(self):
        """Kills the processes; their tasks raise WorkerDied."""
        self.processes.kill()

    def begin_run(self):
        super().begin_run()
        self.processes.restarts = 0

    def change(self, spec, objective):
        self.begin_run()
        self.spec = dataclasses.replace(spec, use_gpu=self.spec.use_gpu, graphs=self.spec.graphs)
        self.objective = objective
        self.describe()
        return True

    def _try_network(self):
        try:
            facts = self.processes.restarting(self._described, self.restart)
        except LayerFailed:
            raise self._bad_layer() from None
        except CaffeStopped as error:
            if self.spec.input_size:
                problem = f"the network cannot use this size ({error})"
                raise input_size_refusal(self.spec.input_size, problem, "drop the option") from None
            files = f"{self.spec.files.deploy} and {self.spec.files.weights}"
            raise RunFailed(f"{error}; do {files} belong together?") from None
        self.tile_size, self.shapes, notices = facts
        self.notices += notices

    def _bad_layer(self):
        """The BadRequest for a network with a layer that Caffe cannot run, or not backward."""
        culprit = "this layer"
        with CaffeProcesses(1, self.gpus[:1]) as processes:
            names = processes.call(with_network, self.spec, "layers")
            passes = [(i, False) for i in range(len(names))]
            passes += [(i, True) for i in reversed(range(len(names)))]
            try:
                for number, backward in passes:
                    arguments = (self.spec, "run_layer", number, backward)
                    processes.submit(with_network, *arguments).result()
            except WorkerDied:
                culprit = names[number]
        problem = f"Caffe cannot compute a gradient for {culprit}"
        return refusal("layer", str(self.objective), problem, ANOTHER_LAYER)

    def _described(self):
        """What `describe` found. Finds the batch size. Raises what a task raises, WorkerDied."""
        work = (self.spec, self.objective)
        if not self.gpus:
            # Batches would not help, and a sum might depend on the other tiles of one.
            self.batch_size = 1
            return self._load_networks(self.processes.number)[0].result()
        facts = self.processes.on_each(describe, *work)[0]
        arguments = (self.spec, "batch_for_memory", self._each)
        fitting = min(self.processes.on_each(with_network, *arguments))
        self.batch_size = self._batch_size or fitting
        check_batch(self.batch_size, 1, facts[0])
        if self._batch_size or fitting < FULL_BATCH:  # memory may be short
            self.processes.on_each(try_batch, *work, self.batch_size)
        return facts

    def _load_networks(self, number):
        """Lets `number` idle processes load the network; returns the futures."""
        return [self.processes.submit(describe, self.spec, self.objective) for _ in range(number)]

    def expect(self, count):
        missing = min(count, self._cores) - self.processes.number
        if not self.gpus and missing > 0:
            self.processes.grow(self.processes.number + missing)
            self._load_networks(missing)  # the new ones are idle, and the first to be used

    def _map_slots(self):
        """Makes two slots for each worker, one being computed and one to do next, and a spare."""
        slots = 2 * self.processes.most + 1
        shape = (slots, 2, self.batch_size, 3, *self.tile_size)
        check_batch(self.batch_size, slots, self.tile_size)
        try:
            os.truncate(self._memory_file.fileno(), slots_size(shape))
        except OSError as error:
            problem = f"{one_line(error)}{remedy_of(error)}"
            raise RunFailed(f"memory shared with workers: {problem}") from None
        self._memory = (self._memory_file.fileno(), shape)
        self._slots = map_slots(*self._memory)
        self._free = list(range(slots))
        # Beyond the slots, for a Canvas.
        self._beyond = -(-slots_size(shape) // mmap.PAGESIZE) * mmap.PAGESIZE

    def submit(self, task, *arguments):
        """Submits task(spec, *arguments), as CaffeProcesses.submit does."""
        return self.processes.submit(task, self.spec, *arguments)

    def canvas(self, dream, is_stopping):
        has_one = self.gpus and self.processes.number == 1
        if not (has_one and may_stay_on_gpu(self.spec, dream.scratch)):
            return None
        return Canvas(self, dream, (self._memory_file, self._beyond), is_stopping)

    def has_room(self):
        return bool(self._free)

    def send(self, tiles_in, measure=True):
        slot = self._free.pop()
        for i, tile in enumerate(tiles_in):
            self._slots[slot, 0, i] = tile
        self._compute(slot, len(tiles_in), measure)
        return slot

    def _compute(self, slot, count, measure):
        arguments = (self.spec, self.objective, self._memory, slot, count, measure)
        self._jobs[slot] = (count, measure, self.processes.submit(compute_slot, *arguments))

    def is_done(self, ticket):
        return not concurrent.futures.wait([self._jobs[ticket][2]], timeout=1).not_done

    def receive(self, ticket):
        while True:
            count, _, future = self._jobs[ticket]
            try:
                losses = future.result()
                break
            except WorkerDied:
                self.restart()
                for slot, (*job, future) in list(self._jobs.items()):
                    if future.exception() is not None:
                        self._compute(slot, *job)
        del self._jobs[ticket]
        self._free.append(ticket)
        return list(zip(self._slots[ticket, 1, :count].copy(), losses))
