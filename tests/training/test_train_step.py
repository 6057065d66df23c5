"""Training steps: the numbers do not depend on mesh, micro-batches, packing, remat or chunks.

What is frozen stays.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import stage_fixtures

from configs import base
from cptjax import sharding
from cptjax.models import load, trainable
from cptjax.training import train_step
from cptjax.training.stage_context import StageProgress
from cptjax.training.train_loop import next_step_batch

STEPS = 3
ONE = (1, 1, 1)
CASES = {  # mesh, remat, chunk, micro-batch, packed -> rows of each device pass
    "micro-batches, a chunk of a few tokens": (ONE, "block", 3, 4, False, [4, 4]),
    "packed": (ONE, "offload", 16, 0, True, None),
    "2,2,2": ((2, 2, 2), "dots", 5, 0, False, [8]),
    "2,2,2, packed": ((2, 2, 2), "none", 1024, 0, True, None),
    "1,4,2, micro-batches": ((1, 4, 2), "offload", 7, 4, False, [4, 4]),
    "1,2,2, packed micro-batches": ((1, 2, 2), "block", 2, 4, True, None),
    "8,1,1, mostly empty rows": ((8, 1, 1), "dots", 1, 2, False, [8, 8, 8, 8]),
}


def config(mesh=ONE, remat="none", chunk=1024, micro=0, pack=False, **sections):
    """SFT on images.

    A large epsilon: Adam's direction then shows the gradient's size, and rounding of a tiny one
    does not decide it.
    """
    c = base.get_config()
    c.stages = (dict(task="first", steps=STEPS),)
    c.method.update(base.METHODS["sft"])
    c = stage_fixtures.tiny(c, steps=STEPS, batch=8, family="colour", side=32)
    c.mesh.update(dict(zip(sharding.AXES, mesh, strict=True)))
    c.model.remat = remat
    c.data.update(
        template="none",
        limit=24,
        pack=pack,
        **(dict(prompt_limit=64, buckets=(64,)) if pack else {}),
    )
    c.train.update(micro_batch=micro, chunk=chunk, eps=1e-2, clip=None)
    for section, values in sections.items():
        c[section].update(values)
    return c


def trained(settings, folder):
    """Return losses and gradient norms, the last state, and the shapes of the first step."""
    metrics, shapes = [], []
    with (
        stage_fixtures.prepare_stage(settings, folder) as prepared,
        prepared.ctx.open_stream(0) as stream,
        jax.set_mesh(prepared.run.model_ctx.mesh),
    ):
        state, places = prepared.state, jax.tree.map(lambda x: x.sharding, prepared.state)
        for _ in range(STEPS):
            (update,) = next_step_batch(prepared.ctx, None, stream, StageProgress()).updates
            shapes.append([b.targets.shape[0] for b in update])
            state, numbers = prepared.programs.run(state, prepared.frozen, update, 1e-2)
            metrics.append([numbers[name].value for name in ("loss", "grad_norm")])
    jax.tree.map_with_path(fixed, state, places)
    return np.asarray(jax.device_get(metrics)), state, shapes[0]


def fixed(path, leaf, place):
    assert (
        leaf.sharding.is_equivalent_to(place, leaf.ndim)
        and leaf.sharding.memory_kind == place.memory_kind
    ), path


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """One device, one pass of all rows, nothing packed, nothing computed twice."""
    metrics, state, shapes = trained(config(), tmp_path_factory.mktemp("plain"))
    assert shapes == [8]
    return metrics, jax.device_get(state.params)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_steps_do_not_depend_on_how_they_are_computed(plain, case, tmp_path):
    *how, rows = CASES[case]
    metrics, state, shapes = trained(config(*how), tmp_path)
    assert shapes == rows if rows else sum(shapes) < 8
    np.testing.assert_allclose(metrics, plain[0], rtol=1e-5)
    for (path, x), y in zip(
        jax.tree.leaves_with_path(jax.device_get(state.params)),
        jax.tree.leaves(plain[1]),
        strict=True,
    ):
        assert np.linalg.norm(x - y) <= 1e-5 * np.linalg.norm(y), jax.tree_util.keystr(path)


def test_changed_weights_are_counted_in_their_own_type():
    weights = {"a": jnp.ones((3, 2)), "b": jnp.ones(4, jnp.bfloat16)}
    step = jax.tree.map(lambda w: (w.astype(jnp.float32) + 1e-3).astype(w.dtype), weights)
    assert float(train_step.count_changed(weights, step).value) == pytest.approx(6 / 10)


PARTS = {
    "tower and merger frozen": dict(freeze=("vision", "merger")),
    "language frozen": dict(freeze=("language",)),
    "adapters of both": dict(lora=dict(rank=2, vision=True)),
    "adapters of the tower": dict(lora=dict(rank=2, vision=True), freeze=("language",)),
}


@pytest.mark.parametrize("name", PARTS)
def test_what_is_not_trained_keeps_its_bits(name, tmp_path):
    c = config(model=PARTS[name], train=dict(lr=1e-2, eps=1e-8))
    run, model_state, _ = stage_fixtures.train_all_stages(c, tmp_path)
    start = trainable.flatten_params(
        load.create_params(
            run.config.model, run.model_ctx.cfg, run.model_ctx.mesh, run.model_ctx.dtype, c.seed
        )
    )
    same = lambda path: np.array_equal(
        start[path], trainable.flatten_params(model_state.params)[path]
    )
    chosen = trainable.is_trained(c.model.freeze, c.model.lora.rank)
    assert {path for path in start if not same(path)} == {path for path in start if chosen(path)}


@pytest.mark.parametrize(
    "model",
    [
        dict(freeze=("language",), lora=dict(rank=2)),
        dict(freeze=("vision",), lora=dict(rank=2, vision=True)),
    ],
)
def test_adapters_that_would_not_be_trained_are_refused(model, tmp_path):
    with pytest.raises(
        ValueError, match=f"model.freeze names {model['freeze'][0]}, and model.lora.vision="
    ):
        stage_fixtures.train_all_stages(config(model=model), tmp_path)
