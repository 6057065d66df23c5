"""Elastic weight consolidation: the diagonal Fisher information of a stage, and penalties as programs take them."""

from collections.abc import Callable
from typing import Any

import jax

from cptjax import console, lessons, penalties, stage, train
from cptjax.batches import answers
from cptjax.batching import Encoded
from cptjax.classroom import prepare
from cptjax.drafts import Stopped
from cptjax.lessons import Spent
from cptjax.objectives import Objective
from cptjax.order import permutation
from cptjax.runtime import Runtime
from cptjax.settings import Stage
from cptjax.types import Params


def l2(trained: Params, arrays: dict[str, Any]) -> jax.Array:
    return arrays["coef"] * penalties.l2(trained, arrays["anchor"])


def ewc(trained: Params, arrays: dict[str, Any]) -> jax.Array:
    return arrays["coef"] * penalties.ewc(trained, arrays["anchor"], arrays["fisher"])


def slopes(rt: Runtime, config: Any) -> Callable[[Params, Params, Encoded], Params]:
    """The gradient of one conversation's negative log-likelihood, summed over its answers' tokens."""
    opt = stage.optimizer(config, {})
    begin = train.make_steps(rt.cfg, Objective("sft", config.train.chunk), opt, train.Places(None, ()), rt.dtype).begin
    return lambda trained, frozen, encoded: begin(trained, frozen, answers(rt, [encoded], rows=rt.shards)).gradient


def updated(current: Any, which: Stage, before: Params | None) -> tuple[Params, Spent]:
    """The Fisher of all stages so far: squared gradients of the gold answers' log-likelihood, one example at a time; what it cost."""
    rt, c = current.rt, which.config
    trained, frozen = current.split()
    courses = {name: current.course(name, c) for name in which.tasks}
    build = prepare(rt, courses, True, max(rt.ladder))
    sources = [current.examples(name, "train", c) for name in which.tasks]
    each = -(-c.method.penalty.samples // len(sources))
    seed = lambda number: (current.config.seed, which.number, number)
    rows = [source[i] for n, source in enumerate(sources) for i in permutation(len(source), seed(n))[:each].tolist()]
    slope = slopes(rt, c)
    fisher, cost = penalties.no_fisher(trained), Spent()
    one = lambda gradient: jax.tree.map(lambda g: g / jax.process_count(), gradient)  # every process has brought the row
    add = jax.jit(lambda f, g: penalties.add_fisher(f, one(g), len(rows)), donate_argnums=0)
    with jax.set_mesh(rt.mesh), console.progress("Fisher information", total=len(rows)) as bar:
        for example in rows:  # one example a pass: a sum of squares is not the square of a sum
            if current.sigterm.agreed():
                raise Stopped
            encoded = build(example).encoded
            fisher = add(fisher, slope(trained, frozen, encoded))
            cost += Spent(flops=3 * lessons.reading(rt.cfg, encoded))
            bar.advance()
    return fisher if before is None else penalties.join_fisher(before, fisher), cost
