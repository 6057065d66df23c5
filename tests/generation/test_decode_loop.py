"""Rollouts equal transformers' greedy search, with the trainer's log-probabilities."""

import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import run_helpers
import tiny

from cptjax import sharding
from cptjax.common import chips
from cptjax.config import resolve_stages
from cptjax.data import model_context, processor
from cptjax.generation import decode_loop, generate, rollout_weights
from cptjax.generation.sampling_config import SamplingConfig
from cptjax.models import attention, causal_lm, decoder, hf_checkpoint, logprobs, lora, trainable
from cptjax.models.config import ModelConfig
from cptjax.training import tower_states, validate_config

ROWS = [
    [5, tiny.Image(4, 4), 3],
    [9],
    [3, tiny.Image(6, 10), 2, tiny.Image(4, 8), 4],
    [14],
    [2, tiny.Image(8, 8), 6],
    [4],
    [7, tiny.Image(2, 2), 1],
    [11],
]
KEY = jax.random.key(7)


@pytest.fixture(scope="module")
def cfg() -> ModelConfig:
    """A tower of one block: the blocks of towers have their own tests."""
    tower = {"depth": 1, "fullatt_block_indexes": [0]}
    return tiny.our_config(text={"eos_token_id": [2, 7]}, vision=tower)


def make_params(cfg, declared=None):
    """Random weights in numpy, with logits wide enough that tokens differ."""
    tree = tiny.random_params(cfg, declared=declared)
    tree["text"]["embed"] *= 4
    return tree


@pytest.fixture(scope="module")
def params(cfg):
    return make_params(cfg)


@pytest.fixture(scope="module")
def one_layer():
    """A small text model and its weights, for tests of which row is decoded when."""
    sizes = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64}
    cfg = tiny.our_config(family="qwen2", text=sizes)
    return cfg, make_params(cfg)


def prompts(cfg, rows=ROWS, shards=1):
    rng = np.random.default_rng(0)
    return tiny.prompts([tiny.random_row(r, cfg, rng) for r in rows], cfg, shards=shards)


def sampling(**changes):
    settings = {"group": 3, "max_new_tokens": 12, "temperature": 1.0, "check_every": 4}
    return SamplingConfig(**settings | changes)


def run(params, prompts, cfg, key=KEY, stop=None, limits=None, rows=None, **changes):
    out = decode_loop.generate_rollouts(
        params,
        prompts,
        key,
        cfg,
        sampling(**changes),
        dtype=jnp.float32,
        stop=stop,
        limits=limits,
        rows=rows,
    )
    return jax.tree.map(np.asarray, out)


