"""The GPU path: on this machine's GPUs if Caffe was built for them, else on two emulated ones
(cuda_on_cpu/README.md). Tests that need a GPU to fail, or to log what it does, need emulation."""

import collections
import errno
import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import (
    CARD,
    CHECKPOINT,
    CUDA_ON_CPU,
    EMULATION,
    GOLDEN,
    ROOT,
    RUN,
    TINY,
    assert_one_line,
    assert_same_run,
    kill_workers,
    pixels,
    psnr,
    run_cli,
    session,
    start,
    under_way,
    wait_for,
    workers,
)
from test_engines import WORK
from test_golden import tiny_pictures

import cnn_vis
from cnn_vis_lib.engines import has_cuda
from cnn_vis_lib.machine import count_gpus
from cnn_vis_lib.records import read_record
from cnn_vis_lib.workers import Workers

NO_DRIVER = {"PYTHONPATH": EMULATION["PYTHONPATH"], "CUDA_VISIBLE_DEVICES": None}
EMULATED = NO_DRIVER | EMULATION
IS_REAL = count_gpus() > 0 and has_cuda()
GPU = {"CUDA_VISIBLE_DEVICES": None} if IS_REAL else EMULATED
COUNT = count_gpus() if IS_REAL else 2

IN_MEMORY = {"CNN_VIS_CANVAS": "0"}  # steps are taken there

# How far a GPU's pictures may differ from the CPU's, in grey levels and in dB. Adding in another
# order changes the last bits, and a dream amplifies every difference.
LEVELS, RATIO = (255, 35) if IS_REAL else (8, 65)
# And gradients, relatively: those of a convolution, and of a network with its max pooling.
BOUND = 1e-5 if IS_REAL else 1e-6

emulated = pytest.mark.skipif("IS_REAL", reason="needs an emulated GPU")
two_gpus = pytest.mark.skipif("COUNT < 2", reason="there is one GPU")
EVERYWHERE = [word for word in TINY if not word.startswith("--gpu")]
DREAM = [
    *EVERYWHERE,
    "--layer=inception_a/output",
    "--num_steps=3",
    "--initial_size=70x100",
    "--seed=1",
    "--iter_behavior=none",
]


@pytest.fixture(scope="module", autouse=True)
def _there_is_a_gpu():
    assert IS_REAL or CUDA_ON_CPU.exists(), f"`make {CUDA_ON_CPU.relative_to(ROOT)}/built` makes it"


def dream(*arguments, cwd, **environment):
    """Runs DREAM on GPUs; returns what it said."""
    done = run_cli(*DREAM, *arguments, cwd=cwd, **(GPU | environment))
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory):
    """The picture of DREAM on the CPU."""
    folder = tmp_path_factory.mktemp("cpu")
    assert run_cli(*DREAM, "--gpu=-1", cwd=folder).returncode == 0
    return folder / "out.png"


@pytest.fixture
def logged(tmp_path):
    """(folder of the logs, the environment that has them written)"""
    folder = tmp_path / "logs"
    folder.mkdir()
    return folder, GPU | {"CUDA_ON_CPU_LOG": str(folder)}


def logs(folder):
    """What each process has done on its GPU, a Counter of names, by process."""
    found = []
    for path in folder.iterdir():
        table = np.fromfile(path, [("name", "S56"), ("value", "i8")])
        pairs = ((name.decode(), int(value)) for name, value in table if name)
        found.append(collections.Counter(dict(pairs)))
    return found


def take_counts(folder, *names):
    """The counters with these names, summed over all processes, whose logs are then removed."""
    found = logs(folder)
    for path in folder.iterdir():
        path.unlink()
    return [sum(log[name] for log in found) for name in names]


def assert_near(path, other):
    assert np.abs(pixels(path).astype(int) - pixels(other)).max() <= LEVELS
    assert psnr(path, other) >= RATIO


# ---- The same pictures ---------------------------------------------------------------------------


