#!/usr/bin/env python3
"""Times the program against the original's way of computing, against PyTorch, and against the
matrix products alone.

    python tests/benchmark.py    # everything: about five minutes on two cores, nothing else running
    python tests/benchmark.py --model googlenet_mini --steps 10
    python tests/benchmark.py --ceiling    # what the main process can do: about a minute
    python tests/benchmark.py --occupancy  # how many cores one picture keeps busy: two minutes

One run prints one table, so its ratios are of one machine in one state. Each row is measured in
processes of its own. The original's way: the whole network forward, force_backward (so the
gradients of all weights too), BLAS on all cores, one process, regularizers with general powers.
"""

import argparse
import contextlib
import functools
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
import types

import numpy as np
from PIL import Image

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from torch_network import TorchNetwork, described

import cnn_vis
from cnn_vis_lib.ahead import Steps, cut_tile, tile_gradients
from cnn_vis_lib.caffemodel import read_weights
from cnn_vis_lib.compiled_step import compiled_step
from cnn_vis_lib.description import Description, fit_classifier
from cnn_vis_lib.find_network import find_network
from cnn_vis_lib.machine import count_cores, huge_pages
from cnn_vis_lib.network import Network, NetworkSpec
from cnn_vis_lib.pixels import resize
from cnn_vis_lib.prototxt import caffe_net, import_caffe
from cnn_vis_lib.workers import Engine, Workers, compute_batch

# Of the whole command: a photograph's usual settings.
SETTINGS = {
    "alpha": 2.0,
    "p_reg": 0.5,
    "alpha_aux": 8.0,
    "p_reg_aux": 5e-11,
    "beta": 2.5,
    "tv_reg": 0.05,
    "decay_rate": 0.9,
}
SIZE = (427, 640)


def milliseconds(task, repeat):
    """The time of task(), the median of `repeat` after two more to warm up."""
    times = []
    for _ in range(repeat + 2):
        start = time.perf_counter()
        task()
        times.append(time.perf_counter() - start)
    return 1000 * float(np.median(times[2:]))


# ---- The original's way -----------------------------------------------------------------------


def original_net(spec):
    """The whole network, with force_backward, as the original loads it."""
    caffe = import_caffe()
    net = Description(spec.files.deploy).net
    fit_classifier(net, read_weights(spec.files.weights))
    net.force_backward = True
    loaded = caffe_net(net)
    loaded.copy_from(spec.files.weights)
    loaded.blobs["data"].reshape(1, *loaded.blobs["data"].shape[1:])
    loaded.reshape()
    caffe.set_mode_cpu()
    return loaded


def original_gradient(net, spec, tile):
    """The gradient of a tile float32 (1, 3, H, W)."""
    net.blobs["data"].data[...] = tile
    net.forward()
    (layer,) = spec.layers
    blob = net.blobs[layer]
    blob.diff[...] = cnn_vis.AmplifyLayer().gradient(blob.data)
    net.backward(start=layer)
    return net.blobs["data"].diff.copy()


def original_update(x, start, cnn, cache):
    """The regularizers and RMSProp step of a tile, float64 (1, 3, H, W), written straight from the
    formulas."""
    o, d = SETTINGS, x - start
    p = o["p_reg"] * o["alpha"] * np.sign(d) * np.abs(d) ** (o["alpha"] - 1)
    aux = o["p_reg_aux"] * o["alpha_aux"] * np.sign(x) * np.abs(x) ** (o["alpha_aux"] - 1)
    dx, dy = x[:, :, :-1, :-1] - x[:, :, :-1, 1:], x[:, :, :-1, :-1] - x[:, :, 1:, :-1]
    factor = np.maximum(dx**2 + dy**2, 1e-3) ** (o["beta"] / 2 - 1)
    tv = np.zeros_like(x)
    tv[:, :, :-1, :-1] += o["beta"] * factor * (dx + dy)
    tv[:, :, :-1, 1:] -= o["beta"] * factor * dx
    tv[:, :, 1:, :-1] -= o["beta"] * factor * dy
    gradient = cnn + p + aux + o["tv_reg"] * tv
    cache[...] = o["decay_rate"] * cache + (1 - o["decay_rate"]) * gradient**2
    return -gradient / np.sqrt(cache + 1e-8)


