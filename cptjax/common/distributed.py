"""Exchange Python values between the processes of a run, and compare what must be equal in them.

An exchange goes through process 0 in the key-value store of JAX's coordination service; large
values go between the devices, padded to a power of two, so that few programs are compiled. Every
exchange has a number and the name of the code that asks for it. Processes that are not at the same
exchange end with an error that names both.
"""

import contextlib
import hashlib
import json
import os
import pickle
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax._src import distributed as jax_distributed

from cptjax.common import buckets, phases

T = TypeVar("T")

# On two processes of one machine the key-value store takes 0.9 ms for 10 bytes (devices: 10 ms), 5
# ms for 30 kB (8 ms) and 10 ms for 100 kB (9 ms).
LARGE_BYTES = 32 * 1024
SIZE_CLASS_BYTES = 128 * 1024  # the smallest size class of large values
FILE_SECONDS = 90.0  # for which a network file system may hide a new file
_started = 0  # exchanges of this process


class ProcessesDiffer(ValueError):
    """Processes that should do the same thing do not."""


class _Message(NamedTuple):
    """What a process sends in an exchange."""

    name: str  # of the code that asks for the exchange
    host: str
    flag: int  # the stop signal that the process received
    size: int  # bytes of the pickled value
    pickled: bytes  # empty if the value is large


def process_count() -> int:
    """Return the number of processes without starting JAX's devices."""
    return jax_distributed.global_state.num_processes


def process_index() -> int:
    return jax_distributed.global_state.process_id


def is_main_process() -> bool:
    """Return whether this process writes the run's files."""
    return process_index() == 0


def coordination_client() -> Any:
    """Return the client of JAX's coordination service, which every process has."""
    return jax_distributed.global_state.client


def gather_objects(value: Any) -> list[Any]:
    """Return the values of all processes, in order; each process passes one picklable value."""
    if process_count() == 1:
        return [value]
    global _started
    pickled, number = pickle.dumps(value), _started
    _started += 1
    inline = pickled if len(pickled) <= LARGE_BYTES else b""
    message = _Message(_caller(), socket.gethostname(), _flag(), len(pickled), inline)
    with phases.phase("wait"):
        messages = _relay(number, message)
    _refuse_other_exchange(number, messages)
    parts = [m.pickled for m in messages]
    if not all(parts):
        parts = _gather_on_devices(pickled, [m.size for m in messages])
    if flag := max(m.flag for m in messages):
        _on_flag(flag)
    return [pickle.loads(part) for part in parts]


def exchanges_started() -> int:
    """Return the number of exchanges that this process has started."""
    return _started


def concat_lists(parts: list[list[Any]]) -> list[Any]:
    """Return one list with the elements of all parts, such as those of `gather_objects`."""
    return [x for part in parts for x in part]


def decide_on_main(decide: Callable[[], T]) -> T:
    """Return what `decide` returns on the main process, or raise its error on every process.

    Use it for decisions by the state of files, which may look different on another host.
    """
    value, error = None, None
    if is_main_process():
        try:
            value = decide()
        except (ValueError, OSError) as raised:
            error = raised
    value, error = gather_objects((value, error))[0]
    if error is not None:
        raise error
    return value


def run_on_all(act: Callable[[], T]) -> T:
    """Return what `act` returns on this process, or raise an error of any process on all of them.

    Use it before work that all processes do together, where `act` may fail on one of them.
    """
    value, error = None, None
    try:
        value = act()
    except (ValueError, OSError) as raised:
        error = raised
    errors = [e for e in gather_objects(error) if e is not None]
    if error is not None:
        raise error
    if errors:
        raise errors[0]
    return value


def wait_for_file(path: Path) -> None:
    """Wait until every process sees the file that the main process has just written.

    A network file system may hide it from other hosts for some seconds. In the local copy of a
    bucket's folder, it goes through the bucket.
    """
    if address := buckets.address_of(path):
        decide_on_main(lambda: buckets.publish(path))
        run_on_all(lambda: None if is_main_process() else buckets.get_file(address, path))
        return
    size = decide_on_main(lambda: path.stat().st_size)
    end = time.monotonic() + FILE_SECONDS
    while not (path.is_file() and path.stat().st_size == size):
        if time.monotonic() > end:
            raise OSError(
                f"{path}: expected the {size} bytes that process 0 wrote; the hosts do not share "
                "this folder, or its network file system shows changes too late"
            )
        os.listdir(path.parent)  # makes some network file systems look again
        time.sleep(0.5)


