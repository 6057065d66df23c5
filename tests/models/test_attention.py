"""Every attention back end equals the reference, values and gradients.

The TPU kernel is interpreted.
"""

import contextlib
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters import partial_eval
from jax.sharding import Mesh

from cptjax import sharding
from cptjax.models import attention, attention_tiled, decoder, vision_qwen2_5
from cptjax.models.families import PRESETS
from cptjax.types import Vision

PACKED = [1] * 50 + [2] * 90 + [3] * 40 + [0] * 20  # three conversations and right padding
LEFT = [0] * 37 + [1] * 163


def _draw(b, t, s, n, k, h, dtype=np.float32):
    rng = np.random.default_rng(0)
    return [
        jnp.asarray(rng.normal(size=shape), dtype)
        for shape in ((b, t, n, h), (b, s, k, h), (b, s, k, h), (b, t, n, h))
    ]


def _compare(run, wanted, q, k, v, weight, real, tol):
    """Values and gradients of the real tokens."""
    weight = weight * real[:, :, None, None]

    def differentiated(f):
        def loss(q, k, v):
            out = f(q, k, v)
            return jnp.sum(out * weight), out

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(q, k, v)

    ((value, out), grads), ((value0, out0), grads0) = map(differentiated, (run, wanted))
    np.testing.assert_allclose(value, value0, rtol=tol, atol=tol)
    np.testing.assert_allclose(np.asarray(out)[real], np.asarray(out0)[real], atol=tol)
    for a, b in zip(grads, grads0, strict=True):
        assert np.isfinite(a).all()
        np.testing.assert_allclose(a, b, atol=tol * max(1, float(np.abs(b).max())))


@pytest.fixture
def interpret(monkeypatch):
    monkeypatch.setattr(attention, "INTERPRET", True)


@pytest.fixture
def portable_cudnn(monkeypatch):
    """The call of cuDNN, computed by XLA: the same arguments, the same conventions."""
    calls, original = [], jax.nn.dot_product_attention

    def answer(*args, implementation, **kwargs):
        calls.append(implementation if "mask" in kwargs else f"{implementation} without a mask")
        return original(*args, **kwargs, implementation="xla")

    monkeypatch.setattr(jax.nn, "dot_product_attention", answer)
    return calls


def _naive(q, k, v, segments, causal):
    """Attention by loops, to test the reference itself."""
    out = np.zeros(q.shape)
    b, t, n, h = q.shape
    for i, j, head in np.ndindex(b, t, n):
        seen = [m for m in range(t) if segments[i][m] == segments[i][j] and (m <= j or not causal)]
        kv = head // (n // k.shape[2])
        score = np.exp([q[i, j, head] @ k[i, m, kv] / np.sqrt(h) for m in seen])
        out[i, j, head] = sum(
            s * v[i, m, kv] for s, m in zip(score / score.sum(), seen, strict=True)
        )
    return out


@pytest.mark.parametrize("causal", [True, False])
def test_the_reference_attends_within_segments(causal):
    q, k, v, _ = _draw(2, 9, 9, 4, 2, 8)
    segments = np.array([[1, 1, 1, 2, 2, 2, 2, 0, 0], [0, 0, 1, 1, 1, 1, 1, 1, 1]])
    out = attention.attend(q, k, v, segments, segments, causal=causal, backend="xla")
    np.testing.assert_allclose(
        out, _naive(*map(np.asarray, (q, k, v)), segments, causal), atol=1e-5
    )


def test_the_mask_is_the_diagram_of_the_docstring():
    segments = jnp.array([[1, 1, 2, 2, 0]])
    mask = attention.segment_mask(segments, segments, True)[0]
    assert ["".join(".x"[int(x)] for x in row) for row in mask] == [
        "x....",
        "xx...",
        "..x..",
        "..xx.",
        "....x",
    ]


def test_a_response_reads_the_prompt_and_its_own_past():
    """The gradient of each output says which inputs it read."""
    q, k, v, _ = _draw(1, 6, 6, 2, 1, 8)
    run = lambda v: attention.attend_group(q, k, v, jnp.ones((1, 2), int), 2, 2, "xla")[0].sum(
        (-1, -2)
    )
    read = jnp.abs(jax.jit(jax.jacobian(run))(v))[:, 0].sum((-1, -2)) > 0
    assert ["".join(".x"[int(x)] for x in row) for row in read] == [
        "x.....",
        "xx....",
        "xxx...",
        "xxxx..",
        "xx..x.",
        "xx..xx",
    ]


