"""Hugging Face safetensors <-> the parameter tree: one table of names, shapes derived from sharding.Param."""

import dataclasses
import itertools
import json
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from cptjax import sharding
from cptjax.models import qwen2_5_vl, safetensors_io
from cptjax.models.config import ModelConfig, config_to_hf, locate_checkpoint
from cptjax.models.safetensors_io import PlannedTensor, StoredTensor
from cptjax.sharding import Param
from cptjax.types import Params

# Module in the tree -> module in the released checkpoints; {} is the layer. Leaf "w" or a bare vector is .weight, "b" is .bias.
HF_MODULES = {
    "vision.patch": "visual.patch_embed.proj",
    "vision.blocks.norm1": "visual.blocks.{}.norm1",
    "vision.blocks.norm2": "visual.blocks.{}.norm2",
    "vision.blocks.qkv": "visual.blocks.{}.attn.qkv",
    "vision.blocks.proj": "visual.blocks.{}.attn.proj",
    "vision.blocks.gate": "visual.blocks.{}.mlp.gate_proj",
    "vision.blocks.up": "visual.blocks.{}.mlp.up_proj",
    "vision.blocks.down": "visual.blocks.{}.mlp.down_proj",
    "merger.norm": "visual.merger.ln_q",
    "merger.fc1": "visual.merger.mlp.0",
    "merger.fc2": "visual.merger.mlp.2",
    "text.embed": "model.embed_tokens",
    "text.blocks.norm1": "model.layers.{}.input_layernorm",
    "text.blocks.norm2": "model.layers.{}.post_attention_layernorm",
    "text.blocks.q": "model.layers.{}.self_attn.q_proj",
    "text.blocks.k": "model.layers.{}.self_attn.k_proj",
    "text.blocks.v": "model.layers.{}.self_attn.v_proj",
    "text.blocks.o": "model.layers.{}.self_attn.o_proj",
    "text.blocks.gate": "model.layers.{}.mlp.gate_proj",
    "text.blocks.up": "model.layers.{}.mlp.up_proj",
    "text.blocks.down": "model.layers.{}.mlp.down_proj",
    "text.norm": "model.norm",
    "text.unembed": "lm_head",
}
HF_PREFIXES = (
    ("model.visual.", "visual."),
    ("model.language_model.", "model."),
)  # how transformers >= 4.52 writes them
HEAD_TENSOR, EMBED_TENSOR = "lm_head.weight", "model.embed_tokens.weight"
LORA = ("lora_a", "lora_b")
LeafPath = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class TensorEntry:
    """One tensor of a checkpoint: which leaf (and layer of it), and its shape there."""

    path: LeafPath
    layer: int | None
    shape: tuple[int, ...]


def released_name(name: str) -> str:
    """A tensor's name in the released layout."""
    return next((new + name[len(old) :] for old, new in HF_PREFIXES if name.startswith(old)), name)


def _stacked(p: Param) -> bool:
    return p.axes[0] == "layer"


def _shape(path: LeafPath, p: Param, cfg: ModelConfig) -> tuple[int, ...]:
    """A linear weight [*in, *out] is stored as [out, in]; the patch embedding as a Conv3d; a bias flat; the rest as it is."""
    own = p.shape[_stacked(p) :]
    inside, outside = math.prod(own[: p.inputs]), math.prod(own[p.inputs :])
    if path == ("vision", "patch", "w"):
        v = cfg.vision
        return (outside, v.channels, v.temporal, v.patch, v.patch)
    if p.inputs:
        return (outside, inside)
    return (outside,) if path[-1] == "b" else own


def declared_leaves(cfg: ModelConfig) -> dict[LeafPath, Param]:
    return traverse_util.flatten_dict(
        qwen2_5_vl.declare_params(cfg), is_leaf=lambda _, x: sharding.is_param(x)
    )


def tensor_table(cfg: ModelConfig) -> dict[str, TensorEntry]:
    """Released name -> Entry, for every tensor of the model, layer by layer as checkpoints list them."""
    out = {}
    for path, p in declared_leaves(cfg).items():
        leaf = path[-1] if path[-1] in ("w", "b") else ""
        name = HF_MODULES[".".join(path[:-1] if leaf else path)] + (
            ".bias" if leaf == "b" else ".weight"
        )
        for layer in range(p.shape[0]) if _stacked(p) else (None,):
            out[name.format(layer)] = TensorEntry(path, layer, _shape(path, p, cfg))
    return dict(
        sorted(
            out.items(),
            key=lambda item: (item[1].path[0] == "text", item[1].path[0], item[1].layer or 0),
        )
    )


def _first_and_count(names: set[str]) -> str:
    first, more = sorted(names)[0], len(names) - 1
    return first + (f" (and {more} more)" if more else "")


