"""Prototxts of any age and kind, as a NetParameter in the current format without what only training
needs. Caffe's own conversions have no Python interface in other builds of Caffe."""

import ctypes
import functools
import itertools
import os
import re
import sys
import tempfile

from .errors import NO_MEMORY, BadRequest, OutOfMemory, one_line, refusal
from .install import how_to_install, missing_package


def import_caffe():
    """Imports Caffe, with its log silenced, from the Python path or else from $CAFFE_ROOT/python.
    Returns the module. Raises BadRequest."""
    os.environ.setdefault("GLOG_minloglevel", "2")
    if root := os.environ.get("CAFFE_ROOT"):
        path = os.path.join(root, "python")
        sys.path += [path] if path not in sys.path else []
    try:
        import caffe
    except ModuleNotFoundError as error:
        what = "pycaffe" if error.name == "caffe" else "requirements.txt"
        raise BadRequest(missing_package(error, what)) from None
    except Exception as error:  # the user's own Caffe may fail in any way
        if re.search(NO_MEMORY, str(error)):
            raise OutOfMemory from None
        extra = "[cuda]" if re.search("lib(cublas|curand|cudnn)", str(error)) else ""
        remedy = how_to_install(f"pycaffe{extra}")
        raise BadRequest(f"Caffe cannot be imported ({one_line(error)})", remedy) from None
    return caffe


@functools.cache
def caffe_library():
    """Caffe's shared library, as a ctypes.CDLL. Raises BadRequest."""
    import_caffe()
    import caffe._caffe

    return ctypes.CDLL(caffe._caffe.__file__)


def caffe_net(net):
    """The NetParameter as a caffe.Net in TEST phase, without weights."""
    caffe = import_caffe()
    with open(os.memfd_create("net"), "w") as file:  # Caffe reads nets from files only
        file.write(str(net))
        file.flush()
        return caffe.Net(f"/proc/self/fd/{file.fileno()}", caffe.TEST)


def parse_prototxt(path):
    """The prototxt `path` as a caffe_pb2.NetParameter. Raises BadRequest."""
    import_caffe()
    from google.protobuf import text_format

    try:
        with open(path, "rb") as file:
            data = file.read().removeprefix(b"\xef\xbb\xbf")  # a byte-order mark
        try:
            text = data.decode()
        except UnicodeDecodeError:
            text = data.decode("latin-1")  # allows comments in any encoding
        return parse_net(text)
    except (OSError, text_format.ParseError, RecursionError) as error:
        problem = f"not a network description ({one_line(error)[:200]})"
        raise refusal("deploy_txt", path, problem, "use a deploy.prototxt") from None


def parse_net(text):
    """The text as a NetParameter. Unknown parameters are dropped from layers of types that this
    Caffe lacks. Raises text_format.ParseError, whose message names the layer at fault."""
    from caffe.proto import caffe_pb2
    from google.protobuf import text_format

    text = in_this_dialect(text)
    try:
        return text_format.Parse(text, caffe_pb2.NetParameter())
    except text_format.ParseError:
        known, net = set(import_caffe().layer_type_list()), caffe_pb2.NetParameter()
        for block in blocks(text):
            one = text_format.Parse(block, caffe_pb2.NetParameter(), allow_unknown_field=True)
            layer = next(iter([*one.layer, *one.layers]), None)
            if not one.layer or layer.type in known:
                try:
                    one = text_format.Parse(block, caffe_pb2.NetParameter())
                except text_format.ParseError as error:
                    where = f"layer {layer.name}: " if layer else ""
                    raise text_format.ParseError(f"{where}{error}") from None
            net.MergeFrom(one)
        return net


