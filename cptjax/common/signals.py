"""SIGTERM: noticed at once, answered where everything is saved."""

import contextlib
import dataclasses
import signal
import threading
from collections.abc import Iterator

from cptjax.common import console, distributed


class SamplingStopped(Exception):
    """SIGTERM came between two pieces; all that was drawn is kept."""


class Preempted(SystemExit):
    """SIGTERM came; everything is saved."""

    def __init__(self) -> None:
        super().__init__(0)


@dataclasses.dataclass
class SigtermHandler:
    """Whether SIGTERM came, and whether it must wait: a training step ends and saves first."""

    came: bool = False
    waits: bool = False

    def __call__(self, *_: object) -> None:
        self.came = True
        if not self.waits:
            self.leave("outside of training")

    def agreed(self) -> bool:
        """Whether it came to any process; all ask at the same place."""
        return any(distributed.gather_objects(self.came))

    def leave(self, where: str) -> None:
        console.print_message(f"stopped by SIGTERM {where}; run the same command again to go on")
        raise Preempted


@contextlib.contextmanager
def handle_sigterm(sigterm: SigtermHandler) -> Iterator[None]:
    """SIGTERM goes to `sigterm` meanwhile; only the main thread may listen."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, sigterm)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
