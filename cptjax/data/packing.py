"""Plan on the host how the groups of a batch are packed, in few sizes (`models/packed_groups`)."""

import jax
import numpy as np

from cptjax.common import distributed
from cptjax.types import Packing

# Size of packed rows, and of their targets. All sizes are multiples of it; those of the rows of
# balanced shards, of half of it.
SMALLEST = 512
LONG_ROW = 4096  # tokens from which padding costs more than the compilation for another size


def row_size(tokens: int, capacity: int, balanced: bool = False) -> int:
    """Return the length of packed rows with so many tokens.

    There are 4 sizes from 2^k to 2^(k+1), of long rows 8, so that at most an eighth of the tokens
    is added. No row is longer than `capacity`, the number of tokens of the padded form.

    balanced: the rows of balanced shards (`data.balance`) hardly differ from step to step, so 16
        sizes do not make many programs
    """
    if balanced:
        return min(_round_up(tokens, 16, SMALLEST // 2), capacity)
    return min(_round_up(tokens, 8 if tokens > LONG_ROW else 4), capacity)


def target_size(targets: int, capacity: int) -> int:
    """Return a number of targets of a packed row, of 2 sizes from 2^k to 2^(k+1).

    They only affect the cost of the unembedding.
    """
    return min(_round_up(targets, 2), capacity)


def _round_up(n: int, steps: int, smallest: int | None = None) -> int:
    """Return the smallest of the sizes, `steps` from 2^k to 2^(k+1), that holds n."""
    step = max(smallest or SMALLEST, (1 << max(n - 1, 1).bit_length() - 1) // steps)
    return -(-max(n, 1) // step) * step


def plan_packing(
    prompt_mask: np.ndarray, mask: np.ndarray, shards: int, longest: int | None = None
) -> tuple[np.ndarray, Packing]:
    """Return the states [S A] that predict the targets, as indices in the packed rows, and a plan.

    All processes get the same sizes.

    prompt_mask: [Q P] the tokens of this process's prompts, which are padded on the left
    mask: [B R] the targets among the tokens of the responses
    shards: batch shards of this process
    longest: the length of the rows, where they are balanced; None = that of the longest one
    """
    (nq, p), (b, r) = prompt_mask.shape, mask.shape
    q, group = nq // shards, b // nq  # prompts of a shard, responses of a prompt
    mask = mask.astype(bool).reshape(shards, q * group * r)
    inputs = _predicting_inputs(mask.reshape(b, r))
    # The index in the padded arrays of a shard of each token, by group: its prompt, its responses.
    prompt_at = np.arange(q * p).reshape(q, p)
    response_at = q * p + np.arange(q * group * r).reshape(q, group * r)
    at = np.concatenate([prompt_at, response_at], 1)
    used = np.concatenate(
        [prompt_mask.reshape(shards, q, p), inputs.reshape(shards, q, group * r)], 2
    )
    sources = [at[shard] for shard in used]
    real = [np.flatnonzero(shard) for shard in mask]
    most = np.max(distributed.gather_objects((max(map(len, sources)), max(map(len, real)))), axis=0)
    source = _rows(sources, longest or row_size(int(most[0]), at.size))
    place = _inverse(source, at.size)
    targets = _rows(real, target_size(int(most[1]), mask.shape[1]))
    # The last token of the prompt predicts the first one of each response.
    before = np.concatenate([np.repeat(prompt_at[:, -1:], group, 0), response_at.reshape(-1, r)], 1)
    states = place[:, before[:, :-1].reshape(-1)]
    where = np.take_along_axis(states, np.maximum(targets, 0), 1)
    packing = Packing(source, place, targets, _inverse(targets, mask.shape[1]))
    return np.where(targets < 0, 0, where).astype(np.int32), packing


def packing_shapes(
    prompts: tuple[int, int],
    responses: tuple[int, int],
    shards: int,
    longest: int | None = None,
) -> tuple[jax.ShapeDtypeStruct, Packing]:
    """Return the largest shapes of `plan_packing`, for rows of at most `longest` tokens.

    None = without padding to leave out. prompts: (Q, P); responses: (B, R), of all processes, as
    `shards`
    """
    tokens, targets = (rows // shards * length for rows, length in (prompts, responses))
    longest = longest or tokens + targets
    real = target_size(min(longest, targets), targets)
    sizes = longest, tokens + targets, real, targets
    arrays = (jax.ShapeDtypeStruct((shards, n), np.int32) for n in sizes)
    packing = Packing(*arrays)
    return packing.real, packing


def _predicting_inputs(mask: np.ndarray) -> np.ndarray:
    """Return the tokens [B R] of responses before their last target."""
    r = mask.shape[1]
    lengths = np.where(mask.any(1), r - np.argmax(mask[:, ::-1], 1), 0)
    return np.arange(r) < lengths[:, None] - 1


def _rows(parts: list[np.ndarray], size: int) -> np.ndarray:
    rows = np.full((len(parts), size), -1, np.int32)
    for row, part in zip(rows, parts, strict=True):
        row[: len(part)] = part
    return rows


def _inverse(index: np.ndarray, size: int) -> np.ndarray:
    """Return for each of `size` entries where `index` [S n] has it, or -1."""
    inverse = np.full((len(index), size), -1, np.int32)
    for row, of_shard in zip(inverse, index, strict=True):
        found = np.flatnonzero(of_shard >= 0)
        row[of_shard[found]] = found
    return inverse
