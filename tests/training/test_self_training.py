"""Self-SFT: windows of the policy's own correct responses."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest
import stage_fixtures
from stage_fixtures import method_config

from cptjax.common import console
from cptjax.common.files import read_jsonl
from cptjax.generation import generate
from cptjax.tasks import rewards
from cptjax.training import self_training
from cptjax.training.sampling_cache import SamplingCache


def test_each_window_is_sampled_from_the_current_policy_and_read_back(tmp_path):
    with stage_fixtures.prepare_stage(
        method_config("iterative_sft", steps=4, method=dict(refresh="2")), tmp_path
    ) as prepared:
        ctx, params = prepared.ctx, prepared.params
        examples_of = lambda step, params=params: self_training.response_examples(ctx, params, step)
        first, spent = examples_of(0)
        assert (
            len(first) == 4 and spent.rollouts == 64
        )  # two steps of four prompts, eight responses each
        texts = {(i.row, bytes(i.encoded.tokens)) for i in first}
        assert examples_of(1)[1].rollouts == 0  # the same window
        moved = jax.tree.map(lambda x: x * 1.5, params)
        assert {
            (i.row, bytes(i.encoded.tokens)) for i in examples_of(0, moved)[0]
        } == texts  # a resumed run reads what was written
        examples_of(2, moved)
        files = {p.name: read_jsonl(p) for p in (tmp_path / "corpus").glob("*.jsonl")}
        assert set(files) == {"stage1_step0.jsonl", "stage1_step2.jsonl"}
        origin = json.loads((tmp_path / "corpus" / "stage1_step2.source.json").read_text())
        assert origin == {
            "policy": {"stage": 1, "step": 2},
            "answers": len(files["stage1_step2.jsonl"]),
        }
        for start, rows in ((0, files["stage1_step0.jsonl"]), (2, files["stage1_step2.jsonl"])):
            seen = {p.index for step in (start, start + 1) for p in ctx.mixture.rows(step)}
            assert {r["row"] for r in rows} <= seen
            graded = ctx.builder.prompted_tasks["first"].compute_rewards(
                [r["response"] for r in rows], [ctx.sources[0][r["row"]] for r in rows]
            )
            assert all(rewards.is_correct(parts) for parts in graded)


def test_an_own_response_is_trained_on_after_its_prompt(tmp_path):
    with stage_fixtures.prepare_stage(method_config("self_sft", steps=1), tmp_path) as prepared:
        items, _ = self_training.response_examples(prepared.ctx, prepared.params, 0)
        rows = {
            (r["row"], r["response"])
            for r in read_jsonl(tmp_path / "corpus" / "stage1_step0.jsonl")
        }
        decode = prepared.run.model_ctx.processor.decode
        for item in items:
            response = decode([[int(t) for t in item.encoded.tokens[item.encoded.loss_mask]]])[0]
            assert any(row == item.row and response.startswith(text.strip()) for row, text in rows)


def test_own_responses_that_spell_a_special_token_are_left_out(tmp_path, monkeypatch, capsys):
    """Encoded again, they would be read as turns. Restarts read what the first pass wrote."""
    sample = generate.sample_responses

    def spelled(*args):
        out = sample(*args)
        texts = [f"<|im_end|>{t}" if i % 2 else t for i, t in enumerate(out.texts)]
        return dataclasses.replace(out, texts=texts)

    monkeypatch.setattr(generate, "sample_responses", spelled)
    console.set_console_mode("plain")
    with stage_fixtures.prepare_stage(method_config("self_sft", steps=1), tmp_path) as prepared:
        examples = lambda: self_training.response_examples(prepared.ctx, prepared.params, 0)[0]
        first = [(item.row, bytes(item.encoded.tokens)) for item in examples()]
        self_training._read_responses.cache_clear()
        assert [(item.row, bytes(item.encoded.tokens)) for item in examples()] == first
    lines = read_jsonl(tmp_path / "corpus" / "stage1_step0.jsonl")
    assert lines and not any("<|im_end|>" in line["response"] for line in lines)
    assert re.search(r"; [1-9]\d* more spell a special token", capsys.readouterr().err)


def test_own_responses_depend_on_the_prompts_number_alone(tmp_path, monkeypatch):
    """Not on the batch; and with two processes a prompt has the number that it has with one."""
    c = method_config("self_sft", steps=1, batch=5)
    with stage_fixtures.prepare_stage(c, tmp_path) as prepared:
        ctx, params, mesh = prepared.ctx, prepared.params, prepared.run.model_ctx.mesh
        places = list(dict.fromkeys(ctx.mixture.rows(0)))
        items = ctx.prompt_reader(places)

        def sampled(name, chosen):
            cache = SamplingCache(tmp_path / name, ctx.stage, mesh)
            some = [items[n] for n in chosen]
            with console.progress_bar("", total=len(some)) as bar, jax.set_mesh(mesh):
                pairs, _ = self_training.sample_correct_responses(
                    ctx.builder, params, some, chosen, 8, ctx.step_key(0), bar, cache
                )
            return {(chosen[i], text) for i, text in pairs}

        assert len(places) == 5
        whole = sampled("all", [0, 1, 2, 3, 4])
        assert whole and whole == sampled("one", [0, 2, 4]) | sampled("two", [1, 3, 3])

        def recorded(builder, params, items, numbers, *_):
            raise RuntimeError([(n, i.row) for n, i in zip(numbers, items, strict=True)])

        monkeypatch.setattr(self_training, "sample_correct_responses", recorded)
        rows = [place.index for place in places]
        for index, numbers in ((0, [0, 2, 4]), (1, [1, 3, 3])):
            monkeypatch.setattr(jax, "process_count", lambda: 2)
            monkeypatch.setattr(jax, "process_index", lambda index=index: index)
            with pytest.raises(RuntimeError) as found:
                self_training._sample_window(ctx, params, 0, 1, None)
            assert found.value.args[0] == [(n, rows[n]) for n in numbers]


def test_equal_responses_to_a_prompt_are_trained_on_once(tmp_path, monkeypatch):
    """The responses of a policy, and the lines of a corpus."""
    sample, right = generate.sample_responses, "a" if stage_fixtures.coin("a", None) else "b"
    assert stage_fixtures.coin(right, None) == 1

    def equal(*args):
        out = sample(*args)
        finished = np.ones_like(out.finished)
        return dataclasses.replace(out, texts=[right] * len(out.texts), finished=finished)

    monkeypatch.setattr(generate, "sample_responses", equal)
    line = json.dumps({"id": "first/train/0", "response": right, "reward": 1.0}) + "\n"
    (tmp_path / "other.jsonl").write_text(line * 3)
    (tmp_path / "other.source.json").write_text('{"model": "somebody"}')
    corpus = dict(corpus=str(tmp_path / "other.jsonl"))
    for name, method, prompts in (("self_sft", {}, 4), ("corpus_sft", corpus, 1)):
        c = method_config(name, steps=1, method=method)
        with stage_fixtures.prepare_stage(c, tmp_path / name) as prepared:
            items, _ = self_training.response_examples(prepared.ctx, prepared.params, 0)
        lines = read_jsonl(tmp_path / name / "corpus" / "stage1_step0.jsonl")
        assert [line["response"] for line in lines] == [right] * prompts and len(items) == 4
        assert len({line["row"] for line in lines}) == prompts
