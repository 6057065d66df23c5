"""The order of a stage and the stream that follows it: nothing lost, nothing repeated, the same whoever reads."""

import functools
import multiprocessing
import os
import signal
import time
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from cptjax.benchmark import data_pipeline
from cptjax.data import loader
from cptjax.data.loader import BatchStream
from cptjax.data.mixture import Mixture, RowRef, component_at, component_counts
from cptjax.types import Example


def examples(n, task="t"):
    return [Example(id=f"{task}/{i}", messages=[], answer=i, task=task) for i in range(n)]


def tag(example, pause=0.0):
    time.sleep(pause * (example.answer % 3))  # rows end out of order
    return example.id


def refuse(example, bad, error):
    if example.answer == bad:
        raise error
    return example.id


def die(example, bad):
    if example.answer == bad:
        os.kill(os.getpid(), signal.SIGKILL)
    return example.id


def ids(batch):
    return [row.value for row in batch]


def read(order, sources, steps, start=0, **settings):
    with BatchStream(
        order, sources, functools.partial(tag, pause=0.0005), step=start, **settings
    ) as stream:
        return [ids(next(stream)) for _ in range(steps)]


def indices(order, first, last):
    return [(p.source, p.index) for p in map(order.place, range(first, last))]


@pytest.mark.parametrize("size", [1, 2, 7, 100])
def test_every_epoch_holds_every_example_once(size):
    order = Mixture((size,), batch=3, seed=5)
    for epoch in range(4):
        places = [order.place(n) for n in range(epoch * size, (epoch + 1) * size)]
        assert sorted(p.index for p in places) == list(range(size))
        assert {p.epoch for p in places} == {epoch}


def test_epochs_stages_and_seeds_shuffle_differently():
    epochs = [
        tuple(indices(Mixture((50,), 5, seed=s, stage=t), 50 * e, 50 * e + 50))
        for s in (0, 1)
        for t in (0, 1)
        for e in (0, 1, 2)
    ]
    assert len(set(epochs)) == len(epochs)


def test_shuffle_is_close_to_uniform():
    first = Counter(Mixture((5,), 1, seed=s).place(0).index for s in range(2000))
    assert all(abs(first[i] - 400) < 90 for i in range(5))


def test_several_lists_by_size_are_one_epoch():
    order = Mixture((30, 5, 65), batch=10)
    assert Counter(i for i, _ in set(indices(order, 0, 100))) == {0: 30, 1: 5, 2: 65}
    assert {i for i, _ in indices(order, 0, 20)} == {
        0,
        1,
        2,
    }  # shuffled as one, not one after the other


def test_weights_and_replay_are_exact_at_every_position():
    order = Mixture((40, 10), batch=10, weights=(3, 1), replay=(20, 7), fraction=0.1)
    counts = Counter()
    for n in range(2000):
        place = order.place(n)
        counts["r" if place.source >= 2 else place.source] += 1
        assert place.replay == (place.source >= 2)
        for key, share in (("r", 0.1), (0, 0.675), (1, 0.225)):
            assert abs(counts[key] - share * (n + 1)) < 1, (n, key)
    assert counts == {"r": 200, 0: 1350, 1: 450}


def test_weighted_lists_keep_their_own_epochs():
    order = Mixture((8, 3), batch=4, weights=(1, 1), replay=(6,), fraction=0.25)
    for source, size in ((0, 8), (1, 3), (2, 6)):
        seen = [p.index for p in map(order.place, range(200)) if p.source == source]
        for start in range(0, len(seen) - size, size):
            assert sorted(seen[start : start + size]) == list(range(size))


def test_replay_does_not_change_the_order_of_the_own_rows_within_a_lane():
    plain = [p.index for p in map(Mixture((9,), 4, seed=3).place, range(18))]
    mixed = [
        p.index
        for p in map(Mixture((9,), 4, replay=(5,), fraction=0.5, seed=3).place, range(36))
        if not p.replay
    ]
    assert len(mixed) == len(plain) and sorted(mixed[:9]) == sorted(plain[:9])


def test_rows_of_each_lane_before_a_position():
    parts = Mixture((8, 3), batch=4, weights=(1, 1), replay=(6,), fraction=0.25).parts
    for n in range(50):
        assert component_counts(n, parts) == [
            sum(component_at(i, parts)[0] == lane for i in range(n)) for lane in range(3)
        ]


def test_pick_meets_every_share():
    shares = [Fraction(1, 3), Fraction(1, 7), Fraction(11, 21)]
    drawn = [component_at(n, [shares[0], shares[1] / (shares[1] + shares[2])]) for n in range(210)]
    for lane, share in enumerate(shares):
        assert [k for i, k in drawn if i == lane] == list(range(int(210 * share)))


def test_processes_share_a_batch_in_blocks():
    order = Mixture((23,), batch=6)
    for step in range(8):
        assert order.rows(step, (0, 2)) + order.rows(step, (1, 2)) == order.rows(step)


