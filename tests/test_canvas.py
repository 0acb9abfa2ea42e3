"""Pictures that stay on a GPU while their steps are taken: the same bits, and nothing is lost."""

import itertools
import os
import signal
import time

import numpy as np
import pytest
from conftest import (
    CARD,
    CHECKPOINT,
    RUN,
    assert_one_line,
    kill_workers,
    pixels,
    run_cli,
    session,
    under_way,
    wait_for,
    workers,
)
from PIL import Image
from test_dream import SILENT
from test_gpu import (  # noqa: F401
    EVERYWHERE,
    GPU,
    IN_MEMORY,
    IS_REAL,
    _there_is_a_gpu,
    emulated,
    gpu_environment,
    logged,
    logs,
    run_python,
    take_counts,
)

import cnn_vis
from cnn_vis_lib.ahead import overlap
from cnn_vis_lib.behaviors import ARRAYS
from cnn_vis_lib.checkpoints import Checkpoint
from cnn_vis_lib.gpu_picture import Layout, apart

DREAM = [*EVERYWHERE, "--gpu=0", "--layer=inception_a/output", "--iter_behavior=none"]
# Nothing is measured.
PLAIN = [*(w for w in RUN if not w.startswith(("--stats", "--iter", "--gpu"))), "--gpu=0"]
PLAIN += ["--iter_behavior=none"]
FILES = ("--deploy_txt=", "--caffe_model=", "--mean_image=")
NETWORK = [word.partition("=")[2] for word in EVERYWHERE if word.startswith(FILES)]


def assert_same(path, other):
    """The same pixels; on a real GPU, whose sums depend on the number of tiles, nearly."""
    difference = np.abs(pixels(path).astype(int) - pixels(other))
    assert difference.max() <= (8 if IS_REAL else 0)


@pytest.fixture(scope="module")
def in_memory(tmp_path_factory):
    """The picture of PLAIN, with its steps in memory."""
    folder = tmp_path_factory.mktemp("memory")
    assert run_cli(*PLAIN, cwd=folder, **GPU | IN_MEMORY).returncode == 0
    return folder / "out.png"


# ---- The same pictures ---------------------------------------------------------------------------


RUNS = {
    "noise": "--seed=1 --initial_size=70x100 --num_steps=5",
    "several sizes, schedules, a rate for each pixel": "--image=card.png --initial_size=x0.5 "
    "--num_sizes=3 --num_steps=5 --use_pixel_learning_rates --tv_grad_operator=sobel "
    "--tv_reg_step=0.3 --tv_reg_step_iter=2 --learning_rate_decay_iter=2 "
    "--learning_rate_decay_fraction=0.5",
    "the change, by the mean": "--image=card.png --num_steps=5 --step_rule=mean --enlarge=change "
    "--num_sizes=2 --initial_size=x0.7 --tv_grad_operator=sobel_squish --batch_size=3 "
    "--alpha_aux=8 --p_reg_aux=1e-19 --p_reg=0 --tv_reg=0.01 --strength=2",
    "odd exponents and units, sometimes measured": "--image=card.png --num_steps=7 "
    "--output_iter=3 --iter_behavior=print --alpha=3 --beta=2.5 --p_scale=2 --tv_reg_scale=3",
    "several sizes, sometimes measured": "--initial_size=32x32 --final_size=64x64 --num_sizes=2 "
    "--num_steps=5 --output_iter=2 --iter_behavior=print --seed=1",
    "a mask": "--image=card.png --num_steps=4 --mask=mask.png --p_reg=0 --beta=3",
    "no regularizers": "--image=card.png --num_steps=4 --p_reg=0 --tv_reg=0 --input_scale=0.5",
}


@pytest.fixture(scope="module", params=RUNS)
def run(request, tmp_path_factory):
    """(A folder, the words of a run there), whose picture by steps in memory is memory.png."""
    folder = tmp_path_factory.mktemp("run")
    CARD.save(folder / "card.png")
    mask = np.zeros((160, 200), np.uint8)
    mask[20:60, 90:] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    words = [*DREAM, *RUNS[request.param].split()]
    done = run_cli(*words, "--output=memory.png", cwd=folder, **GPU | IN_MEMORY)
    assert done.returncode == 0, done.stderr
    return folder, words


