#!/usr/bin/env python3
"""Trains a narrow GoogLeNet to see what a full one sees: the way googlenet_mini was made.

    pip install -r requirements.txt          # PyTorch
    python distill.py bvlc_googlenet.caffemodel PICTURES_FOLDER student.caffemodel --minutes 90
    python distill.py bvlc_googlenet.caffemodel PICTURES_FOLDER student.caffemodel \\
        --start earlier.caffemodel --lr 5e-4

Writes student.caffemodel, its deploy prototxt student.prototxt, and student.state.pt, from which
the same command goes on after a stop. One step of training: random crops of the pictures, some of
them dreamed upon by the student, go through both networks; at conv1, conv2 and every inception
output each of the student's channels is to equal one channel of the teacher's, in units of that
channel's variance. In each branch the teacher's most varying channels are the ones imitated.

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
import cnn_vis

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
CONVOLUTIONS = {"conv1": 64, "conv2": 192}

# ---- Networks ---------------------------------------------------------------------------------


def lrn(x):
    """Caffe's LRN as GoogLeNet has it: 5 channels, alpha 1e-4, beta 0.75."""
    squares = F.pad(x * x, (0, 0, 0, 0, 2, 2))
    near = sum(squares[:, i : i + x.shape[1]] for i in range(5))
    root = (1 + 1e-4 / 5 * near).rsqrt()
    return x * root * root.sqrt()


class GoogLeNet(nn.Module):
    """GoogLeNet up to inception_5b/output with `width` times the channels. forward gives {"conv1":
    ..., "5b": ...}."""

    def __init__(self, width=1.0):
        super().__init__()
        self.layers = nn.ModuleDict()
        stem, wide = int(64 * width), int(192 * width)
        self._add("conv1/7x7_s2", 3, stem, 7, stride=2)
        self._add("conv2/3x3_reduce", stem, stem, 1)
        self._add("conv2/3x3", stem, wide, 3)
        for key, channels in INCEPTIONS.items():
            one, reduce3, three, reduce5, five, pool = (int(c * width) for c in channels)
            for name, inputs, outputs, kernel in (
                ("1x1", wide, one, 1),
                ("3x3_reduce", wide, reduce3, 1),
                ("3x3", reduce3, three, 3),
                ("5x5_reduce", wide, reduce5, 1),
                ("5x5", reduce5, five, 5),
                ("pool_proj", wide, pool, 1),
            ):
                self._add(f"inception_{key}/{name}", inputs, outputs, kernel)
            wide = one + three + five + pool

    def _add(self, name, inputs, outputs, kernel, stride=1):
        layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2)
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        nn.init.zeros_(layer.bias)
        self.layers[name] = layer

    def _conv(self, name, x):
        return F.relu(self.layers[name](x))

    def _inception(self, key, x):
        def conv(name, x):
            return self._conv(f"inception_{key}/{name}", x)

        three, five = conv("3x3", conv("3x3_reduce", x)), conv("5x5", conv("5x5_reduce", x))
        return torch.cat(
            [conv("1x1", x), three, five, conv("pool_proj", F.max_pool2d(x, 3, 1, 1))], 1
        )

    def forward(self, x):
        seen = {"conv1": self._conv("conv1/7x7_s2", x)}
        x = self._conv("conv2/3x3_reduce", lrn(F.max_pool2d(seen["conv1"], 3, 2, ceil_mode=True)))
        seen["conv2"] = self._conv("conv2/3x3", x)
        x = F.max_pool2d(lrn(seen["conv2"]), 3, 2, ceil_mode=True)
        for key in INCEPTIONS:
            seen[key] = x = self._inception(key, x)
            if key in ("3b", "4e"):
                x = F.max_pool2d(x, 3, 2, ceil_mode=True)
        return seen


def load_caffemodel(path, width=1.0):
    """A GoogLeNet with the weights of a caffemodel."""
    cnn_vis.import_caffe()
    from caffe.proto import caffe_pb2

    file = caffe_pb2.NetParameter.FromString(pathlib.Path(path).read_bytes())
    blobs = {layer.name: layer.blobs for layer in (file.layer or file.layers)}
    net = GoogLeNet(width)
    with torch.no_grad():
        for name, layer in net.layers.items():
            for parameter, blob in zip((layer.weight, layer.bias), blobs[name]):
                parameter.copy_(torch.tensor(blob.data).view_as(parameter))
    return net


def narrow_prototxt(width):
    """Caffe's GoogLeNet prototxt up to inception_5b/output with `width` times the channels, as a
    NetParameter."""
    net = cnn_vis.Description(cnn_vis.MODELS["bvlc_googlenet"].find_deploy()).net
    net.name = f"GoogLeNet, width {width:g}"
    last = next(i for i, layer in enumerate(net.layer) if layer.name == "inception_5b/output")
    del net.layer[last + 1 :]
    for layer in net.layer:
        if layer.type == "Input":
            layer.input_param.shape[0].dim[0] = 1
        elif layer.type == "Convolution":
            layer.convolution_param.num_output = int(layer.convolution_param.num_output * width)
    return net


