"""Frontiers and losses at matched accuracy against numbers computed by hand."""

import pytest

from cptjax.analysis import finding, pareto
from cptjax.analysis.pareto import ArmPoint
from cptjax.common import files, run_log

SFT = [ArmPoint("sft", a, x, y) for a, x, y in (("1", 0.4, 0.1), ("2", 0.6, 0.3), ("3", 0.8, 0.5))]
RL = [ArmPoint("rl", a, x, y) for a, x, y in (("1", 0.5, 0.02), ("2", 0.7, 0.04), ("3", 0.6, 0.2))]


def test_the_frontier_has_the_points_that_no_other_beats():
    assert [p.arm for p in pareto.frontier(RL)] == ["1", "2"]  # the third is worse than the second
    assert pareto.frontier(SFT[::-1]) == SFT


def test_the_loss_at_an_accuracy_is_read_off_the_frontier():
    assert pareto.loss_at(SFT, 0.7) == pytest.approx(0.4)
    assert pareto.loss_at(RL, 0.6) == pytest.approx(0.03)
    assert pareto.loss_at(SFT, 0.1) == pytest.approx(0.1)  # its first point reaches more than that
    assert pareto.loss_at(RL, 0.71) is None


def test_methods_are_compared_at_what_all_of_them_reach():
    numbers = pareto.pareto_finding(SFT + RL, base=0.3).numbers
    assert numbers["matched_accuracy"] == 0.7  # of rl, which learns less
    assert numbers["loss_at_matched_accuracy"] == pytest.approx({"rl": 0.04, "sft": 0.4})
    assert numbers["levels"] == pytest.approx([0.4, 0.5, 0.6, 0.7])
    assert numbers["losses"]["sft"] == pytest.approx([0.1, 0.2, 0.3, 0.4])


def test_the_limiting_method_has_a_loss_at_the_matched_accuracy():
    """Also where base + 1.0 * (matched - base) is above the matched accuracy by rounding."""
    base, matched = next(
        (b / 192, m / 192)
        for b in range(1, 60)
        for m in range(100, 192)
        if b / 192 + 1.0 * (m / 192 - b / 192) > m / 192
    )
    points = [ArmPoint("sft", "1", matched, 0.2), ArmPoint("rl", "2", matched + 0.05, 0.05)]
    numbers = pareto.pareto_finding(points, base).numbers
    assert numbers["loss_at_matched_accuracy"] == {"rl": 0.05, "sft": 0.2}
    assert numbers["levels"][-1] == matched and len(numbers["levels"]) == 4


def test_without_a_base_accuracy_methods_are_compared_only_at_the_matched_one():
    found = pareto.pareto_finding(SFT + RL, None)
    assert found.numbers["levels"] == [0.7]
    assert found.sentences[0].startswith("At 70.0 % on the new tasks, the others change")


def write_run(folder, method, accuracy, loss, seed=0):
    """A workdir of one stage with an accuracy on its task, and a loss on a general task."""
    log = run_log.RunLog(folder)
    for stage, task, value in (
        (0, "t", 0.2),
        (0, "g", 0.9),
        (1, "t", accuracy),
        (1, "g", 0.9 - loss),
    ):
        values = (stage, "s", 1, task, "accuracy", value, 100, 0.01, "exact", "none", "1", "greedy")
        log.evals([dict(zip(run_log.EVAL_COLUMNS, values, strict=True))])
    log.close()
    config = {
        **{"name": folder.name, "seed": seed, "stages": [{"task": "t", "steps": 1}]},
        **{"method": {"name": method}, "eval": {"tasks": "all", "general": ["g"], "groups": {}}},
    }
    files.write_json(folder / "config.json", config)


