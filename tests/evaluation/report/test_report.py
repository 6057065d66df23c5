"""Writing the report: which page, the numbers as JSON, and the command."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from report_runs import ARMS, TASKS, make_run, write_page

from cptjax.evaluation import report, summary
from cptjax.evaluation.report import read


def test_runs_of_a_seed_are_compared_with_the_joint_run_of_that_seed(tmp_path):
    for seed in (1, 2):
        make_run(tmp_path / "grpo" / f"seed{seed}", seed=seed)
    joint = make_run(tmp_path / "joint" / "seed2", "joint", seed=2)
    report.write_comparison(tmp_path)
    found = [
        json.loads((tmp_path / f"grpo/seed{s}/summary.json").read_text())["metrics"][
            "intransigence"
        ]["value"]
        for s in (1, 2)
    ]
    assert (
        found
        == [
            None,
            summary.summarise_table(
                *(summary.load_run_tables(p).accuracy for p in (tmp_path / "grpo/seed2", joint))
            )["metrics"]["intransigence"]["value"],
        ]
        and found[1] is not None
    )
    spreads = json.loads((tmp_path / "report.json").read_text())["arms"]
    assert (
        spreads["grpo"]["intransigence"] == {"mean": found[1], "sd": None, "n": 1}
        and spreads["grpo"]["avg_acc"]["n"] == 2
    )
    assert "fm_peak_all" not in spreads["joint"]


def test_arms_of_one_stage_with_several_tasks_are_compared(tmp_path, monkeypatch):
    """None of them is joint training, the reference of sequences, unless there is a sequence."""
    for arm, lost_general in (("much", 0.3), ("little", 0.02)):
        monkeypatch.setitem(ARMS, arm, (0.0, lost_general, [TASKS]))
        make_run(tmp_path / arm, arm)
    text = write_page(tmp_path)
    assert not any(arm.is_joint for arm in read.read_arms([tmp_path]))
    assert re.search(r"<b>little</b> changed by <b>[^<]*</b> points and <b>much</b> by", text)
    assert '<td class="best">' in text
    assert "Average over all tasks, stage by stage" in text and "little, free" in text
    make_run(tmp_path / "grpo", "grpo")
    arms = read.read_arms([tmp_path])
    assert [(arm.label, arm.is_joint) for arm in arms] == [
        ("grpo", False),
        ("little", True),
        ("much", True),
    ]


def launch(*args):
    command = [sys.executable, "launch/report.py", *map(str, args)]
    root = Path(__file__).parents[3]
    return subprocess.run(
        command,
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )


def test_a_page_that_cannot_be_written_and_an_unknown_baseline_of_one_run_are_refused(tmp_path):
    run = make_run(tmp_path / "run")
    for out, words in (
        (tmp_path, "got a folder; add a name such as page.html"),
        ("", "got no name"),
        (tmp_path / "a.json", "got that of its numbers"),
    ):
        with pytest.raises(ValueError, match=f"--out={out}: expected the path of a page, {words}"):
            report.write_report([run], out)
    with pytest.raises(ValueError, match="the baseline is the arm 'other'; known: "):
        report.write_report([run], tmp_path / "x.html", "other")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_the_launcher_prints_one_line(tmp_path):
    done = launch(make_run(tmp_path / "run"), f"--out={tmp_path / 'x.html'}")
    assert (
        done.returncode == 0
        and done.stdout.strip() == str(tmp_path / "x.html")
        and (tmp_path / "x.html").exists()
    )
    (tmp_path / "empty").mkdir()
    refused = launch(tmp_path / "empty")
    assert (
        refused.returncode == 2
        and refused.stderr.count("\n") == 1
        and "is not a run" in refused.stderr
    )
