"""Networks by name: which one runs, and the whole way of a download, from a real HTTP server on this machine."""

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
from conftest import GOLDEN, ROOT, assert_one_line, cnn_vis
from PIL import Image

import cnn_vis as program

MINI = ROOT / "models" / "googlenet_mini" / "googlenet_mini.caffemodel"
PLACES_NAME = "googlelet_places205_train_iter_2400000.caffemodel"


@functools.cache
def googlenet_weights(classes):
    """The bytes of a caffemodel that fits GoogLeNet's prototxt, with random weights and `classes` classes."""
    net = program.read_prototxt(program.find_in_caffe(program.GOOGLENET_DEPLOY, program.GOOGLENET_DEPLOY))
    program.fit_classifier(net, {"loss3/classifier": [(classes, 1024), (classes,)]})
    with program.caffe_net(net) as loaded, tempfile.NamedTemporaryFile() as file:
        loaded.save(file.name)
        return file.read()


@pytest.fixture
def weights():
    """googlenet_weights(classes)."""
    return googlenet_weights


@pytest.fixture
def server():
    """Serves {path: bytes or function(handler)}; its `url` is where."""
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
    return cnn_vis(f"--download_model={name}", f"--model_url={server['url']}{path}", cwd=folder, CAFFE_ROOT=None,
                   CNN_VIS_MODELS=str(folder / "models"), **environment)  # fmt: skip


def installed(folder):
    """All files below the models folder."""
    return sorted(str(path.relative_to(folder / "models")) for path in (folder / "models").rglob("*") if path.is_file())


def test_a_good_download_is_installed_and_used(server, weights, tmp_path, photographs):
    server["/365"] = weights(365)
    done = fetch(server, "googlenet_places365", "/365", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "structure checked" in done.stdout
    assert hashlib.sha256(weights(365)).hexdigest() in done.stdout
    name = "googlenet_places365/googlenet_places365.caffemodel"
    assert installed(tmp_path) == [name, f"{name}.checked"]
    environment = {"CAFFE_ROOT": None, "CNN_VIS_MODELS": str(tmp_path / "models")}
    listed = cnn_vis("--list_models", cwd=tmp_path, **environment).stdout
    (line,) = (line for line in listed.splitlines() if line.startswith("googlenet_places365"))
    assert "structure checked" in line
    common = ["--model=googlenet_places365", f"--image={photographs}/chelsea.png", "--num_steps=1", "--gpu=-1"]
    done = cnn_vis(*common, "--image_type=amplify_neuron", "--layer=loss3/classifier", "--target_neuron=364", cwd=tmp_path,
                   **environment)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "loss3/classifier 365" in done.stderr
    done = cnn_vis(*common, "--image_type=amplify_neuron", "--layer=prob", "--target_neuron=365", cwd=tmp_path, **environment)
    assert_one_line(done, 2, "--target_neuron", "365 channels")
    (tmp_path / "models" / name).write_bytes(weights(205))
    assert "changed since" in cnn_vis("--list_models", cwd=tmp_path, **environment).stdout


def test_known_hash(server, weights, tmp_path, monkeypatch, capsys):
    """A file with the known hash is placed as verified. Run in this process, as the real file's hash cannot be met."""
    server["/file"] = weights(1000)
    model = program.Model("bvlc_googlenet", "http://unused", (f"sha1:{hashlib.sha1(weights(1000)).hexdigest()}",))
    monkeypatch.setitem(program.MODELS, "bvlc_googlenet", model)
    monkeypatch.setenv("CNN_VIS_MODELS", str(tmp_path / "models"))
    monkeypatch.delenv("CAFFE_ROOT", raising=False)
    assert program.main(["--download_model=bvlc_googlenet", f"--model_url={server['url']}/file"]) == 0
    assert "bvlc_googlenet: verified, sha256:" in capsys.readouterr().out
    assert installed(tmp_path) == ["bvlc_googlenet/bvlc_googlenet.caffemodel"]


def test_wrong_hash(server, weights, tmp_path):
    server["/file"] = weights(1000)
    assert_one_line(fetch(server, "bvlc_googlenet", "/file", tmp_path), 1, "sha1", "405fc5acd08a3bb12de8ee5e23a96bec22f08204")
    assert installed(tmp_path) == []


def test_wrong_structure(server, tmp_path):
    server["/file"] = MINI.read_bytes()
    assert_one_line(fetch(server, "googlenet_places365", "/file", tmp_path), 1, "conv1/7x7_s2", "shape")
    assert installed(tmp_path) == []


def test_not_a_caffemodel(server, tmp_path):
    server["/file"] = b"\x00" * 5000
    assert_one_line(fetch(server, "googlenet_places365", "/file", tmp_path), 1, "googlenet_places365")
    assert installed(tmp_path) == []


@pytest.mark.parametrize("name", ["bvlc_googlenet", "googlenet_places205", "googlenet_places365"])
def test_html(name, server, tmp_path):
    server["/file"] = b"<!DOCTYPE html><html><body>Please log in</body></html>"
    assert_one_line(fetch(server, name, "/file", tmp_path), 1, "web page")
    assert installed(tmp_path) == []


def test_truncated(server, weights, tmp_path):
    def cut_off(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(weights(365))))
        handler.end_headers()
        handler.wfile.write(weights(365)[:1_000_000])

    server["/file"] = cut_off
    assert_one_line(fetch(server, "googlenet_places365", "/file", tmp_path), 1, "broke off")
    assert installed(tmp_path) == []
    server["/file"] = weights(365)
    assert fetch(server, "googlenet_places365", "/file", tmp_path).returncode == 0


