"""A Caffe network in NumPy and double precision, to measure the rounding errors of others by. Slow:
a tile takes seconds."""

import numpy as np


def windows(x, layer, fill=0.0, more=(0, 0)):
    """(N, C, H, W, kernel, kernel) of x for a layer, padded; `more`: at the bottom and right."""
    kernel, stride, pad = layer["kernel_size"], layer["stride"], layer["pad"]
    widths = [(pad, pad + extra) for extra in more]
    x = np.pad(x, ((0, 0), (0, 0), *widths), constant_values=fill)
    seen = np.lib.stride_tricks.sliding_window_view(x, (kernel, kernel), (2, 3))
    return seen[:, :, ::stride, ::stride]


def add_windows(parts, shape, layer, more=(0, 0)):
    """The reverse of `windows` for gradients: the sum of all parts (N, C, H, W, kernel, kernel)
    at their places in x of this shape."""
    kernel, stride, pad = layer["kernel_size"], layer["stride"], layer["pad"]
    height, width = parts.shape[2:4]
    x = np.zeros((*shape[:2], *(n + 2 * pad + extra for n, extra in zip(shape[2:], more))))
    for i in range(kernel):
        for j in range(kernel):
            rows = slice(i, i + stride * height, stride)
            columns = slice(j, j + stride * width, stride)
            x[:, :, rows, columns] += parts[..., i, j]
    return x[:, :, pad : pad + shape[2], pad : pad + shape[3]]


class ExactNetwork:
    """The network of torch_network.described. `layers` may end anywhere."""

    def __init__(self, layers, weights, blob):
        self.layers, self.blob = layers, blob
        self.weights = {
            name: [array.astype(np.float64) for array in arrays] for name, arrays in weights.items()
        }

    def forward(self, x):
        """The last layer's activations for tiles (N, 3, H, W)."""
        self.blobs, self._steps = {}, []
        for layer in self.layers:
            if layer["type"] == "Input":
                self.blobs[layer["top"]] = x.astype(np.float64)
                self._input = layer["top"]
                continue
            compute = getattr(self, f"_{layer['type'].lower()}")
            y, backward = compute(layer, *(self.blobs[name] for name in layer["bottom"]))
            self.blobs[layer["top"]] = y
            self._steps.append((layer, backward))
        return self.blobs[self.blob]

    def backward(self, gradient):
        """The gradient with respect to the tiles, from that with respect to the activations."""
        gradients, is_in_place = {self.blob: gradient.astype(np.float64)}, True
        for layer, backward in reversed(self._steps):
            # As Caffe from the layer that makes the blob: not through what works in place on it.
            is_in_place = is_in_place and layer["bottom"] == [self.blob] == [layer["top"]]
            if is_in_place or layer["top"] not in gradients:
                continue
            for name, part in zip(layer["bottom"], backward(gradients.pop(layer["top"]))):
                gradients[name] = gradients[name] + part if name in gradients else part
        return gradients[self._input]

    def _convolution(self, layer, x):
        weight, *bias = self.weights[layer["name"]]
        groups = layer["groups"]
        seen = windows(x, layer)
        n, _, height, width, *_ = seen.shape

        def split(a, axis):
            return np.split(a, groups, axis)

        pairs = [
            (np.moveaxis(part, 1, 3).reshape(n * height * width, -1), w.reshape(len(w), -1))
            for part, w in zip(split(seen, 1), split(weight, 0))
        ]
        y = np.concatenate([columns @ w.T for columns, w in pairs], 1)
        y = y.reshape(n, height, width, -1).transpose(0, 3, 1, 2)
        y = y + bias[0].reshape(-1, 1, 1) if bias else y

        def backward(gradient):
            rows = np.moveaxis(gradient, 1, 3).reshape(n * height * width, -1)
            parts = [part @ w for part, (_, w) in zip(split(rows, 1), pairs)]
            shape = (n, height, width, -1, *weight.shape[2:])
            parts = np.concatenate([part.reshape(shape) for part in parts], 3)
            return [add_windows(np.moveaxis(parts, 3, 1), x.shape, layer)]

        return y, backward

    def _relu(self, layer, x):
        return np.maximum(x, 0), lambda gradient: [gradient * (x > 0)]

    def _pooling(self, layer, x):
        kernel, stride, pad = layer["kernel_size"], layer["stride"], layer["pad"]
        outs = [-(-(n + 2 * pad - kernel) // stride) + 1 for n in x.shape[2:]]
        if pad:
            outs = [o - ((o - 1) * stride >= n + pad) for o, n in zip(outs, x.shape[2:])]
        more = [max(0, (o - 1) * stride + kernel - n - 2 * pad) for o, n in zip(outs, x.shape[2:])]
        seen = windows(x, layer, -np.inf, more)[:, :, : outs[0], : outs[1]]
        seen = seen.reshape(*seen.shape[:4], -1)
        chosen = seen.argmax(-1)

        def backward(gradient):
            parts = np.where(np.arange(kernel**2) == chosen[..., None], gradient[..., None], 0)
            return [
                add_windows(parts.reshape(*parts.shape[:4], kernel, kernel), x.shape, layer, more)
            ]

        return seen.max(-1), backward

    def _lrn(self, layer, x):
        size, alpha, beta, k = (layer[name] for name in ("size", "alpha", "beta", "k"))

        def near(a):
            a = np.pad(a, ((0, 0), (size // 2, size // 2), (0, 0), (0, 0)))
            return sum(a[:, i : i + x.shape[1]] for i in range(size))

        scale = k + alpha / size * near(x * x)

        def backward(gradient):
            spread = near(gradient * x * scale ** (-beta - 1))
            return [gradient * scale**-beta - 2 * beta * alpha / size * x * spread]

        return x * scale**-beta, backward

    def _concat(self, layer, *parts):
        places = np.cumsum([part.shape[1] for part in parts])[:-1]
        return np.concatenate(parts, 1), lambda gradient: np.split(gradient, places, 1)
