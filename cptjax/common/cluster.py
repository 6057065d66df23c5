"""Connect the processes of a run, notice lost ones, and end all of them together.

Each process has two threads beside its work. One writes a heartbeat into the key-value store of
JAX's coordination service and reads those of the others. One waits for the line with which a
process ends all of them. Both end this process, even if its main thread waits in a collective.

A heartbeat also says where the main thread is, and for how long it has waited there for a device or
for an exchange. Processes that wait for each other at different places would wait for ever; they
end after `wait_seconds`. At the same place they may run one long program, so that is no reason to
end.
"""

import contextlib
import itertools
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from cptjax.common import console

BEAT_SECONDS = 2.0
LOST_SECONDS = 30.0  # without a heartbeat
OWN_MODULES = ("cptjax", "__main__")
BUSY_SECONDS = 0.1  # of a processor between two heartbeats: the main thread works
# JAX's own heartbeat ends a process with native traces; it is only for a process whose threads
# above do not run.
JAX_HEARTBEAT_SECONDS = 3600
CONNECT_SECONDS = 300
END_KEY = "cptjax/end"
DEVICE_ERROR = re.compile("[A-Z_]{5,}: ")
GO_ON = "run the same command again to continue from the last save"
_watch: "_Watch | None" = None
_service: "_Service | None" = None  # on process 0


def connect(
    coordinator: str | None = None,
    processes: int | None = None,
    index: int | None = None,
    seconds: int = CONNECT_SECONDS,
    wait_seconds: float = 0.0,
) -> None:
    """Connect to the other processes; without arguments, JAX asks the scheduler or the TPU.

    coordinator: host:port of process 0. seconds: for which the processes wait for each other now.
    wait_seconds: for which they may wait for each other at different places; 0 = for ever.
    """
    global _watch
    import jax

    if coordinator is not None:
        refuse_bad_address(coordinator)
    gpus = slurm_gpus(os.environ)
    with _service_in_own_process():
        try:
            jax.distributed.initialize(
                coordinator,
                processes,
                index,
                local_device_ids=None if gpus is None else list(range(gpus)),
                initialization_timeout=seconds,
                heartbeat_timeout_seconds=JAX_HEARTBEAT_SECONDS,
                shutdown_timeout_seconds=60,
            )
        except RuntimeError as error:
            raise OSError(
                f"the processes of the run did not connect to {coordinator or 'process 0'}: "
                f"{str(error).splitlines()[0][:200]}; start all of them, and check the address"
            ) from error
    _watch = _Watch(wait_seconds)
    here = jax.local_device_count()
    if gpus is not None and here < gpus:
        raise ValueError(
            f"host {socket.gethostname()}: SLURM gave {gpus} GPUs, JAX sees {here} devices "
            f"({jax.devices()[0].device_kind}); check the driver and the installed jax[cuda]"
        )
    if not jax.process_index():
        console.print_message(
            f"{jax.process_count()} processes with {jax.device_count()} devices "
            f"({jax.devices()[0].device_kind}); {here} on host {socket.gethostname()}"
        )


