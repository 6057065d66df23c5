"""What a stage evaluation writes once its rows are recorded."""

import collections
import math
import sys

import pytest

from cptjax.common import console, files, run_log
from cptjax.continual import stage_evaluation

RECORDING: list[collections.Counter] = []  # an audit hook can not be removed, so it is switched


def _count_reads(event, args):
    if RECORDING and event == "open" and isinstance(args[0], str) and "r" in (args[1] or ""):
        RECORDING[-1][args[0]] += 1


@pytest.fixture(scope="module", autouse=True)
def audit_hook():
    sys.addaudithook(_count_reads)


def make_run(workdir):
    """A run of two stages, evaluated up to the end."""
    stages = [{"task": "a", "steps": 2}, {"task": "b", "steps": 2}]
    files.write_json(workdir / "config.json", {"name": "run", "stages": stages})
    log = run_log.RunLog(workdir)
    for stage, (a, b) in enumerate([(0.5, 0.25), (1.0, 0.25), (0.75, 1.0)]):
        for task, value in (("a", a), ("b", b)):
            row = dict.fromkeys(run_log.EVAL_COLUMNS, "") | {"stage": stage, "step": 2, "n": 4}
            row |= {"task": task, "metric": "accuracy", "value": value, "stderr": math.nan}
            log.evals([row])
            log.predictions(stage, [{"task": task, "id": 0, "score": value}])
        log.step(stage, 2, {"loss": 0.5, "seconds": 1.0})
    log.close()


def test_each_result_file_is_read_once_after_a_stage(tmp_path, capsys):
    make_run(tmp_path)
    console.set_console_mode("plain")
    RECORDING.append(collections.Counter())
    stage_evaluation.write_results(tmp_path, 2, "b")
    reads = RECORDING.pop()
    names = ["config.json", "evals.csv", "metrics.jsonl"]
    names += [f"predictions/stage{stage}.jsonl" for stage in range(3)]
    assert {name: reads[str(tmp_path / name)] for name in names} == dict.fromkeys(names, 1)
    assert "after stage 2 b: a 75.0, b 100.0" in "".join(capsys.readouterr())
    assert all((tmp_path / name).exists() for name in ("matrix.csv", "summary.json", "report.html"))