def same(a, b, atol=1e-4):
    for name in ("tokens", "mask", "finished"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    np.testing.assert_allclose(a.logps, b.logps, atol=atol)
    np.testing.assert_allclose(a.policy_logps, b.policy_logps, atol=atol)


group_states = jax.jit(causal_lm.forward_group, static_argnums=3)


def trainer_logps(params, prompts, tokens, cfg, group):
    """What the training step computes for the same tokens."""
    hidden = group_states(params, prompts, tokens.reshape(-1, group, tokens.shape[1]), cfg)
    flat = hidden.reshape(-1, hidden.shape[-1])
    return np.asarray(
        logprobs.token_logps(flat, decoder.unembedding(params["text"]), tokens.reshape(-1))[0]
    ).reshape(tokens.shape)


@pytest.mark.parametrize(
    "settings, unroll",
    [
        ({}, False),
        ({}, True),
        ({"temperature": 0.6, "top_k": 20, "top_p": 0.9}, False),
        ({"temperature": 0.6, "top_k": 20, "top_p": 0.9}, True),
        ({"temperature": 0.0}, False),
    ],
    ids=str,
)
def test_policy_logps_equal_the_trainers(cfg, params, settings, unroll):
    cfg = cfg.with_compute(unroll=unroll)
    out = run(params, prompts(cfg), cfg, **settings)
    want = trainer_logps(params, prompts(cfg), out.tokens, cfg, 3)
    np.testing.assert_allclose(out.policy_logps, np.where(out.mask, want, 0), atol=1e-4)
    if not settings:  # the two differ by the forbidden tokens' share only
        assert (out.logps >= out.policy_logps - 1e-6).all() and np.abs(
            out.logps - out.policy_logps
        ).max() < 0.3
    assert not np.isin(out.tokens[out.mask], [*cfg.vision_tokens, cfg.pad]).any()


def test_mask_ends_with_the_stop_token_or_the_limit(cfg, params):
    """Several stop ids, a limit for each row, padding after the end."""
    stops, limits = tuple(range(2, 60)), np.arange(24).reshape(8, 3) % 12 + 1
    out = run(params, prompts(cfg), cfg, stop=stops, limits=limits)
    length = out.mask.sum(1)
    for row, n, limit, ended in zip(
        out.tokens, length, limits.reshape(-1), out.finished, strict=True
    ):
        assert ended == (row[n - 1] in stops) and (ended or n == limit) and n <= limit
        assert not np.isin(row[: n - 1], stops).any() and (row[n:] == cfg.pad).all()
    assert out.finished.any() and not out.finished.all()
    np.testing.assert_array_equal(out.mask, np.arange(12) < length[:, None])
    assert (out.logps[~out.mask] == 0).all() and (out.policy_logps[~out.mask] == 0).all()


def test_shared_prompt_equals_copied_prompts(cfg, params):
    """A group of three is three groups of one with the same row numbers."""
    once = run(params, prompts(cfg), cfg)
    for g in range(3):
        # row number = prompt number * group + g, so one response of prompt number n alone is row n
        alone = run(params, prompts(cfg), cfg, group=1, rows=np.arange(8) * 3 + g)
        same(alone, jax.tree.map(lambda x: x.reshape(8, 3, *x.shape[1:])[:, g], once))  # noqa: B023


def test_the_key_decides_responses_except_greedy_ones(cfg, params):
    out, again, other = (
        run(params, prompts(cfg), cfg),
        run(params, prompts(cfg), cfg),
        run(params, prompts(cfg), cfg, jax.random.key(8)),
    )
    same(out, again, 0)
    assert (out.tokens != other.tokens).any(1).mean() > 0.9
    first = out.tokens[:, 0].reshape(8, 3)
    assert all(len(set(row)) > 1 for row in first)
    greedy = run(params, prompts(cfg), cfg, temperature=0.0)
    same(greedy, run(params, prompts(cfg), cfg, jax.random.key(8), temperature=0.0), 0)
    assert (greedy.tokens.reshape(8, 3, -1) == greedy.tokens.reshape(8, 3, -1)[:, :1]).all()


@pytest.mark.parametrize(
    "slots, slot_rows, unroll", [(1, 2, False), (3, 0, True), (5, 1, True), (8, 2, True)]
)
def test_slots_do_not_change_rows(cfg, params, slots, slot_rows, unroll):
    """Nor do the rows of a slot, which start the next response of a group of three.

    Some responses have a limit of 0 or 1 tokens.
    """
    stops, limits = tuple(range(2, 40)), np.arange(24).reshape(8, 3) % 12
    whole = run(params, prompts(cfg), cfg, stop=stops, limits=limits)
    assert len(set(whole.mask.sum(1).tolist())) > 5
    same(
        whole,
        run(
            params,
            prompts(cfg),
            cfg.with_compute(unroll=unroll),
            stop=stops,
            limits=limits,
            slots=slots,
            slot_rows=slot_rows,
            check_every=3,
        ),
    )


def test_batch_split_does_not_change_rows(cfg, params):
    """The parts are padded to another length than the whole."""
    whole = run(params, prompts(cfg, [[9], [14], [4], [11]]), cfg, rows=np.array([4, 5, 6, 7]))
    rows = [
        tiny.random_row(r, cfg, rng)
        for rng in [np.random.default_rng(0)]
        for r in ([9], [14], [4], [11])
    ]
    parts = [
        run(params, tiny.prompts(rows[i : i + 2], cfg, length=16), cfg, rows=np.array([4, 5]) + i)
        for i in (0, 2)
    ]
    same(whole, jax.tree.map(lambda *x: np.concatenate(x), *parts))


@pytest.mark.parametrize(
    "shape, slots", [((8, 1, 1), 0), ((2, 2, 2), 0), ((1, 4, 2), 4), ((1, 1, 8), 3)], ids=str
)
def test_meshes_do_not_change_rows(cfg, params, shape, slots):
    """One device and eight: rows over data and fsdp, heads over model where there are enough."""
    mesh = sharding.make_mesh(*shape)
    rules = sharding.rules_for(cfg.text.kv_heads, mesh)
    shards = sharding.batch_shards(mesh)
    whole = run(params, prompts(cfg), cfg, rows=np.arange(8) + 3)
    placed = jax.device_put(
        params, sharding.param_shardings(causal_lm.declare_params(cfg), mesh, rules)
    )
    batch = prompts(cfg, shards=shards)
    batch = batch.replace(
        positions=sharding.place_rows(batch.positions, mesh, lambda _: (None, "batch", None)),
        **{
            f: sharding.place_rows(getattr(batch, f), mesh)
            for f in ("tokens", "segments", "slots", "vision")
        },
    )
    with jax.set_mesh(mesh):
        if shape == (2, 2, 2):
            placed = rollout_weights.prepare_rollout_weights(
                placed, cfg, sampling(gather=True), jnp.float32
            )
            assert not any("fsdp" in str(x.sharding.spec) for x in jax.tree.leaves(placed))
        same(whole, run(placed, batch, cfg, rows=np.arange(8) + 3, slots=slots))


@pytest.mark.parametrize(
    "shape, slots", [(None, 0), (None, 3), ((1, 4, 2), 4), ((1, 2, 4), 0)], ids=str
)
def test_the_tpu_kernel_does_not_change_rows(shape, slots, monkeypatch):
    """Rows end at different steps, slots are refilled, and the ring of 12 columns is padded."""
    monkeypatch.setattr(attention, "INTERPRET", True)
    cfg = tiny.our_config(family="qwen2")
    params = make_params(cfg)
    batch, stops = prompts(cfg, [[9], [14], [4], [11], [6], [3], [8], [12]]), tuple(range(2, 40))
    whole = run(params, batch, cfg, stop=stops)
    assert len(set(whole.mask.sum(1).tolist())) > 3
    kernel = cfg.with_compute(attention="splash")
    if shape is None:
        changes = dict(stop=stops, slots=slots, check_every=3)
        same(whole, run(params, batch, kernel, slot_rows=2 if slots else 0, **changes))
        return
    mesh = sharding.make_mesh(*shape)
    if slots:  # groups that share the MLP with others
        mesh = sharding.sampling_mesh(mesh, 2, 4)
    rules = sharding.rules_for(cfg.text.kv_heads, mesh)
    placed = jax.device_put(
        params, sharding.param_shardings(causal_lm.declare_params(cfg), mesh, rules)
    )
    with jax.set_mesh(mesh):
        batch = sharding.place_prompts(batch, mesh)
        same(whole, run(placed, batch, kernel, stop=stops, slots=slots, check_every=3))


def local_shape(x):
    return x.sharding.shard_shape(x.shape)


@pytest.mark.parametrize("gather, slots, mlp", [(True, 0, 4), (False, 4, 0), (False, 4, 4)])
def test_more_devices_on_model_while_sampling_do_not_change_rows(cfg, params, gather, slots, mlp):
    """Weights and prompts on a mesh of 8 x 1, programs that sample on 4 x 2 or 2 x 1 x 2 x 2.

    With slots on the second mesh, a slot has two rows for its three responses.
    """
    mesh = sharding.make_mesh(2, 4, 1)
    context = types.SimpleNamespace(cfg=cfg, dtype=jnp.float32, mesh=mesh)
    changes = dict(model=2, mlp=mlp, slots=slots, slot_rows=2 if slots and mlp else 0)
    settings = sampling(gather=gather, **changes)
    whole = run(params, prompts(cfg), cfg)
    placed = jax.device_put(params, sharding.param_shardings(causal_lm.declare_params(cfg), mesh))
    weights = generate.prepare_weights(context, placed, settings)
    names = {
        name for x in jax.tree.leaves(weights) for name in jax.tree.leaves(tuple(x.sharding.spec))
    }
    assert names == {"model"} | ({"rows"} if mlp else set()) | (set() if gather else {"fsdp"})
    blocks = weights["text"]["blocks"]
    parts = {n: blocks[n]["w"].shape[-1] // local_shape(blocks[n]["w"])[-1] for n in ("gate", "up")}
    assert parts == {"gate": mlp or 2, "up": mlp or 2}
    assert local_shape(blocks["q"]["w"])[-2] == cfg.text.heads // 2
    batch = sharding.place_prompts(prompts(cfg, shards=8), mesh)
    with jax.set_mesh(mesh):
        states = tower_states.make_tower_program(cfg, jnp.float32)(placed, batch.vision)
    with jax.set_mesh(settings.mesh(mesh)):
        same(whole, run(weights, batch, cfg, **changes))
        if not (slots and mlp):  # with each of the two, and so of other programs to compile
            frozen = batch.replace(vision=None, tower_states=states)
            same(whole, run(weights, frozen, cfg, **changes))


@pytest.mark.parametrize("kind", ["int8", "lora"])
def test_a_mesh_of_sampling_takes_int8_weights_and_adapters(cfg, kind):
    """On 2 x 1 x 2 x 2 devices, MLPs in four parts, the rows are those of one device."""
    declared = causal_lm.declare_params(cfg)
    if kind == "lora":
        declared = lora.add_lora(declared, 2)
    params = make_params(cfg, declared)
    dtype = "int8" if kind == "int8" else ""

    def sample(mesh, **changes):
        context = types.SimpleNamespace(cfg=cfg, dtype=jnp.float32, mesh=mesh)
        placed = jax.device_put(params, sharding.param_shardings(declared, mesh))
        settings = sampling(dtype=dtype, **changes)
        weights = generate.prepare_weights(context, placed, settings)
        batch = sharding.place_prompts(prompts(cfg, shards=mesh.size), mesh)
        with jax.set_mesh(settings.mesh(mesh)):
            return run(weights, batch, cfg, dtype=dtype, **changes)

    one = sample(sharding.make_mesh(devices=jax.devices()[:1]))
    assert len(np.unique(one.tokens)) > 10
    same(one, sample(sharding.make_mesh(2, 4, 1), model=2, mlp=4))


def test_whole_rows_are_only_computed_where_all_devices_get_some():
    mesh = sharding.make_mesh(2, 2, 2)
    spec = lambda: sharding.activation_spec(("batch", "heads"))
    with jax.set_mesh(mesh):
        with sharding.whole_rows(16, 8):
            assert spec() == jax.P(("data", "fsdp", "model"), None)
        with sharding.whole_rows(16, 4):
            assert spec() == jax.P(("data", "fsdp"), "model")
    with sharding.whole_rows(16):  # without a mesh
        assert spec() == jax.P(("data", "fsdp"), "model")


@pytest.mark.parametrize("group, at", [(1, 0), (1, 64), (1, 127), (8, 127)])
def test_a_long_row_does_not_hold_up_the_queue(one_layer, group, at):
    """128 groups, one row ten times longer than the rest, at any place of the queue: under 1.5
    times the steps of the ideal schedule.

    A group is as long as its longest row: a slot becomes free when all of its rows are done.
    """
    (cfg, params), count, slots, every, n = one_layer, 128, 4, 4, 18
    batch = prompts(cfg, [[3]] * count)
    limits = np.random.default_rng(0).integers(1, n + 1, (count, group))
    limits[:, 0], limits[at, -1] = n, 10 * n
    settings = sampling(group=group, max_new_tokens=10 * n, check_every=every)
    out, steps = decode_loop.sample_with_refill(
        params,
        batch,
        decode_loop.place_limits(limits, 10 * n, count, group),
        decode_loop.place_row_ids(None, count, group),
        decode_loop.traced_settings(settings, KEY, cfg, (-1,)),
        cfg,
        decode_loop.static_settings(settings, jnp.float32),
        slots,
    )
    longest = limits.max(1)
    ideal = max(longest.max(), -(-longest.sum() // slots))
    assert ideal <= steps + 1 < 1.5 * ideal, (steps, ideal)
    np.testing.assert_array_equal(np.asarray(out.mask).sum(1), limits.reshape(-1))


def row_steps(lengths, rows, first):
    """Return the steps until rows have decoded responses, each started by the first free row.

    A row's first response has its first token from the prefill, if `first`.
    """
    busy = [-1 if first else 0] * rows
    for n in lengths:
        row = int(np.argmin(busy))
        busy[row] += n
    return max(busy)


def test_rows_of_a_slot_do_not_wait_for_the_longest_response(one_layer):
    """Lognormal lengths, 16 rows: 8 slots of 2 rows take 0.7 times the steps of 2 slots of 8."""
    (cfg, params), count, group, most = one_layer, 32, 8, 48
    noise = np.exp(np.random.default_rng(0).standard_normal((count, group)))
    limits = np.clip((8 * noise).astype(int), 0, most)
    batch, taken = prompts(cfg, [[3]] * count), {}
    for slots, rows in ((2, 8), (8, 2)):
        settings = sampling(group=group, max_new_tokens=most, slots=slots, slot_rows=rows)
        out, taken[rows] = decode_loop.sample_with_refill(
            params,
            batch,
            decode_loop.place_limits(limits, most, count, group),
            decode_loop.place_row_ids(None, count, group),
            decode_loop.traced_settings(settings, KEY, cfg, (-1,)),
            cfg,
            decode_loop.static_settings(settings, jnp.float32),
            slots,
        )
        np.testing.assert_array_equal(np.asarray(out.mask).sum(1), limits.reshape(-1))
        ends, check = np.zeros(slots, int), settings.check_every
        for lengths in limits:  # slots become free at checks
            slot = int(np.argmin(ends))
            steps = row_steps(np.maximum(lengths, 1), rows, first=True)
            ends[slot] += -(-max(steps, 1) // check) * check
        assert taken[rows] == pytest.approx(ends.max(), abs=2 * check)
    assert taken[2] < 0.7 * taken[8]


def test_refills_prefill_each_prompt_once(one_layer, monkeypatch):
    """Groups that end at different times are refilled in batches of 4, 2 and 1."""
    assert decode_loop.refill_sizes(64, 1) == [8, 4, 2, 1]
    assert decode_loop.refill_sizes(24, 2) == [2] and decode_loop.refill_sizes(6, 3) == [3]
    (cfg, params), sizes, refill = one_layer, [], decode_loop.refill_program

    def record(weights, pool, queue, slots, index, *settings):
        sizes.append(len(index))
        return refill(weights, pool, queue, slots, index, *settings)

    monkeypatch.setattr(decode_loop, "refill_program", record)
    monkeypatch.setattr(decode_loop, "refill_sizes", lambda slots, shards: [4, 2, 1])
    limits = np.random.default_rng(0).integers(1, 13, 40)
    batch = prompts(cfg, [[3, 5]] * 40)
    refilled = run(params, batch, cfg, stop=(-1,), limits=limits, slots=8, max_new_tokens=12)
    assert sum(sizes) == 40 - 8 and set(sizes) == {4, 2, 1}
    same(refilled, run(params, batch, cfg, stop=(-1,), limits=limits, max_new_tokens=12))


def test_other_settings_compile_nothing_again(cfg, params):
    run(params, prompts(cfg), cfg)
    before = decode_loop.sample_whole_batch._cache_size()
    for settings in ({"temperature": 0.3}, {"stop": (9, 11)}):
        run(params, prompts(cfg), cfg, jax.random.key(3), **settings)
    assert decode_loop.sample_whole_batch._cache_size() == before


def program_for_a_gpu(cfg, params):
    settings = sampling(top_p=0.9, top_k=5, max_new_tokens=12, check_every=4)
    static = decode_loop.static_settings(settings, jnp.float32)
    batch = prompts(cfg)
    args = (
        decode_loop.place_limits(None, 12, len(batch.tokens), settings.group),
        decode_loop.place_row_ids(None, len(batch.tokens), settings.group),
        decode_loop.traced_settings(settings, KEY, cfg, (-1,)),
    )
    program = decode_loop.sample_whole_batch.trace(params, batch, *args, cfg, static)
    return program.lower(lowering_platforms=("cuda",)).as_text()


def test_a_gpu_does_not_ask_the_host_within_a_check(cfg, params):
    """The program has no conditional, and one loop whose end depends on data."""
    text = program_for_a_gpu(cfg, params)
    # The choice of code for a platform is a conditional on a constant.
    cases = dict(re.findall(r'(%\w+) = "stablehlo\.(?:case|if)"\((%\w+)\)', text))
    assert all(cases.get(index, index).startswith("%c") for index in cases.values())
    conditions = re.findall(r"stablehlo.while.*?cond \{(.*?)\} do", text, re.DOTALL)
    assert sum("stablehlo.compare" not in c for c in conditions) == 1 < len(conditions)


def test_sampling_on_a_gpu_slices_no_stacked_weights(cfg, params):
    """XLA:GPU copies the slices of stacked weights for their products, at every token."""
    shape = f"1x{cfg.text.width}x{cfg.text.mlp}xf32"

    def slices(cfg):
        text = program_for_a_gpu(cfg, params)
        return len(re.findall(rf"stablehlo.dynamic_slice .*-> tensor<{shape}>", text))

    assert slices(cfg) > 0 == slices(cfg.with_compute(unroll_sampling=True))


@pytest.mark.parametrize("new, every, steps", [(4, 4, 3), (64, 8, 8), (24, 8, 8), (10, 8, 5)])
def test_checks_divide_a_response_evenly(new, every, steps):
    settings = sampling(max_new_tokens=new, check_every=every)
    static = decode_loop.static_settings(settings, jnp.float32)
    assert decode_loop.steps_between_checks(static) == steps


@pytest.mark.parametrize(
    "new, every, parts",
    [
        (1024, 16, [256, 256, 256, 256]),
        (300, 16, [160, 140]),
        (512, 100, [172, 172, 168]),
        (512, 512, [512]),
        (255, 8, [255]),
        (1, 8, [1]),
    ],
)
def test_parts_of_the_cache_end_at_checks(cfg, new, every, parts):
    settings = sampling(max_new_tokens=new, check_every=every)
    static = decode_loop.static_settings(settings, jnp.float32)
    assert decode_loop.column_parts(static, cfg) == parts and sum(parts) == new
    unrolled = decode_loop.column_parts(static, cfg.with_compute(unroll_sampling=True))
    assert len(unrolled) == min(2, len(parts)) and sum(unrolled) == new
    ends, steps = np.cumsum(parts)[:-1], decode_loop.steps_between_checks(static)
    assert not (ends % steps).any()


def test_a_cache_in_parts_gives_the_policy_logps_of_the_trainer(cfg, params):
    """Responses of up to 256 tokens have two parts; some end before, at and after the first."""
    batch = prompts(cfg, [[9], [14], [4]])
    limits = np.array([[256, 20], [200, 129], [127, 128]])
    settings = {"group": 2, "max_new_tokens": 256, "check_every": 16, "stop": (-1,)}
    stacked, unrolled = (
        run(params, batch, cfg.with_compute(unroll=unroll), limits=limits, **settings)
        for unroll in (False, True)
    )
    assert stacked.mask.sum() == limits.sum()
    same(stacked, unrolled)
    want = trainer_logps(params, batch, stacked.tokens, cfg, 2)
    np.testing.assert_allclose(stacked.policy_logps, np.where(stacked.mask, want, 0), atol=1e-4)


def test_the_cache_shares_prompts_and_has_the_computed_size(cfg, params):
    """16 responses of 100 tokens to a prompt of 1,000: under a fifth of copied prompts."""
    shared = decode_loop.kv_cache_bytes(cfg, 64, 1000, 16, 100, jnp.bfloat16)
    copied = decode_loop.kv_cache_bytes(cfg, 64 * 16, 1000, 1, 100, jnp.bfloat16)
    assert copied > 5 * shared
    batch = prompts(cfg)

    @jax.jit
    def prefill(params):
        x = causal_lm.embed_inputs(params, batch, cfg, jnp.float32)
        return causal_lm.prefill(params, x, batch.positions, batch.segments, cfg)

    _, k, v = prefill(params)
    cache = causal_lm.new_kv_cache(k, v, batch.segments, cfg)
    for columns in (8, 4):
        cache = causal_lm.add_columns(cache, 3, columns, cfg)
    keys_values = cache.prompt_k, cache.prompt_v, cache.own_k, cache.own_v
    held = sum(x.nbytes for x in jax.tree.leaves(keys_values))
    assert held == decode_loop.kv_cache_bytes(cfg, *batch.tokens.shape, 3, 12, jnp.float32)


def test_weights_are_gathered_where_they_fit_in_runs_and_plans(cfg, monkeypatch):
    """A copy for each device and four sharded models may take two thirds of the memory."""
    mesh = sharding.make_mesh(1, 4, 2)
    shapes = sharding.abstract_params(causal_lm.declare_params(cfg), jnp.float32, mesh)
    size = lambda tree: sum(
        np.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )
    whole = jax.tree.map(
        lambda x: x.update(sharding=rollout_weights.without_axis(x.sharding, "fsdp")), shapes
    )
    needed = (size(whole) / 2 + 4 * size(shapes)) * 3 / 2  # the copy is bfloat16

    def gathers(usable, gather=None):
        monkeypatch.setattr(chips, "usable_memory", lambda devices: usable)
        settings = sampling(gather=gather)
        program = rollout_weights.weights_program(shapes, cfg, settings, jnp.bfloat16)
        planned, _ = decode_loop.weights_programs("", shapes, settings, cfg, jnp.bfloat16, 1.0)
        assert (program is not None) == bool(planned)
        return bool(planned)

    assert gathers(needed * 1.001) and not gathers(needed * 0.999)
    assert not gathers(None), "the memory of a CPU is unknown"
    assert gathers(1.0, gather=True) and not gathers(1e15, gather=False)
    shapes = jax.tree.map(lambda x: x.update(sharding=None), shapes)
    assert not gathers(1e15), "no fsdp axis"


def test_a_run_tells_once_whether_it_gathers_weights(cfg, params, monkeypatch, capsys):
    mesh = sharding.make_mesh(1, 4, 2)
    params = jax.device_put(params, sharding.param_shardings(causal_lm.declare_params(cfg), mesh))
    model_ctx = model_context.ModelContext(cfg, None, mesh, jnp.bfloat16, (32,))
    generate._tell_once.cache_clear()  # an earlier test may have been told
    for usable, words in ((None, "every decode step transfers"), (1e12, "every device gets")):
        monkeypatch.setattr(chips, "usable_memory", lambda devices, usable=usable: usable)
        weights = [generate.prepare_weights(model_ctx, params, sampling()) for _ in range(2)][0]
        assert capsys.readouterr().err.count(f"rollouts: {words}") == 1
        specs = {str(x.sharding.spec) for x in jax.tree.leaves(weights)}
        assert any("fsdp" in spec for spec in specs) == (usable is None)


def test_integer_weights_stay_near_the_policy(cfg, params):
    pytest.importorskip("qwix")
    gentle = jax.device_put(jax.tree.map(lambda x: x / 2 if x.ndim > 1 else x, params))
    for unroll in (False, True):
        c = cfg.with_compute(unroll=unroll)
        out = run(
            rollout_weights.prepare_rollout_weights(gentle, c, sampling(dtype="int8"), jnp.float32),
            prompts(cfg),
            c,
        )
        want = trainer_logps(gentle, prompts(cfg), out.tokens, cfg, 3)
        mismatch = np.abs(out.policy_logps - want)[out.mask].mean()
        assert 0 < mismatch < 0.05, mismatch


def test_integer_weights_name_the_missing_package(cfg, params, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs the package qwix"):
        rollout_weights.prepare_rollout_weights(
            jax.device_put(params), cfg, sampling(dtype="int8"), jnp.float32
        )


@pytest.mark.parametrize(
    "change, words",
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"group": 0}, "group=0"),
        ({"check_every": 0}, "check_every=0"),
        ({"stop": ()}, "no stop token"),
        ({"max_new_tokens": 2000}, "2000 new ones exceed the model's 1024 positions"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"temperature": -1.0}, "temperature=-1"),
        ({"slots": -1}, "slots=-1"),
        ({"limits": np.ones(5)}, "limits or rows end before"),
        ({"rows": np.ones(9)}, "got rows for 9 prompts, the batch has 8"),
    ],
    ids=lambda x: str(x) if isinstance(x, dict) else "",
)
def test_bad_input_is_refused_in_one_line(cfg, params, change, words):
    with pytest.raises(ValueError, match=words) as error:
        run(params, prompts(cfg), cfg, **change)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"dtype": "bfloat"}, "rollout.dtype='bfloat'.*'float32', 'bfloat16', 'int8'"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"min_p": 2.0}, "min_p=2"),
        ({"top_k": -1}, "top_k=-1"),
        ({"slots": -8}, "slots=-8"),
        ({"check_every": 0}, "check_every=0"),
    ],
    ids=str,
)
def test_bad_rollout_settings_are_refused_with_the_config(change, words):
    first = lambda rollout: resolve_stages(run_helpers.config("grpo", rollout=rollout))[0]
    with pytest.raises(ValueError, match=words):
        validate_config.validate_stage(first(change))
    validate_config.validate_stage(first({"dtype": "bfloat16", "slots": 2}))