@pytest.mark.parametrize("switches", [{}, pytest.param({"CUDA_ON_CPU_LAZY": "1"}, marks=emulated)])
def test_the_picture_is_that_of_steps_in_memory(run, switches):
    folder, words = run
    done = run_cli(*words, "--output=canvas.png", cwd=folder, **GPU | switches)
    assert done.returncode == 0, done.stderr
    assert "not CUDA graphs" not in done.stderr
    assert_same(folder / "canvas.png", folder / "memory.png")


def test_without_graphs_it_is_the_same_picture(in_memory, tmp_path):
    assert run_cli(*PLAIN, cwd=tmp_path, **GPU | {"CNN_VIS_GRAPHS": "0"}).returncode == 0
    assert_same(tmp_path / "out.png", in_memory)


LIBRARY = f"""
import conftest, cnn_vis, os, sys
IS_REAL = {IS_REAL}
words = dict(zip(("deploy_txt", "caffe_model", "mean_image"), sys.argv[1:]))
words |= dict(layer="inception_a/output", gpu=0, seed=1)

def assert_same(picture, other):
    assert abs(picture.astype(int) - other).max() <= (8 if IS_REAL else 0)

"""
EACH_STEP = """
found = []
for on in "01":
    os.environ["CNN_VIS_CANVAS"] = on
    run = cnn_vis.dream(initial_size="70x100", num_steps=5, **words)
    found.append([progress.picture() for progress in run])
    run = cnn_vis.dream(initial_size="70x100", num_steps=5, **words)
    third = [next(run) for _ in range(3)][-1]
    run.close()
    assert_same(third.picture(), found[-1][2])
assert len(found[0]) == 5
for pair in zip(*found):
    assert_same(*pair)
"""


def test_the_library_gives_each_steps_picture(tmp_path):
    """And that of a run that is left."""
    run_python(LIBRARY + EACH_STEP, tmp_path, *NETWORK, **GPU)


INTERRUPTED = """
import signal
how, words["initial_size"] = sys.argv[4], "83x77"
pictures = [progress.picture() for progress in cnn_vis.dream(num_steps=14, **words)]

class Alarm(BaseException):
    pass

def ring(*_):
    if called:  # else it is too early or too late
        raise Alarm

called = []

def call(function, *arguments):
    called.append(function)
    try:
        return function(*arguments)
    except Alarm:
        return None
    finally:
        called.clear()

"""
ASKED_OR_NOT = """
def number(picture):  # of the step whose picture is most like it: it may be amid one
    return 1 + min(range(14), key=lambda i: abs(picture.astype(int) - pictures[i]).sum())

signal.signal(signal.SIGALRM, ring)
for delay in (1e-4, 3e-4, 1e-3, 3e-3, 1e-2):
    run, steps = cnn_vis.dream(num_steps=14, **words), []
    for progress in run:
        steps.append(progress.step)
        if progress.step != 8:
            continue
        if how == "thrown":
            call(run.throw, Alarm)
            assert number(progress.picture()) == 8
            break
        signal.setitimer(signal.ITIMER_REAL, delay)
        if how == "asking":
            call(progress.picture)
            signal.setitimer(signal.ITIMER_REAL, 0)
            assert number(progress.picture()) == 8
        else:
            while call(next, run, None):
                pass
            assert number(progress.picture()) >= 8
            break
    if how == "asking":
        assert steps == [*range(1, 15)], steps
        assert number(progress.picture()) == 14
"""


@pytest.mark.parametrize("how", ["asking", "thrown", "a step"])
def test_an_interrupted_library_run_still_has_its_picture(how, tmp_path):
    """An exception of a signal's handler while a picture is asked for, or while a step is done; or
    one that is thrown into the run."""
    run_python(LIBRARY + INTERRUPTED + ASKED_OR_NOT, tmp_path, *NETWORK, how, **GPU)


