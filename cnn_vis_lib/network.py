"""The network in a worker: loading, checking and running it.

What uses Caffe runs only in worker processes, because any error in Caffe kills its process."""

import ctypes
import dataclasses
import functools
import itertools
import math
import os

import numpy as np

from .caffemodel import misfits, read_weights
from .channels_last import use_channels_last
from .cuda_graphs import Graphs
from .description import (
    ANOTHER_LAYER,
    GPU_LAYERS,
    TF32_LAYERS,
    Description,
    cut,
    end_in_objective,
    fit_classifier,
    followers,
    join_relus,
    use_fast_layers,
)
from .errors import BadRequest, refusal, some
from .install import how_to_install
from .machine import ONE_THREAD
from .models import NetworkFiles
from .prototxt import caffe_library, caffe_net, import_caffe
from .terms import class_of, strong


def structure_error(deploy, path):
    """What is wrong with the weights `path` for the network `deploy`, in one line, or None. Every
    layer must have all its blobs, in the right shapes, and Caffe must be able to load the file."""
    try:
        weights = read_weights(path)
    except BadRequest:
        return "it cannot be read as Caffe weights"
    net = Description(deploy).net
    fit_classifier(net, weights)
    loaded = caffe_net(net)
    for name, (stored, needed) in misfits(loaded, weights).items():
        return f"layer {name} has weights of shape {stored or None}, not {needed}"
    loaded.copy_from(path)
    return None


def check_targets(files, input_size, targets):
    """Task: raises BadRequest if the network lacks a layer or a channel of the Targets."""
    description = Description(files.deploy, input_size, files.known_name())
    blobs = [description.find(target.layer) for target in targets]
    shapes = {blob: shape for blob, shape, _ in layer_shapes(files, input_size)[0]}
    for target, blob in zip(targets, blobs):
        for word in target.channels or ():
            if blob in shapes and not strong(word):
                class_of(target.layer, word, shapes[blob])
        if blob in shapes:
            target.check(shapes[blob][0])


def layer_shapes(files, input_size=None, without=(), first=None):
    """Task: returns three lists: (blob, shape of one tile's activations, layer that makes it) for
    everything that can be amplified; notices of what cannot; the names of all layers except those
    in `without` and the layers that need them. Loads only the `first` layers of these, or all."""
    description = Description(files.deploy, input_size, files.known_name())
    net, starts = description.net, description.starts
    weights = read_weights(files.weights) if files.weights else {}
    if files.fit_classifier:
        fit_classifier(net, weights)
    lost = followers(net, without)
    kept = [layer for layer in net.layer if layer.name not in without]
    kept = [layer for layer in kept if lost.isdisjoint(layer.bottom)]
    del net.layer[:]
    net.layer.extend(kept[:first])
    problems = dict.fromkeys(description.problems.values())
    notices = [*description.notices, *(f"{LEFT_OUT}: {problem}" for problem in problems)]
    loaded = caffe_net(net)
    if input_size:
        wrong = [name for name, (stored, _) in misfits(loaded, weights).items() if stored]
        lost |= followers(net, wrong)
        notices += [f"{LEFT_OUT}: {name} works only at the prototxt's size" for name in wrong]
    loaded_blobs = [blob for blob in starts if blob in loaded.blobs and blob not in lost]
    shapes = {blob: tuple(loaded.blobs[blob].shape)[1:] for blob in loaded_blobs}
    listed = [(blob, shape, starts[blob]) for blob, shape in shapes.items() if shape]
    return listed, notices, [layer.name for layer in kept]


LEFT_OUT = "left out, with all layers that need it"


