"""Optimizers (AdamW, Muon, Adafactor), learning-rate schedules, clipping, non-finite guard.

    gradient -> float32 -> clip by global norm -> direction u of the optimizer
             -> u + weight_decay p (matrices only) -> p - lr u

If the norm or the loss is not finite, weights and moments stay unchanged, and `skipped` increases.
The direction of every optimizer has about AdamW's size, so that learning rate and weight decay mean
the same for all three:

    adamw      b1, b2, eps
    muon       momentum .95 (Nesterov), orthogonalised per layer, rms .2; embeddings, vectors and
               patches are updated by AdamW
    adafactor  factored second moments, no first moments; its own decay and epsilon (b1, b2 and eps
               are not used)

Departures: 1. Adafactor's step is not multiplied by each weight's size. 2. bfloat16 moments are
only for comparisons: with b2 = .999 a bfloat16 second moment never shrinks, since .999 v rounds
back to v.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from cptjax.sharding import Param, is_param
from cptjax.types import Array, Mean, Params, TrainState

OPTIMIZERS = ("adamw", "muon", "adafactor")
SCHEDULES = ("constant", "cosine", "linear", "wsd")
MOMENT_DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The settings of an optimizer: those of `config.train` with the same names."""

    optimizer: str  # adamw | muon | adafactor
    b1: float
    b2: float
    eps: float
    weight_decay: float
    clip: float | None  # largest global norm of a gradient
    moments_dtype: str  # float32 | bfloat16

    @classmethod
    def from_config(cls, train: Any) -> "OptimizerConfig":
        return cls(**{f.name: train[f.name] for f in dataclasses.fields(cls)})

    def validate(self) -> None:
        """Refuse settings that cannot train, with an error that names the allowed values."""
        _check_choice("optimizer", self.optimizer, OPTIMIZERS)
        _check_choice("moments_dtype", self.moments_dtype, MOMENT_DTYPES)
        if not (0 <= self.b1 < 1 and 0 < self.b2 < 1 and self.eps > 0):
            raise ValueError(
                f"train.b1={self.b1}, train.b2={self.b2}, train.eps={self.eps}: "
                "expected 0 <= b1 < 1, 0 < b2 < 1 and eps > 0"
            )
        if self.weight_decay < 0 or (self.clip is not None and self.clip <= 0):
            raise ValueError(
                f"train.weight_decay={self.weight_decay}, train.clip={self.clip}: "
                "expected decay >= 0, clip above 0 or None"
            )


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """The settings of the learning rate: those of `config.train` with the same names."""

    lr: float
    schedule: str  # constant | cosine | linear | wsd
    warmup: float  # share of the stage's updates

    @classmethod
    def from_config(cls, train: Any) -> "ScheduleConfig":
        return cls(**{f.name: train[f.name] for f in dataclasses.fields(cls)})

    def validate(self) -> None:
        """Refuse rates and schedules that do not exist."""
        _check_choice("schedule", self.schedule, SCHEDULES)
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise ValueError(f"train.lr={self.lr}: expected a learning rate above 0")
        if not 0 <= self.warmup < 1:
            raise ValueError(
                f"train.warmup={self.warmup}: expected a share of the stage's steps, "
                "0 <= warmup < 1"
            )


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"train.{name}={value!r}: choose one of {', '.join(allowed)}")


def make_schedule(config: ScheduleConfig, steps: int) -> optax.Schedule:
    """Return the learning rate as a function of the update 0, 1, ... of a stage.

    The rate rises linearly over the first `warmup` share of the updates, and is then constant or
    falls to 0. With wsd it is constant, and falls linearly to 0 over the last 40 % of the updates
    after the warmup.
    """
    lr, rise = config.lr, round(config.warmup * steps)
    after = max(steps - rise, 1)
    if config.schedule == "cosine":
        main = optax.cosine_decay_schedule(lr, after)
    elif config.schedule == "linear":
        main = optax.linear_schedule(lr, 0.0, after)
    elif config.schedule == "wsd":
        fall = optax.linear_schedule(lr / 0.4, 0.0, after)
        main = lambda step: jnp.minimum(lr, fall(step))
    else:
        main = optax.constant_schedule(lr)
    if not rise:
        return main
    return optax.join_schedules([optax.linear_schedule(lr / (rise + 1), lr, rise), main], [rise])


