"""Create the model of `config.model`: its shape on a mesh, and its parameters, random or loaded."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from cptjax import sharding
from cptjax.models import attention, hf_checkpoint, lora, qwen2_5_vl, trainable
from cptjax.models.config import PRESETS, ModelConfig, read_model_config
from cptjax.types import Params

MAX_UNROLLED_LAYERS = (
    12  # layers at most that a CPU's programs hold without a loop: faster, but compiled one by one
)


MODEL_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def fit_config(cfg: ModelConfig, settings: Any, mesh: Mesh) -> ModelConfig:
    """The model's shape with what `config.model` and the mesh decide."""
    kernel = attention.choose_backend(
        mesh, cfg, MODEL_DTYPES[settings.compute_dtype], settings.attention
    )
    scale = settings.lora.alpha / max(settings.lora.rank, 1)
    unroll = mesh.devices.flat[0].platform == "cpu" and cfg.text.depth <= MAX_UNROLLED_LAYERS
    return dataclasses.replace(
        cfg, remat=settings.remat, attention=kernel, lora_scale=scale, unroll=unroll
    )


def find_preset(name: str) -> ModelConfig:
    if name not in PRESETS:
        raise ValueError(f"model.preset={name!r}; expected one of {', '.join(PRESETS)}")
    return PRESETS[name]


def declare_model_params(settings: Any, cfg: ModelConfig) -> Params:
    """The tree of Param of `config.model`, adapters included."""
    tree = qwen2_5_vl.declare_params(cfg)
    if not settings.lora.rank:
        return tree
    return lora.add_lora(tree, settings.lora.rank, settings.lora.targets, settings.lora.vision)


def describe_model_source(settings: Any) -> str:
    return settings.path and str(Path(settings.path)) or f"random {settings.preset}"


def find_model_config(settings: Any) -> ModelConfig:
    """Return the shape of the model that `config.model` names by folder, hub id or preset."""
    return read_model_config(settings.path) if settings.path else find_preset(settings.preset)


def create_params(settings: Any, cfg: ModelConfig, mesh: Mesh, dtype: Any, seed: int) -> Params:
    """Create the parameters of `config.model` on the mesh, adapters included.

    Trained leaves are in `settings.param_dtype`, frozen leaves in `dtype`, the type of the arithmetic.
    """
    rules = sharding.rules_for(cfg.text.kv_heads, mesh)
    declared = declare_model_params(settings, cfg)
    if not settings.path:
        params = sharding.init_params(declared, jax.random.key(seed), jnp.float32, mesh, rules)
    else:
        params = hf_checkpoint.load_hf_checkpoint(settings.path, cfg, mesh, None, rules)
        adapters, _ = trainable.split_params(declared, trainable.is_adapter)
        if adapters:
            new = sharding.init_params(adapters, jax.random.key(seed), jnp.float32, mesh, rules)
            params = trainable.join_params(new, params)
    chosen = trainable.is_trained(settings.freeze, settings.lora.rank)
    trained, frozen = trainable.split_params(params, chosen)
    return trainable.join_params(
        trainable.cast_params(trained, MODEL_DTYPES[settings.param_dtype]),
        trainable.cast_params(frozen, dtype),
    )


def copy_params(params: Params, dtype: str) -> Params:
    """Parameters to compare with, in the type of the arithmetic; they outlive the state that they were copied from."""
    return jax.tree.map(lambda x: jnp.array(x, MODEL_DTYPES[dtype], copy=True), params)
