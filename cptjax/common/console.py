"""What a person at the terminal sees: one progress display for everything that takes more than seconds.

A terminal gets live bars, a log file gets a plain line every few seconds, a test gets silence.
All of it goes to standard error, so that standard output belongs to results.
"""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

PLAIN_EVERY = 10.0  # seconds between two plain lines of one bar
_mode = "auto"
_live: Progress | None = None
_depth = 0


def set_console_mode(mode: str) -> None:
    """Chooses how progress is shown: auto, live, plain or silent."""
    global _mode
    if mode not in ("auto", "live", "plain", "silent"):
        raise ValueError(f"console mode: expected auto, live, plain or silent, got {mode!r}")
    _mode = mode


def console_mode() -> str:
    if _mode != "auto":
        return _mode
    return "live" if sys.stderr.isatty() and os.environ.get("TERM") != "dumb" else "plain"


def print_message(text: str) -> None:
    """Prints one line; it does not disturb a running bar."""
    if console_mode() != "silent":
        _console().print(text, markup=False, highlight=False, soft_wrap=True)


def print_warning(text: str) -> None:
    if console_mode() != "silent":
        _console().print(
            f"[yellow]warning:[/yellow] {escape(text)}", highlight=False, soft_wrap=True
        )


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a small table, the first column left, the others right."""
    grid = Table(title=title, title_justify="left")
    for i, name in enumerate(header):
        grid.add_column(name, justify="right" if i else "left")
    for row in rows:
        grid.add_row(*map(str, row))
    if console_mode() != "silent":
        _console().print(grid)


class ProgressBar:
    """Counts finished units; what `advance` is told by name stays visible beside the count."""

    def __init__(self, text: str, total: int | None, done: int = 0):
        self.text, self.total, self.done, self.resumed = text, total, done, done
        self.shown: dict[str, object] = {}
        self.started = self.printed = time.monotonic()

    def advance(self, n: int = 1, **shown: object) -> None:
        self.done += n
        self.shown |= shown
        self._show()

    def _show(self) -> None:
        pass

    def _end(self) -> None:
        pass

    def eta(self) -> float | None:
        """Returns the seconds left at the speed so far; None while nothing is known."""
        made = self.done - self.resumed
        return (
            (time.monotonic() - self.started) / made * (self.total - self.done)
            if made and self.total
            else None
        )

    def values(self) -> str:
        return "  ".join(
            f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in self.shown.items()
        )

    def line(self) -> str:
        count = (
            f"{self.done}/{self.total} ({self.done / self.total:.0%})"
            if self.total
            else str(self.done)
        )
        left = (
            f"  ETA {format_duration(eta)}"
            if (eta := self.eta())
            else f"  {format_duration(time.monotonic() - self.started)}"
        )
        return f"{self.text}  {count}{left}  {self.values()}".rstrip()


class _PlainBar(ProgressBar):
    def __init__(self, text: str, total: int | None, done: int = 0):
        super().__init__(text, total, done)
        self.reminder = _Reminder(
            f"{text}  {done}{f'/{total}' if total else ''} (a first step compiles)"
        )

    def advance(self, n: int = 1, **shown: object) -> None:
        if n:
            self.reminder.stop()
        super().advance(n, **shown)

    def _show(self) -> None:
        if time.monotonic() - self.printed >= PLAIN_EVERY:
            self.printed = time.monotonic()
            print_message(self.line())

    def _end(self) -> None:
        self.reminder.stop()
        if time.monotonic() - self.started >= PLAIN_EVERY / 2:
            print_message(self.line())


class _LiveBar(ProgressBar):
    def __init__(self, text: str, total: int | None, done: int, live: Progress):
        super().__init__(text, total, done)
        self.live, self.id = (
            live,
            live.add_task(escape(text), total=total, completed=done, shown=""),
        )

    def _show(self) -> None:
        self.live.update(self.id, completed=self.done, shown=escape(self.values()))

    def _end(self) -> None:
        self.live.remove_task(self.id)


@contextlib.contextmanager
def progress_bar(text: str, total: int | None = None, done: int = 0) -> Iterator[ProgressBar]:
    """Shows a bar while its body runs; bars may be nested, `done` is where a resumed run starts."""
    with _live_display() as live:
        kind = {"plain": _PlainBar, "silent": ProgressBar}.get(console_mode(), ProgressBar)
        bar = _LiveBar(text, total, done, live) if live else kind(text, total, done)
        try:
            yield bar
        finally:
            bar._end()


@contextlib.contextmanager
def show_waiting(text: str) -> Iterator[None]:
    """Shows that something without countable steps is going on, and for how long."""
    if console_mode() != "plain":
        with progress_bar(text):
            yield
        return
    reminder, started = _Reminder(text), time.monotonic()
    try:
        yield
    finally:
        reminder.stop()
    if (took := time.monotonic() - started) >= PLAIN_EVERY / 2:
        print_message(f"{text}: took {format_duration(took)}")


def format_duration(seconds: float) -> str:
    """Writes seconds as 7s, 3m05s or 2h04m."""
    s = round(seconds)
    return (
        f"{s}s"
        if s < 60
        else f"{s // 60}m{s % 60:02}s"
        if s < 3600
        else f"{s // 3600}h{s % 3600 // 60:02}m"
    )


class _Reminder:
    """Says every few seconds that something still goes on, until it is stopped."""

    def __init__(self, text: str):
        self.done, self.started = threading.Event(), time.monotonic()
        self.thread = threading.Thread(target=self._remind, args=(text,), daemon=True)
        self.thread.start()

    def _remind(self, text: str) -> None:
        while not self.done.wait(PLAIN_EVERY):
            print_message(f"{text}  {format_duration(time.monotonic() - self.started)} so far")

    def stop(self) -> None:
        self.done.set()
        self.thread.join()


def _console() -> Console:
    return _live.console if _live else Console(stderr=True)


@contextlib.contextmanager
def _live_display() -> Iterator[Progress | None]:
    """Opens the one live display that nested bars share."""
    global _live, _depth
    if console_mode() != "live":
        yield None
        return
    if _live is None:
        _live = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[shown]}"),
            console=Console(stderr=True),
            transient=True,
        )
        _live.start()
    _depth += 1
    try:
        yield _live
    finally:
        _depth -= 1
        if not _depth:
            _live.stop()
            _live = None
