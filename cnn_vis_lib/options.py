"""The command line's parser and the types of its options. The script adds the options to PARSER.

Each option is defined in one entry. Besides argparse's own arguments it can have:

    idle   a function of the options that returns with what, or "without ...", this one has no
           effect, or a false value
    file   "read" or "write" if the option names a file that a run reads or writes
    words  values of such an option that are not file names
    text   a function that writes the value for a command line; None: left out of recorded commands

An option that is a field of the script's Settings cannot be changed by a resumed run; all others
are free."""

import argparse
import dataclasses
import difflib
import functools
import itertools
import math
import os
import re
import shlex
import sys

from .errors import BadRequest, one_line, refusal, suggestion
from .files import expanded
from .install import PROGRAM
from .pixels import LEAST_SIDE, MAX_SIDE
from .presets import PRESETS

SIZE = re.compile(
    r"([0-9]{1,400}) *x *([0-9]{1,400})"  # height, width
    r"|x *((?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[-+]?[0-9]+)?)"  # factor
    r"|([0-9]{1,400})"  # longer side
)


def parse_size(text, base):
    """The size that an option gives: "HxW", "xF" (F times the size `base`), "N" (the proportions of
    `base` with the longer side N), or None (`base`). Raises ValueError."""
    if text is None:
        return tuple(base)
    match = SIZE.fullmatch(text.strip().lower())
    if not match:
        raise ValueError("this is not a size")
    height, width, factor, longer = match.groups()
    if longer:
        longer = min(int(longer), 2 * MAX_SIDE)
        size = tuple(min(longer, max(1, round(longer * b / max(base)))) for b in base)
    elif factor:
        size = tuple(int(min(float(factor), 2 * MAX_SIDE) * side) for side in base)
    else:
        size = (int(height), int(width))
    if min(size) < 1:
        raise ValueError(f"{size[0]}x{size[1]} has no pixels")
    if max(size) > MAX_SIDE:
        raise ValueError(f"no side may exceed {MAX_SIDE} pixels")
    return size


def size_refusal(settings, name, *why):
    """The BadRequest for --initial_size or --final_size, with problem and remedy."""
    value = getattr(settings, name)
    return refusal(name, "unset" if value is None else value or "''", *why)


def end_sizes(settings, base, tile_size):
    """(first size, last size, remarks) that the settings ask for; `base` is the size that factors
    refer to. If a longer side is so small that the other would be below the network's input, it is
    raised. Raises BadRequest."""
    ends, remarks = [], []
    enough = max(t / b for t, b in zip(tile_size, base))
    for name in ("initial_size", "final_size")[: settings.num_sizes]:  # of one size, only the first
        text = getattr(settings, name)
        try:
            size = parse_size(text, base)
        except ValueError as error:
            remedy = "use HEIGHTxWIDTH (540x960), the longer side (960) or a factor (x0.5)"
            raise size_refusal(settings, name, str(error), remedy) from None
        if text and text.strip().isdigit() and any(a < t for a, t in zip(size, tile_size)):
            least = tuple(max(t, round(b * enough)) for t, b in zip(tile_size, base))
            problem = "{}x{} is smaller than the network's input, so it is {}x{}"
            remarks.append(f"--{name} {text}: {problem.format(*size, *least)}")
            size = least
        ends.append(size)
    return ends[0], ends[-1], remarks


