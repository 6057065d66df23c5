"""Expectations of a config, judged by the numbers of the runs."""

import json

import numpy as np
import pytest
from ml_collections import ConfigDict
from report_runs import make_run, write_page

from configs import demo
from cptjax.evaluation import summary
from cptjax.evaluation.report import expect, read, words

EXPECT = [
    {"arm": "grpo", "metric": "text", "at_least": -0.05},
    {"arm": "sft_bare", "metric": "fm_diagonal", "at_most": -0.9},
    {"arm": "grpo", "metric": "fm_diagonal", "above": "sft_bare"},
    {"arm": ["grpo", "sft_bare"], "metric": "learned_gain", "within": 0.04},
    {"arm": "sft_bare", "metric": "text", "at_most": -0.5, "mean": True},
    {"arm": "iterative", "metric": "text", "at_least": 0.0},
]


def test_expectations_are_met_missed_or_not_judged(tmp_path):
    for arm in ("grpo", "sft_bare"):
        for seed in (0, 2):
            make_run(tmp_path / arm / f"seed{seed}", arm, seed=seed, expect=EXPECT)
    text = write_page(tmp_path)
    metrics = {
        v["expect"]["metric"] + str(k): v
        for v in json.loads((tmp_path / "report.json").read_text())["expected"]
        for k, e in enumerate(EXPECT)
        if e == v["expect"]
    }
    assert {name: v["met"] for name, v in metrics.items()} == {
        "text0": True,
        "fm_diagonal1": False,
        "fm_diagonal2": True,
        "learned_gain3": True,
        "text4": True,
        "text5": None,
    }
    number = lambda arm, seed, name: summary.summarise_table(
        summary.load_run_tables(tmp_path / arm / f"seed{seed}").accuracy
    )["metrics"][name]["value"]
    for seed in (0, 2):
        fm, gain = (
            [number(arm, seed, name) for arm in ("grpo", "sft_bare")]
            for name in ("fm_diagonal", "learned_gain")
        )
        assert metrics["fm_diagonal2"]["found"][f"seed{seed}"] == {
            "value": pytest.approx(fm[0] - fm[1]),
            "met": True,
        }
        assert metrics["learned_gain3"]["found"][f"seed{seed}"]["value"] == pytest.approx(
            abs(gain[0] - gain[1])
        )
    mean = np.mean([number("sft_bare", s, "text") for s in (0, 2)])
    assert (
        metrics["text4"]["found"] == {"mean": {"value": pytest.approx(mean), "met": True}}
        and metrics["text5"]["found"] == {}
    )
    assert "<b>4 of 6</b> expectations are met, 1 not judged" in text
    worst = ", ".join(
        f"{words.format_points(number('sft_bare', s, 'fm_diagonal'))} (seed{s})" for s in (0, 2)
    )
    assert f"Missed: <b>FM of sft_bare at most −90.0</b>; found <b>{worst}</b>" in text


def test_an_unfinished_run_is_not_judged(tmp_path):
    make_run(tmp_path / "grpo" / "seed0", expect=EXPECT[:1])
    make_run(tmp_path / "grpo" / "seed1", seed=1, upto=3, expect=EXPECT[:1])
    (verdict,) = expect.judge_expectations(read.read_arms([tmp_path]))
    assert (
        verdict.met is None
        and verdict.values["seed1"] is None
        and verdict.holds(verdict.values["seed0"])
    )
    at_bound = expect.Verdict({"arm": "a", "metric": "text", "at_least": -0.03}, {})
    assert at_bound.holds(0.97 - 1.0) and not at_bound.holds(-0.031)
    assert not expect.Verdict({"arm": "a", "metric": "text", "above": "b"}, {}).holds(0.0)


@pytest.mark.parametrize(
    "entry, message",
    [
        (
            {"arm": "grpo", "metric": "text"},
            "expected arm, metric, one of at_least, at_most, above, within",
        ),
        (
            {"arm": "grpo", "metric": "text", "at_least": 0, "at_most": 1},
            "expected arm, metric, one of",
        ),
        ({"arm": "grpo", "metric": "text", "at_least": "0"}, "expected arm, metric, one of"),
        (
            {"arm": "grpo", "metric": "text", "within": 0.1},
            "expected a tuple of arms with within",
        ),
        ({"arm": ("grpo", "sft_bare"), "metric": "text", "at_most": 0}, "otherwise one arm"),
        (
            {"arm": "gpro", "metric": "text", "at_most": 0},
            "names the arm 'gpro'; did you mean 'grpo'",
        ),
        ({"arm": "grpo", "metric": "fm_diagonal", "above": "zz"}, "names the arm 'zz'; known:"),
        (
            {"arm": "grpo", "metric": "txt", "at_most": 0},
            "names the metric 'txt'; did you mean 'text'",
        ),
    ],
)
def test_expectations_that_no_report_can_judge_are_refused(entry, message):
    config = demo.get_config()
    expect.check_expectations(config)
    config.expect = (entry,)
    with pytest.raises(ValueError, match=message):
        expect.check_expectations(config)
    if "the arm" in message:  # of a run without arms they are the folders next to it
        config.arms = ConfigDict()
        expect.check_expectations(config)
    config.expect, config.eval.groups = (), ConfigDict({"gain": ("facts",)})
    with pytest.raises(ValueError, match="gain already names a number"):
        expect.check_expectations(config)
