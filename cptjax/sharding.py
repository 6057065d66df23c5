"""The device mesh, the sharding rules, declared parameters, and the placement of arrays."""

import contextlib
import contextvars
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from cptjax.types import Batch, Prompts

AXES = ("data", "fsdp", "model")

# Logical axis -> mesh axis (or axes). Only this table decides how arrays are sharded.
RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "mlp_batch": ("data", "fsdp"),  # rows of MLPs and logits
    "state_batch": ("data", "fsdp"),  # rows of hidden states between attention and MLPs
    "layer": None,
    "embed": "fsdp",  # the model width of parameters
    "heads": "model",
    "kv_heads": "model",
    "head_dim": None,
    "mlp": "model",
    "vocab": "model",
    "rank": None,  # LoRA
    "patch": None,
    None: None,
}

# A mesh of sampling may have the axis `rows`. Its devices share MLPs and the vocabulary with those
# of `model`, and have rows of their own in attention, so MLPs can have more parts than heads.
SAMPLING_AXES = ("data", "fsdp", "rows", "model")
SAMPLING_RULES = RULES | {
    "batch": ("data", "fsdp", "rows"),
    "state_batch": SAMPLING_AXES,
    "mlp": ("rows", "model"),
    "vocab": ("rows", "model"),
}
_whole_rows = contextvars.ContextVar("whole_rows", default=False)

Initializer = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]


@dataclasses.dataclass(frozen=True)
class Param:
    """A declared parameter: its shape, logical axes and initializer."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: Initializer = jax.nn.initializers.normal(0.02)
    inputs: int = 0  # number of axes after "layer" that are contracted with x; 0 for vectors


def is_param(x: Any) -> bool:
    return isinstance(x, Param)


def make_mesh(
    data: int = 1, fsdp: int = -1, model: int = 1, devices: list | None = None, slices: int = 1
) -> Mesh:
    """Return a (data, fsdp, model) mesh over all devices.

    One size may be -1, for all remaining devices. With several `slices`, the data axis spans the
    slow network between them.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = {"data": data, "fsdp": fsdp, "model": model}
    free = [name for name, n in sizes.items() if n == -1]
    known = math.prod(n for n in sizes.values() if n != -1)
    if len(free) > 1 or known < 1 or len(devices) % known or (not free and known != len(devices)):
        raise ValueError(
            f"mesh data={data} fsdp={fsdp} model={model}: expected a product of {len(devices)}, "
            "the number of devices; set one of the three to -1"
        )
    if free:
        sizes[free[0]] = len(devices) // known
    shape = tuple(sizes.values())
    if slices < 1:
        raise ValueError(f"mesh.slices={slices}: expected at least 1")
    if shape[0] % slices:
        raise ValueError(
            f"mesh data={shape[0]}: expected a multiple of the {slices} slices that it spans"
        )
    return Mesh(_grid(shape, devices, slices), AXES, axis_types=(AxisType.Auto,) * 3)


