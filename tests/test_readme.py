"""Runs every command of the README and of docs/, with a picture in.jpg, few steps and the included
network."""

import os
import re
import shlex
import socket
import subprocess
import sys
import time

import pytest
from conftest import ROOT, free_port, run_cli, run_script, wait_for
from PIL import Image
from test_prototxts import KNOWN, random_weights

import cnn_vis

PAGES = {path: path.read_text() for path in [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]}
README = "\n".join(PAGES.values())
BLOCKS = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
LINES = [
    line.split("  #")[0].strip()
    for block in BLOCKS
    for line in block.replace("\\\n", " ").splitlines()
]
COMMANDS = [line for line in LINES if line and not line.startswith("#")]
DOWNLOAD = "python cnn_vis.py --download_model bvlc_googlenet"
GO_ON = "python cnn_vis.py --resume out.png.checkpoint"
REPRODUCE = "python cnn_vis.py --reproduce out.png"
PROGRAM = [
    line
    for line in COMMANDS
    if line.startswith("python cnn_vis.py")
    and line not in (DOWNLOAD, GO_ON, REPRODUCE)
    and "--scheduler" not in line
]
CLUSTER = [line for line in COMMANDS if "dask" in line or "cluster" in line or "8786" in line]
INSTALLED = [line for line in COMMANDS if re.search("ADDRESS|docker|^cnn-vis", line)]
SHEET = "examples/sheet.py dreams/"
SCRIPTS = [line for line in COMMANDS if line.startswith("examples/") and line != SHEET]
SMALL = [
    "--model=googlenet_mini",
    "--gpu=-1",
    "--initial_size=224x224",
    "--initialization_scale=20",
]


def test_the_set_up_commands_are_two():
    """Commands that do not run the program are set-up: two `make` commands, one of which runs these
    tests, activating the environment, and the download, which test_models.py tries with its own
    server. The other ways to install are in test_install.py."""
    known = PROGRAM + SCRIPTS + CLUSTER + INSTALLED + [GO_ON, REPRODUCE, SHEET]
    others = [line for line in COMMANDS if line not in known]
    assert others == ["make example", "make test", ". .venv/bin/activate", DOWNLOAD]