def original_run(spec, picture, mean, steps):
    """The original's loop: a picture uint8 (H, W, 3), SETTINGS, one size. Returns the picture as it
    then is."""
    net = original_net(spec)
    tile_size = tuple(net.blobs["data"].shape[2:])
    start = cnn_vis.from_uint8(picture, mean)
    image, caches = start.copy(), {}
    for _ in range(steps):
        for colour in cnn_vis.tiles(SIZE, tile_size):
            places = [np.s_[:, :, y0:y1, x0:x1] for y0, y1, x0, x1 in colour]
            gradients = [original_gradient(net, spec, image[place]) for place in places]
            for region, place, cnn in zip(colour, places, gradients):
                cache = caches.setdefault(region, np.zeros(cnn.shape))
                image[place] += original_update(
                    image[place], start[place], cnn.astype(np.float64), cache
                )
    return cnn_vis.to_picture(image, mean)


# ---- Measurements, each in a process of its own -----------------------------------------------


def measure_original(spec, tile):
    """The original's network alone."""
    net = original_net(spec)
    return milliseconds(lambda: original_gradient(net, spec, tile), 15)


def measure_ours(spec, tile):
    """One of our workers alone."""
    work = (Network(spec), objective_of(spec), tile)
    return milliseconds(lambda: compute_batch(*work, measure=False), 25)


def objective_of(spec):
    """The objective that all rows compute: the whole layer."""
    return cnn_vis.Objective(tuple(map(cnn_vis.Target, spec.layers)))


def measure_workers(spec, tile):
    """All workers at once, through the program's own machinery: 60 tiles that do not wait for one
    another."""
    with Workers(spec, objective_of(spec), count_cores()) as workers:
        workers.describe()
        workers.expect(count_cores())
        return tiles_through(workers, np.concatenate([tile] * 60))


def tiles_through(engine, tiles_in):
    """ms for each of the tiles (N, 3, H, W), side by side in one picture."""
    count, _, height, width = tiles_in.shape
    image = np.concatenate(tiles_in, axis=2)[np.newaxis].astype(np.float64)
    regions = [(0, height, i * width, (i + 1) * width) for i in range(count)]

    def gradients():
        for _ in tile_gradients(engine, image, [(regions, False)], Steps()):
            pass

    return milliseconds(gradients, 3) / count


def measure_torch(spec, tile, threads):
    """The same gradient by PyTorch, which runs as fast as it can on `threads` threads."""
    import torch

    torch.set_num_threads(threads)
    network = TorchNetwork(*described(spec))
    x = torch.from_numpy(tile.copy()).to(memory_format=torch.channels_last).requires_grad_()

    def gradient():
        a = network(x)
        return torch.autograd.grad((a * a.abs() / 2 + a.square() / 2).sum(), x)

    return milliseconds(gradient, 25)


def measure_floor(spec, tile):
    """The matrix products of the convolutions forward, and backward to the tile, and nothing else,
    on one core."""
    network = Network(spec)
    loaded, products = network._net, []
    for name, (weight, *_) in loaded.params.items():
        outputs, columns = weight.shape[0], int(np.prod(weight.shape[1:]))
        top = loaded.blobs[loaded.top_names[name][0]]
        pixels = top.count // outputs
        w, x, y = (
            np.random.rand(*s).astype(np.float32)
            for s in ((outputs, columns), (columns, pixels), (outputs, pixels))
        )
        products += [(w, x), (np.ascontiguousarray(w.T), y)]
    return milliseconds(lambda: [a @ b for a, b in products], 15)


