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
from cptjax.models import causal_lm, unrolled
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

    If they are gathered, every device of the `fsdp` axis gets a copy. `sampling.model` places them
    on the mesh of sampling. `sampling.dtype` int8 quantises the linear maps of the text blocks.
    Without any of these, `params` is returned, and the programs of the decode loop cast it.
    """
    program = weights_program(params, cfg, sampling, dtype)
    return params if program is None else program(params)


def weights_program(
    params: Params, cfg: ModelConfig, sampling: SamplingConfig, dtype: Any
) -> Callable[[Params], Params] | None:
    """Return the jitted program that prepares weights like `params` (arrays or shapes).

    Return None if there is nothing to prepare: the decode loop then takes `params` as they are.
    """
    int8, gather = sampling.dtype == "int8", gathers_weights(params, cfg, sampling, dtype)
    if not (int8 or gather or sampling.model):
        return None
    if int8 and importlib.util.find_spec("qwix") is None:
        raise ValueError(
            "rollout.dtype='int8' needs the package qwix; "
            "install it with: pip install 'cptjax[int8]'"
        )
    leaves, tree = jax.tree.flatten(params)
    shardings = tuple(rollout_shardings(params, cfg, sampling, gather))
    return _jit_weights_program(cfg, sampling.compute_dtype(dtype), int8, tree, shardings)


def rollout_shardings(
    params: Params, cfg: ModelConfig, sampling: SamplingConfig, gather: bool
) -> list[tuple[NamedSharding, ...]]:
    """Return the shardings that the copies of the leaves of `params` take, one after the other.

    The last one is that of sampling; () = unchanged. From one mesh to the other, the compiler would
    gather whole weights at once; it gathers their shards over the devices that join `model`, cuts
    them, and then gathers them over `fsdp`.
    """
    leaves = jax.tree.leaves_with_path(params)
    if not sampling.model:
        places = [without_axis(x.sharding, "fsdp") if gather else None for _, x in leaves]
        return [() if place is None else (place,) for place in places]
    mesh = sampling.mesh(leaves[0][1].sharding.mesh)
    rules = sharding.rules_for(cfg.text.kv_heads, mesh)
    declared = dict(
        jax.tree.leaves_with_path(causal_lm.declare_params(cfg), is_leaf=sharding.is_param)
    )
    out = []
    for path, x in leaves:
        place = NamedSharding(mesh, PartitionSpec())
        if path in declared:  # adapters are not, and are small: every device gets them whole
            param = declared[path]
            # The axis `rows` splits the decoder only: a vision tower has whole rows of its own.
            own = rules if path[0].key == "text" else sharding.RULES
            place = sharding.named_sharding(param.axes, mesh, param.shape, own)
        last = (without_axis(place, "fsdp"),) if gather else ()
        whole = without_axis(x.sharding, "model"), without_axis(place, "rows", "model")
        out.append((*whole, place, *last))
    return out


def gathers_weights(params: Params, cfg: ModelConfig, sampling: SamplingConfig, dtype: Any) -> bool:
    """Return whether weights like `params` (arrays or shapes) are gathered over the `fsdp` axis.

    `sampling.gather` decides. None decides from memory, so that a plan and a resumed run decide
    alike: from the shapes of the weights and the devices of the mesh.
    """
    if sampling.gather is not None:
        return sampling.gather
    mesh = fsdp_mesh(params)
    usable = None if mesh is None else chips.usable_memory(list(mesh.devices.flat))
    return usable is not None and gathered_bytes(params, cfg, sampling, dtype) <= SHARE * usable


def fsdp_mesh(params: Params) -> Mesh | None:
    """Return the mesh of weights if its devices exist and `fsdp` has several of them."""
    place = jax.tree.leaves(params)[0].sharding
    mesh = place.mesh if isinstance(place, NamedSharding) else None
    return mesh if isinstance(mesh, Mesh) and mesh.shape["fsdp"] > 1 else None


def gathered_bytes(params: Params, cfg: ModelConfig, sampling: SamplingConfig, dtype: Any) -> float:
    """Return the bytes of a device that a gathered copy and `MODELS` sharded models take."""
    copy = weights_output(params, cfg, sampling, dtype, gather=True)
    return sharding.bytes_per_device(copy) + MODELS * sharding.bytes_per_device(params)


def weights_output(
    params: Params, cfg: ModelConfig, sampling: SamplingConfig, dtype: Any, gather: bool
) -> Params:
    """Return the abstract result of a `weights_program` that casts and places weights."""
    leaves, tree = jax.tree.flatten(params)
    places = rollout_shardings(params, cfg, sampling, gather)
    dtype = sampling.compute_dtype(dtype)
    return tree.unflatten(
        jax.ShapeDtypeStruct(x.shape, dtype, sharding=steps[-1] if steps else x.sharding)
        for x, steps in zip(leaves, places, strict=True)
    )


@functools.lru_cache(maxsize=32)
def _jit_weights_program(
    cfg: ModelConfig, dtype: Any, int8: bool, tree: Any, shardings: tuple
) -> Callable[[Params], Params]:
    """Return one jitted function per structure and layout of the weights."""

    def prepare(params: Params) -> Params:
        leaves = [x.astype(dtype) for x in jax.tree.leaves(params)]
        leaves = [
            functools.reduce(_move, steps, x) for x, steps in zip(leaves, shardings, strict=True)
        ]
        params = tree.unflatten(leaves)
        return unrolled.unstack_layers(_quantise(params) if int8 else params, cfg)

    # The compiler may replicate results that have the sharding of another mesh than the arguments.
    plain = not (int8 or cfg.compute.samples_unrolled) and all(shardings)
    results = {"out_shardings": tree.unflatten(s[-1] for s in shardings)} if plain else {}
    return PlatformJit(prepare, **results)


def _move(x: Array, place: NamedSharding) -> Array:
    # Without the barrier, the compiler makes one step of several.
    return jax.lax.with_sharding_constraint(jax.lax.optimization_barrier(x), place)


def without_axis(old: Any, *names: str) -> NamedSharding | None:
    """Return a sharding without some mesh axes; None for an array that is not on a mesh."""
    if not isinstance(old, NamedSharding):
        return None

    def drop(axis: Any) -> Any:
        if isinstance(axis, tuple):
            return tuple(a for a in axis if a not in names) or None
        return None if axis in names else axis

    return NamedSharding(old.mesh, PartitionSpec(*map(drop, old.spec)))


def is_quantised(path: tuple[str, ...]) -> bool:
    """Return whether int8 sampling quantises the leaf at a path."""
    return path[:2] == ("text", "blocks") and path[2] in DECODER_LINEARS and path[-1] == "w"


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