@pytest.mark.parametrize("command", PROGRAM, ids=lambda command: " ".join(command.split()[2:6]))
def test_program_commands(command, photographs, tmp_path):
    arguments = shlex.split(command)[2:]
    for name in ("in.jpg", "guide.jpg", "other.jpg", "mask.png"):
        (tmp_path / name).symlink_to(photographs / "in.jpg")
    if "--deploy_txt" in arguments:  # stands for VGG19: the same layers, few channels
        path = tmp_path / arguments[arguments.index("--deploy_txt") + 1]
        path.write_text(KNOWN["VGG19"][0](32))
        weights = random_weights(path)[1].partition("=")[2]
        os.rename(weights, tmp_path / arguments[arguments.index("--caffe_model") + 1])
    done = run_cli(*arguments, "--num_steps=1", "--model=googlenet_mini", "--gpu=-1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    if not {"--help", "--list_models", "--list_layers"} & set(arguments):
        output = cnn_vis.PARSER.parse_args(arguments).output_file
        made = sorted((tmp_path / output).glob("*.png")) if output[-1] == "/" else [output]
        for name in made:
            Image.open(tmp_path / name).verify()
        if output == SHEET.split()[1]:
            assert len(made) == 4
            assert SHEET in COMMANDS
            subprocess.run(
                [sys.executable, ROOT / SHEET.split()[0], output], cwd=tmp_path, check=True
            )
            assert (tmp_path / output / "index.html").exists()


def test_go_on_and_reproduce(tmp_path):
    """A run that is killed goes on by the one command, and the other prints what made its
    picture."""
    command = [
        sys.executable,
        str(ROOT / "cnn_vis.py"),
        *SMALL,
        "--num_steps=60",
        "--checkpoint_iter=1",
    ]
    running = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while not (tmp_path / "out.png.checkpoint").exists():
        time.sleep(0.01)
        assert running.poll() is None
    running.kill()
    running.wait()
    assert GO_ON in COMMANDS
    done = run_cli(*shlex.split(GO_ON)[2:], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert REPRODUCE in COMMANDS
    done = run_cli(*shlex.split(REPRODUCE)[2:], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "--num_steps=60" in done.stdout


def test_the_five_commands_of_a_cluster(photographs, tmp_path):
    """The first has been done for these tests."""
    install, *commands = CLUSTER
    assert install == f"pip install -r {(ROOT / 'requirements-cluster.txt').name}"
    (tmp_path / "in.jpg").symlink_to(photographs / "in.jpg")
    port = free_port()
    commands = [line.replace("HOST:8786", f"127.0.0.1:{port}") for line in commands]
    commands[0] += f" --port={port}"
    *servers, one, many = [shlex.split(line) for line in commands]
    (tmp_path / "frames").mkdir()
    for name in "abc":
        (tmp_path / f"frames/{name}.jpg").symlink_to(photographs / "in.jpg")
    environment = os.environ | {"PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"}
    environment["CNN_VIS_MODELS"] = str(tmp_path)  # the worker's cache
    running = []
    try:
        for words in servers:
            words.append("--no-dashboard")
            running.append(
                subprocess.Popen(words, cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL)
            )
            wait_for(lambda: not socket.socket().connect_ex(("127.0.0.1", port)))
        for command in (one, many):
            done = run_cli(*command[2:], *SMALL, "--num_sizes=1", "--num_steps=1", cwd=tmp_path)
            assert done.returncode == 0, done.stderr
            assert f"tcp://127.0.0.1:{port}, 1 worker" in done.stderr
        assert len(os.listdir(tmp_path / "dreams")) == 3
    finally:
        for process in reversed(running):
            process.terminate()
            process.wait()


@pytest.mark.parametrize("command", SCRIPTS)
def test_scripts(command, photographs, tmp_path):
    (tmp_path / "in.jpg").symlink_to(photographs / "in.jpg")
    words = [
        str(ROOT / command.split()[0]),
        *shlex.split(command)[1:],
        *SMALL[:3],
        "--num_sizes=1",
        "--num_steps=1",
    ]
    environment = os.environ | {
        "LAYERS": "inception_4c/output",
        "SIDE": "224",
        "CNN_VIS_PYTHON": sys.executable,
    }
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.rglob("*.png"))


def test_python_code(photographs, tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (tmp_path / "in.jpg").symlink_to(photographs / "in.jpg")
    done = run_script(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 75
    assert Image.open(tmp_path / "dream.png").size == (400, 267)


def test_make_example(tmp_path):
    """What `make example` runs, in an environment that is already installed."""
    environment = os.environ | {"PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"}
    script = ROOT / "examples" / "example.sh"
    done = subprocess.run(
        [script, "out.png", "--num_steps=1", "--gpu=-1"], cwd=tmp_path, env=environment, check=False
    )
    assert done.returncode == 0
    assert Image.open(tmp_path / "out.png").size == (631, 420)


def test_make_example_runs_that_script():
    done = subprocess.run(
        ["make", "-n", "example"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "examples/example.sh example.png" in done.stdout


def test_make_builds_for_gpus_after_a_build_for_the_cpu(tmp_path):
    def plan(*variables):
        command = ["make", "-n", f"VENV={tmp_path}", *variables, "install"]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout

    now = time.time()
    (tmp_path / "installed").touch()
    os.utime(tmp_path / "installed", (now + 60, now + 60))
    assert "pip install" not in plan()
    assert "pip install" in plan("PYCAFFE_CUDA=1")  # for-gpus does not exist yet
    (tmp_path / "for-gpus").touch()
    assert "pip install" not in plan("PYCAFFE_CUDA=1")
    assert "pip install" not in plan()


def test_the_system_packages_are_those_of_the_build():
    done = subprocess.run(
        [ROOT / "pycaffe/system-packages.sh", "--print"], capture_output=True, text=True, check=True
    )
    assert f"`{done.stdout.strip()}`" in README


def test_options_in_the_readme_exist():
    import cnn_vis

    known = {name for action in cnn_vis.PARSER.options for name in action.option_strings}
    known |= {"--help", "--version"}
    mentioned = set(re.findall(r"`(--\w+)", README)) | {
        word for line in PROGRAM for word in line.split() if word[:2] == "--"
    }
    assert mentioned <= known


def headings(path):
    """What a link to a heading of the page can be."""
    return {
        re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-")
        for heading in re.findall(r"^#+ (.*)", path.read_text(), re.MULTILINE)
    }


@pytest.mark.parametrize(
    "page",
    [
        *(str(path.relative_to(ROOT)) for path in PAGES),
        "CONTRIBUTING.md",
        "examples/README.md",
        "tests/README.md",
        "models/googlenet_mini/README.md",
        "pycaffe/README.md",
    ],
)
def test_links_exist(page):
    """To files, and to headings of a page."""
    path = ROOT / page
    for target, heading in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", path.read_text()):
        if not target.startswith("http"):
            other = path.parent / target if target else path
            assert other.exists(), target
            assert not heading or heading in headings(other), heading


def test_every_page_is_in_the_readmes_map():
    text = (ROOT / "README.md").read_text()
    for path in ROOT.glob("docs/*.md"):
        assert f"(docs/{path.name})" in text
    assert text.count("\n") <= 200


def test_gallery():
    """Every picture has its command, of the program or of a script that is there (test_examples.py
    runs them all), with options that it takes."""
    import cnn_vis

    text = (ROOT / "examples" / "README.md").read_text()
    pictures = re.findall(
        r"!\[[^\]]+\]\((pictures/[^)]+)\)\n\n```sh\n(?:examples/|python cnn_vis)", text
    )
    assert len(pictures) == text.count("![") >= 10
    for path in (ROOT / "examples" / "pictures").iterdir():
        assert path.stat().st_size < 200_000, path
    known = {name for action in cnn_vis.PARSER.options for name in action.option_strings}
    for line in re.findall(r"^python cnn_vis.py (.*)", text, re.MULTILINE):
        cnn_vis.PARSER.parse_args(shlex.split(line, comments=True))
    for line in re.findall(r"^examples/.*", text, re.MULTILINE):
        script, *words = shlex.split(line, comments=True)
        assert os.access(ROOT / script, os.X_OK), script
        assert {word for word in words if word.startswith("--")} <= known
    for script in set(re.findall(r"`(\w+\.(?:sh|sbatch|py|ipynb))\b", text)) - {"cnn_vis.py"}:
        assert (ROOT / "examples" / script).exists(), script
