"""The program from outside: commands other than a run, its streams, its environment."""

import contextlib
import io
import logging
import os
import shlex
import subprocess
import sys

import pytest
from conftest import ONE, QUICK, ROOT, TINY, assert_one_line, run_cli
from PIL import Image

import cnn_vis
from cnn_vis_lib.errors import log


def test_the_version_is_printed(tmp_path):
    done = run_cli("--version", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"cnn_vis.py {cnn_vis.__version__}\n")


def test_import_needs_no_caffe(tmp_path):
    """`import cnn_vis` loads neither Caffe nor anything slow."""
    heavy = ("caffe", "scipy", "skimage", "matplotlib", "PIL")
    code = f"import sys, cnn_vis; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    "redirection", [">&-", ">/dev/full", "2>&-", "2>/dev/full", ">&- 2>&- <&-"]
)
def test_closed_and_full_streams_stop_nothing(redirection, tmp_path):
    command = shlex.join([sys.executable, str(ROOT / "cnn_vis.py"), *ONE[:-2], "--output_iter=1"])
    done = subprocess.run(
        ["sh", "-c", f"{command} {redirection}"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    Image.open(tmp_path / "out.png").verify()


def test_an_error_on_a_full_stderr_keeps_its_status(tmp_path):
    """The message is lost, but the exit status still reports the error."""
    command = shlex.join([sys.executable, str(ROOT / "cnn_vis.py"), *TINY, "--image=nope.jpg"])
    assert subprocess.run(["sh", "-c", f"{command} 2>/dev/full"], cwd=tmp_path).returncode == 2


def test_a_current_folder_that_is_gone_is_one_line(tmp_path):
    command = shlex.join(
        [sys.executable, str(ROOT / "cnn_vis.py"), *ONE, f"--output={tmp_path}/o.png"]
    )
    done = subprocess.run(
        ["sh", "-c", f"mkdir gone; cd gone; rmdir ../gone; {command}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert_one_line(done, 2, "current directory")


def test_main_leaves_the_callers_logging_and_streams_alone(tmp_path, monkeypatch):
    """The caller's stderr may be any stream; lines are printed once; --quiet lasts for one call."""
    monkeypatch.chdir(tmp_path)
    told = io.StringIO()
    root = logging.StreamHandler(told)
    logging.getLogger().addHandler(root)
    try:
        with contextlib.redirect_stderr(io.StringIO()) as said:
            assert cnn_vis.main([*QUICK, "--iter_behavior=none"]) == 0
            assert cnn_vis.main([*QUICK, "--iter_behavior=none", "--quiet"]) == 0
    finally:
        logging.getLogger().removeHandler(root)
    assert said.getvalue().count("out.png: done") == 1
    assert "done" not in told.getvalue()
    assert log.propagate
    assert log.level == logging.NOTSET


def test_commands_in_messages_work_where_they_are_typed(tmp_path):
    """From another folder, as a path; run itself, as a command."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    (tmp_path / "cnn vis").symlink_to(ROOT)
    start = ["../cnn vis/cnn_vis.py", "--list_models", "--gpu=-1"]
    for words in ([sys.executable, *start], start):
        environment = os.environ | {
            "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
        }
        environment |= {"CNN_VIS_MODELS": str(tmp_path), "CAFFE_ROOT": str(tmp_path)}
        done = subprocess.run(
            words, cwd=folder, capture_output=True, text=True, env=environment, check=True
        )
        assert "python '../cnn vis/cnn_vis.py' --download_model bvlc_googlenet" in done.stdout


def test_a_shell_completes_options_and_presets(tmp_path):
    def completed(line):
        script = f"""
            COMP_LINE={shlex.quote(line)} COMP_POINT={len(line)} _ARGCOMPLETE=1 IFS=, \\
            _ARGCOMPLETE_IFS=, {sys.executable} {ROOT}/cnn_vis.py 8>&1 9>&2 >/dev/null 2>&1"""
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
        return sorted(done.stdout.replace("\v", ",").split(","))

    assert completed("cnn_vis.py --preset s") == ["soft", "strokes"]
    assert "--strength" in [word.strip() for word in completed("cnn_vis.py --str")]


def test_a_picture_of_another_command_is_not_replaced_without_a_word(tmp_path):
    def said(*more):
        words = [*QUICK, "--initial_size=32x32", "--iter_behavior=none", "--seed=1"]
        return run_cli(*words, *more, cwd=tmp_path).stderr

    assert "replaced" not in said()
    assert "replaced" not in said()  # the same command again
    assert "out.png exists, from another command, and will be replaced" in said("--seed=5")
    Image.new("RGB", (9, 9)).save(tmp_path / "out.png")  # from another program
    assert "replaced" in said("--seed=5")
