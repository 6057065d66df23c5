"""Prefetch the batches of a stage: rows are read, decoded and encoded before they are needed.

The order is a function of (seed, stage, position); see `mixture.py`. Any number of worker processes
gives the same batches.

Grain maps and prefetches the batches, but the order and the worker pool are our own. Grain's
shuffle and mix do not give exact shares over epochs and replay. Its `mp_prefetch` with two workers
reads 90 to 160 rows/s of 448 x 448 JPEGs (our pool 185) and 700 to 1040 small rows/s (our pool
1020), and takes 1.3 to 2 times as much CPU time of this process. It also needs parsed absl flags,
does not name the row at which a worker dies, waits forever for a row that does not pickle, and
takes 25 s per worker to close when rows are not arrays.
"""

import concurrent.futures
import contextlib
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import cloudpickle
import grain

from cptjax.data.mixture import Mixture, RowRef
from cptjax.types import Example

# Rows that a worker takes at a time; with 8, workers idle at the end of a batch (110 rows/s
# instead of 180).
ROWS_PER_TASK = 2
ROW_NAME_BYTES = 160  # bytes kept of the name of the row that a worker is busy with
ROW_CACHE_BYTES = 1 << 29

Sources = Sequence[Sequence[Example]]
PrepareRow = Callable[[Example, int], Any]  # (example, its index in its list) -> what a batch holds


class BatchStream:
    """An endless iterator over a stage's batches from `step` on, prefetched by threads or workers.

    `prepare` turns an example and its index into any picklable value, and `collate` turns a list of
    these values into a batch. Both must depend on nothing but their arguments. `waited` is the
    number of seconds that the caller has waited for batches.
    """

    def __init__(
        self,
        mixture: Mixture,
        sources: Sources,
        prepare: PrepareRow,
        *,
        collate: Callable[[list[Any]], Any] = list,
        shard: tuple[int, int] = (0, 1),
        step: int = 0,
        workers: int = 0,
        prefetch: int = 2,
    ):
        sizes = tuple(map(len, sources))
        if sizes != mixture.sizes + mixture.replay:
            raise ValueError(
                f"the mixture is of lists of {mixture.sizes + mixture.replay} examples, "
                f"got lists of {sizes}"
            )
        self.step, self.waited = step, 0.0
        self._reader = (
            _WorkerPool(sources, prepare, workers) if workers else LocalReader(sources, prepare)
        )
        batches = (
            grain.MapDataset.range(step, sys.maxsize)
            .map(lambda n: mixture.rows(n, shard))
            .map(self._reader)
            .map(collate)
        )
        # Rows that are prepared in this process use one thread: a second one would only compete for
        # the interpreter lock.
        options = grain.ReadOptions(
            num_threads=min(prefetch, prefetch if workers else 1), prefetch_buffer_size=prefetch
        )
        self._batches = iter(batches.to_iter_dataset(options))
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
        """Stop prefetching and end the worker processes."""
        self._batches.close()
        self._reader.close()

    def __enter__(self) -> "BatchStream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class RowCache:
    """A cache of prepared rows, used only if all rows fit into `max_bytes`.

    The size of the first row times the number of rows is the estimate.
    """

    def __init__(self, rows: int, max_bytes: int = ROW_CACHE_BYTES):
        self.rows, self.max_bytes = rows, max_bytes
        self.values: dict[Hashable, Any] = {}
        self.fits: bool | None = None  # unknown before the first row

    def get(self, keys: Sequence[Hashable], make: Callable[[list[Any]], list[Any]]) -> list[Any]:
        """Return the values of `keys`; one call of `make` computes those that are missing."""
        missing = [key for key in dict.fromkeys(keys) if key not in self.values]
        made = dict(zip(missing, make(missing), strict=True)) if missing else {}
        if missing and self.fits is None:
            self.fits = len(cloudpickle.dumps(made[missing[0]])) * self.rows <= self.max_bytes
        if self.fits:
            self.values |= made
        return [made[key] if key in made else self.values[key] for key in keys]


@contextlib.contextmanager
def open_reader(
    sources: Sources, prepare: PrepareRow, workers: int = 0
) -> Iterator[Callable[[Sequence[RowRef]], list[Any]]]:
    """Yield a function that prepares rows, in this process or in worker processes.

    The workers end with the context.
    """
    if not workers:
        yield lambda refs: [prepare_row(sources, prepare, ref) for ref in refs]
        return
    with contextlib.closing(_WorkerPool(sources, prepare, workers)) as pool:
        yield pool