def measure_maths(_, tile):
    """Regularizers and step of a tile, at the settings of the README's examples and at the
    defaults."""
    engine, results = types.SimpleNamespace(tile_size=tile.shape[2:]), {}
    picture = cnn_vis.to_picture(tile.astype(np.float64), 100)
    cnn = np.random.RandomState(1).randn(*tile.shape[1:]).astype(np.float32)
    for name, changes in {"examples": SETTINGS, "defaults": {}}.items():
        dream = cnn_vis.Dream(cnn_vis.Settings(**changes), picture, 103, engine)
        dream.lay_out()
        dream.begin_size()
        dream.image += 3
        terms = dream._regularizers()
        start = dream._start_of((0, tile.shape[2], 0, tile.shape[3]), terms)
        for way in (cnn_vis.step_tile, cnn_vis.compiled_step_tile):
            if way is not cnn_vis.step_tile and compiled_step() is None:
                continue
            step = functools.partial(
                way, dream.image[0], start, 103, cnn, dream.caches[0], None, terms, 0.9, 1.0
            )
            way_name = "NumPy" if way is cnn_vis.step_tile else "compiled"
            results[f"{name}, {way_name}"] = milliseconds(step, 30)
    x, cache = tile.astype(np.float64), np.zeros(tile.shape)
    results["original formulas"] = milliseconds(
        lambda: original_update(x, x - 3, tile.astype(np.float64), cache), 15
    )
    return results


def measured(what, arguments, threads=1, copies=1):
    """The result of measure_WHAT(...). With several `copies`, that many processes run at the same
    time, and the result is their mean time divided by their number. If it fails, why, as text."""
    command = [sys.executable, __file__, "--measure", json.dumps([what, *arguments]), *sys.argv[1:]]
    threaded = {f"{name}_NUM_THREADS": str(threads) for name in ("OPENBLAS", "OMP", "MKL")}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = os.environ | huge_pages() | threaded
    running = [subprocess.Popen(command, env=environment, **options) for _ in range(copies)]
    said = [process.communicate() for process in running]
    if any(process.returncode for process in running):
        why = "".join(errors for _, errors in said).strip().splitlines()[-1]
        is_missing = why.startswith("ModuleNotFoundError: No module named 'torch'")
        return "not installed" if is_missing else f"failed: {why}"
    results = [json.loads(text.splitlines()[-1]) for text, _ in said]
    return results[0] if copies == 1 else float(np.mean(results)) / copies


# ---- The main process alone -------------------------------------------------------------------


class Instant(Engine):
    """Answers immediately, without computing anything."""

    def __init__(self, slots=9, tile_size=(224, 224)):
        self.tile_size, self.batch_size, self.number = tile_size, 1, 1
        self._memory = np.ones((slots, 2, 3, *tile_size), np.float32)
        self._free = list(range(slots))

    def has_room(self):
        return bool(self._free)

    def send(self, tiles_in, measure=True):
        slot = self._free.pop()
        self._memory[slot, 0] = tiles_in[0]
        return slot

    def is_done(self, ticket):
        return True

    def receive(self, ticket):
        self._free.append(ticket)
        return [(self._memory[ticket, 1].copy(), None)]


def parent_alone(step_tile):
    """Runs the parent process at 1080x1920 with an Instant engine; returns (seconds, CPU seconds,
    CPU seconds of its main thread) per tile, and the Dream."""
    settings = cnn_vis.Settings(
        **SETTINGS, initial_size="1080x1920", num_steps=22, seed=1, initialization_scale=20.0
    )
    dream = cnn_vis.Dream(settings, None, 103, Instant())
    dream.step_tile = step_tile
    clocks = (time.perf_counter, time.process_time, time.thread_time)
    for progress in dream.run():
        if progress.step == 2:
            begun = [clock() for clock in clocks]
    count = len(dream.cache_index) * (settings.num_steps - 2)
    return [(clock() - start) / count for clock, start in zip(clocks, begun)], dream


