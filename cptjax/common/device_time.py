"""The time of a training step by the work that the devices do, and the time that they wait.

Devices run what they are given in order. A piece of work therefore takes from the moment at which
it was given, or from the end of the piece before it, until its results are ready; the rest of a
step they wait for the host. Waits inside of a piece count as its work.
"""

import concurrent.futures
import time
from typing import Any

import jax


class DeviceTime:
    """The work that the devices of this process were given, with the times when it was done."""

    def __init__(self) -> None:
        # Waits for results in the order in which they were asked for.
        self._waiter = concurrent.futures.ThreadPoolExecutor(1)
        self._given: list[tuple[str, float, concurrent.futures.Future[float]]] = []

    def watch(self, work: str, given: float, results: Any) -> concurrent.futures.Future[float]:
        """Count work from `given` until its results are ready; return when that is.

        The results may not be donated before they are ready.
        """
        ready = self._waiter.submit(_wait_until_ready, results)
        self._given.append((work, given, ready))
        return ready

    def between(self, began: float, ended: float) -> dict[str, float]:
        """Return the seconds of each kind of work between two times, and the rest as `idle`.

        Work that is not done at the later time is also counted in the next call.
        """
        seconds: dict[str, float] = {}
        last = began
        for work, given, ready in self._given:
            start = max(given, last)
            last = max(last, min(ready.result() if ready.done() else ended, ended))
            seconds[work] = seconds.get(work, 0.0) + max(0.0, last - start)
        self._given = [entry for entry in self._given if not entry[-1].done()]
        return seconds | {"idle": ended - began - sum(seconds.values())}

    def close(self) -> None:
        """Stop waiting."""
        self._waiter.shutdown(wait=False)


def _wait_until_ready(results: Any) -> float:
    jax.block_until_ready(results)
    return time.perf_counter()


_active: DeviceTime | None = None


def start() -> DeviceTime:
    """Start to count the work of the steps of a stage."""
    global _active
    _active = DeviceTime()
    return _active


def stop() -> None:
    """End to count."""
    global _active
    if _active is not None:
        _active.close()
    _active = None


def watch(work: str, given: float, results: Any) -> None:
    """Count work in a training step, as `DeviceTime.watch`; elsewhere nothing is counted."""
    if _active is not None:
        _active.watch(work, given, results)
