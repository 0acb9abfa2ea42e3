"""The command `cnn-vis`, as pip, pipx and uv install it: nothing of the clone is needed."""

import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import CHECKPOINT, ROOT, psnr, run_cli, wait_for
from PIL import Image
from test_readme import DOWNLOAD, INSTALLED

import cnn_vis

SMALL = ["--model=googlenet_mini", "--initial_size=224x224", "--seed=1", "--gpu=-1"]
SMALL += ["--initialization_scale=20", "--num_steps=1"]


@pytest.fixture(scope="session")
def command(tmp_path_factory):
    """The command, installed as the README says, from a repository that contains only what the
    Docker image copies, in a new environment that shares this one's packages. There, Python code
    that opens a file of the clone fails."""
    folder = tmp_path_factory.mktemp("installed")
    source, environment = folder / "source", folder / "environment"
    source.mkdir()
    for name in re.findall(r"^!(.*)", (ROOT / ".dockerignore").read_text(), re.MULTILINE):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    git = ["git", "-C", source, "-c", "user.name=test", "-c", "user.email=test@localhost"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "test"]):
        subprocess.run([*git, *words], check=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    (packages,) = environment.glob("lib/python*/site-packages")
    paths = [path for path in sys.path if path.endswith("-packages")]
    (packages / "of_the_tests.pth").write_text("\n".join([*paths, "import far_from_the_clone"]))
    (packages / "far_from_the_clone.py").write_text(
        "import sys\n"
        "def hook(event, values):\n"
        f"    path, allowed = str(values[0]) if event == 'open' else '', {tuple(paths)}\n"
        f"    if path.startswith('{ROOT}/') and not path.startswith(allowed):\n"
        "        raise PermissionError(path)\n"
        "sys.addaudithook(hook)\n"
    )
    (line,) = [line for line in INSTALLED if line.startswith("pip ")]
    program, *words, caffe = shlex.split(line.replace("ADDRESS", f"file://{source}"))
    assert caffe == f"{words[-1]}#subdirectory=pycaffe"  # which these tests have
    here = [program, "--quiet", "--python", environment / "bin" / "python"]
    subprocess.run(
        [sys.executable, "-m", *here, *words, "--no-deps", "--no-build-isolation"], check=True
    )
    shutil.rmtree(source)
    return environment / "bin" / "cnn-vis"


def run_installed(command, *arguments, cwd):
    environment = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
    words = [str(command), *map(str, arguments)]
    return subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True)


def test_it_makes_the_pictures_of_the_script(command, photographs, tmp_path):
    """Each PNG records the command that made it; --reproduce prints it with the name of the program
    that is run."""
    words = ["--image", photographs / "in.jpg", *SMALL, "--verbose"]
    made = [
        run_installed(command, *words, cwd=tmp_path),
        run_cli(*words, "--output=2.png", cwd=tmp_path),
    ]
    assert [done.returncode for done in made] == [0, 0], made
    assert f"{command.parent.parent}/lib" in made[0].stderr  # where its network lies
    assert psnr(tmp_path / "out.png", tmp_path / "2.png") == float("inf")
    with Image.open(tmp_path / "out.png") as file:
        assert file.info["Comment"].startswith("cnn-vis --")
    for name in ("out.png", "2.png"):
        own = run_installed(command, f"--reproduce={name}", "--verbose", cwd=tmp_path).stdout
        other = run_cli(f"--reproduce={name}", "--verbose", cwd=tmp_path).stdout
        assert own.startswith("cnn-vis --model=googlenet_mini --")
        assert other == own.replace("cnn-vis", "python cnn_vis.py", 1)


def test_commands_with_docker(command, photographs, tmp_path):
    """The README's Docker commands fit the Dockerfile, and the installed program runs them."""
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert dockerfile.endswith('WORKDIR /pictures\nUSER 1000:1000\nENTRYPOINT ["cnn-vis"]\n')
    (alias,) = [line for line in INSTALLED if line.startswith("alias cnn-vis='docker run ")]
    networks = re.search("CNN_VIS_MODELS=([^ ]*)", dockerfile)[1]
    volumes = f'--volume "$PWD:/pictures" --volume cnn-vis-networks:{networks}'
    assert alias.endswith(f" {volumes} cnn-vis'")
    asked = [line.split()[1:] for line in INSTALLED if line.startswith("cnn-vis ")]
    asked.remove(DOWNLOAD.split()[2:])
    (tmp_path / "in.jpg").symlink_to(photographs / "in.jpg")
    for words in asked:
        assert run_installed(command, *words, *SMALL, cwd=tmp_path).returncode == 0


