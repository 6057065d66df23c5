"""The order of a stage's rows: an epoch has each row once, shares are exact everywhere."""

from collections import Counter
from fractions import Fraction

import pytest

from cptjax.data.mixture import Mixture, component_at, component_counts


def indices(mixture, first, last):
    return [(p.source, p.index) for p in map(mixture.row_at, range(first, last))]


@pytest.mark.parametrize("size", [1, 2, 7, 100])
def test_every_epoch_holds_every_example_once(size):
    mixture = Mixture((size,), batch=3, seed=5)
    for epoch in range(4):
        rows = [mixture.row_at(n) for n in range(epoch * size, (epoch + 1) * size)]
        assert sorted(row.index for row in rows) == list(range(size))


def test_epochs_stages_and_seeds_shuffle_differently():
    epochs = [
        tuple(indices(Mixture((50,), 5, seed=s, stage=t), 50 * e, 50 * e + 50))
        for s in (0, 1)
        for t in (0, 1)
        for e in (0, 1, 2)
    ]
    assert len(set(epochs)) == len(epochs)


def test_shuffle_is_close_to_uniform():
    first = Counter(Mixture((5,), 1, seed=s).row_at(0).index for s in range(2000))
    assert all(abs(first[i] - 400) < 90 for i in range(5))


def test_several_lists_by_size_are_one_epoch():
    mixture = Mixture((30, 5, 65), batch=10)
    assert Counter(i for i, _ in set(indices(mixture, 0, 100))) == {0: 30, 1: 5, 2: 65}
    assert {i for i, _ in indices(mixture, 0, 20)} == {
        0,
        1,
        2,
    }  # shuffled as one, not one after the other


def test_weights_and_replay_are_exact_at_every_position():
    mixture = Mixture((40, 10), batch=10, weights=(3, 1), replay=(20, 7), fraction=0.1)
    counts = Counter()
    for n in range(2000):
        row = mixture.row_at(n)
        counts["r" if row.source >= 2 else row.source] += 1
        for key, share in (("r", 0.1), (0, 0.675), (1, 0.225)):
            assert abs(counts[key] - share * (n + 1)) < 1, (n, key)
    assert counts == {"r": 200, 0: 1350, 1: 450}


def test_weighted_lists_keep_their_own_epochs():
    mixture = Mixture((8, 3), batch=4, weights=(1, 1), replay=(6,), fraction=0.25)
    for source, size in ((0, 8), (1, 3), (2, 6)):
        seen = [p.index for p in map(mixture.row_at, range(200)) if p.source == source]
        for start in range(0, len(seen) - size, size):
            assert sorted(seen[start : start + size]) == list(range(size))


def test_replay_does_not_change_the_order_of_the_own_rows_within_a_component():
    plain = [p.index for p in map(Mixture((9,), 4, seed=3).row_at, range(18))]
    mixed = [
        p.index
        for p in map(Mixture((9,), 4, replay=(5,), fraction=0.5, seed=3).row_at, range(36))
        if p.source == 0
    ]
    assert len(mixed) == len(plain) and sorted(mixed[:9]) == sorted(plain[:9])


def test_rows_of_each_component_before_a_position():
    shares = Mixture((8, 3), batch=4, weights=(1, 1), replay=(6,), fraction=0.25).remaining_shares
    for n in range(50):
        assert component_counts(n, shares) == [
            sum(component_at(i, shares)[0] == component for i in range(n)) for component in range(3)
        ]


def test_component_at_meets_every_share():
    shares = [Fraction(1, 3), Fraction(1, 7), Fraction(11, 21)]
    components = [
        component_at(n, [shares[0], shares[1] / (shares[1] + shares[2])]) for n in range(210)
    ]
    for component, share in enumerate(shares):
        assert [k for i, k in components if i == component] == list(range(int(210 * share)))


def test_processes_share_a_batch_in_blocks():
    mixture = Mixture((23,), batch=6)
    for step in range(8):
        assert mixture.rows(step, (0, 2)) + mixture.rows(step, (1, 2)) == mixture.rows(step)


def test_steps_of_an_epoch():
    assert Mixture((100,), 32).steps(1) == 4
    assert Mixture((96,), 32).steps(1) == 3
    assert Mixture((96,), 32).steps(0.5) == 2
    mixture = Mixture((90,), 10, replay=(5,), fraction=0.1)
    assert mixture.steps(1) == 10
    assert len({p.index for s in range(10) for p in mixture.rows(s) if p.source == 0}) == 90


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
def test_impossible_mixtures_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Mixture(**{"batch": 4, **settings})


def test_a_batch_that_the_processes_cannot_share_is_refused():
    with pytest.raises(ValueError, match="train.batch=5 cannot be cut into 2"):
        Mixture((3,), 5).rows(0, (0, 2))
