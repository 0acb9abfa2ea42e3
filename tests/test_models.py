"""Networks by name: which one runs, and the whole way of a download, from a real HTTP server on
this machine."""

import functools
import hashlib
import http.server
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import time

import numpy as np
import pytest
from conftest import GOLDEN, ONE, ROOT, TINY, assert_one_line, psnr, run_cli
from PIL import Image

import cnn_vis
from cnn_vis_lib.description import Description, fit_classifier
from cnn_vis_lib.models import GOOGLENET_DEPLOY, MODELS, Model, find_in_caffe
from cnn_vis_lib.prototxt import caffe_net

MINI = ROOT / "models" / "googlenet_mini" / "googlenet_mini.caffemodel"


PLACES_NAME = "googlelet_places205_train_iter_2400000.caffemodel"


@functools.cache
def googlenet_weights(classes):
    """The bytes of a caffemodel that fits GoogLeNet's prototxt, with random weights and `classes`
    classes."""
    net = Description(find_in_caffe(GOOGLENET_DEPLOY, GOOGLENET_DEPLOY)).net
    fit_classifier(net, {"loss3/classifier": [(classes, 1024), (classes,)]})
    with tempfile.NamedTemporaryFile() as file:
        caffe_net(net).save(file.name)
        return file.read()


@pytest.fixture
def weights():
    """googlenet_weights(classes)."""
    return googlenet_weights


@pytest.fixture
def server():
    """A server, as the dict {path: bytes or function(handler)} that it serves; `url` is its
    address."""
    answers = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            answer = answers.get(self.path)
            if answer is None:
                return self.send_error(404)
            if callable(answer):
                return answer(self)
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            return self.wfile.write(answer)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        answers["url"] = f"http://127.0.0.1:{running.server_port}"
        yield answers
        running.shutdown()


def fetch(server, name, path, folder, **environment):
    return run_cli(
        f"--download_model={name}",
        f"--model_url={server['url']}{path}",
        cwd=folder,
        CAFFE_ROOT=None,
        CNN_VIS_MODELS=str(folder / "models"),
        **environment,
    )


def installed(folder):
    """All files below the models folder."""
    return sorted(
        str(path.relative_to(folder / "models"))
        for path in (folder / "models").rglob("*")
        if path.is_file()
    )


