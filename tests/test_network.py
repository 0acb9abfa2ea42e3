"""Reading, judging, cutting and running a network."""

import dataclasses
import os
import random
import re

import numpy as np
import pytest
from conftest import GOLDEN, ONE, QUICK, ROOT, TINY, Ascent, assert_one_line, mutated, psnr, run_cli

import cnn_vis
from cnn_vis_lib.description import Description
from cnn_vis_lib.errors import OutOfMemory
from cnn_vis_lib.models import MODELS, NetworkFiles, read_mean
from cnn_vis_lib.network import NetworkSpec, layer_shapes, structure_error
from cnn_vis_lib.processes import CaffeProcesses, CaffeStopped
from cnn_vis_lib.prototxt import caffe_net, import_caffe, parse_prototxt
from cnn_vis_lib.terminal import printable
from cnn_vis_lib.workers import describe

MINI = ROOT / "models" / "googlenet_mini" / "googlenet_mini.caffemodel"


@pytest.mark.parametrize(
    ("target", "objective"),
    [
        ("inception_a/output", cnn_vis.AmplifyLayer(clip=1e9)),
        ("inception_a/output", cnn_vis.AmplifyNeuron(9)),
        ("classifier", cnn_vis.AmplifyLayer(clip=1e9)),
        ("pool1/norm1", cnn_vis.AmplifyLayer(clip=1e9)),
    ],
)
def test_the_gradient_through_caffe_is_the_slope(target, objective):
    """From the picture through a real net: slopes of the objective, in single precision."""
    files = NetworkFiles(f"{GOLDEN}/deploy.prototxt", f"{GOLDEN}/tiny_inception.caffemodel")
    network = Ascent(files, cnn_vis.Target(target, objective))
    random = np.random.default_rng(5)
    batch = random.normal(0, 60, (2, 3, 32, 32)).astype(np.float32)
    gradient = network.gradients(batch)[0].copy()
    for _ in range(4):
        direction = random.normal(size=batch.shape).astype(np.float32)
        h = 0.02
        up, down = (sum(network.gradients(batch + sign * h * direction)[1]) for sign in (1, -1))
        expected = float((gradient.astype(float) * direction).sum())
        assert (up - down) / (2 * h) == pytest.approx(
            expected, rel=0.02, abs=2e-3 * float(np.abs(gradient * direction).sum())
        )


def test_a_prototxt_with_an_input_layer_gives_the_same(picture, tmp_path):
    """The same network with an Input layer gives the same picture."""
    text = (GOLDEN / "deploy.prototxt").read_text()
    head, layers = text[: text.index("layer {")], text[text.index("layer {") :]
    assert "input_dim" in head
    new = (
        'layer { name: "data" type: "Input" top: "data" '
        "input_param { shape { dim: 10 dim: 3 dim: 32 dim: 32 } } }\n" + layers
    )
    (tmp_path / "new.prototxt").write_text(new)
    common = [*QUICK, f"--image={picture}", "--iter_behavior=none"]
    assert run_cli(*common, "--output=a.png", cwd=tmp_path).returncode == 0
    assert (
        run_cli(*common, "--deploy_txt=new.prototxt", "--output=b.png", cwd=tmp_path).returncode
        == 0
    )
    assert psnr(tmp_path / "a.png", tmp_path / "b.png") == np.inf


def v1(text):
    """A prototxt in the older format, `layers` with enumerated types."""
    text = re.sub(r"param \{ lr_mult: \d \} ?", "", text).replace("layer {", "layers {")
    names = {
        "Convolution": "CONVOLUTION",
        "ReLU": "RELU",
        "Pooling": "POOLING",
        "Concat": "CONCAT",
        "InnerProduct": "INNER_PRODUCT",
        "Softmax": "SOFTMAX",
        "LRN": "LRN",
    }
    return re.sub(r'type: "(\w+)"', lambda match: f"type: {names[match[1]]}", text)


def two_readers(text):
    """A prototxt that computes the same of two layers that read the data."""
    extra = """layer { name: "zero" type: "Power" bottom: "data" top: "zero"
                       power_param { scale: 0 } }
               layer { name: "sum" type: "Eltwise" bottom: "data" bottom: "zero" top: "sum" }"""
    head, layers = text.split("layer {", 1)
    return head + extra + "layer {" + layers.replace('bottom: "data"', 'bottom: "sum"', 1)


