"""The memory of a continual-learning method: open it for a stage, fill it at the stage's end."""

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from cptjax import sharding
from cptjax.common import console, distributed
from cptjax.common.program import Program
from cptjax.common.signals import SamplingStopped
from cptjax.config import Stage
from cptjax.continual.open_run import Run
from cptjax.data.collate import EncodedConversation
from cptjax.data.cost import WorkCost, conversation_flops, sampling_cost
from cptjax.data.device_batches import batch_slices, conversation_batch, pad_to_shards
from cptjax.data.loader import PrepareRow, RowCache, prepare_row
from cptjax.data.mixture import Mixture, RowRef
from cptjax.data.model_context import ModelContext
from cptjax.data.prompts import make_example_encoder
from cptjax.generation import generate
from cptjax.generation.sampling_config import SamplingConfig, rollout_sampling
from cptjax.models.flops import PassCosts
from cptjax.models.logprobs import make_top_logps_program
from cptjax.training import build, programs
from cptjax.training.algorithms.continual_learning.hooks import ContinualMethod, MemorySettings
from cptjax.training.algorithms.continual_learning.memory import (
    MemoryArrays,
    empty_memory,
    filled_rows,
    memory_shapes,
    sample_reservoir,
)
from cptjax.training.memory_batches import MemoryBatches, ReadPrompts, join_response
from cptjax.training.programs import AbstractStage
from cptjax.types import Example, Params

SAMPLING_KEY = 2**30 + 1  # in the place of a step, whose keys are counted from 0


# ---- in a stage ----------------------------------------------------------------------------------


def open_memory(run: Run, stage: Stage, kept: dict[str, Any]) -> MemoryBatches | None:
    """Return the batches of the memory from earlier stages; None = the stage has no memory."""
    objective = build.memory_objective_from_config(stage.config)
    if objective is None:
        return None
    name, settings = objective.method.name, objective.method.memory
    check_memory(name, settings, run.model_ctx.cfg.text.vocab)
    if name not in kept:
        return None
    rows = filled_rows(kept[name])
    return MemoryBatches(
        run.model_ctx.with_longer_rows(settings.tokens),
        kept[name],
        Mixture((rows,), settings.batch, seed=run.config.seed, stage=stage.number),
        make_prompt_reader(run, run.stages[: stage.number - 1], rows),
    )


def check_memory(name: str, settings: MemorySettings, vocab: int) -> None:
    """Refuse a memory that does not fit the model or the processes."""
    if settings.top_k >= vocab:
        raise ValueError(
            f"{name}: top_k={settings.top_k}: expected less than the {vocab} tokens of the model's "
            "vocabulary"
        )
    if settings.batch % jax.process_count():
        raise ValueError(
            f"{name}: batch={settings.batch}: expected a multiple of the {jax.process_count()} "
            "processes, each of which reads a share"
        )


def make_prompt_reader(run: Run, stages: Sequence[Stage], cached: int) -> ReadPrompts:
    """Return a function that encodes the prompts of rows of these stages, the first of the run.

    cached: the number of rows that may be kept encoded
    """
    sources: list[Sequence[Example]] = []
    encoders: list[PrepareRow] = []
    for stage in stages:
        more, encode = stage_rows(run, stage, with_gold=False)
        sources += more
        encoders += [encode] * len(more)
    cache = RowCache(cached)

    def read(refs: Sequence[RowRef]) -> list[EncodedConversation]:
        items = cache.get(
            refs, lambda refs: [prepare_row(sources, encoders[ref.source], ref) for ref in refs]
        )
        return [item.encoded for item in items]

    return read


def stage_rows(
    run: Run, stage: Stage, with_gold: bool
) -> tuple[list[Sequence[Example]], PrepareRow]:
    """Return the training rows of a stage's tasks, and the function that encodes them."""
    c, datasets = stage.config, run.datasets
    prompted_tasks = {name: datasets.prompted_task(name, c) for name in stage.tasks}
    limit = max(run.model_ctx.buckets)
    encode = make_example_encoder(run.model_ctx, prompted_tasks, with_gold, limit)
    return [datasets.examples(name, "train", c) for name in stage.tasks], encode