def test_steps_of_an_epoch():
    assert Mixture((100,), 32).steps(1) == 4
    assert Mixture((96,), 32).steps(1) == 3
    assert Mixture((96,), 32).steps(0.5) == 2
    order = Mixture((90,), 10, replay=(5,), fraction=0.1)
    assert order.steps(1) == 10
    assert len({p.index for s in range(10) for p in order.rows(s) if not p.replay}) == 90


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_resumed_stream_equals_the_uninterrupted_one(workers):
    sources = [examples(17, "a"), examples(5, "b"), examples(6, "old")]
    order = Mixture((17, 5), batch=6, replay=(6,), fraction=0.2, seed=1, stage=2)
    expected = [[sources[p.source][p.index].id for p in order.rows(s)] for s in range(9)]
    follow = functools.partial(read, order, sources, workers=workers)
    assert follow(3, start=6) == expected[6:]
    halves = [follow(6, start=3, shard=(index, 2)) for index in (0, 1)]
    assert [a + b for a, b in zip(*halves, strict=True)] == expected[3:]


def test_collate_step_and_waiting_time():
    order = Mixture((8,), batch=4)
    with BatchStream(
        order, [examples(8)], functools.partial(tag, pause=0.02), collate=len, step=5, prefetch=1
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
        Mixture((8,), 4), [examples(8)], lambda e: read_rows.append(e.id), prefetch=0
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
        lambda e: (e.answer, os.environ["JAX_PLATFORMS"], os.getpid()),
        workers=1,
    ) as stream:
        values = ids(next(stream))
    assert sorted(v[0] for v in values) == [0, 1, 2, 3]
    assert {v[1] for v in values} == {"cpu"} and os.getpid() not in {v[2] for v in values}


def test_a_result_that_does_not_pickle_is_an_error_and_no_hang():
    with BatchStream(Mixture((4,), 2), [examples(4)], lambda e: lambda: e, workers=1) as stream:
        with pytest.raises(Exception, match="pickle"):
            next(stream)


def test_closing_ends_the_workers_at_once():
    before = set(multiprocessing.active_children())
    stream = BatchStream(
        Mixture((64,), 32), [examples(64)], lambda e: np.zeros(300_000), workers=2, prefetch=4
    )
    next(stream)
    workers = set(multiprocessing.active_children()) - before
    assert len(workers) == 2
    started = time.monotonic()
    stream.close()
    assert time.monotonic() - started < 10
    assert not any(w.is_alive() for w in workers)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sizes": ()}, "at least one row"),
        ({"sizes": (3, 0)}, "at least one row"),
        ({"sizes": (3, 3), "weights": (1,)}, "data.weights: expected 2 numbers > 0"),
        ({"sizes": (3,), "weights": (0,)}, "data.weights"),
        ({"sizes": (3,), "replay": (3,), "fraction": 1.0}, "replay.fraction < 1"),
        ({"sizes": (3,), "batch": 0}, "train.batch >= 1"),
    ],
)
def test_orders_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        Mixture(**{"batch": 4, **settings})


def test_mismatched_lists_and_batches_are_refused():
    with pytest.raises(ValueError, match=r"lists of \(3,\) examples, but lists of \(2,\) came"):
        BatchStream(Mixture((3,), 2), [examples(2)], tag)
    with pytest.raises(ValueError, match="train.batch=5 cannot be cut into 2"):
        Mixture((3,), 5).rows(0, (0, 2))


def test_benchmark_measures_the_whole_pipeline():
    found = data_pipeline.measure_data_pipeline(rows=64, jpegs=2)
    assert (found["data_rows"], found["data_jpeg_448_rows"]) == (
        32,
        1,
    )  # the first batch starts the workers
    assert (
        min(found["data_rows_s"], found["data_rows_s_core"], found["data_jpeg_448_rows_s_core"]) > 5
    )


def test_the_benchmark_counts_the_rows_that_it_reads():
    rows, wall, _ = data_pipeline.time_epoch(
        examples(16), lambda example: time.sleep(0.02), list, 0
    )
    assert rows == 8 and wall > 0.9 * rows * 0.02


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_are_made_ahead_in_their_order(workers):
    batches, made = [[RowRef(0, i, 0), RowRef(0, i + 4, 0)] for i in range(4)], []
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


def test_a_shelf_keeps_what_fits():
    for ctx, again in ((1 << 20, [2]), (1, [1, 2])):
        shelf, made = loader.RowCache(3, ctx), []
        make = lambda keys: made.append(keys) or [10 * k for k in keys]  # noqa: B023
        assert shelf.get([0, 1, 1], make) == [0, 10, 10] and shelf.get([1, 2], make) == [10, 20]
        assert made == [[0, 1], again]


def test_names_longer_than_their_slot_are_cut():
    assert len(("é" * 200).encode()[: loader.NAME_BYTES]) == loader.NAME_BYTES
