"""Faithfulness: the pictures that the original program wrote. golden/README.md tells how they were
made."""

import json
import shlex

import numpy as np
import pytest
from conftest import GOLDEN, TINY, psnr, run_cli
from PIL import Image

import cnn_vis

CASES = json.loads((GOLDEN / "cases.json").read_text())
COMMANDS = [
    [field.strip() for field in line.split("|")]
    for line in (GOLDEN / "googlenet" / "commands.txt").read_text().splitlines()
    if not line.startswith("#")
]


@pytest.mark.parametrize("case", CASES["cases"])
def test_tiny_network(case, tmp_path):
    """Every picture of the run, those along the way too, is the original's."""
    arguments = [
        a.replace("=input.png", f"={GOLDEN}/input.png") for a in shlex.split(CASES["cases"][case])
    ]
    done = run_cli(*TINY, *arguments, f"--seed={CASES['seed']}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    expected = {path.name for path in (GOLDEN / case).iterdir()}
    assert {path.name for path in tmp_path.iterdir()} == expected
    for name in expected:
        ours, theirs = (
            np.asarray(Image.open(folder / name)).astype(int)
            for folder in (tmp_path, GOLDEN / case)
        )
        assert np.abs(ours - theirs).max() <= 1, name
        assert psnr(tmp_path / name, GOLDEN / case / name) >= 85, name


@pytest.mark.parametrize(("case", "bound", "arguments"), COMMANDS, ids=[c[0] for c in COMMANDS])
def test_googlenet(case, bound, arguments, photographs, tmp_path):
    """The same on BVLC GoogLeNet, as far as rounding noise allows."""
    if cnn_vis.MODELS["bvlc_googlenet"].find_weights() is None:
        pytest.skip(
            "BVLC GoogLeNet is not in $CAFFE_ROOT/models, $CNN_VIS_MODELS or the user's cache"
        )
    arguments = [
        a.replace("initial_image=", f"initial_image={photographs}/") for a in shlex.split(arguments)
    ]
    done = run_cli(
        "--model=bvlc_googlenet", "--gpu=-1", *arguments, "--iter_behavior=none", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert psnr(tmp_path / "out.png", GOLDEN / "googlenet" / f"{case}.png") >= float(bound)
