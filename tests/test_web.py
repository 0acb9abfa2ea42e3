"""--iter_behavior web: the page and the server's answers, none of which may disturb the run."""

import contextlib
import http.client
import io
import json
import os
import pty
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import types

import numpy as np
import pytest
from conftest import (
    CHECKPOINT,
    ONE,
    QUICK,
    ROOT,
    RUN,
    STARTED,
    assert_one_line,
    free_port,
    pixels,
    run_cli,
    run_script,
    start,
    under_way,
    wait_for,
)
from PIL import Image

import cnn_vis
from cnn_vis_lib.web import Snapshot, Web, open_web_server
from cnn_vis_lib.writing import encode_jpeg

PLAIN = [word for word in RUN if not word.startswith("--stats")]
LONG = [*PLAIN, "--num_steps=100000", "--iter_behavior=web"]


def is_served(port):
    """Whether the page can be had. (Before the run, the port is tried for a moment.)"""
    with contextlib.suppress(OSError):
        return get(port, "/")[0] == 200
    return False


def watched(*arguments, cwd, begin=start):
    """(process, port) of a run with a page that answers."""
    port = free_port()
    running = begin(*arguments, f"--web_port={port}", cwd=cwd)
    wait_for(lambda: is_served(port))
    return running, port


def answer(port, request, method="GET"):
    """(status, headers, body) of what the server says to the bytes of a request."""
    with socket.create_connection(("127.0.0.1", port), 20) as client:
        client.sendall(request)
        with contextlib.closing(http.client.HTTPResponse(client, method=method)) as response:
            response.begin()
            return response.status, dict(response.headers), response.read()


def get(port, path, method="GET", **headers):
    """What the server says to a request; names of headers have _ for -."""
    headers = {"Host": f"127.0.0.1:{port}"} | headers
    lines = [f"{name.replace('_', '-')}: {value}" for name, value in headers.items() if value]
    request = "\r\n".join([f"{method} {path} HTTP/1.1", *lines, "", ""])
    return answer(port, request.encode(), method)


class Listener(threading.Thread):
    """Collects the server's events in `events` until one reports the end of the run; then gets the
    picture, as the page does."""

    def __init__(self, port):
        super().__init__(daemon=True)
        self.port, self.events, self.picture = port, [], None
        self.start()
        wait_for(lambda: self.events)

    def run(self):
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        connection.request("GET", "/events")
        with connection.getresponse() as response:
            assert response.headers["Content-Type"] == "text/event-stream"
            for line in response:
                if line.startswith(b"data: "):
                    self.events.append(json.loads(line[6:]))
                    if self.events[-1].get("end"):
                        self.picture = get(self.port, "/picture.jpg")[2]
                        return

    def all(self):
        """What the page knows after all events."""
        self.join(20)
        return {name: value for event in self.events for name, value in event.items()}


def as_jpeg(path):
    return encode_jpeg(pixels(path))


