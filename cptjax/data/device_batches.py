"""Encoded conversations and sampled answers -> device batches of few shapes."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from cptjax.common import distributed
from cptjax.data.collate import EncodedConversation, collate_rows, length_buckets, smallest_bucket
from cptjax.data.model_context import ModelContext, gather_batch_shape
from cptjax.sharding import place_batch, place_rows
from cptjax.types import Batch, Prompts

MIN_RESPONSE_BUCKET = 8  # tokens of the shortest bucket of answers


def max_over_processes(n: int) -> int:
    """The largest of all processes' numbers."""
    return max(distributed.gather_objects(n))


def batch_slices(n: int, size: int) -> list[slice]:
    """n rows in parts of `size`; 0 = one part."""
    size = size or n
    return [slice(i, min(i + size, n)) for i in range(0, n, size)]


def micro_batch_layout(rows: int, micro: int, shards: int, fill: bool) -> tuple[int, int]:
    """(rows of a device pass, passes of an update), over all processes.

    What the batch shards do not divide is filled up with empty rows (conversations: sums and counts do not see them), or refused
    with the numbers (groups of rollouts).
    """
    micro = min(micro or rows, rows)
    if rows % micro:
        raise ValueError(
            f"a batch of {rows} rows can not be cut into micro-batches of {micro}; train.micro_batch must divide it"
        )
    if micro % shards and not fill:
        raise ValueError(
            f"a device pass has {micro} prompts (train.micro_batch, or train.batch / method.updates_per_batch); config.mesh cuts it into "
            f"{shards} shards (data x fsdp), so it must be a multiple of {shards}"
        )
    return -(-micro // shards) * shards, rows // micro


def rows_per_process(model_ctx: ModelContext, rows: int, micro: int, fill: bool = False) -> int:
    """This process's rows of a device pass."""
    count = jax.process_count()
    return micro_batch_layout(rows, micro, model_ctx.shards * count, fill)[0] // count


def conversation_batch(
    model_ctx: ModelContext,
    encoded: Sequence[EncodedConversation],
    *,
    rows: int,
    pack: bool = False,
) -> Batch:
    """Conversations whose assistant turns are learned: plain rows, or several in a row with `pack`."""
    prompts, mask = collate_rows(
        list(encoded),
        buckets=model_ctx.buckets,
        side="right",
        shards=model_ctx.shards,
        pack=pack,
        rows=0 if pack else rows,
        agree=gather_batch_shape,
    )
    count = mask.sum(1)
    width = smallest_bucket(
        max_over_processes(int(count.max())), target_buckets(prompts.tokens.shape[1])
    )
    where, targets, keep, segments = (
        np.zeros((len(mask), width), dtype) for dtype in (np.int32, np.int32, bool, np.int32)
    )
    for row, learned in enumerate(mask):
        at = np.flatnonzero(learned)
        where[row, : len(at)], targets[row, : len(at)], keep[row, : len(at)] = (
            at - 1,
            prompts.tokens[row, at],
            True,
        )
        segments[row, : len(at)] = prompts.segments[row, at]
    return place_batch(
        Batch(prompts, targets, keep, where, {"segments": segments}),
        model_ctx.mesh,
    )


def target_buckets(length: int) -> list[int]:
    """Buckets of the answers within rows of `length` tokens: few, as only the unembedding's work depends on them."""
    return sorted({max(length >> k, min(length, MIN_RESPONSE_BUCKET)) for k in (0, 2, 4)})


def response_bucket(mask: np.ndarray, longest: int) -> int:
    """The bucket that holds the longest of these answers."""
    return smallest_bucket(
        max_over_processes(max(1, int(mask.sum(1).max()))),
        length_buckets(longest, MIN_RESPONSE_BUCKET),
    )


def group_batch(
    model_ctx: ModelContext,
    prompts: Prompts,
    tokens: np.ndarray,
    mask: np.ndarray,
    *,
    length: int,
    extra: dict[str, Any],
) -> Batch:
    """Build a batch of Q prompts on the mesh and their Q * G responses, cut to `length` tokens; `extra` arrays of tokens are cut as well."""
    cut = lambda x: np.asarray(x)[:, :length] if np.ndim(x) == 2 else np.asarray(x)
    arrays = (cut(tokens), cut(mask).astype(bool), {k: cut(v) for k, v in extra.items()})
    targets, mask, extra = place_rows(arrays, model_ctx.mesh)
    return Batch(prompts, targets, mask, None, extra)