class Parser(argparse.ArgumentParser):
    """argparse that accepts dashes in option names, negative numbers such as -1e-4, presets and
    files of options, reports errors in one line, and keeps the attributes listed above for each
    option. `options` lists the actions."""

    def __init__(self, **arguments):
        super().__init__(formatter_class=HelpFormatter, **arguments)
        self._negative_number_matcher = re.compile(r"^-(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$")
        self.options, self._args, self._arguments = [], [], arguments

    def clear(self):
        """Forgets all options."""
        arguments = self._arguments
        self.__dict__.clear()
        self.__init__(**arguments)

    def group(self, title, description=None, *, settings):
        """Starts a group in the help; returns a function that adds an option to it. An option that
        is a field of the dataclass `settings` has its default, and is fixed: a resumed run cannot
        change it."""
        group = self.add_argument_group(title, description)
        fields = {field.name: field.default for field in dataclasses.fields(settings)}

        def add(*names, idle=None, file=None, words=(), text=str, **arguments):
            dest = names[0].removeprefix("--")
            if dest in fields:
                arguments["default"] = fields[dest]
            action = group.add_argument(*names, **arguments)
            action.free, action.idle = dest not in fields, idle
            action.file, action.words, action.text = file, words, text
            self.options.append(action)

        return add

    @functools.cached_property
    def defaults(self):
        """The options of an empty command line."""
        return self.parse_args([])

    def parse_known_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else args
        self._args = self._read_files(args)  # once, because a pipe can be read only once
        preset, _ = PRESET.parse_known_args(self._args)
        if preset.preset in PRESETS:  # is applied first, so that all other options override it
            namespace, _ = super().parse_known_args(PRESETS[preset.preset].split(), namespace)
            settle(namespace)
        options, rest = super().parse_known_args(self._args, namespace)
        settle(options)
        return options, rest

    def _underscored(self, arg):
        name, equals, value = arg.partition("=")
        if value == "--" and name.startswith("--"):  # some versions of argparse drop it
            self.error(f"{name}: -- is not a value")
        name = name.replace("-", "_").replace("__", "--", 1)
        return name + equals + value if arg.startswith("--") else arg

    def _check_value(self, action, value):
        if action.choices is not None and value not in action.choices:
            name = action.option_strings[0].removeprefix("--")
            problem = "there is no such value"
            raise refusal(name, value, problem, suggestion(value, action.choices))

    def _read_files(self, words, outer=()):
        """The words, with each @FILE replaced by the words in that file."""
        replaced = []
        for word in words:
            if not word.startswith("@"):
                replaced.append(self._underscored(word))
                continue
            path = os.path.realpath(word[1:])
            try:
                if path in outer:
                    raise ValueError("it includes itself")
                with open(word[1:], encoding="utf-8-sig") as file:
                    inner = shlex.split(file.read(), comments=True)
            except (OSError, ValueError) as error:
                problem = getattr(error, "strerror", None) or one_line(error)
                if isinstance(error, UnicodeDecodeError):
                    problem = "this is not a text file in UTF-8"
                remedy = f"an argument that starts with @ names a file of options (use ./{word})"
                raise BadRequest(f"{word}: {problem}", remedy) from None
            replaced += self._read_files(inner, (*outer, path))
        return replaced

    def error(self, message):
        remedy = "see --help"
        message = message.replace("expected at least one argument", "expected one argument")
        if unknown := re.match(r"unrecognized arguments: (?:.* )?\W{1,2}(\w+)", message):
            known = self._option_string_actions
            close = difflib.get_close_matches(f"--{unknown[1]}", known, n=1, cutoff=0.75)
            remedy = f"did you mean {close[0]}?" if close else remedy
        if "expected one argument" in message:
            pairs = [*itertools.pairwise(self._args)]
            names = re.match("argument ([^:]*):", message)[1].split("/")
            values = (value for name, value in pairs if name in names)
            value = next((v for v in values if re.match("-(?!-)", v)), None)
            remedy = f"write {names[-1]}={value}" if value else remedy
        raise BadRequest(message.removeprefix("argument "), remedy)

    def several(self, options):
        """The options that have several values, by name."""
        actions = (action for action in self.options if isinstance(action, Several))
        return [a.dest for a in actions if isinstance(getattr(options, a.dest), list)]

    def files_read(self, options, free=True):
        """The files that the options name for reading, {option: path}; unless `free`, only those
        that a resumed run may not change."""
        actions = [a for a in self.options if a.file == "read" and (free or not a.free)]
        named = [(a.option_strings[-1][2:], a, getattr(options, a.dest)) for a in actions]
        return {name: path for name, a, path in named if names_file(a, path)}

    def make_absolute(self, options, folder):
        """Makes the names of files in the options absolute; they are relative to `folder`."""
        for action in self.options:
            name = getattr(options, action.dest)
            if names_file(action, name):
                setattr(options, action.dest, os.path.abspath(os.path.join(folder, name)))

    def without_effect(self, options):
        """Yields a notice for each option that was set but has no effect, in the order of
        --help."""
        for action in self.options:
            changed = getattr(options, action.dest) != getattr(self.defaults, action.dest)
            reason = changed and action.idle and action.idle(options)
            if reason:
                with_reason = reason if reason.startswith("without ") else f"with {reason}"
                yield f"--{action.dest} has no effect {with_reason}"

    def words(self, options, **chosen):
        """The options that differ from their defaults, as words of a command line; `chosen` has the
        values that the run chose for options left open."""
        words = []
        for action in self.options:
            value = chosen.get(action.dest, getattr(options, action.dest))
            if action.text is None or value in (None, getattr(self.defaults, action.dest)):
                continue
            name = action.option_strings[0]
            words.append(name if action.nargs == 0 else f"{name}={action.text(value)}")
        return words

    def fixed_differences(self, old, new):
        """Yields (action, old value, new value) for the fixed options that differ."""
        for action in self.options:
            values = getattr(old, action.dest), getattr(new, action.dest)
            if not action.free and values[0] != values[1]:
                yield action, *values


PRESET = argparse.ArgumentParser(add_help=False)
PRESET.add_argument("--preset", nargs="?")


def names_file(action, value):
    """Whether the value of an option is the name of a file."""
    return bool(action.file) and value is not None and value not in action.words


class Uses(list):
    """The values of an option that can have several, at each of its uses so far."""


class Several(argparse.Action):
    """An option that can have several values. If it is given several times, all values count if the
    output names several pictures; otherwise only the last use counts, as for every option. One
    value is stored as it is, several as a list. They replace those of a preset or checkpoint."""

    def __call__(self, parser, namespace, values, option_string=None):
        earlier = getattr(namespace, self.dest)
        earlier = earlier if isinstance(earlier, Uses) else ()
        setattr(namespace, self.dest, Uses([*earlier, listed(values)]))