@pytest.mark.parametrize("change", [v1, two_readers])
def test_force_backward_gives_the_same(change, picture, tmp_path):
    """Where the net cannot be cut for speed, the slow way gives the same picture."""
    (tmp_path / "slow.prototxt").write_text(change((GOLDEN / "deploy.prototxt").read_text()))
    common = [*QUICK, f"--image={picture}", "--iter_behavior=none"]
    assert run_cli(*common, "--output=a.png", cwd=tmp_path).returncode == 0
    done = run_cli(*common, "--deploy_txt=slow.prototxt", "--output=b.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert psnr(tmp_path / "a.png", tmp_path / "b.png") == np.inf


def test_a_caffe_abort_is_one_line(picture, tmp_path):
    """Caffe ends its process where weights do not fit; the program says why in one line."""
    text = (GOLDEN / "deploy.prototxt").read_text().replace("kernel_size: 5", "stride_h: 5", 1)
    (tmp_path / "other.prototxt").write_text(text)
    done = run_cli(*QUICK, f"--image={picture}", "--deploy_txt=other.prototxt", cwd=tmp_path)
    assert_one_line(done, 1, "Caffe stopped", "other.prototxt", "tiny_inception.caffemodel")


def test_weights_of_other_shapes_are_named(tmp_path):
    text = (GOLDEN / "deploy.prototxt").read_text().replace("num_output: 12", "num_output: 10")
    (tmp_path / "other.prototxt").write_text(text)
    done = run_cli(*ONE, "--deploy_txt=other.prototxt", cwd=tmp_path)
    assert_one_line(done, 2, "--caffe_model", "conv1/5x5_s2", "12x3x5x5", "10x3x5x5")


def test_listed_layers_are_those_that_can_be_targeted(tmp_path):
    """Every GoogLeNet layer that can be targeted, in order, with its shape; and of any prototxt."""
    listed = run_cli("--list_layers", "--model=googlenet_mini", cwd=tmp_path).stdout.splitlines()
    assert listed[0].split() == ["conv1/7x7_s2", "64x112x112"]
    assert "inception_4c/output 276x14x14" in {" ".join(line.split()) for line in listed}
    tiny = run_cli(
        "--list_layers", f"--deploy_txt={GOLDEN}/deploy.prototxt", cwd=tmp_path
    ).stdout.splitlines()
    assert [line.split()[0] for line in tiny][-3:] == ["pool2/2x2_s2", "classifier", "prob"]
    assert not any("relu" in line for line in tiny)


def test_every_listed_layer_can_be_amplified():
    """Backward from each layer of the small network reaches the picture."""
    deploy = MODELS["googlenet_mini"].find_deploy()
    batch = np.random.default_rng(0).normal(0, 50, (1, 3, 224, 224)).astype(np.float32)
    files = NetworkFiles(deploy, str(MINI))
    names = [name for name, *_ in layer_shapes(files)[0]]
    for name in names[::7] + names[-1:]:
        gradient, (loss,) = Ascent(files, cnn_vis.Target(name)).gradients(batch)
        assert np.isfinite(gradient).all()
        assert np.abs(gradient).max() > 0, name
        assert loss < 0


@pytest.mark.parametrize("classes", [1, 7])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("legacy", [True, False])
def test_the_classifier_has_the_width_of_the_weights(classes, bias, legacy, tmp_path):
    """The width is that of the weights: in the older format of shapes too, where there is no bias,
    and for one class."""
    import_caffe()
    from caffe.proto import caffe_pb2

    text = (GOLDEN / "deploy.prototxt").read_text()
    if not bias:
        text = re.sub(r"param { lr_mult: 2 } (inner_product_param {)", r"\1 bias_term: false", text)
    (tmp_path / "deploy.prototxt").write_text(text)
    net = Description(str(tmp_path / "deploy.prototxt")).net
    (layer,) = (layer for layer in net.layer if layer.type == "InnerProduct")
    layer.inner_product_param.num_output = classes
    caffe_net(net).save(str(tmp_path / "new.caffemodel"))
    weights = caffe_pb2.NetParameter.FromString((tmp_path / "new.caffemodel").read_bytes())
    for blob in (blob for layer in weights.layer for blob in layer.blobs if legacy):
        blob.num, blob.channels, blob.height, blob.width = [1] * (4 - len(blob.shape.dim)) + list(
            blob.shape.dim
        )
        blob.ClearField("shape")
    (tmp_path / "new.caffemodel").write_bytes(weights.SerializeToString())
    files = (str(tmp_path / "deploy.prototxt"), str(tmp_path / "new.caffemodel"))
    assert structure_error(*files) is None
    layers, *_ = layer_shapes(NetworkFiles(*files, fit_classifier=True))
    assert (layer.name, (classes,), layer.name) in layers


def test_layers_of_training_and_single_numbers_are_refused(tmp_path):
    text = (GOLDEN / "deploy.prototxt").read_text()
    for name, kind, more in (
        ("drop", "Dropout", "include { phase: TRAIN }"),
        ("stage", "Power", 'include { stage: "deploy" }'),
        ("sums", "Reduction", "reduction_param { axis: 1 }"),
        ("sum", "Reduction", ""),
    ):
        text += (
            f'layer {{ name: "{name}" type: "{kind}" bottom: "classifier" top: "{name}" {more} }}\n'
        )
    (tmp_path / "more.prototxt").write_text(text)
    done = run_cli("--deploy_txt=more.prototxt", "--list_layers", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert not {"drop", "stage", "sums", "sum"} & {
        line.split()[0] for line in done.stdout.splitlines()
    }
    for layer, words in (
        ("drop", "no such layer"),
        ("stage", "no such layer"),
        ("sums", "channels"),
        ("sum", "channels"),
    ):
        for neuron in ([], ["--image_type=amplify_neuron"]):
            done = run_cli(
                *ONE, "--deploy_txt=more.prototxt", f"--layer={layer}", *neuron, cwd=tmp_path
            )
            assert_one_line(done, 2, f"--layer {layer}", words)


def test_a_layer_without_gradient_is_refused(tmp_path):
    text = (GOLDEN / "deploy.prototxt").read_text()
    text += 'layer { name: "best" type: "ArgMax" bottom: "classifier" top: "best" }\n'
    text += 'layer { name: "apart" type: "DummyData" top: "dummy" '
    text += "dummy_data_param { shape { dim: 1 dim: 3 } } }\n"
    text += 'layer { name: "lonely" type: "Power" bottom: "dummy" top: "lonely" }\n'
    (tmp_path / "more.prototxt").write_text(text)
    for layer, words in (("best", "cannot compute a gradient"), ("lonely", "does not depend")):
        done = run_cli(
            *TINY,
            "--deploy_txt=more.prototxt",
            f"--layer={layer}",
            f"--image={GOLDEN}/input.png",
            cwd=tmp_path,
        )
        assert_one_line(done, 2, "--layer", layer, words)


@pytest.mark.parametrize("kind", ["deploy", "weights"])
def test_damaged_networks_are_loaded_or_refused_in_one_line(kind, tmp_path):
    """Two hundred broken prototxts and caffemodels each: loaded and tried, or refused in one
    line."""
    files = {"deploy": GOLDEN / "deploy.prototxt", "weights": GOLDEN / "tiny_inception.caffemodel"}
    data, randomly, outcomes = files[kind].read_bytes(), random.Random(kind), []
    with CaffeProcesses() as processes:
        for number in range(200):
            path = tmp_path / str(number)
            path.write_bytes(mutated(data, randomly))
            given = {name: str(path if name == kind else file) for name, file in files.items()}
            network = NetworkFiles(**given, fit_classifier=bool(number % 2))
            objective = cnn_vis.Objective((cnn_vis.Target("inception_a/output"),))
            spec = NetworkSpec(network, objective.layers())
            try:
                processes.call(describe, spec, objective)
                outcomes.append("loaded")
            except cnn_vis.BadRequest as error:
                assert len(printable(str(error)).splitlines()) == 1, error
                outcomes.append("refused")
            except (CaffeStopped, OutOfMemory) as error:
                assert len(printable(str(error)).splitlines()) == 1, error
                outcomes.append("stopped")
                processes.start()
    assert len(set(outcomes)) >= 2, outcomes


def test_a_network_that_asks_for_all_memory_is_one_line(tmp_path):
    text = (
        (GOLDEN / "deploy.prototxt")
        .read_text()
        .replace("num_output: 12", "num_output: 2000000000", 1)
    )
    (tmp_path / "huge.prototxt").write_text(text)
    done = run_cli(
        *TINY,
        "--deploy_txt=huge.prototxt",
        "--layer=inception_a/output",
        f"--image={GOLDEN}/input.png",
        cwd=tmp_path,
    )
    assert_one_line(done, 1, "Caffe stopped")


def test_a_network_of_more_than_512_mb_is_read(tmp_path):
    """As VGG's 553 MB are; Caffe's master would refuse it."""
    text = (GOLDEN / "deploy.prototxt").read_text()
    text += 'layer { name: "large" type: "InnerProduct" bottom: "data" top: "large" '
    text += "inner_product_param { num_output: 44000 } }\n"
    (tmp_path / "large.prototxt").write_text(text)
    net = caffe_net(Description(str(tmp_path / "large.prototxt")).net)
    net.copy_from(f"{GOLDEN}/tiny_inception.caffemodel")
    net.save(str(tmp_path / "large.caffemodel"))
    del net
    assert os.path.getsize(tmp_path / "large.caffemodel") > 1 << 29
    files = ["--deploy_txt=large.prototxt", "--caffe_model=large.caffemodel"]
    done = run_cli(*ONE, *files, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    os.remove(tmp_path / "large.caffemodel")


def changed_weights(change, tmp_path):
    """Writes the tiny network's weights, edited by change({layer name: layer}); returns the option
    for the file."""
    import_caffe()
    from caffe.proto import caffe_pb2

    net = caffe_pb2.NetParameter.FromString((GOLDEN / "tiny_inception.caffemodel").read_bytes())
    change({layer.name: layer for layer in net.layer})
    (tmp_path / "changed.caffemodel").write_bytes(net.SerializeToString())
    return "--caffe_model=changed.caffemodel"


def test_missing_weights_are_named(tmp_path):
    """Those of layers that are needed; a layer behind the target may lack its own."""
    option = changed_weights(lambda layers: setattr(layers["conv1/5x5_s2"], "name", "x"), tmp_path)
    done = run_cli(*ONE, option, cwd=tmp_path)
    assert_one_line(
        done, 2, "--caffe_model", "changed.caffemodel", "conv1/5x5_s2", "deploy.prototxt"
    )
    option = changed_weights(lambda layers: layers["classifier"].ClearField("blobs"), tmp_path)
    assert run_cli(*ONE, option, cwd=tmp_path).returncode == 0
    done = run_cli(*ONE, option, "--layer=classifier", cwd=tmp_path)
    assert_one_line(done, 2, "--caffe_model", "classifier")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_numbers_are_named(value, tmp_path):
    def change(layers):
        layers["conv1/5x5_s2"].blobs[0].data[3] = value

    done = run_cli(*ONE, changed_weights(change, tmp_path), cwd=tmp_path)
    assert_one_line(done, 2, "--caffe_model", "conv1/5x5_s2", "finite")


def test_empty_statistics_of_batch_normalization_are_told(tmp_path):
    text = (GOLDEN / "deploy.prototxt").read_text()
    text += 'layer { name: "bn" type: "BatchNorm" bottom: "classifier" top: "bn" }\n'
    (tmp_path / "bn.prototxt").write_text(text)
    net = caffe_net(Description(str(tmp_path / "bn.prototxt")).net)
    net.copy_from(f"{GOLDEN}/tiny_inception.caffemodel")
    for factor in (0, 1):
        net.params["bn"][2].data[...] = factor
        net.save(str(tmp_path / "bn.caffemodel"))
        words = ["--deploy_txt=bn.prototxt", "--caffe_model=bn.caffemodel", "--layer=bn"]
        done = run_cli(*TINY, *words, "--num_steps=1", "--iter_behavior=none", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert ("bn: BatchNorm without statistics" in done.stderr) == (factor == 0)


@pytest.mark.parametrize(
    "comment",
    ["注释".encode("gbk"), "é".encode("latin-1"), "é".encode()],
    ids=["gbk", "latin1", "utf8"],
)
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["", "byte-order mark"])
def test_prototxts_may_have_comments_in_any_encoding(comment, mark, tmp_path):
    text = (GOLDEN / "deploy.prototxt").read_bytes()
    (tmp_path / "odd.prototxt").write_bytes(mark + b"# " + comment + b"\n" + text)
    net = parse_prototxt(str(tmp_path / "odd.prototxt"))
    assert net == parse_prototxt(f"{GOLDEN}/deploy.prototxt")


FOREIGN = {
    "PyTorch": (b"PK\3\4" + bytes(90), "another program's weights"),
    "old PyTorch": (b"\x80\2\x8a\x0a" + bytes(90), "another program's weights"),
    "LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(100), "HDF5"),
    "web page": (b"\n<!DOCTYPE html><html></html>", "web page"),
    "half a download": ((GOLDEN / "tiny_inception.caffemodel").read_bytes()[:9000], "cut short"),
    "empty file": (b"", "no weights"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_not_weights_is_named(kind, tmp_path):
    data, words = FOREIGN[kind]
    (tmp_path / "no.caffemodel").write_bytes(data)
    done = run_cli(*ONE, "--caffe_model=no.caffemodel", cwd=tmp_path)
    assert_one_line(done, 2, "--caffe_model", "no.caffemodel", words)


def test_a_mean_image_may_be_a_binaryproto(tmp_path):
    import_caffe()
    from caffe.proto import caffe_pb2

    mean = np.load(GOLDEN / "mean.npy")
    blob = caffe_pb2.BlobProto(data=mean.ravel().tolist())
    (tmp_path / "mean.binaryproto").write_bytes(blob.SerializeToString())
    found = read_mean(str(tmp_path / "mean.binaryproto"))
    assert found == pytest.approx(read_mean(f"{GOLDEN}/mean.npy"), rel=1e-6)
    (tmp_path / "bad.binaryproto").write_bytes(b"nonsense")
    done = run_cli(*ONE, "--mean_image=bad.binaryproto", cwd=tmp_path)
    assert_one_line(done, 2, "--mean_image", "bad.binaryproto")


def test_layers_that_this_caffe_lacks_are_told(tmp_path):
    """They only matter before the target, but --list_layers reports all of them."""
    text = (GOLDEN / "deploy.prototxt").read_text()
    text += 'layer { name: "norm" type: "Normalize" bottom: "classifier" top: "norm" }\n'
    text += 'layer { name: "after" type: "ReLU" bottom: "norm" top: "after" }\n'
    text += 'layer { name: "python" type: "Python" bottom: "classifier" top: "python" }\n'
    text = text.replace("convolution_param {", "convolution_param { engine: CUDNN", 1)
    (tmp_path / "more.prototxt").write_text(text)
    option = "--deploy_txt=more.prototxt"
    done = run_cli("--list_layers", option, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    listed = [line.split()[0] for line in done.stdout.splitlines()]
    plain = run_cli("--list_layers", TINY[0], cwd=tmp_path)
    assert listed == [line.split()[0] for line in plain.stdout.splitlines()]
    for words in ("norm is a Normalize layer", "python is a Python layer"):
        assert words in done.stderr
    done = run_cli(*ONE, option, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_weights_may_begin_as_markup_does(tmp_path):
    """With a name of 60 letters a caffemodel begins with a newline and <."""
    option = changed_weights(lambda layers: None, tmp_path)
    from caffe.proto import caffe_pb2

    path = tmp_path / "changed.caffemodel"
    net = caffe_pb2.NetParameter.FromString(path.read_bytes())
    net.name = "a" * 60
    path.write_bytes(net.SerializeToString())
    assert path.read_bytes().startswith(b"\n<")
    assert run_cli(*ONE, option, cwd=tmp_path).returncode == 0


OF_OTHER_PROGRAMS = {  # as these programs begin their files; a GraphDef begins as a caffemodel does
    "net.pb": (b"\x0a\x14\x0a\x04data\x12\x0bPlaceholder1", "TensorFlow"),
    "net.pth": (b"\x80\2\x8a\x0al\xfc\x9c\x46\xf9 j\xa8P\x19.", "PyTorch"),
    "net.onnx": (b"\x08\x07\x12\x07pytorch\x1a\x051.7.1", "ONNX"),
}


@pytest.mark.parametrize("name", OF_OTHER_PROGRAMS)
def test_other_programs_weights_are_told_as_such(name, tmp_path):
    data, program = OF_OTHER_PROGRAMS[name]
    (tmp_path / name).write_bytes(data)
    done = run_cli(*ONE, f"--caffe_model={name}", cwd=tmp_path)
    assert_one_line(done, 2, "--caffe_model", name, program, ".caffemodel")
    assert "cut short" not in done.stderr


def test_the_gradient_of_a_scaled_input_is_the_slope():
    """As without a scale, of the pixels: the network sees the tile times the scale."""
    files = NetworkFiles(f"{GOLDEN}/deploy.prototxt", f"{GOLDEN}/tiny_inception.caffemodel")
    form = cnn_vis.AmplifyLayer(clip=1e9)
    plain, scaled = (
        Ascent(dataclasses.replace(files, scale=scale), cnn_vis.Target("inception_a/output", form))
        for scale in (1.0, 0.25)
    )
    batch = np.random.default_rng(5).normal(0, 60, (2, 3, 32, 32)).astype(np.float32)
    expected, losses = plain.gradients(batch / 4)
    expected = expected / 4
    gradient, scaled_losses = scaled.gradients(batch)
    assert gradient == pytest.approx(expected, rel=1e-6)
    assert scaled_losses == pytest.approx(losses)
