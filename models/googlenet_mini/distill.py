#!/usr/bin/env python3
"""Trains a narrow GoogLeNet to see what a full one sees: the way googlenet_mini was made.

    pip install -r requirements.txt          # PyTorch
    python distill.py bvlc_googlenet.caffemodel PICTURES_FOLDER student.caffemodel --minutes 90
    python distill.py bvlc_googlenet.caffemodel PICTURES_FOLDER student.caffemodel \\
        --start earlier.caffemodel
    python distill.py bvlc_googlenet.caffemodel PICTURES_FOLDER unused.caffemodel \\
        --start student.caffemodel --iterations 0   # writes nothing, tells how well it imitates

Trains on a GPU if PyTorch finds one. Writes student.caffemodel, its deploy prototxt
student.prototxt, and student.state.pt, from which the same command goes on after a stop. Each of
the student's channels is to equal one channel of the teacher's, in units of that channel's
variance: in each layer the teacher's most varying channels are imitated. First the layers are
solved one after another, by least squares over --fit batches of crops, each from what the
student's layers before it give (conv1, which sees what the teacher's sees, learns by descent).
Then all are trained together: random crops of the pictures, some of them dreamed upon by the
student, go through both networks, and what counts is conv1, conv2 and every inception output.

Pictures are float32 (N, 3, S, S), channels B, G, R, 0 to 255 with MEAN taken off, as Caffe's
GoogLeNet takes them.
"""

import argparse
import math
import os
import pathlib
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
from cnn_vis_lib.description import Description
from cnn_vis_lib.machine import count_cores
from cnn_vis_lib.models import MODELS
from cnn_vis_lib.options import HelpFormatter
from cnn_vis_lib.prototxt import caffe_net, import_caffe
from cnn_vis_lib.reading import read_picture

MEAN = np.array([104.0, 117.0, 123.0], np.float32)
# Channels of the branches 1x1, 3x3_reduce, 3x3, 5x5_reduce, 5x5, pool_proj: Szegedy et al. 2015,
# table 1.
INCEPTIONS = {
    "3a": (64, 96, 128, 16, 32, 32),
    "3b": (128, 128, 192, 32, 96, 64),
    "4a": (192, 96, 208, 16, 48, 64),
    "4b": (160, 112, 224, 24, 64, 64),
    "4c": (128, 128, 256, 24, 64, 64),
    "4d": (112, 144, 288, 32, 64, 64),
    "4e": (256, 160, 320, 32, 128, 128),
    "5a": (256, 160, 320, 32, 128, 128),
    "5b": (384, 192, 384, 48, 128, 128),
}
BRANCHES = ("1x1", "3x3_reduce", "3x3", "5x5_reduce", "5x5", "pool_proj")
# The layers whose channels an output is made of, and the channels of every layer at full width.
OUTPUTS = {"conv1": ["conv1/7x7_s2"], "conv2": ["conv2/3x3"]} | {
    key: [f"inception_{key}/{branch}" for branch in BRANCHES if "reduce" not in branch]
    for key in INCEPTIONS
}
FULL = {"conv1/7x7_s2": 64, "conv2/3x3_reduce": 64, "conv2/3x3": 192} | {
    f"inception_{key}/{branch}": count
    for key, counts in INCEPTIONS.items()
    for branch, count in zip(BRANCHES, counts)
}

# ---- Networks ---------------------------------------------------------------------------------


def lrn(x):
    """Caffe's LRN as GoogLeNet has it: 5 channels, alpha 1e-4, beta 0.75."""
    squares = F.pad(x.float().square(), (0, 0, 0, 0, 2, 2))
    near = sum(squares[:, i : i + x.shape[1]] for i in range(5))
    root = (1 + 1e-4 / 5 * near).rsqrt()
    return x * root * root.sqrt()


def narrow(widths):
    """{layer: channels}, each a multiple of four, of a GoogLeNet with the fraction `widths`,
    {output: fraction}, of the channels of each output. conv2's reduction is as wide as conv1."""
    found = {}
    for layer, channels in FULL.items():
        key = layer.split("/")[0].removeprefix("inception_")
        width = widths["conv1" if layer == "conv2/3x3_reduce" else key]
        found[layer] = 4 * math.ceil(channels * width / 4)
    return found