def _drop_tied_head(found: dict[str, StoredTensor], cfg: ModelConfig) -> None:
    """A tied checkpoint may store its head too, if it is the embedding."""
    if not cfg.text.tied or HEAD_TENSOR not in found or EMBED_TENSOR not in found:
        return
    head, embed = found.pop(HEAD_TENSOR), found[EMBED_TENSOR]
    every = slice(0, cfg.text.vocab)
    same = (np.array_equal(a, b) for a, b in zip(head.rows(every), embed.rows(every), strict=True))
    if (head.shape, head.dtype) != (embed.shape, embed.dtype) or not all(same):
        raise ValueError(
            f"config.json says tie_word_embeddings, but {HEAD_TENSOR} differs from {EMBED_TENSOR}; set it to false"
        )


def _check(
    found: dict[str, StoredTensor], expected: dict[str, TensorEntry], folder: str | Path
) -> None:
    unmapped, missing = found.keys() - expected.keys(), expected.keys() - found.keys()
    if unmapped:
        raise ValueError(
            f"{folder} holds {_first_and_count(unmapped)}, which a model of its config.json does not have; are they of one checkpoint?"
        )
    if missing:
        raise ValueError(
            f"{folder} lacks {_first_and_count(missing)}; expected the {len(expected)} tensors of its config.json"
        )
    for name, entry in expected.items():
        if found[name].shape != entry.shape:
            raise ValueError(
                f"{name} has shape {found[name].shape}; config.json makes it {entry.shape}"
            )


def _read_into(target: np.ndarray, tensor: StoredTensor, p: Param, box: tuple[slice, ...]) -> None:
    """Fill `target`, the part `box` of one layer of a leaf."""
    own = p.shape[_stacked(p) :]
    if p.inputs:
        rows, columns = (
            safetensors_io.contiguous_runs(box[p.inputs :], own[p.inputs :]),
            safetensors_io.contiguous_runs(box[: p.inputs], own[: p.inputs]),
        )
        target = target.reshape(math.prod(target.shape[: p.inputs]), -1).T
    else:
        k = 1 if len(tensor.shape) > 1 else len(own)  # a vector is stored as one column
        rows, columns = (
            safetensors_io.contiguous_runs(box[:k], own[:k]),
            safetensors_io.contiguous_runs(box[k:], own[k:]),
        )
        target = target.reshape(sum(r.stop - r.start for r in rows), -1)
    i = 0
    for block in itertools.chain.from_iterable(map(tensor.rows, rows)):
        j = 0
        for column in columns:
            part = safetensors_io.cast_block(block[:, column], target.dtype)
            safetensors_io.copy_in_strips(
                safetensors_io.as_unsigned(target[i : i + len(part), j : j + part.shape[1]]),
                safetensors_io.as_unsigned(part),
            )
            j += part.shape[1]
        i += len(block)


def _read(
    tensors: list[StoredTensor],
    p: Param,
    dtype: Any,
    box: tuple[slice, ...],
    pool: ThreadPoolExecutor,
) -> np.ndarray:
    """The part `box` of a leaf; `tensors` are its layers (one for a leaf that is not stacked)."""
    out = safetensors_io.aligned_empty(
        tuple(len(range(*b.indices(n))) for b, n in zip(box, p.shape, strict=True)), dtype
    )
    if not _stacked(p):
        _read_into(out, tensors[0], p, box)
        return out
    list(
        pool.map(
            lambda pair: _read_into(pair[0], pair[1], p, box[1:]),
            zip(out, tensors[box[0]], strict=True),
        )
    )
    return out


def _place(
    shape: tuple[int, ...],
    where: jax.sharding.Sharding,
    read: Callable[[tuple[slice, ...]], np.ndarray],
) -> jax.Array:
    """As jax.make_array_from_callback, but each part is read once, and is on its devices before the next is read."""
    parts: dict[str, tuple[tuple[slice, ...], list]] = {}
    for device, box in where.addressable_devices_indices_map(shape).items():
        parts.setdefault(str(box), (box, []))[1].append(device)
    arrays = []
    for box, devices in parts.values():
        host = read(box)
        arrays += jax.block_until_ready([jax.device_put(host, d) for d in devices])
    return jax.make_array_from_single_device_arrays(shape, where, arrays)


def load_hf_checkpoint(
    folder: str | Path,
    cfg: ModelConfig,
    mesh: Mesh | None = None,
    dtype: Any = None,
    rules: dict | None = None,
) -> Params:
    """The checkpoint's parameters, in its own type unless `dtype` is given, each device reading only its part."""
    folder = locate_checkpoint(folder, weights=True)
    found, expected = safetensors_io.find_tensors(folder, released_name), tensor_table(cfg)
    _drop_tied_head(found, cfg)
    _check(found, expected, folder)
    dtype = jnp.dtype(dtype or safetensors_io.SAFETENSORS_DTYPES[found[EMBED_TENSOR].dtype])
    rules = (
        sharding.rules_for(cfg.text.kv_heads, mesh) if mesh is not None and rules is None else rules
    )
    layers: dict[LeafPath, list[StoredTensor]] = {}
    for name, entry in expected.items():
        layers.setdefault(entry.path, []).append(found[name])
    out = {}
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        for path, p in declared_leaves(cfg).items():
            read = lambda box: _read(layers[path], p, dtype, box, pool)
            if mesh is None:
                out[path] = jax.block_until_ready(
                    jax.device_put(read((slice(None),) * len(p.shape)))
                )
            else:
                out[path] = _place(
                    p.shape, sharding.named_sharding(p.axes, mesh, p.shape, rules), read
                )
    return traverse_util.unflatten_dict(out)


