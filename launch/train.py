"""Run what a config describes, or go on with it where the workdir has a state: stages, checkpoints, evaluations, report.

python launch/train.py --config=configs/demo.py --workdir=runs/demo [--config.seeds=0,1,2 --config.arms.grpo.train.lr=2e-4]
"""

import os

from absl import flags

from cptjax.common import cli, config_flag, console

WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run; one that has a state is continued.", required=True
)
PLAIN = flags.DEFINE_bool("plain", False, "Plain progress lines also on a terminal.")
CONFIG = config_flag.define_config_flag()


def main() -> None:
    if PLAIN.value:
        console.set_console_mode("plain")
    cli.init_distributed()
    from cptjax.continual import driver

    driver.run(CONFIG.value, WORKDIR.value)


if __name__ == "__main__":
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        cli.restart_with_malloc_settings()
    cli.run_launcher(main)
