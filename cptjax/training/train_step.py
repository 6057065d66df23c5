"""One optimizer update: gradients over micro-batches, then the update, as jitted functions.

A loss takes the predicting states of the response tokens and returns sums. They are divided by the
count of the whole batch, so micro-batches, padding and devices cannot change the update:

    for each micro-batch:  total += gradient of loss_sum, count, metric sums
    once:                  update(state, total.gradient / total.count + gradient of penalties)

A continual-learning method with a memory combines this gradient with that of a batch of the memory,
which a program of its own computes.
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
from cptjax.common.compiler_options import PlatformJit
from cptjax.models import decoder, trainable
from cptjax.models.config import ModelConfig
from cptjax.models.logprobs import predicting_states
from cptjax.training.algorithms import losses, optimizers
from cptjax.training.algorithms.continual_learning import hooks
from cptjax.training.algorithms.continual_learning.hooks import HookArrays, Methods
from cptjax.training.algorithms.losses import Loss
from cptjax.training.algorithms.objective import MemoryObjective
from cptjax.types import Array, Batch, Mean, Params, TrainState

# Hidden states [B A D], unembedding [D V], batch -> loss. Hashable, so that stages share programs.
ObjectiveFn = Callable[[Array, Array, Batch], Loss]
NO_ARRAYS = HookArrays()


@flax.struct.dataclass
class GradientSum:
    """The sums over micro-batches."""

    gradient: Params
    loss: Array
    count: Array
    metrics: dict[str, Mean]


@dataclasses.dataclass(frozen=True)
class StepPrograms:
    """The jitted programs of one stage."""

    begin: PlatformJit  # trained, frozen, batch -> GradientSum
    add: PlatformJit  # sum, trained, frozen, batch -> sum
    # state, sum, learning rate, arrays of the continual-learning methods, sum of the memory
    # -> state, metrics
    finish: PlatformJit
    # begin and finish in one program, for an update of one micro-batch
    step: PlatformJit
    # trained, frozen, batch of the memory -> sum; None = no method has a memory
    memory_gradient: PlatformJit | None

    def run(
        self,
        state: TrainState,
        frozen: Params,
        batches: Sequence[Batch],
        lr: float,
        arrays: HookArrays = NO_ARRAYS,
        memory_batch: Batch | None = None,
    ) -> tuple[TrainState, dict[str, Mean]]:
        """Apply one update, computed from its micro-batches and a batch of the memory."""
        rate, of_memory = jnp.float32(lr), None
        if memory_batch is not None:
            of_memory = self.memory_gradient(state.params, frozen, memory_batch)
        if len(batches) == 1:
            return self.step(state, frozen, batches[0], rate, arrays, of_memory)
        total = self.begin(state.params, frozen, batches[0])
        for batch in batches[1:]:
            total = self.add(total, state.params, frozen, batch)
        return self.finish(state, total, rate, arrays, of_memory)


@dataclasses.dataclass(frozen=True)
class StateShardings:
    """The shardings of a training state, as a hashable tree."""

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
        """Give each gradient its parameter's sharding; XLA would replicate it otherwise."""
        return jax.tree.map(
            jax.lax.with_sharding_constraint, gradient, self.tree.unflatten(self.leaves).params
        )


