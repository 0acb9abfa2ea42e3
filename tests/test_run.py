"""A run as a whole: what is said, killed and continued, from the command line and from Python."""

import contextlib
import functools
import json
import os
import pathlib
import random
import re
import shlex
import signal
import subprocess
import sys
import time

import nbformat
import numpy as np
import pytest
from conftest import (
    CHECKPOINT,
    GOLDEN,
    ONE,
    QUICK,
    ROOT,
    RUN,
    TINY,
    assert_one_line,
    assert_same_run,
    pixels,
    psnr,
    run_cli,
    run_script,
    session,
    shared_memory,
    start,
    under_way,
    wait_for,
    workers,
)
from nbclient import NotebookClient
from PIL import Image

import cnn_vis
from cnn_vis_lib.behaviors import ARRAYS
from cnn_vis_lib.checkpoints import Checkpoint


def test_a_line_tells_the_run_and_one_its_end(picture, tmp_path):
    """With --verbose, one more tells what only developers want to know."""
    words = [*QUICK, f"--image={picture}", "--iter_behavior=none"]
    line, end = run_cli(*words, cwd=tmp_path).stderr.splitlines()
    assert re.fullmatch(
        r"network, inception_a/output, CPU, \d cores?: 90x60 pixels \(width x height\), 2 steps",
        line,
    )
    same, more, _ = run_cli(*words, "--verbose", cwd=tmp_path).stderr.splitlines()
    assert same == line
    assert more.endswith(
        "tiny_inception.caffemodel; inception_a/output 18x16x16 a tile; sizes 90x60"
    )
    assert re.fullmatch(r"out\.png: done in 00:0\d", end)


