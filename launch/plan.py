"""Compile every program of a run ahead of time: does it fit on a slice, and how fast can it be?

No accelerator is needed: for TPUs the package libtpu, for NVIDIA GPUs those of jax[cuda12].

python launch/plan.py --config=configs/cpt7.py:grpo,7b,v5p-4x4x4 --topology=v5p:4x4x4
    [--slices=2] [--json=plan.json] [--thorough]
python launch/plan.py --config=configs/cpt7.py:grpo,7b,h100-8 --topology=h100:8

Exit code 0: everything fits; 1: something does not (which program, by how much, what to change);
2: bad input. The programs have the largest shapes that the config allows. For TPUs, each is
compiled until its buffers are assigned, which takes 10 to 90 seconds; `--thorough` also generates
machine code, which takes ten times as long.
"""

import json
import os
from pathlib import Path

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # libtpu compiles without a TPU

from absl import flags

from cptjax.common import cli, config_flag, console

TOPOLOGY = flags.DEFINE_string(
    "topology",
    None,
    "TPU slice, such as v5e:16x16, v5p:4x4x4 or v6e:16x16, or the GPUs of a machine, such as "
    "h100:8 (a100, h100, h200, b200); default: this machine's devices.",
)
SLICES = flags.DEFINE_integer(
    "slices",
    1,
    "Slices, or machines with GPUs, joined by the data-centre network; mesh.data must be a "
    "multiple.",
    lower_bound=1,
)
JSON = flags.DEFINE_string("json", None, "Also write all numbers to this file.")
THOROUGH = flags.DEFINE_bool(
    "thorough",
    False,
    "For TPUs, compile to machine code, as is always done for other devices: sizes stay the same, "
    "but it shows that every program compiles.",
)
CONFIG = config_flag.define_config_flag()


def main() -> None:
    if CONFIG.value is None:
        raise ValueError("--config is missing; expected --config=configs/X.py[:argument]")
    if JSON.value and not Path(JSON.value).absolute().parent.is_dir():
        raise ValueError(f"--json={JSON.value}: its folder does not exist; create it first")
    if TOPOLOGY.value:
        os.environ["JAX_PLATFORMS"] = "cpu"  # only the compiler is used, no accelerator
        # JAX cannot load programs for devices that are not there.
        os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    from cptjax.planning import plan

    plans = plan.make_plans(CONFIG.value, TOPOLOGY.value, SLICES.value, THOROUGH.value)
    for one in plans:
        plan.show_plan(one)
    if JSON.value:
        Path(JSON.value).write_text(json.dumps([plan.plan_as_json(p) for p in plans], indent=1))
    if verdicts := [v for v in map(plan.plan_verdict, plans) if v]:
        console.print_message("\n".join(verdicts))
        raise SystemExit(1)


if __name__ == "__main__":
    cli.run_launcher(main)
