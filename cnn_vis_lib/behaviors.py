"""All watchers by their words, and the watchers of one run."""

import argparse

from .checkpoints import RUN_ARRAYS
from .errors import RunFailed, log, suggestion
from .watchers import Bar, Checkpoints, Gif, Plot, PlotPix, Print, Save, Show, Silence, Stats
from .web import Web


def behaviors(text):
    """A type for argparse: words of BEHAVIORS joined by +, as a set; "none" is the empty set."""
    words, known = set(text.split("+")), (*BEHAVIORS, "none")
    if unknown := words.difference(known):
        word = min(unknown)
        problem = f"{text!r}: there is no {word!r} (words are joined by +)"
        raise argparse.ArgumentTypeError(f"{problem}; {suggestion(word, known)}")
    if "none" in words and len(words) > 1:
        raise argparse.ArgumentTypeError(f"{text!r}: none cannot be joined with other words")
    return words - {"none"}


BEHAVIORS = {  # words of --iter_behavior
    "print": Print,
    "save": Save,
    "show": Show,
    "plot_pix": PlotPix,
    "plot": Plot,
    "gif": Gif,
    "web": Web,
}


ARRAYS = RUN_ARRAYS | {  # all that a checkpoint can hold
    name: kind for watcher in (*BEHAVIORS.values(), Stats) for name, kind in watcher.arrays.items()
}


class Watchers(list):
    """The watchers that the options ask for, in the order in which they act. Raises BadRequest if
    one cannot work."""

    def __init__(self, options, files):
        self.output_iter = options.output_iter
        asked = [watcher for word, watcher in BEHAVIORS.items() if word in options.iter_behavior]
        asked += [Stats] if options.stats else []
        asked += [Silence, Checkpoints] + ([] if options.quiet else [Bar])
        super().__init__(watcher(options, files) for watcher in asked)

    def writes(self):
        """The paths that they write, except those of intermediate pictures."""
        return [path for watcher in self for path in watcher.writes()]

    def wants_stats(self, step):
        """Whether a step, counted from 1, is to be measured."""
        return any(watcher.wants_stats(step) for watcher in self)

    def after_step(self, progress):
        """Does what is due after a step. A RunFailed is reported, and the run continues."""
        for watcher in self:
            try:
                watcher.after_step(progress)
                if progress.step % self.output_iter == 0:
                    watcher.when_due(progress)
            except RunFailed as error:
                log.error(str(error))

    def keep(self):
        """What they keep in a checkpoint, {name: array}."""
        return {name: array for watcher in self for name, array in watcher.keep().items()}
