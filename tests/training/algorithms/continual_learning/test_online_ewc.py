"""Online EWC against a sum by hand."""

import jax
import numpy as np
import pytest
from method_helpers import assert_kept_as_planned, random_tree, stage_end

from cptjax.training.algorithms.continual_learning.ewc import EWC
from cptjax.training.algorithms.continual_learning.online_ewc import OnlineEWC

STAGES = [jax.tree.map(np.square, random_tree(seed)) for seed in range(3)]


def kept_after(method):
    kept = None
    for mean in STAGES:
        _, kept = method.stage_end(stage_end(kept=kept, mean=mean))
    return kept


@pytest.mark.parametrize("decay", [0.25, 1.0])
def test_the_importance_of_a_stage_decays_with_each_later_stage(decay):
    method = OnlineEWC(1.0, decay=decay)
    kept = kept_after(method)
    first, second, third = (np.asarray(stage["text"]["embed"]) for stage in STAGES)
    expected = decay**2 * first + decay * second + third
    np.testing.assert_allclose(kept["text"]["embed"], expected, rtol=1e-6)
    assert_kept_as_planned(method, kept, 4)


def test_with_decay_1_it_is_ewc():
    online, plain = kept_after(OnlineEWC(1.0, decay=1.0)), kept_after(EWC(1.0))
    jax.tree.map(np.testing.assert_array_equal, online, plain)
    with pytest.raises(ValueError, match="decay=0: expected 0 < decay <= 1"):
        OnlineEWC(1.0, decay=0).check(None)
