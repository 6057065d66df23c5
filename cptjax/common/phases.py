"""The phases of a run: their names in profiles, and the time that each takes over all sessions.

A session is the time from a start of a run to its end, stop or death. The phases of the main thread
share its time: of two nested phases only the inner one is counted. `compile` is what JAX reports of
its compilations, and is taken out of the phase around them.
"""

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from cptjax.common import files

# The kind of work of each phase. Time in no phase is "other": loading, checks, reports.
WORKS = {
    "update": "training",
    "logps": "training",
    "stage_end": "training",  # of continual-learning methods
    "rollout": "sampling",
    "rewards": "sampling",
    "evaluation": "evaluating",
    "compile": "compiling",
    "saving": "saving",
    "batch": "waiting",  # the devices wait for rows
    "wait": "waiting",  # for the other processes
    "": "other",
}
COMPILE_EVENTS = "/jax/core/compile/"
SESSIONS_FILE = "sessions.json"


class PhaseClock:
    """Counts the seconds of the main thread by phase."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(WORKS, 0.0)
        self.stack = [""]
        self.since = self.started = time.perf_counter()
        self.compiled: list[tuple[float, float]] = []  # start and end of each, disjoint

    def switch(self) -> None:
        """Count the time since the last switch for the current phase."""
        now = time.perf_counter()
        self.seconds[self.stack[-1]] += now - self.since
        self.since = now

    def move(self, seconds: float, source: str, target: str) -> None:
        """Count seconds of one phase for another."""
        self.seconds[source] -= seconds
        self.seconds[target] += seconds

    def add_compilation(self, seconds: float) -> None:
        """Count a compilation that ends now; compilations within it are counted already."""
        end = time.perf_counter()
        start = max(end - seconds, self.started)
        inner = [span for span in self.compiled if span[0] >= start]
        self.compiled = [*self.compiled[: len(self.compiled) - len(inner)], (start, end)]
        self.move(end - start - sum(e - s for s, e in inner), self.stack[-1], "compile")

    def work_seconds(self) -> dict[str, float]:
        """Return the seconds of each kind of work so far."""
        self.switch()
        total = dict.fromkeys(WORKS.values(), 0.0)
        for phase_name, seconds in self.seconds.items():
            total[WORKS[phase_name]] += seconds
        return {work: max(0.0, seconds) for work, seconds in total.items()}


_clock = PhaseClock()


def restart_clock() -> None:
    """Start to count from zero, at the start of a session."""
    global _clock
    _clock = PhaseClock()


def _listen(event: str, seconds: float, **_: Any) -> None:
    if event.startswith(COMPILE_EVENTS) and _in_main_thread():
        _clock.add_compilation(seconds)


jax.monitoring.register_event_duration_secs_listener(_listen)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """Count the time of the body for a phase of WORKS, and name it in profiles."""
    with jax.profiler.TraceAnnotation(name):
        if not _in_main_thread():
            yield
            return
        clock = _clock
        clock.switch()
        clock.stack.append(name)
        try:
            yield
        finally:
            clock.switch()
            clock.stack.pop()


def count_idle_time(seconds: float) -> None:
    """Count seconds of an update, in which the devices had ended it, as waiting for rows."""
    _clock.move(seconds, "update", "batch")


class SessionLog:
    """Records the seconds of this session in the workdir, beside those of earlier sessions."""

    def __init__(self, workdir: Path):
        self.path = workdir / SESSIONS_FILE
        self.earlier = files.read_checked_json(self.path)["sessions"] if self.path.is_file() else []
        self.started = ""

    def start(self) -> None:
        """Say that the run goes on; a start that is refused before is no session."""
        self.started = time.strftime("%Y-%m-%dT%H:%M:%S%z")

    def record(self) -> None:
        """Write the seconds so far; what a killed session did after the last call is lost."""
        if not self.started:
            return
        session = {"started": self.started, "seconds": _clock.work_seconds()}
        files.write_checked_json(self.path, {"sessions": [*self.earlier, session]})


def summarise_sessions(workdir: Path) -> dict[str, Any] | None:
    """Return how the time of all sessions of a run was spent; None for a run without records."""
    path = workdir / SESSIONS_FILE
    if not path.is_file():
        return None
    sessions = files.read_checked_json(path)["sessions"]
    seconds = {w: sum(s["seconds"].get(w, 0.0) for s in sessions) for w in WORKS.values()}
    total = sum(seconds.values())
    shares = {work: value / total if total else 0.0 for work, value in seconds.items()}
    return {"sessions": len(sessions), "seconds": total, "shares": shares}
