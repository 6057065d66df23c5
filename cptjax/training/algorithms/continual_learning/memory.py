"""A memory of training rows of finished stages, with a budget of rows or bytes.

Reservoir sampling (Vitter 1985) chooses the rows: after every stage the memory is a uniform sample,
without replacement, of the training rows of all finished stages. The arrays stay on the host:

    seen      []        training rows of the finished stages
    source    [N]       number of the row's task, counted over the tasks of all stages; -1 = empty
    row       [N]       index in the training rows of that task
    tokens    [N A]     the response
    length    [N]       tokens of the response
    ids       [N A k]   where a method stores them: the k likeliest tokens at each response token
    logps     [N A k+1] their log-probabilities, then that of all other tokens together

Prompts and images are not stored, but read again from the data. The response is the gold one if the
stage trains on gold responses. Otherwise it is one that the policy samples at the stage's end, from
its whole distribution at temperature 1: then the cross-entropy on the responses estimates the
divergence KL(policy at the stage's end || policy), up to a constant. Greedy responses would not,
and correct ones alone would change the distribution.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from cptjax.models.logprobs import token_logps
from cptjax.training.algorithms.continual_learning.hooks import (
    ContinualMethod,
    KeptLayout,
    MemorySettings,
    StageEnd,
)
from cptjax.types import Array, Batch, Mean, Params

MemoryArrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class MemoryMethod(ContinualMethod):
    """A method with a memory; its budget is `rows` or `max_bytes`."""

    rows: int | None = None
    max_bytes: int | None = None
    tokens: int = 256  # of a response; later ones are left out
    batch: int = 16  # rows of the memory in an update

    @property
    def stored_logps(self) -> int:
        """The likeliest tokens whose log-probabilities are stored."""
        return 0

    @property
    def memory(self) -> MemorySettings:
        settings = MemorySettings(self.rows or 0, self.tokens, self.stored_logps, self.batch)
        if self.max_bytes is None:
            return settings
        fixed, one = (memory_bytes(dataclasses.replace(settings, rows=n)) for n in (0, 1))
        return dataclasses.replace(settings, rows=max(self.max_bytes - fixed, 0) // (one - fixed))

    def check(self, config: ConfigDict) -> None:
        if (self.rows is None) == (self.max_bytes is None):
            raise ValueError(
                f"{self.name}: expected a budget of the memory, either rows or max_bytes, got "
                f"rows={self.rows}, max_bytes={self.max_bytes}"
            )
        for name in ("rows", "max_bytes", "tokens", "batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{self.name}: {name}={value}: expected at least 1")
        if not self.memory.rows:
            one = memory_bytes(dataclasses.replace(self.memory, rows=1))
            raise ValueError(
                f"{self.name}: max_bytes={self.max_bytes}: expected at least {one}, for one row; "
                "raise it or lower tokens"
            )

    def kept_shapes(self, layout: KeptLayout) -> dict[str, jax.ShapeDtypeStruct]:
        return memory_shapes(self.memory)

    def combine_gradients(
        self, gradient: Params, of_memory: Params
    ) -> tuple[Params, dict[str, Mean]]:
        return jax.tree.map(jnp.add, gradient, of_memory), {}

    def stage_end(self, end: StageEnd) -> tuple[Params, Any]:
        return end.trained, end.memory


def cross_entropy(hidden: Array, unembed: Array, batch: Batch, chunk: int) -> Array:
    """Return the negative log-probability of each response token [B A]."""
    logps, _ = token_logps(hidden, unembed, batch.targets.reshape(-1), chunk=chunk)
    return -logps.reshape(batch.targets.shape)


def memory_shapes(settings: MemorySettings) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes and types of the arrays of a memory."""
    n, a, k = settings.rows, settings.tokens, settings.top_k
    shapes = {"seen": (), "source": (n,), "row": (n,), "tokens": (n, a), "length": (n,)}
    if k:
        shapes["ids"] = (n, a, k)
    arrays = {name: jax.ShapeDtypeStruct(shape, np.int32) for name, shape in shapes.items()}
    if k:
        arrays["logps"] = jax.ShapeDtypeStruct((n, a, k + 1), np.float16)
    return arrays


def memory_bytes(settings: MemorySettings) -> int:
    """Return the size of a memory."""
    shapes = memory_shapes(settings).values()
    return sum(x.size * np.dtype(x.dtype).itemsize for x in shapes)


def empty_memory(settings: MemorySettings) -> MemoryArrays:
    """Return a memory without rows."""
    arrays = {name: np.zeros(x.shape, x.dtype) for name, x in memory_shapes(settings).items()}
    arrays["source"] -= 1
    return arrays


def filled_rows(memory: MemoryArrays) -> int:
    """Return the number of rows that a memory has."""
    return min(int(memory["seen"]), len(memory["source"]))


def sample_reservoir(
    seen: int, new: int, capacity: int, seed: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the slots that get a new row, in order, and which of the `new` rows each gets.

    Row number t of all rows, counted from 0, takes slot t while there is room. Later it takes a
    random slot with probability capacity / (t + 1).
    """
    t = np.arange(seen, seen + new)
    # numpy guarantees stable raw bits of its generators.
    raw = np.random.PCG64(np.random.SeedSequence(seed)).random_raw(new)
    slot = np.where(t < capacity, t, ((raw >> 11) * 2.0**-53 * (t + 1)).astype(np.int64))
    taken = np.flatnonzero(slot < capacity)
    slots, last = np.unique(slot[taken][::-1], return_index=True)  # a later row replaces
    return slots, taken[::-1][last]
