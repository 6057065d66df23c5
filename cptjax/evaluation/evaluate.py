"""Evaluate a model on one task: generate and score responses, or measure likelihoods of answers."""

import concurrent.futures
import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np

from cptjax import sharding
from cptjax.common import console, distributed, run_log
from cptjax.data import loader
from cptjax.data.collate import EncodedConversation, round_up_size
from cptjax.data.cost import WorkCost, image_flops, sampling_cost
from cptjax.data.device_batches import (
    MIN_RESPONSE_BUCKET,
    cut_to_shards,
    group_batch,
    max_over_processes,
)
from cptjax.data.mixture import RowRef
from cptjax.data.model_context import ModelContext
from cptjax.data.row_checks import CheckedRows
from cptjax.evaluation.judge import Judge
from cptjax.generation import generate
from cptjax.generation.sampling_config import SamplingConfig
from cptjax.models import flops, logprobs
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
    # Of the gold answers after the forced prefix, if requested and the task has such answers.
    gold_probabilities: list[float] = dataclasses.field(default_factory=list)


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

    def batches(
        self, rows: Sequence[int], size: int
    ) -> Iterator[tuple[list[int], list[int], dict[int, EncodedConversation]]]:
        """Cut rows into batches of about `size` over all processes, those of long prompts first.

        Yield the rows of each batch, the same with its last row repeated up to the compiled shape,
        and the encoded prompts by row.
        """
        order = self.order_by_length(rows)
        processes = jax.process_count()
        size = cut_to_shards(size, self.model_ctx.shards * processes) // processes
        parts = [order[start : start + size] for start in range(0, len(order), size)]
        with contextlib.closing(self.encode_batches(parts)) as encoded_batches:
            for part, encoded in zip(parts, encoded_batches, strict=True):
                yield part, part + [part[-1]] * (size - len(part)), encoded


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
    responses: dict[int, list[str]] = {}
    cost = WorkCost()
    with contextlib.closing(eval_prompts.batches(rows, batch)) as batches:
        for batch_rows, filled, prompts in batches:
            encoded = {
                i: append_response_prefix(prompt, prefix) if prefix else prompt
                for i, prompt in prompts.items()
            }
            count = len(batch_rows)
            limits = np.where(np.arange(len(filled)) < count, sampling.max_new_tokens, 0)
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


def score_continuations(
    model_ctx: ModelContext,
    params: Params,
    eval_prompts: EvalPrompts,
    rows: Sequence[int],
    continuation: Callable[[Example], tuple[str, str]],
    *,
    batch: int,
    chunk: int,
    bar: console.ProgressBar,
) -> tuple[list[float], WorkCost]:
    """Return the log-probability of a text that continues the prompt of each row, and the cost.

    `continuation` returns the start of the response and the text after it, which alone counts.
    """
    program = logprobs.make_scoring_program(model_ctx.cfg, model_ctx.dtype, chunk, 1.0)
    processor = model_ctx.processor
    logps: dict[int, float] = {}
    cost = WorkCost()
    with contextlib.closing(eval_prompts.batches(rows, batch)) as batches:
        for batch_rows, filled, encoded in batches:
            texts = [continuation(eval_prompts.scored[i]) for i in filled]
            given = [processor.prefix_ids(prefix) if prefix else [] for prefix, _ in texts]
            scored = [processor.ids(text) for _, text in texts]
            lengths = [len(g) + len(s) for g, s in zip(given, scored, strict=True)]
            # One of few sizes, so that few programs are compiled.
            length = max(MIN_RESPONSE_BUCKET, round_up_size(max_over_processes(max(lengths))))
            tokens = np.zeros((len(filled), length), np.int32)
            mask = np.zeros(tokens.shape, bool)
            for row, (before, after) in enumerate(zip(given, scored, strict=True)):
                tokens[row, : lengths[row]] = [*before, *after]
                mask[row, len(before) : lengths[row]] = True
            prompts = model_ctx.place_prompts([encoded[i] for i in filled])
            placed = group_batch(model_ctx, prompts, tokens, mask, extra={})
            with jax.set_mesh(model_ctx.mesh):
                by_token = sharding.local_rows(program(params, placed))
            count = len(batch_rows)
            logps |= zip(batch_rows, by_token.sum(1)[:count].tolist(), strict=True)
            read = sum(len(encoded[i]) for i in batch_rows) + sum(lengths[:count])
            targets = int(mask[:count].sum())
            work = flops.text_forward_flops(model_ctx.cfg, count, read / count, targets / count)
            work += sum(image_flops(model_ctx.cfg, encoded[i]) for i in batch_rows)
            cost += WorkCost(flops=work, seen=read)
            bar.advance(count)
    return [logps[i] for i in rows], cost


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


@dataclasses.dataclass(frozen=True)
class RowResponses:
    """What a model gives for the rows of this process."""

    responses: list[str]  # `sampling.group` for each row
    forced: list[str]  # continuations of the forced prefix
    gold_logps: list[float]  # of the gold answer after the forced prefix, one for each row
    cost: WorkCost