def ceiling(args):
    """Prints how many tiles the parent can feed and step in a second, where the time goes, and what
    that means for other machines."""
    compiled, numpys = cnn_vis.compiled_step_tile, cnn_vis.step_tile
    if compiled_step() is None:
        sys.exit("this is not the Caffe included with cnn_vis.py: it has no compiled step")
    for name, step_tile in (("NumPy", numpys), ("compiled", compiled)):
        (seconds, cpu, main_cpu), dream = parent_alone(step_tile)
        print(f"parent alone: {1 / seconds:.0f} tiles/s ({name}), {1000 * cpu:.2f} ms of CPU")
    image, region = dream.image, next(iter(dream.cache_index))
    slot, cut = np.ones((3, 224, 224), np.float32), cut_tile(image, region)
    step = (cut, None, slot, dream.caches[0], None, dream._regularizers(), 0.9, 1.0)
    parts = {
        "cut and sent: float64 to float32": lambda: np.copyto(slot, cut, casting="same_kind"),
        "received: a copy of the gradient": slot.copy,
        "step, compiled": lambda: compiled(*step),
        "step, NumPy": lambda: numpys(*step),
    }
    print("\n| for each tile, arrays in the processor's cache | ms of CPU |\n|---|---|")
    for name, part in parts.items():
        print(f"| {name} | {milliseconds(part, 50):.2f} |")
    print(f"| main thread, amid a run | {1000 * main_cpu:.2f} |")

    network = measured("ours", []) / 1000
    print(f"\nA worker takes {1000 * network:.1f} ms a tile on one core. From these parts:")
    print("\n| | network, tiles/s | parent, tiles/s | together |\n|---|---|---|---|")
    machines = {f"{n} cores": (n, n / network) for n in (2, 8, 32, 128)}
    machines["16 cores, a GPU of 0.3 ms a tile"] = (16, 1 / 0.3e-3)
    for name, (cores, rate) in machines.items():
        threads = min(cores, cnn_vis.MOST_THREADS)
        parent = min(1 / main_cpu, threads / (cpu - main_cpu), cores / cpu)
        # On the CPU both share the cores.
        both = min(parent, rate if "GPU" in name else cores / (network + cpu))
        print(f"| {name} | {rate:.0f} | {parent:.0f} | {both:.0f} |")


# ---- Command line -----------------------------------------------------------------------------


def load(args):
    """(NetworkSpec, scalar mean, picture uint8 (H, W, 3)) for the arguments."""
    import skimage.data

    words = [f"--layer={args.layer}", *([f"--model={args.model}"] if args.model else [])]
    files = find_network(cnn_vis.PARSER.parse_args(words))
    objective = cnn_vis.layer_terms(args.layer)
    spec = NetworkSpec(files, objective.layers(), objective=objective.caffe_layer())
    return spec, files.mean, resize(skimage.data.coffee(), SIZE)


def one_measurement(args):
    """Does what --measure asks for, and prints the result as JSON."""
    from occupancy import measure_pieces

    what, *arguments = json.loads(args.measure)
    spec, mean, picture = load(args)
    if what == "original_run":
        original_run(spec, picture, mean, args.steps)
        return
    tile = np.ascontiguousarray(cnn_vis.from_uint8(picture, mean)[:, :, :224, :224], np.float32)
    measure = measure_pieces if what == "pieces" else globals()[f"measure_{what}"]
    print(json.dumps(measure(spec, tile, *arguments)))


def program(folder, *words):
    """The running program, started in `folder`."""
    words = ["--iter_behavior=none", "--checkpoint_iter=0", "--quiet", "--gpu=-1", *words]
    return subprocess.Popen([sys.executable, cnn_vis.__file__, *words], cwd=folder)


def seconds(folder, *words):
    """How long the program takes, from the shell."""
    start = time.perf_counter()
    assert program(folder, *words).wait() == 0
    return time.perf_counter() - start


def memory(pid):
    """The memory of a process and its descendants in bytes; shared pages are divided among them
    (PSS)."""
    total = 0
    with contextlib.suppress(OSError):
        with open(f"/proc/{pid}/smaps_rollup") as file:
            total = 1024 * int(re.search(r"^Pss: *(\d+)", file.read(), re.MULTILINE)[1])
        with open(f"/proc/{pid}/task/{pid}/children") as file:
            total += sum(map(memory, file.read().split()))
    return total


