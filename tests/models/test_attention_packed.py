"""Kernels of packed groups, interpreted: equal to a mask, and only live blocks are listed.

"splash" has the kernel of TPUs, "cudnn" that of NVIDIA GPUs.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cptjax import sharding
from cptjax.data import packing
from cptjax.models import attention, attention_packed
from cptjax.planning import aot_compile

BLOCK = 128
P, G, R = 150, 3, 200  # tokens of prompts, responses to each, and their tokens, with padding
Q, SHARDS = 4, 2
LENGTHS = [200, 17, 1, 0, 64, 190, 0, 0, 0, 133, 180, 2]


@pytest.fixture
def packed(monkeypatch):
    """Return the index [S N] of packed rows of several blocks, and the mask [S N N] of its keys."""
    monkeypatch.setattr(attention_packed, "BLOCK", BLOCK)
    monkeypatch.setattr(attention, "INTERPRET", True)
    monkeypatch.setattr(packing, "SMALLEST", 8)
    prompt_mask = np.arange(P)[::-1] < np.array([[140], [3], [150], [60]])
    mask = np.arange(R) < np.array(LENGTHS)[:, None]
    _, plan = packing.plan_packing(prompt_mask, mask, SHARDS)
    source, q = plan.source, Q // SHARDS
    is_prompt = (source >= 0) & (source < q * P)
    response = np.maximum(source - q * P, 0) // R
    group, part = np.where(is_prompt, source // P, response // G), np.where(is_prompt, -1, response)
    same = lambda x: x[:, :, None] == x[:, None]
    visible = same(group) & ((part == -1)[:, None] | same(part)) & (source >= 0)[:, None]
    visible &= (source >= 0)[:, :, None]
    return plan, visible & np.tri(source.shape[1], dtype=bool)


def inputs(source: np.ndarray, kv: int = 2) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """Return queries, keys and values, and weights of the results that are 0 for padding."""
    rng = np.random.default_rng(0)
    draw = lambda heads: jnp.asarray(rng.normal(size=(*source.shape, heads, 16)), jnp.float32)
    return (draw(4), draw(kv), draw(kv)), jnp.where(source[..., None, None] < 0, 0, draw(4))


def weighted(run, weights):
    """Return a loss of attention that sees no padding, with its gradients."""
    loss = lambda *arrays: jnp.sum(weights * jnp.sin(jnp.where(weights == 0, 0, run(*arrays))))
    return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))


@pytest.mark.parametrize("backend", ["splash", "cudnn"])
def test_values_and_gradients_are_those_of_the_mask(packed, backend):
    plan, visible = packed
    assert plan.source.shape[1] > 4 * BLOCK
    arrays, weights = inputs(plan.source)

    def run(q, k, v):
        reads = attention.plan_packed_reads(plan, (Q, P), (Q * G, R), backend)
        return attention.attend_packed_rows(q, k, v, reads, backend)

    reference = weighted(lambda *x: attention.reference_attention(*x, visible), weights)
    found, wanted = weighted(run, weights)(*arrays), reference(*arrays)
    assert found[0] == pytest.approx(float(wanted[0]), rel=1e-5)
    for got, want in zip(found[1], wanted[1], strict=True):
        np.testing.assert_allclose(got, want, atol=2e-5)


def test_the_listed_blocks_are_those_with_a_visible_pair(packed):
    plan, visible = packed
    reads = attention.plan_packed_reads(plan, (Q, P), (Q * G, R), "splash")
    n = reads.keys.shape[1]
    visible |= np.eye(visible.shape[1], dtype=bool)  # padding attends to itself
    padded = np.zeros((SHARDS, n * BLOCK, n * BLOCK), bool)
    padded[:, : visible.shape[1], : visible.shape[1]] = visible
    padded |= np.eye(n * BLOCK, dtype=bool)
    blocks = padded.reshape(SHARDS, n, BLOCK, n, BLOCK)
    live, whole = blocks.any((2, 4)), blocks.all((2, 4))
    assert 0.5 * n * (n + 1) * SHARDS > live.sum()  # causal blocks without a visible pair
    assert whole.any()
    for s in range(SHARDS):
        for i in range(n):
            assert reads.key_count[s, i] == live[s, i].sum()
            assert set(reads.keys[s, i].tolist()) == set(np.flatnonzero(live[s, i]))
            keys, queries = reads.keys[s, i].tolist(), reads.queries[s, i].tolist()
            assert keys[: reads.whole_keys[s, i]] == np.flatnonzero(whole[s, i]).tolist()
            assert queries[: reads.whole_queries[s, i]] == np.flatnonzero(whole[s, :, i]).tolist()
            assert reads.query_count[s, i] == live[s, :, i].sum()
            assert set(reads.queries[s, i].tolist()) == set(np.flatnonzero(live[s, :, i]))


def test_the_estimate_counts_the_blocks_of_full_groups():
    prompts, responses = (2, 2 * BLOCK), (4, BLOCK)
    source = jnp.arange(8 * BLOCK)[None]  # prompts first, as in the padded form
    groups = [0, 1, 4, 5, 2, 3, 6, 7]  # the same blocks group by group
    source = source.reshape(8, BLOCK)[jnp.array(groups)].reshape(1, -1)
    reads = attention_packed.find_packed_reads(source, prompts, responses, BLOCK)
    # Blocks p p a b: 1 + 2 + 3 + 3, for each of two groups.
    assert reads.pairs == 18 * BLOCK**2 == int(reads.key_count.sum()) * BLOCK**2


@pytest.mark.parametrize(("backend", "kv"), [("splash", 2), ("splash", 1), ("cudnn", 2)])
def test_a_mesh_does_not_change_the_result(packed, backend, kv):
    """Rows and heads are on other devices; a single key/value head is repeated for two devices."""
    plan, _ = packed
    (q, k, v), _ = inputs(plan.source, kv)
    run = jax.jit(functools.partial(attention.attend_packed_rows, backend=backend))
    reads = attention.plan_packed_reads(plan, (Q, P), (Q * G, R), backend)
    alone = run(q, k, v, reads)
    devices = np.array(jax.devices()[:4]).reshape(1, 2, 2)
    with jax.set_mesh(jax.sharding.Mesh(devices, ("data", "fsdp", "model"))):
        np.testing.assert_allclose(run(q, k, v, reads), alone, atol=1e-6)


def test_blocks_of_many_heads_fit_into_the_memory_of_a_tpu(quick_tpu_compiler):
    """A key/value head has 8 heads, as in the models of 3B and 72B, and arrays are float32."""
    pytest.importorskip("libtpu")
    mesh = sharding.make_mesh(devices=aot_compile.topology_devices("v5e:2x2"))
    abstract = lambda *shape, dtype=jnp.float32: sharding.abstract_array(
        (4, 1024, *shape), dtype, mesh, ("batch",)
    )
    q, k = abstract(8, 128), abstract(1, 128)

    def loss(q, k, v, source):
        block = attention_packed.block_size(source.shape[1])
        reads = attention_packed.find_packed_reads(source, (1, 512), (2, 256), block)
        return jnp.sum(attention.attend_packed_rows(q, k, v, reads, "splash"))

    with jax.set_mesh(mesh):
        jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, k, k, abstract(dtype=jnp.int32)).compile()
