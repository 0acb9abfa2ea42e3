"""Files of a run: written completely or not at all, never over other files, and their record of how
they were made."""

import errno
import io
import json
import os
import pathlib
import random
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from conftest import (
    CARD,
    CHECKPOINT,
    GOLDEN,
    ONE,
    QUICK,
    ROOT,
    RUN,
    TINY,
    assert_one_line,
    mutated,
    pixels,
    run_cli,
    run_process,
    start,
    under_way,
    wait_for,
)
from PIL import Image, ImageCms, PngImagePlugin

import cnn_vis
from cnn_vis_lib.behaviors import ARRAYS
from cnn_vis_lib.checkpoints import Checkpoint
from cnn_vis_lib.files import part_name, whole_file
from cnn_vis_lib.writing import FORMATS, write_picture


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 KB."""
    folder = tmp_path / "small"
    folder.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True
    ).returncode:
        pytest.skip("a small file system cannot be mounted here (that takes root)")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_at_the_end_loses_nothing(small_disk, tmp_path):
    """One clear line, and the good file that was there stays."""
    shutil.copy(GOLDEN / "input.png", small_disk / "out.png")
    good = (small_disk / "out.png").read_bytes()
    (small_disk / "filler").write_bytes(bytes(64 * 1024 - len(good) - 8192))
    done = run_cli(
        *RUN,
        "--num_steps=3",
        "--stats=/dev/full/no",
        f"--output={small_disk}/out.png",
        cwd=tmp_path,
    )
    assert_one_line(done, 2, "--stats")
    done = run_cli(
        *TINY,
        "--layer=inception_a/output",
        "--initial_size=300x300",
        "--initialization_scale=60",
        "--num_steps=2",
        "--tv_reg=0",
        "--quiet",
        f"--output={small_disk}/out.png",
        cwd=tmp_path,
        TMPDIR=str(tmp_path),
    )
    assert_one_line(done, 1, "--output", "No space left", "unchanged")
    assert (small_disk / "out.png").read_bytes() == good
    assert sorted(os.listdir(small_disk)) == ["filler", "out.png"]
    command = shlex.split(
        done.stderr.partition("to continue: ")[2]
    )  # the checkpoint is among the temporary files
    assert run_cli(*command[2:], cwd=tmp_path).returncode == 0
    assert Image.open(tmp_path / "ANOTHER.png").size == (300, 300)


def test_a_full_disk_on_the_way_is_reported(small_disk, tmp_path):
    """An intermediate picture that cannot be saved is reported; the run goes on, and succeeds if
    there is room again."""
    (small_disk / "filler").write_bytes(bytes(50 * 1024))
    running = start(
        *TINY,
        "--layer=inception_a/output",
        "--initial_size=90x90",
        "--initialization_scale=60",
        "--num_steps=400",
        "--tv_reg=0",
        "--quiet",
        "--output_iter=1",
        "--iter_behavior=save",
        "--checkpoint_iter=0",
        f"--output={small_disk}/out.png",
        cwd=tmp_path,
    )
    assert "No space left" in running.stderr.readline()
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    running.communicate(timeout=60)
    assert running.returncode == 0
    Image.open(small_disk / "out.png").verify()


@pytest.mark.parametrize("extension", ["png", "jpg", "jpeg", "webp", "tif", "tiff"])
def test_the_extension_decides_the_format(extension, tmp_path):
    """The format is the extension's, tagged as sRGB."""
    name = f"out.{extension}"
    done = run_cli(
        *TINY,
        "--layer=inception_a/output",
        f"--image={GOLDEN}/input.png",
        "--num_steps=1",
        f"--output={name}",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / name) as picture:
        assert FORMATS[f".{extension}"][0] == picture.format
        assert "sRGB" in ImageCms.getProfileDescription(
            ImageCms.ImageCmsProfile(io.BytesIO(picture.info["icc_profile"]))
        )
        picture.load()


@pytest.mark.parametrize(("extension", "side"), [("jpg", 65501), ("webp", 16384)])
def test_sides_that_a_format_does_not_hold(extension, side, tmp_path):
    """Refused before work begins; a picture one pixel smaller is written."""
    options = [*TINY, "--layer=inception_a/output", f"--output=out.{extension}"]
    done = run_cli(*options, f"--initial_size=32x{side}", cwd=tmp_path)
    assert_one_line(done, 2, "--output", str(side - 1), ".png")
    path = tmp_path / f"long.{extension}"
    write_picture(np.zeros((2, side - 1, 3), np.uint8), str(path))
    assert Image.open(path).width == side - 1


