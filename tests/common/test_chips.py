"""Figures of accelerators, and the memory that a program gets."""

import os
import types

import pytest

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
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    chips.reserve_gpu_memory()
    share = float(os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"])
    assert chips.usable_memory(devices("NVIDIA H100 80GB HBM3")) == share * 80e9
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", ".15")
    chips.reserve_gpu_memory()
    assert os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] == ".15"
