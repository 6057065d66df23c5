"""What a step learns from: gold answers, own correct answers, another run's answers, or rollouts with rewards (`rollouts`).

gold      row -> conversation with its target                                -> one update
self      a window of rows -> own answers -> the correct ones                -> one update a step, cycling through them
corpus    a rollouts/*.jsonl -> its correct answers                          -> one update
rollouts  row -> prompt -> answers -> rewards -> advantages                  -> `updates_per_batch` updates
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from cptjax.data.cost import WorkCost, conversation_flops
from cptjax.data.device_batches import batch_slices, conversation_batch, rows_per_process
from cptjax.data.model_context import ModelContext
from cptjax.data.prompts import EncodedExample
from cptjax.generation.sampling_config import SamplingConfig
from cptjax.tasks.prompted_task import PromptedTask
from cptjax.training.algorithms.losses import LossConfig
from cptjax.types import Batch, Params


@dataclasses.dataclass
class StepBatch:
    """One step's learning: optimiser updates, each of some micro-batches; what to log; rows for the rollouts file."""

    updates: Iterator[list[Batch]]
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    rollout_rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    cost: WorkCost = WorkCost()
    batches_taken: int = 1  # from the stream


@dataclasses.dataclass(frozen=True)
class BatchBuilder:
    """All that turning rows into lessons needs, beside the parameters."""

    model_ctx: ModelContext
    prompted_tasks: dict[str, PromptedTask]
    sampling: SamplingConfig
    method: Any  # config.method of the stage
    loss: LossConfig
    batch_size: int  # prompts or conversations of a step, over all processes
    micro_batch: int
    pack: bool
    score: Callable[[Params, Batch], jax.Array]  # [B A] of a batch's targets

    @property
    def training_ctx(self) -> ModelContext:
        """The runtime of rows to learn from."""
        return self.model_ctx.longer(
            extra_response_tokens(self.method, self.sampling.max_new_tokens)
        )

    def conversation_batches(self, items: Sequence[EncodedExample]) -> list[list[Batch]]:
        """Conversations with their answers -> the micro-batches of one update."""
        rows = rows_per_process(self.model_ctx, self.batch_size, self.micro_batch, fill=True)
        parts = [
            items[p]
            for p in batch_slices(
                len(items), -(-(self.micro_batch or self.batch_size) // jax.process_count())
            )
        ]
        return [
            [
                conversation_batch(
                    self.training_ctx, [i.encoded for i in part], rows=rows, pack=self.pack
                )
                for part in parts
            ]
        ]


def extra_response_tokens(method: Any, max_new_tokens: int) -> int:
    """Tokens by which a row to learn from may be longer than a prompt: a sampled response and the end of its line."""
    return max_new_tokens + 1 if method.source in ("self", "corpus") else 0


def sft_batch(
    builder: BatchBuilder, items: Sequence[EncodedExample], forwards: int = 0
) -> StepBatch:
    """Conversations to imitate; `forwards` further models score them."""
    work = sum(conversation_flops(builder.model_ctx.cfg, i.encoded) for i in items)
    tokens = sum(len(i.encoded) for i in items)
    return StepBatch(
        iter(builder.conversation_batches(items)),
        cost=WorkCost(flops=(3 + forwards) * work, seen=tokens, trained=tokens),
    )
