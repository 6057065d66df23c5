"""Tiny models of the families in cptjax and transformers, random checkpoints, and rows for both."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cptjax import sharding
from cptjax.data import balance
from cptjax.models import causal_lm, positions
from cptjax.models.config import ModelConfig
from cptjax.models.families import FAMILIES, find_family
from cptjax.models.hf_config import config_from_hf
from cptjax.models.vision_qwen2_5 import normalise_patches
from cptjax.sharding import is_param
from cptjax.types import Prompts, Vision

IMAGE, VIDEO, START, END, EOS, PAD = 383, 382, 381, 380, 2, 0
TEXT = {
    "vocab_size": 384,
    "hidden_size": 128,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
}
VISION = {
    "depth": 4,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_heads": 8,
    "out_hidden_size": 128,
    "fullatt_block_indexes": [1, 3],
    "window_size": 112,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "tokens_per_second": 2,
}
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 1e4}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
TEXT_FAMILIES = {  # the keys in which each differs
    "qwen2": {"rope_parameters": PLAIN_ROPE},
    "qwen3": {"rope_parameters": PLAIN_ROPE, "head_dim": 24},
    "llama": {"rope_parameters": LLAMA3_ROPE},
    "mistral": {"rope_parameters": PLAIN_ROPE, "sliding_window": None},
}


def hf_config(
    tied: bool = False,
    text: dict | None = None,
    vision: dict | None = None,
    family: str = "qwen2_5_vl",
) -> Any:
    """Return transformers' config of the tiny model.

    Every mesh of the tests divides its 8 heads.
    """
    from transformers import AutoConfig, Qwen2_5_VLConfig

    if family in TEXT_FAMILIES:
        keys = TEXT | TEXT_FAMILIES[family] | (text or {})
        return AutoConfig.for_model(family, **copy.deepcopy(keys), tie_word_embeddings=tied)
    return Qwen2_5_VLConfig(
        text_config=copy.deepcopy(TEXT | (text or {})),
        vision_config=VISION | (vision or {}),
        tie_word_embeddings=tied,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )


def our_config(**kwargs: Any) -> ModelConfig:
    return config_from_hf(hf_config(**kwargs).to_dict())


def torch_model(seed: int = 0, **kwargs: Any) -> Any:
    """Return a random transformers model without zero biases or unit norms."""
    torch = pytest.importorskip("torch")
    import transformers

    torch.manual_seed(seed)
    config = hf_config(**kwargs)
    model = getattr(transformers, FAMILIES[config.model_type].architecture)(config).float().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn_like(p)
            p.copy_(1 + 0.1 * noise if "norm" in name or "ln_q" in name else 0.08 * noise)
    return model


def random_params(cfg: ModelConfig, seed: int = 0, declared: Any = None) -> dict:
    """Return our parameters in numpy, at the scale of `torch_model`.

    `declared` replaces those of the config, for a model with adapters.
    """
    import jax

    rng = np.random.default_rng(seed)

    def make(path, p):
        noise = rng.normal(size=p.shape).astype(np.float32)
        is_scale = path[-1].key != "b" and any("norm" in key.key for key in path)
        return 1 + 0.1 * noise if is_scale else 0.08 * noise

    declared = causal_lm.declare_params(cfg) if declared is None else declared
    return jax.tree.map_with_path(make, declared, is_leaf=is_param)


def save(
    folder: str | Path, seed: int = 0, dtype: str = "float32", shard: str = "5GB", **kwargs: Any
) -> Path:
    """Write a random checkpoint with transformers.

    `shard` ("100KB") splits it into several files.
    """
    torch = pytest.importorskip("torch")

    torch_model(seed, **kwargs).to(getattr(torch, dtype)).save_pretrained(
        folder, max_shard_size=shard
    )
    return Path(folder)


@dataclasses.dataclass(frozen=True)
class Image:
    """A still image of h x w patches."""

    h: int
    w: int

    def grid(self) -> tuple[int, int, int]:
        return 1, self.h, self.w


@dataclasses.dataclass(frozen=True)
class Video:
    """A video of t frame pairs of h x w patches, `seconds` apart."""

    t: int
    h: int
    w: int
    seconds: float = 1.0

    def grid(self) -> tuple[int, int, int]:
        return self.t, self.h, self.w


Row = list  # of int (that many text tokens), Image, Video


@dataclasses.dataclass
class PreparedRow:
    """One row before padding."""

    tokens: np.ndarray
    types: np.ndarray
    media: list[tuple[Any, np.ndarray]]  # with its patches, processor order


def _token_grids(part: Image | Video, cfg: ModelConfig) -> list[tuple[int, int, int]]:
    """Return the grid of each run of tokens: one, or one per frame pair where these have a time."""
    t, h, w = part.grid()
    split = isinstance(part, Video) and find_family(cfg).tower.rewrite_videos is not None
    return [(1, h, w)] * t if split else [part.grid()]


def random_row(row: Row, cfg: ModelConfig, rng: np.random.Generator) -> PreparedRow:
    tokens, types, media = [], [], []
    for part in row:
        if isinstance(part, int):
            tokens += list(rng.integers(10, 300, part))
            types += [0] * part
            continue
        still = isinstance(part, Image)
        token, grids = cfg.image_token if still else cfg.video_token, _token_grids(part, cfg)
        for grid in grids:
            n = np.prod(grid) // cfg.vision.merge**2
            time = [] if grids == [part.grid()] else list(rng.integers(10, 300, 3))
            tokens += time + [cfg.vision_start] + [token] * n + [cfg.vision_end]
            types += [0] * len(time) + [0] + [1 if still else 2] * n + [0]
        size = np.prod(part.grid()), cfg.vision.patch_dim
        media.append((part, rng.integers(0, 256, size, np.uint8)))
    return PreparedRow(np.array(tokens, np.int32), np.array(types, np.int32), media)


def _vision(
    rows: list[PreparedRow], cfg: ModelConfig, spare: int
) -> tuple[list[np.ndarray], tuple[np.ndarray, ...]]:
    """Return the slots of each row's placeholders, and the arrays of one vision row."""
    patches, places, frames, slots, at, number = [], [], [], [], 0, 0
    for row in rows:
        mine = []
        for part, values in row.media:
            t, h, w = part.grid()
            layout = find_family(cfg).tower.frame_layout(h, w, cfg.vision)
            for frame in values.reshape(t, h * w, -1):
                number += 1
                real = layout.order >= 0
                patches.append(np.where(real[:, None], frame[np.maximum(layout.order, 0)], 0))
                places.append(layout.positions)
                frames.append(np.where(real, number, 0))
                mine.append(at // cfg.vision.merge**2 + layout.units)
                at += len(layout.order)
        slots.append(np.concatenate(mine) if mine else np.zeros(0, np.int32))
    empty = (
        np.zeros((spare, cfg.vision.patch_dim), np.uint8),
        np.zeros((spare, cfg.vision.position_values), np.int32),
        np.zeros(spare, np.int32),
    )
    return slots, tuple(
        np.concatenate([*x, e]) for x, e in zip((patches, places, frames), empty, strict=True)
    )


def balanced_group_batch(ctx, prompts: Prompts, tokens, mask, extra):
    """Return the batch of `balance.balanced_group_batch`, and the places of its responses."""
    lengths = (sharding.local_rows(prompts.segments) > 0).sum(1)
    (sizes,) = balance.gather_group_sizes(prompts, [lengths], [mask])
    plan = balance.plan_placement(ctx, sizes, prompts.tokens.shape[1], mask.shape[1])
    batch = balance.balanced_group_batch(ctx, prompts, lengths, *plan, tokens, mask, extra)
    return batch, plan[1]


def prompts(
    rows: list[PreparedRow],
    cfg: ModelConfig,
    left: bool = True,
    length: int | None = None,
    shards: int = 1,
) -> Prompts:
    """Return padded rows; each of `shards` equal parts of the batch has a vision row."""
    length = length or max(len(r.tokens) for r in rows)
    b, per = len(rows), len(rows) // shards
    out = Prompts(
        np.full((b, length), cfg.pad),
        np.zeros((3, b, length), int),
        np.zeros((b, length), int),
        np.full((b, length), -1),
    )
    packed, slots = [], [np.zeros(0, np.int32)] * b
    if cfg.vision is not None:
        window = cfg.vision.window_slots
        packed = [_vision(rows[s * per : (s + 1) * per], cfg, window) for s in range(shards)]
        slots = [x for part, _ in packed for x in part]
    for i, row in enumerate(rows):
        n = len(row.tokens)
        here = slice(length - n, length) if left else slice(0, n)
        grids = [grid for part, _ in row.media for grid in _token_grids(part, cfg)]
        seconds = [part.seconds for part, _ in row.media if isinstance(part, Video)]
        out.tokens[i, here], out.segments[i, here] = row.tokens, 1
        out.positions[:, i, here] = (
            positions.text_positions(n)
            if cfg.vision is None
            else find_family(cfg).tower.token_positions(row.types, grids, seconds, cfg.vision)
        )
        out.slots[i, here][row.types > 0] = slots[i]
    ints = {
        f: getattr(out, f).astype(np.int32) for f in ("tokens", "positions", "segments", "slots")
    }
    if not any(row.media for row in rows):
        return Prompts(**ints)
    size = max(len(v[2]) for _, v in packed)
    fill = lambda x: np.concatenate([x, np.zeros((size - len(x), *x.shape[1:]), x.dtype)])
    vision = Vision(*(np.stack([fill(v[i])[None] for _, v in packed]) for i in range(3)))
    return Prompts(**ints, vision=vision)


def hf_inputs(rows: list[PreparedRow], cfg: ModelConfig, left: bool = True) -> dict[str, Any]:
    """Return the same rows as keyword arguments of transformers."""
    torch = pytest.importorskip("torch")

    ours = prompts(rows, cfg, left)
    types = np.zeros_like(ours.tokens)
    for i, row in enumerate(rows):
        types[i][ours.segments[i] > 0] = row.types
    out: dict[str, Any] = {
        "input_ids": torch.tensor(ours.tokens).long(),
        "attention_mask": torch.tensor(ours.segments).long(),
    }
    if cfg.vision is None:
        return out | {"position_ids": torch.tensor(ours.positions[0]).long()}
    out["mm_token_type_ids"] = torch.tensor(types)
    media = [m for row in rows for m in row.media]
    for kind, pixels, grid in (
        (Image, "pixel_values", "image_grid_thw"),
        (Video, "pixel_values_videos", "video_grid_thw"),
    ):
        if mine := [m for m in media if isinstance(m[0], kind)]:
            values = np.concatenate([values for _, values in mine])
            out[pixels] = torch.tensor(normalise_patches(values, cfg.vision))
            out[grid] = torch.tensor([part.grid() for part, _ in mine])
    seconds = [part.seconds for part, _ in media if isinstance(part, Video)]
    if seconds and find_family(cfg).tower.rewrite_videos is None:
        out["second_per_grid_ts"] = torch.tensor(seconds)
    return out


def released_positions(model: Any, inputs: dict[str, Any]) -> Any:
    """Return the position ids [3 B T] of the released Qwen2.5-VL for inputs of transformers.

    The code released with it (huggingface/transformers#35569) continues after a video at one more
    than the highest id so far, as the rope_deltas of every version do. get_rope_index of the
    installed version skips only the sides of a frame, so ids after a long video are too low.
    """
    grids = {k: v for k, v in inputs.items() if not k.startswith("pixel")}
    out = model.get_rope_index(**grids)[0]
    for row, real in enumerate(inputs["attention_mask"].bool()):
        ids, types = out[:, row, real], inputs["mm_token_type_ids"][row, real]
        for start in (types.diff().nonzero()[:, 0] + 1).tolist():
            ids[:, start:] += ids[:, :start].max() + 1 - ids[0, start]
        out[:, row, real] = ids
    return out