def check_fit(spec, net, weights):
    """Raises BadRequest if `weights` (from read_weights) does not have all parameters of the
    caffe.Net, in the right shapes: layers without them would use random or empty ones."""
    path, deploy, wrong = spec.files.weights, spec.files.deploy, misfits(net, weights)
    missing = [name for name in wrong if not weights.get(name)]
    if missing:
        problem = f"this has no weights for {some(missing)} in {deploy}"
        raise refusal("caffe_model", path, problem, "use a complete file")
    for name, shapes in wrong.items():
        stored, needed = (
            " and ".join("x".join(map(str, s)) or "one number" for s in shape) for shape in shapes
        )
        if spec.input_size and net.layer_dict[name].type == "InnerProduct":
            problem = f"{name} works only at the prototxt's size"
            raise input_size_refusal(spec.input_size, problem, "choose an earlier layer")
        problem = f"{name} has weights of shape {stored}, but {deploy} needs {needed}"
        raise refusal("caffe_model", path, problem, "use files that belong together")


def input_size_refusal(size, *why):
    """The refusal of an input size (height, width)."""
    return refusal("input_size", "{}x{}".format(*size), *why)


def check_values(spec, net):
    """Raises BadRequest if the caffe.Net has weights that are not finite; returns notices about
    weights that look wrong."""
    types = {name: layer.type for name, layer in zip(net._layer_names, net.layers)}
    empty = []
    for name, blobs in net.params.items():
        if not all(np.isfinite(blob.data).all() for blob in blobs):
            problem = f"the weights of {name} are not all finite"
            raise refusal("caffe_model", spec.files.weights, problem, "use an intact file")
        if types[name].endswith("BatchNorm") and not blobs[2].data.any():
            empty.append(name)
    what = "BatchNorm without statistics, which only magnifies its input"
    return [f"{some(empty)}: {what}"] if empty else []


@dataclasses.dataclass(frozen=True)
class NetworkSpec:
    """All that a worker needs to load the network: its files; the names of the layers whose
    activations are wanted; whether it runs on a GPU; the (height, width) of its input, if that is
    not the prototxt's; whether a GPU may multiply in TF32; the (type, parameters) of a layer that
    computes the objective, or None; whether a GPU's passes may be graphs."""

    files: NetworkFiles
    layers: tuple
    use_gpu: bool = False
    input_size: tuple | None = None
    tf32: bool = False
    objective: tuple | None = None
    graphs: bool = True


def start_caffe(spec):
    """Imports Caffe and chooses its device. Raises BadRequest."""
    os.environ.update(ONE_THREAD)  # in case the process was started without it
    caffe = import_caffe()
    if not spec.use_gpu:
        caffe.set_mode_cpu()
        return
    if spec.tf32 and TF32_LAYERS["Convolution"] not in caffe.layer_type_list():
        remedy = f"drop the option, or rebuild Caffe: {how_to_install('pycaffe[cuda]')}"
        raise refusal("tf32", "", "Caffe was built without cuDNN", remedy)
    caffe.set_mode_gpu()
    caffe.set_device(0)  # the only one that this worker sees


@dataclasses.dataclass(frozen=True)
class End:
    """Where a Network's backward pass takes up the gradient of a layer: the name of the layer's
    blob, the caffe.Blob, the number of the Caffe layer that makes it, whether other layers read it,
    and whether it has the channels last."""

    name: str
    blob: object
    start: int
    is_read: bool
    is_last: bool

    def shape(self):
        """The (C, ...) of one tile's activations."""
        sides = tuple(self.blob.shape)[1:]
        return (sides[-1], *sides[:-1]) if self.is_last else sides

    def array(self, kind):
        """The blob's "data" or "diff", (N, C, ...), for reading only."""
        return self._channels_first(read_only(self.blob, kind))

    def writable_diff(self):
        """The blob's diff, (N, C, ...)."""
        return self._channels_first(self.blob.diff)

    def _channels_first(self, array):
        return array.transpose(0, 3, 1, 2) if self.is_last else array


FULL_BATCH = 32  # tiles; a GPU gains little from more

kept_network = {}  # in a worker: {NetworkSpec: Network}, at most one


def load_network(spec):
    """The worker's network: loaded for its first task, then kept as long as `spec` is the same."""
    if spec not in kept_network:
        for network in kept_network.values():
            network.drop_picture()
        kept_network.clear()  # two may not fit in memory
        kept_network[spec] = Network(spec)
    return kept_network[spec]


