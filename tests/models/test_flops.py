"""FLOPs by hand equal sizes of parameters, small sums, and the counts of compiled programs."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest

from cptjax import sharding
from cptjax.data import collate
from cptjax.models import causal_lm, flops, lora, trainable
from cptjax.models.families import PRESETS
from cptjax.planning import hlo_costs
from cptjax.types import Prompts

TINY = PRESETS["tiny"]


def _weights(tree, top):
    """Return the number of weights of the linear maps in a part of the tree."""
    flat = trainable.flatten_params(tree)
    return sum(math.prod(p.shape) for path, p in flat.items() if path[0] == top and path[-1] == "w")


@pytest.mark.parametrize("name", ["tiny", "3b", "7b", "72b"])
def test_a_token_costs_two_operations_for_each_weight_it_meets(name):
    cfg = PRESETS[name]
    weights = _weights(causal_lm.declare_params(cfg), "text") + (
        cfg.text.width * cfg.text.vocab if cfg.text.tied else 0
    )
    pair = 4 * cfg.text.depth * cfg.text.heads * cfg.text.head_dim
    assert flops.text_forward_flops(cfg, 1, 1, 1) == 2 * weights + pair


@pytest.mark.parametrize("name", ["tiny", "7b"])
def test_a_patch_costs_two_operations_for_each_weight_and_the_merger_once_in_four(name):
    cfg = PRESETS[name]
    v, tree = cfg.vision, causal_lm.declare_params(cfg)
    mixing = (
        4 * v.width * (len(v.full_blocks) * 256 + (v.depth - len(v.full_blocks)) * v.window_slots)
    )
    expected = 2 * _weights(tree, "vision") + 2 * _weights(tree, "merger") / v.merge**2 + mixing
    assert flops.vision_forward_flops(cfg, 1, 256) == pytest.approx(expected)


def test_a_group_of_one_is_a_row_and_sharing_saves_prompts():
    cfg = PRESETS["7b"]
    assert flops.group_forward_flops(cfg, 3, 100, 1, 20) == pytest.approx(
        flops.text_forward_flops(cfg, 3, 120, 20), rel=1e-12
    )
    copies = flops.text_forward_flops(cfg, 8, 1200, 200)
    assert copies / flops.group_forward_flops(cfg, 1, 1000, 8, 200) == pytest.approx(3.6, abs=0.1)


def test_prefill_and_decode_make_a_forward_pass():
    cfg = PRESETS["3b"]
    both = flops.text_forward_flops(cfg, 2, 50, 0) + flops.decode_flops(cfg, 2, 50, 1, 30)
    assert both == pytest.approx(flops.text_forward_flops(cfg, 2, 80, 30), rel=1e-12)


@pytest.mark.parametrize("depth", [1, 3])
def test_compiled_forward_does_what_was_counted(depth):
    """The reference attention computes whole squares: every pair instead of the causal half."""
    cfg = dataclasses.replace(TINY, text=dataclasses.replace(TINY.text, depth=depth))
    b, t = 2, 48
    ids = jax.ShapeDtypeStruct((b, t), jnp.int32)
    prompts = Prompts(ids, jax.ShapeDtypeStruct((3, b, t), jnp.int32), ids, ids)
    run = jax.jit(lambda p, x: causal_lm.forward(p, x, cfg) @ p["text"]["embed"].T)
    text = (
        run.lower(sharding.abstract_params(causal_lm.declare_params(cfg), jnp.float32), prompts)
        .compile()
        .as_text()
    )
    pair = 4 * depth * cfg.text.heads * cfg.text.head_dim
    expected = flops.text_forward_flops(cfg, b, t, t) + b * pair * (t * t - t * (t + 1) / 2)
    assert hlo_costs.count_flops(text) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("freeze", "rank", "costs"),
    [
        ((), 0, (3, 3)),
        (("vision", "merger"), 0, (3, 1)),
        (("language",), 0, (2, 3)),
        ((), 1, (2, 1)),
    ],
)
def test_a_compiled_gradient_does_what_was_counted(freeze, rank, costs):
    """The gradients of frozen weights are not computed.

    Attention has no weights, so its gradients cost two forward passes in any case; the reference
    computes whole squares of it.
    """
    cfg = TINY
    declared = causal_lm.declare_params(cfg)
    if rank:
        declared = lora.add_lora(declared, rank)
    params = sharding.abstract_params(declared, jnp.float32)
    is_trained = trainable.is_trained(freeze, rank)
    trained, frozen = trainable.split_params(params, is_trained)
    shape = collate.largest_batch_shape(cfg, 64 * 64, 4, 1, 64)
    prompts = collate.prompt_arrays(shape, 1, cfg)

    def loss(trained, frozen, prompts):
        joined = trainable.join_params(trained, frozen)
        return jnp.sum(jnp.square(causal_lm.forward(joined, prompts, cfg)))

    compiled = jax.jit(jax.grad(loss)).lower(trained, frozen, prompts).compile()
    found = flops.training_pass_costs(freeze, rank, False)
    assert (found.text, found.vision) == costs
    text = flops.text_forward_flops(cfg, *prompts.tokens.shape, 0)
    *images, patches, _ = prompts.vision.patches.shape
    vision = flops.vision_forward_flops(cfg, math.prod(images) * patches, patches)
    t, (rows, length) = cfg.text, prompts.tokens.shape
    pair = 4 * t.depth * t.heads * t.head_dim
    squares, counted = rows * pair * length**2, rows * pair * length * (length + 1) / 2
    expected = found.text * (text - counted) + 3 * squares + found.vision * vision
    assert hlo_costs.count_flops(compiled.as_text()) == pytest.approx(expected, rel=0.05)
