"""What `config.model` says of the model: its shape, number formats, and the tree of its parameters."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from cptjax.models import attention, qwen2_5_vl
from cptjax.models.config import PRESETS, ModelConfig, read_model_config
from cptjax.models.lora import add_lora
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
    lora = settings.lora
    return add_lora(tree, lora.rank, lora.targets, lora.vision) if lora.rank else tree


def describe_model_source(settings: Any) -> str:
    return settings.path and str(Path(settings.path)) or f"random {settings.preset}"


def find_model_config(config: ConfigDict) -> ModelConfig:
    return (
        read_model_config(config.model.path)
        if config.model.path
        else find_preset(config.model.preset)
    )


def copy_params(params: Params, dtype: str) -> Params:
    """Parameters to compare with, in the type of the arithmetic; they outlive the state that they were copied from."""
    return jax.tree.map(lambda x: jnp.array(x, MODEL_DTYPES[dtype], copy=True), params)