class GoogLeNet(nn.Module):
    """GoogLeNet up to inception_5b/output with so many channels in each layer, {layer: channels}.
    forward gives {layer: what it gives after its ReLU}."""

    def __init__(self, channels=FULL):
        super().__init__()
        self.layers, self.channels = nn.ModuleDict(), dict(channels)
        self._add("conv1/7x7_s2", 3, 7, stride=2)
        self._add("conv2/3x3_reduce", channels["conv1/7x7_s2"], 1)
        self._add("conv2/3x3", channels["conv2/3x3_reduce"], 3)
        wide = channels["conv2/3x3"]
        for key in INCEPTIONS:
            inside = f"inception_{key}/"
            for branch in ("1x1", "3x3_reduce", "5x5_reduce", "pool_proj"):
                self._add(inside + branch, wide, 1)
            self._add(inside + "3x3", channels[inside + "3x3_reduce"], 3)
            self._add(inside + "5x5", channels[inside + "5x5_reduce"], 5)
            wide = sum(channels[layer] for layer in OUTPUTS[key])

    def _add(self, name, inputs, kernel, stride=1):
        layer = nn.Conv2d(inputs, self.channels[name], kernel, stride, kernel // 2)
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        nn.init.zeros_(layer.bias)
        self.layers[name] = layer

    def _conv(self, name, x):
        y = F.relu(self.layers[name](x))
        yield name, x, y
        return y

    def _inception(self, key, x):
        def conv(branch, x):
            return self._conv(f"inception_{key}/{branch}", x)

        one = yield from conv("1x1", x)
        three = yield from conv("3x3_reduce", x)
        five = yield from conv("5x5_reduce", x)
        pool = yield from conv("pool_proj", F.max_pool2d(x, 3, 1, 1))
        three = yield from conv("3x3", three)
        five = yield from conv("5x5", five)
        return torch.cat([one, three, five, pool], 1)

    def run(self, x):
        """Yields (layer, what it sees, what it gives after its ReLU), in order."""
        x = yield from self._conv("conv1/7x7_s2", x)
        x = lrn(F.max_pool2d(x, 3, 2, ceil_mode=True))
        x = yield from self._conv("conv2/3x3_reduce", x)
        x = yield from self._conv("conv2/3x3", x)
        x = F.max_pool2d(lrn(x), 3, 2, ceil_mode=True)
        for key in INCEPTIONS:
            x = yield from self._inception(key, x)
            if key in ("3b", "4e"):
                x = F.max_pool2d(x, 3, 2, ceil_mode=True)

    def forward(self, x):
        return {layer: given for layer, _, given in self.run(x)}


def load_caffemodel(path):
    """The GoogLeNet, of whatever width, in a caffemodel."""
    import_caffe()
    from caffe.proto import caffe_pb2

    file = caffe_pb2.NetParameter.FromString(pathlib.Path(path).read_bytes())
    blobs = {layer.name: layer.blobs for layer in (file.layer or file.layers)}
    biases = {name: blobs[name][1] for name in FULL}
    net = GoogLeNet({name: len(bias.data) for name, bias in biases.items()})
    with torch.no_grad():
        for name, layer in net.layers.items():
            for parameter, blob in zip((layer.weight, layer.bias), blobs[name]):
                parameter.copy_(torch.tensor(blob.data).view_as(parameter))
    return net


def narrow_prototxt(channels):
    """Caffe's GoogLeNet prototxt up to inception_5b/output with so many channels in each layer, as
    a NetParameter."""
    net = Description(MODELS["bvlc_googlenet"].find_deploy()).net
    net.name = "GoogLeNet, narrower"
    last = next(i for i, layer in enumerate(net.layer) if layer.name == "inception_5b/output")
    del net.layer[last + 1 :]
    for layer in net.layer:
        if layer.type == "Input":
            layer.input_param.shape[0].dim[0] = 1
        elif layer.type == "Convolution":
            layer.convolution_param.num_output = channels[layer.name]
            for settings in ("weight_filler", "bias_filler"):  # matter to training alone
                layer.convolution_param.ClearField(settings)
            layer.ClearField("param")
    return net


def save_caffemodel(net, path):
    """Writes `path` (.caffemodel) and its prototxt beside it, each whole or not at all."""
    prototxt = narrow_prototxt(net.channels)
    loaded = caffe_net(prototxt)
    for name, layer in net.layers.items():
        for blob, parameter in zip(loaded.params[name], (layer.weight, layer.bias)):
            blob.data[...] = parameter.detach().cpu().numpy()
    loaded.save(f"{path}.part")
    os.replace(f"{path}.part", path)
    pathlib.Path(path).with_suffix(".prototxt").write_text(str(prototxt))


# ---- Pictures ---------------------------------------------------------------------------------


def random_crop(picture, size, random):
    """A square of a uint8 (H, W, 3) picture at a random scale, uint8 (size, size, 3)."""
    height, width = picture.shape[:2]
    side = min(
        max(int(min(height, width) * math.exp(random.uniform(math.log(0.35), 0))), 64),
        height,
        width,
    )
    y, x = random.integers(0, height - side + 1), random.integers(0, width - side + 1)
    square = Image.fromarray(picture[y : y + side, x : x + side])
    return np.asarray(square.resize((size, size), Image.Resampling.BICUBIC))


class Crops(torch.utils.data.Dataset):
    """Batches of random crops of random pictures, uint8 (N, size, size, 3), with a contrast and a
    shift of colour for each, since a dreamed picture leaves the natural range. The same number
    gives the same batch."""

    def __init__(self, pictures, count, size, seed):
        self.pictures, self.count, self.size, self.seed = pictures, count, size, seed

    def __getitem__(self, number):
        random = np.random.default_rng((self.seed, number))
        chosen = random.integers(len(self.pictures), size=self.count)
        batch = np.stack([random_crop(self.pictures[i], self.size, random) for i in chosen])
        flips = random.random(self.count) < 0.5
        batch[flips] = batch[flips, :, ::-1]
        contrast = random.uniform(0.6, 1.4, (self.count, 1, 1, 1))
        colour = random.uniform(-25, 25, (self.count, 1, 1, 3))
        return torch.from_numpy(batch), torch.tensor(contrast), torch.tensor(colour)


def on_device(batch, device):
    """A batch of Crops as the networks take it, float32 (N, 3, size, size)."""
    pixels, contrast, colour = (part.to(device, non_blocking=True) for part in batch)
    pixels = pixels.flip(3) - torch.tensor(MEAN, device=device)
    return (pixels * contrast + colour).float().permute(0, 3, 1, 2)  # channels last in memory


def dreamed(net, batch, random):
    """The batch after one to four steps uphill on what `net` sees at a random layer: what a student
    that is right on photographs only would be wrong about, and what it will be used for."""
    key = random.choice(list(INCEPTIONS))
    for _ in range(random.integers(1, 5)):
        batch = batch.detach().requires_grad_()
        seen = net(batch)
        objective = sum(seen[layer].square().sum() for layer in OUTPUTS[key])
        (gradient,) = torch.autograd.grad(objective, batch)
        size = gradient.abs().mean((1, 2, 3), keepdim=True) + 1e-12
        batch = batch + gradient / size * float(random.uniform(2, 8))
    return batch.detach().clamp(-160, 190)


# ---- Imitation --------------------------------------------------------------------------------


def teacher_spread(teacher, batches):
    """{layer: standard deviation of each channel}."""
    sums = {}
    for batch in batches:
        for layer, a in teacher(batch).items():
            sums.setdefault(layer, []).append(
                torch.stack([a.mean((0, 2, 3)), a.square().mean((0, 2, 3))])
            )
    moments = {layer: torch.stack(values).mean(0) for layer, values in sums.items()}
    return {
        layer: (square - mean**2).clamp_min(1e-6).sqrt()
        for layer, (mean, square) in moments.items()
    }


def most_varying(spread, channels):
    """{layer: which teacher channels to imitate}: the most varying, in order."""
    return {
        layer: deviation.argsort(descending=True)[: channels[layer]].sort()[0]
        for layer, deviation in spread.items()
    }


def most_alike(student, teacher, batches, spread):
    """{layer: the teacher channel that each channel of a trained student imitates}, by their
    correlation. Channels that never fire get the most varying of those left over."""
    seen = [(student(batch), teacher(batch)) for batch in batches]
    chosen = {}
    for layer in spread:
        theirs = [
            torch.cat([pair[i][layer].transpose(0, 1).flatten(1) for pair in seen], 1)
            for i in (0, 1)
        ]
        ours, full = (
            (a - a.mean(1, keepdim=True)) / (a.std(1, keepdim=True) + 1e-9) for a in theirs
        )
        match = (ours @ full.T / ours.shape[1]).max(1)
        fires = match.values > 0.1
        left = spread[layer].argsort(descending=True)
        left = left[~torch.isin(left, match.indices[fires])]
        match.indices[~fires] = left[: int((~fires).sum())]
        chosen[layer] = match.indices
    return chosen


def difference(given, wanted, chosen, spread):
    """What a layer of the student gives, (N, C, H, W), minus the `chosen` channels that the
    teacher's gives, in units of their standard deviation, `spread`."""
    return (given - wanted[:, chosen]) / spread[chosen].view(1, -1, 1, 1)


def errors(student_sees, teacher_sees, chosen, spread):
    """{output: mean squared error in units of the channels' variance}: about one minus the
    explained variance."""

    def of_output(layers):
        parts = [
            difference(student_sees[layer], teacher_sees[layer], chosen[layer], spread[layer])
            for layer in layers
        ]
        return torch.cat(parts, 1).float().square().mean()

    return {key: of_output(layers) for key, layers in OUTPUTS.items()}


@torch.no_grad()
def report(student, teacher, batches, chosen, spread):
    """The errors over `batches` as a line of text."""
    totals = [errors(student(batch), teacher(batch), chosen, spread) for batch in batches]
    return " ".join(
        f"{key}:{sum(float(t[key]) for t in totals) / len(totals):.3f}" for key in totals[0]
    )


# ---- Least squares, layer by layer ------------------------------------------------------------

# Layers that see nothing of one another, in order: each group is solved at once.
GROUPS = [["conv1/7x7_s2"], ["conv2/3x3_reduce"], ["conv2/3x3"]] + [
    [f"inception_{key}/{branch}" for branch in group]
    for key in INCEPTIONS
    for group in (["1x1", "3x3_reduce", "5x5_reduce", "pool_proj"], ["3x3", "5x5"])
]
SAMPLES = 150_000  # places at which a layer is to be right, of all the batches together


def learn_conv1(student, teacher, batches, chosen, spread):
    """conv1 by descent, in four passes, eight crops at a time. (Both networks' conv1 see the same,
    so least squares would return the teacher's own weights, and the student is to have none of
    them.)"""
    layer = "conv1/7x7_s2"
    optimizer = torch.optim.Adam(student.layers[layer].parameters(), lr=1e-2)
    parts = [part for batch in batches for part in batch.split(8)] * 4
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(parts))
    for part in parts:
        _, _, given = next(student.run(part))
        with torch.no_grad():
            _, _, wanted = next(teacher.run(part))
        optimizer.zero_grad()
        difference(given, wanted, chosen[layer], spread[layer]).square().mean().backward()
        optimizer.step()
        schedule.step()


