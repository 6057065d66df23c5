"""IFEval's and RLVR-IFeval's rows keep their constraints, those on the language too."""

import pytest
from hub_fixtures import FIXTURES, write

from cptjax.tasks.registry import BUILT_IN_TASKS
from cptjax.tasks.scoring import language


def test_every_row_is_kept_and_an_unknown_constraint_is_named(tmp_path):
    ((path, features, rows),) = FIXTURES["ifeval"][0]
    write(tmp_path, FIXTURES["ifeval"][0])
    examples = BUILT_IN_TASKS["ifeval"].load("test", root=str(tmp_path))
    assert [e.answer[0]["id"] for e in examples] == [
        "punctuation:no_comma",
        "language:response_language",
    ]
    write(tmp_path, [(path, features, [rows[0] | {"instruction_id_list": ["a:b", "c:d"]}])])
    with pytest.raises(ValueError, match="unknown constraint 'a:b'; known: keywords:existence"):
        BUILT_IN_TASKS["ifeval"].load("test", root=str(tmp_path))[0]


def test_training_rows_are_rewarded_by_their_own_checks(tmp_path):
    write(tmp_path, FIXTURES["retain_ifeval"][0])
    task = BUILT_IN_TASKS["ifeval"]
    example = task.load("train", root=str(tmp_path))[0]
    assert example.answer["func_name"] == "validate_lowercase" and task.reward == "rlvr_ifeval"
    assert example.meta["constraint_type"] == "All Lowercase"


def test_a_missing_language_detector_is_reported_before_any_step(tmp_path, monkeypatch):
    write(tmp_path, FIXTURES["ifeval"][0])
    monkeypatch.setattr(language.importlib.util, "find_spec", lambda name: None)
    message = r"task ifeval: .* need the package langdetect, .*pip install 'cptjax\[ifeval\]'"
    with pytest.raises(ValueError, match=message):
        BUILT_IN_TASKS["ifeval"].load("test", root=str(tmp_path))
    assert len(BUILT_IN_TASKS["ifeval"].load("test", root=str(tmp_path), limit=0)) == 0
