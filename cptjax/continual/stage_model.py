"""Load or export the model at the end of a stage, without loading the run's tasks."""

import contextlib
from pathlib import Path

import jax.numpy as jnp
from jax.sharding import Mesh

from cptjax import sharding
from cptjax.common import buckets, files
from cptjax.continual.checkpoint import open_checkpoints
from cptjax.continual.model_state import newest_stage, restore_stage_params
from cptjax.continual.workdir import read_run_config
from cptjax.data.model_context import ModelContext
from cptjax.data.processor import load_processor
from cptjax.evaluation.report.read import find_arm_folders, is_run_folder
from cptjax.models import load
from cptjax.models.hf_checkpoint import save_hf_checkpoint
from cptjax.models.orbax_io import ORBAX_FOLDER
from cptjax.types import Params

FOLDER_KINDS = {
    "run": "the workdir of a run",
    "runs": "a folder of several runs",
    "orbax": "an Orbax checkpoint",
    "hf": "a Hugging Face checkpoint",
}


def folder_kind(folder: Path) -> str:
    """Return the key in FOLDER_KINDS for the content of a folder, or "" for other content."""
    if is_run_folder(folder):
        return "run"
    if (folder / "config.json").is_file():
        return "orbax" if (folder / ORBAX_FOLDER).is_dir() else "hf"
    return "runs" if find_arm_folders(folder) else ""


def check_folder_kind(setting: str, folder: str | Path, expected: str) -> None:
    """Refuse a folder of another kind, and name the flag of launch/convert.py that takes it."""
    kind = folder_kind(Path(folder))
    if kind == expected:
        return
    wanted = f"{setting}={folder}: expected {FOLDER_KINDS[expected]}"
    if kind == "run":
        advice = f"--workdir={folder} [--stage=K] exports the model of a stage"
    elif kind == "runs":
        workdirs = [str(path) for _, paths in find_arm_folders(Path(folder)) for path in paths]
        advice = f"choose one of {', '.join(workdirs[:8])}{' ...' * (len(workdirs) > 8)}"
    elif kind == "orbax":
        advice = f"--checkpoint={folder} converts it to a Hugging Face folder"
    elif kind == "hf":
        advice = f"transformers loads it as it is; --src={folder} converts it to Orbax"
    elif expected == "run":
        raise ValueError(f"{wanted}, with the config.json that launch/train.py writes")
    else:
        return  # the function that reads the folder says what is missing
    raise ValueError(f"{wanted}, got {FOLDER_KINDS[kind]}; {advice}")


def load_stage_model(
    workdir: str | Path, mesh: Mesh, stage: int | None = None, dtype: str = ""
) -> tuple[ModelContext, Params, int]:
    """Return the model context of a run, the parameters after a stage, and the stage's number.

    `stage` None means the last finished stage, 0 the base model. `dtype` is that of the arithmetic
    and of the frozen parameters; "" means model.compute_dtype of the run. The run may be in
    progress in another process.
    """
    workdir = buckets.fetch(workdir)
    check_folder_kind("workdir", workdir, "run")
    config = read_run_config(workdir)
    settings = config.model
    dtype = dtype or settings.compute_dtype
    with files.explain_errors(f"{workdir / 'config.json'}, section model"):
        scale = load.lora_scale(settings)
    cfg = load.fit_for_inference(load.find_model_config(settings), mesh, dtype, scale)
    processor = load_processor(settings.path or None, cfg, settings.min_pixels, settings.max_pixels)
    model_ctx = ModelContext(processor.cfg, processor, mesh, load.MODEL_DTYPES[dtype], ())
    with contextlib.ExitStack() as stack:
        if checkpoints := open_checkpoints(workdir):
            stack.enter_context(contextlib.closing(checkpoints))
        if stage is None:
            stage = newest_stage(workdir, checkpoints)
        return model_ctx, restore_stage_params(config, model_ctx, checkpoints, stage), stage


def export_stage(
    workdir: str | Path,
    folder: str | Path,
    stage: int | None = None,
    dtype: str = "",
    shard_bytes: float = 5e9,
) -> int:
    """Write the model of a stage as a folder that transformers and vLLM load; return the stage.

    Adapters are merged. `dtype` "" means model.compute_dtype, which the run sampled and evaluated
    in.
    """
    mesh = sharding.make_mesh()
    model_ctx, params, number = load_stage_model(workdir, mesh, stage)
    if stage is None and number == 0:
        raise ValueError(f"{workdir} has no finished stage; --stage=0 exports the base model")
    dtype = dtype or jnp.dtype(model_ctx.dtype).name
    save_hf_checkpoint(params, model_ctx.cfg, folder, model_ctx.processor.save, dtype, shard_bytes)
    return number
