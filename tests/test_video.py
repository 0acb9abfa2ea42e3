"""The dream is carried from frame to frame of a video: to the right places, without the program's
gain, and so that the film flickers less. The clips are made here, of a photograph that moves."""

import functools
import os
import re
import shutil
import subprocess
import sys

import imageio_ffmpeg
import numpy as np
import pytest
from conftest import ROOT, TINY, run_cli
from PIL import Image
from test_examples import run

import cnn_vis
from cnn_vis_lib.records import read_record

pytest.importorskip("cv2", reason="OpenCV is not installed")
sys.path.insert(0, str(ROOT / "examples"))
import flow
import picture

SIZE = (128, 128)
FAST = ["--model=googlenet_mini", "--gpu=-1", "--workers=1", "--input_size=128"]


@functools.cache
def photograph():
    """A cat, uint8 (300, 451, 3)."""
    import skimage.data

    return skimage.data.chelsea()


def view(x, y):
    """The part of the photograph, uint8 (*SIZE, 3), whose upper left corner is at x, y."""
    return photograph()[y : y + SIZE[0], x : x + SIZE[1]]


def moved(values, x, y):
    """The part of an array (H, W, ...) that is still seen when the view moves by x, y, neither
    negative."""
    return values[y:, x:]


def unmoved(values, x, y):
    """The same part, in the array of the moved view."""
    return values[: len(values) - y, : values.shape[1] - x]


# ---- Where the dream goes ---------------------------------------------------------------------


@pytest.mark.parametrize("method", ["dis", "farneback"])
def test_carried_to_its_place(method):
    """Spots in the earlier frame are found where the photograph has moved; where it shows something
    new, nothing is carried."""
    previous, frame = view(100, 60), view(107, 63).copy()
    frame[60:84, 40:64] = 255 - frame[60:84, 40:64]
    y, x = np.indices(SIZE)
    spots = np.repeat(40 * np.sin(x / 6) * np.sin(y / 6), 3).reshape(*SIZE, 3).astype(np.float32)
    start = flow.carry(spots, previous, frame, 0.5, method)
    assert start.dtype == np.uint8
    is_new = np.abs(unmoved(frame, 7, 3).astype(int) - moved(previous, 7, 3)).max(axis=2) > 30
    assert is_new.sum() > 300
    carried = unmoved(start.astype(int) - frame, 7, 3)
    expected = 0.5 * moved(spots, 7, 3)
    far = np.ones(is_new.shape, bool)  # from what is new
    far[50:94, 30:74] = False
    far[:, -12:] = far[-8:] = False
    error = np.abs(carried - expected)[far]
    assert error.mean() < 0.15 * np.abs(expected[far]).mean()
    not_moved = np.abs(carried - 0.5 * unmoved(spots, 7, 3))[far]
    assert not_moved.mean() > 4 * error.mean()
    middle = np.s_[64:80, 44:60]
    assert np.abs(carried[middle]).mean() < 0.1 * np.abs(expected[middle]).mean()


def test_nothing_is_carried_over_a_cut():
    previous, frame = np.full((*SIZE, 3), 40, np.uint8), np.full((*SIZE, 3), 200, np.uint8)
    dreamed = np.full((*SIZE, 3), 19.7, np.float32)
    assert np.array_equal(flow.carry(dreamed, previous, frame, 1), frame)
    assert np.array_equal(flow.carry(dreamed, previous, previous, 1), previous + 20)


def test_nothing_is_carried_from_outside():
    frame = np.full((*SIZE, 3), 100, np.uint8)
    for vector, seen in (((8, 0), np.s_[:, :-8]), ((0, -8), np.s_[8:])):
        weight = flow.trust(frame, frame, np.full((*SIZE, 2), vector, np.float32))
        expected = np.zeros(SIZE)
        expected[seen] = 1
        assert np.array_equal(weight > 0, expected)


