"""Caffe's own Python interface, which the package also offers without cnn_vis.py: every public
function that needs no extra files works with current libraries, without a warning."""

import numpy as np
import pytest
from PIL import Image
from skimage.color import rgb2gray

from cnn_vis_lib.prototxt import import_caffe

caffe = import_caffe()
io, L, P = caffe.io, caffe.layers, caffe.params
pytestmark = pytest.mark.filterwarnings("error")

RANDOM = np.random.default_rng(0)
PICTURE = RANDOM.integers(0, 256, (20, 30, 3), np.uint8)


@pytest.fixture
def files(tmp_path):
    """A small classifier's prototxt and weights, as paths."""
    net = caffe.NetSpec()
    net.data = L.Input(shape={"dim": [2, 3, 16, 16]})
    net.conv = L.Convolution(net.data, kernel_size=3, num_output=4, weight_filler={"type": "msra"})
    net.pool = L.Pooling(net.conv, pool=P.Pooling.MAX, kernel_size=2, stride=2)
    net.fc = L.InnerProduct(net.pool, num_output=5, weight_filler={"type": "xavier"})
    net.prob = L.Softmax(net.fc)
    (tmp_path / "net.prototxt").write_text(str(net.to_proto()))
    caffe.Net(str(tmp_path / "net.prototxt"), caffe.TEST).save(str(tmp_path / "net.caffemodel"))
    return str(tmp_path / "net.prototxt"), str(tmp_path / "net.caffemodel")


def test_arrays_become_protobuf_messages_and_back():
    array = RANDOM.random((2, 3, 4)).astype(np.float32)
    blob = io.array_to_blobproto(array, 2 * array)
    assert (io.blobproto_to_array(blob) == array).all()
    assert (io.blobproto_to_array(blob, return_diff=True) == 2 * array).all()
    text = io.arraylist_to_blobprotovector_str([array, 3 * array])
    one, other = io.blobprotovector_str_to_arraylist(text)
    assert (one == array).all()
    assert (other == 3 * array).all()
    for values in (array, PICTURE):
        datum = io.array_to_datum(values, 7)
        assert datum.label == 7
        assert (io.datum_to_array(datum) == values).all()
        io.datum_to_array(datum)[...] = 0


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "1", "P"])
def test_pictures_are_loaded(mode, tmp_path):
    picture = Image.fromarray(PICTURE)
    picture = picture.convert("L").convert(mode) if "A" in mode else picture.convert(mode)
    picture.save(tmp_path / "in.png")
    expected = np.asarray(picture.convert("RGB")) / 255
    loaded = io.load_image(str(tmp_path / "in.png"))
    assert (loaded.dtype, loaded.shape) == (np.float32, (20, 30, 3))
    assert loaded == pytest.approx(expected, abs=1e-6)
    grey = io.load_image(str(tmp_path / "in.png"), color=False)
    assert grey.shape == (20, 30, 1)
    assert grey[..., 0] == pytest.approx(rgb2gray(expected), abs=1e-6)


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_pictures_are_resized_without_smoothing(channels):
    """Linear between the pixels: every other pixel of a ramp is a ramp."""
    ramp = np.tile(np.arange(0, 1, 0.05, np.float32)[:, None, None], (1, 20, channels))
    small = io.resize_image(ramp, (5, 10))
    assert small.shape == (5, 10, channels)
    if channels != 5:
        assert small[:, 3, 0] == pytest.approx(np.arange(5) * 0.2 + 0.075, abs=1e-6)
    assert (io.resize_image(np.ones((9, 9, channels), np.float32), (4, 3)) == 1).all()


def test_pictures_are_cropped_ten_times():
    crops = io.oversample([PICTURE, PICTURE], (8, 8))
    assert crops.shape == (20, 8, 8, 3)
    assert (crops[0] == PICTURE[:8, :8]).all()
    assert (crops[4] == PICTURE[6:14, 11:19]).all()
    assert (crops[5] == PICTURE[:8, 7::-1]).all()


def test_the_transformer_goes_there_and_back():
    transformer = io.Transformer({"data": (1, 3, 20, 30)})
    transformer.set_transpose("data", (2, 0, 1))
    transformer.set_channel_swap("data", (2, 1, 0))
    transformer.set_raw_scale("data", 255.0)
    transformer.set_input_scale("data", 0.5)
    picture = PICTURE / 255
    means = (
        np.array([1.0, 2, 3]),
        np.full((3, 25, 35), 4.0),
        RANDOM.random((3, 20, 30)),
        RANDOM.random((20, 30)),
        np.full((10, 15), 6.0),
    )
    for mean in means:
        transformer.set_mean("data", mean)
        ready = transformer.preprocess("data", picture)
        assert (ready.dtype, ready.shape) == (np.float32, (3, 20, 30))
        assert transformer.deprocess("data", ready) == pytest.approx(picture, abs=1e-5)
    flat = (PICTURE[..., 2] - 6.0) / 2
    assert ready[0] == pytest.approx(flat, abs=1e-4)


@pytest.mark.parametrize("oversample", [True, False])
def test_a_classifier_predicts(oversample, files):
    mean = np.array([1.0, 2, 3])
    classifier = caffe.Classifier(
        *files, image_dims=(18, 18), mean=mean, raw_scale=255, channel_swap=(2, 1, 0)
    )
    picture = RANDOM.random((18, 18, 3)).astype(np.float32)
    found = classifier.predict([picture] * 3, oversample)
    crops = io.oversample([picture], (16, 16)) if oversample else picture[None, 1:17, 1:17]
    net = caffe.Net(*files, caffe.TEST)
    ready = (255 * crops[..., ::-1] - mean).transpose(0, 3, 1, 2)
    expected = net.forward_all(data=ready)["prob"].reshape(1, len(crops), 5).mean(1)
    assert found == pytest.approx(np.repeat(expected, 3, 0), abs=1e-5)