def test_slow_but_steady(server, weights, tmp_path):
    def slow(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(weights(365))))
        handler.end_headers()
        for start in range(0, len(weights(365)), 4_000_000):
            handler.wfile.write(weights(365)[start : start + 4_000_000])
            time.sleep(0.2)

    server["/file"] = slow
    assert fetch(server, "googlenet_places365", "/file", tmp_path).returncode == 0


def test_stalled(server, tmp_path, monkeypatch, capsys):
    release = threading.Event()
    server["/file"] = lambda handler: release.wait(20)
    monkeypatch.setattr(program, "TIMEOUT", 1)
    monkeypatch.setenv("CNN_VIS_MODELS", str(tmp_path / "models"))
    assert program.main(["--download_model=googlenet_places365", f"--model_url={server['url']}/file"]) == 1
    release.set()
    assert "no word from the server for 1 seconds" in capsys.readouterr().err
    assert installed(tmp_path) == []


def test_absent(server, tmp_path):
    assert_one_line(fetch(server, "bvlc_googlenet", "/none", tmp_path), 1, "404", "--model_url")


def test_offline(tmp_path):
    assert_one_line(fetch({"url": "http://127.0.0.1:9"}, "bvlc_googlenet", "/x", tmp_path), 1, "no connection", "online")
    assert_one_line(fetch({"url": "nonsense"}, "bvlc_googlenet", "", tmp_path), 1, "nonsense")


def test_proxy_variables(server, weights, tmp_path):
    """The usual proxy variables are heeded: the proxy here answers for a host that does not exist."""
    server["http://models.invalid/365"] = weights(365)
    proxy = {"http_proxy": server["url"], "no_proxy": "", "NO_PROXY": ""}
    done = fetch({"url": "http://models.invalid"}, "googlenet_places365", "/365", tmp_path, **proxy)
    assert done.returncode == 0, done.stderr


def test_no_write_permission(server, weights, tmp_path):
    """A file where the folder should be stands for every place that cannot be written to, for root too."""
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


