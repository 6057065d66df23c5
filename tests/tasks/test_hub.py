"""Public datasets, from the hub or a copy on disk: files, splits, limits, lazy images."""

import cloudpickle
import datasets
import numpy as np
import pytest
from hub_fixtures import FIXTURES, POPE, write
from row_helpers import bad_rows

from cptjax.common import console, files
from cptjax.tasks.hub import HubSource, find_split_files
from cptjax.tasks.registry import BUILT_IN_TASKS
from cptjax.tasks.task import example_text


def test_the_hub_and_a_copy_on_disk_give_the_same_examples(tmp_path, monkeypatch):
    tables, text, answer, _ = FIXTURES["pathvqa"]
    whole = datasets.Dataset.from_list(tables[0][2], features=tables[0][1])
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config, split: whole)
    hub = BUILT_IN_TASKS["pathvqa"].load("test")[0]
    monkeypatch.undo()
    datasets.DatasetDict(test=whole).save_to_disk(tmp_path / "path-vqa")
    disk = BUILT_IN_TASKS["pathvqa"].load("test", root=str(tmp_path))[0]
    assert example_text(hub) == example_text(disk) == text and hub.answer == answer
    assert np.array_equal(
        hub.messages[0]["content"][0]["image"], disk.messages[0]["content"][0]["image"]
    )


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch):
    def refuse(*args, **kwargs):
        raise ConnectionError("no\nroute")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(
        files.TryAgain,
        match=r"hiyouga/geometry3k: the hub does not answer \(no route\); run the same command again, "
        "or put a copy under data.root",
    ):
        BUILT_IN_TASKS["geometry3k"].load("train")


def test_a_missing_copy_and_a_missing_split_name_what_was_looked_for(tmp_path):
    with pytest.raises(ValueError, match=r"data.root='nowhere': no such folder"):
        BUILT_IN_TASKS["pope"].load("test", root="nowhere")
    write(tmp_path, FIXTURES["pope"][0])
    with pytest.raises(ValueError, match="task pope: no split 'train'; it has test"):
        BUILT_IN_TASKS["pope"].load("train", root=str(tmp_path))
    write(tmp_path, FIXTURES["geometry3k"][0])
    with pytest.raises(
        ValueError, match=r"no data files of split 'train' .* found test-00000-of-00001.parquet"
    ):
        BUILT_IN_TASKS["geometry3k"].load("train", root=str(tmp_path))


def test_a_dataset_without_a_copy_comes_from_the_hub(tmp_path, monkeypatch, capsys):
    whole = datasets.Dataset.from_list(FIXTURES["pope"][0][0][2], features=POPE)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config, split: whole)
    console.set_console_mode("plain")
    for _ in range(2):
        assert len(BUILT_IN_TASKS["pope"].load("test", root=str(tmp_path))) == 1
    console.set_console_mode("auto")
    said = "".join(capsys.readouterr().err.split())
    assert said.count("lmms-lab/POPE:nocopyunderdata.root(lookedfor") == 1


@pytest.mark.parametrize(
    ("files", "source", "own"),
    [  # as the repositories on the hub are laid out
        (
            ["ifeval_input_data.jsonl", "README.md"],
            HubSource("google/IFEval", "train"),
            "ifeval_input_data.jsonl",
        ),
        (
            ["data/train-00000-of-00001.parquet", "algebra/train-00000-of-00001.parquet"],
            HubSource("MATH-lighteval", "train"),
            "data/train-00000-of-00001.parquet",
        ),
        (
            ["default/train-00000-of-00001.parquet", "algebra/train-00000-of-00001.parquet"],
            HubSource("MATH-lighteval", "train"),
            "default/train-00000-of-00001.parquet",
        ),
        (
            ["all/test-00000-of-00001.parquet", "anatomy/test-00000-of-00001.parquet"],
            HubSource("cais/mmlu", "test", "all"),
            "all/test-00000-of-00001.parquet",
        ),
        (
            ["dataset_infos.json", "test.jsonl"],
            HubSource("HuggingFaceH4/MATH-500", "test"),
            "test.jsonl",
        ),
    ],
)
def test_the_files_of_a_split_in_a_copied_repository(files, source, own, tmp_path):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert find_split_files(tmp_path, source) == [str(tmp_path / own)]


def test_an_image_is_decoded_only_when_its_example_is_accessed(tmp_path):
    broken = {"image": {"bytes": b"no image", "path": None}, "question": "q", "answer": "yes"}
    write(
        tmp_path,
        [("path-vqa/test", FIXTURES["pathvqa"][0][0][1], [*FIXTURES["pathvqa"][0][0][2], broken])],
    )
    examples = BUILT_IN_TASKS["pathvqa"].load("test", root=str(tmp_path))
    assert len(examples) == 2 and examples[0].answer == "yes"
    with pytest.raises(ValueError, match="pathvqa/test, row 1: image: not an image"):
        examples[1]
    assert [str(bad).partition(" (")[0] for bad in bad_rows(examples)] == [
        "pathvqa/test:1: image: not an image that can be read"
    ]


def test_examples_survive_the_trip_to_a_worker_process(tmp_path):
    for name in ("gqa", "mmlu_pro", "refcoco"):
        write(tmp_path, FIXTURES[name][0])
        examples = BUILT_IN_TASKS[name].load("test", root=str(tmp_path))
        assert example_text(cloudpickle.loads(cloudpickle.dumps(examples))[0]) == example_text(
            examples[0]
        )


def test_a_limit_is_a_seeded_subset_and_smaller_limits_are_nested(tmp_path):
    write(tmp_path, FIXTURES["superclevr"][0])
    task = BUILT_IN_TASKS["superclevr"]
    ids = lambda **options: [
        example.id for example in task.load("train", root=str(tmp_path), **options)
    ]
    assert ids(limit=5) == ids(limit=5) and set(ids(limit=5)) < set(ids(limit=9)) < set(ids())
    assert ids(limit=5, seed=1) != ids(limit=5)


def test_divided_splits_cover_the_rows_without_overlap(tmp_path):
    write(tmp_path, FIXTURES["superclevr"][0])
    write(tmp_path, FIXTURES["countdown"][0])
    for name, rows in (("superclevr", 20), ("countdown", 10)):
        train, test = (
            BUILT_IN_TASKS[name].load(split, root=str(tmp_path)) for split in ("train", "test")
        )
        assert sorted([*train.order, *test.order]) == list(range(rows)) and len(test) == 1
