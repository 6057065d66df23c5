"""Call functions of a file in worker processes, each call with a hard time limit.

Symbolic algebra and users' own code process arbitrary responses, and both may loop forever inside
C code that no Python signal interrupts. A call is therefore sent to another process, and a process
that exceeds its time limit is killed and replaced:

    parent  --(number, pickled arguments)-->  worker
    parent  <--(one line of JSON, with the number)---  worker

A worker is a new interpreter that runs this file by its path: it imports neither jax nor the
user's main script, and the parent, which has jax's threads, never forks.

A function is named `file.py:function`. It returns a number, a string, None, or lists and dicts of
these.
"""

import contextlib
import importlib.util
import inspect
import itertools
import json
import os
import pickle
import queue
import signal
import struct
import subprocess
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

WORKER_START = (
    "import runpy, sys; runpy.run_path(sys.argv[1])['serve'](int(sys.argv[2]), sys.argv[3:])"
)
# Seconds of processor time for importing a file, and how many times as long it may take in all: the
# first import of a large library is slow on some disks.
LOAD_TIME_LIMIT, LOAD_PATIENCE = 20.0, 6.0


class SandboxCall(NamedTuple):
    """The arguments of a call: positional ones, and a row's columns.

    The function receives the columns that it has parameters for.
    """

    args: tuple
    columns: Mapping[str, Any] = {}


class SandboxOutcome(NamedTuple):
    """The value that a call returned, or the reason why there is none."""

    value: Any = None
    error: str | None = None
    late: bool = False  # the call exceeded its time limit


class SandboxPool:
    """Worker processes, started when first needed, stopped by `close`; threads may share them."""

    def __init__(self, processes: int = 2, timeout: float = 10.0, memory: int = 0):
        """`timeout`: seconds per call.

        `memory`: bytes of address space per worker, 0 = no limit.
        """
        if processes < 1 or timeout <= 0:
            raise ValueError(
                "a pool: expected processes >= 1 and timeout > 0 s, "
                f"got processes={processes}, timeout={timeout}"
            )
        self.processes, self.timeout = processes, timeout
        self._idle: queue.Queue[_Worker] = queue.Queue()
        self._workers = [_Worker(memory) for _ in range(processes)]
        for worker in self._workers:
            self._idle.put(worker)

    def map(
        self, target: str, calls: Sequence[SandboxCall], patience: float = 1.0
    ) -> list[SandboxOutcome]:
        """Return the outcome of each call of `file.py:function`, in order.

        With patience > 1 the limit is on processor time, and a call may take up to `patience`
        times as long on a busy machine.
        """
        if len(calls) == 1 or self.processes == 1:
            return [self._run(target, call, patience) for call in calls]
        with ThreadPoolExecutor(self.processes) as threads:
            return list(threads.map(lambda call: self._run(target, call, patience), calls))

    def load(self, target: str) -> None:
        """Import a target, so that a missing or broken file stops the run before it starts."""
        outcome = self._run(target, None)
        if outcome.error:
            raise ValueError(f"{target}: {outcome.error}")

    def _run(self, target: str, call: SandboxCall | None, patience: float = 1.0) -> SandboxOutcome:
        worker = self._idle.get()
        try:
            return worker.run(target, call, self.timeout, patience)
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        for worker in self._workers:
            worker.stop()

    def __enter__(self) -> "SandboxPool":
        return self

    def __exit__(self, *exc: Any) -> None:
        self.close()


class _Worker:
    """One process and the targets it has loaded."""

    def __init__(self, memory: int):
        self.memory = memory
        self.process: subprocess.Popen | None = None
        self.loaded: set[str] = set()
        self.numbers = itertools.count()

    def run(
        self, target: str, call: SandboxCall | None, limit: float, patience: float
    ) -> SandboxOutcome:
        try:
            message = pickle.dumps((target, call and tuple(call), limit, patience))
        except Exception as error:  # the pickling code of a column may raise anything
            return SandboxOutcome(
                error="a column cannot be sent to another process "
                f"({type(error).__name__}: {error})"
            )
        if target not in self.loaded:
            load = pickle.dumps((target, None, LOAD_TIME_LIMIT, LOAD_PATIENCE))
            outcome = self._ask(load, LOAD_TIME_LIMIT, LOAD_PATIENCE)
            if outcome.error:
                return outcome
            self.loaded.add(target)
        return SandboxOutcome() if call is None else self._ask(message, limit, patience)

    def _ask(self, message: bytes, limit: float, patience: float = 1.0) -> SandboxOutcome:
        process, late, line, number = self._start(), threading.Event(), b"", next(self.numbers)

        def expire() -> None:
            late.set()
            _kill_session(process)

        timer = threading.Timer(limit * patience, expire)
        timer.daemon = True
        timer.start()
        with contextlib.suppress(OSError):
            # A dead worker leaves the line empty, which is checked below.
            process.stdin.write(struct.pack(">QQ", number, len(message)) + message)
            process.stdin.flush()
            line = process.stdout.readline()
        timer.cancel()
        if line.endswith(b"\n") and not late.is_set():
            answered, *outcome = json.loads(line)
            if answered == number:
                return SandboxOutcome(*outcome)
            self.stop()
            return SandboxOutcome(
                error=f"its process answered call {answered} instead of {number}; it was stopped"
            )
        code = self.stop()
        if late.is_set() or code == -signal.SIGPROF:
            return SandboxOutcome(
                error=f"no result within {limit:g} s; its process was stopped", late=True
            )
        reason = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return SandboxOutcome(error=f"its process died ({reason})")

    def _start(self) -> subprocess.Popen:
        if self.process is None:
            command = [
                sys.executable,
                "-P",
                "-c",
                WORKER_START,
                __file__,
                str(self.memory),
                *(p for p in sys.path if p),
            ]
            # A user's file may import jax; the accelerator belongs to the parent.
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,
                env=os.environ | {"JAX_PLATFORMS": "cpu"},
            )
        return self.process

    def stop(self) -> int:
        process, self.process = self.process, None
        self.loaded.clear()
        if process is None:
            return 0
        # A worker that died on its own returns its exit code within this second; its children are
        # killed with its session.
        with contextlib.suppress(OSError):
            process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=1.0)
        _kill_session(process)
        process.stdout.close()
        return process.wait()