def learning_rates(config: ScheduleConfig, steps: int) -> np.ndarray:
    """Compute the learning rates of all updates of a stage.

    They are computed once, in float64; a schedule evaluated at each update would round twice and
    wait for the device.
    """
    with jax.enable_x64(True):
        rates = make_schedule(config, steps)(np.arange(steps))
        return np.broadcast_to(np.asarray(rates, np.float64), (steps,))


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """A hashable optimizer; `init` and `update` are pure and work under jit."""

    config: OptimizerConfig
    # The matrices that Muon orthogonalises, by path.
    matrices: tuple[tuple[tuple[str, ...], MuonDimensionNumbers], ...] = ()

    @property
    def transform(self) -> optax.GradientTransformation:
        """The direction of an update, before the learning rate."""
        c = self.config
        adam = store_moments_as(optax.scale_by_adam(c.b1, c.b2, c.eps), c.moments_dtype)
        if c.optimizer == "adafactor":
            # Clipping by block limits the rms of the direction to 1, about that of AdamW.
            direction = store_moments_as(
                optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)),
                c.moments_dtype,
            )
        elif c.optimizer == "muon":
            known = dict(self.matrices)
            axes = lambda tree: jax.tree_util.tree_map_with_path(
                lambda path, _: known[parameter_path(path)], tree
            )
            momentum = scale_by_muon(mu_dtype=c.moments_dtype, weight_dimension_numbers=axes)
            muon = optax.chain(
                momentum, optax.stateless(lambda u, _: jax.tree.map(scale_like_adam, u, axes(u)))
            )
            label = lambda path, _: "muon" if parameter_path(path) in known else "adam"
            labels = lambda tree: jax.tree_util.tree_map_with_path(label, tree)
            direction = optax.partition({"muon": muon, "adam": adam}, labels)
        else:
            direction = adam
        return optax.chain(direction, optax.add_decayed_weights(c.weight_decay, decay_mask))

    def init(self, params: Params) -> TrainState:
        """Return a new state for the trained parameters."""
        zero = lambda: jnp.zeros((), jnp.int32)
        return TrainState(
            step=zero(), params=params, opt_state=self.transform.init(params), skipped=zero()
        )

    def update(
        self, state: TrainState, gradient: Params, loss: Array, lr: Array | float
    ) -> tuple[TrainState, dict[str, Mean]]:
        """Apply one update, or none if the gradient or the loss is not finite.

        `step` counts all updates, `skipped` the skipped ones in a row.
        """
        gradient = jax.tree.map(lambda g: g.astype(jnp.float32), gradient)
        norm = optax.tree.norm(gradient)
        if self.config.clip is not None:
            # One factor for all leaves. optax.clip_by_global_norm divides and multiplies each leaf,
            # which rounds differently.
            shrink = jnp.minimum(1.0, self.config.clip / jnp.maximum(norm, 1e-30))
            gradient = jax.tree.map(lambda g: g * shrink, gradient)
        direction, opt_state = self.transform.update(gradient, state.opt_state, state.params)
        params = jax.tree.map(
            lambda p, u: (p.astype(jnp.float32) - lr * u).astype(p.dtype), state.params, direction
        )
        # optax.apply_if_finite checks only the gradient, not the loss, and its lax.cond prevents
        # XLA from fusing the update.
        finite = jnp.isfinite(norm) & jnp.isfinite(loss)
        keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)
        new = state.replace(
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


def make_optimizer(config: OptimizerConfig, declared: Params | None = None) -> Optimizer:
    """Build an optimizer; Muon needs the `declared` tree of Param to tell inputs from outputs."""
    if config.optimizer != "muon":
        return Optimizer(config)
    if declared is None:
        raise ValueError("train.optimizer='muon' needs the declared parameters (tree of Param)")
    return Optimizer(config, muon_axes(declared))


def muon_axes(declared: Params) -> tuple[tuple[tuple[str, ...], MuonDimensionNumbers], ...]:
    """Return the declared hidden matrices with the input and output axes of each.

    All other axes are stacks of matrices.
    """

    def axes(p: Param) -> MuonDimensionNumbers | None:
        if not p.inputs or {"vocab", "patch"} & set(p.axes):
            return None
        first = 1 if p.axes[0] == "layer" else 0
        inputs, outputs = range(first, first + p.inputs), range(first + p.inputs, len(p.shape))
        # q, k and v of a fused weight are stacked along an axis of size 3; they are three matrices.
        return MuonDimensionNumbers(
            tuple(inputs), tuple(i for i in outputs if not (p.shape[i] == 3 and p.axes[i] is None))
        )

    leaves = jax.tree_util.tree_leaves_with_path(declared, is_leaf=is_param)
    named = ((parameter_path(path), axes(p)) for path, p in leaves)
    return tuple((names, a) for names, a in named if a is not None)


def scale_like_adam(u: Array, axes: MuonDimensionNumbers) -> Array:
    """Scale an orthogonal direction of any shape to an rms of .2, the usual size of AdamW's."""
    fans = (math.prod(u.shape[i] for i in group) for group in axes)
    return u * (0.2 * math.sqrt(max(fans)))


def store_moments_as(tx: optax.GradientTransformation, dtype: str) -> optax.GradientTransformation:
    """Return the transformation with moments computed in float32 and stored in `dtype`."""
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
    """Return True for weights that decay: all but biases and norms.

    Names decide, since stacked vectors have an additional axis.
    """

    def is_matrix(path: tuple, _: Array) -> bool:
        names = parameter_path(path)
        return names[-1] != "b" and not any("norm" in name for name in names)

    return jax.tree_util.tree_map_with_path(is_matrix, params)


def parameter_path(path: tuple) -> tuple[str, ...]:
    """Return the dictionary keys in a parameter's path, also inside an optimizer state."""
    return tuple(k.key for k in path if isinstance(k, jax.tree_util.DictKey))
