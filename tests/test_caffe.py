"""Our own layers in Caffe against Caffe's: max pooling to the last bit, the others to rounding,
which is measured from double precision."""

import contextlib
import ctypes
import types

import benchmark
import exact_network
import hypothesis
import hypothesis.extra.numpy
import hypothesis.strategies as st
import numpy as np
import pytest
import torch_network
from conftest import wait_for

import cnn_vis
from cnn_vis_lib.description import end_in_objective
from cnn_vis_lib.models import MODELS, NetworkFiles
from cnn_vis_lib.network import Network, NetworkSpec
from cnn_vis_lib.prototxt import caffe_library, caffe_net, import_caffe

caffe = import_caffe()
HAS = set(caffe.layer_type_list())


def net(kind, parameters, shape, tmp_path, is_first=False):
    """A net with one layer `top` of that kind, after a convolution that changes nothing and learns
    only its bias. The program cuts nets like this, so that gradients reach the data but none are
    computed for the layer's weights. If it `is_first`, there is no layer before it."""
    dims = " ".join(f"dim: {side}" for side in shape)
    before = "ChannelsLastConvolution" if kind.startswith("Channels") else "Convolution"
    weights = 0 if "convolution" not in parameters else 1 if "bias_term: false" in parameters else 2
    path = tmp_path / f"{kind}.prototxt"
    text = f"""
        layer {{ name: "data" type: "Input" top: "data" input_param {{ shape {{ {dims} }} }} }}
        layer {{ name: "before" type: "{before}" bottom: "data" top: "before"
          propagate_down: true param {{ lr_mult: 0 }}
          convolution_param {{ num_output: {shape[1]} kernel_size: 1 }} }}
        layer {{ name: "top" type: "{kind}" bottom: "before" top: "top"
          loss_weight: 1 {"param { lr_mult: 0 } " * weights}
          {parameters} }}"""
    if is_first:
        first, _, last = text.split("layer {")[1:]
        last = last.replace('bottom: "before"', 'bottom: "data" propagate_down: true')
        text = "layer {".join(["", first, last.replace("lr_mult: 0", "lr_mult: 1")])
    path.write_text(text)
    caffe.set_mode_cpu()
    loaded = caffe.Net(str(path), caffe.TEST)
    if not is_first:
        loaded.params["before"][0].data[:, :, 0, 0] = np.eye(shape[1])
    return loaded


def passes(net, x, gradient):
    """The activations for x, and what comes back of `gradient`, both with the channels first."""
    is_last = net.layer_dict["top"].type.startswith("ChannelsLast")
    axes = (0, 3, 1, 2) if is_last else (0, 1, 2, 3)
    net.blobs["data"].data[...] = x
    net.forward()
    net.blobs["top"].diff.transpose(axes)[...] = gradient
    net.backward(start="top")
    return net.blobs["top"].data.transpose(axes).copy(), net.blobs["data"].diff.copy()


def error(found, exact):
    """The size of the difference, relative to that of the exact result."""
    return np.linalg.norm(found - exact) / np.linalg.norm(exact)


@contextlib.contextmanager
def helping_cores(number):
    """Within this context, so many cores help the layers in this process."""
    library = caffe_library()
    cores = ctypes.c_int(number)
    library.cnn_vis_share_cores(ctypes.byref(cores))
    try:
        yield
        wait_for(lambda: cores.value == number)  # all are returned
    finally:
        cores.value = -1000  # nobody helps; the memory stays in use
        helping_cores.kept.append(cores)


helping_cores.kept = []


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


needs_ours = pytest.mark.skipif(
    "ChannelsLastConvolution" not in HAS, reason="this Caffe is not ours"
)


