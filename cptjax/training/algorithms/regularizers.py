"""What holds a stage's weights near those before it: quadratic penalties, averages. (LwF compares outputs: `objectives`.)

    l2    1/2 sum (p - anchor)^2
    ewc   1/2 sum F (p - anchor)^2      F = mean over examples of (gradient of the log-likelihood)^2, the diagonal Fisher

The coefficient is the caller's. Trees may have None where a parameter is frozen. All sums are float32.
"""

from typing import Any

import jax
import jax.numpy as jnp

from cptjax.types import Array, Params

PENALTIES = ("none", "ewc", "l2", "lwf")


def check_penalty(name: str, coef: float = 0.0, samples: int = 1, average: float = 0.0) -> None:
    """Refuse penalties that do not exist or do nothing."""
    if name not in PENALTIES:
        raise ValueError(f"method.penalty.name={name!r}: choose one of {', '.join(PENALTIES)}")
    if coef < 0:
        raise ValueError(f"method.penalty.coef={coef}: expected 0 or more")
    if name != "none" and coef == 0:
        raise ValueError(
            f"method.penalty.name={name!r} with coef=0 does nothing: set method.penalty.coef, or name='none'"
        )
    if name == "ewc" and samples < 1:
        raise ValueError(
            f"method.penalty.samples={samples}: ewc estimates its Fisher from at least 1 example"
        )
    if not 0 <= average < 1:
        raise ValueError(
            f"method.average={average}: expected the weight of the stage's start, 0 <= average < 1"
        )


def needs_exact_start(method: Any) -> bool:
    """Whether weights are compared with those of the stage's start: a copy that must not be rounded."""
    return bool(method.average) or method.penalty.name in ("l2", "ewc")


def l2_distance(params: Params, anchor: Params) -> Array:
    """Half the squared distance to the anchor."""
    return _half_sum(jax.tree.map(lambda p, a: jnp.square(_float(p) - _float(a)), params, anchor))


def fisher_distance(params: Params, anchor: Params, fisher: Params) -> Array:
    """Half the squared distance to the anchor, each weight counted by its Fisher information."""
    return _half_sum(
        jax.tree.map(lambda p, a, f: f * jnp.square(_float(p) - _float(a)), params, anchor, fisher)
    )


def zero_fisher(params: Params) -> Params:
    """Zeros to add to."""
    return jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), params)


def add_fisher(fisher: Params, gradient: Params, examples: int) -> Params:
    """One of `examples` gradients of a single example's log-likelihood added to their mean of squares."""
    return jax.tree.map(lambda f, g: f + jnp.square(_float(g)) / examples, fisher, gradient)


def merge_fisher(before: Params, new: Params, decay: float = 1.0) -> Params:
    """The Fisher of all stages so far: the sum, older ones times `decay` at each stage (online EWC)."""
    return jax.tree.map(lambda b, n: decay * b + n, before, new)


def interpolate(a: Params, b: Params, weight: float | Array) -> Params:
    """(1 - weight) a + weight b in a's types: WiSE-FT with b the stage's start, an EMA teacher with b the student."""
    return jax.tree.map(
        lambda x, y: ((1 - weight) * _float(x) + weight * _float(y)).astype(x.dtype), a, b
    )


def _float(x: Array) -> Array:
    return x.astype(jnp.float32)


def _half_sum(tree: Any) -> Array:
    return 0.5 * sum((jnp.sum(x) for x in jax.tree.leaves(tree)), jnp.zeros(()))


def l2_penalty(trained: Params, arrays: dict[str, Any]) -> jax.Array:
    return arrays["coef"] * l2_distance(trained, arrays["anchor"])


def ewc_penalty(trained: Params, arrays: dict[str, Any]) -> jax.Array:
    return arrays["coef"] * fisher_distance(trained, arrays["anchor"], arrays["fisher"])
