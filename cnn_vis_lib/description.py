"""A network as its prototxt describes it: what can be amplified, and cutting it down to that."""

import contextlib
import difflib
import re

from .errors import BadRequest, refusal
from .pixels import LEAST_SIDE
from .prototxt import import_caffe, keep_test_layers, parse_prototxt, take_inputs, upgraded
from .terms import class_of, quoted

ANOTHER_LAYER = "choose another layer from --list_layers"

ITS_FILES = "give its files: --deploy_txt, --caffe_model"
# Networks by the names of their layers, for somebody who has their names in mind.
OTHER_NETWORKS = {
    r"mixed\d|conv2d\d": "TensorFlow's Inception, which is not a Caffe network; see --list_layers",
    r"(conv|relu|pool)\d_\d|fc[678]$": f"VGG or CaffeNet; {ITS_FILES}",
    r"(res|bn|scale)\d": f"ResNet; {ITS_FILES}",
    r"fire\d": f"SqueezeNet; {ITS_FILES}",
    r"inception_\d": f"GoogLeNet; {ITS_FILES}",
}

NO_GRADIENT = {"Accuracy", "ArgMax", "Embed", "Threshold"}  # layer types without a gradient


class Description:
    """A network as its prototxt describes it, ready to be cut and run. `input_size`, if given, is
    the (height, width) of its pictures, and `name` what the user knows it by. Raises BadRequest.

    Attributes: path; name; net, a NetParameter in the current format, without the layers that this
    Caffe cannot create; inputs, {blob: shape for one tile}; starts, {blob that can be amplified:
    the layer from which backward starts}, in order; aliases, {layer: the only blob that it makes};
    holders, {layer that works in place: its blob}; problems, {any other blob or layer: why it
    cannot be amplified}; notices, a list of lines for the user.
    """

    def __init__(self, path, input_size=None, name=None):
        self.path, self.name, self.notices, net = path, name or path, [], parse_prototxt(path)
        if net.layers:
            net = upgraded(net)
        keep_test_layers(net)
        names = {""}
        for number, layer in enumerate(net.layer):
            del layer.propagate_down[:]  # meant for training
            if layer.name in names:  # Caffe would always find the first one
                layer.name = f"{layer.name}#{number}"
            names.add(layer.name)
            for field, value in layer.ListFields():
                if field.message_type and "engine" in field.message_type.fields_by_name:
                    value.ClearField("engine")  # this Caffe may lack it; let it choose
        self.inputs, reading, labels = take_inputs(net)
        self._choose_pictures(input_size, reading)
        for blob, shape in reversed(self.inputs.items()):
            layer = net.layer.add(name=blob, type="Input", top=[blob])
            layer.input_param.shape.add(dim=shape)
            net.layer.insert(0, net.layer.pop())
        self.net, self.starts, self.problems = net, {}, {}
        self.aliases, self.holders = {}, {}
        self._of_inputs = set()  # those problems that are about several inputs
        self._sort_out(labels)

    def _choose_pictures(self, input_size, reading):
        """Finds the inputs that take pictures, and gives them their size."""

        def refuse(*why):
            return refusal("deploy_txt", self.path, *why)

        shapes, kinds = self.inputs, ", ".join(f"{layer.name} ({layer.type})" for layer in reading)
        pictures = [blob for blob, shape in shapes.items() if len(shape) == 4 and shape[1] == 3]
        if not pictures:
            found = f"its input has shape {[*shapes.values()][0]}" if shapes else "it has no input"
            raise refuse(found, "it must take 3-channel pictures")
        large = [blob for blob in pictures if min(shapes[blob][2:]) >= LEAST_SIDE]
        self.pictures = large or pictures
        if input_size:
            shapes.update(dict.fromkeys(self.pictures, (1, 3, *input_size)))
        elif not large:
            height, width = shapes[pictures[0]][2:]
            if kinds and not height:
                problem = f"this is for training, and {kinds} does not state the picture size"
                raise refuse(problem, "use the deploy.prototxt, or --input_size")
            found = f"is only {height}x{width}" if height else "has no size"
            raise refuse(f"its input {found}", "choose a size, such as --input_size 224")
        if kinds:
            height, width = shapes[self.pictures[0]][2:]
            becomes = f"{kinds} is replaced by an input of {height}x{width}"
            self.notices.append(f"{self.path} is a training prototxt; {becomes}")

    def _sort_out(self, labels):
        """Finds what can be amplified: blobs that depend on a single input, one for pictures."""
        known, problems = set(import_caffe().layer_type_list()), self.problems
        sources = {}  # {blob: the inputs that it depends on}
        for layer in list(self.net.layer):
            lost = next((blob for blob in layer.bottom if blob not in sources), None)
            if layer.type not in known:
                problem = f"{layer.name} is a {layer.type} layer, which this Caffe lacks"
            elif layer.type in NO_GRADIENT:
                problem = f"{layer.name}: Caffe cannot compute a gradient for {layer.type} layers"
            elif lost in labels:
                problem = f"{layer.name} needs {lost}, which exists only in training"
            elif lost is not None:
                problem = problems.get(lost, f"{layer.name} needs {lost}, which no layer makes")
            else:
                inputs = set().union(*(sources[blob] for blob in layer.bottom))
                inputs.update([layer.name] if layer.type == "Input" else [])
                sources.update(dict.fromkeys(layer.top, inputs))
                self._add_targets(layer, inputs)
                continue
            problems |= dict.fromkeys([layer.name, *layer.top], problem)
            for top in layer.top:
                sources.pop(top, None)
                self.starts.pop(top, None)
            self.net.layer.remove(layer)

    def _add_targets(self, layer, inputs):
        """Adds the blobs that a layer writes to `starts`, or to `problems` if they cannot be
        amplified. `inputs` are the inputs that they depend on."""
        problem = None
        if len(inputs) > 1:
            names = " and ".join(blob for blob in self.inputs if blob in inputs)
            earlier = filter(None, map(self.problems.get, layer.bottom))
            problem = f"{layer.name} depends on {len(inputs)} inputs, {names}, not on one picture"
            problem = next((text for text in earlier if text in self._of_inputs), problem)
            self._of_inputs.add(problem)
        elif not inputs:
            problem = f"{layer.name} does not depend on the picture"
        elif inputs.isdisjoint(self.pictures):
            shape = "x".join(map(str, self.inputs[min(inputs)][1:]))
            problem = (
                f"{layer.name} depends on {min(inputs)} alone, which takes no pictures ({shape})"
            )
        if layer.bottom and problem:
            self.problems |= dict.fromkeys([layer.name, *layer.top], problem)
        elif layer.bottom and layer.top:
            tops = [top for top in layer.top if top not in layer.bottom]
            tops = tops[:1] if layer.type == "Pooling" else tops  # the second is only positions
            for top in [*tops, *([layer.name] if layer.name in layer.top else [])]:
                self.starts[top] = layer.name
            self.aliases |= {layer.name: tops[0]} if len(tops) == 1 else {}
            self.holders |= {} if tops else {layer.name: layer.top[0]}

    def find(self, name):
        """The blob to amplify for `name`, which names a blob or a layer. Raises BadRequest."""
        blob = name if name in self.starts else self.aliases.get(name)
        if blob in self.starts:
            return blob
        if not self.starts:
            why = next((f" ({problem})" for problem in self.problems.values()), "")
            problem = f"this has no layer to amplify{why}"
            raise refusal("deploy_txt", self.path, problem, "use another deploy.prototxt")
        if self.holders.get(name) in self.starts:
            problem = f"it works in place on {self.holders[name]}"
            raise refusal("layer", name, problem, f"use --layer {self.holders[name]}")
        if name in self.inputs or name in self.problems:
            problem = self.problems.get(name, "this is the input, not a layer")
            raise refusal("layer", name, problem, ANOTHER_LAYER)
        close = self._close_names(name, cutoff=1)
        others = [hint for pattern, hint in OTHER_NETWORKS.items() if re.match(pattern, name)]
        if not close and (term := self._class(name)):
            hint = f"did you mean {term}?"
        elif not close and others:
            hint = f"layers of this name are those of {others[0]}"
        else:
            close = close or self._close_names(name)
            hint = f"did you mean {' or '.join(close)}?" if close else "see --list_layers"
        raise refusal("layer", name, f"{self.name} has no such layer", hint)

    def _class(self, word):
        """What --layer takes for the class `word`, in the last classifier that has it; or None."""
        for layer in reversed(self.net.layer):
            with contextlib.suppress(BadRequest):
                class_of(layer.name, word, (layer.inner_product_param.num_output,))
                return f"{quoted(layer.name)}:{word}"
        return None

    def _close_names(self, name, cutoff=0.5):
        """At most three blobs that `name` may have been meant for. Capitals and punctuation are
        ignored, a layer that works in place stands for its blob, and part of a name is enough."""

        def plain(text):
            return re.sub("[^a-z0-9]", "", text.lower())

        names = self.holders | self.aliases | {blob: blob for blob in self.starts}
        by_key, key = {}, plain(name)
        for other, blob in names.items():
            by_key.setdefault(plain(other), []).append(blob)
        parts = [other for other in reversed(by_key) if key and key in other]  # outputs come last
        close = difflib.get_close_matches(key, by_key, n=3, cutoff=cutoff)
        keys = [key] if key in by_key else parts or close
        blobs = dict.fromkeys(blob for key in keys for blob in by_key[key])
        return [blob for blob in blobs if blob in self.starts][:3]