@needs_ours
@pytest.mark.parametrize(
    "parameters",
    [
        "kernel_size: 3 stride: 1 pad: 1",
        "kernel_size: 3 stride: 2",
        "kernel_size: 3 stride: 2 pad: 1",
        "kernel_size: 2 stride: 2",
        "kernel_size: 3 stride: 2 round_mode: FLOOR",
        "kernel_size: 5 stride: 3",
        "kernel_size: 7",
        "kernel_h: 2 kernel_w: 5 stride_h: 1 stride_w: 2 pad_h: 1 pad_w: 2",
    ],
)
@pytest.mark.parametrize(("side", "channels"), [(7, 5), (14, 16), (28, 35), (57, 3)])
def test_max_pooling_is_bit_identical(parameters, side, channels, tmp_path):
    parameters = f"pooling_param {{ pool: MAX {parameters} }}"
    random = np.random.RandomState(side)
    x = random.randint(-3, 4, (2, channels, side, side + 3)).astype(np.float32)  # with many ties
    original, ours = (
        net(kind, parameters, x.shape, tmp_path) for kind in ("Pooling", "ChannelsLastPooling")
    )
    gradient = random.randn(*original.blobs["top"].shape).astype(np.float32)
    with helping_cores(2):
        for a, b in zip(passes(original, x, gradient), passes(ours, x, gradient)):
            assert a.tobytes() == b.tobytes()


@needs_ours
def test_max_pooling_does_the_relu_before_it(tmp_path):
    """Exactly, as the largest of numbers and 0 does not depend on the order."""
    parameters = "pooling_param { pool: MAX kernel_size: 3 stride: 2 }"
    random = np.random.RandomState(1)
    x = random.randn(1, 8, 15, 15).astype(np.float32) - 1
    original = net("Pooling", parameters, x.shape, tmp_path)
    ours = net("ChannelsLastPooling", parameters + " relu_param {}", x.shape, tmp_path)
    gradient = random.randn(*original.blobs["top"].shape).astype(np.float32)
    y, d = passes(original, np.maximum(x, 0), gradient)
    assert (y == 0).any()
    for a, b in zip((y, d * (x > 0)), passes(ours, x, gradient)):
        assert np.array_equal(a, b)


def convolve(x, weight, sides, groups):
    """A convolution and its gradient by definition, in double precision: the activations, and a
    function from their gradient to that with respect to x. `sides` are (stride, pad, dilation),
    vertically and horizontally."""
    padded = np.pad(x.astype(np.float64), ((0, 0), (0, 0), *((s[1], s[1]) for s in sides)))
    sizes = [
        (n - side[2] * (k - 1) - 1) // side[0] + 1
        for n, k, side in zip(padded.shape[2:], weight.shape[2:], sides)
    ]

    def places(*tap):
        starts = [i * side[2] for i, side in zip(tap, sides)]
        ends = [first + side[0] * n for first, side, n in zip(starts, sides, sizes)]
        return (
            slice(None),
            slice(None),
            *(slice(f, e, s[0]) for f, e, s in zip(starts, ends, sides)),
        )

    def by_group(product, a, w, axis):
        pairs = zip(np.split(a, groups, 1), np.split(w, groups, 0))
        return np.concatenate([np.einsum(product, part, own) for part, own in pairs], 1)

    taps = [
        (places(*tap), weight[:, :, tap[0], tap[1]].astype(np.float64))
        for tap in np.ndindex(*weight.shape[2:])
    ]
    y = sum(by_group("nchw,oc->nohw", padded[place], w, 1) for place, w in taps)

    def backward(gradient):
        to = np.zeros_like(padded)
        for place, w in taps:
            to[place] += by_group("nohw,oc->nchw", gradient.astype(np.float64), w, 1)
        (_, top, _), (_, left, _) = sides
        return to[:, :, top : top + x.shape[2], left : left + x.shape[3]]

    return y, backward