GRADIENT = """
import dataclasses, sys, numpy, cnn_vis, conftest
from cnn_vis_lib.models import NetworkFiles
files = NetworkFiles(*sys.argv[1:3])
terms, neuron, use_gpu = sys.argv[3:]
form = cnn_vis.AmplifyNeuron(int(neuron)) if neuron else cnn_vis.AmplifyLayer()
targets = cnn_vis.layer_terms(terms).targets
targets = (dataclasses.replace(target, form=form) for target in targets)
network = conftest.Ascent(files, *targets, use_gpu=use_gpu == "gpu")
batch = numpy.random.default_rng(1).normal(0, 50, (3, 3, *network.tile_size)).astype("float32")
for tiles in (batch, batch[:1], batch):
    gradients, losses = network.gradients(tiles)
kinds = [layer.type for layer in network.network._net.layers]
numpy.savez("found.npz", gradients=gradients, losses=losses, kinds=kinds)
"""


def run_python(script, folder, *arguments, **environment):
    """Runs a script that imports the program and the tests."""
    path = [str(ROOT), str(ROOT / "tests"), *filter(None, [environment.pop("PYTHONPATH", None)])]
    environment = os.environ | environment | {"PYTHONPATH": os.pathsep.join(path)}
    subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=folder,
        env={name: value for name, value in environment.items() if value is not None},
        stderr=subprocess.DEVNULL,
        check=True,
    )


def gradients(folder, device, target, neuron="", change="", **environment):
    """(gradients, losses) of three tiles of noise, on "gpu" or "cpu"; `change` is run before."""
    files = (GOLDEN / "deploy.prototxt", GOLDEN / "tiny_inception.caffemodel")
    run_python(f"{change}\n{GRADIENT}", folder, *files, target, neuron, device, **environment)
    found = np.load(folder / "found.npz")
    return found["gradients"], found["losses"]


@pytest.mark.parametrize(
    "target, neuron, bound",
    [
        ("conv1/5x5_s2", "", BOUND),
        ("pool1/norm1", "", 2 * BOUND),
        ("inception_a/output", "", 2 * BOUND),
        ("inception_a/output", "9", 2 * BOUND),
        ("classifier", "", 2 * BOUND),
        ("prob", "", 100 * BOUND),  # differences of what is nearly the same
        ("inception_a/output:3,5-7", "", 2 * BOUND),
        ("2*inception_a/output + inception_a/1x1:1 + -1*classifier", "", 3 * BOUND),
        ("conv1/5x5_s2 + 3*inception_a/3x3_reduce", "4", 3 * BOUND),
    ],
)
def test_gradients_are_the_cpus(target, neuron, bound, tmp_path):
    """Of each tile of a batch, after batches of other sizes."""
    gpu, losses = gradients(tmp_path, "gpu", target, neuron, **GPU)
    cpu, expected = gradients(tmp_path, "cpu", target, neuron)
    for ours, theirs in zip(gpu, cpu):
        assert np.linalg.norm(ours - theirs) <= bound * np.linalg.norm(theirs)
    assert losses == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("case", ["image_multiscale", "neuron", "schedules", "layer_signed"])
def test_pictures_are_the_originals(case, tmp_path):
    """Those of both objectives, several sizes and schedules. The others differ in what a GPU does
    not do; test_golden.py has all."""
    for name, found in tiny_pictures(case, tmp_path, "--gpu=0", **GPU).items():
        difference, ratio = found
        assert difference <= LEVELS, name
        assert ratio >= RATIO, name


@pytest.mark.parametrize(
    "gpu, told",
    [
        ([], "GPU 0"),
        (["--gpu=0"], "GPU 0"),
        pytest.param(["--gpu=1"], "GPU 1", marks=two_gpus),
        pytest.param(["--gpu=0,1"], "GPUs 0,1", marks=two_gpus),
        (["--gpu=-1"], "CPU"),
    ],
)
def test_a_run_is_on_the_gpus_that_are_asked_for(gpu, told, on_cpu, tmp_path):
    assert re.search(f", {told}[:,] ", dream(*gpu, cwd=tmp_path))
    assert_near(tmp_path / "out.png", on_cpu)


def test_a_guided_run_is_the_cpus(tmp_path):
    CARD.save(tmp_path / "guide.png")
    words = ["--guide=guide.png", "--layer=inception_a/output + pool1/norm1:1-5"]
    dream(*words, "--gpu=0", cwd=tmp_path)
    dream(*words, "--gpu=-1", "--output=cpu.png", cwd=tmp_path)
    assert_near(tmp_path / "out.png", tmp_path / "cpu.png")


