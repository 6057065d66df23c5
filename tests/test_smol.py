"""The study of a real model: its arms run, its numbers are read, and the README shows them."""

import json
import re
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import readme_parts
import readme_smol
import readme_smol_figure
import recording_python
from device_fixtures import see

from configs import smol
from cptjax.config import merge_config
from cptjax.continual import driver

ROOT = Path(__file__).parents[1]
GENERAL = ("capitals", "opposites")
SCORER = "def score(completion, answer, **columns):\n    return float(len(completion) % 2)\n"


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Two arms of the short study on a random model, with scores that change quickly."""
    folder = tmp_path_factory.mktemp("smol")
    (folder / "odd.py").write_text(SCORER)
    short = smol.get_config("0,short")
    scorer = {"scorer": f"{folder}/odd.py:score"}
    tasks = {name: short.tasks[name].to_dict() | scorer for name in (*smol.STAGES, *GENERAL)}
    fast = {"train": {"lr": 0.02}, "tasks": tasks}
    arms = {name: short.arms[name].to_dict() | fast for name in ("sft_bare", "grpo_nokl")}
    changes = {
        "model": {"path": "", "preset": "tiny_qwen2"},
        "data": {"buckets": (128,)},
        "eval": {"general": GENERAL, "groups": {}, "drift": 2, "max_new_tokens": 4},
        "rollout": {"max_new_tokens": 4, "check_every": 4},
        "arms": arms,
    }
    with pytest.MonkeyPatch.context() as patch:
        see(patch, 1)
        config = merge_config(short, changes)
        driver.run(config, folder / "runs", only=",".join(arms))
    return folder / "runs"


def test_numbers_of_runs_are_changes_of_the_same_rows(workdir, monkeypatch):
    monkeypatch.setattr(readme_smol, "GENERAL", GENERAL)
    monkeypatch.setattr(smol, "FACTS", dict.fromkeys(GENERAL, ""))
    numbers = readme_smol.collect_numbers([str(workdir)])
    assert set(numbers["arms"]) == {"sft_bare", "grpo_nokl"}
    for arm, found in numbers["arms"].items():
        matrix = np.genfromtxt(workdir / arm / "matrix.csv", delimiter=",", skip_header=1)[:, 2:]
        learned = np.mean([matrix[k + 1, k] - matrix[0, k] for k in range(3)])
        earlier = np.mean([matrix[3, k] - matrix[k + 1, k] for k in range(2)])
        assert found["learned"][0] == pytest.approx(learned, abs=1e-3)
        assert found["earlier"][0] == pytest.approx(earlier, abs=1e-3)
        assert np.ptp(matrix[:, :3]) > 0
        assert len(found["drift"]) == 3 and len(found["rows"]) == 2 * 4
        assert np.mean(found["rows"]) == pytest.approx(found["general"][0], abs=1e-3)
    assert "Over 6 stages" in readme_smol.describe_drift(numbers)
    section = readme_smol.render_section(numbers)
    (missing,) = [line for line in section.splitlines() if line.startswith("Not run: ")]
    assert "GRPO with KL" in missing and "GRPO without KL;" not in missing


def test_an_interval_covers_95_percent_of_a_normal_sample():
    mean, half = readme_smol.mean_with_interval([0.0, 1.0] * 50)
    assert mean == 0.5 and half == pytest.approx(1.96 * 0.5025 / 10, abs=1e-3)


def test_verdicts_follow_the_interval_of_the_rows_differences():
    def said(mean, claim):
        a = {"rows": [0.5 + mean, -0.5 + mean + 0.1, mean - 0.1] * 20, "learned": [0.5, 0.1]}
        b = {"rows": [0.5, -0.5, 0.0] * 20, "learned": [0.4, 0.1]}
        return readme_smol.verdict("p", claim, "a", "b", {"arms": {"a": a, "b": b}})

    assert "agrees (+20" in said(0.2, "less") and "disagrees" in said(-0.2, "less")
    assert "not resolved" in said(0.01, "less") and "disagrees" in said(-0.2, "does not lose")
    assert "not run" in readme_smol.verdict("p", "less", "a", "b", {"arms": {}})


def test_numbers_of_another_session_are_added():
    def numbers(arms, rows=24, pareto=()):
        parts = dict.fromkeys(("bf16", "influence", "fisher"), {})
        return {
            "settings": {"rows": rows},
            "arms": arms,
            "pareto": list(pareto),
            "sweep": [],
            **parts,
        }

    old = numbers({"a": 1, "b": 2}, pareto=["said"])
    added = readme_smol.add_numbers(old, numbers({"b": 3, "c": 4}))
    assert added == numbers({"a": 1, "b": 3, "c": 4}, pareto=["said"])
    assert readme_smol.add_numbers({}, old) == old
    with pytest.raises(ValueError, match="settings differ"):
        readme_smol.add_numbers(old, numbers({}, rows=48))


def test_analyses_of_a_workdir_are_averaged_over_responses_and_prompts(tmp_path):
    workdir = tmp_path / "sft_bare+lr=1e-05"
    workdir.mkdir()
    pull = lambda kernel, change: {"kernel": kernel, "change": {"capitals": change}}
    corpus = {"name": "gold", "perplexity": 9.0, "pulls": [pull(1.0, -4.0), pull(3.0, 2.0)]}
    (workdir / "influence.json").write_text(json.dumps({"corpora": [corpus]}))
    prompt = lambda sft, ratio: {"sft": sft, "rft": 1.0, "group": 0.5, "ratio": ratio}
    prompts = [prompt(2.0, None), prompt(4.0, 6.0), prompt(6.0, 8.0), prompt(0.0, 0.0)]
    (workdir / "fisher.json").write_text(json.dumps({"prompts": prompts}))
    numbers = readme_smol.numbers_of_analyses([str(tmp_path)])
    gold = {"n": 2, "perplexity": 9.0, "kernel": 2.0, "change": {"capitals": -1.0}}
    assert numbers["influence"] == {"gold, sft_bare": gold}
    risk = {"n": 4, "mixed": 2, "ratio": 7.0, "sft": 3.0, "rft": 1.0, "group": 0.5}
    assert numbers["fisher"] == {"sft_bare": risk}
    assert "| bare answers | 2 | 9 | 2 | -1 |" in readme_smol.table_of_influence(numbers)
    assert "On the 2 prompts" in readme_smol.describe_risk("sft_bare", risk)


def test_the_readme_shows_the_numbers_of_the_runs():
    _, written, _ = readme_parts.split_readme("smol")
    assert written == readme_smol.render_part(), "run python -m tests.readme_smol --write"
    assert readme_smol.FIGURE.read_text() == readme_smol.render_figure()


def test_the_figure_has_an_interval_of_each_measured_change():
    arms = {"a": {"learned": [0.5, 0.1], "prose": [-0.1, 0.02]}, "b": {"learned": [0.2, 0.1]}}
    figure = readme_smol_figure.draw_figure(arms, {"a": "A", "b": "B", "c": "not run"})
    ElementTree.fromstring(figure)
    lines = re.findall(r'class="stem" x1="([\d.]+)" y1="[\d.]+" x2="([\d.]+)"', figure)
    (a, b, prose) = ([float(v) for v in line] for line in lines)
    assert a[1] - a[0] == pytest.approx(b[1] - b[0], abs=0.2)  # the same width, at 50 and at 20
    assert np.mean(a) - np.mean(b) == pytest.approx(1.5 * (a[1] - a[0]), abs=0.3)
    assert prose[0] > b[1] and "not run" not in figure


@pytest.mark.parametrize("word", ["short", "gpu"])
def test_the_launcher_makes_the_model_and_runs_every_part(tmp_path, word):
    """An interpreter that only records its arguments shows what is installed and run."""
    env, log = recording_python.make_environment(tmp_path)
    command = ["bash", ROOT / "launch" / "smol.sh", word, str(tmp_path / "out")]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = log.read_text().splitlines()
    has_model = (ROOT / smol.MODEL / "config.json").exists()
    assert any("convert.py" in line for line in lines) != has_model
    trained = {line.split()[1].split(":")[1] for line in lines if "train.py" in line}
    parts = ["", ",lora", ",bf16"] + [",sweep"] * (word == "gpu")
    assert trained == {f"0,{word}{part}" for part in parts}
    analyses = [line.split()[1] for line in lines if "analyze.py" in line]
    on_weights = ["influence", "influence", "fisher"] if word == "short" else []
    assert analyses == ["drift", "pareto", *on_weights]
    assert f"report.py {tmp_path}/out/arms {tmp_path}/out/lora" in log.read_text()
