"""Convert weights between a Hugging Face folder and an Orbax checkpoint.

python launch/convert.py --src=HF_DIR --dst=DIR            Hugging Face -> Orbax
python launch/convert.py --checkpoint=DIR --dst=HF_DIR     Orbax -> Hugging Face; adapters are merged
"""

import jax
from absl import flags

from cptjax import sharding
from cptjax.common import cli
from cptjax.data import processor_files
from cptjax.models import hf_checkpoint, orbax_io
from cptjax.models.config import locate_checkpoint, read_model_config

SRC = flags.DEFINE_string("src", None, "Hugging Face folder or hub id to read.")
CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "Orbax checkpoint to read, as written by --src."
)
DST = flags.DEFINE_string("dst", None, "Folder to write; must not exist or be empty.")
DTYPE = flags.DEFINE_enum(
    "dtype", None, ["bfloat16", "float16", "float32"], "Type to write; default: the source's."
)
SHARD_GB = flags.DEFINE_float("shard_gb", 5.0, "Largest safetensors file in GB.", lower_bound=0.001)


def main() -> None:
    if (SRC.value is None) == (CHECKPOINT.value is None) or DST.value is None:
        raise ValueError(
            "expected --dst and exactly one of --src (Hugging Face folder) and --checkpoint (Orbax folder)"
        )
    mesh = sharding.make_mesh() if jax.device_count() > 1 else None
    if SRC.value:
        cfg = read_model_config(SRC.value)
        orbax_io.save_orbax(
            hf_checkpoint.load_hf_checkpoint(SRC.value, cfg, mesh, DTYPE.value),
            cfg,
            DST.value,
            processor_files.CopiedProcessor(locate_checkpoint(SRC.value)),
        )
    else:
        params, cfg = orbax_io.load_orbax(CHECKPOINT.value, mesh)
        dtype = DTYPE.value or str(params["text"]["embed"].dtype)
        hf_checkpoint.save_hf_checkpoint(
            params,
            cfg,
            DST.value,
            processor_files.CopiedProcessor(CHECKPOINT.value),
            dtype,
            SHARD_GB.value * 1e9,
        )
    print(f"wrote {DST.value}")


if __name__ == "__main__":
    cli.run_launcher(main)
