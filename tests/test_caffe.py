"""Our own layers in Caffe against Caffe's: max pooling to the last bit, 3x3 convolution and LRN to
rounding."""

import hypothesis
import hypothesis.extra.numpy
import hypothesis.strategies as st
import numpy as np
import pytest

import cnn_vis
from cnn_vis_lib.description import end_in_objective
from cnn_vis_lib.prototxt import caffe_net, import_caffe

caffe = import_caffe()
HAS = set(caffe.layer_type_list())


def net(kind, parameters, shape, tmp_path):
    """A net with one layer `top` of that kind, after a convolution that learns only its bias. The
    program cuts nets like this, so that gradients reach the data but none are computed for the
    layer's weights."""
    dims = " ".join(f"dim: {side}" for side in shape)
    weights = 0 if "convolution" not in parameters else 1 if "bias_term: false" in parameters else 2
    path = tmp_path / f"{kind}.prototxt"
    path.write_text(f"""
        layer {{ name: "data" type: "Input" top: "data" input_param {{ shape {{ {dims} }} }} }}
        layer {{ name: "before" type: "Convolution" bottom: "data" top: "before"
          propagate_down: true param {{ lr_mult: 0 }}
          convolution_param {{ num_output: {shape[1]} kernel_size: 1 }} }}
        layer {{ name: "top" type: "{kind}" bottom: "before" top: "top"
          loss_weight: 1 {"param { lr_mult: 0 } " * weights}
          {parameters} }}""")
    caffe.set_mode_cpu()
    loaded = caffe.Net(str(path), caffe.TEST)
    loaded.params["before"][0].data[:, :, 0, 0] = np.eye(shape[1])
    return loaded


def passes(net, x, gradient):
    """The activations for x, and what comes back of `gradient`."""
    net.blobs["data"].data[...] = x
    net.forward()
    net.blobs["top"].diff[...] = gradient
    net.backward(start="top")
    return net.blobs["top"].data.copy(), net.blobs["data"].diff.copy()


numbers = st.floats(width=32, allow_subnormal=False)
not_negative = st.floats(0, 1e9, width=32, allow_subnormal=False)


@pytest.mark.skipif("AmplifyLayer" not in HAS, reason="this Caffe is not ours")
@hypothesis.settings(deadline=None, max_examples=200)
@hypothesis.given(
    activations=hypothesis.extra.numpy.arrays(
        np.float32, st.sampled_from([(1, 3, 2, 5), (2, 4, 1, 1), (3, 2)]), elements=numbers
    ),
    objective=st.one_of(
        st.builds(cnn_vis.AmplifyLayer, numbers, numbers, not_negative),
        st.builds(cnn_vis.AmplifyNeuron, st.integers(0, 1)),
    ),
)
def test_objectives_are_numpys_to_the_last_bit(activations, objective):
    """Whatever the activations: infinite ones and NaN too."""
    layer = caffe.proto.caffe_pb2.NetParameter()
    layer.layer.add(name="x", type="Input", top=["x"]).input_param.shape.add(dim=activations.shape)
    ours = cnn_vis.Objective((cnn_vis.Target("x", objective),)).caffe_layer()
    assert end_in_objective(layer, "x", *ours)
    loaded = caffe_net(layer)
    loaded.blobs["x"].data[...] = activations
    loaded.forward()
    with np.errstate(all="ignore"):
        expected = objective.gradient(activations)
    found, is_number = loaded.blobs["x"].diff, ~np.isnan(expected)
    assert np.array_equal(~np.isnan(found), is_number)
    assert found[is_number].tobytes() == expected[is_number].tobytes()


@pytest.mark.skipif("MaxPooling" not in HAS, reason="this Caffe is not ours")
@pytest.mark.parametrize(
    "kernel, stride, pad", [(3, 1, 1), (3, 2, 0), (3, 2, 1), (2, 2, 0), (5, 3, 0), (7, 1, 0)]
)
@pytest.mark.parametrize("side", [7, 14, 28, 57])
def test_max_pooling_is_bit_identical(kernel, stride, pad, side, tmp_path):
    parameters = f"pooling_param {{ pool: MAX kernel_size: {kernel} stride: {stride} pad: {pad} }}"
    random = np.random.RandomState(side)
    x = random.randint(-3, 4, (2, 5, side, side + 3)).astype(np.float32)  # with many ties
    original, ours = (
        net(kind, parameters, x.shape, tmp_path) for kind in ("Pooling", "MaxPooling")
    )
    gradient = random.randn(*original.blobs["top"].shape).astype(np.float32)
    for a, b in zip(passes(original, x, gradient), passes(ours, x, gradient)):
        assert a.tobytes() == b.tobytes()