def test_responses_are_sampled_in_the_type_of_the_setting(cfg, params):
    """A float32 model's log-probabilities differ a little in bfloat16.

    Int8 keeps the model's type.
    """
    mesh = sharding.make_mesh(1, 1, 1, jax.devices()[:1])
    tiny_cfg = run_helpers.SMALL.with_compute(unroll=True)
    model_ctx = model_context.ModelContext(
        tiny_cfg, processor.load_processor(None, tiny_cfg, 256, 256), mesh, jnp.float32, (32,)
    )
    weights = sharding.init_params(
        causal_lm.declare_params(tiny_cfg), jax.random.key(0), jnp.float32, mesh
    )
    encoded = [
        model_ctx.processor.encode([{"role": "user", "content": "what is it"}], generation=True)
    ]
    sample = lambda dtype: generate.sample_responses(
        model_ctx,
        weights,
        encoded,
        KEY,
        np.arange(1),
        sampling(group=4, dtype=dtype, max_new_tokens=4),
    )
    same, half = [sample(d) for d in ("", "float32")], sample("bfloat16")
    assert np.array_equal(same[0].policy_logps, same[1].policy_logps)
    first = np.abs(half.policy_logps - same[0].policy_logps)[:, 0]
    assert 1e-5 < first.max() < 0.2
    assert sampling(dtype="int8").compute_dtype(jnp.float32) == jnp.float32


