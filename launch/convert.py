"""Convert weights between Hugging Face, GGUF and Orbax, and export the model of a stage of a run.

python launch/convert.py --src=HF_DIR --dst=DIR                   # Hugging Face -> Orbax
python launch/convert.py --src=FILE.gguf --dst=HF_DIR             # GGUF -> Hugging Face
python launch/convert.py --checkpoint=DIR --dst=HF_DIR            # Orbax -> Hugging Face
python launch/convert.py --workdir=DIR [--stage=K] --dst=HF_DIR   # run -> Hugging Face
python launch/convert.py --workdir=DIR [--stage=K] --push=ORG/NAME [--dry-run]   # run -> hub

Adapters are merged. transformers, vLLM and cptjax.load read the Hugging Face folder.
"""

import functools
from pathlib import Path

from absl import flags

from cptjax.common import cli

SRC = flags.DEFINE_string("src", None, "Hugging Face folder, hub id or GGUF file to read.")
CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "Orbax checkpoint to read, as written by --src."
)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a run whose model is exported.")
STAGE = flags.DEFINE_integer(
    "stage",
    None,
    "With --workdir: the stage; default: the last finished one, 0 = base.",
    lower_bound=0,
)
DST = flags.DEFINE_string("dst", None, "Folder to write; must not exist or be empty.")
PUSH = flags.DEFINE_string(
    "push",
    None,
    "With --workdir: a repository of the Hugging Face hub, org/name, which is made if it does not "
    "exist, as a private one.",
)
DRY_RUN = flags.DEFINE_bool("dry_run", False, "With --push: list the files, upload nothing.")
flags.DEFINE_alias("dry-run", "dry_run")
DTYPE = flags.DEFINE_enum(
    "dtype",
    None,
    ["bfloat16", "float16", "float32"],
    "Type to write; default: that of the source, for a run its model.compute_dtype, for a GGUF "
    "file bfloat16.",
)
SHARD_GB = flags.DEFINE_float(
    "shard_gb", None, "Largest safetensors file in GB; default: 5.", lower_bound=0.001
)


def main() -> None:
    sources = (SRC.value, CHECKPOINT.value, WORKDIR.value)
    if sum(v is not None for v in sources) != 1 or (DST.value is None and PUSH.value is None):
        raise ValueError(
            "expected --dst (or --push) and exactly one of --src (Hugging Face folder or GGUF "
            "file), --checkpoint (Orbax folder) and --workdir (folder of a run)"
        )
    if "" in (*sources, DST.value, PUSH.value):
        raise ValueError("a flag is empty: expected a folder; is a shell variable not set?")
    for flag in (STAGE, PUSH):
        if flag.value is not None and WORKDIR.value is None:
            raise ValueError(
                f"--{flag.name}={flag.value}: expected --workdir with it; add --workdir=DIR"
            )
    if DRY_RUN.value and PUSH.value is None:
        raise ValueError("--dry_run: expected --push with it; other conversions have no dry run")
    is_gguf = SRC.value is not None and Path(SRC.value).suffix == ".gguf"
    if SHARD_GB.value is not None and SRC.value is not None and not is_gguf:
        raise ValueError(
            f"--shard_gb={SHARD_GB.value}: expected a conversion to a Hugging Face folder, got one "
            "to Orbax; leave it out"
        )
    import jax

    from cptjax import sharding
    from cptjax.common import buckets
    from cptjax.continual.hub_upload import push_stage
    from cptjax.continual.stage_model import check_folder_kind, export_stage
    from cptjax.data.gguf_checkpoint import convert_gguf
    from cptjax.data.processor_files import copy_processor_files
    from cptjax.models.hf_checkpoint import load_hf_checkpoint, save_hf_checkpoint
    from cptjax.models.hf_config import locate_checkpoint, read_model_config
    from cptjax.models.orbax_io import load_orbax, save_orbax

    shard_bytes = 1e9 * (5.0 if SHARD_GB.value is None else SHARD_GB.value)
    mesh = sharding.make_mesh() if jax.device_count() > 1 else None
    if is_gguf:
        convert_gguf(SRC.value, DST.value, DTYPE.value or "bfloat16", shard_bytes)
    elif SRC.value:
        check_folder_kind("--src", SRC.value, "hf")
        cfg = read_model_config(SRC.value)
        params = load_hf_checkpoint(SRC.value, cfg, mesh, DTYPE.value)
        save_orbax(
            params,
            cfg,
            DST.value,
            functools.partial(copy_processor_files, locate_checkpoint(SRC.value)),
        )
    elif CHECKPOINT.value:
        check_folder_kind("--checkpoint", CHECKPOINT.value, "orbax")
        params, cfg = load_orbax(CHECKPOINT.value, mesh)
        dtype = DTYPE.value or str(params["text"]["embed"].dtype)
        save_processor = functools.partial(copy_processor_files, CHECKPOINT.value)
        save_hf_checkpoint(params, cfg, DST.value, save_processor, dtype, shard_bytes)
    else:
        workdir = buckets.fetch(WORKDIR.value)
        check_folder_kind("--workdir", workdir, "run")
        dtype = DTYPE.value or ""
        if PUSH.value is not None:
            sizes = push_stage(
                *(workdir, PUSH.value, STAGE.value, dtype, shard_bytes),
                folder=DST.value,
                dry_run=DRY_RUN.value,
            )
            for name, size in sizes.items():
                print(f"{size:14,} bytes  {name}")
            print(f"{'would upload' if DRY_RUN.value else 'uploaded'} this to {PUSH.value}")
            return
        stage = export_stage(workdir, DST.value, STAGE.value, dtype, shard_bytes)
        print(f"exported the model of stage {stage}" if stage else "exported the base model")
    print(f"wrote {DST.value}")


if __name__ == "__main__":
    cli.run_launcher(main)
