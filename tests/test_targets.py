"""What is amplified: the terms of --layer, and --guide."""

import itertools
import json
import signal

import numpy as np
import pytest
from conftest import (
    CARD,
    CHECKPOINT,
    GOLDEN,
    TINY,
    Ascent,
    assert_one_line,
    pixels,
    run_cli,
    run_script,
    start,
    wait_for,
)
from PIL import Image
from test_terms import assert_gradient

import cnn_vis
from cnn_vis import AmplifyLayer, AmplifyNeuron, Resemble, Target
from cnn_vis_lib.models import NetworkFiles, with_guide
from cnn_vis_lib.network import NetworkSpec
from cnn_vis_lib.pixels import resize
from cnn_vis_lib.terms import CLASSES, class_names, class_number

MEAN = 120.0
FILES = NetworkFiles(f"{GOLDEN}/deploy.prototxt", f"{GOLDEN}/tiny_inception.caffemodel", mean=MEAN)
DREAM = [*TINY, "--image=in.png", "--num_steps=4", "--learning_rate=4", "--iter_behavior=none"]
LAYERS = [
    "conv1/5x5_s2", "pool1/norm1", "inception_a/1x1", "inception_a/3x3_reduce", "inception_a/3x3",
    "inception_a/pool", "inception_a/pool_proj", "inception_a/output", "pool2/2x2_s2",
    "classifier", "prob",
]  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    CARD.save(tmp_path / "in.png")
    Image.fromarray(np.asarray(CARD)[::-1, :90].copy()).save(tmp_path / "guide.png")
    return tmp_path


def dream(*arguments, cwd):
    done = run_cli(*DREAM, *arguments, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stderr


def network(*targets):
    return Ascent(FILES, *targets)


def tiles(number=2):
    batch = np.random.default_rng(7).normal(0, 60, (number, 3, 32, 32))
    return batch.astype(np.float32)


@pytest.mark.parametrize(
    ("text", "targets"),
    [
        ("a/b", [Target("a/b")]),
        ("2*a", [Target("a", weight=2)]),
        (" -1e+2 * a+b ", [Target("a", weight=-100), Target("b")]),
        ("a:1, 3-5,3 + .5*b:strong4", [
            Target("a", channels=(1, 3, 4, 5)), Target("b", channels=("strong4",), weight=0.5),
        ]),
        ("c:great white shark,7", [Target("c", channels=("great white shark", 7))]),
        ('"a+b: c":2 + "d*e"', [Target("a+b: c", channels=(2,)), Target("d*e")]),
        ("conv 1", [Target("conv 1")]),
    ],
)  # fmt: skip
def test_terms_are_read_and_written(text, targets):
    objective = cnn_vis.Objective(tuple(targets))
    assert cnn_vis.layer_terms(text) == objective
    assert cnn_vis.layer_terms(str(objective)) == objective
    assert str(cnn_vis.layer_terms(text)) == text  # as in names of files and in records


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("a + ", "character 4, the end"),
        ("a + *b", "character 4, *b"),
        ("x*a", "character 1, x*a"),
        ("a:", "character 1, a:"),
        ('a + "b', 'character 4, "b'),
        ("a:3-1", "at '3-1'"),
        ("a:1,,2", "at "),
        ("a + b:strong0", "--layer b:strong0: at 'strong0'"),
        ("a + 0*b", "--layer 0*b"),
        ("1e999*b", "--layer 1e999*b"),
    ],
)
def test_mistakes_in_terms_are_pointed_at(text, place, tmp_path):
    assert_one_line(run_cli(*TINY, f"--layer={text}", cwd=tmp_path), 2, "--layer", place)


def sums():
    """Targets of every pair of layers, and some more: of one layer twice, of three."""
    forms = itertools.cycle([AmplifyLayer(), AmplifyNeuron(2), AmplifyLayer(0.3, 2.0, 0.5)])
    weights = itertools.cycle([1.0, 0.5, -2.0, 3.0])
    pairs = [*itertools.combinations(LAYERS, 2), *itertools.combinations(LAYERS[::-1], 2)]
    more = [("inception_a/1x1",) * 2, ("inception_a/output",) * 3, LAYERS[:5], LAYERS[6:1:-2]]
    for layers in [*pairs, *more]:
        yield [Target(name, next(forms), weight=next(weights)) for name in layers]