# {convolution_param: (channels, sizes, (stride, pad, dilation), groups, how many times Caffe's
# rounding error is allowed)}. Filtering in large patches costs up to five times, which is hardly
# seen in whole networks: see test_a_network_is_as_exact_as_with_caffes_layers.
USUAL, FILTERED = 2.5, 5.5
CONVOLUTIONS = {
    "num_output: 40 kernel_size: 3 pad: 1": (40, [(29, 56)], (1, 1, 1), 1, FILTERED),
    "num_output: 41 kernel_size: 3 pad: 1": (40, [(14, 14), (7, 7)], (1, 1, 1), 1, USUAL),
    "num_output: 42 kernel_size: 3 pad: 1": (40, [(1, 5), (3, 2)], (1, 1, 1), 1, FILTERED),
    "num_output: 9 kernel_size: 3 pad: 1 bias_term: false": (12, [(31, 17)], (1, 1, 1), 1, USUAL),
    "num_output: 33 kernel_size: 3": (48, [(30, 23)], (1, 0, 1), 1, FILTERED),
    "num_output: 9 kernel_size: 3 pad: 1 stride: 2": (12, [(29, 14)], (2, 1, 1), 1, USUAL),
    "num_output: 24 kernel_size: 5 pad: 2": (20, [(14, 14), (28, 31)], (1, 2, 1), 1, FILTERED),
    "num_output: 8 kernel_size: 5 pad: 2 stride: 2": (3, [(32, 33)], (2, 2, 1), 1, USUAL),
    "num_output: 70 kernel_size: 1": (12, [(14, 14), (1, 3)], (1, 0, 1), 1, USUAL),
    "num_output: 20 kernel_size: 1 stride: 2": (30, [(14, 15)], (2, 0, 1), 1, USUAL),
    "num_output: 64 kernel_size: 7 pad: 3 stride: 2": (3, [(56, 61)], (2, 3, 1), 1, FILTERED),
    "num_output: 16 kernel_size: 11 stride: 4": (3, [(51, 60)], (4, 0, 1), 1, USUAL),
    "num_output: 12 kernel_size: 3 stride: 4": (5, [(14, 19)], (4, 0, 1), 1, USUAL),
    "num_output: 64 kernel_size: 3 pad: 1 group: 2": (64, [(29, 28)], (1, 1, 1), 2, FILTERED),
    "num_output: 32 kernel_size: 5 pad: 2 group: 2": (48, [(27, 27)], (1, 2, 1), 2, FILTERED),
    "num_output: 10 kernel_size: 1 group: 5": (20, [(9, 13)], (1, 0, 1), 5, USUAL),
    "num_output: 6 kernel_size: 3 pad: 1 stride: 3 group: 3": (9, [(20, 20)], (3, 1, 1), 3, USUAL),
    "num_output: 8 kernel_size: 3 pad: 2 dilation: 2": (12, [(15, 19)], (1, 2, 2), 1, USUAL),
    "num_output: 8 kernel_size: 2 pad: 3": (5, [(9, 12)], (1, 3, 1), 1, USUAL),
}


@needs_ours
@pytest.mark.parametrize(
    ("parameters", "size"),
    [(parameters, size) for parameters, (_, sizes, *_) in CONVOLUTIONS.items() for size in sizes],
)
def test_convolution_is_nearly_as_exact_as_caffes(parameters, size, tmp_path):
    """Compared with double precision, whatever the layout of the input."""
    channels, _, side, groups, times = CONVOLUTIONS[parameters]
    check_convolution(parameters, (2, channels, *size), (side, side), groups, times, tmp_path)


@needs_ours
def test_convolution_with_two_different_sides(tmp_path):
    parameters = "num_output: 8 kernel_h: 1 kernel_w: 7 pad_h: 0 pad_w: 3 stride_h: 2 stride_w: 1"
    sides = ((2, 0, 1), (1, 3, 1))
    check_convolution(parameters, (1, 20, 17, 15), sides, 1, USUAL, tmp_path)


def check_convolution(parameters, shape, sides, groups, times, tmp_path):
    random = np.random.RandomState(1)
    x = random.randn(*shape).astype(np.float32)
    own = "ChannelsLastConvolution"
    original, ours, first = (
        net(kind, f"convolution_param {{ {parameters} {axis} }}", x.shape, tmp_path, is_first)
        for kind, axis, is_first in (
            ("Convolution", "", False),
            (own, "axis: 3", False),
            (own, "", True),
        )
    )
    for blob, *others in zip(original.params["top"], ours.params["top"], first.params["top"]):
        blob.data[...] = random.randn(*blob.data.shape)
        for other in others:
            other.data[...] = blob.data
    weight, *bias = (blob.data for blob in original.params["top"])
    y, backward = convolve(x, weight, sides, groups)
    y += bias[0].reshape(-1, 1, 1) if bias else 0
    gradient = random.randn(*y.shape).astype(np.float32)
    exact = y, backward(gradient)
    theirs = passes(original, x, gradient)
    alone = passes(ours, x, gradient)
    with helping_cores(3):
        helped = passes(ours, x, gradient)
    for a, b in zip(alone, helped):
        assert a.tobytes() == b.tobytes()  # whoever computes the pieces
    for mine in (alone, passes(first, x, gradient)):
        for own, other, right in zip(mine, theirs, exact):
            assert error(own, right) <= times * error(other, right) + 1e-8


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


