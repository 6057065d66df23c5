"""The workload of a benchmark: model size, shapes, and random inputs for us and the peer."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from cptjax.models import layers
from cptjax.models.config import ModelConfig, RopeConfig
from cptjax.models.families import PRESETS, find_family
from cptjax.types import Prompts, Vision

BENCH_PHASES = ("load", "data", "rollout", "logp", "sft", "grpo")
MODEL_PHASES = BENCH_PHASES[2:]
BENCH_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def small_model(
    width: int, mlp: int, depth: int, vocab: int, vision: dict[str, Any]
) -> ModelConfig:
    """Return a small model of the 3B model's shape, with 8 query heads over 2 key/value heads."""
    released = PRESETS["3b"]
    head, third = width // 8, width // 8 // 16 * 3
    text = dataclasses.replace(
        released.text,
        vocab=vocab,
        width=width,
        mlp=mlp,
        depth=depth,
        heads=8,
        kv_heads=2,
        head_dim=head,
        max_positions=4096,
        rope=RopeConfig(1e6, (head // 2 - 2 * third, third, third)),
        tied=False,
    )
    names = ("image_token", "video_token", "vision_start", "vision_end")
    tokens = {name: vocab - 1 - i for i, name in enumerate(names)}
    tower = dataclasses.replace(released.vision, **vision)
    return dataclasses.replace(released, text=text, vision=tower, **tokens, eos=(1,), pad=0)


BENCH_SIZES: dict[str, ModelConfig] = {
    "cpu-s": small_model(
        256, 768, 6, 8192, vision=dict(depth=4, width=128, mlp=256, heads=4, full_blocks=(1, 3))
    ),
    "cpu-m": small_model(
        512, 1536, 8, 32768, vision=dict(depth=6, width=192, mlp=512, heads=4, full_blocks=(2, 5))
    ),
    "3b": PRESETS["3b"],
    "7b": PRESETS["7b"],
}


def find_size(name: str) -> ModelConfig:
    """Return the model of a benchmark's size, or a preset."""
    return BENCH_SIZES[name] if name in BENCH_SIZES else PRESETS[name]


@dataclasses.dataclass(frozen=True)
class Workload:
    """The model size, shapes and dtype of a benchmark.

    Each field is a flag of `launch/bench.py`.
    """

    size: str = "cpu-s"
    image: int = 112  # pixels of a side; 0 = prompts without images
    prompts: int = 8
    group: int = 8
    text: int = 32  # text tokens of a prompt
    new: int = 64  # tokens of a response
    repeat: int = 3
    micro: int = 0  # rows of one pass in logp and sft; 0 = all
    dtype: str = "float32"
    remat: str = "none"
    chunk: int = 4096  # tokens whose logits are in memory at once

    @property
    def rows(self) -> int:
        return self.prompts * self.group

    @property
    def grid(self) -> int:
        vision = find_size(self.size).vision
        return self.image // vision.patch if vision else 0

    @property
    def prompt(self) -> int:
        """Tokens of a prompt: the text, the image, and one token before and after the image."""
        return self.text + (self.image_tokens + 2 if self.grid else 0)

    @property
    def image_tokens(self) -> int:
        return self.grid**2 // find_size(self.size).vision.merge ** 2 if self.grid else 0


def check_size(name: str) -> None:
    """Refuse an unknown size."""
    if name not in BENCH_SIZES | PRESETS:
        raise ValueError(
            f"--size={name}: expected one of {', '.join(BENCH_SIZES)}, or another preset of "
            "config.model"
        )


def check_workload(work: Workload, phases: Sequence[str]) -> None:
    """Refuse a workload that cannot be measured."""
    check_size(work.size)
    named = [
        ("dtype", work.dtype, BENCH_DTYPES),
        ("remat", work.remat, layers.REMAT_POLICIES),
    ]
    for name, value, allowed in named + [("phases", phase, BENCH_PHASES) for phase in phases]:
        if value not in allowed:
            raise ValueError(
                f"--{name}={value}: expected {'some' if name == 'phases' else 'one'} of "
                f"{', '.join(allowed)}"
            )
    if not phases:
        raise ValueError(f"--phases is empty: expected some of {', '.join(BENCH_PHASES)}")
    cfg = find_size(work.size)
    unit = cfg.vision.patch * cfg.vision.merge if cfg.vision else 0
    if work.image and (not unit or work.image % unit):
        expected = f"a multiple of {unit} pixels (of merged patches), or 0" if unit else "0"
        raise ValueError(f"--image={work.image}: expected {expected} for a {cfg.family} model")
    if work.micro and work.rows % work.micro:
        raise ValueError(
            f"--micro={work.micro}: it must divide the {work.rows} rows (prompts x group)"
        )


def random_inputs(work: Workload, cfg: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Return random prompts [N P], responses [N * G R] and patches [N P C]."""
    rng = np.random.default_rng(seed)
    words = min(cfg.text.vocab, 150_000) - 10
    text = rng.integers(10, words, (work.prompts, work.text))
    fill = lambda token, n: np.full((work.prompts, n), token)
    image = []
    if work.grid:
        image = [
            fill(cfg.vision_start, 1),
            fill(cfg.image_token, work.image_tokens),
            fill(cfg.vision_end, 1),
        ]
    values = cfg.vision.patch_dim if work.grid else 0
    return {
        "prompts": np.concatenate([text[:, :4], *image, text[:, 4:]], 1),
        "responses": rng.integers(10, words, (work.rows, work.new)),
        "patches": rng.integers(0, 256, (work.prompts, work.grid**2, values), np.uint8),
    }


def equal_rows(tokens: np.ndarray, patches: np.ndarray, cfg: ModelConfig, shards: int) -> Prompts:
    """Return rows of equal shape [B T] as prompts, each with one square image [B P C] or none."""
    (b, t), side = tokens.shape, round(patches.shape[1] ** 0.5)
    ones, none = np.ones((b, t), np.int32), np.full((b, t), -1, np.int32)
    if not side:
        ids = np.broadcast_to(np.arange(t, dtype=np.int32), (3, b, t))
        return Prompts(tokens.astype(np.int32), ids, ones, none)
    is_image = tokens[0] == cfg.image_token
    tower = find_family(cfg).tower
    ids = tower.token_positions(is_image.astype(int), [(1, side, side)], [], cfg.vision)
    layout = tower.frame_layout(side, side, cfg.vision)
    real, n = layout.order >= 0, len(layout.order)
    slots = none
    slots[:, is_image] = (
        np.arange(b)[:, None] % (b // shards) * (n // cfg.vision.merge**2) + layout.units
    )
    frame = np.where(real[:, None], patches[:, np.maximum(layout.order, 0)], 0)
    rows = lambda x: np.broadcast_to(x, (b, *x.shape)).reshape(shards, b // shards, *x.shape)
    vision = Vision(
        frame.reshape(shards, b // shards, n, -1),
        rows(layout.positions),
        rows(real.astype(np.int32)),
    )
    positioned = np.broadcast_to(ids[:, None], (3, b, t))
    return Prompts(tokens.astype(np.int32), positioned, ones, slots, vision)
