"""The watcher that serves a page to watch the run in a browser."""

import contextlib
import dataclasses
import errno
import functools
import hashlib
import json
import math
import os
import re
import shlex
import socket
import sys
import threading
import time

import numpy as np

from .errors import BadRequest, Stopped, log, one_line, refusal
from .files import read_bytes
from .install import USUAL_COMMAND
from .pixels import block_means
from .records import short_words
from .terminal import printable, say
from .watchers import Pace, Watcher
from .writing import encode_jpeg


class Snapshot:
    """An intermediate picture for browsers: a copy of the image in a Progress, with blocks of
    pixels averaged if a side is above SIDE. It is encoded as a JPEG on the first request."""

    SIDE = 2048

    def __init__(self, progress):
        image, side = progress.image, max(progress.image.shape[2:])
        step = math.ceil(side / self.SIDE)
        image = block_means(image, step) if step > 1 else image.copy()
        self.steps = progress.steps_done()
        self._progress = dataclasses.replace(progress, get_image=lambda: image)
        self._encoding, self._jpeg = threading.Lock(), None

    def jpeg(self, rescale):
        """The picture as the bytes of a JPEG."""
        with self._encoding:
            if self._jpeg is None:
                self._jpeg = encode_jpeg(self._progress.picture(rescale))
                self._progress = None  # frees the copy
            return self._jpeg