def fit_classifier(net, weights):
    """Sets the width of the classifier in the NetParameter `net`, in place, to that of `weights`
    (from read_weights), so that one GoogLeNet prototxt serves all data sets."""
    for layer in net.layer:
        shapes = weights.get(layer.name)
        if layer.type == "InnerProduct" and shapes and len(shapes[0]) > 1:
            layer.inner_product_param.num_output = shapes[0][-2]


def followers(net, names):
    """The blobs that are written by the layers `names` of the NetParameter `net`, or by layers that
    depend on them."""
    blobs = set()
    for layer in net.layer:
        if layer.name in names or not blobs.isdisjoint(layer.bottom):
            blobs.update(layer.top)
    return blobs


def cut(net, targets, blob_counts):
    """Cuts the NetParameter `net`, in place, down to the layers needed for the gradient of the
    blobs `targets` with respect to the input. Returns the targets that its layers read, not
    counting those that work in place.

    It keeps the layers that the targets depend on, and those that work in place on the targets.
    Caffe's force_backward would also compute the gradient of every weight. Instead, only the first
    layer's bias is left to learn. Caffe then runs backward from a loss (set on the last layer that
    writes each target that no other layer reads) to the first layer, and propagate_down extends
    this to the input. If that is impossible (the first layer has no bias or has shared weights, or
    there are several first layers), force_backward does the same more slowly. `blob_counts` is
    {layer name: number of its weight blobs}.
    """
    kept, needed = [], set(targets)
    for layer in reversed(net.layer):
        if not needed.isdisjoint(layer.top):
            kept.insert(0, layer)
            needed.update(layer.bottom)
    inputs = set().union(*(layer.top for layer in kept if layer.type == "Input"))
    first = [layer for layer in kept if not inputs.isdisjoint(layer.bottom)]
    has_bias = len(first) == 1 and blob_counts.get(first[0].name, 0) == 2
    has_bias = has_bias and first[0].type in ("Convolution", "InnerProduct")
    has_bias = has_bias and not any(param.name for param in first[0].param)  # perhaps shared
    net.force_backward = not has_bias
    if has_bias:
        for layer in kept:
            while len(layer.param) < blob_counts.get(layer.name, 0):
                layer.param.add()
            for param in layer.param:
                param.lr_mult = 0
        first[0].param[1].lr_mult = 1
        first[0].propagate_down[:] = [True]
    read = {blob for layer in kept for blob in layer.bottom if blob not in layer.top}
    ends = set(targets) - read
    for layer in reversed(kept if has_bias else ()):
        if not ends.isdisjoint(layer.top):
            layer.loss_weight[:] = [1.0 if top in ends else 0.0 for top in layer.top]
            ends.difference_update(layer.top)
    names = {layer.name for layer in kept}
    for layer in [layer for layer in net.layer if layer.name not in names]:
        net.layer.remove(layer)
    return read.intersection(targets)


