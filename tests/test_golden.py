"""Faithfulness: the pictures that the original program wrote. golden/README.md tells how they were
made."""

import json
import os
import shlex

import numpy as np
import pytest
from conftest import GOLDEN, TINY, pixels, psnr, run_cli

from cnn_vis_lib.models import MODELS

CASES = json.loads((GOLDEN / "cases.json").read_text())
COMMANDS = [
    [field.strip() for field in line.split("|")]
    for line in (GOLDEN / "googlenet" / "commands.txt").read_text().splitlines()
    if not line.startswith("#")
]


def tiny_pictures(case, folder, *arguments, **environment):
    """Runs a case in `folder`. Returns {name: (largest difference from the original's picture in
    grey levels, PSNR)} for all pictures of the run, including intermediate ones."""
    words = shlex.split(CASES["cases"][case])
    words = [word.replace("=input.png", f"={GOLDEN}/input.png") for word in words]
    seed = f"--seed={CASES['seed']}"
    done = run_cli(*TINY, *words, seed, *arguments, cwd=folder, **environment)
    assert done.returncode == 0, done.stderr
    theirs = GOLDEN / case
    assert sorted(os.listdir(folder)) == sorted(os.listdir(theirs))
    return {
        name: (
            np.abs(pixels(folder / name).astype(int) - pixels(theirs / name)).max(),
            psnr(folder / name, theirs / name),
        )
        for name in os.listdir(theirs)
    }


@pytest.mark.parametrize("case", CASES["cases"])
def test_tiny_network(case, tmp_path):
    """The pictures are the original's."""
    for name, (difference, ratio) in tiny_pictures(case, tmp_path).items():
        assert difference <= 1, name
        assert ratio >= 85, name


@pytest.mark.parametrize(("case", "bound", "arguments"), COMMANDS, ids=[c[0] for c in COMMANDS])
def test_googlenet(case, bound, arguments, photographs, tmp_path):
    """The same on BVLC GoogLeNet, as far as rounding noise allows."""
    if MODELS["bvlc_googlenet"].find_weights() is None:
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
