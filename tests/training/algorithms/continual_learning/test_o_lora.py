"""O-LoRA: its term by numpy, 0 for orthogonal adapters, and smaller after training with it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import stage_fixtures
from stage_fixtures import method_config

from cptjax.models.lora import new_adapters
from cptjax.models.trainable import flatten_params, is_adapter, split_params
from cptjax.training.algorithms.continual_learning.o_lora import OLoRA, overlap
from cptjax.training.algorithms.continual_learning.table import check_methods

A = ("text", "blocks", "q", "lora_a")


def tree(seed, rank):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.float32(rng.normal(size=shape))
    return {
        "q": {"lora_a": normal(2, 8, rank), "lora_b": normal(2, rank, 5)},
        "o": {"lora_a": normal(2, 2, 4, rank), "lora_b": normal(2, rank, 5)},
    }


def test_the_term_is_the_sum_over_earlier_stages_weights_and_layers():
    new, kept = tree(0, 2), tree(1, 6)
    expected = 0.0
    for name in ("q", "o"):
        a, b = (np.asarray(t[name]["lora_a"], np.float64) for t in (new, kept))
        a, b = a.reshape(2, 8, 2), b.reshape(2, 8, 3, 2)  # three earlier stages of rank 2
        for layer in range(2):
            for stage in range(3):
                expected += np.linalg.norm(b[layer, :, stage].T @ a[layer]) ** 2
    np.testing.assert_allclose(OLoRA(0.3).penalty(new, None, kept), 0.3 * expected, rtol=1e-5)
    assert OLoRA().penalty(new, None, None) is None


def test_orthogonal_adapters_have_no_term_and_no_gradient():
    q, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(1, 8, 4)))
    new, kept = ({"q": {"lora_a": jnp.float32(q[..., cut])}} for cut in (slice(2), slice(2, 4)))
    value, gradient = jax.value_and_grad(OLoRA(1.0).penalty)(new, None, kept)
    assert value < 1e-12 and np.abs(gradient["q"]["lora_a"]).max() < 1e-6
    assert OLoRA(1.0).penalty(new, None, new) == pytest.approx(2)


def test_training_moves_the_second_stage_away_from_the_first(tmp_path):
    c = method_config(
        "sft",
        steps=8,
        stages=2,
        method=dict(parameters=dict(name="o_lora", coef=10.0)),
        model=dict(lora=dict(rank=2)),
        train=dict(lr=1e-2),
    )
    _, model_state, lines = stage_fixtures.train_all_stages(c, tmp_path)
    first, second = jnp.split(flatten_params(model_state.kept["o_lora"])[A], 2, -1)
    steps = [line for line in lines if "event" not in line]
    assert "penalty" not in steps[0] and steps[-1]["penalty"] < 0.5 * steps[8]["penalty"]
    adapters, _ = split_params(model_state.params, is_adapter)
    start = flatten_params(new_adapters(adapters, jax.random.fold_in(jax.random.key(c.seed), 1)))[A]
    assert overlap(first, second) < 0.5 * overlap(first, start)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(model=dict(lora=dict(rank=0))), "set model.lora.rank"),
        (dict(train=dict(reset_optimizer=False)), "new adapters have no moments"),
        (dict(method=dict(penalty=dict(name="l2", coef=1.0))), "each stage has new ones"),
        (dict(method=dict(stage_end=dict(name="wise_ft", weight=0.5))), "each stage has new ones"),
        (dict(method=dict(gradient=dict(name="gpm"))), "gpm with method.parameters.name='o_lora'"),
        (dict(method=dict(parameters=dict(coef=0.0))), "o_lora: coef=0 does nothing"),
    ],
)
def test_settings_that_make_no_sense_are_one_clear_line(settings, words):
    c = method_config("sft", method=dict(parameters=dict(name="o_lora")))
    c.model.lora.rank = 2
    for section, values in settings.items():
        c[section].update(values)
    with pytest.raises(ValueError, match=words) as error:
        check_methods(c)
    assert "\n" not in str(error.value)