def until(run, layers):
    """{layer: (what it sees, what it gives)} of a network's run that ends with the last of
    `layers`."""
    found = {}
    for layer, seen, given in run:
        if layer in layers:
            found[layer] = seen, given
        if len(found) == len(layers):
            break
    return found


def samples(conv, seen, goal, count, generator):
    """What a convolution sees at up to `count` random places, float32 (count, inputs + 1), the last
    of which is 1, and the goal, (N, C, H, W), at the same places, (count, C)."""
    columns = F.unfold(seen, conv.kernel_size, padding=conv.padding, stride=conv.stride)
    places = torch.randperm(goal[:, 0].numel(), generator=generator)[:count].to(seen.device)
    crop, place = places // columns.shape[2], places % columns.shape[2]
    x = columns.transpose(1, 2)[crop, place]
    return F.pad(x, (0, 1), value=1.0), goal.flatten(2).transpose(1, 2)[crop, place]


def solve(x, goal, penalty=1e-3, rounds=20):
    """Weights (inputs + 1, C) with which relu(x @ weights) comes near the goal, (count, C), which
    is not negative. Where the goal is 0 every negative number meets it: in each round, what is
    negative there already stays as it is. The penalty is for the square of each weight but the
    bias, in units of its input's mean square; 1e-6 is for inputs that are always 0."""
    products = x.T @ x / len(x)
    products.diagonal()[:-1].mul_(1 + penalty).add_(1e-6 * products.diagonal().mean())
    factor, wanted = torch.linalg.cholesky(products), goal
    for _ in range(rounds):
        weights = torch.cholesky_solve(x.T @ wanted / len(x), factor)
        wanted = torch.where(goal > 0, goal, (x @ weights).clamp_max(0))
    return weights


