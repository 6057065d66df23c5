"""Memory aware synapses against gradients by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from method_helpers import assert_kept_as_planned, random_tree, stage_end

from cptjax.training.algorithms.continual_learning.mas import MAS
from cptjax.types import Batch


@pytest.mark.parametrize("chunk", [3, 64])
def test_importance_of_a_linear_model_is_the_mean_magnitude_of_its_gradients(chunk):
    """hidden = x W, logits = hidden U: dN/dW = x' G, dN/dU = hidden' Z, of Z = 2/tokens logits."""
    rng = np.random.default_rng(0)
    w, u = rng.normal(size=(4, 5)), rng.normal(size=(5, 11))
    x, mask = rng.normal(size=(3, 7, 4)), rng.random((3, 7)) < 0.6
    a_pass = MAS(1.0, samples=3).gradient_pass(chunk)
    rows, expected = [], []
    for row in range(3):
        batch = Batch(None, np.zeros((1, 7), np.int32), jnp.asarray(mask[row : row + 1]))

        def norm(params, row=row, batch=batch):
            hidden = jnp.asarray(x[row : row + 1], jnp.float32) @ params["w"]
            return a_pass.objective(hidden, params["u"], batch).sum

        params = {name: jnp.asarray(p, jnp.float32) for name, p in (("w", w), ("u", u))}
        rows.append(a_pass.transform(jax.grad(norm)(params)))
        seen = x[row][mask[row]]
        z = 2 / len(seen) * (seen @ w @ u)
        expected.append({"w": np.abs(seen.T @ (z @ u.T)), "u": np.abs((seen @ w).T @ z)})
    for name in ("w", "u"):
        np.testing.assert_allclose(
            sum(r[name] for r in rows) / 3, sum(e[name] for e in expected) / 3, rtol=1e-4
        )


def test_a_row_counts_once_in_a_batch_with_padding():
    rng = np.random.default_rng(1)
    hidden, u = rng.normal(size=(2, 4, 5)), rng.normal(size=(5, 6))
    mask = np.array([[True, True, False, False], [False] * 4])
    batch = Batch(None, np.zeros((2, 4), np.int32), jnp.asarray(mask))
    objective = MAS(1.0).gradient_pass(8).objective
    loss = objective(jnp.asarray(hidden, jnp.float32), jnp.asarray(u, jnp.float32), batch)
    expected = np.square(hidden[0, :2] @ u).sum() / 2
    assert loss.count == 1
    np.testing.assert_allclose(loss.sum, expected, rtol=1e-5)


def test_the_importance_of_stages_adds_up():
    method, means = MAS(1.0), [jax.tree.map(jnp.abs, random_tree(seed)) for seed in (0, 1)]
    _, kept = method.stage_end(stage_end(mean=means[0]))
    _, kept = method.stage_end(stage_end(kept=kept, mean=means[1]))
    expected = means[0]["text"]["embed"] + means[1]["text"]["embed"]
    np.testing.assert_array_equal(kept["text"]["embed"], expected)
    assert_kept_as_planned(method, kept, 4)
    with pytest.raises(ValueError, match="at least 1 row"):
        MAS(1.0, samples=0).check(None)
