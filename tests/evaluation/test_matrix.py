"""Every formula of the accuracy matrix against numbers computed by hand, signs included."""

import math

import numpy as np
import pytest

from cptjax.evaluation import matrix
from cptjax.evaluation.matrix import AccuracyTable, Cell


def make_table(rows, stages, tasks=None, **more):
    tasks = tasks or list(dict.fromkeys(t for s in stages for t in s))
    cells = {
        (i, t): Cell(v, 0.03, 100)
        for i, row in enumerate(rows)
        for t, v in zip(tasks, row, strict=True)
        if v is not None
    }
    return AccuracyTable(tuple(map(tuple, stages)), cells, **more)


THREE = make_table(
    [[0.2, 0.3, 0.4], [0.8, 0.35, 0.4], [0.6, 0.9, 0.5], [0.7, 0.5, 0.95]], ["a", "b", "c"]
)
FOUR = make_table(
    [
        [0.1, 0.2, 0.3, 0.4],
        [0.5, 0.2, 0.3, 0.4],
        [0.7, 0.6, 0.2, 0.4],
        [0.4, 0.8, 0.7, 0.5],
        [0.3, 0.9, 0.5, 0.6],
    ],
    "abcd",
)


@pytest.mark.parametrize(
    "table, name, value, terms",
    [
        (THREE, "avg_acc", 2.15 / 3, 3),
        (THREE, "base_acc", 0.3, 3),
        (THREE, "learned_acc", 2.65 / 3, 3),
        (THREE, "learned_gain", 1.75 / 3, 3),  # .6 + .6 + .55
        (THREE, "fm_peak", -0.25, 2),  # (.7 - .8 + .5 - .9) / 2
        (THREE, "fm_peak_all", -0.5 / 3, 3),
        (THREE, "fm_diagonal", -0.25, 2),
        (THREE, "bwt", -0.25, 2),
        (THREE, "forgetting", 0.25, 2),
        (THREE, "mft", 2.65 / 3, 3),
        (THREE, "mfn", 2.15 / 3, 3),
        (THREE, "fwt", 0.075, 2),  # (.35 - .3 + .5 - .4) / 2
        (THREE, "maa", (0.8 + 0.75 + 2.15 / 3) / 3, 3),
        (THREE, "gain", 1.25 / 3, 3),
        (FOUR, "avg_acc", 0.575, 4),
        (FOUR, "learned_acc", 0.6, 4),
        (FOUR, "learned_gain", 1.4 / 4, 4),
        (FOUR, "fm_peak", -0.2, 3),  # (.3 - .7 + .9 - .9 + .5 - .7) / 3
        (FOUR, "fm_peak_all", -0.15, 4),
        (FOUR, "fm_diagonal", -0.1 / 3, 3),  # (.3 - .5 + .9 - .6 + .5 - .7) / 3
        (FOUR, "bwt", -0.1 / 3, 3),
        (FOUR, "forgetting", 0.5 / 3, 3),  # (.7 - .3 + .8 - .9 + .7 - .5) / 3
        (FOUR, "fwt", 0.0, 3),  # 0 - .1 + .1
        (FOUR, "maa", (0.5 + 0.65 + 1.9 / 3 + 0.575) / 4, 4),
    ],
)
def test_formulas_match_numbers_computed_by_hand(table, name, value, terms):
    found = matrix.forgetting_metrics(table)[name]
    assert found["value"] == pytest.approx(value, abs=1e-12) and found["terms"] == terms
    assert found["formula"] == matrix.FORMULAS[name].text


def test_the_means_of_mrcl_and_mcitlib_and_the_transfer_are_their_papers_formulas():
    """On random plain sequences, with the formulas over matrix indices written out in numpy."""
    rng = np.random.default_rng(0)
    for T in (2, 3, 5, 8):
        R, F = rng.random((T + 1, T)), rng.random(T)
        names = [f"t{j}" for j in range(T)]
        table = make_table(R.tolist(), [[name] for name in names])
        fresh = {("fresh", name): Cell(F[j], 0.03, 100) for j, name in enumerate(names)}
        found = matrix.forgetting_metrics(table, fresh=fresh)
        trained = R[1:]  # trained[i, j]: on task j after stage i, both from 0
        lower = np.tril(np.ones((T, T)))
        expected = {
            "mft": np.trace(trained) / T,
            "mfn": trained[-1].sum() / T,
            "maa": ((trained * lower).sum(1) / np.arange(1, T + 1)).mean(),
            "bwt": (trained[-1, :-1] - np.diag(trained)[:-1]).sum() / (T - 1),
            "fwt": sum(R[j, j] - R[0, j] for j in range(1, T)) / (T - 1),
            "plasticity": (np.diag(trained)[1:] - F[1:]).sum() / (T - 1),
        }
        assert {name: found[name]["value"] for name in expected} == pytest.approx(expected)
        assert found["mft"]["terms"] == found["mfn"]["terms"] == found["maa"]["terms"] == T
        assert found["plasticity"]["terms"] == T - 1


