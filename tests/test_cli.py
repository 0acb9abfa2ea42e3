"""The command line as a user meets it: real processes, exit status, stderr, files."""

import os
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import GOLDEN, ROOT, TINY, assert_one_line, cnn_vis, psnr
from PIL import Image

import cnn_vis as program

QUICK = [*TINY, "--layer=inception_a/output", "--num_steps=2"]


@pytest.fixture
def picture(tmp_path):
    return shutil.copy(GOLDEN / "input.png", tmp_path / "in.png")


def test_help_is_instant(tmp_path):
    times = []
    for _ in range(5):
        start = time.perf_counter()
        done = cnn_vis("--help", cwd=tmp_path)
        times.append(time.perf_counter() - start)
    assert done.returncode == 0
    assert min(times) < 0.3


def test_help_names_every_option_of_the_original(tmp_path):
    text = cnn_vis("--help", cwd=tmp_path).stdout
    names = """deploy_txt caffe_model batch_size mean_image gpu image_type target_layer layer target_neuron initial_image image
        initialization_scale initialization_blur initial_size final_size num_sizes resize_type learning_rate decay_rate
        learning_rate_decay_iter learning_rate_decay_fraction learning_rate_decay_factor num_steps use_pixel_learning_rates
        amplify_l1_weight l1_weight amplify_l2_weight l2_weight amplify_grad_clip grad_clip alpha p_scale p_reg alpha_aux
        p_scale_aux p_reg_aux beta tv_reg tv_reg_scale tv_reg_step tv_reg_step_iter tv_grad_operator output_file output
        output_iter iter_behavior show_width show_height rescale_image"""
    assert [name for name in names.split() if not re.search(rf"--{name}\s", text)] == []


def test_version(tmp_path):
    done = cnn_vis("--version", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"cnn_vis.py {program.__version__}\n")


def test_defaults_are_the_originals():
    o = program.build_parser().parse_args([])
    assert (o.batch_size, o.image_type, o.target_layer, o.target_neuron) == (None, "amplify_layer", "inception_4d/3x3_reduce", 0)
    assert (o.initialization_scale, o.initialization_blur, o.num_sizes, o.resize_type) == (1.0, 0.0, 1, "geometric")
    assert (o.learning_rate, o.decay_rate, o.learning_rate_decay_iter, o.learning_rate_decay_fraction) == (1.0, 0.95, 100, 1.0)
    assert (o.num_steps, o.use_pixel_learning_rates, o.rescale_image) == (1000, False, False)
    assert (o.amplify_l1_weight, o.amplify_l2_weight, o.amplify_grad_clip) == (1.0, 1.0, 5.0)
    assert (o.alpha, o.p_scale, o.p_reg, o.alpha_aux, o.p_scale_aux, o.p_reg_aux) == (6.0, 1.0, 1e-4, 6.0, 1.0, 0.0)
    assert (o.beta, o.tv_reg, o.tv_reg_scale, o.tv_reg_step, o.tv_reg_step_iter) == (2.0, 0.5, 1.0, 0.0, 50)
    assert (o.tv_grad_operator, o.output_file, o.output_iter, o.iter_behavior) == ("naive", "out.png", 50, {"save", "print"})
    assert (o.show_width, o.show_height, o.initial_image, o.initial_size, o.final_size) == (5, 5, None, None, None)


def test_other_names_and_dashes(picture, tmp_path):
    """The names of the original's README, and dashes, mean the same."""
    first = cnn_vis(*TINY, "--target_layer=inception_a/output", f"--initial_image={picture}", "--amplify_l1_weight=0.5",
                    "--learning_rate_decay_fraction=0.5", "--learning_rate_decay_iter=1", "--num_steps=3",
                    "--output_file=a.png", "--iter_behavior=none", cwd=tmp_path)  # fmt: skip
    second = cnn_vis(*TINY, "--layer", "inception_a/output", "--image", picture, "--l1-weight", "0.5",
                     "--learning-rate-decay-factor=0.5", "--learning-rate-decay-iter", "1", "--num-steps", "3",
                     "--output", "b.png", "--iter-behavior", "none", cwd=tmp_path)  # fmt: skip
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert psnr(tmp_path / "a.png", tmp_path / "b.png") == np.inf


