"""Batches of a memory: rows of finished stages with their stored responses, for each update."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import jax
import numpy as np

from cptjax import sharding
from cptjax.data.collate import EncodedConversation
from cptjax.data.cost import WorkCost, conversation_flops
from cptjax.data.device_batches import conversation_batch, pad_to_shards
from cptjax.data.mixture import Mixture, RowRef
from cptjax.data.model_context import ModelContext
from cptjax.training.algorithms.continual_learning.memory import MemoryArrays
from cptjax.types import Batch

# Rows, whose source is the number of their task over all stages -> their prompts.
ReadPrompts = Callable[[Sequence[RowRef]], list[EncodedConversation]]


@dataclasses.dataclass(frozen=True)
class MemoryBatches:
    """The batches of a memory: a function of (seed, stage, update)."""

    model_ctx: ModelContext  # for rows of a prompt and its response
    memory: MemoryArrays
    order: Mixture  # of the memory's rows
    read_prompts: ReadPrompts

    def batches(self, updates: Iterable[int]) -> tuple[list[Batch], WorkCost]:
        """Build the batches of some updates; return them with the cost of this process's rows."""
        built = [self.batch(update) for update in updates]
        return [batch for batch, _ in built], sum((cost for _, cost in built), WorkCost())

    def batch(self, update: int) -> tuple[Batch, WorkCost]:
        """Build the batch of an update; return it with the cost of this process's rows."""
        shard = (jax.process_index(), jax.process_count())
        slots = [ref.index for ref in self.order.rows(update, shard)]
        stored = {name: array[slots] for name, array in self.memory.items() if array.ndim}
        places = zip(stored["source"].tolist(), stored["row"].tolist(), strict=True)
        prompts = self.read_prompts([RowRef(*place) for place in places])
        responses = zip(prompts, stored["tokens"], stored["length"], strict=True)
        encoded = [join_response(prompt, tokens[:n]) for prompt, tokens, n in responses]
        rows = pad_to_shards(self.order.batch, sharding.batch_shards(self.model_ctx.mesh))
        batch = conversation_batch(self.model_ctx, encoded, rows=rows // jax.process_count())
        arrays = {
            f"memory_{name}": _fit(stored[name], rows // jax.process_count(), batch)
            for name in ("ids", "logps")
            if name in stored
        }
        batch = batch.replace(extra=batch.extra | sharding.place_rows(arrays, self.model_ctx.mesh))
        tokens = sum(map(len, encoded))
        cfg, costs = self.model_ctx.cfg, self.model_ctx.pass_costs
        work = sum(conversation_flops(cfg, e, costs) for e in encoded)
        return batch, WorkCost(flops=work, seen=tokens, trained=tokens)


def join_response(prompt: EncodedConversation, tokens: Sequence[int]) -> EncodedConversation:
    """Return a prompt with the tokens of its response, which alone are trained on."""
    untrained = dataclasses.replace(prompt, loss_mask=np.zeros_like(prompt.loss_mask))
    return untrained.append_tokens(tokens, trained=len(tokens))


def _fit(stored: np.ndarray, rows: int, batch: Batch) -> np.ndarray:
    """Cut or pad stored arrays [n A k] to the rows and the targets of a batch."""
    width = batch.targets.shape[1]
    fitted = np.zeros((rows, width, stored.shape[2]), stored.dtype)
    fitted[: len(stored), : stored.shape[1]] = stored[:, :width]
    return fitted
