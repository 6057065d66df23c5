"""Train and evaluate what a config describes; a run that was stopped continues.

python launch/train.py --config=configs/demo.py --workdir=runs/demo
    [--config.seeds=0,1,2] [--config.arms.grpo.train.lr=2e-4] [--only=grpo/seed1] [--start_over]

On a CPU, `source launch/cpu_memory.sh` first, as launch/quickstart.sh does: it makes steps that use
gigabytes faster.
"""

from absl import flags

from cptjax.common import cli, config_flag, console

WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run; a run that was stopped in it continues.", required=True
)
ONLY = flags.DEFINE_string(
    "only",
    "",
    "Run only a part of the arms and seeds: folders in the workdir, or patterns of them, separated "
    "by commas, such as grpo/seed1 or '*/seed1'. Several processes can run different parts in one "
    "workdir at the same time, for example one per GPU; each writes the report on all parts.",
)
START_OVER = flags.DEFINE_bool(
    "start_over",
    False,
    "If checkpoints or results of a run are lost, continue from the newest state that can be read; "
    "its records are first copied to old/ in the workdir. Other runs continue as usual.",
)
PLAIN = flags.DEFINE_bool("plain", False, "Print plain progress lines even on a terminal.")
CONFIG = config_flag.define_config_flag()
cli.define_cluster_flags()
cli.define_cache_flag()


def main() -> None:
    if PLAIN.value:
        console.set_console_mode("plain")
    cli.connect_processes()
    from cptjax.continual import driver

    driver.run(CONFIG.value, WORKDIR.value, START_OVER.value, ONLY.value)


if __name__ == "__main__":
    cli.run_launcher(main)