class Web(Watcher):
    """web: a page that shows the run in a browser while it lasts.

    The run's thread only records how far it is, and copies the image if a request is waiting for a
    picture; everything else is done in the server's threads. `_changed` guards what they share.
    Steps are measured every --output_iter steps, or every hundredth of the run, and while somebody
    is watching as often as PAUSE allows.

    When a run at a terminal is done, the page stays until somebody has seen the end, or until
    Ctrl-C: who opens the address later finds the picture. A script must not wait for anybody, so
    without a terminal, or with --quiet, it only gives those who are watching the time to fetch the
    last picture.
    """

    at_end = True  # the page follows the run from the first step to the last
    PAUSE = 0.25  # seconds, at least, between events and between measured steps
    PATIENCE = 15  # seconds after which a waiting request is answered even if nothing is new
    FAREWELL = 2  # seconds, at most, that listeners have to fetch the last event
    POINTS = 500  # in the curve, at most
    THUMBNAIL = 320  # pixels, at most, of a side of a batch's finished pictures

    def __init__(self, options, files):
        super().__init__(options, files)
        self._changed = threading.Condition()
        self._version, self._seen, self._end = 0, None, None
        self._snapshot, self._curve = None, []  # curve: [[steps done, objective], ...]
        self._is_wanted = False  # whether a request is waiting for a picture
        self._visitors = 0  # requests that the end of the run waits for
        self._has_been_seen = False  # whether a listener got the event that tells the end
        self._looked = self._measured = -math.inf  # times of the last request and measured step
        steps = options.num_steps * options.num_sizes
        self._every = min(options.output_iter, max(5, math.ceil(steps / 100)))
        self._asked = {}  # {step: what wants_stats answered}; must not change during a step
        open_web_server(self, options.web_host, options.web_port).server_close()  # fails early

    def wants_stats(self, step):
        if step not in self._asked:
            now = time.monotonic()
            is_watched = self._is_wanted or now - self._looked < 10 * self.PAUSE
            is_wanted = is_watched and now - self._measured >= self.PAUSE
            self._measured = now if is_wanted else self._measured
            self._asked[step] = is_wanted or step % self._every == 0
        return self._asked[step]

    def begin(self, run):
        super().begin(run)
        self._pace, self._server = Pace(run.dream), self._open()
        run.batch.port = self._server.port
        threading.Thread(target=self._server.serve_forever, args=(0.1,), daemon=True).start()
        lines = [f"watch the run at {self._server.url}"]
        if not self._server.is_local:
            port = f"port {self._server.port} of this machine"
            lines.append(f"whoever can reach {port} can see the picture and the command")
        for line in lines:  # even with --quiet: nobody can find the page without its address
            say(printable(f"note: {line}"), "stderr")

    def _open(self):
        """A server at the requested port; if any port will do, at the previous picture's, so that
        an open page continues with this one."""
        host, port = self.options.web_host, self.options.web_port
        if self.run.batch.port and not port:
            with contextlib.suppress(BadRequest):
                return open_web_server(self, host, self.run.batch.port)
        return open_web_server(self, host, port)

    def after_step(self, progress):
        self._pace.advance(progress)
        self._asked = {step: asked for step, asked in self._asked.items() if step > progress.step}
        with self._changed:
            if progress.stats and math.isfinite(progress.stats["objective"]):
                if len(self._curve) == self.POINTS:
                    del self._curve[1::2]
                objective = float(f"{progress.stats['objective']:.5g}")
                self._curve.append([progress.steps_done(), objective])
            self._tell(progress, self._is_wanted)

    def close(self):
        """Lets viewers fetch the last event and picture, and stops the server."""
        dream, error = self.run.dream, self.run.error
        end = "done" if dream.is_done() and not error else "stopped"
        is_failure = error and not isinstance(error, Stopped)
        with self._changed:
            self._end = ["failed", one_line(error)] if is_failure else [end, ""]
            self._snapshot = None
            stays = end == "done" and self.run.batch.is_last() and sys.stderr.isatty()
            stays = stays and not self.options.quiet
            self._tell(dream.progress(), dream.image is not None and (stays or self._visitors))
            self._changed.wait_for(lambda: not self._visitors, self.FAREWELL)
        if stays:
            self._stay()
        self._server.shutdown()
        self._server.server_close()

    def _stay(self):
        """Waits until somebody has seen the end, or for Ctrl-C."""
        if not self._has_been_seen:
            url = self._server.url
            say(f"note: the page stays until you have seen it; Ctrl-C closes it: {url}", "stderr")
        with self._changed:
            while not self._has_been_seen and not self.run.is_stopping():
                self._changed.wait(0.2)
            self._changed.wait_for(lambda: not self._visitors, self.FAREWELL)

    def _tell(self, progress, with_picture):
        """Records how far the run is, for viewers."""
        self._version += 1
        self._seen = dataclasses.replace(progress, get_image=None)
        if with_picture:
            with contextlib.suppress(MemoryError):  # a snapshot is not worth failing the run
                self._snapshot = Snapshot(progress)
            self._is_wanted = False
        self._changed.notify_all()

    # The methods below run in the server's threads.

    @contextlib.contextmanager
    def visitor(self):
        """Makes the end of the run wait while a request is being answered."""
        with self._changed:
            self._visitors += 1
        try:
            yield
        finally:
            with self._changed:
                self._visitors -= 1
                self._changed.notify_all()

    def picture(self, after):
        """Waits until more than `after` steps are done, or the run ends, and returns (steps done,
        JPEG) of the picture as it stands; None if there is none within PATIENCE."""
        with self._changed:
            before = self._snapshot

            def is_there():
                shot = self._snapshot
                is_new = shot is not before or (shot and shot.steps == self._seen.steps_done())
                return self._end or (is_new and shot.steps > after)

            self._looked = time.monotonic()
            self._is_wanted = self._is_wanted or not is_there()
            is_answered = self._changed.wait_for(is_there, self.PATIENCE)
            self._looked, snapshot = time.monotonic(), self._snapshot
        if not is_answered or snapshot is None:
            return None
        return snapshot.steps, snapshot.jpeg(self.options.rescale_image)

    def events(self):
        """Yields news for the page as dicts: first everything, then changes, or empty dicts to see
        whether the listener is still there. The last one says how the run ended."""
        news, version, drawn = self._plan(), None, None
        while True:
            with self._changed:
                if self._version == version:
                    self._changed.wait(self.PATIENCE)
                news |= {} if self._version == version else self._state()
                if self._curve and self._curve[-1] != drawn:
                    news["curve"], drawn = self._curve.copy(), self._curve[-1]
                version, has_ended = self._version, self._end is not None
            yield news
            if has_ended:
                with self._changed:
                    self._has_been_seen = True
                    self._changed.notify_all()
                return
            news = {}
            with self._changed:
                self._changed.wait_for(lambda: self._end, self.PAUSE)

    def _plan(self):
        """What is known before the first step."""
        dream = self.run.dream
        plan = {"command": self._command(), "sizes": dream.sizes, "curve": []}
        plan |= {"steps": dream.settings.num_steps, "tiles": self._pace.counts}
        return plan | {"batch": str(self.run.batch)}

    def _command(self):
        """The command, for people."""
        return f"{USUAL_COMMAND} {shlex.join(short_words(self.run.record))}"

    def _state(self):
        """Where the run is."""
        seen = self._seen or self.run.dream
        return {
            "size": seen.size_number,
            "step": seen.step,
            "rate": self._pace.rate(),
            "left": self._pace.seconds_left(),
            "seconds": time.monotonic() - self.run.begun,
            "end": self._end,
            "made": [*map(os.path.basename, self.run.batch.made)]
            if self.run.batch.count > 1
            else [],
        }

    def thumbnail(self, number):
        """A JPEG of a batch's finished picture, numbered from 0, with at most THUMBNAIL pixels a
        side; None if there is none that can be read."""
        from PIL import Image

        with (
            contextlib.suppress(OSError, IndexError),
            Image.open(self.run.batch.made[number]) as file,
        ):
            picture = file.convert("RGB")
            picture.thumbnail((self.THUMBNAIL, self.THUMBNAIL))
            return encode_jpeg(np.asarray(picture))
        return None