def test_seed_makes_noise_repeatable(tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        arguments = [
            *QUICK,
            f"--seed={seed}",
            "--initialization_scale=20",
            "--iter_behavior=none",
            f"--output={name}.png",
        ]
        assert run_cli(*arguments, cwd=tmp_path).returncode == 0
    assert psnr(tmp_path / "a.png", tmp_path / "b.png") == np.inf
    assert psnr(tmp_path / "a.png", tmp_path / "c.png") < 30


def test_kill_and_resume_at_random_moments(whole, tmp_path):
    """kill -9 eight times, anywhere from the start of Python to the last step, then left to end:
    bitwise the same picture."""
    folder, seconds = whole
    moments = random.Random(0)
    memory = set()
    for _ in range(8):
        resume = [f"--resume={CHECKPOINT}"] if (tmp_path / CHECKPOINT).exists() else RUN
        running = start(*resume, "--checkpoint_iter=3", cwd=tmp_path)
        time.sleep(moments.uniform(0.3, 1) * seconds)
        memory |= shared_memory(running.pid)
        running.kill()
        running.communicate()
        wait_for(lambda running=running: not session(running.pid))
    resume = [f"--resume={CHECKPOINT}"] if (tmp_path / CHECKPOINT).exists() else RUN
    done = run_cli(*resume, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path, folder)
    assert not memory


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_save_and_say_how_to_go_on(signum, whole, tmp_path):
    running = under_way(*RUN, "--checkpoint_iter=5", "--quiet", cwd=tmp_path)
    memory = shared_memory(running.pid)
    running.send_signal(signum)
    _, said = running.communicate(timeout=20)
    assert running.returncode == 128 + signum
    assert not memory
    (line,) = said.splitlines()
    assert "out.png" in line
    Image.open(tmp_path / "out.png").verify()
    wait_for(lambda: not session(running.pid))
    command = shlex.split(line.partition("to continue: ")[2])
    assert command[:2] == ["python", str(ROOT / "cnn_vis.py")]  # as it was started
    assert run_cli(*command[2:], cwd=tmp_path).returncode == 0
    assert_same_run(tmp_path, whole[0])


@pytest.mark.parametrize("moment", [0.05, 0.2, 0.4, 0.6, 0.8, 1.2])
def test_ctrl_c_from_a_terminal_shows_no_traceback(moment, tmp_path):
    """A terminal sends Ctrl-C to workers too, at any moment: no traceback from any process."""
    running = start(*RUN, "--num_steps=100000", cwd=tmp_path)
    time.sleep(moment)
    os.killpg(running.pid, signal.SIGINT)
    out, said = running.communicate(timeout=20)
    if running.returncode == 130:
        assert "Traceback" not in said, said
        assert "stopped" in said
    else:  # Python itself was still starting
        assert not re.search(r"cnn_vis.py\", line \d+, in (?!<module>)", said), said
    wait_for(lambda: not session(running.pid))


def test_ctrl_c_is_ignored_in_the_background_of_a_script(tmp_path):
    """As shells promise: Ctrl-C is for the job in the foreground."""
    command = shlex.join([sys.executable, str(ROOT / "cnn_vis.py"), *map(str, RUN), "--seed=1"])
    words = ["sh", "-c", f"{command} & wait $!"]
    running = subprocess.Popen(
        words, cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert "sizes" in running.stderr.readline()
    for pid in set(session(running.pid)) - {running.pid}:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGINT)
    assert running.wait(timeout=60) == 0
    assert (tmp_path / "out.png").exists()


def test_a_ctrl_c_whose_exception_is_lost_still_stops_the_run(tmp_path):
    """C code that ignores exceptions may swallow the one that a signal raises."""
    script = f"""
import contextlib, os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import cnn_vis

def find_network(options, real=cnn_vis.find_network):
    with contextlib.suppress(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    return real(options)

cnn_vis.find_network = find_network
if __name__ == "__main__":
    sys.exit(cnn_vis.main(sys.argv[1:]))
"""
    (tmp_path / "lost.py").write_text(script)
    command = [sys.executable, tmp_path / "lost.py", *RUN, "--num_steps=100000"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 130, done.stderr
    assert done.stderr.splitlines()[-1].endswith("stopped")
    assert not (tmp_path / "out.png").exists()


def test_a_signal_ends_a_run_amid_a_step(tmp_path):
    """Between two tiles; all is saved, and goes on from there."""
    options = [*TINY, "--layer=inception_a/output", "--initial_size=700x700", "--seed=4"]
    options += ["--num_steps=2", "--learning_rate=9", "--stats=stats.csv", "--iter_behavior=gif"]
    options += ["--output_iter=1", "--tv_reg=0.1"]
    alone = tmp_path / "alone"
    alone.mkdir()
    assert run_cli(*options, cwd=alone).returncode == 0
    places = []
    words = options
    for _ in range(20):
        running = start(*words, cwd=tmp_path)
        while "700x700 pixels" not in running.stderr.readline():
            pass
        time.sleep(0.3)
        running.send_signal(signal.SIGTERM)
        _, said = running.communicate(timeout=20)  # on a busy machine
        if running.returncode == 0:
            break
        assert running.returncode == 143, said
        numbers = Checkpoint.read(str(tmp_path / CHECKPOINT), ARRAYS).numbers
        places.append((numbers["step"], numbers["tile"]))
        words = [f"--resume={CHECKPOINT}"]
    assert places == sorted(set(places)), places
    assert any(tile for step, tile in places)
    done = run_cli(*words, cwd=tmp_path) if running.returncode else running
    assert done.returncode == 0
    assert np.array_equal(pixels(tmp_path / "out.png"), pixels(alone / "out.png"))
    assert (tmp_path / "stats.csv").read_text() == (alone / "stats.csv").read_text()
    assert (tmp_path / "out_run.gif").read_bytes() == (alone / "out_run.gif").read_bytes()


@pytest.mark.parametrize("signum", [signal.SIGHUP, signal.SIGTERM])
def test_signals_to_all_processes_save_the_run(signum, whole, tmp_path):
    """As sent when a terminal closes, or by a cluster's scheduler: one line is printed, and the run
    can be resumed."""
    running = under_way(*RUN, "--checkpoint_iter=5", "--quiet", cwd=tmp_path)
    os.killpg(running.pid, signum)
    _, said = running.communicate(timeout=20)
    assert running.returncode == 128 + signum, said
    (line,) = said.splitlines()
    assert "out.png" in line
    wait_for(lambda: not session(running.pid))
    assert run_cli(f"--resume={CHECKPOINT}", cwd=tmp_path).returncode == 0
    assert_same_run(tmp_path, whole[0])


def test_a_second_ctrl_c_ends_at_once(tmp_path):
    """Even in the middle of a long step; here the workers are suspended."""
    running = under_way(*RUN, "--num_steps=100000", "--checkpoint_iter=1", cwd=tmp_path)
    held = workers(running.pid)
    for pid in held:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(0.3)
    running.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert running.poll() is None
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=5)
    assert running.returncode == 130
    assert f"--resume {CHECKPOINT}" in said.splitlines()[-1]
    wait_for(lambda: not session(running.pid))
    assert (tmp_path / CHECKPOINT).exists()


def test_kill_of_the_whole_group_leaves_nothing(tmp_path):
    """As a cluster ends a job: nobody is left to tidy up, and there is nothing to tidy."""
    running = under_way(*RUN, "--num_steps=100000", "--checkpoint_iter=1", cwd=tmp_path)
    memory = shared_memory(running.pid)
    os.killpg(running.pid, signal.SIGKILL)
    running.communicate()
    wait_for(lambda: not session(running.pid))
    assert not memory


def test_resume_refuses_what_changes_the_picture(tmp_path):
    running = under_way(*RUN, "--num_steps=100000", "--checkpoint_iter=1", cwd=tmp_path)
    running.send_signal(signal.SIGTERM)
    running.communicate(timeout=20)
    for option in (
        "--tv_reg=3",
        "--num_steps=7",
        "--seed=6",
        "--layer=pool1",
        "--image=in.png",
        "--use_pixel_learning_rates",
    ):
        name = option.partition("=")[0]
        done = run_cli(f"--resume={CHECKPOINT}", option, cwd=tmp_path)
        assert_one_line(
            done,
            2,
            name,
            CHECKPOINT,
        )
    other = tmp_path / "other.caffemodel"
    other.write_bytes((GOLDEN / "tiny_inception.caffemodel").read_bytes() + b"\x0a\x01x")
    assert_one_line(
        run_cli(f"--resume={CHECKPOINT}", "--caffe_model=other.caffemodel", cwd=tmp_path),
        2,
        "--caffe_model",
        "sha256",
    )
    assert (tmp_path / CHECKPOINT).exists()


def test_a_new_run_keeps_the_checkpoint_of_an_unfinished_one(tmp_path):
    (tmp_path / CHECKPOINT).write_bytes(b"hours of work")
    done = run_cli(*RUN, "--num_steps=1", "--num_sizes=1", cwd=tmp_path)
    assert done.returncode == 0
    assert f"{CHECKPOINT}.old1" in done.stderr
    (tmp_path / CHECKPOINT).write_bytes(b"more work")
    assert run_cli(*RUN, "--num_steps=1", "--num_sizes=1", cwd=tmp_path).returncode == 0
    assert (tmp_path / f"{CHECKPOINT}.old1").read_bytes() == b"hours of work"
    assert (tmp_path / f"{CHECKPOINT}.old2").read_bytes() == b"more work"


def test_checkpoints_count_the_steps_of_all_sizes(tmp_path):
    running = start(
        *TINY,
        "--layer=inception_a/output",
        f"--image={GOLDEN}/input.png",
        "--num_sizes=500",
        "--num_steps=2",
        "--final_size=x2",
        "--checkpoint_iter=5",
        cwd=tmp_path,
    )
    wait_for((tmp_path / CHECKPOINT).exists)
    running.kill()
    running.communicate()
    numbers = Checkpoint.read(str(tmp_path / CHECKPOINT), ARRAYS).numbers
    assert ((numbers["size"] - 1) * 2 + numbers["step"]) % 5 == 0


def test_a_run_goes_on_from_another_folder(picture, tmp_path):
    """Its files were named from the folder that it was started in."""
    options = ["--layer=inception_a/output", "--image=./in.png", "--stats=s.csv", "--num_steps=300"]
    assert run_cli(*TINY, *options, "--output=whole.png", cwd=tmp_path).returncode == 0
    running = under_way(*TINY, *options, "--checkpoint_iter=1", cwd=tmp_path)
    running.send_signal(signal.SIGTERM)
    running.communicate(timeout=20)
    (tmp_path / "elsewhere").mkdir()
    done = run_cli(f"--resume=../{CHECKPOINT}", cwd=tmp_path / "elsewhere")
    assert done.returncode == 0, done.stderr
    assert os.listdir(tmp_path / "elsewhere") == []
    assert np.array_equal(pixels(tmp_path / "out.png"), pixels(tmp_path / "whole.png"))
    assert len((tmp_path / "s.csv").read_text().splitlines()) == 301


@pytest.mark.parametrize(
    "name", ["-o.png", "n\tl.png", "it's $HOME.png", os.fsdecode(b"caf\xe9.png")]
)
def test_the_line_to_continue_works_for_any_name(name, tmp_path):
    running = start(
        *RUN, f"--output={name}", "--num_steps=4000", "--checkpoint_iter=1", cwd=tmp_path
    )
    wait_for((tmp_path / f"{name}.checkpoint").exists)
    running.send_signal(signal.SIGTERM)
    said = running.communicate(timeout=20)[1]
    command = said.splitlines()[-1].partition("to continue: python cnn_vis.py ")[2]
    program = shlex.join([sys.executable, str(ROOT / "cnn_vis.py")])
    words = ["bash", "-c", f"{program} {command} --output_iter=100000 --quiet"]
    running = subprocess.Popen(words, cwd=tmp_path, stderr=subprocess.PIPE, start_new_session=True)
    with pytest.raises(subprocess.TimeoutExpired):  # it goes on
        running.wait(timeout=2)
    os.killpg(running.pid, signal.SIGKILL)
    running.communicate()


def test_a_checkpoint_of_version_1_0_is_told(tmp_path):
    header = np.frombuffer(json.dumps({"command": []}).encode(), np.uint8)
    np.savez(tmp_path / "old.npz", header=header)
    (tmp_path / "old.npz").rename(tmp_path / CHECKPOINT)
    done = run_cli(f"--resume={CHECKPOINT}", cwd=tmp_path)
    assert_one_line(done, 2, "--resume", CHECKPOINT, "version 1.0")


def test_resume_of_one_set_aside(tmp_path):
    """Resuming it continues that run, and keeps the checkpoint of a newer unfinished one."""
    for seed in (1, 2):
        running = start(
            *RUN, f"--seed={seed}", "--num_steps=4000", "--checkpoint_iter=1", cwd=tmp_path
        )
        wait_for(
            (tmp_path / f"{CHECKPOINT}.old1").exists
            if seed == 2
            else (tmp_path / CHECKPOINT).exists
        )
        wait_for((tmp_path / CHECKPOINT).exists)
        running.send_signal(signal.SIGTERM)
        running.communicate(timeout=20)
    second = (tmp_path / CHECKPOINT).read_bytes()
    running = start(f"--resume={CHECKPOINT}.old1", cwd=tmp_path)
    wait_for((tmp_path / f"{CHECKPOINT}.old2").exists)
    running.kill()
    running.communicate()
    assert (tmp_path / f"{CHECKPOINT}.old2").read_bytes() == second
    first = Checkpoint.read(str(tmp_path / f"{CHECKPOINT}.old1"), ARRAYS)
    assert "--seed=1" in first.record["command"]


OPTIONS = {
    "deploy_txt": f"{GOLDEN}/deploy.prototxt",
    "caffe_model": f"{GOLDEN}/tiny_inception.caffemodel",
    "mean_image": f"{GOLDEN}/mean.npy",
    "gpu": -1,
    "layer": "inception_a/output",
}


def test_dream_is_the_command_line(tmp_path):
    """The same pictures, step by step, from a file as from an array."""
    options = {
        "num_steps": 2,
        "num_sizes": 2,
        "final_size": "x1.3",
        "use_pixel_learning_rates": True,
    }
    words = [
        f"--{name}" if value is True else f"--{name}={value}" for name, value in options.items()
    ]
    done = run_cli(
        *TINY,
        "--layer=inception_a/output",
        f"--image={GOLDEN}/input.png",
        *words,
        "--output_iter=1",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    picture = Image.open(GOLDEN / "input.png").convert("RGB")
    for image in (f"{GOLDEN}/input.png", np.asarray(picture), picture):
        seen = 0
        for progress in cnn_vis.dream(image, **OPTIONS, **options):
            expected = Image.open(tmp_path / f"out_{progress.size_number}_{progress.step}.png")
            assert np.array_equal(progress.picture(), np.asarray(expected))
            seen += 1
        assert seen == 4


def test_dream_can_be_left(tmp_path):
    """A loop that is broken off ends the workers."""
    options = {name: value for name, value in OPTIONS.items() if name != "layer"}
    code = f"""
import cnn_vis, os
for progress in cnn_vis.dream(layer="inception_a/output", **{options}):
    break
del progress
import gc; gc.collect()
print(repr(open(f"/proc/self/task/{{os.getpid()}}/children").read()))
"""
    done = run_script(code, tmp_path)
    assert (done.stdout, done.stderr) == ("''\n", "")


LIBRARY = """
import multiprocessing, sys, cnn_vis
from concurrent.futures import ThreadPoolExecutor
def seen(_=0):
    return [progress.step for progress in cnn_vis.dream(**OPTIONS)]
"""
MAINS = {
    "without a guard": "print(seen())",
    "in a thread": "print(ThreadPoolExecutor().submit(seen).result())",
    "in a daemonic process": """
if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(*pool.map(seen, [0]))
""",
}


@pytest.mark.parametrize("main", [*MAINS, "from standard input"])
def test_dream_works_wherever_it_is_called(main, tmp_path):
    """Workers do not run the calling script again, so it need not be one that they can import."""
    options = OPTIONS | {"num_steps": 2, "initial_size": "32x32", "num_sizes": 1}
    code = LIBRARY.replace("OPTIONS", str(options)) + MAINS.get(main, "print(seen())")
    if main == "from standard input":
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        words = {"input": code, "cwd": tmp_path, "env": environment, "timeout": 60}
        done = subprocess.run([sys.executable, "-"], capture_output=True, text=True, **words)
    else:
        done = run_script(code, tmp_path)
    assert (done.stdout, done.stderr) == ("[1, 2]\n", "")


def test_workers_that_cannot_run_are_one_line(tmp_path):
    """With the cause, and without blaming memory."""
    code = """
import cnn_vis, multiprocessing
multiprocessing.set_executable("/bin/false")
try:
    next(cnn_vis.dream(**OPTIONS))
except cnn_vis.RunFailed as error:
    print(error)
"""
    done = run_script(code.replace("OPTIONS", str(OPTIONS)), tmp_path)
    said = "/bin/false cannot run the workers: it ended with status 1"
    assert (done.stdout, done.stderr) == (f"{said}\n", "")


@pytest.mark.parametrize("name", ["signal", "struct", "socket", "caffe"])
def test_files_of_the_current_folder_are_not_run(name, tmp_path):
    """Named as modules that the program imports; in a folder of downloads, say."""
    (tmp_path / f"{name}.py").write_text("open('ran', 'w')\nraise SystemExit('was run')")
    done = run_cli(*ONE, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert set(os.listdir(tmp_path)) == {f"{name}.py", "out.png"}


def test_dream_refuses_what_it_cannot_do():
    with pytest.raises(cnn_vis.BadRequest, match="--num_steps"):
        next(cnn_vis.dream(None, **OPTIONS, num_steps=0))
    with pytest.raises(cnn_vis.BadRequest, match="uint8"):
        next(cnn_vis.dream(np.zeros((40, 40, 3)), **OPTIONS))
    with pytest.raises(cnn_vis.BadRequest, match="uint8"):
        next(cnn_vis.dream(Image.open(GOLDEN / "input.png").convert("L"), **OPTIONS))
    with pytest.raises(cnn_vis.BadRequest, match="uint8"):
        next(cnn_vis.dream(np.zeros((0, 0, 3), np.uint8), **OPTIONS))
    with pytest.raises(cnn_vis.BadRequest, match="--preset dream: this is for photographs"):
        next(cnn_vis.dream(None, preset="dream"))
    with pytest.raises(cnn_vis.BadRequest, match="must not be empty"):
        next(cnn_vis.dream("", **OPTIONS))
    with pytest.raises(cnn_vis.BadRequest, match="command line"):
        next(cnn_vis.dream(None, **OPTIONS, help=True))
    with pytest.raises(cnn_vis.BadRequest, match="--nonsense"):
        next(cnn_vis.dream(None, **OPTIONS, nonsense=1))


def test_dream_tells_its_notices_to_the_logger(caplog):
    with caplog.at_level("INFO", "cnn_vis"), np.errstate(all="raise"):
        for _ in cnn_vis.dream(None, **OPTIONS, num_steps=1, batch_size=4, target_neuron=3):
            pass
    for words in ("noise seed", "--batch_size has no effect", "--target_neuron has no effect"):
        assert words in caplog.text


def test_the_notebook_runs(monkeypatch):
    """From top to bottom, without a screen."""
    monkeypatch.chdir(ROOT / "examples")
    notebook = nbformat.read("library.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    NotebookClient(notebook, timeout=100, kernel_name="python3").execute()
    pictures = [
        output
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    assert len(pictures) == 3


def test_a_step_begun_with_statistics_goes_on_without(tmp_path):
    """Whether statistics are needed may change when a run resumes in the middle of a step."""
    options = [*TINY, "--layer=inception_a/output", "--initial_size=700x700", "--seed=4"]
    options += ["--num_steps=2", "--output_iter=1", "--iter_behavior=plot"]
    running = start(*options, cwd=tmp_path)
    assert "700x700 pixels" in running.stderr.readline()
    time.sleep(0.3)
    running.send_signal(signal.SIGTERM)
    running.communicate(timeout=20)
    assert running.returncode == 143
    done = run_cli(f"--resume={CHECKPOINT}", "--iter_behavior=none", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


# ---- --scratch --------------------------------------------------------------------------------


def test_scratch_changes_nothing(whole, tmp_path):
    """Nor does a stop, and nothing is left in the folder."""
    scratch, folder = tmp_path / "scratch", tmp_path / "run"
    scratch.mkdir()
    folder.mkdir()
    running = under_way(*RUN, "--checkpoint_iter=1", f"--scratch={scratch}", cwd=folder)
    maps = pathlib.Path(f"/proc/{running.pid}/maps").read_text()
    assert maps.count(str(scratch)) >= 2  # image and caches
    assert not os.listdir(scratch)
    running.kill()
    running.wait()
    done = run_cli("--resume", CHECKPOINT, f"--scratch={scratch}", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert_same_run(folder, whole[0])
    assert not os.listdir(scratch)


def test_a_scratch_folder_that_cannot_be_used_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    for name in ("nosuch", "file"):
        done = run_cli(*ONE, f"--scratch={name}", cwd=tmp_path)
        assert_one_line(done, 2, "--scratch", f"{tmp_path}/{name} is not a folder")
    too_large = [*ONE, "--initial_size=200000x200000", f"--scratch={tmp_path}"]
    assert_one_line(run_cli(*too_large, cwd=tmp_path), 2, "--initial_size", "GB")


def test_a_scratch_folder_that_is_full_is_one_line(tmp_path):
    """Simulated by a limit on file sizes that the caches exceed."""
    words = [*ONE, "--initial_size=300x300", "--scratch=."]
    done = run_cli(*words, cwd=tmp_path, limit="-f 300")
    assert_one_line(done, 1, f"--scratch {tmp_path}", "File too large")


def test_a_scratch_folder_that_fills_up_later_loses_nothing(tmp_path):
    """The picture of the size before is there."""
    words = [*ONE, "--initial_size=40x40", "--final_size=400x400", "--num_sizes=2"]
    words += ["--scratch=.", "--checkpoint_iter=0"]
    done = run_cli(*words, cwd=tmp_path, limit="-f 600")
    assert_one_line(done, 1, f"--scratch {tmp_path}", "File too large", "out.png")
    assert Image.open(tmp_path / "out.png").size == (40, 40)


def test_a_library_user_may_fork(tmp_path):
    """A child that is forked in the loop, and outlives the run, does not keep it from ending; nor
    its workers, if the program is killed. A child that leaves the loop does not end them."""
    code = """
import os, sys, time, cnn_vis
for progress in cnn_vis.dream(**OPTIONS):
    if progress.step == 1 and not os.fork():
        time.sleep(60)
        os._exit(0)
    if progress.step == 2 and not os.fork():
        sys.exit()
    if progress.step == 3 and len(sys.argv) > 1:
        print("now", flush=True)
        time.sleep(60)
print(progress.step)
"""
    options = OPTIONS | {"num_steps": 4, "initial_size": "32x32"}
    (tmp_path / "script.py").write_text(code.replace("OPTIONS", str(options)))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for more in ([], ["die"]):
        running = subprocess.Popen(
            [sys.executable, "script.py", *more], cwd=tmp_path, env=environment,
            stdout=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        try:
            if not more:
                assert running.stdout.readline() == b"4\n"
                running.wait(30)
            else:
                assert running.stdout.readline() == b"now\n"
                there = workers(running.pid)
                assert there
                running.kill()
                running.wait()
                left = functools.partial(session, running.pid)
                wait_for(lambda left=left, there=there: not set(left()).intersection(there))
        finally:
            os.killpg(running.pid, signal.SIGKILL)
            running.stdout.close()