def test_empty_prompts_pad_a_batch(cfg, params):
    batch = prompts(cfg, [[9], [4]])
    batch.segments[1] = 0
    alone = run(params, prompts(cfg, [[9]]), cfg)
    for more in ({}, {"limits": np.array([12]), "rows": np.array([0])}):
        out = run(params, batch, cfg, **more)
        assert out.mask[:3].any() and not out.mask[3:].any() and not out.finished[3:].any()
        same(jax.tree.map(lambda x: x[:3], out), alone)
    batch.segments[:] = 0
    with pytest.raises(ValueError, match="every prompt is empty"):
        run(params, batch, cfg)


@pytest.mark.slow
def test_greedy_equals_transformers(tmp_path):
    """100 prompts: text, one image, several images, mixed lengths, rows that end early."""
    torch = pytest.importorskip("torch")
    from cptjax.models import hf_checkpoint

    rng = np.random.default_rng(0)
    image = lambda: tiny.Image(2 * int(rng.integers(1, 5)), 2 * int(rng.integers(1, 5)))
    row = lambda i: (
        [int(rng.integers(2, 20))]
        + [p for _ in range(i % 4) for p in (image(), int(rng.integers(1, 6)))]
    )
    for tied in (False, True):
        cfg, model = tiny.our_config(tied=tied), tiny.torch_model(int(tied), tied=tied)
        model.save_pretrained(tmp_path / str(tied))
        params = hf_checkpoint.load_hf_checkpoint(tmp_path / str(tied), cfg)
        rows = [tiny.random_row(row(i), cfg, rng) for i in range(50)]
        ours = lambda *stop: run(
            params,
            tiny.prompts(rows, cfg, shards=10),
            cfg,
            group=1,
            max_new_tokens=16,
            temperature=0.0,
            stop=stop,
        )  # noqa: B023
        stops = [
            int(t) for t in np.unique(ours(*[-1] * 6).tokens[:, 5])[:6]
        ]  # tokens that are sampled, so some rows end early
        out = ours(*stops)
        with torch.no_grad():
            theirs = model.generate(
                **tiny.hf_inputs(rows, cfg),
                do_sample=False,
                max_new_tokens=16,
                eos_token_id=stops,
                pad_token_id=cfg.pad,
                suppress_tokens=[*cfg.vision_tokens, cfg.pad],
            ).numpy()
        width = out.mask.sum(1).max()
        np.testing.assert_array_equal(out.tokens[:, :width], theirs[:, -width:])
        assert 5 < out.finished.sum() < 50