def web_handler(web):
    """The class that answers requests for the page of a Web: GET and HEAD of four paths.

    Other sites open in the same browser must not read the answers, not even through a name that
    they have pointed at this machine (DNS rebinding). So the Host of a request has to be the
    server's: an IP address, which nobody can redirect, localhost or the value of --web_host; and
    the Origin, if there is one, has to match the Host.
    """
    import http.server

    class Handler(http.server.BaseHTTPRequestHandler):
        timeout = 10  # seconds that a thread waits for a client to send or receive

        def do_GET(self):
            path, _, query = self.path.partition("?")
            answers = {"/": self.page, "/events": self.events, "/picture.jpg": self.picture}
            answers |= {"/made.jpg": self.made}
            if not self.is_for_us():
                problem = f"open {self.server.url}"
                self.reply(403, problem.encode())
            elif self.command not in ("GET", "HEAD"):
                self.reply(405, b"only GET and HEAD are allowed", Allow="GET, HEAD")
            elif path in answers:
                answers[path](query)
            else:
                self.reply(404, b"not found; the page is at /")

        def __getattr__(self, name):
            if name.startswith("do_"):  # any other method
                return self.do_GET
            raise AttributeError(name)

        def is_for_us(self):
            """Whether a request may be answered, judging by its headers."""
            host, *others = self.headers.get_all("Host", [""])
            origins = self.headers.get_all("Origin", [])
            site, mode = (self.headers.get(f"Sec-Fetch-{name}") for name in ("Site", "Mode"))
            is_own = site in (None, "same-origin", "none") or mode == "navigate"  # a link
            is_same = all(origin == f"http://{host}" for origin in origins)
            return not others and self.server.has_name(host) and is_same and is_own

        def page(self, _):
            self.reply(200, page().encode(), "text/html; charset=utf-8")

        def picture(self, query):
            if self.command == "HEAD":  # without making a picture
                self.reply(200, None, "image/jpeg")
                return
            after = re.fullmatch(r"after=(\d{1,15})", query)
            with web.visitor():
                shot = web.picture(int(after[1]) if after else -1)
                if shot:
                    self.reply(200, shot[1], "image/jpeg", Steps=shot[0])
                else:
                    self.reply(204)

        def made(self, query):
            number = re.fullmatch(r"number=(\d{1,9})", query)
            jpeg = web.thumbnail(int(number[1])) if number else None
            if jpeg:
                self.reply(200, jpeg, "image/jpeg")
            else:
                self.reply(404, b"there is no such picture")

        def events(self, _):
            self.reply(200, None, "text/event-stream")
            if self.command == "HEAD":
                return
            with web.visitor():
                for news in web.events():
                    line = f"data: {json.dumps(news)}" if news else ": nothing new"
                    self.wfile.write(f"{line}\n\n".encode())
                self.rfile.read(1)  # waits until the page has everything and hangs up

        def reply(self, status, body=b"", kind="text/plain; charset=utf-8", **more):
            """Sends an answer, only its headers if `body` is None."""
            self.send_response(status)
            headers = more | page_headers() | {"Content-Type": kind}
            if body is not None and status != 204:
                headers["Content-Length"] = len(body)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            if body and self.command != "HEAD":
                self.wfile.write(body)

        def send_error(self, code, *_):  # for malformed requests
            self.reply(code, b"invalid request")

        def version_string(self):
            return "cnn-vis"

        def log_message(self, *_):
            pass

    return Handler


