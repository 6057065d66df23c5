"""One training step: gradients of a loss over micro-batches, one update. Pure functions, jitted once per shape.

A loss sees the predicting states of the answer tokens and returns sums; the count it is divided by is that of the whole
batch, so micro-batches, padding and devices can not change it:

    for each micro-batch:  total += gradient of loss_sum, count, metric sums
    once:                  update(state, total.gradient / total.count + gradient of penalty)
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cptjax import sharding
from cptjax.models import decoder, trainable
from cptjax.models.config import ModelConfig
from cptjax.models.logprobs import predicting_states
from cptjax.training.algorithms import losses, optimizers
from cptjax.training.algorithms.losses import Loss
from cptjax.types import Array, Batch, Mean, Params, TrainState

ObjectiveFn = Callable[
    [Array, Array, Batch], Loss
]  # hidden [B A D], unembedding [D V], batch; hashable, so programs are shared
PenaltyFn = Callable[[Params, Any], Array]  # trained parameters, its own arrays -> scalar


@flax.struct.dataclass
class GradientSum:
    """What micro-batches add up to."""

    gradient: Params
    loss: Array
    count: Array
    metrics: dict[str, Mean]


@dataclasses.dataclass(frozen=True)
class StepPrograms:
    """The jitted programs of one stage."""

    begin: Callable[..., GradientSum]  # trained, frozen, batch -> Total
    add: Callable[..., GradientSum]  # Total, trained, frozen, batch -> Total
    finish: Callable[
        ..., tuple[TrainState, dict]
    ]  # state, Total, learning rate, extra -> state, metrics
    step: Callable[..., tuple[TrainState, dict]]  # all three for a batch of one micro-batch

    def run(
        self,
        state: TrainState,
        frozen: Params,
        batches: Sequence[Batch],
        lr: float,
        extra: Any = None,
    ) -> tuple[TrainState, dict]:
        """One optimiser step on the micro-batches of one batch."""
        rate = jnp.float32(lr)
        if len(batches) == 1:
            return self.step(state, frozen, batches[0], rate, extra)
        total = self.begin(state.params, frozen, batches[0])
        for batch in batches[1:]:
            total = self.add(total, state.params, frozen, batch)
        return self.finish(state, total, rate, extra)


@dataclasses.dataclass(frozen=True)
class StateShardings:
    """A tree of shardings that hashes."""

    tree: Any
    leaves: tuple

    @staticmethod
    def of(state: Any) -> "StateShardings":
        leaves, tree = jax.tree.flatten(state)
        return StateShardings(tree, tuple(x.sharding for x in leaves))

    def pin(self, state: Any) -> Any:
        return jax.tree.map(
            jax.lax.with_sharding_constraint, state, self.tree.unflatten(self.leaves)
        )

    def pin_gradient(self, gradient: Params) -> Params:
        """Each gradient beside its parameter: left to the compiler, every device gets the whole of it."""
        if self.tree is None:
            return gradient
        return jax.tree.map(
            jax.lax.with_sharding_constraint, gradient, self.tree.unflatten(self.leaves).params
        )


@functools.lru_cache(maxsize=64)
def make_step_programs(
    cfg: ModelConfig,
    objective: ObjectiveFn,
    optimizer: optimizers.Optimizer,
    places: StateShardings,
    dtype: Any,
    penalty: PenaltyFn | None = None,
) -> StepPrograms:
    """The programs of a stage; stages that differ in numbers only share them. The state stays in its `places`."""

    def begin(trained: Params, frozen: Params, batch: Batch) -> GradientSum:
        def value(trained):
            params = trainable.cast_params(trainable.join_params(trained, frozen), dtype)
            loss = objective(
                predicting_states(params, batch, cfg, dtype),
                decoder.unembedding(params["text"]),
                batch,
            )
            return loss.sum, loss

        (_, loss), gradient = jax.value_and_grad(value, has_aux=True)(trained)
        gradient = places.pin_gradient(jax.tree.map(lambda g: g.astype(jnp.float32), gradient))
        return GradientSum(gradient, loss.sum, loss.count, loss.metrics)

    def add(total: GradientSum, trained: Params, frozen: Params, batch: Batch) -> GradientSum:
        more = begin(trained, frozen, batch)
        gradient = jax.tree.map(jnp.add, total.gradient, more.gradient)
        return GradientSum(
            gradient,
            total.loss + more.loss,
            total.count + more.count,
            losses.combine_metrics(total.metrics, more.metrics),
        )

    def finish(
        state: TrainState, total: GradientSum, lr: Array, extra: Any
    ) -> tuple[TrainState, dict]:
        count = jnp.maximum(total.count, 1)
        gradient = jax.tree.map(lambda g: g / count, total.gradient)
        metrics = dict(total.metrics, loss=Mean(total.loss, total.count))
        if penalty is not None:
            more, slope = jax.value_and_grad(penalty)(state.params, extra)
            gradient = jax.tree.map(jnp.add, gradient, slope)
            metrics["penalty"] = Mean(more, jnp.ones(()))
        loss = jnp.where(
            total.count > 0, total.loss, jnp.nan
        )  # nothing to learn from: no update, not even weight decay
        state, told = optimizer.update(state, gradient, loss, lr)
        return places.pin(state), metrics | told

    def step(
        state: TrainState, frozen: Params, batch: Batch, lr: Array, extra: Any
    ) -> tuple[TrainState, dict]:
        return finish(state, begin(state.params, frozen, batch), lr, extra)

    return StepPrograms(
        jax.jit(begin),
        jax.jit(add, donate_argnums=0),
        jax.jit(finish, donate_argnums=0),
        jax.jit(step, donate_argnums=0),
    )


def abstract_state(optimizer: optimizers.Optimizer, params: Params, mesh: Mesh) -> TrainState:
    """The shapes and places of a fresh state: moments lie beside their parameters, all else on every device."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    beside = {tuple(path): p for path, p in trainable.flatten_params(params).items()}

    def find(path: tuple, leaf: Any) -> jax.ShapeDtypeStruct:
        names = tuple(k.key for k in path if isinstance(k, jax.tree_util.DictKey))
        like = next((beside[names[i:]] for i in range(len(names)) if names[i:] in beside), None)
        where = (
            sharding.canonical_sharding(like.sharding)
            if like is not None and like.shape == leaf.shape
            else everywhere
        )
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    return jax.tree_util.tree_map_with_path(find, jax.eval_shape(optimizer.init, params))


def init_state(optimizer: optimizers.Optimizer, params: Params, mesh: Mesh) -> TrainState:
    """A fresh state that takes over the trained parameters; each other part is born where it lives."""
    where = jax.tree.map(lambda x: x.sharding, abstract_state(optimizer, params, mesh))
    return jax.jit(_fresh_state, static_argnums=0, out_shardings=where, donate_argnums=1)(
        optimizer, params
    )


def _fresh_state(optimizer: optimizers.Optimizer, params: Params) -> TrainState:
    return optimizer.init(
        params
    )  # one function for all optimisers: the next stage finds this one's program
