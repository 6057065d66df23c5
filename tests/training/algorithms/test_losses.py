"""Losses against plain loops, and known facts about their gradients."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cptjax.training.algorithms import losses
from cptjax.training.algorithms.advantages import compute_advantages
from cptjax.training.algorithms.losses import LossConfig

B, R = 6, 5
pytestmark = pytest.mark.usefixtures("no_broadcast")


SETTINGS = dataclasses.replace(
    LossConfig.plain("policy", chunk=4),
    clip_low=0.2,
    clip_high=0.3,
    clip_dual=3.0,
    kl_limit=10.0,
    fixed_length=7,
)


def changed(**settings):
    return dataclasses.replace(SETTINGS, **settings)


def policy_loss(logps, old, ref, adv, mask, tis=None, entropy=None, **settings):
    return losses.policy_loss(
        logps, old, ref, adv, mask, changed(**settings), tis=tis, entropy=entropy
    )


def sft_loss(logps, mask, segments=None, weights=None, ref_logps=None, **settings):
    return losses.sft_loss(
        logps,
        mask,
        changed(objective="sft", **settings),
        segments=segments,
        weights=weights,
        ref_logps=ref_logps,
    )


def estimate_kl(logps, ref, estimator="k3", limit=10.0):
    return losses.estimate_kl(logps, ref, estimator, limit)


def random_arrays(seed=0, spread=0.4):
    rng = np.random.default_rng(seed)
    logps, old, ref = (-1 - spread * rng.random((B, R)).astype(np.float32) * k for k in (1, 2, 3))
    lengths = rng.integers(1, R + 1, B)
    return logps, old, ref, rng.normal(size=B).astype(np.float32), np.arange(R) < lengths[:, None]


def loop(
    logps,
    old,
    ref,
    adv,
    mask,
    *,
    ratio,
    normalise,
    kl_coef=0.0,
    kl="k3",
    low=0.2,
    high=0.3,
    dual=3.0,
    fixed=7,
):
    """The same loss, one token at a time in Python floats."""
    total, tokens = 0.0, 0
    for i in range(len(adv)):
        steps = [t for t in range(mask.shape[1]) if mask[i, t]]
        mean = sum(float(logps[i, t] - old[i, t]) for t in steps) / len(steps)
        for t in steps:
            d, a = float(logps[i, t] - old[i, t]), float(adv[i])
            r = math.exp(mean if ratio == "sequence" else d)
            held = min(max(r, 1 - low), 1 + high)
            if ratio == "none":
                value = -a
            elif ratio == "cispo":
                value = -held * a
            else:
                value = -min(r * a, held * a)
                value = min(value, -dual * a) if a < 0 and dual else value
            e = float(logps[i, t] - ref[i, t])
            value += kl_coef * {"k2": e * e / 2, "k3": math.exp(-e) - 1 + e}[kl]
            total += value / (len(steps) if normalise == "sequence" else 1)
            tokens += 1
    return total, {"token": tokens, "sequence": len(adv), "fixed": len(adv) * fixed}[normalise]


@pytest.mark.parametrize("normalise", losses.NORMALISERS)
@pytest.mark.parametrize("ratio", losses.RATIOS)
def test_policy_against_loops(ratio, normalise):
    for seed in range(10):
        arrays = random_arrays(seed, spread=1.5)
        got = policy_loss(
            *arrays,
            ratio=ratio,
            normalise=normalise,
            kl_coef=0.1,
            kl_estimator="k3",
        )
        np.testing.assert_allclose(
            got[:2], loop(*arrays, ratio=ratio, normalise=normalise, kl_coef=0.1), rtol=1e-5
        )
    got = policy_loss(
        *arrays,
        ratio=ratio,
        normalise=normalise,
        kl_coef=0.1,
        kl_estimator="k2",
        clip_dual=None,
    )
    np.testing.assert_allclose(
        got[:2],
        loop(*arrays, ratio=ratio, normalise=normalise, kl_coef=0.1, kl="k2", dual=None),
        rtol=1e-5,
    )


LOG_RATIOS = np.array([[0.5, 0.1, 0.0], [-0.5, 0.3, np.nan]], np.float32)
THERE = np.array([[1, 1, 1], [1, 1, 0]], bool)
SURROGATES = {
    "none": [[-1, -1, -1], [1, 1, 0]],
    "token": [[-1.3, -1.10517, -1], [0.8, 1.34986, 0]],
    "sequence": [[-1.2214, -1.2214, -1.2214], [0.90484, 0.90484, 0]],
    "cispo": [[-1.3, -1.10517, -1], [0.8, 1.3, 0]],
}
DIVERGENCES = {
    "k1": [[0.5, 0.1, 0], [-0.5, 0.3]],
    "k2": [[0.125, 0.005, 0], [0.125, 0.045]],
    "k3": [[0.10653, 0.00484, 0], [0.14872, 0.04082]],
}
WEIGHTS = {
    "token": ([[1, 1, 1], [1, 1, 0]], 5),
    "sequence": ([[1 / 3, 1 / 3, 1 / 3], [1 / 2, 1 / 2, 0]], 2),
    "fixed": ([[1, 1, 1], [1, 1, 0]], 8),
}


def test_the_literals_of_the_docstring():
    only = np.eye(6, dtype=np.float32).reshape(
        6, 2, 3
    )  # an importance weight of 1 on a single token leaves that token's share
    for ratio, want in SURROGATES.items():
        arrays = (
            LOG_RATIOS - 1,
            np.full((2, 3), -1, np.float32),
            None,
            np.array([1, -1], np.float32),
            THERE,
        )
        got = [policy_loss(*arrays, ratio=ratio, tis=tis).sum for tis in only]
        np.testing.assert_allclose(np.reshape(got, (2, 3)), want, atol=1e-5, err_msg=ratio)
    for kind, want in DIVERGENCES.items():
        got = np.asarray(estimate_kl(LOG_RATIOS, np.zeros((2, 3), np.float32), kind))
        np.testing.assert_allclose(got[THERE], np.concatenate(want), atol=1e-5, err_msg=kind)
    for normalise, (want, count) in WEIGHTS.items():
        weight, counted = losses.token_weights(THERE, changed(normalise=normalise, fixed_length=4))
        np.testing.assert_allclose(np.where(THERE, weight, 0), want, rtol=1e-6, err_msg=normalise)
        assert counted == count


def test_a_group_by_hand():
    """Responses of 2 and 1 tokens, advantages 1 and -1, ratios e^.5, 1, e^-.5: clip at 1.3 and 0.8."""
    mask = jnp.array([[True, True], [True, False]])
    logps = jnp.array([[0.5, 0.0], [-0.5, 9.0]]) - 1
    loss = policy_loss(
        logps, jnp.full((2, 2), -1.0), None, jnp.array([1.0, -1.0]), mask, ratio="token"
    )
    np.testing.assert_allclose(loss.sum, -1.3 - 1.0 + 0.8, rtol=1e-6)
    assert loss.count == 3
    got = {k: float(v.value) for k, v in loss.metrics.items()}
    want = {
        "ratio_min": math.exp(-0.5),
        "ratio_max": math.exp(0.5),
        "clip_low": 1 / 3,
        "clip_high": 1 / 3,
        "clip_dual": 0,
    }
    assert got == pytest.approx(want)


def test_dual_clip_bounds_a_bad_response_that_became_likely():
    one = jnp.ones((1, 1), bool)
    loss = lambda dual: policy_loss(
        jnp.full((1, 1), -1.0),
        jnp.full((1, 1), -3.0),
        None,
        -jnp.ones(1),
        one,
        ratio="token",
        clip_dual=dual,
    )
    np.testing.assert_allclose([loss(3.0).sum, loss(None).sum], [3.0, math.exp(2)], rtol=1e-6)
    assert loss(3.0).metrics["clip_dual"].value == 1


@pytest.mark.parametrize("ratio", losses.RATIOS)
def test_on_policy_every_ratio_is_one_and_nothing_is_clipped(ratio):
    logps, _, _, adv, mask = random_arrays()
    for old in (logps, None):
        metrics = policy_loss(logps, old, None, adv, mask, ratio=ratio).metrics
        assert metrics["ratio_min"].value == metrics["ratio_max"].value == 1
        assert all(m.value == 0 for name, m in metrics.items() if name.startswith("clip"))


@pytest.mark.parametrize("ratio", losses.RATIOS)
def test_on_policy_all_ratios_have_the_gradient_of_reinforce(ratio):
    logps, _, _, adv, mask = random_arrays()
    grad = jax.grad(
        lambda x: policy_loss(x, logps, None, adv, mask, ratio=ratio, normalise="sequence").sum
    )(logps)
    np.testing.assert_allclose(
        grad, np.where(mask, -adv[:, None] / mask.sum(1, keepdims=True), 0), rtol=1e-5
    )


def test_cispo_keeps_a_gradient_where_clipping_ends_it():
    mask, old, adv = jnp.ones((1, 1), bool), jnp.full((1, 1), -2.0), jnp.ones(1)
    slope = lambda ratio: float(
        jax.grad(lambda x: policy_loss(x, old, None, adv, mask, ratio=ratio).sum)(
            jnp.full((1, 1), -1.0)
        ).item()
    )
    assert slope("token") == 0
    assert slope("cispo") == pytest.approx(-1.3)


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo", "batch"])
@pytest.mark.parametrize("ratio", losses.RATIOS)
def test_a_group_of_equal_rewards_has_exactly_no_policy_gradient(ratio, name):
    logps, old, ref, _, mask = random_arrays()
    adv = compute_advantages(np.full((2, 3), 0.9, np.float32), name).reshape(-1)
    grad = lambda **kw: jax.grad(
        lambda x: policy_loss(x, old, ref, adv, mask, ratio=ratio, **kw).sum
    )(logps)
    assert not np.any(grad())
    assert np.any(grad(kl_coef=0.1))  # the divergence still pulls


def test_remax_has_a_gradient_on_equal_rewards_when_greedy_differs():
    logps, old, _, _, mask = random_arrays()
    adv = compute_advantages(
        np.ones((2, 3), np.float32), "remax", greedy=np.zeros(2, np.float32)
    ).reshape(-1)
    assert np.any(jax.grad(lambda x: policy_loss(x, old, None, adv, mask).sum)(logps))


def test_grpo_on_policy_is_zero_in_value_but_not_in_gradient():
    logps, _, _, _, mask = random_arrays()
    adv = compute_advantages(np.array([[1, 0, 0], [1, 1, 0]], np.float32), "grpo").reshape(-1)
    for ratio in losses.RATIOS:
        value, grad = jax.value_and_grad(
            lambda x, r=ratio: (
                policy_loss(x, logps, None, adv, mask, ratio=r, normalise="sequence").sum
            )
        )(logps)
        assert abs(value) < 1e-6 and np.abs(grad).max() > 0.1


def test_estimators_of_the_divergence():
    d = jnp.linspace(-3, 3, 61)
    k1, k2, k3 = (estimate_kl(d, jnp.zeros(61), k, None) for k in losses.KL_ESTIMATORS)
    np.testing.assert_allclose(k1, d)
    np.testing.assert_allclose(k2, np.square(d) / 2, rtol=1e-6)
    np.testing.assert_allclose(k3, np.exp(-d) - 1 + d, rtol=1e-4, atol=1e-6)
    small = jnp.asarray(
        np.random.default_rng(0).normal(size=10000) * 10.0 ** np.linspace(-9, 1, 10000), jnp.float32
    )
    assert np.all(estimate_kl(small, jnp.zeros(10000), "k3", None) >= 0)
    assert estimate_kl(jnp.float32(0), jnp.float32(0)) == 0
    assert estimate_kl(jnp.array(-9.0), jnp.array(0.0)) == 10
    assert jnp.isfinite(estimate_kl(jnp.array(-900.0), jnp.array(0.0), "k3", None))


def test_expected_gradients_of_the_estimators():
    """Mean gradients: k1 has 0, k2 that of KL(policy || ref), k3 that of KL(ref || policy)."""
    z, ref = jnp.array([0.3, -0.2, 0.5]), jax.nn.log_softmax(jnp.array([0.0, 1.0, -1.0]))
    p = jax.nn.softmax(z)
    mean = lambda kind: jax.grad(
        lambda z: jnp.sum(p * estimate_kl(jax.nn.log_softmax(z), ref, kind, None))
    )(z)
    reverse = jax.grad(lambda z: jnp.sum(jax.nn.softmax(z) * (jax.nn.log_softmax(z) - ref)))(z)
    forward = jax.grad(lambda z: jnp.sum(jnp.exp(ref) * (ref - jax.nn.log_softmax(z))))(z)
    np.testing.assert_allclose(mean("k1"), 0, atol=1e-6)
    np.testing.assert_allclose(mean("k2"), reverse, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(mean("k3"), forward, rtol=1e-4, atol=1e-6)


POLICY_SETTINGS = [
    {"ratio": r, "normalise": n} for r, n in itertools.product(losses.RATIOS, losses.NORMALISERS)
]


def gradient(arrays, **settings):
    logps, old, ref, adv, mask = arrays
    f = lambda x: (
        (loss := policy_loss(x, old, ref, adv, mask, kl_coef=0.1, **settings)).sum / loss.count
    )
    return np.asarray(jax.grad(f)(logps))


@pytest.mark.parametrize(
    "settings", POLICY_SETTINGS, ids=lambda s: f"{s['ratio']}-{s['normalise']}"
)
def test_padding_changes_nothing(settings):
    arrays = random_arrays()
    wide = [
        np.pad(x, ((0, 2), (0, 3)), constant_values=0 if x.dtype == bool else np.nan)
        for x in (*arrays[:3], arrays[4])
    ]
    wide.insert(3, np.pad(arrays[3], (0, 2)))
    want, got = (policy_loss(*x, kl_coef=0.1, **settings) for x in (arrays, wide))
    np.testing.assert_allclose(got[:2], want[:2], rtol=1e-6)
    assert all(np.allclose(got.metrics[k].value, m.value) for k, m in want.metrics.items())
    grad = gradient(wide, **settings)
    np.testing.assert_allclose(grad[:B, :R], gradient(arrays, **settings), rtol=1e-5, atol=1e-8)
    assert not np.any(grad[B:]) and not np.any(grad[:, R:])


@pytest.mark.parametrize(
    "settings", POLICY_SETTINGS, ids=lambda s: f"{s['ratio']}-{s['normalise']}"
)
def test_micro_batches_and_order_change_nothing(settings):
    arrays = random_arrays()
    run = lambda rows: policy_loss(*(x[rows] for x in arrays), kl_coef=0.1, **settings)
    whole, parts, mixed = (
        run(np.arange(B)),
        [run(np.arange(i, i + 2)) for i in (0, 2, 4)],
        run(np.array([3, 1, 5, 0, 4, 2])),
    )
    for other in ((sum(p.sum for p in parts), sum(p.count for p in parts)), mixed[:2]):
        np.testing.assert_allclose(other, whole[:2], rtol=1e-5)
    metrics = losses.combine_metrics(
        losses.combine_metrics(parts[0].metrics, parts[1].metrics), parts[2].metrics
    )
    assert all(np.allclose(metrics[k].value, m.value, rtol=1e-5) for k, m in whole.metrics.items())


def test_packed_conversations_have_the_weights_they_have_alone():
    logps = -np.arange(1.0, 9.0, dtype=np.float32)
    mask = np.array([1, 1, 0, 1, 1, 1, 0, 0], bool)
    segments = np.array([1, 1, 2, 2, 2, 2, 3, 0])  # the third has no token to train on
    rows = lambda x: np.stack([np.pad(x[:2], (0, 2)), x[2:6]])
    for normalise in losses.NORMALISERS:
        packed = sft_loss(
            logps[None], mask[None], normalise=normalise, fixed_length=5, segments=segments[None]
        )
        alone = sft_loss(rows(logps), rows(mask), normalise=normalise, fixed_length=5)
        np.testing.assert_allclose(packed[:2], alone[:2], rtol=1e-6)
    np.testing.assert_allclose(
        sft_loss(rows(logps), rows(mask), normalise="sequence").sum, 1.5 + 5.0
    )


def test_eaft_scales_tokens_and_leaves_the_count_alone():
    logps, mask = jnp.full((1, 3), -2.0), jnp.array([[True, True, False]])
    weights = jnp.array([[0.5, 0.0, jnp.nan]])
    loss, grad = jax.value_and_grad(lambda x: sft_loss(x, mask, weights=weights).sum)(logps)
    np.testing.assert_allclose(loss, 1.0)
    np.testing.assert_allclose(grad, [[-0.5, 0, 0]])
    assert sft_loss(logps, mask, weights=weights).count == 2


def test_sft_with_a_reference():
    logps, _, ref, _, mask = random_arrays()
    plain, pulled = (
        sft_loss(logps, mask),
        sft_loss(logps, mask, ref_logps=ref, kl_coef=0.5, kl_estimator="k2"),
    )
    np.testing.assert_allclose(
        pulled.sum - plain.sum, 0.5 * np.sum(np.square(logps - ref)[mask] / 2), rtol=1e-4
    )


def test_distillation_leaves_out_the_first_tokens_of_each_response():
    kl = jnp.arange(8.0).reshape(2, 4)
    mask = jnp.array([[False, True, True, True], [True, True, False, False]])
    loss = losses.distill_loss(kl, mask, changed(objective="distill", skip_tokens=1))
    assert (loss.sum, loss.count) == (2 + 3 + 5, 3)


def test_entropy_bonus_and_importance_weights():
    logps, old, _, adv, mask = random_arrays()
    entropy = jnp.asarray(np.where(mask, 2.0, np.nan))
    plain = policy_loss(logps, old, None, adv, mask, ratio="token")
    bonus = policy_loss(
        logps, old, None, adv, mask, ratio="token", entropy=entropy, entropy_coef=0.1
    )
    np.testing.assert_allclose(bonus.sum, plain.sum - 0.2 * mask.sum(), rtol=1e-5)
    tis = losses.tis_weights(old, old - np.float32(1.0), mask, cap=2.0)
    np.testing.assert_array_equal(tis, np.where(mask, 2.0, 0))
    np.testing.assert_allclose(
        policy_loss(logps, old, None, adv, mask, ratio="token", tis=tis).sum,
        2 * plain.sum,
        rtol=1e-5,
    )
    np.testing.assert_allclose(
        losses.tis_weights(old, old + np.float32(1.0), mask, cap=2.0)[mask], math.exp(-1), rtol=1e-5
    )


def test_mismatch_and_divergence_in_the_reward():
    logps, old, ref, adv, mask = random_arrays()
    metrics = losses.mismatch_metrics(logps, np.where(mask, old, -np.inf), mask)
    assert metrics["mismatch"].value == pytest.approx(np.abs(logps - old)[mask].mean(), rel=1e-5)
    assert metrics["mismatch_max"].value == pytest.approx(np.abs(logps - old)[mask].max(), rel=1e-5)
    want = adv - 0.1 * np.where(mask, logps - ref, 0).sum(1)
    np.testing.assert_allclose(
        losses.subtract_kl(adv, logps, ref, mask, changed(kl_coef=0.1, kl_estimator="k1")),
        want,
        rtol=1e-5,
        atol=1e-6,
    )


# A policy over 3 tokens that can be enumerated: token 0 ends a response, the second token depends
# on the first.
SEQUENCES = np.array([[0, 0]] + [[a, b] for a in (1, 2) for b in range(3)])
MASKS = np.array([[True, s[0] != 0] for s in SEQUENCES])
TOY_REWARDS = np.array([0.2, 1, 0, 0, 0.5, 0, 1], np.float32)
TOY = jnp.asarray(
    np.random.default_rng(3).normal(size=(4, 3)), jnp.float32
)  # row 0: first token; row 1 + a: after a


def toy_logps(table, tokens):
    logp = jax.nn.log_softmax(table)
    return jnp.stack([logp[0, tokens[:, 0]], logp[1 + tokens[:, 0], tokens[:, 1]]], 1)


def toy_probabilities(table):
    return jnp.exp(jnp.sum(jnp.where(MASKS, toy_logps(table, SEQUENCES), 0), 1))


EXACT = np.asarray(jax.grad(lambda t: jnp.sum(toy_probabilities(t) * TOY_REWARDS))(TOY))


@pytest.mark.parametrize("baseline", [0.0, 0.7])
@pytest.mark.parametrize("ratio", losses.RATIOS)
def test_the_gradient_is_that_of_the_expected_reward_by_enumeration(ratio, baseline):
    p = toy_probabilities(TOY)
    np.testing.assert_allclose(p.sum(), 1, rtol=1e-6)
    old = toy_logps(TOY, SEQUENCES)
    loss = lambda t: (
        policy_loss(
            toy_logps(t, SEQUENCES), old, None, p * (TOY_REWARDS - baseline), MASKS, ratio=ratio
        ).sum
    )
    np.testing.assert_allclose(-jax.grad(loss)(TOY), EXACT, atol=1e-6)


@pytest.mark.parametrize("name", ["reinforce", "rloo", "remax", "dr_grpo"])
def test_sampled_gradients_average_to_the_enumerated_one(name):
    """8,192 groups of 4; within 5 standard errors of each table entry.

    A group mean that includes the response scales by (G-1)/G.
    """
    groups, g = 8192, 4
    sampled = np.asarray(
        jax.random.choice(jax.random.key(0), len(SEQUENCES), (groups, g), p=toy_probabilities(TOY))
    )
    first = int(jnp.argmax(TOY[0]))
    greedy = [first, int(jnp.argmax(TOY[1 + first]))] if first else [0, 0]
    baseline = np.full(groups, TOY_REWARDS[SEQUENCES.tolist().index(greedy)], np.float32)
    adv = compute_advantages(
        TOY_REWARDS[sampled], name, greedy=baseline if name == "remax" else None
    )

    def one(tokens, mask, a):
        grad = jax.grad(lambda t: policy_loss(toy_logps(t, tokens), None, None, a, mask).sum)(TOY)
        return -grad / g

    with jax.numpy_rank_promotion("allow"):
        grads = np.asarray(
            jax.jit(jax.vmap(one))(SEQUENCES[sampled], MASKS[sampled], adv), np.float64
        )
    error = grads.std(0, ddof=1) / math.sqrt(groups)
    scale = (g - 1) / g if name == "dr_grpo" else 1
    assert np.all(np.abs(grads.mean(0) - scale * EXACT) < 5 * error + 1e-6)
    assert np.abs(EXACT).max() > 20 * error.max()  # the test would see a wrong sign or scale


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"objective": "dpo"}, "policy, sft, eaft, dft, distill"),
        ({"ratio": "tokens"}, "none, token, sequence, cispo"),
        ({"normalise": "mean"}, "token, sequence, fixed"),
        ({"kl_estimator": "k4"}, "k1, k2, k3"),
        ({"kl_place": "advantage"}, "loss, reward"),
        ({"clip_low": 1.0}, "0 <= clip_low < 1"),
        ({"clip_high": -0.1}, "0 or more"),
        ({"clip_dual": 1.0}, "above 1, or None"),
        ({"kl_coef": -0.01}, "0 .no reference model. or more"),
        ({"kl_coef": 0.01, "kl_estimator": "k1"}, "choose k2 or k3"),
        ({"tis_cap": 0.0}, "above 0, or None"),
        ({"entropy_coef": -1.0}, "0 or more"),
        ({"normalise": "fixed", "fixed_length": 0}, "fixed_length=0: expected at least 1"),
        ({"kl_limit": 0.0}, "kl_limit=0.0: expected a number of nats above 0"),
    ],
)
def test_bad_settings_are_one_clear_line(settings, words):
    with pytest.raises(ValueError, match=words) as error:
        changed(**settings).validate()
    assert "\n" not in str(error.value)


def test_a_loss_refuses_missing_inputs():
    logps, old, _, adv, mask = random_arrays()
    for settings, words in [
        ({"kl_coef": 0.1}, "reference"),
        ({"entropy_coef": 0.1}, "entropy of each token"),
    ]:
        with pytest.raises(ValueError, match=words):
            policy_loss(logps, old, None, adv, mask, **settings)
    changed(kl_coef=0.1, kl_estimator="k1", kl_place="reward").validate()