@torch.no_grad()
def fit_layers(student, teacher, batches, chosen):
    """Solves every layer but conv1 after those before it, so that each makes good what they
    lack; yields each layer's name when it is done."""
    generator = torch.Generator().manual_seed(0)
    count = math.ceil(SAMPLES / len(batches))
    for layers in GROUPS[1:]:
        found = {layer: [] for layer in layers}
        for batch in batches:
            ours, theirs = (until(net.run(batch), layers) for net in (student, teacher))
            for layer in layers:
                (seen, _), (_, goal), conv = ours[layer], theirs[layer], student.layers[layer]
                goal = goal[:, chosen[layer]]
                found[layer].append(samples(conv, seen, goal, count, generator))
        for layer in layers:
            x, goal = (torch.cat(parts) for parts in zip(*found.pop(layer)))
            weights = solve(x, goal).T
            conv = student.layers[layer]
            conv.weight.copy_(weights[:, :-1].reshape(conv.weight.shape))
            conv.bias.copy_(weights[:, -1])
            yield layer


# ---- Command line -----------------------------------------------------------------------------


def parse_arguments(argv):
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=HelpFormatter
    )
    parser.add_argument("teacher", help="caffemodel of a GoogLeNet")
    parser.add_argument("pictures", help="folder of photographs; every 25th is held out")
    parser.add_argument("out", help="caffemodel to write")
    parser.add_argument(
        "--width", type=fraction, default=0.5, help="channels, as a fraction of the teacher's"
    )
    parser.add_argument(
        "--wide",
        action="append",
        type=wide,
        default=[],
        metavar="OUTPUT=WIDTH",
        help="another fraction for one output, such as conv1=1; as often as you like",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=90,
        help="length of the training; the learning rate ends at 0 with it",
    )
    parser.add_argument(
        "--iterations", type=int, help="stop after as many steps instead (default: by the clock)"
    )
    parser.add_argument("--crop", type=int, default=128, help="side of the crops, in pixels")
    parser.add_argument("--batch", type=int, default=32, help="crops in a step")
    parser.add_argument("--lr", type=float, default=5e-4, help="highest learning rate")
    parser.add_argument(
        "--dreamed", type=float, default=0.25, help="fraction of steps on dreamed crops"
    )
    parser.add_argument(
        "--start",
        help="a caffemodel to continue from, which gives the widths; its layers are not solved",
    )
    parser.add_argument(
        "--fit",
        type=int,
        default=64,
        help="batches of 32 crops over which the layers are solved before the training, unless "
        "--start is given; they stay in memory; 0: begin with random weights",
    )
    parser.add_argument(
        "--every", type=int, default=200, help="steps between reports and saved states"
    )
    return parser.parse_args(argv)


