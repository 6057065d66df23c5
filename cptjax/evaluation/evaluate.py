"""Evaluate a model on one task: generate responses to the test rows and score them."""

import concurrent.futures
import contextlib
import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np

from cptjax.common import console, distributed, run_log
from cptjax.data import loader
from cptjax.data.collate import EncodedConversation
from cptjax.data.cost import WorkCost, sampling_cost
from cptjax.data.device_batches import cut_to_shards
from cptjax.data.mixture import RowRef
from cptjax.data.model_context import ModelContext
from cptjax.data.row_checks import CheckedRows
from cptjax.evaluation.judge import Judge
from cptjax.generation import generate
from cptjax.generation.sampling_config import SamplingConfig
from cptjax.tasks.prompted_task import PromptedTask
from cptjax.tasks.scoring import scorers, summaries
from cptjax.types import Example, Params

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """The scored responses of a model to the test rows of one task.

    With several samples per row, the responses to a row are adjacent.
    """

    prompted: PromptedTask
    records: list[scorers.ScoreRecord]
    forced_records: list[scorers.ScoreRecord]  # of responses after the forced prefix, if requested
    responses: list[str]
    cost: WorkCost  # of all processes, including the responses after the forced prefix
    # The records of the task's further scorers.
    extra_records: dict[scorers.Scorer, list[scorers.ScoreRecord]] = dataclasses.field(
        default_factory=dict
    )
    samples: int = 1  # responses per row


class EvalPrompts:
    """The test rows of a task as encoded prompts, for all evaluations of a run.

    Rows are measured once, and encoded one batch ahead of the device. Encoded rows are kept in
    memory if all of them fit.
    """

    def __init__(
        self,
        model_ctx: ModelContext,
        prompted: PromptedTask,
        examples: CheckedRows,
        workers: int = 0,
    ):
        self.model_ctx = model_ctx
        self.prompted = prompted
        self.examples = examples
        self.workers = workers
        self.lengths = examples.tokens.copy()  # by row; 0 = not measured yet
        # The examples of the encoded rows without their messages, for the scorers.
        self.scored: dict[int, Example] = {}
        self.row_cache = loader.RowCache(len(examples))

    def order_by_length(self, rows: Sequence[int]) -> list[int]:
        """Sort rows by length, longest first.

        A batch then has rows of similar length, and the first batch needs the most memory.
        """

        def measure(example: Example, _: int) -> int:
            return self.model_ctx.processor.measure(self.prompted.build_prompt(example))[0]

        def measure_row(row: int) -> int:
            return loader.prepare_row([self.examples], measure, RowRef(0, row))

        unmeasured = [i for i in dict.fromkeys(rows) if not self.lengths[i]]
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:
            self.lengths[unmeasured] = list(threads.map(measure_row, unmeasured))
        return sorted(rows, key=lambda i: (-self.lengths[i], i))

    def encode_batches(
        self, batches: Sequence[Sequence[int]]
    ) -> Iterator[dict[int, EncodedConversation]]:
        """Yield the encoded prompts of each batch by row; encode the next in the background."""
        prompted = dataclasses.replace(self.prompted, sandbox=None)  # a pool cannot be pickled
        processor = self.model_ctx.processor

        def encode(example: Example, _: int) -> tuple[EncodedConversation, Example]:
            encoded = processor.encode(prompted.build_prompt(example), generation=True)
            return encoded, dataclasses.replace(example, messages=[])

        all_kept = all(i in self.row_cache.values for rows in batches for i in rows)
        with loader.open_reader([self.examples], encode, 0 if all_kept else self.workers) as read:

            def encode_rows(rows: Sequence[int]) -> list[tuple[EncodedConversation, Example]]:
                return self.row_cache.get(rows, lambda new: read([RowRef(0, i) for i in new]))

            batches_encoded = loader.prefetch_map(encode_rows, batches)
            for rows, values in zip(batches, batches_encoded, strict=True):
                self.scored |= {i: example for i, (_, example) in zip(rows, values, strict=True)}
                yield {i: encoded for i, (encoded, _) in zip(rows, values, strict=True)}


