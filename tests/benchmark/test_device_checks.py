"""The checks of a platform pass here, and fail where a path computes something else."""

import math

import jax
import pytest
from device_fixtures import devices  # noqa: F401
from test_phase_times import NANO

from cptjax.benchmark import device_checks, workload
from cptjax.benchmark.device_checks import Check
from cptjax.benchmark.phase_times import BenchModel
from cptjax.benchmark.workload import Workload
from cptjax.models import attention


@pytest.fixture
def model(monkeypatch, devices):  # noqa: F811
    monkeypatch.setitem(workload.BENCH_SIZES, "nano", NANO)
    work = Workload("nano", image=84, prompts=2, group=2, text=8, new=8)
    model = BenchModel(work, training=False)
    with jax.set_mesh(model.mesh):
        yield model


def test_every_path_of_a_cpu_computes_what_float32_does(model):
    pytest.importorskip("qwix")
    checks = [*device_checks.check_groups(model), *device_checks.check_sampling(model)]
    assert [c.name for c in checks if not c.passed] == []
    assert [c.name for c in checks] == [
        "log-probabilities of unrelated rows",
        "log-probabilities of packed groups",
        "sampling",
        "trainer against sampler",
        "sampling with slots",
        "sampling with slots of fewer rows",
        "sampling with layers in a loop",
        "sampling with int8 weights",
    ]
    assert 1e-6 < checks[-1].error, "int8 weights are rounded"


def test_an_unknown_size_is_refused():
    with pytest.raises(ValueError, match="^--size=70b: expected one of cpu-s, cpu-m, 3b, 7b"):
        device_checks.run_checks("70b")


def test_a_wrong_back_end_fails(model, monkeypatch):
    checks = [*device_checks.check_attention(model), *device_checks.check_group_attention(model)]
    assert all(c.passed for c in checks) and len(checks) == 4
    kernel = attention._tiled
    monkeypatch.setattr(
        attention, "_tiled", lambda *args, causal, offset: kernel(*args, causal=False, offset=0)
    )
    found = {c.name: c.passed for c in device_checks.check_attention(model)}
    assert found == {"attention xla": True, "attention tiled": False}
    assert not Check("", math.nan, 1.0).passed
