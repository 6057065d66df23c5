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
from cptjax.models import hf_checkpoint
from cptjax.models.config import ModelConfig, read_model_config
from cptjax.types import Params

ORBAX_FOLDER, LORA_SCALE_FILE = "params", "lora.json"


def save_orbax(params: Params, cfg: ModelConfig, folder: str | Path, processor: Any = None) -> None:
    """An Orbax checkpoint `params` with config and processor files beside it; adapters stay adapters."""
    folder = Path(folder).absolute()
    if (folder / ORBAX_FOLDER).exists():
        raise ValueError(
            f"{folder} holds a checkpoint already; remove it or choose another destination"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / ORBAX_FOLDER, {"params": params})
    if jax.process_index() == 0:
        hf_checkpoint.write_hf_config(cfg, folder, str(params["text"]["embed"].dtype))
        (folder / LORA_SCALE_FILE).write_text(json.dumps({"lora_scale": cfg.lora_scale}))
        if processor is not None:
            processor.save(folder)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"saved {folder}")


def load_orbax(
    folder: str | Path, mesh: Mesh | None = None, rules: dict | None = None
) -> tuple[Params, ModelConfig]:
    """What `save` wrote, onto the mesh."""
    folder = Path(folder).absolute()
    cfg = read_model_config(folder)
    if not (folder / ORBAX_FOLDER).is_dir():
        raise ValueError(
            f"{folder / ORBAX_FOLDER} does not exist; expected a folder written by launch/convert.py --src"
        )
    scale = folder / LORA_SCALE_FILE
    cfg = dataclasses.replace(cfg, **(json.loads(scale.read_text()) if scale.is_file() else {}))
    declared, one = (
        hf_checkpoint.declared_leaves(cfg),
        jax.sharding.SingleDeviceSharding(jax.local_devices()[0]),
    )
    rules = (
        sharding.rules_for(cfg.text.kv_heads, mesh) if mesh is not None and rules is None else rules
    )
    with ocp.StandardCheckpointer() as checkpointer:
        kept = traverse_util.flatten_dict(
            checkpointer.metadata(folder / ORBAX_FOLDER).item_metadata.tree["params"]
        )
        wanted = {}
        for path, meta in kept.items():
            axes = (
                declared[path].axes if path in declared else (None,) * len(meta.shape)
            )  # adapters are small: everywhere
            where = one if mesh is None else sharding.named_sharding(axes, mesh, meta.shape, rules)
            wanted[path] = jax.ShapeDtypeStruct(meta.shape, meta.dtype, sharding=where)
        tree = checkpointer.restore(
            folder / ORBAX_FOLDER, {"params": traverse_util.unflatten_dict(wanted)}
        )
    return tree["params"], cfg
