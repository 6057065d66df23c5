"""Every dataset: rows in the form of the public files become the expected examples and prompts."""

import dataclasses
import json
import re

import pytest
from hub_fixtures import FIXTURES, MMMU, MMMU_ROW, painted_image, write

from configs.base import get_config
from cptjax.tasks import prompted_task
from cptjax.tasks.datasets import ctbench, mrcl, ucit
from cptjax.tasks.prompt_templates import BUILT_IN_TEMPLATES
from cptjax.tasks.registry import BUILT_IN_TASKS
from cptjax.tasks.scoring import scorers
from cptjax.tasks.task import content_text, example_text

WITHOUT_DOWNLOAD = {name for name in BUILT_IN_TASKS if name.startswith("synthetic_")}
WITHOUT_DOWNLOAD |= {"exercise", "knowledge", "prose"}


def test_every_dataset_has_a_fixture():
    assert set(BUILT_IN_TASKS) - {"jigsaw"} - WITHOUT_DOWNLOAD == set(FIXTURES) == set(INSTRUCTIONS)


WORD = "\nAnswer the question using a single word or phrase."

LETTER = "\nAnswer with the option's letter from the given choices directly."

UNANSWERABLE = (
    "\nWhen the provided information is insufficient, respond with 'Unanswerable'." + WORD
)

INSTRUCTIONS = {  # what the prompt of every template adds to the question
    **dict.fromkeys(("mmlu", "mmstar"), LETTER),
    **{
        f"{prefix}{name}": LETTER
        for prefix in ("", "cpt7_", "released_")
        for name in ("scienceqa", "mmmu")
    },
    **dict.fromkeys(("cpt7_mmlu_pro", "released_mmlu_pro"), LETTER),
    **{
        f"{prefix}{name}": WORD
        for prefix in ("", "cpt7_", "released_")
        for name in ("textvqa", "gqa", "geometry3k", "pathvqa", "superclevr", "pope")
    },
    "docvqa": WORD,
    **dict.fromkeys(("vizwiz", "cpt7_vizwiz", "released_vizwiz"), UNANSWERABLE),
    # The question brings its own instruction, or any response is allowed.
    **dict.fromkeys(("mmlu_pro", "ifeval", "retain_ifeval", "mme"), ""),
    **dict.fromkeys(("wildjailbreak", "wildguardtest"), ""),
    "retain_mmlu": '\nReason about it and answer with "The answer is: <option>"',
    "retain_math": "\nReason about the problem, derive your answer, and wrap your final answer in $\\boxed{ }$.",
    "retain_countdown": "\nReason about it, and put the final expression, without an equals sign, in \\boxed{}.",
    "countdown": "\nThe final answer is the expression alone.",
    "math": "\nThe final answer is the result alone.",
    "refcoco": "\nThe final answer is the box alone.",
    **{f"mrcl_{part}": f"\n{mrcl.PARTS[part][1]}" for part in mrcl.PARTS},
    # The question brings its own instruction.
    **dict.fromkeys((f"ctbench_{part}" for part in ctbench.SCORERS), ""),
    **dict.fromkeys((f"ucit_{part}" for part in ucit.FOLDERS), ""),
}
ANSWER_SPACES = {  # scorer -> what its prompts must say about the answer
    "mcq_letter": "letter|The answer is: <option>",
    "mmstar": "letter",
    "mmlu_pro": "letter",
    "mmmu_official": "letter",
    "retain_mmlu": "The answer is: <option>",
    "retain_math": "final answer in \\$.boxed",
    "retain_countdown": "expression, .* in .boxed",
    "exact_match": "single word or phrase",
    "pathvqa_split": "single word or phrase",
    "vqa_soft": "single word or phrase",
    "vqa_em_modal": "single word or phrase",
    "anls": "single word or phrase",
    "pope": "single word or phrase",
    "mathruler_parity": "single word or phrase|letter",
    "mme": "answer yes or no",
    "math": "the result alone|single word or phrase",
    "countdown": "an expression .*The final answer is the expression alone",
    "iou50": "as \\[x1, y1, x2, y2\\].*The final answer is the box alone",
    "mrcl": "The final answer is",
    "mrcl_finmme": "capital letter .* or a number",
    "ctbench_open": "a phrase|a sentence",
    "ctbench_choice": "the letter",
    "ctbench_number": "a number",
    "ctbench_math": "yes or no",
    "ucit": "in a word|the letter",
    "jigsaw": "numbers separated by spaces.*The final answer is the numbers alone",
}
FREE_RESPONSES = {"ifeval", "rlvr_ifeval", "refusal", "caption"}
WEIGHTS = get_config().rewards


def prompts_of(task, example):
    """Return the text of the last turn under every built-in template."""
    judge = "." if task.scorer == "refusal" else ""  # a folder
    task = dataclasses.replace(task, template="", judge=judge)
    make = lambda template: prompted_task.make_prompted_task(task, template, WEIGHTS, None)
    return {
        template: content_text(make(template).build_prompt(example)[-1]["content"])
        for template in BUILT_IN_TEMPLATES
    }


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_every_template_states_the_answers_that_the_scorer_accepts(name, tmp_path):
    files, text, *_ = FIXTURES[name]
    write(tmp_path, files)
    task = BUILT_IN_TASKS[name]
    prompts = prompts_of(task, task.load("test", root=str(tmp_path))[0])
    for template, prompt in prompts.items():
        assert prompt.startswith((text + INSTRUCTIONS[name]).strip()), template
        if task.scorer not in FREE_RESPONSES:
            assert re.search(ANSWER_SPACES[task.scorer], prompt, re.DOTALL), template
    assert prompts["none"] == (text + INSTRUCTIONS[name]).strip()
    assert all("\\boxed{}" in prompts[name] for name in ("cot", "boxed", "released_cot"))
    assert INSTRUCTIONS[name] == "" or prompts["direct"] == prompts["none"]


def test_the_synthetic_jigsaw_states_its_answers_too(capsys):
    task = BUILT_IN_TASKS["synthetic_jigsaw"]
    for prompt in prompts_of(task, task.load("test", limit=1)[0]).values():
        assert re.search(ANSWER_SPACES["jigsaw"], prompt, re.DOTALL)
    assert "generated images, not photographs" in capsys.readouterr().err


def test_a_users_template_has_the_instruction_as_a_variable(tmp_path):
    (tmp_path / "mine.jinja").write_text("{{ content }} [{{ answer_instruction }}]")
    write(tmp_path, FIXTURES["vizwiz"][0])
    task = BUILT_IN_TASKS["vizwiz"]
    prompted = prompted_task.make_prompted_task(task, str(tmp_path / "mine.jinja"), WEIGHTS, None)
    (turn,) = prompted.build_prompt(task.load("test", root=str(tmp_path))[0])
    assert content_text(turn["content"]) == f"<image>What is this? [{UNANSWERABLE.strip()}]"


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
    assert example.answer == ["8", "eight"] and example.meta["answer_instruction"].startswith(
        "Answer the question using a single word"
    )
    assert (
        scorers.find_scorer("mmmu_official").score("The answer is 8.", example.answer, example.meta)
        == 1.0
    )
