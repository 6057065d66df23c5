"""Batches for a stage: rows are read, decoded and prepared ahead of the step that needs them, in threads or processes.

The order is `cptjax.order`'s and does not depend on who reads: any number of workers gives the same batches.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import cloudpickle
import grain

from cptjax.data.mixture import Mixture, RowRef
from cptjax.types import Example

ROWS_PER_TASK = 8  # rows that a worker takes at a time at most
NAME_BYTES = 160  # bytes kept of the name of the row that a worker is busy with


@dataclasses.dataclass(frozen=True)
class LoadedRow:
    """One example as `prepare` left it, and where it came from."""

    place: RowRef
    value: Any


class BatchStream:
    """An endless iterator over a stage's batches from `step` on; reads and prepares rows ahead in threads or processes.

    `prepare` turns an example into anything that pickles, `collate` a list of `Row` into a batch; both must be functions of
    their arguments alone. `waited` is the time, in seconds, that all batches so far kept their caller waiting.
    """

    def __init__(
        self,
        order: Mixture,
        sources: Sequence[Sequence[Example]],
        prepare: Callable[[Example], Any],
        *,
        collate: Callable[[list[LoadedRow]], Any] = list,
        shard: tuple[int, int] = (0, 1),
        step: int = 0,
        workers: int = 0,
        prefetch: int = 2,
    ):
        came = tuple(map(len, sources))
        if came != order.sizes + order.replay:
            raise ValueError(
                f"the order is for lists of {order.sizes + order.replay} examples, but lists of {came} came"
            )
        self.step, self.waited = step, 0.0
        self._reader = (
            _WorkerPool(sources, prepare, workers) if workers else LocalReader(sources, prepare)
        )
        batches = grain.MapDataset.source(_BatchSource(order, shard, step, self._reader, collate))
        # One thread where rows are prepared in this process: a second would only fight it for the interpreter.
        threads = grain.ReadOptions(
            num_threads=min(prefetch, prefetch if workers else 1), prefetch_buffer_size=prefetch
        )
        self._batches = iter(batches.to_iter_dataset(threads))
        self._batches.start_prefetch()

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        started = time.perf_counter()
        batch = next(self._batches)
        self.waited += time.perf_counter() - started
        self.step += 1
        return batch

    def close(self) -> None:
        """Stops reading ahead and ends the worker processes."""
        self._batches.close()
        self._reader.close()

    def __enter__(self) -> "BatchStream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class RowCache:
    """Keeps prepared rows where all of them fit into `room` bytes, judged by the first: small sets are passed many times."""

    def __init__(self, rows: int, ctx: int = 1 << 29):
        self.rows, self.ctx, self.kept = rows, ctx, {}
        self.open: bool | None = None

    def get(self, keys: Sequence[Any], make: Callable[[list[Any]], list[Any]]) -> list[Any]:
        """The values of keys; those that are not here are made in one call."""
        new = [key for key in dict.fromkeys(keys) if key not in self.kept]
        made = dict(zip(new, make(new), strict=True)) if new else {}
        if new and self.open is None:
            self.open = len(cloudpickle.dumps(made[new[0]])) * self.rows <= self.ctx
        if self.open:
            self.kept |= made
        return [made[key] if key in made else self.kept[key] for key in keys]


@contextlib.contextmanager
def open_reader(
    sources: Sequence[Sequence[Example]], prepare: Callable[[Example], Any], workers: int = 0
) -> Iterator[Callable[[Sequence[RowRef]], list[Any]]]:
    """A function that prepares the rows at some places: in this process, or in others that live as long as the context."""
    if not workers:
        yield lambda places: [prepare_row(sources, prepare, place) for place in places]
        return
    with contextlib.closing(_WorkerPool(sources, prepare, workers)) as pool:
        yield pool


def prefetch_map(
    make: Callable[[Any], Any], batches: Iterable[Any], prefetch: int = 1
) -> Iterator[Any]:
    """`make` of each batch in order, `prefetch` of them made in a thread while the caller works on the one before."""
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        coming: collections.deque[concurrent.futures.Future] = collections.deque()
        try:
            for batch in batches:
                coming.append(thread.submit(make, batch))
                if len(coming) > prefetch:
                    yield coming.popleft().result()
            while coming:
                yield coming.popleft().result()
        finally:
            for future in coming:
                future.cancel()


@dataclasses.dataclass
class _BatchSource:
    """The batches of a stage by number, from `first` on."""

    order: Mixture
    shard: tuple[int, int]
    first: int
    reader: "LocalReader | _WorkerPool"
    collate: Callable[[list[LoadedRow]], Any]

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, i: int) -> Any:
        places = self.order.rows(self.first + i, self.shard)
        return self.collate(
            [LoadedRow(p, v) for p, v in zip(places, self.reader(places), strict=True)]
        )


class LocalReader:
    """Prepares rows in this process, and keeps them where they fit."""

    def __init__(self, sources: Sequence[Sequence[Example]], prepare: Callable[[Example], Any]):
        self.sources, self.prepare = sources, prepare
        self.shelf = RowCache(sum(map(len, sources)))

    def __call__(self, places: Sequence[RowRef]) -> list[Any]:
        make = lambda rows: [
            prepare_row(self.sources, self.prepare, RowRef(*row, 0)) for row in rows
        ]
        return self.shelf.get([(p.source, p.index) for p in places], make)

    def close(self) -> None:
        """Has nothing to end."""


def prepare_row(
    sources: Sequence[Sequence[Example]],
    prepare: Callable[[Example], Any],
    place: RowRef,
    busy: Callable = str,
) -> Any:
    """Reads and prepares one example; what goes wrong is told with the row's id."""
    name = f"row {place.index} of list {place.source}"
    busy(name)
    try:
        example = sources[place.source][place.index]
        name = example.id
        busy(name)
        return prepare(example)
    except (ValueError, OSError) as error:
        raise ValueError(f"{name}: {_one_line(error)}") from None
    except Exception as error:
        raise RuntimeError(f"{name}: {type(error).__name__}: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


class _WorkerPool:
    """Prepares rows in processes that are started afresh, since a fork of a process with JAX's threads may hang."""

    def __init__(
        self, sources: Sequence[Sequence[Example]], prepare: Callable[[Example], Any], workers: int
    ):
        context = multiprocessing.get_context("spawn")
        self.workers, self.names = workers, context.RawArray("c", workers * NAME_BYTES)
        job = cloudpickle.dumps((sources, prepare))  # plain pickle refuses closures
        self.pool = concurrent.futures.ProcessPoolExecutor(
            workers, context, _start_worker, (job, context.Value("i", 0), self.names)
        )

    def __call__(self, places: Sequence[RowRef]) -> list[Any]:
        size = min(ROWS_PER_TASK, math.ceil(len(places) / self.workers))
        chunks = [places[i : i + size] for i in range(0, len(places), size)]
        try:
            return [value for values in self.pool.map(_prepare_rows, chunks) for value in values]
        except BrokenProcessPool:
            raise OSError(
                f"a data worker died (out of memory, or a crash in a decoder) at {self.busy()}; lower data.workers "
                "or look at that row"
            ) from None

    def busy(self) -> str:
        """Names the rows that the workers were at."""
        slots = [
            self.names[i * NAME_BYTES : (i + 1) * NAME_BYTES].rstrip(b"\0").decode(errors="replace")
            for i in range(self.workers)
        ]
        return " or ".join(filter(None, slots)) or "its start"

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)


_prepare: Callable[[RowRef], Any]  # of a worker process, set once by _start


def _start_worker(job: bytes, started: Any, names: Any) -> None:
    """Readies a worker: it never touches an accelerator, leaves Ctrl-C to its parent, and ends when the parent is gone."""
    global _prepare
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    os.environ["JAX_PLATFORMS"] = "cpu"
    if "jax" in sys.modules:  # the launcher's own imports were repeated here, before this line
        sys.modules["jax"].config.update("jax_platforms", "cpu")
    with started.get_lock():
        slot = slice(started.value * NAME_BYTES, (started.value + 1) * NAME_BYTES)
        started.value += 1

    def busy(name: str) -> None:
        names[slot] = name.encode()[:NAME_BYTES].ljust(NAME_BYTES, b"\0")

    sources, prepare = cloudpickle.loads(job)
    _prepare = lambda place: prepare_row(sources, prepare, place, busy)


def _exit_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _prepare_rows(places: list[RowRef]) -> list[Any]:
    return [_prepare(p) for p in places]
