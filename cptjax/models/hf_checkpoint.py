"""Load and save Hugging Face checkpoints, by one table of tensor names for both directions."""

import dataclasses
import functools
import itertools
import json
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from cptjax import sharding
from cptjax.common import distributed
from cptjax.models import causal_lm, lora, safetensors_io, trainable
from cptjax.models.config import ModelConfig
from cptjax.models.families import find_family
from cptjax.models.hf_config import config_to_hf, locate_checkpoint
from cptjax.models.safetensors_io import PlannedTensor, StoredTensor
from cptjax.sharding import Param
from cptjax.types import Params

LeafPath = tuple[str, ...]
EMBED_LEAF: LeafPath = ("text", "embed")


@dataclasses.dataclass(frozen=True)
class TensorEntry:
    """A tensor of a checkpoint: its leaf in the tree, its layer in the leaf, its stored shape."""

    path: LeafPath
    layer: int | None
    shape: tuple[int, ...]


def released_name(name: str, cfg: ModelConfig) -> str:
    """Return the name that a tensor has in the released checkpoints."""
    for old, new in find_family(cfg).prefixes.items():
        if name.startswith(old):
            return new + name[len(old) :]
    return name


def _stacked(p: Param) -> bool:
    return p.axes[0] == "layer"


def _layer_shape(p: Param) -> tuple[int, ...]:
    """Return the shape of a leaf without its layer axis."""
    return p.shape[1:] if _stacked(p) else p.shape


def _stored_shape(path: LeafPath, p: Param, cfg: ModelConfig) -> tuple[int, ...]:
    """Return the shape of a leaf's layer in the file.

    A linear weight [*in, *out] is stored as [out, in], a bias flat, the patch embedding as a
    Conv3d, and any other leaf as it is.
    """
    shape = _layer_shape(p)
    inputs, outputs = math.prod(shape[: p.inputs]), math.prod(shape[p.inputs :])
    if path == ("vision", "patch", "w"):
        v = cfg.vision
        return (outputs, v.channels, v.temporal, v.patch, v.patch)
    if p.inputs:
        return (outputs, inputs)
    return (outputs,) if path[-1] == "b" else shape


def declared_leaves(cfg: ModelConfig) -> dict[LeafPath, Param]:
    """Return the declared parameters of the model by their paths."""
    return trainable.flatten_params(causal_lm.declare_params(cfg))


def _released_leaf(path: LeafPath, cfg: ModelConfig) -> str:
    """Return the released name of a leaf, with {} for the number of its layer."""
    leaf = path[-1] if path[-1] in ("w", "b") else ""
    module = find_family(cfg).tensor_names[".".join(path[:-1] if leaf else path)]
    return module + (".bias" if leaf == "b" else ".weight")


def tensor_table(cfg: ModelConfig) -> dict[str, TensorEntry]:
    """Return every tensor of the model by its released name, ordered by layer as in checkpoints."""
    out = {}
    for path, p in declared_leaves(cfg).items():
        name = _released_leaf(path, cfg)
        for layer in range(p.shape[0]) if _stacked(p) else (None,):
            out[name.format(layer)] = TensorEntry(path, layer, _stored_shape(path, p, cfg))

    def order(item: tuple[str, TensorEntry]) -> tuple:
        top = item[1].path[0]
        return top == "text", top, item[1].layer or 0

    return dict(sorted(out.items(), key=order))


def _first_and_count(names: set[str]) -> str:
    """Name the first of some names, and how many more there are."""
    first, more = sorted(names)[0], len(names) - 1
    return first + (f" (and {more} more)" if more else "")


def _drop_tied_head(stored: dict[str, StoredTensor], cfg: ModelConfig) -> None:
    """Drop the head that a tied checkpoint may also store; it must equal the embedding."""
    names = [_released_leaf(path, cfg) for path in (("text", "unembed", "w"), EMBED_LEAF)]
    if not cfg.text.tied or not stored.keys() >= set(names):
        return
    head, embed = stored.pop(names[0]), stored[names[1]]
    every = slice(0, cfg.text.vocab)
    same = (np.array_equal(a, b) for a, b in zip(head.rows(every), embed.rows(every), strict=True))
    if (head.shape, head.dtype) != (embed.shape, embed.dtype) or not all(same):
        raise ValueError(
            f"config.json has tie_word_embeddings=true, but {names[0]} differs from {names[1]}; "
            "set it to false"
        )


def _check_tensors(
    stored: dict[str, StoredTensor], expected: dict[str, TensorEntry], folder: str | Path
) -> None:
    """Refuse tensors that are unknown, missing or of another shape."""
    unmapped, missing = stored.keys() - expected.keys(), expected.keys() - stored.keys()
    if unmapped:
        raise ValueError(
            f"{folder} holds {_first_and_count(unmapped)}, which the model of its config.json does "
            "not have; copy both from one checkpoint"
        )
    if missing:
        raise ValueError(
            f"{folder} lacks {_first_and_count(missing)}; expected the {len(expected)} tensors of "
            "the model of its config.json"
        )
    for name, entry in expected.items():
        if stored[name].shape != entry.shape:
            raise ValueError(
                f"{name} has shape {stored[name].shape}; expected {entry.shape} by config.json"
            )


