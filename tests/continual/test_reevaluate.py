"""A finished stage is evaluated again: the same result, recorded only on request."""

import pytest
import run_helpers
from device_fixtures import one_device  # noqa: F401

from cptjax.continual import driver, reevaluate

pytestmark = pytest.mark.usefixtures("one_device")


def test_a_stage_is_evaluated_again_with_the_same_result_and_recorded_on_request(tmp_path):
    c, matrix = run_helpers.run_quickly(
        tmp_path, stages=run_helpers.TEXT_STAGES, model=run_helpers.TEXT
    )
    files = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    value = lambda rows, task: next(
        r["value"] for r in rows if r["task"] == task and r["metric"] == "accuracy"
    )
    for stage in (0, 1, 2, None):
        rows = reevaluate.reevaluate_stage(c, tmp_path, stage)
        expected = matrix[2 if stage is None else stage]
        assert [value(rows, t) for t in ("facts", "words")] == list(expected)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == files
    assert {r["task"] for r in reevaluate.reevaluate_stage(c, tmp_path, 1, tasks=("facts",))} == {
        "facts"
    }
    before = len(run_helpers.read_evals(tmp_path))
    added = reevaluate.reevaluate_stage(c, tmp_path, 2, tasks=("facts",), record=True)
    assert len(run_helpers.read_evals(tmp_path)) == before + len(added)
    driver.run(c, tmp_path)  # what was recorded stays
    assert len(run_helpers.read_evals(tmp_path)) == before + len(added)
    for arguments, message in (
        (dict(stage=3), "no finished stage 3"),
        (dict(tasks=("x",)), "--tasks names x; the config evaluates facts, words"),
        (dict(model="m", stage=1), "--model is not a stage"),
    ):
        with pytest.raises(ValueError, match=message):
            reevaluate.reevaluate_stage(c, tmp_path, **arguments)
    for workdir, message in (
        (tmp_path / "typo", "typo: expected the workdir of a run, with the config.json"),
        ("", "--workdir is empty: expected a folder"),
    ):
        with pytest.raises(ValueError, match=message):
            reevaluate.reevaluate_stage(c, workdir)
    assert not (tmp_path / "typo").exists()
    assert reevaluate.format_eval_rows(added).splitlines()[0].split() == list(
        reevaluate.PRINTED_COLUMNS
    )
