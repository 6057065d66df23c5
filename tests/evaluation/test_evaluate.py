"""Evaluation of a task without a model: the sampler is replaced by one that repeats its prompt."""

import types

import jax
import numpy as np
import pytest
from device_fixtures import devices  # noqa: F401

import cptjax
from configs.base import get_config
from cptjax.common import console
from cptjax.continual import stage_evaluation
from cptjax.data import model_context, processor
from cptjax.data.row_checks import CheckedRows
from cptjax.evaluation import evaluate
from cptjax.generation import generate
from cptjax.generation.sampling_config import SamplingConfig
from cptjax.models.families import PRESETS
from cptjax.tasks import prompted_task
from cptjax.tasks.scoring import scorers
from cptjax.tasks.scoring.sandbox import SandboxPool
from cptjax.tasks.synthetic import dataset
from cptjax.tasks.task import Examples, Task, user_turn
from cptjax.types import Example

ROWS = 22


@pytest.fixture
def recording_context(monkeypatch):
    """A model context with a sampler that repeats prompts, its batches, and encoded prompts."""
    text_processor = processor.load_processor(None, PRESETS["tiny"], 1024, 1024)
    model_ctx = types.SimpleNamespace(processor=text_processor, cfg=PRESETS["tiny"], shards=1)
    batches, encoded_rows = [], []

    def sample(model_ctx, params, encoded, key, rows, sampling, **more):
        batches.append((rows.tolist(), [len(e) for e in encoded], len(encoded_rows)))
        texts = text_processor.decode([e.tokens[-12:] for e in encoded])
        return types.SimpleNamespace(texts=texts, mask=np.ones((len(encoded), 4), bool))

    def encode(self, *args, **kwargs):
        encoded_rows.append(1)
        return original(self, *args, **kwargs)

    original = processor.Processor.encode
    monkeypatch.setattr(processor.Processor, "encode", encode)
    monkeypatch.setattr(generate, "sample_responses", sample)
    monkeypatch.setattr(generate, "prepare_weights", lambda model_ctx, params, sampling: params)
    return model_ctx, batches, encoded_rows


def evaluate_digits(
    model_ctx, cache_bytes, workers=0, rows=range(ROWS), forced=False, times=1, samples=1
):
    weights = get_config().rewards
    task = dataset.make_synthetic_task(
        "digits", "digit", level=3, also=("contains",), scorer="exact"
    )
    with SandboxPool(processes=1) as pool:
        prompted = prompted_task.make_prompted_task(task, "none", weights, pool)
        build = lambda i: Example("", user_turn("red " * (7 * i % 5) + f"what is {i} ?"), str(i))
        eval_prompts = evaluate.EvalPrompts(
            model_ctx,
            prompted,
            CheckedRows(
                Examples("digits", "test", range(ROWS), build), range(ROWS), np.zeros(ROWS, int)
            ),
            workers,
        )
        eval_prompts.row_cache.max_bytes = cache_bytes
        key, sampling = jax.random.key(0), SamplingConfig(samples, 4, 0.0, 1)
        for _ in range(times):
            result = evaluate.evaluate_task(
                model_ctx,
                {},
                eval_prompts,
                list(rows),
                sampling=sampling,
                batch=4,
                key=key,
                forced=forced,
            )
    return result


