"""A Caffe network in PyTorch, with the same weights, for the rows of benchmark.py and gpu_check.py
that compare with PyTorch. This is not part of the program, and only these rows need PyTorch."""

from cnn_vis_lib.caffemodel import read_weights
from cnn_vis_lib.description import Description, cut, fit_classifier
from cnn_vis_lib.prototxt import caffe_net


def described(spec):
    """The layers of a NetworkSpec with one layer, cut as the program cuts them, as dicts that say
    what each computes, and their weights, {layer: arrays}. Runs in a process that may load Caffe.
    """
    description = Description(spec.files.deploy)
    net, (blob,) = description.net, [description.find(layer) for layer in spec.layers]
    if spec.files.fit_classifier:
        fit_classifier(net, read_weights(spec.files.weights))
    cut(net, [blob], {})
    loaded = caffe_net(net)
    loaded.copy_from(spec.files.weights)
    weights = {name: [blob.data.copy() for blob in blobs] for name, blobs in loaded.params.items()}
    return list(map(as_dict, net.layer)), weights, blob


def as_dict(layer):
    """What a LayerParameter of a known type computes. Raises ValueError for others."""
    found = {"name": layer.name, "type": layer.type}
    found |= {"bottom": list(layer.bottom), "top": layer.top[0]}
    if layer.type in ("Convolution", "Pooling"):
        own = layer.convolution_param if layer.type == "Convolution" else layer.pooling_param
        for name, default in {"kernel_size": 0, "stride": 1, "pad": 0}.items():
            value = getattr(own, name)
            value = value[0] if hasattr(value, "append") and value else value
            found[name] = value if isinstance(value, int) and value else default
        if layer.type == "Convolution":
            found["groups"] = own.group
        elif own.pool != own.MAX:
            raise ValueError(f"{layer.name}: only maximum pooling is known here")
    elif layer.type == "LRN":
        own = layer.lrn_param
        found |= {"size": own.local_size, "alpha": own.alpha, "beta": own.beta, "k": own.k}
    elif layer.type not in ("Input", "ReLU", "Concat"):
        raise ValueError(f"{layer.name}: {layer.type} layers are not known here")
    return found


class TorchNetwork:
    """The network of `described` in PyTorch, channels last: called with tiles (N, 3, H, W), it
    returns the last layer's activations."""

    def __init__(self, layers, weights, blob, device="cpu"):
        import torch

        self.torch, self.layers, self.blob = torch, layers, blob
        self.weights = {
            name: [torch.from_numpy(array).to(device) for array in arrays]
            for name, arrays in weights.items()
        }
        for arrays in self.weights.values():
            if arrays[0].dim() == 4:
                arrays[0] = arrays[0].to(memory_format=torch.channels_last)

    def __call__(self, x):
        blobs = {}
        for layer in self.layers:
            if layer["type"] == "Input":
                blobs[layer["top"]] = x
                continue
            compute = getattr(self, f"_{layer['type'].lower()}")
            blobs[layer["top"]] = compute(layer, *(blobs[name] for name in layer["bottom"]))
        return blobs[self.blob]

    def _convolution(self, layer, x):
        stride, pad, groups = layer["stride"], layer["pad"], layer["groups"]
        functional = self.torch.nn.functional
        return functional.conv2d(x, *self.weights[layer["name"]], stride, pad, groups=groups)

    def _relu(self, layer, x):
        return self.torch.nn.functional.relu(x)

    def _pooling(self, layer, x):
        sizes = layer["kernel_size"], layer["stride"], layer["pad"]
        return self.torch.nn.functional.max_pool2d(x, *sizes, ceil_mode=True)

    def _lrn(self, layer, x):
        constants = layer["size"], layer["alpha"], layer["beta"], layer["k"]
        return self.torch.nn.functional.local_response_norm(x, *constants)

    def _concat(self, layer, *parts):
        return self.torch.cat(parts, 1)
