"""What is printed, whatever the terminal, and words quoted for a shell."""

import contextlib
import logging
import os
import shlex
import sys

from .install import PROGRAM

listeners = []  # at most one, which gets the lines instead: it is called as `say` is


def say(text, stream="stdout"):
    """Prints a line on sys.stdout or sys.stderr, above the progress bar if there is one. If the
    reader has gone (| head) or the log's disk is full, this and all later lines are discarded, and
    the run continues."""
    if listeners:
        listeners[0](text, stream)
        return
    file, tqdm = getattr(sys, stream), sys.modules.get("tqdm")
    try:
        tqdm.tqdm.write(text, file) if tqdm else print(text, file=file)
        file.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())
        with contextlib.suppress(OSError):
            file.flush()


def printable(text):
    """The text with control characters and other unprintable characters as escapes."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def shell_word(word):
    """The word quoted for a shell, if need be. Unprintable characters become escapes that bash, zsh
    and ksh understand."""
    if word.isprintable():
        return shlex.quote(word)

    def escaped(c):
        if c.isprintable() and c not in "'\\":
            return c
        return "".join(f"\\x{byte:02x}" for byte in os.fsencode(c))

    return f"$'{''.join(map(escaped, word))}'"


def shell_path(path):
    """The path quoted for a shell, and written so that it cannot be mistaken for an option."""
    return shell_word(f"./{path}" if path.startswith("-") else path)


def mend_streams():
    """Reopens closed standard streams on the null device, so that no file opened later gets their
    descriptors. Characters that the terminal's encoding lacks are printed as escapes."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free descriptor
    sys.stdout = sys.stdout or open(1, "w")  # noqa: SIM115, for the life of the process
    sys.stderr = sys.stderr or open(2, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


class LineHandler(logging.Handler):
    """Prints log messages as lines on stderr."""

    def emit(self, record):
        prefix = f"{PROGRAM}: " if record.levelno >= logging.ERROR else ""
        say(printable(prefix + record.getMessage()), "stderr")
