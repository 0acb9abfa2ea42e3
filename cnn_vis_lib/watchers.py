"""Watchers: what a run does along the way."""

import csv
import io
import time

import numpy as np

from .errors import log, one_line, refusal
from .files import whole_file
from .gauge import COLUMNS, STATS
from .pixels import resize
from .terminal import say
from .writing import write_picture


class Watcher:
    """Something that a run does along the way. To add one, write a class, put it in BEHAVIORS, in
    behaviors.py, under its word for --iter_behavior, and its `ending` in ENDINGS, in outputs.py.

    A RunFailed from after_step or when_due is reported, and the run continues; any other failure
    ends it. Once the run has begun, `self.run` is the Run: its options, files, record and so on.
    `say` prints a line above the progress bar.
    """

    ending = None  # it writes a file NAME + ending beside the picture
    at_end = False  # whether it also does something at the end
    arrays = {}  # what it keeps in a checkpoint: {name: (dtype, *shape)}, None for any length

    def __init__(self, options, files):
        """Called before the run; raises BadRequest if the watcher cannot work."""
        self.options, self.files = options, files

    def writes(self):
        """The paths that it writes, except those of intermediate pictures."""
        return [self.files.beside(self.ending)] if self.ending else []

    def wants_stats(self, step):
        """Whether a step, counted from 1, is to be measured. It is asked several times for each
        step, even before that begins; the answer must not change until the step is done."""
        return False

    def begin(self, run):
        """Called when everything has been checked, before the first step; run.kept holds the
        arrays of the checkpoint that the run continues from."""
        self.run = run

    def after_step(self, progress):
        """Called after every step."""

    def when_due(self, progress):
        """Called after every --output_iter steps at a size."""

    def finish(self, progress):
        """Called when the finished picture has been written. A RunFailed ends the run."""

    def close(self):
        """Called at the end, however the run ends."""

    def keep(self):
        """Its `arrays`, {name: array}, for a checkpoint."""
        return {}


class Silence(Watcher):
    """Reports, once, that the network's gradient is zero."""

    is_told = False

    def after_step(self, progress):
        if progress.is_silent and not self.is_told:
            self.is_told = True
            layer = self.options.target_layer
            log.info(
                f"note: the gradient of {layer} is zero; only the regularizers change the picture"
            )


class Print(Watcher):
    """print: statistics as readable lines."""

    def wants_stats(self, step):
        return step % self.options.output_iter == 0

    def when_due(self, progress):
        s = progress.stats
        say(
            f"{self.run.batch}{progress}, objective {s['objective']:.4g}\n"
            f"  losses: p {s['p_loss']:.4g}, aux {s['aux_loss']:.4g}, tv {s['tv_loss']:.4g}\n"
            f"  mean gradients: cnn {s['cnn_gradient']:.4g}, p {s['p_gradient']:.4g}, "
            f"aux {s['aux_gradient']:.4g}, tv {s['tv_gradient']:.4g}\n"
            f"  step: mean {s['step_size']:.4g}, relative to value {s['step_to_value']:.4g}; "
            f"image: mean {s['image_mean']:.4g}, std {s['image_std']:.4g}"
        )


class Save(Watcher):
    """save: NAME_SIZE_STEP.EXT."""

    def when_due(self, progress):
        picture = progress.picture(self.options.rescale_image, self.options.depth)
        path = self.files.on_the_way(progress.size_number, progress.step)
        write_picture(picture, path, self.run.made(size=progress.size_number, step=progress.step))


class Drawing(Watcher):
    """A watcher that draws with matplotlib: in a window, or in a file if there is no display."""

    def __init__(self, options, files):
        super().__init__(options, files)
        try:
            import matplotlib.figure
            import matplotlib.pyplot  # noqa: F401
        except (ImportError, ValueError) as error:
            remedy = "pip install matplotlib, and check $MPLBACKEND"
            problem = f"matplotlib does not work ({one_line(error)})"
            raise refusal("iter_behavior", "", problem, remedy) from None

    def open_window(self, **arguments):
        """Makes self.figure, in a window if there is a display."""
        import matplotlib.figure
        import matplotlib.pyplot

        self._window = matplotlib.pyplot
        try:
            self.figure = matplotlib.pyplot.figure(**arguments)
            has_display = self.figure.canvas.required_interactive_framework is not None
        except Exception:  # each toolkit fails in its own way without a display
            has_display = False
        if not has_display:
            arguments.pop("num", None)
            self.figure, self._window = matplotlib.figure.Figure(**arguments), None
            log.info(f"note: there is no display; see {self.files.beside(self.ending)}")

    def update_window(self):
        """Shows the figure as it is, or writes it. Raises RunFailed."""
        if self._window:
            self._window.pause(0.01)
        else:
            self.write(self.figure)

    def write(self, figure):
        """Writes a figure as a PNG. Raises RunFailed."""
        with whole_file(self.files.beside(self.ending)) as file:
            figure.savefig(file, format="png")