SPLASH = {  # heads, kv heads, head width, segments, causal
    "packed, causal": (4, 2, 32, [PACKED, LEFT], True),
    "packed, whole, width 80": (2, 2, 80, [PACKED, LEFT], False),
    "one kv head, width 128": (4, 1, 128, [LEFT, PACKED], True),
    "several blocks": (2, 1, 16, [[1] * 300 + [2] * 350 + [0] * 11], True),
}


@pytest.mark.parametrize("name", SPLASH)
def test_splash_equals_the_reference(name, interpret):
    n, kv, h, segments, causal = SPLASH[name]
    segments = np.array(segments)
    b, t = segments.shape
    q, k, v, weight = _draw(b, t, t, n, kv, h)
    run = lambda backend: (
        lambda q, k, v: attention.attend(
            q, k, v, segments, segments, causal=causal, backend=backend
        )
    )
    _compare(run("splash"), run("xla"), q, k, v, weight, segments > 0, 2e-5)


@pytest.mark.parametrize(
    "scores", [1, 200 * 200 * 4, 1 << 19], ids=["a row", "two rows", "all rows"]
)
@pytest.mark.parametrize("causal", [True, False])
def test_tiles_equal_the_reference(scores, causal, monkeypatch):
    """For any number of rows in a tile; padding sees padding, so no query is without a key."""
    monkeypatch.setattr(attention_tiled, "SCORES", scores)
    segments = np.array([PACKED, LEFT, PACKED[::-1], LEFT[::-1]])
    q, k, v, weight = _draw(4, 200, 200, 4, 2, 32)
    run = lambda backend: (
        lambda q, k, v: attention.attend(
            q, k, v, segments, segments, causal=causal, backend=backend
        )
    )
    _compare(run("tiled"), run("xla"), q, k, v, weight, segments >= 0, 1e-5)


def test_tiles_keep_no_scores_for_the_gradient():
    """The arrays kept for the backward pass hold none of queries x keys."""
    q, k, v, _ = _draw(64, 96, 96, 4, 2, 16)
    segments = np.ones((64, 96), np.int32)
    for backend, kept in (("xla", True), ("tiled", False)):
        run = lambda q, k, v: jnp.sum(
            attention.attend(q, k, v, segments, segments, causal=True, backend=backend)
        )
        _, back = jax.vjp(run, q, k, v)
        sizes = [x.size for x in jax.tree.leaves(back) if jnp.issubdtype(x.dtype, jnp.floating)]
        assert (max(sizes) >= 64 * 4 * 96 * 96) == kept
    few = lambda q, k, v: jnp.sum(
        attention.attend(q, k, v, segments[:8], segments[:8], causal=True, backend="tiled")
    )
    kept = jax.tree.leaves(jax.vjp(few, q[:8], k[:8], v[:8])[1])
    assert max(x.size for x in kept) >= 8 * 4 * 96 * 96, (
        "of few scores there is nothing to save: they are kept"
    )


def test_splash_in_bfloat16_is_close_to_float32(interpret):
    segments = np.array([PACKED])
    q, k, v, weight = _draw(1, 200, 200, 4, 2, 64, jnp.bfloat16)
    run = lambda backend: jax.jit(
        lambda q, k, v: attention.attend(q, k, v, segments, segments, causal=True, backend=backend)
    )
    exact = run("xla")(*(x.astype(jnp.float32) for x in (q, k, v)))
    off = lambda x: float(jnp.abs(x.astype(jnp.float32) - exact)[segments > 0].max())
    assert off(run("splash")(q, k, v)) < 1.5 * max(off(run("xla")(q, k, v)), 0.02)


