"""IFEval's and RLVR's constraints are ones that the scorer can check."""

import json
import logging

from hub_fixtures import FIXTURES, write

from cptjax.tasks.datasets import ifeval
from cptjax.tasks.registry import BUILT_IN_TASKS
from cptjax.tasks.scoring.instructions import follows_constraint


def test_every_rlvr_constraint_is_one_that_the_scorer_can_check():
    arguments = {
        "N": 2,
        "quantifier": "around",
        "keyword_list": ["a"],
        "word": "a",
        "forbidden_words": ["b"],
        "letter": "a",
        "i": 1,
        "language": "hi",
        "first_word": "a",
        "postscript_marker": "P.S.",
        "section_splitter": "Section",
        "original_prompt": "say",
        "end_phrase": "end",
    }
    for function in set(ifeval.RLVR_INSTRUCTIONS) - {"validate_response_language"}:
        for constraint in ifeval.translate_constraint(
            json.dumps({"func_name": function, **arguments})
        ):
            assert follows_constraint("a reply", constraint) in (True, False)
    exactly = ifeval.translate_constraint(
        json.dumps({"func_name": "verify_keyword_frequency", "word": "ha", "N": 2})
    )
    assert [
        all(follows_constraint(text, c) for c in exactly) for text in ("ha", "ha ha", "ha ha ha")
    ] == [False, True, False]
    assert ifeval.count_bounds("at most", 5) == [("less than", 6)] and ifeval.count_bounds(
        "around", 30
    ) == [("at least", 27), ("less than", 34)]


def test_ifeval_logs_how_many_rows_it_leaves_out(tmp_path, caplog):
    write(tmp_path, FIXTURES["ifeval"][0])
    with caplog.at_level(logging.WARNING, "cptjax"):
        assert len(BUILT_IN_TASKS["ifeval"].load("test", root=str(tmp_path))) == 1
    assert "ifeval/test: 1 rows with a constraint that cannot be checked" in caplog.text