class Show(Drawing):
    """show: the picture as it stands."""

    ending = "_show.png"

    def begin(self, run):
        super().begin(run)
        size = (self.options.show_width, self.options.show_height)
        self.open_window(num="cnn-vis", figsize=size)

    def when_due(self, progress):
        self.figure.clf()
        axes = self.figure.add_axes((0, 0, 1, 1))
        axes.imshow(progress.picture(self.options.rescale_image))
        axes.axis("off")
        self.update_window()


class PlotPix(Drawing):
    """plot_pix: the values of a few pixels over time: those of the original's four that lie inside
    the picture."""

    ending = "_plot_pix.png"
    arrays = {"pixels": ("float64", None, 6)}
    PIXELS = ((100, 100), (200, 200), (100, 200), (200, 100))  # (y, x)

    def begin(self, run):
        super().begin(run)
        self.open_window(num="cnn-vis pixels")
        self.history = run.kept.get("pixels", np.empty((0, 6))).tolist()  # step, y, x, b, g, r

    def after_step(self, progress):
        image = progress.image
        for y, x in self.PIXELS:
            if y < image.shape[2] and x < image.shape[3]:
                self.history.append([progress.steps_done(), y, x, *image[0, :, y, x]])

    def when_due(self, progress):
        self.figure.clf()
        history = np.array(self.history).reshape(-1, 6)
        for number, (y, x) in enumerate(self.PIXELS, 1):
            axes = self.figure.add_subplot(2, 2, number, title=f"pixel {(y, x)}", xlabel="step")
            rows = history[(history[:, 1:3] == (y, x)).all(axis=1)]
            for colour, channel in zip("bgr", (3, 4, 5)):
                axes.plot(rows[:, 0], rows[:, channel], colour)
        self.figure.tight_layout()
        self.update_window()

    def keep(self):
        return {"pixels": np.array(self.history, np.float64).reshape(-1, 6)}


class Statistics(Watcher):
    """A watcher that keeps the statistics of every step as a row with the COLUMNS."""

    at_end = True
    arrays = {"rows": ("float64", None, len(COLUMNS))}

    def wants_stats(self, step):
        return True

    def begin(self, run):
        super().begin(run)
        self.rows = run.kept["rows"].tolist() if "rows" in run.kept else []

    def after_step(self, progress):
        stats = (progress.stats[name] for name in STATS)
        self.rows.append([progress.size_number, *progress.size, progress.step, *stats])

    def finish(self, progress):
        if self.rows:
            self.when_due(progress)

    def keep(self):
        return {"rows": np.array(self.rows, np.float64).reshape(-1, len(COLUMNS))}


class Stats(Statistics):
    """--stats: the statistics as CSV."""

    def writes(self):
        return [self.options.stats]

    def when_due(self, progress):
        with whole_file(self.options.stats, f"--stats {self.options.stats}") as file:
            text = io.TextIOWrapper(file, encoding="utf-8", newline="")
            rows = ([*map(int, row[:4]), *row[4:]] for row in self.rows)
            csv.writer(text).writerows([COLUMNS, *rows])
            text.detach()