@needs_ours
@pytest.mark.parametrize("size, alpha, beta, k", [(5, 1e-4, 0.75, 1), (3, 2, 0.75, 0.5)])
@pytest.mark.parametrize("channels", [1, 2, 7, 24, 40])
def test_lrn_is_as_exact_as_caffes(size, alpha, beta, k, channels, tmp_path):
    """Measured from the formulas in double precision; how far Caffe's own is from them is up to the
    processor."""
    random = np.random.RandomState(2)
    x = 30 * random.randn(2, channels, 13, 17).astype(np.float32)
    gradient = random.randn(*x.shape).astype(np.float32)
    parameters = f"lrn_param {{ local_size: {size} alpha: {alpha} beta: {beta} k: {k} }}"
    with helping_cores(2):
        original, ours = (
            passes(net(kind, parameters, x.shape, tmp_path), x, gradient)
            for kind in ("LRN", "ChannelsLastLRN")
        )
    for exact, theirs, mine in zip(lrn(x, gradient, size, alpha, beta, k), original, ours):
        rounding = np.finfo(np.float32).eps * np.linalg.norm(exact)
        assert np.linalg.norm(mine - exact) <= 1.1 * np.linalg.norm(theirs - exact) + rounding


def text_of(*layers):
    """A prototxt with an input of 64x64 and these layers: (type, top, bottoms, parameters)."""
    text = 'layer { name: "data" type: "Input" top: "data" input_param { shape { dim: 1 dim: 3 '
    text += "dim: 64 dim: 64 } } }"
    for i, (kind, top, bottoms, parameters) in enumerate(layers):
        names = " ".join(f'bottom: "{bottom}"' for bottom in bottoms.split())
        text += f' layer {{ name: "layer{i}" type: "{kind}" {names} top: "{top}" {parameters} }}'
    return text


def convolution(top, bottom, parameters):
    """A convolution and its ReLU, for text_of."""
    parameters = f"convolution_param {{ {parameters} }}"
    return ("Convolution", top, bottom, parameters), ("ReLU", top, top, "")


