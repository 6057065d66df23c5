"""The language model: embedding, a scan over stacked decoder blocks, final norm."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cptjax.models import unrolled
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
from cptjax.sharding import Param, constrain
from cptjax.types import Array, Params


def decoder_params(t: TextConfig) -> Params:
    """Declare the parameters of the language model."""
    d, n, k, h, f = t.width, t.heads, t.kv_heads, t.head_dim, t.mlp

    def layers(inputs: dict[str, int], outputs: dict[str, int], bias: bool = False) -> Params:
        return linear_params(t.depth, inputs, outputs, bias)

    tree = {
        "embed": Param((t.vocab, d), ("vocab", "embed")),
        "blocks": {
            "norm1": norm_params(t.depth, d),
            "q": layers({"embed": d}, {"heads": n, "head_dim": h}, bias=True),
            "k": layers({"embed": d}, {"kv_heads": k, "head_dim": h}, bias=True),
            "v": layers({"embed": d}, {"kv_heads": k, "head_dim": h}, bias=True),
            "o": layers({"heads": n, "head_dim": h}, {"embed": d}),
            "norm2": norm_params(t.depth, d),
            "gate": layers({"embed": d}, {"mlp": f}),
            "up": layers({"embed": d}, {"mlp": f}),
            "down": layers({"mlp": f}, {"embed": d}),
        },
        "norm": norm_params(0, d),
    }
    if not t.tied:
        tree["unembed"] = linear_params(0, {"embed": d}, {"vocab": t.vocab}, bias=False)
    return tree


def mrope_cos_sin(positions: Array, t: TextConfig) -> tuple[Array, Array]:
    """Return cos and sin [... H / 2] of the M-RoPE angles of time, height and width ids [3 ...].

    Each frequency rotates with one of the three ids.
    """
    axis = np.repeat(np.arange(3), t.rope_sections)
    freq = 1.0 / t.rope_theta ** (np.arange(0, t.head_dim, 2, dtype=np.float32) / t.head_dim)
    angles = jnp.moveaxis(positions[axis], 0, -1).astype(jnp.float32) * freq
    return jnp.cos(angles), jnp.sin(angles)


def project_heads(p: Params, y: Array, cfg: ModelConfig) -> tuple[Array, Array, Array]:
    """Return queries [B T N H], keys and values [B T K H] of y [B T D]."""
    return tuple(linear(p[name], y, 1, cfg.lora_scale) for name in "qkv")


def decoder_block(
    p: Params, x: Array, rope: tuple[Array, Array], attend: Callable, cfg: ModelConfig
) -> tuple[Array, Any]:
    """Run one block on x [B T D].

    `attend(q, k, v)` returns the mixed values and what to keep for later (a cache, or None).
    """
    fused = unrolled.is_fused(p)
    with jax.named_scope("attention"):
        y = rms_norm(x, p["norm1"], cfg.text.norm_eps)
        q, k, v = unrolled.fused_heads(p, y, cfg) if fused else project_heads(p, y, cfg)
        q = constrain(q, "batch", None, "heads", None)
        out, kept = attend(rotate(q, rope), rotate(k, rope), v)
        x = x + linear(p["o"], out, 2, cfg.lora_scale)
    with jax.named_scope("mlp"):
        y = rms_norm(x, p["norm2"], cfg.text.norm_eps)
        x = x + (unrolled.fused_mlp(p, y) if fused else mlp(p, y, cfg.lora_scale))
    return constrain(x, "batch", None, None), kept


def run_decoder(
    p: Params, x: Array, positions: Array, attend: Callable, cfg: ModelConfig
) -> tuple[Array, Any]:
    """Run all blocks and the final norm; what `attend` keeps is stacked over the layers."""
    rope = unrolled.compute_rope_once(mrope_cos_sin(positions, cfg.text), p["blocks"])
    block = apply_remat(lambda x, layer: decoder_block(layer, x, rope, attend, cfg), cfg.remat)
    x, kept = unrolled.scan_layers(block, x, p["blocks"])
    return rms_norm(x, p["norm"], cfg.text.norm_eps), kept


def embed_tokens(p: Params, tokens: Array, dtype: jnp.dtype) -> Array:
    """Return the embeddings [B T D] of tokens [B T]."""
    table = p["embed"].astype(dtype)
    # Gather the smaller operand: the table, still sharded by vocabulary, if there are more tokens
    # than rows in it. The gradient of the table is then sharded in the same way.
    if tokens.size > table.shape[0]:
        table = constrain(table, "vocab", None)
    return constrain(table[tokens], "batch", None, None)


def unembedding(p: Params) -> Array:
    """Return the matrix [D V] that maps hidden states to logits."""
    return p["unembed"]["w"] if "unembed" in p else p["embed"].T
