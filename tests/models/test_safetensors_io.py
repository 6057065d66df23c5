"""Parts of arrays in files of safetensors."""

import numpy as np

from cptjax.models import safetensors_io


def test_contiguous_runs_cover_a_box():
    x = np.arange(4 * 3 * 5).reshape(4, 3, 5)
    whole = slice(None)
    for box in [
        (whole,) * 3,
        (slice(1, 3), whole, whole),
        (whole, slice(0, 2), whole),
        (slice(2, 4), slice(1, 2), slice(1, 4)),
    ]:
        assert (
            np.concatenate(
                [x.reshape(-1)[r] for r in safetensors_io.contiguous_runs(box, x.shape)]
            ).tolist()
            == x[box].reshape(-1).tolist()
        )
    assert len(safetensors_io.contiguous_runs((slice(1, 3), whole, whole), x.shape)) == 1
