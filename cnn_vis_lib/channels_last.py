"""On the CPU, a network whose blobs have the channels last, (N, H, W, C), as far as this program's
build of Caffe has layers for that: they are faster than Caffe's own, and share their work among
cores. Results differ only by rounding."""

import itertools

from .description import followers
from .prototxt import import_caffe

CONVOLUTION = "Convolution"  # takes both layouts


def convolution_fits(layer):
    """Whether it is one in two dimensions that does not treat each channel alone: there is nothing
    to gain for those."""
    own = layer.convolution_param
    is_joint = own.group == 1 or own.num_output >= 8 * own.group
    return own.axis == 1 and len(own.kernel_size) <= 2 and is_joint


def pooling_fits(layer):
    """Whether it is of maxima in windows."""
    own = layer.pooling_param
    sides = own.kernel_size or own.kernel_h, own.kernel_size or own.kernel_w
    pads = own.pad or own.pad_h, own.pad or own.pad_w
    is_usual = own.pool == own.MAX and not own.global_pooling
    return is_usual and all(pad < side for pad, side in zip(pads, sides))


def lrn_fits(layer):
    """Whether it is across channels, with the usual exponent."""
    own = layer.lrn_param
    is_usual = own.norm_region == own.ACROSS_CHANNELS and own.local_size % 2 == 1
    return is_usual and own.beta == 0.75


def concat_fits(layer):
    """Whether it joins channels."""
    own = layer.concat_param
    return (own.concat_dim if own.HasField("concat_dim") else own.axis) == 1


def batch_norm_fits(layer):
    """Whether it uses the statistics of the training."""
    own = layer.batch_norm_param
    return own.use_global_stats or not own.HasField("use_global_stats")


def scale_fits(layer):
    """Whether it multiplies each channel by a weight."""
    own = layer.scale_param
    return own.axis == 1 and own.num_axes == 1


FITS = {  # {Caffe's type: whether the layer has a version for channels last}
    CONVOLUTION: convolution_fits,
    "Pooling": pooling_fits,
    "LRN": lrn_fits,
    "Concat": concat_fits,
    "BatchNorm": batch_norm_fits,
    "Scale": scale_fits,
}
# Types of layers to which it is all the same where the channels are.
# fmt: off
ELEMENTWISE = {
    "AbsVal", "BNLL", "Clip", "Dropout", "ELU", "Eltwise", "Exp", "Log", "Power", "ReLU",
    "Sigmoid", "Swish", "TanH",
}
# fmt: on
RESHAPING = {"Flatten", "InnerProduct", "Reduction", "Reshape"}  # to any number of axes
ADDING = {f"ChannelsLast{CONVOLUTION}", "ChannelsLastPooling"}  # can add to a gradient


def use_channels_last(net, targets):
    """Rewrites the NetParameter `net`, in place, for layers with the channels last, if this Caffe
    has them. Returns the names of the blobs that then have them last. All targets keep their names
    and what is computed in place on them; other blobs may lose an in-place ReLU to the convolution
    before it."""
    if f"ChannelsLast{CONVOLUTION}" not in import_caffe().layer_type_list():
        return set()
    fixed = fixed_blobs(net, targets)
    join_relus(net, targets, fixed)
    last = change_layers(net, fixed)
    split(net, last, targets)
    return last


def is_fast(layer):
    """Whether there is a version of the layer for channels last."""
    is_single = len(layer.top) == 1 and (len(layer.bottom) == 1 or layer.type == "Concat")
    return is_single and layer.type in FITS and FITS[layer.type](layer)


def passes_on(layer):
    """Whether the layer can have its channels last if what it reads has them last."""
    is_mixed = len(layer.bottom) > 1 and not {*layer.bottom}.isdisjoint(layer.top)
    return (layer.type in ELEMENTWISE and not is_mixed) or is_fast(layer)


def fixed_blobs(net, targets):
    """The blobs whose layers must stay as they are: the targets on which a layer without a version
    works in place, as backward starts at the layer that makes a target, and does not pass a copy;
    and all that depends on a layer after which blobs may not be pictures."""
    others = [layer for layer in net.layer if not passes_on(layer)]
    fixed = {blob for layer in others for blob in layer.top if blob in layer.bottom} & {*targets}
    return fixed | followers(net, {layer.name for layer in net.layer if layer.type in RESHAPING})


