"""DER and DER++ by an independent formula; with alpha = 0, DER++ is experience replay."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from memory_helpers import log_softmax, random_batch
from stage_fixtures import method_config, train_all_stages

from cptjax.models import logprobs
from cptjax.training.algorithms.continual_learning.der import DER, DERPP
from cptjax.training.algorithms.objective import MemoryObjective

K = 3


def kept_and_rest(logps, ids):
    """Log-probabilities of the tokens `ids`, then of all others together."""
    kept = np.take_along_axis(logps, ids, -1)
    return np.concatenate([kept, np.log(1 - np.exp(kept).sum(-1, keepdims=True))], -1)


def stored_batch(seed):
    """A random batch with the outputs of another model, and these by hand."""
    hidden, unembed, _ = random_batch(seed + 100)
    logps = log_softmax(hidden @ unembed)
    ids = np.argsort(-logps, -1)[..., :K]
    stored = kept_and_rest(logps, ids)
    extra = {"memory_ids": jnp.asarray(ids), "memory_logps": jnp.asarray(stored, jnp.float16)}
    return *random_batch(seed, **extra), ids, stored


@pytest.mark.parametrize("chunk", [4, 100])
def test_stored_outputs_are_the_likeliest_tokens_and_the_rest(chunk):
    hidden, unembed, _ = random_batch(1)
    flat, expected = hidden.reshape(-1, 4), log_softmax(hidden @ unembed).reshape(-1, 11)
    ids, logps = logprobs.top_logps(flat, unembed, k=K, chunk=chunk)
    assert np.array_equal(ids, np.argsort(-expected, -1)[:, :K])
    np.testing.assert_allclose(logps, kept_and_rest(expected, np.array(ids)), rtol=1e-4, atol=1e-5)
    kl = lambda h: logprobs.stored_kl(h, unembed, ids, logps, chunk=chunk).sum()
    value, gradient = jax.value_and_grad(kl)(flat)  # the model that stored them
    assert abs(value) < 1e-5 and np.abs(gradient).max() < 1e-5


@pytest.mark.parametrize("seed", range(4))
def test_the_loss_is_the_divergence_from_the_stored_distribution(seed):
    hidden, unembed, batch, ids, stored = stored_batch(seed)
    logps = log_softmax(hidden @ unembed)
    kl = (np.exp(stored) * (stored - kept_and_rest(logps, ids))).sum(-1)
    nll = -np.take_along_axis(logps, np.array(batch.targets)[..., None], 2)[..., 0]
    mask = np.array(batch.mask)
    loss = lambda method: MemoryObjective(method, chunk=4)(hidden, unembed, batch)
    # The stored numbers have 11 bits.
    np.testing.assert_allclose(loss(DER(rows=1, alpha=0.7)).sum, 0.7 * kl[mask].sum(), rtol=3e-3)
    both = 0.7 * kl[mask].sum() + 0.2 * nll[mask].sum()
    np.testing.assert_allclose(loss(DERPP(rows=1, alpha=0.7, beta=0.2)).sum, both, rtol=3e-3)
    assert kl[mask].min() > 0


def test_the_divergence_has_the_gradient_of_its_formula():
    """The gradient by a logit z is p(z) - stored(z), where the rest shares its part by p."""
    hidden, unembed, batch, ids, stored = stored_batch(7)
    value = lambda h: MemoryObjective(DER(rows=1, alpha=1.0), chunk=100)(h, unembed, batch).sum
    p = np.exp(log_softmax(hidden @ unembed))
    target = p * np.exp(stored[..., -1:]) / (1 - np.take_along_axis(p, ids, -1).sum(-1))[..., None]
    np.put_along_axis(target, ids, np.exp(stored[..., :-1]), -1)
    expected = (p - target) @ unembed.T * np.array(batch.mask)[..., None]
    np.testing.assert_allclose(jax.grad(value)(hidden), expected, atol=2e-3)


def test_der_pp_without_alpha_equals_er_bit_for_bit(tmp_path):
    ends = {}
    for replay in (
        dict(name="er", coef=0.5),
        dict(name="derpp", alpha=0.0, beta=0.5, top_k=4),
    ):
        method = dict(replay=replay | dict(rows=6, tokens=8, batch=4))
        c = method_config("sft", stages=2, method=method, train=dict(lr=1e-2))
        _, end, lines = train_all_stages(c, tmp_path / replay["name"])
        steps = [line for line in lines if "event" not in line]
        ends[replay["name"]] = end, [line.get("memory/loss") for line in steps]
    (er, losses), (same, others) = ends["er"], ends["derpp"]
    assert losses == others and losses[:2] == [None, None] and losses[2] > 0
    leaves = map(jax.tree.leaves, (er.params, same.params))
    assert all(np.array_equal(a, b) for a, b in zip(*leaves, strict=True))
    for name, array in er.kept["er"].items():
        assert np.array_equal(array, same.kept["derpp"][name])
