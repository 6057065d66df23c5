"""A stage's loss from hidden states: each term against numpy, and the settings it uses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cptjax.models.logprobs import target_logps, token_logps
from cptjax.training.algorithms.continual_learning.lwf import LwF
from cptjax.training.algorithms.losses import LossConfig
from cptjax.training.algorithms.objective import Objective
from cptjax.types import Batch

B, A, D, V = 3, 4, 5, 24
RNG = np.random.default_rng(0)
HIDDEN, UNEMBED = (
    RNG.normal(size=(B, A, D)).astype(np.float32),
    RNG.normal(size=(D, V)).astype(np.float32),
)
TARGETS = RNG.integers(0, V, (B, A))
MASK = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]], bool)
ADVANTAGES = np.array([1.0, -0.5, 2.0], np.float32)


CLIPS = dict(clip_low=0.2, clip_high=0.3, clip_dual=3.0, kl_limit=10.0)


def objective_of(objective, **settings):
    """The objective with this loss, by chunks of four tokens."""
    plain = LossConfig.plain(objective, chunk=4)
    return Objective(dataclasses.replace(plain, **(CLIPS | settings)))


def changed(objective, **settings):
    return Objective(dataclasses.replace(objective.config, **settings))


def numbers(temperature=1.0, hidden=HIDDEN):
    """Log-probabilities [B A V], the targets' [B A] and the entropy [B A], in float64."""
    z = hidden.astype(np.float64) @ UNEMBED / temperature
    p = z - np.logaddexp.reduce(z, -1, keepdims=True)
    return p, np.take_along_axis(p, TARGETS[..., None], -1)[..., 0], -(np.exp(p) * p).sum(-1)


def batch(**extra):
    arrays = {"advantages": ADVANTAGES, "sampler_logps": np.where(MASK, numbers()[1], 0)} | extra
    return Batch(
        None,
        jnp.asarray(TARGETS),
        jnp.asarray(MASK),
        None,
        {k: jnp.asarray(v, jnp.float32) for k, v in arrays.items()},
    )


def run(objective, data, hidden=HIDDEN):
    """Loss and its gradient with respect to the hidden states."""

    def value(h):
        loss = objective(h, jnp.asarray(UNEMBED), data)
        return loss.sum / loss.count, loss

    (value, loss), gradient = jax.value_and_grad(value, has_aux=True)(jnp.asarray(hidden))
    return float(value), np.asarray(gradient), {k: v.value for k, v in loss.metrics.items()}


def direction(temperature=1.0):
    """Gradient [B A D] of each target's log-probability."""
    p, _, _ = numbers(temperature)
    return (np.eye(V)[TARGETS] - np.exp(p)) @ UNEMBED.T / temperature


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_policy_gradient_is_that_of_the_sampled_distribution(temperature):
    objective = objective_of("policy", temperature=temperature)
    _, gradient, metrics = run(objective, batch())
    want = -ADVANTAGES[:, None, None] * direction(temperature) * MASK[..., None] / MASK.sum()
    np.testing.assert_allclose(gradient, want, atol=1e-6)
    assert metrics["ratio_min"] == metrics["ratio_max"] == 1
    np.testing.assert_allclose(metrics["entropy"], numbers(temperature)[2][MASK].mean(), rtol=1e-5)


@pytest.mark.parametrize("ratio", ["none", "token", "sequence", "cispo"])
def test_on_policy_ratio_is_exactly_one_and_nothing_is_clipped(ratio):
    objective = objective_of("policy", ratio=ratio)
    old = target_logps(jnp.asarray(HIDDEN), jnp.asarray(UNEMBED), batch(), 4)
    _, gradient, metrics = run(objective, batch(old_logps=old))
    assert (
        metrics["ratio_min"] == metrics["ratio_max"] == 1
        and metrics.get("clip_low", 0) == metrics.get("clip_high", 0) == 0
    )
    np.testing.assert_allclose(gradient, run(objective_of("policy"), batch())[1], atol=1e-6)