def fraction(text):
    """A number above 0 and up to 1. Raises ValueError."""
    if not 0 < (value := float(text)) <= 1:
        raise ValueError
    return value


def wide(text):
    """(output, fraction) of OUTPUT=WIDTH. Raises ValueError."""
    key, _, width = text.partition("=")
    if key not in OUTPUTS:
        raise ValueError
    return key, fraction(width)


def widths(args):
    """{output: the fraction of its channels that the student gets}"""
    return dict.fromkeys(OUTPUTS, args.width) | dict(args.wide)


class Training:
    """The networks, what the student's channels are to be, and how far the training has come; kept
    in a file, from which it continues."""

    def __init__(self, args, train, held_out):
        self.args, self.device = args, "cuda" if torch.cuda.is_available() else "cpu"
        self.kept = pathlib.Path(args.out).with_suffix(".state.pt")
        self.train, self.test = train, self.batches_of(held_out, 8, seed=2)
        place = {"device": self.device, "memory_format": torch.channels_last}
        student = load_caffemodel(args.start) if args.start else GoogLeNet(narrow(widths(args)))
        self.student = student.to(**place)
        self.teacher = load_caffemodel(args.teacher).eval().requires_grad_(False).to(**place)
        self.optimizer = torch.optim.AdamW(student.parameters(), lr=args.lr, weight_decay=1e-4)
        self.step = 0
        if self.kept.exists():
            self.resume()
        else:
            self.choose(self.batches_of(train, 6, seed=1))
            self.begun = time.monotonic()
            if args.fit > 0 and not args.start:
                self.fit(self.batches_of(train, args.fit, seed=4))

    def batches_of(self, pictures, count, seed):
        made = Crops(pictures, 32, self.args.crop, seed)
        return [on_device(made[i], self.device) for i in range(count)]

    @torch.no_grad()
    def choose(self, batches):
        self.spread = teacher_spread(self.teacher, batches)
        if self.args.start:
            self.chosen = most_alike(self.student, self.teacher, batches, self.spread)
        else:
            self.chosen = most_varying(self.spread, self.student.channels)

    def fit(self, batches):
        """Solves the layers and keeps the result; the training begins only then."""
        networks = self.student, self.teacher
        learn_conv1(*networks, batches, self.chosen, self.spread)
        for layer in fit_layers(*networks, batches, self.chosen):
            print(f"{layer} solved, {time.monotonic() - self.begun:.0f} s", flush=True)
        self.begun = time.monotonic()
        self.keep()

    def resume(self):
        state = torch.load(self.kept, weights_only=True, map_location=self.device)
        self.student.load_state_dict(state["student"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.chosen, self.spread, self.step = (state[k] for k in ("chosen", "spread", "step"))
        self.begun = time.monotonic() - state["elapsed"]

    def keep(self):
        state = {"student": self.student.state_dict(), "optimizer": self.optimizer.state_dict()}
        state |= {"chosen": self.chosen, "spread": self.spread, "step": self.step}
        torch.save(state | {"elapsed": time.monotonic() - self.begun}, f"{self.kept}.part")
        os.replace(f"{self.kept}.part", self.kept)

    def done(self):
        """The fraction of the training that is over."""
        if self.args.iterations:
            return self.step / self.args.iterations
        return (time.monotonic() - self.begun) / (60 * self.args.minutes)

    def batches(self):
        """The rest of the batches without end, made by other processes if a GPU waits for them."""
        on_gpu = self.device == "cuda"
        return torch.utils.data.DataLoader(
            Crops(self.train, self.args.batch, self.args.crop, seed=0),
            sampler=range(self.step, 10**9),
            batch_size=None,
            num_workers=max(1, count_cores() - 1) if on_gpu else 0,
            pin_memory=on_gpu,
        )

    def take_step(self, batch):
        """One step of the optimizer; returns the loss before it. Its random numbers are the step's
        own, so that a training that is resumed is the same."""
        random = np.random.default_rng((3, self.step))
        rate = min(1, (self.step + 1) / 200) * 0.5 * (1 + math.cos(math.pi * self.done()))
        for group in self.optimizer.param_groups:  # a short rise, then half a cosine
            group["lr"] = self.args.lr * rate + 1e-6
        batch = on_device(batch, self.device)
        # On a GPU products of 16 bits are faster, and far more exact than the imitation.
        with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
            if random.random() < self.args.dreamed:
                batch = dreamed(self.student, batch, random)
            with torch.no_grad():
                goal = self.teacher(batch)
            loss = sum(errors(self.student(batch), goal, self.chosen, self.spread).values())
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.student.parameters(), 5.0)
        self.optimizer.step()
        self.step += 1
        return float(loss.detach())

    def report(self):
        return report(self.student, self.teacher, self.test, self.chosen, self.spread)


def main(argv=None):
    args = parse_arguments(argv)
    torch.manual_seed(0)
    files = sorted(path for path in pathlib.Path(args.pictures).iterdir() if path.is_file())
    pictures = [read_picture(str(path))[0] for path in files]
    train = [picture for i, picture in enumerate(pictures) if i % 25]
    training = Training(args, train, held_out=pictures[::25])
    print(f"step {training.step}, held out {training.report()}", flush=True)
    if args.iterations == 0:
        return
    for batch in training.batches() if training.done() < 1 else ():
        loss = training.take_step(batch)
        if training.step % args.every == 0:
            seconds = time.monotonic() - training.begun
            told = f"step {training.step}, {seconds:.0f} s, loss {loss:.3f}"
            print(f"{told}, held out {training.report()}", flush=True)
            training.keep()
        if training.done() >= 1:
            break
    training.keep()  # should the next line fail
    save_caffemodel(training.student, args.out)
    print(f"{args.out}: step {training.step}, held out {training.report()}")
    training.kept.unlink()


if __name__ == "__main__":
    main()
