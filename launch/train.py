"""Train and evaluate what a config describes; a run that was stopped continues.

python launch/train.py --config=configs/demo.py --workdir=runs/demo
    [--config.seeds=0,1,2] [--config.arms.grpo.train.lr=2e-4] [--only=grpo/seed1] [--start_over]

On a CPU, `source launch/cpu_memory.sh` first, as launch/quickstart.sh does: it makes steps that use
gigabytes faster.
"""

import signal

from absl import flags

from cptjax.common import cli, config_flag, console, signals
from cptjax.common.runs import list_parts

WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Folder of the run, or gs://BUCKET/FOLDER; a run that was stopped in it continues.",
    required=True,
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
PROFILE = flags.DEFINE_string(
    "profile",
    "",
    "Profile steps of a stage, as STAGE:STEP:COUNT such as 1:10:3; the trace in profile/ of the "
    "run is for xprof.",
)
LIST = flags.DEFINE_bool(
    "list", False, "Only print the arms and seeds that --only selects, one per line; run nothing."
)
FAIL_ON_SIGTERM = flags.DEFINE_bool(
    "fail_on_sigterm",
    False,
    "Exit with code 143 instead of 0 after SIGTERM, when everything is saved: for schedulers that "
    "start only failed jobs again.",
)
PLAIN = flags.DEFINE_bool("plain", False, "Print plain progress lines even on a terminal.")
CONFIG = config_flag.define_config_flag()
cli.define_cluster_flags()
cli.define_cache_flag()


def main() -> None:
    if PLAIN.value:
        console.set_console_mode("plain")
    if LIST.value:
        print(*list_parts(CONFIG.value, ONLY.value), sep="\n")
        return
    cli.connect_processes()
    from cptjax.continual import driver

    try:
        driver.run(CONFIG.value, WORKDIR.value, START_OVER.value, ONLY.value, PROFILE.value)
    except signals.Preempted as stopped:
        if stopped.code or not FAIL_ON_SIGTERM.value:
            raise
        raise SystemExit(128 + signal.SIGTERM) from None


if __name__ == "__main__":
    cli.run_launcher(main)