def test_a_sums_gradient_is_the_sum_of_separate_backward_passes():
    """For layers in any order, one after the other or side by side; with in-place ReLUs; each term
    is scaled, in every tile, to the norm of the first one."""
    batch, separate = tiles(), {}
    for targets in sums():
        parts = []
        for target in targets:
            if target not in separate:
                alone = network(Target(target.layer, target.form))
                gradient, losses = alone.gradients(batch)
                (a,) = alone.activations(batch).values()
                own = target.form.gradient(a).reshape(len(batch), -1).astype(float)
                separate[target] = gradient.copy(), losses, np.sqrt((own**2).sum(axis=1))
            parts.append(separate[target])
        first = parts[0][2]
        expected = sum(
            (target.weight * first / norm)[:, None, None, None] * gradient
            for target, (gradient, _, norm) in zip(targets, parts)
        )
        losses = [sum(t.weight * p[1][i] for t, p in zip(targets, parts)) for i in (0, 1)]
        for _ in range(2):  # nothing is left over from the pass before
            found, ours = network(*targets).gradients(batch)
            assert np.abs(found - expected).max() < 2e-5 * np.abs(expected).max(), targets
            assert ours == pytest.approx(losses)


def test_a_first_term_that_finds_nothing_does_not_silence_the_others():
    a = np.ones((2, 3, 4, 4), np.float32)
    first, second = Target("x"), Target("y", weight=0.5)
    dead = a.copy()
    dead[1] = 0
    found = cnn_vis.Objective((first, second)).gradients({"x": dead, "y": a})
    ((_, alone),) = cnn_vis.Objective((second,)).gradients({"y": a})
    assert [layer for layer, _ in found] == ["x", "y"]
    assert not found[0][1][1].any()
    assert np.allclose(found[1][1], 0.5 * alone)


def test_a_sum_of_a_batch_is_that_of_its_tiles():
    targets = Target("inception_a/output"), Target("conv1/5x5_s2", AmplifyNeuron(1), weight=0.5)
    ours, batch = network(*targets), tiles(5)
    together = ours.gradients(batch)[0].copy()
    for tile, gradient in zip(batch, together):
        alone = ours.gradients(tile[np.newaxis])[0][0]
        assert np.abs(alone - gradient).max() < 1e-6 * np.abs(gradient).max()


def test_one_term_of_any_weight_is_the_layer_alone(folder):
    """The pictures are identical, and a note says that the weight has no effect. A negative weight,
    though, leads away from the layer."""
    said = dream("--layer=inception_a/output", "--output=plain.png", cwd=folder)
    assert "weight" not in said
    for weight in (3, 0.001):
        said = dream(f"--layer={weight}*inception_a/output", cwd=folder)
        assert np.array_equal(pixels(folder / "out.png"), pixels(folder / "plain.png"))
        assert f"{weight}*inception_a/output: a single term's weight has no effect" in said
    said = dream("--layer=-1*inception_a/output", cwd=folder)
    assert "weight" not in said
    activity = []
    for name in ("out.png", "plain.png"):
        tile = np.zeros((1, 3, *CARD.size[::-1]))
        cnn_vis.from_uint8(pixels(folder / name), MEAN, tile)
        ours = network(Target("inception_a/output"))
        (a,) = ours.activations(tile[:, :, :32, :32].astype(np.float32)).values()
        activity.append(a.mean())
    assert activity[0] < 0.9 * activity[1]


def test_only_the_named_channels_grow():
    """amplify_neuron amplifies the channels' sum, amplify_layer applies its usual form to them."""
    a = np.random.default_rng(1).normal(0, 3, (2, 5, 3, 3)).astype(np.float32)
    for form in (AmplifyLayer(), AmplifyNeuron(None)):
        target = Target("x", form, channels=(3, 1))
        gradient = target.gradient(a)
        assert not gradient[:, [0, 2, 4]].any()
        assert np.array_equal(gradient[:, [1, 3]], form.gradient(a[:, [1, 3]]))
        assert_gradient(target, a.astype(np.float64), 0)
    both = network(Target("inception_a/output", AmplifyNeuron(None), channels=(3, 5)))
    apart = [network(Target("inception_a/output", AmplifyNeuron(n))) for n in (3, 5)]
    batch = tiles(1)
    expected = sum(one.gradients(batch)[0].copy() for one in apart)
    assert np.allclose(both.gradients(batch)[0], expected, rtol=1e-4, atol=1e-5)


