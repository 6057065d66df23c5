"""Load and save parameters in Orbax format, with config and processor files."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from cptjax import sharding
from cptjax.common import distributed, files
from cptjax.models import hf_checkpoint, trainable
from cptjax.models.config import ModelConfig
from cptjax.models.hf_config import read_model_config
from cptjax.types import Params

ORBAX_FOLDER, LORA_SCALE_FILE = "params", "lora.json"


def save_orbax(
    params: Params,
    cfg: ModelConfig,
    folder: str | Path,
    save_processor: Callable[[Path], None] | None = None,
) -> None:
    """Write an Orbax checkpoint with its config and processor files; adapters are not merged."""
    folder = files.orbax_folder(folder, "--dst").absolute()
    if (folder / ORBAX_FOLDER).exists():
        raise ValueError(f"{folder} holds a checkpoint already; remove it, or choose another --dst")
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder} exists already; remove it, or choose another --dst")
    folder.mkdir(parents=True, exist_ok=True)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / ORBAX_FOLDER, {"params": params})
    if jax.process_index() == 0:
        hf_checkpoint.write_hf_config(cfg, folder, str(params["text"]["embed"].dtype))
        (folder / LORA_SCALE_FILE).write_text(json.dumps({"lora_scale": cfg.lora_scale}))
        if save_processor is not None:
            save_processor(folder)
    distributed.gather_objects(True)  # no process reads the files before they are written


def load_orbax(
    folder: str | Path, mesh: Mesh | None = None, rules: dict | None = None
) -> tuple[Params, ModelConfig]:
    """Load what `save_orbax` wrote onto the mesh, or onto one device."""
    folder = Path(folder).absolute()
    cfg = read_model_config(folder)
    if not (folder / ORBAX_FOLDER).is_dir():
        raise ValueError(
            f"{folder / ORBAX_FOLDER} does not exist; "
            "expected a folder that launch/convert.py --src has written"
        )
    scale = folder / LORA_SCALE_FILE
    cfg = dataclasses.replace(cfg, **(files.read_json(scale, dict) if scale.is_file() else {}))
    declared = hf_checkpoint.declared_leaves(cfg)
    if mesh is not None and rules is None:
        rules = sharding.rules_for(cfg.text.kv_heads, mesh)

    def place(path: tuple[str, ...], shape: tuple[int, ...]) -> jax.sharding.Sharding:
        if mesh is None:
            return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        # Adapters are small: every device holds them.
        axes = declared[path].axes if path in declared else (None,) * len(shape)
        return sharding.named_sharding(axes, mesh, shape, rules)

    with ocp.StandardCheckpointer() as checkpointer:
        saved = checkpointer.metadata(folder / ORBAX_FOLDER).item_metadata.tree["params"]
        like = {
            path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place(path, x.shape))
            for path, x in trainable.flatten_params(saved).items()
        }
        like = {"params": trainable.unflatten_params(like)}
        return checkpointer.restore(folder / ORBAX_FOLDER, like)["params"], cfg
