"""The language model: embedding, a scan over stacked decoder blocks, final norm."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cptjax.models import bfloat16_products, unrolled
from cptjax.models.config import Llama3Scaling, ModelConfig, RopeConfig, TextConfig
from cptjax.models.layers import (
    apply_remat,
    linear,
    linear_params,
    mlp,
    norm_params,
    rms_norm,
    rotate,
)
from cptjax.sharding import Param, constrain, constrain_states, move_rows
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
            "q": layers({"embed": d}, {"heads": n, "head_dim": h}, t.qkv_bias),
            "k": layers({"embed": d}, {"kv_heads": k, "head_dim": h}, t.qkv_bias),
            "v": layers({"embed": d}, {"kv_heads": k, "head_dim": h}, t.qkv_bias),
            "o": layers({"heads": n, "head_dim": h}, {"embed": d}),
            "norm2": norm_params(t.depth, d),
            "gate": layers({"embed": d}, {"mlp": f}),
            "up": layers({"embed": d}, {"mlp": f}),
            "down": layers({"mlp": f}, {"embed": d}),
        },
        "norm": norm_params(0, d),
    }
    if t.qk_norm:
        tree["blocks"] |= {"q_norm": norm_params(t.depth, h), "k_norm": norm_params(t.depth, h)}
    if not t.tied:
        tree["unembed"] = linear_params(0, {"embed": d}, {"vocab": t.vocab}, bias=False)
    return tree


def rope_frequencies(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """Return the frequencies [H / 2], from high to low."""
    freq = 1.0 / rope.theta ** (np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
    return freq if rope.scaling is None else _scale_frequencies(freq, rope.scaling)


def _scale_frequencies(freq: np.ndarray, s: Llama3Scaling) -> np.ndarray:
    """Divide the frequencies of long wavelengths by `factor`, those between in part."""
    turns = s.old_positions * freq / np.float32(2 * math.pi)  # in a row of pretraining
    share = np.clip((turns - s.low) / (s.high - s.low), 0, 1)
    return ((1 - share) * freq / s.factor + share * freq).astype(np.float32)


def position_axes(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """Return which of the ids of time (0), height (1) and width (2) each frequency [H / 2] uses.

    sections 4 2 2                 0 0 0 0 1 1 2 2
    sections 4 2 2, interleaved    0 1 2 0 1 2 0 0
    """
    if rope.sections is None:
        return np.zeros(head_dim // 2, int)
    if not rope.interleaved:
        return np.repeat(np.arange(3), rope.sections)
    axes = np.zeros(head_dim // 2, int)
    for axis in (1, 2):
        axes[axis : 3 * rope.sections[axis] : 3] = axis
    return axes


def rope_cos_sin(positions: Array, t: TextConfig) -> tuple[Array, Array]:
    """Return cos and sin [... H / 2] of the angles of time, height and width ids [3 ...].

    Each frequency rotates with one of the three ids; those of text are equal.
    """
    axes, freq = position_axes(t.rope, t.head_dim), rope_frequencies(t.rope, t.head_dim)
    angles = jnp.moveaxis(positions[axes], 0, -1).astype(jnp.float32) * freq
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
        y = move_rows(rms_norm(x, p["norm1"], cfg.text.norm_eps), "batch")
        q, k, v = unrolled.fused_heads(p, y, cfg) if fused else project_heads(p, y, cfg)
        if cfg.text.qk_norm:
            q = rms_norm(q, p["q_norm"], cfg.text.norm_eps)
            k = rms_norm(k, p["k_norm"], cfg.text.norm_eps)
        q = constrain(q, "batch", None, "heads", None)
        out, kept = attend(rotate(q, rope), rotate(k, rope), v)
        x = x + linear(p["o"], out, 2, cfg.lora_scale)
    with jax.named_scope("mlp"):
        y = move_rows(rms_norm(x, p["norm2"], cfg.text.norm_eps), "mlp_batch")
        x = x + (unrolled.fused_mlp(p, y) if fused else mlp(p, y, cfg.lora_scale))
    return constrain_states(x), kept


def run_decoder(
    p: Params,
    x: Array,
    positions: Array,
    attend: Callable,
    cfg: ModelConfig,
    added: Array | None = None,
) -> tuple[Array, Any]:
    """Run all blocks and the final norm; what `attend` keeps is stacked over the layers.

    added: features [n B P D] that are added to the hidden states of the first P tokens after the
        first n layers.
    """
    blocks = p["blocks"]
    rope = unrolled.compute_rope_once(rope_cos_sin(positions, cfg.text), blocks)

    def step(x: Array, layer: Params, number: Any = None) -> tuple[Array, Any]:
        x, kept = decoder_block(layer, x, rope, attend, cfg)
        return x if added is None else _add_features(x, added, number), kept

    numbers = () if added is None else (unrolled.layer_numbers(blocks, cfg.text.depth),)
    step = apply_remat(step, cfg.compute.remat)
    x, kept = unrolled.scan_layers(step, x, blocks, *numbers)
    return rms_norm(x, p["norm"], cfg.text.norm_eps), kept


def _add_features(x: Array, added: Array, number: Array | int) -> Array:
    """Add the features of the first P tokens after layer `number`; later layers have none."""
    last = len(added) - 1
    features = jax.lax.dynamic_index_in_dim(added, jnp.minimum(number, last), keepdims=False)
    # Padding here, not outside of the loop, keeps n * (T - P) states less in memory.
    features = jnp.pad(features, ((0, 0), (0, x.shape[1] - features.shape[1]), (0, 0)))
    return x + jnp.where(number <= last, features, 0)


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
    if "unembed" in p:
        return p["unembed"]["w"]
    in_memory = bfloat16_products.are_faster(p["embed"])
    return bfloat16_products.transposed(p["embed"]) if in_memory else p["embed"].T
