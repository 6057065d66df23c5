"""Answers to imitate that are not in the data: the policy's own correct ones, drawn by windows of steps, or another run's.

A window's answers are written to corpus/stage{K}_step{start}.jsonl before they are used, so that a resumed run learns from the same;
beside them lies what drawing them cost (.cost.json) and where they came from (.source.json).
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cptjax.common import console, distributed, files
from cptjax.common.shuffle import permutation
from cptjax.data.cost import WorkCost, sampling_cost
from cptjax.data.device_batches import batch_slices, rows_per_process
from cptjax.data.mixture import RowRef, component_at, component_counts
from cptjax.data.prompts import EncodedExample
from cptjax.generation import generate
from cptjax.tasks.rewards import is_correct
from cptjax.training import sampling_cache
from cptjax.training.corpus import RowResponse, load_corpus
from cptjax.training.rollouts import grade_responses
from cptjax.training.sampling_cache import SamplingCache
from cptjax.training.stage_context import StageContext
from cptjax.training.step_batch import BatchBuilder
from cptjax.types import Params


def sample_correct_responses(
    builder: BatchBuilder,
    params: Params,
    items: Sequence[EncodedExample],
    samples: int,
    key: jax.Array,
    bar: Any,
    cache: Any,
    unfinished: bool = False,
) -> tuple[list[tuple[int, str]], WorkCost]:
    """(item, text) of the policy's own correct answers to these prompts, each device pass kept in `drafts`.

    unfinished: also those that met the length limit.
    """
    share = rows_per_process(builder.model_ctx, builder.batch_size, 0, fill=True)
    sampling = dataclasses.replace(builder.sampling, group=samples)
    weights = generate.prepare_weights(builder.model_ctx, params, sampling)
    found: list[tuple[int, str]] = []
    spent = WorkCost()

    def draw(p: slice) -> tuple[list[tuple[int, str]], WorkCost]:
        here = list(items[p]) + [items[p.stop - 1]] * (share - (p.stop - p.start))
        numbers = np.arange(p.start, p.start + share)
        encoded = [i.encoded for i in here]
        out = generate.sample_responses(builder.model_ctx, weights, encoded, key, numbers, sampling)
        parts = grade_responses(builder, here, out.texts)
        right = [
            r
            for r in range((p.stop - p.start) * samples)
            if is_correct(parts[r]) and (unfinished or out.finished[r])
        ]
        cost = sampling_cost(builder.model_ctx.cfg, encoded, out.mask.sum(1).reshape(-1, samples))
        return [(p.start + r // samples, out.texts[r]) for r in right], cost

    for p in batch_slices(len(items), share):
        right, cost = cache.piece(lambda p=p: draw(p))
        found += [(i, text) for i, text in right]
        spent += cost
        bar.advance(p.stop - p.start, correct=len(found))
    return found, spent


def response_examples(
    ctx: StageContext, params: Params, step: int
) -> tuple[list[EncodedExample], WorkCost]:
    """Rows of a window's corpus for this step; the corpus is drawn when its window begins."""
    t, window = ctx.builder, _window_steps(ctx)
    start = step // window * window
    pairs, spent = _window_responses(ctx, params, start, min(window, ctx.steps - start))
    spent = spent if step == start else WorkCost()
    rows = _step_responses(ctx, pairs, start, step)
    mine = rows[batch_slices(len(rows), t.batch_size // jax.process_count())[jax.process_index()]]
    return _encode_responses(ctx, mine), spent


def _step_responses(
    ctx: StageContext, pairs: list[RowResponse], start: int, step: int
) -> list[RowResponse]:
    """The step's answers: every position takes the next one of its lane, lap after lap in an order of the seed, so shares stay exact."""
    order, batch = ctx.mixture, ctx.builder.batch_size
    lists = [[p for p in pairs if p[0] in lane.sources] for lane in order.components]
    if step == start and not all(lists):
        empty = [
            ctx.sources[lane.sources[0]][0].task
            for lane, own in zip(order.components, lists, strict=True)
            if not own
        ]
        console.print_warning(
            f"stage {ctx.stage.number}: no correct answer in the lane of {', '.join(empty)}; until step {start + _window_steps(ctx)} "
            "others take its rows: raise method.self_samples, or the steps of method.refresh"
        )
    lists, before = (
        [own or pairs for own in lists],
        component_counts(start * batch, order.remaining_shares),
    )
    found = []
    for n in range(step * batch, (step + 1) * batch):
        lane, k = component_at(n, order.remaining_shares)
        lap, at = divmod(k - before[lane], len(lists[lane]))
        found.append(
            lists[lane][
                permutation(len(lists[lane]), (ctx.seed, ctx.stage.number, start, lane, lap))[at]
            ]
        )
    return found


def _window_steps(ctx: StageContext) -> int:
    """Steps that learn from the same answers."""
    m = ctx.config.method
    return (
        {"never": ctx.steps, "epoch": ctx.mixture.steps(1)}.get(m.refresh) or int(m.refresh)
        if m.source == "self"
        else ctx.steps
    )


def needs_sampling(ctx: StageContext, step: int) -> bool:
    """Whether the policy must answer before this step can learn."""
    return ctx.config.method.source == "self" and step % _window_steps(ctx) == 0


def _encode_responses(ctx: StageContext, pairs: Sequence[RowResponse]) -> list[EncodedExample]:
    model_ctx = ctx.builder.training_ctx
    prompts = ctx.prompt_reader([RowRef(source, row) for source, row, _ in pairs])
    answered = lambda prompt, text: model_ctx.processor.append_response(
        prompt.encoded, text, limit=max(model_ctx.buckets)
    )
    return [
        EncodedExample(p.example, answered(p, text), row)
        for p, (_, row, text) in zip(prompts, pairs, strict=True)
    ]


@functools.lru_cache(maxsize=2)
def _read_responses(path: Path) -> list[RowResponse]:
    return [(r["source"], r["row"], r["response"]) for r in files.read_jsonl(path)]


def _window_responses(
    ctx: StageContext, params: Params, start: int, steps: int
) -> tuple[list[RowResponse], WorkCost]:
    """A window's answers, and what drawing them cost; drawn now, or found as a killed run left them."""
    path = ctx.workdir / "corpus" / f"stage{ctx.stage.number}_step{start}.jsonl"
    cache = SamplingCache(path, ctx.stage, ctx.builder.model_ctx.mesh, ctx.stopping)
    if not cache.made():
        foreign = ctx.config.method.source == "corpus"
        pairs, spent = (
            (load_corpus(ctx), WorkCost())
            if foreign
            else _sample_window(ctx, params, start, steps, cache)
        )
        total = sum(distributed.gather_objects(spent), WorkCost())
        if distributed.is_main_process():
            sampling_cache.write_sampling_cost(path, total, cache.mark)
            files.write_json(
                path.with_suffix(".source.json"), _provenance(ctx, start) | {"answers": len(pairs)}
            )
            lines = [
                {"source": s, "row": r, "id": ctx.sources[s][r].id, "response": text}
                for s, r, text in pairs
            ]
            files.write_text(
                path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            )
        distributed.gather_objects(True)  # nobody reads before it is written
        cache.clear()
        _read_responses.cache_clear()
    # the file tells the cost of all processes, and a step adds up its processes' costs
    return _read_responses(path), sampling_cache.read_sampling_cost(path)[
        0
    ] if distributed.is_main_process() else WorkCost()


def _provenance(ctx: StageContext, start: int) -> dict[str, Any]:
    """Where a window's answers come from: a file, or the policy after so many steps of a stage."""
    m = ctx.config.method
    if m.source == "self":
        return {"policy": {"stage": ctx.stage.number, "step": start}}
    text = Path(m.corpus).read_bytes()
    return {
        "corpus": str(Path(m.corpus).resolve()),
        "sha256": hashlib.sha256(text).hexdigest(),
        "rows": text.count(b"\n"),
    }


def _sample_window(
    ctx: StageContext, params: Params, start: int, steps: int, cache: SamplingCache
) -> tuple[list[RowResponse], WorkCost]:
    t, count = ctx.builder, jax.process_count()
    places = dict.fromkeys(
        (p.source, p.index) for step in range(start, start + steps) for p in ctx.mixture.rows(step)
    )
    mine = list(places)[jax.process_index() :: count]
    mine += mine[-1:] * (-(-len(places) // count) - len(mine))
    with console.progress_bar(f"own answers, stage {ctx.stage.number}", total=len(mine)) as bar:
        items = ctx.prompt_reader([RowRef(*at) for at in mine])
        right, spent = sample_correct_responses(
            t, params, items, ctx.config.method.self_samples, ctx.step_key(start), bar, cache
        )
    ends = lambda i, text: (
        len(items[i].encoded) + len(t.model_ctx.processor.ids(text)) + 2
    )  # tokens, with the end of the turn and of its line
    found = distributed.concat_lists(
        distributed.gather_objects([(*mine[i], text, ends(i, text)) for i, text in right])
    )
    pairs = sorted({(*at, text) for *at, text, end in found if end <= max(t.training_ctx.buckets)})
    if not pairs:
        raise ValueError(
            f"none of the policy's own answers to {len(places)} prompts is correct; there is nothing to learn from"
        )
    lost = sum(
        end > max(t.training_ctx.buckets) for *_, end in found
    )  # read again, a text may have other tokens than when it was sampled
    more = f"; {lost} more were too long when read again" if lost else ""
    console.print_message(
        f"stage {ctx.stage.number}: {len(pairs)} correct own answers to {len(places)} prompts{more}"
    )
    return pairs, spent