def test_a_good_download_is_installed_and_used(server, weights, tmp_path, photographs):
    server["/365"] = weights(365)
    done = fetch(server, "googlenet_places365", "/365", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "structure checked" in done.stdout
    assert hashlib.sha256(weights(365)).hexdigest() in done.stdout
    name = "googlenet_places365/googlenet_places365.caffemodel"
    assert installed(tmp_path) == [name, f"{name}.checked"]
    environment = {"CAFFE_ROOT": None, "CNN_VIS_MODELS": str(tmp_path / "models")}
    listed = run_cli("--list_models", cwd=tmp_path, **environment).stdout
    (line,) = (line for line in listed.splitlines() if line.startswith("googlenet_places365"))
    assert "structure checked" in line
    common = [
        "--model=googlenet_places365",
        f"--image={photographs}/chelsea.png",
        "--num_steps=1",
        "--gpu=-1",
    ]
    done = run_cli(
        *common,
        "--image_type=amplify_neuron",
        "--layer=loss3/classifier",
        "--target_neuron=364",
        "--verbose",
        cwd=tmp_path,
        **environment,
    )
    assert done.returncode == 0, done.stderr
    assert "loss3/classifier 365" in done.stderr
    done = run_cli(
        *common,
        "--image_type=amplify_neuron",
        "--layer=prob",
        "--target_neuron=365",
        cwd=tmp_path,
        **environment,
    )
    assert_one_line(done, 2, "--target_neuron", "365 channels")
    (tmp_path / "models" / name).write_bytes(weights(205))
    assert "changed since" in run_cli("--list_models", cwd=tmp_path, **environment).stdout


def test_a_file_with_the_known_hash_is_verified(server, weights, tmp_path, monkeypatch, capsys):
    """A file with the known hash is installed as verified. Runs in this process, to replace the
    real hash, which no test file has."""
    server["/file"] = weights(1000)
    model = Model(
        "bvlc_googlenet", "http://unused", (f"sha1:{hashlib.sha1(weights(1000)).hexdigest()}",)
    )
    monkeypatch.setitem(MODELS, "bvlc_googlenet", model)
    monkeypatch.setenv("CNN_VIS_MODELS", str(tmp_path / "models"))
    monkeypatch.delenv("CAFFE_ROOT", raising=False)
    assert (
        cnn_vis.main(["--download_model=bvlc_googlenet", f"--model_url={server['url']}/file"]) == 0
    )
    assert "bvlc_googlenet: verified, sha256:" in capsys.readouterr().out
    assert installed(tmp_path) == ["bvlc_googlenet/bvlc_googlenet.caffemodel"]


def test_a_file_with_a_wrong_hash_is_refused(server, weights, tmp_path):
    server["/file"] = weights(1000)
    assert_one_line(
        fetch(server, "bvlc_googlenet", "/file", tmp_path),
        1,
        "sha1",
        "405fc5acd08a3bb12de8ee5e23a96bec22f08204",
    )
    assert installed(tmp_path) == []


def test_weights_of_another_network_are_refused(server, tmp_path):
    server["/file"] = MINI.read_bytes()
    assert_one_line(
        fetch(server, "googlenet_places365", "/file", tmp_path), 1, "conv2/3x3", "shape"
    )
    assert installed(tmp_path) == []


def test_what_is_not_a_caffemodel_is_refused(server, tmp_path):
    server["/file"] = b"\x00" * 5000
    assert_one_line(
        fetch(server, "googlenet_places365", "/file", tmp_path), 1, "googlenet_places365"
    )
    assert installed(tmp_path) == []


@pytest.mark.parametrize("name", ["bvlc_googlenet", "googlenet_places205", "googlenet_places365"])
def test_a_web_page_is_refused(name, server, tmp_path):
    server["/file"] = b"<!DOCTYPE html><html><body>Please log in</body></html>"
    assert_one_line(fetch(server, name, "/file", tmp_path), 1, "web page")
    assert installed(tmp_path) == []


def test_a_download_that_breaks_off_leaves_nothing(server, weights, tmp_path):
    def cut_off(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(weights(365))))
        handler.end_headers()
        handler.wfile.write(weights(365)[:1_000_000])

    server["/file"] = cut_off
    assert_one_line(fetch(server, "googlenet_places365", "/file", tmp_path), 1, "interrupted")
    assert installed(tmp_path) == []
    server["/file"] = weights(365)
    assert fetch(server, "googlenet_places365", "/file", tmp_path).returncode == 0


def test_a_slow_but_steady_server_is_waited_for(server, weights, tmp_path):
    def slow(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(weights(365))))
        handler.end_headers()
        for start in range(0, len(weights(365)), 4_000_000):
            handler.wfile.write(weights(365)[start : start + 4_000_000])
            time.sleep(0.2)

    server["/file"] = slow
    assert fetch(server, "googlenet_places365", "/file", tmp_path).returncode == 0


def test_a_silent_server_is_not_waited_for(server, tmp_path, monkeypatch, capsys):
    release = threading.Event()
    server["/file"] = lambda handler: release.wait(20)
    monkeypatch.setattr("cnn_vis_lib.download.TIMEOUT", 1)
    monkeypatch.setenv("CNN_VIS_MODELS", str(tmp_path / "models"))
    assert (
        cnn_vis.main(["--download_model=googlenet_places365", f"--model_url={server['url']}/file"])
        == 1
    )
    release.set()
    assert "did not respond within 1 s" in capsys.readouterr().err
    assert installed(tmp_path) == []


def test_a_missing_file_is_one_line(server, tmp_path):
    assert_one_line(fetch(server, "bvlc_googlenet", "/none", tmp_path), 1, "404", "--model_url")


def with_bvlc_googlenet(weights, folder):
    """(an environment in which BVLC GoogLeNet is installed, below `folder`; the file's path)."""
    place = folder / "models/bvlc_googlenet/bvlc_googlenet.caffemodel"
    place.parent.mkdir(parents=True)
    place.write_bytes(weights(1000))
    return {"CAFFE_ROOT": None, "CNN_VIS_MODELS": str(folder / "models")}, place