def test_none_writes_only_the_picture(picture, tmp_path):
    done = cnn_vis(*QUICK, f"--image={picture}", "--iter_behavior=none", "--output_iter=1", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "")
    assert sorted(os.listdir(tmp_path)) == ["in.png", "out.png"]


def test_print_shows_figures(picture, tmp_path):
    done = cnn_vis(*QUICK, f"--image={picture}", "--iter_behavior=print", "--output_iter=1", cwd=tmp_path)
    assert done.stdout.count("objective") == 2
    assert sorted(os.listdir(tmp_path)) == ["in.png", "out.png"]


def test_a_line_tells_the_run_and_one_its_end(picture, tmp_path):
    done = cnn_vis(*QUICK, f"--image={picture}", "--iter_behavior=none", cwd=tmp_path)
    line, end = done.stderr.splitlines()
    for word in ("tiny_inception.caffemodel", "inception_a/output 18x16x16", "CPU", "60x90"):
        assert word in line
    assert re.fullmatch(r"out\.png: done in 00:0\d", end)


def test_seed_makes_noise_repeatable(tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        arguments = [*QUICK, f"--seed={seed}", "--initialization_scale=20", "--iter_behavior=none", f"--output={name}.png"]
        assert cnn_vis(*arguments, cwd=tmp_path).returncode == 0
    assert psnr(tmp_path / "a.png", tmp_path / "b.png") == np.inf
    assert psnr(tmp_path / "a.png", tmp_path / "c.png") < 30


@pytest.mark.parametrize("options", [["--workers=1"], ["--workers=3", "--batch_size=2"]])
def test_workers_change_nothing(options, picture, tmp_path):
    common = [*QUICK, f"--image={picture}", "--initial_size=100x130", "--iter_behavior=none"]
    assert cnn_vis(*common, "--output=a.png", cwd=tmp_path).returncode == 0
    assert cnn_vis(*common, *options, "--output=b.png", cwd=tmp_path).returncode == 0
    assert psnr(tmp_path / "a.png", tmp_path / "b.png") == np.inf


def test_input_layer_prototxt(picture, tmp_path):
    """The same network with an Input layer gives the same picture."""
    text = (GOLDEN / "deploy.prototxt").read_text()
    head, layers = text[: text.index("layer {")], text[text.index("layer {") :]
    assert "input_dim" in head
    new = 'layer { name: "data" type: "Input" top: "data" input_param { shape { dim: 10 dim: 3 dim: 32 dim: 32 } } }\n' + layers
    (tmp_path / "new.prototxt").write_text(new)
    common = [*QUICK, f"--image={picture}", "--iter_behavior=none"]
    assert cnn_vis(*common, "--output=a.png", cwd=tmp_path).returncode == 0
    assert cnn_vis(*common, "--deploy_txt=new.prototxt", "--output=b.png", cwd=tmp_path).returncode == 0
    assert psnr(tmp_path / "a.png", tmp_path / "b.png") == np.inf


def v1(text):
    """A prototxt in the older format, `layers` with enumerated types."""
    text = re.sub(r"param \{ lr_mult: \d \} ?", "", text).replace("layer {", "layers {")
    names = {"Convolution": "CONVOLUTION", "ReLU": "RELU", "Pooling": "POOLING", "Concat": "CONCAT",
             "InnerProduct": "INNER_PRODUCT", "Softmax": "SOFTMAX", "LRN": "LRN"}  # fmt: skip
    return re.sub(r'type: "(\w+)"', lambda match: f"type: {names[match[1]]}", text)


def two_readers(text):
    """A prototxt that computes the same of two layers that read the data."""
    extra = """layer { name: "zero" type: "Power" bottom: "data" top: "zero" power_param { scale: 0 } }
               layer { name: "sum" type: "Eltwise" bottom: "data" bottom: "zero" top: "sum" }"""
    head, layers = text.split("layer {", 1)
    return head + extra + "layer {" + layers.replace('bottom: "data"', 'bottom: "sum"', 1)


@pytest.mark.parametrize("change", [v1, two_readers])
def test_force_backward_gives_the_same(change, picture, tmp_path):
    """Where the net cannot be cut for speed, the slow way gives the same picture."""
    (tmp_path / "slow.prototxt").write_text(change((GOLDEN / "deploy.prototxt").read_text()))
    common = [*QUICK, f"--image={picture}", "--iter_behavior=none"]
    assert cnn_vis(*common, "--output=a.png", cwd=tmp_path).returncode == 0
    done = cnn_vis(*common, "--deploy_txt=slow.prototxt", "--output=b.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert psnr(tmp_path / "a.png", tmp_path / "b.png") == np.inf


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1", "LA", "CMYK"])
def test_kinds_of_pictures(mode, tmp_path):
    name = "in.tif" if mode == "CMYK" else "in.png"
    Image.open(GOLDEN / "input.png").convert("RGB").convert(mode).save(tmp_path / name)
    done = cnn_vis(*QUICK, f"--image={name}", "--iter_behavior=none", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "out.png").size == Image.open(GOLDEN / "input.png").size


def test_exif_orientation(tmp_path):
    image = Image.open(GOLDEN / "input.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    image.save(tmp_path / "in.jpg", exif=exif)
    assert cnn_vis(*QUICK, "--image=in.jpg", "--iter_behavior=none", cwd=tmp_path).returncode == 0
    assert Image.open(tmp_path / "out.png").size == image.size[::-1]


BAD = {
    "unknown option": (["--nonsense=1"], ["--nonsense"]),
    "not a number": (["--num_steps=many"], ["--num_steps", "many"]),
    "no steps": (["--num_steps=0"], ["--num_steps", "0", "at least 1"]),
    "nan": (["--tv_reg=nan"], ["--tv_reg", "nan", "finite"]),
    "infinity": (["--learning_rate=inf"], ["--learning_rate", "inf", "finite"]),
    "decay": (["--decay_rate=2"], ["--decay_rate", "2", "at most 1"]),
    "choice": (["--resize_type=cubic"], ["--resize_type", "cubic", "geometric"]),
    "behavior": (["--iter_behavior=save+dance"], ["--iter_behavior", "dance", "plot_pix"]),
    "layer": (["--layer=inception_a/outputs"], ["--layer", "inception_a/outputs", "inception_a/output"]),
    "in-place layer": (["--layer=inception_a/relu_1x1"], ["--layer", "inception_a/relu_1x1", "inception_a/1x1"]),
    "data": (["--layer=data"], ["--layer", "data"]),
    "neuron": (["--image_type=amplify_neuron", "--target_neuron=18"], ["--target_neuron", "18", "18 channels"]),
    "no picture": (["--image=none.png"], ["--image", "none.png"]),
    "picture is a folder": (["--image=."], ["--image"]),
    "not a picture": ([f"--image={GOLDEN}/cases.json"], ["--image", "cases.json"]),
    "no weights": (["--caffe_model=none.caffemodel"], ["--caffe_model", "none.caffemodel", "no such file"]),
    "not weights": ([f"--caffe_model={GOLDEN}/input.png"], ["--caffe_model", "input.png"]),
    "not a prototxt": ([f"--deploy_txt={GOLDEN}/cases.json"], ["--deploy_txt", "cases.json"]),
    "binary prototxt": ([f"--deploy_txt={GOLDEN}/input.png"], ["--deploy_txt", "input.png"]),
    "not a mean": ([f"--mean_image={GOLDEN}/cases.json"], ["--mean_image", "cases.json"]),
    "size": (["--initial_size=big"], ["--initial_size", "big", "HxW"]),
    "size without height": (["--initial_size=x"], ["--initial_size", "x"]),
    "negative size": (["--initial_size=x-1"], ["--initial_size", "x-1"]),
    "too low": (["--initial_size=31x90"], ["--initial_size", "31x90", "32x32"]),
    "too narrow": (["--initial_size=90x31"], ["--initial_size", "90x31", "32x32"]),
    "final too small": (["--num_sizes=2", "--final_size=8x8"], ["--final_size", "8x8"]),
    "output folder": (["--output=none/out.png"], ["--output", "none/out.png", "folder"]),
    "output format": (["--output=out.xyz"], ["--output", "out.xyz", ".png"]),
    "no such gpu": (["--gpu=99"], ["--gpu", "99"]),
    "gpus": (["--gpu=0,0"], ["--gpu", "0,0"]),
    "not a gpu": (["--gpu=fast"], ["--gpu", "fast"]),
    "model": (["--model=alexnet"], ["--model", "alexnet", "bvlc_googlenet"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_requests(case, picture, tmp_path):
    """Exit status 2 and one line with the option, the value and a remedy; nothing written."""
    arguments, words = BAD[case]
    done = cnn_vis(*QUICK, f"--image={picture}", *arguments, cwd=tmp_path)
    assert_one_line(done, 2, *words)
    assert os.listdir(tmp_path) == ["in.png"]


def test_missing_network_names_the_places(tmp_path):
    done = cnn_vis("--model=bvlc_googlenet", "--gpu=-1", cwd=tmp_path, CNN_VIS_MODELS=str(tmp_path), CAFFE_ROOT="/nowhere")
    assert_one_line(done, 2, "bvlc_googlenet", "/nowhere/models/bvlc_googlenet/bvlc_googlenet.caffemodel", str(tmp_path))


def test_caffe_root_wins(picture, tmp_path):
    """Files in $CAFFE_ROOT are used under the names that the original looks for."""
    folder = tmp_path / "caffe" / "models" / "bvlc_googlenet"
    folder.mkdir(parents=True)
    shutil.copy(GOLDEN / "deploy.prototxt", folder)
    shutil.copy(GOLDEN / "tiny_inception.caffemodel", folder / "bvlc_googlenet.caffemodel")
    mean = tmp_path / "caffe" / "python" / "caffe" / "imagenet"
    mean.mkdir(parents=True)
    shutil.copy(GOLDEN / "mean.npy", mean / "ilsvrc_2012_mean.npy")
    common = ["--layer=inception_a/output", "--num_steps=2", f"--image={picture}", "--iter_behavior=none", "--gpu=-1"]
    done = cnn_vis(*common, "--output=a.png", cwd=tmp_path, CAFFE_ROOT=str(tmp_path / "caffe"))
    assert done.returncode == 0, done.stderr
    assert cnn_vis(*common, *TINY, "--output=b.png", cwd=tmp_path).returncode == 0
    assert psnr(tmp_path / "a.png", tmp_path / "b.png") == np.inf


def test_a_caffe_abort_is_one_line(picture, tmp_path):
    """Caffe ends its process where weights do not fit; the program says why in one line."""
    text = (GOLDEN / "deploy.prototxt").read_text().replace("num_output: 12", "num_output: 10")
    (tmp_path / "other.prototxt").write_text(text)
    done = cnn_vis(*QUICK, f"--image={picture}", "--deploy_txt=other.prototxt", cwd=tmp_path)
    assert_one_line(done, 1, "shape mismatch")


def test_show_without_a_display(picture, tmp_path):
    """What would be shown goes to files."""
    screenless = {"DISPLAY": None, "WAYLAND_DISPLAY": None}
    options = ["--iter_behavior=show+plot_pix", "--output_iter=1"]
    done = cnn_vis(*QUICK, f"--image={picture}", *options, cwd=tmp_path, **screenless)
    assert done.returncode == 0, done.stderr
    for name in ("out_show.png", "out_plot_pix.png"):
        assert name in done.stderr
        Image.open(tmp_path / name).verify()


def test_import_needs_no_caffe(tmp_path):
    """`import cnn_vis` loads neither Caffe nor anything slow."""
    code = "import sys, cnn_vis; print([m for m in ('caffe', 'scipy', 'skimage', 'matplotlib', 'PIL') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n"
