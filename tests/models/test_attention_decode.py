"""The TPU kernel of decode steps equals attention over all columns, and reads only live ones.

The kernel is interpreted.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from cptjax import sharding
from cptjax.models import attention, attention_decode
from cptjax.models.attention_decode import Blocks, Cache, Past
from cptjax.planning import hlo_costs


@dataclasses.dataclass(frozen=True)
class Shape:
    """Q groups of G responses, with N query and K key/value heads of width H; see `Cache`."""

    q: int
    g: int
    n: int
    k: int
    h: int
    p: int
    w: int
    ring: int
    dtype: str = "float32"
    layers: int = 2
    own_ages: bool = False  # of the responses of a group


SHAPES = {
    "7 queries per head, several blocks": Shape(3, 4, 14, 2, 32, 256, 384, 300),
    "responses of different ages": Shape(3, 16, 4, 2, 32, 256, 384, 300, own_ages=True),
    "one response per group": Shape(5, 1, 4, 4, 16, 384, 128, 12),
    "two steps of 8 responses": Shape(2, 16, 2, 1, 64, 128, 256, 256),
    "bfloat16": Shape(2, 8, 14, 2, 128, 1024, 256, 250, "bfloat16"),
}


def draw(shape: Shape, *sizes):
    rng = np.random.default_rng(sum(sizes))
    return jnp.asarray(rng.normal(size=sizes), shape.dtype)


def zeros(shape: Shape, *sizes):
    return jnp.zeros(sizes, shape.dtype)


def inputs(shape: Shape, column: int, draw=draw):
    """Queries, caches, masks of left-padded prompts, and groups of different ages.

    The first group is whole, the last one is done.
    """
    s, rng = shape, np.random.default_rng(column)
    keys, own = (s.layers, s.q, s.k, s.h, s.p), (s.layers, s.q, s.g, s.k, s.w, s.h)
    cache = Cache(draw(s, *keys), draw(s, *keys[:3], s.p, s.h), draw(s, *own), draw(s, *own) + 1)
    start = rng.integers(0, s.p, s.q)
    mask = np.arange(s.p) >= start[:, None]
    active = rng.random((s.q, s.g)) < 0.7
    active[0], active[-1] = True, False
    # A row that starts another response has the age -1: it attends to the prompt only.
    age = rng.integers(-1, s.ring, (s.q, s.g if s.own_ages else 1), dtype=np.int32)
    age[0, 0], age[0, -1] = s.ring - 1, -1 if s.own_ages else s.ring - 1
    mask, active, age = map(jnp.asarray, (mask, active, age))
    return draw(s, s.q, s.g, s.n, s.h), cache, mask, Past(jnp.int32(column), age, active, s.ring)


@functools.partial(jax.jit, static_argnames=("ring", "heads"))
def _attend(q, cache, mask, past, ring, layer, heads):
    past = Past(*past, ring)
    reads = attention_decode.plan_reads(cache, mask, past, heads)
    return attention_decode.attend_live(q, cache, reads, layer, ring, heads, interpret=True)


def attend(q, cache, mask, past, layer, heads=None):
    return _attend(q, cache, mask, past[:3], past.ring, layer, heads)


@jax.jit
def wanted(q, cache, mask, past, layer):
    """Attention over all columns, which is not used where a response is done."""
    own_k, own_v = [cache.own_k[layer]], [cache.own_v[layer]]
    visible = past.visible(cache.own_k.shape[4])
    out = attention.attend_cached(
        q, cache.prompt_k[layer], cache.prompt_v[layer], own_k, own_v, mask, visible
    )
    return jnp.where(past.active[..., None, None], out, 0)


@pytest.mark.parametrize("column", [5, -1], ids=["the ring begins again", "last column"])
@pytest.mark.parametrize("name", SHAPES)
def test_the_kernel_equals_attention_over_all_columns(name, column):
    args = inputs(SHAPES[name], column % SHAPES[name].ring)
    got, want = attend(*args, 1), wanted(*args, 1)
    assert got.dtype == want.dtype
    tolerance = 0.01 if SHAPES[name].dtype == "bfloat16" else 1e-5
    np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (got, want)), atol=tolerance)


def read_columns(shape: Shape, past: Past, mask):
    """Return the number of columns that are copied: of prompts, and of each response."""
    _, cache, *_ = inputs(shape, 0, zeros)
    blocks = Blocks.of(cache)
    plan = lambda *past: attention_decode.plan_reads(cache, mask, Past(*past, shape.ring), None)
    reads = jax.jit(plan)(*past[:3])
    changes = lambda held: (np.diff(held, axis=0, prepend=-1) != 0).sum(0)
    own = np.asarray(reads.own_held).reshape(-1, blocks.responses)
    return changes(np.asarray(reads.prompt_held)) * blocks.prompt, changes(own) * blocks.own


def test_only_blocks_with_a_visible_column_are_copied():
    """Three groups of 2 responses, in blocks of 128 columns."""
    shape = Shape(3, 2, 4, 2, 1024, 256, 384, 300)
    starts = np.array([200, 0, 0])
    mask = jnp.asarray(np.arange(256) >= starts[:, None])
    active = jnp.array([[True, True], [True, False], [False, False]])
    past = Past(jnp.int32(10), jnp.array([[3], [10 + 300 - 130], [200]]), active, 300)
    prompts, responses = read_columns(shape, past, mask)
    assert prompts == 128 + 256 + 0
    # Group 0 sees columns 7 to 10; group 1 columns 130 to 299 and 0 to 10, for its first response.
    assert responses.tolist() == [128 + 384, 128]


def test_what_is_not_copied_has_no_influence():
    """Rows that are done, padding and columns beyond the ring may hold anything, even NaN."""
    q, cache, mask, past = inputs(SHAPES["7 queries per head, several blocks"], 40)
    visible = np.asarray(past.visible(384))[None, :, :, None, :, None]
    live = visible & np.asarray(past.active)[None, :, :, None, None, None]
    blocks = live.reshape(1, 3, 4, 1, 3, 128, 1).any(5, keepdims=True)
    read = np.broadcast_to(blocks, (1, 3, 4, 1, 3, 128, 1)).reshape(1, 3, 4, 1, 384, 1)
    spoilt = cache.replace(
        own_k=jnp.where(read, cache.own_k, jnp.nan), own_v=jnp.where(read, cache.own_v, jnp.nan)
    )
    assert not read.all()
    np.testing.assert_array_equal(attend(q, spoilt, mask, past, 0), attend(q, cache, mask, past, 0))


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 2, 4)], ids=str)
def test_each_device_runs_its_own_groups_and_heads(sizes):
    """Of two key/value heads, four devices on `model` have both."""
    mesh = sharding.make_mesh(*sizes)
    args = inputs(Shape(4, 2, 4, 2, 16, 128, 128, 100), 60)
    heads = "kv_heads" if sizes[2] == 2 else None
    with jax.set_mesh(mesh):
        got = attend(*args, 1, heads)
    np.testing.assert_allclose(got, wanted(*args, 1), atol=1e-5)


def compiled_text(topology: str, shape: Shape) -> str:
    """Compile a decode step's attention for a TPU."""
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    place = jax.NamedSharding(Mesh(np.array(devices[:1]), "x"), jax.P())
    q, cache, mask, past = jax.eval_shape(functools.partial(inputs, shape, 0, zeros))
    arrays = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        (q, cache, mask, *past[:3]),
    )

    def run(q, cache, mask, *past):
        past = Past(*past, shape.ring)
        reads = attention_decode.plan_reads(cache, mask, past, None)
        return attention_decode.attend_live(q, cache, reads, jnp.int32(0), past.ring, None)

    return jax.jit(run).lower(*arrays).compile().as_text()