def generate_responses(
    model_ctx: ModelContext,
    weights: Params,
    eval_prompts: EvalPrompts,
    rows: Sequence[int],
    sampling: SamplingConfig,
    batch: int,
    key: jax.Array,
    bar: console.ProgressBar,
    prefix: Sequence[int] = (),
) -> tuple[list[str], WorkCost]:
    """Generate responses to some rows, in the order of `rows`; those to a row are adjacent.

    Each response continues the tokens of `prefix`.
    """
    order = eval_prompts.order_by_length(rows)
    processes = jax.process_count()
    batch = cut_to_shards(batch, model_ctx.shards * processes) // processes
    batches = [order[start : start + batch] for start in range(0, len(order), batch)]
    responses: dict[int, list[str]] = {}
    cost = WorkCost()
    with contextlib.closing(eval_prompts.encode_batches(batches)) as encoded_batches:
        for batch_rows, prompts in zip(batches, encoded_batches, strict=True):
            encoded = {
                i: append_response_prefix(prompt, prefix) if prefix else prompt
                for i, prompt in prompts.items()
            }
            count = len(batch_rows)
            filled = batch_rows + [batch_rows[-1]] * (batch - count)  # to the compiled shape
            limits = np.where(np.arange(batch) < count, sampling.max_new_tokens, 0)
            samples = generate.sample_responses(
                model_ctx,
                weights,
                [encoded[i] for i in filled],
                key,
                np.asarray(filled),
                sampling,
                limits=limits,
            )
            texts = group_values(samples.texts[: count * sampling.group], sampling.group)
            responses |= zip(batch_rows, texts, strict=True)
            lengths = samples.mask[: count * sampling.group].sum(1).reshape(count, -1)
            cost += sampling_cost(model_ctx.cfg, [encoded[i] for i in batch_rows], lengths)
            bar.advance(count)
    return [text for i in rows for text in responses[i]], cost


def group_values(values: Sequence[T], size: int) -> list[list[T]]:
    """Cut a list into parts of `size` values."""
    return [list(values[i : i + size]) for i in range(0, len(values), size)]


def append_response_prefix(encoded: EncodedConversation, ids: Sequence[int]) -> EncodedConversation:
    """Append the tokens that a response must begin with to a prompt."""
    n, start = len(ids), int(encoded.positions.max()) + 1
    text = np.broadcast_to(np.arange(start, start + n, dtype=encoded.positions.dtype), (3, n))
    added = dict(tokens=np.asarray(ids), types=np.zeros(n), loss_mask=np.zeros(n, bool))
    fields = {
        name: np.concatenate([getattr(encoded, name), v.astype(getattr(encoded, name).dtype)])
        for name, v in added.items()
    }
    positions = np.concatenate([encoded.positions, text], 1)
    return dataclasses.replace(encoded, positions=positions, **fields)


def rows_of_process(rows: Sequence[int]) -> list[int]:
    """Return the rows of this process.

    The last row is repeated so that all processes have the same number of rows.
    """
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
    judge: Judge | None = None,
    title: str = "",
) -> TaskResult:
    """Generate and score responses to some rows of a task.

    `forced` also generates responses that continue the forced prefix. With `judge`, its verdicts
    on the responses are scored, and no response is forced.
    """
    forced = forced and not judge
    prompted, own_rows = eval_prompts.prompted, rows_of_process(rows)
    weights = generate.prepare_weights(model_ctx, params, sampling)
    total = len(own_rows) * (1 + forced)
    with console.progress_bar(title or f"evaluate {prompted.name}", total=total) as bar:

        def respond(prefix: Sequence[int] = ()) -> tuple[list[str], WorkCost]:
            return generate_responses(
                model_ctx, weights, eval_prompts, own_rows, sampling, batch, key, bar, prefix
            )

        responses, cost = respond()
        forced_responses: list[str] = []
        if forced:
            prefix = model_ctx.processor.prefix_ids(prompted.forced_prefix)
            forced_responses, forced_cost = respond(prefix)
            cost += forced_cost
    examples = [eval_prompts.scored[i] for i in own_rows for _ in range(sampling.group)]
    predictions = responses
    if judge:
        questions = [judged_prompt(example) for example in examples]
        predictions, judge_cost = judge(questions, responses, [e.id for e in examples])
        cost += judge_cost

    def gather(values: Sequence[T]) -> list[T]:
        """Gather the values of all processes, in the order of `rows`."""
        pairs = list(zip(own_rows, group_values(values, sampling.group), strict=True))
        by_row = dict(distributed.concat_lists(distributed.gather_objects(pairs)))
        return [value for i in rows for value in by_row[i]]

    extra_records = {
        scorer: gather(dataclasses.replace(prompted, scorer=scorer).score(predictions, examples))
        for scorer in prompted.extra_scorers
    }
    forced_records = (
        gather(prompted.score(forced_responses, examples, forced=True)) if forced else []
    )
    return TaskResult(
        prompted,
        records=gather(prompted.score(predictions, examples)),
        forced_records=forced_records,
        responses=gather(responses),
        cost=sum(distributed.gather_objects(cost), WorkCost()),
        extra_records=extra_records,
        samples=sampling.group,
    )