def test_one_channel_is_the_originals_neuron(folder):
    neuron = "--image_type=amplify_neuron"
    dream(neuron, "--layer=inception_a/output", "--target_neuron=4", "--output=a.png", cwd=folder)
    said = dream(neuron, "--layer=inception_a/output:4", "--target_neuron=7", cwd=folder)
    assert np.array_equal(pixels(folder / "out.png"), pixels(folder / "a.png"))
    assert "--target_neuron has no effect with --layer inception_a/output:4" in said


def test_the_strongest_channels_are_found(folder):
    """Checked independently, on tiles of the first size cut here. The picture records the
    channels."""
    words = ["--initial_size=96x120", "--num_sizes=2"]
    said = dream("--layer=0.5*inception_a/output:strong3 + pool1/norm1:1", *words, cwd=folder)
    size, mean = (96, 120), float(np.load(GOLDEN / "mean.npy").mean())
    image = np.zeros((1, 3, *size))
    cnn_vis.from_uint8(resize(np.asarray(CARD), size, bilinear=True), mean, image)
    ours = network(Target("inception_a/output"))
    activity = []
    for y0, y1, x0, x1 in cnn_vis.all_tiles(size, (32, 32)):
        (a,) = ours.activations(image[:, :, y0:y1, x0:x1].astype(np.float32)).values()
        activity.append(np.abs(a).mean(axis=(0, 2, 3)))
    strongest = sorted(np.argsort(-np.mean(activity, axis=0))[:3])
    found = f"0.5*inception_a/output:{','.join(map(str, strongest))} + pool1/norm1:1"
    assert f"is {found}\n" in said
    record = json.loads(Image.open(folder / "out.png").info["cnn-vis"])
    assert f"--target_layer={found}" in record["command"]
    dream(f"--layer={found}", *words, "--output=again.png", cwd=folder)
    assert np.array_equal(pixels(folder / "out.png"), pixels(folder / "again.png"))


def test_a_run_goes_on_with_the_channels_that_were_found(folder):
    """Even if --layer is given again, as it was."""
    words = [*DREAM, "--layer=inception_a/output:strong2", "--num_steps=40"]
    assert run_cli(*words, "--output=whole.png", cwd=folder).returncode == 0
    running = start(*words, "--checkpoint_iter=1", cwd=folder)
    wait_for((folder / CHECKPOINT).exists)
    running.send_signal(signal.SIGINT)
    running.communicate(timeout=60)
    other = run_cli("--resume", CHECKPOINT, "--layer=inception_a/output:strong3", cwd=folder)
    assert_one_line(other, 2, "--layer", "strong3")
    done = run_cli("--resume", CHECKPOINT, "--layer=inception_a/output:strong2", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert np.array_equal(pixels(folder / "out.png"), pixels(folder / "whole.png"))


def test_strong_channels_of_noise_and_in_a_library(folder):
    """Also when starting from noise, and when the caller runs the loop."""
    common = [*TINY, "--num_steps=1", "--seed=1", "--iter_behavior=none"]
    done = run_cli(*common, "--layer=inception_a/output:strong1", cwd=folder)
    assert done.returncode == 0, done.stderr
    code = f"""
import cnn_vis, logging
from PIL import Image
if __name__ == "__main__":
    logging.basicConfig(level="INFO")
    words = {dict(word[2:].split("=") for word in TINY)}
    for progress in cnn_vis.dream(layer="inception_a/output:strong1", num_steps=1, seed=1, **words):
        Image.fromarray(progress.picture()).save("library.png")
"""
    ran = run_script(code, folder)
    assert ran.returncode == 0, ran.stderr
    assert "--layer inception_a/output:strong1 is inception_a/output:" in ran.stderr
    assert np.array_equal(pixels(folder / "out.png"), pixels(folder / "library.png"))


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        ("inception_a/output:18", ["inception_a/output:18", "18 channels"]),
        ("pool1/norm1 + inception_a/outptu:1", ["--layer inception_a/outptu", "did you mean"]),
        ("pool1/norm1 + inception_a/output:hen", ["inception_a/output:hen", "numbers and ranges"]),
        ("pool1/norm1 + data", ["--layer data", "input"]),
    ],
)
def test_terms_that_do_not_fit_the_network_are_refused(layer, words, folder):
    assert_one_line(run_cli(*DREAM, f"--layer={layer}", cwd=folder), 2, *words)