def settle(options):
    """Replaces the Uses in the options by the values that count."""
    for name, uses in vars(options).items():
        if isinstance(uses, Uses):
            uses = uses if names_several(options.output_file) else uses[-1:]
            values = [*itertools.chain(*uses)]
            setattr(options, name, values if len(values) > 1 else values[0])


def names_several(output):
    """Whether the value of --output names a picture for each start picture and layer."""
    return output is not None and (
        output.endswith("/") or "{name}" in output or "{layer}" in output
    )


def listed(value):
    """The values of an option that can have several, as a list."""
    return value if isinstance(value, list) else [value]


class HelpFormatter(argparse.HelpFormatter):
    """Adds an option's default to its help, unless it is None or False."""

    def _get_help_string(self, action):
        has_default = not any(action.default is none for none in (None, False, argparse.SUPPRESS))
        return f"{action.help} (default: %(default)s)" if has_default else action.help


def number(kind, low=None, high=None, above=None):
    """A type for argparse: an int or float within bounds; `above` is an exclusive lower bound."""
    limits = {"at least": low, "more than": above, "at most": high}
    bounds = " and ".join(
        f"{words} {limit}" for words, limit in limits.items() if limit is not None
    )

    def parse(text):
        value = kind(text)
        if kind is int and abs(value) > 10**15:
            raise argparse.ArgumentTypeError(f"{text[:30]} is too large; use a smaller number")
        if not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text} is not a finite number")
        is_low = low is not None and value < low or above is not None and value <= above
        if is_low or high is not None and value > high:
            raise argparse.ArgumentTypeError(f"{text} is out of range; it must be {bounds}")
        return value

    parse.__name__ = "whole number" if kind is int else "number"
    return parse


def not_empty(text):
    """A type for argparse: text that is not empty, as that of an unset shell variable would be."""
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r} must not be empty or contain a null character")
    return text


def mask_name(text):
    """A type for argparse: a file to read, or alpha."""
    return text if text == "alpha" else file_name(text)


def file_name(text):
    """A type for argparse: a file to read. The name is taken literally if the file exists."""
    return expanded(text, os.path.exists(not_empty(text)))


def output_name(text):
    """A type for argparse: a file to write. The name is taken literally if its folder exists."""
    return expanded(text, os.path.isdir(os.path.dirname(not_empty(text)) or "."))


def scratch_folder(text):
    """A type for argparse: a folder in which files can be created."""
    path = os.path.abspath(expanded(text, os.path.isdir(not_empty(text))))
    if not (os.path.isdir(path) and os.access(path, os.W_OK | os.X_OK)):
        kind = "cannot be written to" if os.path.isdir(path) else "is not a folder"
        raise argparse.ArgumentTypeError(f"{path} {kind}; use a folder with enough disk space")
    return path


def gpu_numbers(text):
    """A type for argparse: a list of GPU numbers, [] for the CPU."""
    words = text.split(",")
    are_numbers = all(re.fullmatch(r"[0-9]{1,9}", word) for word in words)
    if are_numbers and len(set(map(int, words))) == len(words):
        return list(map(int, words))
    if re.fullmatch(r"-[0-9]+", text):
        return []
    remedy = "use different GPU numbers, such as 0,1, or just -1 for the CPU"
    raise argparse.ArgumentTypeError(f"{text!r}: {remedy}")


def input_size(text):
    """A type for argparse: (height, width) from "HxW" or "N"."""
    sides = re.fullmatch(r"(\d+)(?:x(\d+))?", text.strip())
    size = sides and (int(sides[1]), int(sides[2] or sides[1]))
    if not size or not LEAST_SIDE <= min(size) <= max(size) <= MAX_SIDE:
        problem = f"{text[:30]}: use HxW or N, with sides from {LEAST_SIDE} to {MAX_SIDE}"
        raise argparse.ArgumentTypeError(problem)
    return size


def colour(text):
    """A type for argparse: a colour that PIL knows."""
    if text == "white":  # the default; importing PIL for it would slow down every start
        return text
    from PIL import ImageColor

    try:
        ImageColor.getrgb(text)
    except ValueError:
        remedy = "use a name or #rrggbb, such as black or #808080"
        raise argparse.ArgumentTypeError(f"{text!r} is not a colour; {remedy}") from None
    return text


def when(name, value):
    """A reason to be idle: another option has this value."""
    return lambda options: getattr(options, name) == value and f"--{name} {value}"


def too_few_steps(name):
    """A reason to be idle: another option's number of steps is never reached."""

    def reason(options):
        steps, every = options.num_steps, getattr(options, name)
        return every >= steps and f"--num_steps {steps} and --{name} {every}"

    return reason


PARSER = Parser(
    prog=PROGRAM,
    description="Makes DeepDream pictures with Caffe, by amplifying what a layer of a network "
    "responds to in a picture or in noise.",
    epilog="Option names can be written with dashes. A size is HxW, height x width in pixels; "
    "or the longer side alone; or xF, F times the base size, which is the start picture's size "
    "or, for noise, the network's input size. No side may be smaller than the network's input. "
    "@FILE reads options from a file.",
)
