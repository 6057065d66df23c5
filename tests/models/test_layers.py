"""Layers equal their formulas in numpy."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cptjax.models import layers


def _normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_a_linear_map_contracts_its_inputs_and_adds_adapters_and_bias():
    x, w, b = _normal(2, 5, 3, 4), _normal(3, 4, 6, seed=1), _normal(6, seed=2)
    a, c = _normal(3, 4, 2, seed=3), _normal(2, 6, seed=4)
    p = {"w": w, "b": b, "lora_a": a, "lora_b": c}
    expected = np.einsum("btnh,nhd->btd", x, w + 0.5 * np.einsum("nhr,rd->nhd", a, c)) + b
    np.testing.assert_allclose(layers.linear(p, x, 2, 0.5), expected, atol=1e-4)


def test_int8_weights_have_a_scale_per_output():
    q = np.random.default_rng(0).integers(-127, 128, (4, 6)).astype(np.int8)
    x, scale = _normal(3, 4), np.linspace(0.01, 0.1, 6, dtype=np.float32)
    found = layers.linear({"int8": q, "scale": scale}, x)
    np.testing.assert_allclose(found, x @ (q * scale), rtol=1e-4, atol=1e-4)


def test_rms_norm_normalises_in_float32_and_scales_in_the_dtype_of_x():
    x, scale = _normal(3, 64), 1 + 0.1 * _normal(64, seed=1)
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale
    np.testing.assert_allclose(layers.rms_norm(x, scale, 1e-6), expected, rtol=1e-5)
    assert layers.rms_norm(jnp.bfloat16(x), scale, 1e-6).dtype == jnp.bfloat16


@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_norms_reduce_arrays_without_row_axes_of_size_1(norm):
    scale = {"w": 1 + _normal(8, seed=1), "b": _normal(8, seed=2)}

    def total(scale, x):
        if norm == "rms":
            return jnp.sum(jnp.sin(layers.rms_norm(x, scale["w"], 1e-6)))
        return jnp.sum(jnp.sin(layers.layer_norm(scale, x, 1e-6)))

    gradient, x = jax.jit(jax.grad(total, (0, 1))), _normal(5, 8)
    of_scale, of_x = gradient(scale, x)
    of_scale_again, of_row = gradient(scale, x[None])
    jax.tree.map(np.testing.assert_allclose, of_scale_again, of_scale)
    np.testing.assert_allclose(of_row[0], of_x)
    program = gradient.lower(scale, x[None]).as_text()
    reduced = re.findall(r"stablehlo.reduce.*?across dimensions.*?: \(tensor<(\S+)xf32>", program)
    assert "5x8" in reduced and "1x5x8" not in reduced


def test_a_rotation_keeps_lengths_and_depends_on_the_distance_alone():
    q, k = _normal(8), _normal(8, seed=1)
    angles = lambda n: n * 10.0 ** -np.arange(4, dtype=np.float32)
    turn = lambda x, n: layers.rotate(x[None], (np.cos(angles(n)), np.sin(angles(n))))[0]
    assert np.linalg.norm(turn(q, 7.0)) == pytest.approx(np.linalg.norm(q), rel=1e-5)
    assert turn(q, 9.0) @ turn(k, 4.0) == pytest.approx(float(turn(q, 5.0) @ k), rel=1e-4)


def test_the_gradients_of_the_gated_silu_are_those_of_its_formula():
    gate, up = _normal(5, 7), _normal(5, 7, seed=1)
    plain = lambda gate, up: jnp.sin(gate * jax.nn.sigmoid(gate) * up).sum()
    ours = lambda gate, up: jnp.sin(layers.gated_silu(gate, up)).sum()
    for a, b in zip(
        jax.grad(ours, (0, 1))(gate, up), jax.grad(plain, (0, 1))(gate, up), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