def save_caffemodel(net, width, path):
    """Writes `path` (.caffemodel) and its prototxt beside it, each whole or not at all."""
    prototxt = narrow_prototxt(width)
    loaded = cnn_vis.caffe_net(prototxt)
    for name, layer in net.layers.items():
        for blob, parameter in zip(loaded.params[name], (layer.weight, layer.bias)):
            blob.data[...] = parameter.detach().numpy()
    loaded.save(f"{path}.part")
    os.replace(f"{path}.part", path)
    pathlib.Path(path).with_suffix(".prototxt").write_text(str(prototxt))


# ---- Pictures ---------------------------------------------------------------------------------


def random_crop(picture, size, random):
    """A square of a uint8 (H, W, 3) picture at a random scale, float32 (3, size, size). Contrast
    and colour vary too: a dreamed picture leaves the natural range."""
    height, width = picture.shape[:2]
    side = min(
        max(int(min(height, width) * math.exp(random.uniform(math.log(0.35), 0))), 64),
        height,
        width,
    )
    y, x = random.integers(0, height - side + 1), random.integers(0, width - side + 1)
    square = Image.fromarray(picture[y : y + side, x : x + side]).resize(
        (size, size), Image.Resampling.BICUBIC
    )
    crop = np.asarray(square, np.float32)[:, :: random.choice((-1, 1)), ::-1] - MEAN
    crop = crop * random.uniform(0.6, 1.4) + random.uniform(-25, 25, 3)
    return crop.transpose(2, 0, 1).astype(np.float32)


def crops(pictures, count, size, random):
    """A batch of random crops of random pictures."""
    chosen = random.integers(len(pictures), size=count)
    batch = np.stack([random_crop(pictures[i], size, random) for i in chosen])
    return torch.from_numpy(batch).to(memory_format=torch.channels_last)


def dreamed(net, batch, random):
    """The batch after one to four steps uphill on what `net` sees at a random layer: what a student
    that is right on photographs only would be wrong about, and what it will be used for."""
    key = random.choice(list(INCEPTIONS))
    for _ in range(random.integers(1, 5)):
        batch = batch.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(net(batch)[key].square().sum(), batch)
        size = gradient.abs().mean((1, 2, 3), keepdim=True) + 1e-12
        batch = batch + gradient / size * float(random.uniform(2, 8))
    return batch.detach().clamp(-160, 190)


# ---- Imitation --------------------------------------------------------------------------------


def branch_sizes(key):
    """Channels of each branch of an output, at full width."""
    return (
        [CONVOLUTIONS[key]] if key in CONVOLUTIONS else [INCEPTIONS[key][i] for i in (0, 2, 4, 5)]
    )


def teacher_spread(teacher, batches):
    """{output: standard deviation of each channel}."""
    sums = {}
    for batch in batches:
        for key, a in teacher(batch).items():
            sums.setdefault(key, []).append(
                torch.stack([a.mean((0, 2, 3)), a.square().mean((0, 2, 3))])
            )
    moments = {key: torch.stack(list(values)).mean(0) for key, values in sums.items()}
    return {
        key: (square - mean**2).clamp_min(1e-6).sqrt() for key, (mean, square) in moments.items()
    }


def most_varying(spread, width):
    """{output: which teacher channels to imitate}: in each branch the most varying, in order."""
    chosen = {}
    for key, deviation in spread.items():
        start, indices = 0, []
        for size in branch_sizes(key):
            best = deviation[start : start + size].argsort(descending=True)[: int(size * width)]
            indices.append(best.sort()[0] + start)
            start += size
        chosen[key] = torch.cat(indices)
    return chosen


def most_alike(student, teacher, batches, spread, width):
    """{output: the teacher channel that each channel of a trained student imitates}, by their
    correlation. Channels that never fire get the most varying of those left over."""
    seen = [(student(batch), teacher(batch)) for batch in batches]
    chosen = {}
    for key in spread:
        theirs = [
            torch.cat([pair[i][key].transpose(0, 1).flatten(1) for pair in seen], 1) for i in (0, 1)
        ]
        ours, full = (
            (a - a.mean(1, keepdim=True)) / (a.std(1, keepdim=True) + 1e-9) for a in theirs
        )
        alike, row, column, indices = ours @ full.T / ours.shape[1], 0, 0, []
        for size in branch_sizes(key):
            rows = int(size * width)
            match = alike[row : row + rows, column : column + size].max(1)
            fires = match.values > 0.1
            left = spread[key][column : column + size].argsort(descending=True)
            left = left[~torch.isin(left, match.indices[fires])]
            match.indices[~fires] = left[: int((~fires).sum())]
            indices.append(match.indices + column)
            row, column = row + rows, column + size
        chosen[key] = torch.cat(indices)
    return chosen


