"""The command line's parser, to which the script adds the options, and sizes as options give them.

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
import os
import re
import shlex
import sys
import threading

from .errors import BadRequest, one_line, refusal, suggestion
from .install import COMMAND, PROGRAM
from .pixels import MAX_SIDE
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
        least = tuple(max(t, round(b * enough)) for t, b in zip(tile_size, base))
        if (text or "").strip().lower() == "smallest":
            ends.append(least)
            continue
        try:
            size = parse_size(text, base)
        except ValueError as error:
            remedy = "use HEIGHTxWIDTH (540x960), the longer side (960), x0.5 or smallest"
            raise size_refusal(settings, name, str(error), remedy) from None
        if text and text.strip().isdigit() and any(a < t for a, t in zip(size, tile_size)):
            problem = "{}x{} is smaller than the network's input, so it is {}x{} (height x width)"
            remarks.append(f"--{name} {text}: {problem.format(*size, *least)}")
            size = least
        ends.append(size)
    return ends[0], ends[-1], remarks


class Parser(argparse.ArgumentParser):
    """argparse that accepts dashes in option names, negative numbers such as -1e-4, presets and
    files of options, reports errors in one line, and keeps the attributes listed above for each
    option. `options` lists the actions."""

    def __init__(self, **arguments):
        super().__init__(formatter_class=HelpFormatter, add_help=False, **arguments)
        self.add_argument(
            "-h", "--help", nargs="?", choices=("all",), metavar="all", action=Help,
            default=argparse.SUPPRESS, help="show this, or all options",
        )  # fmt: skip
        self._negative_number_matcher = re.compile(r"^-(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$")
        self.options, self._arguments = [], arguments
        self._parsing = threading.local()  # dream() may be called in several threads

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
        args = self._parsing.args = self.read_files(args)
        given = argparse.Namespace(**{action.dest: None for action in self.options})
        given, _ = super().parse_known_args(args, given)
        preset = PRESETS.get(given.preset)
        if preset:  # is applied first, so that all other options override it
            namespace, _ = super().parse_known_args(preset.options.split(), namespace)
            settle(namespace)
        options, rest = super().parse_known_args(args, namespace)
        pictures = [*filter(may_be_picture, rest)]
        if pictures:
            image = self._option_string_actions["--image"]
            try:
                image(self, options, [self._get_value(image, word) for word in pictures])
            except argparse.ArgumentError as error:
                self.error(str(error))
        settle(options)
        if preset:
            fit_preset(options, given)
        if options.output_file is None and not options.resume:
            options.output_file = default_output(options)
        return options, [word for word in rest if word not in pictures]

    def _underscored(self, arg):
        name, equals, value = arg.partition("=")
        if value == "--" and name.startswith("--"):  # some versions of argparse drop it
            self.error(f"{name}: -- is not a value")
        name = name.replace("-", "_").replace("__", "--", 1)
        return name + equals + value if arg.startswith("--") else arg

    def _check_value(self, action, value):
        if action.choices is not None and value not in action.choices:
            name = next(n for n in action.option_strings if n.startswith("--"))[2:]
            problem = "there is no such value"
            raise refusal(name, value, problem, suggestion(value, action.choices))

    def read_files(self, words, outer=()):
        """The words, with each @FILE replaced by the words in that file. They can be read again, as
        a pipe cannot."""
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
            replaced += self.read_files(inner, (*outer, path))
        return replaced

    def error(self, message):
        remedy = "see --help"
        message = message.replace("expected at least one argument", "expected one argument")
        if unknown := re.match(r"unrecognized arguments: (?:.* )?\W{1,2}(\w+)", message):
            known = self._option_string_actions
            close = difflib.get_close_matches(f"--{unknown[1]}", known, n=1, cutoff=0.75)
            remedy = f"did you mean {close[0]}?" if close else remedy
        if "expected one argument" in message:
            pairs = [*itertools.pairwise(self._parsing.args)]
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
        named = self._files_read(options, free)
        return {action.option_strings[-1][2:]: path for action, path in named}

    def pictures_read(self, options):
        """The pictures that the options name, {attribute: path}."""
        return {action.dest: path for action, path in self._files_read(options, False)}

    def _files_read(self, options, free):
        actions = [a for a in self.options if a.file == "read" and (free or not a.free)]
        named = [(action, getattr(options, action.dest)) for action in actions]
        return [(action, path) for action, path in named if names_file(action, path)]

    def make_absolute(self, options, folder):
        """Makes the names of files in the options absolute; they are relative to `folder`."""
        for action in self.options:
            name = getattr(options, action.dest)
            if names_file(action, name):
                setattr(options, action.dest, os.path.abspath(os.path.join(folder, name)))

    def without_effect(self, options):
        """Yields a notice for each option that was set, not only by the preset, but has no effect,
        in the order of --help."""
        base = self.defaults
        if options.preset in PRESETS:
            base = self.parse_args([f"--preset={options.preset}"])
        for action in self.options:
            changed = getattr(options, action.dest) != getattr(base, action.dest)
            reason = changed and action.idle and action.idle(options)
            if reason:
                with_reason = reason if reason.startswith("without ") else f"with {reason}"
                yield f"--{action.dest} has no effect {with_reason}"

    def words(self, options, **chosen):
        """The options that differ from their defaults, as words of a command line; `chosen` has the
        values that the run chose for options left open."""
        return self._differences(options, self.defaults, 0, **chosen)

    def short_words(self, options, preset):
        """The options as few words: the preset, if that is not None, what differs from it, and the
        names in the README. All words, if these would not be parsed to the same options."""
        start = [f"--preset={preset}"] if preset in PRESETS else []
        image = [f"--image={options.initial_image}"] if options.initial_image else []
        base = self.parse_args([*start, *image])
        words = [*start, *image, *self._differences(options, base, -1)]
        again = vars(self.parse_args(words)) | {"preset": None}
        return words if again == vars(options) | {"preset": None} else self.words(options)

    def _differences(self, options, base, name, **chosen):
        """The options that differ from those in `base`, as words, with their name-th names."""
        words = []
        for action in self.options:
            value = chosen.get(action.dest, getattr(options, action.dest))
            if action.text is None or value in (None, getattr(base, action.dest)):
                continue
            option = action.option_strings[name]
            words.append(option if action.nargs == 0 else f"{option}={action.text(value)}")
        return words

    def fixed_differences(self, old, new):
        """Yields (action, old value, new value) for the fixed options that differ."""
        for action in self.options:
            values = getattr(old, action.dest), getattr(new, action.dest)
            if not action.free and values[0] != values[1]:
                yield action, *values


def names_file(action, value):
    """Whether the value of an option is the name of a file."""
    return bool(action.file) and value is not None and value not in action.words


class Uses(list):
    """The values of an option that can have several, at each of its uses so far."""


class Several(argparse.Action):
    """An option that can have several values, also by being given several times. One value is
    stored as it is, several as a list. They replace those of a preset or checkpoint."""

    def __call__(self, parser, namespace, values, option_string=None):
        earlier = getattr(namespace, self.dest)
        earlier = earlier if isinstance(earlier, Uses) else ()
        setattr(namespace, self.dest, Uses([*earlier, listed(values)]))


def settle(options):
    """Replaces the Uses in the options by the values that count."""
    for name, uses in vars(options).items():
        if isinstance(uses, Uses):
            values = [*dict.fromkeys(itertools.chain(*uses))]
            setattr(options, name, values if len(values) > 1 else values[0])


def fit_preset(options, given):
    """Adapts the options of a preset, among `options`, to those that were `given` with it (the
    others are None there): a first size above the last one is lowered, and a channel is amplified.
    """
    sizes = (options.initial_size, given.final_size)
    if given.initial_size is None and all(re.match(r"\s*[0-9]", size or "") for size in sizes):
        options.initial_size = min(sizes, key=lambda size: max(map(int, re.findall(r"\d+", size))))
    if given.target_neuron is not None and given.image_type is None:
        options.image_type = "amplify_neuron"


def check_preset(options):
    """Raises BadRequest if the options have a preset for photographs, but no photograph."""
    preset = PRESETS.get(options.preset)
    if preset and preset.is_for_photographs and options.initial_image is None:
        remedy = "add one: --image in.jpg"
        raise refusal("preset", options.preset, "this is for photographs", remedy)


def may_be_picture(word):
    """Whether a word that belongs to no option names a start picture: one that exists, or at least
    has the ending of a file."""
    has_ending = re.search(r"[^./]\.[A-Za-z][^./]*$", word)
    return not re.match("[-–—]", word) and bool(os.path.exists(word) or has_ending)


def default_output(options):
    """The name of the picture if --output gives none: the start picture's and the preset's,
    in_dream.png, so that it survives the next run; from noise the preset's; out.png without one."""
    image, preset = options.initial_image, options.preset
    if not preset or isinstance(image, list):
        return "out.png"
    image = image and re.sub("[{}]", "", image)  # which would make the name a template
    stem = f"{os.path.splitext(os.path.basename(image))[0]}_" if image else ""
    return f"{stem}{preset}.png"


