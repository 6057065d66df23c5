"""One task, one model -> scored answers: the same decoding for every method, never teacher-forced."""

import concurrent.futures
import contextlib
import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from cptjax.common import console, distributed, run_log
from cptjax.data import loader
from cptjax.data.collate import EncodedConversation
from cptjax.data.cost import WorkCost, sampling_cost
from cptjax.data.mixture import RowRef
from cptjax.data.model_context import ModelContext
from cptjax.generation import generate
from cptjax.generation.generate import SamplingConfig
from cptjax.tasks.prompted_task import PromptedTask
from cptjax.tasks.scoring import scorers, summaries
from cptjax.types import Example, Params


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """The answers of a model to one task's test rows."""

    prompted: PromptedTask
    records: list[scorers.ScoreRecord]
    forced: list[scorers.ScoreRecord]  # after the forced prefix; empty where that was not asked for
    texts: list[str]
    spent: WorkCost  # by all processes, the forced answers included
    also: dict[scorers.Scorer, list[scorers.ScoreRecord]] = dataclasses.field(
        default_factory=dict
    )  # by the task's further scorers


class EvalPrompts:
    """A task's test rows as prompts, over all evaluations: measured once, encoded just ahead of the device, kept where all fit."""

    def __init__(
        self,
        model_ctx: ModelContext,
        prompted: PromptedTask,
        examples: Sequence[Example],
        workers: int = 0,
    ):
        self.model_ctx, self.prompted, self.examples, self.workers = (
            model_ctx,
            prompted,
            examples,
            workers,
        )
        self.lengths: dict[int, int] = {}  # tokens, by row
        self.asked: dict[int, Example] = {}  # without their pictures, by row
        self.shelf = loader.RowCache(len(examples))

    def order(self, rows: Sequence[int]) -> list[int]:
        """Long prompts first, so that one batch holds similar lengths and memory peaks at once."""
        look = lambda example: (
            self.model_ctx.processor.measure(self.prompted.messages(example))[0],
            dataclasses.replace(example, messages=[]),
        )
        new = list(dict.fromkeys(i for i in rows if i not in self.lengths))
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:
            found = threads.map(
                lambda i: loader.prepare_row([self.examples], look, RowRef(0, i, 0)), new
            )
            for i, (tokens, asked) in zip(new, found, strict=True):
                self.lengths[i], self.asked[i] = tokens, asked
        return sorted(rows, key=lambda i: (-self.lengths[i], i))

    def encoded(self, batches: Sequence[Sequence[int]]) -> Iterator[dict[int, EncodedConversation]]:
        """The prompts of each batch by row, made while the device answers the batch before."""
        form, words = (
            dataclasses.replace(self.prompted, pool=None),
            self.model_ctx.processor,
        )  # a pool does not pickle
        encode = lambda example: words.encode(form.messages(example), generation=True)
        workers = 0 if all(i in self.shelf.kept for rows in batches for i in rows) else self.workers
        with loader.open_reader([self.examples], encode, workers) as read:
            shelved = lambda rows: self.shelf.get(
                rows, lambda new: read([RowRef(0, i, 0) for i in new])
            )
            for rows, values in zip(batches, loader.prefetch_map(shelved, batches), strict=True):
                yield dict(zip(rows, values, strict=True))


def generate_responses(
    model_ctx: ModelContext,
    params: Params,
    eval_prompts: EvalPrompts,
    rows: Sequence[int],
    sampling: SamplingConfig,
    batch: int,
    key: jax.Array,
    bar: console.ProgressBar,
    prefix: Sequence[int] = (),
) -> tuple[list[str], WorkCost]:
    """Texts of all rows in their order; `prefix`: the tokens that each answer is made to begin with."""
    order = eval_prompts.order(rows)
    batch = max(
        model_ctx.shards, batch // jax.process_count() // model_ctx.shards * model_ctx.shards
    )
    batches = [order[start : start + batch] for start in range(0, len(order), batch)]
    found: dict[int, str] = {}
    spent = WorkCost()
    with contextlib.closing(eval_prompts.encoded(batches)) as coming:
        for mine, prompts in zip(batches, coming, strict=True):
            encoded = {
                i: append_response_prefix(prompt, prefix) if prefix else prompt
                for i, prompt in prompts.items()
            }
            filled = mine + [mine[-1]] * (batch - len(mine))  # a full batch has the compiled shape
            limits = np.where(np.arange(batch) < len(mine), sampling.max_new_tokens, 0)
            out = generate.sample_responses(
                model_ctx,
                params,
                [encoded[i] for i in filled],
                key,
                np.asarray(filled),
                sampling,
                limits=limits,
            )
            for i, text in zip(mine, out.texts, strict=False):
                found[i] = text
            spent += sampling_cost(
                model_ctx.cfg, [encoded[i] for i in mine], out.mask[: len(mine)].sum(1)[:, None]
            )
            bar.advance(len(mine))
    return [found[i] for i in rows], spent


