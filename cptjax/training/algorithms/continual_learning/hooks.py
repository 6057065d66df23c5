"""The hooks by which a continual-learning method enters the training of a stage.

    hook                called                                            used by
    replayed_share      when the order of a stage's rows is made          replay
    begin_rewards,      on the rewards of the sampled responses           RaPO
      shape_rewards
    token_loss          on the response tokens of each micro-batch        LwF
    memory, memory_loss on a batch of the memory's rows, once for each    ER, DER, A-GEM
      combine_gradients   update; its gradient is combined with that of
                          the objective and the penalties
    penalty             on the trained parameters, once for each update   L2, EWC, SI, MAS, CPO
    begin_stage,        with the gradient and the parameters before and   SI
      after_update      after each update
    project_gradient    after the gradient, before the optimizer          gradient projection
    project_change      after the optimizer                               gradient projection
    gradient_pass,      once, after the last step                         EWC, MAS, CPO, WiSE-FT
      stage_end
    frozen_weights      after a stage, and where its model is restored    O-LoRA, merged LoRA

Hooks of the update are pure functions of arrays, and are compiled into its program. Hooks of the
rewards and of the stage's end run in Python.

    trained     the trained parameters
    start       their values at the start of the stage, where `needs_start` is True
    kept        what the method's last `stage_end` returned; None before its first

A method is a frozen dataclass. Its fields are its settings, so it is hashable, and stages with
equal methods share their programs.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from cptjax.types import Array, Batch, Mean, Params


@dataclasses.dataclass(frozen=True)
class KeptLayout:
    """What the shapes of a method's kept arrays depend on."""

    trained: Params  # the trained parameters, as shapes with shardings
    mesh: Mesh
    stage: int  # the number of the stage that has ended

    def like_trained(self, dtype: Any = jnp.float32) -> Params:
        """Return the shapes of a copy of the trained parameters in another type."""
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding), self.trained
        )


@dataclasses.dataclass(frozen=True)
class GradientPass:
    """A pass over training rows at the end of a stage, one gradient for each row."""

    objective: Callable[..., Any]  # hidden [B A D], unembedding [D V], batch -> Loss
    transform: Callable[[Params], Params]  # gradient of a row -> what is averaged over the rows
    samples: int  # number of rows


@dataclasses.dataclass(frozen=True)
class MemorySettings:
    """A memory of training rows of finished stages; `memory.py` has its arrays."""

    rows: int  # of the memory
    tokens: int  # the most tokens of a response; later ones are left out
    top_k: int  # the likeliest tokens whose log-probabilities are stored; 0 = none
    batch: int  # rows of an update, over all processes


@dataclasses.dataclass(frozen=True)
class StageEnd:
    """What a method has at the end of a stage."""

    stage: int  # the number of the stage
    seed: int
    trained: Params  # the trained parameters, as earlier methods of the stage's end left them
    unmerged: Params  # the trained parameters after the last step, before a merge
    start: Params | None  # their values at the start of the stage
    state: Any  # what `after_update` returned last
    kept: Any  # what `stage_end` of an earlier stage returned
    mean: Params | None  # the result of `gradient_pass`
    memory: Any  # the arrays of `memory` with rows of this stage
    stage_params: Callable[[int], Params]  # the trained parameters after stage k; 0 = base model
    carried: Any = None  # what `shape_rewards` returned last