POOL = "pooling_param { pool: MAX kernel_size: 3 stride: 2 }"
BRANCHES = (
    *convolution("a", "data", "num_output: 16 kernel_size: 3 stride: 2"),
    *convolution("b", "a", "num_output: 24 kernel_size: 1"),
    *convolution("c", "a", "num_output: 40 kernel_size: 3 pad: 1"),
    ("Concat", "d", "b c", ""),
    ("Pooling", "e", "d", POOL),
    *convolution("f", "e", "num_output: 20 kernel_size: 1"),
)
NETWORKS = {
    "VGG": (
        *convolution("a", "data", "num_output: 32 kernel_size: 3 pad: 1"),
        *convolution("b", "a", "num_output: 32 kernel_size: 3 pad: 1"),
        ("Pooling", "c", "b", "pooling_param { pool: MAX kernel_size: 2 stride: 2 }"),
        *convolution("d", "c", "num_output: 48 kernel_size: 3 pad: 1"),
        ("InnerProduct", "e", "d", "inner_product_param { num_output: 5 }"),
    ),
    "CaffeNet": (
        *convolution("a", "data", "num_output: 96 kernel_size: 11 stride: 4"),
        ("Pooling", "b", "a", POOL),
        ("LRN", "c", "b", "lrn_param { local_size: 5 alpha: 0.0001 beta: 0.75 }"),
        *convolution("d", "c", "num_output: 64 kernel_size: 5 pad: 2 group: 2"),
        ("LRN", "e", "d", "lrn_param { local_size: 5 beta: 0.5 }"),
        *convolution("f", "e", "num_output: 64 kernel_size: 3 pad: 1 group: 2"),
    ),
    "SqueezeNet": (
        *BRANCHES,
        ("Dropout", "f", "f", ""),
        ("Pooling", "g", "f", "pooling_param { pool: AVE global_pooling: true }"),
        ("Softmax", "h", "g", ""),
    ),
    "ResNet": (
        *convolution(
            "a", "data", "num_output: 32 kernel_size: 7 pad: 3 stride: 2 bias_term: false"
        ),
        ("BatchNorm", "a", "a", ""),
        ("Scale", "a", "a", "scale_param { bias_term: true }"),
        ("ReLU", "a", "a", ""),
        ("Pooling", "b", "a", POOL),
        ("Convolution", "c", "b", "convolution_param { num_output: 32 kernel_size: 3 pad: 1 }"),
        ("BatchNorm", "c", "c", ""),
        ("Scale", "c", "c", "scale_param { bias_term: true }"),
        ("Eltwise", "d", "b c", ""),
        ("ReLU", "d", "d", ""),
        *convolution("e", "d", "num_output: 48 kernel_size: 1 stride: 2"),
    ),
    "several readers": (*BRANCHES, ("Eltwise", "g", "f f", ""), ("TanH", "h", "g", "")),
    "in place on what was pooled": (
        *convolution("a", "data", "num_output: 16 kernel_size: 3"),
        ("Pooling", "b", "a", POOL),
        ("PReLU", "b", "b", ""),
    ),
    "in place on what was joined": (
        *BRANCHES[:-4],
        ("Concat", "d", "b c", ""),
        ("Scale", "d", "d", "scale_param { bias_term: true }"),
        *convolution("e", "d", "num_output: 20 kernel_size: 1"),
    ),
    "readers of many kinds": (
        *convolution("a", "data", "num_output: 16 kernel_size: 3"),
        *convolution("b", "a", "num_output: 24 kernel_size: 3 stride: 2 pad: 1"),
        *convolution("c", "a", "num_output: 8 kernel_size: 8 stride: 2 pad: 3"),
        *convolution("d", "a", "num_output: 16 kernel_size: 3 pad: 2 dilation: 2 stride: 2"),
        *convolution("e", "a", "num_output: 16 kernel_size: 3 pad: 1 group: 16"),
        ("Pooling", "f", "a", "pooling_param { pool: MAX kernel_size: 2 stride: 2 }"),
        ("Pooling", "g", "e", "pooling_param { pool: MAX kernel_size: 2 stride: 2 }"),
        ("Concat", "h", "b c d f g", ""),
    ),
    "what was reshaped": (
        *convolution("a", "data", "num_output: 16 kernel_size: 3"),
        ("Reshape", "b", "a", "reshape_param { shape { dim: 0 dim: 4 dim: -1 dim: 62 } }"),
        *convolution("c", "b", "num_output: 8 kernel_size: 3"),
        ("Pooling", "d", "c", POOL),
    ),
    "what was flattened": (
        *convolution("a", "data", "num_output: 16 kernel_size: 3"),
        ("Flatten", "b", "a", "flatten_param { axis: 2 }"),
        *convolution("c", "b", "num_output: 8 kernel_size: 3"),
    ),
    "two that meet in place": (
        *convolution("m", "data", "num_output: 16 kernel_size: 3"),
        ("Convolution", "t", "m", "convolution_param { num_output: 8 kernel_size: 1 }"),
        ("Convolution", "u", "m", "convolution_param { num_output: 8 kernel_size: 1 }"),
        ("Eltwise", "v", "t u", "eltwise_param { operation: PROD }"),
    ),
    "in place": (
        *convolution("a", "data", "num_output: 16 kernel_size: 3"),
        ("Convolution", "b", "a", "convolution_param { num_output: 8 kernel_size: 1 }"),
        ("PReLU", "b", "b", ""),
        ("Convolution", "c", "b", "convolution_param { num_output: 8 kernel_size: 3 }"),
        ("Sigmoid", "c", "c", ""),
        ("PReLU", "c", "c", ""),
        ("Pooling", "d", "c", POOL),
    ),
    "unusual layers": (
        *convolution("a", "data", "num_output: 16 kernel_size: 3"),
        ("PReLU", "b", "a", ""),
        *convolution("c", "b", "num_output: 8 kernel_size: 1"),
        ("Pooling", "d", "c", "pooling_param { pool: AVE kernel_size: 3 stride: 2 }"),
        ("Concat", "e", "d d", "concat_param { axis: 2 }"),
        *convolution("f", "e", "num_output: 12 kernel_size: 3"),
        ("ReLU", "f", "f", "relu_param { negative_slope: 0.1 }"),
    ),
}


