"""An estimate of the memory of a forward and backward pass, from the sizes of the model."""

from typing import Any

import jax.numpy as jnp

from cptjax.models.config import ModelConfig


def activation_bytes(
    cfg: ModelConfig, remat: str, dtype: Any, shares_tower: bool, tokens: float, patches: float
) -> float:
    """Return the bytes that all layers keep for the backward pass, plus those inside one layer.

    shares_tower: the states of images in the frozen tower are arguments of the pass
    """
    t, v, itemsize = cfg.text, cfg.vision, jnp.dtype(dtype).itemsize
    text_inner = 2 * (t.heads + t.kv_heads) * t.head_dim + 2 * t.width + 2 * t.mlp
    parts = [(tokens, t.depth, t.width, text_inner)]
    total = 0.0 if v is None else tokens * itemsize * v.added_layers * t.width
    if shares_tower:
        total += patches * itemsize * (1 + v.added_layers) * v.width
    elif v is not None:
        parts.append((patches, v.depth, v.width, v.block_values))
    for n, depth, width, inner in parts:
        kept = {"block": 0, "offload": 0, "dots": inner, "none": 2 * inner}
        per_layer = width + kept[remat]
        total += n * itemsize * (depth * per_layer + 2 * inner)
    return total
