"""Groups packed into one row per batch shard, so that the decoder processes almost no padding.

A batch has prompts [Q P], padded on the left, and responses [B R], padded on the right. All real
tokens of a batch shard form one row, group by group. The last token of a response predicts nothing
and is left out:

    prompts    - p p      responses    a a a -      packed    p p a a b q q q c c c d -
               q q q                   b b - -
                                       c c c c
                                       d d - -

On TPUs and NVIDIA GPUs, kernels attend in the packed rows (`attention_packed`,
`attention_packed_gpu`). Other kernels know what a prompt and its responses are only in the padded
form, to which queries, keys and values go back (`attention.attend_padded_groups`). All other work
of the decoder, and the unembedding of the targets, is done on packed arrays.
"""

import jax
import jax.numpy as jnp

from cptjax.types import Array, Batch, Packing, Prompts


@jax.custom_vjp
def permute(x: Array, index: Array, inverse: Array) -> Array:
    """Return the entries [S m ...] at `index` [S m] of each shard's entries x [S n ...].

    Where `index` is -1, the result is 0. `inverse` [S n] has the place of each entry in the
    result, or -1, so that the gradient is also a selection and not a sum of scattered entries.
    """
    return _select(x, index)


def _select(x: Array, index: Array) -> Array:
    index = index.reshape(*index.shape, *(1,) * (x.ndim - 2))
    return jnp.where(index < 0, 0, jnp.take_along_axis(x, jnp.maximum(index, 0), 1))


permute.defvjp(
    lambda x, index, inverse: (_select(x, index), inverse),
    lambda inverse, slope: (_select(slope, inverse), None, None),
)


def pack_tokens(
    prompts: Prompts, responses: Array, first_positions: Array, packing: Packing
) -> Prompts:
    """Return the packed rows [S N] of prompts [Q P] and responses [B R].

    first_positions: [Q] the position id of the first token of a response
    """
    shards, (b, r) = packing.source.shape[0], responses.shape
    first = jnp.repeat(first_positions, b // len(first_positions))
    ids = jnp.broadcast_to(first[:, None] + jnp.arange(r), (3, b, r))

    def pack(prompt: Array, response: Array) -> Array:
        parts = [x.reshape(shards, -1) for x in (prompt, response)]
        return _select(jnp.concatenate(parts, 1), packing.source)

    is_real = packing.source >= 0
    slots = pack(prompts.slots, jnp.full_like(responses, -1))
    return Prompts(
        tokens=pack(prompts.tokens, responses),
        positions=jax.vmap(pack)(prompts.positions, ids),
        segments=is_real.astype(prompts.segments.dtype),
        slots=jnp.where(is_real, slots, -1),
        vision=prompts.vision,
        tower_states=prompts.tower_states,
        pool=prompts.pool,
    )


def to_padded(x: Array, prompts: tuple, responses: tuple, packing: Packing) -> tuple[Array, Array]:
    """Return x [S N ...] as arrays of prompts [Q P ...] and of responses [Q G R ...].

    prompts: (Q, P); responses: (Q, G, R)
    """
    padded = permute(x, packing.place, packing.source)
    count = prompts[0] // x.shape[0] * prompts[1]  # of the shard's prompt tokens with padding
    head, tail = padded[:, :count], padded[:, count:]
    return head.reshape(*prompts, *x.shape[2:]), tail.reshape(*responses, *x.shape[2:])


def to_packed(head: Array, tail: Array, packing: Packing) -> Array:
    """Return arrays of prompts [Q P ...] and of responses [Q G R ...] as packed rows [S N ...]."""
    shards, rest = packing.source.shape[0], head.shape[2:]
    padded = jnp.concatenate([x.reshape(shards, -1, *rest) for x in (head, tail)], 1)
    return permute(padded, packing.source, packing.place)


def flat_targets(batch: Batch) -> Array:
    """Return the targets [n] in the order of the states of `logprobs.predicting_states`."""
    if batch.packing is None:
        return batch.targets.reshape(-1)
    targets = batch.targets.reshape(len(batch.packing.real), -1)
    return _select(targets, batch.packing.real).reshape(-1)


def by_target(batch: Batch, x: Array) -> Array:
    """Return what was computed for `flat_targets` [n ...] as [B A ...].

    Padding of packed groups gets 0, other padding an arbitrary value.
    """
    if batch.packing is not None:
        real, spread = batch.packing.real, batch.packing.spread
        x = permute(x.reshape(*real.shape, *x.shape[1:]), spread, real)
        x = x.reshape(-1, *x.shape[2:])
    return x.reshape(*batch.targets.shape, *x.shape[1:])