def test_stale_responses_have_a_ratio_and_a_capped_weight():
    old, behaviour = numbers()[1] - 0.3, numbers()[1] - 0.3 - np.log(3)
    wide = objective_of("policy", ratio="token", clip_high=10.0)
    stale = batch(old_logps=old, behaviour_logps=behaviour)
    _, plain, metrics = run(wide, stale)
    np.testing.assert_allclose(metrics["ratio_max"], np.exp(0.3), rtol=1e-5)
    _, capped, _ = run(changed(wide, tis_cap=2.0), stale)
    np.testing.assert_allclose(capped, 2 * plain, atol=1e-6)  # policy / behaviour is 3, the cap 2
    _, free, _ = run(changed(wide, tis_cap=9.0), stale)
    np.testing.assert_allclose(free, 3 * plain, rtol=1e-4, atol=1e-6)
    once = run(objective_of("policy"), batch())[
        1
    ]  # without a ratio the weight leads from the sampler to the policy of now
    for cap, weight in ((9.0, 3 * np.exp(0.3)), (2.0, 2.0)):
        weighed = run(objective_of("policy", ratio="none", tis_cap=cap), stale)[1]
        np.testing.assert_allclose(weighed, weight * once, rtol=1e-4, atol=1e-6)


def test_entropy_bonus_pushes_entropy_up():
    coefficient = 0.1
    data = batch(advantages=np.zeros(B))
    value, gradient, _ = run(objective_of("policy", entropy_coef=coefficient), data)
    np.testing.assert_allclose(value, -coefficient * numbers()[2][MASK].mean(), rtol=1e-5)
    higher = numbers(hidden=HIDDEN - 0.1 * gradient.astype(np.float32))[2]
    assert higher[MASK].mean() > numbers()[2][MASK].mean()
    assert not run(objective_of("policy"), data)[
        1
    ].any()  # without it an equal-reward batch moves nothing


def test_limit_of_k3_is_a_setting():
    """Beyond the limit, a token has no gradient towards the reference; without a limit it has."""
    data = batch(advantages=np.zeros(B), ref_logps=numbers()[1] + 4.0)  # e^4 - 1 - 4 > 10
    base = dict(objective="policy", kl_coef=0.5, kl_estimator="k3")
    cut, whole = run(objective_of(**base), data), run(objective_of(**base, kl_limit=None), data)
    assert not cut[1].any() and cut[2]["kl"] == pytest.approx(10)
    np.testing.assert_allclose(whole[2]["kl"], np.exp(4) - 5, rtol=1e-4)
    np.testing.assert_allclose(
        whole[1],
        0.5 * (1 - np.exp(4)) * direction() * MASK[..., None] / MASK.sum(),
        rtol=1e-3,
        atol=1e-4,
    )


def test_sft_and_its_kl_term():
    value, gradient, metrics = run(objective_of("sft"), batch())
    np.testing.assert_allclose(value, -numbers()[1][MASK].mean(), rtol=1e-5)
    np.testing.assert_allclose(gradient, -direction() * MASK[..., None] / MASK.sum(), atol=1e-6)
    held = objective_of("sft", kl_coef=0.2, kl_estimator="k2")
    _, pulled, metrics = run(held, batch(ref_logps=numbers()[1] - 0.5))
    np.testing.assert_allclose(metrics["kl"], 0.125, rtol=1e-4)
    np.testing.assert_allclose(
        pulled, (-1 + 0.2 * 0.5) * direction() * MASK[..., None] / MASK.sum(), atol=1e-6
    )


def test_eaft_weighs_each_token_by_the_entropy_of_its_best():
    _, gradient, metrics = run(objective_of("eaft"), batch())
    plain = run(objective_of("sft"), batch())[1]
    weight = (gradient * plain).sum(-1) / (plain * plain).sum(-1).clip(1e-12)
    np.testing.assert_allclose(
        gradient, weight[..., None] * plain, atol=1e-6
    )  # the direction of every token stays
    assert (
        0 < weight[MASK].min()
        and weight[MASK].max() <= 1 + 1e-5
        and metrics["eaft_weight"] == pytest.approx(weight[MASK].mean(), rel=1e-4)
    )