def refuse_bad_address(address: str) -> None:
    """Refuse what is not host:port; JAX's service would end this process with native traces."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise ValueError(f"--coordinator={address}: expected host:port with a port of 1 to 65535")


def slurm_gpus(environ: Mapping[str, str]) -> int | None:
    """Return how many GPUs of this node belong to a process that is alone on it under SLURM.

    By itself JAX would take one. None = not under SLURM, no GPUs, or several processes per node.
    """
    tasks = environ.get("SLURM_STEP_TASKS_PER_NODE", "").split("(")[0]  # such as 1(x4)
    gpus = environ.get("SLURM_GPUS_ON_NODE", "")
    if "SLURM_PROCID" not in environ or "JAX_LOCAL_DEVICE_IDS" in environ:
        return None
    return int(gpus) if tasks == "1" and gpus.isdigit() else None


def is_connected() -> bool:
    """Return whether this process is one of several that `connect` connected."""
    return _watch is not None


def disconnect() -> None:
    """Wait until all processes are done, and leave them in order."""
    global _watch
    if _watch is None:
        return
    import jax

    from cptjax.common import distributed

    distributed.coordination_client().wait_at_barrier("cptjax/done", 3_600_000)
    _watch.stop()
    _watch = None
    jax.distributed.shutdown()


def end_all(reason: str, code: int = 2, say: bool = True) -> NoReturn:
    """End this process with an error, and all others with a line that names this process."""
    if _watch is not None:
        _watch.claim_end()
        _watch.publish(reason)
    if say:
        console.print_error(reason)
    _exit(code)


def wait_for_lost_process(error: Exception) -> None:
    """Give the threads time to end this process if its error may come from a lost one.

    A collective fails then, with an error of JAX; one that a device reports later is a ValueError
    that begins with a code such as "UNKNOWN: ".
    """
    cause: BaseException | None = error
    while _watch is not None and cause is not None:
        if isinstance(cause, RuntimeError) or DEVICE_ERROR.match(str(cause)):
            time.sleep(LOST_SECONDS + 5 * BEAT_SECONDS)
            return
        cause = cause.__cause__


def _exit(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    if _service is not None:
        _service.end("stop")
    os._exit(code)


class _Place(NamedTuple):
    """Where the main thread of a process is."""

    exchange: int  # exchanges that it has started
    line: str  # file, line and function
    waits: bool  # for a device or an exchange


def main_thread_place() -> _Place:
    """Return where the main thread is; it waits if it is in a call of JAX that does not compile.

    A call of a compiled function has no frame of its own, so the package's own frames count as
    waiting too; `_Watch` looks at the processor time. The line is the innermost of the package.
    """
    from cptjax.common import distributed

    frame: Any = sys._current_frames()[threading.main_thread().ident]
    modules = [frame.f_globals.get("__name__", "")]  # code of a library may have no module
    while frame.f_back and (
        modules[-1].partition(".")[0] not in OWN_MODULES or modules[-1] == distributed.__name__
    ):
        frame = frame.f_back
        modules.append(frame.f_globals.get("__name__", ""))
    waits = modules[0].partition(".")[0] in ("jax", *OWN_MODULES)
    code = frame.f_code
    line = f"{Path(code.co_filename).name}:{frame.f_lineno} {code.co_name}"
    compiles = "jax._src.compiler" in modules
    return _Place(distributed.exchanges_started(), line, waits and not compiles)


class _Beat(NamedTuple):
    """What a process writes with every heartbeat."""

    number: int
    host: str
    waited: float  # seconds at the place
    exchange: int
    line: str


NO_BEAT = _Beat(-1, "unknown", 0.0, 0, "")


class _Watch:
    """The two threads that watch over the other processes."""

    def __init__(self, wait_seconds: float) -> None:
        from cptjax.common import distributed

        self.client, self.wait_seconds = distributed.coordination_client(), wait_seconds
        self.index, self.host = distributed.process_index(), socket.gethostname()
        self.stopping, self.ending = threading.Event(), threading.Lock()
        self.answered = time.monotonic()  # when the service answered
        self.asked: float | None = None  # since when an answer is awaited
        self.beats = dict.fromkeys(range(distributed.process_count()), NO_BEAT)
        self.place, self.worked, self.busy = main_thread_place(), time.monotonic(), 0.0
        self.silent = dict.fromkeys(self.beats, 0.0)  # seconds without another beat
        self.threads = [
            threading.Thread(target=act, name=f"cptjax{act.__name__}", daemon=True)
            for act in (self._beat, self._listen)
        ]
        for thread in self.threads:
            thread.start()

    def stop(self) -> None:
        """End the threads: Python cannot exit in order while one is in a call of the service."""
        self.stopping.set()
        for thread in self.threads:
            thread.join()

    def claim_end(self) -> None:
        """Keep the threads from ending this process, which ends itself."""
        with self.ending:
            self.stopping.set()

    def publish(self, reason: str) -> None:
        """Store the line that ends the other processes; the first of several reasons counts."""
        line = f"process {self.index} (host {self.host}) stopped: {reason}; {GO_ON}"
        with contextlib.suppress(RuntimeError):
            self.client.key_value_set(END_KEY, line)

    def _beat(self) -> None:
        for number in itertools.count():
            self.asked = self.asked or time.monotonic()
            with contextlib.suppress(RuntimeError):  # the service does not answer
                self._exchange_beats(number)
                self.asked = None
            if lost := self._lost():
                self._end_with(f"{lost}; {GO_ON}", 1)
            if stuck := self._stuck():  # the others need a beat to notice it too
                self._end_with(f"{stuck}; {GO_ON}", 1, 2 * BEAT_SECONDS)
            if self.stopping.wait(BEAT_SECONDS):
                return

    def _exchange_beats(self, number: int) -> None:
        """Write a heartbeat, and note whose changed."""
        key, waited = f"cptjax/beat/{self.index}", self._waited()
        beat = _Beat(number, self.host, waited, self.place.exchange, self.place.line)
        self.client.key_value_set(key, json.dumps(beat), allow_overwrite=True)
        found = self.client.key_value_dir_get("cptjax/beat/")
        now = time.monotonic()
        # A time in which this thread did not run says little about the others.
        passed, self.answered = min(now - self.answered, 3 * BEAT_SECONDS), now
        beats = {int(key.rsplit("/", 1)[1]): _Beat(*json.loads(beat)) for key, beat in found}
        for index, before in self.beats.items():
            changed = beats.get(index, NO_BEAT).number != before.number
            self.silent[index] = 0.0 if changed else self.silent[index] + passed
        self.beats |= beats

    def _waited(self) -> float:
        """Return for how many seconds the main thread has waited at one place."""
        clock = time.pthread_getcpuclockid(threading.main_thread().ident)
        place, busy, now = main_thread_place(), time.clock_gettime(clock), time.monotonic()
        if not place.waits or place != self.place or busy - self.busy > BUSY_SECONDS:
            self.worked = now
        self.place, self.busy = place, busy
        return now - self.worked

    def _stuck(self) -> str:
        """Say at which places the processes wait for each other; "" = they do not."""
        places = {(beat.exchange, beat.line) for beat in self.beats.values()}
        waited = min(beat.waited for beat in self.beats.values())
        if not self.wait_seconds or waited < self.wait_seconds or len(places) == 1:
            return ""
        first = self.beats[0]
        index, other = next((i, b) for i, b in self.beats.items() if b[3:] != first[3:])
        return (
            f"process 0 (host {first.host}) waits at {first.line} after {first.exchange} "
            f"exchanges, process {index} (host {other.host}) at {other.line} after "
            f"{other.exchange}, for {waited:.0f} s so far: the processes do not run the same "
            "steps. Give all of them the same code, config, data and folder"
        )

    def _lost(self) -> str:
        """Say which process gave no sign of life for LOST_SECONDS; "" = none."""
        if self.asked is not None and time.monotonic() - self.asked > LOST_SECONDS:
            return (
                f"the host of process 0 has not answered for {LOST_SECONDS:.0f} s: it is down, or "
                "the network is"
            )
        for index, seconds in self.silent.items():
            if seconds > LOST_SECONDS:
                return (
                    f"process {index} (host {self.beats[index].host}) has given no sign of life "
                    f"for {LOST_SECONDS:.0f} s: it died or hangs"
                )
        return ""

    def _listen(self) -> None:
        """End this process when another one publishes why."""
        while not self.stopping.is_set():
            try:
                line = self.client.blocking_key_value_get(END_KEY, 1000)
            except RuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    time.sleep(1.0)  # the service does not answer; `_beat` measures for how long
                if lost := self._lost():  # a call of `_beat` may hang
                    self._end_with(f"{lost}; {GO_ON}", 1)
                continue
            # An error that all processes have reaches each of them by itself.
            if not self.stopping.wait(1.0):
                self._end_with(line, 2)
            return

    def _end_with(self, line: str, code: int, seconds: float = 0.0) -> None:
        """Print a line once and end this process some seconds later."""
        with self.ending:
            if not self.stopping.is_set():
                self.stopping.set()
                console.print_error(line)
                time.sleep(seconds)
                _exit(code)


class _Service:
    """JAX's coordination service in a process of its own (see `coordinator`)."""

    def __init__(self, address: str, processes: int, heartbeat: int):
        path = Path(__file__).with_name("coordinator.py")
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(path), address, str(processes), str(heartbeat)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
            text=True,
        )
        if (word := self.process.stdout.readline().strip()) != "ready":
            raise OSError(f"the coordination service did not start ({word or 'it died'})")

    def end(self, word: str) -> None:
        """Let the service end after the time that others need (see `coordinator`)."""
        with contextlib.suppress(OSError):
            print(word, file=self.process.stdin, flush=True)
            self.process.stdin.close()

    def shutdown(self) -> None:
        """Let the service end at once; JAX calls it when all processes have left."""
        self.end("done")


@contextlib.contextmanager
def _service_in_own_process() -> Iterator[None]:
    """Let jax.distributed.initialize start the service in a process of its own."""
    from jax._src.lib import _jax

    def start(address: str, processes: int, **options: Any) -> _Service:
        global _service
        _service = _Service(address, processes, options["heartbeat_timeout"])
        return _service

    before, _jax.get_distributed_runtime_service = _jax.get_distributed_runtime_service, start
    try:
        yield
    finally:
        _jax.get_distributed_runtime_service = before
