"""The vision tower of Qwen3-VL: attention within whole frames, and features of several depths."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from cptjax.models import attention, positions
from cptjax.models.config import ModelConfig, VisionConfig
from cptjax.models.family import Grid, VisionFeatures
from cptjax.models.layers import (
    apply_remat,
    layer_norm,
    layer_norm_params,
    linear,
    linear_params,
    rotate,
)
from cptjax.models.positions import FrameLayout
from cptjax.models.vision_qwen2_5 import VISION_EPS, normalise_patches, vision_cos_sin
from cptjax.sharding import Param, constrain
from cptjax.types import Array, Params, Vision


@dataclasses.dataclass(frozen=True)
class Qwen3VisionConfig(VisionConfig):
    """Shape of the tower; the defaults are those of the 8B and 32B models."""

    depth: int = 27
    width: int = 1152
    mlp: int = 4304
    heads: int = 16
    patch: int = 16
    pixel_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    pixel_std: tuple[float, ...] = (0.5, 0.5, 0.5)
    table: int = 48  # side of the learned table of positions
    deepstack: tuple[int, ...] = (8, 16, 24)  # blocks whose features enter the first text layers

    position_values: ClassVar[int] = 4  # row, column, height and width of the frame

    @property
    def added_layers(self) -> int:
        return len(self.deepstack)

    @property
    def block_values(self) -> int:
        return 6 * self.width + self.mlp


def whole_frame_layout(h: int, w: int, v: Qwen3VisionConfig) -> FrameLayout:
    """Return a frame in the processor's order; a patch's positions end with the frame's size."""
    layout = positions.window_layout(h, w, v.merge, side=1)
    size = np.broadcast_to(np.array([h, w], np.int32), layout.positions.shape)
    return dataclasses.replace(layout, positions=np.concatenate([layout.positions, size], -1))


def frame_token_positions(
    types: np.ndarray, grids: Sequence[Grid], seconds: Sequence[float], v: Qwen3VisionConfig
) -> np.ndarray:
    """Return the M-RoPE ids [3 T] of a row, in which each frame pair of a video has its own grid.

    `seconds` has no effect: the time of a frame pair is in the text before it.
    """
    return positions.mrope(types, grids, [0.0] * len(grids), v.merge, 0)


def frame_tower_flops(cfg: ModelConfig, patches: float, frame: float) -> float:
    """Return the FLOPs of `patches` slots in all, in frames of `frame` slots each."""
    v, d = cfg.vision, cfg.vision.width
    block = 2 * (4 * d * d + 2 * d * v.mlp) + 4 * d * frame
    wide = d * v.merge**2
    merger = 2 * (wide * wide + wide * cfg.text.width) / v.merge**2
    return patches * (2 * v.patch_dim * d + v.depth * block + (1 + len(v.deepstack)) * merger)


def declare_frame_tower(cfg: ModelConfig) -> Params:
    """Declare the parameters of the tower and its mergers."""
    v, d = cfg.vision, cfg.vision.width

    def layers(inputs: dict[str, int], outputs: dict[str, int]) -> Params:
        return linear_params(v.depth, inputs, outputs, bias=True)

    tower = {
        "patch": linear_params(0, {"patch": v.patch_dim}, {"embed": d}, bias=True),
        "table": Param((v.table**2, d), (None, "embed")),
        "blocks": {
            "norm1": layer_norm_params(v.depth, d),
            "qkv": layers({"embed": d}, {"'": 3, "heads": v.heads, "head_dim": v.head_dim}),
            "proj": layers({"heads": v.heads, "head_dim": v.head_dim}, {"embed": d}),
            "norm2": layer_norm_params(v.depth, d),
            "up": layers({"embed": d}, {"mlp": v.mlp}),
            "down": layers({"mlp": v.mlp}, {"embed": d}),
        },
    }
    return {"vision": tower, "merger": _mergers(v, cfg.text.width)}


def _mergers(v: Qwen3VisionConfig, text_width: int) -> Params:
    """Declare the mergers, which map the patches of a merge unit to one feature of the text.

    The merger of the last block normalises each patch, those of `deepstack` the whole unit.
    """
    wide, count = v.width * v.merge**2, len(v.deepstack)

    def maps(depth: int) -> Params:
        return {
            "fc1": linear_params(depth, {"embed": wide}, {"mlp": wide}, bias=True),
            "fc2": linear_params(depth, {"mlp": wide}, {"embed": text_width}, bias=True),
        }

    last = {"norm": layer_norm_params(0, v.width)} | maps(0)
    if not count:
        return last
    return last | {"deepstack": {"norm": layer_norm_params(count, wide)} | maps(count)}


def table_rows(places: Array, side: int) -> tuple[Array, Array]:
    """Return the four rows of the table nearest to each patch [... 4], and their weights.

    places: row, column, height and width [... 4]. A frame covers the whole table: its corner
    patches take the table's corners, the others a bilinear mean.
    """
    index, size = places[..., :2].astype(jnp.float32), places[..., 2:]
    at = index * (side - 1) / jnp.maximum(size - 1, 1)
    first, tap = jnp.floor(at)[..., None], np.arange(2)
    near = jnp.minimum(first.astype(jnp.int32) + tap, side - 1)  # [... axis tap]
    weights = jnp.maximum(1 - jnp.abs(at[..., None] - first - tap), 0)
    rows = near[..., 0, :, None] * side + near[..., 1, None, :]
    weights = weights[..., 0, :, None] * weights[..., 1, None, :]
    return rows.reshape(*rows.shape[:-2], 4), weights.reshape(*rows.shape[:-2], 4)


