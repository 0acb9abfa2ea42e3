#!/usr/bin/env python3
"""Carries a video's dream from one frame to the next, along the optical flow (video.sh uses it).

    flow.py carry SHARE dis|farneback FRAME OUT PREVIOUS DREAM [FRAME OUT PREVIOUS DREAM ...]
    flow.py plan FOLDER

OUT, the start picture for the next dream, is FRAME plus SHARE (0 to 1) of the previous dream: the
difference between DREAM and its own frame PREVIOUS, moved along the flow to FRAME. Nothing is
carried to places that do not look alike in both frames, such as where something new comes into
view.

A scene begins where less than a quarter of a frame looks like the frame before; nothing is carried
there, so scenes can be dreamed at the same time. plan prints in each line the names of frames in
FOLDER that can: the first frames of all scenes, the second ones, and so on.

cnn_vis.py multiplies contrast by --contrast, 1.2 by default, at each size. That is not part of the
dream and would grow from frame to frame, so it is undone before the difference is taken.
"""

import argparse
import concurrent.futures
import itertools
import pathlib
import sys

import cv2
import numpy as np
from PIL import Image

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from picture import fit, match, read

import cnn_vis
from cnn_vis_lib.reading import read_mask
from cnn_vis_lib.records import read_record

MISFIT = 30  # grey levels; places that differ by more are taken to show different things


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    carrying = commands.add_parser("carry")
    carrying.add_argument("share", type=float)
    carrying.add_argument("method", choices=("dis", "farneback"))
    carrying.add_argument("paths", nargs="+")
    planning = commands.add_parser("plan")
    planning.add_argument("folder", type=pathlib.Path)
    options = parser.parse_args()
    if options.command == "plan":
        for names in plan(options.folder):
            print(*names)
        return
    with concurrent.futures.ThreadPoolExecutor(2) as pool:  # frames may be large
        groups = [iter(options.paths)] * 4
        more = itertools.repeat(options.share), itertools.repeat(options.method)
        try:
            list(pool.map(carry_file, *zip(*zip(*groups)), *more))
        except cnn_vis.BadRequest as error:  # the file of --mask is missing
            sys.exit(f"flow.py: {error}")


def carry_file(frame, out, previous, dream, share, method):
    """Writes the start picture `out`; all are paths. Raises BadRequest."""
    frame, previous = np.asarray(read(frame)), np.asarray(read(previous))
    dreamed, where = difference(dream, previous)
    start = carry(dreamed, previous, frame, share * where, method)
    Image.fromarray(start).save(out)


# ---- What was dreamed -------------------------------------------------------------------------