@pytest.mark.parametrize("size", [1, 2, 5, 32])
def test_batches_give_the_same_picture(size, on_cpu, tmp_path):
    dream("--gpu=0", f"--batch_size={size}", cwd=tmp_path)
    assert_near(tmp_path / "out.png", on_cpu)


@two_gpus
@pytest.mark.parametrize(
    "visible, gpu, told",
    [
        ("1", [], "GPU 0"),
        ("1,0", ["--gpu=0,1"], "GPUs 0,1"),
        ("", [], "CPU (no GPU found), "),
        pytest.param("GPU-c0de0001", ["--gpu=0"], "GPU 0", marks=emulated),
        ("0", ["--gpu=1"], None),
        ("7", ["--gpu=0"], None),
    ],
)
def test_cuda_visible_devices_is_heeded(visible, gpu, told, on_cpu, tmp_path):
    """--gpu counts only the GPUs that it leaves; for any other number the error names the
    variable."""
    done = run_cli(*DREAM, *gpu, cwd=tmp_path, **GPU | {"CUDA_VISIBLE_DEVICES": visible})
    if told:
        assert done.returncode == 0, done.stderr
        assert f", {told}" in done.stderr
        assert_near(tmp_path / "out.png", on_cpu)
    else:
        assert_one_line(done, 2, gpu[0].replace("=", " "), f"CUDA_VISIBLE_DEVICES={visible}")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """As conftest's, on a GPU."""
    folder = tmp_path_factory.mktemp("whole")
    done = run_cli(*RUN, "--gpu=0", cwd=folder, **GPU)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def gpu_environment(monkeypatch):
    """Lets all that the test starts see the GPUs."""
    for name, value in GPU.items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(
            name, value
        )


def under_way_on(gpu, cwd):
    """RUN on a GPU, once it has written a checkpoint."""
    return under_way(*RUN, "--checkpoint_iter=1", f"--gpu={gpu}", cwd=cwd)


@two_gpus
@pytest.mark.parametrize("seconds", [0, 0.2, 0.4])
@pytest.mark.parametrize("which", [min, max])
def test_a_worker_that_dies_at_its_start_is_replaced(seconds, which, gpu_environment, tmp_path):
    """Also the one that was started last, while the others wait for it."""
    running = start(*DREAM, "--gpu=0,1", cwd=tmp_path)
    there = wait_for(lambda: len(workers(running.pid)) == 4 and workers(running.pid))
    time.sleep(seconds)
    os.kill(which(there), signal.SIGKILL)
    _, said = running.communicate(timeout=60)
    assert running.returncode == 0, said


def test_killed_workers_are_replaced(whole, gpu_environment, tmp_path):
    running = under_way_on(0, tmp_path)
    assert kill_workers(running.pid)
    _, said = running.communicate(timeout=60)
    assert running.returncode == 0, said
    assert_same_run(tmp_path, whole)


def test_a_run_that_is_stopped_goes_on_to_the_same_picture(whole, gpu_environment, tmp_path):
    running = under_way_on(0, tmp_path)
    running.send_signal(signal.SIGINT)
    running.communicate(timeout=60)
    wait_for(lambda: not session(running.pid))
    done = run_cli("--resume", CHECKPOINT, cwd=tmp_path, **GPU)
    assert done.returncode == 0, done.stderr
    assert "rounding" not in done.stderr
    assert_same_run(tmp_path, whole)


def test_a_run_that_goes_on_elsewhere_says_so(gpu_environment, tmp_path):
    """Begun on a GPU, resumed on the CPU."""
    running = under_way_on(0, tmp_path)
    running.send_signal(signal.SIGKILL)
    running.communicate(timeout=60)
    done = run_cli("--resume", CHECKPOINT, "--gpu=-1", cwd=tmp_path, **GPU)
    assert done.returncode == 0, done.stderr
    assert re.search(r"note: .*GPU.*CPU.*", done.stderr), done.stderr


# ---- Layers of our own: convolutions by cuDNN, and LRN -------------------------------------------