@pytest.mark.parametrize("backend", ["splash", "cudnn", "tiled"])
@pytest.mark.parametrize("shape", [(150, 30), (128, 128)])
def test_group_attention_equals_copies_of_the_prompt(
    backend, shape, interpret, portable_cudnn, monkeypatch
):
    """With left-padded prompts, through kernels that take plain rows only."""
    monkeypatch.setattr(attention_tiled, "SCORES", 200 * 200)
    p, r = shape
    g, nq = 3, 2
    segments = np.stack([np.arange(p) >= 40, np.arange(p) >= 0]).astype(np.int32)
    dtype = jnp.bfloat16 if backend == "cudnn" else jnp.float32
    q, k, v, weight = _draw(nq, p + g * r, p + g * r, 4, 2, 32, dtype)
    real = np.concatenate([segments > 0, np.ones((nq, g * r), bool)], 1)
    run = lambda backend: lambda q, k, v: attention.attend_group(q, k, v, segments, p, g, backend)
    if backend == "cudnn":
        both = (jax.jit(run(name))(q, k, v) for name in ("cudnn", "xla"))
        got, want = (np.asarray(x, np.float32)[real] for x in both)
        assert np.abs(got - want).max() < 0.03 and portable_cudnn
    else:
        _compare(run(backend), run("xla"), q, k, v, weight, real, 2e-5)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("h", [80, 128])
def test_the_arguments_of_cudnn_give_the_reference(h, causal, portable_cudnn):
    """Segments of packed rows reach the GPU kernel."""
    segments = np.array([PACKED, LEFT])
    q, k, v, weight = _draw(2, 200, 200, 4, 2, h, jnp.bfloat16)
    run = lambda backend: (
        lambda q, k, v: attention.attend(
            q, k, v, segments, segments, causal=causal, backend=backend
        )
    )
    _compare(run("cudnn"), run("xla"), q, k, v, weight, segments > 0, 0.03)
    assert set(portable_cudnn) == {"cudnn"}


@pytest.mark.parametrize("padding", ["left", "right"])
def test_padding_on_one_side_needs_no_mask_of_cudnn(padding, portable_cudnn):
    """Rows with 0 to 199 columns of padding, and an empty one."""
    real = np.arange(199) < np.array([1, 60, 200, 120, 0])[:, None]
    segments = (real if padding == "right" else real[:, ::-1]).astype(np.int32)
    q, k, v, weight = _draw(5, 199, 199, 4, 2, 32, jnp.bfloat16)
    run = lambda backend: functools.partial(
        attention.attend,
        q_segments=segments,
        kv_segments=segments,
        causal=True,
        backend=backend,
        padding=padding,
    )
    _compare(run("cudnn"), run("xla"), q, k, v, weight, segments > 0, 0.03)
    assert set(portable_cudnn) == {"cudnn without a mask"}


MESHES = {"2,2,2": (2, 2, 2), "1,4,2": (1, 4, 2), "1,1,8": (1, 1, 8)}


@pytest.mark.parametrize("sizes", MESHES.values(), ids=MESHES)
@pytest.mark.parametrize("kernel", ["splash", "tiled"])
def test_a_mesh_does_not_change_a_kernel(sizes, kernel, interpret, monkeypatch):
    """Each device runs its own rows and heads; few key/value heads are copied over `model`."""
    monkeypatch.setattr(attention_tiled, "SCORES", 100 * 100)
    mesh = sharding.make_mesh(*sizes)
    segments = np.array([PACKED, LEFT] * 2)[:, 60:]
    q, k, v, weight = _draw(4, 140, 140, 8, 2, 32)
    run = lambda backend: (
        lambda q, k, v: attention.attend(q, k, v, segments, segments, causal=True, backend=backend)
    )
    wanted = jax.jit(jax.grad(lambda *x: jnp.sum(run("xla")(*x) * weight), (0, 1, 2)))(q, k, v)
    with jax.set_mesh(mesh):
        got = jax.jit(jax.grad(lambda *x: jnp.sum(run(kernel)(*x) * weight), (0, 1, 2)))(q, k, v)
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_the_platform_of_the_mesh_chooses_the_back_end():
    cfg = PRESETS["7b"]
    assert (
        attention.choose_backend(None, cfg, "float32") == "tiled"
        and attention.choose_backend(sharding.make_mesh(), cfg, "bfloat16") == "tiled"
    )
    fake = type("Device", (), {"platform": "tpu"})()
    mesh = type("Mesh", (), {"devices": np.array([fake])})()
    assert (
        attention.choose_backend(mesh, cfg, "float32") == "splash"
        and attention.choose_backend(mesh, cfg, "float32", "xla") == "xla"
    )
    with pytest.raises(ValueError, match="flash"):
        attention.choose_backend(None, cfg, "bfloat16", "flash")


