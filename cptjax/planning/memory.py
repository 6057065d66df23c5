"""Estimate the memory of a stage on one device: resident arrays exactly, the peak roughly."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType
from ml_collections import ConfigDict

from cptjax import sharding
from cptjax.generation import decode_loop, rollout_weights
from cptjax.generation.sampling_config import rollout_sampling
from cptjax.models import trainable
from cptjax.models.activation_memory import activation_bytes
from cptjax.training.programs import AbstractStage
from cptjax.training.step_batch import extra_response_tokens


def resident_bytes(
    stage: AbstractStage, arguments: Any = (), not_loaded: Sequence[str] = ()
) -> dict[str, float]:
    """Return the bytes per device of all models and arrays that stay in memory, by name.

    An array counts once, under the first name that has it. Arrays among `arguments` and names that
    are `not_loaded` are left out.
    """
    counted = {id(x) for x in jax.tree.leaves(arguments)}
    sizes: dict[str, float] = {}
    for name, tree in stage.resident.items():
        leaves = jax.tree.leaves(tree)
        new = [x for x in leaves if id(x) not in counted]
        if name not in not_loaded and (new or not leaves):
            sizes[name] = sharding.bytes_per_device(new)
            counted |= {id(x) for x in new}
    return sizes


def estimate_bytes(stage: AbstractStage, prompt: int, patches: int) -> dict[str, float]:
    """Return the bytes per device of each part of a stage, without compiling.

    The longest prompts have `prompt` tokens and `patches` patches. The entry "peak" is the memory
    that a device must have. Buffers that the compiler adds (fusions, padding, collectives) do not
    count; `launch/plan.py` compiles and counts them.
    """
    resident = resident_bytes(stage)
    update = _update_bytes(stage, prompt, patches)
    rollout = _rollout_bytes(stage, prompt)
    peak = sum(resident.values()) + max(sum(update.values()), sum(rollout.values()))
    return resident | update | rollout | {"peak": peak}


def _update_bytes(stage: AbstractStage, prompt: int, patches: int) -> dict[str, float]:
    """Return the bytes of a device pass of the update, in addition to the resident arrays."""
    c, layout, trained = stage.config, stage.layout, stage.state.params
    m, t, r = c.method, c.train, c.rollout
    response = extra_response_tokens(m, r.max_new_tokens)
    if m.source == "rollouts":
        response = r.group * r.max_new_tokens
    rows, model = layout.rows / stage.shards, stage.mesh.shape["model"]
    # The sum so far, that of the current micro-batch, and that of the memory.
    sums = (2 if layout.micro_batches > 1 else 1) + (stage.memory is not None)
    gradients = sums * sharding.bytes_per_device(_cast(trained, jnp.float32))
    if c.model.param_dtype != c.model.compute_dtype:
        gradients += sharding.bytes_per_device(_cast(trained, stage.dtype))
    activations = activation_bytes(
        *(stage.cfg, c.model.remat, stage.dtype, stage.shares_tower),
        tokens=rows * (prompt + response),
        patches=rows * patches,
    )
    return {
        "gradients": gradients,
        "activations": activations / model,
        "logits": 2 * 4 * t.chunk * stage.cfg.text.vocab / model,
    }


def _rollout_bytes(stage: AbstractStage, prompt: int) -> dict[str, float]:
    """Return the bytes of sampling, in addition to the resident arrays."""
    c, cfg = stage.config, stage.cfg
    if c.method.source not in ("rollouts", "self"):
        return {"rollout weights": 0.0, "cache": 0.0}
    sampling = rollout_sampling(c)
    if stage.needs.self_samples:
        sampling = dataclasses.replace(sampling, group=stage.needs.self_samples)
    dtype = sampling.compute_dtype(stage.dtype)
    weights, mesh = stage.params, sampling.mesh(stage.mesh)
    gather = rollout_weights.gathers_weights(weights, cfg, sampling, stage.dtype)
    weights = rollout_weights.weights_output(weights, cfg, sampling, stage.dtype, gather)
    if sampling.dtype == "int8":  # the scales are few and not counted
        quantised, rest = trainable.split_params(weights, rollout_weights.is_quantised)
        weights = trainable.join_params(_cast(quantised, jnp.int8), rest)
    groups = (sampling.slots_for(c.train.batch) or c.train.batch) / sharding.batch_shards(mesh)
    model = mesh.shape["model"]
    cache = decode_loop.kv_cache_bytes(
        cfg, groups, prompt, sampling.rows, sampling.max_new_tokens, dtype
    )
    is_cut = cfg.text.kv_heads % model == 0  # otherwise each device of `model` has all heads
    return {
        "rollout weights": sharding.bytes_per_device(weights),
        "cache": cache / (model if is_cut else 1),
    }


def _cast(tree: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding), tree)


def mesh_of_size(settings: ConfigDict, devices: int) -> AbstractMesh:
    """Return the abstract mesh of `config.mesh` with a number of devices."""
    sizes = {name: settings[name] for name in sharding.AXES}
    known = math.prod(n for n in sizes.values() if n > 0)
    sizes = {name: devices // known if n == -1 else n for name, n in sizes.items()}
    if math.prod(sizes.values()) != devices:
        raise ValueError(
            f"mesh {dict(settings)} does not make {devices} devices; set one of data, fsdp, model "
            "to -1"
        )
    return AbstractMesh(tuple(sizes.values()), sharding.AXES, axis_types=(AxisType.Auto,) * 3)


def possible_device_counts(
    settings: ConfigDict, candidates: Sequence[int], batch: int
) -> list[int]:
    """Return the device count of `config.mesh`, or all possible candidates if a size is -1.

    A candidate is possible if the batch can be cut into its shards.
    """
    known = math.prod(settings[name] for name in sharding.AXES if settings[name] > 0)
    if all(settings[name] > 0 for name in sharding.AXES):
        return [known]

    def is_possible(n: int) -> bool:
        return n % known == 0 and batch % sharding.batch_shards(mesh_of_size(settings, n)) == 0

    return [n for n in candidates if is_possible(n)] or [known]
