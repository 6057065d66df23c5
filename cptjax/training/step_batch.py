"""What one step trains on, and how conversations become its device batches.

source    rows -> responses                                            updates per step
gold      row -> conversation with its gold response                   1
self      a window of rows -> correct responses of the policy          1
corpus    a rollouts/*.jsonl -> its correct responses                  1
gold+corpus   both, in proportion to the number of responses           1
rollouts  row -> prompt -> responses -> rewards -> advantages          updates_per_batch * passes
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from cptjax import sharding
from cptjax.common import device_time, phases
from cptjax.data.collate import EncodedConversation
from cptjax.data.cost import WorkCost, conversation_flops
from cptjax.data.device_batches import batch_slices, conversation_batch, micro_batch_layout
from cptjax.data.model_context import ModelContext
from cptjax.data.prompts import EncodedExample
from cptjax.generation.sampling_config import SamplingConfig
from cptjax.models.config import ModelConfig
from cptjax.models.flops import PassCosts
from cptjax.tasks.prompted_task import PromptedTask
from cptjax.training import tower_states
from cptjax.training.algorithms.distillation import Teacher
from cptjax.training.algorithms.losses import LossConfig
from cptjax.training.method_needs import MethodNeeds, method_needs
from cptjax.types import Array, Batch, Params, Prompts


@dataclasses.dataclass
class StepBatch:
    """What one step trains on: the micro-batches of each update, with metrics and cost."""

    updates: Iterator[list[Batch]]
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    rollout_rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    cost: WorkCost = WorkCost()
    memory: list[Batch] = dataclasses.field(default_factory=list)  # one for each update, or none
    batches_taken: int = 1  # from the stream
    # What continual-learning methods carry to the next step, by name.
    carried: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class StepLayout:
    """How the prompts or conversations of a step are cut, over all processes.

    train.batch=16, method.updates_per_batch=2, train.micro_batch=4, method.passes=3:
    2 parts of 2 micro-batches of 4 rows each; 6 updates, on parts 0 1 0 1 0 1
    """

    rows: int  # of a micro-batch, with the empty rows that fill it up to a multiple of the shards
    filled_rows: int  # of a micro-batch, without the empty rows
    micro_batches: int  # of a part
    parts: int  # of the batch; each update trains on one
    passes: int  # over all parts

    @property
    def updates(self) -> int:
        return self.parts * self.passes

    @property
    def total_micro_batches(self) -> int:
        """The micro-batches of the batch."""
        return self.parts * self.micro_batches


def step_layout(method: Any, batch: int, micro_batch: int, shards: int) -> StepLayout:
    """Return how a batch is cut for a mesh of so many batch shards; refuse what does not divide."""
    part = batch // method.updates_per_batch
    rows, count = micro_batch_layout(part, micro_batch, shards, fill=method.source != "rollouts")
    return StepLayout(rows, part // count, count, method.updates_per_batch, method.passes)


@dataclasses.dataclass(frozen=True)
class BatchBuilder:
    """Builds the batches of a stage; parameters are passed to each call."""

    model_ctx: ModelContext
    prompted_tasks: dict[str, PromptedTask]
    sampling: SamplingConfig
    method: Any  # config.method of the stage
    loss: LossConfig
    batch_size: int  # prompts or conversations per step, over all processes
    micro_batch: int  # prompts or conversations per device pass; 0 = all
    pack: bool  # put several conversations into a row
    score: Callable[[Params, Batch], Array]  # log-probabilities [B A] of a batch's targets
    # The frozen vision tower that the models of a step share; None = each runs its own.
    tower: Params | None = None
    # `score` for a reference of a folder, which has its own config; None = `score`.
    score_reference: Callable[[Params, Batch], Array] | None = None
    reference_cfg: ModelConfig | None = None  # None = the policy's

    @property
    def needs(self) -> MethodNeeds:
        return method_needs(self.method, self.sampling.ahead)

    @property
    def layout(self) -> StepLayout:
        """How the rows of a step are cut."""
        shards = sharding.batch_shards(self.model_ctx.mesh)
        return step_layout(self.method, self.batch_size, self.micro_batch, shards)

    @property
    def training_ctx(self) -> ModelContext:
        """The model context for training rows, which may be longer than prompts."""
        more = extra_response_tokens(self.method, self.sampling.max_new_tokens)
        return self.model_ctx.with_longer_rows(more)

    def prompt_slices(self, count: int) -> list[slice]:
        """Cut the `count` prompts of this process into micro-batches of whole groups."""
        return batch_slices(count, self.layout.rows // jax.process_count())

    def conversation_batches(self, items: Sequence[EncodedExample]) -> list[Batch]:
        """Build the micro-batches of one update from conversations with their responses."""
        layout, count = self.layout, jax.process_count()
        rows, share = layout.rows // count, -(-layout.filled_rows // count)
        batches = [
            conversation_batch(
                self.training_ctx, [i.encoded for i in items[part]], rows=rows, pack=self.pack
            )
            for part in batch_slices(len(items), share)
        ]
        prompts = self.share_tower([batch.prompts for batch in batches])
        return [b.replace(prompts=p) for b, p in zip(batches, prompts, strict=True)]

    def place_prompts(self, encoded: Sequence[EncodedConversation]) -> list[Prompts]:
        """Collate this process's prompts, and place the micro-batches of groups on the mesh."""
        slices = self.prompt_slices(len(encoded))
        return self.share_tower(self.model_ctx.place_prompt_batches([encoded[p] for p in slices]))

    def share_tower(self, prompts: Sequence[Prompts]) -> list[Prompts]:
        """Replace images by their states in the tower, if the models of a step share it."""
        if self.tower is None:
            return list(prompts)
        began, ctx = time.perf_counter(), self.model_ctx
        program = tower_states.make_tower_program(ctx.cfg, ctx.dtype)
        with jax.set_mesh(ctx.mesh):
            states = [p.vision and program(self.tower, p.vision) for p in prompts]
        device_time.watch("vision", began, states)
        return [
            tower_states.replace_images(p, s, self.needs) if s else p
            for p, s in zip(prompts, states, strict=True)
        ]

    def scorers(
        self, reference: Params | None, teacher: Teacher | None
    ) -> list[tuple[ModelConfig, bool]]:
        """Return the config of each model that scores a batch, and whether it runs a tower."""
        shared = self.tower is not None
        found = []
        if reference is not None:
            cfg = self.reference_cfg or self.model_ctx.cfg
            found.append((cfg, self.needs.other_reference or not shared))
        if teacher is not None:
            found.append((teacher.model_ctx.cfg, self.needs.teacher == "model" or not shared))
        return found

    def score_batches(
        self, model: str, params: Params | None, batches: Sequence[Batch]
    ) -> list[Array]:
        """Start to compute the log-probabilities of a model: policy, reference or start.

        A reference of a folder has its own config and runs its own vision tower.
        """
        began, score = time.perf_counter(), self.score
        if model == "reference" and self.needs.other_reference:
            score = self.score_reference or score
            batches = [tower_states.for_other_tower(batch) for batch in batches]
        logps = [score(params, batch) for batch in batches]
        device_time.watch(model, began, logps)
        return logps


