"""One training step: gradients of a loss over micro-batches, one update. Pure functions, jitted once per shape.

A loss sees the predicting states of the answer tokens and returns sums; the count it is divided by is that of the whole
batch, so micro-batches, padding and devices can not change it:

    for each micro-batch:  total += gradient of loss_sum, count, metric sums
    once:                  update(state, total.gradient / total.count + gradient of penalty)
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cptjax import optim, sharding
from cptjax.metrics import Mean
from cptjax.model import qwen25_vl, text, trainable
from cptjax.model.config import Config
from cptjax.types import Array, Batch, Params, TrainState

# hidden [B A D], unembedding [D V], batch -> sum, count, metrics (each name a sum and a count)
Loss = Callable[[Array, Array, Batch], tuple[Array, Array, dict[str, Mean]]]
Penalty = Callable[[Params, Any], Array]  # trained parameters, its own arrays -> scalar


@flax.struct.dataclass
class Total:
    """What micro-batches add up to."""

    gradient: Params
    loss: Array
    count: Array
    metrics: dict[str, Mean]


def cast(params: Params, dtype: jnp.dtype) -> Params:
    """Parameters in the type of the arithmetic; done once, before the layers are scanned."""
    return jax.tree.map(lambda x: x.astype(dtype), params)


def predicting_states(params: Params, batch: Batch, cfg: Config, dtype: jnp.dtype) -> Array:
    """The hidden states [B A D] that predict `batch.targets`."""
    if batch.where is None:
        q, (b, a) = batch.prompts.tokens.shape[0], batch.targets.shape
        hidden = qwen25_vl.forward_group(params, batch.prompts, batch.targets.reshape(q, b // q, a), cfg, dtype)
        return hidden.reshape(b, a, -1)
    return jnp.take_along_axis(qwen25_vl.forward(params, batch.prompts, cfg, dtype), batch.where[..., None], 1)


@dataclasses.dataclass(frozen=True)
class Steps:
    """The jitted programs of one stage."""

    begin: Callable[..., Total]  # trained, frozen, batch -> Total
    add: Callable[..., Total]  # Total, trained, frozen, batch -> Total
    finish: Callable[..., tuple[TrainState, dict]]  # state, Total, extra -> state, metrics
    step: Callable[..., tuple[TrainState, dict]]  # all three for a batch of one micro-batch

    def run(self, state: TrainState, frozen: Params, batches: Sequence[Batch], extra: Any = None) -> tuple[TrainState, dict]:
        """One optimiser step on the micro-batches of one batch."""
        if len(batches) == 1:
            return self.step(state, frozen, batches[0], extra)
        total = self.begin(state.params, frozen, batches[0])
        for batch in batches[1:]:
            total = self.add(total, state.params, frozen, batch)
        return self.finish(state, total, extra)


def make_steps(
    cfg: Config, loss: Loss, optimizer: optim.Optimizer, like: Any, *, dtype: jnp.dtype, penalty: Penalty | None = None
) -> Steps:
    """The programs of a stage; `like` is the tree of the state's shardings (None on one device)."""

    def begin(trained: Params, frozen: Params, batch: Batch) -> Total:
        def objective(trained):
            params = cast(trainable.join(trained, frozen), dtype)
            hidden = predicting_states(params, batch, cfg, dtype)
            value, count, metrics = loss(hidden, text.unembedding(params["text"]), batch)
            return value, (count, metrics)

        (value, (count, metrics)), gradient = jax.value_and_grad(objective, has_aux=True)(trained)
        return Total(jax.tree.map(lambda g: g.astype(jnp.float32), gradient), value, count, metrics)

    def add(total: Total, trained: Params, frozen: Params, batch: Batch) -> Total:
        return jax.tree.map(jnp.add, total, begin(trained, frozen, batch))

    def finish(state: TrainState, total: Total, extra: Any) -> tuple[TrainState, dict]:
        count = jnp.maximum(total.count, 1)
        gradient = jax.tree.map(lambda g: g / count, total.gradient)
        metrics = dict(total.metrics, loss=Mean(total.loss, total.count))
        if penalty is not None:
            value, slope = jax.value_and_grad(penalty)(state.params, extra)
            gradient = jax.tree.map(jnp.add, gradient, slope)
            metrics["penalty"] = Mean(value, jnp.ones(()))
        state, norms = optimizer.update(state, gradient, metrics["loss"].sum)
        return state, metrics | norms

    def step(state: TrainState, frozen: Params, batch: Batch, extra: Any) -> tuple[TrainState, dict]:
        return finish(state, begin(state.params, frozen, batch), extra)

    out = None if like is None else (like, None)
    return Steps(
        jax.jit(begin),
        jax.jit(add, donate_argnums=0),
        jax.jit(finish, donate_argnums=(0, 1), out_shardings=out),
        jax.jit(step, donate_argnums=0, out_shardings=out),
    )


def state_shardings(optimizer: optim.Optimizer, params: Params, where: Params, mesh: Mesh) -> TrainState:
    """Where the state lives: moments beside their parameters, everything else on every device."""
    state = jax.eval_shape(optimizer.init, params)
    everywhere = NamedSharding(mesh, PartitionSpec())
    beside = {tuple(path): s for path, s in trainable.flatten(where).items()}
    shapes = {path: p.shape for path, p in trainable.flatten(params).items()}

    def find(path: tuple, leaf: Any) -> NamedSharding:
        names = tuple(k.key for k in path if isinstance(k, jax.tree_util.DictKey))
        tail = next((names[i:] for i in range(len(names)) if names[i:] in beside), None)
        return beside[tail] if tail and shapes[tail] == leaf.shape else everywhere

    return jax.tree_util.tree_map_with_path(find, state)


def init_state(optimizer: optim.Optimizer, params: Params, mesh: Mesh | None) -> TrainState:
    """A fresh state around trained parameters, each part born where it lives."""
    if mesh is None:
        return jax.jit(optimizer.init)(params)
    where = jax.tree.map(lambda p: p.sharding, params)
    return jax.jit(optimizer.init, out_shardings=state_shardings(optimizer, params, where, mesh))(params)


def place(batch: Batch, mesh: Mesh | None) -> Batch:
    """A host batch onto the mesh: rows over the batch shards, position ids [3 B T] over their second axis."""
    if mesh is None:
        return jax.tree.map(jnp.asarray, batch)
    put = lambda tree: sharding.place(tree, mesh)
    prompts = place_prompts(batch.prompts, mesh)
    return Batch(prompts, *put((batch.targets, batch.mask, batch.where, batch.extra)))


def place_prompts(prompts: Any, mesh: Mesh | None) -> Any:
    if mesh is None:
        return jax.tree.map(jnp.asarray, prompts)
    put = lambda tree: sharding.place(tree, mesh)
    positions = sharding.place(prompts.positions, mesh, lambda x: (None, "batch", None))
    return prompts.replace(
        tokens=put(prompts.tokens), positions=positions, segments=put(prompts.segments), slots=put(prompts.slots), vision=put(prompts.vision)
    )