def test_plasticity_is_negative_where_a_fresh_model_learns_more():
    """By hand: b scores .9 in its stage and 1.0 from the base model, c .95 and .9."""
    fresh = {("fresh", task): Cell(v, 0.04, 50) for task, v in (("a", 0.1), ("b", 1.0), ("c", 0.9))}
    found = matrix.forgetting_metrics(THREE, fresh=fresh)["plasticity"]
    assert found["value"] == pytest.approx((-0.1 + 0.05) / 2) and found["terms"] == 2
    assert found["stderr"] == pytest.approx(math.sqrt(2 * (0.03**2 + 0.04**2)) / 2)
    assert matrix.forgetting_metrics(THREE)["plasticity"]["value"] is None
    del fresh["fresh", "c"]
    assert matrix.forgetting_metrics(THREE, fresh=fresh)["plasticity"]["value"] == pytest.approx(
        -0.1
    )


def test_the_final_mean_of_a_part_leaves_out_tasks_that_are_not_trained_yet():
    part = make_table([[0.2, 0.3, 0.4], [0.8, 0.3, 0.4], [0.6, 0.9, 0.5]], ["a", "b", "c"])
    found = matrix.forgetting_metrics(part)
    assert found["mfn"]["value"] == pytest.approx(0.75)
    assert found["avg_acc"]["value"] == pytest.approx(2.0 / 3)


def test_the_peak_since_the_tasks_own_stage_leaves_out_zero_shot_scores():
    """Task b scores best, 0.9, before it is trained: fm_peak counts that, fm_peak_own does not."""
    t = make_table([[0.1, 0.8, 0], [0.5, 0.9, 0], [0.4, 0.7, 0], [0.3, 0.6, 1]], ["a", "b", "c"])
    found = matrix.forgetting_metrics(t)
    assert found["fm_peak"]["value"] == pytest.approx((0.3 - 0.5 + 0.6 - 0.9) / 2)
    assert found["fm_peak_own"]["value"] == pytest.approx((0.3 - 0.5 + 0.6 - 0.7) / 2)


def test_intransigence_is_positive_where_joint_training_learned_more():
    joint = make_table([[0.2, 0.3, 0.4], [0.9, 1.0, 0.9]], [("a", "b", "c")])
    assert matrix.forgetting_metrics(THREE, joint)["intransigence"]["value"] == pytest.approx(
        (0.1 + 0.1 - 0.05) / 3
    )
    assert matrix.forgetting_metrics(THREE)["intransigence"]["value"] is None
    own = matrix.forgetting_metrics(joint)
    assert own["fm_peak"]["value"] is own["fm_peak_all"]["value"] is None
    assert own["forgetting"]["terms"] == 0 and own["avg_acc"]["value"] == pytest.approx(2.8 / 3)


def test_a_task_trained_twice_and_a_joint_stage():
    t = make_table(
        [
            [0, 0, 0, 0],
            [0.5, 0, 0, 0],
            [0.1, 0.6, 0.1, 0],
            [0.8, 0.4, 0.3, 0.2],
            [0.6, 0.5, 0.9, 0.7],
        ],
        ["a", "b", "a", ("c", "d")],
        tasks="abcd",
    )
    found = {name: n["value"] for name, n in matrix.forgetting_metrics(t).items()}
    assert t.last("a") == 3 and t.first("a") == 1 and t.old() == ["a", "b"]
    assert found["learned_acc"] == pytest.approx((0.8 + 0.6 + 0.9 + 0.7) / 4)
    assert found["fm_diagonal"] == pytest.approx((0.6 - 0.8 + 0.5 - 0.6) / 2)
    assert found["fwt"] == pytest.approx(
        (0 + 0.3 + 0.2) / 3
    )  # b before stage 2, c and d before stage 4
    assert found["maa"] == pytest.approx((0.5 + 0.35 + 0.6 + 0.675) / 4)
    stage4 = matrix.per_stage_metrics(t)[3]
    assert stage4["gain"] == pytest.approx((0.6 + 0.5) / 2) and stage4["drop"] == pytest.approx(
        (0.2 - 0.1) / 2
    )


def test_general_tasks_and_paper_c_signs():
    rows = [[0.2, 0.9], [0.8, 0.5]]
    found = matrix.forgetting_metrics(make_table(rows, ["a"], tasks=["a", "facts"]))
    assert found["general_delta"]["value"] == pytest.approx(-0.4) and found["drop"][
        "value"
    ] == pytest.approx(0.4)
    assert found["gain"]["value"] == pytest.approx(0.6) and found["avg_acc"]["terms"] == 1
    stage = matrix.per_stage_metrics(make_table(rows, ["a"], tasks=["a", "facts"]))[0]
    assert stage["drop"] == stage["loss"] == pytest.approx(0.4)