@pytest.mark.parametrize("family", tiny.TEXT_FAMILIES)
def test_greedy_tokens_of_text_families_equal_transformers(family):
    """50 prompts; the log-probabilities are also those of a plain forward pass over each row."""
    torch = pytest.importorskip("torch")
    model, cfg = tiny.torch_model(family=family), tiny.our_config(family=family)
    flat = {name: x.detach().numpy() for name, x in model.named_parameters()}
    params = hf_arrays(flat, cfg)
    rng = np.random.default_rng(0)
    rows = [tiny.random_row([int(n)], cfg, rng) for n in rng.integers(3, 20, 50)]
    prompts, new = tiny.prompts(rows, cfg), 10
    inputs = tiny.hf_inputs(rows, cfg)
    with torch.no_grad():
        theirs = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            do_sample=False,
            max_new_tokens=new,
            suppress_tokens=[cfg.pad],
        ).numpy()[:, prompts.tokens.shape[1] :]
    ours = decode_loop.generate_rollouts(
        params,
        jax.tree.map(jnp.asarray, prompts),
        jax.random.key(0),
        cfg.with_compute(unroll=True),
        SamplingConfig(group=1, max_new_tokens=new, temperature=0.0, check_every=new),
        dtype=jnp.float32,
    )
    mask = np.asarray(ours.mask)
    assert mask.sum() > 400, "almost all rows reach the limit"
    assert np.array_equal(np.asarray(ours.tokens)[mask], theirs[:, : mask.shape[1]][mask])
    hidden = group_states(params, prompts, np.asarray(ours.tokens)[:, None], cfg)
    logits = hidden[:, 0] @ decoder.unembedding(params["text"])
    logps = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), ours.tokens[..., None], -1)
    np.testing.assert_allclose(ours.policy_logps[mask], logps[..., 0][mask], atol=2e-4)


