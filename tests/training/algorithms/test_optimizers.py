"""Optimizers against torch and by hand: rates, decay, clip, guard, dtypes, shardings, Muon."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from cptjax.sharding import Param, is_param, make_mesh
from cptjax.training.algorithms import optimizers
from cptjax.training.algorithms.optimizers import OptimizerConfig, ScheduleConfig

LOSS = jnp.float32(1.0)


def tree(seed=0):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    blocks = {
        "norm1": normal(2, 8),
        "qkv": {"w": normal(2, 8, 3, 2, 4), "b": normal(2, 3, 2, 4)},
        "down": {"w": normal(2, 16, 8)},
    }
    return {"text": {"embed": normal(12, 8), "blocks": blocks, "norm": normal(8)}}


DECLARED = {
    "text": {
        "embed": Param((12, 8), ("vocab", "embed")),
        "blocks": {
            "norm1": Param((2, 8), ("layer", None)),
            "qkv": {
                "w": Param(
                    (2, 8, 3, 2, 4), ("layer", "embed", None, "heads", "head_dim"), inputs=1
                ),
                "b": Param((2, 3, 2, 4), ("layer", None, "heads", "head_dim")),
            },
            "down": {"w": Param((2, 16, 8), ("layer", "mlp", "embed"), inputs=1)},
        },
        "norm": Param((8,), (None,)),
    }
}


ADAMW = OptimizerConfig("adamw", 0.9, 0.999, 1e-8, 0.0, 1.0, "float32")
CONSTANT = ScheduleConfig(lr=2.0, schedule="constant", warmup=0.0)


def build(name="adamw", **settings):
    config = dataclasses.replace(ADAMW, optimizer=name, **settings)
    return optimizers.make_optimizer(config, DECLARED)


@functools.cache
def update(optimizer):
    return jax.jit(optimizer.update)


def start(optimizer, params=None):
    return jax.jit(optimizer.init)(tree() if params is None else params)


def test_adamw_takes_the_steps_of_torch():
    torch = pytest.importorskip("torch")
    begin, gradients = (
        np.random.default_rng(0).normal(size=(4, 3)),
        np.random.default_rng(1).normal(size=(3, 4, 3)),
    )
    theirs = torch.nn.Parameter(torch.tensor(begin, dtype=torch.float32))
    tool = torch.optim.AdamW([theirs], lr=0.01, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
    optimizer = build(b2=0.99, weight_decay=0.1, clip=1.0)
    state = start(optimizer, {"w": jnp.asarray(begin, jnp.float32)})
    for g in gradients:
        theirs.grad = torch.tensor(g, dtype=torch.float32)
        norm = torch.nn.utils.clip_grad_norm_([theirs], 1.0)
        tool.step()
        state, metrics = update(optimizer)(state, {"w": jnp.asarray(g, jnp.float32)}, LOSS, 0.01)
        np.testing.assert_allclose(metrics["grad_norm"].value, norm.item(), rtol=1e-5)
        np.testing.assert_allclose(state.params["w"], theirs.detach().numpy(), rtol=1e-5, atol=1e-6)
    assert state.step == 3 and state.skipped == 0


def test_schedules():
    def rate(step, **settings):
        schedule = dataclasses.replace(CONSTANT, **settings)
        with jax.enable_x64(True):
            return float(optimizers.make_schedule(schedule, 10)(step))

    assert [rate(s) for s in (0, 9, 50)] == [2, 2, 2]
    np.testing.assert_allclose([rate(s, warmup=0.3) for s in range(5)], [0.5, 1.0, 1.5, 2.0, 2.0])
    np.testing.assert_allclose(
        [rate(s, schedule="linear") for s in (0, 5, 9, 10, 99)], [2, 1, 0.2, 0, 0], atol=1e-9
    )
    np.testing.assert_allclose(
        [rate(s, schedule="cosine") for s in (0, 5, 10)], [2, 1, 0], atol=1e-9
    )
    np.testing.assert_allclose(
        [rate(s, schedule="wsd") for s in (0, 5, 6, 8, 10)], [2, 2, 2, 1, 0], atol=1e-9
    )
    cosine = [rate(s, schedule="cosine", warmup=0.2) for s in range(10)]
    assert np.argmax(cosine) == 2 and all(
        a > b > 0 for a, b in zip(cosine[2:], cosine[3:], strict=False)
    )


def rate_by_hand(step, steps, config):
    rise = round(config.warmup * steps)
    if step < rise:
        return config.lr * (step + 1) / (rise + 1)
    done = min((step - rise) / max(steps - rise, 1), 1.0)
    falls = {
        "constant": 1.0,
        "linear": 1 - done,
        "wsd": min(1.0, (1 - done) / 0.4),
        "cosine": 0.5 * (1 + math.cos(math.pi * done)),
    }
    return config.lr * falls[config.schedule]


@pytest.mark.parametrize("schedule", optimizers.SCHEDULES)
@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.3, 0.99])
@pytest.mark.parametrize("steps", [1, 7, 150])
def test_rates_of_a_stage_equal_their_formula_in_float32(schedule, warmup, steps):
    config = ScheduleConfig(2e-3, schedule, warmup)
    rates = optimizers.learning_rates(config, steps)
    want = [rate_by_hand(step, steps, config) for step in range(steps)]
    np.testing.assert_array_equal(rates.astype(np.float32), np.asarray(want, np.float32))


def test_another_learning_rate_is_the_same_program():
    optimizer, calls = build(), []

    @jax.jit
    def step(state, gradient, lr):
        calls.append(1)
        return optimizer.update(state, gradient, LOSS, lr)[0]

    state = start(optimizer)
    moved = [
        optax.tree.norm(
            jax.tree.map(jnp.subtract, step(state, tree(1), jnp.float32(lr)).params, state.params)
        )
        for lr in (1e-3, 2e-3)
    ]
    np.testing.assert_allclose(moved[1], 2 * moved[0], rtol=1e-3)
    assert len(calls) == 1 and hash(optimizer) == hash(build())


@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_vectors_do_not_decay_and_matrices_do(name):
    optimizer, params = build(name, weight_decay=0.5, clip=None), tree()
    state, _ = update(optimizer)(
        start(optimizer, params), jax.tree.map(jnp.zeros_like, params), LOSS, 0.1
    )
    shrink = jax.tree.map(lambda new, old: float(jnp.median(new / old)), state.params, params)[
        "text"
    ]
    assert shrink["norm"] == shrink["blocks"]["norm1"] == shrink["blocks"]["qkv"]["b"] == 1
    np.testing.assert_allclose(
        [shrink["embed"], shrink["blocks"]["qkv"]["w"], shrink["blocks"]["down"]["w"]],
        0.95,
        rtol=1e-5,
    )


def test_clipping_bounds_the_gradient_and_leaves_small_ones_alone():
    optimizer = build(b1=0.0, clip=1.0)
    for scale, seen in [(10.0, 1.0), (0.01, None)]:
        gradient = jax.tree.map(lambda g, s=scale: g * s, tree(1))
        state, metrics = update(optimizer)(start(optimizer), gradient, LOSS, 0.1)
        norm = optax.tree.norm(optax.tree.get(state.opt_state, "mu"))
        np.testing.assert_allclose(norm, seen or metrics["grad_norm"].value, rtol=1e-5)


@pytest.mark.parametrize("where", ["gradient", "loss"])
@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_a_step_that_is_not_finite_changes_nothing_but_the_counts(name, where):
    optimizer = build(name)
    step = update(optimizer)
    first, _ = step(start(optimizer), tree(1), LOSS, 0.01)
    bad = tree(2)
    bad["text"]["blocks"]["qkv"]["w"] = (
        bad["text"]["blocks"]["qkv"]["w"].at[1, 0, 0, 0, 0].set(jnp.inf)
    )
    second, metrics = step(
        first,
        bad if where == "gradient" else tree(2),
        LOSS if where == "gradient" else jnp.nan,
        0.01,
    )
    third, _ = step(second, bad, LOSS, 0.01)
    jax.tree.map(
        np.testing.assert_array_equal,
        (second.params, second.opt_state),
        (first.params, first.opt_state),
    )
    assert (
        int(second.step),
        int(second.skipped),
        int(third.skipped),
        metrics["skipped"].value,
    ) == (
        2,
        1,
        2,
        1.0,
    )
    fourth, metrics = step(third, tree(2), LOSS, 0.01)
    assert int(fourth.skipped) == 0 and metrics["skipped"].value == 0
    jax.tree.map(
        np.testing.assert_array_equal, fourth.params, step(first, tree(2), LOSS, 0.01)[0].params
    )


def second_moment_after_zeros(dtype, b2=0.999, steps=300):
    optimizer = build(b1=0.0, b2=b2, clip=None, moments_dtype=dtype)
    state, _ = update(optimizer)(
        start(optimizer, {"w": jnp.zeros(1)}), {"w": jnp.full(1, 1000.0)}, LOSS, 0.0
    )
    first = optax.tree.get(state.opt_state, "nu")["w"]
    quiet = lambda state, _: (optimizer.update(state, {"w": jnp.zeros(1)}, LOSS, 0.0)[0], None)
    state, _ = jax.lax.scan(quiet, state, None, steps)
    return float(optax.tree.get(state.opt_state, "nu")["w"][0] / first[0])


def test_bfloat16_second_moments_never_decay():
    np.testing.assert_allclose(second_moment_after_zeros("float32"), 0.999**300, rtol=1e-3)
    assert second_moment_after_zeros("bfloat16") == 1.0
    assert second_moment_after_zeros("bfloat16", b2=0.95) < 0.01


@pytest.mark.parametrize("moments", optimizers.MOMENT_DTYPES)
@pytest.mark.parametrize("weights", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_shapes_and_types_of_the_state_are_a_fixed_point(name, weights, moments):
    optimizer = build(name, moments_dtype=moments)
    state = jax.eval_shape(optimizer.init, jax.tree.map(lambda p: p.astype(weights), tree()))
    after, _ = jax.eval_shape(optimizer.update, state, tree(1), LOSS, jnp.float32(0.1))
    assert after == state
    assert {p.dtype for p in jax.tree.leaves(state.params)} == {jnp.dtype(weights)}
    kept = {
        x.dtype
        for x in jax.tree.leaves(state.opt_state)
        if x.size > 16 and jnp.issubdtype(x.dtype, jnp.floating)
    }
    assert kept == {jnp.dtype(moments)}


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_places_of_the_state_are_a_fixed_point(name):
    optimizer, mesh, params = build(name), make_mesh(1, 4, 2, devices=jax.devices()[:8]), tree()
    spec = {
        (12, 8): P("model", "fsdp"),
        (2, 8, 3, 2, 4): P(None, "fsdp", None, "model"),
        (2, 16, 8): P(None, "model", "fsdp"),
    }
    place = lambda x: jax.device_put(x, NamedSharding(mesh, spec.get(x.shape, P())))
    state, gradient = jax.tree.map(place, (start(optimizer, params), tree(1)))
    after, _ = update(optimizer)(state, gradient, LOSS, 0.1)
    same = jax.tree.map(lambda a, b: a.sharding.is_equivalent_to(b.sharding, a.ndim), after, state)
    assert all(jax.tree.leaves(same))
    alone, _ = update(optimizer)(start(optimizer, params), tree(1), LOSS, 0.1)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4),
        after.params,
        alone.params,
    )


@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_frozen_leaves_cost_nothing(name):
    size = lambda x: sum(leaf.size for leaf in jax.tree.leaves(x))
    frozen = tree()
    frozen["text"] |= {"embed": None}
    optimizer = build(name)
    saved = size(optimizer.init(tree()).opt_state) - size(optimizer.init(frozen).opt_state)
    assert saved >= 12 * 8
    gradient = tree(1)
    gradient["text"] |= {"embed": None}
    state, _ = update(optimizer)(start(optimizer, frozen), gradient, LOSS, 0.1)
    assert state.params["text"]["embed"] is None


def test_muon_orthogonalises_each_layer_and_each_of_q_k_v():
    axes = {path[-2:]: a for path, a in optimizers.muon_axes(DECLARED)}
    assert axes == {("qkv", "w"): ((1,), (3, 4)), ("down", "w"): ((1,), (2,))}
    optimizer, params = build("muon", clip=None), tree()
    state, _ = update(optimizer)(start(optimizer, params), tree(1), LOSS, 1.0)
    moved = jax.tree.map(jnp.subtract, params, state.params)["text"]
    for matrix in (
        *moved["blocks"]["down"]["w"],
        *np.moveaxis(moved["blocks"]["qkv"]["w"], 2, 1).reshape(6, 8, 8),
    ):
        values = np.linalg.svd(matrix, compute_uv=False) / (0.2 * np.sqrt(max(matrix.shape)))
        assert np.all(
            (values > 0.3) & (values < 1.4)
        )  # five Newton-Schulz steps leave about .5 to 1.2
    np.testing.assert_allclose(np.abs(moved["embed"]), 1, rtol=1e-3)  # AdamW's first step


def test_adafactor_is_small_and_moves_as_far_as_adamw():
    params = {"w": jnp.ones((256, 512))}
    gradient = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(256, 512)), jnp.float32)}
    optimizer = build("adafactor", clip=None)
    state = start(optimizer, params)
    assert sum(x.size for x in jax.tree.leaves(state.opt_state)) < 1000
    after, _ = update(optimizer)(state, gradient, LOSS, 0.1)
    moved = params["w"] - after.params["w"]
    np.testing.assert_allclose(jnp.sqrt(jnp.mean(moved**2)), 0.1, rtol=0.05)
    assert np.mean(np.sign(moved) == np.sign(gradient["w"])) == 1


def test_muon_reads_the_declared_model():
    from cptjax.models import causal_lm
    from cptjax.models.families import PRESETS

    declared = causal_lm.declare_params(PRESETS["tiny"])
    matrices = {path for path, _ in optimizers.muon_axes(declared)}
    leaves = {
        optimizers.parameter_path(path): p
        for path, p in jax.tree_util.tree_leaves_with_path(declared, is_leaf=is_param)
    }
    assert {path[-2] for path in matrices} == {
        "qkv",
        "proj",
        "gate",
        "up",
        "down",
        "fc1",
        "fc2",
        "q",
        "k",
        "v",
        "o",
    }
    decays = {
        optimizers.parameter_path(path)
        for path, d in jax.tree_util.tree_leaves_with_path(
            optimizers.decay_mask(leaves_as_arrays(declared))
        )
        if d
    }
    assert decays == {
        path for path, p in leaves.items() if p.inputs or path[-1] in ("embed", "unembed")
    }


def leaves_as_arrays(declared):
    return jax.tree.map(
        lambda p: jax.ShapeDtypeStruct(p.shape, jnp.float32), declared, is_leaf=is_param
    )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"optimizer": "sgd"}, "adamw, muon, adafactor"),
        ({"schedule": "step"}, "constant, cosine, linear, wsd"),
        ({"moments_dtype": "float16"}, "float32, bfloat16"),
        ({"lr": 0.0}, "above 0"),
        ({"warmup": 1.0}, "0 <= warmup < 1"),
        ({"b2": 1.0}, "0 < b2 < 1"),
        ({"clip": 0.0}, "clip above 0 or None"),
    ],
)
def test_bad_settings_are_one_clear_line(settings, words):
    with pytest.raises(ValueError, match=words) as error:
        for config in (ADAMW, CONSTANT):
            names = config.__dataclass_fields__.keys() & settings
            dataclasses.replace(config, **{name: settings[name] for name in names}).validate()
    assert "\n" not in str(error.value)


def test_muon_needs_the_declared_parameters():
    with pytest.raises(ValueError, match="declared"):
        optimizers.make_optimizer(dataclasses.replace(ADAMW, optimizer="muon"))