def prefetch_map(
    make: Callable[[Any], Any], batches: Sequence[Any], prefetch: int = 1
) -> Iterator[Any]:
    """Yield `make(batch)` of each batch in order.

    A thread computes the next `prefetch` results while the caller uses the current one.
    """
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=prefetch)
    made = iter(grain.MapDataset.source(batches).map(make).to_iter_dataset(options))
    try:
        yield from made
    finally:
        made.close()


class LocalReader:
    """Prepares rows in this process, and caches them if all of them fit."""

    def __init__(self, sources: Sources, prepare: PrepareRow):
        self.sources, self.prepare = sources, prepare
        self.row_cache = RowCache(sum(map(len, sources)))

    def __call__(self, refs: Sequence[RowRef]) -> list[Any]:
        return self.row_cache.get(
            refs, lambda refs: [prepare_row(self.sources, self.prepare, ref) for ref in refs]
        )

    def close(self) -> None:
        """Do nothing; worker pools have the same method."""


def prepare_row(
    sources: Sources,
    prepare: PrepareRow,
    ref: RowRef,
    report_row: Callable[[str], Any] | None = None,
) -> Any:
    """Read and prepare one example; an error names the row by its id."""
    name = f"row {ref.index} of list {ref.source}"
    if report_row:
        report_row(name)
    try:
        example = sources[ref.source][ref.index]
        name = example.id
        if report_row:
            report_row(name)
        return prepare(example, ref.index)
    except (ValueError, OSError) as error:
        raise ValueError(f"{name}: {' '.join(str(error).split())}") from None
    except Exception as error:
        message = " ".join(str(error).split())
        raise RuntimeError(f"{name}: {type(error).__name__}: {message}") from error


class _WorkerPool:
    """Prepares rows in spawned processes; a fork of a process with JAX's threads may hang."""

    def __init__(self, sources: Sources, prepare: PrepareRow, workers: int):
        context = multiprocessing.get_context("spawn")
        self.workers = workers
        self.row_names = context.RawArray("c", workers * ROW_NAME_BYTES)
        job = cloudpickle.dumps((sources, prepare))  # plain pickle refuses closures
        self.pool = concurrent.futures.ProcessPoolExecutor(
            workers, context, _start_worker, (job, context.Value("i", 0), self.row_names)
        )

    def __call__(self, refs: Sequence[RowRef]) -> list[Any]:
        size = min(ROWS_PER_TASK, math.ceil(len(refs) / self.workers))
        chunks = [refs[i : i + size] for i in range(0, len(refs), size)]
        try:
            return [value for values in self.pool.map(_prepare_rows, chunks) for value in values]
        except BrokenProcessPool:
            raise OSError(
                "a data worker died (out of memory, or a crash in a decoder) at "
                f"{self.current_rows()}; lower data.workers or look at that row"
            ) from None

    def current_rows(self) -> str:
        """Return the names of the rows that the workers are busy with."""
        names = [
            self.row_names[i * ROW_NAME_BYTES : (i + 1) * ROW_NAME_BYTES]
            .rstrip(b"\0")
            .decode(errors="replace")
            for i in range(self.workers)
        ]
        return " or ".join(filter(None, names)) or "its start"

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)


_prepare: Callable[[RowRef], Any]  # of a worker process, set once by _start_worker


def _start_worker(job: bytes, started: Any, row_names: Any) -> None:
    """Set up a worker process.

    A worker never uses an accelerator, ignores Ctrl-C, and exits when its parent process does.
    """
    global _prepare
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    os.environ["JAX_PLATFORMS"] = "cpu"
    if "jax" in sys.modules:  # spawning repeats the launcher's imports before this line
        sys.modules["jax"].config.update("jax_platforms", "cpu")
    with started.get_lock():
        slot = slice(started.value * ROW_NAME_BYTES, (started.value + 1) * ROW_NAME_BYTES)
        started.value += 1

    def report_row(name: str) -> None:
        row_names[slot] = name.encode()[:ROW_NAME_BYTES].ljust(ROW_NAME_BYTES, b"\0")

    sources, prepare = cloudpickle.loads(job)
    _prepare = lambda ref: prepare_row(sources, prepare, ref, report_row)


def _exit_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _prepare_rows(refs: list[RowRef]) -> list[Any]:
    return [_prepare(ref) for ref in refs]
