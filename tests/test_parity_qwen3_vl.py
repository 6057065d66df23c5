"""Our Qwen3-VL equals that of transformers on random tiny checkpoints that transformers saves."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_qwen3_vl
from tiny import Image, Video

from cptjax.models import attention, causal_lm, decoder, hf_checkpoint

torch = pytest.importorskip("torch")

MIXED = [
    [30],
    [4, Image(6, 10), 8],
    [5, Image(10, 4), 3, Image(4, 14), 11],
    [2, Image(8, 8), Image(2, 2), 1],
    [4, Video(3, 8, 12), 6, Image(4, 6), 2, Video(1, 4, 6), 5],
]
CASES = {
    "images, video and text, left padding": ({}, MIXED, True),
    "tied, right padding, as many features as text layers": (
        {
            "tied": True,
            "vision": {"deepstack_visual_indexes": [0, 1, 3], "num_position_embeddings": 2304},
        },
        MIXED[:3],
        False,
    ),
    "video, one kv head, other rope, no deepstack": (
        {
            "text": {
                "num_key_value_heads": 1,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 5e6,
                    "mrope_section": [2, 3, 3],
                },
            },
            "vision": {"deepstack_visual_indexes": []},
        },
        MIXED[-1:],
        True,
    ),
}


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """(transformers' model, our config, our parameters, prompts, transformers' inputs)."""
    kwargs, rows, left = CASES[request.param]
    folder = tiny_qwen3_vl.save(tmp_path_factory.mktemp("checkpoint"), **kwargs)
    cfg, rng = tiny_qwen3_vl.our_config(**kwargs), np.random.default_rng(1)
    rows = [tiny.random_row(row, cfg, rng) for row in rows]
    return (
        tiny_qwen3_vl.torch_model(**kwargs),
        cfg,
        hf_checkpoint.load_hf_checkpoint(folder, cfg),
        tiny.prompts(rows, cfg, left),
        tiny.hf_inputs(rows, cfg, left),
    )


@functools.partial(jax.jit, static_argnums=2)
def _layers(params, prompts, cfg):
    """Return the hidden states after every text block, and the logits."""
    inputs, seg = causal_lm.embed_inputs(params, prompts, cfg, jnp.float32), prompts.segments
    attend = lambda q, k, v: (attention.attend(q, k, v, seg, seg, causal=True, backend="xla"), None)
    rope, x, seen = decoder.rope_cos_sin(prompts.positions, cfg.text), inputs.x, []
    for i in range(cfg.text.depth):
        layer = jax.tree.map(lambda x, i=i: x[i], params["text"]["blocks"])
        x, _ = decoder.decoder_block(layer, x, rope, attend, cfg)
        seen.append(x)
        if inputs.added is not None and i < len(inputs.added):
            x = x + inputs.added[i]
    logits = causal_lm.forward(params, prompts, cfg) @ decoder.unembedding(params["text"])
    return seen, logits


def test_positions_layers_and_logits_equal_transformers(case):
    """The tower has its own test, block by block."""
    model, cfg, params, prompts, inputs = case
    real = prompts.segments > 0
    grids = {k: v for k, v in inputs.items() if not k.startswith("pixel")}
    positions, _ = model.model.get_rope_index(**grids)
    np.testing.assert_array_equal(prompts.positions[:, real], positions.numpy()[:, real])
    caught = []
    hooks = [
        layer.register_forward_hook(lambda _, __, out: caught.append(out.numpy()))
        for layer in model.model.language_model.layers
    ]
    with torch.no_grad():
        theirs = model(**inputs).logits.numpy()
    for hook in hooks:
        hook.remove()
    seen, logits = _layers(params, prompts, cfg)
    for ours, wanted in zip(seen, caught, strict=True):
        np.testing.assert_allclose(np.asarray(ours)[real], wanted[real], atol=1e-4, rtol=0)
    assert np.abs(theirs[real]).max() > 1, "logits too small to tell anything"
    np.testing.assert_allclose(np.asarray(logits)[real], theirs[real], atol=2e-4, rtol=0)


@functools.partial(jax.jit, static_argnums=3)
@functools.partial(jax.value_and_grad)
def _loss(params, prompts, weights, cfg):
    logits = causal_lm.forward(params, prompts, cfg) @ decoder.unembedding(params["text"])
    logps = jax.nn.log_softmax(logits[:, :-1])
    picked = jnp.take_along_axis(logps, prompts.tokens[:, 1:, None], -1)[..., 0]
    return -jnp.sum(picked * weights[:, 1:]) / jnp.sum(weights[:, 1:])


def _stored(grads, cfg):
    """Return our gradients by the names of transformers and in its shapes."""
    declared = hf_checkpoint.declared_leaves(cfg)
    for name, entry in hf_checkpoint.tensor_table(cfg).items():
        leaf = functools.reduce(lambda tree, key: tree[key], entry.path, grads)
        one = np.asarray(leaf if entry.layer is None else leaf[entry.layer])
        if inputs := declared[entry.path].inputs:
            one = one.reshape(np.prod(one.shape[:inputs]), -1).T
        yield name, one.reshape(entry.shape)


def test_gradients_equal_transformers(case):
    model, cfg, params, prompts, inputs = case
    real = prompts.segments > 0
    weights = (real & (prompts.slots < 0)).astype(np.float32)
    weights[:, 1:] *= real[:, :-1]  # a row's first token has nothing before it
    model.zero_grad()
    logits = model(**inputs).logits[:, :-1].log_softmax(-1)
    w = torch.tensor(weights)[:, 1:]
    loss = -(logits.gather(-1, inputs["input_ids"][:, 1:, None])[..., 0] * w).sum() / w.sum()
    loss.backward()
    value, grads = _loss(params, prompts, weights, cfg)
    np.testing.assert_allclose(float(value), loss.item(), rtol=1e-5)
    theirs = dict(model.named_parameters())
    for name, ours in _stored(grads, cfg):
        wanted = theirs[name].grad
        if wanted is None:
            assert not ours.any(), f"{name} has a gradient here, none in torch"
            continue
        off = np.linalg.norm(ours - wanted.numpy()) / np.linalg.norm(wanted.numpy())
        assert off < 1e-3, f"gradient of {name} is off by {off:.1e}"
