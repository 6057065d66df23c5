"""The stream of a stage's batches: the mixture's rows in its order for any number of workers."""

import functools
import multiprocessing
import os
import signal
import time

import numpy as np
import pytest

from cptjax.data import loader
from cptjax.data.loader import BatchStream
from cptjax.data.mixture import Mixture, RowRef
from cptjax.types import Example


def examples(n, task="t"):
    return [Example(id=f"{task}/{i}", messages=[], answer=i, task=task) for i in range(n)]


def tag(example, index, pause=0.0):
    time.sleep(pause * (example.answer % 3))  # rows end out of order
    return example.id


def refuse(example, index, bad, error):
    if example.answer == bad:
        raise error
    return example.id


def die(example, index, bad):
    if example.answer == bad:
        os.kill(os.getpid(), signal.SIGKILL)
    return example.id


def read(mixture, sources, steps, start=0, **settings):
    with BatchStream(
        mixture, sources, functools.partial(tag, pause=0.0005), step=start, **settings
    ) as stream:
        return [next(stream) for _ in range(steps)]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_resumed_stream_equals_the_uninterrupted_one(workers):
    sources = [examples(17, "a"), examples(5, "b"), examples(6, "old")]
    mixture = Mixture((17, 5), batch=6, replay=(6,), fraction=0.2, seed=1, stage=2)
    expected = [[sources[p.source][p.index].id for p in mixture.rows(s)] for s in range(9)]
    follow = functools.partial(read, mixture, sources, workers=workers)
    assert follow(3, start=6) == expected[6:]
    if workers == 1:  # shards are in the cases of none and of several
        return
    halves = [follow(6, start=3, shard=(index, 2)) for index in (0, 1)]
    assert [a + b for a, b in zip(*halves, strict=True)] == expected[3:]


def test_collate_step_and_waiting_time():
    mixture = Mixture((8,), batch=4)
    with BatchStream(
        mixture, [examples(8)], functools.partial(tag, pause=0.02), collate=len, step=5, prefetch=1
    ) as stream:
        assert next(stream) == 4
        assert stream.step == 6 and stream.waited > 0.01
        time.sleep(0.5)
        before = stream.waited
        next(stream)
        assert stream.waited - before < 0.05  # it was read ahead


def test_nothing_is_read_ahead_without_prefetch():
    read_rows = []
    with BatchStream(
        Mixture((8,), 4), [examples(8)], lambda e, _: read_rows.append(e.id), prefetch=0
    ) as stream:
        assert not read_rows
        next(stream)
        assert len(read_rows) == 4


@pytest.mark.parametrize("workers", [0, 1])
def test_a_wrong_row_is_named(workers):
    for error, kind, text in (
        (OSError("cut short\nhere"), ValueError, "cut short here"),
        (KeyError("x"), RuntimeError, "KeyError: 'x'"),
    ):
        with BatchStream(
            Mixture((8,), 8),
            [examples(8)],
            functools.partial(refuse, bad=3, error=error),
            workers=workers,
        ) as stream:
            with pytest.raises(kind) as caught:
                next(stream)
        assert str(caught.value) == f"t/3: {text}"


def test_a_killed_worker_is_one_line_with_the_row():
    with BatchStream(
        Mixture((8,), 8), [examples(8)], functools.partial(die, bad=3), workers=1
    ) as stream:
        with pytest.raises(OSError, match=r"data worker died .* at t/3; lower data.workers"):
            next(stream)


def test_closures_run_in_workers_that_cannot_take_the_accelerator():
    with BatchStream(
        Mixture((4,), 4),
        [examples(4)],
        lambda e, _: (e.answer, os.environ["JAX_PLATFORMS"], os.getpid()),
        workers=1,
    ) as stream:
        values = next(stream)
    assert sorted(v[0] for v in values) == [0, 1, 2, 3]
    assert {v[1] for v in values} == {"cpu"} and os.getpid() not in {v[2] for v in values}


def test_a_result_that_does_not_pickle_is_an_error_and_no_hang():
    with BatchStream(Mixture((4,), 2), [examples(4)], lambda e, _: lambda: e, workers=1) as stream:
        with pytest.raises(Exception, match="pickle"):
            next(stream)


def test_closing_ends_the_workers_at_once():
    before = set(multiprocessing.active_children())
    stream = BatchStream(
        Mixture((64,), 32), [examples(64)], lambda e, _: np.zeros(300_000), workers=2, prefetch=4
    )
    next(stream)
    workers = set(multiprocessing.active_children()) - before
    assert len(workers) == 2
    started = time.monotonic()
    stream.close()
    assert time.monotonic() - started < 10
    assert not any(w.is_alive() for w in workers)


def test_lists_of_other_sizes_than_the_mixture_are_refused():
    with pytest.raises(ValueError, match=r"lists of \(3,\) examples, got lists of \(2,\)"):
        BatchStream(Mixture((3,), 2), [examples(2)], tag)


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_are_built_ahead_in_their_order(workers):
    batches, made = [[RowRef(0, i), RowRef(0, i + 4)] for i in range(4)], []
    with loader.open_reader([examples(8)], tag, workers) as read:
        for n, batch in enumerate(
            loader.prefetch_map(
                lambda places: made.append(places) or read(places), batches, prefetch=1
            )
        ):
            assert batch == [f"t/{n}", f"t/{n + 4}"] and len(made) <= n + 2
    with loader.open_reader(
        [examples(8)], functools.partial(refuse, bad=5, error=OSError("cut"))
    ) as read:
        with pytest.raises(ValueError, match="t/5: cut"):
            list(loader.prefetch_map(read, batches))


def test_a_row_cache_keeps_what_fits():
    for max_bytes, again in ((1 << 20, [2]), (1, [1, 2])):
        cache, made = loader.RowCache(3, max_bytes), []
        make = lambda keys: made.append(keys) or [10 * k for k in keys]  # noqa: B023
        assert cache.get([0, 1, 1], make) == [0, 10, 10] and cache.get([1, 2], make) == [10, 20]
        assert made == [[0, 1], again]


def test_names_longer_than_their_slot_are_cut():
    assert len(("é" * 200).encode()[: loader.ROW_NAME_BYTES]) == loader.ROW_NAME_BYTES