def test_nothing_is_carried_to_where_the_mask_is_black(tmp_path):
    """With flow.py: the dream's pattern moves with the picture, but the mask stays in place."""
    previous, frame = view(100, 60), view(107, 63)
    for name, pixels in (("previous", previous), ("frame", frame)):
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    mask = np.zeros(SIZE, np.uint8)
    mask[:, 64:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    options = ["--layer=inception_3a/1x1", "--num_steps=2", "--learning_rate=2"]
    options += ["--mask=mask.png", "--image=previous.png", "--iter_behavior=none"]
    assert run_cli(*FAST, *options, cwd=tmp_path).returncode == 0
    arguments = ["carry", "0.9", "dis", "frame.png", "next.png", "previous.png", "out.png"]
    command = [sys.executable, ROOT / "examples" / "flow.py", *arguments]
    subprocess.run(command, cwd=tmp_path, check=True)
    carried = np.asarray(Image.open(tmp_path / "next.png")).astype(int) - frame
    assert not carried[mask == 0].any()
    assert carried[mask > 0].std() > 1


@pytest.mark.parametrize("difference", [30, 31])
def test_places_fit_up_to_30_grey_levels(difference):
    """In any one channel."""
    frame = np.full((*SIZE, 3), 100, np.uint8)
    previous = frame.copy()
    previous[..., 1] += np.uint8(difference)
    weight = flow.trust(frame, previous, np.zeros((*SIZE, 2), np.float32))
    assert (weight == (difference == 30)).all()


# ---- What was dreamed -------------------------------------------------------------------------


def written(start, pattern, mean=112.0):
    """What the program writes if it starts from `start`, uint8 (H, W, 3), and adds the pattern."""
    image = cnn_vis.from_uint8(start, mean)
    image += pattern[:, :, ::-1].transpose(2, 0, 1)
    return cnn_vis.to_picture(image, mean)


def test_added_is_what_was_added():
    """The error is at most half a grey level, the rounding to 8 bits. Where the dream was clipped
    to black or white, the pattern is unknown, and must not turn the frame's own white grey."""
    frame = view(100, 60)
    pattern = np.random.default_rng(1).normal(0, 8, frame.shape)
    dream = written(frame, pattern)
    found = flow.added(dream, frame, 112.0, cnn_vis.CONTRAST)
    is_known = (dream > 0) & (dream < 255)
    assert is_known.mean() > 0.9
    assert np.abs(found - pattern)[is_known].max() < 0.5
    assert abs((found - pattern)[is_known].mean()) < 0.01
    white = np.full((2, 2, 3), 250, np.uint8)
    assert (flow.added(np.full_like(white, 255), white, 112.0, cnn_vis.CONTRAST) == 0).all()
    assert (flow.added(np.full_like(white, 0), 255 - white, 112.0, cnn_vis.CONTRAST) == 0).all()


@pytest.mark.parametrize(
    "options, bound",
    [
        ([], 0.5),
        (["--keep_colors"], 2),
        (["--mask=mask.png"], 1),
        (["--num_sizes=2", "--initial_size=x1", "--final_size=x1"], 1),
        (["--num_sizes=2", "--initial_size=x1", "--final_size=x1", "--enlarge=change"], 1),
        (["--contrast=1"], 1),
    ],
    ids=["plain", "keep_colors", "mask", "two sizes", "only the change", "no contrast"],
)
def test_a_dream_of_nothing_adds_nothing(options, bound, tmp_path):
    """Whatever the options have done to the contrast, it is no part of the dream."""
    frame = view(100, 60)
    Image.fromarray(frame).save(tmp_path / "in.png")
    Image.fromarray(np.uint8(np.indices(SIZE)[1] * 255 / SIZE[1])).save(tmp_path / "mask.png")
    common = ["--layer=inception_a/output", "--num_steps=1", "--learning_rate=1e-9"]
    options = [option.replace("mask.png", str(tmp_path / "mask.png")) for option in options]
    done = run_cli(*TINY, *common, "--image=in.png", "--iter_behavior=none", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    out = np.asarray(Image.open(tmp_path / "out.png")).astype(int)
    assert out.std() > 1.05 * frame.std() or "--contrast=1" in options
    mean = read_record(str(tmp_path / "out.png"))[0]["mean"]
    raised = cnn_vis.CONTRAST**2 * (frame - mean) + mean
    is_known = ((raised > 0) & (raised < 255)).all(axis=2)  # nothing was cut at black or white
    assert is_known.mean() > 0.5
    found, _ = flow.difference(tmp_path / "out.png", frame)
    assert abs(found[is_known].mean()) < 0.1, found[is_known].mean()
    assert np.abs(found[is_known]).max() < bound


def test_pictures_of_others_lend_no_contrast(tmp_path):
    """A picture without a record of how it was made is brought to its frame's contrast first."""
    frame = view(100, 60)
    Image.fromarray(np.uint8(frame * 0.5 + 60)).save(tmp_path / "out.png")
    assert np.abs(flow.difference(tmp_path / "out.png", frame)[0]).mean() < 1


def test_no_drift_over_100_frames():
    """Brightness and contrast of a film whose dream adds the same pattern to every frame stay the
    same. The last assertion shows that they would drift if the gain were left in."""
    steps = np.arange(100) / 20 * 2 * np.pi  # the camera comes back every 20 frames
    places = np.round([150 + 60 * np.sin(steps), 80 + 40 * np.cos(steps)]).astype(int).T
    pattern = np.random.default_rng(1).normal(0.3, 1, (*SIZE, 3))

    def film(gain):
        figures, previous, dreamed = [], None, None
        for x, y in places:
            frame = view(x, y)
            start = frame
            if previous is not None:
                start = flow.carry(dreamed, previous, frame, 0.9)
            dream = written(start, pattern)
            dreamed, previous = flow.added(dream, frame, 112.0, gain), frame
            figures.append((dream.mean(), dream.std()))
        return np.reshape(figures, (5, 20, 2)).mean(axis=1)

    figures = film(cnn_vis.CONTRAST)
    assert np.abs(figures[1:] - figures[1]).max() < 0.5
    plain = np.mean([written(view(x, y), pattern).std() for x, y in places])
    assert figures[-1, 1] == pytest.approx(plain, rel=0.05)
    assert film(1)[-1, 1] > 1.2 * plain


# ---- The script -------------------------------------------------------------------------------


@pytest.fixture
def programs(tmp_path):
    """A folder with stand-ins for ffprobe and ffmpeg. The film that the latter writes is a folder
    with the dreamed frames."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "ffprobe").write_text("#!/bin/sh\necho 25/1\n")
    (folder / "ffmpeg").write_text('#!/bin/bash\nfor film; do :; done\ncp -r out "$film"\n')
    for program in folder.iterdir():
        program.chmod(0o755)
    return folder


def film(frames, programs, *options, dreamed=(), **environment):
    """The frames that video.sh makes of `frames`, arrays uint8 (H, W, 3) all; those that are there
    already are the files `dreamed`."""
    cwd = programs.parent
    work = cwd / "out.mp4.frames"
    (work / "in").mkdir(parents=True)
    (work / "out").mkdir()
    for number, frame in enumerate(frames, 1):
        Image.fromarray(frame).save(work / "in" / f"{number:06}.png")
    for path in dreamed:
        shutil.copy(path, work / "out")
    shutil.rmtree(cwd / "out.mp4", ignore_errors=True)
    environment["PATH"] = f"{programs}:{os.environ['PATH']}"
    run("video.sh", "in.mp4", "out.mp4", *FAST, *options, cwd=cwd, **environment)
    return [np.asarray(Image.open(path)) for path in sorted((cwd / "out.mp4").iterdir())]


@pytest.mark.timeout(300)
def test_flicker(programs):
    """Flicker is the mean difference between frames, with the motion undone. A dream that is
    carried along flickers much less than if every frame is dreamed separately, equally strongly, or
    if half of the previous dreamed frame is mixed in without moving it, as the script once did."""
    frames = [view(100 + 7 * i, 60 + 3 * i) for i in range(8)]
    carried = film(frames, programs)
    made = programs.parent / "out.mp4" / "000001.png"
    record, words = read_record(str(made))

    def dream(start):
        Image.fromarray(start).save(programs.parent / "start.png")
        more = ["--image=start.png", "--learning_rate=1.5", "--output=out.png"]
        assert run_cli(*words, *more, cwd=programs.parent).returncode == 0
        return np.asarray(Image.open(programs.parent / "out.png"))

    plain = [dream(frame) for frame in frames[4:]]
    blended = frames[3:4]
    for frame in frames[4:]:
        before = picture.match(Image.fromarray(blended[-1]), Image.fromarray(frame))
        blended.append(dream(np.uint8((np.float32(frame) + np.asarray(before)) / 2)))

    def flicker(pictures):
        pairs = zip(pictures[-4:], pictures[-3:])
        return np.mean([np.abs(np.float32(unmoved(b, 7, 3)) - moved(a, 7, 3)) for a, b in pairs])

    def strength(pictures):
        pairs = zip(pictures[-4:], frames[-4:])
        return np.mean(
            [flow.added(*pair, record["mean"], cnn_vis.CONTRAST).std() for pair in pairs]
        )

    assert strength(carried) > 0.9 * strength(plain)
    assert flicker(carried) < 0.7 * flicker(plain)
    assert flicker(carried) < 0.6 * flicker(blended)


def test_stopped_and_started_again(programs):
    """The frames are the same as if it had not been stopped."""
    frames = [view(100 + 7 * i, 60 + 3 * i) for i in range(3)]
    whole = film(frames, programs, "--num_steps=1")
    kept = shutil.copytree(programs.parent / "out.mp4", programs.parent / "kept")
    again = film(
        frames, programs, "--num_steps=1", dreamed=[kept / "000001.png", kept / "000002.png"]
    )
    assert len(again) == 3
    assert not np.array_equal(whole[2], whole[1])
    assert all(np.array_equal(*pair) for pair in zip(whole, again))


def test_without_opencv(programs):
    """What to install is told in one line, before anything is done."""
    python = programs / "python"
    python.write_text(
        f'#!/bin/sh\ncase $* in *cv2*) exit 1 ;; esac\nexec "{sys.executable}" "$@"\n'
    )
    python.chmod(0o755)
    environment = {"PATH": f"{programs}:{os.environ['PATH']}", "CNN_VIS_PYTHON": str(python)}
    said = run("video.sh", "in.mp4", "out.mp4", cwd=programs.parent, status=1, **environment)
    assert len(said.splitlines()) == 1
    assert said.endswith(f"{python} -m pip install -r {ROOT}/examples/requirements.txt\n")
    assert [path.name for path in programs.parent.iterdir()] == ["bin"]


# ---- Colours ----------------------------------------------------------------------------------

BARS = [
    (255, 0, 0),
    (0, 255, 0),
    (0, 0, 255),
    (200, 60, 60),
    (60, 160, 60),
    (128,) * 3,
    (220, 180, 150),
]
TAGS = "-colorspace {0} -color_primaries {0} -color_trc {0} -color_range tv"


def bars(height):
    """Vertical bars of plain colours, uint8 (height, 448, 3)."""
    return np.repeat(np.uint8(BARS)[None], 64, axis=1).repeat(height, axis=0)


def ffmpeg(*arguments):
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-loglevel", "error", "-y"]
    subprocess.run([*command, *map(str, arguments)], check=True)


def as_played(film):
    """(first frame of a film as players show it, uint8 (H, W, 3); the standard that it is tagged
    with, or "")."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-i", film]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stderr
    tag = re.search(r"Video:.*\((?:tv|pc), *([a-z0-9]+)", said)
    height = int(re.search(r"Video:.* \d+x(\d+)", said)[1])
    matrix = tag[1] if tag else "bt709" if height >= 720 else "smpte170m"
    convert = f"scale=in_color_matrix={matrix}:in_range=tv,format=rgb24"
    frame = film.with_suffix(".png")
    ffmpeg("-i", film, "-vf", convert, "-frames:v", 1, frame)
    return np.asarray(Image.open(frame)), tag[1] if tag else ""


@pytest.fixture
def real_ffmpeg(tmp_path):
    """The environment of a script with a real ffmpeg, an ffprobe that tells what the test writes
    to probe.txt, and a dream that leaves pictures as they are."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "ffmpeg").symlink_to(imageio_ffmpeg.get_ffmpeg_exe())
    (folder / "ffprobe").write_text(
        f"""#!/bin/sh
for word; do
    case $word in stream=*) sed -n "s/^${{word#*=}} //p" "{tmp_path}/probe.txt" ;; esac