@pytest.mark.parametrize(
    ("layer", "hint"),
    [
        ("pineapple", "did you mean loss3/classifier:pineapple?"),
        ("golden_retriever", "did you mean loss3/classifier:golden_retriever?"),
        ("conv2_3x3", "did you mean conv2/3x3"),
        ("inception_4c", "did you mean inception_4c/output"),
        ("conv4_4", "VGG or CaffeNet; give its files"),
        ("mixed4c", "TensorFlow's Inception"),
        ("res4f", "ResNet"),
        ("fire9", "SqueezeNet"),
    ],
)
def test_a_layer_of_another_network_and_a_class_are_recognized(layer, hint, weights, tmp_path):
    """And the network is called by its name, not by a file that nobody named."""
    environment, _ = with_bvlc_googlenet(weights, tmp_path)
    words = [f"--layer={layer}", "--gpu=-1", "--model=bvlc_googlenet"]
    done = run_cli(*words, cwd=tmp_path, **environment)
    said = f"--layer {layer}: bvlc_googlenet has no such layer"
    assert_one_line(done, 2, said, hint)


def test_no_connection_is_one_line(tmp_path):
    assert_one_line(
        fetch({"url": "http://127.0.0.1:9"}, "bvlc_googlenet", "/x", tmp_path),
        1,
        "no connection",
        "sha1:405fc5acd08a3bb12de8ee5e23a96bec22f08204",
        "bvlc_googlenet/bvlc_googlenet.caffemodel",
    )
    assert_one_line(fetch({"url": "nonsense"}, "bvlc_googlenet", "", tmp_path), 2, "nonsense")


def test_the_usual_proxy_variables_work(server, weights, tmp_path):
    """The usual proxy variables are heeded: the proxy here answers for a host that does not
    exist."""
    server["http://models.invalid/365"] = weights(365)
    proxy = {"http_proxy": server["url"], "no_proxy": "", "NO_PROXY": ""}
    done = fetch({"url": "http://models.invalid"}, "googlenet_places365", "/365", tmp_path, **proxy)
    assert done.returncode == 0, done.stderr


def test_a_folder_that_cannot_be_written_is_one_line(server, weights, tmp_path):
    """A file where the folder should be stands for every place that cannot be written to, for root
    too."""
    server["/365"] = weights(365)
    (tmp_path / "models").write_text("")
    assert_one_line(fetch(server, "googlenet_places365", "/365", tmp_path), 1, "CNN_VIS_MODELS")