def extra_response_tokens(method: Any, max_new_tokens: int) -> int:
    """Return how much longer than a prompt a row may be: a response and the end of its turn."""
    return max_new_tokens + 1 if method.source in ("self", "corpus", "gold+corpus") else 0


def attach_arrays(batches: Sequence[Batch], **arrays: Sequence[Array]) -> list[Batch]:
    """Return the batches with the given device arrays, one per batch, added to their `extra`."""
    return [
        batch.replace(extra=batch.extra | {name: parts[i] for name, parts in arrays.items()})
        for i, batch in enumerate(batches)
    ]


def iterate_updates(
    updates: Sequence[Sequence[Batch]],
    teacher: Teacher | None = None,
    seen: Sequence[Sequence[Batch]] | None = None,
) -> Iterator[list[Batch]]:
    """Yield the micro-batches of each update, with the states of a teacher on `seen`.

    `seen` are the batches with the prompts that the teacher sees; None = the same batches. The
    states [B A D] are large, so those of an update are computed just before the update.
    """
    for batches, seen_batches in zip(updates, seen or updates, strict=True):
        if teacher is None:
            yield list(batches)
        else:
            states = [teacher.compute_states(batch) for batch in seen_batches]
            yield attach_arrays(batches, **{name: [s[name] for s in states] for name in states[0]})


def sft_step_batch(
    builder: BatchBuilder,
    items: Sequence[EncodedExample],
    reference: Params | None = None,
    teacher: Teacher | None = None,
) -> StepBatch:
    """Build the batch of an SFT step; the reference and the teacher score the same batches."""
    batches = builder.conversation_batches(items)
    if "ref_logps" in builder.needs.arrays:
        with phases.phase("logps"):
            ref_logps = builder.score_batches("reference", reference, batches)
        batches = attach_arrays(batches, ref_logps=ref_logps)
    cfg, costs = builder.model_ctx.cfg, builder.model_ctx.pass_costs
    encoded = [i.encoded for i in items]
    work = sum(conversation_flops(cfg, e, costs) for e in encoded)
    for scorer, own_tower in builder.scorers(reference, teacher):
        costs = PassCosts(text=1, vision=int(own_tower))
        work += sum(conversation_flops(scorer, e, costs) for e in encoded)
    tokens = sum(map(len, encoded))
    return StepBatch(
        iterate_updates([batches], teacher),
        cost=WorkCost(flops=work, seen=tokens, trained=tokens),
    )