# Layers of this program's build of Caffe that are faster on a GPU than Caffe's own and give the
# same results except for rounding; and with less precise products.
GPU_LAYERS = {"Convolution": "CudnnConvolution", "LRN": "CudaLRN", "Concat": "CudaConcat"}
TF32_LAYERS = GPU_LAYERS | {"Convolution": "CudnnTF32Convolution"}
# Layers that do what one of these and a ReLU after it do.
RELU_LAYERS = {
    "CudnnConvolution": "CudnnConvolutionReLU",
    "CudnnTF32Convolution": "CudnnTF32ConvolutionReLU",
}


def use_fast_layers(net, fast):
    """Replaces layer types in the NetParameter `net` as in `fast`, {Caffe's type: ours}, if this
    Caffe has ours."""
    known = set(import_caffe().layer_type_list())
    for layer in net.layer:
        if fast.get(layer.type) in known:
            layer.type = fast[layer.type]


def join_relus(net, targets):
    """Makes one layer, as in RELU_LAYERS, of each layer in the NetParameter `net` and the ReLU that
    works in place on its output, unless that is one of the `targets`, blobs whose own gradient
    enters between the two."""
    known, first_users = set(import_caffe().layer_type_list()), {}
    for layer in net.layer:
        for blob in layer.bottom:
            first_users.setdefault(blob, layer)
    for layer in list(net.layer):
        joined, user = RELU_LAYERS.get(layer.type), first_users.get(layer.top[0])
        is_relu = user and user.type == "ReLU" and not user.relu_param.negative_slope
        is_in_place = is_relu and list(user.bottom) == list(user.top) == list(layer.top)
        if joined in known and is_in_place and layer.top[0] not in targets:
            layer.type = joined
            net.layer.remove(user)


def end_in_objective(net, blob, kind, parameters):
    """Appends the layer of type `kind` that computes an objective to the NetParameter `net`, cut at
    `blob`, if this Caffe has such layers; returns whether it has. The forward pass then writes the
    gradient of the loss where backward starts, so that on a GPU the activations need not leave it.
    """
    if kind not in import_caffe().layer_type_list():
        return False
    net.layer[-1].ClearField("loss_weight")  # the objective starts backward instead
    layer = net.layer.add(name="cnn_vis/objective", type=kind, bottom=[blob], loss_weight=[1])
    layer.top[:] = [layer.name]
    layer.python_param.param_str = parameters
    return True
