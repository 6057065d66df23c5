"""Fixtures of all tests of tasks."""

import datasets
import pytest
from PIL import Image
from row_helpers import RED


@pytest.fixture(autouse=True)
def quiet_cache(tmp_path_factory, monkeypatch):
    """Keep the cache of `datasets` in a temporary folder, and its progress bars off."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    datasets.disable_progress_bars()


@pytest.fixture
def folder(tmp_path):
    """A folder with two images for a user's rows."""
    Image.new("RGB", (12, 8), RED).save(tmp_path / "a.png")
    Image.new("RGB", (8, 12), "blue").save(tmp_path / "b.jpg")
    return tmp_path