# ---- at the end of a stage -----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Responses:
    """Prompts of this process with their responses."""

    prompts: list[EncodedConversation]
    tokens: list[np.ndarray]
    cost: WorkCost = WorkCost()


# Rows and the number of each among all new rows -> their responses.
Respond = Callable[[Sequence[RowRef], np.ndarray], Responses]


def memory_sampling(config: ConfigDict, settings: MemorySettings) -> SamplingConfig | None:
    """Return how the policy samples the responses of a memory; None = they are gold responses."""
    if config.method.source in ("gold", "gold+corpus"):
        return None
    return dataclasses.replace(
        rollout_sampling(config),
        group=1,
        max_new_tokens=min(settings.tokens, config.rollout.max_new_tokens),
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        min_p=0.0,
    )


def make_responder(run: Run, stage: Stage, settings: MemorySettings, params: Params) -> Respond:
    """Return the function that reads or samples the responses of a stage's rows."""
    sampling, model_ctx = memory_sampling(stage.config, settings), run.model_ctx
    sources, encode = stage_rows(run, stage, with_gold=sampling is None)
    read = lambda refs: [prepare_row(sources, encode, ref).encoded for ref in refs]

    def read_gold(refs: Sequence[RowRef], numbers: np.ndarray) -> Responses:
        prompts, tokens = zip(*map(split_response, read(refs)), strict=True)
        return Responses(list(prompts), [t[: settings.tokens] for t in tokens])

    if sampling is None:
        return read_gold
    weights = generate.prepare_weights(model_ctx, params, sampling)
    stage_key = jax.random.fold_in(jax.random.key(run.config.seed), stage.number)
    key = jax.random.fold_in(stage_key, SAMPLING_KEY)

    def sample(refs: Sequence[RowRef], numbers: np.ndarray) -> Responses:
        prompts = read(refs)
        out = generate.sample_responses(model_ctx, weights, prompts, key, numbers, sampling)
        mask = out.mask.astype(bool)
        return Responses(
            prompts,
            [tokens[kept] for tokens, kept in zip(out.tokens, mask, strict=True)],
            sampling_cost(model_ctx.cfg, prompts, mask.sum(1, keepdims=True)),
        )

    return sample


def split_response(encoded: EncodedConversation) -> tuple[EncodedConversation, np.ndarray]:
    """Return the prompt of a conversation, and the tokens of its last response."""
    end = np.flatnonzero(encoded.loss_mask)[-1] + 1
    start = np.flatnonzero(~encoded.loss_mask[:end])[-1] + 1
    names = ("tokens", "types", "positions", "loss_mask")
    prompt = {name: getattr(encoded, name)[..., :start] for name in names}
    return dataclasses.replace(encoded, **prompt), encoded.tokens[start:end]


def add_stage_rows(
    run: Run, stage: Stage, method: ContinualMethod, params: Params, memory: MemoryArrays | None
) -> tuple[MemoryArrays, WorkCost]:
    """Return the memory with rows of a stage that has ended, and the cost of all processes.

    params: all parameters after the stage
    """
    settings = method.memory
    memory, refs, slots = choose_rows(run, stage, settings, memory)
    model_ctx, count = run.model_ctx, jax.process_count()
    respond = make_responder(run, stage, settings, params)
    rows = pad_to_shards(stage.config.train.batch, sharding.batch_shards(model_ctx.mesh)) // count
    total = WorkCost()
    with (
        jax.set_mesh(model_ctx.mesh),
        console.progress_bar(f"memory of {method.name}", total=len(refs)) as bar,
    ):
        for part in batch_slices(len(refs), rows * count):
            if run.stop_signals.agreed():
                raise SamplingStopped
            # Each process takes a share; the last row is repeated where there are too few.
            numbers = part.start + jax.process_index() * rows + np.arange(rows)
            numbers = np.minimum(numbers, len(refs) - 1)
            responses = respond([refs[i] for i in numbers], numbers)
            stored, cost = store_responses(model_ctx, stage.config, settings, params, responses)
            parts, costs = zip(*distributed.gather_objects((stored, cost)), strict=True)
            new = slots[part]
            for name in stored:
                memory[name][new] = np.concatenate([p[name] for p in parts])[: len(new)]
            total += sum(costs, WorkCost())
            bar.advance(len(new))
    if cut := int(np.sum(memory["length"][slots] == settings.tokens)):
        console.print_message(
            f"stage {stage.number}: {cut} of {len(slots)} responses have tokens={settings.tokens} "
            f"or more; the memory of {method.name} has their first tokens"
        )
    return memory, total


