"""Runs of one workdir evaluate a base model once, and record what each would have found."""

from types import SimpleNamespace

import pytest
import run_helpers
from ml_collections import ConfigDict

from cptjax.common import files
from cptjax.continual import base_evaluations, driver, fingerprints, stage_evaluation

SECTIONS = {
    "model": run_helpers.TEXT,
    "stages": ({"task": "facts", "steps": 1},),
    "eval": {"limit": 8, "batch": 4, "general": ("sums",), "drift": 2},
}


def config(**sections):
    c = run_helpers.config("sft", **SECTIONS, **sections)
    c.tasks.sums = ConfigDict({"task": "synthetic", "family": "arithmetic"})
    return c


def base_records(workdir):
    """Everything that a run recorded about its base model, without times."""
    lines = run_helpers.metrics_lines(workdir, events=True)
    events = [
        {k: v for k, v in line.items() if not k.startswith(run_helpers.TIMES)}
        for line in lines
        if line["stage"] == 0
    ]
    rows = [row for row in run_helpers.read_evals(workdir) if row["stage"] == "0"]
    return events, rows, (workdir / "predictions" / "stage0.jsonl").read_bytes()


@pytest.fixture
def evaluated(monkeypatch):
    """The run and the task of each evaluation of a base model."""
    calls, evaluate = [], stage_evaluation.evaluate_with_templates

    def record(run, number, params, task, *args):
        if not number:
            calls.append((run.files.workdir.name, task))
        return evaluate(run, number, params, task, *args)

    monkeypatch.setattr(stage_evaluation, "evaluate_with_templates", record)
    return calls


def test_arms_with_one_base_model_evaluate_it_once(tmp_path, evaluated, capsys):
    """Another learning rate shares, longer responses do not."""
    arms = {"a": {}, "b": {"train": {"lr": 2e-2}}, "c": {"eval": {"max_new_tokens": 3}}}
    driver.run(config(arms=arms), tmp_path / "arms")
    both = ["facts", "sums"]
    assert evaluated == [(arm, task) for arm in "ac" for task in both]
    printed = (tmp_path / "arms" / "b" / "run.log").read_text()
    assert "results of the base model on facts, sums are those of a, which has the same" in printed
    driver.run(config(train={"lr": 2e-2}), tmp_path / "alone")
    assert evaluated[4:] == [("alone", task) for task in both]
    assert not (tmp_path / "alone" / base_evaluations.FOLDER).exists()
    assert base_records(tmp_path / "alone") == base_records(tmp_path / "arms" / "b")
    # A file that was changed is not used: that of one task has its name.
    for path in (tmp_path / "arms" / base_evaluations.FOLDER).iterdir():
        path.write_text(path.read_text().replace("sums", "sum"))
    driver.run(config(arms={**arms, "d": {"train": {"lr": 3e-2}}}), tmp_path / "arms", only="d")
    assert evaluated[6:] == [("d", "sums")]
    assert "differ from their sha256; restore the file; the task" in (
        tmp_path / "arms" / "d" / "run.log"
    ).read_text().replace("\n", " ")


CHANGES = {
    "lr": (dict(train={"lr": 1.0}), True),
    "method": (dict(method={"kl_coef": 0.3, "source": "rollouts"}), True),
    "other general tasks": (dict(eval={"general": ()}), True),
    "seed of random weights": (dict(seed=3), False),
    "length": (dict(eval={"max_new_tokens": 5}), False),
    "chunk": (dict(train={"chunk": 7}), False),
    "sampling": (dict(rollout={"check_every": 2}), False),
    "type": (dict(model={"compute_dtype": "bfloat16"}), False),
    "rewards": (dict(rewards={"format": 0.5}), False),
    "mesh": (dict(mesh={"model": 2}), False),
    "the task": (dict(tasks={"facts": {"task": "synthetic", "family": "digit"}}), False),
}


def fingerprint(tmp_path, c, inputs=None, templates=("none",)):
    default = {"rows of facts test": "8 rows, 1", "model.path: x": "2"}
    files.write_checked_json(tmp_path / "inputs.json", inputs or default)
    run = SimpleNamespace(config=c, files=SimpleNamespace(workdir=tmp_path))
    return base_evaluations._fingerprint(run, "facts", list(templates))


@pytest.mark.parametrize("name", CHANGES)
def test_what_decides_an_evaluation_is_in_its_fingerprint(tmp_path, name):
    changes, is_same = CHANGES[name]
    before = fingerprint(tmp_path, run_helpers.config())
    assert (before == fingerprint(tmp_path, run_helpers.config(**changes))) == is_same


def test_rows_model_templates_code_and_sampled_seeds_are_in_the_fingerprint(tmp_path, monkeypatch):
    c, inputs = run_helpers.config(), {"rows of facts test": "8 rows, 1", "model.path: x": "2"}
    found = [fingerprint(tmp_path, c, inputs)]
    of_training = {"rows of facts train": "9 rows, 1", "stage 1: method.corpus: x": "3"}
    assert found[0] == fingerprint(tmp_path, c, inputs | of_training)
    found += [fingerprint(tmp_path, c, inputs | {name: "4"}) for name in inputs]
    found.append(fingerprint(tmp_path, c, templates=("cot",)))
    for temperature, number in ((0.0, 1), (1.0, 2)):  # the seed decides sampled responses
        changes = dict(model={"path": "x"}, eval={"temperature": temperature})
        seeds = [run_helpers.config(seed=seed, **changes) for seed in (0, 1)]
        of_seeds = {fingerprint(tmp_path, seeded) for seeded in seeds}
        assert len(of_seeds) == number
        found += of_seeds
    monkeypatch.setattr(fingerprints, "code_hash", lambda: "other")
    found.append(fingerprint(tmp_path, c))
    assert len(set(found)) == len(found) == 8