def append_response_prefix(encoded: EncodedConversation, ids: Sequence[int]) -> EncodedConversation:
    """A prompt whose answer begins with these tokens."""
    n, start = len(ids), int(encoded.positions.max()) + 1
    text = np.broadcast_to(np.arange(start, start + n, dtype=encoded.positions.dtype), (3, n))
    more = dict(tokens=np.asarray(ids), types=np.zeros(n), loss_mask=np.zeros(n, bool))
    joined = {
        k: np.concatenate([getattr(encoded, k), v.astype(getattr(encoded, k).dtype)])
        for k, v in more.items()
    }
    return dataclasses.replace(
        encoded, positions=np.concatenate([encoded.positions, text], 1), **joined
    )


def rows_of_process(rows: Sequence[int]) -> list[int]:
    """The rows that this process answers; the last is answered again where the processes' shares would differ."""
    count, index = jax.process_count(), jax.process_index()
    share = -(-len(rows) // count)
    return [rows[min(i, len(rows) - 1)] for i in range(index * share, (index + 1) * share)]


def evaluate_task(
    model_ctx: ModelContext,
    params: Params,
    eval_prompts: EvalPrompts,
    rows: Sequence[int],
    *,
    sampling: SamplingConfig,
    batch: int,
    key: jax.Array,
    forced: bool = False,
    title: str = "",
) -> TaskResult:
    """Some rows of a task answered and scored."""
    prompted, mine = eval_prompts.prompted, rows_of_process(rows)
    params, sampling = generate.prepare_sampling(model_ctx, params, sampling)
    with console.progress_bar(
        title or f"evaluate {prompted.name}", total=len(mine) * (1 + forced)
    ) as bar:
        texts, spent = generate_responses(
            model_ctx, params, eval_prompts, mine, sampling, batch, key, bar
        )
        again: list[str] = []
        if forced:
            again, more = generate_responses(
                model_ctx,
                params,
                eval_prompts,
                mine,
                sampling,
                batch,
                key,
                bar,
                model_ctx.processor.opening(prompted.forced_prefix),
            )
            spent += more
    asked = [eval_prompts.asked[i] for i in mine]
    everyone = lambda found: _gather_by_row(rows, mine, found)
    further = {
        scorer: everyone(dataclasses.replace(prompted, scorer=scorer).score(texts, asked))
        for scorer in prompted.also
    }
    after = everyone(prompted.score(again, asked, forced=True)) if forced else []
    total = sum(distributed.gather_objects(spent), WorkCost())
    return TaskResult(
        prompted, everyone(prompted.score(texts, asked)), after, everyone(texts), total, further
    )


def _gather_by_row(rows: Sequence[int], mine: Sequence[int], found: Sequence[Any]) -> list[Any]:
    """What every process found, by row."""
    by_row = dict(
        distributed.concat_lists(distributed.gather_objects(list(zip(mine, found, strict=True))))
    )
    return [by_row[i] for i in rows]


def eval_rows(
    result: TaskResult, common: Mapping[str, Any], mini: bool = False
) -> list[dict[str, Any]]:
    """The lines of evals.csv."""
    own = {"task": result.prompted.name, "template": result.prompted.template.name, **common}
    line = lambda scorer, name, metric: {
        **own,
        "metric": name,
        "scorer": scorer.id,
        **metric._asdict(),
    }
    main = result.prompted.scorer
    summary = scorers.summarise_records(main, result.records)
    if mini:
        return [line(main, run_log.ACCURACY_MINI, summary[run_log.ACCURACY])]
    out = [line(main, name, metric) for name, metric in summary.items()]
    for scorer, records in result.also.items():
        out += [
            line(scorer, f"{scorer.name}/{name}", metric)
            for name, metric in scorers.summarise_records(scorer, records).items()
        ]
    if result.forced:
        out.append(
            line(
                main,
                run_log.ACCURACY_FORCED,
                summaries.mean_metric([r.score for r in result.forced]),
            )
        )
    return out


def prediction_rows(result: TaskResult, step: int) -> list[dict[str, Any]]:
    """The lines of predictions/stage{K}.jsonl."""
    return [
        {
            "task": result.prompted.name,
            "step": step,
            "id": r.id,
            "score": r.score,
            "prediction": r.prediction,
            "response": t,
            "answer": r.answer,
        }
        for r, t in zip(result.records, result.texts, strict=True)
    ]