def test_arms_of_a_sweep_with_seeds_become_points_of_their_method(tmp_path):
    write_run(tmp_path / "sft_low", "sft", 0.5, 0.1)
    write_run(tmp_path / "sft_high", "sft", 0.9, 0.5)
    for seed, loss in enumerate((0.02, 0.04)):
        write_run(tmp_path / "rl" / f"seed{seed}", "grpo", 0.7, loss, seed)
    found = pareto.analyze([tmp_path])
    numbers = found.numbers
    assert numbers["matched_accuracy"] == pytest.approx(0.7)
    assert numbers["loss_at_matched_accuracy"] == pytest.approx({"grpo": 0.03, "sft": 0.3})
    assert {p["arm"]: p["method"] for p in numbers["points"]} == {
        **{"sft_low": "sft", "sft_high": "sft"},
        "rl": "grpo",
    }
    assert "At 70.0 % on the new tasks" in found.sentences[0]
    assert "grpo -3.0, sft -30.0." in found.sentences[0]
    page = finding.write_finding(found, tmp_path / "page.html").read_text()
    assert page.count("<svg") == 1 and "FM peak, own stage on" in page


def test_arms_that_did_not_evaluate_the_base_model_do_not_count_as_0(tmp_path):
    write_run(tmp_path / "sft", "sft", 0.9, 0.5)
    write_run(tmp_path / "rl", "grpo", 0.6, 0.1)
    evals = tmp_path / "rl" / "evals.csv"
    lines = evals.read_text().splitlines(True)
    evals.write_text("".join(line for line in lines if not line.startswith("0,s,1,t")))
    found = pareto.analyze([tmp_path])
    assert "(base model: 20.0 %)" in found.sentences[0]
    assert found.numbers["levels"] == pytest.approx([0.3, 0.4, 0.5, 0.6])


def test_only_finished_runs_are_points(tmp_path):
    """A run of two stages that has finished the first, and one seed of two."""
    write_run(tmp_path / "sft", "sft", 0.9, 0.5)
    write_run(tmp_path / "rl" / "seed0", "grpo", 0.6, 0.1)
    for folder in (tmp_path / "rl" / "seed1", tmp_path / "other"):
        write_run(folder, "grpo", 0.8, 0.7, seed=1)
        config = files.read_json(folder / "config.json")
        stages = [*config["stages"], {"task": "u", "steps": 1}]
        files.write_json(folder / "config.json", config | {"stages": stages})
    found = pareto.analyze([tmp_path]).numbers["points"]
    assert [(p["arm"], p["accuracy"], p["sd"]) for p in found] == [
        ("sft", 0.9, None),
        ("rl", 0.6, None),
    ]
    assert found[1]["loss"] == pytest.approx(0.1)


def test_a_method_that_learns_nothing_is_named_and_not_compared(tmp_path):
    """Its accuracy is below that of the base model, 20 %."""
    write_run(tmp_path / "self", "self", 0.1, 0.3)
    write_run(tmp_path / "sft", "sft", 0.9, 0.5)
    write_run(tmp_path / "rl", "grpo", 0.6, 0.1)
    found = pareto.analyze([tmp_path])
    assert found.numbers["matched_accuracy"] == pytest.approx(0.6)
    assert found.numbers["losses"]["self"] == [None] * 4
    assert found.numbers["losses"]["grpo"][-1] == pytest.approx(0.1)
    first, second = found.sentences[0].split("%),")
    assert first.startswith("At 60.0 % on the new tasks (base model: 20.0")
    assert "grpo -10.0, sft -50.0" in second and "not above" in second.lower()
    assert "self" in second and [row[-1] for row in found.tables[0].rows][-1] == ""
    finding.write_finding(found, tmp_path / "page.html")


def test_methods_that_all_learn_nothing_are_compared_where_the_worst_ends(tmp_path):
    write_run(tmp_path / "self", "self", 0.1, 0.3)
    write_run(tmp_path / "sft", "sft", 0.15, 0.5)
    found = pareto.analyze([tmp_path])
    assert found.numbers["levels"] == pytest.approx([0.1])
    assert found.numbers["losses"] == {"self": pytest.approx([0.3]), "sft": pytest.approx([0.5])}