def require_equal(facts: Mapping[str, Any], advice: str) -> None:
    """Refuse processes whose facts differ; the error names the first difference."""
    text = {name: json.dumps(value, sort_keys=True, default=str) for name, value in facts.items()}
    digest = hashlib.sha256(repr(sorted(text.items())).encode()).hexdigest()
    if len(set(gather_objects(digest))) == 1:
        return
    everywhere = gather_objects((socket.gethostname(), text))
    host, first = everywhere[0]
    for number, (other_host, other) in enumerate(everywhere):
        for name in dict.fromkeys([*first, *other]):
            ours, theirs = first.get(name, "none"), other.get(name, "none")
            if ours != theirs:
                raise ProcessesDiffer(
                    f"the processes differ in {name}: process 0 (host {host}) has {ours[:80]}, "
                    f"process {number} (host {other_host}) has {theirs[:80]}; {advice}"
                )


@contextlib.contextmanager
def flag_in_exchanges(flag: Callable[[], int], act: Callable[[int], None]) -> Iterator[None]:
    """Send `flag()` with every exchange in this block; call `act` on all processes if one is set.

    `act` is called at the end of the same exchange on all processes.
    """
    global _flag, _on_flag
    before, (_flag, _on_flag) = (_flag, _on_flag), (flag, act)
    try:
        yield
    finally:
        _flag, _on_flag = before


def _flag() -> int:
    return 0


def _on_flag(_: int) -> None:
    pass


def _caller() -> str:
    """Return file, line and function of the code that asks for an exchange."""
    frame = sys._getframe(2)
    while frame.f_globals["__name__"] == __name__:
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}"


def _relay(number: int, message: _Message) -> list[_Message]:
    """Send a message to the main process, which sends all messages to every process."""
    client, folder = coordination_client(), f"cptjax/exchange/{number}"
    mine = pickle.dumps(tuple(message))
    if not is_main_process():
        client.key_value_set_bytes(f"{folder}/{process_index()}", mine)
        return [_Message(*m) for m in pickle.loads(_wait_for(f"{folder}/all"))]
    others = [pickle.loads(_wait_for(f"{folder}/{i}")) for i in range(1, process_count())]
    messages = [message, *(_Message(*m) for m in others)]
    client.key_value_set_bytes(f"{folder}/all", pickle.dumps([tuple(m) for m in messages]))
    if number:  # every process has read the exchange before
        client.key_value_delete(f"cptjax/exchange/{number - 1}")
    return messages


def _wait_for(key: str) -> bytes:
    """Return the value of a key as soon as it has one, and let Python handle signals meanwhile."""
    while True:
        try:
            return coordination_client().blocking_key_value_get_bytes(key, 1000)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise


def _refuse_other_exchange(number: int, messages: list[_Message]) -> None:
    first = messages[0]
    for i, other in enumerate(messages):
        if other.name != first.name:
            raise ProcessesDiffer(
                f"at exchange {number} process 0 (host {first.host}) is at {first.name}, process "
                f"{i} (host {other.host}) at {other.name}; the processes do not run the same "
                "steps: give all of them the same code, config, data and folder"
            )


def size_class(size: int) -> int:
    """Return the padded size of a large value: a power of two."""
    return max(SIZE_CLASS_BYTES, 1 << (size - 1).bit_length())


def _gather_on_devices(pickled: bytes, sizes: list[int]) -> list[bytes]:
    """Gather large values with a compiled program per size class."""
    from jax.experimental import multihost_utils

    padded = np.zeros(size_class(max(sizes)), np.uint8)
    padded[: len(pickled)] = np.frombuffer(pickled, np.uint8)
    rows = multihost_utils.process_allgather(padded)
    return [row[:size].tobytes() for row, size in zip(rows, sizes, strict=True)]