def test_dft_weighs_each_token_by_its_probability_without_a_gradient_through_it():
    """The gradient of -p log p with p held equals that of -p, since p' = p (log p)'."""
    value, gradient, metrics = run(objective_of("dft"), batch())
    logps = np.take_along_axis(numbers()[0], TARGETS[..., None], -1)[..., 0][MASK]
    np.testing.assert_allclose(value, -(np.exp(logps) * logps).mean(), rtol=1e-4)
    assert metrics["dft_weight"] == pytest.approx(np.exp(logps).mean(), rel=1e-4)

    def minus_p(hidden):
        flat = hidden.reshape(-1, hidden.shape[-1])
        logps, _ = token_logps(flat, jnp.asarray(UNEMBED), TARGETS.reshape(-1), chunk=4)
        p = jnp.exp(logps)
        return -jnp.sum(jnp.where(MASK.reshape(-1), p, 0)) / MASK.sum()

    want = jax.grad(minus_p)(jnp.asarray(HIDDEN))
    np.testing.assert_allclose(gradient, want, atol=1e-6)


def test_distillation_from_the_student_itself_is_zero():
    data = batch(teacher_hidden=HIDDEN, teacher_unembed=UNEMBED)
    for way in ("forward", "reverse"):
        value, gradient, _ = run(objective_of("distill", direction=way), data)
        assert abs(value) < 1e-6 and np.abs(gradient).max() < 1e-6
    other = batch(teacher_hidden=HIDDEN[::-1].copy(), teacher_unembed=UNEMBED)
    ours, theirs = numbers()[0], numbers(hidden=HIDDEN[::-1])[0]
    for way, a, b in (("forward", theirs, ours), ("reverse", ours, theirs)):
        value, gradient, _ = run(objective_of("distill", direction=way), other)
        np.testing.assert_allclose(value, (np.exp(a) * (a - b)).sum(-1)[MASK].mean(), rtol=1e-4)
        assert np.abs(gradient).max() > 1e-3
    late = run(objective_of("distill", skip_tokens=2), other)[1]
    assert not late[:, :2].any() and late[:, 2:].any()


@pytest.mark.parametrize("kind", ["sft", "policy"])
def test_lwf_adds_a_divergence_that_starts_at_zero(kind):
    plain = objective_of(kind)
    held = dataclasses.replace(plain, methods=(LwF(0.7),))
    same = batch(teacher_hidden=HIDDEN, teacher_unembed=UNEMBED)
    assert run(held, same)[0] == pytest.approx(run(plain, same)[0], abs=1e-5)
    np.testing.assert_allclose(run(held, same)[1], run(plain, same)[1], atol=1e-6)
    other = batch(teacher_hidden=HIDDEN[::-1].copy(), teacher_unembed=UNEMBED)
    value, _, metrics = run(held, other)
    twice = dataclasses.replace(plain, methods=(LwF(1.4),))
    assert run(twice, other)[2]["lwf"] == pytest.approx(2 * metrics["lwf"])
    assert (
        value == pytest.approx(run(plain, other)[0] + metrics["lwf"], rel=1e-4)
        and metrics["lwf"] > 0.1
    )


def test_padding_changes_nothing():
    wide = lambda x: np.concatenate([x, np.full((B, 3, *x.shape[2:]), 2, x.dtype)], 1)
    data = batch()
    padded = Batch(
        None,
        jnp.asarray(wide(TARGETS)),
        jnp.asarray(np.pad(MASK, ((0, 0), (0, 3)))),
        None,
        data.extra | {"sampler_logps": jnp.asarray(wide(np.asarray(data.extra["sampler_logps"])))},
    )
    for kind in ("sft", "policy", "eaft"):
        value, gradient, _ = run(objective_of(kind), data)
        more, wider, _ = run(objective_of(kind), padded, wide(HIDDEN))
        assert more == pytest.approx(value, rel=1e-5, abs=1e-6)
        np.testing.assert_allclose(wider[:, :A], gradient, atol=1e-6)
        assert not wider[:, A:].any()
