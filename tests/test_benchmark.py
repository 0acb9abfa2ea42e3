"""The rows of benchmark.py and gpu_check.py that compare with PyTorch: their network is Caffe's.
NumPy stands in for PyTorch, which these tests do not need."""

import sys
import time
import types

import benchmark
import numpy as np
import occupancy
import pytest
import torch_network
from conftest import GOLDEN, ROOT, Ascent

from cnn_vis import Target
from cnn_vis_lib.models import NetworkFiles
from cnn_vis_lib.processes import in_a_worker


class Tensor(np.ndarray):
    """The methods of PyTorch's tensors that the rows use."""

    def to(self, *_, **__):
        return self

    requires_grad_ = clone = to

    def dim(self):
        return self.ndim

    def abs(self):
        return np.abs(self)

    def square(self):
        return np.square(self)


def tensor(array):
    return np.asarray(array).view(Tensor)


def windows(x, kernel, stride, pad, fill):
    """(N, C, H, W, kernel, kernel) of x, padded."""
    x = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)), constant_values=fill)
    seen = np.lib.stride_tricks.sliding_window_view(x, (kernel, kernel), (2, 3))
    return seen[:, :, ::stride, ::stride]


def conv2d(x, weight, bias, stride, pad, groups=1):
    parts = [
        np.einsum("nchwij,ocij->nohw", windows(part, w.shape[2], stride, pad, 0), w)
        for part, w in zip(np.split(x, groups, 1), np.split(weight, groups, 0))
    ]
    return tensor(np.concatenate(parts, 1) + np.reshape(bias, (-1, 1, 1)))


def max_pool2d(x, kernel, stride, pad, ceil_mode):
    assert ceil_mode
    sides = [
        -(-(n + 2 * pad - kernel) // stride) for n in x.shape[2:]
    ]  # the last starts, rounded up
    more = [(0, max(0, kernel + stride * last - n - pad)) for last, n in zip(sides, x.shape[2:])]
    x = np.pad(x, ((0, 0), (0, 0), (pad, more[0][1]), (pad, more[1][1])), constant_values=-np.inf)
    return tensor(windows(x, kernel, stride, 0, 0).max(axis=(4, 5)))


def local_response_norm(x, size, alpha, beta, k):
    squares = np.pad(np.square(x), ((0, 0), (size // 2, size // 2), (0, 0), (0, 0)))
    near = sum(squares[:, i : i + x.shape[1]] for i in range(size))
    return tensor(x / (k + alpha / size * near) ** beta)


def relu(x):
    return np.maximum(x, 0)


@pytest.fixture
def torch(monkeypatch):
    """A stand-in for PyTorch."""
    functional = types.SimpleNamespace(
        conv2d=conv2d, relu=relu, max_pool2d=max_pool2d, local_response_norm=local_response_norm
    )
    module = types.ModuleType("torch")
    module.nn = types.SimpleNamespace(functional=functional)
    module.from_numpy, module.channels_last = tensor, None
    module.cat = lambda parts, axis: tensor(np.concatenate(parts, axis))
    module.set_num_threads = lambda number: None
    module.autograd = types.SimpleNamespace(grad=lambda loss, x: (np.zeros_like(x),))
    monkeypatch.setitem(sys.modules, "torch", module)
    return module


MINI = ROOT / "models" / "googlenet_mini"
NETWORKS = {
    "tiny": (
        GOLDEN / "deploy.prototxt",
        GOLDEN / "tiny_inception.caffemodel",
        "inception_a/output",
    ),
    "mini": (MINI / "deploy.prototxt", MINI / "googlenet_mini.caffemodel", "inception_4c/output"),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_pytorchs_network_is_caffes(name, torch):
    *files, layer = NETWORKS[name]
    loaded = Ascent(NetworkFiles(*map(str, files)), Target(layer))
    network = torch_network.TorchNetwork(*in_a_worker(torch_network.described, loaded.spec))
    batch = np.random.default_rng(1).normal(0, 50, (1, 3, *loaded.tile_size)).astype(np.float32)
    found, expected = network(tensor(batch)), loaded.activations(batch)[layer]
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


def test_the_row_of_pytorch_runs(torch):
    *files, layer = NETWORKS["tiny"]
    loaded = Ascent(NetworkFiles(*map(str, files)), Target(layer))
    tile = np.ones((1, 3, *loaded.tile_size), np.float32)
    assert benchmark.measure_torch(loaded.spec, tile, 1) > 0


def test_a_row_that_fails_says_so_and_why(monkeypatch):
    """Without PyTorch, that it is not installed."""
    monkeypatch.setattr(sys, "argv", [sys.argv[0], "--model=googlenet_mini"])
    assert benchmark.measured("nosuch", []) == "failed: KeyError: 'measure_nosuch'"
    try:
        import torch  # noqa: F401
    except ModuleNotFoundError:
        assert benchmark.measured("torch", [1]) == "not installed"


def test_the_time_of_a_tile_on_many_cores_is_that_of_its_pieces():
    assert occupancy.makespan([3, 1, 1, 1], 2) == 3
    assert occupancy.makespan([1, 1, 1], 2) == 2
    assert occupancy.makespan([1, 2], 8) == 2
    # 8 ms in four pieces, 1 in one, 1 besides; on two cores half a millisecond for sharing.
    tile_time = occupancy.TileTime(one=10, two=6.5, pieces=[[2] * 4, [1]])
    assert tile_time.moment == pytest.approx(0.5)
    assert [tile_time(n) for n in (1, 2, 3, 4, 32)] == pytest.approx([10, 6.5, 6.5, 4.5, 4.5])


def test_sleeping_workers_share_the_cores():
    """Two tiles on two cores take as long as one tile on one core, and both cores are busy."""
    engine = occupancy.Sleeping(2, lambda cores: 60 / cores)
    begun = time.perf_counter()
    tickets = [engine.send([None]) for _ in range(2)]
    while not all(map(engine.is_done, tickets)):
        pass
    passed = time.perf_counter() - begun
    assert passed >= 0.06
    assert engine.busy == pytest.approx(0.12, rel=1e-3)
