"""Encoded conversations and sampled answers -> device batches of few shapes."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from cptjax import multihost
from cptjax.batching import Encoded, bucket, collate, ladder
from cptjax.runtime import Runtime, together
from cptjax.train import place
from cptjax.types import Batch

ANSWER_LADDER = 8  # tokens of the shortest bucket of answers


def agreed(n: int) -> int:
    """The largest of all processes' numbers."""
    return max(multihost.gather(n))


def pieces(n: int, size: int) -> list[slice]:
    """n rows in parts of `size`; 0 = one part."""
    size = size or n
    return [slice(i, min(i + size, n)) for i in range(0, n, size)]


def passes(rows: int, micro: int, shards: int, fill: bool) -> tuple[int, int]:
    """(rows of a device pass, passes of an update), over all processes.

    What the batch shards do not divide is filled up with empty rows (conversations: sums and counts do not see them), or refused
    with the numbers (groups of rollouts).
    """
    micro = min(micro or rows, rows)
    if rows % micro:
        raise ValueError(f"a batch of {rows} rows can not be cut into micro-batches of {micro}; train.micro_batch must divide it")
    if micro % shards and not fill:
        raise ValueError(
            f"a device pass has {micro} prompts (train.micro_batch, or train.batch / method.updates_per_batch); config.mesh cuts it into "
            f"{shards} shards (data x fsdp), so it must be a multiple of {shards}"
        )
    return -(-micro // shards) * shards, rows // micro


def own_part(rt: Runtime, rows: int, micro: int, fill: bool = False) -> int:
    """This process's rows of a device pass."""
    count = jax.process_count()
    return passes(rows, micro, rt.shards * count, fill)[0] // count


def answers(rt: Runtime, encoded: Sequence[Encoded], *, rows: int, pack: bool = False, extra: dict[str, Any] | None = None) -> Batch:
    """Conversations whose assistant turns are learned: plain rows, or several in a row with `pack`."""
    prompts, mask = collate(
        list(encoded), buckets=rt.ladder, side="right", shards=rt.shards, pack=pack, rows=0 if pack else rows, agree=together
    )
    count = mask.sum(1)
    width = bucket(agreed(int(count.max())), widths(prompts.tokens.shape[1]))
    where, targets, keep, segments = (np.zeros((len(mask), width), dtype) for dtype in (np.int32, np.int32, bool, np.int32))
    for row, learned in enumerate(mask):
        at = np.flatnonzero(learned)
        where[row, : len(at)], targets[row, : len(at)], keep[row, : len(at)] = at - 1, prompts.tokens[row, at], True
        segments[row, : len(at)] = prompts.segments[row, at]
    return place(Batch(prompts, targets, keep, where, {"segments": segments, **(extra or {})}), rt.mesh)


def widths(length: int) -> list[int]:
    """Buckets of the answers within rows of `length` tokens: few, as only the unembedding's work depends on them."""
    return sorted({max(length >> k, min(length, ANSWER_LADDER)) for k in (0, 2, 4)})


def trimmed(mask: np.ndarray, longest: int) -> int:
    """The bucket that holds the longest of these answers."""
    return bucket(agreed(max(1, int(mask.sum(1).max()))), ladder(longest, ANSWER_LADDER))


def groups(rt: Runtime, encoded: Sequence[Encoded], tokens: np.ndarray, mask: np.ndarray, *, length: int, extra: dict[str, Any]) -> Batch:
    """Q prompts and their Q * G answers, cut to `length` tokens; `extra` arrays of tokens are cut as well."""
    prompts, _ = collate(list(encoded), buckets=rt.ladder, side="left", shards=rt.shards, rows=len(encoded), agree=together)
    cut = lambda x: np.asarray(x)[:, :length] if np.ndim(x) == 2 else np.asarray(x)
    return place(Batch(prompts, cut(tokens), cut(mask).astype(bool), None, {k: cut(v) for k, v in extra.items()}), rt.mesh)