class Network:
    """A Caffe net from its input to some layers. Raises BadRequest if `spec` cannot be loaded.

    Attributes: tile_size, (height, width) of the input; shapes, {layer: (C, ...) of one tile's
    activations}; mean, the number that is subtracted from pixels; has_objective, whether the net
    itself computes the objective's gradient; notices, a list of lines for the user; picture, the
    GpuPicture that it computes, or None.
    """

    def __init__(self, spec):
        start_caffe(spec)
        weights = read_weights(spec.files.weights)
        description = Description(spec.files.deploy, spec.input_size, spec.files.known_name())
        net, blobs = description.net, [description.find(layer) for layer in spec.layers]
        if spec.files.fit_classifier:
            fit_classifier(net, weights)
        read = cut(net, blobs, {name: len(shapes) for name, shapes in weights.items()})
        if spec.use_gpu:
            use_fast_layers(net, TF32_LAYERS if spec.tf32 else GPU_LAYERS)
            join_relus(net, blobs)
        last = set() if spec.use_gpu else use_channels_last(net, blobs)
        # Caffe's layer for a single channel assumes that channels come first.
        is_one = spec.objective and (blobs[0] not in last or spec.objective[0] != "AmplifyNeuron")
        self.has_objective = bool(is_one) and end_in_objective(net, blobs[0], *spec.objective)
        self.spec, self.mean, self._net = spec, spec.files.mean, caffe_net(net)
        check_fit(spec, self._net, weights)
        self._net.copy_from(spec.files.weights)
        self.notices = description.notices + check_values(spec, self._net)
        for number, layer in enumerate(self._net.layers):
            for top in range(len(self._net._top_ids(number))):
                if hasattr(layer, "set_loss"):  # in this program's build of Caffe
                    layer.set_loss(top, 0)  # nobody asks for Caffe's own loss
        (name,) = self._net.inputs
        self._input = self._net.blobs[name]
        self._graphs = Graphs.available() if spec.use_gpu and spec.graphs else None
        self.picture = None
        self.tile_size, self._ends = tuple(self._input.shape)[2:], {}
        # An in-place ReLU after the layer that makes a blob has changed the activations, but the
        # gradient of the blob itself does not pass back through it; those from later layers do.
        order = list(self._net._layer_names)
        for layer, blob in zip(spec.layers, blobs):
            start = order.index(description.starts[blob])
            self._ends[layer] = End(blob, self._net.blobs[blob], start, blob in read, blob in last)
        self.shapes = {layer: end.shape() for layer, end in self._ends.items()}
        for layer in [layer for layer, shape in self.shapes.items() if not shape]:
            problem = "this layer's output is a single number, without channels"
            raise refusal("layer", layer, problem, ANOTHER_LAYER)

    def drop_picture(self):
        """Frees what the `picture` takes."""
        if self._graphs:
            self._graphs.forget()
        self.picture = None

    def forward(self, batch):
        """Computes the activations for the tiles `batch`, float32 (N, 3, H, W)."""
        self._load(batch)
        self._do("forward", lambda: self._forward(True))

    def gradient(self, batch, reads):
        """The gradient of the net's own objective with respect to the tiles `batch`, both float32
        (N, 3, H, W), valid until the next call. With `reads`, the activations can be read."""
        self._load(batch)
        self._do(("gradient", reads), lambda: self._pass(reads, [self._input]))
        return self._input_gradient()

    def pass_on_gpu(self, key, count, before, after):
        """Gives the GPU a pass of `count` tiles, without waiting: before(address of the tiles),
        which writes them there, then the pass, then after(address of their gradient). Both are for
        the net's own objective, with the input's scale. What is done with a key, (who does it, a
        number), is always the same; without one, it does not become a graph."""
        data = diff = None
        if not (self._graphs and self._graphs.has(key)):
            self._reshape((count, 3, *self.tile_size))
            data, diff = self._input.gpu_data_address, self._input.gpu_diff_address

        def work():
            before(data)
            self._pass(False, [])
            after(diff)

        if self._graphs:
            self._graphs.do(key, work, trial=("pass_on_gpu", key and key[0], count))
        else:
            work()

    def _reshape(self, shape):
        if tuple(self._input.shape) != shape:
            self._input.reshape(*shape)
            self._net.reshape()

    def _load(self, batch):
        self._reshape(batch.shape)
        scale = self.spec.files.scale
        self._input.data[...] = batch if scale == 1 else batch * np.float32(scale)

    def _do(self, what, work):
        """Does a part of a pass, on a GPU as a graph if possible."""
        if self._graphs is None:
            work()
        else:
            self._graphs.do((tuple(self._input.shape), what), work)
            caffe_library().cnn_vis_wait()

    def _pass(self, reads, diffs):
        """Goes forward and back for the net's own objective, and brings the `diffs` of these blobs
        here."""
        (start,) = {end.start for end in self._ends.values()}
        self._forward(reads)
        self._backward(start, -1, diffs)

    def _forward(self, reads):
        self._net._forward(0, len(self._net.layers) - 1)
        for end in self._ends.values() if reads else ():
            read_only(end.blob, "data")  # brings it here

    def _backward(self, start, stop, reads):
        """Goes back from the layer number `start` to the one after `stop`, and brings the diffs of
        the blobs `reads` here."""
        self._net._backward(start, stop + 1)
        for blob in reads:
            read_only(blob, "diff")

    def activations(self):
        """The activations of each layer, {layer: float32 (N, C, ...)}, valid until `forward`."""
        return {layer: np.ascontiguousarray(end.array("data")) for layer, end in self._ends.items()}

    def backward(self, gradients):
        """The gradient with respect to the tiles, float32 (N, 3, H, W), valid until the next call,
        after `forward`. `gradients` are [(layer, the gradient of its activations), ...]."""
        filled = set()
        starts = sorted({end.start for end in self._ends.values()}, reverse=True)
        for start, stop in itertools.pairwise([*starts, -1]):
            for layer, gradient in gradients:
                end = self._ends[layer]
                if end.start == start:
                    diff = end.writable_diff()
                    if end.is_read or end.name in filled:
                        diff += gradient
                    else:
                        diff[...] = gradient
                    filled.add(end.name)
            ends = [end for end in self._ends.values() if end.start == stop]
            reads = [end.blob for end in ends if end.is_read or end.name in filled]
            reads = reads if stop >= 0 else [self._input]
            what = ("backward", start, tuple(end.name for end in ends))
            self._do(what, functools.partial(self._backward, start, stop, reads))
        return self._input_gradient()

    def _input_gradient(self):
        gradient, scale = read_only(self._input, "diff"), self.spec.files.scale
        return gradient if scale == 1 else gradient * np.float32(scale)

    def guide(self):
        """The guide of the run, uint8 (H, W, 3), or None."""
        path = self.spec.files.guide
        return np.load(path, allow_pickle=False) if path else None

    def batch_for_memory(self, share):
        """How many tiles, at most a full batch, fit at the same time in this process's part of the
        GPU's free memory, which is shared by `share` processes that have all run one tile
        already."""
        tile = sum(2 * 4 * math.prod(blob.shape) for blob in self._net.blobs.values())
        return min(FULL_BATCH, max(1, int(0.7 * self.free_gpu_memory() / share) // tile))

    def free_gpu_memory(self):
        """The GPU's free memory, in bytes."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        driver = ctypes.CDLL("libcuda.so.1")
        driver.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total))
        return free.value

    def layers(self):
        """The names of its layers, in order."""
        return list(self._net._layer_names)

    def run_layer(self, number, backward):
        """Runs one layer, forward or backward."""
        (self._net._backward if backward else self._net._forward)(number, number)


def read_only(blob, kind):
    """The "data" or "diff" of a caffe.Blob for reading only, so that a Caffe with our patches need
    not copy it to the GPU again."""
    array = getattr(blob, f"cpu_{kind}", None)
    return getattr(blob, kind) if array is None else array
