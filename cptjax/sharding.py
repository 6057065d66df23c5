"""Where arrays live: the mesh, one table of rules, and parameters declared before they exist."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from cptjax.types import Batch


def check_batch_shards(shards: int, processes: int) -> None:
    """Refuse a mesh on which two processes would each feed the same rows."""
    if shards % processes:
        raise ValueError(
            f"config.mesh cuts a batch into {shards} shards (data x fsdp) for {processes} processes: expected a multiple, so that "
            "each feeds rows of its own; lower mesh.model until it stays within a process"
        )


def place_batch(batch: Batch, mesh: Mesh | None) -> Batch:
    """A host batch onto the mesh: rows over the batch shards, position ids [3 B T] over their second axis."""
    if mesh is None:
        return jax.tree.map(jnp.asarray, batch)
    put = lambda tree: place_rows(tree, mesh)
    prompts = place_prompts(batch.prompts, mesh)
    return Batch(prompts, *put((batch.targets, batch.mask, batch.where, batch.extra)))


def place_prompts(prompts: Any, mesh: Mesh | None) -> Any:
    if mesh is None:
        return jax.tree.map(jnp.asarray, prompts)
    put = lambda tree: place_rows(tree, mesh)
    positions = place_rows(prompts.positions, mesh, lambda x: (None, "batch", None))
    return prompts.replace(
        tokens=put(prompts.tokens),
        positions=positions,
        segments=put(prompts.segments),
        slots=put(prompts.slots),
        vision=put(prompts.vision),
    )


AXES = ("data", "fsdp", "model")

# Logical axis -> mesh axis (or axes). The only place that says where anything lives.
RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "layer": None,
    "embed": "fsdp",  # parameters' model width
    "heads": "model",
    "kv_heads": "model",
    "head_dim": None,
    "mlp": "model",
    "vocab": "model",
    "rank": None,  # LoRA
    "patch": None,
    None: None,
}

Initializer = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]


@dataclasses.dataclass(frozen=True)
class Param:
    """A parameter before it exists: its shape, its logical axes, how it starts; `inputs` counts the axes contracted with x."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: Initializer = jax.nn.initializers.normal(0.02)
    inputs: int = 0  # of the axes after "layer"; 0 for vectors


def is_param(x: Any) -> bool:
    return isinstance(x, Param)


def make_mesh(
    data: int = 1, fsdp: int = -1, model: int = 1, devices: list | None = None, slices: int = 1
) -> Mesh:
    """A (data, fsdp, model) mesh over all devices; one size may be -1; `slices` puts the data axis across the slow network."""
    devices = list(jax.devices() if devices is None else devices)
    sizes = {"data": data, "fsdp": fsdp, "model": model}
    free = [name for name, n in sizes.items() if n == -1]
    known = math.prod(n for n in sizes.values() if n != -1)
    if len(free) > 1 or known < 1 or len(devices) % known or (not free and known != len(devices)):
        raise ValueError(
            f"mesh data={data} fsdp={fsdp} model={model} does not make {len(devices)} devices; set one of the three to -1"
        )
    if free:
        sizes[free[0]] = len(devices) // known
    shape = tuple(sizes.values())
    if slices < 1:
        raise ValueError(f"mesh.slices={slices}: expected at least 1")
    if shape[0] % slices:
        raise ValueError(
            f"mesh data={shape[0]} must be a multiple of the {slices} slices that it spans"
        )
    return Mesh(_grid(shape, devices, slices), AXES, axis_types=(AxisType.Auto,) * 3)


def _grid(shape: tuple[int, ...], devices: list, slices: int) -> np.ndarray:
    """Devices in the mesh's order, neighbours of the torus side by side; its axes are split where a mesh axis needs a part of one."""
    within = (shape[0] // slices, *shape[1:])
    for split in (False, True):
        try:
            if slices == 1:
                return mesh_utils.create_device_mesh(
                    shape, devices, allow_split_physical_axes=split
                )
            return mesh_utils.create_hybrid_device_mesh(
                within, (slices, 1, 1), devices, allow_split_physical_axes=split
            )
        except NotImplementedError:  # whole axes of the torus do not make this mesh
            if split:
                raise ValueError(
                    f"mesh data, fsdp, model = {shape} can not be laid out on these {len(devices)} devices"
                ) from None
    raise AssertionError


def batch_shards(mesh: Mesh | None) -> int:
    """Into how many parts a batch is cut."""
    return 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]


def partition_spec(axes: tuple[str | None, ...], rules: dict | None = None) -> PartitionSpec:
    """The PartitionSpec of logical axes; two of them on one mesh axis is an error."""
    rules = RULES if rules is None else rules
    unknown = [a for a in axes if a not in rules]
    if unknown:
        raise ValueError(
            f"no sharding rule for axis {unknown[0]!r}; known axes: {sorted(a for a in rules if a)}"
        )
    physical = [rules[a] for a in axes]
    used = [m for p in physical for m in ((p,) if isinstance(p, str) else p or ())]
    if len(used) != len(set(used)):
        raise ValueError(f"axes {axes} put two dimensions on one mesh axis: {physical}")
    return PartitionSpec(*physical)


