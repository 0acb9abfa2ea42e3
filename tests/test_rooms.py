"""The house that CONTRIBUTING.md shows: arrows point only downward, and nothing imports the
script."""

import ast
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from cnn_vis_lib.behaviors import BEHAVIORS
from cnn_vis_lib.outputs import ENDINGS

(PICTURE,) = re.findall(r"```text\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
FLOORS = [re.split(r" {2,}", line)[0].split() for line in reversed(PICTURE.splitlines())]
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
FILES = {path.stem: path for path in (ROOT / "cnn_vis_lib").glob("*.py") if path.stem[0] != "_"}


def imported(path):
    """Yields (level, module) of each import statement in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield node.level, node.module
        elif isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)


def test_the_picture_shows_all_rooms():
    assert sorted(FLOOR_OF) == sorted(FILES), "CONTRIBUTING.md shows all files of cnn_vis_lib"
    assert sum(map(len, FLOORS)) == len(FLOOR_OF)


@pytest.mark.parametrize("room", FILES)
def test_a_room_knows_only_lower_rooms(room):
    for level, module in imported(FILES[room]):
        if level == 0:  # also "from cnn_vis_lib": a room names its neighbours in one way
            assert module.split(".")[0] not in ("cnn_vis", "cnn_vis_lib")
        else:
            assert level == 1
            assert FLOOR_OF[module] < FLOOR_OF[room], module


def test_each_room_can_be_imported_alone():
    """Without Caffe, and without the script."""
    code = """if True:
        import importlib, sys
        for room in sys.argv[1:]:
            importlib.import_module(f"cnn_vis_lib.{room}")
            assert not {"caffe", "cnn_vis"} & set(sys.modules)
            for name in [name for name in sys.modules if name.startswith("cnn_vis_lib")]:
                del sys.modules[name]"""
    subprocess.run([sys.executable, "-c", code, *FILES], cwd=ROOT, check=True)


def test_the_script_is_read_in_a_sitting_and_a_room_at_a_glance():
    assert len((ROOT / "cnn_vis.py").read_text().splitlines()) <= 1500
    for room, path in FILES.items():
        assert len(path.read_text().splitlines()) <= 450, room


def test_the_endings_of_files_are_the_watchers():
    """Files.names must know them, and stands below the watchers."""
    assert {watcher.ending for watcher in BEHAVIORS.values()} - {None} == set(ENDINGS)
