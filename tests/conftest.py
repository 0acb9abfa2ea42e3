"""What the tests share: where things lie, and the command line run as a user runs it."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
sys.path.insert(0, str(ROOT))

TINY = [f"--deploy_txt={GOLDEN}/deploy.prototxt", f"--caffe_model={GOLDEN}/tiny_inception.caffemodel",
        f"--mean_image={GOLDEN}/mean.npy", "--gpu=-1"]  # fmt: skip


def cnn_vis(*arguments, cwd, timeout=110, **environment):
    """Runs the script in a process of its own, in this environment with changes (None: without that variable); returns the
    finished process with its stdout and stderr as text."""
    environment = {name: value for name, value in (os.environ | environment).items() if value is not None}
    return subprocess.run(
        [sys.executable, str(ROOT / "cnn_vis.py"), *map(str, arguments)],
        cwd=cwd, timeout=timeout, capture_output=True, text=True, env=environment, stdin=subprocess.DEVNULL,
    )  # fmt: skip


def psnr(a, b):
    """Peak signal-to-noise ratio of two 8-bit picture files, in dB; infinite where they are equal."""
    a, b = (np.asarray(Image.open(path)).astype(float) for path in (a, b))
    assert a.shape == b.shape
    error = ((a - b) ** 2).mean()
    return 10 * np.log10(255**2 / error) if error else np.inf


def assert_one_line(process, status, *words):
    """The process ended with `status` and said one line on stderr that holds all the `words`."""
    assert process.returncode == status, process.stderr
    lines = process.stderr.splitlines()
    assert len(lines) == 1, process.stderr
    assert lines[0].startswith("cnn_vis.py: error: ")
    for word in words:
        assert word in lines[0], lines[0]


@pytest.fixture(scope="session")
def photographs(tmp_path_factory):
    """A folder with scikit-image's chelsea.png and coffee.png, and in.jpg of 640x427 pixels."""
    import skimage.data

    folder = tmp_path_factory.mktemp("photographs")
    for name in ("chelsea", "coffee"):
        Image.fromarray(getattr(skimage.data, name)()).save(folder / f"{name}.png")
    Image.fromarray(skimage.data.coffee()).resize((640, 427)).save(folder / "in.jpg", quality=95)
    return folder