def errors(student_sees, teacher_sees, chosen, spread):
    """{output: mean squared error in units of the channels' variance}: about one minus the
    explained variance."""
    return {
        key: ((a - teacher_sees[key][:, chosen[key]]) / spread[key][chosen[key]].view(1, -1, 1, 1))
        .square()
        .mean()
        for key, a in student_sees.items()
    }


@torch.no_grad()
def report(student, teacher, batches, chosen, spread):
    """The errors over `batches` as a line of text."""
    totals = [errors(student(batch), teacher(batch), chosen, spread) for batch in batches]
    return " ".join(
        f"{key}:{sum(float(t[key]) for t in totals) / len(totals):.3f}" for key in totals[0]
    )


# ---- Command line -----------------------------------------------------------------------------


def parse_arguments(argv):
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("teacher", help="caffemodel of a GoogLeNet")
    parser.add_argument("pictures", help="folder of photographs; every 25th is held out")
    parser.add_argument("out", help="caffemodel to write")
    parser.add_argument(
        "--width", type=float, default=0.5, help="channels, as a fraction of the teacher's"
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
    parser.add_argument(
        "--lr",
        type=float,
        default=2.5e-3,
        help="highest learning rate; with --start 5e-4 is enough, and more diverges",
    )
    parser.add_argument(
        "--dreamed", type=float, default=0.25, help="fraction of steps on dreamed crops"
    )
    parser.add_argument(
        "--start", help="a caffemodel of the same width to go on from (default: random weights)"
    )
    parser.add_argument(
        "--every", type=int, default=200, help="steps between reports and saved states"
    )
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_arguments(argv)
    state_path = pathlib.Path(args.out).with_suffix(".state.pt")
    torch.manual_seed(0)
    files = sorted(path for path in pathlib.Path(args.pictures).iterdir() if path.is_file())
    pictures = [cnn_vis.read_picture(str(path))[0] for path in files]
    held_out, train = pictures[::25], [picture for i, picture in enumerate(pictures) if i % 25]
    test_random = np.random.default_rng(9)
    test = [crops(held_out, 16, args.crop, test_random) for _ in range(4)]

    teacher = (
        load_caffemodel(args.teacher)
        .eval()
        .requires_grad_(False)
        .to(memory_format=torch.channels_last)
    )
    student = load_caffemodel(args.start, args.width) if args.start else GoogLeNet(args.width)
    student = student.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(student.parameters(), lr=args.lr, weight_decay=1e-4)
    step, elapsed, random = 0, 0.0, np.random.default_rng(0)
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        student.load_state_dict(state["student"])
        optimizer.load_state_dict(state["optimizer"])
        chosen, spread, step, elapsed = (
            state[name] for name in ("chosen", "spread", "step", "elapsed")
        )
        random = np.random.default_rng(step)
    else:
        with torch.no_grad():
            batches = [crops(train, 32, args.crop, random) for _ in range(6)]
            spread = teacher_spread(teacher, batches)
            chosen = (
                most_alike(student, teacher, batches, spread, args.width)
                if args.start
                else most_varying(spread, args.width)
            )
    print(f"step {step}, held out {report(student, teacher, test, chosen, spread)}", flush=True)

    begun = time.monotonic() - elapsed
    while (
        done := step / args.iterations
        if args.iterations
        else (time.monotonic() - begun) / (60 * args.minutes)
    ) < 1:
        for group in optimizer.param_groups:  # a short rise, then half a cosine
            group["lr"] = (
                args.lr * min(1, (step + 1) / 200) * 0.5 * (1 + math.cos(math.pi * done)) + 1e-6
            )
        batch = crops(train, args.batch, args.crop, random)
        if random.random() < args.dreamed:
            batch = dreamed(student, batch, random)
        with torch.no_grad():
            goal = teacher(batch)
        loss = sum(errors(student(batch), goal, chosen, spread).values())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 5.0)
        optimizer.step()
        step += 1
        if step % args.every == 0:
            seconds = time.monotonic() - begun
            held = report(student, teacher, test, chosen, spread)
            print(
                f"step {step}, {seconds:.0f} s, loss {float(loss.detach()):.3f}, held out {held}",
                flush=True,
            )
            state = {
                "student": student.state_dict(),
                "optimizer": optimizer.state_dict(),
                "chosen": chosen,
                "spread": spread,
            }
            torch.save(state | {"step": step, "elapsed": seconds}, f"{state_path}.part")
            os.replace(f"{state_path}.part", state_path)
    save_caffemodel(student, args.width, args.out)
    print(f"{args.out}: step {step}, held out {report(student, teacher, test, chosen, spread)}")
    state_path.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
