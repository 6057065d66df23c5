"""The vision tower: patches in window order -> one feature per merged token."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from cptjax.models import attention
from cptjax.models.config import ModelConfig, VisionConfig
from cptjax.models.layers import (
    apply_remat,
    linear,
    linear_params,
    mlp,
    norm_params,
    rms_norm,
    rotate,
)
from cptjax.sharding import constrain
from cptjax.types import Array, Params, Vision

VISION_EPS = 1e-6
VISION_ROPE_THETA = 1e4
VISION_MLP = ("gate", "up", "down")


def vision_params(v: VisionConfig) -> Params:
    d, n, h, f = v.width, v.heads, v.head_dim, v.mlp
    lin = lambda i, o: linear_params(v.depth, i, o, bias=True)
    return {
        "patch": linear_params(0, {"patch": v.patch_dim}, {"embed": d}, bias=False),
        "blocks": {
            "norm1": norm_params(v.depth, d),
            "qkv": lin({"embed": d}, {"'": 3, "heads": n, "head_dim": h}),
            "proj": lin({"heads": n, "head_dim": h}, {"embed": d}),
            "norm2": norm_params(v.depth, d),
            "gate": lin({"embed": d}, {"mlp": f}),
            "up": lin({"embed": d}, {"mlp": f}),
            "down": lin({"mlp": f}, {"embed": d}),
        },
    }


def merger_params(cfg: ModelConfig) -> Params:
    wide = cfg.vision.width * cfg.vision.merge**2
    return {
        "norm": norm_params(0, cfg.vision.width),
        "fc1": linear_params(0, {"embed": wide}, {"mlp": wide}, bias=True),
        "fc2": linear_params(0, {"mlp": wide}, {"embed": cfg.text.width}, bias=True),
    }


def vision_cos_sin(positions: Array, v: VisionConfig) -> tuple[Array, Array]:
    """[... 2] row and column -> cos and sin [... H / 2] of the rotary angles, the first half by row."""
    quarter = v.head_dim // 2
    freq = 1.0 / VISION_ROPE_THETA ** (np.arange(0, quarter, 2, dtype=np.float32) / quarter)
    angles = (positions[..., None].astype(jnp.float32) * freq).reshape(
        *positions.shape[:-1], quarter
    )
    return jnp.cos(angles), jnp.sin(angles)


def _attend(
    q: Array, k: Array, v: Array, frames: Array, full: Array | bool, cfg: ModelConfig
) -> Array:
    """q, k, v [rows P N H]: whole frames in the full blocks, windows of `window_slots` elsewhere."""
    slots = cfg.vision.window_slots

    def whole(q, k, v):
        return attention.attend(q, k, v, frames, frames, causal=False, backend=cfg.attention)

    def windows(q, k, v):
        cut = lambda x: x.reshape(-1, slots, *x.shape[2:])
        kernel = "tiled" if cfg.attention == "tiled" else "xla"  # too short for a flash kernel
        out = attention.attend(
            cut(q), cut(k), cut(v), cut(frames), cut(frames), causal=False, backend=kernel
        )
        return out.reshape(q.shape)

    if isinstance(full, bool):
        return whole(q, k, v) if full else windows(q, k, v)
    return jax.lax.cond(full, whole, windows, q, k, v)


def vision_block(
    p: Params,
    x: Array,
    rope: tuple[Array, Array],
    frames: Array,
    full: Array | bool,
    cfg: ModelConfig,
) -> Array:
    """One block on rows x [rows P D]; `full` may be traced."""
    qkv = linear(p["qkv"], rms_norm(x, p["norm1"], VISION_EPS), 1, cfg.lora_scale)
    q, k, v = (constrain(qkv[:, :, i], "batch", None, "heads", None) for i in range(3))
    out = _attend(rotate(q, rope), rotate(k, rope), v, frames, full, cfg)
    x = x + linear(p["proj"], out, 2, cfg.lora_scale)
    return constrain(
        x + mlp(p["mlp"], rms_norm(x, p["norm2"], VISION_EPS), cfg.lora_scale), "batch", None, None
    )


def merge_patches(p: Params, x: Array, cfg: ModelConfig) -> Array:
    """Neighbouring patches of a merge unit -> one feature of the text's width: [rows P D] -> [rows P/4 D_text]."""
    y = rms_norm(x, p["norm"], VISION_EPS)
    y = y.reshape(y.shape[0], -1, p["fc1"]["w"].shape[0])
    return linear(p["fc2"], jax.nn.gelu(linear(p["fc1"], y), approximate=False))


def group_mlp(blocks: Params) -> Params:
    """The blocks' leaves with the three of the gated MLP under one name."""
    return {k: v for k, v in blocks.items() if k not in VISION_MLP} | {
        "mlp": {k: blocks[k] for k in VISION_MLP}
    }


def _period(v: VisionConfig) -> int:
    """After how many blocks the tower repeats itself, a full block last (released models: 8); 0 if it does not."""
    every = v.depth // max(1, len(v.full_blocks))
    return (
        every if v.full_blocks and v.full_blocks == tuple(range(every - 1, v.depth, every)) else 0
    )


def _scan_blocks(blocks: Params, x: Array, step: Callable, cfg: ModelConfig) -> Array:
    """Scan over the blocks; where they repeat, the kind of each is known, so no block stores what only the other kind needs."""
    v, every = cfg.vision, _period(cfg.vision)
    if not every:
        full = jnp.asarray(np.isin(np.arange(v.depth), v.full_blocks))
        return jax.lax.scan(
            apply_remat(lambda x, layer: step(x, *layer), cfg.remat), x, (blocks, full)
        )[0]
    window, whole = (
        apply_remat(functools.partial(step, full=full), cfg.remat) for full in (False, True)
    )

    def period(x, some):
        x, _ = jax.lax.scan(window, x, jax.tree.map(lambda w: w[:-1], some))
        return whole(x, jax.tree.map(lambda w: w[-1], some))

    return jax.lax.scan(
        period, x, jax.tree.map(lambda w: w.reshape(-1, every, *w.shape[1:]), blocks)
    )[0]


def encode_vision(
    tower: Params, merger: Params, vision: Vision, cfg: ModelConfig, dtype: jnp.dtype
) -> Array:
    """-> features [S W*P/4 D_text], shard by shard."""
    s, w, slots, values = vision.patches.shape
    rows = lambda x: x.reshape(s * w, *x.shape[2:])
    x = constrain(linear(tower["patch"], rows(vision.patches).astype(dtype)), "batch", None, None)
    rope, frames = vision_cos_sin(rows(vision.positions), cfg.vision), rows(vision.frames)
    step = lambda x, p, full: (vision_block(p, x, rope, frames, full, cfg), None)
    x = _scan_blocks(group_mlp(tower["blocks"]), x, step, cfg)
    return merge_patches(merger, x, cfg).reshape(
        s, w * slots // cfg.vision.merge**2, cfg.text.width
    )
