"""The plan of packed groups: sizes, indices, and how much of a row is padding."""

import numpy as np
import pytest
from length_distributions import DISTRIBUTIONS, lengths_of

from cptjax.data import packing


def test_the_sizes_of_rows_are_few_and_long_rows_have_at_most_an_eighth_of_padding():
    real = np.arange(1, 40_000)
    sizes = np.array([packing.row_size(n, 1 << 30) for n in real.tolist()])
    assert (sizes >= real).all() and (sizes % 512 == 0).all() and (np.diff(sizes) >= 0).all()
    assert (sizes <= np.where(real > 4096, 1.125, 1.25) * real)[real > 2048].all()
    # 512 1024 ... 4096 | 4608 ... 8192 | 9216 ... 16384 | 18432 ... 32768 | 36864 40960
    assert len(set(sizes)) == 8 + 8 + 8 + 8 + 2
    assert packing.row_size(980, 1000) == 1000  # never more than the padded form
    sizes = np.array([packing.row_size(n, 1 << 30, balanced=True) for n in real.tolist()])
    assert (sizes[4096:] <= 1.0625 * real[4096:]).all() and (sizes % 256 == 0).all()


def test_a_plan_by_hand():
    """Two shards of two prompts with one response each."""
    prompt_mask = np.array([[0, 1, 1], [1, 1, 1], [0, 0, 1], [0, 1, 1]], bool)
    mask = np.array([[1, 1, 0], [0, 0, 0], [0, 1, 1], [1, 0, 0]], bool)
    where, plan = packing.plan_packing(prompt_mask, mask, 2)
    assert plan.source.shape == (2, 12) and plan.place.shape == (2, 12)  # the padded form
    # 1 2 = the first prompt, 6 = its response without the last token, 3 4 5 = the second prompt
    assert plan.source.tolist() == [
        [1, 2, 6, 3, 4, 5, *[-1] * 6],
        [2, 6, 7, 4, 5, *[-1] * 7],
    ]
    for source, place in zip(plan.source, plan.place, strict=True):
        assert [source[i] for i in place if i >= 0] == np.flatnonzero(place >= 0).tolist()
    assert plan.real.tolist() == [[0, 1, *[-1] * 4], [1, 2, 3, *[-1] * 3]]
    assert plan.spread.tolist() == [[0, 1, *[-1] * 4], [-1, 0, 1, 2, -1, -1]]
    # The state before a token predicts it, that of the prompt's last token the first one.
    assert where[:, :3].tolist() == [[1, 2, 0], [1, 2, 4]]


def test_processes_agree_on_the_sizes(monkeypatch):
    """The process with the most tokens and the one with the most targets decide."""
    masks = np.ones((2, 900), bool), np.ones((4, 600), bool)
    alone = packing.plan_packing(*masks, 1)[1]
    assert (alone.source.shape, alone.real.shape) == ((1, 4200), (1, 2400))
    masks = masks[0], masks[1] & (np.arange(600) < 100)
    alone = packing.plan_packing(*masks, 1)[1]
    assert (alone.source.shape, alone.real.shape) == ((1, 2560), (1, 512))
    others = [(3000, 100), (100, 700)]
    monkeypatch.setattr(packing.distributed, "gather_objects", lambda own: [own, *others])
    together = packing.plan_packing(*masks, 1)[1]
    assert (together.source.shape, together.real.shape) == ((1, 3072), (1, 1024))


@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_padding_at_two_distributions_of_lengths(name, shards):
    """512 prompts, 64 of each shard in a micro-batch."""
    prompt, group, mean, limit = DISTRIBUTIONS[name]
    lengths = lengths_of(mean, limit, (512, group))
    assert lengths.mean() == pytest.approx(mean, rel=0.01)
    processed, rows = 0, set()
    for part in np.split(lengths, 512 // (64 * shards)):
        mask = np.arange(limit) < part.reshape(-1, 1)
        _, plan = packing.plan_packing(np.ones((len(part), prompt), bool), mask, shards)
        processed += plan.source.size
        rows.add(plan.source.shape)
    real = 512 * prompt + lengths.sum()
    assert processed / real <= 1.15 and len(rows) <= 3
    assert (512 * prompt + 512 * group * limit) / real > 2.5  # all as long as the longest
