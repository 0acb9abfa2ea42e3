"""Networks of every kind that people bring: what can be amplified in them, and what is said of the
rest."""

import itertools
import signal

import numpy as np
import pytest
from conftest import (
    CHECKPOINT,
    GOLDEN,
    ONE,
    TINY,
    Ascent,
    assert_one_line,
    pixels,
    run_cli,
    under_way,
)
from PIL import Image

import cnn_vis
from cnn_vis_lib.description import Description
from cnn_vis_lib.models import NetworkFiles
from cnn_vis_lib.prototxt import caffe_net, parse_prototxt


def random_weights(path):
    """Writes weights for the prototxt `path`, drawn by its fillers, beside it; returns the options
    that name both."""
    net = caffe_net(Description(str(path)).net)
    for name, blobs in net.params.items():
        if name.startswith("bn"):
            blobs[1].data[...] = blobs[2].data[...] = 1  # variance, and the factor of both
    net.save(str(path.with_suffix(".caffemodel")))
    return [f"--deploy_txt={path}", f"--caffe_model={path.with_suffix('.caffemodel')}", TINY[2]]


def layer(name, kind, bottom, top, more=""):
    bottoms = " ".join(f'bottom: "{blob}"' for blob in bottom.split())
    return f'layer {{ name: "{name}" type: "{kind}" {bottoms} top: "{top}" {more} }}\n'


def conv(name, bottom, top, more="pad: 1 kernel_size: 3"):
    more = f'num_output: 8 {more} weight_filler {{ type: "msra" }}'
    return layer(name, "Convolution", bottom, top, f"convolution_param {{ {more} }}")


def flat(name, bottom):
    more = 'num_output: 4 weight_filler { type: "xavier" }'
    return layer(name, "InnerProduct", bottom, name, f"inner_product_param {{ {more} }}")


def shaped(*sides):
    return "shape {" + " ".join(f"dim: {side}" for side in sides) + "}" if sides else ""


def given_input(name, *sides):
    more = f"input_param {{ {shaped(*sides)} }}"
    return f'layer {{ name: "{name}" type: "Input" top: "{name}" {more} }}\n'


def in_place(name, blob):
    return layer(name, "ReLU", blob, blob)


def written(tmp_path, text, name="net"):
    (tmp_path / f"{name}.prototxt").write_text(text)
    return tmp_path / f"{name}.prototxt"


DREAM = [
    "--gpu=-1",
    "--num_steps=2",
    "--seed=3",
    "--initialization_scale=20",
    "--iter_behavior=none",
]


