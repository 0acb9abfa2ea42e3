#!/usr/bin/env python3
"""Makes a contact sheet of pictures and, with --html, a page of them at full size.

    sheet.py OUT.png [--columns N] [--width W] [--html OUT.html] [--title TEXT] PICTURE=LABEL...
    sheet.py FOLDER [--title TEXT]

The second form makes FOLDER/index.html, a page of all pictures in the folder that browsers can
show, except intermediate pictures. The label is what follows the last "="; without one it is the
file's name. The page shows the command that made each picture, which cnn_vis.py stores in PNGs.
"""

import argparse
import html
import json
import os
import pathlib
import re
import shlex
import sys
import urllib.parse

from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import cnn_vis  # noqa: F401, knows the options
from cnn_vis_lib.records import short_words
from cnn_vis_lib.writing import RECORD_KEY

GAP = 8  # pixels around each picture
LINE = 20  # pixels of height for a label
PAGE = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ background: #222; color: #ddd; font-family: sans-serif }}
main {{ display: flex; flex-wrap: wrap }}
figure {{ margin: 8px; width: min-content }}
code {{ color: #999; font-size: small; overflow-wrap: anywhere }}
</style>
<h1>{title}</h1>
<main>
{figures}
</main>
</html>
"""
FIGURE = """<figure>
<a href="{link}">
<img src="{link}" width="{width}" height="{height}" loading="lazy" alt="{label}"></a>
<figcaption>{label}<br><code>{command}</code></figcaption>
</figure>"""


def split_argument(argument):
    """Splits PICTURE=LABEL or PICTURE into (path, label)."""
    path, equals, label = argument.rpartition("=")
    path = pathlib.Path(path if equals else argument)
    return path, label if equals else path.stem


def dreams_in(folder):
    """[(path, label), ...] of a folder's pictures, by name, without intermediate ones."""
    paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in (".png", ".jpg", ".webp"))
    names = {path.name for path in paths}

    def is_finished(path):
        whole = re.sub(r"_\d+_\d+(?=\.\w+$)", "", path.name)
        return whole == path.name or whole not in names

    def is_sound(path):
        try:
            with Image.open(path):
                return True
        except OSError:
            print(f"sheet.py: {path} cannot be read as a picture; skipped", file=sys.stderr)
            return False

    return [(path, path.stem) for path in paths if is_finished(path) and is_sound(path)]


def shorten(text, font, width):
    """The text, cut at its end to fit into `width` pixels."""
    while text and font.getlength(text) > width:
        text = text[:-1]
    return text


def contact_sheet(pictures, columns, width):
    """The sheet, an RGB Image, of `pictures` [(path, label), ...]: each `width` pixels wide, with
    its label below."""
    thumbnails = []
    for path, _ in pictures:
        with Image.open(path) as picture:
            height = max(1, round(picture.height * width / picture.width))
            thumbnails.append(
                picture.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
            )
    rows = [
        range(len(pictures))[first : first + columns] for first in range(0, len(pictures), columns)
    ]
    heights = [max(thumbnails[i].height for i in row) + LINE + GAP for row in rows]
    sheet = Image.new("RGB", (len(rows[0]) * (width + GAP) + GAP, sum(heights) + GAP), "#222")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=LINE * 0.7)
    y = GAP
    for row, height in zip(rows, heights):
        for column, i in enumerate(row):
            x = GAP + column * (width + GAP)
            sheet.paste(thumbnails[i], (x, y))
            draw.text(
                (x, y + thumbnails[i].height), shorten(pictures[i][1], font, width), "#ddd", font
            )
        y += height
    return sheet


def command(picture):
    """The command that made the Image, if it is recorded there: with its preset, and without
    --output, which may be a temporary name."""
    try:
        words = short_words(json.loads(picture.info[RECORD_KEY]))
    except (KeyError, ValueError, TypeError):  # another program's picture
        return picture.info.get("Comment", "")
    words = (word for word in words if not re.match("--output(_file)?=", word))
    return f"python cnn_vis.py {shlex.join(words)}"


def page(pictures, title, folder):
    """The HTML page of `pictures` [(path, label), ...], with links relative to `folder`."""
    figures = []
    for path, label in pictures:
        link = urllib.parse.quote(os.path.relpath(path, folder))
        with Image.open(path) as picture:
            values = {"width": picture.width, "height": picture.height, "command": command(picture)}
        values |= {"link": link, "label": label}
        figures.append(
            FIGURE.format(**{name: html.escape(str(value)) for name, value in values.items()})
        )
    return PAGE.format(title=html.escape(title), figures="\n".join(figures))


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "output",
        metavar="OUT.png",
        type=pathlib.Path,
        help="the sheet (its extension sets the format), or a folder",
    )
    parser.add_argument("pictures", metavar="PICTURE=LABEL", nargs="*", type=split_argument)
    parser.add_argument("--columns", metavar="N", type=int, default=4, help="default: %(default)s")
    parser.add_argument(
        "--width",
        metavar="W",
        type=int,
        default=240,
        help="width of each picture in pixels; default: %(default)s",
    )
    parser.add_argument(
        "--html", metavar="OUT.html", type=pathlib.Path, help="page to write; default: none"
    )
    parser.add_argument(
        "--title", metavar="TEXT", default="cnn-vis", help="title of the page; default: %(default)s"
    )
    options = parser.parse_intermixed_args()
    if options.output.is_dir() and not options.pictures:
        options.pictures, options.html = dreams_in(options.output), options.output / "index.html"
    elif options.pictures:
        contact_sheet(options.pictures, options.columns, options.width).save(options.output)
    if not options.pictures:
        parser.error(f"{options.output}: no pictures to show; name some, or their folder")
    if options.html:
        options.html.write_text(
            page(options.pictures, options.title, options.html.parent), encoding="utf-8"
        )
        print(options.html)


if __name__ == "__main__":
    main()