def learned_positions(table: Array, places: Array, v: Qwen3VisionConfig) -> Array:
    """Return the learned positions [... D] of patches, in float32."""
    table = constrain(table.astype(jnp.float32), None, None)
    rows, weights = table_rows(places, v.table)
    return sum(table[rows[..., i]] * weights[..., i, None] for i in range(4))


def embed_patches(p: Params, vision: Vision, v: Qwen3VisionConfig, dtype: jnp.dtype) -> Array:
    """Return the input [S*W P D] of the first block."""
    rows = lambda x: x.reshape(-1, *x.shape[2:])
    x = linear(p["patch"], normalise_patches(rows(vision.patches), v).astype(dtype))
    places = learned_positions(p["table"], rows(vision.positions), v)
    return constrain(x + places.astype(dtype), "batch", None, None)


def frame_block(
    p: Params, x: Array, rope: tuple[Array, Array], frames: Array, cfg: ModelConfig
) -> Array:
    """Run one block on rows x [rows P D]."""
    scale = cfg.lora_scale
    qkv = linear(p["qkv"], layer_norm(p["norm1"], x, VISION_EPS), 1, scale)
    q, k, v = (constrain(qkv[:, :, i], "batch", None, "heads", None) for i in range(3))
    q, k, backend = rotate(q, rope), rotate(k, rope), cfg.compute.attention
    out = attention.attend(q, k, v, frames, frames, causal=False, backend=backend)
    x = x + linear(p["proj"], out, 2, scale)
    y = linear(p["up"], layer_norm(p["norm2"], x, VISION_EPS), 1, scale)
    x = x + linear(p["down"], jax.nn.gelu(y, approximate=True), 1, scale)
    return constrain(x, "batch", None, None)


def merge_last(p: Params, x: Array, merge: int) -> Array:
    """Return the features [... P/4 D_text] of the patches [... P D] after the last block."""
    return _map_units(p, _join_units(layer_norm(p["norm"], x, VISION_EPS), merge))


def merge_deepstack(p: Params, x: Array, merge: int) -> Array:
    """Return the features [n ... P/4 D_text] of the patches [n ... P D] of several depths."""

    def one(p: Params, x: Array) -> Array:
        return _map_units(p, layer_norm(p["norm"], _join_units(x, merge), VISION_EPS))

    return jax.vmap(one)(p, x)


def _join_units(x: Array, merge: int) -> Array:
    return x.reshape(*x.shape[:-2], -1, merge**2 * x.shape[-1])


def _map_units(p: Params, x: Array) -> Array:
    return linear(p["fc2"], jax.nn.gelu(linear(p["fc1"], x), approximate=False))


def _run_blocks(blocks: Params, x: Array, step: Callable, cfg: ModelConfig) -> tuple[Array, Array]:
    """Return the patches after the last block, and after each block of `deepstack` [n rows P D].

    The scan carries n + 1 arrays; a block that is not in `deepstack` overwrites the last of them.
    """
    deepstack = cfg.vision.deepstack
    place = np.full(cfg.vision.depth, len(deepstack))
    place[list(deepstack)] = np.arange(len(deepstack))
    block = apply_remat(step, cfg.compute.remat)

    def run(carry: tuple[Array, Array], layer: tuple[Params, Array]) -> tuple:
        x = block(carry[0], layer[0])
        kept = jax.lax.dynamic_update_index_in_dim(carry[1], x, layer[1], 0)
        return (x, constrain(kept, None, "batch", None, None)), None

    kept = jnp.zeros((len(deepstack) + 1, *x.shape), x.dtype)
    (x, kept), _ = jax.lax.scan(run, (x, kept), (blocks, jnp.asarray(place)))
    return x, kept[:-1]


def run_frame_tower(
    p: Params, vision: Vision, cfg: ModelConfig, dtype: jnp.dtype
) -> tuple[Array, ...]:
    """Return the states of the patches of each batch shard.

    They are those after the last block [S W*P D], and after each block of `deepstack` [n S W*P D].
    """
    v = cfg.vision
    s, w, slots, _ = vision.patches.shape
    rows = lambda x: x.reshape(s * w, *x.shape[2:])
    rope, frames = vision_cos_sin(rows(vision.positions[..., :2]), v), rows(vision.frames)

    def step(x: Array, block: Params) -> Array:
        return frame_block(block, x, rope, frames, cfg)

    x, kept = _run_blocks(
        p["vision"]["blocks"], embed_patches(p["vision"], vision, v, dtype), step, cfg
    )
    last = constrain(x.reshape(s, w * slots, -1), "batch", None, None)
    if not v.deepstack:
        return (last,)
    kept = kept.reshape(-1, *last.shape)
    return last, constrain(kept, None, "batch", None, None)


def merge_frame_states(p: Params, states: tuple[Array, ...], cfg: ModelConfig) -> VisionFeatures:
    """Return the features of the states of `run_frame_tower`."""
    last, *kept = states
    merged, merge = merge_last(p["merger"], last, cfg.vision.merge), cfg.vision.merge
    if not kept:
        return VisionFeatures(merged)
    return VisionFeatures(merged, merge_deepstack(p["merger"]["deepstack"], kept[0], merge))
