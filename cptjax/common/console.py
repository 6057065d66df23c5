"""Print messages, tables and progress bars on the terminal, or as plain lines in a log file.

A terminal shows live bars, a log file gets a plain line every few seconds, and tests show nothing.
All output is on standard error, so that standard output has only results. `keep_log` also appends
it to a file. Control characters of data are shown escaped, and a failure to print stops no run.
"""

import collections
import contextlib
import errno
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

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

MAX_ERROR = 2000  # characters of the line that ends a command
PLAIN_EVERY = 10.0  # seconds between two plain lines of one bar
RECENT = 50  # calls of `advance` that tell the present speed of a bar
COMPILES = 5.0  # seconds from which a first unit alone does not tell the speed
WIDTH = 160  # characters of a line outside of a terminal, for tables
# Control characters except tab and new line, characters that change the direction of text, and
# halves of surrogate pairs, which cannot be written.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_mode = "auto"
_live: Progress | None = None  # the live display that nested bars share
_depth = 0  # how many bars are nested in it
_log: IO[bytes] | None = None  # the file that `keep_log` writes
_addresses: dict[str, str] = {}  # what is shown instead of the start of a path


def set_console_mode(mode: str) -> None:
    """Choose how progress is shown: auto, live, plain or silent."""
    global _mode
    if mode not in ("auto", "live", "plain", "silent"):
        raise ValueError(f"console mode: expected auto, live, plain or silent, got {mode!r}")
    _mode = mode


def console_mode() -> str:
    """Return live, plain or silent; auto is live on a terminal."""
    if _mode != "auto":
        return _mode
    return "live" if sys.stderr.isatty() and os.environ.get("TERM") != "dumb" else "plain"


def escape_controls(text: str) -> str:
    """Return text in which control characters are shown as \\x1b or \\u202e, not obeyed."""
    return _CONTROLS.sub(lambda found: ascii(found[0])[1:-1], text)


def show_addresses(start: str, address: str) -> None:
    """Show an address instead of the start of paths, such as those of a copy of a bucket."""
    _addresses[start] = address


def with_addresses(text: str) -> str:
    """Return text with the addresses that `show_addresses` names."""
    for start, address in _addresses.items():
        text = text.replace(start, address)
    return text


def print_message(text: str) -> None:
    """Print one line, above a live bar."""
    text = with_addresses(text)
    write_log(text)
    if console_mode() != "silent":
        _console().print(escape_controls(text), markup=False, highlight=False, soft_wrap=True)


def print_warning(text: str) -> None:
    text = with_addresses(text)
    write_log(f"warning: {text}")
    if console_mode() != "silent":
        _console().print(
            f"[yellow]warning:[/yellow] {escape(escape_controls(text))}",
            highlight=False,
            soft_wrap=True,
        )


def print_error(error: object) -> None:
    """Print the line that ends a command; it is shown in every mode."""
    line = with_addresses(f"error: {' '.join(str(error).split())}")
    if len(line) > MAX_ERROR:
        line = f"{line[: MAX_ERROR - 100]} ... {line[-95:]}"
    write_log(line)
    _Stderr().write(f"{escape_controls(line)}\n")


