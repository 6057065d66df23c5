"""Every public dataset, from a few rows in its exact schema: the same code path as the real files, the expected prompt and gold answer."""

import itertools
import json
import logging
import types

import cloudpickle
import datasets
import numpy as np
import pytest
from datasets import ClassLabel, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image, ImageDraw
from row_helpers import bad_rows

from cptjax.common import console
from cptjax.common.images import ImageSettings
from cptjax.tasks import prompted_task
from cptjax.tasks.datasets import countdown, ifeval, jigsaw
from cptjax.tasks.hub import HubSource, find_split_files
from cptjax.tasks.registry import BUILT_IN_TASKS, TASK_MAKERS, resolve_task
from cptjax.tasks.scoring import scorers
from cptjax.tasks.scoring.instructions import follows_constraint
from cptjax.tasks.scoring.puzzles import evaluate_arithmetic
from cptjax.tasks.task import content_text, example_text, most_frequent, user_turn

STRING, INT, IMAGE = Value("string"), Value("int64"), ImageFeature()


def drawn(size=(40, 30), colour="teal"):
    image = Image.new("RGB", size, "white")
    ImageDraw.Draw(image).rectangle((4, 4, size[0] // 2, size[1] // 2), fill=colour)
    return image


def strings(*names):
    return dict.fromkeys(names, STRING)


TEN = ["nokia"] * 6 + ["Nokia 3310", "phone", "nokia phone", "no idea"]
SCIENCE = Features(
    {"image": IMAGE, "question": STRING, "choices": List(STRING), "answer": Value("int8")}
    | strings(
        "hint", "task", "grade", "subject", "topic", "category", "skill", "lecture", "solution"
    )
)
SCIENCE_ROW = dict.fromkeys(
    ("task", "grade", "subject", "topic", "category", "skill", "lecture", "solution"), "x"
)
TEXTVQA = Features(
    {
        "image_id": STRING,
        "question_id": Value("int32"),
        "question": STRING,
        "question_tokens": List(STRING),
        "image": IMAGE,
        "image_width": Value("int32"),
        "image_height": Value("int32"),
        "flickr_original_url": STRING,
        "flickr_300k_url": STRING,
        "answers": List(STRING),
        "image_classes": List(STRING),
        "set_name": STRING,
        "ocr_tokens": List(STRING),
    }
)
TEXTVQA_ROW = {
    "image_id": "003a8ae2ef43b901",
    "question_id": 34602,
    "question": "what is the BRAND of this phone?",
    "question_tokens": ["what"],
    "image": drawn(),
    "image_width": 40,
    "image_height": 30,
    "flickr_original_url": "",
    "flickr_300k_url": "",
    "answers": TEN,
    "image_classes": ["Belt"],
    "set_name": "val",
    "ocr_tokens": ["NOKIA", "3310"],
}
VIZWIZ = Features(
    {
        "question_id": STRING,
        "image": IMAGE,
        "question": STRING,
        "answers": List(STRING),
        "category": STRING,
    }
)
GQA = Features(
    {
        **strings("id", "imageId", "question", "answer", "fullAnswer"),
        "isBalanced": Value("bool"),
        "groups": strings("global", "local"),
        "entailed": STRING,
        "equivalent": STRING,
        "types": strings("structural", "semantic", "detailed"),
        "annotations": {
            k: List(strings("objectId", "value")) for k in ("question", "answer", "fullAnswer")
        },
        "semantic": List(strings("operation", "argument") | {"dependencies": List(Value("int32"))}),
        "semanticStr": STRING,
    }
)
GQA_ROW = {
    "id": "201307251",
    "imageId": "n161313",
    "question": "Is it overcast?",
    "answer": "no",
    "fullAnswer": "No, it is clear.",
    "isBalanced": True,
    "groups": {"global": None, "local": "13-weather"},
    "entailed": "",
    "equivalent": "201307251",
    "types": {"structural": "verify", "semantic": "global", "detailed": "weatherVerify"},
    "annotations": {"question": [], "answer": [], "fullAnswer": []},
    "semantic": [{"operation": "select", "argument": "scene", "dependencies": []}],
    "semanticStr": "select: scene",
}
MMMU = Features(
    strings("id", "question", "options", "explanation")
    | {f"image_{n}": IMAGE for n in range(1, 8)}
    | strings("img_type", "answer", "topic_difficulty", "question_type", "subfield")
)
MMMU_ROW = {
    "id": "validation_Art_Theory_3",
    "question": "What does <image 1> share with <image 2>?",
    "options": "['its age', '<image 3>']",
    "explanation": "",
    **{f"image_{n}": drawn((20 + n, 20)) if n < 4 else None for n in range(1, 8)},
    "img_type": "['Paintings']",
    "answer": "B",
    "topic_difficulty": "Easy",
    "question_type": "multiple-choice",
    "subfield": "Art Theory",
}
MMLU_PRO = Features(
    {
        "question_id": INT,
        "question": STRING,
        "options": List(STRING),
        "answer": STRING,
        "answer_index": INT,
    }
    | strings("cot_content", "category", "src")
)
POPE = Features(
    strings("id", "question_id", "question", "answer", "image_source")
    | {"image": IMAGE, "category": STRING}
)
MMLU = Features(
    {
        "question": STRING,
        "subject": STRING,
        "choices": List(STRING),
        "answer": ClassLabel(names=["A", "B", "C", "D"]),
    }
)
DOCVQA = Features(
    {
        "questionId": INT,
        "question": STRING,
        "question_types": List(STRING),
        "image": IMAGE,
        "docId": INT,
        "ucsf_document_id": STRING,
        "ucsf_document_page_no": STRING,
        "answers": List(STRING),
    }
)
REFCOCO = Features(
    {
        "question_id": STRING,
        "image": IMAGE,
        "question": STRING,
        "answer": List(STRING),
        "segmentation": List(Value("float32")),
        "bbox": List(Value("float32")),
        "iscrowd": Value("int8"),
        "file_name": STRING,
    }
)
SUPERCLEVR = Features(
    {
        "id": STRING,
        "image": IMAGE,
        "conversations": List(strings("from", "value")),
        "data_source": STRING,
    }
)
HINT = "Hint: Please answer the question and provide the final answer at the end.\nQuestion: "


def pro_row(number, answer="B"):
    return {
        "question_id": number,
        "question": f"Which is {number}?",
        "options": ["one", "two", "three"],
        "answer": answer,
        "answer_index": 1,
        "cot_content": f"A: Let's think step by step. It is two. The answer is ({answer}).",
        "category": "math",
        "src": "x",
    }


# task -> files (path under the root, features, rows), then what its first test example must be: text, answer, target
FIXTURES = {
    "scienceqa": (
        [
            (
                "derek-thomas__ScienceQA/data/test-00000-of-00001",
                SCIENCE,
                [
                    {
                        "image": None,
                        "question": "No image?",
                        "choices": ["a", "b"],
                        "answer": 0,
                        "hint": "",
                        **SCIENCE_ROW,
                    },
                    {
                        "image": drawn(),
                        "question": "Which is north?",
                        "choices": ["up", "down"],
                        "answer": 1,
                        "hint": "See it.",
                        **SCIENCE_ROW,
                    },
                ],
            )
        ],
        "<image>Context: See it.\nWhich is north?\nA. up\nB. down",
        "B",
        "B",
    ),
    "textvqa": (
        [("lmms-lab__textvqa/data/validation-00000-of-00001", TEXTVQA, [TEXTVQA_ROW])],
        "<image>What is the brand of this phone?",
        TEN,
        "nokia",
    ),
    "cpt7_textvqa": (
        [("lmms-lab__textvqa/data/validation-00000-of-00001", TEXTVQA, [TEXTVQA_ROW])],
        "<image>What is the brand of this phone?\nReference OCR token: NOKIA, 3310",
        "nokia",
        "nokia",
    ),
    "vizwiz": (
        [
            (
                "lmms-lab__VizWiz-VQA/data/val-00000-of-00001",
                VIZWIZ,
                [
                    {
                        "question_id": "VizWiz_val_0",
                        "image": drawn(),
                        "question": "what is this?",
                        "answers": ["unanswerable"] * 7 + ["mug"] * 3,
                        "category": "unanswerable",
                    },
                ],
            )
        ],
        "<image>What is this?",
        ["unanswerable"] * 7 + ["mug"] * 3,
        "unanswerable",
    ),
    "gqa": (
        [
            ("lmms-lab__GQA/testdev_balanced_instructions/testdev-00000-of-00001", GQA, [GQA_ROW]),
            (
                "lmms-lab__GQA/testdev_balanced_images/testdev-00000-of-00001",
                Features({"id": STRING, "image": IMAGE}),
                [{"id": "n1", "image": drawn((10, 10))}, {"id": "n161313", "image": drawn()}],
            ),
        ],
        "<image>Is it overcast?",
        "no",
        "no",
    ),
    "geometry3k": (
        [
            (
                "hiyouga__geometry3k/data/test-00000-of-00001",
                Features({"images": List(IMAGE), "problem": STRING, "answer": STRING}),
                [{"images": [drawn()], "problem": "<image>Find x.", "answer": "2 \\sqrt { 221 }"}],
            )
        ],
        "<image>Find x.",
        "2 \\sqrt { 221 }",
        "2 \\sqrt { 221 }",
    ),
    "pathvqa": (
        [
            (
                "flaviagiammarino__path-vqa/data/test-00000-of-00001",
                Features({"image": IMAGE, "question": STRING, "answer": STRING}),
                [{"image": drawn(), "question": "is the liver shown?", "answer": "yes"}],
            )
        ],
        "<image>is the liver shown?",
        "yes",
        "yes",
    ),
    "superclevr": (
        [
            (
                "lmms-lab__LLaVA-OneVision-Data/Super-CLEVR(MathV360K)/train-00000-of-00001",
                SUPERCLEVR,
                [
                    {
                        "id": str(n),
                        "image": drawn(),
                        "data_source": "Super-CLEVR(MathV360K)",
                        "conversations": [
                            {"from": "human", "value": f"<image>\n{HINT}How many?"},
                            {"from": "gpt", "value": "The answer is 3."},
                        ],
                    }
                    for n in range(20)
                ],
            )
        ],
        f"<image>{HINT}How many?",
        "3",
        "3",
    ),
    "mmmu": (
        [("lmms-lab__MMMU/data/validation-00000-of-00001", MMMU, [MMMU_ROW])],
        "What does <image> share with <image>?\nA. its age\nB. <image>",
        "B",
        "B",
    ),
    "mmlu_pro": (
        [
            ("TIGER-Lab__MMLU-Pro/data/test-00000-of-00001", MMLU_PRO, [pro_row(70)]),
            (
                "TIGER-Lab__MMLU-Pro/data/validation-00000-of-00001",
                MMLU_PRO,
                [pro_row(1), pro_row(2, "C")],
            ),
        ],
        "The following are multiple choice questions (with answers) about math. Think step by step and then finish your answer with "
        '"the answer is (X)" where X is the correct letter choice.\n\n'
        "Question:\nWhich is 1?\nOptions:\nA. one\nB. two\nC. three\nAnswer: Let's think step by step. It is two. The answer is (B).\n\n"
        "Question:\nWhich is 2?\nOptions:\nA. one\nB. two\nC. three\nAnswer: Let's think step by step. It is two. The answer is (C).\n\n"
        "Question:\nWhich is 70?\nOptions:\nA. one\nB. two\nC. three\nAnswer: Let's think step by step.",
        "B",
        "B",
    ),
    "cpt7_mmlu_pro": (
        [("TIGER-Lab__MMLU-Pro/data/test-00000-of-00001", MMLU_PRO, [pro_row(70)])],
        "Which is 70?\nA. one\nB. two\nC. three",
        "B",
        "B",
    ),
    "pope": (
        [
            (
                "lmms-lab__POPE/data/test-00000-of-00001",
                POPE,
                [
                    {
                        "id": "0",
                        "question_id": "1",
                        "question": "Is there a snowboard in the image?",
                        "answer": "yes",
                        "image_source": "COCO_val2014_000000310196",
                        "image": drawn(),
                        "category": "adversarial",
                    }
                ],
            )
        ],
        "<image>Is there a snowboard in the image?",
        "yes",
        "yes",
    ),
    "mmlu": (
        [
            (
                "cais__mmlu/all/test-00000-of-00001",
                MMLU,
                [
                    {
                        "question": " What is 2+2? ",
                        "subject": "elementary_mathematics",
                        "choices": ["1", "2", "3", "4"],
                        "answer": 3,
                    }
                ],
            )
        ],
        "What is 2+2?\nA. 1\nB. 2\nC. 3\nD. 4",
        "D",
        "D",
    ),
    "countdown": (
        [
            (
                "Jiayi-Pan__Countdown-Tasks-3to4/data/train-00000-of-00001",
                Features({"target": INT, "nums": List(INT)}),
                [{"target": 98, "nums": [44, 19, 35]}] * 10,
            )
        ],
        "Use the numbers 44, 19, 35 to make an expression that equals 98. You may use +, -, *, / and brackets, "
        "and every number exactly once.",
        98,
        "",
    ),
    "math": (
        [
            (
                "HuggingFaceH4__MATH-500/test",
                Features(
                    strings("problem", "solution", "answer", "subject", "unique_id")
                    | {"level": INT}
                ),
                [
                    {
                        "problem": "Convert $(0,3)$.",
                        "solution": "So \\boxed{x}.",
                        "answer": "\\left( 3, \\frac{\\pi}{2} \\right)",
                        "subject": "Algebra",
                        "level": 2,
                        "unique_id": "test/precalculus/807.json",
                    }
                ],
            )
        ],
        "Convert $(0,3)$.",
        "\\left( 3, \\frac{\\pi}{2} \\right)",
        "\\left( 3, \\frac{\\pi}{2} \\right)",
    ),
    "docvqa": (
        [
            (
                "HuggingFaceM4__DocumentVQA/data/validation-00000-of-00001",
                DOCVQA,
                [
                    {
                        "questionId": 49153,
                        "question": "What is the 'actual' value?",
                        "question_types": ["figure/diagram"],
                        "image": drawn(),
                        "docId": 14465,
                        "ucsf_document_id": "pybv0228",
                        "ucsf_document_page_no": "81",
                        "answers": ["0.28", ".28"],
                    }
                ],
            )
        ],
        "<image>What is the 'actual' value?",
        ["0.28", ".28"],
        "0.28",
    ),
    "refcoco": (
        [
            (
                "lmms-lab__RefCOCO/data/testA-00000-of-00001",
                REFCOCO,
                [
                    {
                        "question_id": "469306",
                        "image": drawn((320, 240)),
                        "question": "Describe it.",
                        "answer": ["guy in yellow", "yellow shirt"],
                        "segmentation": [1.0],
                        "bbox": [100.0, 50.0, 200.0, 100.0],
                        "iscrowd": 0,
                        "file_name": "x.jpg",
                    }
                ],
            )
        ],
        '<image>Locate "guy in yellow" in the image. Give its bounding box in pixels as [x1, y1, x2, y2].',
        [166, 82, 499, 245],
        "[166, 82, 499, 245]",
    ),
    "ifeval": (
        [
            (
                "google__IFEval/train",
                Features(
                    {
                        "key": INT,
                        "prompt": STRING,
                        "instruction_id_list": List(STRING),
                        "kwargs": List({"num_words": INT, "relation": STRING, "language": STRING}),
                    }
                ),
                [
                    {
                        "key": 999,
                        "prompt": "In Hindi.",
                        "instruction_id_list": ["language:response_language"],
                        "kwargs": [{"num_words": None, "relation": None, "language": "hi"}],
                    },
                    {
                        "key": 1000,
                        "prompt": "Write 300+ words.",
                        "instruction_id_list": [
                            "punctuation:no_comma",
                            "length_constraints:number_words",
                        ],
                        "kwargs": [
                            dict.fromkeys(("num_words", "relation", "language")),
                            {"num_words": 300, "relation": "at least", "language": None},
                        ],
                    },
                ],
            )
        ],
        "Write 300+ words.",
        [
            {"id": "punctuation:no_comma"},
            {"id": "length_constraints:number_words", "num_words": 300, "relation": "at least"},
        ],
        "",
    ),
    "retain_ifeval": (
        [
            (
                "allenai__RLVR-IFeval/data/train-00000-of-00001",
                Features(
                    {
                        "messages": List(strings("content", "role")),
                        **strings("ground_truth", "dataset", "constraint_type", "constraint"),
                    }
                ),
                [
                    {
                        "messages": [{"role": "user", "content": "Tell me. In lowercase."}],
                        "dataset": "ifeval",
                        "constraint_type": "All Lowercase",
                        "constraint": "Your entire response should be in lowercase.",
                        "ground_truth": json.dumps(
                            {"func_name": "validate_lowercase", "N": None, "quantifier": None}
                        ),
                    }
                ]
                * 12,
            )
        ],
        "Tell me. In lowercase.",
        [{"id": "change_case:english_lowercase"}],
        "",
    ),
}
SAME = (
    "scienceqa",
    "vizwiz",
    "gqa",
    "geometry3k",
    "pathvqa",
    "superclevr",
    "mmmu",
    "pope",
)  # paper A asks them alike
FIXTURES |= {f"cpt7_{name}": FIXTURES[name] for name in SAME}
FIXTURES["cpt7_vizwiz"] = (
    FIXTURES["vizwiz"][0],
    "<image>What is this?",
    "unanswerable",
    "unanswerable",
)
FIXTURES["retain_mmlu"] = (
    [(path, features, rows * 8) for path, features, rows in FIXTURES["mmlu"][0]],
    *FIXTURES["mmlu"][1:],
)


@pytest.fixture(autouse=True)
def quiet_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def write(root, files):
    for path, features, rows in files:
        file = root / f"{path}.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_list(rows, features=features).to_parquet(file)


def test_every_dataset_has_a_fixture():
    drawn = {name for name in BUILT_IN_TASKS if name.startswith("synthetic_")}
    assert set(BUILT_IN_TASKS) - {"jigsaw"} - drawn == set(FIXTURES) == set(SUFFIXES)


WORD = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
UNANSWERABLE = (
    "\nWhen the provided information is insufficient, respond with 'Unanswerable'." + WORD
)
COT = (
    "\nReason first, between the tags <think> and </think>. Then write the final answer, and nothing but the final answer, "
    "inside \\boxed{}."
)
ONE_LETTER = '\nReason step by step, then finish with "The answer is: X", where X is the letter of the right option.'
SUFFIXES = {  # what the prompt adds to the question: under "direct", and under paper A's (for paper C's: the config's "boxed") template
    **dict.fromkeys(
        ("scienceqa", "cpt7_scienceqa", "cpt7_mmlu_pro", "mmmu", "cpt7_mmmu", "mmlu"), (LETTER, COT)
    ),
    **dict.fromkeys(
        ("textvqa", "cpt7_textvqa", "gqa", "cpt7_gqa", "geometry3k", "cpt7_geometry3k", "docvqa"),
        (WORD, COT),
    ),
    **dict.fromkeys(
        ("pathvqa", "cpt7_pathvqa", "superclevr", "cpt7_superclevr", "pope", "cpt7_pope"),
        (WORD, COT),
    ),
    **dict.fromkeys(("vizwiz", "cpt7_vizwiz"), (UNANSWERABLE, COT)),
    **dict.fromkeys(
        ("mmlu_pro", "ifeval", "retain_ifeval"), ("", "")
    ),  # the question brings its own instruction
    "retain_mmlu": (ONE_LETTER, ONE_LETTER),
    "countdown": ("\nGive only the expression.", COT),
    "math": ("\nGive only the final answer.", COT),
    "refcoco": ("\nGive only the box.", COT),
}


@pytest.mark.parametrize("name", SUFFIXES)
def test_the_prompt_is_the_question_with_the_template_around_it(name, tmp_path):
    files, text, *_ = FIXTURES[name]
    write(tmp_path, files)
    example = BUILT_IN_TASKS[name].load("test", root=str(tmp_path))[0]
    weights = types.SimpleNamespace(accuracy=0.9, format=0.1, on_error="stop")
    for template, suffix in zip(("direct", "cot"), SUFFIXES[name], strict=True):
        turns = prompted_task.make_prompted_task(
            BUILT_IN_TASKS[name], template, weights, None
        ).build_prompt(example)
        assert content_text(turns[-1]["content"]) == text + suffix and len(turns) == len(
            example.messages
        )


@pytest.mark.parametrize("name", FIXTURES)
def test_fixture_becomes_the_expected_example(name, tmp_path):
    files, text, answer, target = FIXTURES[name]
    write(tmp_path, files)
    task = BUILT_IN_TASKS[name]
    example = task.load("test", root=str(tmp_path))[0]
    assert example_text(example) == text
    assert (example.answer, example.target) == (answer, target)
    assert example.task == name and example.id.startswith(f"{name}/test/")
    images = [part["image"] for part in example.messages[-1]["content"] if part["type"] == "image"]
    assert len(images) == text.count("<image>") and all(image.mode == "RGB" for image in images)
    if isinstance(scorers.find_scorer(task.scorer).rule, str) or not target:
        return  # symbolic scorers run in worker processes; tests/test_symbolic.py has them
    assert scorers.find_scorer(task.scorer).score(target, answer, example.meta) >= 0.9


def test_every_scorer_and_reward_named_by_a_task_exists():
    for task in BUILT_IN_TASKS.values():
        assert callable(task.scorer) or task.scorer in scorers.SCORERS
        assert set(task.also) <= set(scorers.SCORERS)


def test_the_tasks_of_paper_a_have_one_lenient_scorer_and_report_their_own():
    every = [name for name in BUILT_IN_TASKS if name.startswith("cpt7_")]
    assert len(every) == 10
    assert {BUILT_IN_TASKS[name].scorer for name in every} == {"mathruler_parity"}
    assert all(BUILT_IN_TASKS[name].also for name in every)


def test_one_answer_to_train_on_leaves_the_ten_to_the_official_score(tmp_path):
    write(tmp_path, FIXTURES["cpt7_textvqa"][0])
    example = BUILT_IN_TASKS["cpt7_textvqa"].load("test", root=str(tmp_path))[0]
    assert example.answer == "nokia"
    assert scorers.find_scorer("vqa_soft").score(
        "nokia 3310", example.answer, example.meta
    ) == pytest.approx(0.3)  # 1 of 10


def test_the_hub_and_a_copy_on_disk_give_the_same_examples(tmp_path, monkeypatch):
    files, text, answer, _ = FIXTURES["pathvqa"]
    whole = datasets.Dataset.from_list(files[0][2], features=files[0][1])
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config, split: whole)
    hub = BUILT_IN_TASKS["pathvqa"].load("test")[0]
    monkeypatch.undo()
    datasets.DatasetDict(test=whole).save_to_disk(tmp_path / "path-vqa")
    disk = BUILT_IN_TASKS["pathvqa"].load("test", root=str(tmp_path))[0]
    assert example_text(hub) == example_text(disk) == text and hub.answer == answer
    assert np.array_equal(
        hub.messages[0]["content"][0]["image"], disk.messages[0]["content"][0]["image"]
    )


def test_a_hub_that_can_not_be_reached_is_one_line(monkeypatch):
    def refuse(*args, **kwargs):
        raise ConnectionError("no\nroute")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(
        ValueError,
        match=r"hiyouga/geometry3k can not be loaded from the hub \(no route\); put a copy under data.root",
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


def test_an_image_is_decoded_only_when_its_example_is_asked_for(tmp_path):
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


def test_splits_of_our_own_making_cover_the_rows_without_overlap(tmp_path):
    write(tmp_path, FIXTURES["superclevr"][0])
    write(tmp_path, FIXTURES["countdown"][0])
    for name, rows in (("superclevr", 20), ("countdown", 10)):
        train, test = (
            BUILT_IN_TASKS[name].load(split, root=str(tmp_path)) for split in ("train", "test")
        )
        assert sorted([*train.order, *test.order]) == list(range(rows)) and len(test) == 1


def sizes(example):
    return [
        part["image"].size for part in example.messages[-1]["content"] if part["type"] == "image"
    ]


def test_each_image_is_the_one_that_the_question_means(tmp_path):
    for name in ("gqa", "mmmu", "refcoco"):
        write(tmp_path, FIXTURES[name][0])
    load = lambda name: BUILT_IN_TASKS[name].load("test", root=str(tmp_path))[0]
    assert sizes(load("gqa")) == [(40, 30)]
    assert sizes(load("mmmu")) == [(21, 20), (22, 20), (23, 20)]
    assert sizes(load("refcoco")) == [(532, 392)] and load("refcoco").meta["size"] == [532, 392]


def test_mmmu_images_that_the_text_never_mentions_go_first(tmp_path):
    row = MMMU_ROW | {"question": "See <image 3>, then <image 1>.", "options": "['a', 'b']"}
    write(tmp_path, [("MMMU/validation", MMMU, [row])])
    example = BUILT_IN_TASKS["mmmu"].load("test", root=str(tmp_path))[0]
    assert example_text(example) == "<image>See <image>, then <image>.\nA. a\nB. b"
    assert sizes(example) == [(22, 20), (23, 20), (21, 20)]
    write(tmp_path, [("MMMU/validation", MMMU, [row | {"image_3": None}])])
    with pytest.raises(
        ValueError, match="the question mentions <image 3> but the row has no image_3"
    ):
        BUILT_IN_TASKS["mmmu"].load("test", root=str(tmp_path))[0]


def test_gqa_names_a_question_whose_image_is_missing(tmp_path):
    files = FIXTURES["gqa"][0]
    write(tmp_path, [files[0], (files[1][0], files[1][1], files[1][2][:1])])
    with pytest.raises(ValueError, match="question 201307251: no image 'n161313'"):
        BUILT_IN_TASKS["gqa"].load("test", root=str(tmp_path))[0]


def test_vizwiz_trains_on_the_official_files(tmp_path):
    folder = tmp_path / "vizwiz"
    (folder / "train").mkdir(parents=True)
    (folder / "Annotations").mkdir()
    drawn().save(folder / "train" / "VizWiz_train_00000000.jpg")
    answers = [{"answer": "basil leaves", "answer_confidence": "yes"}] * 6 + [
        {"answer": "basil", "answer_confidence": "maybe"}
    ] * 4
    entry = {
        "image": "VizWiz_train_00000000.jpg",
        "question": "What's the name?",
        "answers": answers,
        "answer_type": "other",
    }
    (folder / "Annotations" / "train.json").write_text(json.dumps([entry]))
    example = BUILT_IN_TASKS["vizwiz"].load("train", root=str(tmp_path))[0]
    assert (example_text(example), example.target, len(example.answer)) == (
        "<image>What's the name?",
        "basil leaves",
        10,
    )
    with pytest.raises(ValueError, match="the hub has no training split"):
        BUILT_IN_TASKS["vizwiz"].load("train")


def test_mmmu_open_questions_keep_every_gold_answer_and_their_own_suffix(tmp_path):
    row = MMMU_ROW | {
        "question_type": "open",
        "options": "[]",
        "answer": "['8', 'eight']",
        "question": "How many?",
    }
    row |= {"image_2": None, "image_3": None}
    write(tmp_path, [("MMMU/validation", MMMU, [row])])
    example = BUILT_IN_TASKS["mmmu"].load("test", root=str(tmp_path))[0]
    assert example_text(example) == "<image>How many?"
    assert example.answer == ["8", "eight"] and example.meta["direct_suffix"].startswith(
        "Answer the question using a single word"
    )
    assert (
        scorers.find_scorer("mmmu_official").score("The answer is 8.", example.answer, example.meta)
        == 1.0
    )


def test_modal_answer_is_the_most_frequent_and_first_of_equals():
    assert most_frequent(["b", "a", "a", "b", "c"]) == "b"


def test_placeholders_and_images_must_agree():
    (turn,) = user_turn("a<image>b<video>", ["x"], ["y"])
    assert [part["type"] for part in turn["content"]] == [
        "text",
        "image",
        "text",
        "video",
    ]
    with pytest.raises(ValueError, match=r"2 <image> in the prompt but 1 image\(s\)"):
        user_turn("<image><image>", ["x"])


def puzzle_image(width, height):
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("permutation", itertools.permutations(range(4)))
def test_every_2x2_jigsaw_can_be_put_back_together(permutation):
    image = puzzle_image(13, 9)
    shown = jigsaw.shuffle_tiles(image, permutation, 2, 2)
    assert np.array_equal(
        jigsaw.restore_tiles(shown, jigsaw.answer_of_permutation(permutation), 2, 2),
        jigsaw.crop_to_grid(image, 2, 2),
    )


def test_random_3x3_and_uneven_jigsaws_can_be_put_back_together():
    rng = np.random.default_rng(1)
    for rows, cols, size in [(3, 3, (30, 30)), (3, 3, (50, 31)), (2, 5, (47, 20)), (4, 1, (5, 19))]:
        image = puzzle_image(*size)
        for _ in range(10):
            permutation = rng.permutation(rows * cols)
            shown = jigsaw.shuffle_tiles(image, permutation, rows, cols)
            assert np.array_equal(
                jigsaw.restore_tiles(shown, jigsaw.answer_of_permutation(permutation), rows, cols),
                jigsaw.crop_to_grid(image, rows, cols),
            )


def test_the_jigsaw_of_the_docstring():
    """The original a b / c d shown as d c / a b is answered 3 4 2 1."""
    image = Image.fromarray(np.array([[[1] * 3, [2] * 3], [[3] * 3, [4] * 3]], np.uint8))
    shown = jigsaw.shuffle_tiles(image, (3, 2, 0, 1), 2, 2)
    assert np.asarray(shown)[..., 0].tolist() == [[4, 3], [1, 2]]
    assert jigsaw.answer_of_permutation((3, 2, 0, 1)) == [3, 4, 2, 1]
    for place, tile in enumerate(jigsaw.answer_of_permutation((3, 2, 0, 1))):
        assert (
            np.asarray(shown).reshape(4, 3)[tile - 1, 0]
            == np.asarray(image).reshape(4, 3)[place, 0]
        )


def test_jigsaws_from_a_folder_another_task_and_drawings(tmp_path):
    for number in range(40):
        puzzle_image(31, 20).save(tmp_path / f"{number}.png")
    task = resolve_task(
        "puzzle", {"puzzle": {"task": "jigsaw", "rows": 2, "cols": 3, "images": str(tmp_path)}}
    )
    train, test = (task.load(split) for split in ("train", "test"))
    assert (
        len(train) + len(test) == 40
        and test
        and not {e.meta["source"] for e in train} & {e.meta["source"] for e in test}
    )
    example = train[0]
    shown = example.messages[0]["content"][0]["image"]
    assert (
        shown.size == (30, 20)
        and example.target == " ".join(map(str, example.answer)) != "1 2 3 4 5 6"
    )
    restored = jigsaw.restore_tiles(shown, example.answer, 2, 3)
    assert np.array_equal(
        restored, jigsaw.crop_to_grid(Image.open(tmp_path / example.meta["source"]), 2, 3)
    )
    assert train[0].answer == task.load("train")[0].answer

    write(tmp_path, FIXTURES["pathvqa"][0])
    other = TASK_MAKERS["jigsaw"]("other", images="pathvqa").load("test", root=str(tmp_path))
    assert len(other) == 1 and sorted(other[0].answer) == list(range(1, 10))
    assert (
        len(BUILT_IN_TASKS["jigsaw"].load("test", limit=3)) == 3
        and BUILT_IN_TASKS["jigsaw"].load("test", limit=3)[2].id == "jigsaw/test/2"
    )
    with pytest.raises(ValueError, match="expected a folder, a task or"):
        TASK_MAKERS["jigsaw"]("bad", images="nowhere").load("train")
    with pytest.raises(ValueError, match="no images for split 'validation'"):
        task.load("validation")
    (tmp_path / "train").mkdir()
    with pytest.raises(ValueError, match="no images for split 'test'"):
        task.load("test")


def test_drawn_countdown_puzzles_have_the_solution_that_they_claim():
    seen = {}
    for split in ("train", "test"):
        for example in TASK_MAKERS["countdown"]("c", synthetic=True, count=4).load(split, limit=60):
            assert evaluate_arithmetic(example.target) is not None, example.target
            assert (
                scorers.find_scorer("countdown").score(example.target, example.answer, example.meta)
                == 1.0
            )
            seen.setdefault(split, set()).add((*sorted(example.meta["nums"]), example.answer))
    assert not seen["train"] & seen["test"]
    assert (
        countdown.make_puzzle("train", 0, 3, 3, 20)
        == countdown.make_puzzle("train", 0, 3, 3, 20)
        != countdown.make_puzzle("train", 1, 3, 3, 20)
    )


def test_every_rlvr_constraint_is_one_that_the_scorer_can_check():
    arguments = {
        "N": 2,
        "quantifier": "around",
        "keyword_list": ["a"],
        "word": "a",
        "forbidden_words": ["b"],
        "letter": "a",
        "i": 1,
        "language": "hi",
        "first_word": "a",
        "postscript_marker": "P.S.",
        "section_splitter": "Section",
        "original_prompt": "say",
        "end_phrase": "end",
    }
    for function in set(ifeval.RLVR_INSTRUCTIONS) - {"validate_response_language"}:
        for constraint in ifeval.translate_constraint(
            json.dumps({"func_name": function, **arguments})
        ):
            assert follows_constraint("a reply", constraint) in (True, False)
    exactly = ifeval.translate_constraint(
        json.dumps({"func_name": "verify_keyword_frequency", "word": "ha", "N": 2})
    )
    assert [
        all(follows_constraint(text, c) for c in exactly) for text in ("ha", "ha ha", "ha ha ha")
    ] == [False, True, False]
    assert ifeval.count_bounds("at most", 5) == [("less than", 6)] and ifeval.count_bounds(
        "around", 30
    ) == [("at least", 27), ("less than", 34)]


def test_ifeval_says_how_many_rows_it_leaves_out(tmp_path, caplog):
    write(tmp_path, FIXTURES["ifeval"][0])
    with caplog.at_level(logging.WARNING, "cptjax"):
        assert len(BUILT_IN_TASKS["ifeval"].load("test", root=str(tmp_path))) == 1
    assert "ifeval/test: 1 rows with a constraint that can not be checked" in caplog.text


@pytest.mark.parametrize(
    ("size", "limits"),
    [((320, 240), (200_704, 1_003_520)), ((640, 480), (3136, 50_000)), ((90, 200), (784, 10_000))],
)
def test_boxes_are_pixels_of_the_image_that_the_processor_leaves_alone(tmp_path, size, limits):
    """The stated box covers the coloured part of the image as the model sees it."""
    image = Image.new("RGB", size, "black")
    ImageDraw.Draw(image).rectangle(
        (size[0] // 4, size[1] // 2, size[0] // 2 - 1, size[1] - 11), fill="white"
    )
    box = [size[0] // 4, size[1] // 2, size[0] // 4, size[1] // 2 - 10]
    row = FIXTURES["refcoco"][0][0][2][0] | {"image": image, "bbox": list(map(float, box))}
    write(tmp_path, [("RefCOCO/testA", REFCOCO, [row])])
    task = TASK_MAKERS["refcoco"]("r", min_pixels=limits[0], max_pixels=limits[1])
    example = task.load("test", root=str(tmp_path))[0]
    shown = example.messages[0]["content"][0]["image"]
    assert ImageSettings(*limits).size(*shown.size) == shown.size[::-1]
    rows, columns = (np.flatnonzero((np.asarray(shown)[..., 0] > 127).any(axis)) for axis in (1, 0))
    assert (
        np.abs(
            np.array(example.answer) - [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        ).max()
        <= 1
    )


def test_boxes_in_pixels_are_refused_under_other_limits():
    assert resolve_task("refcoco", pixels=(200_704, 1_003_520)) is BUILT_IN_TASKS["refcoco"]
    with pytest.raises(
        ValueError,
        match="refcoco: its answers are positions in images of 200704 to 1003520 pixels, but the model sees 784 to",
    ):
        resolve_task("refcoco", pixels=(784, 50_000))
    assert resolve_task(
        "refcoco",
        {"refcoco": {"task": "refcoco", "min_pixels": 784, "max_pixels": 50_000}},
        (784, 50_000),
    ).pixels


def test_resolve_prefers_the_config_and_names_the_nearest():
    own = resolve_task(
        "textvqa",
        {
            "textvqa": {
                "task": "textvqa",
                "ocr": True,
                "scorer": "contains",
                "direct_suffix": "Short.",
            }
        },
    )
    assert (own.name, own.scorer, own.direct_suffix) == ("textvqa", "contains", "Short.")
    assert resolve_task("pope").scorer == "yes_no"
    with pytest.raises(ValueError, match="no task 'textvqq'; did you mean 'textvqa'"):
        resolve_task("textvqq")
    with pytest.raises(ValueError, match="unknown setting 'rowz'; did you mean 'rows'"):
        resolve_task("p", {"p": {"task": "jigsaw", "rowz": 2}})
    with pytest.raises(ValueError, match="tasks.p.task: no task 'jigsow'; did you mean 'jigsaw'"):
        resolve_task("p", {"p": {"task": "jigsow"}})