def test_one_run_at_a_time_writes_an_output(tmp_path):
    running = under_way(*RUN, "--num_steps=100000", "--checkpoint_iter=1", cwd=tmp_path)
    assert_one_line(run_cli(*RUN, "--quiet", cwd=tmp_path), 2, "--output", "out.png", "another run")
    others = (
        ["--output=out.jpg"],
        ["--output=x.png"],
        ["--output=y.png", "--stats=stats.csv", "--iter_behavior=none"],
    )
    for (other, *more), taken in zip(others, ("out_run.gif", "stats.csv", "stats.csv")):
        assert_one_line(run_cli(*RUN, other, *more, cwd=tmp_path), 2, "another run", taken)
    assert_one_line(
        run_cli(f"--resume={CHECKPOINT}", "--output=z.png", "--stats=z.csv", cwd=tmp_path),
        2,
        "another run",
        "out.png",
    )
    running.send_signal(signal.SIGTERM)
    _, said = running.communicate(timeout=20)
    assert "--resume" in said
    assert sorted(os.listdir(tmp_path)) == ["out.png", CHECKPOINT, "out_run.gif", "stats.csv"]


@pytest.mark.parametrize("option", ["caffe_model", "deploy_txt", "mean_image", "image"])
def test_inputs_are_not_overwritten(option, tmp_path):
    files = {
        "caffe_model": "tiny_inception.caffemodel",
        "deploy_txt": "deploy.prototxt",
        "mean_image": "mean.npy",
        "image": "input.png",
    }
    file = shutil.copy(GOLDEN / files[option], tmp_path)
    before = pathlib.Path(file).read_bytes()
    done = run_cli(*ONE, f"--{option}={file}", f"--stats={file}", cwd=tmp_path)
    assert_one_line(done, 2, "--stats", file)
    linked = tmp_path / "linked.png"
    linked.symlink_to(file)
    assert_one_line(
        run_cli(*ONE, f"--{option}={file}", "--output=linked.png", cwd=tmp_path),
        2,
        "--output",
        f"--{option}",
    )
    assert pathlib.Path(file).read_bytes() == before


def test_a_checkpoint_is_not_overwritten(tmp_path):
    """A resumed run must not write its picture over its checkpoint."""
    running = under_way(*RUN, "--num_steps=100000", "--checkpoint_iter=1", cwd=tmp_path)
    running.kill()
    running.communicate()
    (tmp_path / CHECKPOINT).rename(tmp_path / "c.png")
    before = (tmp_path / "c.png").read_bytes()
    assert_one_line(
        run_cli("--resume=c.png", "--output=c.png", cwd=tmp_path), 2, "--output", "--resume"
    )
    assert (tmp_path / "c.png").read_bytes() == before


@pytest.mark.parametrize(
    "stats",
    ["in.png", "o.png", "o.png.checkpoint", "o_plot.png", "o_1_1.png", "o.png.json", "./o.png"],
)
def test_stats_overwrite_nothing(stats, tmp_path):
    shutil.copy(GOLDEN / "input.png", tmp_path / "in.png")
    done = run_cli(*ONE, "--image=in.png", "--output=o.png", f"--stats={stats}", cwd=tmp_path)
    assert_one_line(done, 2, "--stats", stats)
    assert (tmp_path / "in.png").read_bytes() == (GOLDEN / "input.png").read_bytes()


def test_the_image_is_not_overwritten(tmp_path):
    shutil.copy(GOLDEN / "input.png", tmp_path / "in_1_1.png")
    assert_one_line(
        run_cli(*ONE, "--image=in_1_1.png", "--output=in.png", cwd=tmp_path),
        2,
        "--output",
        "in.png",
    )