CONVOLUTIONS = [
    "num_output: 9 kernel_size: 3 pad: 1",
    "num_output: 9 kernel_size: 3 pad: 1 bias_term: false",
    "num_output: 9 kernel_size: 3 pad: 0",
    "num_output: 9 kernel_size: 3 pad: 1 stride: 2",
    "num_output: 8 kernel_size: 1",
    "num_output: 8 kernel_size: 3 pad: 1 group: 4",
    "num_output: 8 kernel_size: 3 pad: 2 dilation: 2",
    "num_output: 8 kernel_h: 3 kernel_w: 5 pad_h: 1 pad_w: 2",
]


@pytest.mark.skipif("WinogradConvolution" not in HAS, reason="this Caffe is not ours")
@pytest.mark.parametrize("parameters", CONVOLUTIONS)
@pytest.mark.parametrize("size", [(14, 14), (7, 7), (1, 5), (29, 56), (131, 97)])
def test_winograd_convolution(parameters, size, tmp_path):
    """Equal up to rounding if our own code runs, to the last bit if Caffe's does."""
    if min(size) < 3 and "pad: 1" not in parameters:
        pytest.skip("larger than the picture")
    parameters = f"convolution_param {{ {parameters} }}"
    random = np.random.RandomState(1)
    x = random.randn(2, 12, *size).astype(np.float32)
    original, ours = (
        net(kind, parameters, x.shape, tmp_path) for kind in ("Convolution", "WinogradConvolution")
    )
    for theirs, mine in zip(original.params["top"], ours.params["top"]):
        theirs.data[...] = mine.data[...] = random.randn(*theirs.data.shape)
    gradient = random.randn(*original.blobs["top"].shape).astype(np.float32)
    own = (
        "kernel_size: 3 pad: 1 " in f"{parameters} "
        and "stride" not in parameters
        and "group" not in parameters
    )
    for a, b in zip(passes(original, x, gradient), passes(ours, x, gradient)):
        assert np.linalg.norm(a - b) <= (1e-6 * np.linalg.norm(a) if own else 0)


def lrn(x, gradient, size, alpha, beta, k):
    """The formulas of local response normalization across channels in float64: the activations
    for x (N, C, H, W), and the gradient with respect to x of sum(gradient * activations)."""

    def window(a):
        reach = size // 2
        padded = np.pad(a, ((0, 0), (reach, reach), (0, 0), (0, 0)))
        return sum(padded[:, i : i + a.shape[1]] for i in range(size))

    x, gradient = x.astype(np.float64), gradient.astype(np.float64)
    scale = k + alpha / size * window(x * x)
    spread = window(gradient * x * scale ** (-beta - 1))
    return x * scale**-beta, gradient * scale**-beta - 2 * beta * alpha / size * x * spread


@pytest.mark.skipif("FastLRN" not in HAS, reason="this Caffe is not ours")
@pytest.mark.parametrize("size, alpha, beta, k", [(5, 1e-4, 0.75, 1), (3, 2, 0.75, 0.5)])
@pytest.mark.parametrize("channels", [1, 2, 7, 24])
def test_fast_lrn_is_as_exact_as_caffes(size, alpha, beta, k, channels, tmp_path):
    """Measured from the formulas in double precision; how far Caffe's own is from them is up to the
    processor."""
    random = np.random.RandomState(2)
    x = 30 * random.randn(2, channels, 13, 17).astype(np.float32)
    gradient = random.randn(*x.shape).astype(np.float32)
    parameters = f"lrn_param {{ local_size: {size} alpha: {alpha} beta: {beta} k: {k} }}"
    original, ours = (
        passes(net(kind, parameters, x.shape, tmp_path), x, gradient) for kind in ("LRN", "FastLRN")
    )
    for exact, theirs, mine in zip(lrn(x, gradient, size, alpha, beta, k), original, ours):
        rounding = np.finfo(np.float32).eps * np.linalg.norm(exact)
        assert np.linalg.norm(mine - exact) <= 1.1 * np.linalg.norm(theirs - exact) + rounding


@pytest.mark.skipif("FastLRN" not in HAS, reason="this Caffe is not ours")
@pytest.mark.parametrize(
    "parameters",
    ["local_size: 5 alpha: 1 beta: 0.6", "local_size: 5 alpha: 1 norm_region: WITHIN_CHANNEL"],
)
@pytest.mark.parametrize("channels", [1, 2, 7, 24])
def test_other_lrns_are_caffes(parameters, channels, tmp_path):
    random = np.random.RandomState(2)
    x = 30 * random.randn(2, channels, 13, 17).astype(np.float32)
    gradient = random.randn(*x.shape).astype(np.float32)
    original, ours = (
        passes(net(kind, f"lrn_param {{ {parameters} }}", x.shape, tmp_path), x, gradient)
        for kind in ("LRN", "FastLRN")
    )
    for a, b in zip(original, ours):
        assert a.tobytes() == b.tobytes()
