"""Create the model of `config.model`: its config, and its parameters, random or loaded."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from cptjax import sharding
from cptjax.models import attention, causal_lm, hf_checkpoint, lora, trainable
from cptjax.models.config import ComputeConfig, ModelConfig
from cptjax.models.families import PRESETS, find_family
from cptjax.models.hf_config import read_model_config
from cptjax.types import Params

# The most text layers that a CPU runs without a loop: that is faster, but compiles every layer.
MAX_UNROLLED_LAYERS = 12

MODEL_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def fit_config(cfg: ModelConfig, settings: ConfigDict, mesh: Mesh) -> ModelConfig:
    """Return the config with the settings that depend on `config.model` and the mesh."""
    dtype = MODEL_DTYPES[settings.compute_dtype]
    platform = mesh.devices.flat[0].platform
    compute = ComputeConfig(
        remat=settings.remat,
        attention=attention.choose_backend(mesh, cfg, dtype, settings.attention),
        unroll=platform == "cpu" and cfg.text.depth <= MAX_UNROLLED_LAYERS,
        unroll_sampling=platform not in ("cpu", "tpu"),
    )
    return dataclasses.replace(cfg, lora_scale=lora_scale(settings), compute=compute)


def fit_for_inference(cfg: ModelConfig, mesh: Mesh, dtype: str, scale: float = 1.0) -> ModelConfig:
    """Return the config for generating and scoring, which need no gradient."""
    compute = ComputeConfig(
        remat="none",
        attention=attention.choose_backend(mesh, cfg, dtype),
        unroll=mesh.devices.flat[0].platform != "tpu",
    )
    return dataclasses.replace(cfg, lora_scale=scale, compute=compute)


def lora_scale(settings: ConfigDict) -> float:
    """Return the factor alpha / rank of the adapters."""
    return settings.lora.alpha / max(settings.lora.rank, 1)


def find_preset(name: str) -> ModelConfig:
    """Return the preset of `config.model.preset`."""
    if name not in PRESETS:
        raise ValueError(f"model.preset={name!r}; expected one of {', '.join(PRESETS)}")
    return PRESETS[name]


def declare_model_params(settings: ConfigDict, cfg: ModelConfig) -> Params:
    """Declare the parameters of `config.model`, adapters included."""
    tree, tower = causal_lm.declare_params(cfg), find_family(cfg).tower
    check_parts(settings, cfg)
    if not settings.lora.rank:
        return tree
    adapters = tower.adapters if tower and settings.lora.vision else None
    return lora.add_lora(tree, settings.lora.rank, settings.lora.targets, adapters)


def check_parts(settings: ConfigDict, cfg: ModelConfig) -> None:
    """Refuse settings of `config.model` for a vision tower that the model does not have."""
    if find_family(cfg).tower is not None:
        return
    named = [part for part in settings.freeze if part != "language"]
    if named or settings.lora.vision:
        wrong = f"freeze names {named[0]}" if named else "lora.vision=True"
        raise ValueError(
            f"model.{wrong}: a {cfg.family} model has no vision tower; remove the setting"
        )
    if "language" in settings.freeze:
        raise ValueError(
            f"model.freeze names language, the only part of a {cfg.family} model; nothing is left "
            "to train"
        )


def describe_model_source(settings: ConfigDict) -> str:
    """Return the source of the weights as text: a folder, a hub id, or a random preset."""
    return str(Path(settings.path)) if settings.path else f"random {settings.preset}"


def find_model_config(settings: ConfigDict) -> ModelConfig:
    """Return the shape of the model that `config.model` names by folder, hub id or preset."""
    return read_model_config(settings.path) if settings.path else find_preset(settings.preset)


def create_params(
    settings: ConfigDict, cfg: ModelConfig, mesh: Mesh, dtype: Any, seed: int
) -> Params:
    """Create the parameters of `config.model` on the mesh, adapters included.

    Trained leaves are in `settings.param_dtype`, frozen leaves in `dtype`, the compute dtype.
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


@functools.partial(jax.jit, static_argnames="dtype")
def copy_params(params: Params, dtype: str) -> Params:
    """Copy parameters to another dtype; the copy stays valid when a step donates the original."""
    return jax.tree.map(lambda x: jnp.array(x, MODEL_DTYPES[dtype], copy=True), params)
