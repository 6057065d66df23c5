"""SFT on listed responses: the policy's own in windows of steps, a corpus, or gold and a corpus.

Equal correct responses to a prompt are listed once, so a prompt counts with its distinct correct
responses, however often each was sampled.

The responses of a window are written to corpus/stage{K}_step{start}.jsonl before they are used, so
that a resumed run trains on the same responses. Their sampling cost (.cost.json) and their origin
(.source.json) are written next to that file.
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

from cptjax import sharding
from cptjax.common import console, distributed, files
from cptjax.common.shuffle import permutation
from cptjax.data.cost import WorkCost, sampling_cost
from cptjax.data.device_batches import batch_slices, pad_to_shards
from cptjax.data.mixture import RowRef, component_at, component_counts
from cptjax.data.prompts import EncodedExample
from cptjax.generation import generate
from cptjax.tasks.rewards import is_correct
from cptjax.training import sampling_cache
from cptjax.training.corpus import RowResponse, find_provenance, load_corpus
from cptjax.training.rollouts import grade_responses
from cptjax.training.sampling_cache import SamplingCache
from cptjax.training.stage_context import StageContext
from cptjax.training.step_batch import BatchBuilder
from cptjax.types import Params


def response_examples(
    ctx: StageContext, params: Params | None, step: int
) -> tuple[list[EncodedExample], WorkCost]:
    """Return this process's conversations of a step; a window is sampled at its first step."""
    window = _window_steps(ctx)
    start = step // window * window
    pairs, cost = _window_responses(ctx, params, start, min(window, ctx.steps - start))
    rows = _step_responses(ctx, pairs, start, step)
    share = batch_slices(len(rows), ctx.builder.batch_size // jax.process_count())
    items = _encode_responses(ctx, rows[share[jax.process_index()]])
    return items, cost if step == start else WorkCost()


def starts_window(ctx: StageContext, step: int) -> bool:
    """Return whether the policy must sample before it can train on this step."""
    return ctx.config.method.source == "self" and step % _window_steps(ctx) == 0


def _window_steps(ctx: StageContext) -> int:
    """Return the number of steps that train on the same responses."""
    method = ctx.config.method
    if method.source != "self" or method.refresh == "never":
        return ctx.steps
    return ctx.mixture.steps(1) if method.refresh == "epoch" else int(method.refresh)


def _window_responses(
    ctx: StageContext, params: Params | None, start: int, steps: int
) -> tuple[list[RowResponse], WorkCost]:
    """Return the responses of a window and their cost; sample them if no file has them."""
    path = ctx.workdir / "corpus" / f"stage{ctx.stage.number}_step{start}.jsonl"
    cache = SamplingCache(path, ctx.stage, ctx.builder.model_ctx.mesh, ctx.stopping)
    if not cache.is_complete():
        if ctx.config.method.source == "self":
            pairs, cost = _sample_window(ctx, params, start, steps, cache)
        else:
            pairs, cost = _listed_responses(ctx), WorkCost()
        total = sum(distributed.gather_objects(cost), WorkCost())
        if distributed.is_main_process():
            origin = _origin(ctx, start) | {"answers": len(pairs)}
            files.write_json(path.with_suffix(".source.json"), origin)
            lines = [
                {"source": s, "row": r, "id": ctx.sources[s][r].id, "response": text}
                | ({"gold": True} if gold else {})
                for s, r, text, gold in pairs
            ]
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            sampling_cache.write_samples(path, text, total, cache.fingerprint)
        distributed.wait_for_file(path)
        cache.discard()
        _read_responses.cache_clear()
    # The file has the cost of all processes, and a step sums the costs of its processes.
    cost, _ = distributed.decide_on_main(lambda: sampling_cache.read_sampling_cost(path))
    return _read_responses(path), cost if distributed.is_main_process() else WorkCost()


@functools.lru_cache(maxsize=2)
def _read_responses(path: Path) -> list[RowResponse]:
    return [
        RowResponse(line["source"], line["row"], line["response"], line.get("gold", False))
        for line in files.read_jsonl(path)
    ]


def _listed_responses(ctx: StageContext) -> list[RowResponse]:
    """Return the responses of the corpus, after the gold answers where both are trained on."""
    builder, gold = ctx.builder, []
    if builder.method.source == "gold+corpus":
        gold = [
            RowResponse(s, row, builder.prompted_tasks[example.task].gold_response(example), True)
            for s, source in enumerate(ctx.sources)
            for row, example in enumerate(source)
        ]
    prompted_tasks = ctx.corpus_tasks or builder.prompted_tasks
    return gold + load_corpus(builder.method, ctx.sources, prompted_tasks, builder.training_ctx)


def steps_over_responses(ctx: StageContext, params: Params, epochs: float) -> int:
    """Return the steps of so many passes over the responses of a stage; they are sampled now."""
    pairs, _ = _window_responses(ctx, params, 0, max(ctx.steps, ctx.mixture.steps(1)))
    own = sum(pair.source < len(ctx.stage.tasks) for pair in pairs)
    return ctx.mixture.steps(epochs, own)


def _origin(ctx: StageContext, start: int) -> dict[str, Any]:
    """Return the origin of a window's responses: a corpus, or the policy at a step."""
    method = ctx.config.method
    if method.source == "self":
        return {"policy": {"stage": ctx.stage.number, "step": start}}
    path = Path(method.corpus)
    text = path.read_bytes()
    return {
        "corpus": str(path.resolve()),
        "provenance": find_provenance(path, "method.corpus"),
        "sha256": hashlib.sha256(text).hexdigest(),
        "rows": text.count(b"\n"),
    }


def _sample_window(
    ctx: StageContext, params: Params, start: int, steps: int, cache: SamplingCache
) -> tuple[list[RowResponse], WorkCost]:
    """Sample responses to the prompts of a window.

    Return the correct ones of all processes, and this process's cost.
    """
    builder, count = ctx.builder, jax.process_count()
    rows = [row for step in range(start, start + steps) for row in ctx.mixture.rows(step)]
    places = list(dict.fromkeys((row.source, row.index) for row in rows))
    numbers = list(range(jax.process_index(), len(places), count))
    numbers += numbers[-1:] * (-(-len(places) // count) - len(numbers))
    local = [places[n] for n in numbers]
    label = f"own responses, stage {ctx.stage.number}"
    with console.progress_bar(label, total=len(local)) as bar:
        items = ctx.prompt_reader([RowRef(*place) for place in local])
        samples, key = builder.needs.self_samples, ctx.step_key(start)
        correct, cost = sample_correct_responses(
            builder, params, items, numbers, samples, key, bar, cache
        )

    # When encoded again, a text may have other tokens than the sampled ones. Two more tokens end
    # the turn and its line.
    processor = builder.model_ctx.processor
    ids = processor.ids
    usable = [(i, text) for i, text in correct if not processor.reserved.search(text)]
    measured = [(*local[i], text, len(items[i].encoded) + len(ids(text)) + 2) for i, text in usable]
    reserved = sum(distributed.gather_objects(len(correct) - len(usable)))
    measured = distributed.concat_lists(distributed.gather_objects(measured))
    limit = max(builder.training_ctx.buckets)
    pairs = sorted({RowResponse(*pair) for *pair, tokens in measured if tokens <= limit})
    if not pairs:
        raise ValueError(
            f"none of the policy's own responses to {len(places)} prompts is correct; "
            "there is nothing to train on"
        )
    too_long = sum(tokens > limit for *_, tokens in measured)
    more = f"; {too_long} more are too long when encoded again" if too_long else ""
    more += f"; {reserved} more spell a special token" if reserved else ""
    console.print_message(
        f"stage {ctx.stage.number}: "
        f"{len(pairs)} correct own responses to {len(places)} prompts{more}"
    )
    return pairs, cost


def sample_correct_responses(
    builder: BatchBuilder,
    params: Params,
    items: Sequence[EncodedExample],
    numbers: Sequence[int],
    samples: int,
    key: jax.Array,
    bar: console.ProgressBar,
    cache: SamplingCache,
    unfinished: bool = False,
) -> tuple[list[tuple[int, str]], WorkCost]:
    """Sample responses to prompts; return (item, text) of the correct ones, and the cost.

    Each device pass is a part of the cache. With `unfinished`, responses that reached the length
    limit are included.

    numbers: of each prompt among all that are sampled with `key`, over all processes; its responses
        depend on it, and not on its batch or process
    """
    model_ctx, sampling = builder.model_ctx, dataclasses.replace(builder.sampling, group=samples)
    shards = sharding.batch_shards(model_ctx.mesh)
    rows = pad_to_shards(builder.batch_size, shards) // jax.process_count()
    weights = generate.prepare_weights(model_ctx, params, sampling)

    def sample(p: slice) -> tuple[list[tuple[int, str]], WorkCost]:
        count = p.stop - p.start
        batch = [*items[p], *[items[p.stop - 1]] * (rows - count)]
        encoded = [i.encoded for i in batch]
        padded = np.array([*numbers[p], *[numbers[p.stop - 1]] * (rows - count)])
        out = generate.sample_responses(model_ctx, weights, encoded, key, padded, sampling)
        parts = grade_responses(builder.prompted_tasks, batch, out.texts)
        correct = [
            (p.start + r // samples, out.texts[r])
            for r in range(count * samples)
            if is_correct(parts[r]) and (unfinished or out.finished[r])
        ]
        lengths = out.mask.sum(1).reshape(-1, samples)
        return correct, sampling_cost(model_ctx.cfg, encoded, lengths)

    correct: list[tuple[int, str]] = []
    total = WorkCost()
    for p in batch_slices(len(items), rows):
        part, cost = cache.next_part(functools.partial(sample, p))
        correct += [(i, text) for i, text in part]
        total += cost
        bar.advance(p.stop - p.start, correct=len(correct))
    return correct, total


def _step_responses(
    ctx: StageContext, pairs: list[RowResponse], start: int, step: int
) -> list[RowResponse]:
    """Return the responses of a step, for all processes.

    Each position takes the next response of its mixture component, so the components keep their
    exact shares. The order depends on the seed and changes with each pass over the responses of
    the component.
    """
    mixture, batch = ctx.mixture, ctx.builder.batch_size
    of_component = [[p for p in pairs if p[0] in c.sources] for c in mixture.components]
    if step == start and not all(of_component):
        empty = [
            ctx.sources[component.sources[0]][0].task
            for component, responses in zip(mixture.components, of_component, strict=True)
            if not responses
        ]
        console.print_warning(
            f"stage {ctx.stage.number}: no correct response to the prompts of {', '.join(empty)}; "
            f"until step {start + _window_steps(ctx)} other responses take their rows: "
            "raise method.self_samples, or the steps of method.refresh"
        )
    of_component = [responses or pairs for responses in of_component]
    before = component_counts(start * batch, mixture.remaining_shares)
    out = []
    for n in range(step * batch, (step + 1) * batch):
        c, k = component_at(n, mixture.remaining_shares)
        turn, at = divmod(k - before[c], len(of_component[c]))
        order = permutation(len(of_component[c]), (ctx.seed, ctx.stage.number, start, c, turn))
        out.append(of_component[c][order[at]])
    return out


def _encode_responses(ctx: StageContext, pairs: Sequence[RowResponse]) -> list[EncodedExample]:
    """Encode prompts with their responses, reusing the encoded images of the prompts."""
    model_ctx = ctx.builder.training_ctx
    limit = max(model_ctx.buckets)
    prompts: dict[int, EncodedExample] = {}
    for gold, reader in ((True, ctx.prompt_reader), (False, ctx.corpus_reader)):
        chosen = [i for i, pair in enumerate(pairs) if pair.gold == gold]
        rows = [RowRef(pairs[i].source, pairs[i].row) for i in chosen]
        prompts |= zip(chosen, reader(rows), strict=True)
    return [
        EncodedExample(
            prompts[i].example,
            model_ctx.processor.append_response(prompts[i].encoded, pair.text, limit=limit),
            pair.row,
        )
        for i, pair in enumerate(pairs)
    ]
