"""A user's task: columns, settings, ids, held-out shares, sources."""

import cloudpickle
import pytest
from row_helpers import load, row, write

from cptjax.tasks.registry import resolve_task


def test_unknown_columns_and_settings_name_the_nearest(folder):
    source = write(folder, {"questions": "a", "label": "b"})
    with pytest.raises(
        ValueError,
        match="no column 'question'; did you mean 'questions'.; it has questions, label; set columns.prompt",
    ):
        load(source, columns={"prompt": "question"})
    with pytest.raises(ValueError, match="no column 'prompt'; it has questions, label"):
        load(source)
    with pytest.raises(ValueError, match="no column 'labels'; did you mean 'label'"):
        load(source, prompt="{questions} {labels}")
    with pytest.raises(ValueError, match="unknown role 'prompts'; did you mean 'prompt'"):
        load(source, columns={"prompts": "questions"})
    with pytest.raises(ValueError, match="unknown setting 'scorrer'; did you mean 'scorer'"):
        load(source, scorrer="exact")
    (example,) = load(write(folder, row(extra=1)))
    assert example.meta == {"extra": 1}


def test_duplicate_ids(folder):
    examples = load(write(folder, row(id="x"), row(id="y"), row(id="x"), row(id=7), row(id=7)))
    assert [(bad.row, bad.reason) for bad in examples.bad] == [
        (3, "the id 'x' is already in use by an earlier row"),
        (5, "the id '7' is already in use by an earlier row"),
    ]
    assert [e.id for e in load(write(folder, row(), row()))] == ["train.jsonl:1", "train.jsonl:2"]


def test_a_share_held_out_is_the_same_tenth_whatever_the_seed_and_the_bad_rows(folder):
    rows = [{"id": f"r{n}", "prompt": "q", "answer": str(n)} for n in range(100)]
    ids = lambda split, source, **options: [e.id for e in load(source, split, test=0.1, **options)]
    train, test = (ids(split, write(folder, *rows)) for split in ("train", "test"))
    assert len(test) == 10 and sorted(train + test) == sorted(r["id"] for r in rows)
    assert ids("test", write(folder, *rows), seed=5) == test
    shuffled = write(folder, *reversed(rows))
    assert sorted(ids("test", shuffled)) == sorted(test)
    worse = [r | {"answer": ""} if r["id"] == test[0] else r for r in rows]
    assert (
        ids("test", write(folder, *worse)) == test[1:]
        and ids("train", write(folder, *worse)) == train
    )
    limited = ids("train", write(folder, *rows), limit=20)
    assert len(limited) == 20 and set(limited) < set(train)


def test_sources_that_make_no_sense_are_one_line(folder):
    with pytest.raises(
        ValueError, match="no/such/file.jsonl: no such file or folder, nor a hub dataset"
    ):
        load("no/such/file.jsonl")
    with pytest.raises(
        ValueError,
        match="train.txt: expected a data file that ends in .jsonl, .json, .csv, .parquet",
    ):
        load(write(folder, row(), name="train.txt"))
    with pytest.raises(
        ValueError,
        match="tasks.mine.test: expected a file, folder or hub id, or a share of train between 0 and 1; got 1.5",
    ):
        load(write(folder, row()), test=1.5)
    with pytest.raises(ValueError, match="tasks.mine: give train, test or both"):
        resolve_task("mine", {"mine": {"scorer": "exact"}})
    with pytest.raises(ValueError, match="task mine: no test data; it has train"):
        load(write(folder, row()), "test")
    with pytest.raises(ValueError, match="no rows for train"):
        load(write(folder))
    (folder / "broken.json").write_text('[{"prompt": ')
    with pytest.raises(ValueError, match="broken.json: not JSON"):
        load(str(folder / "broken.json"))


def test_settings_pass_through_to_the_task_and_examples_to_workers(folder):
    task = resolve_task(
        "mine",
        {
            "mine": {
                "test": write(folder, row()),
                "reward": "my.py:reward",
                "scorer": "my.py:score",
                "template": "t.jinja",
            }
        },
    )
    assert (task.name, task.reward, task.scorer, task.template) == (
        "mine",
        "my.py:reward",
        "my.py:score",
        "t.jinja",
    )
    assert cloudpickle.loads(cloudpickle.dumps(task.load("test")))[0].answer == "red"