HALF_FETCHED = """
class Half:  # an array; Alarm comes when the picture has been copied to it, but nothing else
    def __init__(self, canvas):
        self.arrays, self.array = canvas._arrays, canvas._arrays["image"]

    def __setitem__(self, *arguments):
        self.array.__setitem__(*arguments)
        self.arrays["image"] = self.array
        raise Alarm

steps = []
for progress in cnn_vis.dream(num_steps=14, **words):
    steps.append(progress.step)
    if progress.step == 8:
        canvas = progress.get_image.__self__.canvas
        canvas._arrays["image"] = Half(canvas)
        assert call(progress.picture) is None
    if progress.step == 10:
        conftest.kill_workers(os.getpid())
assert steps == [*range(1, 15)]
assert_same(progress.picture(), pictures[-1])
"""


def test_a_picture_that_was_half_fetched_is_not_mixed_with_another(tmp_path):
    """If the worker then dies, and steps are taken again from there."""
    run_python(LIBRARY + INTERRUPTED + HALF_FETCHED, tmp_path, *NETWORK, "", **GPU)


STILL = """
words |= dict(zip(("deploy_txt", "caffe_model"), sys.argv[4:]), layer="after")
words |= dict(initial_size="40x40", final_size="60x60", num_sizes=2, num_steps=3)
words |= dict(p_reg=0, p_reg_aux=0, tv_reg=0)
try:
    for progress in cnn_vis.dream(**words):
        assert progress.get_image.__self__.canvas
except cnn_vis.RunFailed as error:
    assert "no step changes the picture" in str(error)
assert progress.picture().shape == (60, 60, 3)
"""


def test_a_run_that_changes_nothing_still_has_its_picture(tmp_path):
    (tmp_path / "net.prototxt").write_text(SILENT.format(shift=-1000))
    (tmp_path / "no.caffemodel").write_bytes(b"")
    words = (*NETWORK, "net.prototxt", "no.caffemodel")
    run_python(LIBRARY + STILL, tmp_path, *words, **GPU)


def test_this_build_can_hold_pictures(tmp_path):
    """Compilers differ in which functions they hide."""
    script = "from cnn_vis_lib.prototxt import caffe_library as c; c().cnn_vis_end_step"
    run_python(script, tmp_path, **GPU)


# ---- What a step asks of the GPU -----------------------------------------------------------------


@emulated
@pytest.mark.parametrize("batch_size, parts", [(32, 2), (2, 6)])
def test_a_step_is_a_launch_for_each_part_and_one_wait(batch_size, parts, tmp_path, logged):  # noqa: F811
    """And no copy."""
    folder, environment = logged
    words = [*DREAM, "--initial_size=70x100", "--seed=1", f"--batch_size={batch_size}"]
    names = ("graph_launches", "waits", "to_device", "to_host", "on_device", "memsets", "pinned")
    counts = []
    for steps in (4, 10):
        done = run_cli(*words, f"--num_steps={steps}", cwd=tmp_path, **environment)
        assert done.returncode == 0, done.stderr
        counts.append(take_counts(folder, *names))
    launches, waits, *others = np.subtract(*reversed(counts))
    assert (launches, waits) == (6 * parts, 6)
    assert others[:3] == [0, 0, 0]


@emulated
@pytest.mark.parametrize(
    "more", [["--scratch=."], ["--layer=inception_a/output:1-5"], ["--gpu=0,1"], ["--stats=a.csv"]]
)
def test_what_cannot_be_there_stays_in_memory(more, tmp_path, logged):  # noqa: F811
    folder, environment = logged
    words = [*DREAM, "--initial_size=70x100", "--seed=1", "--num_steps=5", *more]
    assert run_cli(*words, cwd=tmp_path, **environment).returncode == 0
    assert sum(log["to_host"] for log in logs(folder)) > 5


