"""Attention behind one function, with a back end for each platform (CPU, TPU, NVIDIA GPU).

The tests compare each back end with `reference_attention`.

A query attends to the keys of its own segment (padding is segment 0); with `causal`, only to those
at its own position or before:

    segments   1 1 2 2 0
               x . . . .
               x x . . .
               . . x . .
               . . x x .
               . . . . x

A group is one prompt and G responses. A response attends to the prompt and to its own past, not to
the other responses:

               p p | a a | b b
        p      x . | . . | . .
        p      x x | . . | . .
        a      x x | x . | . .
        a      x x | x x | . .
        b      x x | . . | x .
        b      x x | . . | x x
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from cptjax import sharding
from cptjax.models import attention_packed, attention_packed_gpu, attention_tiled
from cptjax.models.attention_packed import PackedReads
from cptjax.models.attention_tiled import MASKED
from cptjax.models.config import ModelConfig
from cptjax.models.layers import ATTENTION_RESULTS
from cptjax.types import Array, Packing

# The back end of each platform; "xla" is `reference_attention` and runs everywhere.
BACKENDS = {"cpu": "tiled", "tpu": "splash", "gpu": "cudnn", "cuda": "cudnn", "rocm": "xla"}

# The kernels that attend in packed rows, by the back end that they belong to.
PACKED_KERNELS = {"splash": attention_packed, "cudnn": attention_packed_gpu}

INTERPRET = False  # tests interpret the kernels of Pallas on a CPU


def short_row_backend(backend: str) -> str:
    """Return the back end for rows that are too short for a flash kernel, such as image windows."""
    return "tiled" if backend == "tiled" else "xla"


def check_backend_name(wanted: str) -> None:
    if wanted not in ("auto", "xla", "tiled", "cudnn", "cudnn_padded", "splash"):
        raise ValueError(
            f"model.attention={wanted!r}; expected auto, xla, tiled, cudnn, cudnn_padded or splash"
        )


def choose_backend(mesh: Mesh | None, cfg: ModelConfig, dtype: Any, wanted: str = "auto") -> str:
    """Return the back end that the user names, or the best one for the mesh and the model."""
    check_backend_name(wanted)
    platform = (mesh.devices.flat[0] if mesh is not None else jax.devices()[0]).platform
    widths = [cfg.text.head_dim] + ([cfg.vision.head_dim] if cfg.vision else [])
    best = BACKENDS.get(platform, "xla")
    fits = (
        best == "cudnn"
        and jnp.dtype(dtype).itemsize == 2
        and all(h % 8 == 0 and h <= 128 for h in widths)
    )
    if wanted in ("cudnn", "cudnn_padded") and not fits:
        found = (
            f"{jnp.dtype(dtype).name} and heads of {' and '.join(map(str, widths))} on {platform}"
        )
        raise ValueError(
            f"model.attention={wanted!r}: expected bfloat16 and heads of 8, 16, ... 128 on an "
            f"NVIDIA GPU, got {found}; set it to 'auto'"
        )
    if wanted != "auto":
        return wanted
    return "xla" if best == "cudnn" and not fits else best


def reference_attention(q: Array, k: Array, v: Array, mask: Array) -> Array:
    """Return the attention [B T N H] of q [B T N H], k and v [B S K H] and mask [B T S].

    This is the definition that the other back ends must match.
    """
    b, t, n, h = q.shape
    kv = k.shape[2]
    q = q.reshape(b, t, kv, n // kv, h)
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=jnp.float32) * h**-0.5
    probs = jax.nn.softmax(jnp.where(mask[:, None, None], scores, MASKED), -1).astype(v.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", probs, v).reshape(b, t, n, h)


def segment_mask(q_segments: Array, kv_segments: Array, causal: bool, offset: int = 0) -> Array:
    """Return the mask [B T S] of segments [B T] and [B S]; query i has key position i + offset."""
    mask = q_segments[:, :, None] == kv_segments[:, None, :]
    if causal:
        t, s = mask.shape[1:]
        mask &= jnp.arange(s)[None, :] <= jnp.arange(t)[:, None] + offset
    return mask


def attend(
    q: Array,
    k: Array,
    v: Array,
    q_segments: Array,
    kv_segments: Array,
    *,
    causal: bool,
    backend: str,
    offset: int = 0,
    padding: str = "",
) -> Array:
    """Return the attention of q [B T N H] over k and v [B S K H], within segments.

    padding: "left" or "right" if rows of one segment have padding only on that side; results of
        padding are then undefined
    """
    cudnn = functools.partial(_cudnn, padding=padding)
    kernels = {"splash": _splash, "cudnn": cudnn, "cudnn_padded": cudnn, "tiled": _tiled}
    if backend in kernels:
        return _per_device(
            functools.partial(kernels[backend], causal=causal, offset=offset),
            (q, k, v),
            (q_segments, kv_segments),
        )
    return reference_attention(q, k, v, segment_mask(q_segments, kv_segments, causal, offset))


def attend_shared(
    q: Array,
    prompt_k: Array,
    prompt_v: Array,
    own_k: Array,
    own_v: Array,
    prompt_mask: Array,
    own_mask: Array,
) -> Array:
    """Attend with responses q [Q G R N H] to the prompt [Q P K H] and their own keys [Q G S K H].

    prompt_mask is [Q P]; own_mask broadcasts to [Q G R S]. One softmax covers both parts, and the
    prompt is never copied.
    """
    nq, g, r, n, h = q.shape
    kv, p = prompt_k.shape[2], prompt_k.shape[1]
    q = q.reshape(nq, g, r, kv, n // kv, h)
    scores = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    shared = scores("qgrkmh,qpkh->qkmgrp", q, prompt_k) * h**-0.5
    own = scores("qgrkmh,qgskh->qkmgrs", q, own_k) * h**-0.5
    own_mask = jnp.broadcast_to(own_mask, (nq, g, r, own.shape[-1]))
    shared = jnp.where(prompt_mask[:, None, None, None, None], shared, MASKED)
    own = jnp.where(own_mask[:, None, None], own, MASKED)
    probs = jax.nn.softmax(jnp.concatenate([shared, own], -1), -1).astype(own_v.dtype)
    out = jnp.einsum("qkmgrp,qpkh->qgrkmh", probs[..., :p], prompt_v)
    out = out + jnp.einsum("qkmgrs,qgskh->qgrkmh", probs[..., p:], own_v)
    return out.reshape(nq, g, r, n, h)


def attend_cached(
    q: Array,
    prompt_k: Array,
    prompt_v: Array,
    own_k: Sequence[Array],
    own_v: Sequence[Array],
    prompt_mask: Array,
    visible: Array,
) -> Array:
    """Attend with one query [Q G N H] of each response to the prompt and to its own past.

    Keys are [Q K H P] and [Q G K W H], values [Q K P H] and [Q G K W H]. The columns of a response
    are in one or more arrays of some W. prompt_mask is [Q P]; visible [Q G R], or [Q 1 R], covers
    the columns of all arrays. The softmax has one part for the prompt and one for each array, with
    a common maximum; nothing is copied.
    """
    nq, g, n, h = q.shape
    kv, m = prompt_k.shape[1], n // prompt_k.shape[1]
    q = q.reshape(nq, g, kv, m, h)
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

    # The queries of a group form one matrix per key/value head. Only queries, maxima, sums and
    # results are transposed between the two orders, never the scores.
    def by_head(x):  # [Q G K M .] -> [Q K G*M .]
        return jnp.swapaxes(x, 1, 2).reshape(nq, kv, g * m, -1)

    def by_response(x):  # [Q K G*M .] -> [Q G K M .]
        return jnp.swapaxes(x.reshape(nq, kv, g, m, -1), 1, 2)

    shared = product("qkxh,qkhp->qkxp", by_head(q), prompt_k) * h**-0.5
    shared = jnp.where(prompt_mask[:, None, None], shared, MASKED)
    top = by_response(jnp.max(shared, -1))
    own = [product("qgkmh,qgkwh->qgkmw", q.astype(x.dtype), x) * h**-0.5 for x in own_k]
    ends = list(itertools.accumulate(x.shape[-1] for x in own))
    masks = jnp.split(visible[:, :, None, None], ends[:-1], -1)
    own = [jnp.where(mask, x, MASKED) for mask, x in zip(masks, own, strict=True)]
    for x in own:
        top = jnp.maximum(top, jnp.max(x, -1, keepdims=True))
    shared = jnp.exp(shared - by_head(top))
    total = by_response(jnp.sum(shared, -1))
    out = by_response(product("qkxp,qkph->qkxh", shared.astype(prompt_v.dtype), prompt_v))
    for x, values in zip(own, own_v, strict=True):
        x = jnp.exp(x - top)
        total = total + jnp.sum(x, -1, keepdims=True)
        out = out + product("qgkmw,qgkwh->qgkmh", x.astype(values.dtype), values)
    return (out / total).astype(q.dtype).reshape(nq, g, n, h)


def attend_group(
    q: Array, k: Array, v: Array, segments: Array, prompt: int, group: int, backend: str
) -> Array:
    """Attend in rows that hold a prompt of `prompt` tokens and then `group` responses.

    q is [Q P+G*R N H]; `segments` [Q P] are those of the prompts.
    """
    nq, total = q.shape[:2]
    r = (total - prompt) // group
    prompts = q[:, :prompt], k[:, :prompt], v[:, :prompt]
    split = lambda x: x[:, prompt:].reshape(nq, group, r, *x.shape[2:])
    head, tail = attend_padded_groups(prompts, (split(q), split(k), split(v)), segments, backend)
    return jnp.concatenate([head, tail.reshape(nq, group * r, *q.shape[2:])], 1)


def attend_padded_groups(
    prompts: Sequence[Array], responses: Sequence[Array], segments: Array, backend: str
) -> tuple[Array, Array]:
    """Attend in prompts [Q P N H] and in their responses [Q G R N H].

    Both are queries, keys and values; `segments` [Q P] are those of the left-padded prompts.
    """
    (prompt_q, k, v), (q, own_k, own_v) = prompts, responses
    head = attend(prompt_q, k, v, segments, segments, causal=True, backend=backend)
    if backend == "xla":
        own_mask = jnp.tril(jnp.ones((q.shape[2], q.shape[2]), bool))
        return head, attend_shared(q, k, v, own_k, own_v, segments > 0, own_mask)
    if backend == "tiled":
        arrays = q, k, v, own_k, own_v
        return head, _per_device(attention_tiled.attend_group_tiled, arrays, (segments,))
    return head, _group_by_copy(q, k, v, own_k, own_v, segments, backend)


def reads_packed_rows(backend: str) -> bool:
    """Return whether packed groups stay packed in attention."""
    return backend in PACKED_KERNELS


def plan_packed_reads(
    packing: Packing, prompts: tuple[int, int], responses: tuple[int, int], backend: str
) -> PackedReads:
    """Return what each device's packed groups read: prompts (Q, P) with responses (B, R)."""
    shards, tokens = packing.source.shape
    (q, p), (b, r) = prompts, responses
    return attention_packed.find_packed_reads(
        packing.source,
        (q // shards, p),
        (b // shards, r),
        PACKED_KERNELS[backend].block_size(tokens),
    )


def attend_packed_rows(q: Array, k: Array, v: Array, reads: PackedReads, backend: str) -> Array:
    """Attend in packed rows: queries [S N heads H], keys and values [S N K H]."""
    arrays, structure = jax.tree.flatten(reads)

    def kernel(q: Array, k: Array, v: Array, *arrays: Array) -> Array:
        reads = structure.unflatten(arrays)
        return PACKED_KERNELS[backend].attend_packed(q, k, v, reads, INTERPRET)

    return _per_device(kernel, (q, k, v), arrays)


def _group_by_copy(
    q: Array,
    prompt_k: Array,
    prompt_v: Array,
    own_k: Array,
    own_v: Array,
    segments: Array,
    backend: str,
) -> Array:
    """Compute `attend_shared` with a kernel of plain rows; each response copies the prompt."""
    nq, g, r = q.shape[:3]
    p = prompt_k.shape[1]

    def rows(x):
        return x.reshape(nq * g, *x.shape[2:])

    def join(shared, own):
        copies = jnp.broadcast_to(shared[:, None], (nq, g, *shared.shape[1:]))
        return rows(jnp.concatenate([copies, own], 2))

    keys, values = join(prompt_k, own_k), join(prompt_v, own_v)
    ones = jnp.ones((nq * g, r), segments.dtype)
    prompt_ids = jnp.repeat((segments > 0).astype(segments.dtype), g, 0)
    ids = jnp.concatenate([prompt_ids, ones], 1)
    out = attend(rows(q), keys, values, ones, ids, causal=True, backend=backend, offset=p)
    return out.reshape(q.shape)


def _tiled(
    q: Array, k: Array, v: Array, q_segments: Array, kv_segments: Array, causal: bool, offset: int
) -> Array:
    """Attend by tiles; if one tile holds all scores, use the reference and keep its scores."""
    mask = segment_mask(q_segments, kv_segments, causal, offset)
    one_tile = math.prod(q.shape[:3]) * k.shape[1] <= attention_tiled.SCORES
    attention = reference_attention if one_tile else attention_tiled.attend_tiled
    return attention(q, k, v, mask)


def _pad(x: Array, axis: int, multiple: int) -> Array:
    extra = -x.shape[axis] % multiple
    return jnp.pad(x, [(0, extra if i == axis else 0) for i in range(x.ndim)]) if extra else x


def _splash_kernel(heads: int, t: int, s: int, causal: bool, offset: int, interpret: bool):
    """Build the TPU kernel.

    Each trace builds it again, with its mask tables as constants of the program, so that compiling
    ahead of time needs no device.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    mask = masks.CausalMask((t, s), offset=offset) if causal else masks.FullMask((t, s))
    bq, bk = (next(b for b in (512, 384, 256, 128) if n % b == 0) for n in (t, s))
    sizes = kernel.BlockSizes(
        block_q=bq,
        block_kv=bk,
        block_kv_compute=bk,
        block_q_dkv=bq,
        block_kv_dkv=bk,
        block_kv_dkv_compute=bk,
        block_q_dq=bq,
        block_kv_dq=bk,
    )
    return kernel.make_splash_mqa_single_device(
        masks.MultiHeadMask([mask] * heads),
        block_sizes=sizes,
        interpret=interpret,
        residual_checkpoint_name=ATTENTION_RESULTS,
    )


def _splash(
    q: Array, k: Array, v: Array, q_segments: Array, kv_segments: Array, causal: bool, offset: int
) -> Array:
    """Call the TPU flash kernel once per row and key/value head."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel

    b, t, n, h = q.shape
    kv = k.shape[2]
    pad = lambda x: _pad(_pad(x, 1, 128), 3, 128)
    qp = pad(q * h**-0.5).reshape(b, -1, kv, n // kv, h + -h % 128).transpose(0, 2, 3, 1, 4)
    kp, vp = (pad(x).transpose(0, 2, 1, 3) for x in (k, v))
    ids = kernel.SegmentIds(_pad(q_segments, 1, 128), _pad(kv_segments, 1, 128))
    run = _splash_kernel(n // kv, qp.shape[3], kp.shape[2], causal, offset, INTERPRET)
    out = jax.vmap(jax.vmap(run, (0, 0, 0, None)))(qp, kp, vp, ids)
    return out.transpose(0, 3, 1, 2, 4)[:, :t, ..., :h].reshape(b, t, n, h)


def _cudnn(
    q: Array,
    k: Array,
    v: Array,
    q_segments: Array,
    kv_segments: Array,
    causal: bool,
    offset: int,
    padding: str,
) -> Array:
    """Call the cuDNN flash kernel, which supports only even lengths.

    With `is_causal` it skips the tiles above the diagonal. A mask becomes an array of the size of
    all scores, which rows with padding on the right do not need: no token before the padding
    attends to it. Rows with padding on the left are rolled.
    """
    t = q.shape[1]
    square = causal and offset == 0 and t == k.shape[1]
    attend = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
    if square and padding:
        shift = (q_segments == 0).sum(1) if padding == "left" else None
        q, k, v = (_pad(_roll(x, shift), 1, 2) for x in (q, k, v))
        return _roll(attend(q, k, v, is_causal=True)[:, :t], None if shift is None else -shift)
    q, k, v, q_segments, kv_segments = (_pad(x, 1, 2) for x in (q, k, v, q_segments, kv_segments))
    mask = segment_mask(q_segments, kv_segments, causal, offset)[:, None]
    return attend(q, k, v, mask=mask, is_causal=square)[:, :t]


def _roll(x: Array, shift: Array | None) -> Array:
    """Move the columns of each row of x [B T N H] to the left by `shift` [B], in a circle."""
    if shift is None:
        return x
    columns = (jnp.arange(x.shape[1]) + shift[:, None]) % x.shape[1]
    return jnp.take_along_axis(x, columns[..., None, None], 1)


def _per_device(kernel: Callable, arrays: Sequence[Array], segments: Sequence[Array]) -> Array:
    """Run a kernel that the compiler cannot partition on each device's own rows and heads.

    arrays: [B .. heads H], the queries first; segments: [B ..]
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return kernel(*arrays, *segments)
    q, *others = arrays
    heads = others[0].shape[-2]
    ways = mesh.shape["model"] if sharding.activation_spec(("heads",))[0] else 1
    if heads % ways:  # repeat key/value heads so that the devices on `model` divide them
        others = [jnp.repeat(x, math.lcm(heads, ways) // heads, -2) for x in others]

    def spec(x):
        return sharding.activation_spec(("batch", *(None,) * (x.ndim - 3), "heads", None))

    specs = [spec(x) for x in (q, *others)]
    specs += [sharding.activation_spec(("batch", *(None,) * (x.ndim - 1))) for x in segments]
    run = jax.shard_map(kernel, in_specs=tuple(specs), out_specs=spec(q), check_vma=False)
    return run(q, *others, *segments)
