"""Files: what may be read and written, and writing that leaves either the old file or the whole new
one, however the program ends."""

import contextlib
import errno
import glob
import hashlib
import io
import itertools
import os
import shutil
import socket
import stat
import tempfile

from .errors import RunFailed, one_line, refusal, remedy_of


def expanded(path, is_literal):
    """The path, with ~ and variables expanded unless `is_literal`."""
    return path if is_literal else os.path.expanduser(os.path.expandvars(path))


def existing_file(option, path):
    """Returns `path` if it is a file; otherwise raises BadRequest, naming the `option`."""
    if not os.path.isfile(path):
        kind = "this is a folder" if os.path.isdir(path) else "this is not a regular file"
        reason = kind if os.path.exists(path) else "no such file"
        raise refusal(option, path, reason, "use another path")
    if not os.access(path, os.R_OK):
        raise refusal(option, path, "this file cannot be read", "run chmod u+r on it")
    return path


def file_hash(path, algorithm):
    """The hash of a file as "algorithm:hex"."""
    digest = hashlib.new(algorithm)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return f"{algorithm}:{digest.hexdigest()}"


def sha256_of(path):
    """The SHA-256 of a file, in hex."""
    return file_hash(path, "sha256").partition(":")[2]


def read_text(path):
    """The text of a small file."""
    with open(path) as file:
        return file.read()


def read_bytes(path):
    """The content of a file."""
    with open(path, "rb") as file:
        return file.read()


class Undescribed(io.BufferedRandom):
    """A file that denies having a descriptor, so that libraries write to it through Python. Pillow
    and libtiff would otherwise write to the descriptor and not notice, or print, that a disk is
    full."""

    def fileno(self):
        raise io.UnsupportedOperation("fileno")


@contextlib.contextmanager
def whole_file(path, name=None):
    """A binary file to write that replaces `path` (or its target, if it is a link) only once all
    is written and on disk, and is removed if that fails. Raises RunFailed, whose message calls the
    file `name`."""
    try:
        target = os.path.realpath(path)
        if os.path.exists(target) and not os.path.isfile(target):
            raise OSError("it is not a regular file")
        with open_part(target) as raw:
            try:
                with Undescribed(raw) as file:
                    yield file
                put_in_place(raw.name, target)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.remove(raw.name)
                raise
    except OSError as error:
        problem = f"cannot be written ({one_line(error)}){remedy_of(error)}"
        raise RunFailed(f"{name or path}: {problem}; an existing file is unchanged") from None


def open_part(target):
    """A new file, unbuffered, for put_in_place: beside `target`, or in the temporary folder if
    `target` exists in a folder that cannot be written."""
    try:
        return open(part_name(target, os.getpid()), "w+b", buffering=0)
    except OSError:
        if not os.path.isfile(target):
            raise
        elsewhere = os.path.join(tempfile.gettempdir(), os.path.basename(target))
        return open(part_name(elsewhere, os.getpid()), "x+b", buffering=0)


def put_in_place(part, place):
    """Moves the complete file `part` to `place`, which it replaces as a whole once its content is
    on disk. Some files can be written but not replaced: one that is mounted into a container, or
    another user's in a sticky folder. They are overwritten. Raises OSError if nothing has been
    changed, and RunFailed, which names a complete copy, if that failed halfway."""
    with open(part, "r+b") as file:
        with contextlib.suppress(OSError):  # no file to replace, or a file system without modes
            os.fchmod(file.fileno(), stat.S_IMODE(os.stat(place).st_mode))
        to_disk(file)
    try:
        os.replace(part, place)
    except OSError:
        if not os.path.isfile(place):
            raise
        with open(part, "rb") as source, open(place, "r+b") as target:
            sizes = [os.fstat(file.fileno()).st_size for file in (source, target)]
            try:  # a full disk must be found before anything is lost
                os.posix_fallocate(target.fileno(), 0, max(1, *sizes))
            except OSError:
                target.truncate(sizes[1])
                raise
            try:
                shutil.copyfileobj(source, target)
                target.truncate()
                to_disk(target)
            except OSError as error:
                copy = shutil.move(part, os.path.join(tempfile.mkdtemp(), os.path.basename(place)))
                problem = f"writing it failed halfway ({one_line(error)})"
                raise RunFailed(f"{place}: {problem}; a complete copy is {copy}") from None
        os.remove(part)


def to_disk(file):
    """Waits until what was written to an open file is on disk, if its file system can tell."""
    file.flush()
    try:
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise


def part_name(path, pid):
    """The temporary file in which process `pid` on this machine writes `path`."""
    return f"{part_stem(path)}.{os.uname().nodename}.{pid}.part"


def part_stem(path):
    """How the names of temporary files begin in which `path` is written."""
    folder, name = os.path.split(path)
    return os.path.join(folder, f".{os.fsdecode(os.fsencode(name)[:100])}")


@contextlib.contextmanager
def sole_writer(paths):
    """Keeps other runs on this machine from writing to any of `paths`. Raises BadRequest if one
    already does.

    Each path is locked by a socket in Linux's abstract namespace, which leaves nothing behind
    however the process ends.
    """
    with contextlib.ExitStack() as stack:
        for path in sorted({os.path.realpath(path) for path in paths}):
            lock = stack.enter_context(socket.socket(socket.AF_UNIX))
            try:
                lock.bind(f"\0cnn-vis {hashlib.sha256(os.fsencode(path)).hexdigest()}")
            except OSError:
                problem = f"another run is writing {path}"
                remedy = "choose another name, or stop that run"
                raise refusal("output", "", problem, remedy) from None
        yield


def remove_parts(path):
    """Removes the temporary files of runs to `path` that were killed while writing."""
    stem = os.path.splitext(os.path.realpath(path))[0]
    elsewhere = os.path.join(tempfile.gettempdir(), os.path.basename(stem))
    node = glob.escape(os.uname().nodename)
    patterns = [f"{glob.escape(part_stem(s))}*.{node}.*.part" for s in (stem, elsewhere)]
    for part in itertools.chain(*map(glob.glob, patterns)):
        pid = part.split(".")[-2]
        if pid.isdecimal() and not os.path.exists(f"/proc/{pid}"):
            with contextlib.suppress(OSError):
                os.remove(part)


def extension_of(path):
    """A file name's extension in lower case, as in FORMATS."""
    return os.path.splitext(path)[1].lower()


def try_folder(folder):
    """Raises OSError if no file can be written in the folder."""
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(bytes(4096))


def unwritable(path):
    """What keeps a run from writing the file `path`, as "..." in "it is ..."; None if nothing does,
    or it does not exist."""
    if os.path.isdir(path):
        return "a folder"
    if os.path.exists(path) and not os.path.isfile(path):
        return "not a regular file"
    if is_protected(path):
        return "write-protected"
    try:
        with open(path, "r+b"):
            return None
    except OSError as error:
        if not os.path.lexists(path) or error.errno == errno.ENOENT:
            return None
        return f"not writable ({error.strerror})"


def is_protected(path):
    """Whether there is a file that this user may not write, or that nobody may (not even root)."""
    with contextlib.suppress(OSError):
        return not (os.stat(path).st_mode & 0o222 and os.access(path, os.W_OK))
    return False
