"""Evaluate the model of a run's stage, or any Hugging Face folder, on the tasks of a config, and print a table.

python launch/evaluate.py --config=configs/demo.py --workdir=runs/demo/grpo [--stage=2] [--tasks=colour,facts] [--record]
"""

from absl import flags

from cptjax import cli

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)
STAGE = flags.DEFINE_integer("stage", None, "Stage whose model is evaluated; 0 = base, left out = the newest finished one.", lower_bound=0)
MODEL = flags.DEFINE_string("model", "", "Hugging Face folder or hub id that is evaluated instead of a stage.")
TASKS = flags.DEFINE_list("tasks", [], "Some of the tasks that the config evaluates; left out = all.")
RECORD = flags.DEFINE_bool("record", False, "Append the rows to the evals.csv of the workdir, whose run must be finished.")
CONFIG = cli.config_flag()


def main() -> None:
    cli.distributed()
    from cptjax import multihost, reexam

    rows = reexam.run(CONFIG.value, WORKDIR.value, STAGE.value, MODEL.value, tuple(TASKS.value), RECORD.value)
    if multihost.first():
        print(reexam.table(rows))


if __name__ == "__main__":
    cli.main(main)
