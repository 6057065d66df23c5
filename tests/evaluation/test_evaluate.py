"""Evaluation without a model: a sampler that repeats its prompt shows what is asked, in which batches, and how much is in memory."""

import types

import jax
import numpy as np
import pytest

from cptjax.common import console
from cptjax.data import processor
from cptjax.data.row_checks import CheckedRows
from cptjax.evaluation import evaluate
from cptjax.generation import generate
from cptjax.generation.sampling_config import SamplingConfig
from cptjax.models.config import PRESETS
from cptjax.tasks import prompted_task
from cptjax.tasks.scoring.sandbox import SandboxPool
from cptjax.tasks.synthetic import dataset
from cptjax.tasks.task import Examples, user_turn
from cptjax.types import Example

ROWS = 22


@pytest.fixture
def desk(monkeypatch):
    """A runtime whose sampler says the prompt's last words; `told` keeps the batches, `made` counts encoded prompts."""
    words = processor.load_processor(None, PRESETS["tiny"], 1024, 1024)
    model_ctx = types.SimpleNamespace(processor=words, cfg=PRESETS["tiny"], shards=1)
    metrics, made = [], []

    def sample(model_ctx, params, encoded, key, rows, sampling, **more):
        metrics.append((rows.tolist(), [len(e) for e in encoded], len(made)))
        texts = words.decode([e.tokens[-12:] for e in encoded])
        return types.SimpleNamespace(texts=texts, mask=np.ones((len(encoded), 4), bool))

    def encode(self, *args, **kwargs):
        made.append(1)
        return plain(self, *args, **kwargs)

    plain = processor.Processor.encode
    monkeypatch.setattr(processor.Processor, "encode", encode)
    monkeypatch.setattr(generate, "sample_responses", sample)
    monkeypatch.setattr(generate, "prepare_weights", lambda model_ctx, params, sampling: params)
    return model_ctx, metrics, made


def examined(model_ctx, ctx, workers=0, rows=range(ROWS), forced=False, times=1):
    weights = types.SimpleNamespace(accuracy=0.9, format=0.1, on_error="stop")
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
        eval_prompts.row_cache.max_bytes = ctx
        key, sampling = jax.random.key(0), SamplingConfig(1, 4, 0.0, 1)
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


def test_answers_are_the_same_kept_or_made_again_and_memory_is_bounded(desk):
    console.set_console_mode("silent")
    model_ctx, metrics, made = desk
    exams = [examined(model_ctx, ctx, times=2, forced=True) for ctx in (1 << 29, 0)]
    passes, size = 2 * 2, -(-ROWS // 4)  # two evaluations, free and forced; batches of each
    assert len(metrics) == 2 * passes * size and len(made) == ROWS + passes * ROWS
    assert (
        exams[0].responses == exams[1].responses
        and exams[0].records == exams[1].records
        and exams[0].forced_records == exams[1].forced_records
    )
    assert [r.id for r in exams[0].records] == [f"digits/test/{i}" for i in range(ROWS)]
    for number, (rows, lengths, count) in enumerate(metrics[passes * size :]):
        before, batch = divmod(number, size)
        assert len(rows) == 4 and (
            not batch or metrics[passes * size + number - 1][1][-1] >= lengths[0] >= lengths[-1]
        )
        assert count - ROWS * (1 + before) <= 4 * (
            batch + 2
        )  # up to this batch and the one after it
    assert {scorer.name: len(records) for scorer, records in exams[0].extra_records.items()} == {
        "contains": ROWS
    }


def test_some_rows_are_asked_as_they_are_among_all(desk):
    console.set_console_mode("silent")
    model_ctx, metrics, _ = desk
    every, some = examined(model_ctx, 0), examined(model_ctx, 0, rows=[3, 17, 9])
    assert some.responses == [every.responses[i] for i in (3, 17, 9)] and {
        row for rows, *_ in metrics[-1:] for row in rows
    } == {3, 9, 17}


def test_a_row_that_can_not_be_asked_is_named(desk, monkeypatch):
    console.set_console_mode("silent")

    def refuse(self, *args, **kwargs):
        raise ValueError("too long")

    monkeypatch.setattr(processor.Processor, "measure", refuse)
    with pytest.raises(ValueError, match="digits/test/0: too long"):
        examined(desk[0], 0)