def test_cudnn_is_chosen_only_where_it_runs():
    """float32, or heads of other sizes, choose another back end; cudnn by name is then refused."""
    cfg = PRESETS["7b"]
    odd = dataclasses.replace(cfg, vision=dataclasses.replace(cfg.vision, width=16 * 84))
    gpu, cpu = (
        type("Mesh", (), {"devices": np.array([type("Device", (), {"platform": p})()])})()
        for p in ("gpu", "cpu")
    )
    assert (
        attention.choose_backend(gpu, cfg, "bfloat16")
        == attention.choose_backend(gpu, cfg, jnp.bfloat16, "cudnn")
        == "cudnn"
    )
    padded = attention.choose_backend(gpu, cfg, "bfloat16", "cudnn_padded")
    assert attention.reads_packed_rows("cudnn") and not attention.reads_packed_rows(padded)
    for place, model, dtype, auto in (
        (gpu, cfg, "float32", "xla"),
        (gpu, odd, "bfloat16", "xla"),
        (cpu, cfg, "bfloat16", "tiled"),
    ):
        assert attention.choose_backend(place, model, dtype) == auto
        for wanted in ("cudnn", "cudnn_padded"):
            with pytest.raises(ValueError, match=f"{wanted}'.*got {dtype} and heads of 128 and"):
                attention.choose_backend(place, model, dtype, wanted)


@pytest.mark.parametrize("sizes", [None, (2, 2, 2), (1, 1, 8)])
@pytest.mark.parametrize(("t", "padding"), [(127, ""), (128, "left"), (128, "right")])
def test_a_gpu_program_calls_cudnn(t, padding, sizes, monkeypatch):
    """Forward and backward, with odd lengths and on meshes, without a GPU."""
    from jax._src.cudnn import fused_attention_stablehlo

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    q, k, v, _ = _draw(4, t, t, 8, 2, 80, jnp.bfloat16)
    segments = np.array([PACKED[:t], LEFT[:t]] * 2)
    f = lambda q, k, v: (
        attention.attend(q, k, v, segments, segments, causal=True, backend="cudnn", padding=padding)
        .astype(jnp.float32)
        .sum()
    )
    with jax.set_mesh(sharding.make_mesh(*sizes)) if sizes else contextlib.nullcontext():
        lowered = (
            jax.jit(jax.grad(f, (0, 1, 2)))
            .trace(q, k, v)
            .lower(lowering_platforms=("cuda",))
            .as_text()
        )
    called = "__cudnn$fmhaSoftmax" if padding else "__cudnn$fmhaScaleBiasSoftmax"
    found = set(re.findall(r"__cudnn\$\w+", lowered))
    assert found == {called, called + "Backward"}


def _one_layer(backend, remat):
    """Return the gradient of a decoder with the 3B model's heads, and its arguments."""
    text = dataclasses.replace(PRESETS["3b"].text, depth=2, width=64, mlp=64, vocab=256)
    cfg = dataclasses.replace(PRESETS["3b"], text=text)
    cfg = cfg.with_compute(attention=backend, remat=remat)
    params = sharding.abstract_params(decoder.decoder_params(text), jnp.bfloat16)
    x = jax.ShapeDtypeStruct((2, 128, text.width), jnp.bfloat16)
    segments = np.array([PACKED[:128], LEFT[:128]])
    positions = np.broadcast_to(np.arange(128), (3, 2, 128))

    def loss(p, x):
        attend = lambda q, k, v: (
            attention.attend(q, k, v, segments, segments, causal=True, backend=backend),
            None,
        )
        hidden, _ = decoder.run_decoder(p, x, positions, attend, cfg)
        return jnp.sum(jnp.square(hidden.astype(jnp.float32)))

    return jax.grad(loss), params, x


