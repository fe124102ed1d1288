"""What the command line says: remarks and progress on standard error, results on standard output."""

from __future__ import annotations

import re
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

_BAR_WIDTH = 24
_REDRAW_SECONDS = 0.1  # a terminal needs no more
_TICK_SECONDS = 1.0
_LINE_SECONDS = 10.0  # between lines in a log file
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and newline


class Console:
    """Speaks to the person, or the log file, behind standard error.

    Args:
        stream: where progress and remarks go; default standard error.
        quiet: say nothing but errors.
    """

    def __init__(self, stream: TextIO | None = None, *, quiet: bool = False) -> None:
        self.stream = stream if stream is not None else sys.stderr
        self.quiet = quiet
        self.live = not quiet and self.stream.isatty()

    def say(self, text: str) -> None:
        """One remark."""
        if not self.quiet:
            self.error(text)

    def error(self, text: str) -> None:
        """One line that is shown even when quiet."""
        _write(self.stream, text + "\n")

    def result(self, text: str) -> None:
        """What the command was run for, on standard output."""
        _write(sys.stdout, text + "\n")

    @contextmanager
    def progress(self, title: str, unit: str = "") -> Iterator[Progress]:
        """A bar for one stage; it is closed, with the time it took, when the block ends.

        Args:
            title: what is being done, e.g. "Sampling".
            unit: what is counted, e.g. "step"; empty when nothing is.
        """
        bar = Progress(self, title, unit)
        try:
            yield bar
        except BaseException:
            bar.close(finished=False)
            raise
        bar.close(finished=True)


class Progress:
    """A bar on a terminal; elsewhere a line at the start, an estimate after two units, a line every ten
    seconds, and one at the end."""

    def __init__(self, console: Console, title: str, unit: str) -> None:
        self.console = console
        self.title = title
        self.unit = unit
        self.done = 0
        self.total = 0
        self.first = 0  # what was done before this run: a resumed run starts in the middle
        self.started = time.monotonic()
        self.counted_from = self.started
        self.shown = self.started
        self.lock = threading.Lock()
        self.ended = threading.Event()
        if console.live:
            self._draw()
        else:
            console.say(f"{title} ...")
        if not console.quiet:
            threading.Thread(target=self._tick, daemon=True).start()

    def update(self, done: int, total: int) -> None:
        """`done` of `total` units are finished; the signature of every progress callback in this package."""
        now = time.monotonic()
        with self.lock:
            if not self.total:
                # The first unit is not timed: it pays for warming up.
                self.first, self.counted_from = done, now
            self.done, self.total = done, total
            self._show(now, estimate=done - self.first == 2)

    def close(self, *, finished: bool) -> None:
        """Ends the bar and says how long it took."""
        self.ended.set()
        with self.lock:
            if self.console.live:
                self.console.stream.write("\r\x1b[K")
            spent = duration(time.monotonic() - self.started)
            reached = f", at {self._count()}" if self.total else ""
            self.console.say(f"{self.title}: done in {spent}" if finished else
                             f"{self.title}: stopped after {spent}{reached}")

    def _tick(self) -> None:
        """Shows, in a thread of its own, that time passes, even when nothing can be counted."""
        while not self.ended.wait(_TICK_SECONDS):
            with self.lock:
                if not self.ended.is_set():
                    self._show(time.monotonic(), estimate=False)

    def _show(self, now: float, *, estimate: bool) -> None:
        """Redraws the bar, or writes a line if it is time for one; `estimate` asks for one a bit earlier."""
        if self.console.live:
            if self.done == self.total or now - self.shown >= _REDRAW_SECONDS:
                self.shown = now
                self._draw()
            return
        if self.total and self.done == self.total:
            return
        early = estimate and self._seconds_left(now) > _LINE_SECONDS
        if early or now - self.shown >= _LINE_SECONDS:
            self.shown = now
            state = f"{self._count()}{self._remaining(now)}" if self.total else duration(now - self.started)
            self.console.say(f"{self.title}: {state}")

    def _count(self) -> str:
        return f"{self.unit} {self.done} of {self.total}".strip()

    def _seconds_each(self, now: float) -> float:
        finished = self.done - self.first
        return (now - self.counted_from) / finished if finished > 0 else 0.0

    def _seconds_left(self, now: float) -> float:
        return self._seconds_each(now) * (self.total - self.done)

    def _remaining(self, now: float) -> str:
        if self.done <= self.first:
            return ""
        each = self._seconds_each(now)
        speed = f", {duration(each)} each" if each >= 0.1 else ""
        return f"{speed}, {duration(self._seconds_left(now))} left"

    def _draw(self) -> None:
        now = time.monotonic()
        if not self.total:
            spent = now - self.started
            text = f"{self.title} ..." + (f" {duration(spent)}" if spent >= _TICK_SECONDS else "")
        else:
            filled = _BAR_WIDTH * self.done // self.total
            text = (f"{self.title} [{'#' * filled}{'.' * (_BAR_WIDTH - filled)}] {self._count()}"
                    f"{self._remaining(now)}")
        width = shutil.get_terminal_size().columns - 1
        self.console.stream.write("\r\x1b[K" + _plain(text)[:width])
        self.console.stream.flush()


class StatusLine:
    """A line that says what is going on: drawn anew on a terminal; elsewhere a line every ten seconds. Not for several
    threads at once."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.text = ""
        self.shown = -_LINE_SECONDS

    def __enter__(self) -> StatusLine:
        return self

    def __exit__(self, *error: object) -> None:
        self.show("")

    def show(self, text: str) -> None:
        """What is going on now; empty for nothing."""
        now = time.monotonic()
        changed, self.text = text != self.text, text
        if self.console.live:
            # What has come to an end disappears at once; a terminal needs no more than ten pictures a second.
            if changed and (not text or now - self.shown >= _REDRAW_SECONDS):
                self.shown = now
                self._draw()
        elif text and now - self.shown >= _LINE_SECONDS:
            self.shown = now
            self.console.say(text)

    def say(self, text: str) -> None:
        """A remark that stays."""
        with self.hidden():
            self.console.say(text)

    def error(self, text: str) -> None:
        """A remark that is shown even when quiet."""
        with self.hidden():
            self.console.error(text)

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """Makes room for other lines."""
        if self.console.live:
            self.console.stream.write("\r\x1b[K")
            self.console.stream.flush()
        yield
        if self.console.live:
            self._draw()

    def _draw(self) -> None:
        width = shutil.get_terminal_size().columns - 1
        self.console.stream.write("\r\x1b[K" + _plain(self.text)[:width])
        self.console.stream.flush()


def _write(stream: TextIO, text: str) -> None:
    """Writes what the stream can show: a prompt may hold characters its encoding lacks."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    stream.write(_plain(text).encode(encoding, "replace").decode(encoding))
    stream.flush()


def _plain(text: str) -> str:
    """Without what a terminal would obey: files and servers may hold anything."""
    return _CONTROL.sub("?", text)


def duration(seconds: float) -> str:
    """A time span as people write it: 0.3 s, 42 s, 5:07, 1:02:03."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def roughly(seconds: float) -> str:
    """A time span that is a guess: 40 s, 12 min, 2.5 h, 31 h."""
    if seconds < 100:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 6000 else f"{seconds / 3600:.{int(seconds < 36_000)}f} h"


def size(num_bytes: float) -> str:
    """A number of bytes in the largest fitting unit: 17 B, 1.5 MiB, 5.2 GiB."""
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} GiB"
