"""Batches of mixed images and lengths have few shapes: once each is compiled, nothing compiles."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from stage_fixtures import SMALL

from cptjax import sharding
from cptjax.benchmark.phase_times import CompilationCounter
from cptjax.data import collate, device_batches, model_context, processor
from cptjax.generation import generate
from cptjax.generation.sampling_config import SamplingConfig
from cptjax.models import causal_lm, trainable
from cptjax.training import train_step
from cptjax.training.algorithms.losses import LossConfig
from cptjax.training.algorithms.objective import Objective
from cptjax.training.algorithms.optimizers import OptimizerConfig, make_optimizer
from cptjax.types import Batch

OPTIMIZER = OptimizerConfig("adamw", 0.9, 0.999, 1e-8, 0.0, 1.0, "float32")
ROWS, PIXELS, LADDER = 2, (16 * 16, 32 * 32), (24, 32)


@pytest.fixture(scope="module")
def model_ctx() -> model_context.ModelContext:
    cfg = SMALL.with_compute(attention="tiled", unroll=True)
    return model_context.ModelContext(
        cfg,
        processor.load_processor(None, cfg, *PIXELS),
        sharding.make_mesh(1, 1, 1, jax.devices()[:1]),
        jnp.float32,
        LADDER,
    )


@pytest.fixture(scope="module")
def params(model_ctx):
    """The trained and the frozen weights; few are trained, so that a program compiles quickly."""
    params = sharding.init_params(
        causal_lm.declare_params(model_ctx.cfg), jax.random.key(0), jnp.float32, model_ctx.mesh
    )
    return trainable.split_params(params, lambda path: path == ("text", "embed"))


def vision_shapes(model_ctx) -> list[tuple[int, int]]:
    """Return (patches of a vision row, vision rows) of every batch with at most one image a row.

    (0, 0) = no image.
    """
    window, most = (
        model_ctx.cfg.vision.window_slots,
        collate.max_image_slots(model_ctx.cfg, PIXELS[1]) // model_ctx.cfg.vision.window_slots,
    )
    sizes = range(1, most + 1)
    some = (
        s for n in range(1, ROWS + 1) for s in itertools.combinations_with_replacement(sizes, n)
    )
    return [
        (0, 0),
        *sorted(
            {
                (width * window, rows)
                for width, rows in (collate.fit_vision_rows([s], most) for s in some)
            }
        ),
    ]


def conversation(model_ctx, rng, with_response=True, longest=32):
    """Return a conversation of random length, with or without an image."""
    size = rng.integers(8, 40, 2)
    image = (
        [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))]
        if rng.random() < 0.6
        else []
    )
    content = [
        *({"type": "image", "image": i} for i in image),
        {"type": "text", "text": "what is it"},
    ]
    ask = {"role": "user", "content": content}
    short = len(model_ctx.processor.encode([ask], generation=True)) + 2
    words = "red " * int(rng.integers(1, max(2, longest - short)))
    if with_response:
        return model_ctx.processor.encode([ask, {"role": "assistant", "content": words.strip()}])
    return model_ctx.processor.encode(
        [{"role": "user", "content": [*content, {"type": "text", "text": words}]}], generation=True
    )


def forced(monkeypatch, shape: collate.BatchShape, width: int) -> None:
    """Give every batch this shape, as if another process needed it."""
    monkeypatch.setattr(device_batches, "gather_batch_shape", lambda _: shape)
    monkeypatch.setattr(model_context, "gather_batch_shape", lambda _: shape)
    monkeypatch.setattr(device_batches, "max_over_processes", lambda _: width)


def step_programs(model_ctx, kind, opt, state):
    objective = Objective(LossConfig.plain(kind, 64))
    places = train_step.StateShardings.of(state)
    return train_step.make_step_programs(
        train_step.StepFunctions(model_ctx.cfg, objective, opt, places, model_ctx.dtype)
    )


def test_sft_compiles_nothing_after_its_shapes(model_ctx, params, monkeypatch):
    """200 steps of random batches after one step of each of 16 shapes."""
    rng, heard, opt = np.random.default_rng(0), CompilationCounter(), make_optimizer(OPTIMIZER)
    trained, frozen = params
    state = train_step.init_state(opt, jax.tree.map(jnp.copy, trained), model_ctx.mesh)
    steps = step_programs(model_ctx, "sft", opt, state)
    plain = model_ctx.processor.encode(
        [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    )
    listed = [
        (length, width, *ctx)
        for length in LADDER
        for width in device_batches.target_buckets(length)
        for ctx in vision_shapes(model_ctx)
    ]
    with jax.set_mesh(model_ctx.mesh):
        for length, width, patches, vision_rows in listed:
            with monkeypatch.context() as patch:
                forced(patch, collate.BatchShape(ROWS, length, patches, vision_rows), width)
                state, metrics = steps.run(
                    state,
                    frozen,
                    [device_batches.conversation_batch(model_ctx, [plain], rows=ROWS)],
                    1e-3,
                )
        assert len(listed) == 16 and heard.count >= len(listed) - 1
        before, seen, longest = heard.count, set(), (18, 24, 32)
        for n in range(200):
            rows = [
                conversation(model_ctx, rng, longest=longest[n % 3])
                for _ in range(rng.integers(1, ROWS + 1))
            ]
            batch = device_batches.conversation_batch(model_ctx, rows, rows=ROWS)
            seen.add(
                (
                    batch.prompts.tokens.shape,
                    batch.targets.shape,
                    batch.prompts.vision and batch.prompts.vision.patches.shape,
                )
            )
            state, metrics = steps.run(state, frozen, [batch], 1e-3)
        assert np.isfinite(float(metrics["loss"].value)) and len(seen) >= 8
    assert heard.count == before


@pytest.mark.slow
def test_rl_compiles_nothing_after_its_shapes(model_ctx, params, monkeypatch):
    """200 steps of rollouts and updates on groups with other images."""
    rng, heard, opt = np.random.default_rng(1), CompilationCounter(), make_optimizer(OPTIMIZER)
    short = dataclasses.replace(model_ctx, buckets=(32,))
    trained, frozen = params
    state = train_step.init_state(opt, jax.tree.map(jnp.copy, trained), model_ctx.mesh)
    steps = step_programs(model_ctx, "policy", opt, state)
    sampling = SamplingConfig(2, 4, temperature=1.0, check_every=16)

    def learn(state, rows):
        out = generate.sample_responses(
            short,
            trainable.join_params(state.params, frozen),
            rows,
            jax.random.key(0),
            np.arange(ROWS),
            sampling,
        )
        numbers = {
            "advantages": rng.standard_normal(2 * ROWS, np.float32),
            "sampler_logps": out.policy_logps,
        }
        (length,) = device_batches.response_buckets([out.mask], 4)
        cut = lambda x: np.asarray(x)[:, :length] if x.ndim == 2 else np.asarray(x)
        tokens, mask, numbers = jax.tree.map(cut, (out.tokens, out.mask, numbers))
        batch: Batch = device_batches.group_batch(
            short, short.place_prompts(rows), tokens, mask, extra=numbers
        )
        return steps.run(state, frozen, [batch], 1e-3)[0]

    plain = model_ctx.processor.encode([{"role": "user", "content": "x"}], generation=True)
    with jax.set_mesh(model_ctx.mesh):
        for ctx in vision_shapes(model_ctx):
            with monkeypatch.context() as patch:
                forced(patch, collate.BatchShape(ROWS, 32, *ctx), 4)
                state = learn(state, [plain] * ROWS)
        before = heard.count
        for _ in range(200):
            state = learn(
                state,
                [
                    conversation(model_ctx, rng, with_response=False, longest=22)
                    for _ in range(ROWS)
                ],
            )
    assert heard.count == before