CONVOLUTIONS = [
    "num_output: 9 kernel_size: 3 pad: 1",
    "num_output: 9 kernel_size: 3 pad: 1 bias_term: false",
    "num_output: 9 kernel_size: 3 pad: 0",
    "num_output: 9 kernel_size: 3 pad: 1 stride: 2",
    "num_output: 8 kernel_size: 1",
    "num_output: 8 kernel_size: 3 pad: 1 group: 4",
    "num_output: 8 kernel_size: 3 pad: 2 dilation: 2",
    "num_output: 8 kernel_h: 3 kernel_w: 5 pad_h: 1 pad_w: 2",
]
NORMALIZATIONS = [
    "local_size: 5 alpha: 0.1 beta: 0.75",
    "local_size: 1 alpha: 0.5 beta: 0.6 k: 2",
    "local_size: 31 alpha: 0.3 beta: 0.75",  # more than there are channels
    "local_size: 3 alpha: 0.1 beta: 0.75 norm_region: WITHIN_CHANNEL",
]
COMPARED = {
    f"convolution_param {{ {parameters} }}": [
        "Convolution",
        "CudnnConvolution",
        "CudnnTF32Convolution",
    ]
    for parameters in CONVOLUTIONS
} | {f"lrn_param {{ {parameters} }}": ["LRN", "CudaLRN"] for parameters in NORMALIZATIONS}
COMPARE = (
    f"""
COMPARED = {COMPARED}"""
    + """
import json, pathlib, sys
import numpy as np
from test_caffe import caffe, net, passes

def distance(a, b):
    return float(np.linalg.norm(a - b) / np.linalg.norm(a))

random = np.random.RandomState(1)
found = {}
for words, (caffes, *kinds) in COMPARED.items():
    for kind in kinds:
        errors = found.setdefault(kind, {}).setdefault(words, [])
        nets = [net(k, words, (3, 12, 9, 14), pathlib.Path()) for k in (caffes, kind)]
        for theirs, mine in zip(*(each.params.get("top", []) for each in nets)):
            theirs.data[...] = mine.data[...] = random.randn(*theirs.data.shape)
        for count in (3, 1, 3):
            x = random.randn(count, 12, 9, 14).astype("float32")
            for each in nets:
                each.blobs["data"].reshape(*x.shape)
                each.reshape()
            gradient = random.randn(*nets[0].blobs["top"].shape).astype("float32")
            caffe.set_mode_cpu()
            cpu = passes(nets[0], x, gradient)
            caffe.set_mode_gpu()
            gpu = passes(nets[1], x, gradient)
            errors += [distance(a, b) for a, b in zip(cpu, gpu)]
json.dump(found, open("found.json", "w"))
"""
)


@pytest.fixture(scope="module")
def cudnn():
    """Skips tests that need cuDNN if Caffe was built without it."""
    script = "import sys, caffe; sys.exit('CudnnConvolution' not in caffe.layer_type_list())"
    if IS_REAL and subprocess.run([sys.executable, "-c", script], check=False).returncode:
        pytest.skip("Caffe was built without cuDNN")


@pytest.fixture(scope="module")
def distances(cudnn, tmp_path_factory):
    """{layer: {parameters: relative distances from Caffe's layer on the CPU, there and back, for
    batches of 3, 1 and 3}}"""
    folder = tmp_path_factory.mktemp("layers")
    run_python(COMPARE, folder, **GPU)
    return json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("parameters", CONVOLUTIONS)
def test_convolutions_are_caffes(parameters, distances):
    """Equal to rounding, or with TF32 to ten bits. If cuDNN has no algorithm (in the emulation: for
    filters that are not square), Caffe's own convolution runs."""
    words = f"convolution_param {{ {parameters} }}"
    assert max(distances["CudnnConvolution"][words]) <= BOUND
    assert max(distances["CudnnTF32Convolution"][words]) <= 2e-3


@pytest.mark.parametrize("parameters", NORMALIZATIONS)
def test_normalizations_are_caffes(parameters, distances):
    assert max(distances["CudaLRN"][f"lrn_param {{ {parameters} }}"]) <= BOUND


def test_tf32_is_off_where_it_is_not_asked_for(distances):
    """TF32 shows in the results, so results without its errors did not use it. (The oldest GPUs
    lack it.)"""
    shown = [min(found) for found in distances["CudnnTF32Convolution"].values()]
    assert IS_REAL or sum(error >= 1e-5 for error in shown) == len(CONVOLUTIONS) - 1
    assert all(max(found) <= BOUND for found in distances["CudnnConvolution"].values())


