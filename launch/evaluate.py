"""Evaluate a stage of a run, or any Hugging Face folder, and print a table.

python launch/evaluate.py --config=configs/demo.py --workdir=runs/demo/grpo
    [--stage=2] [--tasks=colour,facts] [--record]
"""

from absl import flags

from cptjax.common import cli, config_flag, console

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)
STAGE = flags.DEFINE_integer(
    "stage",
    None,
    "Stage whose model is evaluated; 0 = base; default: the newest finished stage.",
    lower_bound=0,
)
MODEL = flags.DEFINE_string(
    "model", "", "Hugging Face folder or hub id to evaluate instead of a stage."
)
TASKS = flags.DEFINE_list("tasks", [], "Some of the tasks that the config evaluates; default: all.")
RECORD = flags.DEFINE_bool(
    "record", False, "Append the rows to evals.csv in the workdir; the run must be finished."
)
CONFIG = config_flag.define_config_flag()
cli.define_cluster_flags()
cli.define_cache_flag()


def main() -> None:
    cli.connect_processes()
    from cptjax.common import distributed
    from cptjax.continual import reevaluate

    rows = reevaluate.reevaluate_stage(
        CONFIG.value, WORKDIR.value, STAGE.value, MODEL.value, tuple(TASKS.value), RECORD.value
    )
    if distributed.is_main_process():
        console.print_result(reevaluate.format_eval_rows(rows))


if __name__ == "__main__":
    cli.run_launcher(main)
