"""Responses of another run: correct ones, graded ones, inserted gold answers, refused files."""

import dataclasses
import hashlib
import json
import types

import pytest
import stage_fixtures
from stage_fixtures import method_config

from cptjax.common.files import read_jsonl
from cptjax.tasks import prompt_templates
from cptjax.training import corpus, self_training
from cptjax.types import Example


def corpus_config(tmp_path, rows, **method):
    path = tmp_path / "other.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return method_config(
        "corpus_sft",
        steps=1,
        batch=2,
        method=dict(corpus=str(path), **method),
        data=dict(prompt_limit=128, buckets=(128,)),
    )


def trained_texts(c, folder):
    with stage_fixtures.prepare_stage(c, folder) as prepared:
        self_training.response_examples(prepared.ctx, prepared.params, 0)
    return {(r["id"], r["response"]) for r in read_jsonl(folder / "corpus" / "stage1_step0.jsonl")}


def test_a_corpus_gives_its_correct_responses_and_grades_the_others(tmp_path):
    right = next(w for w in ("a", "b", "c", "d", "e") if stage_fixtures.coin(w, None) == 1)
    wrong = next(w for w in ("a", "b", "c", "d", "e") if stage_fixtures.coin(w, None) == 0)
    rows = [
        {"id": "first/train/0", "response": "kept", "rewards": {"reward": 0.9, "accuracy": 1.0}},
        {"id": "first/train/1", "response": "dropped", "rewards": {"reward": 0.1, "accuracy": 0.0}},
        {"id": "first/train/2", "response": "whole", "reward": 1.0},
        {"id": "first/train/3", "response": right},  # no reward: the task's own says
        {"id": "first/train/3", "response": wrong},
        {
            "id": "first/train/4",
            "response": "cut",
            "reward": 1.0,
            "finished": False,
        },  # it met its length limit
        {"id": "first/train/4", "response": "uncut", "reward": 1.0, "finished": True},
    ]
    want = {
        ("first/train/0", "kept"),
        ("first/train/2", "whole"),
        ("first/train/3", right),
        ("first/train/4", "uncut"),
    }
    assert trained_texts(corpus_config(tmp_path, rows), tmp_path / "run") == want
    origin = json.loads((tmp_path / "run" / "corpus" / "stage1_step0.source.json").read_text())
    path = tmp_path / "other.jsonl"
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    assert origin == {"corpus": str(path), "sha256": sha256, "rows": 7, "answers": 4}


def test_rows_with_responses_may_be_longer_than_the_prompt_limit(tmp_path):
    """Rows may be longer than prompts by a response, and their lengths are one of a few buckets."""
    c = corpus_config(
        tmp_path,
        [
            {"id": f"first/train/{i}", "response": "it is " * 14 + "red", "reward": 1.0}
            for i in range(4)
        ],
    )
    c.data.update(prompt_limit=32, buckets=(16, 32))
    c.rollout.max_new_tokens = 31
    with stage_fixtures.prepare_stage(c, tmp_path / "run") as prepared:
        items, _ = self_training.response_examples(prepared.ctx, prepared.params, 0)
        assert all(32 < len(i.encoded) < 64 for i in items)
        (batch,) = prepared.ctx.builder.conversation_batches(items)
        assert batch.prompts.tokens.shape[1] == 64 and prepared.ctx.builder.model_ctx.buckets == (
            16,
            32,
        )
    c.rollout.max_new_tokens = 4
    with pytest.raises(
        ValueError,
        match=r"other.jsonl': first/train/0 with its response has \d+ tokens, over the 37 of a prompt",
    ):
        trained_texts(c, tmp_path / "short")


def test_a_corpus_with_the_gold_answer_inserted(tmp_path):
    rows = [
        {
            "id": "first/train/0",
            "response": "<think>well</think><answer>wrong</answer>",
            "rewards": {"accuracy": 0.0},
        },
        {"id": "first/train/1", "response": "no answer", "rewards": {"accuracy": 0.0}},
    ]
    c = corpus_config(tmp_path, rows, corpus_answer="gold")
    c.tasks["first"].template = "answer"
    c.data.update(prompt_limit=256, buckets=(256,))
    with stage_fixtures.prepare_stage(c, tmp_path / "run") as prepared:
        gold = [prepared.ctx.sources[0][i].answer for i in (0, 1)]
    put_in = (
        f"<think>well</think><answer>{gold[0]}</answer>",
        f"no answer\n<answer>{gold[1]}</answer>",
    )
    want = {(f"first/train/{i}", text) for i, text in enumerate(put_in)}
    assert trained_texts(c, tmp_path / "run") == want
    with pytest.raises(ValueError, match="needs a boxed or tagged answer"):
        trained_texts(corpus_config(tmp_path, rows, corpus_answer="gold"), tmp_path / "plain")


def test_the_gold_answer_is_inserted_in_the_form_that_the_question_asks_for():
    template = prompt_templates.load_template("answer")
    prompted = {"jigsaw": types.SimpleNamespace(template=template)}
    example = Example("jigsaw/train/0", [], [2, 1, 3], "2 1 3", task="jigsaw")
    insert = corpus._put_gold_answer
    assert insert(prompted, example, "<think>x</think><answer>3") == (
        "<think>x</think><answer>2 1 3</answer>"
    )
    with pytest.raises(ValueError, match="jigsaw/train/0 has no gold answer to insert"):
        insert(prompted, dataclasses.replace(example, target=""), "x")


BAD = {
    "empty": ([], "no lines"),
    "other keys": ([{"prompt": "a"}], "the keys prompt"),
    "unknown row": (
        [{"id": "second/train/0", "response": "a", "reward": 1.0}],
        "1 of its ids are not in the stage's data",
    ),
    "none right": (
        [{"id": "first/train/0", "response": "a", "reward": 0.0}],
        "none of its 1 responses is correct",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_an_unusable_corpus_is_refused_in_one_line(name, tmp_path):
    rows, expected = BAD[name]
    with pytest.raises(ValueError) as error:
        trained_texts(corpus_config(tmp_path, rows), tmp_path / "run")
    assert expected in str(error.value) and "\n" not in str(error.value)
