"""bfloat16 products on a CPU equal rounded float32 products, and XLA converts none of them."""

import re
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cptjax import sharding
from cptjax.models import bfloat16_products, decoder, layers, logprobs

CPU_FLAGS = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""


def _normal(*shape, seed=0):
    x = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return jnp.asarray(x, jnp.bfloat16)


def _assert_rounded(found, expected):
    """Values are those of float32 products, rounded to the 8 bits of bfloat16."""
    assert found.dtype == jnp.bfloat16
    scale = np.abs(expected).max()
    np.testing.assert_allclose(
        np.asarray(found, np.float32), expected, rtol=2**-8, atol=1e-5 * scale
    )


@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(33, 8, 24), (40, 24, 8), (1, 8, 8)])
def test_values_and_gradients_are_float32_products_rounded_once(rows, inputs, outputs):
    x, w, slope = _normal(rows, inputs), _normal(inputs, outputs), _normal(rows, outputs, seed=1)
    y, pull = jax.vjp(bfloat16_products.multiply, x, w)
    of_x, of_w = pull(slope)
    x, w, slope = (np.asarray(z, np.float32) for z in (x, w, slope))
    for found, expected in ((y, x @ w), (of_x, slope @ w.T), (of_w, x.T @ slope)):
        _assert_rounded(found, expected)


def test_a_linear_map_with_several_axes_has_the_gradients_of_float32():
    x, w = _normal(5, 7, 3, 4), _normal(3, 4, 2, 6, seed=1)
    b, slope = _normal(2, 6, seed=2), _normal(5, 7, 2, 6, seed=3)
    map_rows = lambda x, w, b: layers.linear({"w": w, "b": b}, x, 2)
    found = jax.vjp(map_rows, x, w, b)[1](slope)
    wide = [z.astype(jnp.float32) for z in (x, w, b, slope)]
    expected = jax.vjp(map_rows, *wide[:3])[1](wide[3])
    for a, e in zip(found, expected, strict=True):
        _assert_rounded(a, np.asarray(e))


def test_a_tied_unembedding_is_the_transposed_embedding_with_its_gradient():
    embed, hidden, targets = _normal(33, 8), _normal(20, 8, seed=1), jnp.arange(20)

    def loss(embed, hidden):
        unembed = decoder.unembedding({"embed": embed})
        return logprobs.token_logps(hidden, unembed, targets)[0].sum()

    np.testing.assert_array_equal(bfloat16_products.transposed(embed), embed.T)
    found = jax.grad(loss, (0, 1))(embed, hidden)
    wide = embed.astype(jnp.float32), hidden.astype(jnp.float32)
    for a, b in zip(found, jax.grad(loss, (0, 1))(*wide), strict=True):
        b = np.asarray(b)  # the gradient of the logits is rounded, too
        np.testing.assert_allclose(
            np.asarray(a, np.float32), b, rtol=2**-7, atol=0.01 * np.abs(b).max()
        )


def test_gradients_of_biases_and_scales_are_summed_in_float32():
    """Sums of 4,096 ones and small numbers; a sum in bfloat16 would lose most of the latter."""
    n = 4096
    x = jnp.ones((n, 2), jnp.bfloat16)
    slope = jnp.where(jnp.arange(n)[:, None] % 2, 1.0, 2**-7).astype(jnp.bfloat16)
    slope = jnp.broadcast_to(slope, (n, 2))
    expected = n / 2 * (1 + 2**-7)
    p = {"w": jnp.eye(2, dtype=jnp.bfloat16), "b": jnp.zeros(2, jnp.float32)}
    of_bias = jax.vjp(lambda b: layers.linear(p | {"b": b}, x), p["b"])[1](slope)[0]
    np.testing.assert_allclose(of_bias, expected, rtol=2**-8)
    of_scale = jax.vjp(lambda s: layers.rms_norm(x, s, 0.0), jnp.ones(2))[1](slope)[0]
    np.testing.assert_allclose(of_scale, expected, rtol=2**-8)


def test_they_are_used_for_bfloat16_on_one_cpu_only():
    from jax.experimental import topologies

    x = _normal(2, 2)
    assert bfloat16_products.are_faster(x)
    assert not bfloat16_products.are_faster(x.astype(jnp.float32))
    with jax.set_mesh(sharding.make_mesh(devices=jax.devices()[:1])):
        assert bfloat16_products.are_faster(x)
    with jax.set_mesh(sharding.make_mesh()):
        assert sharding.on_cpu() and not bfloat16_products.are_faster(x)
    chips = topologies.get_topology_desc("v5e:2x2", "tpu").devices
    with jax.set_mesh(sharding.make_mesh(devices=chips[:1])):
        assert not sharding.on_cpu() and not bfloat16_products.are_faster(x)


@pytest.mark.parametrize(("kind", "expected"), [("cpu", True), ("TPU v5p", False)])
def test_the_kind_of_a_device_tells_a_cpu(monkeypatch, kind, expected):
    """Abstract devices of jax 0.10.0 have a kind but no platform."""
    mesh = types.SimpleNamespace(
        empty=False, size=1, abstract_device=types.SimpleNamespace(device_kind=kind)
    )
    monkeypatch.setattr(jax.sharding, "get_abstract_mesh", lambda: mesh)
    assert sharding.on_cpu() == expected


@pytest.mark.skipif("amx_bf16" not in CPU_FLAGS, reason="this CPU has no AMX instructions")
@pytest.mark.parametrize("part", ["linear", "logits", "tied logits"])
def test_no_product_converts_its_inputs_to_float32(part):
    x, w, back = _normal(512, 64), _normal(64, 128, seed=1), _normal(128, 64, seed=2)

    def loss(x, w, back):
        if part != "linear":
            tree = {"unembed": {"w": w}} if part == "logits" else {"embed": back}
            unembed, targets = decoder.unembedding(tree), jnp.zeros(512, jnp.int32)
            return logprobs.token_logps(x, unembed, targets, chunk=512)[0].sum()
        return jnp.sum(layers.linear({"w": back}, layers.linear({"w": w}, x)))

    text = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, w, back).compile().as_text()
    types = dict(re.findall(r"%([\w.\-]+) = (\w+)\[", text)) | dict(
        re.findall(r"([\w.\-]+): (\w+)\[", text)
    )
    inputs = [
        types[name.strip("% ")]
        for products in re.findall(r" dot\(([^)]*)\)", text)
        for name in products.split(",")
    ]
    assert len(inputs) >= (8 if part == "linear" else 6) and set(inputs) == {"bf16"}
