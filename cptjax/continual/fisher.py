"""Elastic weight consolidation: the diagonal Fisher information of a stage, and penalties as programs take them."""

from collections.abc import Callable
from typing import Any

import jax

from cptjax.common import console
from cptjax.common.shuffle import permutation
from cptjax.common.signals import SamplingStopped
from cptjax.config import Stage
from cptjax.data.collate import EncodedConversation
from cptjax.data.cost import WorkCost, conversation_flops
from cptjax.data.device_batches import conversation_batch
from cptjax.data.model_context import ModelContext
from cptjax.data.prompts import make_example_encoder
from cptjax.training import build, train_step
from cptjax.training.algorithms import regularizers
from cptjax.training.algorithms.losses import LossConfig
from cptjax.training.algorithms.objective import Objective
from cptjax.types import Params


def make_example_gradient(
    model_ctx: ModelContext, config: Any
) -> Callable[[Params, Params, EncodedConversation], Params]:
    """The gradient of one conversation's negative log-likelihood, summed over its answers' tokens."""
    opt = build.optimizer_from_config(config, {})
    begin = train_step.make_step_programs(
        model_ctx.cfg,
        Objective(LossConfig.plain("sft", config.train.chunk)),
        opt,
        train_step.StateShardings(None, ()),
        model_ctx.dtype,
    ).begin
    return lambda trained, frozen, encoded: (
        begin(
            trained, frozen, conversation_batch(model_ctx, [encoded], rows=model_ctx.shards)
        ).gradient
    )


def update_fisher(run: Any, stage: Stage, before: Params | None) -> tuple[Params, WorkCost]:
    """The Fisher of all stages so far: squared gradients of the gold answers' log-likelihood, one example at a time; what it cost."""
    model_ctx, c = run.model_ctx, stage.config
    trained, frozen = run.split()
    prompted_tasks = {name: run.prompted(name, c) for name in stage.tasks}
    build = make_example_encoder(model_ctx, prompted_tasks, True, max(model_ctx.buckets))
    sources = [run.examples(name, "train", c) for name in stage.tasks]
    each = -(-c.method.penalty.samples // len(sources))
    seed = lambda number: (run.config.seed, stage.number, number)
    rows = [
        source[i]
        for n, source in enumerate(sources)
        for i in permutation(len(source), seed(n))[:each].tolist()
    ]
    slope = make_example_gradient(model_ctx, c)
    fisher, cost = regularizers.zero_fisher(trained), WorkCost()
    one = lambda gradient: jax.tree.map(
        lambda g: g / jax.process_count(), gradient
    )  # every process has brought the row
    add = jax.jit(lambda f, g: regularizers.add_fisher(f, one(g), len(rows)), donate_argnums=0)
    with (
        jax.set_mesh(model_ctx.mesh),
        console.progress_bar("Fisher information", total=len(rows)) as bar,
    ):
        for example in rows:  # one example a pass: a sum of squares is not the square of a sum
            if run.sigterm.agreed():
                raise SamplingStopped
            encoded = build(example).encoded
            fisher = add(fisher, slope(trained, frozen, encoded))
            cost += WorkCost(flops=3 * conversation_flops(model_ctx.cfg, encoded))
            bar.advance()
    return fisher if before is None else regularizers.merge_fisher(before, fisher), cost
