"""The language model: embedding, a scan over stacked decoder blocks, final norm."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cptjax.models.config import ModelConfig, TextConfig
from cptjax.models.layers import (
    apply_remat,
    linear,
    linear_params,
    mlp,
    norm_params,
    rms_norm,
    rotate,
)
from cptjax.models.unrolled import materialise
from cptjax.sharding import Param, constrain
from cptjax.types import Array, Params


def decoder_params(t: TextConfig) -> Params:
    d, n, k, h, f = t.width, t.heads, t.kv_heads, t.head_dim, t.mlp
    lin = lambda i, o, bias=False: linear_params(t.depth, i, o, bias)
    tree = {
        "embed": Param((t.vocab, d), ("vocab", "embed")),
        "blocks": {
            "norm1": norm_params(t.depth, d),
            "q": lin({"embed": d}, {"heads": n, "head_dim": h}, True),
            "k": lin({"embed": d}, {"kv_heads": k, "head_dim": h}, True),
            "v": lin({"embed": d}, {"kv_heads": k, "head_dim": h}, True),
            "o": lin({"heads": n, "head_dim": h}, {"embed": d}),
            "norm2": norm_params(t.depth, d),
            "gate": lin({"embed": d}, {"mlp": f}),
            "up": lin({"embed": d}, {"mlp": f}),
            "down": lin({"mlp": f}, {"embed": d}),
        },
        "norm": norm_params(0, d),
    }
    return (
        tree
        if t.tied
        else tree | {"unembed": linear_params(0, {"embed": d}, {"vocab": t.vocab}, bias=False)}
    )


def mrope_cos_sin(positions: Array, t: TextConfig) -> tuple[Array, Array]:
    """M-RoPE: [3 ...] time, height, width ids -> cos and sin [... H / 2]; each frequency follows one of the three."""
    axis = np.repeat(np.arange(3), t.rope_sections)
    freq = 1.0 / t.rope_theta ** (np.arange(0, t.head_dim, 2, dtype=np.float32) / t.head_dim)
    angles = jnp.moveaxis(positions[axis], 0, -1).astype(jnp.float32) * freq
    return jnp.cos(angles), jnp.sin(angles)


def decoder_block(
    p: Params, x: Array, rope: tuple[Array, Array], attend: Callable, cfg: ModelConfig
) -> tuple[Array, Any]:
    """One decoder block on x [B T D]; `attend(q, k, v)` returns the mixed values and whatever it wants kept (a cache)."""
    s = cfg.lora_scale
    with jax.named_scope("attention"):
        q, k, v = _heads(p, rms_norm(x, p["norm1"], cfg.text.norm_eps), cfg)
        q = constrain(q, "batch", None, "heads", None)
        out, kept = attend(rotate(q, rope), rotate(k, rope), v)
        x = x + linear(p["o"], out, 2, s)
    with jax.named_scope("mlp"):
        x = x + mlp(p, rms_norm(x, p["norm2"], cfg.text.norm_eps), s)
    return constrain(x, "batch", None, None), kept


def _heads(p: Params, y: Array, cfg: ModelConfig) -> tuple[Array, Array, Array]:
    """Queries [B T N H], keys and values [B T K H]."""
    if "qkv" not in p:
        return tuple(linear(p[name], y, 1, cfg.lora_scale) for name in "qkv")
    n, k = cfg.text.heads, cfg.text.kv_heads
    return tuple(jnp.split(linear(p["qkv"], y), (n, n + k), -2))


def run_decoder(
    p: Params, x: Array, positions: Array, attend: Callable, cfg: ModelConfig
) -> tuple[Array, Any]:
    """All blocks and the final norm; what `attend` keeps is stacked over the layers (of a tuple of layers: listed)."""
    rope = mrope_cos_sin(positions, cfg.text)
    if isinstance(p["blocks"], tuple):
        rope = jax.tree.map(materialise, rope)
    step = apply_remat(lambda x, layer: decoder_block(layer, x, rope, attend, cfg), cfg.remat)
    if isinstance(p["blocks"], tuple):
        kept = []
        for layer in p["blocks"]:
            x, new = step(x, layer)
            kept.append(new)
    else:
        x, kept = jax.lax.scan(step, x, p["blocks"])
    return rms_norm(x, p["norm"], cfg.text.norm_eps), kept


def embed_tokens(p: Params, tokens: Array, dtype: jnp.dtype) -> Array:
    table = p["embed"].astype(dtype)
    if (
        tokens.size > table.shape[0]
    ):  # the smaller thing moves: to many tokens the table, cut by words alone, and so is its gradient
        table = constrain(table, "vocab", None)
    return constrain(table[tokens], "batch", None, None)


def unembedding(p: Params) -> Array:
    """[D V]."""
    return p["unembed"]["w"] if "unembed" in p else p["embed"].T
