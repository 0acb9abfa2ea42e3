"""Choosing the engine that computes the tiles: GPUs, this machine's cores, or a cluster."""

import dataclasses
import functools
import importlib.util
import mmap
import os
import re

from .canvas import may_stay_on_gpu
from .cluster import Cluster
from .errors import BadRequest, Stopped, one_line, refusal
from .gpu_picture import STEP_SYMBOL
from .machine import count_cores, count_gpus
from .options import PARSER
from .processes import in_a_worker
from .prototxt import caffe_library
from .workers import EACH, Workers

CUDA_SYMBOL = "_ZN5caffe20cublasGetErrorStringE14cublasStatus_t"  # of a Caffe built with CUDA


def can_use_gpu():
    """Task: whether this Caffe was built with CUDA, judged by the symbols in its library. (Asking
    Caffe for a GPU would end the process if there is none.)"""
    return hasattr(caffe_library(), CUDA_SYMBOL)


@functools.cache
def has_symbol(name):
    """Whether the library of this program's build of Caffe has a symbol, found without loading it,
    which takes a second with CUDA's libraries; None if this is another Caffe."""
    spec = importlib.util.find_spec("caffe")
    for folder in spec and spec.submodule_search_locations or ():
        path = os.path.join(folder, "libcaffe.so")
        if os.path.isfile(path):
            with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as text:
                return text.find(name.encode()) >= 0
    return None


@functools.cache
def has_cuda():
    """Whether this Caffe was built with CUDA."""
    found = has_symbol(CUDA_SYMBOL)
    return in_a_worker(can_use_gpu) if found is None else found


def choose_gpus(gpus):
    """Returns the GPUs to run on, [] for the CPU, and a description of the device, which says why
    if the CPU is used without having been asked for. `gpus` is the list from --gpu, or None. Raises
    BadRequest."""
    if gpus == []:
        return [], "CPU"
    present = count_gpus()
    cuda = (present or gpus) and has_cuda()
    if cuda:
        check_kept_algorithms(os.environ.get("CNN_VIS_ALGORITHMS"))
    if gpus is None:
        if cuda:
            return [0], "GPU 0"
        return [], f"CPU ({'Caffe was built without CUDA' if present else 'no GPU found'})"
    asked = ",".join(map(str, gpus))
    if not cuda:
        remedy = "use --gpu -1 for the CPU, or build with PYCAFFE_CUDA=1"
        raise refusal("gpu", asked, "Caffe was built without CUDA", remedy)
    if max(gpus) >= present:
        told = f"{present} found, numbered from 0" if present else "none found"
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        told += f" with CUDA_VISIBLE_DEVICES={visible}" if visible is not None else ""
        remedy = "use another number, or -1 for the CPU"
        raise refusal("gpu", asked, f"no such GPU ({told})", remedy)
    return gpus, f"GPU{'s' * (len(gpus) > 1)} {asked}"


def check_kept_algorithms(path):
    """Raises BadRequest if Caffe cannot keep algorithms (pycaffe/include/cnn_vis_ways.hpp) in the
    file that CNN_VIS_ALGORITHMS names, None if it is not set. Reading a pipe could take forever,
    and a file that holds something else would be added to."""
    if not path or path == os.devnull:  # that keeps nothing
        return
    problem, folder = None, os.path.dirname(path) or "."
    if os.path.isfile(path):
        try:
            with open(path, "rb") as file:
                start = file.read(1 << 16)
            if start and not re.search(rb"^.+, CUDA \d+, cuDNN \d+: .*\t", start, re.MULTILINE):
                problem = "this file holds something else"
        except OSError as error:
            problem = one_line(error.strerror)
    elif os.path.lexists(path):
        problem = "this is not a file"
    elif not os.path.isdir(folder):
        problem = "there is no such folder"
    elif not os.access(folder, os.W_OK):
        problem = "its folder cannot be written to"
    if problem:
        told = f"the environment's CNN_VIS_ALGORITHMS={path}: {problem}"
        raise BadRequest(told, "name a new file, which will keep what cuDNN measures")


def open_engine(options, spec, objective, is_shared=False):
    """Creates the Engine that the options select, not yet entered. If it is shared, several
    pictures use it at the same time. Raises BadRequest."""
    if options.scheduler:
        return Cluster(dataclasses.replace(spec, tf32=False), objective, options.scheduler)
    gpus, device = choose_gpus(options.gpu)
    spec = dataclasses.replace(spec, use_gpu=bool(gpus))
    number, batch_size = options.workers or count_cores(), options.batch_size
    is_optional = options.gpu is None
    has_one = len(gpus) == 1 and not is_shared and has_symbol(STEP_SYMBOL)
    each = 1 if has_one and may_stay_on_gpu(spec, options.scratch) else EACH
    return Workers(spec, objective, number, gpus, batch_size, device, is_optional, each)


class Engines:
    """Provides the engines for a series of runs that differ only in their start pictures and
    objectives; a context manager. Running processes are reused. `open_engine` is called with the
    options, a NetworkSpec and an objective."""

    def __init__(self, options, open_engine=open_engine):
        self.options, self._engine, self._open = options, None, open_engine

    def get(self, spec, objective):
        """The Engine for a run, with the network described. Raises BadRequest, RunFailed."""
        engine = self._engine
        if self.are_for(spec, objective):
            engine.begin_run()
            return engine
        try:
            if engine is None or not engine.change(spec, objective):
                self.end()
                self._engine = self._open(self.options, spec, objective)
                self._engine.describe()
        except BaseException:
            self.end(at_once=True)  # it is half ready
            raise
        return self._engine

    def are_for(self, spec, objective):
        """Whether the engine can be used as it is."""
        engine = self._engine
        if engine is None or objective != engine.objective:
            return False
        device = {name: getattr(engine.spec, name) for name in ("use_gpu", "tf32", "graphs")}
        return dataclasses.replace(spec, **device) == engine.spec

    def end(self, at_once=False):
        """Ends the engine, if there is one."""
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.end(at_once)

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        self.end(kind is Stopped)


def idle(options, engine):
    """Yields notices of options that were set but have no effect, on any device or on this one."""
    yield from PARSER.without_effect(options)
    targets = engine.objective.targets
    if len(targets) == 1 and abs(targets[0].weight) != 1:
        yield f"--layer {targets[0]}: a single term's weight has no effect"
    use_gpu = engine.spec.use_gpu
    for name in ("workers",) if use_gpu else ("batch_size", "tf32"):
        if getattr(options, name) and not options.scheduler:
            yield f"--{name} has no effect on {'a GPU' if use_gpu else 'the CPU'}"
