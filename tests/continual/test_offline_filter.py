"""The offline prompt filter and its control keep equally many prompts, decided once."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import stage_fixtures
from stage_fixtures import method_config

from cptjax.common.files import read_jsonl
from cptjax.continual import offline_filter, train_stage
from cptjax.generation import generate
from cptjax.training.sampling_cache import SamplingCache


def test_the_offline_filter_and_its_random_control_keep_equally_many(tmp_path):
    kept = {}
    for name in ("incompetent", "zero_variance", "random"):
        c = method_config(
            "grpo", method=dict(filter=dict(name=name, samples=2), kl_coef=0.0), data=dict(limit=16)
        )
        _, _, lines = stage_fixtures.train_all_stages(c, tmp_path / name)
        found = read_jsonl(tmp_path / name / "filters" / "stage1_first.jsonl")
        counts = np.array([r["correct"] for r in found])
        (metrics,) = [line for line in lines if line.get("event") == "filter"]
        assert len(counts) == 16 and metrics["rollouts"] == 32 and metrics["flops"] > 0
        assert (metrics["filter/never"], metrics["filter/always"]) == (
            (counts == 0).mean(),
            (counts == 2).mean(),
        )
        kept[name] = metrics["filter/rows"]
        assert [r["kept"] for r in found] == (counts >= 1).tolist() or name != "incompetent"
        assert sum(r["kept"] for r in found) == kept[name] == 16 * metrics["filter/kept"]
        rows = {r["id"] for r in read_jsonl(tmp_path / name / "rollouts" / "stage1.jsonl")}
        good = {"incompetent": counts >= 1, "zero_variance": counts == 1}.get(
            name, np.ones(16, bool)
        )
        assert rows <= {f"first/train/{i}" for i in np.flatnonzero(good)}
        assert kept[name] == (good.sum() if name != "random" else kept["incompetent"])
    assert 0 < kept["zero_variance"] < kept["incompetent"] == kept["random"] < 16


def test_a_control_of_another_run_keeps_as_many_and_samples_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(
        offline_filter, "count_correct", lambda *_: pytest.fail("responses were sampled")
    )
    theirs = tmp_path / "theirs" / "filters" / "stage1_first.jsonl"
    theirs.parent.mkdir(parents=True)
    theirs.write_text(
        "".join(
            json.dumps({"row": i, "id": f"first/train/{i}", "kept": i < 3}) + "\n" for i in range(8)
        )
    )

    def ids(like, limit=8):
        control = dict(filter=dict(name="random", like=str(tmp_path / like)), kl_coef=0.0)
        with stage_fixtures.prepare_stage(
            method_config("grpo", method=control, data=dict(limit=limit)),
            tmp_path / f"{like}{limit}",
        ) as prepared:
            return [e.id for e in prepared.ctx.sources[0]]

    found = ids("theirs")
    rows = read_jsonl(tmp_path / "theirs8" / "filters" / "stage1_first.jsonl")
    assert (
        [r["id"] for r in rows if r["kept"]] == found
        and len(rows) == 8
        and "correct" not in rows[0]
    )
    assert len(found) == 3 and found != [f"first/train/{i}" for i in range(3)]
    for like, limit, expected in (
        ("theirs", 6, "expected the 6 prompts .*, got 8 prompts"),
        ("none", 8, "expected the 8 prompts .*, got a missing or empty file"),
    ):
        with pytest.raises(ValueError, match=expected):
            ids(like, limit)


def test_a_filter_is_decided_once(tmp_path, monkeypatch):
    c = method_config("grpo", method=dict(filter=dict(name="incompetent", samples=2), kl_coef=0.0))
    with stage_fixtures.prepare_stage(c, tmp_path) as prepared:
        monkeypatch.setattr(
            offline_filter, "count_correct", lambda *_: pytest.fail("counted again")
        )
        again = train_stage.make_stage_context(
            prepared.run, prepared.ctx.stage, prepared.params, None
        )
        assert [e.id for e in again.sources[0]] == [e.id for e in prepared.ctx.sources[0]]


def test_each_prompt_of_a_filter_has_its_own_random_stream(tmp_path, monkeypatch):
    """Copies of a prompt get other responses, in other batches and under other tasks."""
    sample, texts = generate.sample_responses, []

    def recorded(*args):
        out = sample(*args)
        texts.append(out.texts)
        return out

    monkeypatch.setattr(generate, "sample_responses", recorded)
    filter = dict(name="window", samples=8, lo=0, hi=8)
    c = method_config("grpo", stages=2, method=dict(filter=filter, kl_coef=0.0))
    c.stages = (dict(task=("first", "second"), steps=1),)
    with stage_fixtures.prepare_stage(c, tmp_path) as prepared:
        texts.clear()
        ctx = prepared.ctx
        sampling = dataclasses.replace(ctx.builder.sampling, group=8)
        builder = dataclasses.replace(ctx.builder, sampling=sampling)
        for name in ctx.stage.tasks:
            cache = SamplingCache(tmp_path / f"{name}.jsonl", ctx.stage, builder.model_ctx.mesh)
            copies = [ctx.sources[0][0]] * 12
            with jax.set_mesh(builder.model_ctx.mesh):
                offline_filter.count_correct(
                    ctx.stage, builder, prepared.params, name, copies, 8, cache
                )
    groups = [tuple(t[q * 8 : (q + 1) * 8]) for t in texts for q in range(4)]
    assert len(groups) == len(set(groups)) == 24