class Plot(Statistics, Drawing):
    """plot: objective, losses and step size over all steps; size changes marked."""

    ending = "_plot.png"
    GROUPS = {
        "objective": ["objective"],
        "loss": ["p_loss", "aux_loss", "tv_loss"],
        "mean step": ["step_size"],
    }

    def when_due(self, progress):
        from matplotlib.figure import Figure

        columns = dict(zip(COLUMNS, np.array(self.rows, float).T))
        steps = (columns["size"] - 1) * self.options.num_steps + columns["step"]
        changes = steps[1:][np.diff(columns["size"]) > 0] - 0.5
        figure = Figure(figsize=(8, 9), layout="constrained")
        for axes, (label, names) in zip(figure.subplots(3, sharex=True), self.GROUPS.items()):
            for name in filter(lambda name: columns[name].any(), names):
                axes.plot(steps, columns[name], label=name.replace("_", " "))
            for change in changes:
                axes.axvline(change, color="grey", linewidth=0.7, linestyle=":")
            axes.set_ylabel(label)
            if any((columns[name] > 0).any() for name in names[1:]):
                axes.set_yscale("log")
            if len(names) > 1 and axes.lines:
                axes.legend()
        axes.set_xlabel("step, over all sizes (dotted: size changes)")
        self.write(figure)


class Gif(Watcher):
    """gif: an animation at ten pictures a second that pauses on the last."""

    ending, at_end = "_run.gif", True
    arrays = {"frames": ("uint8", None, None, None, 3)}
    SIDE = 480  # pixels, at most

    def begin(self, run):
        super().begin(run)
        self.frames = list(run.kept.get("frames", []))

    def _frame(self, picture, last_size):
        """The picture resized to the proportions of the last size: uint8 (h, w, 3)."""
        scale = min(1, self.SIDE / max(last_size))
        return resize(picture, tuple(max(1, round(scale * side)) for side in last_size))

    def when_due(self, progress):
        picture = progress.picture(self.options.rescale_image)
        self.frames.append(self._frame(picture, progress.sizes[-1]))

    def finish(self, progress):
        from PIL import Image

        last = self._frame(progress.picture(self.options.rescale_image), progress.sizes[-1])
        is_there = self.frames and np.array_equal(self.frames[-1], last)
        first, *others = map(Image.fromarray, self.frames if is_there else [*self.frames, last])
        durations = [100] * len(others) + [2000]
        with whole_file(self.files.beside(self.ending)) as file:
            first.save(file, "GIF", save_all=True, append_images=others, duration=durations, loop=0)

    def keep(self):
        return {"frames": np.stack(self.frames)} if self.frames else {}


class Checkpoints(Watcher):
    """--checkpoint_iter: saves the run every N steps, counted over all sizes; by default also when
    a minute has passed."""

    def begin(self, run):
        super().begin(run)
        self._saved = time.monotonic()

    def after_step(self, progress):
        every, is_late = self.options.checkpoint_iter, False
        if every is None:
            every = max(50, self.options.output_iter)
            is_late = time.monotonic() - self._saved > SECONDS_AT_RISK
        if every and (progress.steps_done() % every == 0 or is_late):
            self.run.checkpoint().write(self.files.checkpoint)
            self._saved = time.monotonic()


class Pace:
    """How far a run has got, in tiles, and how fast it is."""

    def __init__(self, dream):
        self._steps = dream.settings.num_steps
        self.counts = [sum(map(len, dream.tiles(size))) for size in dream.sizes]
        self.total = self._steps * sum(self.counts)
        self.advance(dream)
        self._done_before, self._begun = self.done, time.monotonic()

    def advance(self, run):
        """Takes in how far a Dream, or its Progress, is."""
        *before, count = self.counts[: run.size_number]
        self.done = self._steps * sum(before) + run.step * count

    def rate(self):
        """Tiles per second, on average."""
        return (self.done - self._done_before) / (time.monotonic() - self._begun)

    def seconds_left(self):
        """How long the rest will take at this rate; None before the first step."""
        rate = self.rate()
        return (self.total - self.done) / rate if rate else None


SECONDS_AT_RISK = 60  # after which a run is saved


class Bar(Watcher):
    """Moves the progress bar."""

    def begin(self, run):
        super().begin(run)
        self._pace = Pace(run.dream)
        self._show("starting")

    def after_step(self, progress):
        self._pace.advance(progress)
        self._show(f"{self.run.batch}{progress}")

    def _show(self, text):
        batch = self.run.batch
        batch.bar.update(batch.number, self._pace.done, self._pace.total, text)

    def close(self):
        batch = self.run.batch
        batch.bar.end_picture(batch.number)
        if batch.is_last():
            batch.bar.close()