def choose_rows(
    run: Run, stage: Stage, settings: MemorySettings, memory: MemoryArrays | None
) -> tuple[MemoryArrays, list[RowRef], np.ndarray]:
    """Choose rows of a stage for the memory.

    Return a memory that names them, the rows by the number of their task in the stage, and their
    slots.
    """
    memory = copy.deepcopy(memory) if memory else empty_memory(settings)
    sizes = [len(examples) for examples in stage_rows(run, stage, with_gold=False)[0]]
    places = [RowRef(source, i) for source, size in enumerate(sizes) for i in range(size)]
    seed = (run.config.seed, stage.number)
    slots, chosen = sample_reservoir(int(memory["seen"]), len(places), settings.rows, seed)
    refs = [places[i] for i in chosen]
    earlier = sum(len(other.tasks) for other in run.stages[: stage.number - 1])
    memory["source"][slots] = [earlier + ref.source for ref in refs]
    memory["row"][slots] = [ref.index for ref in refs]
    memory["seen"] += len(places)
    return memory, refs, slots


def store_responses(
    model_ctx: ModelContext,
    config: ConfigDict,
    settings: MemorySettings,
    params: Params,
    responses: Responses,
) -> tuple[MemoryArrays, WorkCost]:
    """Return what the memory stores of this process's responses, and the cost so far."""
    shapes = memory_shapes(dataclasses.replace(settings, rows=len(responses.tokens)))
    names = [name for name in shapes if name not in ("seen", "source", "row")]
    stored = {name: np.zeros(shapes[name].shape, shapes[name].dtype) for name in names}
    for row, tokens in enumerate(responses.tokens):
        stored["tokens"][row, : len(tokens)] = tokens
        stored["length"][row] = len(tokens)
    if not settings.top_k:
        return stored, responses.cost
    encoded = list(map(join_response, responses.prompts, responses.tokens))
    batch = conversation_batch(
        model_ctx.with_longer_rows(settings.tokens), encoded, rows=len(encoded)
    )
    program = make_top_logps_program(
        model_ctx.cfg, model_ctx.dtype, config.train.chunk, settings.top_k
    )
    for name, array in zip(("ids", "logps"), program(params, batch), strict=True):
        for row, tokens in enumerate(responses.tokens):
            stored[name][row, : len(tokens)] = sharding.local_rows(array)[row, : len(tokens)]
    costs = PassCosts(text=1, vision=1)  # one forward pass
    work = sum(conversation_flops(model_ctx.cfg, e, costs) for e in encoded)
    return stored, responses.cost + WorkCost(flops=work, seen=sum(map(len, encoded)))


def stage_memory_programs(stage: AbstractStage) -> list[Program]:
    """Return the programs that fill the memory of a stage with abstract arguments."""
    if stage.memory is None:
        return []
    name, settings = stage.memory.method.name, stage.memory.method.memory
    rows, listed = pad_to_shards(stage.config.train.batch, stage.shards), []
    if sampling := memory_sampling(stage.config, settings):
        listed += programs.response_programs(stage, f"{name}: responses", rows, [sampling], 0.0)
    if settings.top_k:
        program = make_top_logps_program(
            stage.cfg, stage.dtype, stage.config.train.chunk, settings.top_k
        )
        args = (stage.params, programs.abstract_memory_rows(stage, rows))
        listed.append(Program(f"{name}: likeliest tokens", program, args, 0.0, 0.0))
    return listed
