"""The Orbax side of conversion: parameters with their config and processor files beside them."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import traverse_util
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from cptjax import sharding
from cptjax.model import config, convert
from cptjax.model.config import Config
from cptjax.types import Params

ORBAX, LORA_SCALE = "params", "lora.json"


def save(params: Params, cfg: Config, folder: str | Path, processor: Any = None) -> None:
    """An Orbax checkpoint `params` with config and processor files beside it; adapters stay adapters."""
    folder = Path(folder).absolute()
    if (folder / ORBAX).exists():
        raise ValueError(f"{folder} holds a checkpoint already; remove it or choose another destination")
    folder.mkdir(parents=True, exist_ok=True)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / ORBAX, {"params": params})
    if jax.process_index() == 0:
        convert.write_config(cfg, folder, str(params["text"]["embed"].dtype))
        (folder / LORA_SCALE).write_text(json.dumps({"lora_scale": cfg.lora_scale}))
        if processor is not None:
            processor.save(folder)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"saved {folder}")


def load(folder: str | Path, mesh: Mesh | None = None, rules: dict | None = None) -> tuple[Params, Config]:
    """What `save` wrote, onto the mesh."""
    folder = Path(folder).absolute()
    cfg = config.read(folder)
    if not (folder / ORBAX).is_dir():
        raise ValueError(f"{folder / ORBAX} does not exist; expected a folder written by launch/convert.py --src")
    scale = folder / LORA_SCALE
    cfg = dataclasses.replace(cfg, **(json.loads(scale.read_text()) if scale.is_file() else {}))
    declared, one = convert.leaves(cfg), jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    rules = sharding.rules_for(cfg.text.kv_heads, mesh) if mesh is not None and rules is None else rules
    with ocp.StandardCheckpointer() as checkpointer:
        kept = traverse_util.flatten_dict(checkpointer.metadata(folder / ORBAX).item_metadata.tree["params"])
        wanted = {}
        for path, meta in kept.items():
            axes = declared[path].axes if path in declared else (None,) * len(meta.shape)  # adapters are small: everywhere
            where = one if mesh is None else sharding.sharding(axes, mesh, meta.shape, rules)
            wanted[path] = jax.ShapeDtypeStruct(meta.shape, meta.dtype, sharding=where)
        tree = checkpointer.restore(folder / ORBAX, {"params": traverse_util.unflatten_dict(wanted)})
    return tree["params"], cfg