@emulated
def test_a_picture_that_does_not_fit_stays_in_memory(tmp_path, logged):  # noqa: F811
    folder, environment = logged
    words = [*DREAM, "--initial_size=400x500", "--num_steps=2", "--seed=1", "--batch_size=1"]
    little = {"GPU": {"CUDA_ON_CPU_MEMORY": "9000000"}, "memory": {"limit": "-f 8000"}}
    for name, more in {"all": {}, **little}.items():
        done = run_cli(*words, f"--output={name}.png", cwd=tmp_path, **environment | more)
        assert done.returncode == 0, done.stderr
        assert (take_counts(folder, "to_host")[0] > 2 * 13 * 16) == (name != "all")
        assert_same(tmp_path / "all.png", tmp_path / f"{name}.png")


@emulated
@pytest.mark.parametrize("memory", ["34000000", "36000000"])
def test_a_picture_leaves_the_network_what_it_needs(memory, tmp_path):
    """For the largest batch, of which the network has not seen any when the picture comes."""
    words = [*DREAM, "--initial_size=600x700", "--num_steps=2", "--seed=1"]
    done = run_cli(*words, cwd=tmp_path, **GPU, CUDA_ON_CPU_MEMORY=memory)
    assert done.returncode == 0, done.stderr


NO_ROOM = """
pictures = []
for on in "01":
    os.environ["CNN_VIS_CANVAS"] = on
    steps = []
    for progress in cnn_vis.dream(initial_size="400x500", batch_size=1, num_steps=3, **words):
        steps.append(progress.step)
        if len(steps) == 2 and on == "1":
            os.environ["CUDA_ON_CPU_MEMORY"] = "9000000"
            conftest.kill_workers(os.getpid())
            if sys.argv[4] == "asked":
                try:
                    progress.picture()
                    raise AssertionError
                except cnn_vis.RunFailed:
                    pass
                del os.environ["CUDA_ON_CPU_MEMORY"]
                conftest.kill_workers(os.getpid())
    pictures.append(progress.picture())
    assert steps == ([1, 2, 3] if on == "0" else [1, 2, 1, 2, 3]), steps
assert (pictures[0] == pictures[1]).all()
"""


@emulated
@pytest.mark.parametrize("picture", ["asked", "not asked"])
def test_a_picture_that_no_longer_fits_goes_on_in_memory(picture, tmp_path):
    """If the worker is killed, and another program has taken the GPU's memory; also if somebody
    then asks for the picture, is told, and goes on."""
    run_python(LIBRARY + NO_ROOM, tmp_path, *NETWORK, picture, **GPU)


# ---- Nothing is lost -----------------------------------------------------------------------------


def test_a_worker_that_is_killed_is_replaced(in_memory, gpu_environment, tmp_path):  # noqa: F811
    """What it had done since the picture was last fetched is done again."""
    running = under_way(*PLAIN, "--checkpoint_iter=7", cwd=tmp_path)
    assert kill_workers(running.pid)
    _, said = running.communicate(timeout=60)
    assert running.returncode == 0, said
    assert_same(tmp_path / "out.png", in_memory)


@pytest.mark.parametrize("rule", [["--p_reg=1e-9"], ["--step_rule=mean", "--tv_reg=0.001"]])
def test_ctrl_c_amid_a_step_loses_nothing(rule, gpu_environment, tmp_path):  # noqa: F811
    """A step has 28 parts."""
    size = ["--initial_size=120x220", "--num_sizes=1", "--num_steps=12", "--batch_size=1"]
    words, amid = [*PLAIN, *size, *rule], []
    assert run_cli(*words, "--output=whole.png", cwd=tmp_path, **GPU).returncode == 0
    while not any(amid) and len(amid) < 5:
        running = under_way(*words, "--checkpoint_iter=2", cwd=tmp_path)
        time.sleep(0.02 * len(amid))
        running.send_signal(signal.SIGINT)
        running.communicate(timeout=60)
        wait_for(lambda pid=running.pid: not session(pid))
        amid.append(Checkpoint.read(str(tmp_path / CHECKPOINT), ARRAYS).numbers["tile"])
        done = run_cli("--resume", CHECKPOINT, cwd=tmp_path, **GPU)
        assert done.returncode == 0, done.stderr
        assert_same(tmp_path / "out.png", tmp_path / "whole.png")
    assert any(amid)