def sampling_mesh(mesh: Mesh | AbstractMesh, model: int, mlp: int) -> Mesh | AbstractMesh:
    """Return a mesh of the same devices in the same order, with `model` of them on that axis.

    If `mlp` is above `model`, `mlp // model` of them are on the axis `rows`. The others are on
    `fsdp`. Rows that a device has on the new mesh contain those that it has on the old one.
    """
    old, together = mesh.shape["model"], mesh.shape["fsdp"] * mesh.shape["model"]
    for name, n in (("model", model), ("mlp", max(mlp, model))):
        if n % old or together % n:
            raise ValueError(
                f"rollout.{name}={n}: expected a multiple of mesh.model={old} that is a factor of "
                f"the {together} devices of the axes fsdp and model"
            )
    axes, shape = AXES, (mesh.shape["data"], together // model, model)
    if mlp > model:
        axes, shape = SAMPLING_AXES, (shape[0], together // mlp, mlp // model, model)
    types = (AxisType.Auto,) * len(axes)
    if isinstance(mesh, AbstractMesh):
        return AbstractMesh(shape, axes, axis_types=types)
    return Mesh(mesh.devices.reshape(shape), axes, axis_types=types)


def _grid(shape: tuple[int, ...], devices: list, slices: int) -> np.ndarray:
    """Arrange devices so that neighbours in the mesh are neighbours in the torus.

    An axis of the torus is split only if whole axes do not make the mesh. Other devices than TPUs
    have no torus; their order is that of the hosts, so the first axis spans the hosts.
    """
    if devices[0].platform != "tpu":
        return np.array(devices, object).reshape(shape)
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
                    f"mesh data, fsdp, model = {shape} does not fit the torus of these "
                    f"{len(devices)} devices; change config.mesh"
                ) from None
    raise AssertionError


def check_batch_shards(shards: int, processes: int) -> None:
    """Refuse a mesh on which two processes would have to feed the same rows."""
    if shards % processes:
        raise ValueError(
            f"config.mesh cuts a batch into {shards} shards (data x fsdp) for {processes} "
            "processes: expected a multiple, so that each feeds rows of its own; lower mesh.model "
            "until it stays within a process"
        )


def batch_shards(mesh: Mesh | None) -> int:
    """Return the number of parts that a batch is cut into."""
    return 1 if mesh is None else mesh.size // mesh.shape["model"]


def slice_count(mesh: Mesh) -> int:
    """Return the number of TPU slices, or of domains of fast links between GPUs, of a mesh."""
    return len({getattr(device, "slice_index", 0) for device in mesh.devices.flat})


def decoder_shards() -> int:
    """Return the number of parts that MLPs and the vocabulary are cut into, on the mesh in use."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return sizes.get("model", 1) * sizes.get("rows", 1)


def on_cpu() -> bool:
    """Return whether the mesh in use, or JAX's default device without a mesh, is of CPUs."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return jax.default_backend() == "cpu"
    # Devices of several kinds have no abstract device, and that of jax 0.10.0 has no platform.
    return mesh.abstract_device is not None and mesh.abstract_device.device_kind == "cpu"


def partition_spec(axes: tuple[str | None, ...], rules: dict | None = None) -> PartitionSpec:
    """Return the PartitionSpec of logical axes; raise if two of them share a mesh axis."""
    rules = RULES if rules is None else rules
    unknown = [a for a in axes if a not in rules]
    if unknown:
        raise ValueError(
            f"no sharding rule for axis {unknown[0]!r}; expected one of "
            f"{sorted(a for a in rules if a)}"
        )
    physical = [rules[a] for a in axes]
    used = [name for p in physical for name in _mesh_axes(p)]
    if len(used) != len(set(used)):
        raise ValueError(f"axes {axes} put two dimensions on one mesh axis: {physical}")
    return PartitionSpec(*physical)


def _mesh_axes(physical: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Return the mesh axes of one dimension."""
    return (physical,) if isinstance(physical, str) else physical or ()


def rules_for(kv_heads: int, mesh: Mesh) -> dict:
    """Return the rules of a mesh, but replicate key/value heads that `model` does not divide."""
    rules = rules_of(mesh)
    return rules if kv_heads % mesh.shape["model"] == 0 else rules | {"kv_heads": None}


def rules_of(mesh: Mesh | AbstractMesh) -> dict:
    """Return the sharding rules of the axes of a mesh."""
    return SAMPLING_RULES if "rows" in mesh.axis_names else RULES


def named_sharding(
    axes: tuple[str | None, ...],
    mesh: Mesh,
    shape: tuple[int, ...] | None = None,
    rules: dict | None = None,
) -> NamedSharding:
    """Return the NamedSharding of logical axes.

    Raise a ValueError if mesh axes do not divide their dimension of `shape`.
    """
    spec = partition_spec(axes, rules or rules_of(mesh))
    for name, size, physical in zip(axes, shape or (), spec, strict=bool(shape)):
        ways = math.prod(mesh.shape[m] for m in _mesh_axes(physical))
        if size % ways:
            raise ValueError(
                f"axis {name!r} of size {size} cannot be cut {ways} ways over mesh axis "
                f"{physical!r}; change config.mesh, rollout.model or rollout.mlp"
            )
    return NamedSharding(mesh, spec)


def canonical_sharding(place: jax.sharding.Sharding) -> jax.sharding.Sharding:
    """Return an equal sharding with the shortest spec.

    It has no mesh axes of size 1, and no None at the end.
    """
    if not isinstance(place, NamedSharding):
        return place
    cut = [tuple(m for m in _mesh_axes(p) if place.mesh.shape[m] > 1) for p in place.spec]
    while cut and not cut[-1]:
        cut.pop()
    names = (None if not p else p[0] if len(p) == 1 else p for p in cut)
    return NamedSharding(place.mesh, PartitionSpec(*names), memory_kind=place.memory_kind)


def param_shardings(params: Any, mesh: Mesh, rules: dict | None = None) -> Any:
    """Return the tree of NamedSharding of a tree of Param."""
    return jax.tree.map(
        lambda p: named_sharding(p.axes, mesh, p.shape, rules), params, is_leaf=is_param
    )


def abstract_params(
    params: Any, dtype: Any, mesh: Mesh | None = None, rules: dict | None = None
) -> Any:
    """Return the tree of ShapeDtypeStruct of a tree of Param, on the mesh if there is one."""

    def abstract(p: Param) -> jax.ShapeDtypeStruct:
        place = None if mesh is None else named_sharding(p.axes, mesh, p.shape, rules)
        return jax.ShapeDtypeStruct(p.shape, dtype, sharding=place)

    return jax.tree.map(abstract, params, is_leaf=is_param)


def abstract_array(
    shape: tuple[int, ...], dtype: Any, mesh: Mesh, axes: tuple[str | None, ...] = ()
) -> jax.ShapeDtypeStruct:
    """Return an abstract array on the mesh; axes after the named ones are not sharded."""
    axes = axes + (None,) * (len(shape) - len(axes))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=named_sharding(axes, mesh, shape))


def init_params(
    params: Any, key: jax.Array, dtype: Any, mesh: Mesh | None = None, rules: dict | None = None
) -> Any:
    """Return random parameters, created with their shardings.

    The values of a leaf depend only on the key and on the leaf's position in the tree.
    """

    leaves, tree = jax.tree.flatten(params, is_leaf=is_param)
    shardings = None
    if mesh is not None:
        shardings = tuple(named_sharding(p.axes, mesh, p.shape, rules) for p in leaves)
    return tree.unflatten(_init_program(tuple(leaves), dtype, shardings)(key))


@functools.lru_cache(maxsize=32)
def _init_program(
    leaves: tuple[Param, ...], dtype: Any, shardings: tuple[NamedSharding, ...] | None
) -> Callable[[jax.Array], list[jax.Array]]:
    """Return a program that creates leaves; all runs of a process with the same model share it."""

    def make(key: jax.Array) -> list[jax.Array]:
        keys = [jax.random.fold_in(key, i) for i in range(len(leaves))]
        arrays = [p.init(k, p.shape, jnp.float32) for k, p in zip(keys, leaves, strict=True)]
        return [x.astype(dtype) for x in arrays]

    return jax.jit(make, out_shardings=None if shardings is None else list(shardings))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Shard an activation by the rules if a mesh is set (`jax.set_mesh`)."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, activation_spec(axes))


def activation_spec(axes: tuple[str | None, ...]) -> PartitionSpec:
    """Return the PartitionSpec of the logical axes of an activation, on the mesh that is set."""
    return partition_spec(axes, _activation_rules())


def _activation_rules() -> dict:
    """Return the rules of activations on the mesh in use, inside or outside of `whole_rows`."""
    mesh = jax.sharding.get_abstract_mesh()
    if not _whole_rows.get():
        return rules_of(mesh)
    rows = dict.fromkeys(("batch", "mlp_batch", "state_batch"), mesh.axis_names)
    return RULES | rows | dict.fromkeys(("heads", "kv_heads", "mlp", "vocab"))


def move_rows(x: jax.Array, axis: str) -> jax.Array:
    """Shard hidden states [B ...] by "batch" or "mlp_batch", if these axes are not the same."""
    rules = _activation_rules()
    same = rules["batch"] == rules["mlp_batch"]
    return x if same else constrain(x, axis, *(None,) * (x.ndim - 1))


def constrain_states(x: jax.Array) -> jax.Array:
    """Shard the hidden states [B ...] that attention and MLPs are added to.

    On a mesh with the axis `rows`, each device has some of the rows, if all devices divide them, so
    that the sum over heads or parts of an MLP sends a device only its own rows.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axis = "batch" if mesh.empty or x.shape[0] % mesh.size else "state_batch"
    return constrain(x, axis, *(None,) * (x.ndim - 1))


@contextlib.contextmanager
def whole_rows(*rows: int) -> Iterator[None]:
    """Let each device compute whole rows, also those on `model`, if all devices divide the rows.

    Weights are then gathered, instead of the sums over heads and the MLP, which are larger than the
    weights for rows of many tokens.
    """
    devices = jax.sharding.get_abstract_mesh().size
    divided = devices > 1 and all(n % devices == 0 for n in rows)
    token = _whole_rows.set(divided or _whole_rows.get())
    try:
        yield
    finally:
        _whole_rows.reset(token)


def bytes_per_device(tree: Any) -> float:
    """Return the bytes that a tree of arrays or shapes takes on one device."""

    def share(x: Any) -> tuple[int, ...]:
        return x.sharding.shard_shape(x.shape) if x.sharding else x.shape

    return float(sum(math.prod(share(x)) * x.dtype.itemsize for x in jax.tree.leaves(tree)))


def place_rows(batch: Any, mesh: Mesh | None, axis: Callable[[Any], tuple] | None = None) -> Any:
    """Place host arrays on the mesh; each process passes its own rows.

    The first axis is sharded over the batch shards, unless `axis` returns other logical axes.
    Shapes (jax.ShapeDtypeStruct, of all processes together) get the same shardings.
    """
    if mesh is None:
        return jax.tree.map(jnp.asarray, batch)

    def place(x: Any) -> jax.Array | jax.ShapeDtypeStruct:
        rows_first = ("batch", *(None,) * (np.ndim(x) - 1)) if np.ndim(x) else ()
        axes = axis(x) if axis else rows_first
        if isinstance(x, jax.ShapeDtypeStruct):
            return abstract_array(x.shape, x.dtype, mesh, axes)
        where = named_sharding(axes, mesh)
        return jax.make_array_from_process_local_data(where, np.asarray(x))

    return jax.tree.map(place, batch)


def place_batch(batch: Batch, mesh: Mesh | None) -> Batch:
    """Place a host batch on the mesh, with its rows sharded over the batch shards."""
    if mesh is None:
        return jax.tree.map(jnp.asarray, batch)
    rest = (batch.targets, batch.mask, batch.where, batch.extra, batch.packing)
    return Batch(place_prompts(batch.prompts, mesh), *place_rows(rest, mesh))


def place_prompts(prompts: Prompts, mesh: Mesh | None) -> Prompts:
    """Place host prompts or shapes on the mesh."""
    if mesh is None:
        return jax.tree.map(jnp.asarray, prompts)
    return map_prompts(
        prompts,
        lambda x: place_rows(x, mesh),
        lambda x: place_rows(x, mesh, lambda x: (None, "batch", *(None,) * (np.ndim(x) - 2))),
    )


def map_prompts(prompts: Prompts, first: Callable, second: Callable) -> Prompts:
    """Map the arrays whose first axis is sharded by rows, and those whose second axis is.

    The second are position ids [3 B T], and the states [n S W*P D] of a tower after earlier blocks.
    """
    last, *earlier = prompts.tower_states or (None,)
    states = (first(last), *map(second, earlier)) if prompts.tower_states else None
    rest = jax.tree.map(first, prompts.replace(positions=None, tower_states=None))
    return rest.replace(positions=second(prompts.positions), tower_states=states)


def local_row_numbers(x: jax.Array) -> np.ndarray:
    """Return the numbers of the rows that `local_rows` returns, in the same order."""
    starts = {shard.index[0].start or 0: len(shard.data) for shard in x.addressable_shards}
    return np.concatenate([np.arange(start, start + starts[start]) for start in sorted(starts)])


def local_rows(x: jax.Array) -> np.ndarray:
    """Return this process's rows, in order, of an array that is sharded along its first axis."""
    if not x.ndim:
        return np.asarray(x)
    # Copies of a shard begin at the same row; one of them is used.
    parts = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
    return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])
