#!/usr/bin/env python3
"""Tests and times the program on this machine's GPU, and prints tables for the README.

    make gpu-check                         # everything: about ten minutes on a large GPU
    python tests/gpu_check.py --parts gradients speed    # some of it
    python tests/gpu_check.py --quick      # every part, with as little work as possible

Without a GPU this is --quick on two emulated ones (cuda_on_cpu/README.md), to test this script. If
a part fails, its table says so and the other parts still run; the exit code is then 1.
"""

import argparse
import collections
import contextlib
import functools
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
from unittest import mock

import benchmark
import numpy as np
import torch_network
from conftest import CUDA_ON_CPU, EMULATION, ROOT, TINY, Ascent
from PIL import Image

import cnn_vis
import cnn_vis_lib.network
from cnn_vis_lib.cuda_graphs import Graphs
from cnn_vis_lib.description import GPU_LAYERS, RELU_LAYERS
from cnn_vis_lib.engines import has_cuda
from cnn_vis_lib.errors import one_line
from cnn_vis_lib.find_network import find_network
from cnn_vis_lib.machine import count_cores, count_gpus, versions
from cnn_vis_lib.network import NetworkSpec, layer_shapes, load_network
from cnn_vis_lib.options import parse_size
from cnn_vis_lib.pixels import resize
from cnn_vis_lib.processes import CaffeProcesses, in_a_worker
from cnn_vis_lib.prototxt import caffe_library, import_caffe
from cnn_vis_lib.workers import Workers

IS_EMULATED = os.environ.get("LD_LIBRARY_PATH") == EMULATION["LD_LIBRARY_PATH"]


class Work:
    """How much is measured; with `quick`, just enough to show that this script works."""

    def __init__(self, model, layer, quick):
        self.words = [f"--model={model}"] if model else []
        self.batches, self.tiles, self.repeat = (1, 2, 4, 8, 16, 32), 320, 20
        self.commands = {"427x640": 200, "1080x1920": 100, "4096x4096": 10}
        self.counts = (3, 24)
        if quick:
            self.words = [*TINY]
            layer = "inception_a/output"
            self.batches, self.tiles, self.repeat = (1, 4), 8, 1
            self.commands, self.counts = {"64x96": 4}, (2,)
        self.words.append(f"--layer={layer}")
        self.files = find_network(cnn_vis.PARSER.parse_args(self.words))
        self.objective = cnn_vis.layer_terms(layer)
        layers, own = self.objective.layers(), self.objective.caffe_layer()
        self.spec = NetworkSpec(self.files, layers, use_gpu=True, objective=own)


def on_gpu(task, *arguments, **words):
    """task(*arguments, **words), done in a process that sees GPU 0."""
    with CaffeProcesses(gpus=[0]) as processes:
        return processes.call(functools.partial(task, **words), *arguments)


def noise(count, tile_size):
    """Tiles float32 (count, 3, H, W) of noise."""
    random = np.random.default_rng(1)
    return random.normal(0, 50, (count, 3, *tile_size)).astype(np.float32)


# ---- The parts, each a list of rows (what, value) ------------------------------------------------


def machine(work):
    """The machine and software used."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    told = (
        subprocess.run(query, capture_output=True, text=True, check=False).stdout
        if shutil.which(query[0])
        else ""
    )
    yield "GPUs", "; ".join(told.splitlines()) or ("emulated" if IS_EMULATED else "unknown")
    yield "cores", count_cores()
    yield "network", f"{work.files.name}, {work.objective}"
    types = on_gpu(layer_types)
    yield "convolutions", "cuDNN" if "CudnnConvolution" in types else "Caffe's own, cuBLAS"
    yield from versions().items()


def layer_types():
    return list(import_caffe().layer_type_list())


def tests(_):
    """The tests of the GPU path."""
    environment = {k: v for k, v in os.environ.items() if not IS_EMULATED or k not in EMULATION}
    words = [sys.executable, "-m", "pytest", "-n", "auto", "--maxprocesses", "4"]
    names = ("test_gpu.py", "test_canvas.py", "test_gpu_makers.py")
    words += [*(str(ROOT / "tests" / name) for name in names), "-k", "not kit"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    yield ", ".join(names), done.stdout.strip().splitlines()[-1]
    if done.returncode:
        raise RuntimeError(done.stdout)


def gradients(work):
    """The gradient of a tile of noise for every layer that can be amplified, compared with the
    CPU's."""
    listed, _, _ = in_a_worker(layer_shapes, work.files)
    layers = [blob for blob, _, _ in listed]
    found = on_gpu(distances, work.spec, layers)
    worst = max(found, key=found.get)
    yield "layers", len(found)
    yield "relative distance, median", f"{np.median(list(found.values())):.1e}"
    yield f"the greatest, of {worst}", f"{found[worst]:.1e}"


