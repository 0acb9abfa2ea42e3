"""The scripts in examples/ do what they say. They are run with the included network, one step and
small pictures."""

import os
import re
import shutil
import stat
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT, free_port
from PIL import Image

import cnn_vis

EXAMPLES = ROOT / "examples"
SCRIPTS = sorted([*EXAMPLES.glob("*.sh"), *EXAMPLES.glob("*.sbatch")])
SHELLCHECK = shutil.which(
    "shellcheck", path=f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
)
FAST = ["--model=googlenet_mini", "--gpu=-1", "--workers=1", "--num_steps=1"]
SMALL = [*FAST, "--initial_size=224x224"]


def run(script, *arguments, cwd, status=0, **environment):
    """Runs a script of examples/ as a user does; returns what it printed, stdout and stderr
    together."""
    done = subprocess.run(
        [EXAMPLES / script, *map(str, arguments)],
        cwd=cwd,
        timeout=110,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | {"CNN_VIS_PYTHON": sys.executable} | environment,
    )
    assert done.returncode == status, done.stdout
    return done.stdout


def stand_in(folder, reaction):
    """The path of a python that does the shell command `reaction` in place of running
    cnn_vis.py."""
    path = folder / "stand-in"
    path.write_text(
        f"#!/bin/sh\ncase $1 in */cnn_vis.py) shift; {reaction} ;; esac\n"
        f'exec "{sys.executable}" "$@"\n'
    )
    path.chmod(0o755)
    return str(path)


def options_of(script, *arguments, cwd, **environment):
    """{option: value} that the script calls cnn_vis.py with, which is not run; flags have the value
    ""."""
    python = stand_in(cwd, 'printf "<%s>\\n" "$@"; exit 9')
    printed = run(script, *arguments, cwd=cwd, status=9, CNN_VIS_PYTHON=python, **environment)
    words = re.findall("^<(.*)>$", printed, re.MULTILINE)
    return {
        word: "" if value[:2] == "--" else value
        for word, value in zip(words, [*words[1:], "--"])
        if word[:2] == "--"
    }


@pytest.fixture
def cat(tmp_path):
    """A picture of 300x226 pixels in a folder, both with difficult names."""
    import skimage.data

    folder = tmp_path / "a folder"
    folder.mkdir()
    path = folder / "my <cat> & co.png"
    Image.fromarray(skimage.data.chelsea()).resize((300, 226)).save(path)
    return path


# ---- All scripts ------------------------------------------------------------------------------


