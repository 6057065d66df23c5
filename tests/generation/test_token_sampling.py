"""Token sampling: frequencies against exact probabilities, and the edges of every filter."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from cptjax import sharding
from cptjax.generation import token_sampling
from cptjax.planning import hlo

V, N = 300, 40_000  # more than two blocks, the last one partial


def exact(
    logits: np.ndarray, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, forbidden=()
) -> np.ndarray:
    """Return the distribution by definition: sort, cut, renormalise."""
    z = logits.astype(np.float64) / temperature
    z[list(forbidden)] = -np.inf
    p = np.exp(z - z.max())
    p /= p.sum()
    if top_k:
        p[p < np.sort(p)[-top_k]] = 0
        p /= p.sum()
    if top_p < 1:
        order = np.argsort(-p)
        before = np.cumsum(p[order]) - p[order]
        p[order[before >= top_p]] = 0
        p /= p.sum()
    p[p < min_p * p.max()] = 0
    return p / p.sum()


def sample(
    logits: np.ndarray,
    uniform: np.ndarray,
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    min_p=0.0,
    forbidden=(),
):
    off = np.zeros(logits.shape[-1], bool)
    off[list(forbidden)] = True
    c = token_sampling.make_controls(temperature, top_k, top_p, min_p, off)
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (len(uniform), logits.shape[-1]))
    return [
        np.asarray(x) for x in jax.jit(token_sampling.sample_tokens)(rows, jnp.asarray(uniform), c)
    ]


def logits(seed: int = 0, v: int = V) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=v) * 2


CASES = [
    {},
    {"temperature": 0.5},
    {"temperature": 2.0},
    {"top_k": 7},
    {"top_k": 1},
    {"top_p": 0.8},
    {"top_p": 0.01},
    {"min_p": 0.1},
    {"temperature": 1.5, "top_k": 40, "top_p": 0.9},
    {"temperature": 0.7, "top_k": 30, "top_p": 0.95, "min_p": 0.02},
    {"forbidden": (3, 4, 5, 299)},
    {"top_k": 5, "forbidden": range(0, 300, 2)},
]


@pytest.mark.parametrize("settings", CASES, ids=str)
def test_frequencies_equal_exact_probabilities(settings):
    """Chi-square over pooled cells, far beyond what a wrong cut or temperature would give."""
    p = exact(logits(), **settings)
    uniform = np.random.default_rng(1).random(N).astype(np.float32)
    tokens, logps, raw = sample(logits(), uniform, **settings)
    assert (p[tokens] > 0).all()
    np.testing.assert_allclose(logps, np.log(p[tokens]), atol=2e-5)
    np.testing.assert_allclose(raw, np.log(exact(logits())[tokens]), atol=2e-5)
    counts, want = np.bincount(tokens, minlength=V), p * N
    big = want >= 20
    observed, expected = (
        np.append(counts[big], counts[~big].sum()),
        np.append(want[big], want[~big].sum()),
    )
    observed, expected = observed[expected > 0], expected[expected > 0]
    freedom = len(expected) - 1
    chi2 = ((observed - expected) ** 2 / expected).sum()
    assert chi2 <= freedom + 4.5 * np.sqrt(2 * freedom), (chi2, freedom)


def test_greedy_takes_the_first_of_equal_maxima_and_ignores_the_key():
    row = np.zeros(V)
    row[[10, 20]] = 3.0
    tokens, logps, raw = sample(
        row, np.random.default_rng(0).random(50).astype(np.float32), temperature=0.0
    )
    assert (tokens == 10).all() and (logps == 0).all()
    np.testing.assert_allclose(raw, np.log(exact(row))[10], atol=1e-6)


def test_a_token_without_weight_is_never_sampled():
    row = np.full(V, -200.0)  # exp gives zero
    row[[0, 130, 131]] = 1.0
    uniform = np.array(
        [0.0, np.nextafter(np.float32(1), np.float32(0)), 0.34, 0.66, 0.67], np.float32
    )
    for forbidden in ((), (0, 299)):
        tokens, logps, _ = sample(row, uniform, forbidden=forbidden)
        assert set(tokens) <= {0, 130, 131} - set(forbidden) and np.isfinite(logps).all()


def test_a_dropped_token_is_not_sampled_where_rounding_changes_the_running_sum():
    """XLA adds in a tree: here the sum over the blocks rises at blocks of dropped tokens."""
    v, rng = 151_936, np.random.default_rng(0)
    row, kept = rng.normal(-8, 0.5, v), rng.choice(v - 1000, 200, replace=False)
    row[kept] = 20 - rng.exponential(3, 200)
    z = np.where(np.isin(np.arange(v), kept), row - row.max(), -np.inf).astype(np.float32)
    blocks = jnp.sum(jnp.pad(jnp.exp(z), (0, -v % 128)).reshape(1, -1, 128), -1)
    running = np.asarray(jnp.cumsum(blocks, -1))[0]
    rises = np.flatnonzero((np.diff(running) > 0) & (np.asarray(blocks)[0, 1:] == 0))
    assert len(rises) > 3
    near = np.round(running[rises] / running[-1] * 2**23)
    uniform = np.concatenate([near - 1, near, near + 1, [0, 2**23 - 1]]).astype(np.float32) / 2**23
    tokens, logps, _ = sample(row, uniform, top_k=200)
    assert np.isin(tokens, kept).all()
    np.testing.assert_allclose(logps, np.log(exact(row, top_k=200)[tokens]), atol=2e-5)


def test_the_search_passes_over_weights_of_zero_whose_sum_differs_by_rounding():
    weights, one = np.array([[0, 2, 0, 0, 1, 1, 0]], np.float32), np.float32(1)
    up = np.nextafter(2 * one, 3 * one)
    sums = np.array([[0, 2, up, 2, 3, 4, np.nextafter(4 * one, 5 * one)]], np.float32)
    goals = [0, 1, 2, 3, 3.5, 4, sums[0, -1]]
    found = [token_sampling._first_above(weights, sums, jnp.array([g], jnp.float32)) for g in goals]
    assert [int(at[0]) for at, _ in found] == [1, 1, 4, 5, 5, 5, 5]
    np.testing.assert_allclose([float(r[0]) for _, r in found], [0, 1, 0, 0, 0.5, 1, 1], rtol=1e-6)


def test_ties_at_the_cut_stay_together():
    row = np.zeros(V)
    row[5] = 2.0
    tokens, _, _ = sample(row, np.linspace(0, 0.999, 2000, dtype=np.float32), top_k=2)
    assert len(set(tokens)) == V


def test_thresholds_are_exact_for_extreme_logits():
    """Halving works on float bits: neighbours one bit apart, zeros and huge negative numbers are
    distinct.
    """
    z = np.array(
        [
            [
                0.0,
                -1e-30,
                -np.float32(1.0),
                np.nextafter(np.float32(-1), np.float32(-2)),
                -88.0,
                -1e30,
            ]
        ],
        np.float32,
    )
    for k in range(1, 7):
        cut = token_sampling.highest_with_mass(jnp.asarray(z), jnp.ones_like, jnp.float32(k))
        assert np.asarray(cut)[0] == z[0, k - 1]
    cut = token_sampling.highest_with_mass(jnp.asarray(z), jnp.ones_like, jnp.float32(7))
    assert np.asarray(cut)[0] == np.float32(token_sampling.LOWEST_LOGIT)


@pytest.mark.parametrize("keep_masses", [True, False])
@pytest.mark.parametrize("bits_per_pass", [1, 2, 3, 4])
def test_every_number_of_bits_per_pass_finds_the_same_threshold(bits_per_pass, keep_masses):
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**31, (200, 20)) >> rng.integers(0, 28, (200, 1))
    bits = bits.astype(np.uint32)
    bits[bits > np.float32(3e38).view(np.uint32)] >>= 1  # neither infinite nor no number
    mass_of = lambda z: 1 / (1 - z)
    mass, goal = mass_of(-bits.view(np.float32)), rng.random(200, np.float32) * 9
    found = token_sampling._lowest_with_mass(
        mass_of,
        jnp.asarray(bits),
        jnp.asarray(goal),
        bits_per_pass=bits_per_pass,
        keep_masses=keep_masses,
    )
    for row, m, g, n in zip(bits, mass, goal, np.asarray(found), strict=True):
        enough = [b for b in sorted(row) if m[row <= b].sum() >= g]
        assert n == enough[0] if enough else n >= 2**31 - 1


def test_new_values_compile_nothing_and_a_filter_that_is_off_has_no_program():
    run = jax.jit(lambda *args: token_sampling.sample_tokens(*args))

    def programs(temperature, top_k, top_p, min_p):
        off = np.zeros(V, bool)
        controls = token_sampling.make_controls(temperature, top_k, top_p, min_p, off)
        run(jnp.zeros((2, V)), jnp.zeros(2), controls)
        return run._cache_size()

    assert programs(1.0, 0, 1.0, 0.0) == programs(0.7, 0, 1.0, 0.0) == 1
    assert programs(0.7, 5, 0.9, 0.1) == programs(0.8, 6, 0.8, 0.2) == 2
    assert programs(0.0, 0, 1.0, 0.0) == 3


def test_a_vocabulary_of_152064_tokens():
    row = logits(2, 152_064)
    p = exact(row, top_p=0.9)
    tokens, logps, _ = sample(
        row, np.random.default_rng(0).random(64).astype(np.float32), top_p=0.9
    )
    assert (p[tokens] > 0).all()
    np.testing.assert_allclose(logps, np.log(p[tokens]), atol=1e-4)


def test_a_vocabulary_without_an_allowed_token_is_refused():
    with pytest.raises(ValueError, match="every token"):
        token_sampling.make_controls(1.0, 0, 1.0, 0.0, np.ones(V, bool))


def test_devices_that_share_the_vocabulary_do_not_fetch_all_of_it():
    """The vocabulary is no whole number of blocks on each device; some blocks have no weight."""
    weights = np.random.default_rng(0).random((8, 1100), np.float32)
    weights[:, 128:640] = weights[:, 1000:] = 0
    uniform = np.linspace(0, 0.999, 8, dtype=np.float32)
    mesh = sharding.make_mesh(1, 2, 4)
    placed = jax.device_put(weights, NamedSharding(mesh, PartitionSpec(("data", "fsdp"), "model")))
    with jax.set_mesh(mesh):
        program = jax.jit(token_sampling.invert_cumulative).lower(placed, uniform).compile()
    kinds = r"= (\w+\[[\d,]*\])\S* (?:all-gather|all-to-all|all-reduce)\("
    sizes = [hlo.shape_bytes(shape) for shape in re.findall(kinds, program.as_text())]
    assert 0 < max(sizes) <= 4 * 4 * 128  # a block of each of the 4 rows of a device
    for found, wanted in zip(
        program(placed, uniform), token_sampling.invert_cumulative(weights, uniform), strict=True
    ):
        np.testing.assert_allclose(found, wanted, rtol=1e-6)
    assert (weights[np.arange(8), np.asarray(program(placed, uniform)[0])] > 0).all()