def web_server(handler, host):
    """A class of servers for `host` whose `handler` answers up to `most` requests at a time."""
    import ipaddress
    import socketserver

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = allow_reuse_address = True
        request_queue_size = most = 64  # connections at once

        def __init__(self, family, address):
            self.address_family, self._places = family, threading.Semaphore(self.most)
            super().__init__(address, handler)
            self.port, bound = self.server_address[1], ipaddress.ip_address(self.server_address[0])
            self.is_local, self._names = bound.is_loopback, {"localhost", host.lower()}
            shown = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(str(bound), host)
            shown = f"[{shown}]" if ":" in shown else shown
            self.url = f"http://{shown}:{self.port}/"

        def has_name(self, text):
            """Whether a Host header names this server."""
            text = text.lower() + (":80" if self.port == 80 and text[-3:] != ":80" else "")
            name, _, port = text.rpartition(":")
            with contextlib.suppress(ValueError):
                address = ipaddress.ip_address(name.strip("[]"))
                name = "localhost" if address.is_loopback or not self.is_local else name
            return name in self._names and port == str(self.port)

        def process_request(self, *request):
            if self._places.acquire(blocking=False):
                super().process_request(*request)
            else:
                self.shutdown_request(request[0])

        def process_request_thread(self, *request):
            try:
                super().process_request_thread(*request)
            finally:
                self._places.release()

        def handle_error(self, *_):
            error = sys.exc_info()[1]
            if not isinstance(error, OSError):  # an OSError means that the client has gone
                log.error(f"--iter_behavior web: {one_line(error)}")

    return Server


def open_web_server(web, host, port):
    """A server for the page of a Web, bound but not yet answering. Raises BadRequest."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return web_server(web_handler(web), host)(family, address)
    except (OSError, ValueError) as error:
        if getattr(error, "errno", None) in (errno.EADDRINUSE, errno.EACCES):
            remedy = "choose another port, or omit this option"
            raise refusal("web_port", port, error.strerror, remedy) from None
        problem = f"cannot listen there ({getattr(error, 'strerror', None) or one_line(error)})"
        remedy = "use an address or name of this machine, or omit this option"
        raise refusal("web_host", host, problem, remedy) from None


@functools.cache
def page():
    """The page, HTML. Everything that it shows, except the picture, arrives in events and is
    inserted as text, not as HTML."""
    return read_bytes(os.path.join(os.path.dirname(__file__), "page.html")).decode()


@functools.cache
def page_headers():
    """The headers of every response: nothing is cached, and the page loads only from its server."""
    import base64

    rules = ["default-src 'none'", "connect-src 'self'", "img-src 'self' blob: data:"]
    for kind, text in re.findall(r"<(style|script)>(.*?)</", page(), re.DOTALL):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        rules.append(f"{kind}-src 'sha256-{digest}'")
    rules += ["frame-ancestors 'none'", "base-uri 'none'", "form-action 'none'"]
    return {
        "Cache-Control": "no-store",
        "Content-Security-Policy": "; ".join(rules),
        "Cross-Origin-Resource-Policy": "same-origin",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }
