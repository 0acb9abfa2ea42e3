"""Objective, regularizers, step: the values of the original's functions, and gradients against
finite differences."""

import numpy as np
import pytest
from conftest import GOLDEN
from hypothesis import given, settings
from hypothesis import strategies as st

import cnn_vis
from cnn_vis_lib.compiled_step import compiled_step

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


EXPONENTS = st.one_of(st.sampled_from([1, 1.5, 2, 2.5, 3, 4, 6, 8, 12]), st.floats(1, 9))


@pytest.mark.skipif(compiled_step() is None, reason="this Caffe is not ours")
@settings(max_examples=300, deadline=None)
@given(
    shape=st.tuples(st.integers(3, 40), st.integers(3, 40)),
    weights=st.tuples(*[st.sampled_from([0, 1e-4, 0.3])] * 3),
    exponents=st.tuples(EXPONENTS, EXPONENTS, EXPONENTS),
    scales=st.tuples(*[st.sampled_from([1, 0.5, 60])] * 3),
    operator=st.sampled_from(sorted(cnn_vis.TV_OPERATORS)),
    has_start=st.booleans(),
    has_counts=st.booleans(),
    has_cache=st.booleans(),
    smooths_change=st.booleans(),
    decay=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_the_compiled_step_is_numpys(
    shape,
    weights,
    exponents,
    scales,
    operator,
    has_start,
    has_counts,
    has_cache,
    smooths_change,
    decay,
    seed,
):
    """x and cache are equal to the last bit if `power` uses only square roots and products.
    Otherwise, like the step's mean, they agree within 1e-12 of the largest term, as terms may
    cancel."""
    random, place = np.random.default_rng(seed), np.s_[:, 2 : 2 + shape[0], 3 : 3 + shape[1]]
    x, mean = random.normal(0, 60, (3, 50, 60)), 103.7
    start = random.integers(0, 256, (3, 50, 60), np.uint8)
    x[:, :9] = 0  # flat, and without a sign
    counts = random.integers(1, 4, (50, 60)).astype(float)
    descent = random.normal(0, 1, (3, *shape)).astype(np.float32)
    cache = random.random((3, *shape)) if has_cache else np.empty(0)
    norms = zip(weights[:2], exponents, scales, (True, False))
    p, aux = (cnn_vis.PNorm(*norm) for norm in norms)
    tv = cnn_vis.TotalVariation(weights[2], exponents[2], operator, scales[2], smooths_change)
    terms = {name: t for name, t in {"p": p, "aux": aux, "tv": tv}.items() if t.weight}
    start = start[place] if has_start else None
    found = []
    for step_tile in (cnn_vis.compiled_step_tile, cnn_vis.step_tile):
        image, moved = x.copy(), cache.copy()
        divisors = counts[place[1:]] if has_counts else None
        arguments = (descent, moved if has_cache else None, divisors, terms, decay, 1.3)
        found.append((step_tile(image[place], start, mean, *arguments), image[place].copy(), moved))
        image[place] = x[place]
        assert (image == x).all()  # nothing else is written
    powers = [e - 1 for e, weight in zip(exponents[:2], weights) if weight]
    powers += [exponents[2] / 2 - 1] if weights[2] else []
    if all(4 * power == int(4 * power) and power >= 0 for power in powers):
        assert [a.tobytes() for a in found[0][1:]] == [a.tobytes() for a in found[1][1:]]
    largest = max(
        [np.abs(descent).max()]
        + [
            np.abs(term.gradient(cnn_vis.argument(term, x[place], start, mean)[np.newaxis])).max()
            for term in terms.values()
        ]
    )
    step_of = 1.3 / np.sqrt(found[1][2] + cnn_vis.EPSILON) if has_cache else 1.3
    for a, b, size in zip(*found, (largest * step_of, largest * step_of, largest**2)):
        assert (np.abs(a - b) <= 1e-12 * (size + np.abs(b) + 1)).all()


@pytest.mark.skipif(compiled_step() is None, reason="this Caffe is not ours")
@pytest.mark.parametrize("channel", range(3))
@pytest.mark.parametrize("where", ["descent", "cache", "x"])
def test_an_overflow_leaves_its_channel_as_it_was(channel, where):
    """In both ways of taking a step: channels before it are stepped, those after it are not."""
    for step_tile in (cnn_vis.compiled_step_tile, cnn_vis.step_tile):
        arrays = {"x": np.ones((3, 8, 9)), "descent": np.ones((3, 8, 9), np.float32)}
        arrays["cache"] = np.ones((3, 8, 9))
        arrays[where][channel, 3, 4] = 1e300 if where == "x" else np.inf
        x, before = arrays["x"], arrays["x"].copy()
        terms = {"p": cnn_vis.PNorm(1.0, 4)} if where == "x" else {}
        with np.errstate(all="ignore"):
            step = step_tile(x, None, 0, arrays["descent"], arrays["cache"], None, terms, 0.9, 1.0)
        assert step is None
        assert (x[:channel] != before[:channel]).any(axis=(1, 2)).all()
        assert (x[channel:] == before[channel:]).all()
