"""The offline filter before a stage (RIF-RFT): K answers a prompt, keep the prompts inside a window of success counts."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cptjax.common import console, distributed, files
from cptjax.config import Stage
from cptjax.data.cost import WorkCost
from cptjax.data.device_batches import batch_slices
from cptjax.data.prompts import make_example_encoder
from cptjax.tasks.task import Subset
from cptjax.training import sampling_cache, self_training
from cptjax.training.algorithms import prompt_filters
from cptjax.training.sampling_cache import SamplingCache
from cptjax.training.step_batch import BatchBuilder
from cptjax.types import Example


def filter_prompts(
    run: Any, stage: Stage, builder: BatchBuilder, sources: Sequence[Sequence[Example]]
) -> list[Sequence[Example]]:
    """The examples that stay; judged once, and read back by a resumed run."""
    out = []
    for name, examples in zip(stage.tasks, sources, strict=True):
        path = filter_path(run.workdir, stage, name)
        cache = SamplingCache(path, stage, builder.model_ctx.mesh)
        if not cache.made():
            rows, spent = decide_prompts(run, stage, builder, name, examples, cache)
            if distributed.is_main_process():
                sampling_cache.write_sampling_cost(path, spent, cache.mark, cache.seconds)
                files.write_text(path, "".join(json.dumps(r) + "\n" for r in rows))
        distributed.gather_objects(True)  # nobody reads before it is written
        cache.clear()
        rows = files.read_jsonl(path)
        log_filter(run, stage, name, rows, path)
        out.append(Subset(examples, [r["row"] for r in rows if r["kept"]]))
    return out


def filter_path(workdir: Path, stage: Stage, name: str) -> Path:
    return workdir / "filters" / f"stage{stage.number}_{name}.jsonl"


def decide_prompts(
    run: Any,
    stage: Stage,
    builder: BatchBuilder,
    name: str,
    examples: Sequence[Example],
    cache: SamplingCache,
) -> tuple[list[dict[str, Any]], WorkCost]:
    """A line for every example: how often it was solved, where that was counted, and whether it stays."""
    window, seed = dict(stage.config.method.filter), run.config.seed
    like = window.pop("like", "")
    lines = [{"row": i, "id": examples[i].id} for i in range(len(examples))]
    if like:
        keep = prompt_filters.keep_random_prompts(
            len(lines), count_kept_prompts(Path(like), stage, name, len(lines)), seed
        )
        return [
            line | {"kept": k} for line, k in zip(lines, keep.tolist(), strict=True)
        ], WorkCost()
    correct, spent = count_correct(run, stage, builder, name, examples, window["samples"], cache)
    found = zip(
        lines,
        correct.tolist(),
        prompt_filters.keep_prompts(correct, seed=seed, **window).tolist(),
        strict=True,
    )
    return [
        line | {"correct": n, "samples": window["samples"], "kept": k} for line, n, k in found
    ], spent


def count_kept_prompts(folder: Path, stage: Stage, name: str, prompts: int) -> int:
    """How many prompts the filter of another run kept of this stage's task."""
    path = filter_path(folder, stage, name)
    rows = files.read_jsonl(path)
    if len(rows) != prompts:
        came = f"has {len(rows)} prompts" if rows else "is not there or empty"
        raise ValueError(
            f"method.filter.like: {path} {came}; expected the {prompts} prompts of the same stage in a run with a filter"
        )
    return sum(r["kept"] for r in rows)


def log_filter(
    run: Any, stage: Stage, name: str, rows: Sequence[dict[str, Any]], path: Path
) -> None:
    """What the filter did to a task: on the console and, once, in metrics.jsonl."""
    window, stay = stage.config.method.filter, sum(r["kept"] for r in rows)
    shares = {"filter/kept": stay / len(rows)}
    if "correct" in rows[0]:
        shares["filter/never"] = sum(r["correct"] == 0 for r in rows) / len(rows)
        shares["filter/always"] = sum(r["correct"] == r["samples"] for r in rows) / len(rows)
    said = ", ".join(f"{share:.0%} {key.removeprefix('filter/')}" for key, share in shares.items())
    console.print_message(
        f"filter {window['name']} on {name}: {stay} of {len(rows)} prompts stay ({said})"
    )
    if run.log and run.entering:
        spent, seconds = sampling_cache.read_sampling_cost(path)
        cost = spent.logged() | {"seconds": seconds}
        run.log.step(
            stage.number,
            0,
            {"event": "filter", "task": name, "filter/rows": stay, **shares, **cost},
        )


def count_correct(
    run: Any,
    stage: Stage,
    builder: BatchBuilder,
    name: str,
    examples: Sequence[Example],
    samples: int,
    cache: SamplingCache,
) -> tuple[np.ndarray, WorkCost]:
    """How many of K answers of the current model are right, for every example; each process answers its share."""
    build = make_example_encoder(
        builder.model_ctx, builder.prompted_tasks, False, max(builder.model_ctx.buckets)
    )
    share = -(-len(examples) // jax.process_count())
    mine = [
        min(i, len(examples) - 1)
        for i in range(jax.process_index() * share, (jax.process_index() + 1) * share)
    ]
    key = jax.random.fold_in(
        jax.random.fold_in(jax.random.key(run.config.seed), stage.number), 2**30
    )
    found: list[int] = []
    spent = WorkCost()
    with console.progress_bar(f"filter {name}: {samples} answers a prompt", total=len(mine)) as bar:
        for p in batch_slices(len(mine), builder.batch_size // jax.process_count()):
            items = [build(examples[i]) for i in mine[p]]
            right, cost = self_training.sample_correct_responses(
                builder, run.params, items, samples, key, bar, cache, unfinished=True
            )
            spent += cost
            found += np.bincount([i for i, _ in right], minlength=len(items)).tolist()
    everyone = distributed.gather_objects(dict(zip(mine, found, strict=True)))
    by_row = {i: n for part in everyone for i, n in part.items()}
    return np.array([by_row[i] for i in range(len(examples))]), sum(
        distributed.gather_objects(spent), WorkCost()
    )