SEVEN_B = Shape(8, 8, 28, 4, 128, 4096, 1024, 1024, "bfloat16")
TPUS = ["v5p:2x2x1", "v6e:2x2"]


@pytest.mark.slow
@pytest.mark.parametrize("topology", TPUS)
def test_the_kernel_of_7b_compiles_for_tpus(topology, no_cache):
    """Its cost is that of the prompt and of half of the columns of a response, on average."""
    pytest.importorskip("libtpu")
    text, s = compiled_text(topology, SEVEN_B), SEVEN_B
    own = (s.w + 128) / 2  # 128 columns are in a block
    assert hlo_costs.count_flops(text) == 4 * s.q * s.g * s.n * (s.p + own) * s.h
    live = 2 * s.q * s.k * (s.p + s.g * own) * s.h * jnp.dtype(s.dtype).itemsize
    # The rest are queries, results and masks: no cache is copied.
    assert live < hlo_costs.count_memory_traffic(text) < 1.1 * live


@pytest.mark.parametrize("topology", TPUS)
def test_other_shapes_compile_for_tpus(topology, quick_tpu_compiler):
    """One response to a prompt, heads of 64, float32; responses of different ages."""
    pytest.importorskip("libtpu")
    assert "decode_attention" in compiled_text(topology, Shape(4, 1, 8, 2, 64, 384, 384, 300))
    ages = Shape(4, 4, 28, 4, 128, 512, 512, 512, "bfloat16", own_ages=True)
    assert "decode_attention" in compiled_text(topology, ages)
