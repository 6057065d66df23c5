"""The vision tower of Qwen2.5-VL: patches in window order -> one feature per merged token."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from cptjax.models import attention, positions
from cptjax.models.config import ModelConfig, VisionConfig
from cptjax.models.family import Grid, VisionFeatures
from cptjax.models.layers import (
    apply_remat,
    linear,
    linear_params,
    mlp,
    norm_params,
    rms_norm,
    rotate,
)
from cptjax.models.positions import FrameLayout
from cptjax.sharding import constrain
from cptjax.types import Array, Params, Vision

VISION_EPS = 1e-6
VISION_ROPE_THETA = 1e4


@dataclasses.dataclass(frozen=True)
class Qwen25VisionConfig(VisionConfig):
    """Shape of the tower; the defaults are those of the released models."""

    window: int = 112  # pixels
    full_blocks: tuple[int, ...] = (7, 15, 23, 31)  # the others attend within windows
    tokens_per_second: int = 2  # time ids of one second of video

    @property
    def window_side(self) -> int:
        """Merge units of a side of a whole window."""
        return self.window // self.patch // self.merge

    @property
    def window_slots(self) -> int:
        return (self.window_side * self.merge) ** 2


def frame_layout(h: int, w: int, v: Qwen25VisionConfig) -> FrameLayout:
    """Return the window order of a frame of h x w patches."""
    return positions.window_layout(h, w, v.merge, v.window_side)


def token_positions(
    types: np.ndarray, grids: Sequence[Grid], seconds: Sequence[float], v: Qwen25VisionConfig
) -> np.ndarray:
    """Return the M-RoPE ids [3 T] of a row; the time ids of a video follow its seconds."""
    return positions.mrope(types, grids, seconds, v.merge, v.tokens_per_second)


def tower_flops(cfg: ModelConfig, patches: float, frame: float) -> float:
    """Return the FLOPs of `patches` slots in all, in frames of `frame` slots each."""
    v, d = cfg.vision, cfg.vision.width
    block = 2 * (4 * d * d + 3 * d * v.mlp)
    full = len(v.full_blocks)
    mixing = 4 * d * (full * frame + (v.depth - full) * v.window_slots)
    wide = d * v.merge**2
    merger = 2 * (wide * wide + wide * cfg.text.width) / v.merge**2
    return patches * (2 * v.patch_dim * d + v.depth * block + mixing + merger)


def declare_tower(cfg: ModelConfig) -> Params:
    """Declare the parameters of the tower and its merger."""
    return {"vision": vision_params(cfg.vision), "merger": merger_params(cfg)}


def vision_params(v: Qwen25VisionConfig) -> Params:
    """Declare the parameters of the vision tower."""
    d, n, h, f = v.width, v.heads, v.head_dim, v.mlp

    def layers(inputs: dict[str, int], outputs: dict[str, int]) -> Params:
        return linear_params(v.depth, inputs, outputs, bias=True)

    return {
        "patch": linear_params(0, {"patch": v.patch_dim}, {"embed": d}, bias=False),
        "blocks": {
            "norm1": norm_params(v.depth, d),
            "qkv": layers({"embed": d}, {"'": 3, "heads": n, "head_dim": h}),
            "proj": layers({"heads": n, "head_dim": h}, {"embed": d}),
            "norm2": norm_params(v.depth, d),
            "gate": layers({"embed": d}, {"mlp": f}),
            "up": layers({"embed": d}, {"mlp": f}),
            "down": layers({"mlp": f}, {"embed": d}),
        },
    }


def merger_params(cfg: ModelConfig) -> Params:
    """Declare the parameters of the merger, which maps patches to the width of the text."""
    wide = cfg.vision.width * cfg.vision.merge**2
    return {
        "norm": norm_params(0, cfg.vision.width),
        "fc1": linear_params(0, {"embed": wide}, {"mlp": wide}, bias=True),
        "fc2": linear_params(0, {"mlp": wide}, {"embed": cfg.text.width}, bias=True),
    }


def vision_cos_sin(positions: Array, v: VisionConfig) -> tuple[Array, Array]:
    """Return cos and sin [... H / 2] of the rotary angles of rows and columns [... 2].

    The first half of the frequencies rotates with the row, the second half with the column.
    """
    half = v.head_dim // 2
    freq = 1.0 / VISION_ROPE_THETA ** (np.arange(0, half, 2, dtype=np.float32) / half)
    angles = positions[..., None].astype(jnp.float32) * freq
    angles = angles.reshape(*positions.shape[:-1], half)
    return jnp.cos(angles), jnp.sin(angles)


def _attend(
    q: Array, k: Array, v: Array, frames: Array, full: Array | bool, cfg: ModelConfig
) -> Array:
    """Attend with q, k, v [rows P N H] within frames (full blocks) or within their windows."""
    slots, backend = cfg.vision.window_slots, cfg.compute.attention

    def whole(q, k, v):
        return attention.attend(q, k, v, frames, frames, causal=False, backend=backend)

    def windows(q, k, v):
        cut = lambda x: x.reshape(-1, slots, *x.shape[2:])
        short = attention.short_row_backend(backend)
        qs, ks, vs, fs = (cut(x) for x in (q, k, v, frames))
        return attention.attend(qs, ks, vs, fs, fs, causal=False, backend=short).reshape(q.shape)

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
    """Run one block on rows x [rows P D]; `full` may be traced."""
    qkv = linear(p["qkv"], rms_norm(x, p["norm1"], VISION_EPS), 1, cfg.lora_scale)
    q, k, v = (constrain(qkv[:, :, i], "batch", None, "heads", None) for i in range(3))
    out = _attend(rotate(q, rope), rotate(k, rope), v, frames, full, cfg)
    x = x + linear(p["proj"], out, 2, cfg.lora_scale)
    x = x + mlp(p, rms_norm(x, p["norm2"], VISION_EPS), cfg.lora_scale)
    return constrain(x, "batch", None, None)


def merge_states(params: Params, states: tuple[Array, ...], cfg: ModelConfig) -> VisionFeatures:
    """Map the patches of each merge unit to one feature: [S W*P D] -> [S W*P/4 D_text]."""
    p, (x,) = params["merger"], states
    y = rms_norm(x, p["norm"], VISION_EPS)
    y = y.reshape(y.shape[0], -1, p["fc1"]["w"].shape[0])
    return VisionFeatures(linear(p["fc2"], jax.nn.gelu(linear(p["fc1"], y), approximate=False)))


def _scan_blocks(blocks: Params, x: Array, step: Callable, cfg: ModelConfig) -> Array:
    """Scan over the blocks, or over periods of them if their pattern repeats.

    Released models have a full block after every seven window blocks, a period of 8. In a scan over
    periods the compiler knows the kind of each block, and no block keeps arrays that only the
    gradient of the other kind needs.
    """
    depth, full_blocks = cfg.vision.depth, cfg.vision.full_blocks
    every = depth // max(1, len(full_blocks))
    if full_blocks != tuple(range(every - 1, depth, every)):
        full = np.isin(np.arange(depth), full_blocks)
        block = apply_remat(lambda x, layer: step(x, *layer), cfg.compute.remat)
        return jax.lax.scan(block, x, (blocks, jnp.asarray(full)))[0]
    window_block = apply_remat(functools.partial(step, full=False), cfg.compute.remat)
    full_block = apply_remat(functools.partial(step, full=True), cfg.compute.remat)

    def period(x, layers):
        x, _ = jax.lax.scan(window_block, x, jax.tree.map(lambda w: w[:-1], layers))
        return full_block(x, jax.tree.map(lambda w: w[-1], layers))

    periods = jax.tree.map(lambda w: w.reshape(-1, every, *w.shape[1:]), blocks)
    return jax.lax.scan(period, x, periods)[0]


def normalise_patches(patches: Array, v: VisionConfig) -> Array:
    """Return patches of bytes as the float32 values that the tower was trained on.

    Of numpy arrays the result has the rounding of transformers.
    """
    mean, std = (
        np.repeat(np.float32(x), v.patch_dim // v.channels) for x in (v.pixel_mean, v.pixel_std)
    )
    # transformers multiplies in float64. In float32, a division by 255 gives the same values.
    return (patches.astype(np.float32) / np.float32(1 / v.pixel_scale) - mean) / std


def run_tower(
    params: Params, vision: Vision, cfg: ModelConfig, dtype: jnp.dtype
) -> tuple[Array, ...]:
    """Return the states [S W*P D] of the patches of each batch shard after the last block."""
    tower = params["vision"]
    s, w, slots, _ = vision.patches.shape
    rows = lambda x: x.reshape(s * w, *x.shape[2:])
    patches = normalise_patches(rows(vision.patches), cfg.vision).astype(dtype)
    x = constrain(linear(tower["patch"], patches), "batch", None, None)
    rope, frames = vision_cos_sin(rows(vision.positions), cfg.vision), rows(vision.frames)

    def step(x, p, full):
        return vision_block(p, x, rope, frames, full, cfg), None

    x = _scan_blocks(tower["blocks"], x, step, cfg)
    return (constrain(x.reshape(s, w * slots, -1), "batch", None, None),)
