"""Teachers: prompts, weights, and no gradient from a teacher that equals the student."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import stage_fixtures
from stage_fixtures import SMALL_TEXT

import cptjax
from configs import base
from cptjax.continual import resume, train_stage
from cptjax.data import prompts
from cptjax.data.datasets import Datasets
from cptjax.models import decoder, logprobs, packed_groups
from cptjax.models.hf_checkpoint import save_hf_checkpoint
from cptjax.training.algorithms import distillation
from cptjax.training.stage_context import StageProgress
from cptjax.training.train_loop import next_step_batch


def config(method="sdft", **changes):
    c = base.get_config()
    c.stages = (dict(task="first", steps=2),)
    c.method.update({**base.METHODS[method], **changes})
    c = stage_fixtures.tiny(c, batch=4)
    c.rollout.group = 1
    return c


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    with stage_fixtures.prepare_stage(config(), tmp_path_factory.mktemp("sdft")) as prepared:
        yield prepared


def _first_updates(prepared):
    with prepared.ctx.open_stream(0) as stream:
        return list(next_step_batch(prepared.ctx, prepared.params, stream, StageProgress()).updates)


def test_demonstration_of_nothing_gives_zero_gradient(prepared, monkeypatch):
    (update,) = _first_updates(prepared)
    _, metrics = prepared.update(update)
    assert metrics["kl_teacher"] > 1e-6 and metrics["grad_norm"] > 1e-3
    monkeypatch.setattr(
        distillation,
        "demonstration_prompt",
        lambda prompted, example: prompted.build_prompt(example),
    )
    (update,) = _first_updates(prepared)
    _, metrics = prepared.update(update)
    assert abs(metrics["kl_teacher"]) < 1e-6 and metrics["grad_norm"] < 1e-5


def test_the_teacher_reads_the_students_responses_where_they_are(prepared):
    """Only the prompts with the demonstrations are new; targets and mask are those of the batch."""
    ((batch,),) = _first_updates(prepared)
    items = prepared.ctx.prompt_reader(prepared.ctx.mixture.rows(0))
    shown = prepared.ctx.teacher.demonstration_batch(batch, items)
    assert shown.targets is batch.targets and shown.mask is batch.mask
    np.testing.assert_array_equal(shown.packing.real, batch.packing.real)
    assert shown.prompts.tokens.shape[1] > batch.prompts.tokens.shape[1] and not shown.extra


def test_a_demonstration_follows_the_prompt(prepared):
    prompted, example = prepared.ctx.builder.prompted_tasks["first"], prepared.ctx.sources[0][0]
    text_of = lambda messages: "".join(p["text"] for p in messages[-1]["content"])
    shown = prompts.demonstration_prompt(prompted, example)
    assert (
        example.target in text_of(shown)
        and text_of(shown).startswith(text_of(prompted.build_prompt(example)))
        and shown[-1]["role"] == "user"
    )


def test_demonstration_prompts_may_be_longer_than_the_prompt_limit(prepared):
    """A prompt at its limit fits with the longest demonstration and the text around it."""
    processor, ctx = prepared.run.model_ctx.processor, max(prepared.ctx.teacher.model_ctx.buckets)
    prompted, example = prepared.ctx.builder.prompted_tasks["first"], prepared.ctx.sources[0][0]
    long = dataclasses.replace(
        example, target="it is " * (prepared.ctx.builder.sampling.max_new_tokens // 2)
    )
    size = lambda messages: len(processor.encode(messages))
    assert (
        ctx - max(prepared.run.model_ctx.buckets)
        == size(prompts.demonstration_prompt(prompted, long)) - size(prompted.build_prompt(example))
        > 4
    )


def test_task_without_gold_answers_is_refused(prepared, monkeypatch):
    blank = [dataclasses.replace(e, target="") for e in prepared.ctx.sources[0]]
    monkeypatch.setattr(Datasets, "examples", lambda *_: blank)
    with pytest.raises(
        ValueError, match="first/train/0: task first has no gold answers to demonstrate"
    ) as error:
        train_stage.make_stage_context(prepared.run, prepared.ctx.stage, prepared.params, None)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A teacher with the student's weights, and a wider one, as Hugging Face folders."""
    text = SMALL_TEXT.text
    text = dataclasses.replace(text, width=192, heads=192 // text.head_dim)
    wide = dataclasses.replace(SMALL_TEXT, text=text)
    paths = {}
    for name, model in (("same", SMALL_TEXT), ("wide", wide)):
        paths[name] = tmp_path_factory.mktemp(name)
        with stage_fixtures.open_tiny_run(config("sft"), paths[name] / "run", model) as (run, base):
            save_hf_checkpoint(
                base.params,
                run.model_ctx.cfg,
                paths[name] / "hf",
                run.model_ctx.processor.save,
                "float32",
            )
    return {name: str(path / "hf") for name, path in paths.items()}


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_the_student_follows_another_model(folders, tmp_path, direction):
    """The loss is the KL of the two models' logits at the response tokens, and training lowers it.

    A teacher with the student's weights has no gradient.
    """
    for name in ("same", "wide"):
        c = config(distill=dict(teacher=folders[name], direction=direction))
        with stage_fixtures.prepare_stage(c, tmp_path / name) as prepared:
            (update,) = _first_updates(prepared)
            state, metrics = prepared.update(update, lr=1e-2)
            if name == "same":
                assert abs(metrics["kl_teacher"]) < 1e-6 and metrics["grad_norm"] < 1e-5
                continue
            assert update[0].extra["teacher_hidden"].shape[-1] == 192
            other = cptjax.load(folders[name], dtype="float32")
            ours = log_probabilities(prepared.params, update[0], prepared.run.model_ctx.cfg)
            theirs = log_probabilities(other.params, update[0], other.config)
            first, second = (theirs, ours) if direction == "forward" else (ours, theirs)
            want = (np.exp(first) * (first - second)).sum(-1)[np.asarray(update[0].mask)].mean()
            assert metrics["kl_teacher"] == pytest.approx(want, rel=1e-4) and want > 1e-3
            _, later = dataclasses.replace(prepared, state=state).update(update)
            assert later["kl_teacher"] < metrics["kl_teacher"]


def log_probabilities(params, batch, cfg):
    hidden = logprobs.predicting_states(params, batch.replace(extra={}), cfg, jnp.float32)
    hidden = packed_groups.by_target(batch, hidden.reshape(-1, hidden.shape[-1]))
    return np.asarray(jax.nn.log_softmax(hidden @ decoder.unembedding(params["text"])))


@pytest.mark.parametrize("rate", [0.25, 0.0, 1.0])
def test_followers(prepared, rate):
    start = prepared.state.params
    teacher = distillation.Teacher(
        prepared.run.model_ctx, prepared.ctx.builder.prompted_tasks, rate, start, prepared.frozen
    )
    moved = jax.tree.map(lambda x: x + 1.0, start)
    teacher.follow(moved)
    for before, after in zip(jax.tree.leaves(start), jax.tree.leaves(teacher.trained), strict=True):
        np.testing.assert_allclose(after, before + rate, atol=1e-5)


@pytest.mark.parametrize(("teacher", "rate"), [("ema", 0.01), ("current", 1.0), ("frozen", 0.0)])
def test_follower_moves_in_bfloat16_runs_and_is_saved_as_it_is(tmp_path, teacher, rate):
    """A hundredth of a small change is below bfloat16's precision; checkpoints keep float32."""
    c = config(distill=dict(teacher=teacher))
    c.model.compute_dtype = "bfloat16"
    with stage_fixtures.prepare_stage(c, tmp_path) as prepared:
        found, start = prepared.ctx.teacher, jax.device_get(prepared.state.params)
        before = jax.device_get(found.trained)
        found.follow(jax.tree.map(lambda x: x + 1e-3, start))
        for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(found.trained), strict=True):
            np.testing.assert_allclose(
                np.asarray(new, np.float32) - np.asarray(old, np.float32), rate * 1e-3, atol=2e-7
            )
        saved = resume.checkpoint_structure(
            prepared.run, "steps", prepared.ctx.stage, prepared.state.params
        ).get("teacher")
        assert (saved is None) == (teacher == "frozen")
        if saved:
            assert jax.tree.map(lambda x: x.dtype, saved) == jax.tree.map(
                lambda x: x.dtype, found.trained
            )


def test_the_previous_stage_has_a_pull_only_after_the_model_has_moved(tmp_path):
    with (
        stage_fixtures.prepare_stage(
            config("sft", loss=dict(name="lwf", coef=1.0)), tmp_path
        ) as prepared,
        prepared.ctx.open_stream(0) as stream,
    ):
        update = next(
            next_step_batch(prepared.ctx, prepared.params, stream, StageProgress()).updates
        )
        state, metrics = prepared.update(update, lr=1e-2)
        assert abs(metrics["lwf"]) < 1e-6
        _, later = dataclasses.replace(prepared, state=state).update(update)
        assert later["lwf"] > 1e-4
