"""The suite runs the trainer, and its numbers agree with each other and with the run's files."""

import dataclasses
import json

import numpy as np
import pytest
from device_fixtures import devices  # noqa: F401
from test_phase_times import NANO

from configs.base import get_config
from cptjax.benchmark import grpo_steps, phase_times, suite, workload
from cptjax.benchmark.grpo_steps import StepSize
from cptjax.common import files
from cptjax.models.families import PRESETS

SIZE = StepSize(*("nano", 84, 8, 4, 2, 8, 3, 2), model_settings=(("compute_dtype", "float32"),))


@pytest.fixture(autouse=True)
def nano(monkeypatch, devices):  # noqa: F811
    monkeypatch.setitem(workload.BENCH_SIZES, "nano", NANO)
    monkeypatch.setitem(grpo_steps.STEP_SIZES, "nano", SIZE)


def test_a_row_is_measured_by_the_trainer(tmp_path):
    ceilings = suite.measure_ceilings("float32")
    counter = phase_times.CompilationCounter()
    with grpo_steps.preset(SIZE.find_model()):
        row = suite.measure_row(get_config(), SIZE, "base", 2, counter, ceilings, str(tmp_path))
    lines = files.read_jsonl(tmp_path / "base" / "run" / "metrics.jsonl")
    assert row["steps"] == 2 and row["compilations_after_warmup"] == 0
    assert row["warmup_steps"] == len(lines) - 2 > 0 and "bench" not in PRESETS
    measured = [x for x in lines if x["seconds"] in row["step_s_range"]]
    assert len(measured) == 2 and lines[0] not in measured, "the first step compiles"
    for line in measured:
        phases = [line[f"seconds/device/{p}"] for p in suite.PHASES]
        assert sum(phases) == pytest.approx(line["seconds"]) and min(phases) >= 0
        assert line["perf/throughput"] * line["seconds"] == pytest.approx(line["row_tokens"])
        tokens = SIZE.prompts * SIZE.group * line["prompt_length/mean"] + line["tokens"]
        assert line["row_tokens"] == pytest.approx(tokens)
        assert line["perf/padding"] >= 1 and line["kl"] >= 0
    assert row["padding"] == pytest.approx(np.median([x["perf/padding"] for x in measured]))
    rows = files.read_jsonl(tmp_path / "base" / "run" / "rollouts" / "stage1.jsonl")
    assert len(rows) == len(lines) * SIZE.prompts * SIZE.group
    assert {r["reward"] for r in rows} == {0.0, 1.0} and rows[0]["rewards"].keys() == {
        "reward",
        "right",
    }
    finished = [r["finished"] for r in rows if r["step"] == 1]
    assert np.mean(finished) == pytest.approx(1 - lines[0]["truncated"])
    assert 0 < row["mfu"] < 1 and row["mismatch"] < 1e-3


@pytest.mark.parametrize(("mean", "most"), [(246, 1024), (15, 64), (4, 16)])
def test_responses_have_the_mean_length_that_the_size_names(mean, most):
    """Their lengths are those of a coin that is thrown at each token."""
    p = grpo_steps.end_probability(mean, most)
    lengths = np.minimum(np.random.default_rng(0).geometric(p, 200_000), most)
    assert lengths.mean() == pytest.approx(mean, rel=0.01)
    cfg = dataclasses.replace(SIZE, mean=mean, new=most).find_model()
    assert len(cfg.eos) == 2 + round(512 * p) and len(set(cfg.eos)) == len(cfg.eos)
    assert not set(cfg.eos[2:]) & {*cfg.vision_tokens, cfg.pad}


def test_what_is_not_measured_in_time_is_named(monkeypatch, capsys):
    now = iter([0.0, 30.0, 61.0, 62.0])
    monkeypatch.setattr(suite.time, "perf_counter", lambda: next(now))
    monkeypatch.setattr(suite, "measure_ceilings", lambda dtype: {"device": "cpu", "devices": 1})
    monkeypatch.setattr(suite, "measure_row", lambda *args: {"row": args[2], "x": 1.23456})
    found = suite.run_suite(get_config(), "nano", ["base", "slots", "xla"], 5, minutes=1)
    assert found["rows"] == [{"row": "base", "x": 1.235}]
    assert found["left_out"] == ["slots", "xla"]
    json.dumps(found)
    numbers = dict.fromkeys(suite.LABELS, 0.25)
    suite.print_rows(found | {"rows": [numbers | {"row": "base"}]})
    printed = capsys.readouterr().err
    assert "not run for lack of time: slots, xla" in printed and printed.count("0.25") == len(
        numbers
    )


def test_rows_change_what_they_name():
    base = get_config()
    task = dict(train="a.jsonl", template="none")
    for row, name, value in (
        ("top_p=1", "top_p", 1.0),
        ("slots", "slots", 1),
        ("slot_rows", "slot_rows", SIZE.group // 2),
        ("base", "top_p", 0.99),
    ):
        config = grpo_steps.make_config(base, SIZE, 3, task, suite.row_changes(row, SIZE))
        assert config.rollout[name] == value and config.method.kl_coef > 0
    assert base.rollout.top_p == 1.0 and suite.row_changes("xla", SIZE)["model"]
    assert set(suite.SUITE_ROWS) - set(suite.platform_rows()) == {"padded"}, "it needs a GPU"


@pytest.mark.parametrize(
    ("size", "rows", "repeat", "message"),
    [
        ("70b", ["base"], 5, "--size=70b: expected one of cpu-s, 3b, 7b"),
        ("cpu-s", ["all"], 5, "--rows=all: expected some of base, "),
        ("cpu-s", [], 5, "--rows is empty"),
    ],
)
def test_a_mistake_is_reported_in_one_line(size, rows, repeat, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        suite.run_suite(get_config(), size, rows, repeat)