NAMES = ["tench, Tinca tinca", "hen", "crane, bird", "great_white shark", "crane"]


@pytest.mark.parametrize(
    ("name", "number"), [("hen", 1), ("Tinca  TINCA", 0), ("great white shark", 3)]
)
def test_classes_have_names(name, number):
    assert class_number(name, NAMES) == number


def test_a_class_without_a_name_of_its_own_is_refused():
    with pytest.raises(ValueError, match="classes 2 and 4"):
        class_number("crane", NAMES)
    with pytest.raises(ValueError, match="did you mean tench"):
        class_number("tensch", NAMES)
    with pytest.raises(ValueError, match="--list_classes"):
        class_number("zzzzzz", NAMES)


def test_every_class_can_be_called_by_a_name_or_its_number():
    for width in CLASSES:
        names = class_names(width)
        assert len(names) == width
        shared = 0
        for number, line in enumerate(names):
            own = []
            for name in line.split(","):
                try:
                    own.append(class_number(name, names))
                except ValueError:
                    shared += 1
            assert set(own) <= {number}
        assert shared <= 60


# ---- Guides


def test_a_guides_gradient_is_its_slope():
    """Also in blocks, and on some channels."""
    random = np.random.default_rng(3)
    a, features = random.normal(0, 2, (2, 5, 4, 3)), random.normal(0, 1, (5, 7))
    for form in (Resemble(features), Resemble(features).on((1, 4))):
        chosen = a if form.features.shape[0] == 5 else a[:, [1, 4]]
        gradient = form.gradient(chosen)
        for n, y, x in np.ndindex(2, 4, 3):
            products = chosen[n, :, y, x] @ form.features
            expected = -form.features[:, products.argmax()]
            assert np.array_equal(gradient[n, :, y, x], expected)
        assert_gradient(form, chosen, 0)
        whole = form.loss(chosen)

        class InBlocks(Resemble):
            BLOCK = 15

        assert np.array_equal(InBlocks(form.features).gradient(chosen), gradient)
        assert InBlocks(form.features).loss(chosen) == pytest.approx(whole)


def test_a_guide_is_seen_at_the_networks_size(tmp_path):
    """Its shorter side is fitted; a longer one takes several tiles."""
    guide = np.asarray(CARD)[:, :120]  # 160x120: becomes 43x32
    with with_guide(FILES, guide) as files:
        targets = Target("inception_a/output", Resemble()), Target("pool1/norm1", Resemble(), (2,))
        ours = Ascent(files, *targets)
    image = np.zeros((1, 3, 43, 32))
    cnn_vis.from_uint8(resize(guide, (43, 32), bilinear=True), MEAN, image)
    plain, batch = network(*(Target(target.layer) for target in targets)), tiles(1)
    parts = (image[:, :, y : y + 32].astype(np.float32) for y in (0, 11))
    seen = [[a.copy() for a in plain.activations(part).values()] for part in parts]
    features = [np.concatenate([both[i][0].reshape(n, -1) for both in seen], 1) for i, n in
                enumerate((18, 12))]  # fmt: skip
    by_hand = [
        Target("inception_a/output", Resemble(features[0])),
        Target("pool1/norm1", Resemble(features[1][[2]]), (2,)),
    ]
    expected = cnn_vis.Objective(tuple(by_hand)).gradients(plain.activations(batch))
    found = ours.objective.gradients(ours.activations(batch))
    for (layer, gradient), (other, right) in zip(found, expected):
        assert layer == other
        assert np.array_equal(gradient, right)