def test_file_names_may_be_of_any_bytes(tmp_path):
    """Of any bytes; the ones that are too long are refused before work begins."""
    for name in (b"caf\xe9.png", "é ü 😀.png".encode(), b"new\nline.png"):
        done = run_cli(*ONE, os.fsdecode(b"--output=" + name), cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert name in os.listdir(os.fsencode(tmp_path))
        assert run_cli(b"--reproduce=".decode() + os.fsdecode(name), cwd=tmp_path).returncode == 0
    for name in ("x" * 300 + ".png", "x" * 248 + ".png"):
        assert_one_line(run_cli(*ONE, f"--output={name}", cwd=tmp_path), 2, "--output", "too long")
    assert run_cli(*ONE, f"--output={'😀' * 55}.png", cwd=tmp_path).returncode == 0


def test_links_are_followed_and_devices_refused(tmp_path):
    (tmp_path / "link.png").symlink_to("real.png")
    assert run_cli(*ONE, "--output=link.png", cwd=tmp_path).returncode == 0
    assert (tmp_path / "link.png").is_symlink()
    Image.open(tmp_path / "real.png").verify()
    os.mkfifo(tmp_path / "fifo.png")
    assert_one_line(run_cli(*ONE, "--output=fifo.png", cwd=tmp_path), 2, "--output", "fifo.png")


def test_parts_of_killed_runs_are_removed(tmp_path):
    """Those of this output and of processes of this machine that are no more."""
    dead = subprocess.Popen(["true"])
    dead.wait()
    stale = [
        part_name(str(tmp_path / name), dead.pid)
        for name in ("out.png", "out.png.checkpoint", "out_1_50.png")
    ]
    long = "[1] " * 40 + ".png"
    stale.append(part_name(str(tmp_path / long), dead.pid))
    kept = [
        part_name(str(tmp_path / "out.png"), os.getpid()),
        part_name(str(tmp_path / "other.png"), dead.pid),
        part_name(str(tmp_path / "out.png"), dead.pid).replace(os.uname().nodename, "elsewhere"),
    ]
    for path in stale + kept:
        open(path, "w").close()
    for output in ("out.png", long):
        assert run_process(*ONE, f"--output={output}", cwd=tmp_path).returncode == 0
    assert {path for path in stale + kept if os.path.exists(path)} == set(kept)


def test_folders_in_the_way_are_refused(tmp_path):
    for name, option in (
        ("o.png.json", "--sidecar"),
        ("o_run.gif", "--iter_behavior=gif"),
        ("o_plot.png", "--iter_behavior=plot"),
    ):
        (tmp_path / name).mkdir()
        assert_one_line(
            run_cli(*ONE[:-1], option, "--output=o.png", cwd=tmp_path), 2, "--output", name
        )


def test_what_can_be_written_at_the_end_is_written(tmp_path):
    """Though another file cannot; the run's checkpoint is then kept."""
    (tmp_path / "o_run.gif").symlink_to("nowhere/o.gif")
    words = ["--iter_behavior=gif", "--stats=s.csv", "--num_steps=3", "--output=o.png"]
    done = run_cli(*QUICK, *words, cwd=tmp_path)
    assert done.returncode == 1
    assert "o_run.gif" in done.stderr.splitlines()[-1]
    assert "--resume o.png.checkpoint" in done.stderr.splitlines()[-1]
    assert len((tmp_path / "s.csv").read_text().splitlines()) == 4
    Image.open(tmp_path / "o.png").verify()


def test_the_work_is_kept_when_the_folder_goes_away(tmp_path):
    """The picture cannot be written to its folder; the work is kept and can be resumed."""
    folder = tmp_path / "folder"
    folder.mkdir()
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    command = [
        sys.executable,
        str(ROOT / "cnn_vis.py"),
        *RUN,
        "--stats=s.csv",
        "--quiet",
        "--checkpoint_iter=1",
    ]
    running = subprocess.Popen(
        [*command, f"--output={folder}/out.png"],
        cwd=tmp_path,
        env=environment,
        text=True,
        stderr=subprocess.PIPE,
    )
    wait_for((folder / CHECKPOINT).exists)
    folder.rename(tmp_path / "gone")  # at once, though the run is writing into it
    _, said = running.communicate(timeout=60)
    assert running.returncode == 1
    line = said.splitlines()[-1]
    assert "Traceback" not in said
    command = shlex.split(line.partition("to continue: ")[2])
    assert run_cli(*command[2:], cwd=tmp_path).returncode == 0
    Image.open(tmp_path / "ANOTHER.png").verify()


@pytest.mark.parametrize("more", [[], ["--verbose"]])
@pytest.mark.parametrize("extension", ["png", "jpg"])
def test_the_printed_command_makes_the_same_picture(extension, more, tmp_path):
    """The command that --reproduce prints makes the same picture again; noise without --seed is no
    exception."""
    folder = tmp_path / "a folder"
    folder.mkdir()
    done = run_cli(
        *TINY,
        "--layer=inception_a/output",
        "--initialization_scale=30",
        "--num_steps=3",
        "--batch_size=2",
        "--sidecar",
        f"--output=an out.{extension}",
        "--iter_behavior=none",
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    origin = json.loads((folder / f"an out.{extension}.json").read_text())
    assert origin["seed"] is not None
    assert len(origin["weights_sha256"]) == 64
    assert origin["sizes"] == [[32, 32]]
    assert origin["versions"]["numpy"] == np.__version__
    if extension == "png":
        os.remove(folder / "an out.png.json")
        assert json.loads(Image.open(folder / "an out.png").info["cnn-vis"]) == origin
    done = run_cli(f"--reproduce=an out.{extension}", *more, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert ("--target_layer" in done.stdout) == bool(more)  # briefly, or with all options
    command = shlex.split(done.stdout)
    first = pixels(folder / f"an out.{extension}")
    os.remove(folder / f"an out.{extension}")
    assert run_cli(*command[2:], cwd=folder).returncode == 0
    assert np.array_equal(pixels(folder / f"an out.{extension}"), first)


def test_a_strangers_record_is_printed_as_escapes(tmp_path):
    """Control characters are printed as escapes, which a shell turns back into the same
    characters."""
    name = "a \x1b]0;title\x07 'quoted' \\ name.png"
    record = {
        "program": "\x1b[2J",
        "network": "n",
        "weights_sha256": "0",
        "deploy_sha256": "0",
        "mean": 1.0,
        "seconds": 1.0,
    }
    command = shlex.join(["python", "cnn_vis.py", f"--output_file={name}"])
    for words, expected in ((command, 0), ("python 'unfinished", 2), (7, 2)):
        text = PngImagePlugin.PngInfo()
        text.add_itxt("cnn-vis", json.dumps(record | {"command": words}))
        CARD.save(tmp_path / "stranger.png", pnginfo=text)
        done = run_cli("--reproduce=stranger.png", cwd=tmp_path)
        assert done.returncode == expected
        assert (done.stdout + done.stderr).replace("\n", "").isprintable()
        if expected:
            assert_one_line(done, 2, "--reproduce", "stranger.png")
        else:
            shell = ["bash", "-c", f"printf '%s\\0' {done.stdout}"]
            words = subprocess.check_output(shell, text=True)
            assert words.split("\0")[:-1] == ["python", "cnn_vis.py", f"--output={name}"]


def test_other_files_have_no_record(tmp_path):
    CARD.save(tmp_path / "photo.jpg")
    for name in ("none.png", GOLDEN / "input.png", GOLDEN / "cases.json", ".", "photo.jpg"):
        done = run_cli(f"--reproduce={name}", cwd=tmp_path)
        words = {"none.png": "no such file;", ".": "is a folder"}.get(name, "has no record")
        assert_one_line(done, 2, f"--reproduce {name}:", words)
    os.mkfifo(tmp_path / "fifo.png")
    assert_one_line(
        run_cli("--reproduce=fifo.png", cwd=tmp_path), 2, "--reproduce", "not a regular file"
    )


def test_reproduce_prefers_what_the_picture_says(tmp_path):
    assert run_cli(*ONE, "--sidecar", cwd=tmp_path).returncode == 0
    assert run_cli(*ONE, "--seed=7", cwd=tmp_path).returncode == 0
    assert "--seed=7" in run_cli("--reproduce=out.png", cwd=tmp_path).stdout


def test_reproduce_tells_pictures_on_the_way(tmp_path):
    assert (
        run_cli(
            *ONE, "--iter_behavior=save", "--output_iter=1", "--num_steps=2", cwd=tmp_path
        ).returncode
        == 0
    )
    assert "after step 1 of size 1" in run_cli("--reproduce=out_1_1.png", cwd=tmp_path).stderr
    assert "on the way" not in run_cli("--reproduce=out.png", cwd=tmp_path).stderr


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """The bytes of a checkpoint."""
    folder = tmp_path_factory.mktemp("checkpoint")
    running = under_way(*RUN, "--num_steps=100000", "--checkpoint_iter=1", cwd=folder)
    running.send_signal(signal.SIGTERM)
    running.communicate(timeout=20)
    return (folder / CHECKPOINT).read_bytes()


def test_damaged_checkpoints_are_refused(checkpoint, tmp_path):
    """A checkpoint with any change is refused, unless the change leaves its contents as they
    were."""
    path, randomly = tmp_path / CHECKPOINT, random.Random(8)
    path.write_bytes(checkpoint)
    sound = Checkpoint.read(str(path), ARRAYS)
    refused = 0
    for _ in range(500):
        path.write_bytes(mutated(checkpoint, randomly))
        try:
            same = Checkpoint.read(str(path), ARRAYS)
        except cnn_vis.BadRequest as error:
            assert len(str(error).splitlines()) == 1
            refused += 1
            continue
        for name in ("record", "folder", "numbers"):
            assert getattr(same, name) == getattr(sound, name)
        for name, array in same.arrays.items():
            np.testing.assert_array_equal(array, sound.arrays[name])
    assert refused > 400


def forged(checkpoint, change):
    """A well-formed checkpoint with other contents: change(header, arrays) edits them."""
    with zipfile.ZipFile(io.BytesIO(checkpoint)) as file:
        arrays = {name[:-4]: np.load(io.BytesIO(file.read(name))) for name in file.namelist()}
    header = json.loads(arrays.pop("header").tobytes())
    change(header, arrays)
    buffer = io.BytesIO()
    np.savez(buffer, header=np.frombuffer(json.dumps(header).encode(), np.uint8), **arrays)
    return buffer.getvalue()


COMMAND = "python cnn_vis.py"
FORGERIES = {
    "no header fields": lambda header, arrays: header.clear(),
    "no record": lambda header, arrays: header.update(record=None),
    "a field too many": lambda header, arrays: header.update(more=1),
    "folder is a number": lambda header, arrays: header.update(folder=3),
    "command is a number": lambda header, arrays: header["record"].update(command=3),
    "command is a list": lambda header, arrays: header["record"].update(command=[COMMAND]),
    "no hash": lambda header, arrays: header["record"].pop("weights_sha256"),
    "bad option": lambda header, arrays: header["record"].update(command=f"{COMMAND} --nonsense"),
    "bad value": lambda header, arrays: header["record"].update(command=f"{COMMAND} --seed=x"),
    "help": lambda header, arrays: header["record"].update(command=f"{COMMAND} --help"),
    "open quotation": lambda header, arrays: header["record"].update(command=f"{COMMAND} '"),
    "step too large": lambda header, arrays: header["numbers"].update(step=10**9),
    "step is text": lambda header, arrays: header["numbers"].update(step="3"),
    "step is a fraction": lambda header, arrays: header["numbers"].update(step=1.5),
    "size": lambda header, arrays: header["numbers"].update(size=0),
    "seconds is text": lambda header, arrays: header["record"].update(seconds="long"),
    "learning rate": lambda header, arrays: header["numbers"].update(learning_rate="fast"),
    "image too small": lambda header, arrays: arrays.update(image=arrays["image"][:, :, 1:]),
    "image of whole numbers": lambda header, arrays: arrays.update(
        image=arrays["image"].astype(int)
    ),
    "image not finite": lambda header, arrays: arrays.update(image=arrays["image"] * np.nan),
    "no caches": lambda header, arrays: arrays.pop("caches"),
    "rows": lambda header, arrays: arrays.update(rows=np.zeros(3)),
    "picture": lambda header, arrays: arrays.update(picture=np.zeros(3)),
    "frames": lambda header, arrays: arrays.update(frames=np.zeros(3)),
}


@pytest.mark.parametrize("change", FORGERIES)
def test_forged_checkpoints_are_one_line(change, checkpoint, tmp_path):
    (tmp_path / CHECKPOINT).write_bytes(forged(checkpoint, FORGERIES[change]))
    done = run_cli(f"--resume={CHECKPOINT}", "--quiet", cwd=tmp_path)
    assert_one_line(done, 2, "--resume", CHECKPOINT)


def test_checkpoints_hold_no_pickles(checkpoint, tmp_path):
    def change(header, arrays):
        arrays["image"] = np.array([print], dtype=object)

    (tmp_path / CHECKPOINT).write_bytes(forged(checkpoint, change))
    assert_one_line(run_cli(f"--resume={CHECKPOINT}", cwd=tmp_path), 2, "--resume", "pickle")


def test_a_protected_output_is_refused_at_the_start(tmp_path):
    """The picture, and all else that the run would replace beside it."""
    for name in ("out.png", "stats.csv", "out_run.gif", "out.png.json"):
        path = tmp_path / name
        path.write_bytes(b"mine")
        path.chmod(0o444)
        options = ["--stats=stats.csv", "--iter_behavior=gif", "--sidecar"]
        done = run_cli(*ONE, *options, cwd=tmp_path)
        assert_one_line(done, 2, name, "write-protected")
        assert path.read_bytes() == b"mine"
        path.unlink()


@pytest.mark.parametrize("mode", [0o600, 0o664])
def test_a_replaced_file_keeps_its_mode(mode, tmp_path):
    (tmp_path / "out.png").touch()
    (tmp_path / "out.png").chmod(mode)
    assert run_cli(*ONE, cwd=tmp_path).returncode == 0
    assert pixels(tmp_path / "out.png").shape == (32, 32, 3)
    assert (tmp_path / "out.png").stat().st_mode & 0o777 == mode
    os.umask(umask := os.umask(0))
    assert run_cli(*ONE, "--output=new.png", cwd=tmp_path).returncode == 0
    assert (tmp_path / "new.png").stat().st_mode & 0o777 == 0o666 & ~umask


def test_links_in_a_circle_are_refused_at_the_start(tmp_path):
    (tmp_path / "loop.png").symlink_to("loop.png")
    assert_one_line(run_cli(*ONE, "--output=loop.png", cwd=tmp_path), 2, "--output loop.png")
    assert os.listdir(tmp_path) == ["loop.png"]


# ---- Pictures of 16 bits


def deep_pixels(path):
    """The pixels of a 16-bit picture, read with OpenCV instead of our own code."""
    import cv2

    return cv2.imread(str(path), cv2.IMREAD_UNCHANGED)[:, :, ::-1]


@pytest.mark.parametrize("more", [[], ["--rescale_image"], ["--keep_colors"]])
def test_16_bits_are_the_floats(more, picture, tmp_path):
    """Their upper bytes are those of the 8-bit picture, and the lower ones are not empty."""
    common = [*QUICK, f"--image={picture}", "--iter_behavior=save", "--output_iter=1", *more]
    for words in (["--output=8.png"], ["--output=16.png", "--depth=16"]):
        assert run_cli(*common, *words, cwd=tmp_path).returncode == 0
    done = run_cli(*common, "--output=16.tif", "--depth=16", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for name in ("16.png", "16_1_1.png", "16.tif"):
        deep = deep_pixels(tmp_path / name)
        assert deep.dtype == np.uint16
        usual = pixels(tmp_path / name.replace("16", "8", 1).replace(".tif", ".png"))
        difference = deep.astype(int) // 257 - usual
        assert np.abs(difference).max() <= ("--keep_colors" in more)
        assert (deep % 257 != 0).mean() > 0.5
    with Image.open(tmp_path / "16.png") as file:
        assert "sRGB" in ImageCms.getProfileName(io.BytesIO(file.info["icc_profile"]))
        assert "--depth=16" in file.info["Comment"]
    assert "--depth=16" in run_cli("--reproduce=16.png", cwd=tmp_path).stdout


def test_16_bits_keep_what_a_mask_keeps(picture, tmp_path):
    start = pixels(picture)
    mask = np.zeros(start.shape[:2], np.uint8)
    mask[:, 40:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    words = [f"--image={picture}", "--mask=mask.png", "--depth=16", "--iter_behavior=none"]
    assert run_cli(*QUICK, *words, cwd=tmp_path).returncode == 0
    deep = deep_pixels(tmp_path / "out.png")
    assert np.array_equal(deep[:, :40], start[:, :40].astype(np.uint16) * 257)
    assert not np.array_equal(deep, start.astype(np.uint16) * 257)


def test_formats_of_8_bits_are_refused_for_16(tmp_path):
    for name in ("a.jpg", "a.webp"):
        done = run_cli(*ONE, "--depth=16", f"--output={name}", cwd=tmp_path)
        assert_one_line(done, 2, "--depth 16", name, ".png or .tif")


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.tif", "deep.png", "deep.tif"])
def test_a_picture_that_does_not_fit_on_the_disk_leaves_the_old_one(name, tmp_path):
    """Nothing is written past the limit, and libraries that ignore that must not go unnoticed."""
    (tmp_path / name).write_bytes(b"the old one")
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8)
    np.save(tmp_path / "noise.npy", noise.astype(np.uint16) * 257 if "deep" in name else noise)
    code = f"""if True:
        import resource, sys
        import numpy as np
        from cnn_vis_lib.writing import write_picture
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        write_picture(np.load("noise.npy"), "{name}")"""
    words = [sys.executable, "-c", code]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert f"RunFailed: {name}: cannot be written ([Errno 27] File too large)" in done.stderr
    assert (tmp_path / name).read_bytes() == b"the old one"
    assert sorted(os.listdir(tmp_path)) == sorted([name, "noise.npy"])


def test_a_run_that_fails_before_its_first_step_keeps_the_earlier_picture(tmp_path):
    words = [*ONE, f"--image={GOLDEN}/input.png"]
    assert run_cli(*words, cwd=tmp_path).returncode == 0
    before = (tmp_path / "out.png").read_bytes()
    assert_one_line(run_cli(*words, "--l1_weight=1e38", cwd=tmp_path), 1, "--l1_weight")
    assert (tmp_path / "out.png").read_bytes() == before


def test_a_picture_in_place_of_its_checkpoint_is_recognized(tmp_path):
    (tmp_path / "a.png").write_bytes(b"a picture")
    (tmp_path / "a.png.checkpoint").write_bytes(b"a checkpoint")
    done = run_cli("--resume=a.png", cwd=tmp_path)
    assert_one_line(done, 2, "--resume a.png", "did you mean a.png.checkpoint?")


def test_statistics_replace_no_other_file(tmp_path):
    (tmp_path / "mine.csv").write_text("a,b\n1,2\n")
    words = [*ONE, f"--image={GOLDEN}/input.png"]
    done = run_cli(*words, "--stats=mine.csv", cwd=tmp_path)
    assert_one_line(done, 2, "--stats mine.csv", "another name")
    for _ in range(2):  # its own file it replaces
        assert run_cli(*words, "--stats=own.csv", cwd=tmp_path).returncode == 0


def test_a_folder_in_place_of_the_checkpoint_stays(tmp_path):
    (tmp_path / "out.png.checkpoint").mkdir()
    assert_one_line(run_cli(*ONE, cwd=tmp_path), 2, "--output out.png", "out.png.checkpoint")
    assert os.listdir(tmp_path) == ["out.png.checkpoint"]


# ---- File systems and folders that allow less ----------------------------------------------------


def fails_with(folder, **errors):
    """The environment of a run in which functions of `os` fail: {name: error number}."""
    lines = ["import os"]
    for name, number in errors.items():
        lines += [f"def {name}(*_): raise OSError({number}, os.strerror({number}))"]
        lines += [f"os.{name} = {name}"]
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text("\n".join(lines))
    return {"PYTHONPATH": str(folder / "site")}


REFUSED = {
    "no modes": {"fchmod": errno.EPERM},
    "modes unknown": {"fchmod": errno.ENOTSUP},
    "no fsync": {"fsync": errno.EINVAL},
    "fsync unknown": {"fsync": errno.ENOTSUP},
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_a_file_system_cannot_do_is_no_hindrance(kind, tmp_path):
    """Neither to later checkpoints nor to a second run to the same names, with all its files."""
    environment = fails_with(tmp_path, **REFUSED[kind])
    words = ["--sidecar", "--stats=stats.csv", "--checkpoint_iter=1", "--num_steps=3"]
    for seed in (1, 2):
        done = run_cli(*ONE, *words, f"--seed={seed}", cwd=tmp_path, **environment)
        assert (done.returncode, done.stderr) == (0, "")
        record = json.loads((tmp_path / "out.png.json").read_text())
        assert record["seed"] == seed
    assert sorted(os.listdir(tmp_path)) == ["out.png", "out.png.json", "site", "stats.csv"]


def test_a_disk_that_fails_is_not_ignored(tmp_path):
    """Other than an fsync that does not exist."""
    shutil.copy(GOLDEN / "input.png", tmp_path / "out.png")
    environment = fails_with(tmp_path, fsync=errno.EIO) | {"TMPDIR": str(tmp_path)}
    done = run_cli(*ONE, cwd=tmp_path, **environment)
    assert_one_line(done, 1, "out.png", "Input/output error")
    assert (tmp_path / "out.png").read_bytes() == (GOLDEN / "input.png").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["out.png", "site"]


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="this takes root")
MOUNTED = ["unshare", "-m", "--propagation", "private", "bash", "-c"]


def run_mounted(mounts, *arguments, cwd):
    """Runs the script after shell commands that mount something where only it sees that."""
    command = shlex.join([sys.executable, str(ROOT / "cnn_vis.py"), *map(str, arguments)])
    return subprocess.run(
        [*MOUNTED, f"{mounts} && {command}"], cwd=cwd, capture_output=True, text=True, timeout=100
    )


def check_written(folder, name="out.png"):
    """Asserts that a run with seed 1 wrote the picture `name`, and left nothing else there."""
    record = json.loads(Image.open(folder / name).info["cnn-vis"])
    assert record["seed"] == 1
    assert not [name for name in os.listdir(folder) if name.endswith(".part")]


@needs_root
def test_a_file_that_is_mounted_is_overwritten(tmp_path):
    """As Docker mounts a single file: it can be written, but not replaced. Longer and shorter
    files, statistics too."""
    for name in ("out.png", "stats.csv"):
        (tmp_path / name).touch()
        (tmp_path / f"mounted_{name}").write_bytes(b"size," + bytes(100_000))
    mounts = "mount --bind mounted_out.png out.png && mount --bind mounted_stats.csv stats.csv"
    done = run_mounted(mounts, *ONE, "--stats=stats.csv", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    check_written(tmp_path, "mounted_out.png")
    size, step = (tmp_path / "mounted_stats.csv").read_text().splitlines()
    assert size.startswith("size,height")
    assert step.startswith("1,32,32,1,")


@needs_root
def test_another_users_file_in_a_sticky_folder_is_overwritten(tmp_path):
    (tmp_path / "sticky").mkdir()
    out = tmp_path / "sticky" / "out.png"
    out.write_bytes(b"")
    for path, mode in ((out, 0o666), (tmp_path / "sticky", 0o1777)):
        os.chown(path, 1000, 1000)
        os.chmod(path, mode)
    drop = ["setpriv", "--bounding-set=-fowner", "--inh-caps=-fowner"]
    command = [*drop, sys.executable, str(ROOT / "cnn_vis.py"), *ONE, "--output=sticky/out.png"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (0, "")
    check_written(tmp_path / "sticky")
    assert (os.stat(out).st_uid, os.stat(out).st_mode & 0o777) == (1000, 0o666)


@needs_root
@pytest.mark.parametrize("more", [[], ["--checkpoint_iter=0"]])
def test_a_file_in_a_folder_that_cannot_be_written(more, tmp_path):
    """Is enough, if the run writes nothing else there; otherwise it is refused at the start."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "out.png").touch()
    (tmp_path / "real.png").write_bytes(b"before")
    mounts = "mount --bind folder folder && mount --bind real.png folder/out.png"
    mounts += " && mount -o remount,bind,ro folder"
    done = run_mounted(mounts, *ONE, *more, "--output=folder/out.png", cwd=tmp_path)
    if more:
        assert (done.returncode, done.stderr) == (0, "")
        check_written(tmp_path, "real.png")
    else:
        assert_one_line(done, 2, "--output folder/out.png", "Read-only", "--checkpoint_iter 0")
        assert (tmp_path / "real.png").read_bytes() == b"before"


@needs_root
def test_another_users_checkpoint_that_cannot_be_renamed_is_told_at_the_start(tmp_path):
    (tmp_path / "sticky").mkdir()
    (tmp_path / "sticky" / CHECKPOINT).write_bytes(b"")
    for path, mode in ((tmp_path / "sticky" / CHECKPOINT, 0o666), (tmp_path / "sticky", 0o1777)):
        os.chown(path, 1000, 1000)
        os.chmod(path, mode)
    drop = ["setpriv", "--bounding-set=-fowner", "--inh-caps=-fowner"]
    command = [*drop, sys.executable, str(ROOT / "cnn_vis.py"), *ONE, "--output=sticky/out.png"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert_one_line(done, 2, "--output sticky/out.png", "cannot be renamed", "another name")


def test_a_limit_on_the_size_of_files_is_named(tmp_path):
    words = [sys.executable, str(ROOT / "cnn_vis.py"), *ONE, "--initial_size=400x400"]
    for blocks, name in ((2, "out.png"), (50, "shared with workers"), (200, "out.png")):
        command = f"export TMPDIR=$PWD; ulimit -f {blocks}; {shlex.join(words)}"
        done = subprocess.run(
            ["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=60
        )
        assert done.returncode in (1, 2)
        assert len(done.stderr.splitlines()) == 1
        assert name in done.stderr
        assert "File too large" in done.stderr


def test_a_file_that_cannot_be_replaced_survives_a_full_disk(small_disk, monkeypatch):
    """It is overwritten only if there is room for what replaces it."""
    monkeypatch.setattr(os, "replace", refuse_to_replace)
    path = small_disk / "out.bin"
    path.write_bytes(b"before")
    (small_disk / "filler").write_bytes(bytes(40_000))
    with pytest.raises(cnn_vis.RunFailed, match="No space left"), whole_file(path) as file:
        file.write(bytes(15_000))
    assert path.read_bytes() == b"before"
    assert sorted(os.listdir(small_disk)) == ["filler", "out.bin"]


def refuse_to_replace(*_):
    raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))


def test_a_file_that_is_half_overwritten_is_told_with_its_copy(tmp_path, monkeypatch):
    def fail(source, target):
        target.write(source.read(3))
        target.flush()
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "replace", refuse_to_replace)
    monkeypatch.setattr(shutil, "copyfileobj", fail)
    path = tmp_path / "out.bin"
    path.write_bytes(b"before")
    with pytest.raises(cnn_vis.RunFailed) as raised, whole_file(path) as file:
        file.write(b"content")
    assert "halfway" in str(raised.value)
    copy = pathlib.Path(str(raised.value).rpartition(" ")[2])
    assert copy.read_bytes() == b"content"
    shutil.rmtree(copy.parent)
    assert os.listdir(tmp_path) == ["out.bin"]


def test_devices_are_never_replaced(tmp_path):
    """Not even by a record or an animation whose name is a link to one."""
    for name, word in {"out.png.json": "--sidecar", "out_run.gif": "--iter_behavior=gif"}.items():
        (tmp_path / name).symlink_to("/dev/null")
        assert_one_line(run_cli(*ONE, word, cwd=tmp_path), 2, name, "not a regular file")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    with pytest.raises(cnn_vis.RunFailed, match="regular file"), whole_file("/dev/null"):
        pass
