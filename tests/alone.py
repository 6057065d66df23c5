"""Runs inside the tests' process, on one of its devices or on all of them."""

import functools

import jax
import pytest

from cptjax import console, sharding


@pytest.fixture
def devices(monkeypatch):
    """Sets how many devices a run sees; one unless asked otherwise."""
    make = sharding.make_mesh

    def use(count: int) -> None:
        monkeypatch.setattr(sharding, "make_mesh", functools.partial(make, devices=jax.devices()[:count]))

    use(1)
    return use


@pytest.fixture
def said():
    """Plain lines, so that capsys sees them."""
    console.configure("plain")
    yield
    console.configure("auto")
