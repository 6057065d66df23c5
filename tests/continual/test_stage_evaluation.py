"""What a stage evaluation writes after its rows are recorded."""

import collections
import math
import sys

import numpy as np
import pytest
import run_helpers
from device_fixtures import devices  # noqa: F401

from cptjax.common import console, files, run_log
from cptjax.continual import stage_evaluation

RECORDING: list[collections.Counter] = []  # an audit hook cannot be removed, so it is switched


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


@pytest.mark.slow
def test_kl_to_base_counts_the_rows_of_the_config_on_any_device_count(tmp_path, devices):
    """Three rows do not fill eight shards; the number of devices changes nothing."""
    found = {}
    for count in (1, 8):
        devices(count)
        small = {"train": {"batch": 8}, "eval": {"drift": 3, "limit": 4, "batch": 8}}
        run_helpers.run_quickly(
            tmp_path / str(count),
            stages=({"task": "facts", "steps": 2},),
            model=run_helpers.TEXT,
            **small,
        )
        found[count] = [
            (r["stage"], r["n"], float(r["value"]))
            for r in run_helpers.read_evals(tmp_path / str(count))
            if r["metric"] == "kl_base"
        ]
    assert [(s, n) for s, n, _ in found[1]] == [("0", "3"), ("1", "3")] and found[1][1][2] > 1e-4
    assert [x[:2] for x in found[8]] == [x[:2] for x in found[1]]
    assert np.allclose([x[2] for x in found[8]], [x[2] for x in found[1]], rtol=1e-3, atol=1e-6)
    per_response = [
        float(r["value"])
        for r in run_helpers.read_evals(tmp_path / "1")
        if r["metric"] == "kl_base_sequence"
    ]
    tokens = 3 * per_response[1] / found[1][1][2]  # both are the sum over the same three responses
    assert tokens >= 3 and tokens == pytest.approx(round(tokens), rel=1e-4)


@pytest.mark.slow
def test_an_evaluation_records_templates_prefixes_scorers_and_kl(
    tmp_path, devices, monkeypatch, capsys
):
    """Templates, forced prefix, drift, further scorers, small evaluations inside a stage, general
    tasks, no base row.
    """
    shown = []
    monkeypatch.setattr(
        console._PlainBar, "_show", lambda bar: shown.append(bar.shown.get("accuracy"))
    )
    digit = {
        "task": "synthetic",
        "family": "digit",
        "side": 32,
        "also": ("contains",),
        "template": "",
    }
    facts = {"task": "synthetic", "family": "facts"}
    tasks = {"digit": digit, "facts": facts, "prose": {**facts, "scorer": "likelihood"}}
    wanted = {
        "before": False,
        "general": ("facts", "prose"),
        "templates": ("none", "answer"),
        "forced_prefix": True,
        "gold_probability": True,
    }
    wanted |= {"drift": 2, "every": 1, "mini": 2, **run_helpers.QUICK["eval"]}
    long = {"prompt_limit": 256, "buckets": (256,)}
    _, matrix = run_helpers.run_quickly(
        tmp_path, tasks=tasks, stages=({"task": "digit", "steps": 3},), eval=wanted, data=long
    )
    assert np.isnan(matrix[0]).all() and np.isfinite(matrix[1]).all()
    rows = run_helpers.read_evals(tmp_path)
    of = lambda metric: [
        (r["step"], r["task"], r["template"], r["n"]) for r in rows if r["metric"] == metric
    ]
    both = [
        ("3", "digit", "none", "4"),
        ("3", "digit", "answer", "4"),
        ("3", "facts", "none", "4"),
    ]  # synthetic facts have their own template
    prose = ("3", "prose", "none", "4")  # no response is generated, so no prefix is forced
    assert of("accuracy") == [*both, prose]
    assert of("accuracy_forced") == of("gold_probability") == both
    assert of("bits_per_byte") == [prose]
    assert of("contains/accuracy") == of("contains/extraction_failure") == both[:2]
    assert {r["scorer"] for r in rows if r["metric"] == "contains/accuracy"} == {"contains@1"}
    assert all(int(r["n"]) > 0 and float(r["stderr"]) >= 0 for r in rows)
    value = lambda metric: [float(r["value"]) for r in rows if r["metric"] == metric]
    assert set(shown) - {None} == set(value("accuracy_mini"))
    accuracies = value("accuracy")  # of the first template, and of the general tasks
    first = [100 * accuracies[0], 100 * np.mean(accuracies[2:])]
    assert (
        f"after stage 1 digit: digit {first[0]:.1f}; general {first[1]:.1f}\n"
        in capsys.readouterr().err
    )
    assert of("accuracy_mini") == [("1", "digit", "none", "2"), ("2", "digit", "none", "2")]
    measured = [("3", "digit"), ("3", "facts"), ("3", "prose")]
    assert [x[:2] for x in of("kl_base")] == measured
    drifted = [r for r in rows if r["metric"] == "kl_base"]
    assert all(
        float(r["value"]) > 0 and r["decoding"] == "the base's own, T=1, 4 tokens" for r in drifted
    )
    events = run_helpers.metrics_lines(tmp_path, events=True)
    assert [(e["step"], e.get("task"), e["rollouts"]) for e in events] == [
        (1, None, 2),
        (2, None, 2),
        (3, "digit", 16),
        (3, "facts", 8),
        (3, "prose", 0),
    ]
    assert all((e["tokens"] > 0) == (e["rollouts"] > 0) for e in events)
    assert all(e["flops"] > 0 and e["seconds"] > 0 for e in events)