@pytest.mark.parametrize(
    "change, kind",
    [
        ("", "CudnnConvolution"),
        ("import cnn_vis_lib.network as room; room.GPU_LAYERS = {}", "Convolution"),
    ],
)
def test_gradients_are_alike_with_cudnn_and_without(cudnn, change, kind, tmp_path):
    gpu, _ = gradients(tmp_path, "gpu", "inception_a/output", change=change, **GPU)
    kinds = set(np.load(tmp_path / "found.npz")["kinds"])
    assert {name.removesuffix("ReLU") for name in kinds if "Convolution" in name} == {kind}
    assert "AmplifyLayer" in kinds
    cpu, _ = gradients(tmp_path, "cpu", "inception_a/output")
    assert np.linalg.norm(gpu - cpu) <= 5 * BOUND * np.linalg.norm(cpu)


TWICE = """
import caffe
caffe.set_mode_gpu()
layer = '''layer { name: "%s" type: "CudnnConvolution" bottom: "%s" top: "%s"
  convolution_param { num_output: 3 kernel_size: 3 pad: 1 weight_filler { type: "xavier" } } }'''
with open("net.prototxt", "w") as file:
    file.write('input: "data" input_shape { dim: [2, 3, 8, 8] } force_backward: true ')
    file.writelines(layer % names for names in [("a", "data", "a"), ("b", "a", "b")])
net = caffe.Net("net.prototxt", caffe.TEST)
net.forward()
net.backward()
"""


@emulated
def test_layers_of_one_shape_are_measured_once(cudnn, tmp_path, logged):
    """And have the same algorithm."""
    folder, environment = logged
    run_python(TWICE, tmp_path, **environment, CNN_VIS_ALGORITHMS="algorithms.txt")
    assert take_counts(folder, "measurements") == [2]
    assert len((tmp_path / "algorithms.txt").read_text().splitlines()) == 2


@emulated
def test_measured_algorithms_are_kept(cudnn, on_cpu, tmp_path, logged):
    """In a file, for this card and these versions; what is damaged in it is measured again."""
    folder, environment = logged
    kept = tmp_path / "algorithms.txt"
    words = ["--gpu=0", "--batch_size=3"]

    def measurements(**more):
        dream(*words, cwd=tmp_path, **environment, CNN_VIS_ALGORITHMS=str(kept), **more)
        assert_near(tmp_path / "out.png", on_cpu)
        return take_counts(folder, "measurements")[0]

    first = measurements()
    lines = kept.read_text().splitlines()
    assert first == len(lines) == len(set(lines)) >= 20
    assert measurements() == 0
    damaged = ["", lines[0], lines[1][:-1], lines[2].replace("\t", " "), "\0\t"]
    damaged.append(lines[3][:-2] + lines[4])  # written by two processes, one of which was killed
    kept.write_text("\n".join([*damaged, *lines[5:], ""]))
    assert measurements() == 4
    assert measurements() == 0
    assert measurements(CUDA_ON_CPU_DRIVER="13020") == first
    assert measurements() == 0
    kept.write_text("")
    assert measurements() == first


@pytest.mark.parametrize(
    "path, told",
    [
        ("nowhere/a.txt", "there is no such folder"),
        (".", "this is not a file"),
        ("fifo", "this is not a file"),
        ("/dev/full", "this is not a file"),
        ("link", "this is not a file"),
        ("notes.txt", "this file holds something else"),
    ],
)
def test_a_bad_file_for_algorithms_is_refused(path, told, tmp_path):
    """Before it is read or added to."""
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "notes.txt").write_text("on CUDA, cuDNN 9 and Caffe\n")
    done = run_cli(*EVERYWHERE, "--gpu=0", cwd=tmp_path, **GPU | {"CNN_VIS_ALGORITHMS": path})
    assert_one_line(done, 2, f"CNN_VIS_ALGORITHMS={path}: {told}", "name a new file")
    assert (tmp_path / "notes.txt").read_text() == "on CUDA, cuDNN 9 and Caffe\n"


