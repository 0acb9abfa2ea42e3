"""Downloading networks: nothing is kept before it has been checked."""

import errno
import os
import shutil
import sys
import tempfile
import zlib

from .caffemodel import HTML
from .errors import RunFailed, one_line
from .files import file_hash, put_in_place, unwritable
from .models import has_known_hash

TIMEOUT = 30  # seconds to wait for the server to respond


def fetch(url, path, by_hand):
    """Downloads `url` to `path`, with a progress bar. Raises RunFailed, which says what to do
    `by_hand`."""
    import pooch
    from requests import exceptions

    folder, name = os.path.split(path)
    pooch.get_logger().setLevel("WARNING")
    bar = sys.stderr.isatty()
    downloader = pooch.HTTPDownloader(progressbar=bar, chunk_size=1 << 16, timeout=TIMEOUT)
    try:
        pooch.retrieve(url, known_hash=None, fname=name, path=folder, downloader=downloader)
    except (exceptions.RequestException, ValueError) as error:
        answer = getattr(error, "response", None)
        words = {
            exceptions.HTTPError: answer is not None
            and f"the server says {answer.status_code} {answer.reason}",
            exceptions.Timeout: f"the server did not respond within {TIMEOUT} s",
            exceptions.ChunkedEncodingError: "the download was interrupted",
            exceptions.ConnectionError: "no connection to this server",
        }
        known = (text for kind, text in words.items() if isinstance(error, kind))
        reason = next(known, f"cannot be downloaded ({one_line(error)})")
        raise RunFailed(f"{url}: {reason}; try again, or use --model_url; {by_hand}") from None


def by_hand(model):
    """How to install the model without --download_model."""
    file = model.member or model.url.rpartition("/")[2]
    known = f" ({model.hashes[0]})" if model.hashes and not model.member else ""
    return f"or save a copy of {file}{known}, which the web has many of, as {model.cache_place()}"


def unpack(archive, member, path):
    """Extracts the file called `member`, in any folder of the tar archive, to `path`. Raises
    RunFailed."""
    import tarfile

    try:
        with tarfile.open(archive) as tar:
            files = (item for item in tar if item.isfile())
            found = next((item for item in files if os.path.basename(item.name) == member), None)
            if found is None:
                raise RunFailed(f"the archive does not contain {member}")
            with tar.extractfile(found) as source, open(path, "wb") as target:
                shutil.copyfileobj(source, target)
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise RunFailed(f"the archive cannot be read ({one_line(error)})") from None


def download(model, url, check_structure):
    """Downloads the model's weights to its cache_place(). They are moved there only once they have
    been checked: they have a known hash, or else check_structure(path), which returns what is wrong
    or None, has found no fault. Raises RunFailed."""
    path = model.cache_place()
    folder = os.path.dirname(path)
    if problem := unwritable(path):
        raise RunFailed(f"{path} is {problem}; remove it, or set CNN_VIS_MODELS to another folder")
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as temporary:
            fetched = weights = os.path.join(temporary, "fetched")
            fetch(url, fetched, by_hand(model))
            with open(fetched, "rb") as file:
                start = file.read(512).lstrip().lower()
            if start.startswith(HTML):
                problem = "got a web page, not a network: does this connection need a login?"
                raise RunFailed(f"{url}: {problem}")
            if model.member is not None:
                weights = os.path.join(temporary, "weights")
                try:
                    unpack(fetched, model.member, weights)
                except RunFailed as error:
                    raise RunFailed(f"{url}: {error}; try again, or use --model_url") from None
            is_known = has_known_hash(weights, model)
            if not is_known:
                check_unknown(model, url, weights, check_structure)
            put_in_place(weights, path)
            if not is_known:
                put_in_place(f"{weights}.checked", f"{path}.checked")
    except OSError as error:
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "free some space, or " * is_full + "set CNN_VIS_MODELS to another folder"
        raise RunFailed(f"{folder}: {error.strerror or error}; {remedy}") from None


def check_unknown(model, url, weights, check_structure):
    """Checks downloaded weights that match no known hash, and writes their SHA-256 to a file named
    like them plus ".checked". Raises RunFailed."""
    if model.member is None and model.hashes:
        expected, actual = model.hashes[0], file_hash(weights, "sha1")
        raise RunFailed(f"{url}: wrong file, deleted: expected {expected}, got {actual}")
    error = check_structure(weights)
    if error is not None:
        raise RunFailed(f"{url}: not {model.name} weights, deleted: {error}")
    with open(f"{weights}.checked", "w") as file:
        file.write(file_hash(weights, "sha256"))
