"""Attention behind one function; the mesh's platform chooses the kernel, and each kernel equals `reference` in the tests.

A query sees a key of its own segment number (padding, number 0, sees padding only), at or before itself where `causal`:

    segments   1 1 2 2 0
               x . . . .
               x x . . .
               . . x . .
               . . x x .
               . . . . x

A group is one prompt and G responses; a response sees the whole prompt and its own past, never another response:

               p p | a a | b b
        p      x . | . . | . .
        p      x x | . . | . .
        a      x x | x . | . .
        a      x x | x x | . .
        b      x x | . . | x .
        b      x x | . . | x x
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from cptjax import sharding
from cptjax.models import attention_tiled
from cptjax.models.attention_tiled import MASKED
from cptjax.models.config import ModelConfig
from cptjax.types import Array

BACKENDS = {"cpu": "tiled", "tpu": "splash", "gpu": "cudnn", "cuda": "cudnn", "rocm": "xla"}


def short_row_backend(backend: str) -> str:
    """Return the back end for rows too short for a flash kernel, such as windows of an image."""
    return "tiled" if backend == "tiled" else "xla"


def choose_backend(mesh: Mesh | None, cfg: ModelConfig, dtype: Any, wanted: str = "auto") -> str:
    """The kernel that runs: what the user names, or the best of the mesh's platform for such arrays."""
    if wanted not in ("auto", "xla", "tiled", "cudnn", "splash"):
        raise ValueError(f"model.attention={wanted!r}; expected auto, xla, tiled, cudnn or splash")
    platform = (mesh.devices.flat[0] if mesh is not None else jax.devices()[0]).platform
    widths = cfg.text.head_dim, cfg.vision.head_dim
    best = BACKENDS.get(platform, "xla")
    fits = (
        best == "cudnn"
        and jnp.dtype(dtype).itemsize == 2
        and all(h % 8 == 0 and h <= 128 for h in widths)
    )
    if wanted == "cudnn" and not fits:
        here = f"here: {platform}, {jnp.dtype(dtype).name}, heads of {widths[0]} and {widths[1]}"
        raise ValueError(
            f"model.attention='cudnn' takes bfloat16 and heads of 8, 16, ... 128 on an NVIDIA GPU; {here}: set it to 'auto'"
        )
    if wanted != "auto":
        return wanted
    return "xla" if best == "cudnn" and not fits else best


