"""Orthogonal gradient projection with a rank budget.

After GPM (Saha et al. 2021, 2103.09762) and OGD (Farajtabar et al. 2019, 1910.07104).

    M = sum over stages of the mean over rows of G G^T / |G|^2
    U = the eigenvectors of M with the largest eigenvalues: a share `energy` of their sum, and at
        most `rank` of them
    gradient <- gradient - U U^T gradient, and the same for the change of the weight

G [inputs, outputs] is the gradient of log p(gold response | prompt) of a row with respect to a
weight. Its columns are sums of inputs of the weight, so a change that is orthogonal to them keeps
the outputs for these inputs. The change is projected too, since Adam scales each number of the
gradient by itself, and since weight decay adds the weight. What remains of U in a change is the
rounding of the weight to its type.

Departures: 1. GPM finds the directions in the inputs of all tokens; in G they are weighted by the
gradients of the outputs. 2. When its memory is full, GPM learns no more directions; here the
weakest of all stages make room. 3. M has inputs^2 numbers and is not stored, but M times 2 rank
random columns, whose range is that of M up to small eigenvalues (Tropp et al. 2017, 1706.05736).

The method keeps L * inputs * rank numbers in float32 of each of L layers' weights, and the pass at
the end of a stage twice that. At most half of the inputs of a weight are protected, so that it can
learn. The factors A and B of an adapter are two weights; since B has only model.lora.rank inputs,
adapters keep the outputs for earlier inputs only in part. Weights that `layers` does not name, such
as norms and the vision tower, are trained without projection.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from cptjax.models.layers import DECODER_LINEARS
from cptjax.models.trainable import flatten_params, unflatten_params
from cptjax.sharding import canonical_sharding
from cptjax.training.algorithms.continual_learning.hooks import (
    ContinualMethod,
    GradientPass,
    KeptLayout,
    StageEnd,
)
from cptjax.training.algorithms.continual_learning.importance import check_samples
from cptjax.training.algorithms.losses import LossConfig
from cptjax.training.algorithms.objective import Objective
from cptjax.types import Array, Params

Path = tuple[str, ...]  # of a leaf
NOISE = 1e-5  # eigenvalues below this share of the largest one are rounding errors
einsum = functools.partial(jnp.einsum, precision="highest")  # TPUs would round to bfloat16


@dataclasses.dataclass(frozen=True)
class Sketch:
    """The products of G G^T / |G|^2 of each projected weight with random columns."""

    rank: int
    layers: tuple[str, ...]

    def __call__(self, gradient: Params) -> Params:
        """Return G G^T Omega / |G|^2 [L, inputs, columns] of each projected weight."""
        flat, out = flatten_params(gradient), {}
        for path, (inputs, rank) in projected_weights(flat, self.rank, self.layers).items():
            g = flat[path].reshape(-1, inputs, flat[path][0].size // inputs)
            size = jnp.maximum(einsum("lio,lio->l", g, g), 1e-30)
            seen = einsum("lio,ik->lok", g, random_columns(inputs, rank))
            out[path] = einsum("lio,lok->lik", g, seen) / size[:, None, None]
        return unflatten_params(out)


@dataclasses.dataclass(frozen=True)
class GPM(ContinualMethod):
    """Orthogonal gradient projection.

    It keeps the columns of U, each times the root of its eigenvalue; unused columns are zero.
    """

    name = "gpm"
    rank: int = 64  # directions of each weight
    energy: float = 0.97
    samples: int = 64  # rows of the estimate of M
    layers: tuple[str, ...] = DECODER_LINEARS  # weights of the language model

    def check(self, config: ConfigDict) -> None:
        check_samples(self)
        model = config.model
        if self.rank < 1 or not 0 < self.energy <= 1:
            raise ValueError(
                f"gpm: rank={self.rank}, energy={self.energy}: expected rank >= 1 and "
                "0 < energy <= 1"
            )
        trained = () if "language" in model.freeze else DECODER_LINEARS
        trained = model.lora.targets if model.lora.rank else trained
        if not self.layers or not set(self.layers) <= set(trained):
            raise ValueError(
                f"gpm: layers={tuple(self.layers)}: expected some of the trained weights of the "
                f"language model, {', '.join(trained) or 'of which there are none'}"
            )
        if config.method.parameters.name != "none":
            raise ValueError(
                f"gpm with method.parameters.name={config.method.parameters.name!r}: the inputs "
                "of an adapter's B belong to its A, which each stage replaces; choose one of them"
            )

    def kept_shapes(self, layout: KeptLayout) -> Params:
        """Return the shapes [L, inputs, rank]; inputs are sharded as those of the weight."""
        flat, out = flatten_params(layout.trained), {}
        for path, (inputs, rank) in projected_weights(flat, self.rank, self.layers).items():
            place = NamedSharding(layout.mesh, PartitionSpec(None, *flat[path].sharding.spec[1:2]))
            shape = (len(flat[path]), inputs, rank)
            out[path] = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=canonical_sharding(place))
        return unflatten_params(out)

    def gradient_pass(self, chunk: int) -> GradientPass:
        objective = Objective(LossConfig.plain("sft", chunk))
        return GradientPass(objective, Sketch(self.rank, self.layers), self.samples)

    def stage_end(self, end: StageEnd) -> tuple[Params, Params]:
        sketches, kept = flatten_params(end.mean), flatten_params(end.kept or {})
        weights = projected_weights(flatten_params(end.trained), self.rank, self.layers)
        return end.trained, unflatten_params(
            {
                path: add_directions(kept.get(path), sketches[path], rank, self.energy)
                for path, (_, rank) in weights.items()
            }
        )

    def project_gradient(self, gradient: Params, kept: Params | None) -> Params:
        return remove_directions(gradient, kept)

    def project_change(self, change: Params, kept: Params | None) -> Params:
        return remove_directions(change, kept)


def projected_weights(
    trained: Mapping[Path, Any], rank: int, layers: tuple[str, ...]
) -> dict[Path, tuple[int, int]]:
    """Return the number of inputs, and of kept directions, of each projected weight, by path."""
    sizes = {}
    for path, x in trained.items():
        if path[:2] == ("text", "blocks") and path[2] in layers and path[-1] != "b":
            inputs = math.prod(x.shape[1 : 1 + input_axes(path)])
            sizes[path] = inputs, min(rank, inputs // 2)
    return {path: (inputs, rank) for path, (inputs, rank) in sizes.items() if rank}


def input_axes(path: Path) -> int:
    """Return the number of input axes of a weight: only the output of attention has two."""
    return 2 if path[2] == "o" and path[-1] != "lora_b" else 1


def random_columns(inputs: int, rank: int) -> Array:
    """Return the random matrix Omega [inputs, columns] of a weight."""
    return jax.random.normal(jax.random.key(0), (inputs, 2 * rank))


def remove_directions(tree: Params, kept: Params | None) -> Params:
    """Return x - U U^T x of each projected weight."""
    out = flatten_params(tree)
    for path, scaled in flatten_params(kept or {}).items():
        u = unit_columns(scaled)
        x = out[path].reshape(*scaled.shape[:2], -1)
        x = x - einsum("lir,lro->lio", u, einsum("lir,lio->lro", u, x))
        out[path] = x.reshape(out[path].shape)
    return unflatten_params(out)


def unit_columns(x: Array) -> Array:
    """Divide each column [L, inputs, rank] by its length; zero columns stay zero."""
    length = jnp.linalg.norm(x, axis=1, keepdims=True)
    return x / jnp.where(length > 0, length, 1)


@functools.partial(jax.jit, static_argnames=("rank", "energy"))
def add_directions(kept: Array | None, sketch: Array, rank: int, energy: float) -> Array:
    """Return the scaled directions [L, inputs, rank] of the stages before and of a new one.

    sketch: [L, inputs, columns] the new stage's M Omega
    """
    # M is about (M Omega) (Omega^T M Omega)^-1 (M Omega)^T = root root^T.
    omega = random_columns(sketch.shape[1], sketch.shape[2] // 2)
    core = einsum("ij,lik->ljk", omega, sketch)
    values, vectors = jnp.linalg.eigh(core)
    known = values > NOISE * values[:, -1:]
    inverse = jnp.where(known, jax.lax.rsqrt(jnp.where(known, values, 1)), 0)
    root = einsum("lik,lkr->lir", sketch, vectors * inverse[:, None])
    both = root if kept is None else jnp.concatenate([kept, root], -1)
    u, size, _ = jnp.linalg.svd(both, full_matrices=False)
    value = jnp.square(size)
    stronger = jnp.cumsum(value, -1) - value  # the sum of the larger eigenvalues
    chosen = (stronger < energy * value.sum(-1, keepdims=True)) & (value > NOISE * value[:, :1])
    return u[..., :rank] * jnp.where(chosen, size, 0)[:, None, :rank]