def dreams(tmp_path, *options):
    """The pixels of a short dream of noise, 48x48."""
    done = run_cli(*DREAM, "--initial_size=48x48", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    return pixels(tmp_path / "out.png")


def test_both_a_blobs_name_and_its_layers_can_be_given(tmp_path):
    """The pixels are the same as from this network with names that agree."""
    text = given_input("data", 1, 3, 32, 32) + conv("conv1_new", "data", "conv1")
    text += in_place("relu1", "conv1") + conv("conv2_new", "conv1", "conv2")
    text += layer("relu2", "ReLU", "conv2", "act2")
    files = random_weights(written(tmp_path, text))
    listed = run_cli("--list_layers", files[0], cwd=tmp_path).stdout.splitlines()
    assert [line.split() for line in listed] == [
        ["conv1", "8x32x32", "(layer", "conv1_new)"],
        ["conv2", "8x32x32", "(layer", "conv2_new)"],
        ["act2", "8x32x32", "(layer", "relu2)"],
    ]
    path = written(tmp_path, text.replace("_new", "").replace("act2", "relu2"), "agreed")
    agreed = random_weights(path)
    net, new = (caffe_net(Description(f[0][13:]).net) for f in (agreed, files))
    new.copy_from(str(tmp_path / "net.caffemodel"))
    for name, blobs in net.params.items():
        for blob, other in zip(blobs, new.params[f"{name}_new"]):
            blob.data[...] = other.data
    net.save(str(tmp_path / "agreed.caffemodel"))
    for name, names in {"conv1": ["conv1", "conv1_new"], "relu2": ["act2", "relu2"]}.items():
        expected = dreams(tmp_path, *agreed, f"--layer={name}")
        for other in names:
            assert np.array_equal(dreams(tmp_path, *files, f"--layer={other}"), expected)


def test_a_mistyped_layer_is_found(tmp_path):
    """Case and punctuation are ignored; an in-place layer is found by its blob, and part of a name
    finds the last layer that contains it."""
    names = {
        "Inception_A_Output": "inception_a/output",
        "conv1/relu": "conv1/5x5_s2",
        "conv1_relu": "conv1/5x5_s2",
        "inception_a": "inception_a/output",
        "inseption_a/output": "inception_a/output",
        "data": "the input",
        "zzz": "--list_layers",
    }
    for name, words in names.items():
        done = run_cli(*ONE, f"--layer={name}", cwd=tmp_path)
        assert_one_line(done, 2, f"--layer {name}", words)


def test_the_picture_goes_to_the_input_that_the_target_depends_on(tmp_path):
    text = given_input("left", 1, 3, 32, 32) + given_input("right", 1, 3, 24, 40)
    text += given_input("im_info", 1, 3, 1, 1) + given_input("rows", 1, 5)
    text += conv("a", "left", "a") + conv("b", "right", "b") + flat("c", "a") + flat("d", "b")
    text += flat("info", "im_info") + flat("row", "rows") + layer("sum", "Concat", "c d", "sum")
    files = random_weights(written(tmp_path, text))
    listed = run_cli("--list_layers", files[0], cwd=tmp_path)
    assert [line.split()[0] for line in listed.stdout.splitlines()] == ["a", "b", "c", "d"]
    assert "sum depends on 2 inputs, left and right" in listed.stderr
    assert "info depends on im_info alone" in listed.stderr
    for name in ("a", "b"):
        dreams(tmp_path, *files, f"--layer={name}")
    for name, words in (
        ("sum", "left and right"),
        ("info", "3x1x1"),
        ("row", "takes no pictures"),
    ):
        done = run_cli(*DREAM, *files, f"--layer={name}", cwd=tmp_path)
        assert_one_line(done, 2, f"--layer {name}", words)


DATA = {  # a data layer: the (height, width) of its pictures, None if it does not tell
    'type: "Data" transform_param { crop_size: 32 } data_param { source: "x" }': (32, 32),
    'type: "Data" data_param { source: "x" batch_size: 9 }': None,
    'type: "MemoryData" memory_data_param { channels: 3 height: 24 width: 40 }': (24, 40),
    'type: "ImageData" image_data_param { new_height: 24 new_width: 40 }': (24, 40),
    'type: "HDF5Data" hdf5_data_param { source: "x" }': None,
    f'type: "DummyData" dummy_data_param {{ {shaped(9, 3, 24, 40)} {shaped(9)} }}': (24, 40),
    'type: "DummyData" dummy_data_param { num: 9 channels: 3 height: 24 width: 40 }': (24, 40),
    'type: "AnnotatedData" transform_param { crop_size: 32 } annotated_data_param {}': (32, 32),
    'type: "Python" python_param { module: "m" layer: "l" }': None,
}


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("phases", [("TEST",), ("TRAIN",), ("TRAIN", "TEST"), ()])
def test_a_training_prototxt_is_dreamed_on_or_named(data, phases, tmp_path):
    """If its data layer gives the pictures' size, it becomes an input; otherwise one line asks for
    the deploy.prototxt, or for --input_size."""
    rules = [f"include {{ phase: {phase} }}" for phase in phases] or [""]
    text = "".join(
        f'layer {{ name: "data" top: "data" top: "label" {data} {rule} }}\n' for rule in rules
    )
    text += conv("conv1", "data", "conv1") + in_place("relu1", "conv1") + flat("fc", "conv1")
    text += layer("loss", "SoftmaxWithLoss", "fc label", "loss")
    text += layer("accuracy", "Accuracy", "fc label", "accuracy")
    path, size = written(tmp_path, text), DATA[data]
    if size is None:
        for words in ("", "--list_layers"):
            done = run_cli(
                *DREAM,
                *TINY[1:3],
                f"--deploy_txt={path}",
                "--layer=conv1",
                *words.split(),
                cwd=tmp_path,
            )
            assert_one_line(
                done, 2, "--deploy_txt", "for training", "deploy.prototxt", "--input_size"
            )
        net = Description(str(path), (32, 32))
        assert list(net.inputs.values()) == [(1, 3, 32, 32)]
        return
    description = Description(str(path))
    assert description.inputs == {"data": (1, 3, *size)}
    assert list(description.starts) == ["conv1", "fc"]
    assert "needs label" in description.problems["loss"]
    if phases:
        return
    files = random_weights(path)
    dreams(tmp_path, *files, "--layer=fc")
    done = run_cli(*DREAM, *files, "--layer=loss", cwd=tmp_path)
    assert_one_line(done, 2, "--layer loss", "label", "only in training")


def test_an_input_far_smaller_than_a_picture_is_refused_before_any_work(tmp_path):
    for shape in ((1, 3, 1, 1), (1, 3, 2, 300), ()):
        text = given_input("data", *shape) + conv("conv1", "data", "conv1", "kernel_size: 3 pad: 2")
        path = written(tmp_path, text)
        for words in ([], ["--list_layers"]):
            options = [*DREAM, *TINY[1:3], f"--deploy_txt={path}", "--layer=conv1", *words]
            assert_one_line(run_cli(*options, cwd=tmp_path), 2, "--deploy_txt", "--input_size 224")
        listed = run_cli(
            "--list_layers", f"--deploy_txt={path}", "--input_size=20x30", cwd=tmp_path
        )
        assert listed.stdout.split() == ["conv1", "8x22x32"]


def test_input_size_is_the_size_of_tiles(tmp_path):
    """Layers that accept any size have a gradient; one that does not is refused with that reason,
    and is not listed."""
    files = NetworkFiles(f"{GOLDEN}/deploy.prototxt", f"{GOLDEN}/tiny_inception.caffemodel")
    network = Ascent(files, cnn_vis.Target("inception_a/output"), input_size=(48, 64))
    assert network.tile_size == (48, 64)
    assert network.network.shapes == {"inception_a/output": (18, 24, 32)}
    assert np.abs(network.gradients(np.ones((1, 3, 48, 64), np.float32))[0]).max() > 0
    done = run_cli(*ONE, "--input_size=48x64", "--initial_size=48x64", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "--input_size=48x64" in Image.open(tmp_path / "out.png").info["Comment"]
    done = run_cli(*ONE, "--input_size=48", "--layer=classifier", cwd=tmp_path)
    assert_one_line(done, 2, "--input_size 48x48", "classifier", "only at")
    listed = run_cli(TINY[0], TINY[1], "--input_size=48", "--list_layers", cwd=tmp_path)
    names = [line.split()[0] for line in listed.stdout.splitlines()]
    assert names[-1] == "pool2/2x2_s2"
    assert "classifier works only at the prototxt's size" in listed.stderr
    for size in ("15", "0", "x32", "32x", "-3", "32x32x32", "9999999"):
        assert_one_line(
            run_cli(*ONE, f"--input_size={size}", cwd=tmp_path), 2, "--input_size", "HxW"
        )


def test_parameters_of_layers_that_this_caffe_lacks_are_no_hindrance(tmp_path):
    """As in SSD's prototxts; a misspelt parameter of a layer that it has is still an error."""
    text = given_input("data", 1, 3, 32, 32) + conv("conv1", "data", "conv1")
    text += """layer { name: "norm" type: "Normalize" bottom: "conv1" top: "norm"
        norm_param { scale_filler { type: "constant" value: 20 } # }
        name: "a } in a string" } }\n""" + conv("behind", "norm", "behind")
    path = written(tmp_path, text)
    listed = run_cli("--list_layers", f"--deploy_txt={path}", cwd=tmp_path)
    assert listed.stdout.split() == ["conv1", "8x32x32"], listed.stderr
    assert "norm is a Normalize layer" in listed.stderr
    files = random_weights(path)
    dreams(tmp_path, *files, "--layer=conv1")
    done = run_cli(*DREAM, *files, "--layer=behind", cwd=tmp_path)
    assert_one_line(done, 2, "--layer behind", "Normalize")
    path = written(tmp_path, text.replace("kernel_size", "kernel_sise", 1))
    done = run_cli("--list_layers", f"--deploy_txt={path}", cwd=tmp_path)
    assert_one_line(done, 2, "--deploy_txt", "kernel_sise")


def test_v1_training_prototxts_are_upgraded(tmp_path):
    """The older format with its data layers, shared weights and losses."""
    text = """layers { name: "data" type: DATA top: "data" top: "label"
        data_param { source: "x" batch_size: 9 crop_size: 32 } }
    layers { name: "conv1" type: CONVOLUTION bottom: "data" top: "conv1" blobs_lr: 1 blobs_lr: 2
        param: "shared" param: "bias" weight_decay: 1
        convolution_param { num_output: 3 pad: 1 kernel_size: 3 engine: CUDNN
            weight_filler { type: "msra" } } }
    layers { name: "conv2" type: CONVOLUTION bottom: "conv1" top: "conv2" param: "shared"
        param: "bias" convolution_param { num_output: 3 pad: 1 kernel_size: 3 } }
    layers { name: "relu2" type: RELU bottom: "conv2" top: "conv2" }
    layers { name: "loss" type: SOFTMAX_LOSS bottom: "conv2" bottom: "label" top: "loss" }
    """
    path = written(tmp_path, text)
    description = Description(str(path))
    assert description.inputs == {"data": (1, 3, 32, 32)}
    assert list(description.starts) == ["conv1", "conv2"]
    files = random_weights(path)
    net = caffe_net(description.net)
    net.params["conv1"][0].data[...] = 7
    assert (net.params["conv2"][0].data == 7).all()
    dreams(tmp_path, *files, "--layer=conv2")


def gradient_by_plain_caffe(files, target, start):
    """The gradient of the target's summed activations: the whole network, with force_backward."""
    net = caffe_net(forced(parse_prototxt(files[0][13:])))
    net.copy_from(files[1][14:])
    net.blobs["data"].data[...] = np.random.default_rng(0).normal(0, 50, (1, 3, 32, 32))
    net.forward()
    net.blobs[target].diff[...] = 1
    net._backward(list(net._layer_names).index(start), 0)
    return net.blobs["data"].diff.copy()


def forced(net):
    net.force_backward = True
    return net


ODD = {  # a network behind conv1; what can be amplified besides conv1
    "propagate_down of training": (
        layer("r", "Power", "conv1", "r", "propagate_down: false")
        + layer("sum", "Eltwise", "conv1 r", "sum"),
        ["r", "sum"],
    ),
    "a layer without top": ('layer { name: "quiet" type: "Silence" bottom: "conv1" }\n', []),
    "two layers of a name": (
        layer("pool", "Pooling", "conv1", "p1", "pooling_param { kernel_size: 2 stride: 2 }")
        + layer("pool", "Pooling", "p1", "p2", "pooling_param { kernel_size: 2 stride: 2 }"),
        ["p1", "p2"],
    ),
    "layers without a name": (
        layer("", "Power", "conv1", "p1", "power_param { power: 2 }")
        + layer("", "Power", "p1", "p2", "power_param { scale: 3 }"),
        ["p1", "p2"],
    ),
    "stages and levels": (
        'state { stage: "deploy" level: 3 }\n'
        + layer("a", "Power", "conv1", "a", 'include { stage: "deploy" }')
        + layer("b", "Power", "conv1", "b", "include { min_level: 2 }")
        + layer("c", "Power", "conv1", "c", 'include { not_stage: "deploy" }')
        + layer("d", "Power", "conv1", "d", "include { phase: TRAIN }"),
        ["a", "b"],
    ),
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_networks_have_the_gradients_of_plain_caffe(kind, tmp_path):
    more, names = ODD[kind]
    text = given_input("data", 1, 3, 32, 32) + conv("conv1", "data", "conv1") + more
    files = random_weights(written(tmp_path, text))
    assert list(Description(files[0][13:]).starts) == ["conv1", *names]
    for name in names:
        named = NetworkFiles(files[0][13:], files[1][14:])
        batch = np.random.default_rng(0).normal(0, 50, (1, 3, 32, 32)).astype(np.float32)
        gradient, _ = Ascent(named, cnn_vis.Target(name, Sum())).gradients(batch)
        if "name" in kind or "stages" in kind:  # by hand: plain Caffe cannot start there
            assert np.abs(gradient).max() > 0
        else:
            expected = gradient_by_plain_caffe(files, name, name)
            assert gradient == pytest.approx(
                expected, rel=1e-4, abs=1e-4 * float(np.abs(expected).max())
            )


@pytest.mark.parametrize("kind", ODD)
def test_sums_in_odd_networks_are_those_of_separate_backward_passes(kind, tmp_path):
    more, names = ODD[kind]
    text = given_input("data", 1, 3, 32, 32) + conv("conv1", "data", "conv1") + more
    paths = [word.partition("=")[2] for word in random_weights(written(tmp_path, text))]
    files = NetworkFiles(*paths[:2])
    batch = np.random.default_rng(0).normal(0, 50, (2, 3, 32, 32)).astype(np.float32)

    def network(*layers):
        return Ascent(files, *map(cnn_vis.Target, layers))

    gradients, norms = {}, {}
    for name in ["conv1", *names]:
        alone = network(name)
        gradients[name] = alone.gradients(batch)[0].copy()
        own = cnn_vis.AmplifyLayer().gradient(alone.activations(batch)[name])
        norms[name] = np.linalg.norm(own.reshape(2, -1).astype(float), axis=1)
    for layers in itertools.permutations(gradients, 2):
        scales = (norms[layers[0]] / norms[name] for name in layers)
        expected = sum(s[:, None, None, None] * gradients[n] for s, n in zip(scales, layers))
        found, _ = network(*layers).gradients(batch)
        assert np.abs(found - expected).max() <= 3e-5 * np.abs(expected).max(), layers


class Sum(cnn_vis.AmplifyNeuron):
    """An objective whose gradient is 1 everywhere."""

    def gradient(self, a):
        return np.ones_like(a)


def test_a_foreign_layer_in_place_takes_its_blob_away(tmp_path):
    """Under either name; the reason is told."""
    text = given_input("data", 1, 3, 32, 32) + conv("conv1_new", "data", "conv1")
    text += layer("mish", "Mish", "conv1", "conv1")
    path = written(tmp_path, text)
    for name in ("conv1", "conv1_new", "mish"):
        done = run_cli(*DREAM, *TINY[1:3], f"--deploy_txt={path}", f"--layer={name}", cwd=tmp_path)
        assert_one_line(done, 2, "Mish")


def test_prototxts_of_digits_have_their_input_at_the_stage_deploy(tmp_path):
    rule = 'include { stage: "deploy" }'
    text = given_input("data", 1, 3, 32, 32).replace("input_param", f"{rule} input_param")
    text += (
        'layer { name: "train" type: "Data" top: "data" top: "label" include { stage: "train" } }'
    )
    path = written(tmp_path, text + conv("conv1", "data", "conv1"))
    assert Description(str(path)).inputs == {"data": (1, 3, 32, 32)}


@pytest.mark.parametrize(
    "text", ["layer{" * 3000, "\0" * 3_000_000, "\xff" * 3_000_000], ids=["deep", "zeros", "bytes"]
)
def test_nonsense_for_a_prototxt_is_a_short_line(text, tmp_path):
    path = written(tmp_path, text)
    done = run_cli("--list_layers", f"--deploy_txt={path}", cwd=tmp_path)
    assert_one_line(done, 2, "--deploy_txt", "not a network description")
    assert len(done.stderr) < 1500


# ---- What other Caffes write ------------------------------------------------------------------


@pytest.mark.parametrize("value", ["false", "true", "0"])
def test_ceil_mode_is_round_mode(value, tmp_path):
    """A 33x33 input pooled by 2: 16 if rounded down, 17 if up."""
    more = f"pooling_param {{ pool: MAX kernel_size: 2 stride: 2 ceil_mode: {value} }}"
    text = given_input("data", 1, 3, 33, 33) + conv("a", "data", "a")
    text += layer("pool", "Pooling", "a", "pool", more)
    done = run_cli("--list_layers", f"--deploy_txt={written(tmp_path, text)}", cwd=tmp_path)
    side = 17 if value == "true" else 16
    assert done.stdout.splitlines()[-1].split() == ["pool", f"8x{side}x{side}"], done.stderr


def test_ceil_mode_elsewhere_stays(tmp_path):
    """In names and comments; and a value that is none is told as it was written."""
    more = "pooling_param { kernel_size: 2 stride: 2 ceil_mode: false } # ceil_mode: true\n"
    text = given_input("data", 1, 3, 33, 33) + conv("a", "data", "a")
    text += layer("ceil_mode: true", "Pooling", "a", "ceil_mode: true", more)
    done = run_cli("--list_layers", f"--deploy_txt={written(tmp_path, text)}", cwd=tmp_path)
    assert "ceil_mode: true" in done.stdout.splitlines()[-1], done.stderr
    assert "8x16x16" in done.stdout.splitlines()[-1]
    path = written(tmp_path, text.replace("ceil_mode: false", "ceil_mode: maybe"))
    done = run_cli("--list_layers", f"--deploy_txt={path}", cwd=tmp_path)
    assert_one_line(done, 2, 'no field named "ceil_mode"')


@pytest.mark.parametrize("unknown_first", [False, True])
def test_the_layer_with_an_unknown_field_is_named(unknown_first, tmp_path):
    """With its line; not one that this Caffe lacks, whose fields do not matter."""
    text = given_input("data", 1, 3, 32, 32) + conv("a", "data", "a")
    bad = layer("culprit", "Pooling", "a", "culprit", "pooling_param {\n kernel_size: 2 odd: 1 }")
    other = layer("harmless", "Foreign", "a", "harmless", "foreign_param { odd: 1 }")
    text += other + bad if unknown_first else bad + other
    line = text[: text.index("odd: 1 }" if not unknown_first else " kernel_size: 2 odd")].count(
        "\n"
    )
    done = run_cli(*ONE, f"--deploy_txt={written(tmp_path, text)}", cwd=tmp_path)
    assert_one_line(done, 2, "--deploy_txt", "layer culprit: ", f"{line + 1}:", '"odd"')
    assert "harmless" not in done.stderr


@pytest.mark.parametrize("kind", ["Pooling", "SPP"])
def test_a_layer_that_caffe_has_not_written_is_named(kind, tmp_path):
    """Not the target behind it."""
    text = given_input("data", 1, 3, 32, 32) + conv("a", "data", "a")
    more = "pooling_param { pool: STOCHASTIC kernel_size: 2 stride: 2 }"
    if kind == "SPP":
        more = "spp_param { pool: STOCHASTIC pyramid_height: 2 }"
    text += layer("culprit", kind, "a", "culprit", more) + flat("b", "culprit")
    done = run_cli(*ONE, *random_weights(written(tmp_path, text)), "--layer=b", cwd=tmp_path)
    assert_one_line(done, 2, "--layer b", "culprit", "another layer")


def test_a_layer_in_which_caffe_crashes_is_named(tmp_path):
    """Not memory: a Filter that lets nothing through."""
    text = given_input("data", 1, 3, 32, 32) + conv("a", "data", "a")
    text += (
        'layer { name: "sel" type: "Parameter" top: "sel" parameter_param { shape { dim: 1 } } }'
    )
    text += layer("culprit", "Filter", "a sel", "culprit") + conv("b", "culprit", "b")
    done = run_cli(*ONE, *random_weights(written(tmp_path, text)), "--layer=b", cwd=tmp_path)
    assert_one_line(done, 2, "--layer b", "culprit")


PRELU = "prelu_param { channel_shared: true filler { value: 0.2 } }"
WITHOUT_AXES = {
    "PReLU": PRELU,
    "Scale": "scale_param { num_axes: 0 filler { value: 0.5 } }",
    "Bias": "bias_param { num_axes: 0 filler { value: 3 } }",
}


@pytest.mark.parametrize("kind", WITHOUT_AXES)
def test_weights_that_are_one_number_fit(kind, tmp_path):
    """Their blob has no axes. They are used: other numbers make another picture."""
    text = given_input("data", 1, 3, 32, 32) + conv("a", "data", "a")
    text += layer("one", kind, "a", "one", WITHOUT_AXES[kind]) + conv("b", "one", "b")
    files = random_weights(written(tmp_path, text))
    seen = dreams(tmp_path, *files, "--layer=b")
    net = caffe_net(Description(files[0][13:]).net)
    net.copy_from(files[1][14:])
    net.params["one"][0].data[...] *= 7
    net.save(files[1][14:])
    assert not np.array_equal(dreams(tmp_path, *files, "--layer=b"), seen)


# ---- What a training prototxt does to pictures ------------------------------------------------


def for_training(transform, kind="Data", own='source: "x" batch_size: 2'):
    """The prototxts (for training, as a deploy.prototxt) of one network."""
    rest = conv("a", "data", "a", "kernel_size: 3 stride: 2")
    rest += layer("s", "Sigmoid", "a", "s") + conv("b", "s", "b")
    param = {"Data": "data_param", "ImageData": "image_data_param"}[kind]
    data = layer("data", kind, "", "data", f'top: "label" {transform} {param} {{ {own} }}')
    return data + rest, given_input("data", 1, 3, 32, 32) + rest


@pytest.mark.parametrize("place", ["transform_param", "older"])
def test_scale_and_mean_of_a_training_prototxt_count(place, tmp_path):
    """The picture is that of the deploy.prototxt with --input_scale and a mean image, and its
    record says so, so that it can be made again, resumed, and found in a batch."""
    if place == "older":
        own = 'source: "x" batch_size: 2 scale: 0.017 crop_size: 32 mean_file: "mean.npy"'
        train, deploy = for_training("", own=own)
    else:
        means = " ".join(f"mean_value: {mean}" for mean in (100, 110, 120))
        train, deploy = for_training(f"transform_param {{ scale: 0.017 crop_size: 32 {means} }}")
    np.save(tmp_path / "mean.npy", np.full((3, 4, 4), 110.0))
    plain = random_weights(written(tmp_path, deploy, "deploy"))
    written(tmp_path, train, "train")
    same = [*plain[:2], "--mean_image=mean.npy", "--input_scale=0.017", "--layer=b"]
    expected = dreams(tmp_path, *same)
    assert not np.array_equal(dreams(tmp_path, *same, "--input_scale=1"), expected)
    words = [*DREAM, "--initial_size=48x48", "--layer=b", plain[1], "--deploy_txt=train.prototxt"]
    done = run_cli(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "scaled by 0.017, as train.prototxt says" in done.stderr
    assert "110 is subtracted" in done.stderr
    assert np.array_equal(pixels(tmp_path / "out.png"), expected)
    command = Image.open(tmp_path / "out.png").info["Comment"]
    assert "--input_scale=0.017" in command
    batch = [*words, "--output={name}.png"]
    assert run_cli(*batch, cwd=tmp_path).returncode == 0
    assert "1 of 1 pictures are there already" in run_cli(*batch, cwd=tmp_path).stderr
    other = run_cli(*words, "--input_scale=0.5", "--mean_image=mean.npy", cwd=tmp_path)
    assert "scaled" not in other.stderr
    assert "subtracted" not in other.stderr
    assert not np.array_equal(pixels(tmp_path / "out.png"), expected)


@pytest.mark.parametrize(
    ("transform", "words"),
    [
        ("scale: 0", ("its scale is 0", "--input_scale")),
        ("scale: nan", ("its scale is nan", "--input_scale")),
        ("mean_value: 300", ("its mean_value is 300", "--mean_image")),
        ("mean_value: nan", ("its mean_value is nan", "--mean_image")),
    ],
)
def test_impossible_transforms_are_refused(transform, words, tmp_path):
    train, deploy = for_training(f"transform_param {{ crop_size: 32 {transform} }}")
    files = random_weights(written(tmp_path, deploy, "deploy"))
    written(tmp_path, train, "train")
    done = run_cli(*DREAM, "--layer=b", files[1], "--deploy_txt=train.prototxt", cwd=tmp_path)
    assert_one_line(done, 2, "--deploy_txt train.prototxt", *words)


def test_a_transform_is_that_of_the_layer_that_reads_pictures(tmp_path):
    """Not of one that reads labels. A mean file counts whatever its name."""
    train, deploy = for_training('transform_param { crop_size: 32 scale: 0.2 mean_file: "m" }')
    labels = layer(
        "l", "Data", "", "l", "transform_param { scale: 0.5 } data_param { source: 'y' }"
    )
    files = random_weights(written(tmp_path, deploy, "deploy"))
    written(tmp_path, labels + train.replace('top: "label"', ""), "train")
    with open(tmp_path / "m", "wb") as file:
        np.save(file, np.full(3, 100.0))
    words = [*DREAM, "--initial_size=48x48", "--layer=b", files[1], "--deploy_txt=train.prototxt"]
    done = run_cli(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "scaled by 0.2" in done.stderr
    assert "100 is subtracted" in done.stderr


def test_a_resumed_run_keeps_its_scale(tmp_path):
    running = under_way(*ONE, "--num_steps=100000", "--checkpoint_iter=1", "--input_scale=0.5",
                        cwd=tmp_path)  # fmt: skip
    running.send_signal(signal.SIGTERM)
    running.communicate(timeout=30)
    done = run_cli("--resume", CHECKPOINT, "--input_scale=0.6", cwd=tmp_path)
    assert_one_line(done, 2, "--input_scale 0.6", "has 0.5")


def test_a_mean_file_that_is_not_there_is_told(tmp_path):
    train, deploy = for_training('transform_param { crop_size: 32 mean_file: "no.binaryproto" }')
    files = random_weights(written(tmp_path, deploy, "deploy"))
    written(tmp_path, train, "train")
    words = [*DREAM, "--initial_size=48x48", "--layer=b", files[1], "--deploy_txt=train.prototxt"]
    done = run_cli(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (
        "no.binaryproto, named in train.prototxt, does not exist; see --mean_image" in done.stderr
    )


# ---- The networks that people know, by structure ----------------------------------------------
# Their real prototxts' layers, names and connections; channels divided by `thin`, weights random.


def pooled(name, bottom, kernel=2, stride=2, method="MAX"):
    more = f"pool: {method} kernel_size: {kernel} stride: {stride}"
    return layer(name, "Pooling", bottom, name, f"pooling_param {{ {more} }}")


def conv_of(name, bottom, channels, kernel, stride=1, pad=0, more=""):
    more = f"kernel_size: {kernel} stride: {stride} pad: {pad} {more}"
    more = f'num_output: {max(1, channels)} {more} weight_filler {{ type: "msra" }}'
    return layer(name, "Convolution", bottom, name, f"convolution_param {{ {more} }}")


def classifier(bottom, thin, flat_numbers=(6, 7, 8)):
    """Fully connected layers fc6, fc7, fc8, and prob."""
    text = ""
    for number in flat_numbers:
        channels = 1000 if number == 8 else 4096
        more = f'num_output: {channels // thin} weight_filler {{ type: "xavier" }}'
        name = f"fc{number}"
        text += layer(name, "InnerProduct", bottom, name, f"inner_product_param {{ {more} }}")
        if number != 8:
            text += in_place(f"relu{number}", name) + layer(f"drop{number}", "Dropout", name, name)
        bottom = name
    return text + layer("prob", "Softmax", bottom, "prob")


def vgg(depths, thin):
    text, bottom = given_input("data", 10, 3, 224, 224), "data"
    for block, (depth, channels) in enumerate(zip(depths, (64, 128, 256, 512, 512)), 1):
        for number in range(1, depth + 1):
            name = f"conv{block}_{number}"
            text += conv_of(name, bottom, channels // thin, 3, pad=1)
            text += in_place(f"relu{block}_{number}", name)
            bottom = name
        text += pooled(f"pool{block}", bottom)
        bottom = f"pool{block}"
    return text + classifier(bottom, thin)


def caffenet(thin):
    text, bottom = given_input("data", 10, 3, 227, 227), "data"
    layers = ((96, 11, 4, 0, 1), (256, 5, 1, 2, 2), (384, 3, 1, 1, 1), (384, 3, 1, 1, 2))
    for number, (channels, kernel, stride, pad, group) in enumerate(
        (*layers, (256, 3, 1, 1, 2)), 1
    ):
        name, channels = f"conv{number}", 2 * (channels // thin // 2)
        text += conv_of(name, bottom, channels, kernel, stride, pad, f"group: {group}")
        text += in_place(f"relu{number}", name)
        bottom = name
        if number in (1, 2, 5):
            text += pooled(f"pool{number}", bottom, 3)
            bottom = f"pool{number}"
        if number in (1, 2):
            more = "lrn_param { local_size: 5 alpha: 0.0001 beta: 0.75 }"
            text += layer(f"norm{number}", "LRN", bottom, f"norm{number}", more)
            bottom = f"norm{number}"
    return text + classifier(bottom, thin)


def normalized(name, short):
    """BatchNorm and Scale in place, as the ResNets write them."""
    scale = layer(f"scale{short}", "Scale", name, name, "scale_param { bias_term: true }")
    return layer(f"bn{short}", "BatchNorm", name, name) + scale


def resnet(depths, thin):
    text = given_input("data", 1, 3, 224, 224) + conv_of("conv1", "data", 64 // thin, 7, 2, 3)
    text += normalized("conv1", "_conv1") + in_place("conv1_relu", "conv1")
    text += pooled("pool1", "conv1", 3)
    bottom = "pool1"
    for block, depth in enumerate(depths, 2):
        for unit in range(depth):
            letter = (
                "abcdefghijklmnopqrstuvwxyz"[unit] if depth < 9 else f"b{unit}" if unit else "a"
            )
            name, channels = f"res{block}{letter}", 2 ** (block + 4) // thin
            stride, shortcut = 2 if block > 2 and not unit else 1, bottom
            convs = [
                ("2a", channels, 1, stride),
                ("2b", channels, 3, 1),
                ("2c", 4 * channels, 1, 1),
            ]
            if not unit:
                shortcut = f"{name}_branch1"
                text += conv_of(shortcut, bottom, 4 * channels, 1, stride, 0, "bias_term: false")
                text += normalized(shortcut, shortcut[3:])
            for ending, width, kernel, step in convs:
                branch = f"{name}_branch{ending}"
                text += conv_of(
                    branch, bottom, width, kernel, step, kernel // 2, "bias_term: false"
                )
                text += normalized(branch, branch[3:])
                if ending != "2c":
                    text += in_place(f"{branch}_relu", branch)
                bottom = branch
            text += layer(name, "Eltwise", f"{shortcut} {bottom}", name)
            text += in_place(f"{name}_relu", name)
            bottom = name
    text += pooled("pool5", bottom, 7, 1, "AVE")
    return text + classifier("pool5", thin, (8,)).replace("fc8", "fc1000")


def squeezenet(thin):
    text = given_input("data", 10, 3, 227, 227) + conv_of("conv1", "data", 64 // thin, 3, 2)
    text += in_place("relu_conv1", "conv1") + pooled("pool1", "conv1", 3)
    bottom = "pool1"
    for number, channels in enumerate((16, 16, 32, 32, 48, 48, 64, 64), 2):
        fire, channels = f"fire{number}", channels // thin
        text += conv_of(f"{fire}/squeeze1x1", bottom, channels, 1)
        text += in_place(f"{fire}/relu_squeeze1x1", f"{fire}/squeeze1x1")
        for kernel in (1, 3):
            name = f"{fire}/expand{kernel}x{kernel}"
            text += conv_of(name, f"{fire}/squeeze1x1", 4 * channels, kernel, 1, kernel // 2)
            text += in_place(f"{fire}/relu_expand{kernel}x{kernel}", name)
        bottom = f"{fire}/concat"
        text += layer(bottom, "Concat", f"{fire}/expand1x1 {fire}/expand3x3", bottom)
        if number in (3, 5):
            text += pooled(f"pool{number}", bottom, 3)
            bottom = f"pool{number}"
    text += layer("drop9", "Dropout", bottom, bottom)
    text += conv_of("conv10", bottom, 1000 // thin, 1) + in_place("relu_conv10", "conv10")
    text += layer("pool10", "Pooling", "conv10", "pool10", AVERAGE)
    return text + layer("prob", "Softmax", "pool10", "prob")


AVERAGE = "pooling_param { pool: AVE global_pooling: true }"
KNOWN = {  # the prototxt of a network, thinned; a layer amid it and one that ends it
    "VGG16": (lambda thin: vgg((2, 2, 3, 3, 3), thin), "conv4_3", "fc8"),
    "VGG19": (lambda thin: vgg((2, 2, 4, 4, 4), thin), "conv4_4", "fc8"),
    "CaffeNet": (caffenet, "conv5", "fc8"),
    "ResNet-50": (lambda thin: resnet((3, 4, 6, 3), thin), "res4c", "fc1000"),
    "ResNet-101": (lambda thin: resnet((3, 4, 23, 3), thin), "res4b9", "fc1000"),
    "ResNet-152": (lambda thin: resnet((3, 8, 36, 3), thin), "res4b30", "fc1000"),
    "SqueezeNet": (squeezenet, "fire9/concat", "conv10"),
}


@pytest.mark.parametrize("network", KNOWN)
def test_known_networks_are_listed_and_dreamed_on(network, tmp_path):
    """By structure, with a sixteenth of the channels. One is stopped and resumed, which knows
    nothing of networks."""
    make, amid, end = KNOWN[network]
    files = random_weights(written(tmp_path, make(16)))
    listed = run_cli("--list_layers", files[0], cwd=tmp_path)
    names = [line.split()[0] for line in listed.stdout.splitlines()]
    assert {amid, end, "prob"} <= set(names)
    assert not any("relu" in name or name.startswith("bn") for name in names)
    common = [*DREAM, *files, "--initial_size=300x227", f"--layer={amid}", "--num_steps=5"]
    done = run_cli(*common, "--output=whole.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert pixels(tmp_path / "whole.png").std() > 1
    if network == "SqueezeNet":
        running = under_way(*common, "--num_steps=40", "--checkpoint_iter=1", cwd=tmp_path)
        running.send_signal(signal.SIGTERM)
        running.communicate(timeout=30)
        assert running.returncode == 143
        assert run_cli(f"--resume={CHECKPOINT}", cwd=tmp_path).returncode == 0
        done = run_cli(*common, "--num_steps=40", "--output=whole.png", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert np.array_equal(pixels(tmp_path / "out.png"), pixels(tmp_path / "whole.png"))
    done = run_cli(*common, f"--layer={end}", "--num_steps=1", "--output=end.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_layers_without_a_gradient_are_not_listed(tmp_path):
    """Nor layers after them, nor a pooling layer's mask of maxima. The others are listed and
    run."""
    text = given_input("data", 1, 3, 32, 32) + conv("conv1", "data", "conv1")
    text += layer("best", "ArgMax", "conv1", "best") + layer("after", "Power", "best", "after")
    text += layer("step", "Threshold", "conv1", "step")
    pool = "pooling_param { kernel_size: 2 stride: 2 }"
    text += layer("pool", "Pooling", "conv1", "pool", f'top: "mask" {pool}')
    files = random_weights(written(tmp_path, text))
    listed = run_cli("--list_layers", files[0], cwd=tmp_path)
    assert [line.split()[0] for line in listed.stdout.splitlines()] == ["conv1", "pool"]
    assert "gradient for ArgMax layers" in listed.stderr
    dreams(tmp_path, *files, "--layer=pool")
    for name in ("best", "after", "step"):
        done = run_cli(*DREAM, *files, f"--layer={name}", cwd=tmp_path)
        assert_one_line(done, 2, f"--layer {name}", "gradient")


def test_layers_that_caffe_stops_at_are_left_out_of_the_list(tmp_path):
    """Wherever they are; what does not need them is listed, and runs."""
    text = given_input("data", 1, 3, 32, 32) + conv("conv1", "data", "conv1")
    good = text + conv("beside", "conv1", "beside")
    bad = text + conv("large", "conv1", "large", "kernel_size: 99") + conv("on", "large", "on")
    bad += layer("shape", "Reshape", "conv1", "shape", "reshape_param { shape { dim: 7 dim: 7 } }")
    bad += conv("beside", "conv1", "beside")
    random_weights(written(tmp_path, good))
    path = written(tmp_path, bad, "bad")
    listed = run_cli("--list_layers", f"--deploy_txt={path}", cwd=tmp_path)
    assert [line.split()[0] for line in listed.stdout.splitlines()] == ["conv1", "beside"]
    assert "left out, with all layers that need it: large" in listed.stderr
    assert "left out, with all layers that need it: shape" in listed.stderr
    files = [f"--deploy_txt={path}", "--caffe_model=net.caffemodel", TINY[2]]
    dreams(tmp_path, *files, "--layer=beside")
