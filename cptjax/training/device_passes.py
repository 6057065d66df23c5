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
from typing import NamedTuple

import numpy as np

from cptjax.data.balance import (
    GroupSizes,
    Placement,
    balanced_group_batch,
    gather_group_sizes,
    plan_placement,
    pool_bytes,
)
from cptjax.data.collate import largest_batch_shape
from cptjax.data.device_batches import batch_slices, join_prompts, response_bucket
from cptjax.models import attention
from cptjax.models.activation_memory import activation_bytes
from cptjax.training.step_batch import BatchBuilder
from cptjax.types import Batch, Prompts


@dataclasses.dataclass(frozen=True)
class GroupPass:
    """The prompts of a device pass with their groups of responses."""

    batch: Batch
    placement: Placement | None  # of the responses
    items: np.ndarray  # [Q] the number in the step of each of this process's prompts
    rows: np.ndarray  # [B] the number in the step of each of this process's responses


class PassPlan(NamedTuple):
    """How the micro-batches of a device pass are put together."""

    micro_batches: slice
    response: int  # tokens of responses with padding
    longest: int  # tokens of the packed rows
    placement: Placement | None


def build_passes(
    builder: BatchBuilder,
    prompts: Sequence[Prompts],
    prompt_tokens: np.ndarray,
    tokens: np.ndarray,
    mask: np.ndarray,
    extra: Mapping[str, np.ndarray],
) -> tuple[list[GroupPass], list[slice]]:
    """Return the passes of a step, and the slice of them for each part of its prompts.

    prompts: the micro-batches on the device
    prompt_tokens: [Q] of this process's prompts; tokens, mask and `extra`: [B R] of their responses
    """
    count, group = len(prompts), len(mask) // len(prompt_tokens)
    sizes = gather_group_sizes(prompts[0], np.split(prompt_tokens, count), np.split(mask, count))
    share, limit = len(prompt_tokens) // count, mask.shape[1]
    passes, parts = [], []
    for part in batch_slices(count, builder.layout.micro_batches):
        plans = plan_passes(builder, prompts, sizes, part, limit)
        parts.append(slice(len(passes), len(passes) + len(plans)))
        for micro_batches, response, longest, placement in plans:
            together, order = join_prompts(builder.model_ctx, prompts[micro_batches])
            items = micro_batches.start * share + order
            rows = (items[:, None] * group + np.arange(group)).reshape(-1)
            batch = balanced_group_batch(
                builder.model_ctx,
                together,
                prompt_tokens[items],
                longest,
                placement,
                tokens[rows, :response],
                mask[rows, :response],
                {name: x[rows, :response] for name, x in extra.items()},
            )
            passes.append(GroupPass(batch, placement, items, rows))
    return passes, parts


def plan_passes(
    builder: BatchBuilder,
    prompts: Sequence[Prompts],
    sizes: Sequence[GroupSizes],
    part: slice,
    limit: int,
) -> list[PassPlan]:
    """Join the micro-batches of a part of a step to as few equal passes as fit.

    If no equal division fits, each micro-batch is a pass. All processes get the same plans.

    limit: tokens of the longest response
    """
    count, largest = part.stop - part.start, _largest_pass_bytes(builder, sizes[0], limit)
    for joined in range(count, 1, -1):
        if count % joined:
            continue
        plans = []
        for start in range(part.start, part.stop, joined):
            together = slice(start, start + joined)
            plan = _plan_pass(builder, prompts, sizes, together, limit, largest)
            if plan is None:
                break
            plans.append(plan)
        else:
            return plans
    alone = [slice(i, i + 1) for i in range(part.start, part.stop)]
    return [_plan_pass(builder, prompts, sizes, cut, limit, math.inf) for cut in alone]


def _plan_pass(
    builder: BatchBuilder,
    prompts: Sequence[Prompts],
    sizes: Sequence[GroupSizes],
    together: slice,
    limit: int,
    most: float,
) -> PassPlan | None:
    """Plan the pass of some micro-batches; None = it needs more than `most` bytes on a device."""
    ctx, joined, parts = builder.model_ctx, GroupSizes.join(sizes[together]), prompts[together]
    (shards, q), group = joined.prompts.shape, joined.responses.shape[2]
    length = parts[0].tokens.shape[1]
    response = response_bucket(int(joined.responses.max()), limit)
    patches = sum(p.patches for p in parts)

    def fits(longest: float, places: int) -> bool:
        tokens = longest
        if not attention.reads_packed_rows(ctx.cfg.compute.attention):
            tokens = places * (length + group * response)  # attention has them in the padded form
        return _pass_bytes(builder, q, length, tokens, patches) <= most

    if not fits((joined.prompts.sum() + joined.responses.sum()) / shards, q):
        return None  # the longest row is no shorter than the mean
    longest, placement = plan_placement(ctx, joined, length, response)
    if not fits(longest, q if placement is None else q + 1):
        return None
    return PassPlan(together, response, longest, placement)


def _largest_pass_bytes(builder: BatchBuilder, sizes: GroupSizes, limit: int) -> float:
    """Return the bytes of a micro-batch with the longest prompts and responses on a device."""
    ctx, (shards, q) = builder.model_ctx, sizes.prompts.shape
    longest, pixels = max(ctx.buckets), ctx.processor.pixels
    shape = largest_batch_shape(
        ctx.cfg, pixels.max_pixels if pixels else 0, q * shards, shards, longest
    )
    tokens = q * (longest + sizes.responses.shape[2] * limit)
    return _pass_bytes(builder, q, longest, tokens, shape.patches * shape.vision_rows)


def _pass_bytes(
    builder: BatchBuilder, prompts: int, length: int, tokens: float, patches: int
) -> float:
    """Return the bytes of activations and of other shards' image features on a device.

    A shard has `prompts` prompts of `length` tokens, with padding.
    """
    ctx, shared = builder.model_ctx, builder.tower is not None
    cfg, remat = ctx.cfg, ctx.cfg.compute.remat
    pool = pool_bytes(cfg, ctx.mesh, prompts, length)
    return pool + activation_bytes(cfg, remat, ctx.dtype, shared, tokens, patches)
