"""Merges of stage checkpoints against numpy, over random stages."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from method_helpers import stage_end
from stage_fixtures import method_config

from cptjax.training.algorithms.continual_learning.dare import DARE, drop_and_rescale
from cptjax.training.algorithms.continual_learning.hooks import KeptLayout
from cptjax.training.algorithms.continual_learning.max_merge import MaxMerge
from cptjax.training.algorithms.continual_learning.merging import largest_share
from cptjax.training.algorithms.continual_learning.table import check_methods
from cptjax.training.algorithms.continual_learning.task_arithmetic import TaskArithmetic
from cptjax.training.algorithms.continual_learning.ties import TIES


def tree(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(scale * rng.normal(size=shape), jnp.float32)
    return {"a": draw(4, 5), "b": {"c": draw(7)}}


BASE = tree(0)
ENDS = [tree(seed, 0.5) for seed in (1, 2, 3)]


def merged(method, ends=ENDS):
    """The weights after each stage, as flat arrays, and what is kept in the end."""
    kept, out = None, []
    for stage, end in enumerate(ends, 1):
        start = stage_end(end, stage=stage, seed=0, kept=kept, stage_params=lambda _: BASE)
        params, kept = method.stage_end(start)
        out.append(flat(params))
    return out, kept


def flat(params):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(params)])


def vectors(count):
    return np.stack([flat(end) - flat(BASE) for end in ENDS[:count]])


def trimmed(t, density):
    limit = np.sort(np.abs(t))[::-1][round(density * t.size) - 1]
    return np.where(np.abs(t) >= limit, t, 0)


def ties(t, density):
    t = np.stack([trimmed(x, density) for x in t])
    agree = (t != 0) & (np.sign(t) == np.sign(t.sum(0)))
    return np.where(agree, t, 0).sum(0) / np.maximum(agree.sum(0), 1)


FORMULAS = {
    "task_arithmetic": (TaskArithmetic(0.7), lambda t: 0.7 * t.mean(0)),
    "max_merge": (
        MaxMerge(0.7),
        lambda t: 0.7 * np.take_along_axis(t, np.abs(t).argmax(0)[None], 0)[0],
    ),
    "ties": (TIES(0.7, density=0.4), lambda t: 0.7 * ties(t, 0.4)),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_a_merge_follows_its_formula_after_each_stage(name):
    method, formula = FORMULAS[name]
    for count, params in enumerate(merged(method)[0], 1):
        np.testing.assert_allclose(params, flat(BASE) + formula(vectors(count)), atol=1e-6)


@pytest.mark.parametrize(
    "method", [TaskArithmetic(), TIES(density=1.0), DARE(density=1.0), MaxMerge()]
)
def test_a_merge_of_one_stage_is_that_stage(method):
    np.testing.assert_allclose(merged(method, ENDS[:1])[0][0], flat(ENDS[0]), atol=1e-6)


@pytest.mark.parametrize("name", ["wise_ft", "task_arithmetic", "ties", "dare", "max_merge"])
def test_a_merge_of_adapters_is_refused(name):
    """Merged factors are not a merge of the weights: (A + A')(B + B') / 4 is not (AB + A'B') / 2."""
    weight = dict(weight=0.5) if name == "wise_ft" else {}
    c = method_config("sft", method=dict(stage_end=dict(name=name, **weight)))
    check_methods(c)
    c.model.lora.rank = 2
    words = f"name='{name}' with model.lora.rank=2: .*; set model.lora.rank=0, or .*'merge_lora'"
    with pytest.raises(ValueError, match=words) as error:
        check_methods(c)
    assert "\n" not in str(error.value)


def test_dare_drops_most_values_and_keeps_their_mean():
    vector = {"w": jnp.ones(100_000)}
    dropped = np.asarray(drop_and_rescale(vector, 0.1, jax.random.key(0))["w"])
    assert set(np.unique(dropped)) == {0.0, 10.0}
    assert (dropped > 0).mean() == pytest.approx(0.1, abs=0.005)
    (first, *_), _ = merged(DARE(density=0.5))
    change = first - flat(BASE)
    own = vectors(1)[0]
    assert set(np.round(change / own, 4).tolist()) == {0.0, 2.0}


def test_the_largest_share_is_counted_over_the_whole_tree():
    big = {"a": 10 * BASE["a"], "b": BASE["b"]}
    kept = largest_share(big, 0.25)
    values = flat(kept)
    assert (values != 0).sum() == 7 and not np.asarray(kept["b"]["c"]).any()
    np.testing.assert_array_equal(values, trimmed(flat(big), 0.25))


@pytest.mark.parametrize(
    ("method", "bytes_each"), [(TaskArithmetic(), 4), (DARE(), 4), (TIES(), 10), (MaxMerge(), 4)]
)
def test_what_is_kept_does_not_grow_with_the_stages(method, bytes_each):
    mesh = jax.make_mesh((1,), ("data",))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    shapes = method.kept_shapes(
        KeptLayout(
            jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), BASE),
            mesh,
            3,
        )
    )
    kept = merged(method)[1]
    jax.tree.map(
        lambda x, s: np.testing.assert_equal((x.shape, x.dtype), (s.shape, s.dtype)), kept, shapes
    )
    assert sum(x.nbytes for x in jax.tree.leaves(kept)) <= bytes_each * flat(BASE).size + 4