def names_several(output):
    """Whether the value of --output names a picture for each start picture and layer."""
    return output is not None and (
        output.endswith("/") or "{name}" in output or "{layer}" in output
    )


def listed(value):
    """The values of an option that can have several, as a list."""
    return value if isinstance(value, list) else [value]


USAGE = f"""\
{COMMAND} --preset dream --image in.jpg                # writes in_dream.png
{COMMAND} --image in.jpg --layer inception_4c/output   # as the original program does
{COMMAND} --help"""


class Help(argparse.Action):
    """--help prints what one needs, the options BASIC; --help all everything."""

    # fmt: off
    BASIC = (
        "image", "preset", "list_presets", "strength", "final_size", "num_steps", "output",
        "layer", "list_layers", "guide", "mask", "keep_colours",
        "iter_behavior", "resume", "model", "download_model", "gpu",
    )
    # fmt: on

    def __call__(self, parser, namespace, values, option_string=None):
        if values:
            parser.print_help()
        else:
            formatter = HelpFormatter(parser.prog)
            options = {action.option_strings[-1]: action for action in parser.options}
            formatter.add_arguments(options[f"--{name}"] for name in self.BASIC)
            rest = f"--help all shows all {len(parser.options)} options."
            print(f"{parser.description}\n\n{USAGE}\n\n{formatter.format_help()}\n{rest}")
        parser.exit()


class HelpFormatter(argparse.HelpFormatter):
    """Adds an option's default to its help, unless it is None or False."""

    def _get_help_string(self, action):
        has_default = not any(action.default is none for none in (None, False, argparse.SUPPRESS))
        return f"{action.help} (default: %(default)s)" if has_default else action.help


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
    "or, for noise, the network's input size; or smallest, what the network takes at least. "
    "@FILE reads options from a file.",
)
