"""The progress bar."""

import os
import sys
import threading
import time

from .errors import log

SECONDS_BETWEEN = 10  # between lines in a log


class ProgressBar:
    """How many tiles of all pictures are done, and how long the rest will take: a bar on a
    terminal, or lines in a log. Pictures that have not begun count as the mean of those that
    have. Can be used by several threads."""

    def __init__(self, count=1):
        self._count, self._tiles, self._lock = count, {}, threading.Lock()
        self._bar, self._before, self._begun = None, 0, time.monotonic()
        self._told, self._share_told = self._begun, 0.0  # of the last line in a log

    def update(self, number, done, total, text):
        """Shows that `done` of the `total` tiles of a picture are done, and the text."""
        with self._lock:
            if number not in self._tiles:
                self._before += done
            self._tiles[number] = done, total
            self._show(text)

    def end_picture(self, number):
        """Counts no more tiles of a picture, however it ended."""
        with self._lock:
            if number in self._tiles:
                done, _ = self._tiles[number]
                self._tiles[number] = done, done
            else:  # it has not begun, and will not
                self._count = max(1, self._count - 1)

    def _show(self, text):
        from tqdm import tqdm

        done, known = (sum(counts) for counts in zip(*self._tiles.values()))
        total = known * self._count / len(self._tiles)
        if self._bar is None:
            has_columns = sys.stderr.isatty() and os.get_terminal_size(2).columns > 0
            self._bar = tqdm(
                total=total, initial=done, leave=False, dynamic_ncols=True, disable=not has_columns,
                bar_format="{desc} |{bar}| {percentage:3.0f}%, {remaining} left",
            )  # fmt: skip
        if self._bar.disable:
            self._tell(text, done, total)
            return
        self._bar.total = total
        self._bar.set_description_str(text, refresh=False)
        self._bar.update(done - self._bar.n)

    def _tell(self, text, done, total):
        """Logs how far all is, unless it did so less than ten seconds or a tenth of it ago."""
        now, share = time.monotonic(), done / total
        if now - self._told < SECONDS_BETWEEN or round(share - self._share_told, 6) < 0.1:
            return
        self._told, self._share_told = now, share
        rate = (done - self._before) / (now - self._begun)
        left = self._bar.format_interval((total - done) / rate) if rate else "?"
        log.info(f"{text}: {100 * share:.0f}%, {left} left")

    def close(self):
        """Removes it from the terminal."""
        with self._lock:
            if self._bar is not None:
                self._bar.close()