def with_and_without(spec, monkeypatch):
    """Yields the Network of a NetworkSpec with our layers, then with Caffe's own."""
    yield Network(spec)
    with monkeypatch.context() as patch:
        patch.setattr("cnn_vis_lib.network.use_channels_last", lambda net, targets: set())
        network = Network(spec)
    yield network


@needs_ours
@pytest.mark.parametrize("targets", ["last", "all"])
@pytest.mark.parametrize("name", NETWORKS)
def test_any_network_gives_the_same_as_with_caffes_layers(name, targets, monkeypatch, tmp_path):
    """Its activations and gradients, for its last layer or for all of them together."""
    random = np.random.RandomState(3)
    deploy, weights = str(tmp_path / "deploy.prototxt"), str(tmp_path / "w.caffemodel")
    (tmp_path / "deploy.prototxt").write_text(text_of(*NETWORKS[name]))
    loaded = caffe.Net(deploy, caffe.TEST)
    for blobs in loaded.params.values():
        for i, blob in enumerate(blobs):
            width = np.prod(blob.data.shape[1:]) if blob.data.ndim > 1 else 4
            blob.data[...] = random.randn(*blob.data.shape) / np.sqrt(width)
            if i == 1 and len(blobs) == 3:  # a variance
                blob.data[...] = 1 + blob.data**2
            if i == 2:
                blob.data[...] = 1
    loaded.save(weights)
    tops = [layer[1] for layer in NETWORKS[name]]
    layers = tuple(dict.fromkeys(tops))[-1:] if targets == "last" else tuple(dict.fromkeys(tops))
    spec = NetworkSpec(NetworkFiles(deploy, weights), layers)
    x = 10 * random.randn(1, 3, 64, 64).astype(np.float32)
    results = []
    for network in with_and_without(spec, monkeypatch):
        network.forward(x)
        activations = {layer: a.copy() for layer, a in network.activations().items()}
        gradients = [(layer, np.abs(a) + 1) for layer, a in activations.items()]
        results.append((network, activations, network.backward(gradients).copy()))
    (ours, mine, d), (stock, theirs, e) = results
    assert ours.shapes == stock.shapes
    kinds = [layer.type for layer in ours._net.layers]
    assert "ChannelsLastConvolution" in kinds
    usual = (name, targets) != ("in place", "all")
    usual = usual and name not in (
        "readers of many kinds",
        "what was reshaped",
        "what was flattened",
    )
    assert usual == ("Convolution" not in kinds)
    for layer, a in theirs.items():
        assert error(mine[layer], a) < 3e-6, layer
    assert error(d, e) < 1e-5


@needs_ours
@pytest.mark.parametrize("model", ["googlenet_mini", "bvlc_googlenet"])
def test_a_network_is_as_exact_as_with_caffes_layers(model, monkeypatch):
    """Activations and gradient are at most twice as far from double precision. Pictures cannot
    show this: their steps amplify what little is lost, with any BLAS."""
    if MODELS[model].find_weights() is None:
        pytest.skip(f"{model} is not installed")
    arguments = types.SimpleNamespace(model=model, layer="inception_4c/output")
    spec, mean, picture = benchmark.load(arguments)
    tile = cnn_vis.from_uint8(picture, mean)[:, :, :224, :224].astype(np.float32)
    exact = exact_network.ExactNetwork(*torch_network.described(spec))
    objective = cnn_vis.AmplifyLayer()
    a = exact.forward(tile)
    right = a, exact.backward(objective.gradient(a))
    errors = []
    for network in with_and_without(spec, monkeypatch):
        network.forward(tile)
        (y,) = network.activations().values()
        d = network.backward([(spec.layers[0], objective.gradient(y))])
        errors.append([error(one, exact) for one, exact in zip((y, d), right)])
    assert all(mine <= 2 * theirs for mine, theirs in zip(*errors)), errors
