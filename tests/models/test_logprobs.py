"""Log-probabilities by chunks equal the formula over all logits, on all meshes."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from cptjax.models import logprobs
from cptjax.sharding import make_mesh

N, D, V = 37, 12, 50


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    return normal(N, D), normal(D, V), jnp.asarray(rng.integers(0, V, N))


def reference(hidden, unembed, targets, temperature=1.0):
    logp = jax.nn.log_softmax(hidden @ unembed / temperature)
    return logp[jnp.arange(len(targets)), targets], -jnp.sum(jnp.exp(logp) * logp, -1)


@pytest.mark.parametrize("chunk", [1, 5, 36, 37])
def test_values_and_gradients_do_not_depend_on_the_chunk(arrays, chunk):
    hidden, unembed, targets = arrays
    weight = jnp.linspace(-1, 1, N)

    def ours(h, w):
        logp, entropy = logprobs.token_logps(
            h,
            w,
            targets,
            chunk=chunk,
            entropy=True,
            entropy_grad=True,
            temperature=0.7,
        )
        return jnp.sum(weight * logp + entropy), (logp, entropy)

    def plain(h, w):
        logp, entropy = reference(h, w, targets, 0.7)
        return jnp.sum(weight * logp + entropy), (logp, entropy)

    got, want = (jax.jit(jax.grad(f, (0, 1), has_aux=True))(hidden, unembed) for f in (ours, plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), got, want)


def test_a_logged_entropy_carries_no_gradient(arrays):
    hidden, unembed, targets = arrays
    grad = jax.grad(
        lambda h: logprobs.token_logps(h, unembed, targets, chunk=8, entropy=True)[1].sum()
    )(hidden)
    assert not np.any(grad)
    assert logprobs.token_logps(hidden, unembed, targets)[1] is None


@pytest.mark.parametrize("top_k", [0, 5, V - 1])
@pytest.mark.parametrize("direction", logprobs.KL_DIRECTIONS)
def test_distill_kl_equals_numpy(arrays, direction, top_k):
    hidden, unembed, _ = arrays
    rng = np.random.default_rng(1)
    teacher, other = (
        rng.normal(size=(N, D)).astype(np.float32),
        rng.normal(size=(D, V)).astype(np.float32),
    )
    got = logprobs.distill_kl(
        hidden,
        jnp.asarray(teacher),
        unembed,
        jnp.asarray(other),
        direction=direction,
        top_k=top_k,
        chunk=7,
    )

    def softmax(z):
        e = np.exp(z - z.max(-1, keepdims=True), dtype=np.float64)
        return e / e.sum(-1, keepdims=True)

    for i in range(N):
        s, t = softmax(np.asarray(hidden[i] @ unembed)), softmax(teacher[i] @ other)
        if top_k:
            kept = np.argsort(-t)[:top_k]
            s, t = (np.append(p[kept], 1 - p[kept].sum()) for p in (s, t))
        a, b = (t, s) if direction == "forward" else (s, t)
        np.testing.assert_allclose(got[i], np.sum(a * np.log(a / b)), rtol=1e-3, atol=1e-4)


def test_top_k_is_a_lower_bound_that_reaches_the_full_divergence(arrays):
    hidden, unembed, _ = arrays
    teacher = hidden[::-1]
    kl = jax.jit(logprobs.distill_kl, static_argnames="top_k")
    full, few, nearly = (kl(hidden, teacher, unembed, unembed, top_k=k) for k in (0, 5, V - 1))
    assert np.all(few <= full + 1e-5) and np.any(few < full - 1e-3)
    np.testing.assert_allclose(nearly, full, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("top_k", [0, 5])
@pytest.mark.parametrize("direction", logprobs.KL_DIRECTIONS)
def test_a_teacher_equal_to_the_student_gives_no_gradient(arrays, direction, top_k):
    hidden, unembed, _ = arrays
    kl = lambda h, w: logprobs.distill_kl(
        h, hidden, w, unembed, direction=direction, top_k=top_k, chunk=10
    ).sum()
    value, grads = jax.jit(jax.value_and_grad(kl, (0, 1)))(hidden, unembed)
    assert abs(value) < 1e-4
    jax.tree.map(lambda g: np.testing.assert_allclose(g, 0, atol=5e-5), grads)


def test_no_gradient_reaches_the_teacher(arrays):
    hidden, unembed, _ = arrays
    grads = jax.grad(
        lambda t, w: logprobs.distill_kl(hidden, t, unembed, w, direction="reverse").sum(), (0, 1)
    )(hidden * 2, unembed)
    assert not any(np.any(g) for g in grads)


def test_top_entropy_is_one_for_equal_logits_and_small_for_one_large_logit():
    hidden = jnp.array([[0.0], [1.0]])
    unembed = jnp.zeros((1, V)).at[0, 3].set(30.0)
    got = logprobs.top_entropy(hidden, unembed, k=20)
    np.testing.assert_allclose(got, [1.0, 0.0], atol=1e-5)
    assert not np.any(jax.grad(lambda h: logprobs.top_entropy(h, unembed).sum())(hidden))


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 1, 8)])
def test_on_a_mesh_values_and_gradients_are_the_same(shape):
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices")
    rng = np.random.default_rng(2)
    hidden, unembed = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((64, 16), (16, 48)))
    targets = jnp.asarray(rng.integers(0, 48, 64))

    def loss(h, w):
        logp, entropy = logprobs.token_logps(
            h, w, targets, chunk=4, entropy=True, entropy_grad=True
        )
        return (
            jnp.sum(logp * jnp.arange(64))
            + entropy.sum()
            + logprobs.distill_kl(h, h[::-1], w, w, top_k=3, chunk=4).sum()
        )

    want = jax.jit(jax.value_and_grad(loss, (0, 1)))(hidden, unembed)
    mesh = make_mesh(*shape, devices=jax.devices()[:8])
    put = lambda x, *axes: jax.device_put(x, NamedSharding(mesh, P(*axes)))
    with jax.set_mesh(mesh):
        got = jax.jit(jax.value_and_grad(loss, (0, 1)))(
            put(hidden, ("data", "fsdp")), put(unembed, "fsdp", "model")
        )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, want)


def test_rows_that_the_mesh_does_not_divide_are_padded(arrays):
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices")
    with jax.set_mesh(make_mesh(1, 8, 1, devices=jax.devices()[:8])):
        got, _ = jax.jit(lambda *a: logprobs.token_logps(*a, chunk=2))(*arrays)
    np.testing.assert_allclose(got, reference(*arrays)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"chunk": 0}, "at least 1"),
        ({"temperature": 0.0}, "above 0"),
        ({"direction": "sideways"}, "forward, reverse"),
        ({"top_k": -1}, "whole vocabulary"),
    ],
)
def test_bad_settings_are_one_line(settings, words):
    with pytest.raises(ValueError, match=words) as error:
        logprobs.check_logprobs(**settings)
    assert "\n" not in str(error.value)


def compiled_for_tpu(f, *shapes, mesh_shape=None, specs=None):
    pytest.importorskip("libtpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault(
        "ALLOW_MULTIPLE_LIBTPU_LOAD", "1"
    )  # only compiles; another test process may hold the lock
    from jax.experimental import topologies

    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"no TPU compiler: {error}")
    mesh = make_mesh(*(mesh_shape or (1, 1, 1)), devices=devices[: np.prod(mesh_shape or (1,))])
    place = [NamedSharding(mesh, P(*s)) for s in (specs or [()] * len(shapes))]
    args = [
        jax.ShapeDtypeStruct(s, dtype, sharding=where)
        for (s, dtype), where in zip(shapes, place, strict=True)
    ]
    with jax.set_mesh(mesh):
        return jax.jit(f).lower(*args).compile()


SIZES = ((8192, 2048), jnp.bfloat16), ((2048, 151936), jnp.bfloat16), ((8192,), jnp.int32)


@pytest.mark.slow
@pytest.mark.usefixtures("no_cache")
def test_the_compiled_gradient_on_a_tpu_holds_one_chunk_of_logits():
    def gradients(chunk):
        return jax.grad(lambda h, w, t: logprobs.token_logps(h, w, t, chunk=chunk)[0].sum(), (0, 1))

    few, whole = (
        compiled_for_tpu(gradients(c), *SIZES).memory_analysis().temp_size_in_bytes / 1e6
        for c in (512, 8192)
    )
    assert few < 330  # MB; 512 x 151,936 float32 logits are 311
    assert whole > 2400


@pytest.mark.slow
@pytest.mark.usefixtures("no_cache")
def test_a_tpu_mesh_gathers_the_unembedding_once_and_never_the_logits():
    gradients = jax.grad(lambda h, w, t: logprobs.token_logps(h, w, t, chunk=512)[0].sum(), (0, 1))
    rows = ("data", "fsdp")
    text = compiled_for_tpu(
        gradients, *SIZES, mesh_shape=(1, 2, 2), specs=[(rows,), ("fsdp", "model"), (rows,)]
    ).as_text()
    collectives = [
        line
        for line in text.splitlines()
        if any(f" {op}(" in line or f" {op}-start(" in line for op in ("all-reduce", "all-gather"))
    ]
    assert collectives
    assert not any("f32[512,75968]" in line for line in collectives)
    assert sum("[2048,75968]" in line.split("all-")[0] for line in collectives) <= 2


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_backward_pass_multiplies_in_the_dtype_of_the_model(arrays, dtype):
    hidden, unembed, targets = (x.astype(dtype) if x.ndim > 1 else x for x in arrays)
    loss = lambda h, w: logprobs.token_logps(h, w, targets, chunk=8)[0].mean()
    gradient = jax.jit(jax.grad(loss, (0, 1)))
    lowered = gradient.lower(hidden, unembed).as_text()
    products = [x for x in lowered.splitlines() if "stablehlo.dot_general" in x]
    name = {jnp.float32: "f32", jnp.bfloat16: "bf16"}[dtype]
    assert len(products) == 3  # the logits and two gradients
    for product in products:
        operands = product.split(" : (")[1].split(")")[0].split(", ")
        assert all(x.endswith(f"x{name}>") for x in operands), product
    exact = jax.grad(loss, (0, 1))(*(x.astype(jnp.float32) for x in (hidden, unembed)))
    for ours, want in zip(gradient(hidden, unembed), exact, strict=True):
        error = np.linalg.norm(ours.astype(jnp.float32) - want) / np.linalg.norm(want)
        assert error < (1e-6 if dtype == jnp.float32 else 0.01), error
