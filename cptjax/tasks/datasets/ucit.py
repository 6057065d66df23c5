"""UCIT (HiDe-LLaVA, arXiv 2503.12941; MCITlib): six tasks of recognition, diagrams and captions.

Put the instructions of the hub dataset HaiyangGuo/UCIT and the images of its sources in
data.root/UCIT, in the folders of MCITlib or of HiDe-LLaVA:

    UCIT/ImageNet-R/train.json            or UCIT/instructions/ImageNet-R/train.json
        [{"id": ..., "image": "path in datasets/", "conversations": [
            {"from": "human", "value": question}, {"from": "gpt", "value": answer}]}, ...]
    UCIT/ImageNet-R/test.json             or .../test_3000.json
        [{"question_id": ..., "image": "path in datasets/", "text": question, "answer": answer}]
    UCIT/VizWiz/val_coco_type_3000.json   also of Flickr30k: the captions of the test images, as
        {"images": [...], "annotations": [{"image_id": 1, "caption": ...}, ...]}
    UCIT/datasets/

The image goes before the question, which brings its own instruction. In the captions, image_id k is
the k-th row of the test file. The score is the released one, equality without case; of captions,
ROUGE-L, with BLEU, CIDEr and their mean as further metrics. The released mean also has METEOR,
whose scorer is a Java program.
"""

import functools
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cptjax.common.images import open_image
from cptjax.tasks import released_files
from cptjax.tasks.task import Task, user_turn
from cptjax.types import Example

DATASET = "HaiyangGuo/UCIT"
FOLDERS = {  # part -> names of its folder
    "imagenet_r": ("ImageNet-R",),
    "arxivqa": ("ArxivQA",),
    "vizwiz": ("VizWiz", "VizWiz-caption"),
    "iconqa": ("IconQA",),
    "clevr_math": ("CLEVR-Math", "CLEVR"),
    "flickr30k": ("Flickr30k", "Flickr30k-cap"),
}
CAPTIONS = ("vizwiz", "flickr30k")
FILES = {
    "train": ("train.json", "train_4w.json", "train_brief_4w.json"),
    "test": ("test.json", "test_3000.json"),
}
CAPTION_FILE = "val_coco_type_3000.json"


def list_paths(part: str, files: Sequence[str]) -> tuple[str, ...]:
    """Return the paths that a file of a part may have."""
    places = [f"{top}{name}" for top in ("", "instructions/", "UCIT/") for name in FOLDERS[part]]
    return tuple(f"{place}/{file}" for place in places for file in files)


def build_example(row: dict[str, Any], images: Path) -> Example:
    """Return the example of a row in the form of the training or of the test files."""
    (image,) = released_files.read_columns(row, "image")
    if "conversations" in row:
        question, answer = released_files.read_conversation_turns(row)
    elif "captions" in row:
        (question,), answer = released_files.read_columns(row, "text"), row["captions"]
    else:
        question, answer = released_files.read_columns(row, "text", "answer")
    return Example(
        "",  # the ids of some parts repeat
        user_turn(
            "<image>\n" + question.replace("<image>", "").strip(), [open_image(image, images)]
        ),
        answer,
        answer if isinstance(answer, str) else answer[0],
    )


def load_split(
    name: str,
    release: released_files.Release,
    part: str,
    split: str,
    root: str = "",
    limit: int | None = None,
    seed: int = 0,
) -> Sequence[Example]:
    folder = released_files.find_release(name, release, root)
    rows = released_files.read_rows(name, release, folder, split)
    if split == "test" and part in CAPTIONS:
        path = released_files.find_path(name, folder, list_paths(part, (CAPTION_FILE,)))
        rows = add_captions(rows, path)
    return released_files.make_examples(
        name, release, folder, split, rows, build_example, limit, seed
    )


def add_captions(rows: Sequence[dict[str, Any]], path: Path) -> list[dict[str, Any]]:
    """Return the test rows with the captions of their images."""
    captions = defaultdict(list)
    for annotation in json.loads(path.read_text(encoding="utf-8"))["annotations"]:
        captions[annotation["image_id"]].append(annotation["caption"])
    missing = [k for k in range(1, len(rows) + 1) if k not in captions]
    if missing:
        raise ValueError(
            f"{path}: expected captions of image_id 1 to {len(rows)}, one for each test row; "
            f"got none of {missing[0]}; download the corrected file"
        )
    return [row | {"captions": captions[k]} for k, row in enumerate(rows, 1)]


def make_task(name: str, part: str = "", **fields: Any) -> Task:
    """Return the task of one part of UCIT."""
    if part not in FOLDERS:
        raise ValueError(f"tasks.{name}.part={part!r}: choose one of {', '.join(FOLDERS)}")
    release = released_files.Release(
        DATASET,
        {split: list_paths(part, files) for split, files in FILES.items()},
        ("datasets", "UCIT/datasets"),
    )
    own = {"scorer": "caption" if part in CAPTIONS else "ucit"}
    return Task(name, functools.partial(load_split, name, release, part), **{**own, **fields})
