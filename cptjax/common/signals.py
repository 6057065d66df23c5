"""Handle SIGTERM: finish and save a training step first; anywhere else, end the process at once."""

import contextlib
import signal
import threading
from collections.abc import Iterator

from cptjax.common import console, distributed


class SamplingStopped(Exception):
    """Raised after SIGTERM between two parts of a long task; all finished parts are kept."""


class Preempted(SystemExit):
    """Raised after SIGTERM, once everything is saved; exit code 0."""

    def __init__(self) -> None:
        super().__init__(0)


class SigtermHandler:
    """Handles SIGTERM at once, or only records it inside a `deferred` block."""

    def __init__(self) -> None:
        self.received = False
        self._deferring = False

    def __call__(self, *_: object) -> None:
        self.received = True
        if not self._deferring:
            self.leave("outside of training")

    def deferred(self) -> contextlib.AbstractContextManager[None]:
        """Only record SIGTERM inside this block; its code calls `agreed` where it can stop."""
        return self._deferring_set_to(True)

    def immediate(self) -> contextlib.AbstractContextManager[None]:
        """Handle SIGTERM at once inside a `deferred` block, for work that need not finish."""
        return self._deferring_set_to(False)

    @contextlib.contextmanager
    def _deferring_set_to(self, value: bool) -> Iterator[None]:
        before, self._deferring = self._deferring, value
        try:
            yield
        finally:
            self._deferring = before

    def agreed(self) -> bool:
        """Return whether any process received SIGTERM; all processes must call it together."""
        return any(distributed.gather_objects(self.received))

    def leave(self, where: str) -> None:
        """End the process with exit code 0 and say how to continue."""
        console.print_message(f"stopped by SIGTERM {where}; run the same command again to go on")
        raise Preempted


@contextlib.contextmanager
def handle_sigterm(sigterm: SigtermHandler) -> Iterator[None]:
    """Handle SIGTERM with `sigterm` inside this block.

    Python allows handlers only in the main thread; in another thread this block does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, sigterm)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