def print_result(text: str) -> None:
    """Print a result on standard output; data for a file or a pipe are not changed."""
    print(escape_controls(text) if sys.stdout.isatty() else text)


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a small table; the first column is aligned to the left, the others to the right."""
    table = Table(title=escape(title), title_justify="left")
    for i, name in enumerate(header):
        table.add_column(escape(name), justify="right" if i else "left")
    for row in rows:
        table.add_row(*(escape(escape_controls(str(cell))) for cell in row))
    write_log("\n".join([title, *("  ".join(map(str, row)) for row in (header, *rows))]))
    if console_mode() != "silent":
        _console().print(table)


# ---- the log file --------------------------------------------------------------------------------


@contextlib.contextmanager
def keep_log(path: Path) -> Iterator[None]:
    """Append everything that is printed inside this block to a file, with the time of each line.

    An error that ends the block is written too: one line for a user's mistake, else a traceback.
    """
    global _log
    with path.open("ab", buffering=0) as file:
        before, _log = _log, file
        write_log(f"---- {' '.join(sys.argv)}")
        try:
            yield
        except (ValueError, OSError) as error:
            write_log(with_addresses(f"error: {' '.join(str(error).split())}"))
            raise
        except Exception:
            write_log(traceback.format_exc().rstrip())
            raise
        except KeyboardInterrupt:
            write_log("interrupted from the keyboard")
            raise
        finally:
            _log = before


def write_log(text: str) -> None:
    """Write lines to the log file, if there is one; a log that cannot be written stops no run."""
    if _log is not None:
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        lines = "".join(f"{now}  {line}\n" for line in escape_controls(text).split("\n"))
        with contextlib.suppress(OSError):
            _log.write(lines.encode(errors="backslashreplace"))


# ---- progress ------------------------------------------------------------------------------------


class ProgressBar:
    """A count of finished units, and the latest named values that `advance` received.

    The subclasses display it; this class displays nothing.
    """

    def __init__(self, text: str, total: int | None, done: int = 0):
        self.text, self.total = escape_controls(text), total
        self.done, self.resumed = done, done
        self.shown: dict[str, object] = {}
        self.started = self.printed = time.monotonic()
        self._recent: collections.deque[tuple[float, int]] = collections.deque(maxlen=RECENT)

    def advance(self, n: int = 1, **shown: object) -> None:
        """Add n finished units."""
        self.done += n
        self.shown |= shown
        if n:
            self._recent.append((time.monotonic(), self.done))
        self._show()

    def _show(self) -> None:
        pass

    def _end(self, complete: bool) -> None:
        """Remove the bar. Its last line is not printed after an error or a signal, which ends the
        output with its own line."""

    def eta(self) -> float | None:
        """Return the seconds left at the present speed; None if it is not known yet.

        The first unit, which compiles programs, counts only until another one is finished, and not
        at all if it took long.
        """
        if not self._recent or not self.total:
            return None
        if self.done - self.resumed == 1 and time.monotonic() - self.started > COMPILES:
            return None
        start = (self.started, self.resumed) if len(self._recent) == 1 else self._recent[0]
        seconds, units = time.monotonic() - start[0], self.done - start[1]
        return seconds / units * (self.total - self.done)

    def values(self) -> str:
        """Return the named values as text."""
        return "  ".join(
            f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in self.shown.items()
        )

    def line(self) -> str:
        """Return the bar as one line of text."""
        count = str(self.done)
        if self.total:
            count = f"{self.done}/{self.total} ({self.done / self.total:.0%})"
        if eta := self.eta():
            duration = f"ETA {format_duration(eta)}"
        else:
            duration = format_duration(time.monotonic() - self.started)
        return f"{self.text}  {count}  {duration}  {self.values()}".rstrip()


class _PlainBar(ProgressBar):
    """A line every PLAIN_EVERY seconds, even while the first unit is not done yet."""

    def __init__(self, text: str, total: int | None, done: int = 0):
        super().__init__(text, total, done)
        count = f"{done}/{total}" if total else str(done)
        self.reminder = _Reminder(f"{text}  {count} (a first step compiles)")

    def advance(self, n: int = 1, **shown: object) -> None:
        if n:
            self.reminder.stop()
        super().advance(n, **shown)

    def _show(self) -> None:
        is_last = self.done == self.total  # `_end` prints it
        if time.monotonic() - self.printed >= PLAIN_EVERY and not is_last:
            self.printed = time.monotonic()
            print_message(self.line())

    def _end(self, complete: bool) -> None:
        self.reminder.stop()
        if complete and time.monotonic() - self.started >= PLAIN_EVERY / 2:
            print_message(self.line())


class _LiveBar(ProgressBar):
    """A bar in the live display."""

    def __init__(self, text: str, total: int | None, done: int, live: Progress):
        super().__init__(text, total, done)
        self.live = live
        self.id = live.add_task(escape(self.text), total=total, completed=done, shown="")

    def _show(self) -> None:
        self.live.update(self.id, completed=self.done, shown=escape(escape_controls(self.values())))
        if time.monotonic() - self.printed >= PLAIN_EVERY:
            self.printed = time.monotonic()
            write_log(self.line())

    def _end(self, complete: bool) -> None:
        self.live.remove_task(self.id)
        if complete and time.monotonic() - self.started >= PLAIN_EVERY / 2:
            write_log(self.line())


@contextlib.contextmanager
def progress_bar(text: str, total: int | None = None, done: int = 0) -> Iterator[ProgressBar]:
    """Show a bar while the body runs; bars may be nested. A resumed run starts at `done` units."""
    with _live_display() as live:
        if live:
            bar = _LiveBar(text, total, done, live)
        elif console_mode() == "plain":
            bar = _PlainBar(text, total, done)
        else:
            bar = ProgressBar(text, total, done)
        complete = False
        try:
            yield bar
            complete = True
        finally:
            bar._end(complete)


@contextlib.contextmanager
def show_waiting(text: str) -> Iterator[None]:
    """Show that the body is running and for how long, for work without countable steps."""
    if console_mode() != "plain":
        with progress_bar(text):
            yield
        return
    started = time.monotonic()
    reminder = _Reminder(text)
    try:
        yield
    finally:
        reminder.stop()
    if (took := time.monotonic() - started) >= PLAIN_EVERY / 2:
        print_message(f"{text}: took {format_duration(took)}")


def format_duration(seconds: float) -> str:
    """Return a duration as 7s, 3m05s or 2h04m."""
    s = round(seconds)
    if s < 60:
        return f"{s}s"
    if s < 3600:
        return f"{s // 60}m{s % 60:02}s"
    return f"{s // 3600}h{s % 3600 // 60:02}m"


class _Reminder:
    """A thread that prints the time spent so far every PLAIN_EVERY seconds, until stopped."""

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


class _Stderr:
    """Standard error, without the errors of a full disk or of a closed terminal.

    A closed pipe acts like a closed terminal: the process gets SIGHUP, after which a run saves and
    ends (see `signals`).
    """

    def __init__(self) -> None:
        self._stream = sys.stderr

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._attempt(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def _attempt(self, act: Any, *args: str) -> None:
        try:
            act(*args)
        # ValueError: a closed stream; RuntimeError: a signal handler prints while a print runs.
        except (OSError, ValueError, RuntimeError) as error:
            if getattr(error, "errno", None) == errno.EPIPE:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
                signal.raise_signal(signal.SIGHUP)


def _console() -> Console:
    if _live:
        return _live.console
    is_set = sys.stderr.isatty() or "COLUMNS" in os.environ
    return Console(file=_Stderr(), width=None if is_set else WIDTH)


@contextlib.contextmanager
def _live_display() -> Iterator[Progress | None]:
    """Yield the live display, opened or shared with outer bars; None in the other modes."""
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
            console=Console(file=_Stderr()),
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
