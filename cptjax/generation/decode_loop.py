"""The decode loop: generate rollouts on the mesh, for the whole batch at once or slot by slot.

Each prompt is prefilled once, and its responses are decoded in a loop on the device. `slots` limits
how many groups are decoded at a time. Every `check_every` steps, the responses of finished groups
are stored, and the next prompts of the queue are prefilled into the slots of these groups. A group
keeps its slot until its longest row is done, because its rows share the prompt's cache:

    slot     steps 0 .. k     k .. 2k      2k .. 3k
      0      prompt 0         prompt 0     prompt 3
      1      prompt 1         prompt 2     prompt 2        (prompt 1 was done after k steps)
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from cptjax import sharding
from cptjax.common.compiler_options import PlatformJit
from cptjax.common.program import Output, Program
from cptjax.generation import decode_pool, rollout_weights, token_sampling
from cptjax.generation.decode_pool import (
    DecodePool,
    QueuedPrompts,
    StaticSettings,
    TracedSettings,
)
from cptjax.generation.sampling_config import SamplingConfig
from cptjax.models import causal_lm, flops
from cptjax.models.config import ModelConfig
from cptjax.sharding import abstract_array, constrain
from cptjax.types import Array, Params, Prompts, Rollouts

LEAST_COLUMNS = 128  # of a part of the cache of responses
# f(indices in the batch of finished groups [n], their tokens [n G R], numbers of tokens [n G])
OnFinished = Callable[[np.ndarray, np.ndarray, np.ndarray], None]


def generate_rollouts(
    params: Params,
    prompts: Prompts,
    key: Array,
    cfg: ModelConfig,
    sampling: SamplingConfig,
    *,
    dtype: Any = jnp.bfloat16,
    stop: tuple[int, ...] | None = None,
    limits: np.ndarray | None = None,
    rows: np.ndarray | None = None,
    on_finished: OnFinished | None = None,
) -> Rollouts:
    """Sample `sampling.group` responses to each left-padded prompt, as row q * group + g.

    With a mesh, call this function under `jax.set_mesh`, with that of `SamplingConfig.mesh`; the
    prompts may be on the mesh of training. Equal (key, rows, weights) give equal
    responses for any batch, order of the batch, number of slots and mesh, up to float rounding.
    Empty prompts are padding and get no response.

    params: the model's parameters, or the result of `prepare_rollout_weights`.
    dtype: the dtype in which the model computes.
    stop: ids that end a row; they are kept in its mask. None = cfg.eos, (-1,) = no stop token.
    limits: [Q] or [Q G] the most tokens of each response.
    rows: [Q] the number of each prompt in the run; None = its index.
    on_finished: is called with the groups that end while others are decoded, each once.
    """
    static = static_settings(sampling, dtype)
    stops = cfg.eos if stop is None else tuple(stop)
    if not stops:
        raise ValueError(
            "no stop token: the model names no end token; give stop=(id, ...), or stop=(-1,) to "
            "run every row to its limit"
        )
    sampling.check_batch_shards(_batch_shards())
    queued, mesh = len(prompts.tokens), _mesh_of(prompts.tokens)
    limits = place_limits(limits, static.max_new_tokens, queued, sampling.group, mesh)
    row_ids = place_row_ids(rows, queued, sampling.group, mesh)
    if mesh not in (None, jax.sharding.get_mesh()):
        prompts, limits, row_ids, key = _move_to_mesh(prompts, limits, row_ids, key)
    _check_prompts(prompts, cfg, static, limits, row_ids)
    traced = traced_settings(sampling, key, cfg, stops)
    if slots := sampling.slots_for(queued):
        return sample_with_refill(
            params, prompts, limits, row_ids, traced, cfg, static, slots, on_finished
        )[0]
    return sample_whole_batch(params, prompts, limits, row_ids, traced, cfg, static)


def static_settings(sampling: SamplingConfig, dtype: Any) -> StaticSettings:
    """Return the settings that programs are compiled for; `dtype` is the model's."""
    return StaticSettings(
        sampling.group,
        sampling.rows,
        sampling.max_new_tokens,
        sampling.check_every,
        sampling.compute_dtype(dtype),
    )


def traced_settings(
    sampling: SamplingConfig, key: Array, cfg: ModelConfig, stops: tuple[int, ...]
) -> TracedSettings:
    """Return the settings that programs take as arrays."""
    controls = token_sampling.make_controls(
        sampling.temperature,
        sampling.top_k,
        sampling.top_p,
        sampling.min_p,
        forbidden_tokens(cfg, stops),
    )
    return TracedSettings(key, controls, jnp.asarray(stops, jnp.int32))