def _kill_session(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def shared_sandbox_pool(_pools: list[SandboxPool] = []) -> SandboxPool:  # noqa: B006
    """Return this process's pool for the built-in symbolic scorers, created at the first call."""
    if not _pools:
        _pools.append(SandboxPool(processes=2, timeout=10.0, memory=4 << 30))
    return _pools[0]


def split_target(target: str) -> tuple[Path, str]:
    """Split `dir/file.py:function` into the path and the function's name."""
    path, colon, name = target.rpartition(":")
    if not colon or not path.endswith(".py") or not name.isidentifier():
        raise ValueError(f"expected file.py:function, got {target!r}")
    return Path(path), name


# ---- the worker's side ----


def serve(memory: int, path: list[str]) -> None:
    """Reply to requests on standard input until it closes."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # what a user's function prints goes to the terminal, not into the protocol
    sys.path += [p for p in path if p not in sys.path]
    if memory:
        import resource

        hard = resource.getrlimit(resource.RLIMIT_AS)[1]  # a process cannot raise it
        memory = memory if hard == resource.RLIM_INFINITY else min(memory, hard)
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    functions: dict[str, Any] = {}
    worker = os.getpid()
    while header := requests.read(16):
        number, length = struct.unpack(">QQ", header)
        reply = _reply(requests.read(length), functions)
        if os.getpid() != worker:  # a child that a user's function forked has returned from it
            os._exit(0)
        try:
            replies.write(json.dumps([number, *reply]).encode() + b"\n")
            replies.flush()
        except OSError:  # a user's function closed the pipe
            os._exit(1)


def _reply(message: bytes, functions: dict[str, Any]) -> tuple[Any, str | None]:
    file = ""
    try:
        target, call, limit, patience = pickle.loads(message)
        file = str(split_target(target)[0])
        # If the parent dies in the meantime, the alarm ends this process; its default action needs
        # no Python. A worker inherits the signals that its parent ignores or blocks, as libtpu does
        # with SIGPROF, so restore them.
        alarms = (signal.SIGALRM, signal.SIGPROF)
        for number in alarms:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, alarms)
        signal.setitimer(signal.ITIMER_REAL, limit * patience + 5.0)
        signal.setitimer(signal.ITIMER_PROF, limit if patience > 1 else 0.0)
        if target not in functions:
            functions[target] = _load_function(target)
        value = (
            None
            if call is None
            else _to_json_value(
                functions[target](*call[0], **_accepted_columns(functions[target], call[1]))
            )
        )
        return value, None
    except BaseException as error:  # a user's sys.exit() also counts as an error of the row
        return None, _describe_error(error, file)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.setitimer(signal.ITIMER_PROF, 0.0)


def call_in_process(function: Any, call: SandboxCall) -> SandboxOutcome:
    """Call a function in this process, without a time limit."""
    try:
        return SandboxOutcome(
            _to_json_value(function(*call.args, **_accepted_columns(function, call.columns)))
        )
    except Exception as error:
        return SandboxOutcome(
            error=_describe_error(
                error, getattr(getattr(function, "__code__", None), "co_filename", "")
            )
        )


def _load_function(target: str) -> Any:
    path, name = split_target(target)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    module_spec = importlib.util.spec_from_file_location(f"cptjax_user_{path.stem}", path)
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module
    # Appended last, so that a file in the same folder never hides a library.
    sys.path.append(str(path.parent.resolve()))
    module_spec.loader.exec_module(module)
    if not callable(getattr(module, name, None)):
        known = sorted(
            k
            for k, v in vars(module).items()
            if inspect.isfunction(v) and v.__module__ == module.__name__
        )
        raise AttributeError(f"no function {name!r} in {path}; it has {', '.join(known) or 'none'}")
    return getattr(module, name)


def _accepted_columns(function: Any, columns: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns that a function accepts: all with `**columns`, else those it names."""
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return dict(columns)
    return {
        p.name: columns[p.name]
        for p in parameters
        if p.name in columns and p.kind is not p.POSITIONAL_ONLY
    }


def _to_json_value(value: Any) -> Any:
    """Convert a value to what JSON can hold; numpy and torch scalars become numbers."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > 2**1023:
        raise OverflowError("returned a whole number that no float can hold")
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(k): _to_json_value(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_json_value(v) for v in value]
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"returned a {type(value).__name__}; expected a number or a dict of numbers")


def _describe_error(error: BaseException, file: str) -> str:
    first = (str(error).splitlines() or [""])[0][:300]
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename == file
    ]
    where = f" ({Path(file).name}, line {lines[-1]})" if lines else ""
    return f"{type(error).__name__}: {first}{where}"
