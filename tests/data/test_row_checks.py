"""A row is prepared once: its image is decoded once per check and use; token counts are kept."""

import collections
import json
import types

import datasets
import numpy as np
import pytest
from PIL import Image

from configs.base import get_config
from cptjax.common import console
from cptjax.data import row_checks
from cptjax.data.datasets import Datasets
from cptjax.data.loader import LocalReader
from cptjax.data.mixture import RowRef
from cptjax.data.processor import load_processor
from cptjax.data.prompts import make_example_encoder
from cptjax.evaluation.evaluate import EvalPrompts
from cptjax.models.families import PRESETS

LIMIT, ROWS = 128, 6


@pytest.fixture(autouse=True)
def _silent():
    console.set_console_mode("silent")
    yield
    console.set_console_mode("auto")


@pytest.fixture
def opened(monkeypatch):
    """Count how often each image file, or each image in memory, is opened."""
    counts, plain = collections.Counter(), Image.open

    def count_open(source, *args, **kwargs):
        key = source.getvalue() if hasattr(source, "getvalue") else str(source)
        counts[key] += 1
        return plain(source, *args, **kwargs)

    monkeypatch.setattr(Image, "open", count_open)
    return counts


def user_config(folder):
    lines = []
    for i in range(ROWS):
        Image.new("RGB", (64, 64), (10 * i, 0, 0)).save(folder / f"{i}.png")
        prompt = "<image>what colour?" + " red" * (i % 3)
        lines.append(json.dumps({"prompt": prompt, "images": [f"{i}.png"], "answer": "red"}))
    (folder / "rows.jsonl").write_text("\n".join(lines))
    c = get_config()
    c.model.update(min_pixels=1024, max_pixels=4096)
    c.data.update(template="direct", prompt_limit=LIMIT)
    with c.unlocked():
        c.tasks.mine = {"train": str(folder / "rows.jsonl"), "test": str(folder / "rows.jsonl")}
    return c


def load(c, task, split, folder):
    """The checked rows of a split, its prompted task and the model context of a new run."""
    processor = load_processor(None, PRESETS["tiny"], 1024, 4096)
    model_ctx = types.SimpleNamespace(processor=processor, buckets=(LIMIT,))
    run_datasets = Datasets(c, model_ctx, None, folder, recording=True)
    return (
        run_datasets.examples(task, split, c),
        run_datasets.prompted_task(task, c),
        model_ctx,
    )


def test_an_image_of_a_test_row_is_opened_once_to_check_it_and_once_to_use_it(tmp_path, opened):
    c = user_config(tmp_path)
    rows, prompted, model_ctx = load(c, "mine", "test", tmp_path)
    assert len(opened) == ROWS and set(opened.values()) == {1}
    eval_prompts = EvalPrompts(model_ctx, prompted, rows)
    order = eval_prompts.order_by_length(range(ROWS))
    assert set(opened.values()) == {1}
    for _ in range(2):  # small sets stay in memory from one evaluation to the next
        encoded = {i: e for batch in eval_prompts.encode_batches([order]) for i, e in batch.items()}
    assert len(opened) == ROWS and set(opened.values()) == {2}
    assert [len(encoded[i]) for i in range(ROWS)] == rows.tokens.tolist()
    assert order == sorted(range(ROWS), key=lambda i: (-len(encoded[i]), i))
    assert eval_prompts.scored[0].answer == "red" and not eval_prompts.scored[0].messages


@pytest.mark.parametrize("kept", [True, False])
def test_an_image_of_a_training_row_is_opened_once_an_epoch(tmp_path, opened, kept):
    c = user_config(tmp_path)
    c.method.update(source="gold", objective="sft")
    rows, prompted, model_ctx = load(c, "mine", "train", tmp_path)
    reader = LocalReader([rows], make_example_encoder(model_ctx, {"mine": prompted}, True, LIMIT))
    if not kept:
        reader.row_cache.max_bytes = 0
    for epoch in (1, 2):
        items = reader([RowRef(0, i) for i in range(ROWS)])
        assert set(opened.values()) == {2 if kept else 1 + epoch}
    assert [len(item.encoded) for item in items] == rows.tokens.tolist()
    assert [item.row for item in items] == list(range(ROWS))


