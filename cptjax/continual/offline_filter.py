"""Offline filter (RIF-RFT): keep prompts by how many of K sampled responses are correct."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cptjax.common import console, distributed, files
from cptjax.common.run_log import RunLog
from cptjax.config import Stage
from cptjax.continual.open_run import Run
from cptjax.data.cost import WorkCost
from cptjax.data.device_batches import batch_slices
from cptjax.data.prompts import make_example_encoder
from cptjax.tasks.task import Subset
from cptjax.training import corpus, sampling_cache, self_training
from cptjax.training.algorithms import prompt_filters
from cptjax.training.sampling_cache import SamplingCache
from cptjax.training.step_batch import BatchBuilder
from cptjax.types import Example, Params

SAMPLING_KEY = 2**30  # in the place of a step, whose keys are counted from 0


def filter_prompts(
    run: Run,
    stage: Stage,
    builder: BatchBuilder,
    sources: Sequence[Sequence[Example]],
    params: Params,
    resumed: bool,
) -> list[Sequence[Example]]:
    """Return the examples that the filter keeps.

    A resumed stage reads the decision made at its start and does not log it again.
    """
    kept_sources = []
    for name, examples in zip(stage.tasks, sources, strict=True):
        path = filter_path(run.files.workdir, stage, name)
        cache = SamplingCache(path, stage, builder.model_ctx.mesh)
        if not cache.is_complete():
            rows, spent = decide_prompts(stage, builder, params, name, examples, cache)
            if distributed.is_main_process():
                text = "".join(json.dumps(r) + "\n" for r in rows)
                sampling_cache.write_samples(path, text, spent, cache.fingerprint, cache.seconds)
        distributed.wait_for_file(path)
        cache.discard()
        rows = files.read_jsonl(path)
        metrics = filter_metrics(rows)
        print_filter(stage, name, metrics, len(rows))
        if run.files.log and not resumed:
            log_filter(run.files.log, stage, name, metrics, path)
        kept_sources.append(Subset(examples, [r["row"] for r in rows if r["kept"]]))
    return kept_sources


def filter_path(workdir: Path, stage: Stage, name: str) -> Path:
    return workdir / "filters" / f"stage{stage.number}_{name}.jsonl"


def decide_prompts(
    stage: Stage,
    builder: BatchBuilder,
    params: Params,
    name: str,
    examples: Sequence[Example],
    cache: SamplingCache,
) -> tuple[list[dict[str, Any]], WorkCost]:
    """Decide which prompts to keep; return a line per example, and the cost.

    A line has `kept` and, if responses were sampled, the number of `correct` ones.
    """
    window, seed = dict(stage.config.method.filter), stage.config.seed
    other_run = window.pop("like", "")
    lines = [{"row": i, "id": examples[i].id} for i in range(len(examples))]
    if other_run:
        count = count_kept_prompts(Path(other_run), stage, name, len(lines))
        keep = prompt_filters.keep_random_prompts(np.ones(len(lines), bool), count, seed)
        for line, kept in zip(lines, keep.tolist(), strict=True):
            line["kept"] = kept
        return lines, WorkCost()
    samples, path = window["samples"], window.pop("corpus", "")
    window.pop("top_p", None)
    if path:
        ids = [line["id"] for line in lines]
        correct, spent = corpus.count_correct_responses(path, ids, samples), WorkCost()
    else:
        sampling = dataclasses.replace(builder.sampling, **builder.needs.filter_sampling)
        builder = dataclasses.replace(builder, sampling=sampling)
        correct, spent = count_correct(stage, builder, params, name, examples, samples, cache)
    keep = prompt_filters.keep_prompts(correct, seed=seed, **window)
    for line, n, kept in zip(lines, correct.tolist(), keep.tolist(), strict=True):
        line |= {"correct": n, "samples": samples, "kept": kept}
    return lines, spent


def count_kept_prompts(folder: Path, stage: Stage, name: str, prompts: int) -> int:
    """Return how many prompts of this stage's task the filter of another run kept."""
    path = filter_path(folder, stage, name)
    rows = files.read_jsonl(path)
    if len(rows) != prompts:
        got = f"{len(rows)} prompts" if rows else "a missing or empty file"
        raise ValueError(
            f"method.filter.like: {path}: expected the {prompts} prompts of the same stage in a "
            f"run with a filter, got {got}"
        )
    return sum(r["kept"] for r in rows)


def filter_metrics(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the shares of prompts that were kept, never solved, and always solved."""
    shares = {"filter/kept": sum(r["kept"] for r in rows) / len(rows)}
    if "correct" in rows[0]:
        shares["filter/never"] = sum(r["correct"] == 0 for r in rows) / len(rows)
        shares["filter/always"] = sum(r["correct"] == r["samples"] for r in rows) / len(rows)
    return {"filter/rows": sum(r["kept"] for r in rows)} | shares


def print_filter(stage: Stage, name: str, metrics: dict[str, float], prompts: int) -> None:
    """Print what the filter kept of a task."""
    shares = [
        f"{metrics[key]:.0%} {key.removeprefix('filter/')}"
        for key in ("filter/kept", "filter/never", "filter/always")
        if key in metrics
    ]
    console.print_message(
        f"filter {stage.config.method.filter['name']} on {name}: "
        f"{metrics['filter/rows']} of {prompts} prompts kept ({', '.join(shares)})"
    )


def log_filter(log: RunLog, stage: Stage, name: str, metrics: dict[str, float], path: Path) -> None:
    """Add the metrics and the cost of the filter to metrics.jsonl."""
    spent, seconds = sampling_cache.read_sampling_cost(path)
    cost = spent.logged() | {"seconds": seconds}
    log.step(stage.number, 0, {"event": "filter", "task": name, **metrics, **cost})


def count_correct(
    stage: Stage,
    builder: BatchBuilder,
    params: Params,
    name: str,
    examples: Sequence[Example],
    samples: int,
    cache: SamplingCache,
) -> tuple[np.ndarray, WorkCost]:
    """Count for each example how many of K responses of the current model are correct.

    The examples are divided among the processes. Each has its own random stream, so equal prompts
    of several batches, processes or tasks get other responses.
    """
    model_ctx, count, index = builder.model_ctx, jax.process_count(), jax.process_index()
    encode = make_example_encoder(model_ctx, builder.prompted_tasks, False, max(model_ctx.buckets))
    share = -(-len(examples) // count)
    # The last rows are counted twice where the shares of the processes would differ.
    mine = [min(i, len(examples) - 1) for i in range(index * share, (index + 1) * share)]
    stage_key = jax.random.fold_in(jax.random.key(stage.config.seed), stage.number)
    key = jax.random.fold_in(stage_key, SAMPLING_KEY)
    key = jax.random.fold_in(key, stage.tasks.index(name))
    counts: list[int] = []
    spent = WorkCost()
    title = f"filter {name}: {samples} responses per prompt"
    with console.progress_bar(title, total=len(mine)) as bar:
        for part in batch_slices(len(mine), builder.batch_size // count):
            items = [encode(examples[i]) for i in mine[part]]
            correct, cost = self_training.sample_correct_responses(
                builder, params, items, mine[part], samples, key, bar, cache, unfinished=True
            )
            spent += cost
            counts += np.bincount([i for i, _ in correct], minlength=len(items)).tolist()
    by_row: dict[int, int] = {}
    for part in distributed.gather_objects(dict(zip(mine, counts, strict=True))):
        by_row |= part
    total = sum(distributed.gather_objects(spent), WorkCost())
    return np.array([by_row[i] for i in range(len(examples))]), total
