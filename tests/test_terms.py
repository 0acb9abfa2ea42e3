"""Objective, regularizers, step: the values of the original's functions, and gradients against
finite differences."""

import numpy as np
import pytest
from conftest import GOLDEN
from hypothesis import given, settings
from hypothesis import strategies as st

import cnn_vis

VALUES = np.load(GOLDEN / "functions.npz")


def assert_close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-9 * np.abs(expected).max())


@pytest.mark.parametrize("name", [name for name in VALUES.files if name.startswith("tv")])
def test_total_variation_has_the_originals_values(name):
    flat, *operator, beta, what = name.split("_")
    x = VALUES["x_flat" if flat == "tvflat" else "x"]
    term = cnn_vis.TotalVariation(1, float(beta), "_".join(operator))
    assert_close({"loss": term.loss, "grad": term.gradient}[what](x), VALUES[name])


@pytest.mark.parametrize("name", [name for name in VALUES.files if name.startswith("p_")])
def test_p_norms_have_the_originals_values(name):
    _, p, scale, what = name.split("_")
    term = cnn_vis.PNorm(1, float(p), float(scale))
    assert_close({"loss": term.loss, "grad": term.gradient}[what](VALUES["x"]), VALUES[name])


def test_rmsprop_has_the_originals_values():
    cache = np.zeros_like(VALUES["x"])
    for k in range(3):
        step = cnn_vis.rmsprop(VALUES["x"] * (k + 1) - k, cache, 0.85, 1.0)
        assert_close(step, VALUES[f"rms_{k}_step"])
        assert_close(cache, VALUES[f"rms_{k}_cache"])


@given(exponent=st.integers(0, 60).map(lambda n: n / 4) | st.floats(0, 12), seed=st.integers(0, 99))
def test_power_is_power(exponent, seed):
    x = np.abs(np.random.default_rng(seed).normal(0, 3, 50))
    np.testing.assert_allclose(cnn_vis.power(x, exponent), x**exponent, rtol=1e-12)


def assert_gradient(term, x, seed):
    """The gradient along a random direction is the slope of the loss along it."""
    loss, gradient = term.loss, term.gradient
    direction = np.random.default_rng(seed).normal(size=x.shape)
    h = 1e-5
    slope = (loss(x + h * direction) - loss(x - h * direction)) / (2 * h)
    expected = float((gradient(x) * direction).sum())
    # Rounding of a loss, or of parts of it that cancel out.
    rounding = 1e-14 * (abs(loss(x)) + np.square(x).sum()) / h
    assert abs(slope - expected) <= 1e-5 * (np.abs(gradient(x) * direction).sum() + 1e-9) + rounding


shapes = st.tuples(st.just(1), st.just(3), st.integers(3, 12), st.integers(3, 12))


@settings(deadline=None)
@given(
    shape=shapes,
    p=st.floats(1.5, 9) | st.sampled_from([2.0, 2.5, 4.0, 6.0, 7.0, 8.0]),
    scale=st.floats(0.5, 20),
    weight=st.floats(0.1, 10),
    seed=st.integers(0, 99),
)
def test_the_p_norms_gradient_is_its_slope(shape, p, scale, weight, seed):
    x = np.random.default_rng(seed).normal(0, 2, shape)
    x += np.copysign(0.1, x)  # off the kink at 0
    assert_gradient(cnn_vis.PNorm(weight, p, scale), x, seed)


@settings(deadline=None)
@given(
    shape=shapes,
    beta=st.floats(0.5, 5) | st.sampled_from([1.0, 2.0, 2.5, 3.0]),
    scale=st.floats(0.5, 5),
    operator=st.sampled_from(sorted(cnn_vis.TV_OPERATORS)),
    weight=st.floats(0.1, 10),
    seed=st.integers(0, 99),
)
def test_total_variations_gradient_is_its_slope(shape, beta, scale, operator, weight, seed):
    x = np.random.default_rng(seed).normal(0, 20, shape)  # no slope as small as the floor
    assert_gradient(cnn_vis.TotalVariation(weight, beta, operator, scale), x, seed)


def test_gradients_at_zero_are_finite():
    zeros = np.zeros((1, 3, 8, 8))
    for p in (1.0, 1.5, 2.0, 3.0, 6.0):
        assert not cnn_vis.PNorm(1, p).gradient(zeros).any()
    for beta in (0.5, 1.0, 2.0, 2.5):
        assert not cnn_vis.TotalVariation(1, beta).gradient(zeros).any()


@settings(deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 5), st.integers(1, 5)),
    l1=st.floats(-2, 2),
    l2=st.floats(-2, 2),
    clip=st.floats(0.1, 5),
    seed=st.integers(0, 99),
)
def test_an_objectives_gradient_is_its_slope(shape, l1, l2, clip, seed):
    a = np.random.default_rng(seed).normal(0, 3, shape)
    for objective in (
        cnn_vis.AmplifyLayer(l1, l2, clip),
        cnn_vis.AmplifyNeuron(shape[1] - 1),
    ):
        assert_gradient(objective, a, seed)