def in_this_dialect(text):
    """The prototxt with the `ceil_mode` of other Caffes as this one's `round_mode`."""
    from caffe.proto import caffe_pb2

    fields = caffe_pb2.PoolingParameter.DESCRIPTOR.fields_by_name
    if "ceil_mode" in fields or "round_mode" not in fields:
        return text

    def translated(match):
        if match[1] is None:  # a string or a comment
            return match[0]
        return f"round_mode: {'CEIL' if match[1].lower() in ('true', 't', '1') else 'FLOOR'}"

    truth = r"\bceil_mode\s*:\s*([Tt]rue|[Ff]alse|[tf]|[01])\b"
    return re.sub(f"{UNSPOKEN}|{truth}", translated, text)


UNSPOKEN = r"\"(?:\\.|[^\"\\])*\"|'(?:\\.|[^'\\])*'|#[^\n]*"  # strings and comments of a prototxt


def blocks(text):
    """Cuts a prototxt after every brace that closes an outermost block; yields the pieces, each
    after as many empty lines as there are lines before it, so that errors have the right line."""
    depth, begun = 0, 0
    for token in re.finditer(rf"{UNSPOKEN}|[{{}}]", text):
        depth += {"{": 1, "}": -1}.get(token[0], 0)
        if token[0] == "}" and depth == 0:
            yield "\n" * text.count("\n", 0, begun) + text[begun : token.end()]
            begun = token.end()
    yield "\n" * text.count("\n", 0, begun) + text[begun:]


def upgraded(net):
    """A NetParameter in an older format (V0 or V1: `layers`), converted to the current one."""
    from caffe.proto import caffe_pb2

    if any(layer.HasField("layer") for layer in net.layers):  # V0; Caffe upgrades it on loading
        with tempfile.NamedTemporaryFile() as file:
            caffe_net(net).save(file.name)
            net = caffe_pb2.NetParameter.FromString(file.read())
        for layer in net.layer:
            del layer.blobs[:]
        return net
    kinds = {name.lower(): name for name in import_caffe().layer_type_list()}
    kinds["softmaxloss"] = "SoftmaxWithLoss"
    for old in net.layers:
        new, kind = net.layer.add(), old.LayerType.Name(old.type)
        new.type = kinds.get(kind.replace("_", "").lower(), kind.title().replace("_", ""))
        for name in old.param:
            new.param.add(name=name)
        for field, value in old.ListFields():
            handled = ("type", "param", "blobs", "blobs_lr", "weight_decay", "blob_share_mode")
            if field.name in handled:
                continue
            if isinstance(value, str):
                setattr(new, field.name, value)
            elif hasattr(value, "extend"):
                getattr(new, field.name).extend(value)
            elif field.name in new.DESCRIPTOR.fields_by_name:
                getattr(new, field.name).CopyFrom(value)
    net.ClearField("layers")
    return net


def keep_test_layers(net):
    """Removes the layers that Caffe omits in its TEST phase, at the level and stages of the
    NetParameter `net`, plus the stage "deploy" if an Input layer includes it. If no remaining layer
    reads pictures, keeps those that do in the TRAIN phase."""
    from caffe import TEST

    stages, level = set(net.state.stage), net.state.level
    inputs = (layer for layer in net.layer if layer.type == "Input")
    stages.update("deploy" for layer in inputs for rule in layer.include if "deploy" in rule.stage)

    def is_met(rule):
        phase = not rule.HasField("phase") or rule.phase == TEST
        least = not rule.HasField("min_level") or level >= rule.min_level
        most = not rule.HasField("max_level") or level <= rule.max_level
        has_stages = stages.issuperset(rule.stage) and stages.isdisjoint(rule.not_stage)
        return phase and least and most and has_stages

    def is_kept(layer):
        if layer.include:
            return any(map(is_met, layer.include))
        return not any(map(is_met, layer.exclude))

    kept, layers = list(map(is_kept, net.layer)), list(net.layer)
    reads = net.input or any(
        is_in and layer.top and not layer.bottom for is_in, layer in zip(kept, layers)
    )
    del net.layer[:]
    for is_in, layer in zip(kept, layers):
        if is_in or not (reads or layer.bottom):
            del layer.include[:], layer.exclude[:]
            net.layer.append(layer)
    net.ClearField("state")