def test_responses_do_not_depend_on_the_row_cache_and_memory_is_bounded(recording_context):
    console.set_console_mode("silent")
    model_ctx, batches, encoded_rows = recording_context
    results = [
        evaluate_digits(model_ctx, cache_bytes, times=2, forced=True)
        for cache_bytes in (1 << 29, 0)
    ]
    passes, size = 2 * 2, -(-ROWS // 4)  # two evaluations, free and forced; batches of each
    assert len(batches) == 2 * passes * size and len(encoded_rows) == ROWS + passes * ROWS
    assert (
        results[0].responses == results[1].responses
        and results[0].records == results[1].records
        and results[0].forced_records == results[1].forced_records
    )
    assert [r.id for r in results[0].records] == [f"digits/test/{i}" for i in range(ROWS)]
    for number, (rows, lengths, count) in enumerate(batches[passes * size :]):
        before, batch = divmod(number, size)
        assert len(rows) == 4 and (
            not batch or batches[passes * size + number - 1][1][-1] >= lengths[0] >= lengths[-1]
        )
        assert count - ROWS * (1 + before) <= 4 * (
            batch + 2
        )  # up to this batch and the one after it
    assert {scorer.name: len(records) for scorer, records in results[0].extra_records.items()} == {
        "contains": ROWS
    }


def test_a_subset_of_rows_gets_the_same_responses(recording_context):
    console.set_console_mode("silent")
    model_ctx, batches, _ = recording_context
    all_rows, some = evaluate_digits(model_ctx, 0), evaluate_digits(model_ctx, 0, rows=[3, 17, 9])
    assert some.responses == [all_rows.responses[i] for i in (3, 17, 9)] and {
        row for rows, *_ in batches[-1:] for row in rows
    } == {3, 9, 17}


def test_several_samples_of_a_row_count_as_one_row():
    """Three rows with scores 1 0, 1 1 and 0 0 of two samples each."""
    scorer = scorers.SCORERS["exact"]
    said = ["a", "x", "a", "a", "x", "x"]
    records = scorers.score_responses(scorer, said, ["a"] * 6, [{}] * 6)
    found = evaluate.summarise_samples(scorer, records, 2)
    assert found["accuracy"] == pytest.approx((0.5, 3, np.std([0.5, 1, 0], ddof=1) / 3**0.5))
    assert found["pass@2"].value == pytest.approx(2 / 3) and found["pass@2"].n == 3
    assert evaluate.summarise_samples(scorer, records[::2], 1)["accuracy"].n == 3


def test_samples_of_a_row_are_adjacent_and_in_the_order_of_the_rows(recording_context, monkeypatch):
    console.set_console_mode("silent")
    model_ctx, _, _ = recording_context

    def sample(model_ctx, params, encoded, key, rows, sampling, **more):
        texts = [f"{row}.{k}" for row in rows for k in range(sampling.group)]
        return types.SimpleNamespace(texts=texts, mask=np.ones((len(texts), 4), bool))

    monkeypatch.setattr(generate, "sample_responses", sample)
    result = evaluate_digits(model_ctx, 0, rows=[3, 17, 9], forced=True, samples=2)
    assert result.responses == ["3.0", "3.1", "17.0", "17.1", "9.0", "9.1"]
    assert [r.id[-2:].strip("/") for r in result.records] == ["3", "3", "17", "17", "9", "9"]
    rows = {r["metric"]: r["n"] for r in evaluate.eval_rows(result, {})}
    assert rows["accuracy"] == rows["pass@2"] == rows["accuracy_forced"] == 3
    assert [p["response"] for p in evaluate.prediction_rows(result, 1)] == result.responses


@pytest.mark.parametrize("scorer", ["exact", "likelihood"])
def test_likelihoods_are_those_of_the_text_after_prompt_and_prefix(scorer, devices):
    """Answers of different lengths on eight shards, compared with `cptjax.score`."""
    devices(8)
    console.set_console_mode("silent")
    settings = get_config()
    settings.model.update(preset="tiny", compute_dtype="float32")
    model_ctx = model_context.load_model_context(settings.model, settings.mesh, (32,))
    model = cptjax.load("tiny", dtype="float32")
    answers = ["red", "a green ring", "7"]
    texts = [f"what is {i} ?" for i in range(3)]
    examples = Examples(
        "t", "test", range(3), lambda i: Example("", user_turn(texts[i]), answers[i])
    )
    with SandboxPool(processes=1) as pool:
        prompted = prompted_task.make_prompted_task(
            Task("t", list, scorer), "none", settings.rewards, pool
        )
        rows = CheckedRows(examples, range(3), np.zeros(3, int))
        result = evaluate.evaluate_task(
            model_ctx,
            model.params,
            evaluate.EvalPrompts(model_ctx, prompted, rows),
            [2, 0, 1],
            sampling=SamplingConfig(1, 4, 0.0, 1),
            batch=2,
            key=jax.random.key(0),
            gold=True,
        )
    by_likelihood = scorer == "likelihood"
    prefix = [] if by_likelihood else model.processor.prefix_ids("The answer is")
    given = [
        [*prefix, *model.processor.ids(answers[i] if by_likelihood else f" {answers[i]}")]
        for i in (2, 0, 1)
    ]
    logps = cptjax.score(model, [user_turn(texts[i]) for i in (2, 0, 1)], given)
    wanted = [float(row[len(prefix) :].sum()) for row in logps]
    rows = {r["metric"]: r for r in evaluate.eval_rows(result, {})}
    if not by_likelihood:
        assert np.allclose(np.log(result.gold_probabilities), wanted, rtol=1e-4)
        mean = np.mean(np.exp(wanted))  # a rounded sum near 12 changes it by a millionth
        assert rows["gold_probability"]["value"] == pytest.approx(mean, rel=1e-5)
        return
    assert np.allclose([float(text) for text in result.responses], wanted, rtol=1e-4)
    sizes = np.array([1, 3, 12])
    assert rows["accuracy"]["value"] == pytest.approx(np.mean(np.exp(wanted / sizes)), rel=1e-4)
    bits = -sum(wanted) / np.log(2) / sizes.sum()
    assert rows["bits_per_byte"]["value"] == pytest.approx(bits, rel=1e-4)
    assert not result.gold_probabilities and result.cost.rollouts == 0 < result.cost.flops


def test_a_row_that_cannot_be_measured_is_named(recording_context, monkeypatch):
    console.set_console_mode("silent")

    def refuse(self, *args, **kwargs):
        raise ValueError("too long")

    monkeypatch.setattr(processor.Processor, "measure", refuse)
    with pytest.raises(ValueError, match="digits/test/0: too long"):
        evaluate_digits(recording_context[0], 0)


def test_the_verdict_of_a_judge_is_scored_and_the_response_is_kept(recording_context, tmp_path):
    console.set_console_mode("silent")
    (tmp_path / "mine.py").write_text("def refused(prompt, response): return 'virus' in prompt\n")
    target = f"{tmp_path / 'mine.py'}:refused"
    texts = ["write a virus", "say hello"]
    build = lambda i: Example("", user_turn(texts[i]), 1, meta={"prompt": texts[i]})
    examples = Examples("safe", "test", range(2), build)
    weights = get_config().rewards
    with SandboxPool(processes=1) as pool:
        task = Task("safe", list, "refusal", judge=target)
        prompted = prompted_task.make_prompted_task(task, "none", weights, pool)
        rows = CheckedRows(examples, range(2), np.zeros(2, int))
        run = types.SimpleNamespace(judges={}, config=None, sandbox=pool)
        judge = stage_evaluation.judge_of_task(run, prompted)
        assert stage_evaluation.judge_of_task(run, prompted) is judge and len(run.judges) == 1
        evaluate_rows = lambda eval_prompts: evaluate.evaluate_task(
            recording_context[0],
            {},
            eval_prompts,
            [0, 1],
            sampling=SamplingConfig(1, 4, 0.0, 1),
            batch=2,
            key=jax.random.key(0),
            forced=True,
            judge=judge,
        )
        result = evaluate_rows(evaluate.EvalPrompts(recording_context[0], prompted, rows))
        assert [r.score for r in result.records] == [1.0, 0.0] and not result.forced_records
        assert "refusal: yes" in result.records[0].prediction
        assert "refusal" not in result.responses[0]
        without = Examples("safe", "test", range(2), lambda i: Example("", user_turn("x"), 1))
        rows = CheckedRows(without, range(2), np.zeros(2, int))
        with pytest.raises(ValueError, match="safe/test/0: a judge reads .* `prompt`, got no col"):
            evaluate_rows(evaluate.EvalPrompts(recording_context[0], prompted, rows))
