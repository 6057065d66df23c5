"""The model of the KL term: in a later stage, and of a folder."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import stage_fixtures
from stage_fixtures import SMALL_TEXT, method_config

import cptjax
from cptjax.continual import reference_models, resume
from cptjax.models import logprobs, trainable
from cptjax.models.config import RopeConfig
from cptjax.models.hf_checkpoint import save_hf_checkpoint
from cptjax.training import train_loop
from cptjax.training.programs import abstract_stage, training_programs
from cptjax.training.stage_context import StageProgress


def test_the_reference_of_a_second_stage_is_the_base_or_its_start(tmp_path):
    with stage_fixtures.open_tiny_run(
        method_config("grpo", steps=1, stages=2, method=dict(kl_coef=0.1)), tmp_path
    ) as (
        run,
        base,
    ):
        stage, first = run.stages[1], jax.device_get(base.params)
        params = jax.tree.map(lambda x: x + 1, base.params)
        now = jax.device_get(params)
        for name, want in (("base", first), ("stage", now)):
            stage.config.method.kl_reference = name
            ctx, found = reference_models.load_reference(
                run, stage, reference_models.load_stage_start(run, stage, params, False)
            )
            assert ctx is run.model_ctx
            jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), want)
        stage.config.method.kl_coef = 0.0
        start = reference_models.load_stage_start(run, stage, params, False)
        assert start is None and reference_models.load_reference(run, stage, start)[1] is None


def save_reference(folder, **text):
    """Save a random model, with changes of its text config, as a Hugging Face folder."""
    text = dataclasses.replace(SMALL_TEXT.text, **text)
    c = method_config("sft")
    c.seed = 1  # other weights than the policy's
    model = dataclasses.replace(SMALL_TEXT, text=text)
    with stage_fixtures.open_tiny_run(c, folder / "run", model) as (run, base):
        save = run.model_ctx.processor.save
        save_hf_checkpoint(base.params, run.model_ctx.cfg, folder / "hf", save, "float32")
    return str(folder / "hf")


SAME_SHAPES = dict(rope=RopeConfig(theta=100.0), norm_eps=0.5)
WIDE = dict(width=192, heads=192 // SMALL_TEXT.text.head_dim)


@pytest.mark.parametrize("method", ["grpo", "sft"])
@pytest.mark.parametrize("text", [SAME_SHAPES, WIDE], ids=["same shapes", "wide"])
def test_a_reference_of_a_folder_is_scored_with_its_own_config(tmp_path, method, text):
    """Its weights may have the shapes of the policy's although its config differs."""
    folder = save_reference(tmp_path, **text)
    c = method_config(method, method=dict(kl_coef=0.1, kl_reference=folder))
    with stage_fixtures.prepare_stage(c, tmp_path / "run") as prepared:
        ctx, run = prepared.ctx, prepared.run
        with ctx.open_stream(0) as stream, jax.set_mesh(run.model_ctx.mesh):
            step = train_loop.next_step_batch(ctx, prepared.params, stream, StageProgress())
            (batch,) = next(step.updates)
            other = cptjax.load(folder, dtype="float32")
            score = logprobs.make_scoring_program(other.config, jnp.float32, c.train.chunk, 1.0)
            want = np.asarray(score(other.params, batch.replace(extra={})))
        np.testing.assert_allclose(batch.extra["ref_logps"], want, atol=1e-5)
        cfg = run.model_ctx.cfg
        stage = abstract_stage(ctx.config, cfg, run.model_ctx.mesh)
        shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
        assert shapes(stage.reference) == shapes(ctx.reference)
        assert stage.reference_cfg.text == other.config.text != cfg.text
        with jax.set_mesh(stage.mesh):
            (program,) = [p for p in training_programs(stage) if p.name == "reference log-probs"]
            program.lower({})


def test_a_reference_with_another_vocabulary_is_refused(tmp_path):
    folder = save_reference(tmp_path)
    path = tmp_path / "hf" / "tokenizer.json"
    path.write_text(path.read_text().replace('"a"', '"another"', 1))
    c = method_config("grpo", method=dict(kl_coef=0.1, kl_reference=folder))
    with (
        pytest.raises(ValueError, match="method.kl_reference=.*another vocabulary; choose"),
        stage_fixtures.prepare_stage(c, tmp_path / "run"),
    ):
        """The stage is refused."""


@pytest.mark.parametrize("parameters, shared", [({}, True), ({"name": "merge_lora"}, False)])
def test_models_of_a_run_share_frozen_weights_that_do_not_change(tmp_path, parameters, shared):
    """The model, the base model and the stage's start."""
    c = method_config("grpo", steps=1, method={"kl_coef": 0.1, "parameters": parameters})
    c.model.lora.update(rank=2, alpha=2.0)
    with stage_fixtures.open_tiny_run(c, tmp_path, saved=True) as (run, _):
        params = resume.resume_run(run)[1].params
        models = [
            {path: id(x) for path, x in trainable.flatten_params(tree).items()}
            for tree in (params, run.base_params, run.copy_for_comparison(params))
        ]
        same = {path for path in models[0] if len({ids[path] for ids in models}) == 1}
        frozen = {path for path in models[0] if not trainable.is_adapter(path)}
        assert frozen and same == (frozen if shared else set())