def test_tf32_is_another_picture_and_told(cudnn, on_cpu, tmp_path):
    """The picture records --tf32; on the CPU, products keep their full precision."""
    dream("--gpu=0", "--tf32", cwd=tmp_path)
    ratio = psnr(tmp_path / "out.png", on_cpu)
    assert ratio >= 20
    assert IS_REAL or ratio < RATIO
    record, _ = read_record(str(tmp_path / "out.png"))
    assert "--tf32" in record["command"]
    done = run_cli(*DREAM, "--gpu=-1", "--tf32", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "--tf32 has no effect on the CPU" in done.stderr
    assert np.array_equal(pixels(tmp_path / "out.png"), pixels(on_cpu))


# ---- GPUs that fail ------------------------------------------------------------------------------


FAILURES = {  # what is wrong with the GPU, and words of what is said
    "memory": ({"CUDA_ON_CPU_MEMORY": "3000000"}, "memory is full"),
    "driver": ({"CUDA_ON_CPU_DRIVER": "12040"}, "driver is older"),
    "kernels": ({"CUDA_ON_CPU_CAPABILITY": "70"}, "Caffe was built for other GPUs"),
    "kept": ({"CUDA_ON_CPU_EXCLUSIVE": "/proc"}, "another program has it"),
    "lost": ({"CUDA_ON_CPU_FAIL": "700@3"}, "illegal memory access"),
}


@emulated
@pytest.mark.parametrize("failure", FAILURES)
def test_a_gpu_that_was_asked_for_and_fails_is_one_line(failure, tmp_path):
    """With the remedy, and not a word about the user's files."""
    environment, words = FAILURES[failure]
    done = run_cli(*DREAM, "--gpu=1", cwd=tmp_path, **GPU | environment)
    assert_one_line(done, 1, words, "--gpu")
    assert "belong together" not in done.stderr
    assert not os.listdir(tmp_path)


@emulated
@pytest.mark.parametrize("failure", FAILURES)
def test_a_gpu_that_nobody_asked_for_and_fails_is_left_alone(failure, on_cpu, tmp_path):
    """The run is on the CPU and says why; the picture is the CPU's to the last bit."""
    environment, words = FAILURES[failure]
    said = dream(cwd=tmp_path, **environment)
    assert re.search(rf", CPU \(.*{words}.*\), \d+ cores?: ", said), said
    assert np.array_equal(pixels(tmp_path / "out.png"), pixels(on_cpu))


@emulated
def test_a_gpu_that_is_lost_amid_a_run_loses_no_work(whole, tmp_path):
    done = run_cli(
        *RUN, "--gpu=0", "--quiet", cwd=tmp_path, **GPU | {"CUDA_ON_CPU_FAIL": "700@5000"}
    )
    assert_one_line(done, 1, "illegal memory access", f"--resume {CHECKPOINT}")
    done = run_cli("--resume", CHECKPOINT, cwd=tmp_path, **GPU)
    assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path, whole)


@emulated
@pytest.mark.parametrize("gpu, told", [([], "CPU (no GPU found)"), (["--gpu=0"], None)])
def test_without_a_driver_it_is_the_cpu(gpu, told, on_cpu, tmp_path):
    """A Caffe built with CUDA gives the CPU's picture to the last bit."""
    done = run_cli(*DREAM, *gpu, cwd=tmp_path, **NO_DRIVER)
    if told:
        assert done.returncode == 0, done.stderr
        assert told in done.stderr
        assert np.array_equal(pixels(tmp_path / "out.png"), pixels(on_cpu))
    else:
        assert_one_line(done, 2, "--gpu 0", "none found", "-1")


@emulated
def test_a_gpu_that_takes_one_process_only_gets_one(on_cpu, tmp_path, logged):
    folder, environment = logged
    environment |= IN_MEMORY | {"CUDA_ON_CPU_EXCLUSIVE": str(tmp_path)}
    assert ", GPU 1: " in dream("--gpu=1", cwd=tmp_path, **environment)
    assert_near(tmp_path / "out.png", on_cpu)
    assert sum(log["to_host"] > 6 for log in logs(folder)) == 1  # the other has only tried


@emulated
def test_a_batch_is_tried_before_the_run(on_cpu, tmp_path):
    """A batch that is too large for the GPU is noticed at the start, not in the middle of the
    run."""
    small = {"CUDA_ON_CPU_MEMORY": "6500000"}
    done = run_cli(*DREAM, "--gpu=0", "--batch_size=32", cwd=tmp_path, **GPU | small)
    assert_one_line(done, 1, "memory is full", "--batch_size")
    said = dream("--batch_size=32", cwd=tmp_path, **small)
    assert ", CPU (the GPU failed: its memory is full), " in said
    assert np.array_equal(pixels(tmp_path / "out.png"), pixels(on_cpu))
    dream("--gpu=0", cwd=tmp_path, **small)  # a batch that fits is found