@pytest.mark.skipif(SHELLCHECK is None, reason="shellcheck is not installed")
def test_shellcheck():
    done = subprocess.run([SHELLCHECK, *SCRIPTS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_scripts_can_be_run():
    """All but the one that the others read."""
    executable = {script.name for script in SCRIPTS if script.stat().st_mode & stat.S_IXUSR}
    assert executable == {script.name for script in SCRIPTS} - {"common.sh"}


@pytest.mark.parametrize(
    "script, arguments",
    [
        ("all_layers.sh", []),
        ("neurons.sh", []),
        ("neurons.sh", ["conv2/3x3", "many"]),
        ("compare_networks.sh", []),
        ("zoom.sh", []),
        ("zoom.sh", ["in.png", "many"]),
        ("video.sh", []),
        ("video.sh", ["in.mp4", "--gpu=-1"]),
        ("parallel.sh", ["a", "b"]),
        ("cluster.sh", []),
    ],
)
def test_what_is_missing_is_told_in_one_line(script, arguments, tmp_path):
    lines = run(script, *arguments, cwd=tmp_path, status=2).splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"usage: {script} ")


def test_the_masked_cup_is_kept(tmp_path):
    import skimage.data

    run("mask.sh", *FAST, "--num_sizes=1", "--initial_size=x1", cwd=tmp_path)
    ours, cup = (np.asarray(picture) for picture in (Image.open(tmp_path / "masked.png"),
                 skimage.data.coffee()))  # fmt: skip
    kept = np.asarray(Image.open(tmp_path / "mask.png")) == 0
    assert kept.mean() > 0.3
    assert np.array_equal(ours[kept], cup[kept])
    assert not np.array_equal(ours[~kept], cup[~kept])


# ---- example1.sh to example13.sh --------------------------------------------------------------

# The original's settings: layer, number of sizes, steps, learning rate, decay rate, alpha, p_reg,
# beta, tv_reg, and more.
NOISE = {"initial_size": "270x480", "final_size": "1080x1920"}
AUX = {"alpha_aux": 8, "p_reg_aux": 5e-11, "use_pixel_learning_rates": True}
PLACES = {"model": "googlenet_places205"}
SETTINGS = {
    1: (
        "inception_4d/3x3_reduce",
        5,
        100,
        10,
        0.25,
        6,
        1e-10,
        2.5,
        0.5,
        NOISE,
    ),
    2: ("inception_4c/output", 5, 100, 10, 0.25, 6, 1e-10, 2.5, 0.5, NOISE),
    3: ("inception_4e/output", 5, 100, 10, 0.25, 6, 1e-10, 2.5, 0.5, NOISE),
    4: (
        "inception_4d/3x3_reduce",
        5,
        200,
        10,
        0.25,
        6,
        1e-11,
        2.5,
        0.01,
        NOISE,
    ),
    5: (
        "inception_4b/3x3_reduce",
        5,
        200,
        5,
        0.95,
        4,
        1e-9,
        2.0,
        0.3,
        NOISE | PLACES,
    ),
    6: (
        "inception_4c/pool",
        5,
        150,
        2,
        0.9,
        4,
        1e-9,
        2.5,
        1,
        NOISE | PLACES | {"initialization_scale": 10, "initialization_blur": 1},
    ),
    7: ("inception_3a/1x1", 2, 30, 1, 0.9, 2, 0.5, 2.5, 0.05, {}),
    8: ("inception_3a/3x3_reduce", 2, 30, 1, 0.9, 2, 0.5, 2.5, 0.05, {}),
    9: ("inception_4d/output", 3, 50, 1, 0.9, 2, 0.5, 2.5, 0.05, {}),
    10: ("inception_4d/pool", 4, 50, 1, 0.9, 2, 5, 2.5, 0.1, {}),
    11: ("inception_4d/pool", 5, 50, 1, 0.85, 2, 10, 2.5, 1, AUX),
    12: ("inception_4c/output", 3, 100, 5, 0.85, 2, 0.5, 2.5, 5, AUX),
    13: ("inception_4b/5x5_reduce", 3, 100, 5, 0.85, 2, 0.5, 2.5, 0.5, AUX),
}
NAMES = (
    "target_layer",
    "num_sizes",
    "num_steps",
    "learning_rate",
    "decay_rate",
    "alpha",
    "p_reg",
    "beta",
    "tv_reg",
)


@pytest.mark.parametrize("number", SETTINGS)
def test_example_settings(number, tmp_path):
    """What the script's command comes to: the original's settings, and no others."""
    *values, more = SETTINGS[number]
    python = stand_in(tmp_path, 'printf "%s\\n" "$@"; exit 9')
    printed = run(f"example{number}.sh", cwd=tmp_path, status=9, CNN_VIS_PYTHON=python)
    options = cnn_vis.PARSER.parse_args(printed.splitlines())
    expected = dict(zip(NAMES, values)) | more | {"output_file": f"example{number}.png"}
    changed = {
        action.dest: getattr(options, action.dest)
        for action in cnn_vis.PARSER.options
        if getattr(options, action.dest) != getattr(cnn_vis.PARSER.defaults, action.dest)
    }
    assert changed.pop("preset") == f"example{number}"
    picture = changed.pop("initial_image", None)
    assert (picture is None) == (number <= 6)
    if picture:
        size = Image.open(picture).size
        for name in ("initial_size", "final_size"):
            assert float(changed.pop(name)) * min(size) / max(size) >= 224
    assert changed.keys() <= expected.keys()
    options.target_layer = str(options.target_layer)
    assert {name: getattr(options, name) for name in expected} == expected


@pytest.mark.parametrize("number", SETTINGS)
def test_example_runs(number, tmp_path):
    """From another folder, with options of one's own, which come after the example's."""
    run(
        f"example{number}.sh",
        *SMALL,
        "--num_sizes=1",
        "--iter_behavior=none",
        "--output=my own.png",
        cwd=tmp_path,
    )
    assert Image.open(tmp_path / "my own.png").size == (224, 224)


def test_python_of_the_environment_or_else_of_the_path(tmp_path):
    """Without CNN_VIS_PYTHON the scripts take the repository's environment, and where there is none
    python from the PATH."""
    (tmp_path / "examples").mkdir()
    for name in ("common.sh", "example2.sh"):
        shutil.copy(EXAMPLES / name, tmp_path / "examples")
    for folder in (tmp_path / "bin", tmp_path / ".venv" / "bin"):
        folder.mkdir(parents=True)
        (folder / "python").write_text('#!/bin/sh\necho "$0" "$1"\n')
        (folder / "python").chmod(0o755)
        environment = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
        printed = subprocess.run(
            ["../examples/example2.sh"],
            cwd=tmp_path / "bin",
            env=environment,
            capture_output=True,
            text=True,
        )
        assert printed.stdout == f"{folder}/python {tmp_path}/cnn_vis.py\n"


# ---- Sheets -----------------------------------------------------------------------------------


def test_all_layers(cat):
    folder = cat.parent / "my layers"
    environment = {"SIDE": "224", "LAYERS": "conv2/3x3 no/such inception_3a/1x1"}
    printed = run(
        "all_layers.sh", cat.name, folder.name, *FAST, cwd=cat.parent, status=1, **environment
    )
    assert printed.splitlines()[-1] == "failed: no/such"
    names = ["conv2-3x3.png", "inception_3a-1x1.png", "index.html", "sheet.png", "start.png"]
    assert sorted(path.name for path in folder.iterdir()) == names
    for name in ("conv2-3x3.png", "inception_3a-1x1.png", "start.png"):
        assert Image.open(folder / name).size == (297, 224)
    assert Image.open(folder / "sheet.png").width == 3 * (240 + 8) + 8

    page = (folder / "index.html").read_text()
    assert "<h1>my &lt;cat&gt; &amp; co</h1>" in page
    assert re.findall('src="(.*?)"', page) == ["start.png", "conv2-3x3.png", "inception_3a-1x1.png"]
    assert page.count('<a href="conv2-3x3.png">') == 1
    assert 'alt="conv2/3x3"' in page
    assert "python cnn_vis.py" in page
    assert "--layer=conv2/3x3" in page

    (folder / "conv2-3x3.png").unlink()
    before = (folder / "inception_3a-1x1.png").stat().st_mtime_ns
    run(
        "all_layers.sh",
        cat.name,
        folder.name,
        *FAST,
        cwd=cat.parent,
        SIDE="224",
        LAYERS="conv2/3x3 inception_3a/1x1",
    )
    assert (folder / "conv2-3x3.png").exists()
    assert (folder / "inception_3a-1x1.png").stat().st_mtime_ns == before


def test_all_layers_of_the_network(cat):
    """Without LAYERS they are those of --list_layers. Its pictures are there already, so nothing is
    computed."""
    folder = cat.parent / "my <cat> & co_layers"
    folder.mkdir()
    layers = subprocess.run(
        [sys.executable, ROOT / "cnn_vis.py", "--list_layers", "--model=googlenet_mini"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()[::2]
    for layer in layers:
        Image.new("RGB", (8, 6)).save(folder / f"{layer.replace('/', '-')}.png")
    run("all_layers.sh", cat.name, "--model=googlenet_mini", cwd=cat.parent)
    page = (folder / "index.html").read_text()
    assert re.findall("<figcaption>(.*?)<", page) == ["start", *layers]


def test_a_stopped_picture_is_not_taken_for_a_whole_one(cat):
    """cnn_vis.py saves an unfinished picture when it is stopped or fails; here a stand-in does
    so."""
    python = stand_in(cat.parent, 'for last; do :; done; cp "$PICTURE" "$last"; exit 130')
    environment = {"LAYERS": "conv2/3x3", "CNN_VIS_PYTHON": python, "PICTURE": str(cat)}
    run("all_layers.sh", cat, "folder", cwd=cat.parent, status=1, **environment)
    assert not (cat.parent / "folder" / "conv2-3x3.png").exists()


def test_neurons(tmp_path):
    run("neurons.sh", "inception_3a/5x5_reduce", 2, *FAST, cwd=tmp_path)
    folder = tmp_path / "neurons_inception_3a-5x5_reduce"
    assert sorted(path.name for path in folder.iterdir()) == ["0.png", "1.png", "sheet.png"]
    first, second = (np.asarray(Image.open(folder / name)) for name in ("0.png", "1.png"))
    assert (first != second).any()


def test_neurons_are_no_more_than_there_are(tmp_path):
    folder = tmp_path / "neurons_inception_3a-5x5_reduce"
    folder.mkdir()
    for neuron in range(8):
        Image.new("RGB", (8, 6)).save(folder / f"{neuron}.png")
    run("neurons.sh", "inception_3a/5x5_reduce", *SMALL, cwd=tmp_path)
    assert Image.open(folder / "sheet.png").width == 4 * (240 + 8) + 8


def test_compare_networks(cat, tmp_path):
    """All installed networks are compared: here only the included one."""
    nowhere = {"CNN_VIS_MODELS": str(tmp_path), "CAFFE_ROOT": str(tmp_path), "SIDE": "224"}
    run("compare_networks.sh", cat, *FAST, cwd=tmp_path, **nowhere)
    folder = tmp_path / "my <cat> & co_networks"
    assert sorted(path.name for path in folder.iterdir()) == [
        "googlenet_mini.png",
        "sheet.png",
        "start.png",
    ]
    assert Image.open(folder / "sheet.png").width == 2 * (480 + 8) + 8


def test_guides(tmp_path):
    run("guides.sh", *FAST, "--num_sizes=1", "--initial_size=x1", cwd=tmp_path)
    made = {path.stem: np.asarray(Image.open(path)) for path in tmp_path.glob("guided_by_*.png")}
    assert len(made) == 3
    assert len({picture.tobytes() for picture in made.values()}) == 3
    assert Image.open(tmp_path / "guides.png").width == 2 * (450 + 8) + 8


def test_targets(tmp_path):
    """A picture for each target, and a page of all of them, with their commands."""
    run("targets.sh", *FAST, "--num_sizes=1", "--initial_size=x0.6", cwd=tmp_path)
    made = sorted(path.stem for path in (tmp_path / "targets").glob("*.png"))
    assert len(made) == 6
    assert "inception_4c-output-strong5" in made
    page = (tmp_path / "targets/index.html").read_text()
    assert page.count("<figure>") == 6
    assert "--layer=inception_4c/output:" in page
    assert (tmp_path / "targets.png").exists()


def test_a_page_of_a_folder(tmp_path):
    """It shows all pictures that browsers can display, except intermediate ones."""
    for name in ("a.png", "a_1_50.png", "b_2_7.jpg", "c.webp", "d.tif"):
        Image.new("RGB", (8, 6)).save(tmp_path / name)
    sheet = [sys.executable, EXAMPLES / "sheet.py", tmp_path]
    subprocess.run(sheet, check=True)
    shown = re.findall(r'<img src="([^"]+)"', (tmp_path / "index.html").read_text())
    assert shown == ["a.png", "b_2_7.jpg", "c.webp"]
    sheet[2] = tmp_path / "empty"
    sheet[2].mkdir()
    done = subprocess.run(sheet, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no pictures to show" in done.stderr


def test_sheet(tmp_path):
    """Rows are as high as their highest picture, labels may be missing, and links are relative to
    the page."""
    (tmp_path / "a#b").mkdir()
    for name, size in (
        ("a#b/tall=1.png", (10, 20)),
        ("wide.png", (20, 10)),
        ("square.png", (10, 10)),
    ):
        Image.new("RGB", size, "red").save(tmp_path / name)
    arguments = [
        "sheet.png",
        "a#b/tall=1.png=<tall>",
        "wide.png",
        "square.png=s",
        "--columns=2",
        "--width=50",
    ]
    subprocess.run(
        [sys.executable, EXAMPLES / "sheet.py", *arguments, "--html=page.html"],
        cwd=tmp_path,
        check=True,
    )
    sheet = Image.open(tmp_path / "sheet.png")
    assert sheet.size == (2 * 58 + 8, (100 + 28) + (50 + 28) + 8)
    assert [sheet.getpixel(place) for place in ((30, 107), (90, 32), (30, 160))] == [
        (255, 0, 0)
    ] * 3
    page = (tmp_path / "page.html").read_text()
    assert (
        'src="a%23b/tall%3D1.png" width="10" height="20" loading="lazy" alt="&lt;tall&gt;"' in page
    )
    assert "<figcaption>wide<" in page


# ---- Films ------------------------------------------------------------------------------------


def picture_py(command, *arguments):
    subprocess.run(
        [sys.executable, EXAMPLES / "picture.py", command, *map(str, arguments)], check=True
    )


def test_picture_fit_and_zoom(tmp_path):
    """fit goes by the shorter side; zoom keeps the middle, and takes size, brightness and contrast
    from the model."""
    pixels = np.full((30, 60, 3), 60, np.uint8)
    pixels[10:20, 20:40] = 100
    Image.fromarray(pixels).save(tmp_path / "in.png")
    picture_py("fit", tmp_path / "in.png", tmp_path / "fit.png", 45)
    assert Image.open(tmp_path / "fit.png").size == (90, 45)
    picture_py("zoom", tmp_path / "fit.png", tmp_path / "zoom.png", 2, tmp_path / "in.png")
    zoomed = np.asarray(Image.open(tmp_path / "zoom.png")).astype(float)
    assert zoomed.shape == pixels.shape
    assert abs(zoomed.mean() - pixels.mean()) < 1
    assert abs(zoomed.std() - pixels.std()) < 1
    bright = zoomed[..., 0] > zoomed.mean()
    assert np.ptp(np.nonzero(bright.any(1))) + 1 == pytest.approx(20, abs=1)
    assert np.ptp(np.nonzero(bright.any(0))) + 1 == pytest.approx(40, abs=1)


def test_zoom(cat):
    """Goes on from the last frame that there is; the film needs ffmpeg."""
    printed = run("zoom.sh", cat, 1, *FAST, cwd=cat.parent, SIDE="224")
    folder = cat.parent / "my <cat> & co_zoom"
    before = (folder / "00001.png").stat().st_mtime_ns
    printed = run("zoom.sh", cat, 2, *FAST, cwd=cat.parent, SIDE="224")
    assert (folder / "00001.png").stat().st_mtime_ns == before
    assert {Image.open(folder / name).size for name in ("00001.png", "00002.png")} == {(297, 224)}
    film = cat.parent / "my <cat> & co_zoom.mp4"
    if shutil.which("ffmpeg"):
        assert probe(film, "width,height,nb_frames") == ["296", "224", "2"]
    else:
        assert "ffmpeg is not installed" in printed.splitlines()[-1]


def probe(film, entries):
    """What ffprobe tells about the film's first video stream, as text."""
    command = [
        "ffprobe",
        "-v",
        "error",
        "-select_streams",
        "v",
        "-show_entries",
        f"stream={entries}",
        "-of",
        "csv=p=0",
        film,
    ]
    return (
        subprocess.run(command, capture_output=True, text=True, check=True)
        .stdout.strip()
        .split(",")
    )


def test_zoom_without_ffmpeg(cat):
    """Says how to make the film; the frame is there already."""
    folder = cat.parent / "my <cat> & co_zoom"
    folder.mkdir()
    shutil.copy(cat, folder / "00001.png")
    printed = run("zoom.sh", cat, 1, cwd=cat.parent, PATH=path_without("ffmpeg", cat.parent))
    assert re.match(
        "ffmpeg is not installed; .*'my <cat> & co_zoom.mp4'$", printed.splitlines()[-1]
    )


def path_without(program, folder):
    """A PATH with all that the scripts use but `program`: links in a folder of its own."""
    programs = folder / "programs"
    programs.mkdir()
    for name in {
        "sh",
        "bash",
        "dirname",
        "mkdir",
        "cut",
        "awk",
        "mv",
        "rm",
        "grep",
        "cksum",
        "env",
    } - {program}:
        (programs / name).symlink_to(shutil.which(name))
    return str(programs)


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ffmpeg is not installed")
def test_video(tmp_path):
    """Three frames and their sound. What the frames become is checked in test_video.py."""
    pytest.importorskip("cv2", reason="OpenCV is not installed")
    source = [
        "-f",
        "lavfi",
        "-i",
        "testsrc=size=240x224:rate=12.5",
        "-f",
        "lavfi",
        "-i",
        "sine",
        "-t",
        "0.24",
    ]
    subprocess.run(["ffmpeg", "-loglevel", "error", *source, "my in.mp4"], cwd=tmp_path, check=True)
    printed = run("video.sh", "my in.mp4", "my &%d o:ut.mp4", *FAST, cwd=tmp_path)
    assert printed.splitlines() == [
        *(f"my &%d o:ut.mp4: {number} of 3 frames are dreamed" for number in (1, 2, 3)),
        "my &%d o:ut.mp4",
    ]
    assert probe(tmp_path / "my &%d o:ut.mp4", "width,height,avg_frame_rate,nb_frames") == [
        "240",
        "224",
        "25/2",
        "3",
    ]
    streams = [
        "ffprobe",
        "-v",
        "error",
        "-show_entries",
        "stream=codec_type",
        "-of",
        "csv=p=0",
        "my &%d o:ut.mp4",
    ]
    assert (
        "audio"
        in subprocess.run(streams, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    )
    assert not (tmp_path / "my &%d o:ut.mp4.frames").exists()


@pytest.mark.parametrize(
    "script, arguments, program",
    [
        ("video.sh", ["in.mp4", "out.mp4"], "ffmpeg"),
        ("parallel.sh", [":::", "a", ":::", "b"], "parallel"),
    ],
)
def test_what_is_not_installed_is_told_in_one_line(script, arguments, program, tmp_path):
    printed = run(script, *arguments, cwd=tmp_path, status=1, PATH=path_without(program, tmp_path))
    assert len(printed.splitlines()) == 1
    assert f"apt-get install {program}" in printed


# ---- Many machines ----------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("parallel") is None, reason="GNU parallel is not installed")
def test_parallel(cat):
    """Two layers at once; the same command again has nothing to do."""
    arguments = [*SMALL, ":::", "conv2/3x3", "conv2/norm2", ":::", cat.name]
    run("parallel.sh", *arguments, cwd=cat.parent)
    pictures = [cat.parent / f"my <cat> & co_{layer}.png" for layer in ("conv2-3x3", "conv2-norm2")]
    before = [path.stat().st_mtime_ns for path in pictures]
    run("parallel.sh", *arguments, cwd=cat.parent)
    assert [path.stat().st_mtime_ns for path in pictures] == before


@pytest.mark.parametrize("way", ["ssh", "slurm"])
def test_cluster(way, cat):
    """One picture on two machines, with stand-ins for ssh and srun that run things here."""
    programs = cat.parent / "bin"
    programs.mkdir()
    reactions = {"ssh": 'echo "$4" >> machines; shift 4; exec "$@"', "srun": 'exec "$@"'}
    for name, reaction in reactions.items():
        (programs / name).write_text(f"#!/bin/sh\n{reaction}\n")
        (programs / name).chmod(0o755)
    environment = {"PATH": f"{programs}:{os.environ['PATH']}", "PORT": str(free_port())}
    environment["CNN_VIS_MODELS"] = str(cat.parent / "cache")
    script = "cluster.sh"
    if way == "ssh":
        environment["MACHINES"] = "alpha,beta"
    else:
        script = shutil.copy(EXAMPLES / script, cat.parent / "slurm_script")
        environment |= {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(ROOT)}
    said = run(script, *FAST, f"--image={cat.name}", cwd=cat.parent, **environment)
    assert "out.png: done" in said
    if way == "ssh":
        assert sorted((cat.parent / "machines").read_text().split()) == ["alpha", "beta"]
    assert Image.open(cat.parent / "out.png").size == (300, 226)


def test_cluster_tells_what_does_not_answer(cat):
    """A machine that ssh cannot reach is reported; another one does the work."""
    environment = {"MACHINES": "nosuch.invalid,:", "PORT": str(free_port())}
    environment["CNN_VIS_MODELS"] = str(cat.parent / "cache")
    said = run("cluster.sh", *FAST, f"--image={cat.name}", cwd=cat.parent, **environment)
    assert "nosuch.invalid: " in said
    assert "out.png: done" in said


def test_slurm(cat):
    """Run as Slurm runs it: from a copy of the script, in the submission folder, with Slurm's
    variables. Tasks share the layers, or the pictures of a folder."""
    copy = shutil.copy(EXAMPLES / "slurm.sbatch", cat.parent / "slurm_script")
    environment = {
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_ARRAY_TASK_ID": "8",
        "SLURM_ARRAY_TASK_MAX": "8",
        "SLURM_CPUS_PER_TASK": "2",
    }
    options = options_of(copy, cat.name, "--num_steps", "7", cwd=cat.parent, **environment)
    assert options["--layer"] == "inception_5b/output"
    assert options["--output"] == "./"
    assert (options["--image"], options["--num_steps"], options["--workers"]) == (
        cat.name,
        "7",
        "2",
    )
    (cat.parent / "many pictures").mkdir()
    for name in ("1.png", "1.jpg", "2.png", "3.png", "3.txt", "4.png"):
        shutil.copy(cat, cat.parent / "many pictures" / name)
    shares = []
    for task in range(5):
        environment |= {"SLURM_ARRAY_TASK_ID": f"{task}", "SLURM_ARRAY_TASK_MAX": "4"}
        status, python = 0 if task == 4 else 9, stand_in(cat.parent, 'echo "$@"; exit 9')
        environment |= {"CNN_VIS_PYTHON": python}
        printed = run(copy, "many pictures", cwd=cat.parent, status=status, **environment)
        shares.append(re.findall(r"many pictures/(\S+)", printed))
    assert shares == [["1.jpg", "1.png"], ["2.png"], ["3.png"], ["4.png"], []]


def test_slurm_ends_a_task_and_starts_it_again(cat):
    """The signal that Slurm sends when time is up saves the work. The next task resumes it; once it
    is done, it is not made again."""
    copy = shutil.copy(EXAMPLES / "slurm.sbatch", cat.parent / "slurm_script")
    environment = {
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_ARRAY_TASK_ID": "0",
        "SLURM_CPUS_PER_TASK": "1",
        "LAYERS": "pool1/3x3_s2",
    }
    picture = cat.parent / "my <cat> & co_pool1-3x3_s2.png"
    checkpoint = cat.parent / f"{picture.name}.checkpoint"
    task = subprocess.Popen(
        ["bash", copy, cat.name, "--model=googlenet_mini", "--gpu=-1", "--num_steps=30"],
        cwd=cat.parent,
        env=os.environ | {"CNN_VIS_PYTHON": sys.executable} | environment,
    )
    while not checkpoint.exists():
        time.sleep(0.01)
        assert task.poll() is None
    task.terminate()
    assert task.wait() == 143
    again = [copy, cat.name, "--model=googlenet_mini", "--gpu=-1", "--num_steps=30"]
    assert "goes on after" in run(*again, cwd=cat.parent, **environment)
    assert picture.exists()
    assert not checkpoint.exists()
    assert "1 of 1 pictures are there already" in run(*again, cwd=cat.parent, **environment)
