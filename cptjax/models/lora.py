"""Low-rank adapters on plain parameter trees: declared beside their weights, merged into them."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from cptjax.models.layers import zeros
from cptjax.models.trainable import ADAPTER_LEAVES, flatten_params, is_trained, unflatten_params
from cptjax.sharding import Param
from cptjax.types import Array, Params

LORA_TARGETS = ("q", "k", "v", "o", "gate", "up", "down")


VISION_TARGETS = {
    "q": "qkv",
    "k": "qkv",
    "v": "qkv",
    "o": "proj",
}  # the tower's names of the same roles


def is_adapter(path: tuple[str, ...]) -> bool:
    """Return whether a leaf path is that of an adapter."""
    return path[-1] in ADAPTER_LEAVES


def check_lora(freeze: Sequence[str], rank: int, vision: bool) -> None:
    """Refuse adapters (`model.lora`) that `model.freeze` leaves untrained."""
    is_trained(freeze, rank)
    if rank and vision and "vision" in freeze:
        raise ValueError(
            "model.freeze names vision, and model.lora.vision=True adapts it; take one of them back"
        )
    if rank and not vision and "language" in freeze:
        raise ValueError(
            "model.freeze names language, and model.lora.vision=False adapts nothing else; take one of them back"
        )


def add_lora(
    params: Params, rank: int, targets: Sequence[str] = LORA_TARGETS, vision: bool = False
) -> Params:
    """The tree of Param with `lora_a` (random) and `lora_b` (zero) beside each targeted weight: y += (x a) b * alpha / rank."""
    unknown = set(targets) - set(LORA_TARGETS)
    if rank < 1 or unknown or not targets:
        raise ValueError(
            f"lora rank={rank} targets={tuple(targets)}; expected rank >= 1 and some of {', '.join(LORA_TARGETS)}"
        )
    out = dict(flatten_params(params))
    names = {
        "text": set(targets),
        "vision": {VISION_TARGETS.get(t, t) for t in targets} if vision else set(),
    }
    for path, p in flatten_params(params).items():
        if len(path) != 4 or path[-1] != "w" or path[2] not in names.get(path[0], ()):
            continue
        i = 1 + p.inputs  # stacked axis, then the inputs
        fan_in = jax.nn.initializers.variance_scaling(
            1 / 3, "fan_in", "uniform", in_axis=tuple(range(1, i)), out_axis=-1, batch_axis=0
        )
        out[path[:3] + ("lora_a",)] = Param(
            (*p.shape[:i], rank), (*p.axes[:i], "rank"), fan_in, p.inputs
        )
        out[path[:3] + ("lora_b",)] = Param(
            (p.shape[0], rank, *p.shape[i:]), (p.axes[0], "rank", *p.axes[i:]), zeros, 1
        )
    return unflatten_params(out)


def merge_lora(params: Params, scale: float) -> Params:
    """Adapters folded into their weights; the result has no adapters and the same outputs."""
    flat = flatten_params(params)
    out = {path: leaf for path, leaf in flat.items() if not is_adapter(path)}
    for path, a in flat.items():
        if path[-1] == "lora_a":
            out[path[:-1] + ("w",)] = _merge_weight(
                flat[path[:-1] + ("w",)], a, flat[path[:-1] + ("lora_b",)], scale
            )
    return unflatten_params(out)


@jax.jit
def _merge_weight(w: Array, a: Array, b: Array, scale: float) -> Array:
    delta = jax.vmap(lambda a, b: jnp.tensordot(a.astype(jnp.float32), b.astype(jnp.float32), 1))(
        a, b
    )
    return (w.astype(jnp.float32) + scale * delta).astype(w.dtype)