def join_relus(net, targets, fixed):
    """Removes each in-place ReLU after a convolution that can be done in another layer: where that
    is least work, in the only layer that reads the result, or else in the convolution. For max
    pooling the order makes no difference; Concat does the ReLUs of all that it joins, or none."""
    relus = {}  # {blob: (the convolution that makes it, its ReLU, the layers that then read it)}
    for layer in net.layer:
        if layer.type == CONVOLUTION and is_fast(layer) and layer.top[0] not in {*targets, *fixed}:
            relu, *readers = [o for o in net.layer if layer.top[0] in o.bottom] or [None]
            is_plain = relu and relu.type == "ReLU" and not relu.relu_param.negative_slope
            if is_plain and relu.top == layer.top:
                relus[layer.top[0]] = layer, relu, readers
    for layer, relu, readers in relus.values():
        joined = set(readers[0].bottom) if len(readers) == 1 and is_fast(readers[0]) else set()
        is_common = all(blob in relus and len(relus[blob][2]) == 1 for blob in joined)
        is_later = joined and readers[0].type in ("Pooling", "Concat") and is_common
        is_later = is_later and fixed.isdisjoint(readers[0].top)
        (readers[0] if is_later else layer).relu_param.SetInParent()
        net.layer.remove(relu)


def change_layers(net, fixed):
    """Changes the types of layers, but of those that make a blob in `fixed`; returns the blobs that
    then have the channels last. Where another layer needs them first, it gets a copy."""
    last = set()
    for layer in list(net.layer):
        bottoms, is_free = set(layer.bottom), fixed.isdisjoint(layer.top)
        is_last = bool(bottoms) and bottoms <= last
        can_enter = layer.type == CONVOLUTION and is_fast(layer)
        if is_free and (can_enter or (is_last and passes_on(layer))):
            if is_last and layer.type == CONVOLUTION:
                layer.convolution_param.axis = 3
            if layer.type in FITS:
                layer.type = f"ChannelsLast{layer.type}"
            last.update(layer.top)
        else:
            for blob in sorted(bottoms & last):
                copy_before(net, layer, blob, last)
    return last


def copy_before(net, layer, blob, last):
    """Gives a layer that needs the channels of a blob in `last` first a copy that has them there.
    If the layer works in place, the copy takes the name of the blob."""
    copy, original = f"{blob}/channels_first", blob
    if blob in layer.top:
        copy, original = blob, f"{blob}/channels_last"
        for other in itertools.takewhile(lambda other: other.name != layer.name, net.layer):
            for names in (other.bottom, other.top):
                names[:] = [original if name == blob else name for name in names]
        last.symmetric_difference_update([blob, original])
    else:
        layer.bottom[:] = [copy if name == blob else name for name in layer.bottom]
    if not any(copy in other.top for other in net.layer if other.type == "ChannelsFirst"):
        place = [other.name for other in net.layer].index(layer.name)
        insert(net, place, name=f"{blob}/copy", type="ChannelsFirst", bottom=[original], top=[copy])


def insert(net, place, **fields):
    """Adds a layer to the NetParameter `net`, as number `place`; returns it."""
    net.layer.add(**fields)
    net.layer.insert(place, net.layer.pop())
    return net.layer[place]


def split(net, last, targets):
    """Gives each reader of a blob in `last` a blob of its own, so that Caffe need not. If they can,
    the readers share its gradient: the last one, whose turn is first, writes it, and the others add
    to it."""
    makers = [next(i for i, o in enumerate(net.layer) if blob in o.top) for blob in targets]
    running = {layer.name for layer in net.layer[: max(makers) + 1]}  # backward
    for blob in sorted(last):
        writers = [i for i, layer in enumerate(net.layer) if blob in layer.top]
        readers = [
            (layer, i)
            for layer in net.layer
            for i, bottom in enumerate(layer.bottom)
            if bottom == blob and blob not in layer.top
        ]
        if len(readers) < 2:
            continue
        tops = [f"{blob}/split_{i}" for i in range(len(readers))]
        fields = {"type": "ChannelsLastSplit", "bottom": [blob], "top": tops}
        layer = insert(net, writers[-1] + 1, name=f"{blob}/split", **fields)
        can_add = all(o.type in ADDING and o.name in running for o, _ in readers)
        for reader, _ in readers[:-1] if can_add else ():
            reader.python_param.param_str = layer.python_param.param_str = "adds"
        for (reader, i), top in zip(readers, tops):
            reader.bottom[i] = top
