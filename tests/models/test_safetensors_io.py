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


def test_a_new_folder_is_complete_and_removes_what_killed_processes_left(tmp_path):
    left, other = tmp_path / ".hf.123.partial", tmp_path / ".hf2.123.partial"
    for folder in (left, other):
        folder.mkdir()
    with safetensors_io.new_folder(tmp_path / "hf") as folder:
        (folder / "config.json").write_text("{}")
        assert not (tmp_path / "hf").exists() and not left.exists()
    assert (tmp_path / "hf" / "config.json").read_text() == "{}" and other.exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == [".hf2.123.partial", "hf"]