@dataclasses.dataclass(frozen=True)
class ContinualMethod:
    """A continual-learning method; a subclass overrides the hooks that it needs."""

    name: ClassVar[str]  # in the settings of its hook and in reports
    needs_start: ClassVar[bool] = False  # keeps a copy of the parameters at the stage's start
    needs_teacher: ClassVar[bool] = False  # the model at the stage's start scores each batch
    needs_drift: ClassVar[bool] = False  # it scores the sampled responses, after the first stage

    def check(self, config: ConfigDict) -> None:
        """Refuse settings of the method, or of the stage, that make no sense."""

    # ---- in a stage ------------------------------------------------------------------------------

    @property
    def replayed_share(self) -> float:
        """The share of a batch that is taken from the tasks of earlier stages."""
        return 0.0

    def begin_rewards(self, kept: Any) -> Any:
        """Return what the first `shape_rewards` of a stage gets as `carried`."""
        return None

    def shape_rewards(
        self, rewards: np.ndarray, keep: np.ndarray, drift: np.ndarray | None, carried: Any
    ) -> tuple[np.ndarray, Any]:
        """Return the rewards [Q G] from which advantages are computed, and the next `carried`.

        The arrays have the responses of all processes.

        keep: [Q G] False for responses that are left out
        drift: [Q G] log-probability under the policy minus that under the model at the stage's
            start, the mean over the tokens; None without `needs_drift`, and in the first stage
        carried: what JSON can store, since checkpoints inside a stage have it
        """
        return rewards, carried

    def token_loss(self, hidden: Array, unembed: Array, batch: Batch, chunk: int) -> Array | None:
        """Return a loss of each response token [B A], which is added to the objective.

        hidden: [B * A, D] the states that predict the tokens
        unembed: [D V]
        chunk: number of tokens whose logits may be in memory at a time
        """
        return None

    @property
    def memory(self) -> MemorySettings | None:
        """The memory whose rows an update uses after the first stage; None = no memory."""
        return None

    def memory_loss(self, hidden: Array, unembed: Array, batch: Batch, chunk: int) -> Array:
        """Return the loss of each response token [B A] of a batch of the memory.

        The arguments are those of `token_loss`. With `top_k`, `batch.extra` has memory_ids [B A k]
        and memory_logps [B A k+1], the last of which is that of all other tokens together.
        """
        raise NotImplementedError

    def combine_gradients(
        self, gradient: Params, of_memory: Params
    ) -> tuple[Params, dict[str, Mean]]:
        """Return the gradient of an update, and metrics.

        gradient: that of the objective and the penalties
        of_memory: that of the mean of `memory_loss` over the tokens of the memory's batch
        """
        raise NotImplementedError

    def penalty(self, trained: Params, start: Params | None, kept: Any) -> Array | None:
        """Return a scalar that is added to the loss of an update; None = none yet."""
        return None

    def begin_stage(self, trained: Params) -> Any:
        """Return the state that the method updates during a stage; None = no state."""
        return None

    def after_update(self, state: Any, gradient: Params, before: Params, after: Params) -> Any:
        """Return the state after an update, which moved `before` to `after`.

        `gradient` is that of the objective, without penalties.
        """
        return state

    def project_gradient(self, gradient: Params, kept: Any) -> Params:
        """Return the gradient that the optimizer gets."""
        return gradient

    def project_change(self, change: Params, kept: Any) -> Params:
        """Return the change of the parameters that an update makes, in float32."""
        return change

    # ---- at the end of a stage -------------------------------------------------------------------

    def kept_shapes(self, layout: KeptLayout) -> Any:
        """Return the shapes of what the method keeps after a stage; None = nothing.

        An array without a sharding stays on the host.
        """
        return None

    def gradient_pass(self, chunk: int) -> GradientPass | None:
        """Return the pass over training rows whose result `stage_end` needs."""
        return None

    def stage_end(self, end: StageEnd) -> tuple[Params, Any]:
        """Return the parameters that the stage ends with, and what the method keeps."""
        return end.trained, end.kept

    def frozen_weights(self, frozen: Params, kept: Any, scale: float) -> Params:
        """Return the frozen parameters after a stage, from those of the base model.

        scale: the factor alpha / rank of adapters
        """
        return frozen


Methods = tuple[ContinualMethod, ...]
# The hooks that are compiled into the update.
UPDATE_HOOKS = ("penalty", "after_update", "project_gradient", "project_change")


def overrides_hook(method: ContinualMethod, *hooks: str) -> bool:
    """Return whether the method overrides one of these hooks."""
    return any(getattr(type(method), h) is not getattr(ContinualMethod, h) for h in hooks)


# ---- all methods of a stage ----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class HookArrays:
    """The arrays that the hooks of a step take."""

    start: Params | None = None
    kept: dict[str, Any] = dataclasses.field(default_factory=dict)  # by the name of a method


jax.tree_util.register_dataclass(HookArrays, ["start", "kept"], [])


def total_penalty(methods: Methods, trained: Params, arrays: HookArrays) -> Array | None:
    """Return the sum of all penalties; None if there is none."""
    values = {m.name: m.penalty(trained, arrays.start, arrays.kept.get(m.name)) for m in methods}
    known = {name: value for name, value in values.items() if value is not None}
    for name, value in known.items():
        if jnp.shape(value):
            raise ValueError(f"{name}.penalty: expected a scalar, got shape {jnp.shape(value)}")
    first, *others = known.values() or [None]
    return sum(others, first)


def begin_methods(methods: Methods, trained: Params) -> dict[str, Any]:
    """Return the states of the methods at the start of a stage, by name."""
    states = {m.name: m.begin_stage(trained) for m in methods}
    return {name: state for name, state in states.items() if state is not None}


def float_difference(a: Params, b: Params) -> Params:
    """Return a - b in float32."""
    return jax.tree.map(lambda x, y: x.astype(jnp.float32) - y.astype(jnp.float32), a, b)


def tree_sum(trees: Sequence[Any] | Any) -> Array:
    """Return the sum of all values of a tree."""
    return sum((jnp.sum(x) for x in jax.tree.leaves(trees)), jnp.zeros(()))