def distances(spec, layers):
    """Task: {layer: |GPU's gradient - CPU's| / |CPU's|}."""
    found = {}
    for layer in layers:
        both = []
        for use_gpu in (False, True):  # one after the other: the mode is the process's
            loaded = Ascent(spec.files, cnn_vis.Target(layer), use_gpu=use_gpu)
            gradient, _ = loaded.gradients(noise(1, loaded.tile_size), measure=False)
            both.append(gradient.copy())
        cpu, gpu = both
        found[layer] = float(np.linalg.norm(gpu - cpu) / (np.linalg.norm(cpu) or 1))
    return found


def speed(work):
    """One process: ms per tile, forward and backward, for each number of tiles in a batch, as a
    CUDA graph; without one; and without each of the layers of ours that save calls."""
    has_cudnn = "CudnnConvolution" in on_gpu(layer_types)
    for name, way in ways().items():
        if way["fast"] and not has_cudnn:
            yield name, "Caffe was built without cuDNN"
        else:
            yield name, by_batch(on_gpu(batch_times, work, **way))


def ways():
    """{name: arguments of batch_times}"""
    cudnn, own = {"fast": GPU_LAYERS}, {"fast": {}}
    found = {"Caffe's own convolutions": own, "cuDNN": cudnn, "cuDNN, TF32": cudnn | {"tf32": True}}
    found |= {f"{name}, no graph": way | {"graphs": False} for name, way in found.items()}
    for kind in ("LRN", "Concat"):
        fast = {name: ours for name, ours in GPU_LAYERS.items() if name != kind}
        found[f"cuDNN, Caffe's own {kind}"] = {"fast": fast}
    found["cuDNN, ReLU in layers of its own"] = cudnn | {"joins": False}
    measured = {name: found[name] | {"measured": True} for name in ("cuDNN", "cuDNN, TF32")}
    return found | {f"{name}, algorithms measured": way for name, way in measured.items()}


def by_batch(times):
    """{tiles in a batch: ms for each tile} in words."""
    return ", ".join(f"{size}: {ms:.2f}" for size, ms in times.items())


def batch_times(work, fast, tf32=False, graphs=True, joins=True, measured=False):
    """Task: {tiles in a batch: ms for each tile}. `fast` is as GPU_LAYERS; with `joins`, a
    convolution does the ReLU after it; `measured` chooses cuDNN's algorithms."""
    cnn_vis_lib.network.GPU_LAYERS = fast
    if measured:
        os.environ["CNN_VIS_ALGORITHMS"] = os.devnull
    if not joins:
        RELU_LAYERS.clear()
    loaded = Ascent(work.files, *work.objective.targets, use_gpu=True, tf32=tf32, graphs=graphs)
    found = {}
    for size in work.batches:
        batch = noise(size, loaded.tile_size)
        ms = benchmark.milliseconds(lambda b=batch: loaded.gradients(b, False), work.repeat)
        found[size] = ms / size
    return found


def layers(work):
    """The time of each kind of layer, in ms of a pass, forward and backward; in graphs, so that the
    CPU's calls do not count."""
    for count in work.counts:
        found = on_gpu(layer_times, work, count)
        words = (f"{kind}: {ms:.2f}" for kind, ms in sorted(found.items(), key=lambda f: -f[1]))
        yield f"{count} tiles", ", ".join(words)


def layer_times(work, count):
    """Task: {type of layer: ms} for passes of `count` tiles."""
    loaded = Ascent(work.files, *work.objective.targets, use_gpu=True)
    loaded.gradients(noise(count, loaded.tile_size), False)
    net, graphs, found = loaded.network._net, Graphs.available(), collections.Counter()
    directions = (net._forward, net._backward)
    for (number, layer), go in itertools.product(enumerate(net.layers), directions):

        def several_times(go=go, number=number):
            for _ in range(10):
                go(number, number)

        def do(key=(number, go), several_times=several_times):
            graphs.do(key, several_times)
            caffe_library().cnn_vis_wait()

        found[layer.type] += benchmark.milliseconds(do, work.repeat) / 10
    return dict(found)


