"""The pure functions: against values of the original's own functions, and gradients against finite differences."""

import json

import numpy as np
import pytest
from conftest import GOLDEN
from hypothesis import given, settings
from hypothesis import strategies as st

import cnn_vis

VALUES = np.load(GOLDEN / "functions.npz")
GEOMETRY = json.loads((GOLDEN / "geometry.json").read_text())


def assert_close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-9 * np.abs(expected).max())


@pytest.mark.parametrize("name", [name for name in VALUES.files if name.startswith("tv")])
def test_tv_values(name):
    flat, *operator, beta, what = name.split("_")
    x = VALUES["x_flat" if flat == "tvflat" else "x"]
    function = {"loss": cnn_vis.tv_loss, "grad": cnn_vis.tv_gradient}[what]
    assert_close(function(x, float(beta), "_".join(operator)), VALUES[name])


@pytest.mark.parametrize("name", [name for name in VALUES.files if name.startswith("p_")])
def test_p_norm_values(name):
    _, p, scale, what = name.split("_")
    function = {"loss": cnn_vis.p_norm_loss, "grad": cnn_vis.p_norm_gradient}[what]
    assert_close(function(VALUES["x"], float(p), float(scale)), VALUES[name])


def test_rmsprop_values():
    cache = np.zeros_like(VALUES["x"])
    for k in range(3):
        step = cnn_vis.rmsprop(VALUES["x"] * (k + 1) - k, cache, 0.85, 1.0)
        assert_close(step, VALUES[f"rms_{k}_step"])
        assert_close(cache, VALUES[f"rms_{k}_cache"])


@pytest.mark.parametrize("size", GEOMETRY["regions"])
def test_tiles_are_the_originals(size):
    even, odd = cnn_vis.tiles(tuple(map(int, size.split("x"))), (224, 224))
    expected = GEOMETRY["regions"][size]
    assert ([list(t) for t in even], [list(t) for t in odd]) == (expected["even"], expected["odd"])


@pytest.mark.parametrize("case", GEOMETRY["sizes"], ids=lambda case: f"{case['initial']}-{case['final']}-{case['type']}")
def test_sizes_are_the_originals(case):
    ends = [cnn_vis.parse_size(case[end], case["base"]) for end in ("initial", "final")]
    assert cnn_vis.size_sequence(*ends, case["num"], case["type"]) == [tuple(size) for size in case["sizes"]]


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


@given(exponent=st.integers(0, 60).map(lambda n: n / 4) | st.floats(0, 12), seed=st.integers(0, 99))
def test_power_is_power(exponent, seed):
    x = np.abs(np.random.default_rng(seed).normal(0, 3, 50))
    np.testing.assert_allclose(cnn_vis.power(x, exponent), x**exponent, rtol=1e-12)


def assert_gradient(loss, gradient, x, seed):
    """The gradient along a random direction is the slope of the loss along it."""
    direction = np.random.default_rng(seed).normal(size=x.shape)
    h = 1e-5
    slope = (loss(x + h * direction) - loss(x - h * direction)) / (2 * h)
    expected = float((gradient(x) * direction).sum())
    rounding = 1e-14 * (abs(loss(x)) + np.square(x).sum()) / h  # of a loss, or of parts of it that cancel out
    assert abs(slope - expected) <= 1e-5 * (np.abs(gradient(x) * direction).sum() + 1e-9) + rounding


shapes = st.tuples(st.just(1), st.just(3), st.integers(3, 12), st.integers(3, 12))


@settings(deadline=None)
@given(shape=shapes, p=st.floats(1.5, 9) | st.sampled_from([2.0, 2.5, 4.0, 6.0, 7.0, 8.0]), scale=st.floats(0.5, 20),
       seed=st.integers(0, 99))  # fmt: skip
def test_p_norm_gradient(shape, p, scale, seed):
    x = np.random.default_rng(seed).normal(0, 2, shape)
    x += np.copysign(0.1, x)  # off the kink at 0
    assert_gradient(lambda x: cnn_vis.p_norm_loss(x, p, scale), lambda x: cnn_vis.p_norm_gradient(x, p, scale), x, seed)


@settings(deadline=None)
@given(shape=shapes, beta=st.floats(0.5, 5) | st.sampled_from([1.0, 2.0, 2.5, 3.0]), scale=st.floats(0.5, 5),
       operator=st.sampled_from(sorted(cnn_vis.TV_OPERATORS)), seed=st.integers(0, 99))  # fmt: skip
def test_tv_gradient(shape, beta, scale, operator, seed):
    x = np.random.default_rng(seed).normal(0, 20, shape)  # no slope as small as the floor
    assert_gradient(
        lambda x: cnn_vis.tv_loss(x, beta, operator, scale), lambda x: cnn_vis.tv_gradient(x, beta, operator, scale), x, seed
    )


def test_gradients_at_zero_are_finite():
    zeros = np.zeros((1, 3, 8, 8))
    for p in (1.0, 1.5, 2.0, 3.0, 6.0):
        assert not cnn_vis.p_norm_gradient(zeros, p, 1.0).any()
    for beta in (0.5, 1.0, 2.0, 2.5):
        assert not cnn_vis.tv_gradient(zeros, beta).any()


@settings(deadline=None)
@given(shape=st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 5), st.integers(1, 5)), l1=st.floats(-2, 2),
       l2=st.floats(-2, 2), clip=st.floats(0.1, 5), seed=st.integers(0, 99))  # fmt: skip
def test_objective_gradient(shape, l1, l2, clip, seed):
    a = np.random.default_rng(seed).normal(0, 3, shape)
    for objective in (cnn_vis.Objective(None, l1, l2, clip), cnn_vis.Objective(neuron=shape[1] - 1)):
        assert_gradient(lambda a, o=objective: sum(map(o.value, a)), lambda a, o=objective: -o.descent(a), a, seed)


@pytest.mark.parametrize(
    ("target", "neuron"), [("inception_a/output", None), ("inception_a/output", 9), ("classifier", None), ("pool1/norm1", None)]
)
def test_objective_gradient_through_caffe(target, neuron):
    """From the picture through a real net: slopes of the objective, in single precision."""
    objective = cnn_vis.Objective(neuron, clip=1e9)
    spec = cnn_vis.NetworkSpec(f"{GOLDEN}/deploy.prototxt", f"{GOLDEN}/tiny_inception.caffemodel", target, objective)
    network = cnn_vis.Network(spec)
    random = np.random.default_rng(5)
    batch = random.normal(0, 60, (2, 3, 32, 32)).astype(np.float32)
    gradient = network.gradients(batch)[0].copy()
    for _ in range(4):
        direction = random.normal(size=batch.shape).astype(np.float32)
        h = 0.02
        up, down = (sum(network.gradients(batch + sign * h * direction)[1]) for sign in (1, -1))
        expected = -float((gradient.astype(float) * direction).sum())
        assert (up - down) / (2 * h) == pytest.approx(expected, rel=0.02, abs=2e-3 * float(np.abs(gradient * direction).sum()))


@pytest.mark.parametrize(("text", "size"), [(None, (426, 640)), ("320", (213, 320)), ("50x60", (50, 60)), ("x0.5", (213, 320))])
def test_sizes(text, size):
    assert cnn_vis.parse_size(text, (426, 640)) == size
