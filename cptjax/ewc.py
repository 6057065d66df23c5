"""Elastic weight consolidation: the diagonal Fisher information of a stage, and penalties as programs take them."""

from typing import Any

import jax

from cptjax import console, penalties, stage, train
from cptjax.batches import answers
from cptjax.classroom import prepare
from cptjax.objectives import Objective
from cptjax.settings import Stage
from cptjax.types import Params


def l2(trained: Params, arrays: dict[str, Any]) -> jax.Array:
    return arrays["coef"] * penalties.l2(trained, arrays["anchor"])


def ewc(trained: Params, arrays: dict[str, Any]) -> jax.Array:
    return arrays["coef"] * penalties.ewc(trained, arrays["anchor"], arrays["fisher"])


def updated(current: Any, which: Stage, before: Params | None) -> Params:
    """The Fisher of all stages so far: squared gradients of the gold answers' log-likelihood, one example at a time."""
    rt, c = current.rt, which.config
    trained, frozen = current.split()
    courses = {name: current.course(name, c) for name in which.tasks}
    build = prepare(rt, courses, True, max(rt.ladder))
    sources = [current.examples(name, "train", c) for name in which.tasks]
    rows = [source[i] for source in sources for i in range(min(len(source), -(-c.method.penalty.samples // len(sources))))]
    opt = stage.optimizer(c, {})
    begin = train.make_steps(rt.cfg, Objective("sft", c.train.chunk), opt, train.Places(None, ()), rt.dtype).begin
    fisher = penalties.no_fisher(trained)
    add = jax.jit(lambda f, g: penalties.add_fisher(f, g, len(rows)), donate_argnums=0)
    with jax.set_mesh(rt.mesh), console.progress("Fisher information", total=len(rows)) as bar:
        for example in rows:  # one real row a pass: a sum of squares is not the square of a sum
            fisher = add(fisher, begin(trained, frozen, answers(rt, [build(example).encoded], rows=rt.shards)).gradient)
            bar.advance()
    return fisher if before is None else penalties.join_fisher(before, fisher)
