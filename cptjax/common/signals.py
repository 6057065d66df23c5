"""Handle SIGTERM, SIGHUP and Ctrl-C: finish and save a training step first, then end the process.

Outside of training the process ends at once. With several processes all of them end after the same
exchange, whichever of them received the signal (see `distributed`).
"""

import contextlib
import signal
import threading
from collections.abc import Iterator

from cptjax.common import cluster, console, distributed

# The signals that end a run, and how messages name them.
SIGNAL_NAMES = {signal.SIGTERM: "SIGTERM", signal.SIGHUP: "SIGHUP", signal.SIGINT: "Ctrl-C"}


class SamplingStopped(Exception):
    """Raised after a stop signal between two parts of a long task; all finished parts are kept."""


class Preempted(SystemExit):
    """Raised after a stop signal, once everything is saved.

    The exit code is 0 after SIGTERM, which a scheduler sends, and 128 + the signal otherwise.
    """

    def __init__(self, number: int = signal.SIGTERM) -> None:
        super().__init__(0 if number == signal.SIGTERM else 128 + number)


class StopSignals:
    """Handles a stop signal at once, or only records it inside a `deferred` block."""

    def __init__(self) -> None:
        self.received = 0  # the first stop signal that this process received
        self._deferring = False

    def __call__(self, number: int, _frame: object = None) -> None:
        if self.received and number == signal.SIGINT:
            cluster.end_all(
                "stopped at once by a second Ctrl-C; what was saved before is intact", 128 + number
            )
        self.received = self.received or number
        if distributed.process_count() == 1 and not self._deferring:
            self.leave("outside of training")
        if number == signal.SIGINT:
            console.print_message("Ctrl-C: saving after this step; press it again to end at once")

    def deferred(self) -> contextlib.AbstractContextManager[None]:
        """Only record a signal inside this block; its code calls `agreed` where it can stop."""
        return self._deferring_set_to(True)

    def immediate(self) -> contextlib.AbstractContextManager[None]:
        """Handle a signal at once inside a `deferred` block, for work that need not finish."""
        return self._deferring_set_to(False)

    @contextlib.contextmanager
    def _deferring_set_to(self, value: bool) -> Iterator[None]:
        before, self._deferring = self._deferring, value
        try:
            yield
        finally:
            self._deferring = before

    def agreed(self) -> bool:
        """Return whether any process received a signal; all processes must call it together."""
        numbers = distributed.gather_objects(self.received)
        self.received = self.received or max(numbers)
        return any(numbers)

    def after_exchange(self, number: int) -> None:
        """End this process after an exchange in which some process reported a signal.

        All processes take part in an exchange, so all of them end here.
        """
        if not self._deferring:
            self.received = self.received or number
            self.leave("outside of training")

    def leave(self, where: str) -> None:
        """End the process and say how to continue."""
        name = SIGNAL_NAMES.get(signal.Signals(self.received or signal.SIGTERM))
        console.print_message(f"stopped by {name} {where}; run the same command again to go on")
        raise Preempted(self.received or signal.SIGTERM)


@contextlib.contextmanager
def handle_stop_signals(stop_signals: StopSignals) -> Iterator[None]:
    """Handle the stop signals with `stop_signals` inside this block.

    SIGHUP or SIGINT that was ignored before stays ignored, as after `nohup`. Python allows handlers
    only in the main thread; in another thread this block does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {
        number: signal.getsignal(number)
        for number in SIGNAL_NAMES
        if number == signal.SIGTERM or signal.getsignal(number) != signal.SIG_IGN
    }
    for number in before:
        signal.signal(number, stop_signals)
    try:
        with distributed.flag_in_exchanges(
            lambda: stop_signals.received, stop_signals.after_exchange
        ):
            yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