@pytest.mark.parametrize("mean", [None, np.array([1.0, 2, 3])])
@pytest.mark.parametrize("context_pad", [None, 2])
def test_a_detector_looks_at_windows(context_pad, mean, files, tmp_path):
    Image.fromarray(PICTURE).save(tmp_path / "in.png")
    windows = [np.array(w) for w in ((2, 3, 14, 19), (0, 0, 8, 8), (10, 20, 20, 30))]
    detector = caffe.Detector(
        *files, mean=mean, raw_scale=255, channel_swap=(2, 1, 0), context_pad=context_pad
    )
    found = detector.detect_windows([(str(tmp_path / "in.png"), windows)])
    assert [list(one["window"]) for one in found] == [list(window) for window in windows]
    for one in found:
        assert one["prediction"].sum() == pytest.approx(1, abs=1e-5)
    if context_pad is None:
        crop = io.resize_image(PICTURE[2:14, 3:19] / np.float32(255), (16, 16))
        ready = 255 * crop[..., ::-1] - (0 if mean is None else mean)
        expected = caffe.Net(*files, caffe.TEST).forward_all(data=ready.transpose(2, 0, 1)[None])
        assert found[0]["prediction"] == pytest.approx(expected["prob"][0], abs=1e-5)


def test_networks_run_in_batches(files):
    net = caffe.Net(*files, caffe.TEST)
    x = RANDOM.random((5, 3, 16, 16)).astype(np.float32)
    found = net.forward_all(blobs=["conv"], data=x)
    assert (found["conv"].shape, found["prob"].shape) == ((5, 4, 14, 14), (5, 5))
    blobs, diffs = net.forward_backward_all(data=x, prob=np.ones((5, 5), np.float32))
    assert blobs["prob"] == pytest.approx(found["prob"])
    assert list(diffs) == ["data"]
    assert net.top_names["conv"] == ["conv"]
    assert net.bottom_names["conv"] == ["data"]
    assert list(net.layer_dict) == ["data", "conv", "pool", "fc", "prob"]
    other = caffe.Net(files[0], caffe.TEST)
    other.share_with(net)
    assert (other.params["fc"][0].data == net.params["fc"][0].data).all()


def test_labels_come_from_memory(tmp_path):
    net = caffe.NetSpec()
    net.data, net.label = L.MemoryData(batch_size=2, channels=3, height=8, width=8, ntop=2)
    (tmp_path / "net.prototxt").write_text(str(net.to_proto()))
    loaded = caffe.Net(str(tmp_path / "net.prototxt"), caffe.TEST)
    data = RANDOM.random((4, 3, 8, 8)).astype(np.float32)
    loaded.set_input_arrays(data, np.arange(4, dtype=np.float32))
    loaded.forward()
    assert (loaded.forward()["label"].ravel() == [2, 3]).all()
    assert (loaded.blobs["data"].data == data[2:]).all()


@pytest.mark.parametrize("kind", ["SGD", "Nesterov", "AdaGrad", "RMSProp", "AdaDelta", "Adam"])
def test_solvers_learn(kind, tmp_path):
    net = caffe.NetSpec()
    net.data, net.label = L.DummyData(
        shape=[{"dim": [4, 3]}, {"dim": [4]}], data_filler={"type": "constant", "value": 1}, ntop=2
    )
    net.fc = L.InnerProduct(net.data, num_output=5, weight_filler={"type": "xavier"})
    net.loss = L.SoftmaxWithLoss(net.fc, net.label)
    (tmp_path / "net.prototxt").write_text(str(net.to_proto()))
    text = f'net: "{tmp_path}/net.prototxt" type: "{kind}" base_lr: 0.1 lr_policy: "fixed"'
    text += " max_iter: 9 momentum2: 0.99 solver_mode: CPU delta: 1e-6 snapshot_after_train: false"
    (tmp_path / "solver.prototxt").write_text(text)
    solver = caffe.get_solver(str(tmp_path / "solver.prototxt"))
    assert isinstance(solver, getattr(caffe, f"{kind}Solver"))
    before = solver.net.forward()["loss"].item()
    solver.step(5)
    assert solver.net.forward()["loss"].item() < before


def test_coordinates_are_mapped_between_layers():
    net = caffe.NetSpec()
    net.data = L.Input(shape={"dim": [1, 3, 16, 16]})
    net.conv = L.Convolution(net.data, kernel_size=3, num_output=4, pad=5, stride=2)
    net.up = L.Deconvolution(
        net.conv, convolution_param={"num_output": 4, "kernel_size": 4, "stride": 2}
    )
    from caffe import coord_map

    # Pixel j of conv lies at 2j - 5 + 1 in the data, and at 2j + 1.5 in the upsampled layer.
    axis, scale, offset = coord_map.coord_map_from_to(net.data, net.up)
    assert (axis, scale, offset) == (1, 1, 5.5)


def test_a_processor_that_lacks_what_the_build_uses_is_told():
    """In the words of an ImportError, instead of an illegal instruction. Where nothing is known
    about the processor, nothing is refused."""
    from caffe import processor

    needed = processor.needed_by("x86-64-v3")
    has = set(needed.split())
    processor.check(needed, has | {"sse2"})
    processor.check(needed, set())
    processor.check(processor.needed_by("armv8-a"), has)
    with pytest.raises(ImportError, match=r"\(x86-64-v3\); this one lacks avx2"):
        processor.check(needed, has - {"avx2"})
    processor.check(processor.needed_by("native"))
    assert processor.NEEDED in ("", processor.needed_by("native"), needed)