def test_processes_that_cannot_be_started_are_an_error(monkeypatch):
    """Processes that did start are ended."""
    popen, started = subprocess.Popen, []

    def fails_at_the_second(*arguments, **options):
        if started:
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        started.append(popen(*arguments, **options))
        return started[0]

    monkeypatch.setattr(subprocess, "Popen", fails_at_the_second)
    with (
        pytest.raises(cnn_vis.RunFailed, match="workers cannot be started"),
        Workers(*WORK, gpus=[0]) as workers,
    ):
        workers.describe()
    assert started[0].returncode == -signal.SIGKILL


def test_more_than_memory_holds_is_refused(tmp_path):
    done = run_cli(*DREAM, "--gpu=0", "--batch_size=10000000000000", cwd=tmp_path, **GPU)
    assert_one_line(done, 2, "--batch_size 10000000000000", "GB", "smaller")


# ---- What a GPU is given to do -------------------------------------------------------------------


@emulated
@pytest.mark.parametrize("arguments", [[*DREAM, "--gpu=-1"], [*EVERYWHERE, "--list_layers"]])
def test_what_is_done_on_the_cpu_takes_nothing_of_a_gpu(arguments, tmp_path, logged):
    folder, environment = logged
    assert run_cli(*arguments, cwd=tmp_path, **environment).returncode == 0
    assert not os.listdir(folder)


@emulated
def test_a_tile_takes_no_more_memory_than_its_own(tmp_path, logged):
    """Though the prototxt asks for ten pictures at a time."""
    text = (GOLDEN / "deploy.prototxt").read_text()
    (tmp_path / "ten.prototxt").write_text(text.replace("input_dim: 1\n", "input_dim: 10\n"))
    folder, environment = logged
    environment |= IN_MEMORY
    one = [*DREAM, "--gpu=0", "--batch_size=1", "--deploy_txt=ten.prototxt"]
    assert run_cli(*one, cwd=tmp_path, **environment).returncode == 0
    for log in logs(folder):
        assert 0 < log["most_taken"] < 5.5e6
        assert log["to_device_bytes"] < 2e6


@emulated
@pytest.mark.parametrize("objective", [[], ["--image_type=amplify_neuron"]])
def test_only_tiles_and_gradients_are_copied(objective, tmp_path, logged):
    """Two copies for a tile, after the first."""
    folder, environment = logged
    environment |= IN_MEMORY
    copies = []
    for steps in (2, 5):
        words = [*objective, "--gpu=0", "--batch_size=1", f"--num_steps={steps}"]
        dream(*words, cwd=tmp_path, **environment)
        copies.append(take_counts(folder, "to_device", "to_host", "on_device"))
    passes = 3 * len(cnn_vis.all_tiles((70, 100), (32, 32)))
    assert tuple(np.subtract(*reversed(copies))) == (passes, passes, 0)


