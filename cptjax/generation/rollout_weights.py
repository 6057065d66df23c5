"""Cast, gather or quantise the weights for sampling."""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cptjax import sharding
from cptjax.common import chips
from cptjax.common.compiler_options import PlatformJit
from cptjax.generation.sampling_config import SamplingConfig
from cptjax.models import unrolled
from cptjax.models.config import ModelConfig
from cptjax.models.layers import DECODER_LINEARS
from cptjax.types import Array, Params

# What `gathers_weights` expects beside the gathered copy: the sharded weights, two moments of the
# optimiser and another model; and the share of memory that all of it may take. The rest is for
# caches and activations.
MODELS, SHARE = 4, 2 / 3


def prepare_rollout_weights(
    params: Params, cfg: ModelConfig, sampling: SamplingConfig, dtype: Any
) -> Params:
    """Return the weights that the sampler takes, for a model that computes in `dtype`.

    If they are gathered, every device of the `fsdp` axis gets a copy. `sampling.dtype` int8
    quantises the linear maps of the text blocks. Without either, `params` is returned, and the
    programs of the decode loop cast it.
    """
    program = weights_program(params, cfg, sampling, dtype)
    return params if program is None else program(params)


def weights_program(
    params: Params, cfg: ModelConfig, sampling: SamplingConfig, dtype: Any
) -> Callable[[Params], Params] | None:
    """Return the jitted program that prepares weights like `params` (arrays or shapes).

    Return None if they are not gathered and not int8: the decode loop then takes `params` as they
    are.
    """
    int8, gather = sampling.dtype == "int8", gathers_weights(params, sampling, dtype)
    if not (int8 or gather):
        return None
    if int8 and importlib.util.find_spec("qwix") is None:
        raise ValueError(
            "rollout.dtype='int8' needs the package qwix; "
            "install it with: pip install 'cptjax[int8]'"
        )
    leaves, tree = jax.tree.flatten(params)
    shardings = tuple(without_fsdp(x.sharding) if gather else None for x in leaves)
    return _jit_weights_program(cfg, sampling.compute_dtype(dtype), int8, tree, shardings)


def gathers_weights(params: Params, sampling: SamplingConfig, dtype: Any) -> bool:
    """Return whether weights like `params` (arrays or shapes) are gathered over the `fsdp` axis.

    `sampling.gather` decides. None decides from memory, so that a plan and a resumed run decide
    alike: from the shapes of the weights and the devices of the mesh.
    """
    if sampling.gather is not None:
        return sampling.gather
    mesh = fsdp_mesh(params)
    usable = None if mesh is None else chips.usable_memory(list(mesh.devices.flat))
    return usable is not None and gathered_bytes(params, sampling, dtype) <= SHARE * usable


def fsdp_mesh(params: Params) -> Mesh | None:
    """Return the mesh of weights if its devices exist and `fsdp` has several of them."""
    place = jax.tree.leaves(params)[0].sharding
    mesh = place.mesh if isinstance(place, NamedSharding) else None
    return mesh if isinstance(mesh, Mesh) and mesh.shape["fsdp"] > 1 else None


def gathered_bytes(params: Params, sampling: SamplingConfig, dtype: Any) -> float:
    """Return the bytes of a device that a gathered copy and `MODELS` sharded models take."""
    copy = weights_output(params, sampling, dtype)
    return sharding.bytes_per_device(copy) + MODELS * sharding.bytes_per_device(params)


def weights_output(params: Params, sampling: SamplingConfig, dtype: Any) -> Params:
    """Return the abstract result of a `weights_program` that only casts and gathers."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, sampling.compute_dtype(dtype), sharding=without_fsdp(x.sharding)
        ),
        params,
    )


@functools.lru_cache(maxsize=32)
def _jit_weights_program(
    cfg: ModelConfig, dtype: Any, int8: bool, tree: Any, shardings: tuple
) -> Callable[[Params], Params]:
    """Return one jitted function per structure and layout of the weights."""

    def prepare(params: Params) -> Params:
        leaves = [x.astype(dtype) for x in jax.tree.leaves(params)]
        leaves = [
            x if s is None else jax.lax.with_sharding_constraint(x, s)
            for x, s in zip(leaves, shardings, strict=True)
        ]
        params = tree.unflatten(leaves)
        return unrolled.unstack_layers(_quantise(params) if int8 else params, cfg)

    return PlatformJit(prepare)


def without_fsdp(old: Any) -> NamedSharding | None:
    """Return a sharding without its `fsdp` axis; None for an array that is not on a mesh."""
    if not isinstance(old, NamedSharding):
        return None

    def drop(axis: Any) -> Any:
        if isinstance(axis, tuple):
            return tuple(a for a in axis if a != "fsdp") or None
        return None if axis == "fsdp" else axis

    return NamedSharding(old.mesh, PartitionSpec(*map(drop, old.spec)))


def _quantise(params: Params) -> Params:
    """Replace the linear maps of the text blocks by {int8, scale}.

    There is one scale per layer and output, so that the scale can multiply the product.
    """
    blocks = {
        name: _quantise_linear(p, 2 if name == "o" else 1) if name in DECODER_LINEARS else p
        for name, p in params["text"]["blocks"].items()
    }
    return params | {"text": params["text"] | {"blocks": blocks}}


def _quantise_linear(linear: dict[str, Array], inputs: int) -> dict[str, Array]:
    import qwix

    w = linear["w"]
    q = qwix.quantize(w, "int8", channelwise_axes=(0, *range(1 + inputs, w.ndim)))
    rest = {name: x for name, x in linear.items() if name != "w"}
    return rest | {"int8": q.qvalue, "scale": q.scale.reshape(w.shape[0], *w.shape[1 + inputs :])}
