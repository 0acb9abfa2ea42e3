"""`import cnn_vis` as a library, and the notebook that shows it."""

import os
import subprocess
import sys

import nbformat
import numpy as np
import pytest
from conftest import GOLDEN, ROOT, TINY, cnn_vis
from nbclient import NotebookClient
from PIL import Image

import cnn_vis as program

OPTIONS = {"deploy_txt": f"{GOLDEN}/deploy.prototxt", "caffe_model": f"{GOLDEN}/tiny_inception.caffemodel",
           "mean_image": f"{GOLDEN}/mean.npy", "gpu": -1, "layer": "inception_a/output"}  # fmt: skip


def test_dream_is_the_command_line(tmp_path):
    """The same pictures, step by step, from a file as from an array."""
    options = {"num_steps": 2, "num_sizes": 2, "final_size": "x1.3", "use_pixel_learning_rates": True}
    words = [f"--{name}" if value is True else f"--{name}={value}" for name, value in options.items()]
    done = cnn_vis(*TINY, "--layer=inception_a/output", f"--image={GOLDEN}/input.png", *words, "--output_iter=1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    picture = Image.open(GOLDEN / "input.png").convert("RGB")
    for image in (f"{GOLDEN}/input.png", np.asarray(picture), picture):
        seen = 0
        for progress in program.dream(image, **OPTIONS, **options):
            expected = Image.open(tmp_path / f"out_{progress.size_index + 1}_{progress.step + 1}.png")
            assert np.array_equal(progress.picture(), np.asarray(expected))
            seen += 1
        assert seen == 4


def test_dream_can_be_left(tmp_path):
    """A loop that is broken off ends the workers."""
    code = f"""
import cnn_vis, multiprocessing
if __name__ == "__main__":
    for progress in cnn_vis.dream(layer="inception_a/output", **{ {k: v for k, v in OPTIONS.items() if k != "layer"} }):
        break
    del progress
    import gc; gc.collect()
    print(len(multiprocessing.active_children()))
"""
    (tmp_path / "script.py").write_text(code)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    assert (done.stdout, done.stderr) == ("0\n", "")


def test_dream_refuses():
    with pytest.raises(program.BadRequest, match="--num_steps"):
        next(program.dream(None, **OPTIONS, num_steps=0))
    with pytest.raises(program.BadRequest, match="uint8"):
        next(program.dream(np.zeros((40, 40, 3)), **OPTIONS))
    with pytest.raises(program.BadRequest, match="uint8"):
        next(program.dream(Image.open(GOLDEN / "input.png").convert("L"), **OPTIONS))
    with pytest.raises(program.BadRequest, match="uint8"):
        next(program.dream(np.zeros((0, 0, 3), np.uint8), **OPTIONS))
    with pytest.raises(program.BadRequest, match="no such file"):
        next(program.dream("", **OPTIONS))
    with pytest.raises(program.BadRequest, match="--nonsense"):
        next(program.dream(None, **OPTIONS, nonsense=1))


def test_the_notebook_runs(monkeypatch):
    """From top to bottom, without a screen."""
    monkeypatch.chdir(ROOT / "examples")
    notebook = nbformat.read("library.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    NotebookClient(notebook, timeout=100, kernel_name="python3").execute()
    pictures = [output for cell in notebook.cells for output in cell.get("outputs", []) if "image/png" in output.get("data", {})]
    assert len(pictures) == 3