def _read_into(target: np.ndarray, tensor: StoredTensor, p: Param, box: tuple[slice, ...]) -> None:
    """Read the part `box` of one layer of a leaf into `target`."""
    runs, shape = safetensors_io.contiguous_runs, _layer_shape(p)
    if p.inputs:
        i = p.inputs
        rows, columns = runs(box[i:], shape[i:]), runs(box[:i], shape[:i])
        target = target.reshape(math.prod(target.shape[:i]), -1).T
    else:
        i = 1 if len(tensor.shape) > 1 else len(shape)  # a vector is stored as one column
        rows, columns = runs(box[:i], shape[:i]), runs(box[i:], shape[i:])
        target = target.reshape(sum(r.stop - r.start for r in rows), -1)
    top = 0
    for block in itertools.chain.from_iterable(map(tensor.rows, rows)):
        left = 0
        for column in columns:
            part = safetensors_io.cast_block(block[:, column], target.dtype)
            corner = target[top : top + len(part), left : left + part.shape[1]]
            safetensors_io.copy_in_strips(
                safetensors_io.as_unsigned(corner), safetensors_io.as_unsigned(part)
            )
            left += part.shape[1]
        top += len(block)


def _read_leaf(
    tensors: list[StoredTensor],
    p: Param,
    dtype: Any,
    box: tuple[slice, ...],
    pool: ThreadPoolExecutor,
) -> np.ndarray:
    """Read the part `box` of a leaf; `tensors` are its layers (one for a leaf without layers)."""
    shape = tuple(len(range(*b.indices(n))) for b, n in zip(box, p.shape, strict=True))
    out = safetensors_io.aligned_empty(shape, dtype)
    if not _stacked(p):
        _read_into(out, tensors[0], p, box)
        return out
    layers = tensors[box[0]]
    list(pool.map(lambda target, layer: _read_into(target, layer, p, box[1:]), out, layers))
    return out


def _place_leaf(
    shape: tuple[int, ...],
    place: jax.sharding.Sharding,
    read: Callable[[tuple[slice, ...]], np.ndarray],
) -> jax.Array:
    """Do what jax.make_array_from_callback does, with less host memory.

    Each part is read once, and copied to its devices before the next one is read.
    """
    parts: dict[str, tuple[tuple[slice, ...], list]] = {}
    for device, box in place.addressable_devices_indices_map(shape).items():
        parts.setdefault(str(box), (box, []))[1].append(device)
    arrays = []
    for box, devices in parts.values():
        host = read(box)
        arrays += jax.block_until_ready([jax.device_put(host, d) for d in devices])
    return jax.make_array_from_single_device_arrays(shape, place, arrays)


def load_hf_checkpoint(
    folder: str | Path,
    cfg: ModelConfig,
    mesh: Mesh | None = None,
    dtype: Any = None,
    rules: dict | None = None,
) -> Params:
    """Load the parameters of a folder or hub id; each process reads only its devices' parts.

    Each has its dtype in the checkpoint unless `dtype` is given; layers of several dtypes have the
    one that holds all of them.
    """
    folder = locate_checkpoint(folder, weights=True)
    stored = safetensors_io.find_tensors(folder, functools.partial(released_name, cfg=cfg))
    # Older checkpoints store the rotary frequencies, which config.json gives.
    stored = {k: v for k, v in stored.items() if not k.endswith("rotary_emb.inv_freq")}
    expected = tensor_table(cfg)
    _drop_tied_head(stored, cfg)
    _check_tensors(stored, expected, folder)
    if mesh is not None and rules is None:
        rules = sharding.rules_for(cfg.text.kv_heads, mesh)
    layers: dict[LeafPath, list[StoredTensor]] = {}
    for name, entry in expected.items():
        layers.setdefault(entry.path, []).append(stored[name])
    out = {}
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        for path, p in declared_leaves(cfg).items():
            own = [safetensors_io.SAFETENSORS_DTYPES[tensor.dtype] for tensor in layers[path]]
            leaf_dtype = jnp.dtype(dtype or functools.reduce(jnp.promote_types, own))
            read = functools.partial(_read_leaf, layers[path], p, leaf_dtype, pool=pool)
            if mesh is None:
                whole = (slice(None),) * len(p.shape)
                out[path] = jax.block_until_ready(jax.device_put(read(whole)))
            else:
                place = sharding.named_sharding(p.axes, mesh, p.shape, rules)
                out[path] = _place_leaf(p.shape, place, read)
    return trainable.unflatten_params(out)


