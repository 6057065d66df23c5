"""Cast, gather or quantise the weights for sampling."""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from cptjax.common.compiler_options import PlatformJit
from cptjax.generation.sampling_config import SamplingConfig
from cptjax.models import unrolled
from cptjax.models.config import ModelConfig
from cptjax.models.layers import DECODER_LINEARS
from cptjax.types import Array, Params


def prepare_rollout_weights(
    params: Params, cfg: ModelConfig, sampling: SamplingConfig, dtype: Any
) -> Params:
    """Return the weights that the sampler takes, for a model that computes in `dtype`.

    `sampling.gather` copies the weights to every device of the `fsdp` axis. `sampling.dtype` int8
    quantises the linear maps of the text blocks. Without either, `params` is returned, and the
    programs of the decode loop cast it.
    """
    program = weights_program(params, cfg, sampling, dtype)
    return params if program is None else program(params)


def weights_program(
    params: Params, cfg: ModelConfig, sampling: SamplingConfig, dtype: Any
) -> Callable[[Params], Params] | None:
    """Return the jitted program that prepares weights like `params` (arrays or shapes).

    Return None without `gather` and int8: the decode loop then takes `params` as they are.
    """
    int8 = sampling.dtype == "int8"
    if not (int8 or sampling.gather):
        return None
    if int8 and importlib.util.find_spec("qwix") is None:
        raise ValueError(
            "rollout.dtype='int8' needs the package qwix; "
            "install it with: pip install 'cptjax[int8]'"
        )
    leaves, tree = jax.tree.flatten(params)
    shardings = tuple(without_fsdp(x.sharding) if sampling.gather else None for x in leaves)
    return _jit_weights_program(cfg, sampling.compute_dtype(dtype), int8, tree, shardings)


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