def data_layers(net):
    """The data layers of a NetParameter, which read pictures for training instead of an input."""
    has_input = net.input or any(layer.type == "Input" for layer in net.layer)
    others = {"Input", "Parameter"} | ({"DummyData"} if has_input else set())
    sources = (layer for layer in net.layer if layer.top and not layer.bottom)
    return [layer for layer in sources if layer.type not in others]


def data_param(layer):
    """The parameters of a data layer's own type, or None."""
    return {
        "Data": layer.data_param,
        "DummyData": layer.dummy_data_param,
        "ImageData": layer.image_data_param,
        "MemoryData": layer.memory_data_param,
        "WindowData": layer.window_data_param,
    }.get(layer.type)


def picture_shape(layer):
    """The (channels, height, width) of the pictures that a data layer reads; height and width are 0
    if it does not state them."""
    parameters = data_param(layer)
    if layer.type == "MemoryData":
        return parameters.channels, parameters.height, parameters.width
    if layer.type == "DummyData":
        if parameters.shape:
            return tuple(parameters.shape[0].dim[1:])
        return (*parameters.channels[:1], *parameters.height[:1], *parameters.width[:1])
    side = layer.transform_param.crop_size or getattr(parameters, "crop_size", 0)
    if layer.type == "ImageData" and not side:
        return 3, parameters.new_height, parameters.new_width
    return 3, side, side


def take_inputs(net):
    """Removes the inputs and data layers from the NetParameter `net`. Returns {blob: shape for one
    tile, with sides of 0 if they are not stated}, the list of data layers, and the set of blobs
    that exist only in training."""
    shapes = [tuple(shape.dim) for shape in net.input_shape]
    shapes += [tuple(net.input_dim[i : i + 4]) for i in range(0, len(net.input_dim), 4)]
    inputs = dict(itertools.zip_longest(net.input, shapes[: len(net.input)], fillvalue=()))
    for layer in net.layer:
        if layer.type == "Input":
            shapes = [tuple(shape.dim) for shape in layer.input_param.shape] or [()]
            inputs |= zip(layer.top, shapes * len(layer.top))
    reading, labels = data_layers(net), set()
    for layer in reading:
        inputs[layer.top[0]] = (1, *picture_shape(layer))
        labels.update(layer.top[1:])
    for layer in list(net.layer):
        if not layer.bottom and inputs.keys() & set(layer.top):
            net.layer.remove(layer)
    for name in ("input", "input_shape", "input_dim"):
        net.ClearField(name)
    inputs = {blob: (1, *shape[1:]) if shape else (1, 3, 0, 0) for blob, shape in inputs.items()}
    return inputs, reading, labels


def training_input(path):
    """Task: what the data layer of the training prototxt `path` does to pictures, a dict with some
    of "scale", by which they are multiplied; "mean", the mean of what is subtracted from their
    channels before that; and "mean_file", where it is stored instead. Raises BadRequest."""
    net = parse_prototxt(path)
    net = upgraded(net) if net.layers else net
    keep_test_layers(net)
    states = {}
    layers = data_layers(net)
    sized = [layer for layer in layers if min(picture_shape(layer)[1:], default=0)]
    for layer in (sized or layers)[:1]:
        older, current = data_param(layer), layer.transform_param  # the older place, and today's
        scale = current.scale if current.HasField("scale") else getattr(older, "scale", 1)
        if scale != 1:
            states["scale"] = float(f"{scale:.7g}")  # a float32, as it was written
        if current.mean_value:
            states["mean"] = sum(current.mean_value) / len(current.mean_value)
        elif mean_file := current.mean_file or getattr(older, "mean_file", ""):
            states["mean_file"] = mean_file
    return states
