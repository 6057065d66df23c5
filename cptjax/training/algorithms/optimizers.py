"""Gradients to new weights: AdamW, Muon or Adafactor, one clip, one decay rule, one guard; the learning rate is an argument.

    gradient -> float32 -> clipped by global norm -> optimiser's direction u -> + weight_decay p (matrices only) -> p - lr u
                              |
                              +- norm or loss not finite: weights and moments stay as they are, `skipped` counts on

Every optimiser's direction has about AdamW's size, so that one learning rate and one decay mean the same for all three:
    adamw      b1, b2, eps
    muon       momentum .95 (Nesterov) orthogonalised per layer, rms .2; embeddings, vectors and patches by AdamW
    adafactor  factored second moments, no first; its own decay and epsilon (b1, b2, eps are not read), not scaled by the weights' size

Departures: 1. Adafactor's step is not multiplied by each weight's size. 2. bfloat16 moments are a parity switch: with b2 = .999 a bfloat16
second moment never shrinks, since .999 v rounds back to v.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from cptjax.sharding import Param, is_param
from cptjax.types import Array, Mean, Params, TrainState

OPTIMIZERS = ("adamw", "muon", "adafactor")
SCHEDULES = ("constant", "cosine", "linear", "wsd")
MOMENT_DTYPES = ("float32", "bfloat16")


def check_optimizer(
    *,
    optimizer: str = "adamw",
    lr: float = 1e-6,
    schedule: str = "constant",
    warmup: float = 0.0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    clip: float | None = 1.0,
    moments_dtype: str = "float32",
) -> None:
    """Refuse settings that can not train, in one line that names the allowed values."""
    named = {
        "optimizer": (optimizer, OPTIMIZERS),
        "schedule": (schedule, SCHEDULES),
        "moments_dtype": (moments_dtype, MOMENT_DTYPES),
    }
    for name, (value, allowed) in named.items():
        if value not in allowed:
            raise ValueError(f"train.{name}={value!r}: choose one of {', '.join(allowed)}")
    if not (lr > 0 and math.isfinite(lr)):
        raise ValueError(f"train.lr={lr}: expected a learning rate above 0")
    if not 0 <= warmup < 1:
        raise ValueError(
            f"train.warmup={warmup}: expected a share of the stage's steps, 0 <= warmup < 1"
        )
    if not (0 <= b1 < 1 and 0 < b2 < 1 and eps > 0):
        raise ValueError(
            f"train.b1={b1}, train.b2={b2}, train.eps={eps}: expected 0 <= b1 < 1, 0 < b2 < 1 and eps > 0"
        )
    if weight_decay < 0 or (clip is not None and clip <= 0):
        raise ValueError(
            f"train.weight_decay={weight_decay}, train.clip={clip}: expected decay >= 0, clip above 0 or None"
        )


def learning_rate(
    step: int, *, lr: float, steps: int, schedule: str = "constant", warmup: float = 0.0
) -> float:
    """The rate of step 0, 1, ... of a stage: a linear rise over the first `warmup` share, then constant or falling towards 0.

    wsd: constant, and linear to 0 over the last 40 % of what follows the rise.
    """
    rise = round(warmup * steps)
    if step < rise:
        return lr * (step + 1) / (rise + 1)
    done = min((step - rise) / max(steps - rise, 1), 1.0)
    falls = {
        "constant": 1.0,
        "linear": 1 - done,
        "wsd": min(1.0, (1 - done) / 0.4),
        "cosine": 0.5 * (1 + math.cos(math.pi * done)),
    }
    return lr * falls[schedule]


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """A hashable description; `init` and `update` are pure and work under jit."""

    name: str = "adamw"
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float | None = 1.0  # largest global norm of a gradient
    moments_dtype: str = "float32"
    matrices: tuple[
        tuple[tuple[str, ...], MuonDimensionNumbers], ...
    ] = ()  # by path: what Muon orthogonalises

    @property
    def transform(self) -> optax.GradientTransformation:
        """The direction of an update, before the learning rate."""
        adam = store_moments_as(optax.scale_by_adam(self.b1, self.b2, self.eps), self.moments_dtype)
        if self.name == "adafactor":
            # Clipping by block keeps the direction's rms at most 1, as AdamW's is.
            direction = store_moments_as(
                optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)),
                self.moments_dtype,
            )
        elif self.name == "muon":
            known = dict(self.matrices)
            axes = lambda tree: jax.tree_util.tree_map_with_path(
                lambda path, _: known[_path_names(path)], tree
            )
            momentum = scale_by_muon(mu_dtype=self.moments_dtype, weight_dimension_numbers=axes)
            muon = optax.chain(
                momentum, optax.stateless(lambda u, _: jax.tree.map(scale_like_adam, u, axes(u)))
            )
            label = lambda path, _: "muon" if _path_names(path) in known else "adam"
            labels = lambda tree: jax.tree_util.tree_map_with_path(label, tree)
            direction = optax.partition({"muon": muon, "adam": adam}, labels)
        else:
            direction = adam
        return optax.chain(direction, optax.add_decayed_weights(self.weight_decay, decay_mask))

    def init(self, params: Params) -> TrainState:
        """A fresh state around the trained parameters."""
        zero = lambda: jnp.zeros((), jnp.int32)
        return TrainState(
            step=zero(), params=params, opt_state=self.transform.init(params), skipped=zero()
        )

    def update(
        self, state: TrainState, gradient: Params, loss: Array, lr: Array | float
    ) -> tuple[TrainState, dict[str, Mean]]:
        """One step, or none where the gradient or the loss is not finite; `step` counts both, `skipped` the latter in a row."""
        gradient = jax.tree.map(lambda g: g.astype(jnp.float32), gradient)
        norm = global_norm(gradient)
        finite = jnp.isfinite(norm) & jnp.isfinite(loss)
        if self.clip is not None:
            shrink = jnp.minimum(1.0, self.clip / jnp.maximum(norm, 1e-30))
            gradient = jax.tree.map(lambda g: g * shrink, gradient)
        direction, opt_state = self.transform.update(gradient, state.opt_state, state.params)
        params = jax.tree.map(
            lambda p, u: (p.astype(jnp.float32) - lr * u).astype(p.dtype), state.params, direction
        )
        keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)
        new = TrainState(
            step=state.step + 1,
            params=keep(params, state.params),
            opt_state=keep(opt_state, state.opt_state),
            skipped=jnp.where(finite, 0, state.skipped + 1),
        )
        metrics = {
            "grad_norm": norm,
            "lr": jnp.asarray(lr, jnp.float32),
            "skipped": 1.0 - finite.astype(jnp.float32),
        }
        return new, {name: Mean(value, jnp.ones(())) for name, value in metrics.items()}


def make_optimizer(
    *,
    optimizer: str = "adamw",
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    clip: float | None = 1.0,
    moments_dtype: str = "float32",
    declared: Params | None = None,
) -> Optimizer:
    """An Optimizer from the settings of `train`; Muon needs the `declared` tree of Param to tell inputs from outputs."""
    check_optimizer(
        optimizer=optimizer,
        b1=b1,
        b2=b2,
        eps=eps,
        weight_decay=weight_decay,
        clip=clip,
        moments_dtype=moments_dtype,
    )
    matrices = ()
    if optimizer == "muon":
        if declared is None:
            raise ValueError("train.optimizer='muon' needs the declared parameters (tree of Param)")
        matrices = muon_axes(declared)
    return Optimizer(optimizer, b1, b2, eps, weight_decay, clip, moments_dtype, matrices)


def muon_axes(declared: Params) -> tuple[tuple[tuple[str, ...], MuonDimensionNumbers], ...]:
    """Which declared parameters are hidden matrices, with the axes that each maps from and to; other axes are stacks of matrices."""

    def axes(p: Param) -> MuonDimensionNumbers | None:
        if not p.inputs or {"vocab", "patch"} & set(p.axes):
            return None
        first = 1 if p.axes[0] == "layer" else 0
        inputs, outputs = range(first, first + p.inputs), range(first + p.inputs, len(p.shape))
        # q, k and v of one fused weight lie along an axis of 3: three matrices, not one.
        return MuonDimensionNumbers(
            tuple(inputs), tuple(i for i in outputs if not (p.shape[i] == 3 and p.axes[i] is None))
        )

    found = (
        (_path_names(path), axes(p))
        for path, p in jax.tree_util.tree_leaves_with_path(declared, is_leaf=is_param)
    )
    return tuple((names, a) for names, a in found if a is not None)


def scale_like_adam(u: Array, axes: MuonDimensionNumbers) -> Array:
    """Scales an orthogonal direction to an rms of .2, the size that AdamW's usually has; any shape of matrix alike."""
    fans = (math.prod(u.shape[i] for i in group) for group in axes)
    return u * (0.2 * math.sqrt(max(fans)))


