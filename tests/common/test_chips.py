"""Figures of accelerators, and the memory that a program gets."""

import types

import pytest
from jaxlib import xla_client

from cptjax.common import chips


def devices(kind):
    return [types.SimpleNamespace(device_kind=kind)]


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
    ],
)
def test_a_device_is_found_by_its_kind(kind, name):
    assert chips.find_chip(kind).name == name


@pytest.mark.parametrize(
    "kind",
    [
        *("NVIDIA A100-SXM4-40GB", "NVIDIA GH200 480GB", "NVIDIA H100 PCIe", "NVIDIA H100 NVL"),
        *("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "cpu"),
    ],
)
def test_an_unknown_device_has_no_figures(kind):
    """Most of these have another memory than the GPU in the table that has a part of the name."""
    assert chips.find_chip(kind) is None


def test_a_gpu_gives_jax_the_memory_that_plans_count_with(monkeypatch):
    for name in chips.SHARE_VARIABLES:
        monkeypatch.setenv(name, "")
    gpus = devices("NVIDIA H100 80GB HBM3")
    chips.reserve_gpu_memory()
    share = xla_client.generate_pjrt_gpu_plugin_options()["memory_fraction"]
    assert chips.usable_memory(gpus) == share * 84.9e9 and share > 0.75


@pytest.mark.parametrize("name", chips.SHARE_VARIABLES)
def test_a_share_that_the_user_gives_counts(monkeypatch, name):
    """JAX refuses the two variables together."""
    for other in chips.SHARE_VARIABLES:
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, ".15")
    chips.reserve_gpu_memory()
    assert xla_client.generate_pjrt_gpu_plugin_options()["memory_fraction"] == 0.15
    assert chips.usable_memory(devices("NVIDIA H100 80GB HBM3")) == 0.15 * 84.9e9
    assert chips.usable_memory(devices("TPU v5e")) == 0.98 * 16 * 2**30
    monkeypatch.setenv(name, "most")
    with pytest.raises(ValueError, match=f"{name}=most: expected a number such as 0.9"):
        chips.gpu_memory_share()