def rules_for(kv_heads: int, mesh: Mesh) -> dict:
    """RULES, with key/value heads copied to every member of `model` where there are fewer heads than members (as GQA servers do)."""
    return RULES if kv_heads % mesh.shape["model"] == 0 else RULES | {"kv_heads": None}


def named_sharding(
    axes: tuple[str | None, ...],
    mesh: Mesh,
    shape: tuple[int, ...] | None = None,
    rules: dict | None = None,
) -> NamedSharding:
    """The NamedSharding of logical axes; a dimension that its mesh axes do not divide is refused with the numbers."""
    where = partition_spec(axes, rules)
    for name, size, physical in zip(axes, shape or (), where, strict=bool(shape)):
        ways = math.prod(
            mesh.shape[m] for m in ((physical,) if isinstance(physical, str) else physical or ())
        )
        if size % ways:
            raise ValueError(
                f"axis {name!r} of size {size} cannot be cut {ways} ways over mesh axis {physical!r}; change config.mesh"
            )
    return NamedSharding(mesh, where)


def canonical_sharding(place: jax.sharding.Sharding) -> jax.sharding.Sharding:
    """The one name of a place that has several: without mesh axes of one device, and without Nones at the end."""
    if not isinstance(place, NamedSharding):
        return place
    cut = [
        tuple(m for m in ((p,) if isinstance(p, str) else p or ()) if place.mesh.shape[m] > 1)
        for p in place.spec
    ]
    while cut and not cut[-1]:
        cut.pop()
    names = (None if not p else p[0] if len(p) == 1 else p for p in cut)
    return NamedSharding(place.mesh, PartitionSpec(*names), memory_kind=place.memory_kind)


def param_shardings(params: Any, mesh: Mesh, rules: dict | None = None) -> Any:
    """Tree of Param -> tree of NamedSharding."""
    return jax.tree.map(
        lambda p: named_sharding(p.axes, mesh, p.shape, rules), params, is_leaf=is_param
    )


def abstract_params(
    params: Any, dtype: Any, mesh: Mesh | None = None, rules: dict | None = None
) -> Any:
    """Tree of Param -> tree of ShapeDtypeStruct, on the mesh if there is one."""
    where = lambda p: None if mesh is None else named_sharding(p.axes, mesh, p.shape, rules)
    return jax.tree.map(
        lambda p: jax.ShapeDtypeStruct(p.shape, dtype, sharding=where(p)), params, is_leaf=is_param
    )


def abstract_array(
    shape: tuple[int, ...], dtype: Any, mesh: Mesh, axes: tuple[str | None, ...] = ()
) -> jax.ShapeDtypeStruct:
    """Return the shape of an array on the mesh; axes after the named ones are not cut."""
    axes = axes + (None,) * (len(shape) - len(axes))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=named_sharding(axes, mesh, shape))


def init_params(
    params: Any, key: jax.Array, dtype: Any, mesh: Mesh | None = None, rules: dict | None = None
) -> Any:
    """Random parameters, born where they live; a leaf's numbers depend on the key and its place in the tree only."""

    def make(key):
        leaves, tree = jax.tree.flatten(params, is_leaf=is_param)
        return tree.unflatten(
            [
                p.init(jax.random.fold_in(key, i), p.shape, jnp.float32).astype(dtype)
                for i, p in enumerate(leaves)
            ]
        )

    return jax.jit(
        make, out_shardings=None if mesh is None else param_shardings(params, mesh, rules)
    )(key)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pin an activation to the rules where a mesh is set (`jax.set_mesh`); elsewhere nothing."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes))


def place_rows(batch: Any, mesh: Mesh | None, axis: Callable[[Any], tuple] | None = None) -> Any:
    """Host arrays -> device arrays, first axis cut over the batch shards; each process gives its own rows."""
    if mesh is None:
        return jax.tree.map(jnp.asarray, batch)
    axis = axis or (lambda x: ("batch",) + (None,) * (np.ndim(x) - 1) if np.ndim(x) else ())
    put = lambda x: jax.make_array_from_process_local_data(
        named_sharding(axis(x), mesh), np.asarray(x)
    )
    return jax.tree.map(put, batch)


def local_rows(x: jax.Array) -> np.ndarray:
    """This process's rows of an array cut along its first axis, in order, copies left out."""
    parts = {
        shard.index[0].start or 0 if shard.index else 0: shard for shard in x.addressable_shards
    }
    return (
        np.concatenate([np.asarray(parts[start].data) for start in sorted(parts)])
        if x.ndim
        else np.asarray(x)
    )
