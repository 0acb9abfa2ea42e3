"""Sizes and tiles: the original's geometry, and sizes that cannot be."""

import json

import pytest
from conftest import GOLDEN, QUICK, TINY, assert_one_line, run_cli
from hypothesis import given
from hypothesis import strategies as st

import cnn_vis
from cnn_vis_lib.options import parse_size

GEOMETRY = json.loads((GOLDEN / "geometry.json").read_text())


@pytest.mark.parametrize("size", GEOMETRY["regions"])
def test_tiles_are_the_originals(size):
    even, odd = cnn_vis.tiles(tuple(map(int, size.split("x"))), (224, 224))
    expected = GEOMETRY["regions"][size]
    assert ([list(t) for t in even], [list(t) for t in odd]) == (expected["even"], expected["odd"])


@pytest.mark.parametrize(
    "case", GEOMETRY["sizes"], ids=lambda case: f"{case['initial']}-{case['final']}-{case['type']}"
)
def test_sizes_are_the_originals(case):
    ends = [parse_size(case[end], case["base"]) for end in ("initial", "final")]
    assert cnn_vis.size_sequence(*ends, case["num"], case["type"]) == [
        tuple(size) for size in case["sizes"]
    ]


@given(total=st.integers(1, 5000), tile=st.integers(1, 300))
def test_tiles_cover_the_axis(total, tile):
    """The tiles start at 0, end at the end, leave no gap, and none reaches its second-next."""
    if total < tile:
        return
    starts = cnn_vis.tile_starts(total, tile)
    assert starts[0] == 0
    assert starts[-1] + tile == total
    assert all(0 < b - a <= tile for a, b in zip(starts, starts[1:]))
    assert all(c - a >= tile for a, c in zip(starts, starts[2:]))


@pytest.mark.parametrize(
    ("text", "size"),
    [(None, (426, 640)), ("320", (213, 320)), ("50x60", (50, 60)), ("x0.5", (213, 320))],
)
def test_sizes_are_what_the_option_says(text, size):
    assert parse_size(text, (426, 640)) == size


@pytest.mark.parametrize(
    "value",
    ["0x0", "x-1", "axb", "31x31", "x1e300", "x0.0001", "99999999x99999999", "1x", "xnan", "xinf"],
)
def test_impossible_sizes_are_one_line(value, tmp_path):
    for name in ("initial_size", "final_size"):
        options = [
            "--num_sizes=2",
            f"--{name}={value}",
            f"--image={GOLDEN}/input.png",
            "--layer=inception_a/output",
        ]
        assert_one_line(run_cli(*TINY, *options, cwd=tmp_path), 2, f"--{name}", value)


def test_a_longer_side_is_raised_until_the_other_side_will_do(tmp_path):
    """So that presets take pictures of any proportions. The start picture is 60x90."""
    words = [*QUICK, f"--image={GOLDEN}/input.png", "--num_sizes=2"]
    done = run_cli(*words, "--initial_size=40", "--final_size=90", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "note: --initial_size 40: 27x40 is smaller than" in done.stderr
    assert "--final_size" not in done.stderr
