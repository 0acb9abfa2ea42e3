#!/usr/bin/env python3
"""Draws the two figures in the README with the program's own functions: figures.py [FOLDER]

tiles.jpg: the even and odd tiles of a picture, and how many cover each pixel. sizes.jpg: the sizes
of a run, with geometric and with linear spacing.
"""

import pathlib
import sys

import matplotlib.pyplot as plt
import skimage.data

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import cnn_vis

COLOURS = ("tab:orange", "tab:blue")


def draw_tiles(picture, tile, path):
    """Three panels for `picture` (H, W, 3): even tiles, odd tiles, and tiles per pixel."""
    figure, panels = plt.subplots(1, 3, figsize=(12, 3.1), layout="constrained")
    size = picture.shape[:2]
    for axes, name, colour, regions in zip(
        panels, ("even", "odd"), COLOURS, cnn_vis.tiles(size, tile)
    ):
        axes.imshow(picture, alpha=0.6)
        for y0, y1, x0, x1 in regions:
            axes.add_patch(
                plt.Rectangle(
                    (x0, y0),
                    x1 - x0,
                    y1 - y0,
                    facecolor=colour,
                    edgecolor=colour,
                    alpha=0.4,
                    linewidth=2,
                )
            )
        axes.set_title(f"{name} tiles: {len(regions)}")
    panels[2].imshow(cnn_vis.tile_counts(size, tile), cmap="Blues", vmin=0)
    panels[2].set_title("tiles that cover a pixel: 1, 2 or 4")
    for axes in panels:
        axes.axis("off")
    figure.savefig(path, dpi=80, pil_kwargs={"quality": 85})


def draw_sizes(initial, final, number, path):
    """The sizes from `initial` to `final` (height, width) as nested frames, for both spacings."""
    figure, panels = plt.subplots(1, 2, figsize=(12, 3.1), layout="constrained")
    for axes, kind, colour in zip(panels, ("geometric", "linear"), COLOURS):
        for height, width in cnn_vis.size_sequence(initial, final, number, kind):
            axes.add_patch(
                plt.Rectangle(
                    (0, 0),
                    width,
                    height,
                    facecolor=colour,
                    edgecolor=colour,
                    alpha=0.25,
                    linewidth=2,
                )
            )
            axes.annotate(
                f"{height}x{width}",
                (width, height),
                ha="right",
                va="top",
                xytext=(-4, -4),
                textcoords="offset points",
            )
        axes.set(
            xlim=(0, final[1]), ylim=(0, final[0]), aspect="equal", title=f"--resize_type {kind}"
        )
        axes.axis("off")
    figure.savefig(path, dpi=80, pil_kwargs={"quality": 85})


if __name__ == "__main__":
    folder = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else ".")
    draw_tiles(skimage.data.coffee(), (224, 224), folder / "tiles.jpg")
    draw_sizes((270, 480), (1080, 1920), 5, folder / "sizes.jpg")