def respond_to_rows(
    model_ctx: ModelContext,
    params: Params,
    eval_prompts: EvalPrompts,
    rows: Sequence[int],
    *,
    sampling: SamplingConfig,
    batch: int,
    key: jax.Array,
    chunk: int,
    forced: bool,
    gold: bool,
    title: str,
) -> RowResponses:
    """Generate responses and measure likelihoods; the arguments are those of `evaluate_task`."""
    prompted = eval_prompts.prompted
    weights = generate.prepare_weights(model_ctx, params, sampling)
    total = len(rows) * (1 + forced + gold)
    with console.progress_bar(title, total=total) as bar:

        def respond(prefix: Sequence[int] = ()) -> tuple[list[str], WorkCost]:
            return generate_responses(
                model_ctx, weights, eval_prompts, rows, sampling, batch, key, bar, prefix
            )

        score = functools.partial(
            score_continuations,
            model_ctx,
            params,
            eval_prompts,
            rows,
            batch=batch,
            chunk=chunk,
            bar=bar,
        )
        if prompted.scorer.reads == "likelihood":
            logps, cost = score(lambda example: ("", str(example.answer)))
            responses = [str(logp) for logp in logps]
        else:
            responses, cost = respond()
        forced_responses: list[str] = []
        if forced:
            prefix = model_ctx.processor.prefix_ids(prompted.forced_prefix)
            forced_responses, forced_cost = respond(prefix)
            cost += forced_cost
        gold_logps: list[float] = []
        if gold and have_one_answer(eval_prompts, rows):
            gold_logps, gold_cost = score(prompted.gold_continuation)
            cost += gold_cost
    return RowResponses(responses, forced_responses, gold_logps, cost)


def evaluate_task(
    model_ctx: ModelContext,
    params: Params,
    eval_prompts: EvalPrompts,
    rows: Sequence[int],
    *,
    sampling: SamplingConfig,
    batch: int,
    key: jax.Array,
    chunk: int = 1024,
    forced: bool = False,
    gold: bool = False,
    judge: Judge | None = None,
    title: str = "",
) -> TaskResult:
    """Generate and score responses to some rows of a task.

    `forced` also generates responses that continue the forced prefix, and `gold` also measures the
    probability of the gold answer there. With `judge`, its verdicts on the responses are scored,
    and neither is done. For a task that is scored by likelihood nothing is generated: its responses
    are log-probabilities. The logits of `chunk` tokens are in memory at a time.
    """
    prompted, own_rows = eval_prompts.prompted, rows_of_process(rows)
    if prompted.scorer.reads != "response":
        forced = gold = False
    if prompted.scorer.reads == "likelihood":
        sampling = dataclasses.replace(sampling, group=1)
    given = respond_to_rows(
        model_ctx,
        params,
        eval_prompts,
        own_rows,
        sampling=sampling,
        batch=batch,
        key=key,
        chunk=chunk,
        forced=forced,
        gold=gold,
        title=title or f"evaluate {prompted.name}",
    )
    examples = [eval_prompts.scored[i] for i in own_rows for _ in range(sampling.group)]
    predictions, cost = given.responses, given.cost
    if judge:
        questions = [judged_prompt(example) for example in examples]
        predictions, judge_cost = judge(questions, given.responses, [e.id for e in examples])
        cost += judge_cost

    def gather(values: Sequence[T], of_row: int = sampling.group) -> list[T]:
        """Gather the values of all processes, `of_row` for each row, in the order of `rows`."""
        pairs = list(zip(own_rows, group_values(values, of_row), strict=True))
        by_row = dict(distributed.concat_lists(distributed.gather_objects(pairs)))
        return [value for i in rows for value in by_row[i]]

    extra_records = {
        scorer: gather(dataclasses.replace(prompted, scorer=scorer).score(predictions, examples))
        for scorer in prompted.extra_scorers
    }
    forced_records = gather(prompted.score(given.forced, examples, forced=True)) if forced else []
    return TaskResult(
        prompted,
        records=gather(prompted.score(predictions, examples)),
        forced_records=forced_records,
        responses=gather(given.responses),
        cost=sum(distributed.gather_objects(cost), WorkCost()),
        extra_records=extra_records,
        samples=sampling.group,
        gold_probabilities=gather(np.exp(given.gold_logps).tolist(), 1) if given.gold_logps else [],
    )


def have_one_answer(eval_prompts: EvalPrompts, rows: Sequence[int]) -> bool:
    """Return whether the answer of each row of all processes is one text or number."""
    answers = [eval_prompts.scored[i].answer for i in rows]
    is_one = [isinstance(a, str | int | float) and not isinstance(a, bool) for a in answers]
    return all(distributed.gather_objects(all(is_one)))


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
    if result.gold_probabilities:
        metric = summaries.mean_metric(result.gold_probabilities)
        rows.append(row(main, run_log.GOLD_PROBABILITY, metric))
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
