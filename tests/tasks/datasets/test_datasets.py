"""Every dataset: rows in the form of the public files become the expected examples and prompts."""

import json
import types

import pytest
from hub_fixtures import FIXTURES, MMMU, MMMU_ROW, painted_image, write

from cptjax.tasks import prompted_task
from cptjax.tasks.registry import BUILT_IN_TASKS
from cptjax.tasks.scoring import scorers
from cptjax.tasks.task import content_text, example_text


def test_every_dataset_has_a_fixture():
    synthetic = {name for name in BUILT_IN_TASKS if name.startswith("synthetic_")}
    assert set(BUILT_IN_TASKS) - {"jigsaw"} - synthetic == set(FIXTURES) == set(SUFFIXES)


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


def test_one_answer_to_train_on_leaves_the_ten_to_the_official_score(tmp_path):
    write(tmp_path, FIXTURES["cpt7_textvqa"][0])
    example = BUILT_IN_TASKS["cpt7_textvqa"].load("test", root=str(tmp_path))[0]
    assert example.answer == "nokia"
    assert scorers.find_scorer("vqa_soft").score(
        "nokia 3310", example.answer, example.meta
    ) == pytest.approx(0.3)  # 1 of 10


def sizes(example):
    return [
        part["image"].size for part in example.messages[-1]["content"] if part["type"] == "image"
    ]


def test_each_image_is_the_one_of_its_question(tmp_path):
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
    painted_image().save(folder / "train" / "VizWiz_train_00000000.jpg")
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
