"""Move responses between batch shards, so that all shards process about as many tokens.

A shard samples and keeps the responses to its own prompts. If they are long, the other shards wait
in each pass of an update. `plan_places` moves responses, each with a copy of its prompt:

    2 shards with 1 prompt each      shard 0   p p a a a a a b b b b b     12 tokens
                                     shard 1   q q c d                      4
    after                            shard 0   p p a a a a a                7
                                     shard 1   q q c d p p b b b b b       11

Each shard has one place for a prompt and its responses more than it has prompts, and the places of
all shards have the same shape, so few programs are compiled. Where attention takes packed rows back
to the padded form, a place costs as much as a full group, and responses move only if they save more
than that. The copies of a prompt together get the gradient of the prompt, up to the order of sums.

Token ids of responses go from process to process. On the devices, `move_prompts` copies prompts; of
their images only the features move, in each pass of the model (`Prompts.pool`).
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from cptjax.common import distributed
from cptjax.data.device_batches import group_batch
from cptjax.data.model_context import ModelContext
from cptjax.data.packing import row_size
from cptjax.models import attention, flops
from cptjax.models.config import ModelConfig
from cptjax.sharding import (
    batch_shards,
    local_row_numbers,
    named_sharding,
    place_prompts,
    slice_count,
)
from cptjax.types import Array, Batch, FeaturePool, Prompts

POOL_BYTES = 1 << 29  # of image features in bfloat16 that a shard gets from others


class Subgroup(NamedTuple):
    """Responses to one prompt that are at one place."""

    prompt: int
    responses: np.ndarray  # their numbers in the group
    shard: int


def plan_places(
    prompts: np.ndarray, responses: np.ndarray, limit: int, copied: int
) -> list[Subgroup] | None:
    """Divide groups among shards with at most `limit` tokens each, or return None.

    A shard has q + 1 places for its q prompts. What fits stays on its shard. If that does not work,
    the fullest shards and as few of the emptiest as possible divide their groups by size alone.

    prompts: [S q] tokens; responses: [S q G] tokens of each response, 0 = not trained on
    copied: the most prompts that have copies on other shards
    """
    shards, q = prompts.shape
    p, r = prompts.reshape(-1), responses.reshape(shards * q, -1)
    groups = [_split_group(p[i], r[i], limit) for i in range(len(p))]
    if any(parts is None for parts in groups):
        return None
    parts = [(p[i] + r[i, part].sum(), i, part) for i, cut in enumerate(groups) for part in cut]
    parts = [(i, part) for _, i, part in sorted(parts, key=lambda part: -part[0])]
    for mixed in (None, *_mixed_shards(prompts.sum(1) + responses.sum((1, 2)), limit)):
        plan = _fill_shards(p, r, parts, (shards, q, limit), mixed)
        if plan is not None:  # later ones copy more
            return plan if len({i for i, _, s in plan if s != i // q}) <= copied else None
    return None


def _mixed_shards(load: np.ndarray, limit: int) -> Iterator[np.ndarray]:
    """Yield masks [S] of the shards above the limit, and of more and more of the emptiest.

    load: [S] tokens of each shard
    """
    order, full = np.argsort(-load, kind="stable"), np.count_nonzero(load > limit)
    empty = max(1, full // 2)
    while True:
        mixed = np.ones(len(load), bool)
        mixed[order[full : max(full, len(load) - empty)]] = False
        if load[mixed].sum() <= limit * mixed.sum():
            yield mixed
        if mixed.all():
            return
        empty = math.ceil(1.5 * empty)


def _fill_shards(
    p: np.ndarray,
    r: np.ndarray,
    parts: Sequence[tuple[int, np.ndarray]],
    sizes: tuple[int, int, int],
    mixed: np.ndarray | None,
) -> list[Subgroup] | None:
    """Place parts of groups one after the other; divide one further if it fits nowhere.

    p: [Q] tokens of prompts; r: [Q G] of responses; parts: (prompt, responses)
    mixed: [S] the shards that divide their groups by size; None = what fits stays on its shard
    """
    shards, q, limit = sizes
    load, free = np.zeros(shards, int), np.full(shards, q + 1)
    placed: list[Subgroup] = []

    def place(prompt: int, chosen: np.ndarray, shard: int) -> None:
        load[shard] += p[prompt] + r[prompt, chosen].sum()
        free[shard] -= 1
        placed.append(Subgroup(prompt, chosen, shard))

    waiting, at_own_shard = [], set()  # another part of a group would copy the prompt once more
    for i, part in parts:
        if mixed is None:
            fits = load[i // q] + p[i] + r[i, part].sum() <= limit and free[i // q]
            stays = fits and i not in at_own_shard
        else:
            stays = not mixed[i // q]
        if stays:
            place(i, part, i // q)
            at_own_shard.add(i)
        else:
            waiting.append((i, part))
    if mixed is not None:
        free[~mixed] = 0
    for i, part in waiting:
        while part.size:
            room = np.where(free > 0, limit - load - p[i], -1)
            whole = room >= r[i, part].sum()
            # The fullest shard that has room for all, or the emptiest one.
            shard = int(np.argmin(np.where(whole, room, limit)) if whole.any() else room.argmax())
            fits = _first_that_fit(r[i, part], room[shard])
            if not fits.any():
                return None
            place(i, part[fits], shard)
            part = part[~fits]
    return placed if mixed is None else _exchange_shards(placed, shards, q)


def _exchange_shards(placed: Sequence[Subgroup], shards: int, q: int) -> list[Subgroup]:
    """Give each shard the parts of another one, so that many of them are at home."""
    shard_of: dict[int, int] = {}  # by number in `placed`
    for prompt, _, number in placed:
        if number not in shard_of and prompt // q not in shard_of.values():
            shard_of[number] = prompt // q
    left = sorted(set(range(shards)) - set(shard_of.values()))
    others = sorted(set(range(shards)) - set(shard_of))
    shard_of |= dict(zip(others, left, strict=True))
    return [part._replace(shard=shard_of[part.shard]) for part in placed]


def _domains(mesh: Mesh) -> int:
    """Return the number of equal parts of the batch shards between which nothing moves.

    The network between slices is slow. If slices divide a shard, each shard is a domain.
    """
    shards, slices = batch_shards(mesh), slice_count(mesh)
    return slices if shards % slices == 0 else shards


def max_copied(cfg: ModelConfig, shards: int, prompts: int, prompt: int) -> int:
    """Return how many of the prompts of a domain may have copies on other shards.

    Each shard of the domain gets the image features of all of them. Each of its `shards` shards has
    `prompts` prompts of `prompt` tokens.
    """
    most = max(1, shards * prompts // 2)
    if cfg.vision is None:
        return most
    return max(1, min(most, POOL_BYTES // (prompt * _feature_bytes(cfg))))


def _feature_bytes(cfg: ModelConfig) -> int:
    """Return the bytes of the image features of a token, in bfloat16."""
    return 0 if cfg.vision is None else (1 + cfg.vision.added_layers) * cfg.text.width * 2


def pool_bytes(cfg: ModelConfig, mesh: Mesh, prompts: int, prompt: int) -> int:
    """Return the bytes of image features that a shard gets from others, see `max_copied`."""
    of_domain = batch_shards(mesh) // _domains(mesh)
    if of_domain == 1:
        return 0
    return max_copied(cfg, of_domain, prompts, prompt) * prompt * _feature_bytes(cfg)


def _split_group(prompt: int, responses: np.ndarray, limit: int) -> list[np.ndarray] | None:
    """Divide the trained responses of a group, longest first, into parts of at most `limit` tokens.

    Each part has a copy of the prompt. None = the longest response does not fit.
    """
    left, parts = np.argsort(-responses, kind="stable")[: np.count_nonzero(responses)], []
    while left.size:
        fits = _first_that_fit(responses[left], limit - prompt)
        if not fits.any():
            return None
        parts.append(left[fits])
        left = left[~fits]
    return parts


def _first_that_fit(sizes: np.ndarray, room: int) -> np.ndarray:
    """Return a mask of the sizes that fit if they are taken in order and too large ones skipped."""
    fits = np.zeros(len(sizes), bool)
    for i, size in enumerate(sizes):
        if size <= room:
            fits[i], room = True, room - size
    return fits


@dataclasses.dataclass(frozen=True)
class Placement:
    """The places of the responses of a device pass.

    Prompts and responses of all processes are numbered in the order of the batch shards.
    """

    prompts: np.ndarray  # [S * V] the prompt at each place, -1 = none
    # [S * V] the number of each place's prompt in `copied`, -1 = the prompt of its shard, or none
    copies: np.ndarray
    copied: np.ndarray  # [domains M] the prompts with copies on other shards, -1 = none
    own: np.ndarray  # [B] the responses to this process's prompts
    at: np.ndarray  # [s * V * G] the responses at this process's places, -1 = none
    leave: np.ndarray  # [B] those of `own` that are at a place of another process
    guests: np.ndarray  # [s * V * G] those of `at` to a prompt of another process
    tokens: np.ndarray  # [s * V] of the prompts at this process's places, without padding


class GroupSizes(NamedTuple):
    """Tokens of the groups of a micro-batch or a device pass, of all processes, by batch shard."""

    prompts: np.ndarray  # [S q] without padding
    responses: np.ndarray  # [S q G], 0 = not trained on
    process_of: np.ndarray  # [S] the process that has each shard

    @classmethod
    def join(cls, parts: Sequence["GroupSizes"]) -> "GroupSizes":
        """Return the sizes of micro-batches that `join_prompts` joins."""
        prompts, responses = (np.concatenate([part[i] for part in parts], 1) for i in range(2))
        return cls(prompts, responses, parts[0].process_of)

    @property
    def longest(self) -> int:
        """Tokens of the longest packed row if no response moves."""
        # A row has no last token of a response.
        responses = np.maximum(self.responses - 1, 0)
        return int((self.prompts.sum(1) + responses.sum((1, 2))).max())


def gather_group_sizes(
    prompts: Prompts, tokens: Sequence[np.ndarray], masks: Sequence[np.ndarray]
) -> list[GroupSizes]:
    """Return the sizes of micro-batches.

    prompts: those of one of them on the mesh
    tokens: [Q] of this process's prompts, of each micro-batch; masks: [B R] of their targets
    """
    own, shards = local_row_numbers(prompts.tokens), batch_shards(prompts.tokens.sharding.mesh)
    lengths = [
        np.where(mask.any(1), mask.shape[1] - np.argmax(mask[:, ::-1], 1), 0) for mask in masks
    ]
    lengths = np.reshape(lengths, (len(masks), len(own), -1))
    gathered = distributed.gather_objects((own, np.array(tokens), lengths))
    order = np.argsort(np.concatenate([numbers for numbers, *_ in gathered]))
    process = np.repeat(np.arange(len(gathered)), [len(numbers) for numbers, *_ in gathered])
    p, r = (np.concatenate([part[i] for part in gathered], 1)[:, order] for i in (1, 2))
    process_of = process[order].reshape(shards, -1)[:, 0]
    by_shard = p.reshape(len(p), shards, -1), r.reshape(len(r), shards, -1, r.shape[-1])
    return [GroupSizes(*sizes, process_of) for sizes in zip(*by_shard, strict=True)]


def balanced_group_batch(
    model_ctx: ModelContext,
    prompts: Prompts,
    prompt_tokens: np.ndarray,
    longest: int,
    placement: Placement | None,
    tokens: np.ndarray,
    mask: np.ndarray,
    extra: dict[str, np.ndarray],
) -> Batch:
    """Return Q prompts on the mesh with their responses [B R], packed, where `placement` says.

    prompt_tokens: [Q] of this process's prompts, without padding; longest: of the packed rows
    """
    if placement is not None:
        prompt_tokens = placement.tokens
    tokens, mask, extra = to_places(placement, (tokens, mask, extra))
    return group_batch(
        model_ctx,
        move_prompts(model_ctx, prompts, placement),
        tokens,
        mask,
        extra=extra,
        # On the device, the moved prompts may wait for a step that still runs.
        prompt_mask=np.arange(prompts.tokens.shape[1])[::-1] < prompt_tokens[:, None],
        longest=longest,
    )


def to_places(placement: Placement | None, rows: Any) -> Any:
    """Return arrays [B ...] by response to this process's prompts as arrays by its places.

    Rows without a response are 0.
    """
    if placement is None:
        return rows
    return _exchange_rows(rows, placement.own, placement.at, placement.leave)


def to_prompts(placement: Placement | None, rows: Any) -> Any:
    """Do the opposite of `to_places`; responses that are at no place get 0."""
    if placement is None:
        return rows
    return _exchange_rows(rows, placement.at, placement.own, placement.guests)


def _exchange_rows(rows: Any, have: np.ndarray, want: np.ndarray, sends: np.ndarray) -> Any:
    """Return the rows with the numbers `want` of arrays whose rows have the numbers `have`.

    sends: [B] the rows that another process wants
    """
    sent = distributed.gather_objects((have[sends], jax.tree.map(lambda x: x[sends], rows)))
    numbers = np.concatenate([have, *(numbers for numbers, _ in sent)])
    row_of = np.full(max(numbers.max(), want.max()) + 2, -1)
    row_of[numbers] = np.arange(len(numbers))
    row_of[-1] = -1  # of the number -1
    at = row_of[want]

    def take(own: np.ndarray, *others: np.ndarray) -> np.ndarray:
        found = np.concatenate([own, *others])[np.maximum(at, 0)]
        found[at < 0] = 0
        return found

    return jax.tree.map(take, rows, *(others for _, others in sent))


def plan_placement(
    model_ctx: ModelContext, sizes: GroupSizes, prompt: int, response: int
) -> tuple[int, Placement | None]:
    """Return the length of the packed rows, and the places of the responses.

    A placement of None means that each stays with its prompt, which costs no more. All processes
    get the same plan.

    prompt: tokens of prompts with padding; response: the same of responses
    """
    cfg, shards, domains = model_ctx.cfg, batch_shards(model_ctx.mesh), _domains(model_ctx.mesh)
    p, r = sizes.prompts, sizes.responses
    q, group, longest = p.shape[1], r.shape[2], sizes.longest
    unmoved = row_size(longest, q * (prompt + group * response)), None
    if shards == domains or not r.any():
        return unmoved
    copied = max_copied(cfg, shards // domains, q, prompt)
    mean = (p.sum() + r.sum()) / shards
    for size in balanced_row_sizes(cfg, q, prompt, group, response, longest, mean):
        plans = [
            # A row has no last token of a response; the plan has room for it.
            plan_places(*of_domain, size, copied)
            for of_domain in zip(np.split(p, domains), np.split(r, domains), strict=True)
        ]
        if all(plan is not None for plan in plans):
            break
    else:
        return unmoved
    places, responses, copies, prompts_copied = _number_places(plans, r.shape, copied)
    here = places[sizes.process_of == jax.process_index()].reshape(-1)
    return size, Placement(
        places.reshape(-1),
        copies.reshape(-1),
        prompts_copied,
        *_processes_of_rows(responses, sizes.process_of.repeat(q).reshape(shards, q)),
        tokens=np.where(here < 0, 0, p.reshape(-1)[here]),
    )


def balanced_row_sizes(
    cfg: ModelConfig,
    prompts: int,
    prompt: int,
    group: int,
    response: int,
    longest: int,
    mean: float,
) -> list[int]:
    """Return the lengths of packed rows from `mean` tokens that save more than another place costs.

    prompts: of a shard, of `prompt` tokens with `group` responses of `response` tokens, all with
        padding
    longest: tokens of the longest row without a move
    """
    capacity = prompts * (prompt + group * response)
    most = row_size(longest, capacity) - _place_cost(cfg, prompt, group, response)
    sizes = [row_size(int(np.ceil(mean)), capacity, balanced=True)]
    while sizes[-1] < capacity:
        sizes.append(row_size(sizes[-1] + 1, capacity, balanced=True))
    return [size for size in sizes if size < most]


def _place_cost(cfg: ModelConfig, prompt: int, group: int, response: int) -> float:
    """Return the cost of another place of a shard, in tokens of a packed row.

    Only attention in the padded form has such a cost.
    """
    if attention.reads_packed_rows(cfg.compute.attention):
        return 0.0
    # In plans of the update of 7B for v5p, the padded form takes three times as long as its FLOPs.
    return 3 * flops.padded_attention_in_tokens(cfg, prompt, group, response)


def longest_balanced_row(
    cfg: ModelConfig, mesh: Mesh, prompts: int, prompt: int, group: int, response: int
) -> int:
    """Return the longest of the packed rows of moved responses; 0 = none ever move.

    See `balanced_row_sizes`.
    """
    if batch_shards(mesh) == _domains(mesh):
        return 0
    shape = prompts, prompt, group, response
    capacity = prompts * (prompt + group * response)
    return max(balanced_row_sizes(cfg, *shape, longest=capacity, mean=1), default=0)


def _number_places(
    plans: Sequence[list[Subgroup]], shape: tuple[int, int, int], most_copied: int
) -> tuple[np.ndarray, ...]:
    """Return `Placement.prompts`, `responses` and `copies` by shard and place, and `copied`.

    plans: of each domain, with its own numbers; shape: (S, q, G) of all shards
    """
    shards, q, group = shape
    of_domain = shards // len(plans)
    prompts = np.full((shards, q + 1), -1)
    responses = np.full((shards, q + 1, group), -1)
    copies, copied = prompts.copy(), np.full((len(plans), most_copied), -1)
    for i, plan in enumerate(plans):
        first = i * of_domain
        moved = sorted({prompt for prompt, _, shard in plan if shard != prompt // q})
        copied[i, : len(moved)] = np.array(moved, int) + first * q
        for prompt, chosen, shard in plan:
            shard, number = shard + first, prompt + first * q
            place = np.count_nonzero(prompts[shard] >= 0)
            prompts[shard, place] = number
            responses[shard, place, : len(chosen)] = number * group + chosen
            if number // q != shard:
                copies[shard, place] = moved.index(prompt)
    return prompts, responses, copies, copied


def _processes_of_rows(responses: np.ndarray, process_of: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return `Placement.own`, `at`, `leave` and `guests` of this process.

    responses: [S V G]; process_of: [S q] the process of each prompt
    """
    this, group, home = jax.process_index(), responses.shape[2], process_of.reshape(-1)
    rows = (np.flatnonzero(home == this)[:, None] * group + np.arange(group)).reshape(-1)
    at = responses[process_of[:, 0] == this].reshape(-1)
    holder = home.repeat(group)  # the process that has each response
    placed = responses >= 0
    holder[responses[placed]] = process_of[np.nonzero(placed)[0], 0]
    return rows, at, holder[rows] != this, (at >= 0) & (home[at // group] != this)


def move_prompts(model_ctx: ModelContext, prompts: Prompts, placement: Placement | None) -> Prompts:
    """Return the prompts at the places of a device pass; their images stay where they are."""
    if placement is None:
        return prompts
    program = _move_program(model_ctx.mesh, _feature_slots(model_ctx.cfg, prompts))
    rows = prompts.replace(vision=None, tower_states=None)
    moved = program(rows, placement.prompts, placement.copies, placement.copied)
    return moved.replace(vision=prompts.vision, tower_states=prompts.tower_states)


def abstract_moved_prompts(cfg: ModelConfig, mesh: Mesh, prompts: Prompts) -> Prompts:
    """Return the shapes of `move_prompts` on the mesh."""
    shards, domains = batch_shards(mesh), _domains(mesh)
    count, length = prompts.tokens.shape
    places = jax.ShapeDtypeStruct((count + shards,), np.int32)
    most_copied = max_copied(cfg, shards // domains, count // shards, length)
    copied = jax.ShapeDtypeStruct((domains, most_copied), np.int32)
    rows = prompts.replace(vision=None, tower_states=None)
    program = _move_program(mesh, _feature_slots(cfg, prompts))
    moved = place_prompts(jax.eval_shape(program, rows, places, places, copied), mesh)
    return moved.replace(vision=prompts.vision, tower_states=prompts.tower_states)


def _feature_slots(cfg: ModelConfig, prompts: Prompts) -> int:
    """Return the number of image features of a shard, 0 without images."""
    return prompts.patches // cfg.vision.merge**2 if prompts.patches else 0


@functools.lru_cache(maxsize=16)
def _move_program(mesh: Mesh, slots: int) -> Callable[..., Prompts]:
    """Return the program that copies the rows of prompts; a shard has `slots` image features."""
    shards, domains = batch_shards(mesh), _domains(mesh)

    def move(rows: Prompts, chosen: Array, copies: Array, copied: Array) -> Prompts:
        is_prompt = (chosen >= 0)[:, None]

        def take(x: Array) -> Array:
            return jnp.where(is_prompt, x[jnp.maximum(chosen, 0)], 0)

        length = rows.slots.shape[1]
        pooled = slots + jnp.maximum(copies, 0)[:, None] * length + jnp.arange(length)
        own = take(rows.slots)
        is_image = is_prompt & (own >= 0)
        placed = jnp.where(is_image, jnp.where(copies[:, None] < 0, own, pooled), -1)
        pool = None
        if slots:
            home = copied // (len(rows.slots) // shards)  # the shard of each copied prompt
            is_home = home.repeat(shards // domains, 0) == jnp.arange(shards)[:, None]
            is_home &= copied.repeat(shards // domains, 0) >= 0
            sources = rows.slots[jnp.maximum(copied, 0)].repeat(shards // domains, 0)
            pool = jnp.where(is_home[..., None], sources, -1).reshape(shards, -1)
            pool = FeaturePool(pool, domains)
        return Prompts(
            take(rows.tokens),
            jax.vmap(take)(rows.positions),
            take(rows.segments),
            placed,
            pool=pool,
        )

    by_row = named_sharding(("batch", None), mesh)
    places = Prompts(by_row, named_sharding((None, "batch", None), mesh), by_row, by_row)
    if slots:
        places = places.replace(pool=FeaturePool(by_row, domains))
    return jax.jit(move, out_shardings=places)