@pytest.mark.parametrize(
    "backend, kernel, sizes",
    [
        ("splash", "jaxpr=splash_mqa_fwd_segmented_residuals", (2, 1, 2)),
        ("cudnn", "dot_product_attention_fwd_wrapper[", (2, 1, 2)),
        ("tiled", "reduce_max[", None),
    ],
)
def test_dots_runs_the_attention_of_a_layer_once(backend, kernel, sizes, monkeypatch):
    """With remat="block" the backward pass repeats it; with "dots" its results are kept.

    `test_train_step.py` compares the gradients.
    """
    from jax._src.cudnn import fused_attention_stablehlo

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(attention_tiled, "SCORES", 1)  # or one tile uses the reference
    mesh = sharding.make_mesh(*sizes, devices=jax.devices()[:4]) if sizes else None
    with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
        calls = {
            remat: _used_operations(*_one_layer(backend, remat)).count(kernel)
            for remat in ("none", "dots", "block")
        }
    assert calls == {"none": 1, "dots": 1, "block": 2}


def _used_operations(f, *args):
    """Return the computation as text, without operations whose results nothing uses."""
    jaxpr = jax.make_jaxpr(f)(*args).jaxpr
    return str(partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars), True)[0])


@functools.cache
def _slice(name: str = "v5e:2x2", sizes: tuple[int, ...] = (1, 2, 2)) -> Mesh:
    from jax.experimental import topologies

    return sharding.make_mesh(
        *sizes,
        devices=list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices),
    )


def _arguments(tree, mesh, axes):
    where = lambda x: jax.NamedSharding(mesh, sharding.partition_spec(axes(x)))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where(x)), tree)


def _compiled_for_tpu(f, params, *inputs):
    """Return the program of the gradient for a v5e slice, and its number of flash kernel calls."""
    mesh = _slice()
    weights = sharding.abstract_params(params, jnp.bfloat16, mesh, sharding.rules_for(2, mesh))
    rows = _arguments(inputs, mesh, lambda x: ("batch",) + (None,) * (len(x.shape) - 1))
    with jax.set_mesh(mesh):
        text = jax.jit(jax.grad(f)).lower(weights, *rows).compile().as_text()
    return text.count("splash_mqa_fwd"), text.count("splash_mqa_dq"), text.count("splash_mqa_dkv")


@pytest.mark.slow
def test_the_decoder_block_compiles_for_a_tpu_slice(quick_tpu_compiler):
    """The block of the 3B model, packed rows of 1,000 tokens, forward and backward, on v5e:2x2."""
    pytest.importorskip("libtpu")
    t = dataclasses.replace(PRESETS["3b"].text, depth=1)
    cfg = dataclasses.replace(PRESETS["3b"], text=t).with_compute(attention="splash")
    blocks = jax.tree.map(
        lambda p: dataclasses.replace(p, shape=p.shape[1:], axes=p.axes[1:]),
        decoder.decoder_params(t)["blocks"],
        is_leaf=sharding.is_param,
    )

    def loss(p, x, segments, positions):
        attend = lambda q, k, v: (
            attention.attend(q, k, v, segments, segments, causal=True, backend="splash"),
            None,
        )
        out, _ = decoder.decoder_block(
            p,
            x,
            decoder.rope_cos_sin(jnp.broadcast_to(positions, (3, *positions.shape)), t),
            attend,
            cfg,
        )
        return out.astype(jnp.float32).sum()

    ids = jax.ShapeDtypeStruct((4, 1000), jnp.int32)
    assert all(
        _compiled_for_tpu(
            loss, blocks, jax.ShapeDtypeStruct((4, 1000, t.width), jnp.bfloat16), ids, ids
        )
    )


@pytest.mark.slow
def test_the_vision_tower_compiles_for_a_tpu_slice(quick_tpu_compiler):
    """The released tower (head width 80): a window block and a full block in a scan, with remat."""
    pytest.importorskip("libtpu")
    v = dataclasses.replace(PRESETS["3b"].vision, depth=2, full_blocks=(1,))
    cfg = dataclasses.replace(PRESETS["3b"], vision=v)
    cfg = cfg.with_compute(attention="splash", remat="block")
    tree = vision_qwen2_5.declare_tower(cfg)

    def loss(p, x):
        states = vision_qwen2_5.run_tower(p, x, cfg, jnp.bfloat16)
        return vision_qwen2_5.merge_states(p, states, cfg).merged.astype(jnp.float32).sum()

    shape = lambda *s, dtype=jnp.int32: jax.ShapeDtypeStruct((2, 1, 1024, *s), dtype)
    assert all(
        _compiled_for_tpu(
            loss, tree, Vision(shape(v.patch_dim, dtype=jnp.uint8), shape(2), shape())
        )
    )