def reference_attention(q: Array, k: Array, v: Array, mask: Array) -> Array:
    """q [B T N H], k and v [B S K H], mask [B T S] -> [B T N H]: the definition that every kernel must equal."""
    b, t, n, h = q.shape
    kv = k.shape[2]
    scores = (
        jnp.einsum(
            "btkgh,bskh->bkgts",
            q.reshape(b, t, kv, n // kv, h),
            k,
            preferred_element_type=jnp.float32,
        )
        * h**-0.5
    )
    probs = jax.nn.softmax(jnp.where(mask[:, None, None], scores, MASKED), -1).astype(v.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", probs, v).reshape(b, t, n, h)


def segment_mask(q_segments: Array, kv_segments: Array, causal: bool, offset: int = 0) -> Array:
    """[B T] and [B S] -> [B T S]; query i stands at key position i + offset."""
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
) -> Array:
    """Segmented attention of q [B T N H] over k and v [B S K H]."""
    kernel = {"splash": _splash, "cudnn": _cudnn, "tiled": _tiled}.get(backend)
    if kernel:
        return _per_device(
            functools.partial(kernel, causal=causal, offset=offset),
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
    """Responses q [Q G R N H] over the shared prompt [Q P K H] and their own keys [Q G S K H]; the prompt is never copied.

    prompt_mask [Q P]; own_mask broadcasts to [Q G R S]. One softmax over both parts.
    """
    nq, g, r, n, h = q.shape
    kv, p = prompt_k.shape[2], prompt_k.shape[1]
    q = q.reshape(nq, g, r, kv, n // kv, h)
    shared = (
        jnp.einsum("qgrkmh,qpkh->qkmgrp", q, prompt_k, preferred_element_type=jnp.float32) * h**-0.5
    )
    own = jnp.einsum("qgrkmh,qgskh->qkmgrs", q, own_k, preferred_element_type=jnp.float32) * h**-0.5
    shared = jnp.where(prompt_mask[:, None, None, None, None], shared, MASKED)
    own = jnp.where(
        jnp.broadcast_to(own_mask, (nq, g, r, own.shape[-1]))[:, None, None], own, MASKED
    )
    probs = jax.nn.softmax(jnp.concatenate([shared, own], -1), -1).astype(own_v.dtype)
    out = jnp.einsum("qkmgrp,qpkh->qgrkmh", probs[..., :p], prompt_v) + jnp.einsum(
        "qkmgrs,qgskh->qgrkmh", probs[..., p:], own_v
    )
    return out.reshape(nq, g, r, n, h)


def attend_cached(
    q: Array,
    prompt_k: Array,
    prompt_v: Array,
    own_k: Array,
    own_v: Array,
    prompt_mask: Array,
    seen: Array,
) -> Array:
    """One query [Q G N H] of each response over the shared prompt and its own past; the prompt is never copied.

    Keys [Q K H P] and [Q G K H R], values [Q K P H] and [Q G K R H]: both products read a head in the order in which it lies.
    prompt_mask [Q P], seen [Q R]. Two partial softmaxes under one common maximum.
    """
    nq, g, n, h = q.shape
    kv, m = prompt_k.shape[1], n // prompt_k.shape[1]
    q = q.reshape(nq, g, kv, m, h)
    # All of a group's queries of one head are one matrix: only queries, maxima, sums and results are turned, never scores.
    together = lambda x: jnp.swapaxes(x, 1, 2).reshape(nq, kv, g * m, -1)
    apart = lambda x: jnp.swapaxes(x.reshape(nq, kv, g, m, -1), 1, 2)
    shared = (
        jnp.einsum("qkxh,qkhp->qkxp", together(q), prompt_k, preferred_element_type=jnp.float32)
        * h**-0.5
    )
    own = jnp.einsum("qgkmh,qgkhr->qgkmr", q, own_k, preferred_element_type=jnp.float32) * h**-0.5
    shared = jnp.where(prompt_mask[:, None, None], shared, MASKED)
    own = jnp.where(seen[:, None, None, None], own, MASKED)
    top = jnp.maximum(apart(jnp.max(shared, -1)), jnp.max(own, -1, keepdims=True))
    shared, own = jnp.exp(shared - together(top)), jnp.exp(own - top)
    total = apart(jnp.sum(shared, -1)) + jnp.sum(own, -1, keepdims=True)
    shared, own = (x.astype(own_v.dtype) for x in (shared, own))
    out = apart(jnp.einsum("qkxp,qkph->qkxh", shared, prompt_v, preferred_element_type=jnp.float32))
    out = out + jnp.einsum("qgkmr,qgkrh->qgkmh", own, own_v, preferred_element_type=jnp.float32)
    return (out / total).astype(q.dtype).reshape(nq, g, n, h)


def attend_group(
    q: Array, k: Array, v: Array, segments: Array, prompt: int, group: int, backend: str
) -> Array:
    """One row holds a prompt of `prompt` slots and `group` responses behind it: q [Q P+G*R N H], segments [Q P] of the prompt."""
    nq, total = q.shape[:2]
    r = (total - prompt) // group
    head = attend(
        q[:, :prompt],
        k[:, :prompt],
        v[:, :prompt],
        segments,
        segments,
        causal=True,
        backend=backend,
    )
    split = lambda x: x[:, prompt:].reshape(nq, group, r, *x.shape[2:])
    arrays = split(q), k[:, :prompt], v[:, :prompt], split(k), split(v)
    if backend == "xla":
        tail = attend_shared(*arrays, segments > 0, jnp.tril(jnp.ones((r, r), bool)))
    elif backend == "tiled":
        tail = _per_device(_tiled_group, arrays, (segments,))
    else:
        tail = _group_by_copy(*arrays, segments, backend)
    return jnp.concatenate([head, tail.reshape(nq, group * r, *q.shape[2:])], 1)


def _group_by_copy(
    q: Array,
    prompt_k: Array,
    prompt_v: Array,
    own_k: Array,
    own_v: Array,
    segments: Array,
    backend: str,
) -> Array:
    """Flash kernels want plain rows: each response gets [prompt keys, own keys]; only keys and values are copied, nothing else."""
    nq, g, r = q.shape[:3]
    p = prompt_k.shape[1]
    rows = lambda x: x.reshape(nq * g, *x.shape[2:])
    join = lambda shared, own: rows(
        jnp.concatenate([jnp.broadcast_to(shared[:, None], (nq, g, *shared.shape[1:])), own], 2)
    )
    ones = jnp.ones((nq * g, r), segments.dtype)
    kv_segments = jnp.concatenate(
        [jnp.repeat((segments > 0).astype(segments.dtype), g, 0), ones], 1
    )
    out = attend(
        rows(q),
        join(prompt_k, own_k),
        join(prompt_v, own_v),
        ones,
        kv_segments,
        causal=True,
        backend=backend,
        offset=p,
    )
    return out.reshape(q.shape)


def _tiled(
    q: Array, k: Array, v: Array, q_segments: Array, kv_segments: Array, causal: bool, offset: int
) -> Array:
    few = (
        math.prod(q.shape[:3]) * k.shape[1] <= attention_tiled.SCORES
    )  # all at once, kept for gradients: one tile is nothing to save
    return (reference_attention if few else attention_tiled.attend_tiled)(
        q, k, v, segment_mask(q_segments, kv_segments, causal, offset)
    )


def _tiled_group(
    q: Array, prompt_k: Array, prompt_v: Array, own_k: Array, own_v: Array, segments: Array
) -> Array:
    """`attend_shared` in two parts: all responses of a group over the prompt as one row of queries, and each over its own past."""
    nq, g, r, n, h = q.shape
    flat = lambda x: x.reshape(nq, g * r, *x.shape[3:])
    rows = lambda x: x.reshape(nq * g, *x.shape[2:])
    shared = attention_tiled.attend_part(
        flat(q),
        prompt_k,
        prompt_v,
        jnp.broadcast_to((segments > 0)[:, None], (nq, g * r, segments.shape[1])),
    )
    causal = jnp.broadcast_to(jnp.tril(jnp.ones((r, r), bool)), (nq * g, r, r))
    own = attention_tiled.attend_part(rows(q), rows(own_k), rows(own_v), causal)
    return attention_tiled.merge_parts(
        [tuple(x.reshape(nq, g, r, n, -1) for x in part) for part in (shared, own)]
    )


def _pad(x: Array, axis: int, multiple: int) -> Array:
    extra = -x.shape[axis] % multiple
    return jnp.pad(x, [(0, extra if i == axis else 0) for i in range(x.ndim)]) if extra else x


def _splash_kernel(heads: int, t: int, s: int, causal: bool, offset: int, interpret: bool):
    """Made anew in each trace: its mask tables are constants of the program, so no device is needed (ahead-of-time compilation)."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    mask = masks.CausalMask((t, s), offset=offset) if causal else masks.FullMask((t, s))
    block = lambda n: next(b for b in (512, 384, 256, 128) if n % b == 0)
    bq, bk = block(t), block(s)
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
        masks.MultiHeadMask([mask] * heads), block_sizes=sizes, interpret=interpret
    )


def _splash(
    q: Array, k: Array, v: Array, q_segments: Array, kv_segments: Array, causal: bool, offset: int
) -> Array:
    """The TPU flash kernel, one call per row and key/value head."""
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
    q: Array, k: Array, v: Array, q_segments: Array, kv_segments: Array, causal: bool, offset: int
) -> Array:
    """The CUDA flash kernel; it wants even lengths, and skips what lies in the future where it knows that rows are causal."""
    t = q.shape[1]
    q, k, v, q_segments, kv_segments = (_pad(x, 1, 2) for x in (q, k, v, q_segments, kv_segments))
    mask = segment_mask(q_segments, kv_segments, causal, offset)[:, None]
    square = causal and offset == 0 and q.shape[1] == k.shape[1]
    return jax.nn.dot_product_attention(
        q, k, v, mask=mask, is_causal=square, implementation="cudnn"
    )[:, :t]


def _per_device(kernel: Callable, arrays: Sequence[Array], segments: Sequence[Array]) -> Array:
    """A kernel that the compiler cannot cut, each device on its own rows and heads: arrays [B .. heads H], queries first."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return kernel(*arrays, *segments)
    ways, (q, *others) = mesh.shape["model"], arrays
    heads = others[0].shape[-2]
    if (
        heads % ways
    ):  # fewer key/value heads than members of `model`: each member gets a copy of the head it needs
        others = [jnp.repeat(x, math.lcm(heads, ways) // heads, -2) for x in others]
    spec = lambda x: sharding.partition_spec(("batch", *(None,) * (x.ndim - 3), "heads", None))
    places = (
        *map(spec, (q, *others)),
        *(sharding.partition_spec(("batch", None)) for _ in segments),
    )
    return jax.shard_map(kernel, in_specs=places, out_specs=spec(q), check_vma=False)(
        q, *others, *segments
    )


INTERPRET = False  # tests run the TPU kernel on the CPU by interpretation