@jax.jit
def _take_layer(x: jax.Array, i: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(x, i, keepdims=False)


def _merged_layer(flat: dict[LeafPath, Any], entry: TensorEntry, scale: float) -> np.ndarray:
    """Return one layer of a leaf on the host; adapters are merged into it."""

    def layer_of(leaf: str) -> jax.Array:
        x = jnp.asarray(flat[*entry.path[:-1], leaf])
        return x if entry.layer is None else _take_layer(x, np.int32(entry.layer))

    w = layer_of(entry.path[-1])
    if entry.path[-1] == "w" and (*entry.path[:-1], "lora_a") in flat:
        w = lora.merge_weight(w, layer_of("lora_a"), layer_of("lora_b"), scale)
    if not w.is_fully_addressable:
        w = multihost_utils.process_allgather(w, tiled=True)
    return np.asarray(w)


def _stored_form(w: np.ndarray, p: Param, entry: TensorEntry) -> np.ndarray:
    """Return a layer of a leaf in its stored form; a linear weight is transposed."""
    if not p.inputs:
        return w.reshape(entry.shape)
    w = w.reshape(math.prod(w.shape[: p.inputs]), -1)
    out = np.empty(w.shape[::-1], w.dtype)
    safetensors_io.copy_in_strips(safetensors_io.as_unsigned(out).T, safetensors_io.as_unsigned(w))
    return out.reshape(entry.shape)


def _plan_tensors(params: Params, cfg: ModelConfig) -> list[PlannedTensor]:
    """Return the tensors to write; each is computed just before it is written."""
    flat, declared = trainable.flatten_params(params), declared_leaves(cfg)
    adapters = {p for p in flat if trainable.is_adapter(p) and (*p[:-1], "w") in declared}
    unmapped = {".".join(p) for p in flat.keys() - declared.keys() - adapters}
    missing = {".".join(p) for p in declared.keys() - flat.keys()}
    if unmapped:
        raise ValueError(
            f"the parameters have {_first_and_count(unmapped)}, which the config does not have"
        )
    if missing:
        raise ValueError(f"the parameters have no leaf {_first_and_count(missing)}")
    for path, p in declared.items():
        if flat[path].shape != p.shape:
            raise ValueError(
                f"{'.'.join(path)} has shape {flat[path].shape}; expected {p.shape} by the config"
            )

    def make(entry: TensorEntry) -> np.ndarray:
        layer = _merged_layer(flat, entry, cfg.lora_scale)
        return _stored_form(layer, declared[entry.path], entry)

    return [
        PlannedTensor(name, entry.shape, functools.partial(make, entry))
        for name, entry in tensor_table(cfg).items()
    ]


def write_hf_config(cfg: ModelConfig, folder: Path, dtype: str) -> None:
    """Write config.json and generation_config.json."""
    generation = {"eos_token_id": list(cfg.eos), "pad_token_id": cfg.pad, "do_sample": False}
    (folder / "config.json").write_text(json.dumps(config_to_hf(cfg, dtype), indent=2))
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2))


def save_hf_checkpoint(
    params: Params,
    cfg: ModelConfig,
    folder: str | Path,
    save_processor: Callable[[Path], None] | None = None,
    dtype: str = "bfloat16",
    shard_bytes: float = 5e9,
) -> None:
    """Write a folder that transformers and vLLM can load; adapters are merged.

    All processes must call this; the first one writes.
    """
    plan = _plan_tensors(params, cfg)
    if jax.process_index() == 0:
        with safetensors_io.new_folder(folder) as temporary:
            safetensors_io.write_safetensors(temporary, plan, dtype, shard_bytes)
            write_hf_config(cfg, temporary, dtype)
            if save_processor is not None:
                save_processor(temporary)
    else:
        safetensors_io.write_safetensors(None, plan, dtype, shard_bytes)
    distributed.gather_objects(True)  # no process reads the files before they are written


def write_random_checkpoint(
    cfg: ModelConfig,
    folder: str | Path,
    dtype: str = "bfloat16",
    shard_bytes: float = 5e9,
    seed: int = 0,
) -> None:
    """Write a checkpoint of random weights, one tensor at a time, for tests and load times."""
    rng = np.random.default_rng(seed)

    def make(entry: TensorEntry) -> np.ndarray:
        x = rng.standard_normal(entry.shape, np.float32) * np.float32(0.02)
        is_scale = entry.path[-1] != "b" and any("norm" in name for name in entry.path)
        return x + 1 if is_scale else x

    plan = [
        PlannedTensor(name, entry.shape, functools.partial(make, entry))
        for name, entry in tensor_table(cfg).items()
    ]
    with safetensors_io.new_folder(folder) as temporary:
        safetensors_io.write_safetensors(temporary, plan, dtype, shard_bytes)
        write_hf_config(cfg, temporary, dtype)
