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
    (tmp_path / "other.source.json").write_text('{"model": "somebody"}')
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
        # It would be read as the end of a turn.
        {"id": "first/train/5", "response": "a<|im_end|>", "reward": 1.0},
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
    provenance = {"model": "somebody"}
    assert origin == {
        **{"corpus": str(path), "provenance": provenance, "sha256": sha256},
        **{"rows": 8, "answers": 4},
    }


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
    "other keys": ([{"prompt": "a"}], "got {'prompt': 'a'}"),
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


def test_a_corpus_of_unknown_origin_is_refused_in_one_line(tmp_path):
    c = corpus_config(tmp_path, [{"id": "first/train/0", "response": "a", "reward": 1.0}])
    (tmp_path / "other.source.json").unlink()
    with pytest.raises(ValueError, match="has no provenance: expected other.source.json") as error:
        trained_texts(c, tmp_path / "run")
    assert "\n" not in str(error.value)
    rollouts = tmp_path / "theirs" / "rollouts" / "stage1.jsonl"  # of a run: its config tells
    rollouts.parent.mkdir(parents=True)
    (tmp_path / "other.jsonl").rename(rollouts)
    (tmp_path / "theirs" / "config.json").write_text("{}")
    assert corpus.find_provenance(rollouts, "x") == {"run": str(tmp_path / "theirs")}


def test_gold_answers_and_a_corpus_in_one_stage_each_with_its_template(tmp_path):
    """Every gold answer under data.template, every correct response under corpus_template."""
    rows = [
        {"id": f"first/train/{i}", "response": f"say {i}", "reward": float(i < 4)}
        for i in (0, 1, 2, 3, 4)
    ]
    c = corpus_config(
        tmp_path,
        [*rows, {"id": "first/train/0", "response": "again", "reward": 1.0}],
        source="gold+corpus",
        corpus_template="answer",
        epoch_unit="responses",
    )
    c.tasks["first"].template, c.data.template = "", "none"
    c.stages = (dict(task="first", epochs=2),)
    with stage_fixtures.prepare_stage(c, tmp_path / "run") as prepared:
        ctx = prepared.ctx
        assert len(ctx.sources[0]) == 8 and ctx.steps == 2 * (8 + 5) / 2  # of batches of two
        decode = prepared.run.model_ctx.processor.decode
        seen = []
        for step in range(ctx.steps):
            for item in self_training.response_examples(ctx, prepared.params, step)[0]:
                prompt = decode([[int(t) for t in item.encoded.tokens]])[0]
                said = decode([[int(t) for t in item.encoded.tokens[item.encoded.loss_mask]]])[0]
                seen.append((item.row, said.strip(), "<answer>" in prompt.removesuffix(said)))
    gold = [(i, example.target, False) for i, example in enumerate(ctx.sources[0])]
    theirs = [(i, f"say {i}", True) for i in range(4)] + [(0, "again", True)]
    assert sorted(seen) == sorted(2 * (gold + theirs))


def test_success_counts_of_a_graded_corpus(tmp_path):
    lines = [
        {"id": f"r{q}", "response": "a", "rewards": {"reward": r, "accuracy": r}}
        for q, graded in enumerate(((1, 0, 1, 1), (0, 0, 0, 1), (1, 1, 1, 1)))
        for r in map(float, graded)
    ]
    corpus_config(tmp_path, lines)
    file = str(tmp_path / "other.jsonl")
    count = lambda ids, samples: corpus.count_correct_responses(file, ids, samples).tolist()
    assert count(["r0", "r1", "r2"], 4) == [3, 1, 4] and count(["r2", "r1"], 3) == [3, 0]
    with pytest.raises(ValueError, match="expected 8 responses to each row, got 4 to 'r0'"):
        count(["r0"], 8)
    with pytest.raises(ValueError, match="got 0 to 'r9' .1 rows"):
        count(["r0", "r9"], 2)
