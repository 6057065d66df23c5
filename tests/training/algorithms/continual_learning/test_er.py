"""Experience replay by an independent formula."""

import jax
import jax.numpy as jnp
import numpy as np
from memory_helpers import log_softmax, random_batch

from cptjax.training.algorithms.continual_learning.er import ER
from cptjax.training.algorithms.objective import MemoryObjective


def test_the_loss_is_the_weighted_cross_entropy_of_the_response_tokens():
    hidden, unembed, batch = random_batch(0)
    loss = MemoryObjective(ER(rows=1, coef=0.3), chunk=4)(hidden, unembed, batch)
    logps = np.take_along_axis(log_softmax(hidden @ unembed), np.array(batch.targets)[..., None], 2)
    mask = np.array(batch.mask)
    np.testing.assert_allclose(loss.sum, -0.3 * logps[..., 0][mask].sum(), rtol=1e-5)
    assert loss.count == mask.sum() == 8


def test_the_gradients_are_added():
    g, m = ({"w": jnp.array(x), "frozen": None} for x in ([1.0, 2.0], [-3.0, 0.5]))
    combined, metrics = ER(rows=1).combine_gradients(g, m)
    assert combined["w"].tolist() == [-2.0, 2.5] and not metrics
    assert jax.tree.structure(combined) == jax.tree.structure(g)
