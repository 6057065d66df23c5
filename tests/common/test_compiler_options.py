"""A program is compiled with the options of the platform that it runs on."""

import jax
import jax.numpy as jnp
import pytest

from cptjax import sharding
from cptjax.common.compiler_options import COMPILER_OPTIONS, PlatformJit
from cptjax.planning import aot_compile


def test_the_compiler_knows_every_option_of_a_gpu():
    """The compilers of CPUs and GPUs share one table of options; an unknown one is an error."""
    options = COMPILER_OPTIONS["gpu"]
    jax.jit(lambda x: x + 1, compiler_options=options)(jnp.ones(2)).block_until_ready()
    with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option"):
        jax.jit(lambda x: x + 1, compiler_options=options | {"xla_gpu_nothing": True})(1.0)


def test_a_program_is_compiled_once_with_the_options_of_its_platform(monkeypatch):
    """An option that does not exist shows that the options reach the compiler."""
    traces = []

    def double(x):
        traces.append(x)
        return 2 * x

    program = PlatformJit(double)
    assert [float(program(jnp.float32(x))) for x in (3, 4)] == [6, 8] and len(traces) == 1
    monkeypatch.setitem(COMPILER_OPTIONS, "cpu", {"xla_cpu_nothing": True})
    assert float(program(jnp.float32(5))) == 10  # it is compiled already
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_cpu_nothing"):
        PlatformJit(double)(jnp.float32(3))


def test_a_program_for_a_slice_has_the_options_of_a_tpu(no_cache, monkeypatch):
    """A product with a weight that 16 devices share is one product, not one for each device."""
    pytest.importorskip("libtpu")
    mesh = sharding.make_mesh(devices=aot_compile.topology_devices("v5p:2x2x4"))
    weight = sharding.abstract_array((2048, 8192), jnp.bfloat16, mesh, ("embed",))
    rows = sharding.abstract_array((16 * 512, 2048), jnp.bfloat16, mesh, ("batch",))

    def text() -> str:
        with jax.set_mesh(mesh):
            return PlatformJit(lambda x, w: x @ w).lower(rows, weight).compile().as_text()

    assert "all-gather" in text() and "collective-permute" not in text()
    monkeypatch.setitem(COMPILER_OPTIONS, "tpu", {})
    assert "collective-permute" in text()