def test_a_signal_does_not_wait_for_a_gpu_that_hangs(in_memory, gpu_environment, tmp_path):  # noqa: F811
    """The run can be resumed from where the picture was last here."""
    running = under_way(*PLAIN, "--checkpoint_iter=3", cwd=tmp_path)
    for pid in workers(running.pid):
        os.kill(pid, signal.SIGSTOP)
    running.send_signal(signal.SIGTERM)
    _, said = running.communicate(timeout=40)
    assert running.returncode == 128 + signal.SIGTERM, said
    assert "the GPU does not answer" in said
    wait_for(lambda: not session(running.pid))
    assert run_cli("--resume", CHECKPOINT, cwd=tmp_path, **GPU).returncode == 0
    assert_same(tmp_path / "out.png", in_memory)


@emulated
def test_a_gpu_that_is_lost_loses_little(in_memory, tmp_path):
    """The run ends with the state as it was when it was last fetched."""
    lost = {"CUDA_ON_CPU_FAIL": "700@3000"}
    done = run_cli(*PLAIN, "--quiet", cwd=tmp_path, **GPU | lost)
    assert_one_line(done, 1, "illegal memory access", f"--resume {CHECKPOINT}")
    assert run_cli("--resume", CHECKPOINT, cwd=tmp_path, **GPU).returncode == 0
    assert_same(tmp_path / "out.png", in_memory)


@pytest.mark.parametrize(
    "words, told",
    [
        ("--learning_rate=1e300 --p_reg=1e9", "the picture overflowed at step 1 of size 1"),
        ("--layer=classifier --l2_weight=1e38", "the start picture is not a number"),
        (
            "--learning_rate_decay_fraction=1e9 --learning_rate_decay_iter=1 --batch_size=1",
            "the picture overflowed at step 5 of size 1",
        ),
    ],
)
def test_a_picture_that_overflows_is_told_in_the_same_way(words, told, tmp_path):
    words = [*words.split(), "--initial_size=70x100", "--num_steps=9", "--seed=1", "--quiet"]
    said = []
    for name, environment in {"canvas": {}, "memory": IN_MEMORY}.items():
        (tmp_path / name).mkdir()
        said.append(run_cli(*DREAM, *words, cwd=tmp_path / name, **GPU | environment))
        assert said[-1].returncode == 1
        assert told in said[-1].stderr
    assert said[0].stderr == said[1].stderr
    names = [sorted(p.name for p in (tmp_path / name).iterdir()) for name in ("canvas", "memory")]
    assert names[0] == names[1]


# ---- Parts ---------------------------------------------------------------------------------------


def test_parts_are_the_tiles_in_order():
    """Of every turn; those of one level do not overlap."""
    random = np.random.default_rng(5)
    for _ in range(200):
        size, batch = tuple(map(int, random.integers(8, 90, 2))), int(random.integers(1, 12))
        turns = tuple(map(tuple, cnn_vis.tiles(size, (8, 8))))
        parts = Layout(size, (8, 8), turns, frozenset(), 1.0, batch).parts()
        regions, at = list(itertools.chain(*turns)), 0
        for part in parts:
            assert part.first == at
            assert 0 < part.count <= batch
            for count in part.levels:
                level = regions[at : at + count]
                assert not any(overlap(*pair) for pair in itertools.combinations(level, 2))
                at += count
        assert at == len(regions)
        assert [part.whole for part in parts if part.whole] == [len(t) for t in turns if t]


def test_levels_are_as_few_as_columns():
    even, odd = cnn_vis.tiles((1080, 1920), (224, 224))
    assert [len(apart(even)), len(apart(odd))] == [9, 9]
