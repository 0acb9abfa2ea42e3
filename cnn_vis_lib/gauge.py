"""The statistics of a step."""

import collections
import math

import numpy as np

from .pixels import strips

STATS = (
    "objective", "p_loss", "aux_loss", "tv_loss", "p_gradient", "aux_gradient", "tv_gradient",
    "cnn_gradient", "step_size", "step_to_value", "image_mean", "image_std",
)  # fmt: skip


COLUMNS = ("size", "height", "width", "step", *STATS)  # of the table that --stats writes


class Gauge:
    """Measures one step over all its tiles; the original printed the statistics of the last tile
    only. Given the `state` of an earlier Gauge, it continues from there."""

    def __init__(self, state=()):
        self._sums = collections.Counter({name: float(n) for name, n in dict(state).items()})

    def state(self):
        """Everything measured so far, {name: number}."""
        return dict(self._sums)

    def add_tile(self, loss, x, descent, terms):
        """Adds a tile, before its step is taken: the objective's loss; x, float64 (3, H, W); the
        network's gradient; and {name of a regularizer: (the term, its argument)}."""
        self.add(tiles=1, objective=-loss, cnn_gradient=mean_size(descent), value=mean_size(x))
        for name, (term, argument) in terms.items():
            self.add(**{f"{name}_loss": term.loss(argument)})
            self.add(**{f"{name}_gradient": mean_size(term.gradient(argument))})

    def add(self, **numbers):
        """Adds the numbers to the sums of the same names."""
        self._sums.update(numbers)

    def summary(self, image):
        """The statistics, {name in STATS: number}: means over the tiles, or of the whole image."""
        return {name: self._sums[name] / self._sums["tiles"] for name in STATS} | {
            "step_to_value": self._sums["step_size"] / (self._sums["value"] or 1),
            "image_mean": float(image.mean()),
            "image_std": deviation(image),
        }


def deviation(image):
    """The standard deviation of an image's values."""
    mean, squares = image.mean(), 0.0
    for rows in strips(image.shape[2]):
        squares += float(np.square(image[:, :, rows] - mean).sum())
    return math.sqrt(squares / image.size)


def mean_size(array):
    """The mean absolute value."""
    return float(np.abs(array).mean(dtype=np.float64))
