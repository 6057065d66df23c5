"""A program is compiled with the options of the platform that it runs on."""

import jax
import jax.numpy as jnp
import pytest

from cptjax import sharding
from cptjax.common import chips
from cptjax.common.compiler_options import CHIP_OPTIONS, COMPILER_OPTIONS, PlatformJit
from cptjax.planning import aot_compile, hlo, hlo_costs, timeline


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


def compiled_text(function, args, mesh, folder) -> str:
    """Return the compiler's own text, because JAX does not read that of a sparse core."""
    options = {"xla_dump_to": str(folder), "xla_dump_hlo_as_text": True}
    with jax.set_mesh(mesh):
        PlatformJit(function).lower(*args).compile(options)
    return hlo.read_compiler_dump(str(folder))[0]


def test_a_program_for_a_slice_has_the_options_of_a_tpu(quick_tpu_compiler, monkeypatch, tmp_path):
    """A product with a weight that 16 devices share is one product, not one for each device."""
    pytest.importorskip("libtpu")
    mesh = sharding.make_mesh(devices=aot_compile.topology_devices("v5p:2x2x4"))
    weight = sharding.abstract_array((2048, 8192), jnp.bfloat16, mesh, ("embed",))
    rows = sharding.abstract_array((16 * 512, 2048), jnp.bfloat16, mesh, ("batch",))

    def text(name: str) -> str:
        return compiled_text(lambda x, w: x @ w, (rows, weight), mesh, tmp_path / name)

    one = text("one")
    assert "all-gather" in one and "collective-permute" not in one
    monkeypatch.setitem(COMPILER_OPTIONS, "tpu", {})
    assert "collective-permute" in text("many")


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5p:2x2x4", "v6e:4x4"])
def test_weights_are_gathered_while_others_are_multiplied(
    topology, no_cache, monkeypatch, tmp_path
):
    """Without the sparse cores, a layer of two products waits for each of its weights."""
    pytest.importorskip("libtpu")
    mesh = sharding.make_mesh(devices=aot_compile.topology_devices(topology))
    chip = chips.chip_of_devices(list(mesh.devices.flat))
    weights = [sharding.abstract_array((3, 4096, 4096), jnp.bfloat16, mesh, (None, "embed"))] * 2
    rows = sharding.abstract_array((16 * 4096, 4096), jnp.bfloat16, mesh, ("batch",))

    def layer(x, weights):
        for w in weights:
            x = jnp.tanh(x @ w)
        return x, None

    def layers(x, weights):
        return jax.lax.scan(layer, x, weights)[0]

    def waiting(name: str) -> float:
        text = compiled_text(layers, (rows, weights), mesh, tmp_path / name)
        products = hlo_costs.count_flops(text) / chip.flops
        return timeline.scheduled_seconds(text, mesh, chip) - products

    with_cores = waiting("with")
    monkeypatch.setitem(CHIP_OPTIONS, chip.name, {})
    assert with_cores < 0.7 * waiting("without")
