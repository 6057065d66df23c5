"""What a stage needs of a device, by arithmetic and before any device is touched; `launch/plan.py` compiles and knows."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from cptjax import sharding
from cptjax.models import trainable
from cptjax.models.config import ModelConfig
from cptjax.training import build
from cptjax.training.algorithms import distillation, regularizers
from cptjax.types import Params


def expected_bytes(
    cfg: ModelConfig,
    declared: Params,
    settings: ConfigDict,
    prompt: int,
    patches: int,
    devices: int,
) -> dict[str, float]:
    """Bytes per device of one stage, by part, for prompts of `prompt` tokens and `patches` patches at most; "peak" is what must fit.

    Weights are taken to divide evenly; what the compiler adds (fusion buffers, padding, collectives) is not in it.
    """
    m, t, r = settings.method, settings.train, settings.rollout
    data, cut, model = mesh_ways(settings.mesh, devices)
    sizes = lambda tree, dtype: (
        sum(math.prod(p.shape) for p in trainable.flatten_params(tree).values())
        * jnp.dtype(dtype).itemsize
        / cut
    )
    trained, frozen = trainable.split_params(
        declared, trainable.is_trained(settings.model.freeze, settings.model.lora.rank)
    )
    compute, wide = settings.model.compute_dtype, settings.model.param_dtype
    part = t.batch // m.updates_per_batch
    micro = t.micro_batch or part
    answers = {"rollouts": r.group * r.max_new_tokens, "gold": 0}.get(m.source, r.max_new_tokens)
    follows = distillation.has_ema_teacher(m)
    frozen_models = (
        (m.objective == "policy" and m.kl_coef > 0)
        + (m.objective == "distill" and not follows)
        + (m.penalty.name == "lwf")
    )
    kept = {
        "weights": sizes(trained, wide) + sizes(frozen, compute),
        "optimiser": _optimizer_bytes(trained, settings, declared) / cut,
        "reference, teacher": frozen_models * sizes(declared, compute)
        + follows * sizes(trained, "float32"),
        "stage's start": regularizers.needs_exact_start(m) * sizes(declared, wide)
        + (m.penalty.name == "ewc") * sizes(trained, "float32"),
    }
    update = {
        # the sum so far stands beside the micro-batch's own
        "gradients": (2 if micro < part else 1) * sizes(trained, "float32")
        + (sizes(trained, compute) if wide != compute else 0.0),
        "activations": activation_bytes(
            cfg, settings, micro / data * (prompt + answers), micro / data * patches
        )
        / model,
        "logits": 2 * 4 * t.chunk * cfg.text.vocab / model,
    }
    rollout = {"rollout weights": 0.0, "cache": 0.0}
    if m.source in ("rollouts", "self"):
        groups, each = (r.slots or t.batch) / data, prompt + r.group * r.max_new_tokens
        rollout["rollout weights"] = sizes(declared, r.dtype or compute) * (
            cut / model if r.gather else 1
        )
        rollout["cache"] = (
            groups
            * each
            * _cache_bytes_per_token(cfg, compute if r.dtype in ("", "int8") else r.dtype)
            / min(model, cfg.text.kv_heads)
        )
    return (
        kept
        | update
        | rollout
        | {"peak": sum(kept.values()) + max(sum(update.values()), sum(rollout.values()))}
    )


def mesh_ways(mesh: ConfigDict, devices: int) -> tuple[int, int, int]:
    """(ways a batch is cut, ways weights are cut, size of the model axis) of `config.mesh` on so many devices."""
    sizes = {name: mesh[name] for name in sharding.AXES}
    known = math.prod(n for n in sizes.values() if n > 0)
    sizes = {name: devices // known if n == -1 else n for name, n in sizes.items()}
    if math.prod(sizes.values()) != devices:
        raise ValueError(f"mesh {dict(mesh)} does not make {devices} devices")
    return sizes["data"] * sizes["fsdp"], sizes["fsdp"] * sizes["model"], sizes["model"]


def possible_device_counts(mesh: ConfigDict, wished: Sequence[int], batch: int) -> list[int]:
    """The device numbers that `config.mesh` can be made of: its own, or those wished that divide the batch where a size is left open."""
    known = math.prod(mesh[name] for name in sharding.AXES if mesh[name] > 0)
    if all(mesh[name] > 0 for name in sharding.AXES):
        return [known]
    return [n for n in wished if n % known == 0 and batch % mesh_ways(mesh, n)[0] == 0] or [known]


def activation_bytes(
    cfg: ModelConfig, settings: ConfigDict, tokens: float, patches: float
) -> float:
    """Bytes that the layers keep for the backward pass, and what one layer needs while it runs."""
    t, v, size = cfg.text, cfg.vision, jnp.dtype(settings.model.compute_dtype).itemsize
    products = {
        "text": (
            tokens,
            t.depth,
            t.width,
            (t.heads + 2 * t.kv_heads) * t.head_dim + 2 * t.width + 2 * t.mlp,
        ),
        "vision": (patches, v.depth, v.width, 3 * v.width + 2 * v.width + 2 * v.mlp),
    }
    total = 0.0
    for n, depth, width, inner in products.values():
        per_layer = {"block": 0, "offload": 0, "dots": inner, "none": 2 * inner}[
            settings.model.remat
        ]
        total += n * size * (depth * (width + per_layer) + 2 * inner)
    return total


def _optimizer_bytes(trained: Params, settings: ConfigDict, declared: Params) -> float:
    opt = build.optimizer_from_config(settings, declared)
    state = jax.eval_shape(
        opt.init, sharding.abstract_params(trained, settings.model.param_dtype)
    ).opt_state
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(state))


def _cache_bytes_per_token(cfg: ModelConfig, dtype: Any) -> float:
    """Bytes of keys and values of one token."""
    return 2 * cfg.text.depth * cfg.text.kv_heads * cfg.text.head_dim * jnp.dtype(dtype).itemsize