def forbidden_tokens(cfg: ModelConfig, stops: tuple[int, ...]) -> np.ndarray:
    """Return a mask [V] of the tokens that are never sampled.

    These are the tokens that only the processor may write, and padding unless it is a stop token.
    """
    out = np.zeros(cfg.text.vocab, bool)
    out[[t for t in (*cfg.vision_tokens, cfg.pad) if t not in stops and t < cfg.text.vocab]] = True
    return out


def kv_cache_bytes(
    cfg: ModelConfig, prompts: float, prompt: int, group: int, new: int, dtype: Any
) -> float:
    """Return the bytes of the keys and values of `prompts` groups.

    A group has `prompt` tokens, which its rows share, and `new` tokens for each response.
    """
    text = cfg.text
    per_token = 2 * text.depth * text.kv_heads * text.head_dim * jnp.dtype(dtype).itemsize
    return per_token * prompts * (prompt + group * new)


def place_limits(
    limits: np.ndarray | None,
    max_new_tokens: int,
    prompts: int,
    group: int,
    mesh: Mesh | None = None,
) -> Array:
    """Place this process's limits, [Q] or [Q G], as [Q G] on the mesh of the prompts.

    None sets the limit of all rows to `max_new_tokens`.
    """
    if limits is None:
        return jnp.full((prompts, group), max_new_tokens, jnp.int32)
    x = np.asarray(limits)
    x = np.broadcast_to(x if x.ndim == 2 else x[:, None], (len(x), group))
    return _pad_and_place(x, prompts, "limits", mesh)


def place_row_ids(
    rows: np.ndarray | None, prompts: int, group: int, mesh: Mesh | None = None
) -> Array:
    """Place the ids of this process's rows as [Q G] on the mesh: prompt number * group + g."""
    if rows is None:
        return jnp.arange(prompts * group, dtype=jnp.int32).reshape(prompts, group)
    return _pad_and_place(
        np.asarray(rows)[:, None] * group + np.arange(group), prompts, "rows", mesh
    )


@jax.jit
def _move_to_mesh(prompts: Prompts, *others: Array) -> tuple[Any, ...]:
    """Return arrays of the mesh of training on the mesh that is set."""

    def rows(x: Array) -> Array:
        return constrain(x, *("batch", *(None,) * x.ndim)[: x.ndim])

    def second(x: Array) -> Array:
        return constrain(x, None, "batch", *(None,) * (x.ndim - 2))

    return sharding.map_prompts(prompts, rows, second), *map(rows, others)


def _mesh_of(x: Array) -> Mesh | None:
    """Return the mesh that an array is on."""
    place = getattr(x, "sharding", None)
    return place.mesh if isinstance(place, NamedSharding) else None


def _pad_and_place(x: np.ndarray, prompts: int, name: str, mesh: Mesh | None) -> Array:
    """Pad [n G] with -1 to the number of prompts of this process, and place it on the mesh."""
    local = prompts // jax.process_count()
    if len(x) > local:
        raise ValueError(f"got {name} for {len(x)} prompts, the batch has {local}")
    padding = np.full((local - len(x), x.shape[1]), -1)
    return sharding.place_rows(np.concatenate([x, padding]).astype(np.int32), mesh)


def _check_prompts(
    prompts: Prompts, cfg: ModelConfig, static: StaticSettings, limits: Array, row_ids: Array
) -> None:
    """Refuse prompts that cannot be sampled."""
    longest, filled, incomplete = np.asarray(_count_prompts(prompts.segments, limits, row_ids))
    if not filled or incomplete:
        problem = (
            "limits or rows end before the last prompt that is not empty"
            if filled
            else "every prompt is empty"
        )
        raise ValueError(
            f"{problem}; give each prompt text or an image (empty rows pad a batch, at its end)"
        )
    new = static.max_new_tokens
    if prompts.tokens.shape[1] + new > cfg.text.max_positions < longest + new:
        raise ValueError(
            f"a prompt of {longest} tokens and {new} new ones exceed the model's "
            f"{cfg.text.max_positions} positions; shorten the prompt or lower max_new_tokens"
        )


@jax.jit
def _count_prompts(segments: Array, limits: Array, row_ids: Array) -> Array:
    """Return (tokens of the longest prompt, filled prompts, filled ones without limit or id)."""
    count = jnp.sum(segments > 0, 1)
    incomplete = (count > 0) & (jnp.minimum(limits, row_ids)[:, 0] < 0)
    return constrain(jnp.stack([jnp.max(count), jnp.sum(count > 0), jnp.sum(incomplete)]), None)