def store_moments_as(tx: optax.GradientTransformation, dtype: str) -> optax.GradientTransformation:
    """The same transformation with its moments computed in float32 and kept in `dtype`, whatever type the parameters have."""
    cast = lambda tree, to: jax.tree.map(
        lambda x: x.astype(to) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
    )

    def init(params: Params) -> Any:
        return cast(tx.init(cast(params, jnp.float32)), dtype)

    def update(gradient: Params, state: Any, params: Params | None = None) -> tuple[Params, Any]:
        direction, state = tx.update(gradient, cast(state, jnp.float32), params)
        return direction, cast(state, dtype)

    return optax.GradientTransformation(init, update)


def decay_mask(params: Params) -> Any:
    """True for weights that decay: all but biases and norms, by name, since stacking gives vectors an axis more."""
    is_vector = lambda name: name == "b" or name.startswith("norm")
    return jax.tree_util.tree_map_with_path(
        lambda path, _: not is_vector(_path_names(path)[-1]), params
    )


def global_norm(tree: Params) -> Array:
    """Square root of the sum of all squares, in float32."""
    squares = (jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree))
    return jnp.sqrt(sum(squares, jnp.zeros(())))


def _path_names(path: tuple) -> tuple[str, ...]:
    return tuple(k.key for k in path if isinstance(k, jax.tree_util.DictKey))
