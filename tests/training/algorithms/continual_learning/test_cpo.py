"""CPO: which weights a stage protects, the penalty, and its effect."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from method_helpers import assert_kept_as_planned, random_tree, stage_end

from cptjax.sharding import make_mesh
from cptjax.training.algorithms.continual_learning.cpo import CPO, moved_most
from cptjax.training.algorithms.optimizers import OptimizerConfig, make_optimizer


def layers(name: str, x) -> list[np.ndarray]:
    """The tensors of a leaf: those of each layer."""
    x = np.asarray(x)
    return [x] if name == "embed" else list(x)


def leaves(tree) -> dict[str, np.ndarray]:
    text = tree["text"]
    return {"embed": text["embed"], **text["blocks"]}


def expected_mask(p, start, share: float) -> np.ndarray:
    """The top of a tensor by a sort; among equal values the first ones."""
    moved = np.abs(np.asarray(p, np.float32) - np.asarray(start, np.float32)).reshape(-1)
    order = np.argsort(-moved, kind="stable")[: int(len(moved) * share)]
    mask = np.zeros(len(moved), bool)
    mask[order] = moved[order] > 0
    return mask.reshape(p.shape)


@pytest.mark.parametrize("share", [0.1, 0.37, 1.0])
def test_a_stage_protects_the_share_of_each_tensor_that_moved_most(share):
    start, after = random_tree(0), random_tree(1)
    method = CPO(share=share)
    params, mask = method.stage_end(stage_end(after, start=start))
    assert params is after
    for name in leaves(mask):
        for m, p, s in zip(
            *(layers(name, x[name]) for x in map(leaves, (mask, after, start))), strict=True
        ):
            np.testing.assert_array_equal(m, expected_mask(p, s, share))
            assert m.sum() == int(m.size * share)
    assert_kept_as_planned(method, mask, 1)


def test_ties_and_weights_that_stay_are_chosen_as_stated():
    start = jnp.zeros((2, 10))
    after = start.at[0].set(1.0).at[1, 3:5].set(2.0)
    mask = moved_most(after, start, 0.3, (1,))
    np.testing.assert_array_equal(np.flatnonzero(mask[0]), [0, 1, 2])
    np.testing.assert_array_equal(np.flatnonzero(mask[1]), [3, 4])
    assert not moved_most(start, start, 1.0, (1,)).any()


def test_sharded_weights_give_the_same_mask_where_they_are():
    mesh = make_mesh(2, 2, 2, jax.devices())
    rng = np.random.default_rng(0)
    start, after = rng.normal(size=(2, 3, 8, 12)).astype(np.float32).round(1)
    place = NamedSharding(mesh, PartitionSpec(None, "fsdp", "model"))
    mask = moved_most(jax.device_put(after, place), jax.device_put(start, place), 0.2, (1, 2))
    assert mask.sharding.is_equivalent_to(place, 3)
    np.testing.assert_array_equal(mask, moved_most(after, start, 0.2, (1, 2)))
    for m, p, s in zip(np.asarray(mask), after, start, strict=True):
        np.testing.assert_array_equal(m, expected_mask(p, s, 0.2))


def test_penalty_and_gradient_of_random_masks_by_hand():
    start, p, noise = (random_tree(seed) for seed in (0, 1, 2))
    mask = jax.tree.map(lambda x: x > 0.3, noise)
    method = CPO(coef=7.0)
    value, gradient = jax.value_and_grad(lambda p: method.penalty(p, start, mask))(p)
    total = 0.0
    for name in leaves(p):
        parts = (layers(name, leaves(tree)[name]) for tree in (p, start, mask, gradient))
        for x, s, m, g in zip(*parts, strict=True):
            total += 7.0 * np.abs(x - s)[m].mean()
            np.testing.assert_allclose(g, m * np.sign(x - s) * 7.0 / m.sum(), rtol=1e-6)
    assert value == pytest.approx(total, rel=1e-5)
    assert method.penalty(p, start, None) is None
    empty = jax.tree.map(jnp.zeros_like, mask)
    assert method.penalty(p, start, empty) == 0


def test_masks_of_stages_are_united():
    first, second, third = (random_tree(seed) for seed in range(3))
    method = CPO(share=0.2)
    _, one = method.stage_end(stage_end(second, start=first))
    _, other = method.stage_end(stage_end(third, start=second))
    _, both = method.stage_end(stage_end(third, start=second, kept=one))
    jax.tree.map(
        lambda a, b, c: np.testing.assert_array_equal(c, np.asarray(a) | np.asarray(b)),
        *(one, other, both),
    )
    count = lambda tree: sum(int(x.sum()) for x in jax.tree.leaves(tree))
    assert max(count(one), count(other)) < count(both) <= count(one) + count(other)


def test_protected_weights_move_less_than_the_others():
    """With a constant gradient, AdamW moves every weight by the learning rate in each update."""
    config = OptimizerConfig("adamw", 0.9, 0.999, 1e-8, 0.0, None, "float32")
    optimizer, method = make_optimizer(config), CPO(coef=100.0)
    start = random_tree(0)
    mask = jax.tree.map(lambda x: x > 1, random_tree(1))

    @jax.jit
    def update(state):
        pull = jax.grad(lambda p: method.penalty(p, start, mask))(state.params)
        gradient = jax.tree.map(lambda g: g + 0.5, pull)
        return optimizer.update(state, gradient, jnp.zeros(()), 1e-3)[0]

    state = optimizer.init(start)
    for _ in range(20):
        state = update(state)
    moved = jax.tree.map(lambda a, b: np.abs(np.asarray(a - b)), state.params, start)
    held = np.concatenate([m[k] for m, k in zip(*map(jax.tree.leaves, (moved, mask)), strict=True)])
    free = np.concatenate(
        [m[~k] for m, k in zip(*map(jax.tree.leaves, (moved, mask)), strict=True)]
    )
    assert held.max() < 0.25 * free.min()


def test_a_share_that_protects_nothing_is_refused():
    with pytest.raises(ValueError, match="share=0: expected the share of protected parameters"):
        CPO(share=0).check(None)