def processes(work):
    """Independent tiles: ms per tile for each number of processes on GPU 0, with all of the
    program's work except the steps."""
    for each in (1, 2, 3):
        with Workers(work.spec, work.objective, gpus=[0], each=each) as workers:
            workers.describe()
            ms = benchmark.tiles_through(workers, noise(work.tiles, workers.tile_size))
            number = workers.processes.number  # fewer than asked for, if these are too many
            yield f"{number} process{'es' * (number > 1)}", f"{ms:.2f}"


def commands(work):
    """Whole commands on a photograph of that size: with the picture on the GPU or in this machine's
    memory, and with CUDA graphs or without."""
    switches = itertools.product("10", repeat=2)
    for (size, steps), (canvas, graphs) in itertools.product(work.commands.items(), switches):
        environment = {"CNN_VIS_CANVAS": canvas, "CNN_VIS_GRAPHS": graphs}
        with mock.patch.dict(os.environ, environment), tempfile.TemporaryDirectory() as folder:
            photograph(folder, parse_size(size, None))
            few, _ = command(folder, work, 1)
            more, watched = command(folder, work, steps)
        shape = parse_size(size, None)
        count = len(cnn_vis.all_tiles(shape, on_gpu(tile_size, work.spec))) * (steps - 1)
        per_tile = 1000 * (more - few) / count
        size += ", in memory" * (canvas == "0") + ", no graphs" * (graphs == "0")
        yield (
            f"{size}, {steps} steps",
            f"{more:.1f} s; one step {few:.1f} s; {per_tile:.2f} ms a tile",
        )
        if watched:
            busy, memory = zip(*watched)
            yield f"{size}, GPU", f"{np.mean(busy):.0f}% busy; {max(memory)} MiB"


def starts(work):
    """Runs of one step, one after the other; and with algorithms that the first one measures."""
    size = next(iter(work.commands))
    with tempfile.TemporaryDirectory() as folder:
        photograph(folder, parse_size(size, None))
        kept = {"CNN_VIS_ALGORITHMS": f"{folder}/algorithms.txt"}
        for name, environment in {size: {}, f"{size}, algorithms kept": kept}.items():
            with mock.patch.dict(os.environ, environment):
                seconds = [command(folder, work, 1)[0] for _ in range(3)]
            yield name, ", ".join(f"{number:.1f}" for number in seconds) + " s"


def pictures(work):
    """A batch: several photographs at the same time, whose tiles share the GPU's batches."""
    size, steps = next(iter(work.commands.items()))
    for count in (1, 4, 16):
        with tempfile.TemporaryDirectory() as folder:
            photograph(folder, parse_size(size, None))
            for number in range(1, count):
                shutil.copy(f"{folder}/in.png", f"{folder}/in{number}.png")
            images = [f"in{number or ''}.png" for number in range(count)]
            times = []
            for number in (1, steps):
                out = f"--output={number}/"
                times.append(command(folder, work, number, "--image", *images, out)[0])
        ms = 1000 * (times[1] - times[0]) / ((steps - 1) * count)
        yield f"{count} of {size}", f"{times[1]:.1f} s; {ms:.2f} ms a step of each"


def tile_size(spec):
    return load_network(spec).tile_size


def photograph(folder, size):
    import skimage.data

    Image.fromarray(resize(skimage.data.coffee(), size)).save(f"{folder}/in.png")


def command(folder, work, steps, *more):
    """(seconds of a run, [(GPU's utilization in percent, MiB of its memory), ...] along the way)"""
    settings = [f"--{name}={value}" for name, value in benchmark.SETTINGS.items()]
    words = [*work.words, *settings, "--image=in.png", "--gpu=0", f"--num_steps={steps}", *more]
    with gpu_watch() as watched:
        seconds = benchmark.seconds(folder, *words)
    return seconds, watched