def _batch_shards() -> int:
    mesh = jax.sharding.get_mesh()
    return 1 if mesh.empty else sharding.batch_shards(mesh)


@functools.partial(PlatformJit, static_argnames=("cfg", "static"))
@jax.named_scope("rollout")
def sample_whole_batch(
    params: Params,
    prompts: Prompts,
    limits: Array,
    row_ids: Array,
    traced: TracedSettings,
    cfg: ModelConfig,
    static: StaticSettings,
) -> Rollouts:
    """Decode all groups in one program, which ends when every row is done.

    The keys and values of responses are stored in parts, one for each loop. A loop reads only the
    parts that exist, so that the steps do not read columns that no step has written yet. There is
    one part if a step reads only live columns.
    """
    weights = decode_pool.cast_weights(params, cfg, static)
    queue = decode_pool.queue_prompts(weights, prompts, limits, row_ids, cfg, static)
    start = jnp.zeros((), jnp.int32)
    pool = decode_pool.prefill_slots(weights, queue, start, traced, cfg, static)
    steps, end = steps_between_checks(static), 0

    def decode(pool: DecodePool) -> DecodePool:
        return decode_pool.run_decode_steps(weights, pool, steps, traced, cfg, static)

    for columns in column_parts(static, cfg):
        pool, end = decode_pool.add_columns(pool, columns, cfg), end + columns
        pool = jax.lax.while_loop(_unfinished_before(end, static), decode, pool)
    return decode_pool.to_rollouts(decode_pool.slot_results(pool), cfg)


def _unfinished_before(end: int, static: StaticSettings) -> Callable[[DecodePool], Array]:
    """Return the condition of the loop that decodes until step `end`."""

    def unfinished(pool: DecodePool) -> Array:
        rows = ~jnp.all(pool.done)
        # Every row is done at the last column.
        return rows if end == static.max_new_tokens else rows & (pool.step < end)

    return unfinished