def test_the_address_is_told_even_when_quiet(tmp_path):
    """It is one line, of a port that is free."""
    done = run_cli(*ONE[:-1], "--iter_behavior=web", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("note: watch the run at http://127.0.0.1:")
    assert os.listdir(tmp_path) == ["out.png"]


def test_where_it_cannot_listen_is_one_line(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        done = run_cli(*ONE, "--iter_behavior=web", f"--web_port={port}", cwd=tmp_path)
        assert_one_line(done, 2, f"--web_port {port}", "in use", "choose another")
    for host in ("192.0.2.1", "name.invalid", "."):
        done = run_cli(*ONE, "--iter_behavior=web", f"--web_host={host}", cwd=tmp_path)
        assert_one_line(done, 2, f"--web_host {host}", "cannot listen there", "of this machine")
    assert os.listdir(tmp_path) == []


def test_another_address_comes_with_a_warning(tmp_path):
    """The recorded command keeps --web_port, but not --web_host."""
    done = run_cli(*ONE[:-1], "--iter_behavior=web", "--web_host=0.0.0.0", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    address, warning = done.stderr.splitlines()
    assert "http://127.0.0.1:" in address
    assert "whoever can reach port" in warning
    words = ["--iter_behavior=web", "--web_host=0.0.0.0", "--web_port=8000"]
    kept = cnn_vis.PARSER.words(cnn_vis.PARSER.parse_args(words))
    assert kept == ["--iter_behavior=web", "--web_port=8000"]
    told = list(cnn_vis.PARSER.without_effect(cnn_vis.PARSER.parse_args(words[1:])))
    assert [line.split()[0] for line in told] == ["--web_port", "--web_host"]


def test_only_the_page_is_served_and_only_to_itself(tmp_path):
    """Requests for another path, with another method or host name, or from another site are
    refused; so is anything that is not HTTP. The run is not disturbed."""
    running, port = watched(*LONG, cwd=tmp_path)
    own = f"127.0.0.1:{port}"

    status, headers, body = get(port, "/")
    assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    assert body == (ROOT / "cnn_vis_lib" / "page.html").read_bytes()
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert headers["Cache-Control"] == "no-store"
    assert get(port, "/", "HEAD")[::2] == (200, b"")
    assert get(port, "/events", "HEAD")[0] == get(port, "/picture.jpg", "HEAD")[0] == 200
    for host in (f"localhost:{port}", f"[::1]:{port}", f"LOCALHOST:{port}"):
        assert get(port, "/", Host=host)[0] == 200
    assert get(port, "/", Origin=f"http://{own}", Sec_Fetch_Site="same-origin")[0] == 200
    assert get(port, "/", Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="navigate")[0] == 200

    for path in ("/x", "/out.png", "/../etc/passwd", "/..%2f", "/events/", f"http://{own}/"):
        assert get(port, path)[0] == 404, path
    for method in ("POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "CONNECT", "NONSENSE"):
        status, headers, _ = get(port, "/", method)
        assert (status, headers["Allow"]) == (405, "GET, HEAD"), method
    foreign = [
        {"Host": host}
        for host in (
            "evil.example", f"evil.example:{port}", "127.0.0.1", "127.0.0.1:1", f"192.0.2.1:{port}",
            f"{own}.evil.example", f"127.0.0.1.evil.example:{port}", f"{own}\r\nHost: {own}", None,
        )
    ]  # fmt: skip
    origins = ("null", "http://evil.example", f"https://{own}", "http://127.0.0.1:1")
    foreign += [{"Origin": origin} for origin in origins]
    foreign += [{"Host": f"evil.example:{port}", "Origin": f"http://evil.example:{port}"}]
    foreign += [{"Sec-Fetch-Site": site} for site in ("cross-site", "same-site")]
    for headers in foreign:
        for path in ("/", "/events", "/picture.jpg", "/x"):
            status, _, body = get(port, path, **headers)
            assert (status, body) == (403, f"open http://{own}/".encode()), headers

    assert answer(port, b"\r\n".join([b"GET / HTTP/1.1", *([b"X: y"] * 300), b"", b""]))[0] == 431
    assert answer(port, b"GET /" + bytes([255]) * 70000 + b" HTTP/1.1\r\n\r\n")[0] == 414
    randomly = random.Random(0)
    for _ in range(50):
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(randomly.randbytes(randomly.randrange(100)) + b"\r\n\r\n")
    assert get(port, "/picture.jpg")[0] == 200
    running.send_signal(signal.SIGTERM)
    _, said = running.communicate(timeout=20)
    assert running.returncode == 128 + signal.SIGTERM
    assert [line for line in said.splitlines() if "--iter_behavior" in line] == []
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("host", "ours", "others"),
    [
        ("127.0.0.1", ["127.0.0.1:80", "127.0.0.1", "localhost"], ["192.0.2.1", "evil.example"]),
        ("localhost", ["localhost", "[::1]"], ["localhost.evil.example", "localhost:81", ""]),
        ("0.0.0.0", ["192.0.2.1", "[2001:db8::1]", "localhost"], ["evil.example", "192.0.2.1:81"]),
    ],
)
def test_names_of_this_server(host, ours, others):
    """A stranger's domain name that leads here is refused (DNS rebinding); addresses are safe."""
    server = open_web_server(None, host, 0)
    server.server_close()
    server.port = 80
    assert [name for name in ours if not server.has_name(name)] == []
    assert [name for name in others if server.has_name(name)] == []


def test_it_shows_what_the_run_has(tmp_path):
    """The picture as it is saved, the statistics, the command; at the end, the final ones."""
    options = [*LONG[:-1], "--iter_behavior=save+web", "--output_iter=1", "--checkpoint_iter=0"]
    running, port = watched(*options, cwd=tmp_path)
    listener, seen = Listener(port), []
    for _ in range(3):
        after = seen[-1] if seen else -1
        _, headers, jpeg = get(port, f"/picture.jpg?after={after}")
        seen.append(int(headers["Steps"]))
        path = tmp_path / f"out_1_{seen[-1]}.png"
        assert jpeg == as_jpeg(wait_for(lambda path=path: path.exists() and path))
    assert seen == sorted(set(seen))
    wait_for(lambda: any("curve" in event for event in listener.events[1:]))
    running.send_signal(signal.SIGTERM)
    running.communicate(timeout=20)
    page = listener.all()
    assert page["end"] == ["stopped", ""]
    assert listener.picture == as_jpeg(tmp_path / "out.png")
    printed = run_cli("--reproduce=out.png", cwd=tmp_path).stdout
    assert page["command"] == printed.strip().replace(" --output=out.png", "")
    assert page["sizes"] == [[40, 50], [64, 96]]
    assert (page["size"], page["steps"]) == (1, 100000)
    assert page["rate"] > 0
    assert page["left"] > 0
    assert page["step"] >= seen[-1]
    assert len(page["curve"]) <= Web.POINTS
    assert page["curve"][-1][0] <= page["step"]


def test_looking_changes_nothing(tmp_path):
    """Viewers do not change a single pixel, and connections that hang do not hold up the run."""
    done = run_cli(*PLAIN, "--iter_behavior=none", "--output=plain.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    running, port = watched(*PLAIN, "--iter_behavior=web", cwd=tmp_path)
    listener, pictures = Listener(port), 0
    hanging = [socket.create_connection(("127.0.0.1", port)) for _ in range(3)]
    for client, path in zip(hanging, ("/events", "/picture.jpg")):  # the third asks for nothing
        client.sendall(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode())
    with contextlib.suppress(OSError, http.client.HTTPException):
        while True:
            pictures += get(port, "/picture.jpg?after=0")[0] == 200
    begun = time.monotonic()
    _, said = running.communicate(timeout=20)
    assert time.monotonic() - begun < Web.FAREWELL + 1
    assert (running.returncode, "Traceback" in said) == (0, False), said
    assert pictures > 3
    assert listener.all()["end"] == ["done", ""]
    assert len(listener.all()["curve"]) > 2
    assert listener.picture == as_jpeg(tmp_path / "out.png")
    assert np.array_equal(pixels(tmp_path / "out.png"), pixels(tmp_path / "plain.png"))
    for client in hanging:
        client.close()


def test_the_page_of_a_batch_shows_its_finished_pictures(tmp_path):
    for name in "ab":
        Image.new("RGB", (400, 60), "teal").save(tmp_path / f"{name}.png")
    running, port = watched(
        *QUICK,
        "--image=a.png",
        "b.png",
        "--initial_size=60x400",
        "--num_steps=400",
        "--iter_behavior=web",
        "--output=out/",
        cwd=tmp_path,
    )
    assert get(port, "/made.jpg?number=0")[0] == 404
    while "picture 2 of 2" not in running.stderr.readline():
        pass
    wait_for(lambda: is_served(port))
    listener = Listener(port)
    assert listener.events[0]["made"] == ["a_inception_a-output.png"]
    status, headers, jpeg = get(port, "/made.jpg?number=0")
    assert (status, headers["Content-Type"]) == (200, "image/jpeg")
    assert Image.open(io.BytesIO(jpeg)).size == (320, 48)
    for query in ("number=1", "number=-1", "", "number=x"):
        assert get(port, f"/made.jpg?{query}")[0] == 404
    running.send_signal(signal.SIGTERM)
    running.communicate(timeout=20)


@pytest.mark.parametrize("way", ["seen", "Ctrl-C"])
def test_at_a_terminal_the_page_stays_until_it_was_seen(way, tmp_path):
    """Or until Ctrl-C. Either way the picture is finished, and so is the program."""
    port, (ours, theirs) = free_port(), pty.openpty()
    words = [*PLAIN, "--num_steps=2", "--iter_behavior=web", f"--web_port={port}"]
    command = [sys.executable, str(ROOT / "cnn_vis.py"), *words]
    running = subprocess.Popen(command, cwd=tmp_path, stdin=theirs, stdout=theirs, stderr=theirs)
    STARTED.append(running)
    os.close(theirs)
    said = b""
    while b"the page stays" not in said:
        said += os.read(ours, 1 << 16)
    assert (tmp_path / "out.png").exists()
    time.sleep(1)
    assert running.poll() is None
    if way == "seen":
        listener = Listener(port)
        assert listener.all()["end"] == ["done", ""]
        assert listener.picture == as_jpeg(tmp_path / "out.png")
    else:
        running.send_signal(signal.SIGINT)
    with contextlib.suppress(OSError):  # reading a closed terminal raises it
        while data := os.read(ours, 1 << 16):
            said += data
    assert running.wait(20) == 0
    assert b"Saving" not in said
    os.close(ours)


def test_without_anybody_nothing_is_done(tmp_path):
    """If nobody looks, no picture is copied or encoded, statistics are computed only every
    --output_iter steps and every hundredth of the run, and the run ends without waiting."""
    words = [*PLAIN, "--iter_behavior=web", "--output_iter=20", "--num_sizes=1"]
    words += ["--num_steps=500"]
    code = f"""
import time, cnn_vis
from cnn_vis_lib import behaviors, web

def fail(*_):
    raise AssertionError("somebody looks")

class Timed(web.Web):
    def after_step(self, progress):
        assert (progress.stats is not None) == (progress.step % 5 == 0)
        super().after_step(progress)

    def close(self):
        begun = time.monotonic()
        super().close()
        print(time.monotonic() - begun)

if __name__ == "__main__":
    web.Snapshot = web.encode_jpeg = fail
    behaviors.BEHAVIORS["web"] = Timed
    raise SystemExit(cnn_vis.main({words}))
"""
    done = run_script(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0.5


def test_a_failure_is_told(tmp_path):
    """With the line that the program ends with."""
    (tmp_path / "folder").mkdir()
    running, port = watched(*LONG, "--output=folder/out.png", cwd=tmp_path)
    listener = Listener(port)
    shutil.rmtree(tmp_path / "folder")
    running.send_signal(signal.SIGTERM)
    _, said = running.communicate(timeout=20)
    assert running.returncode == 1
    end, message = listener.all()["end"]
    assert end == "failed"
    assert f"cnn_vis.py: error: {message}" in said.splitlines()


def test_a_resumed_run_is_shown(tmp_path):
    """From where it goes on, at the same port."""
    options = [*LONG, "--checkpoint_iter=1"]
    running, port = watched(*options, cwd=tmp_path, begin=under_way)
    running.send_signal(signal.SIGTERM)
    running.communicate(timeout=20)
    running = start(f"--resume={CHECKPOINT}", "--output_iter=1", cwd=tmp_path)
    wait_for(lambda: is_served(port))
    listener = Listener(port)
    wait_for(lambda: any(event.get("curve") for event in listener.events))
    running.send_signal(signal.SIGTERM)
    running.communicate(timeout=20)
    assert listener.all()["end"] == ["stopped", ""]
    assert listener.picture == as_jpeg(tmp_path / "out.png")


def test_pictures_of_one_run_are_shown_at_one_address(picture, tmp_path):
    for name in ("a.png", "b.png"):
        shutil.copy(picture, tmp_path / name)
    words = [*QUICK, "--image", "a.png", "b.png", "--iter_behavior=web", "--output=dreams/"]
    done = run_cli(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    first, second = [line for line in done.stderr.splitlines() if "http://" in line]
    assert first == second


def test_too_many_connections_are_closed(tmp_path):
    running, port = watched(*LONG, cwd=tmp_path)
    clients = [socket.create_connection(("127.0.0.1", port)) for _ in range(70)]
    clients[-1].settimeout(8)  # less than the 10 s after which silent clients are dropped
    with contextlib.suppress(ConnectionError):
        assert clients[-1].recv(1) == b""
    for client in clients:
        client.close()

    def is_answered():
        with contextlib.suppress(ConnectionError):  # until the server has seen them go
            return get(port, "/")[0] == 200

    wait_for(is_answered)
    assert running.poll() is None


@pytest.fixture
def web():
    """A Web of a run that is not there."""
    options = cnn_vis.PARSER.parse_args(["--iter_behavior=web", "--output_iter=10"])
    web = Web(options, None)
    web._pace = types.SimpleNamespace(advance=lambda progress: 1)
    return web


def progress_of(step, stats=None, image=None):
    return cnn_vis.Progress([(8, 8)], 1, 100000, step, lambda: image, 0.0, stats)


def test_whether_a_step_is_measured_holds_for_all_of_it(web):
    """wants_stats is asked before each turn, and a viewer may arrive between two; its answer must
    not change within a step. At the next size it is asked again."""
    assert [*map(web.wants_stats, (9, 10, 11))] == [False, True, False]
    web._is_wanted = True
    assert [*map(web.wants_stats, (9, 10, 11, 12, 13))] == [False, True, False, True, False]
    web._is_wanted = False
    web.after_step(progress_of(12))
    assert list(web._asked) == [13]
    web.after_step(progress_of(100000))
    assert web._asked == {}


def test_the_curve_stays_short(web):
    for step in range(1, 3000):
        web.after_step(progress_of(step, {"objective": step if step % 7 else float("nan")}))
    steps = [step for step, _ in web._curve]
    assert web.POINTS / 2 < len(steps) <= web.POINTS
    assert (steps[0], steps[-1]) == (1, 2999)
    assert steps == sorted(steps)
    json.dumps(web._curve, allow_nan=False)


def test_a_picture_is_what_the_image_was_when_it_was_taken():
    image = np.full((1, 3, 20, 30), 100.0)
    snapshot = Snapshot(progress_of(1, image=image))
    image += 50
    assert snapshot.jpeg(False) == encode_jpeg(np.full((20, 30, 3), 120, np.uint8))


def test_large_pictures_are_shown_smaller(monkeypatch):
    """By the means of blocks; the run's image stays as it is."""
    image = np.random.default_rng(0).normal(size=(1, 3, 90, 130))
    monkeypatch.setattr(Snapshot, "SIDE", 50)
    expected = np.stack([
        [image[:, :, y : y + 3, x : x + 3].mean((2, 3)) for x in range(0, 130, 3)]
        for y in range(0, 90, 3)
    ])  # fmt: skip
    snapshot = Snapshot(progress_of(1, image=image))
    assert np.allclose(snapshot._progress.image, expected.transpose(2, 3, 0, 1))
    with Image.open(io.BytesIO(snapshot.jpeg(False))) as picture:
        assert picture.size == (44, 30)


def browser():
    """A browser without a window, or a skip."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("no browser: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for word in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "window-size=1280,800"):
        options.add_argument(f"--{word}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return webdriver.Chrome(options, webdriver.ChromeService(driver))


def test_in_a_browser(tmp_path):
    """The picture is there and changes, the curve grows, the page tells how the run ended and keeps
    the last picture; another run at the same port is shown in its turn."""

    def text(name):
        return page.execute_script(f"return document.getElementById('{name}').textContent")

    def picture():
        """(steps, width, the pixels' checksum) of the picture shown; None if there is none."""
        return page.execute_script("""
            const picture = document.getElementById("picture");
            if (!picture) return null;
            const canvas = document.createElement("canvas"), pen = canvas.getContext("2d");
            [canvas.width, canvas.height] = [picture.naturalWidth, picture.naturalHeight];
            pen.drawImage(picture, 0, 0);
            const sum = pen.getImageData(0, 0, canvas.width, canvas.height).data
                .reduce((sum, value) => (31 * sum + value) % 1000003, 7);
            return [Number(picture.alt.match(/\\d+/)[0]), canvas.width, sum];
        """)

    def points():
        return page.execute_script("""
            const path = document.querySelector("#curve path");
            return path ? path.getAttribute("d").match(/[ML]/g).length : 0;
        """)

    with browser() as page:
        running, port = watched(*LONG, cwd=tmp_path)
        page.get(f"http://localhost:{port}/")
        first = wait_for(picture)
        wait_for(lambda: picture()[0] > first[0] and picture()[1:] != first[1:])
        assert first[1] == 50
        drawn = wait_for(points)
        wait_for(lambda: points() > drawn)
        assert text("state") == "running"
        assert "--layer=inception_a/output" in text("command")
        assert "of 100000" in text("where")
        assert "size 1 of 2, 50 × 40" in text("where")
        assert float(text("rate")) > 0
        running.send_signal(signal.SIGTERM)
        running.communicate(timeout=20)
        wait_for(lambda: text("state") == "stopped")
        assert picture()[0] > first[0]

        done = start(*PLAIN, "--num_steps=600", "--iter_behavior=web", f"--web_port={port}",
                     cwd=tmp_path)  # fmt: skip
        wait_for(lambda: text("state") == "running")
        _, said = done.communicate(timeout=60)
        assert done.returncode == 0, said
        wait_for(lambda: text("state") == "done")
        assert picture()[:2] == [1200, 96]
        full = page.find_element("id", "full")
        assert full.get_attribute("href") == page.find_element("id", "picture").get_attribute("src")
        page.find_element("id", "copy").click()
        wait_for(lambda: text("copy") == "Copied")
        for name in ("full", "copy", "command"):  # in this order, by the keyboard
            page.switch_to.active_element.send_keys("\ue004") if name != "full" else full.send_keys(
                ""
            )
        assert page.switch_to.active_element.get_attribute("id") == "command"
        assert page.title == "done · cnn-vis"
        complaints = [entry for entry in page.get_log("browser") if entry["source"] != "network"]
        assert complaints == []  # about the script, or about loading what the page forbids
