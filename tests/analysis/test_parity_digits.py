"""The digits: labelings, losses and distances by their definitions, and the law in one small run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cptjax.analysis import parity_digits as toy
from cptjax.analysis.drift import QuadraticFit, StageDrift
from cptjax.analysis.finding import Finding

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def data():
    return toy.load_split_digits(0)


def test_splits_are_disjoint_and_labelings_tell_parity_and_digit(data):
    parts = (data.pretraining, data.training, data.test)
    assert [len(d) for _, d in parts] == [500, 800, 497]
    digits = jnp.arange(10)
    assert sorted(toy.other_labels(digits).tolist()) == list(range(10))
    assert (toy.right_answers(digits).sum(1) == 5).all()
    assert toy.right_answers(digits)[3].tolist() == [False, True] * 5


def test_the_policy_gradient_is_that_of_the_expected_reward(data):
    """Over many samples, minus the gradient of the probability of a right answer."""
    base = toy.init_network(jax.random.key(0))
    images, digits = (x[:4] for x in data.training)

    def with_bias(b):
        return [*base[:-1], base[-1] | {"b": b}]

    def right_share(b):
        p = jax.nn.softmax(toy.answer_logits(with_bias(b), images, True))
        return -(p * toy.right_answers(digits)).sum(-1).mean()

    def sampled_loss(b, key):
        return toy.policy_gradient_loss(with_bias(b), base, images, digits, key)

    keys = jax.random.split(jax.random.key(1), 1000)
    sampled = jax.jit(jax.vmap(jax.grad(sampled_loss), (None, 0)))(base[-1]["b"], keys)
    expected = jax.grad(right_share)(base[-1]["b"]) * (toy.SAMPLES - 1) / toy.SAMPLES
    error = np.asarray(sampled.std(0) / len(keys) ** 0.5)
    assert np.all(np.abs(np.asarray(sampled.mean(0) - expected)) < 5 * error)


def test_the_oracle_is_always_right_and_nearest_to_the_base_model(data):
    """Of the targets, its KL to the base model is smallest, -log p(right) per image."""
    base = toy.init_network(jax.random.key(2))
    images, digits = (x[:50] for x in data.training)
    p = jax.nn.softmax(toy.answer_logits(base, images, True))
    right = toy.right_answers(digits)
    entropy_of = lambda q: -(q * jnp.log(jnp.maximum(q, 1e-30))).sum(-1)
    kl = lambda q: (q * -jnp.log(p)).sum(-1) - entropy_of(q)
    oracle = jnp.where(right, p, 0) / jnp.where(right, p, 0).sum(-1, keepdims=True)
    loss = toy.target_loss("oracle", base, base, images, digits, jax.random.key(0))
    np.testing.assert_allclose(loss, (oracle * -jnp.log(p)).sum(-1).mean(), rtol=1e-5)
    np.testing.assert_allclose(kl(oracle), -jnp.log((p * right).sum(-1)), rtol=1e-4)
    assert (kl(oracle) <= kl(jax.nn.one_hot(digits % 2, 10))).all()


def test_distances_are_zero_at_the_base_model_and_grow(data):
    base = toy.init_network(jax.random.key(3))
    moved = jax.tree.map(lambda x: x * 1.1, base)
    zero, far = (toy.distances(base, p, data.test[0]) for p in (base, moved))
    assert all(abs(float(v)) < 1e-5 for v in zero.values())
    assert all(float(v) > 1e-3 for v in far.values())


def test_seeds_without_a_fit_or_a_matched_loss_are_left_out():
    drift = StageDrift("RL", "x", 1, 0.1, {"KL": 0.5})
    seeds = [
        {"RL": 0.1, "SFT-1": 0.3, "SFT-2": None, "oracle": 0.0},
        {"RL": 0.3, "SFT-1": None, "SFT-2": None, "oracle": 0.0},
    ]
    matched = [Finding("", [], [], [], {"loss_at_matched_accuracy": losses}) for losses in seeds]
    fits = [{"KL": QuadraticFit("KL", 9, (0.0, 1.0, 0.0), 0.8, 0.9)}, {"KL": None}]
    found = toy.parity_finding([drift], (0.9, 0.8), fits, matched, 1.0)
    assert "80 %" in found.sentences[0]
    assert "RL 20.0, SFT-1 30.0, oracle 0.0 points" in found.sentences[1]
    assert found.tables[0].rows == [("KL", "0.800", "")]
    assert found.tables[1].rows == [
        ("RL", "20.0", f"{20 / 2**0.5:.1f}"),  # of a sample of two
        ("SFT-1", "30.0", ""),
        ("SFT-2", "", ""),
        ("oracle", "0.0", "0.0"),
    ]
    nothing = toy.parity_finding([drift], (0.9, 0.8), [{"KL": None}], matched[:1], 1.0)
    assert "too few different values" in nothing.sentences[0]


def test_the_law_holds_in_a_small_simulation(monkeypatch):
    """KL explains most of forgetting over all methods, and SFT-1 moves farther than the oracle."""
    monkeypatch.setattr(toy, "RATES", np.geomspace(1e-4, 1e-3, 4))
    monkeypatch.setattr(toy, "EPOCHS", (1,))
    monkeypatch.setattr(toy, "SCHEDULES", ("constant",))
    monkeypatch.setattr(toy, "PRETRAINING_STEPS", 150)
    found = toy.analyze(seeds=1)
    assert found.numbers["runs"] == 16
    assert found.numbers["r2"]["KL(base || current)"][0] > 0.6
    losses = {name: mean for name, (mean, _) in found.numbers["loss_at_matched_accuracy"].items()}
    assert losses["oracle"] < losses["SFT-1"]
