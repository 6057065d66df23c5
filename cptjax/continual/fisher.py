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
from cptjax.training.algorithms.objective import Objective
from cptjax.types import Params


def make_example_gradient(
    rt: ModelContext, config: Any
) -> Callable[[Params, Params, EncodedConversation], Params]:
    """The gradient of one conversation's negative log-likelihood, summed over its answers' tokens."""
    opt = build.optimizer_from_config(config, {})
    begin = train_step.make_step_programs(
        rt.cfg,
        Objective("sft", config.train.chunk),
        opt,
        train_step.StateShardings(None, ()),
        rt.dtype,
    ).begin
    return lambda trained, frozen, encoded: (
        begin(trained, frozen, conversation_batch(rt, [encoded], rows=rt.shards)).gradient
    )


def update_fisher(current: Any, which: Stage, before: Params | None) -> tuple[Params, WorkCost]:
    """The Fisher of all stages so far: squared gradients of the gold answers' log-likelihood, one example at a time; what it cost."""
    rt, c = current.rt, which.config
    trained, frozen = current.split()
    courses = {name: current.course(name, c) for name in which.tasks}
    build = make_example_encoder(rt, courses, True, max(rt.ladder))
    sources = [current.examples(name, "train", c) for name in which.tasks]
    each = -(-c.method.penalty.samples // len(sources))
    seed = lambda number: (current.config.seed, which.number, number)
    rows = [
        source[i]
        for n, source in enumerate(sources)
        for i in permutation(len(source), seed(n))[:each].tolist()
    ]
    slope = make_example_gradient(rt, c)
    fisher, cost = regularizers.zero_fisher(trained), WorkCost()
    one = lambda gradient: jax.tree.map(
        lambda g: g / jax.process_count(), gradient
    )  # every process has brought the row
    add = jax.jit(lambda f, g: regularizers.add_fisher(f, one(g), len(rows)), donate_argnums=0)
    with jax.set_mesh(rt.mesh), console.progress_bar("Fisher information", total=len(rows)) as bar:
        for example in rows:  # one example a pass: a sum of squares is not the square of a sum
            if current.sigterm.agreed():
                raise SamplingStopped
            encoded = build(example).encoded
            fisher = add(fisher, slope(trained, frozen, encoded))
            cost += WorkCost(flops=3 * conversation_flops(rt.cfg, encoded))
            bar.advance()
    return fisher if before is None else regularizers.merge_fisher(before, fisher), cost