def large_picture(folder):
    """Peak bytes of a run at 4096x4096 with googlenet_mini; ms for each of its tiles, and for each
    of a small picture's."""
    words = [
        "--model=googlenet_mini",
        "--layer=inception_4c/output",
        "--initialization_scale=20",
        "--seed=1",
        "--p_reg=1e-9",
    ]

    def step_seconds(size, few, more):
        return (
            seconds(folder, *words, size, f"--num_steps={more}")
            - seconds(folder, *words, size, f"--num_steps={few}")
        ) / (more - few)

    running, peak = program(folder, *words, "--initial_size=4096x4096", "--num_steps=1"), 0
    while running.poll() is None:
        peak = max(peak, memory(running.pid))
        time.sleep(0.05)
    tiles = {size: len(cnn_vis.all_tiles(size, (224, 224))) for size in ((4096, 4096), (864, 864))}
    large, small = (
        1000 * step_seconds(f"--initial_size={h}x{w}", 1, more) / tiles[h, w]
        for (h, w), more in zip(tiles, (3, 41))
    )
    return peak, large, small


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="network (default: as the program chooses)")
    parser.add_argument(
        "--layer", default="inception_4c/output", help="target (default: %(default)s)"
    )
    parser.add_argument(
        "--steps", type=int, default=50, help="steps of the whole command (default: %(default)s)"
    )
    parser.add_argument("--ceiling", action="store_true", help="only what the main process can do")
    parser.add_argument("--occupancy", action="store_true", help="only how busy cores are")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        one_measurement(args)
    elif args.ceiling:
        ceiling(args)
    elif args.occupancy:
        import occupancy

        occupancy.report(measured("pieces", []))
    else:
        report(args)


def report(args):
    """Measures everything and prints the table."""
    spec, _, picture = load(args)
    cores = count_cores()
    rows = {
        "original's way, network": measured("original", [], threads=cores),
        "one worker": measured("ours", []),
        f"{cores} workers": measured("workers", []),
        f"PyTorch, {cores} threads": measured("torch", [cores], threads=cores),
        f"PyTorch, {cores} processes": measured("torch", [1], copies=cores),
        "matrix products alone, one core": measured("floor", []),
    }
    maths = measured("maths", [])
    start = time.perf_counter()
    measured_original = subprocess.run(
        [sys.executable, __file__, "--measure", '["original_run"]', *sys.argv[1:]],
        env=os.environ | {"OPENBLAS_NUM_THREADS": str(cores)},
        check=False,
    )
    original_seconds = time.perf_counter() - start
    assert measured_original.returncode == 0
    with tempfile.TemporaryDirectory() as folder:
        Image.fromarray(picture).save(f"{folder}/in.png")
        words = [
            *(f"--{name}={value}" for name, value in SETTINGS.items()),
            f"--layer={args.layer}",
            "--image=in.png",
        ]
        words += [f"--model={args.model}"] if args.model else []
        ours_seconds = seconds(folder, *words, f"--num_steps={args.steps}")
        start_seconds = min(seconds(folder, *words, "--num_steps=1") for _ in range(3))
        peak, large, small = large_picture(folder)

    print(f"\n{spec.files.weights}, {args.layer}, {cores} cores")
    print("\n| for each 224x224 tile | ms |\n|---|---|")
    for name, value in rows.items():
        print(f"| {name} | {value if isinstance(value, str) else f'{value:.1f}'} |")
    for name, value in maths.items():
        print(f"| regularizers and step, {name} | {value:.2f} |")
    print(f"\n| whole command, 640x427, {args.steps} steps | s |\n|---|---|")
    print(
        f"| original's way | {original_seconds:.1f} |\n| ours | {ours_seconds:.1f} |\n"
        f"| ours, one step | {start_seconds:.2f} |"
    )
    print("\n| googlenet_mini at 4096x4096 | |\n|---|---|")
    print(f"| memory of all processes, peak | {peak / 1e9:.2f} GB |")
    print(f"| for each tile; at 864x864 | {large:.1f} ms; {small:.1f} ms |\n")
    floor = rows["matrix products alone, one core"]
    times = (value for name, value in rows.items() if "PyTorch" in name)
    torch_best = min((value for value in times if not isinstance(value, str)), default=None)
    print(f"whole command: {original_seconds / ours_seconds:.2f} times faster")
    if torch_best:
        print(
            f"network: {torch_best / rows[f'{cores} workers']:.2f} times faster than PyTorch's best"
        )
    print(f"one worker: {100 * floor / rows['one worker']:.0f}% of the matrix products' speed")


if __name__ == "__main__":
    main()
