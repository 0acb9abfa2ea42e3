"""What can go wrong, and how it is told: in one line, with the option, the value and the remedy."""

import difflib
import errno
import logging

log = logging.getLogger("cnn_vis")


class BadRequest(Exception):
    """The user asked for something impossible. Exit status 2. The message is the `problem` and the
    `remedy`, after the `option` and `value` that are to blame; those can be None."""

    def __init__(self, problem, remedy=None, option=None, value=None):
        self.option, self.value, self.problem, self.remedy = option, value, problem, remedy
        where = f"{f'--{option} {value}'.rstrip()}: " if option else ""
        super().__init__(where + "; ".join(filter(None, (str(problem), remedy))))

    def __reduce__(self):
        return type(self), (self.problem, self.remedy, self.option, self.value)


def refusal(option, value, problem, remedy=None):
    """The BadRequest for an option's value."""
    return BadRequest(problem, remedy, option, value)


class RunFailed(Exception):
    """A valid run failed. Exit status 1."""


class NotFinite(RunFailed):
    """The picture overflowed with these options."""


class OutOfMemory(RunFailed):
    """The machine does not have enough memory."""

    def __init__(self, message="not enough memory; use smaller sizes or fewer --workers"):
        super().__init__(message)


class Stopped(KeyboardInterrupt):
    """A signal has ended the program; exit status 128 + signum."""

    def __init__(self, signum, message="stopped"):
        super().__init__(message)
        self.signum = signum

    def __reduce__(self):
        return type(self), (self.signum, str(self))


def one_line(error):
    """An exception's message on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def remedy_of(error):
    """What to say after an OSError: "; see ulimit -f", or ""."""
    return "; see ulimit -f" if getattr(error, "errno", None) == errno.EFBIG else ""


def suggestion(word, known):
    """What to say to somebody who wrote `word` for one of the `known` words."""
    known = [str(other) for other in known]
    close = difflib.get_close_matches(str(word), known, n=2)
    return f"did you mean {' or '.join(close)}?" if close else f"choose from {', '.join(known)}"


def some(names):
    """The names as text: at most five, and how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if names[5:] else "")


# What programs print when they get no memory: C++, Python, OpenBLAS, Caffe, the system's loader.
NO_MEMORY = (
    "std::bad_alloc|^MemoryError|OpenBLAS error: Memory alloc|host allocation of size|"
    "failed to map segment|[Cc]annot allocate memory"
)
