"""Does a run fit on a slice, and how fast can it be? Compiles every program of it ahead of time; no accelerator is needed.

python launch/plan.py --config=configs/cpt7.py:grpo,7b --topology=v5p:4x4x4 [--slices=2] [--json=plan.json] [--thorough]

Exit code 0: everything fits; 1: something does not (which program, by how much, what to change); 2: bad input.
What is counted are the largest shapes that the config allows. `configs/cpt7.py:grpo,7b` (512 prompts of 4,096 tokens with a picture
of a megapixel each, 8 answers of 1,024 tokens, four updates) needs, in GiB of a device at the worst moment of each program:

    slice           devices   weights for rollouts   rollouts   log-probs   gradients   update   evaluation   of
    v5p:4x4x4            64            7.9             12.7        4.9        19.2        2.2        7.4      93.1
    v5e:16x16           256            7.4              6.3        1.1         4.6        0.6        1.6      15.7
    v6e:16x16           256            6.6              6.5        1.0         4.8        0.6        1.8      31.4

and a step takes at least 30, 18 and 7 seconds (at most 68, 66 and 38 % of the chips' arithmetic). Each program is compiled until its
buffers are assigned, 10 to 90 seconds on two busy cores, 4 to 7 minutes a slice; `--thorough` makes machine code too, ten times that.
"""

import json
import os
from pathlib import Path

os.environ.setdefault(
    "TPU_SKIP_MDS_QUERY", "1"
)  # libtpu compiles for slices that this machine does not have

from absl import flags

from cptjax.common import cli, config_flag, console

TOPOLOGY = flags.DEFINE_string(
    "topology",
    None,
    "TPU slice, such as v5e:16x16, v5p:4x4x4 or v6e:16x16; default: this machine's devices.",
)
SLICES = flags.DEFINE_integer(
    "slices",
    1,
    "Slices joined by the data-centre network; mesh.data must be a multiple.",
    lower_bound=1,
)
JSON = flags.DEFINE_string("json", None, "Also write everything to this file.")
THOROUGH = flags.DEFINE_bool(
    "thorough",
    False,
    "Compile to machine code: nothing more is learned about sizes, only that it works.",
)
CONFIG = config_flag.define_config_flag()


def main() -> None:
    if CONFIG.value is None:
        raise ValueError("expected --config=configs/X.py[:argument]")
    if TOPOLOGY.value:
        os.environ["JAX_PLATFORMS"] = (
            "cpu"  # the compiler alone is wanted, not this machine's accelerator
        )
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
