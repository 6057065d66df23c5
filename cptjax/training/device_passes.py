"""The device passes of an update on rollouts: micro-batches, joined where their rows are short.

`train.micro_batch` prompts fit into a pass with the longest prompts and responses. Those of a step
are usually shorter, so several micro-batches fit. A pass then reads the weights once for all of
them, and the batch shards have more groups, which are easier to balance:

    4 micro-batches of an update      row lengths 900 800 1000 700      of at most 2,000 tokens
    2 passes                          1700 1700
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from cptjax.data.balance import (
    GroupSizes,
    Placement,
    balanced_group_batch,
    gather_group_sizes,
    plan_placement,
)
from cptjax.data.collate import largest_batch_shape
from cptjax.data.device_batches import batch_slices, join_prompts, response_bucket
from cptjax.models import attention
from cptjax.models.config import ModelConfig
from cptjax.training.step_batch import BatchBuilder
from cptjax.types import Batch, Prompts


@dataclasses.dataclass(frozen=True)
class GroupPass:
    """The prompts of a device pass with their groups of responses."""

    batch: Batch
    placement: Placement | None  # of the responses
    items: np.ndarray  # [Q] the number in the step of each of this process's prompts
    rows: np.ndarray  # [B] that of each of its responses


def build_passes(
    builder: BatchBuilder,
    prompts: Sequence[Prompts],
    prompt_tokens: np.ndarray,
    tokens: np.ndarray,
    mask: np.ndarray,
    extra: Mapping[str, np.ndarray],
) -> tuple[list[GroupPass], list[slice]]:
    """Return the passes of a step, and those of each part of its prompts.

    prompts: the micro-batches on the device
    prompt_tokens: [Q] of this process's prompts; tokens, mask and `extra`: [B R] of their responses
    """
    count, group = len(prompts), len(mask) // len(prompt_tokens)
    sizes = gather_group_sizes(prompts[0], np.split(prompt_tokens, count), np.split(mask, count))
    share, limit = len(prompt_tokens) // count, mask.shape[1]
    passes, cuts = [], []
    for part in batch_slices(count, builder.layout.micro_batches):
        first = len(passes)
        for joined in join_short(builder, prompts[part], sizes[part], limit):
            at = slice(part.start + joined.start, part.start + joined.stop)
            together, order = join_prompts(builder.model_ctx, prompts[at])
            items = at.start * share + order
            rows = (items[:, None] * group + np.arange(group)).reshape(-1)
            of_all = GroupSizes.join(sizes[at])
            length = response_bucket(int(of_all.responses.max()), limit)
            batch, placement = balanced_group_batch(
                builder.model_ctx,
                together,
                of_all,
                tokens[rows, :length],
                mask[rows, :length],
                {name: x[rows, :length] for name, x in extra.items()},
            )
            passes.append(GroupPass(batch, placement, items, rows))
        cuts.append(slice(first, len(passes)))
    return passes, cuts


def join_short(
    builder: BatchBuilder, prompts: Sequence[Prompts], sizes: Sequence[GroupSizes], limit: int
) -> list[slice]:
    """Cut the micro-batches of an update into as few equal passes as fit; all processes agree.

    limit: tokens of the longest response
    """
    count = len(prompts)
    largest = _largest_pass_bytes(builder, sizes[0], limit)
    for joined in range(count, 1, -1):
        if count % joined:
            continue
        passes = batch_slices(count, joined)
        if all(_pass_bytes(builder, prompts[p], sizes[p], limit) <= largest for p in passes):
            return passes
    return batch_slices(count, 1)


def _pass_bytes(
    builder: BatchBuilder, prompts: Sequence[Prompts], sizes: Sequence[GroupSizes], limit: int
) -> float:
    """Return the bytes of activations of joined micro-batches on a device."""
    ctx, of_all = builder.model_ctx, GroupSizes.join(sizes)
    length, q, group = (
        prompts[0].tokens.shape[1],
        of_all.prompts.shape[1],
        of_all.responses.shape[2],
    )
    response = response_bucket(int(of_all.responses.max()), limit)
    if attention.reads_packed_rows(ctx.cfg.compute.attention):
        tokens, _ = plan_placement(ctx, of_all, length, response)
    else:  # attention has all responses in the padded form
        tokens = q * (length + group * response)
    patches = sum(_patches(p) for p in prompts)
    return _activation_bytes(builder, tokens, patches)


def _largest_pass_bytes(builder: BatchBuilder, sizes: GroupSizes, limit: int) -> float:
    """Return the bytes of activations of a micro-batch with the longest prompts and responses."""
    ctx, (shards, q) = builder.model_ctx, sizes.prompts.shape
    longest, pixels = max(ctx.buckets), ctx.processor.pixels
    shape = largest_batch_shape(
        ctx.cfg, pixels.max_pixels if pixels else 0, q * shards, shards, longest
    )
    tokens = q * (longest + sizes.responses.shape[2] * limit)
    return _activation_bytes(builder, tokens, shape.patches * shape.vision_rows)


def _activation_bytes(builder: BatchBuilder, tokens: int, patches: int) -> float:
    ctx, shared = builder.model_ctx, builder.tower is not None
    return activation_bytes(ctx.cfg, ctx.cfg.compute.remat, ctx.dtype, shared, tokens, patches)


def _patches(prompts: Prompts) -> int:
    """Return the patches of a shard's images."""
    if prompts.tower_states:
        return prompts.tower_states[0].shape[-2]
    return math.prod(prompts.vision.frames.shape[1:]) if prompts.vision else 0


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
