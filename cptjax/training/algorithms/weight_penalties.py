"""Quadratic penalties on the weights (L2, EWC) and weight averages (WiSE-FT, EMA).

    l2    1/2 sum (p - anchor)^2
    ewc   1/2 sum F (p - anchor)^2, with the diagonal Fisher information
          F = mean over examples of (gradient of the log-likelihood)^2

The caller multiplies by the coefficient. Trees may have None where a parameter is frozen. All sums
are float32. LwF compares outputs instead of weights; see `objective`.
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
            f"method.penalty.name={name!r} with coef=0 does nothing: "
            "set method.penalty.coef, or name='none'"
        )
    if name == "ewc" and samples < 1:
        raise ValueError(
            f"method.penalty.samples={samples}: ewc estimates its Fisher from at least 1 example"
        )
    if not 0 <= average < 1:
        raise ValueError(
            f"method.average={average}: expected the weight of the stage's start, 0 <= average < 1"
        )


def l2_distance(params: Params, anchor: Params) -> Array:
    """Compute half the squared distance to the anchor."""
    return _half_sum(jax.tree.map(lambda p, a: jnp.square(_float(p) - _float(a)), params, anchor))


def fisher_distance(params: Params, anchor: Params, fisher: Params) -> Array:
    """Compute half the squared distance to the anchor, weighted by the Fisher information."""
    return _half_sum(
        jax.tree.map(lambda p, a, f: f * jnp.square(_float(p) - _float(a)), params, anchor, fisher)
    )


def zero_fisher(params: Params) -> Params:
    """Return float32 zeros in the shapes of the parameters, to add squared gradients to."""
    return jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), params)


def add_fisher(fisher: Params, gradient: Params, examples: int) -> Params:
    """Add the gradient of one of `examples` examples to their mean of squares."""
    return jax.tree.map(lambda f, g: f + jnp.square(_float(g)) / examples, fisher, gradient)


def merge_fisher(before: Params, new: Params) -> Params:
    """Return the Fisher information of all stages so far: the sum."""
    return jax.tree.map(jnp.add, before, new)


def interpolate(a: Params, b: Params, weight: float | Array) -> Params:
    """Return (1 - weight) a + weight b in the dtypes of a.

    In WiSE-FT, b is the model at the stage's start; for an EMA teacher, b is the student.
    """
    # optax.incremental_update adds in the other order, which rounds differently, and computes
    # bfloat16 leaves in bfloat16.
    return jax.tree.map(
        lambda x, y: ((1 - weight) * _float(x) + weight * _float(y)).astype(x.dtype), a, b
    )


def _float(x: Array) -> Array:
    return x.astype(jnp.float32)


def _half_sum(tree: Any) -> Array:
    return 0.5 * sum((jnp.sum(x) for x in jax.tree.leaves(tree)), jnp.zeros(()))


def l2_penalty(trained: Params, arrays: dict[str, Any]) -> jax.Array:
    """Compute the L2 penalty from the arrays of a step program: coefficient and anchor."""
    return arrays["coef"] * l2_distance(trained, arrays["anchor"])


def ewc_penalty(trained: Params, arrays: dict[str, Any]) -> jax.Array:
    """Compute the EWC penalty from the arrays of a step program: coefficient, anchor, Fisher."""
    return arrays["coef"] * fisher_distance(trained, arrays["anchor"], arrays["fisher"])


def penalty_arrays(name: str, anchor: Any, coef: Any, fisher: Any) -> dict[str, Any]:
    """Return the arrays, or shapes, that the function of a penalty takes."""
    arrays = {"anchor": anchor, "coef": coef}
    return arrays | {"fisher": fisher} if name == "ewc" else arrays


# LwF is missing, since it is a loss on outputs, not a penalty on weights.
PENALTY_FUNCTIONS = {"l2": l2_penalty, "ewc": ewc_penalty}
