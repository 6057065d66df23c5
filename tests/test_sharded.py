"""Sharding: a mesh of eight CPU devices gives the numbers of one device."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import PartitionSpec
from tiny import Image, Video

from cptjax import sharding
from cptjax.models import causal_lm, decoder

MESHES = (2, 2, 2), (1, 4, 2), (1, 1, 8)
ROWS = [[5, Image(6, 10), 9], [12], [3, Image(4, 4), 2, Image(8, 12), 4], [2, Video(2, 4, 10), 6]]


@functools.cache
def _model():
    cfg = tiny.our_config()
    return cfg, tiny.random_params(cfg)


def _loss(params, prompts, cfg):
    logits = causal_lm.forward(params, prompts, cfg) @ decoder.unembedding(params["text"])
    real = (prompts.segments > 0)[..., None]
    return jnp.sum(jnp.where(real, jnp.sin(logits), 0)), logits


@functools.cache
def _run(sizes, group=False):
    """Return logits (or group states) and gradients; on one device where `sizes` is None."""
    cfg, params = _model()
    mesh = None if sizes is None else sharding.make_mesh(*sizes)
    rows = [tiny.random_row(row, cfg, np.random.default_rng(i)) for i, row in enumerate(ROWS)]
    prompts = tiny.prompts(rows, cfg, shards=sharding.batch_shards(mesh))
    responses = np.random.default_rng(5).integers(10, 300, (4, 3, 6)).astype(np.int32)

    def group_loss(params, prompts, responses):
        out = causal_lm.forward_group(params, prompts, responses, cfg)
        return jnp.sum(jnp.sin(out)), out

    f = group_loss if group else lambda params, prompts, _: _loss(params, prompts, cfg)
    f = jax.jit(jax.value_and_grad(f, has_aux=True))
    if mesh is None:
        (_, out), grads = f(params, prompts, responses)
    else:
        where = sharding.param_shardings(
            causal_lm.declare_params(cfg), mesh, sharding.rules_for(cfg.text.kv_heads, mesh)
        )
        axes = lambda x: (
            (None, "batch", None)
            if x.ndim == 3 and x.shape[0] == 3
            else ("batch",) + (None,) * (x.ndim - 1)
        )
        with jax.set_mesh(mesh):
            placed = sharding.place_rows(prompts, mesh, axes), sharding.place_rows(responses, mesh)
            (_, out), grads = f(jax.device_put(params, where), *placed)
    return np.asarray(out), jax.tree.map(np.asarray, grads), prompts.segments > 0


@pytest.mark.parametrize("sizes, group", [((1, 1, 8), False), *((sizes, True) for sizes in MESHES)])
def test_a_mesh_gives_the_numbers_of_one_device(sizes, group):
    """Rows on the other meshes: test_train."""
    (a, da, real), (b, db, _) = _run(sizes, group), _run(None, group)
    keep = slice(None) if group else real
    np.testing.assert_allclose(a[keep], b[keep], atol=1e-5 * np.abs(b[keep]).max(), rtol=0)
    for (path, x), y in zip(jax.tree.leaves_with_path(da), jax.tree.leaves(db), strict=True):
        assert np.linalg.norm(x - y) <= 1e-5 * np.linalg.norm(y) + 1e-7, jax.tree_util.keystr(path)


def test_parameters_are_sharded_over_fsdp_and_model():
    """No device holds a large leaf whole.

    Fewer key/value heads than devices on `model` are copied.
    """
    cfg, _ = _model()
    mesh = sharding.make_mesh(1, 2, 4)
    tree = sharding.abstract_params(
        causal_lm.declare_params(cfg),
        jnp.float32,
        mesh,
        sharding.rules_for(cfg.text.kv_heads, mesh),
    )
    for path, x in jax.tree.leaves_with_path(tree):
        cut = x.size // np.prod(x.sharding.shard_shape(x.shape))
        name = jax.tree_util.keystr(path)
        if x.ndim > 2 - ("blocks" not in name):
            assert cut == (
                2 if "['k']" in name or "['v']" in name or "patch" in name else 8
            ) or name.endswith("['b']"), name


def test_initial_parameters_do_not_depend_on_the_mesh():
    cfg, _ = _model()
    small = {"text": causal_lm.declare_params(cfg)["text"]}
    wanted = sharding.init_params(small, jax.random.key(3), jnp.float32)
    mesh = sharding.make_mesh(1, 4, 2)
    got = sharding.init_params(small, jax.random.key(3), jnp.float32, mesh)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-7)
    assert got["text"]["embed"].sharding.spec == PartitionSpec("model", "fsdp")
    gate, up = (np.asarray(got["text"]["blocks"][name]["w"]) for name in ("gate", "up"))
    assert abs(np.corrcoef(gate.ravel(), up.ravel())[0, 1]) < 0.05, (
        "leaves of one shape share their numbers"
    )


def test_the_free_axis_of_a_mesh_takes_the_other_devices():
    assert dict(sharding.make_mesh().shape) == {"data": 1, "fsdp": 8, "model": 1}
    assert dict(sharding.make_mesh(-1, 2, 2).shape) == {"data": 2, "fsdp": 2, "model": 2}
    assert (
        sharding.batch_shards(sharding.make_mesh(2, 2, 2)) == 4 and sharding.batch_shards(None) == 1
    )


@pytest.mark.parametrize("sizes", [(3, -1, 1), (-1, -1, 1), (2, 2, 1), (1, 0, 8), (-2, 4, 1)])
def test_a_mesh_that_does_not_fit_is_refused(sizes):
    with pytest.raises(ValueError, match="expected a product of 8"):
        sharding.make_mesh(*sizes)


def test_slices_must_divide_the_data_axis():
    with pytest.raises(ValueError, match="data=1: expected a multiple of the 2 slices"):
        sharding.make_mesh(1, 8, 1, slices=2)
    with pytest.raises(ValueError, match="mesh.slices=0: expected at least 1"):
        sharding.make_mesh(slices=0)


def test_a_dimension_that_the_mesh_does_not_divide_is_refused():
    mesh = sharding.make_mesh(1, 1, 8)
    with pytest.raises(ValueError, match="'heads' of size 28 cannot be cut 8 ways"):
        sharding.named_sharding((None, "heads"), mesh, (3, 28))
    with pytest.raises(ValueError, match="'kv_heads' of size 2"):
        sharding.param_shardings(causal_lm.declare_params(_model()[0]), mesh)
    with pytest.raises(ValueError, match="no sharding rule for axis 'width'"):
        sharding.partition_spec(("width",))
    with pytest.raises(ValueError, match="two dimensions on one mesh axis"):
        sharding.partition_spec(("heads", "mlp"))


def test_params_count_their_inputs():
    """Checkpoint conversion and adapters need the number of contracted axes of each leaf."""
    for path, p in jax.tree.leaves_with_path(
        causal_lm.declare_params(_model()[0]), is_leaf=sharding.is_param
    ):
        name = path[-1].key
        assert (p.inputs > 0) == (name == "w"), path
        assert dataclasses.replace(p) == p
