"""Build batches on the mesh from encoded conversations or sampled responses, in few shapes."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from cptjax.common import distributed
from cptjax.data.collate import EncodedConversation, collate_rows, length_buckets, smallest_bucket
from cptjax.data.model_context import ModelContext, gather_batch_shape
from cptjax.data.packing import plan_packing
from cptjax.sharding import local_rows, place_batch, place_rows
from cptjax.types import Batch, Prompts

MIN_RESPONSE_BUCKET = 8  # tokens of the shortest bucket of responses


def max_over_processes(n: int) -> int:
    """Return the largest value over all processes."""
    return max(distributed.gather_objects(n))


def batch_slices(n: int, size: int) -> list[slice]:
    """Cut n rows into parts of `size`; 0 = one part."""
    size = size or n
    return [slice(i, min(i + size, n)) for i in range(0, n, size)]


def micro_batch_layout(rows: int, micro: int, shards: int, fill: bool) -> tuple[int, int]:
    """Return (rows of a device pass, passes of an update), over all processes.

    fill: if the shards do not divide a pass, pad it with empty rows, which sums and counts ignore;
        otherwise raise a ValueError.
    """
    micro = min(micro or rows, rows)
    if rows % micro:
        raise ValueError(
            f"a batch of {rows} rows cannot be cut into micro-batches of {micro}; "
            "train.micro_batch must divide it"
        )
    if micro % shards and not fill:
        raise ValueError(
            f"a device pass has {micro} prompts (train.micro_batch, or train.batch / "
            f"method.updates_per_batch); config.mesh cuts it into {shards} shards (data x fsdp), "
            f"so it must be a multiple of {shards}"
        )
    return pad_to_shards(micro, shards), rows // micro


def pad_to_shards(rows: int, shards: int) -> int:
    """Return the smallest multiple of the shards that holds these rows."""
    return -(-rows // shards) * shards


def cut_to_shards(rows: int, shards: int) -> int:
    """Return the largest multiple of the shards of at most these rows; at least one row each."""
    return max(shards, rows // shards * shards)


def conversation_arrays(prompts: Prompts, width: int) -> Batch:
    """Return a batch of conversations whose arrays are shapes and types (jax.ShapeDtypeStruct).

    `prompts` are arrays or shapes; a row has `width` targets.
    """
    ints = jax.ShapeDtypeStruct((prompts.tokens.shape[0], width), np.int32)
    mask = jax.ShapeDtypeStruct(ints.shape, bool)
    return Batch(prompts, targets=ints, mask=mask, where=ints, extra={"segments": ints})


def conversation_batch(
    model_ctx: ModelContext,
    encoded: Sequence[EncodedConversation],
    *,
    rows: int,
    pack: bool = False,
) -> Batch:
    """Return a batch that trains on the assistant turns of conversations.

    `pack` puts several conversations into a row.
    """
    prompts, mask = collate_rows(
        list(encoded),
        buckets=model_ctx.buckets,
        side="right",
        shards=model_ctx.shards,
        pack=pack,
        rows=0 if pack else rows,
        agree=gather_batch_shape,
    )
    prompts = prompts.replace(right_padded=not pack)
    counts = mask.sum(1)
    width = smallest_bucket(
        max_over_processes(int(counts.max())), target_buckets(prompts.tokens.shape[1])
    )
    batch: Batch = jax.tree.map(
        lambda x: np.zeros(x.shape, x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else x,
        conversation_arrays(prompts, width),
    )
    for row, n in enumerate(counts):
        at = np.flatnonzero(mask[row])
        batch.where[row, :n] = at - 1  # the state before a token predicts it
        batch.targets[row, :n] = prompts.tokens[row, at]
        batch.mask[row, :n] = True
        batch.extra["segments"][row, :n] = prompts.segments[row, at]
    return place_batch(batch, model_ctx.mesh)


def join_prompts(model_ctx: ModelContext, parts: Sequence[Prompts]) -> tuple[Prompts, np.ndarray]:
    """Join micro-batches on the device; return the prompts, and the index in the batch of each row.

    Each batch shard joins its own rows and images, so nothing moves between devices:

        2 micro-batches of 4 rows on 2 shards      rows 0 1 | 2 3      4 5 | 6 7
        joined                                     rows 0 1 4 5 | 2 3 6 7

    The indices are those of this process's rows.
    """
    rows = len(parts[0].tokens) // jax.process_count()
    index = np.arange(len(parts) * rows).reshape(len(parts), model_ctx.shards, -1)
    order = index.swapaxes(0, 1).ravel()
    if len(parts) == 1:
        return parts[0], order
    places, structure = jax.tree.flatten(jax.tree.map(lambda x: x.sharding, parts[0]))
    v = model_ctx.cfg.vision
    area = v.merge**2 if v else 1
    program = _join_program(len(parts), structure, tuple(places), area)
    return program(*parts), order


@functools.lru_cache(maxsize=16)
def _join_program(
    count: int, structure: Any, places: tuple[NamedSharding, ...], area: int
) -> Callable[..., Prompts]:
    """Return the program that joins `count` micro-batches with these shardings.

    area: patches of a vision feature.
    """
    shardings = structure.unflatten(places)
    specs = jax.tree.map(lambda x: x.spec, shardings)

    def join_shard(*parts: Prompts) -> Prompts:
        patches = parts[0].patches
        numbered = [
            p.replace(slots=jnp.where(p.slots < 0, -1, p.slots + i * patches // area))
            for i, p in enumerate(parts)
        ]
        # Position ids begin with the axis of time, height and width, images with that of shards.
        axes = Prompts(tokens=0, positions=1, segments=0, slots=0, vision=1, tower_states=-2)
        return jax.tree.map(
            lambda axis, *xs: jax.tree.map(lambda *x: jnp.concatenate(x, axis), *xs),
            axes,
            *numbered,
        )

    mesh = places[0].mesh
    joined = jax.shard_map(join_shard, mesh=mesh, in_specs=(specs,) * count, out_specs=specs)
    return jax.jit(joined, out_shardings=shardings)


def target_buckets(length: int) -> list[int]:
    """Return the buckets for the number of targets in rows of `length` tokens.

    There are only three: the buckets affect nothing but the cost of the unembedding.
    """
    return sorted({max(length >> k, min(length, MIN_RESPONSE_BUCKET)) for k in (0, 2, 4)})


def response_buckets(masks: Sequence[np.ndarray], limit: int) -> list[int]:
    """Return the bucket of each mask that holds its longest response, over all processes."""
    own = [max(1, int(mask.sum(1).max())) for mask in masks]
    return [response_bucket(int(n), limit) for n in np.max(distributed.gather_objects(own), 0)]


def response_bucket(longest: int, limit: int) -> int:
    """Return the bucket of responses of at most `longest` tokens."""
    return smallest_bucket(max(1, longest), length_buckets(limit, MIN_RESPONSE_BUCKET))


def group_batch(
    model_ctx: ModelContext,
    prompts: Prompts,
    tokens: np.ndarray,
    mask: np.ndarray,
    *,
    extra: dict[str, Any],
    prompt_mask: np.ndarray | None = None,
    longest: int | None = None,
) -> Batch:
    """Return Q prompts on the mesh with their Q * G responses, packed.

    prompt_mask: [Q P] the tokens of this process's prompts; None = read them from the device
    longest: the length of the packed rows; None = that of the longest one
    """
    if prompt_mask is None:
        prompt_mask = local_rows(prompts.segments) > 0
    mask = mask.astype(bool)
    where, packing = plan_packing(prompt_mask, mask, model_ctx.shards, longest)
    arrays = (tokens, mask, where, extra, packing)
    return Batch(prompts, *place_rows(arrays, model_ctx.mesh))


def with_other_prompts(model_ctx: ModelContext, batch: Batch, prompts: Prompts) -> Batch:
    """Return groups with the targets of `batch`, in the same order, after other prompts."""
    masks = local_rows(prompts.segments) > 0, local_rows(batch.mask)
    where, packing = place_rows(plan_packing(*masks, model_ctx.shards), model_ctx.mesh)
    return batch.replace(prompts=prompts, where=where, packing=packing, extra={})