def column_parts(static: StaticSettings, cfg: ModelConfig) -> list[int]:
    """Return the numbers of columns of the parts of the cache, for a batch that starts together.

    Each part is a loop to compile, of all layers if they are unrolled. So there are at most four or
    two, and a response of full length reads 5/8 or 3/4 of the columns that it would read from one
    part. The parts end at checks. A step that reads only live columns needs no parts.
    """
    if causal_lm.reads_live_columns(cfg):
        return [static.max_new_tokens]
    steps, last = steps_between_checks(static), max(1, static.max_new_tokens - 1)
    most = 2 if cfg.compute.samples_unrolled else 4
    parts = max(1, min(most, static.max_new_tokens // LEAST_COLUMNS))
    size = -(-last // (parts * steps)) * steps
    earlier = -(-last // size) - 1
    return [size] * earlier + [static.max_new_tokens - size * earlier]


def steps_between_checks(static: StaticSettings) -> int:
    """Return the number of decode steps between two checks for a batch that starts together.

    It is near `check_every`, and a multiple of it is at or just above the steps of the longest
    response. A GPU runs a loop of known length without asking the host after each step.
    """
    last = max(1, static.max_new_tokens - 1)
    return -(-last // -(-last // static.check_every))


def refill_sizes(slots: int, shards: int) -> list[int]:
    """Return the numbers of prompts that can be prefilled at a time, the largest first.

    The largest is about an eighth of the slots, which limits its memory. Each is half of the one
    before, so that the few groups that end within a check are refilled without repeated prompts.
    """
    largest = max(1, slots // shards // 8)
    return [shards * (largest >> k) for k in range(largest.bit_length())]


def sample_with_refill(
    params: Params,
    prompts: Prompts,
    limits: Array,
    row_ids: Array,
    traced: TracedSettings,
    cfg: ModelConfig,
    static: StaticSettings,
    slots: int,
    on_finished: OnFinished | None = None,
) -> tuple[Rollouts, int]:
    """Decode `slots` groups at a time, and refill free slots from the queue.

    Also return the number of decode steps. `on_finished` is called while the device decodes.
    """
    weights = cast_program(params, cfg, static)
    queue = queue_program(weights, prompts, limits, row_ids, cfg, static, slots)
    count, sizes = queue.segments.shape[0], refill_sizes(slots, _batch_shards())
    pool = prefill_program(weights, queue, np.arange(slots), traced, cfg, static)
    results, started, finished = None, slots, _FinishedGroups(slots, on_finished)
    while True:
        pool = decode_program(weights, pool, traced, cfg, static)
        finished.pass_on()
        free = np.flatnonzero(np.asarray(_free_slots(pool)))
        if len(free) == slots and started == count:
            return _final_rollouts(pool, results, count, cfg), int(pool.step)
        finished.collect(pool, free)
        free = free[: count - started]
        if len(free):
            results = _store_results(pool, results, count)
        while len(free):
            size = next((n for n in sizes if n <= len(free)), sizes[-1])
            chosen, free = free[:size], free[size:]
            index = started + np.arange(len(chosen))
            started += len(chosen)
            # Fewer groups than batch shards repeat prompts in the same slots.
            chosen, index = np.resize(chosen, size), np.resize(index, size)
            finished.prompts[chosen] = index
            pool = refill_program(weights, pool, queue, chosen, index, traced, cfg, static)


class _FinishedGroups:
    """Passes on the responses of finished groups while the device decodes others."""

    def __init__(self, slots: int, on_finished: OnFinished | None):
        self.on_finished = on_finished
        self.prompts = np.arange(slots)  # the prompt of each slot; -1 = passed on
        self.copied: list[tuple[np.ndarray, np.ndarray, Array, Array]] = []

    def collect(self, pool: DecodePool, free: np.ndarray) -> None:
        """Start to copy the new responses of free slots to the host."""
        slots = free[self.prompts[free] >= 0]
        if self.on_finished is None or not len(slots):
            return
        tokens, lengths = _slot_responses(pool)
        tokens.copy_to_host_async()
        lengths.copy_to_host_async()
        self.copied.append((self.prompts[slots], slots, tokens, lengths))
        self.prompts[slots] = -1

    def pass_on(self) -> None:
        """Pass on what is copied."""
        for prompts, slots, tokens, lengths in self.copied:
            self.on_finished(prompts, np.asarray(tokens)[slots], np.asarray(lengths)[slots])
        self.copied = []


def _prefill_from_queue(
    weights: Params,
    queue: QueuedPrompts,
    index: Array,
    traced: TracedSettings,
    cfg: ModelConfig,
    static: StaticSettings,
) -> DecodePool:
    prompts = decode_pool.select_prompts(queue, index)
    start = jnp.zeros((), jnp.int32)
    pool = decode_pool.prefill_slots(weights, prompts, start, traced, cfg, static)
    # Groups of different ages use all columns of the ring, so it has only one part.
    return decode_pool.add_columns(pool, static.max_new_tokens, cfg)


def _decode_until_check(
    weights: Params,
    pool: DecodePool,
    traced: TracedSettings,
    cfg: ModelConfig,
    static: StaticSettings,
) -> DecodePool:
    return decode_pool.run_decode_steps(weights, pool, static.check_every, traced, cfg, static)


_jit = functools.partial(PlatformJit, static_argnames=("cfg", "static"))
cast_program = _jit(decode_pool.cast_weights)
queue_program = PlatformJit(decode_pool.queue_prompts, static_argnames=("cfg", "static", "slots"))
_scoped = jax.named_scope("rollout")  # their name in profiles
prefill_program = _jit(_scoped(_prefill_from_queue))
decode_program = _jit(_scoped(_decode_until_check), donate_argnames="pool")
refill_program = _jit(_scoped(decode_pool.refill_slots), donate_argnames="pool")


@jax.jit
def _free_slots(pool: DecodePool) -> Array:
    return constrain(jnp.all(pool.done, 1), None)


@jax.jit
def _slot_responses(pool: DecodePool) -> tuple[Array, Array]:
    """Return the tokens [S G R] of every slot and their number [S G], on every process."""
    results = decode_pool.slot_results(pool)
    return constrain(results.tokens, None), constrain(results.length, None)


_store_results = jax.jit(
    decode_pool.store_results, donate_argnames="results", static_argnames="prompts"
)


@functools.partial(jax.jit, static_argnames=("prompts", "cfg"))
def _final_rollouts(
    pool: DecodePool, results: decode_pool.GroupResults | None, prompts: int, cfg: ModelConfig
) -> Rollouts:
    return decode_pool.to_rollouts(decode_pool.store_results(pool, results, prompts), cfg)


# ---- programs with abstract arguments ------------------------------------------------------------


def weights_programs(
    name: str,
    params: Params,
    sampling: SamplingConfig,
    cfg: ModelConfig,
    dtype: Any,
    calls: float,
) -> tuple[list[Program], Params | Output]:
    """Return the program that prepares the weights, if any, and the weights to sample with."""
    prepare = rollout_weights.weights_program(params, cfg, sampling, dtype)
    if prepare is None:
        return [], params
    mesh = sampling.mesh(_mesh_of(jax.tree.leaves(params)[0]))
    program = Program(f"{name}: weights", prepare, (params,), calls, 0.0, mesh=mesh)
    if sampling.dtype == "int8" or cfg.compute.samples_unrolled:
        return [program], Output(program.name)
    gather = rollout_weights.gathers_weights(params, cfg, sampling, dtype)
    return [program], rollout_weights.weights_output(params, cfg, sampling, dtype, gather)


def sampling_programs(
    name: str,
    weights: Params | Output,
    prompts: Prompts,
    sampling: SamplingConfig,
    cfg: ModelConfig,
    dtype: Any,
    mesh: Mesh,
    *,
    calls: float,
    vision_flops: float,
    kept: tuple[str, ...] = (),
) -> list[Program]:
    """Return the programs of `generate_rollouts` for abstract prompts, in the order of first calls.

    Programs that only copy results are left out.

    mesh: that of training.
    calls: batches per training step.
    vision_flops: operations of the vision tower for these prompts.
    kept: the program whose result is the copy of the weights, if there is one.
    """
    mesh = sampling.mesh(mesh)
    prompts = sharding.place_prompts(prompts, mesh)
    sampling.check_batch_shards(sharding.batch_shards(mesh))
    static = static_settings(sampling, dtype)
    rows, length = prompts.tokens.shape
    per_response = abstract_array((rows, sampling.group), jnp.int32, mesh, ("batch",))
    traced = jax.tree.map(
        lambda x: abstract_array(x.shape, x.dtype, mesh),
        jax.eval_shape(lambda: traced_settings(sampling, jax.random.key(0), cfg, cfg.eos)),
    )
    prefill_flops = flops.text_forward_flops(cfg, rows, length, 1)
    decode_flops = flops.decode_flops(cfg, rows, length, sampling.group, static.max_new_tokens)
    slots = sampling.slots_for(rows)
    if not slots:
        args = (weights, prompts, per_response, per_response, traced, cfg, static)
        useful = vision_flops + prefill_flops + decode_flops
        trips = -(-(static.max_new_tokens - 1) // steps_between_checks(static))
        trips /= len(column_parts(static, cfg))  # of each loop
        return [Program(name, sample_whole_batch, args, calls, useful, loop_trips=trips, mesh=mesh)]
    cast, queue = Output(f"{name}: cast"), Output(f"{name}: queue")
    queue_args = (cast, prompts, per_response, per_response, cfg, static, slots)
    programs = [
        Program(cast.program, cast_program, (weights, cfg, static), calls, 0.0),
        Program(queue.program, queue_program, queue_args, calls, vision_flops, kept),
        *_slot_programs(
            name,
            cast,
            queue,
            (traced, cfg, static),
            rows,
            slots,
            mesh,
            calls,
            kept,
            prefill_flops / rows,
            decode_flops / rows,
        ),
    ]
    return [dataclasses.replace(program, mesh=mesh) for program in programs]


def _slot_programs(
    name: str,
    weights: Output,
    queue: Output,
    settings: tuple[TracedSettings, ModelConfig, StaticSettings],
    rows: int,
    slots: int,
    mesh: Mesh,
    calls: float,
    kept: tuple[str, ...],
    prefill_flops: float,
    decode_flops: float,
) -> list[Program]:
    """Return the programs that decode in slots; `prefill_flops`, `decode_flops` are per prompt.

    At the largest shapes all responses are equally long: slots become free together, so that every
    refill is full.
    """
    pool, refill = Output(f"{name}: prefill"), refill_sizes(slots, sharding.batch_shards(mesh))[0]
    static = settings[-1]
    turns = -(-static.group // static.rows)
    checks = turns * static.max_new_tokens / static.check_every  # calls for one group

    def index(n: int) -> jax.ShapeDtypeStruct:
        return abstract_array((n,), jnp.int32, mesh)

    return [
        Program(
            pool.program,
            prefill_program,
            (weights, queue, index(slots), *settings),
            calls,
            prefill_flops * slots,
            kept,
        ),
        Program(
            f"{name}: decode",
            decode_program,
            (weights, pool, *settings),
            calls * rows / slots * checks,
            decode_flops * slots / checks,
            (*kept, queue.program),
        ),
        Program(
            f"{name}: refill",
            refill_program,
            (weights, pool, queue, index(refill), index(refill), *settings),
            calls * (rows - slots) / refill,
            prefill_flops * refill,
            kept,
        ),
    ]
