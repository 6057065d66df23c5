"""What is trained: freezing by part, and low-rank adapters on plain trees."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from cptjax.model.layers import zeros
from cptjax.sharding import Param, is_param
from cptjax.types import Array, Params

PARTS = {"vision": "vision", "merger": "merger", "language": "text"}  # config name -> top of the tree
LINEARS = ("q", "k", "v", "o", "gate", "up", "down")
VISION_NAMES = {"q": "qkv", "k": "qkv", "v": "qkv", "o": "proj"}  # the tower's names of the same roles
ADAPTER = ("lora_a", "lora_b")


def flatten(tree: Params) -> dict[tuple[str, ...], Any]:
    return traverse_util.flatten_dict(tree, is_leaf=lambda _, x: is_param(x))


def unflatten(flat: dict[tuple[str, ...], Any]) -> Params:
    return traverse_util.unflatten_dict(flat)


def chosen(freeze: Sequence[str], lora_rank: int = 0) -> Callable[[tuple[str, ...]], bool]:
    """Which leaf paths are trained: all but the frozen parts; with adapters, the adapters alone."""
    unknown = set(freeze) - set(PARTS)
    if unknown:
        raise ValueError(f"model.freeze names {sorted(unknown)}; expected some of {', '.join(PARTS)}")
    if set(freeze) == set(PARTS):
        raise ValueError("model.freeze names every part of the model; nothing is left to train")
    frozen = {PARTS[f] for f in freeze}
    return lambda path: path[0] not in frozen and (not lora_rank or path[-1] in ADAPTER)


def check(freeze: Sequence[str], rank: int, vision: bool) -> None:
    """Refuse adapters (`model.lora`) that `model.freeze` leaves untrained."""
    chosen(freeze, rank)
    if rank and vision and "vision" in freeze:
        raise ValueError("model.freeze names vision, and model.lora.vision=True adapts it; take one of them back")
    if rank and not vision and "language" in freeze:
        raise ValueError("model.freeze names language, and model.lora.vision=False adapts nothing else; take one of them back")


def split(params: Params, trained: Callable[[tuple[str, ...]], bool]) -> tuple[Params, Params]:
    """(trained, rest): two trees that hold each leaf once; `join` puts them together."""
    flat = flatten(params)
    pick = lambda keep: unflatten({path: leaf for path, leaf in flat.items() if trained(path) == keep})
    return pick(True), pick(False)


def join(trained: Params, rest: Params) -> Params:
    return unflatten({**flatten(rest), **flatten(trained)})


def add_lora(params: Params, rank: int, targets: Sequence[str] = LINEARS, vision: bool = False) -> Params:
    """The tree of Param with `lora_a` (random) and `lora_b` (zero) beside each targeted weight: y += (x a) b * alpha / rank."""
    unknown = set(targets) - set(LINEARS)
    if rank < 1 or unknown or not targets:
        raise ValueError(f"lora rank={rank} targets={tuple(targets)}; expected rank >= 1 and some of {', '.join(LINEARS)}")
    out = dict(flatten(params))
    names = {"text": set(targets), "vision": {VISION_NAMES.get(t, t) for t in targets} if vision else set()}
    for path, p in flatten(params).items():
        if len(path) != 4 or path[-1] != "w" or path[2] not in names.get(path[0], ()):
            continue
        i = 1 + p.inputs  # stacked axis, then the inputs
        fan_in = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", in_axis=tuple(range(1, i)), out_axis=-1, batch_axis=0)
        out[path[:3] + ("lora_a",)] = Param((*p.shape[:i], rank), (*p.axes[:i], "rank"), fan_in, p.inputs)
        out[path[:3] + ("lora_b",)] = Param((p.shape[0], rank, *p.shape[i:]), (p.axes[0], "rank", *p.axes[i:]), zeros, 1)
    return unflatten(out)


def merge_lora(params: Params, scale: float) -> Params:
    """Adapters folded into their weights; the result has no adapters and the same outputs."""
    flat = flatten(params)
    out = {path: leaf for path, leaf in flat.items() if path[-1] not in ADAPTER}
    for path, a in flat.items():
        if path[-1] == "lora_a":
            out[path[:-1] + ("w",)] = _merged(flat[path[:-1] + ("w",)], a, flat[path[:-1] + ("lora_b",)], scale)
    return unflatten(out)


@jax.jit
def _merged(w: Array, a: Array, b: Array, scale: float) -> Array:
    delta = jax.vmap(lambda a, b: jnp.tensordot(a.astype(jnp.float32), b.astype(jnp.float32), 1))(a, b)
    return (w.astype(jnp.float32) + scale * delta).astype(w.dtype)


def count(params: Params) -> int:
    return sum(int(x.size) if hasattr(x, "size") else _size(x) for x in flatten(params).values())


def _size(p: Param) -> int:
    n = 1
    for d in p.shape:
        n *= d
    return n