def test_it_calls_itself_by_its_name(command, tmp_path):
    done = run_installed(command, "--version", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"cnn-vis {cnn_vis.__version__}\n")
    done = run_installed(command, "--help", "all", cwd=tmp_path)
    assert (done.returncode, done.stdout[:15]) == (0, "usage: cnn-vis ")
    done = run_installed(command, "--nonsense", cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("cnn-vis: error: ")
    done = run_installed(command, "--list_models", cwd=tmp_path)
    assert re.search(r"googlenet_mini .* verified: ", done.stdout)
    assert "cnn-vis --download_model googlenet_places365" in done.stdout


def test_it_lists_layers_and_finds_classes(command, tmp_path):
    done = run_installed(command, "--list_layers", "--model=googlenet_mini", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "inception_4c/output" in done.stdout
    python = command.parent / "python"
    code = "from cnn_vis_lib.terms import *; print(*[len(class_names(n)) for n in CLASSES])"
    done = run_installed(python, "-c", code, cwd=tmp_path)
    assert done.stdout == "1000 365 205\n", done.stderr


def test_it_tells_how_to_go_on(command, tmp_path):
    words = [*SMALL, "--num_steps=20", "--checkpoint_iter=1"]
    running = subprocess.Popen([command, *words], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    wait_for((tmp_path / CHECKPOINT).exists)
    running.send_signal(signal.SIGINT)
    last = running.communicate(timeout=60)[1].splitlines()[-1]
    assert running.returncode == 130
    assert last.startswith("cnn-vis: ")
    assert last.endswith(f"to continue: cnn-vis --resume {CHECKPOINT}")
    done = run_installed(command, "--resume", CHECKPOINT, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("delay", [0, 0.02, 0.05, 0.1, 0.2])
def test_ctrl_c_amid_the_imports_shows_no_traceback(delay, command, tmp_path):
    running = subprocess.Popen([command, *SMALL], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: "_ctypes" in pathlib.Path(f"/proc/{running.pid}/maps").read_text())
    time.sleep(delay)
    running.send_signal(signal.SIGINT)
    assert "Traceback" not in running.communicate(timeout=60)[1]
    assert running.returncode in (-signal.SIGINT, 128 + signal.SIGINT)


def test_it_takes_its_tiles_to_a_cluster(command, dask_cluster, tmp_path):
    dask_cluster.add_worker()
    words = [*SMALL, f"--scheduler={dask_cluster.address}"]
    done = run_installed(command, *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "1 worker" in done.stderr


def test_it_needs_what_the_script_needs(command):
    """But for the path to Caffe."""
    (metadata,) = command.parent.parent.rglob("cnn_vis-*.dist-info/METADATA")
    needed = re.findall(r"^Requires-Dist: (.*)", metadata.read_text(), re.MULTILINE)
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert ["./pycaffe", *needed] == [line for line in lines if line[0] != "#"]


def test_the_progress_of_a_build_changes_nothing(tmp_path):
    """The command gets its input and Ctrl-C, its status is passed on, and if it fails the end of
    its output is shown."""
    script, log = ROOT / "with-progress.sh", tmp_path / "a log"
    code = "import signal, sys; print(sys.stdin.read(), signal.getsignal(signal.SIGINT)); sys.exit("
    ends = []
    for status in (0, 3):
        words = [script, log, sys.executable, "-c", f"{code}{status})"]
        done = subprocess.run(words, input="asked", text=True, capture_output=True, check=False)
        assert done.returncode == status
        assert done.stdout == ""
        assert "asked" in log.read_text()
        assert "default_int_handler" in log.read_text()
        ends.append(done.stderr)
    assert ends == ["", f"{log.read_text()}The whole log: {log}\n"]