def summarise_samples(
    scorer: scorers.Scorer, records: Sequence[scorers.ScoreRecord], samples: int
) -> dict[str, summaries.Metric]:
    """Summarise the records of rows with several samples each.

    A metric is the mean over the samples. The standard error of the accuracy is that of the rows'
    means; that of another metric is the mean over the samples, an upper bound. `pass@K` is the
    share of rows with a right sample.
    """
    if samples == 1:
        return scorers.summarise_records(scorer, records)
    by_sample = [scorers.summarise_records(scorer, records[k::samples]) for k in range(samples)]
    names = dict.fromkeys(name for metrics in by_sample for name in metrics)
    metrics = {}
    for name in names:
        values, counts, errors = zip(*(m[name] for m in by_sample if name in m), strict=True)
        metrics[name] = summaries.Metric(np.mean(values), max(counts), np.mean(errors))
    scores = group_values([r.score for r in records], samples)
    return metrics | {
        run_log.ACCURACY: summaries.mean_metric(np.mean(scores, 1)),
        f"pass@{samples}": summaries.mean_metric(np.max(scores, 1)),
    }


def judged_prompt(example: Example) -> str:
    """Return the text that a judge reads as the request."""
    if not isinstance(prompt := example.meta.get("prompt"), str):
        raise ValueError(
            f"{example.id}: a judge reads the request in the column `prompt`, "
            f"got {', '.join(map(str, example.meta)) or 'no columns'}"
        )
    return prompt


def eval_rows(
    result: TaskResult, columns: Mapping[str, Any], mini: bool = False
) -> list[dict[str, Any]]:
    """Return rows of evals.csv; `columns` are those that all rows of an evaluation share."""
    task, main = result.prompted.name, result.prompted.scorer
    shared = {"task": task, "template": result.prompted.template.name, **columns}

    def row(scorer: scorers.Scorer, name: str, metric: summaries.Metric) -> dict[str, Any]:
        return {**shared, "metric": name, "scorer": scorer.id, **metric._asdict()}

    metrics = summarise_samples(main, result.records, result.samples)
    if mini:
        return [row(main, run_log.ACCURACY_MINI, metrics[run_log.ACCURACY])]
    rows = [row(main, name, metric) for name, metric in metrics.items()]
    for scorer, records in result.extra_records.items():
        for name, metric in summarise_samples(scorer, records, result.samples).items():
            rows.append(row(scorer, f"{scorer.name}/{name}", metric))
    if result.forced_records:
        scores = group_values([r.score for r in result.forced_records], result.samples)
        metric = summaries.mean_metric(np.mean(scores, 1))
        rows.append(row(main, run_log.ACCURACY_FORCED, metric))
    return rows


def prediction_rows(result: TaskResult, step: int) -> list[dict[str, Any]]:
    """Return the rows of predictions/stage{K}.jsonl."""
    return [
        {
            "task": result.prompted.name,
            "step": step,
            "id": record.id,
            "score": record.score,
            "prediction": record.prediction,
            "response": response,
            "answer": record.answer,
        }
        for record, response in zip(result.records, result.responses, strict=True)
    ]