def test_places205_archive(server, weights, tmp_path, photographs):
    """Only the weights are taken from the archive; nothing in it can be written elsewhere."""
    members = {"../../escaped": b"x", "/tmp/cnn-vis-escaped": b"x", f"../models/places/{PLACES_NAME}": weights(205)}
    server["/205.tar.gz"] = archive({**members, "googlenet_places205/deploy_places205.protxt": b"name: 'x'"})
    done = fetch(server, "googlenet_places205", "/205.tar.gz", tmp_path)
    assert done.returncode == 0, done.stderr
    name = "googlenet_places205/googlenet_places205.caffemodel"
    assert installed(tmp_path) == [name, f"{name}.checked"]
    assert not os.path.exists("/tmp/cnn-vis-escaped")
    assert sorted(os.listdir(tmp_path)) == ["models"]
    done = cnn_vis("--model=googlenet_places205", f"--image={photographs}/chelsea.png", "--layer=inception_4b/3x3_reduce",
                   "--num_steps=1", "--gpu=-1", cwd=tmp_path, CAFFE_ROOT=None,
                   CNN_VIS_MODELS=str(tmp_path / "models"))  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("data", [archive({"readme": b"nothing here"}), b"\x1f\x8b" + b"\x00" * 999, b"not an archive"])
def test_bad_archive(data, server, tmp_path):
    server["/205.tar.gz"] = data
    assert_one_line(fetch(server, "googlenet_places205", "/205.tar.gz", tmp_path), 1, "archive")
    assert installed(tmp_path) == []


def test_places205_where_the_original_expected_it(weights, tmp_path, photographs):
    folder = tmp_path / "caffe" / "models" / "googlenet_places"
    folder.mkdir(parents=True)
    (folder / PLACES_NAME).write_bytes(weights(205))
    done = cnn_vis("--model=googlenet_places205", "--layer=loss3/classifier", f"--image={photographs}/chelsea.png",
                   "--num_steps=1", "--gpu=-1", cwd=tmp_path, CAFFE_ROOT=str(tmp_path / "caffe"))  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "loss3/classifier 205" in done.stderr


