"""Run what a config describes, or go on with it where the workdir has a state: stages, checkpoints, evaluations, report.

python launch/train.py --config=configs/demo.py --workdir=runs/demo [--config.seeds=0,1,2 --config.arms.grpo.train.lr=2e-4]
"""

import os

from absl import flags

from cptjax import cli, console

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; one that has a state is continued.", required=True)
PLAIN = flags.DEFINE_bool("plain", False, "Plain progress lines also on a terminal.")
CONFIG = cli.config_flag()


def main() -> None:
    if PLAIN.value:
        console.configure("plain")
    cli.distributed()
    from cptjax import continual

    continual.run(CONFIG.value, WORKDIR.value)


if __name__ == "__main__":
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        cli.keep_memory()
    cli.main(main)