@emulated
def test_both_gpus_have_their_share(tmp_path, logged):
    """However late one is to start on a machine with much else to do."""
    folder, environment = logged
    done = run_cli(*DREAM, "--gpu=0,1", "--initial_size=200x300", cwd=tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    launches = collections.Counter()
    for log in logs(folder):
        launches[log["visible"]] += log["launches"]
    assert set(launches) == {0, 1}
    assert min(launches.values()) > 0.2 * launches.total()


# ---- Passes as graphs ----------------------------------------------------------------------------


SIZES = """
import conftest, cnn_vis, numpy, sys
from cnn_vis_lib.models import NetworkFiles
targets = cnn_vis.layer_terms(sys.argv[3]).targets
network = conftest.Ascent(NetworkFiles(*sys.argv[1:3]), *targets, use_gpu=True)
tiles = numpy.random.default_rng(1).normal(0, 50, (9, 3, *network.network.tile_size))
found = []
for count in [1, 2, 3, 1, 2, 3] * 3 + [9] * 4 + [3, 1, 2] * 2:
    first = len(found) % 4
    batch = tiles[first : first + count].astype("float32")
    found.append((network.gradients(batch)[0].copy(), batch))
numpy.savez("sizes.npz", *(gradient for gradient, _ in found))
"""


@pytest.mark.parametrize("lazy", [None, pytest.param("1", marks=emulated)])
@pytest.mark.parametrize("target", ["inception_a/output", "inception_a/output+-0.5*pool1/norm1"])
@pytest.mark.parametrize("kind", ["CudnnConvolution", "Convolution"])
def test_a_graph_gives_the_same_bits(kind, target, lazy, tmp_path):
    """For any number of tiles, in turn, and after memory has moved. Where nothing is done before it
    has to be, a missing wait would show."""
    change = f"from cnn_vis_lib.description import GPU_LAYERS as g; g['Convolution'] = {kind!r}\n"
    files = (GOLDEN / "deploy.prototxt", GOLDEN / "tiny_inception.caffemodel")
    results = []
    for graphs in ("0", "1"):
        environment = GPU | {"CNN_VIS_GRAPHS": graphs, "CUDA_ON_CPU_LAZY": lazy}
        run_python(change + SIZES, tmp_path, *files, target, **environment)
        results.append(list(np.load(tmp_path / "sizes.npz").values()))
    assert len(results[0]) == 28
    for eager, graph in zip(*results):
        assert eager.any()
        assert eager.tobytes() == graph.tobytes()


@emulated
def test_a_pass_is_one_launch_and_one_wait(tmp_path, logged):
    folder, environment = logged
    environment |= IN_MEMORY
    counts = []
    for steps in (4, 10):
        dream("--gpu=0", "--batch_size=1", f"--num_steps={steps}", cwd=tmp_path, **environment)
        names = ("graph_launches", "waits", "to_device", "to_host", "allocations")
        counts.append(take_counts(folder, *names))
    passes = 6 * len(cnn_vis.all_tiles((70, 100), (32, 32)))
    launches, waits, *copies, allocations = np.subtract(*reversed(counts))
    assert launches == waits == passes
    assert copies == [passes, passes]  # nodes of the graphs
    assert allocations == 0


@emulated
def test_only_what_is_used_is_copied_and_started(tmp_path, logged):
    """Though the GPU was tried with 32 tiles; and cuRAND is not used."""
    folder, environment = logged
    dream("--gpu=0", "--batch_size=32", cwd=tmp_path, **environment)
    for log in logs(folder):
        assert log["to_device_bytes"] < 3 * 12288 * (log["to_device"] + 64)
        assert log["generators"] == 0


@emulated
@pytest.mark.parametrize("switch", ["CNN_VIS_GRAPHS", "CUDA_ON_CPU_REFUSE"])
def test_without_graphs_it_is_the_same_picture(switch, on_cpu, tmp_path, logged):
    """Where they are switched off, or cuDNN refuses to be in one: then a line says so."""
    folder, environment = logged
    said = dream("--gpu=0", cwd=tmp_path, **environment, **{switch: "0"})
    assert_near(tmp_path / "out.png", on_cpu)
    assert said.count("passes are not CUDA graphs") == (switch == "CUDA_ON_CPU_REFUSE")
    assert not any(log["graph_launches"] for log in logs(folder))


@emulated
def test_a_run_waits_wherever_it_has_to(on_cpu, tmp_path):
    dream("--gpu=0,1", cwd=tmp_path, **GPU, CUDA_ON_CPU_LAZY="1")
    assert_near(tmp_path / "out.png", on_cpu)


# ---- The kit for a day with a GPU ----------------------------------------------------------------


@pytest.mark.skipif("IS_REAL", reason="takes its ten minutes there: make gpu-check")
def test_the_kit_runs_through(tmp_path):
    """On emulated GPUs; a part that fails is told and does not end it."""
    parts = ["machine", "gradients", "speed", "layers", "processes", "commands", "starts"]
    parts += ["pictures", "torch"]
    kit = [sys.executable, ROOT / "tests" / "gpu_check.py", "--parts", *parts]
    done = subprocess.run(kit, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "failed" not in done.stdout
    assert re.findall(r"^\| (\w+): ", done.stdout, re.MULTILINE) == parts
    rows = dict(re.findall(r"^\| (.*?) \| (.*) \|$", done.stdout, re.MULTILINE))
    assert rows["GPUs"] == "emulated"
    assert float(rows["relative distance, median"]) < 2e-6
    assert float(re.match(r"1: ([\d.]+), 4: ", rows["cuDNN"])[1]) > 0
    assert rows["2 processes"]
