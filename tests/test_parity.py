"""Our model equals transformers on random tiny checkpoints that transformers saves and we load."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tiny import Image, Video

from cptjax.models import attention, causal_lm, decoder, hf_checkpoint, vision_qwen2_5
from cptjax.training import train_step
from cptjax.training.algorithms.losses import LossConfig
from cptjax.training.algorithms.objective import Objective
from cptjax.training.algorithms.optimizers import OptimizerConfig, make_optimizer
from cptjax.types import Batch

torch = pytest.importorskip("torch")

ONE = [[6, Image(8, 12), 9]]
THREE = [[3, Image(4, 10), 5, Image(12, 18), 2, Image(6, 22), 7]]
MIXED = [[30], [4, Image(6, 10), 8], [5, Image(10, 4), 3, Image(4, 14), 11], [2, Image(8, 8), 1]]
CLIP = [[4, Video(3, 8, 12, 0.7), 6, Video(1, 4, 6, 2.0), 5]]
TEXT_ROWS = [[30], [25], [7]]
CASES = {
    **{
        f"{family}, {'tied' if tied else 'untied'}": (
            {"family": family, "tied": tied},
            TEXT_ROWS,
            tied,  # padding on the left or on the right
        )
        for family in tiny.TEXT_FAMILIES
        for tied in (False, True)
    },
    "llama without rope scaling": (
        {"family": "llama", "text": {"rope_parameters": tiny.PLAIN_ROPE}},
        TEXT_ROWS,
        True,
    ),
    "text": ({}, [[40], [25]], True),
    "one image": ({}, ONE, True),
    "three images": ({}, THREE, True),
    "mixed, left padding": ({}, MIXED, True),
    "mixed, right padding": ({}, MIXED, False),
    "video": ({}, CLIP, True),
    "video and image": ({}, [[3, Image(6, 10), 4, Video(3, 4, 10, 1.5), 5]], True),
    "tied": ({"tied": True}, ONE, True),
    "one kv head": ({"text": {"num_key_value_heads": 1}}, ONE, True),
    "as many kv heads as heads": ({"text": {"num_key_value_heads": 8}}, ONE, True),
    "full blocks first": ({"vision": {"fullatt_block_indexes": [0, 2]}}, THREE, True),
    "no full block": ({"vision": {"fullatt_block_indexes": []}}, THREE, True),
    "all full, other window": (
        {"vision": {"fullatt_block_indexes": [0, 1, 2, 3], "window_size": 56}},
        THREE,
        True,
    ),
    "other rope": (
        {
            "text": {
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 1e6,
                    "mrope_section": [4, 1, 3],
                }
            }
        },
        CLIP,
        True,
    ),
}


@functools.cache
def _models(key: str, folder: str):
    """Return (transformers' model, our config, our parameters)."""
    kwargs = dict(next(k for k, *_ in CASES.values() if str(k) == key))
    return (
        tiny.torch_model(**kwargs),
        (cfg := tiny.our_config(**kwargs)),
        hf_checkpoint.load_hf_checkpoint(tiny.save(folder, **kwargs), cfg),
    )


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    kwargs, rows, left = CASES[request.param]
    root = (
        tmp_path_factory.getbasetemp()
        / f"checkpoint{sorted(str(k) for k, *_ in CASES.values()).index(str(kwargs))}"
    )
    model, cfg, params = _models(str(kwargs), str(root))
    rng = np.random.default_rng(1)
    rows = [tiny.random_row(row, cfg, rng) for row in rows]
    inputs = tiny.hf_inputs(rows, cfg, left)
    if "second_per_grid_ts" in inputs:
        inputs["position_ids"] = tiny.released_positions(model.model, inputs)
    return model, cfg, params, tiny.prompts(rows, cfg, left), inputs


def _real(prompts) -> np.ndarray:
    return prompts.segments > 0


@functools.partial(jax.jit, static_argnums=2)
def _layers(params, prompts, cfg):
    """Return the hidden states after every vision block, after every text block, and the logits."""
    tower, seen = [], []
    take = lambda blocks, i: jax.tree.map(lambda x: x[i], blocks)
    if (v := prompts.vision) is not None:
        rows = lambda x: x.reshape(-1, *x.shape[2:])
        patches = vision_qwen2_5.normalise_patches(rows(v.patches), cfg.vision)
        x = patches @ params["vision"]["patch"]["w"]
        rope, frames = vision_qwen2_5.vision_cos_sin(rows(v.positions), cfg.vision), rows(v.frames)
        blocks = params["vision"]["blocks"]
        for i in range(cfg.vision.depth):
            x = vision_qwen2_5.vision_block(
                take(blocks, i), x, rope, frames, jnp.asarray(i in cfg.vision.full_blocks), cfg
            )
            tower.append(x)
    x, seg = causal_lm.embed_inputs(params, prompts, cfg, jnp.float32).x, prompts.segments
    attend = lambda q, k, v: (attention.attend(q, k, v, seg, seg, causal=True, backend="xla"), None)
    for i in range(cfg.text.depth):
        x, _ = decoder.decoder_block(
            take(params["text"]["blocks"], i),
            x,
            decoder.rope_cos_sin(prompts.positions, cfg.text),
            attend,
            cfg,
        )
        seen.append(x)
    return (
        tower,
        seen,
        causal_lm.forward(params, prompts, cfg) @ decoder.unembedding(params["text"]),
    )


def test_logits_and_every_layer_equal_transformers(case):
    model, cfg, params, prompts, inputs = case
    caught = {"vision": [], "text": []}
    hooks = [
        b.register_forward_hook(lambda _, __, out: caught["vision"].append(out.numpy()))
        for b in (model.model.visual.blocks if cfg.vision else ())
    ]
    hooks += [
        b.register_forward_hook(lambda _, __, out: caught["text"].append(out.numpy()))
        for b in getattr(model.model, "language_model", model.model).layers
    ]
    with torch.no_grad():
        theirs = model(**inputs).logits.numpy()
    for hook in hooks:
        hook.remove()
    tower, seen, logits = _layers(params, prompts, cfg)
    real = _real(prompts)
    for ours, wanted in zip(seen, caught["text"], strict=True):
        np.testing.assert_allclose(np.asarray(ours)[real], wanted[real], atol=1e-4, rtol=0)
    if (
        len({k for k in inputs if k.startswith("pixel")}) == 1
    ):  # images and videos pass the tower in two calls there
        filled = prompts.vision.frames.reshape(-1) > 0
        for ours, wanted in zip(tower, caught["vision"], strict=True):
            np.testing.assert_allclose(
                np.asarray(ours).reshape(-1, ours.shape[-1])[filled], wanted, atol=1e-4, rtol=0
            )
    assert np.abs(theirs[real]).max() > 1, "logits too small to tell anything"
    np.testing.assert_allclose(np.asarray(logits)[real], theirs[real], atol=2e-4, rtol=0)


@functools.partial(jax.jit, static_argnums=3)
@functools.partial(jax.value_and_grad)
def _loss(params, prompts, weights, cfg):
    logits = causal_lm.forward(params, prompts, cfg) @ decoder.unembedding(params["text"])
    picked = jnp.take_along_axis(
        jax.nn.log_softmax(logits[:, :-1]), prompts.tokens[:, 1:, None], -1
    )[..., 0]
    return -jnp.sum(picked * weights[:, 1:]) / jnp.sum(weights[:, 1:])


def _stored(grads, cfg):
    """Return our gradients by the names of transformers and in its shapes."""
    declared = hf_checkpoint.declared_leaves(cfg)
    for name, entry in hf_checkpoint.tensor_table(cfg).items():
        leaf = grads
        for part in entry.path:
            leaf = leaf[part]
        one, inputs = (
            np.asarray(leaf if entry.layer is None else leaf[entry.layer]),
            declared[entry.path].inputs,
        )
        yield (
            name,
            (one.reshape(np.prod(one.shape[:inputs]), -1).T if inputs else one).reshape(
                entry.shape
            ),
        )


def test_gradients_equal_transformers(case):
    model, cfg, params, prompts, inputs = case
    weights = (_real(prompts) & (prompts.slots < 0)).astype(np.float32)
    weights[:, 1:] *= _real(prompts)[:, :-1]  # a row's first token has nothing before it
    model.zero_grad()
    logits = model(**inputs).logits[:, :-1].log_softmax(-1)
    w = torch.tensor(weights)[:, 1:]
    loss = -(logits.gather(-1, inputs["input_ids"][:, 1:, None])[..., 0] * w).sum() / w.sum()
    loss.backward()
    value, grads = _loss(params, prompts, weights, cfg)
    np.testing.assert_allclose(float(value), loss.item(), rtol=1e-5)
    theirs = {hf_checkpoint.released_name(n, cfg): p.grad for n, p in model.named_parameters()}
    for name, ours in _stored(grads, cfg):
        wanted = theirs.get(name)
        if wanted is None:
            assert not ours.any(), f"{name} has a gradient here, none in torch"
            continue
        off = np.linalg.norm(ours - wanted.numpy()) / np.linalg.norm(wanted.numpy())
        assert off < 1e-3, f"gradient of {name} is off by {off:.1e}"


def test_three_steps_of_training_equal_torch(tmp_path):
    """AdamW, clipping and decay as in torch: the same losses and norms, and the same updates."""
    lr, decay, clip, betas = 1e-3, 0.1, 1.0, (0.9, 0.99)
    model, cfg = tiny.torch_model(), tiny.our_config()
    params = jax.tree.map(
        jnp.asarray, hf_checkpoint.load_hf_checkpoint(tiny.save(tmp_path / "start"), cfg)
    )
    rows = [tiny.random_row(row, cfg, np.random.default_rng(i)) for i, row in enumerate(MIXED)]
    prompts, inputs = tiny.prompts(rows, cfg), tiny.hf_inputs(rows, cfg)
    mask = (_real(prompts) & (prompts.slots < 0))[:, 1:] & _real(prompts)[:, :-1]
    targets = prompts.tokens[:, 1:]
    batch = Batch(
        prompts, targets, mask, np.broadcast_to(np.arange(targets.shape[1]), targets.shape)
    )
    optimizer = make_optimizer(OptimizerConfig("adamw", *betas, 1e-8, decay, clip, "float32"))
    state, start = jax.jit(optimizer.init)(params), dict(_stored(params, cfg))
    steps = train_step.make_step_programs(
        train_step.StepFunctions(
            cfg,
            Objective(LossConfig.plain("sft", chunk=32)),
            optimizer,
            train_step.StateShardings.of(state),
            jnp.float32,
        )
    )
    vector = lambda name: name.endswith("bias") or "norm" in name or "ln_q" in name
    named = dict(model.named_parameters())
    groups = [
        {
            "params": [p for n, p in named.items() if vector(n) == of],
            "weight_decay": 0 if of else decay,
        }
        for of in (True, False)
    ]
    tool = torch.optim.AdamW(groups, lr=lr, betas=betas, eps=1e-8)
    for _ in range(3):
        logits = model(**inputs).logits[:, :-1].log_softmax(-1)
        loss = -logits.gather(-1, inputs["input_ids"][:, 1:, None])[..., 0][
            torch.tensor(mask)
        ].mean()
        tool.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        tool.step()
        state, metrics = steps.run(state, {}, [batch], lr)
        assert norm > clip
        np.testing.assert_allclose(
            [metrics["loss"].value, metrics["grad_norm"].value],
            [loss.item(), norm.item()],
            rtol=1e-4,
        )
    theirs = {hf_checkpoint.released_name(n, cfg): p.detach().numpy() for n, p in named.items()}
    for name, ours in _stored(state.params, cfg):
        off = np.linalg.norm(ours - theirs[name]) / np.linalg.norm(theirs[name] - start[name])
        assert off < 1e-2, f"the change of {name} is off by {off:.1e}"