@jax.jit
def _layer(x: jax.Array, i: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(x, i, keepdims=False)


def _host(x: Any, layer: int | None) -> np.ndarray:
    """A leaf, or one layer of it, gathered from wherever it lives."""
    if isinstance(x, jax.Array):
        x = x if layer is None else _layer(x, np.int32(layer))
        return np.asarray(
            x if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True)
        )
    return np.asarray(x if layer is None else x[layer])


def _merged_layer(flat: dict[LeafPath, Any], entry: TensorEntry, scale: float) -> np.ndarray:
    """One layer of a leaf with its adapters, if any, folded in."""
    w = _host(flat[entry.path], entry.layer)
    low = [flat.get((*entry.path[:-1], name)) for name in LORA] if entry.path[-1] == "w" else [None]
    if low[0] is None:
        return w
    a, b = (_host(x, entry.layer).astype(np.float32) for x in low)
    return w.astype(np.float32) + scale * np.tensordot(a, b, 1)


def _stored_form(w: np.ndarray, p: Param, entry: TensorEntry) -> np.ndarray:
    if not p.inputs:
        return w.reshape(entry.shape)
    w = w.reshape(math.prod(w.shape[: p.inputs]), -1)
    out = np.empty(w.shape[::-1], w.dtype)
    safetensors_io.copy_in_strips(safetensors_io.as_unsigned(out).T, safetensors_io.as_unsigned(w))
    return out.reshape(entry.shape)


def _planned(params: Params, cfg: ModelConfig) -> Iterator[PlannedTensor]:
    flat, declared = traverse_util.flatten_dict(params), declared_leaves(cfg)
    adapters = {path for path in flat if path[-1] in LORA and (*path[:-1], "w") in declared}
    unmapped, missing = flat.keys() - declared.keys() - adapters, declared.keys() - flat.keys()
    if unmapped or missing:
        side, paths = (
            ("a leaf that the config does not have", unmapped) if unmapped else ("no leaf", missing)
        )
        raise ValueError(
            f"the parameters have {side}: {_first_and_count({'.'.join(p) for p in paths})}"
        )
    for name, e in tensor_table(cfg).items():
        if flat[e.path].shape != declared[e.path].shape:
            raise ValueError(
                f"{'.'.join(e.path)} has shape {flat[e.path].shape}; the config makes it {declared[e.path].shape}"
            )
        yield PlannedTensor(
            name,
            e.shape,
            lambda e=e: _stored_form(_merged_layer(flat, e, cfg.lora_scale), declared[e.path], e),
        )


def write_hf_config(cfg: ModelConfig, folder: Path, dtype: str) -> None:
    """config.json and generation_config.json."""
    generation = {"eos_token_id": list(cfg.eos), "pad_token_id": cfg.pad, "do_sample": False}
    (folder / "config.json").write_text(json.dumps(config_to_hf(cfg, dtype), indent=2))
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2))


def save_hf_checkpoint(
    params: Params,
    cfg: ModelConfig,
    folder: str | Path,
    processor: Any = None,
    dtype: str = "bfloat16",
    shard_bytes: float = 5e9,
) -> None:
    """Write a folder that transformers and vLLM load; adapters are merged; every process calls this, the first one writes."""
    plan = list(_planned(params, cfg))
    if jax.process_index() == 0:
        with safetensors_io.new_folder(folder) as temporary:
            safetensors_io.write_safetensors(temporary, plan, dtype, shard_bytes)
            write_hf_config(cfg, temporary, dtype)
            if processor is not None:
                processor.save(temporary)
    else:
        safetensors_io.write_safetensors(None, plan, dtype, shard_bytes)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"saved {folder}")


def write_random_checkpoint(
    cfg: ModelConfig,
    folder: str | Path,
    dtype: str = "bfloat16",
    shard_bytes: float = 5e9,
    seed: int = 0,
) -> None:
    """A checkpoint of random weights, written tensor by tensor: for tests and for measuring loads of any size."""
    rng = np.random.default_rng(seed)

    def make(entry: TensorEntry) -> np.ndarray:
        x = rng.standard_normal(entry.shape, np.float32) * np.float32(0.02)
        return x + 1 if "norm" in entry.path[-1] else x

    plan = [
        PlannedTensor(name, entry.shape, lambda e=entry: make(e))
        for name, entry in tensor_table(cfg).items()
    ]
    with safetensors_io.new_folder(folder) as temporary:
        safetensors_io.write_safetensors(temporary, plan, dtype, shard_bytes)
        write_hf_config(cfg, temporary, dtype)