@dataclasses.dataclass(frozen=True)
class StepFunctions:
    """The functions of a stage that are compiled; hashable, so that equal stages share programs.

    The state keeps the shardings `places`. `count_changes` adds the share of the trained weights
    that an update changes to its metrics.
    """

    cfg: ModelConfig
    objective: ObjectiveFn
    optimizer: optimizers.Optimizer
    places: StateShardings
    dtype: Any
    methods: Methods = ()
    memory: MemoryObjective | None = None
    count_changes: bool = False

    def begin(self, trained: Params, frozen: Params, batch: Batch) -> GradientSum:
        return self._gradient_sum(self.objective, trained, frozen, batch)

    def memory_gradient(self, trained: Params, frozen: Params, batch: Batch) -> GradientSum:
        return self._gradient_sum(self.memory, trained, frozen, batch)

    def _gradient_sum(
        self, objective: ObjectiveFn, trained: Params, frozen: Params, batch: Batch
    ) -> GradientSum:
        def value(trained):
            params = trainable.cast_params(trainable.join_params(trained, frozen), self.dtype)
            loss = objective(
                predicting_states(params, batch, self.cfg, self.dtype),
                decoder.unembedding(params["text"]),
                batch,
            )
            return loss.sum, loss

        (_, loss), gradient = jax.value_and_grad(value, has_aux=True)(trained)
        gradient = jax.tree.map(lambda g: g.astype(jnp.float32), gradient)
        return GradientSum(self.places.pin_gradient(gradient), loss.sum, loss.count, loss.metrics)

    def add(self, total: GradientSum, trained: Params, frozen: Params, batch: Batch) -> GradientSum:
        more = self.begin(trained, frozen, batch)
        gradient = jax.tree.map(jnp.add, total.gradient, more.gradient)
        return GradientSum(
            gradient,
            total.loss + more.loss,
            total.count + more.count,
            losses.combine_metrics(total.metrics, more.metrics),
        )

    def finish(
        self,
        before: TrainState,
        total: GradientSum,
        lr: Array,
        arrays: HookArrays,
        of_memory: GradientSum | None,
    ) -> tuple[TrainState, dict[str, Mean]]:
        of_objective = mean_gradient(total)
        gradient, metrics = self._change_gradient(before.params, of_objective, arrays, of_memory)
        # Without a token to train on, the NaN skips the update, including its weight decay.
        loss = jnp.where(total.count > 0, total.loss, jnp.nan)
        state, update_metrics = self.optimizer.update(before, gradient, loss, lr)
        state = self._change_update(before, state, of_objective, arrays)
        if self.count_changes:
            metrics["changed_weights"] = count_changed(before.params, state.params)
        metrics = total.metrics | {"loss": Mean(total.loss, total.count)} | metrics
        return self.places.pin(state), metrics | update_metrics

    def step(
        self,
        state: TrainState,
        frozen: Params,
        batch: Batch,
        lr: Array,
        arrays: HookArrays,
        of_memory: GradientSum | None,
    ) -> tuple[TrainState, dict[str, Mean]]:
        total = self.begin(state.params, frozen, batch)
        return self.finish(state, total, lr, arrays, of_memory)

    # ---- what continual-learning methods change --------------------------------------------------

    def _with_hook(self, hook: str) -> list[hooks.ContinualMethod]:
        return [m for m in self.methods if hooks.overrides_hook(m, hook)]

    def _change_gradient(
        self,
        params: Params,
        gradient: Params,
        arrays: HookArrays,
        of_memory: GradientSum | None,
    ) -> tuple[Params, dict[str, Mean]]:
        """Add penalties, combine with the gradient of the memory, then project."""
        metrics = {}
        penalty = functools.partial(hooks.total_penalty, self.methods, arrays=arrays)
        if penalty(params) is not None:
            value, of_penalty = jax.value_and_grad(penalty)(params)
            gradient = jax.tree.map(jnp.add, gradient, of_penalty)
            metrics["penalty"] = Mean(value, jnp.ones(()))
        if of_memory is not None:
            method, mean = self.memory.method, mean_gradient(of_memory)
            gradient, more = method.combine_gradients(gradient, mean)
            metrics |= more | {"memory/loss": Mean(of_memory.loss, of_memory.count)}
        for m in self._with_hook("project_gradient"):
            gradient = m.project_gradient(gradient, arrays.kept.get(m.name))
        return gradient, metrics

    def _change_update(
        self, before: TrainState, state: TrainState, of_objective: Params, arrays: HookArrays
    ) -> TrainState:
        """Project the change of the parameters, then let methods follow it."""
        for m in self._with_hook("project_change"):
            change = hooks.float_difference(state.params, before.params)
            change = m.project_change(change, arrays.kept.get(m.name))
            moved = jax.tree.map(lambda p, c: (p + c).astype(p.dtype), before.params, change)
            state = state.replace(params=moved)
        for m in self._with_hook("after_update"):
            new = m.after_update(before.methods[m.name], of_objective, before.params, state.params)
            keep = lambda n, o: jnp.where(state.skipped == 0, n, o)  # noqa: B023
            new = jax.tree.map(keep, new, before.methods[m.name])
            state = state.replace(methods=state.methods | {m.name: new})
        return state


@functools.lru_cache(maxsize=64)
def make_step_programs(functions: StepFunctions) -> StepPrograms:
    """Return the programs of a stage; equal functions return the same programs."""
    scoped = jax.named_scope("update")  # the name of all of them in profiles
    return StepPrograms(
        PlatformJit(scoped(functions.begin)),
        PlatformJit(scoped(functions.add), donate_argnums=0),
        PlatformJit(scoped(functions.finish), donate_argnums=0),
        PlatformJit(scoped(functions.step), donate_argnums=0),
        PlatformJit(scoped(functions.memory_gradient)) if functions.memory else None,
    )


def mean_gradient(total: GradientSum) -> Params:
    """Return the gradient of the mean loss."""
    count = jnp.maximum(total.count, 1)
    return jax.tree.map(lambda g: g / count, total.gradient)


def count_changed(before: Params, after: Params) -> Mean:
    """Return the share of weights that differ."""
    differ = jax.tree.map(lambda b, a: jnp.sum(b != a, dtype=jnp.float32), before, after)
    size = sum(x.size for x in jax.tree.leaves(before))
    return Mean(sum(jax.tree.leaves(differ)), jnp.float32(size))


def abstract_state(
    optimizer: optimizers.Optimizer, params: Params, mesh: Mesh, methods: Methods = ()
) -> TrainState:
    """Return the shapes and shardings of a new state.

    Moments have the sharding of their parameter; all other arrays are replicated.
    """
    replicated = NamedSharding(mesh, PartitionSpec())
    by_path = {tuple(path): p for path, p in trainable.flatten_params(params).items()}

    def find(path: tuple, leaf: Any) -> jax.ShapeDtypeStruct:
        names = tuple(k.key for k in path if isinstance(k, jax.tree_util.DictKey))
        suffixes = (names[i:] for i in range(len(names)))
        param = next((by_path[names] for names in suffixes if names in by_path), None)
        if param is None or param.shape != leaf.shape:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated)
        place = sharding.canonical_sharding(param.sharding)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    return jax.tree_util.tree_map_with_path(
        find, jax.jit(_fresh_state, static_argnums=(0, 1)).eval_shape(optimizer, methods, params)
    )


def init_state(
    optimizer: optimizers.Optimizer, params: Params, mesh: Mesh, methods: Methods = ()
) -> TrainState:
    """Return a new state; the trained parameters are donated to it.

    The other arrays are created on their devices.
    """
    state = abstract_state(optimizer, params, mesh, methods)
    where = jax.tree.map(lambda x: x.sharding, state)
    return jax.jit(_fresh_state, static_argnums=(0, 1), out_shardings=where, donate_argnums=2)(
        optimizer, methods, params
    )


def _fresh_state(optimizer: optimizers.Optimizer, methods: Methods, params: Params) -> TrainState:
    # A module-level function, so that the next stage reuses its shapes and the compiled program.
    return optimizer.init(params).replace(methods=hooks.begin_methods(methods, params))
