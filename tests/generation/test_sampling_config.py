"""Sampling settings come from the config, and a value out of range is refused in one line."""

import dataclasses

import jax.numpy as jnp
import pytest

from configs.base import get_config
from cptjax.generation.sampling_config import SamplingConfig, eval_sampling, rollout_sampling
from cptjax.sharding import make_mesh

VALID = SamplingConfig(group=1, max_new_tokens=1, temperature=1.0, check_every=1)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"temperature": -0.1}, "temperature=-0.1"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_k": 1.5}, "top_k=1.5"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.2}, "top_p=1.2"),
        ({"min_p": 1.5}, "min_p=1.5"),
        ({"group": 0}, "group=0"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"check_every": 0}, "check_every=0"),
        ({"slots": -1}, "slots=-1"),
        ({"slot_rows": 1}, "slot_rows=1: .* with rollout.slots"),
        ({"slots": 4, "slot_rows": -1}, "slot_rows=-1"),
        ({"ahead": 2}, "ahead=2"),
        ({"model": -1}, "model=-1"),
        ({"mlp": 4}, "mlp=4: .* rollout.model, which must be set"),
        ({"model": 4, "mlp": 6}, "mlp=6"),
        ({"dtype": "fp8"}, "dtype='fp8': expected one of '', 'float32', 'bfloat16', 'int8'"),
    ],
    ids=str,
)
def test_a_value_out_of_range_is_refused(change, words):
    with pytest.raises(ValueError, match="^rollout." + words) as error:
        dataclasses.replace(VALID, **change)
    assert "\n" not in str(error.value)


def test_slots_must_divide_into_the_batch_shards():
    six = dataclasses.replace(VALID, slots=6)
    six.check_batch_shards(3)
    with pytest.raises(
        ValueError, match="rollout.slots=6: expected a multiple of the 4 batch shards"
    ):
        six.check_batch_shards(4)


def test_a_slot_has_no_more_rows_than_the_group_has_responses():
    """Other groups are sampled with the same settings, such as one greedy response."""
    four = dataclasses.replace(VALID, group=8, slots=2, slot_rows=4)
    assert (four.rows, four.greedy().rows, dataclasses.replace(VALID, group=8).rows) == (4, 1, 8)
    assert [four.slots_for(n) for n in (1, 2, 9)] == [1, 2, 2]
    whole = dataclasses.replace(four, slot_rows=0)
    assert [whole.slots_for(n) for n in (1, 2, 9)] == [0, 0, 2]


def test_more_devices_on_the_model_axis_have_the_rows_of_those_before():
    mesh = make_mesh(2, 4, 1)
    wide = dataclasses.replace(VALID, model=2).mesh(mesh)
    assert dict(wide.shape) == {"data": 2, "fsdp": 2, "model": 2} and VALID.mesh(mesh) is mesh
    assert list(wide.devices.flat) == list(mesh.devices.flat)
    rows = dataclasses.replace(VALID, model=2, mlp=4).mesh(mesh)
    assert dict(rows.shape) == {"data": 2, "fsdp": 1, "rows": 2, "model": 2}
    assert list(rows.devices.flat) == list(mesh.devices.flat)
    with pytest.raises(ValueError, match="rollout.mlp=8: .* factor of the 4 devices"):
        dataclasses.replace(VALID, model=2, mlp=8).mesh(mesh)
    for model in (3, 8):
        with pytest.raises(ValueError, match=f"rollout.model={model}: .* factor of the 4 devices"):
            dataclasses.replace(VALID, model=model).mesh(mesh)


def test_the_fields_are_those_of_the_config():
    config = get_config()
    config.rollout.update(top_k=5, slots=4, ahead=1, dtype="int8", gather=True, model=2, mlp=4)
    assert dataclasses.asdict(rollout_sampling(config)) == config.rollout.to_dict()
    config.eval.update(max_new_tokens=7, temperature=0.5)
    evaluation = eval_sampling(config)
    assert (evaluation.group, evaluation.max_new_tokens, evaluation.temperature) == (1, 7, 0.5)
    assert evaluation.gather and (evaluation.model, evaluation.mlp) == (2, 4)
    assert (evaluation.top_k, evaluation.slots, evaluation.dtype) == (
        0,
        0,
        "",
    )


def test_the_type_of_the_arithmetic_is_the_models_unless_named():
    for name, expected in (("", jnp.float32), ("int8", jnp.float32), ("bfloat16", jnp.bfloat16)):
        assert dataclasses.replace(VALID, dtype=name).compute_dtype(jnp.float32) == expected