@contextlib.contextmanager
def gpu_watch():
    """Yields a list that is filled when the block ends, with GPU 0's (utilization in percent, MiB
    of memory) twice a second. It stays empty without nvidia-smi."""
    found, query = [], "--query-gpu=utilization.gpu,memory.used"
    if not shutil.which("nvidia-smi"):
        yield found
        return
    words = ["nvidia-smi", "--id=0", query, "--format=csv,noheader,nounits", "--loop-ms=500"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as watching:
        try:
            yield found
        finally:
            watching.terminate()
        lines = watching.communicate()[0].splitlines()
        found += [tuple(map(int, line.split(","))) for line in lines if line.count(",") == 1]


def torch(work):
    """The same in PyTorch, channels last: ms per tile for each number of tiles in a batch,
    including regularizers and step, also on the GPU."""
    try:
        import torch as library
    except ModuleNotFoundError:
        yield "PyTorch", "not installed"
        return
    if IS_EMULATED or not library.cuda.is_available():
        yield "PyTorch", f"{library.__version__}, sees no GPU"
        return
    for name, tf32 in {"FP32": False, "TF32": True}.items():
        library.backends.cudnn.allow_tf32 = tf32
        library.backends.cuda.matmul.allow_tf32 = tf32
        yield f"PyTorch {library.__version__}, {name}", by_batch(torch_times(work))


def torch_times(work):
    """{tiles in a batch: ms for each tile}: gradient, regularizers, RMSProp."""
    import torch as library

    described = on_gpu(torch_network.described, work.spec)
    network = torch_network.TorchNetwork(*described, "cuda")
    found, o = {}, benchmark.SETTINGS
    for size in work.batches:
        x = library.from_numpy(noise(size, (224, 224))).cuda()
        start, cache = x - 3, library.zeros_like(x)

        def step(x=x, start=start, cache=cache):
            leaf = x.to(memory_format=library.channels_last).requires_grad_()
            a = network(leaf)
            loss = -(a * a.abs() / 2 + a.square().clamp(max=25) / 2).sum()
            d = leaf - start
            loss = loss + o["p_reg"] * d.abs().pow(o["alpha"]).sum()
            loss = loss + o["p_reg_aux"] * leaf.abs().pow(o["alpha_aux"]).sum()
            dx = leaf[:, :, :-1, :-1] - leaf[:, :, :-1, 1:]
            dy = leaf[:, :, :-1, :-1] - leaf[:, :, 1:, :-1]
            loss = loss + o["tv_reg"] * (dx**2 + dy**2).clamp(min=1e-3).pow(o["beta"] / 2).sum()
            (gradient,) = library.autograd.grad(loss, leaf)
            cache.mul_(0.9).add_(gradient**2, alpha=0.1)
            x.add_(-gradient / (cache + 1e-8).sqrt())
            library.cuda.synchronize()

        found[size] = benchmark.milliseconds(step, work.repeat) / size
    return found


# ---- Command line --------------------------------------------------------------------------------

PARTS = (machine, gradients, speed, layers, processes, commands, starts, pictures, torch, tests)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="network (default: as the program chooses)")
    parser.add_argument("--layer", default="inception_4c/output")
    parser.add_argument("--quick", action="store_true", help="just enough work to test this script")
    names = [part.__name__ for part in PARTS]
    parser.add_argument("--parts", nargs="+", choices=names, default=names, help="some of it only")
    args = parser.parse_args()
    if not IS_EMULATED and not count_gpus():
        if not CUDA_ON_CPU.exists():
            sys.exit(f"no GPU found, and the emulation is not built: make {CUDA_ON_CPU}/built")
        words = [sys.executable, __file__, "--quick", *sys.argv[1:]]
        os.execve(sys.executable, words, os.environ | EMULATION)

    if not has_cuda():
        sys.exit(
            "Caffe was built without CUDA; build it: make clean; make PYCAFFE_CUDA=1 gpu-check"
        )
    work, failed = Work(args.model, args.layer, args.quick), False
    for part in PARTS:
        if part.__name__ not in args.parts:
            continue
        print(f"\n| {part.__name__}: {' '.join(part.__doc__.split()).rstrip('.')} | |\n|---|---|")
        try:
            for what, value in part(work):
                print(f"| {what} | {value} |", flush=True)
        except Exception as error:
            failed = True
            print(f"| **failed** | {one_line(error)[-300:]} |", flush=True)
            print(error, file=sys.stderr)
    sys.exit(failed)


if __name__ == "__main__":
    import gpu_check  # processes import the tasks by this name

    gpu_check.main()
