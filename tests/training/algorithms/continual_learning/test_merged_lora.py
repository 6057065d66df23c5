"""New adapters per stage: merged weights by numpy, in memory, after a restart and exported."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import run_helpers
import stage_fixtures
from device_fixtures import devices  # noqa: F401
from jax.sharding import NamedSharding, PartitionSpec
from method_helpers import stage_end

import cptjax
from cptjax import sharding
from cptjax.continual import open_run, stage_model, train_stage
from cptjax.continual.model_state import ModelState, restore_stage_params
from cptjax.models import trainable
from cptjax.models.families import PRESETS
from cptjax.models.trainable import flatten_params
from cptjax.training.algorithms.continual_learning.hooks import KeptLayout
from cptjax.training.algorithms.continual_learning.merged_lora import MergedLora
from cptjax.training.algorithms.continual_learning.o_lora import OLoRA

SCALE = 0.5


def adapters(seed, rank=3):
    """Random adapters of o [L=2, 4, 5, 6]."""
    rng = np.random.default_rng(seed)
    place = NamedSharding(sharding.make_mesh(devices=jax.devices()[:1]), PartitionSpec())
    put = lambda *shape: jax.device_put(jnp.float32(rng.normal(size=shape)), place)
    return {"o": {"lora_a": put(2, 4, 5, rank), "lora_b": put(2, rank, 6)}}


def added(trees):
    """The sum of scale A B of several adapters, in float64."""
    parts = [[np.asarray(t["o"][n], np.float64) for n in ("lora_a", "lora_b")] for t in trees]
    return SCALE * sum(np.einsum("lnhr,lrd->lnhd", a, b) for a, b in parts)


def end_stage(method, stage, kept, trained):
    return method.stage_end(stage_end(trained, stage=stage, seed=7, kept=kept))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stages", [(1, 2), (1, 3)], ids=["each stage", "a stage without"])
def test_weights_after_stages_are_the_base_plus_all_adapters(stages, dtype):
    """They are rounded once, whatever the number of stages."""
    method, kept, trees = MergedLora(), None, [adapters(0), adapters(1)]
    for stage, tree in zip(stages, trees, strict=True):
        new, kept = end_stage(method, stage, kept, tree)
        shapes = method.kept_shapes(KeptLayout(tree, None, stage))
        assert jax.tree.map(lambda x: x.shape, kept) == jax.tree.map(lambda x: x.shape, shapes)
        assert not np.any(new["o"]["lora_b"]) and np.all(new["o"]["lora_a"])
    w = jnp.asarray(np.random.default_rng(2).normal(size=(2, 4, 5, 6)), dtype)
    frozen = method.frozen_weights({"o": {"w": w}, "norm": w[0]}, kept, SCALE)
    assert frozen["norm"] is not w and frozen["o"]["w"].dtype == dtype
    expected = np.asarray(w, np.float64) + added(trees)
    error = np.abs(np.asarray(frozen["o"]["w"], np.float64) - expected)
    assert np.all(error <= jnp.finfo(dtype).eps / 2 * np.abs(expected) + 2e-6)


def test_each_stage_has_its_own_adapters_with_the_declared_spread():
    like = adapters(0, rank=200)
    first, second = (end_stage(OLoRA(), stage, None, like)[0]["o"]["lora_a"] for stage in (1, 2))
    assert np.abs(first - second).max() > 0.1
    limit = 20**-0.5  # uniform in +- inputs ** -0.5, as add_lora declares
    assert 0.98 * limit < np.abs(first).max() <= limit
    np.testing.assert_array_equal(first, end_stage(OLoRA(), 1, None, like)[0]["o"]["lora_a"])


def test_an_exported_and_a_loaded_stage_have_the_weights_of_the_run(tmp_path, monkeypatch, devices):
    """After each of two stages, also without the memory of the run."""
    families = ("facts", "arithmetic")
    c = run_helpers.config(
        "sft",
        method=dict(parameters=dict(name="merge_lora")),
        model={"lora": {"rank": 2, "alpha": 8.0}},
        train={"lr": 5e-2},
        tasks={family: dict(task="synthetic", family=family) for family in families},
        stages=tuple({"task": family, "steps": 2} for family in families),
    )
    monkeypatch.setitem(PRESETS, "tiny", stage_fixtures.SMALL)
    with open_run.open_run(c, tmp_path / "run") as run:
        open_run.write_run_files(run, {}, [])
        ends, end = [], ModelState(restore_stage_params(c, run.model_ctx, None, 0))
        for stage in run.stages:
            end = train_stage.train_stage(run, stage, end)
            ends.append(jax.device_get((end.params, end.kept["merge_lora"])))
    base = flatten_params(cptjax.load(tmp_path / "run", dtype="float32", stage=0).params)
    for stage, end in enumerate(ends, 1):
        params, kept = map(flatten_params, end)
        exported = tmp_path / f"hf{stage}"
        assert stage_model.export_stage(tmp_path / "run", exported, stage, "float32") == stage
        exported = flatten_params(cptjax.load(exported, dtype="float32").params)
        loaded = flatten_params(cptjax.load(tmp_path / "run", dtype="float32", stage=stage).params)
        assert loaded.keys() == params.keys()
        for path, x in params.items():
            np.testing.assert_array_equal(loaded[path], x)
            if trainable.is_adapter(path):
                assert path[-1] == "lora_a" or not np.any(x)
                continue
            np.testing.assert_array_equal(exported[path], x)
            if path[-1] != "w" or (a := kept.get((*path[:-1], "lora_a"))) is None:
                np.testing.assert_array_equal(x, base[path])
                continue
            assert a.shape[-1] == 2 * stage
            b = np.asarray(kept[*path[:-1], "lora_b"])
            flat = np.asarray(a).reshape(len(a), -1, 2 * stage) @ b.reshape(len(b), 2 * stage, -1)
            np.testing.assert_allclose(x, base[path] + 4 * flat.reshape(x.shape), atol=1e-6)
            assert np.abs(x - base[path]).max() > 1e-3