def test_the_small_network_is_used_with_a_notice(tmp_path, photographs):
    environment = {"CAFFE_ROOT": None, "CNN_VIS_MODELS": str(tmp_path / "none")}
    done = cnn_vis(f"--image={photographs}/in.jpg", "--num_steps=1", "--gpu=-1", cwd=tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    assert "--download_model bvlc_googlenet" in done.stderr
    assert "googlenet_mini (" in done.stderr
    assert Image.open(tmp_path / "out.png").size == (640, 427)


def test_bvlc_googlenet_is_used_once_it_is_there(weights, tmp_path, photographs):
    place = tmp_path / "models" / "bvlc_googlenet" / "bvlc_googlenet.caffemodel"
    place.parent.mkdir(parents=True)
    place.write_bytes(weights(1000))
    done = cnn_vis(f"--image={photographs}/in.jpg", "--num_steps=1", "--gpu=-1", cwd=tmp_path, CAFFE_ROOT=None,
                   CNN_VIS_MODELS=str(tmp_path / "models"))  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"bvlc_googlenet ({place})" in done.stderr


def test_the_small_network_is_what_was_committed(tmp_path):
    line = cnn_vis("--list_models", cwd=tmp_path).stdout.splitlines()[0]
    assert line.startswith("googlenet_mini ")
    assert "verified: " in line
    assert "not verified" not in line
    assert MINI.stat().st_size <= 8_000_000


def test_list_layers(tmp_path):
    """Every GoogLeNet layer that can be targeted, in order, with its shape; and of any prototxt."""
    listed = cnn_vis("--list_layers", "--model=googlenet_mini", cwd=tmp_path).stdout.splitlines()
    assert listed[0].split() == ["conv1/7x7_s2", "32x112x112"]
    assert "inception_4c/output 256x14x14" in {" ".join(line.split()) for line in listed}
    tiny = cnn_vis("--list_layers", f"--deploy_txt={GOLDEN}/deploy.prototxt", cwd=tmp_path).stdout.splitlines()
    assert [line.split()[0] for line in tiny][-3:] == ["pool2/2x2_s2", "classifier", "prob"]
    assert not any("relu" in line for line in tiny)


def test_every_listed_layer_can_be_amplified():
    """Backward from each layer of the small network reaches the picture."""
    deploy = program.MODELS["googlenet_mini"].find_deploy()
    batch = np.random.default_rng(0).normal(0, 50, (1, 3, 224, 224)).astype(np.float32)
    names = [name for name, _ in program.layer_shapes(deploy, None)]
    for name in names[::7] + names[-1:]:
        gradient, (value,) = program.Network(program.NetworkSpec(deploy, str(MINI), name, program.Objective())).gradients(batch)
        assert np.isfinite(gradient).all()
        assert np.abs(gradient).max() > 0, name
        assert value > 0


def test_mini_can_be_copied_elsewhere(tmp_path, photographs):
    """The same file under --caffe_model and --deploy_txt is not tied to its place."""
    for name in ("deploy.prototxt", "googlenet_mini.caffemodel"):
        shutil.copy(ROOT / "models" / "googlenet_mini" / name, tmp_path)
    done = cnn_vis("--deploy_txt=deploy.prototxt", "--caffe_model=googlenet_mini.caffemodel", "--num_steps=1", "--gpu=-1",
                   f"--image={photographs}/chelsea.png", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_distill(weights, photographs, tmp_path):
    """A few iterations from a teacher write a network that Caffe loads and the program dreams with; a stopped one goes on."""
    pytest.importorskip("torch", reason="distill.py takes PyTorch, which the program does not")
    (tmp_path / "teacher.caffemodel").write_bytes(weights(1000))
    script = [sys.executable, str(ROOT / "models" / "googlenet_mini" / "distill.py"), "teacher.caffemodel", str(photographs),
              "student.caffemodel", "--width=0.25", "--crop=64", "--batch=2", "--every=1"]  # fmt: skip
    running = subprocess.Popen([*script, "--iterations=100000"], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    for line in running.stdout:
        if line.startswith("step 2,"):
            break
    running.kill()
    running.communicate()
    assert (tmp_path / "student.state.pt").exists()
    done = subprocess.run([*script, "--iterations=4"], cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert int(re.match(r"step (\d+),", done.stdout)[1]) >= 1
    assert not (tmp_path / "student.state.pt").exists()
    done = cnn_vis("--deploy_txt=student.prototxt", "--caffe_model=student.caffemodel", "--layer=inception_5b/output",
                   "--num_steps=1", "--gpu=-1", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "inception_5b/output 256x7x7" in done.stderr


@pytest.mark.parametrize("classes", [1, 7])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("legacy", [True, False])
def test_classifiers_of_any_width(classes, bias, legacy, tmp_path):
    """The width is that of the weights: in the older format of shapes too, where there is no bias, and for one class."""
    program.import_caffe()
    from caffe.proto import caffe_pb2

    text = (GOLDEN / "deploy.prototxt").read_text()
    if not bias:
        text = re.sub(r"param { lr_mult: 2 } (inner_product_param {)", r"\1 bias_term: false", text)
    (tmp_path / "deploy.prototxt").write_text(text)
    net = program.read_prototxt(str(tmp_path / "deploy.prototxt"))
    (layer,) = (layer for layer in net.layer if layer.type == "InnerProduct")
    layer.inner_product_param.num_output = classes
    with program.caffe_net(net) as loaded:
        loaded.save(str(tmp_path / "new.caffemodel"))
    weights = caffe_pb2.NetParameter.FromString((tmp_path / "new.caffemodel").read_bytes())
    for blob in (blob for layer in weights.layer for blob in layer.blobs if legacy):
        blob.num, blob.channels, blob.height, blob.width = [1] * (4 - len(blob.shape.dim)) + list(blob.shape.dim)
        blob.ClearField("shape")
    (tmp_path / "new.caffemodel").write_bytes(weights.SerializeToString())
    files = (str(tmp_path / "deploy.prototxt"), str(tmp_path / "new.caffemodel"))
    assert program.structure_error(*files) is None
    assert dict(program.layer_shapes(*files))[layer.name] == (classes,)


def test_gpus_are_those_that_this_process_sees(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [program.visible_gpu(number) for number in (0, 2)] == ["0", "2"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, GPU-8a1f")
    assert [program.visible_gpu(number) for number in (0, 1)] == ["3", "GPU-8a1f"]