def test_groups_of_general_tasks_have_numbers_of_their_own():
    rows, names = [[0.2, 0.9, 0.8, 1.0], [0.8, 0.5, 0.6, 1.0]], ["a", "facts", "sums", "puzzle"]
    forced = make_table([[0.2, 0.9, 0.8, 1.0], [0.8, 0.9, 0.7, 1.0]], ["a"], tasks=names).cells
    t = make_table(rows, ["a"], tasks=names, forced=forced, groups={"text": ("facts", "sums")})
    found = matrix.forgetting_metrics(t)
    assert (
        found["text"]["value"] == pytest.approx(-0.3)
        and found["text"]["terms"] == 2
        and found["text"]["better"] == "higher"
    )
    assert found["text_forced"]["value"] == pytest.approx(-0.05) and found["general_delta"][
        "value"
    ] == pytest.approx(-0.2)
    assert "facts, sums" in found["text"]["formula"]


def test_partial_runs_are_measured_at_their_last_complete_row():
    t = make_table(
        [[0.2, 0.3, 0.4], [0.8, None, 0.4], [0.6, 0.9, 0.5], [0.7, None, None]], ["a", "b", "c"]
    )
    found = matrix.forgetting_metrics(t)
    assert t.final == 2 and not t.finished
    assert (
        found["fm_diagonal"]["value"] == pytest.approx(-0.2) and found["fm_diagonal"]["terms"] == 1
    )
    assert found["fwt"]["terms"] == 1  # b was not measured before its stage
    assert math.isnan(t.array()[1, 1])


def test_a_peak_over_an_unmeasured_cell_is_left_out():
    """Task a was not measured after its own stage, where it may have scored best."""
    rows = [[0.1, 0.1, 0.1], [None, 0.1, 0.1], [0.5, 0.8, 0.1], [0.5, 0.6, 0.9]]
    found = matrix.forgetting_metrics(make_table(rows, "abc"))
    for name, value in (("fm_peak", -0.2), ("fm_peak_own", -0.2), ("forgetting", 0.2)):
        assert found[name]["value"] == pytest.approx(value) and found[name]["terms"] == 1
    only_a = matrix.forgetting_metrics(make_table([row[:2] for row in rows[:3]], "ab"))
    for name in ("fm_peak", "fm_peak_own", "fm_diagonal", "forgetting"):
        assert only_a[name]["value"] is None and only_a[name]["terms"] == 0


def test_only_a_base_row_gives_a_base_and_no_claim():
    found = matrix.forgetting_metrics(make_table([[0.2, 0.9]], ["a"], tasks=["a", "facts"]))
    assert found["base_acc"]["value"] == 0.2
    assert all(
        found[name]["value"] is None
        for name in ("learned_acc", "fm_peak", "gain", "general_delta", "drop", "maa")
    )
    assert found["avg_acc"]["value"] is None  # of the base model, it is base_acc


def test_intervals_follow_from_the_cells():
    found = matrix.forgetting_metrics(THREE)
    assert found["avg_acc"]["stderr"] == pytest.approx(0.03 / math.sqrt(3))
    assert found["fm_diagonal"]["stderr"] == pytest.approx(0.03)  # four cells with weight 1/2
    assert found["fm_diagonal"]["ci95"] == pytest.approx([-0.25 - 1.96 * 0.03, -0.25 + 1.96 * 0.03])
    steady = make_table(
        [[0.1, 0.1], [0.5, 0.1], [0.6, 0.7]], "ab"
    )  # the peak is the last row: no change, and none to doubt
    assert matrix.forgetting_metrics(steady)["fm_peak"] | {"formula": 0} == {
        "value": 0.0,
        "stderr": 0.0,
        "ci95": [0.0, 0.0],
        "terms": 1,
        "formula": 0,
        "better": "higher",
    }


def test_forced_prefix_splits_format_from_knowledge():
    free = [[0.2, 0.3, 1.0], [0.9, 0.3, 0.6], [0.1, 0.9, 0.2]]
    forced = [[0.2, 0.3, 1.0], [0.9, 0.3, 1.0], [0.8, 0.9, 0.9]]
    t = make_table(
        free,
        ["a", "b"],
        tasks=["a", "b", "facts"],
        forced=make_table(forced, ["a", "b"], tasks=["a", "b", "facts"]).cells,
        gold={(i, "facts"): Cell(p) for i, p in enumerate((0.5, 0.4, 0.2))},
    )
    found = matrix.forgetting_metrics(t)
    assert found["fm_diagonal"]["value"] == pytest.approx(-0.8) and found["fm_forced"][
        "value"
    ] == pytest.approx(-0.1)
    assert found["general_delta_forced"]["value"] == pytest.approx(-0.1)
    assert found["general_delta_gold"]["value"] == pytest.approx(-0.3)
    assert found["fm_gold"]["value"] is None  # not measured on the stages' tasks
    share = matrix.measure_format_share(t)
    assert (share["loss"], share["loss_forced"]) == (pytest.approx(0.8), pytest.approx(0.1))
    assert share["value"] == pytest.approx(1 - 0.1 / 0.8)
    assert matrix.measure_format_share(THREE)["value"] is None
