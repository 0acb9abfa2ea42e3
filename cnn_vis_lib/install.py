"""Where this program is installed, its version, and how to install what it lacks."""

import functools
import glob
import hashlib
import os
import shlex
import sys

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # the folder of cnn_vis.py
IS_INSTALLED = os.path.isdir(os.path.join(HERE, "cnn_vis_models"))  # with pip; False in a clone
INCLUDED = os.path.join(HERE, "cnn_vis_models" if IS_INSTALLED else "models")
IS_COMMAND = IS_INSTALLED or os.path.basename(sys.argv[0]) == "cnn-vis"
PROGRAM = "cnn-vis" if IS_COMMAND else "cnn_vis.py"
USUAL_COMMAND = "cnn-vis" if IS_INSTALLED else "python cnn_vis.py"  # in records


def command():
    """How this program is run, as a shell takes it: as it was, if this is it."""
    if IS_COMMAND:
        return "cnn-vis"
    path = sys.argv[0] if os.path.basename(sys.argv[0]) == "cnn_vis.py" else "cnn_vis.py"
    return f"python {shlex.quote(path)}"


COMMAND = command()


def how_to_install(what):
    """The command that installs `what` from the clone, a folder or a requirements file."""
    if IS_INSTALLED:
        return "see docs/installing.md in the repository of cnn-vis"
    before = "PYCAFFE_CUDA=1 " * what.endswith("[cuda]") + "pip install "
    return before + "-r " * what.endswith(".txt") + shlex.quote(os.path.join(HERE, what))


def missing_package(error, what="requirements.txt"):
    """The message for a ModuleNotFoundError; installing `what` provides the missing package."""
    python = os.path.join(HERE, ".venv", "bin", "python")
    is_set_up = os.path.exists(python) and not os.path.samefile(sys.prefix, f"{HERE}/.venv")
    remedy = f"run cnn_vis.py with {python}" if is_set_up else how_to_install(what)
    return f"this Python ({sys.executable}) lacks {error.name}; {remedy}"


VERSION = "1.1.0"


@functools.cache
def fingerprint():
    """(version of this program, SHA-256 of its code): other code may give other pixels."""
    digest = hashlib.sha256()
    rooms = glob.glob(f"{glob.escape(HERE)}/cnn_vis_lib/*.py")
    for path in [os.path.join(HERE, "cnn_vis.py"), *sorted(rooms)]:
        with open(path, "rb") as file:
            digest.update(file.read())
    return VERSION, digest.hexdigest()