def difference(path, frame):
    """What cnn_vis.py added to `frame`, uint8 (H, W, 3), to make the PNG `path`: grey levels,
    float32 (H, W, 3). Also where it dreamed, from 0 to 1: 1, or its mask, (H, W, 1)."""
    dream = read(path).resize(frame.shape[1::-1], Image.Resampling.BICUBIC)
    try:
        record, words = read_record(str(path))
        options = cnn_vis.PARSER.parse_args(words)
    except cnn_vis.BadRequest:
        options = None
    if options is None or options.rescale_image:  # its change of contrast is not known
        return np.float32(match(dream, Image.fromarray(frame))) - frame, 1
    mask, _ = read_mask(options.mask, frame)
    where = 1 if mask is None else mask[:, :, np.newaxis] / np.float32(255)
    times = len(record["sizes"]) if options.enlarge == "picture" else 1
    dream = np.asarray(dream)
    if options.keep_colors:
        dream, frame = brightness(dream, frame)
    change = added(dream, frame, record["mean"], options.contrast, times, where)
    return np.repeat(change, 3 // change.shape[2], axis=2), where


def brightness(dream, frame):
    """The brightness of two pictures, uint8 (H, W, 3), the first of which has the colours of the
    second: float32 (H, W, 1) each. Their difference is the median of the three channels'
    differences, because one channel may have been clipped at black or white."""
    change, own = np.float32(dream) - frame, frame @ np.float32([[0.299], [0.587], [0.114]])
    return own + np.median(change, axis=2, keepdims=True), own


def added(dream, frame, mean, contrast, times=1, where=1):
    """The difference, float32 (H, W, C), between `dream`, which cnn_vis.py wrote, and its `frame`,
    both (H, W, C) from 0 to 255. Undoes what cnn_vis.py did `times` times `where` it dreamed, a
    number or (H, W, 1): it raised contrast about the grey level `mean` and cut fractions off."""
    gain = 1 + (contrast**times - 1) * where
    truncated = where * sum(contrast**k for k in range(times)) / 2  # half a level each time
    change = (dream + truncated - mean) / gain + mean - frame
    # Clipped values may have been darker or brighter, so they count as unchanged.
    change[(dream <= 0) & (change > 0) | (dream >= 255) & (change < 0)] = 0
    return change.astype(np.float32)


# ---- Where it goes ----------------------------------------------------------------------------


def carry(dreamed, previous, frame, share, method="dis"):
    """`frame` plus a share, a number or (H, W, 1), of what was dreamed into the frame `previous`;
    frames and result are uint8 (H, W, 3), `dreamed` is float32 (H, W, 3)."""
    flow = flow_between(frame, previous, method)
    weight = share * trust(frame, previous, flow)[:, :, np.newaxis]
    start = frame + weight * warp(dreamed, flow)
    return np.clip(np.round(start), 0, 255).astype(np.uint8)


def flow_between(frame, other, method="dis"):
    """The offset (x, y), in pixels, from each pixel of `frame` to the same point in `other`:
    float32 (H, W, 2). Both frames are uint8 (H, W, 3)."""
    frame, other = (cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY) for picture in (frame, other))
    if method == "farneback":
        return cv2.calcOpticalFlowFarneback(frame, other, None, 0.5, 5, 21, 3, 7, 1.5, 0)
    dis = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    return dis.calc(frame, other, None)


def sources(flow):
    """The coordinates, x and y, float32 (H, W) each, that the flow points to."""
    y, x = np.indices(flow.shape[:2], np.float32)
    return x + flow[:, :, 0], y + flow[:, :, 1]


def warp(values, flow):
    """The array (H, W, C) moved along the flow: each pixel is fetched from where `flow` points;
    beyond the edges, from the nearest edge."""
    return cv2.remap(values, *sources(flow), cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


def trust(frame, previous, flow):
    """How much of the dream on `previous` to carry to each pixel of `frame`, both uint8 (H, W, 3):
    float32 (H, W), 1 where the frames match, 0 where they do not, and smooth in between."""
    height, width = flow.shape[:2]
    x, y = sources(flow)
    inside = (x > -0.5) & (x < width - 0.5) & (y > -0.5) & (y < height - 0.5)
    misfit = np.abs(warp(previous, flow).astype(np.int16) - frame).max(axis=2)
    fits = ((misfit <= MISFIT) & inside).astype(np.float32)
    return np.minimum(fits, cv2.GaussianBlur(cv2.erode(fits, np.ones((3, 3))), (0, 0), 1.5))


# ---- Scenes -----------------------------------------------------------------------------------

ALIKE = 0.25  # of a frame; if less of it looks like the frame before, a scene begins
SIDE = 270  # pixels, of the shorter side of frames that are compared


def plan(folder):
    """Lists of the names of frames in the folder that can be dreamed at the same time."""
    paths = sorted(folder.iterdir())
    with concurrent.futures.ThreadPoolExecutor() as pool:
        begins = [True, *pool.map(is_cut, paths, paths[1:])]
    number, waves = 0, []
    for path, is_first in zip(paths, begins):
        number = 0 if is_first else number + 1
        if number == len(waves):
            waves.append([])
        waves[number].append(path.name)
    return waves


def is_cut(previous, frame):
    """Whether a scene begins with the frame; both are paths."""
    pictures = map(read, (previous, frame))
    previous, frame = (np.asarray(fit(p, SIDE) if min(p.size) > SIDE else p) for p in pictures)
    return trust(frame, previous, flow_between(frame, previous)).mean() < ALIKE


if __name__ == "__main__":
    main()
