"""Convert weights between a Hugging Face folder and an Orbax checkpoint.

python launch/convert.py --src=HF_DIR --dst=DIR            Hugging Face -> Orbax
python launch/convert.py --checkpoint=DIR --dst=HF_DIR     Orbax -> Hugging Face; adapters are merged
"""

import jax
from absl import flags

from cptjax import cli, processor_files, sharding
from cptjax.model import config, convert, orbax_files

SRC = flags.DEFINE_string("src", None, "Hugging Face folder or hub id to read.")
CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Orbax checkpoint to read, as written by --src.")
DST = flags.DEFINE_string("dst", None, "Folder to write; must not exist or be empty.")
DTYPE = flags.DEFINE_enum("dtype", None, ["bfloat16", "float16", "float32"], "Type to write; default: the source's.")
SHARD_GB = flags.DEFINE_float("shard_gb", 5.0, "Largest safetensors file in GB.", lower_bound=0.001)


def main() -> None:
    if (SRC.value is None) == (CHECKPOINT.value is None) or DST.value is None:
        raise ValueError("expected --dst and exactly one of --src (Hugging Face folder) and --checkpoint (Orbax folder)")
    mesh = sharding.make_mesh() if jax.device_count() > 1 else None
    if SRC.value:
        cfg = config.read(SRC.value)
        orbax_files.save(convert.load(SRC.value, cfg, mesh, DTYPE.value), cfg, DST.value, processor_files.Copied(config.located(SRC.value)))
    else:
        params, cfg = orbax_files.load(CHECKPOINT.value, mesh)
        dtype = DTYPE.value or str(params["text"]["embed"].dtype)
        convert.save(params, cfg, DST.value, processor_files.Copied(CHECKPOINT.value), dtype, SHARD_GB.value * 1e9)
    print(f"wrote {DST.value}")


if __name__ == "__main__":
    cli.main(main)