@pytest.mark.parametrize("family", tiny.TEXT_FAMILIES)
def test_a_group_of_a_text_family_has_the_responses_of_plain_copies(family):
    """One layer: two are in the test before."""
    cfg = tiny.our_config(family=family, text={"num_hidden_layers": 1}).with_compute(unroll=True)
    params = tiny.random_params(cfg)
    rng = np.random.default_rng(0)
    prompts = tiny.prompts([tiny.random_row([n], cfg, rng) for n in (5, 9)], cfg)

    def sample(group, rows):
        settings = SamplingConfig(group=group, max_new_tokens=6, temperature=1.0, check_every=6)
        out = decode_loop.generate_rollouts(
            params, prompts, jax.random.key(7), cfg, settings, dtype=jnp.float32, rows=rows
        )
        return jax.tree.map(np.asarray, out)

    together = sample(3, None)
    for k in range(3):
        alone = sample(1, np.arange(2) * 3 + k)  # the numbers of these responses in the groups
        np.testing.assert_array_equal(alone.tokens, together.tokens[k::3])
        np.testing.assert_allclose(alone.policy_logps, together.policy_logps[k::3], atol=1e-4)


def hf_arrays(flat: dict[str, np.ndarray], cfg: ModelConfig) -> dict:
    """Return the tensors of transformers as our parameters."""
    params, declared = {}, hf_checkpoint.declared_leaves(cfg)
    table = hf_checkpoint.tensor_table(cfg)
    for path, p in declared.items():
        layers = [flat[name] for name, entry in table.items() if entry.path == path]
        layers = [x.T if p.inputs else x for x in layers]
        params[path] = jnp.asarray(np.stack(layers).reshape(p.shape))
    return trainable.unflatten_params(params)