@pytest.mark.parametrize(
    ("split", "source", "is_bad"),
    [("test", "gold", True), ("train", "rollouts", True), ("train", "self", True),
     ("train", "gold", False)],
)  # fmt: skip
def test_a_gold_answer_that_cannot_be_scored_is_a_bad_row(tmp_path, split, source, is_bad):
    c = user_config(tmp_path)
    c.method.source = source
    with c.unlocked():
        c.tasks.mine.scorer = "numeric"
    spec = row_checks.split_spec(c, "mine", split)
    bad = row_checks.check_split(c, spec, None, None).bad
    assert len(bad) == (ROWS if is_bad else 0)
    assert not is_bad or "expected a number as the answer, got 'red'" in bad[0].reason


def test_checked_rows_hold_no_pixels(tmp_path):
    rows, _, _ = load(user_config(tmp_path), "mine", "test", tmp_path)
    assert rows[0] is rows[0]
    assert rows[0].messages[0]["content"][0]["image"] == tmp_path / "0.png"


def test_token_counts_of_a_public_dataset_are_stored_with_its_bad_rows(
    tmp_path, opened, monkeypatch
):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    c = user_config(tmp_path)
    c.data.update(root=str(tmp_path), bad_rows=1)
    images = [(tmp_path / f"{i}.png").read_bytes() for i in range(4)]
    images[1] = images[1][:60]
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "question": datasets.Value("string"),
            "answer": datasets.Value("string"),
        }
    )
    values = [
        {"image": {"bytes": data, "path": None}, "question": "what" + " red" * i, "answer": "x"}
        for i, data in enumerate(images)
    ]
    (tmp_path / "path-vqa").mkdir()
    datasets.Dataset.from_list(values, features=features).to_parquet(
        tmp_path / "path-vqa" / "test.parquet"
    )
    rows, prompted, model_ctx = load(c, "pathvqa", "test", tmp_path)
    assert [rows.where(i)[1] for i in range(len(rows))] == [0, 2, 3] and (rows.tokens > 0).all()
    assert len(list((tmp_path / "rows").iterdir())) == 1
    opened.clear()
    again, _, _ = load(c, "pathvqa", "test", tmp_path)
    assert np.array_equal(again.tokens, rows.tokens)
    EvalPrompts(model_ctx, prompted, again).order_by_length(range(3))
    assert not opened
    encoded = [model_ctx.processor.encode(prompted.build_prompt(row)) for row in again]
    assert [len(e) for e in encoded] == rows.tokens.tolist()


def test_only_the_first_synthetic_rows_are_checked_and_the_others_are_measured_when_used(tmp_path):
    c = user_config(tmp_path)
    c.eval.limit = 100
    rows, prompted, model_ctx = load(c, "synthetic_colour", "test", tmp_path)
    checked = row_checks.SYNTHETIC_ROWS_CHECKED
    assert (rows.tokens[:checked] > 0).all() and not rows.tokens[checked:].any()
    eval_prompts = EvalPrompts(model_ctx, prompted, rows)
    eval_prompts.order_by_length([70])
    assert eval_prompts.lengths[70] > 0 and not eval_prompts.lengths[71]


def test_a_task_that_needs_other_pixel_limits_is_refused(tmp_path):
    c = user_config(tmp_path)
    with c.unlocked():
        c.tasks.boxes = {"task": "refcoco", "min_pixels": 3136, "max_pixels": 50176}
    with pytest.raises(ValueError, match="but the model sees 1024 to 4096"):
        row_checks.resolve_config_task(c, "boxes")
    c.tasks.boxes.update(min_pixels=1024, max_pixels=4096)
    with pytest.raises(ValueError, match="patches of 14 pixels, but the model's have 8"):
        row_checks.resolve_config_task(c, "boxes")