def archive(members):
    """A tar.gz of {name: bytes}."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def test_only_the_weights_are_taken_from_an_archive(server, weights, tmp_path, photographs):
    """Only the weights are taken from the archive; nothing in it can be written elsewhere."""
    members = {
        "../../escaped": b"x",
        "/tmp/cnn-vis-escaped": b"x",
        f"../models/places/{PLACES_NAME}": weights(205),
    }
    server["/205.tar.gz"] = archive(
        {**members, "googlenet_places205/deploy_places205.protxt": b"name: 'x'"}
    )
    done = fetch(server, "googlenet_places205", "/205.tar.gz", tmp_path)
    assert done.returncode == 0, done.stderr
    name = "googlenet_places205/googlenet_places205.caffemodel"
    assert installed(tmp_path) == [name, f"{name}.checked"]
    assert not os.path.exists("/tmp/cnn-vis-escaped")
    assert sorted(os.listdir(tmp_path)) == ["models"]
    done = run_cli(
        "--model=googlenet_places205",
        f"--image={photographs}/chelsea.png",
        "--layer=inception_4b/3x3_reduce",
        "--num_steps=1",
        "--gpu=-1",
        cwd=tmp_path,
        CAFFE_ROOT=None,
        CNN_VIS_MODELS=str(tmp_path / "models"),
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "data", [archive({"readme": b"nothing here"}), b"\x1f\x8b" + b"\x00" * 999, b"not an archive"]
)
def test_a_bad_archive_is_one_line(data, server, tmp_path):
    server["/205.tar.gz"] = data
    assert_one_line(fetch(server, "googlenet_places205", "/205.tar.gz", tmp_path), 1, "archive")
    assert installed(tmp_path) == []


def test_places205_where_the_original_expected_it(weights, tmp_path, photographs):
    folder = tmp_path / "caffe" / "models" / "googlenet_places"
    folder.mkdir(parents=True)
    (folder / PLACES_NAME).write_bytes(weights(205))
    done = run_cli(
        "--model=googlenet_places205",
        "--layer=loss3/classifier",
        f"--image={photographs}/chelsea.png",
        "--num_steps=1",
        "--gpu=-1",
        "--verbose",
        cwd=tmp_path,
        CAFFE_ROOT=str(tmp_path / "caffe"),
    )
    assert done.returncode == 0, done.stderr
    assert "loss3/classifier 205" in done.stderr


def test_missing_network_names_the_places(tmp_path):
    done = run_cli(
        "--model=bvlc_googlenet",
        "--gpu=-1",
        cwd=tmp_path,
        CNN_VIS_MODELS=str(tmp_path),
        CAFFE_ROOT="/nowhere",
    )
    assert_one_line(
        done,
        2,
        "bvlc_googlenet",
        "/nowhere/models/bvlc_googlenet/bvlc_googlenet.caffemodel",
        str(tmp_path),
    )


def test_caffe_root_wins(picture, tmp_path):
    """Files in $CAFFE_ROOT are used under the names that the original looks for."""
    folder = tmp_path / "caffe" / "models" / "bvlc_googlenet"
    folder.mkdir(parents=True)
    shutil.copy(GOLDEN / "deploy.prototxt", folder)
    shutil.copy(GOLDEN / "tiny_inception.caffemodel", folder / "bvlc_googlenet.caffemodel")
    mean = tmp_path / "caffe" / "python" / "caffe" / "imagenet"
    mean.mkdir(parents=True)
    shutil.copy(GOLDEN / "mean.npy", mean / "ilsvrc_2012_mean.npy")
    common = [
        "--layer=inception_a/output",
        "--num_steps=2",
        f"--image={picture}",
        "--iter_behavior=none",
        "--gpu=-1",
    ]
    done = run_cli(*common, "--output=a.png", cwd=tmp_path, CAFFE_ROOT=str(tmp_path / "caffe"))
    assert done.returncode == 0, done.stderr
    assert run_cli(*common, *TINY, "--output=b.png", cwd=tmp_path).returncode == 0
    assert psnr(tmp_path / "a.png", tmp_path / "b.png") == np.inf


def test_the_small_network_is_used_with_a_notice(tmp_path, photographs):
    environment = {"CAFFE_ROOT": None, "CNN_VIS_MODELS": str(tmp_path / "none")}
    done = run_cli(
        f"--image={photographs}/in.jpg", "--num_steps=1", "--gpu=-1", cwd=tmp_path, **environment
    )
    assert done.returncode == 0, done.stderr
    assert "--download_model bvlc_googlenet" in done.stderr
    assert "googlenet_mini, " in done.stderr
    assert Image.open(tmp_path / "out.png").size == (640, 427)


def test_all_users_of_an_environment_can_share_a_network(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setenv("CNN_VIS_MODELS", str(tmp_path / "mine"))
    monkeypatch.delenv("CAFFE_ROOT", raising=False)
    model = MODELS["bvlc_googlenet"]
    shared, mine = (
        tmp_path / folder / "bvlc_googlenet/bvlc_googlenet.caffemodel"
        for folder in ("share/cnn-vis", "mine")
    )
    assert model.find_weights() is None
    for place in (shared, mine):  # one's own goes first
        place.parent.mkdir(parents=True)
        place.write_bytes(b"")
        assert model.find_weights() == str(place)


def test_bvlc_googlenet_is_used_once_it_is_there(weights, tmp_path, photographs):
    environment, place = with_bvlc_googlenet(weights, tmp_path)
    words = [f"--image={photographs}/in.jpg", "--num_steps=1", "--gpu=-1", "--verbose"]
    done = run_cli(*words, cwd=tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    assert "bvlc_googlenet, " in done.stderr
    assert f"{place}; " in done.stderr


def test_the_small_network_is_what_was_committed(tmp_path):
    line = run_cli("--list_models", cwd=tmp_path).stdout.splitlines()[0]
    assert line.startswith("googlenet_mini ")
    assert "verified: " in line
    assert "not verified" not in line
    assert MINI.stat().st_size <= 8_000_000


def test_mini_can_be_copied_elsewhere(tmp_path, photographs):
    """Named by --caffe_model and --deploy_txt, the network works in any folder."""
    for name in ("deploy.prototxt", "googlenet_mini.caffemodel"):
        shutil.copy(ROOT / "models" / "googlenet_mini" / name, tmp_path)
    done = run_cli(
        "--deploy_txt=deploy.prototxt",
        "--caffe_model=googlenet_mini.caffemodel",
        "--num_steps=1",
        "--gpu=-1",
        f"--image={photographs}/chelsea.png",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr


def test_what_is_not_a_mean_is_refused(tmp_path):
    np.savez(tmp_path / "several.npz", a=np.zeros(3))
    for name, array in (
        ("empty", np.zeros(0)),
        ("complex", np.zeros(3) * 1j),
        ("text", np.array(["a"])),
        ("far", np.full(3, 1e300)),
    ):
        np.save(tmp_path / name, array)
    (tmp_path / "zip.npy").write_bytes(b"PK\x03\x04 and no more")
    for name in ("several.npz", "empty.npy", "complex.npy", "text.npy", "far.npy", "zip.npy"):
        assert_one_line(
            run_cli(*ONE, f"--mean_image={name}", cwd=tmp_path), 2, "--mean_image", name
        )


def test_distill_writes_a_network_to_dream_with(weights, photographs, tmp_path):
    """A few iterations from a teacher write a network that Caffe loads and the program dreams with;
    a stopped one goes on."""
    pytest.importorskip("torch", reason="distill.py takes PyTorch, which the program does not")
    (tmp_path / "teacher.caffemodel").write_bytes(weights(1000))
    script = [
        sys.executable,
        str(ROOT / "models" / "googlenet_mini" / "distill.py"),
        "teacher.caffemodel",
        str(photographs),
        "student.caffemodel",
        "--width=0.25",
        "--crop=64",
        "--batch=2",
        "--every=1",
        "--fit=1",
    ]
    running = subprocess.Popen(
        [*script, "--iterations=100000"], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    )
    for line in running.stdout:
        if line.startswith("step 2,"):
            break
    running.kill()
    running.communicate()
    assert (tmp_path / "student.state.pt").exists()
    done = subprocess.run(
        [*script, "--iterations=4"], cwd=tmp_path, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert int(re.match(r"step (\d+),", done.stdout)[1]) >= 1
    assert not (tmp_path / "student.state.pt").exists()
    done = run_cli(
        "--deploy_txt=student.prototxt",
        "--caffe_model=student.caffemodel",
        "--layer=inception_5b/output",
        "--num_steps=1",
        "--verbose",
        "--gpu=-1",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "inception_5b/output 256x7x7" in done.stderr


def test_distill_solves_a_layer(monkeypatch):
    """Least squares find the weights of a layer with a ReLU from what it sees and gives."""
    torch = pytest.importorskip("torch", reason="distill.py takes PyTorch")
    monkeypatch.syspath_prepend(ROOT / "models" / "googlenet_mini")
    import distill

    torch.manual_seed(0)
    x = torch.nn.functional.pad(torch.randn(5000, 20), (0, 1), value=1.0)
    weights = torch.randn(21, 6)
    goal = (x @ weights).relu()
    found = distill.solve(x, goal, rounds=200)
    assert float((found - weights).abs().max()) < 0.05
    once = distill.solve(x, goal, rounds=1)  # takes zeros literally
    assert float((once - weights).abs().max()) > 0.5


def test_missing_weights_of_a_deploy_of_ones_own_are_named(tmp_path):
    options = [f"--deploy_txt={GOLDEN}/deploy.prototxt", f"--mean_image={GOLDEN}/mean.npy"]
    environment = {"CNN_VIS_MODELS": str(tmp_path), "CAFFE_ROOT": None}
    done = run_cli(*options, "--gpu=-1", cwd=tmp_path, **environment)
    assert_one_line(done, 2, "--model bvlc_googlenet", "--caffe_model")
