"""A user's data files: every container, and lines that cannot be read."""

import csv
import json
import re

import datasets
import pytest
from PIL import Image
from row_helpers import RED, bad_rows, load, only_bad, pixel, row, write

from cptjax.common.images import open_image
from cptjax.tasks.task import example_text


def image_size(example, turn=0, part=0):
    return open_image(example.messages[turn]["content"][part]["image"]).size


def as_json(folder):
    (folder / "d.json").write_text(
        json.dumps({"data": [row(), row(images="b.jpg", answer="blue")]})
    )
    return "d.json"


def as_csv(folder):
    with open(folder / "d.csv", "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file)
        writer.writerows(
            [
                ["prompt", "images", "answer"],
                ["<image>What colour?", "a.png", "red"],
                ["<image>What colour?", '["b.jpg"]', "blue"],
            ]
        )
    return "d.csv"


def as_parquet(folder):
    features = datasets.Features(
        {
            "prompt": datasets.Value("string"),
            "images": datasets.List(datasets.Image()),
            "answer": datasets.Value("string"),
        }
    )
    rows = [row(images=[str(folder / "a.png")]), row(images=[str(folder / "b.jpg")], answer="blue")]
    datasets.Dataset.from_list(rows, features=features).to_parquet(folder / "d.parquet")
    return "d.parquet"


def as_folder(folder):
    write(
        folder,
        {"file_name": "a.png", "prompt": "<image>What colour?", "answer": "red"},
        {"file_name": "b.jpg", "prompt": "<image>What colour?", "answer": "blue"},
        name="metadata.jsonl",
    )
    return "."


def as_saved_dataset(folder):
    datasets.Dataset.from_list(
        [row(images=[str(folder / "a.png")]), row(images=[str(folder / "b.jpg")], answer="blue")]
    ).save_to_disk(folder / "saved")
    return "saved"


def as_json_lines_named_json(folder):
    return write(folder, row(), row(images=["b.jpg"], answer="blue"), name="d.json").rpartition(
        "/"
    )[2]


@pytest.mark.parametrize(
    "container",
    [as_json, as_csv, as_parquet, as_folder, as_saved_dataset, as_json_lines_named_json],
)
def test_every_container_gives_the_same_examples(folder, container):
    examples = load(str(folder / container(folder)), outside=(str(folder),))
    assert bad_rows(examples) == []
    assert [(example_text(e), e.answer, e.target) for e in examples] == [
        ("<image>What colour?", "red", "red"),
        ("<image>What colour?", "blue", "blue"),
    ]
    assert pixel(examples[0]) == RED and image_size(examples[1]) == (8, 12)


def test_a_folder_of_classes_needs_only_a_question(folder):
    (folder / "pets" / "cat").mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(folder / "pets" / "cat" / "1.png")
    (example,) = load(str(folder / "pets"), prompt="<image>Which animal?")
    assert (example_text(example), example.answer) == ("<image>Which animal?", "cat")


def test_a_hub_dataset_by_id_config_and_split(folder, monkeypatch):
    asked = []

    def hub(name, config, split):
        asked.append((name, config, split))
        return datasets.Dataset.from_list([{"question": "Why?", "image": None, "label": 3}])

    monkeypatch.setattr(datasets, "load_dataset", hub)
    (example,) = load("org/name:small@dev", columns={"answer": "label"})
    assert asked == [("org/name", "small", "dev")] and (example_text(example), example.answer) == (
        "Why?",
        "3",
    )


def test_a_mistyped_path_is_not_read_as_a_hub_dataset(folder, monkeypatch):
    asked = []
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda name, *_, **__: asked.append(name) or datasets.Dataset.from_list([row(images=[])]),
    )
    monkeypatch.chdir(folder)
    (folder / "data").mkdir()
    write(folder / "data", row())
    for wrong, near in (
        ("data/trian", ""),
        ("data/train.json", "; did you mean data/train.jsonl?"),
        ("./train.jsonl/x", ""),
        ("dta/train.jsonl", ""),
        ("dat", "; did you mean data?"),
    ):
        with pytest.raises(ValueError, match=f"{wrong}: no such file or folder.*{re.escape(near)}"):
            load(wrong)
    with pytest.raises(ValueError, match="folder data/ exists.*: write hf:data/trian for that"):
        load("data/trian")
    assert not asked
    load("hf:data/trian"), load("org/name"), load("hf:org/name.json")
    assert asked == ["data/trian", "org/name", "org/name.json"]


def test_bad_json_lines(folder):
    examples = load(write(folder, row(), '{"prompt": "cut', "", "[1, 2]", row()))
    assert len(examples) == 2
    assert [(bad.row, bad.reason.partition(" (")[0]) for bad in examples.bad] == [
        (2, "not JSON in UTF-8"),
        (4, "expected an object {...}, got list"),
    ]
    (folder / "latin.jsonl").write_bytes(json.dumps(row()).encode() + b'\n{"prompt": "caf\xe9"}\n')
    assert only_bad(load(str(folder / "latin.jsonl"))).row == 2


def test_bad_csv_rows(folder):
    (folder / "d.csv").write_text('prompt,answer\n"one\nline",1\na,b,c\nonly\n')
    examples = load(str(folder / "d.csv"))
    assert example_text(examples[0]) == "one\nline"
    assert [(bad.row, bad.reason.split(";")[0]) for bad in examples.bad] == [
        (4, "more fields than the header's 2"),
        (5, "fewer fields than the header's 2"),
    ]
