"""Runs inside the tests' process, on one of its devices or on all of them."""

import functools

import jax
import pytest

from cptjax import sharding
from cptjax.common import console

MAKE = sharding.make_mesh


@pytest.fixture
def devices(monkeypatch):
    """Return a function that sets how many devices a run sees; the default is one."""
    use = functools.partial(see, monkeypatch)
    use(1)
    return use


@pytest.fixture(scope="module")
def one_device():
    """Runs of a module see one device, also those of fixtures that tests share."""
    with pytest.MonkeyPatch.context() as patch:
        see(patch, 1)
        yield


def see(patch, count: int) -> None:
    """Runs see so many devices until the patch is undone."""
    patch.setattr(sharding, "make_mesh", functools.partial(MAKE, devices=jax.devices()[:count]))


@pytest.fixture
def said():
    """Plain lines, so that capsys sees them."""
    console.set_console_mode("plain")
    yield
    console.set_console_mode("auto")