done
"""
    )
    (folder / "dream.py").write_text(
        "import sys, cnn_vis\n"
        "from cnn_vis_lib.batch import make_folder_of, plan_batch\n"
        "from cnn_vis_lib.reading import read_picture\n"
        "from cnn_vis_lib.writing import write_picture\n"
        "options = cnn_vis.PARSER.parse_args(sys.argv[1:])\n"
        "for job in plan_batch(options)[0] or [options]:\n"
        "    make_folder_of(job.output_file)\n"
        "    write_picture(read_picture(job.initial_image)[0], job.output_file)\n"
    )
    (folder / "python").write_text(
        f"""#!/bin/sh
case $1 in */cnn_vis.py) shift; set -- "{folder}/dream.py" "$@" ;; esac
exec "{sys.executable}" "$@"
"""
    )
    for program in folder.iterdir():
        program.chmod(0o755)
    return {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "CNN_VIS_PYTHON": str(folder / "python"),
        "PYTHONPATH": str(ROOT),
    }


@pytest.mark.parametrize(
    ("height", "tag"), [(720, "bt709"), (720, ""), (480, "smpte170m"), (480, "")]
)
def test_a_film_keeps_its_colours(height, tag, real_ffmpeg, tmp_path):
    """Tagged or not; and its new film says what they are. A frame rate that the film does not tell
    is taken from another field."""
    Image.fromarray(bars(height)).save(tmp_path / "bars.png")
    standard = "bt709" if height >= 720 else "smpte170m"
    convert = ["-vf", f"scale=out_color_matrix={standard}:out_range=tv,format=yuv444p"]
    tags = TAGS.format(tag).split() if tag else []
    ffmpeg("-loop", 1, "-t", 0.2, "-i", tmp_path / "bars.png", *convert, *tags, tmp_path / "in.mp4")
    told = {"avg_frame_rate": "0/0", "r_frame_rate": "10/1", "height": height}
    told |= {"color_space": tag or "unknown", "color_transfer": tag or "unknown"}
    lines = "".join(f"{name} {value}\n" for name, value in told.items())
    (tmp_path / "probe.txt").write_text(lines)
    run("video.sh", "in.mp4", "out.mp4", cwd=tmp_path, **real_ffmpeg)
    seen, new_tag = as_played(tmp_path / "out.mp4")
    assert new_tag == standard
    middles = np.s_[10:-10, 32::64]
    assert np.abs(seen[middles].astype(int) - bars(height)[middles]).mean() < 4


@pytest.mark.parametrize("height", [720, 480])
def test_a_zoom_keeps_its_colours(height, real_ffmpeg, tmp_path):
    Image.fromarray(bars(height)).save(tmp_path / "bars.png")
    side = str(min(height, 448))
    run("zoom.sh", "bars.png", "2", cwd=tmp_path, SIDE=side, ZOOM="1", **real_ffmpeg)
    seen, tag = as_played(tmp_path / "bars_zoom.mp4")
    assert tag == ("bt709" if height >= 720 else "smpte170m")
    middles = np.s_[10:-10, 32::64]
    assert np.abs(seen[middles].astype(int) - bars(height)[middles]).mean() < 4


# ---- Scenes -----------------------------------------------------------------------------------


def scenes():
    """The frames of a film with scenes of 3, 1 and 2 frames."""
    import skimage.data

    first, last = photograph(), skimage.data.coffee()
    shown = [(first, 0), (first, 1), (first, 2), (255 - first, 0), (last, 0), (last, 1)]
    return [whole[60 + 3 * step :, 100 + 7 * step :][: SIZE[0], : SIZE[1]] for whole, step in shown]


def test_scenes_begin_at_cuts(tmp_path):
    for number, frame in enumerate(scenes()):
        Image.fromarray(frame).save(tmp_path / f"{number}.png")
    assert flow.plan(tmp_path) == [["0.png", "3.png", "4.png"], ["1.png", "5.png"], ["2.png"]]


def test_scenes_are_dreamed_at_the_same_time(programs):
    """As they are one after the other: each frame from the one before it, but not over a cut."""
    words = ["--num_steps=2", "--learning_rate=2"]
    alone = film(scenes(), programs, *words)
    together = film(scenes(), programs, *words, "--workers=3")
    assert len(together) == 6
    assert all(np.array_equal(*pair) for pair in zip(alone, together))
    separate = film(scenes(), programs, *words, BLEND="0")
    same = [np.array_equal(*pair) for pair in zip(alone, separate)]
    assert same == [True, False, False, True, True, False]


def test_without_carrying_frames_are_a_plain_batch(programs):
    film(scenes(), programs, "--num_steps=1", "--workers=2", BLEND="0.0")
    made = programs.parent / "out.mp4"
    for path in made.iterdir():
        assert f"in/{path.name}" in read_record(str(path))[0]["command"]