@pytest.mark.parametrize("layer", ["inception_a/output", "conv1/5x5_s2:1-7 + 2*inception_a/output"])
def test_a_guided_run_is_stopped_resumed_and_reproduced(layer, folder):
    """The guide's file is not needed to go on; what the guide replaces is told."""
    guided = [f"--layer={layer}", "--guide=guide.png", "--num_steps=30"]
    dream(f"--layer={layer}", "--num_steps=30", "--output=plain.png", cwd=folder)
    said = dream(*guided, "--l1_weight=2", "--output=whole.png", cwd=folder)
    assert "--amplify_l1_weight has no effect with --guide" in said
    assert not np.array_equal(pixels(folder / "plain.png"), pixels(folder / "whole.png"))
    running = start(*DREAM, *guided, "--checkpoint_iter=1", cwd=folder)
    wait_for((folder / CHECKPOINT).exists)
    running.send_signal(signal.SIGINT)
    running.communicate(timeout=60)
    (folder / "guide.png").unlink()
    done = run_cli("--resume", CHECKPOINT, "--workers=1", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert np.array_equal(pixels(folder / "out.png"), pixels(folder / "whole.png"))
    assert "guide.png" in run_cli("--reproduce=out.png", cwd=folder).stdout


def test_a_guide_goes_along_to_a_cluster(dask_cluster, folder):
    dask_cluster.add_worker(threads=2)
    guided = ["--layer=inception_a/output + pool1/norm1", "--guide=guide.png"]
    dream(*guided, "--output=here.png", cwd=folder)
    dream(*guided, f"--scheduler={dask_cluster.address}", cwd=folder)
    assert np.array_equal(pixels(folder / "out.png"), pixels(folder / "here.png"))


@pytest.mark.parametrize(
    ("guide", "words"),
    [
        ("nosuch.png", ["--guide nosuch.png"]),
        ("text.png", ["--guide text.png", "cannot be read"]),
        ("out.png", ["would overwrite --guide"]),
    ],
)
def test_guides_that_cannot_be_are_refused(guide, words, folder):
    (folder / "text.png").write_text("no picture")
    CARD.save(folder / "out.png")
    done = run_cli(*DREAM, f"--guide={guide}", "--layer=inception_a/output", cwd=folder)
    assert_one_line(done, 2, *words)


def test_a_guide_leads_the_dream_to_what_it_has(folder):
    """Relative to the other run, each has larger products with its own guide."""
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::8] = stripes[:, 1::8] = (255, 40, 0)
    Image.fromarray(stripes).save(folder / "stripes.png")
    products = []
    for name in ("guide.png", "stripes.png"):
        words = [f"--guide={name}", f"--output=by_{name}", "--num_steps=30", "--p_reg=0"]
        dream("--layer=inception_a/output", *words, "--tv_reg=0", cwd=folder)
        with with_guide(FILES, pixels(folder / name)) as files:
            target = Target("inception_a/output", Resemble())
            ours = Ascent(files, target)
        products.append(lambda a, objective=ours.objective: -objective.loss(a))
    likeness = np.zeros((2, 2))
    for i, name in enumerate(("by_guide.png", "by_stripes.png")):
        image = np.zeros((1, 3, 160, 200))
        cnn_vis.from_uint8(pixels(folder / name), MEAN, image)
        a = ours.activations(image[:, :, 64:96, 64:96].astype(np.float32))
        likeness[i] = [product(a) for product in products]
    assert likeness[0, 0] * likeness[1, 1] > 1.02 * likeness[0, 1] * likeness[1, 0]


def test_guides_differ_by_content():
    """Though their files may have the same path."""
    guides = [np.asarray(CARD), np.asarray(CARD)[::-1].copy()]
    specs = []
    for guide in (*guides, guides[0]):
        with with_guide(FILES, guide) as files:
            specs.append(NetworkSpec(files, ("pool1/norm1",)))
    assert specs[0].files.guide == specs[1].files.guide
    assert specs[0] != specs[1]
    assert specs[0] == specs[2]
