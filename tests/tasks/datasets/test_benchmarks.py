"""MRCL, MLLM-CTBench and UCIT: rows in the columns of their releases train and are scored."""

import json

import pytest
from hub_fixtures import CAPTIONS, FIXTURES, RELEASED_FIXTURES, painted_image, turns, write

from configs import ctbench, mrcl, ucit
from cptjax.config import merge_config, resolve_stages
from cptjax.data import row_checks
from cptjax.tasks import prompted_task
from cptjax.tasks.registry import BUILT_IN_TASKS, resolve_task
from cptjax.tasks.scoring.sandbox import shared_sandbox_pool
from cptjax.tasks.task import content_text, example_text

CONFIGS = [
    *((mrcl, f"{arm},tiny") for arm in ("sft", "grpo")),
    *((ctbench, f"{arm},tiny") for arm in ("sft", "grpo")),
    (ucit, "lora_sft,tiny"),
]
PARTS = {mrcl: "mrcl_", ctbench: "ctbench_", ucit: "ucit_"}
# What a response adds to the answer under a template.
FORMS = {
    "steps": "We go step by step, and the result of all of that is \\boxed{%s}",
    "answer": "<think> It is so. </think> <answer> %s </answer>",
}


@pytest.fixture
def root(tmp_path):
    for name in (*RELEASED_FIXTURES, "pope", "mmstar", "docvqa"):
        write(tmp_path, FIXTURES[name][0])
    return str(tmp_path)


@pytest.mark.parametrize(
    ("module", "arg"), CONFIGS, ids=lambda part: getattr(part, "__name__", part)
)
def test_every_row_passes_the_row_checks(module, arg, root):
    config = merge_config(module.get_config(arg), {"data": {"root": root}})
    specs = row_checks.run_splits(config, resolve_stages(config))
    assert {spec.task for spec in specs} >= {
        n for n in BUILT_IN_TASKS if n.startswith(PARTS[module])
    }
    for spec in specs:
        report = row_checks.check_split(config, spec, None, shared_sandbox_pool())
        assert not report.bad and len(report.rows) == 1, report.bad


@pytest.mark.parametrize("name", RELEASED_FIXTURES)
def test_the_gold_answer_scores_1_and_another_0(name, root):
    module = next(m for m, prefix in PARTS.items() if name.startswith(prefix))
    task = BUILT_IN_TASKS[name]
    rewards = module.get_config().rewards
    for template in module.get_config("sft,tiny" if module is not ucit else "").eval.templates:
        prompted = prompted_task.make_prompted_task(task, template, rewards, shared_sandbox_pool())
        for split in ("train", "test"):
            (example,) = task.load(split, root=root)
            gold = FIXTURES[name][3]
            other = "C" if len(gold) == 1 else "zebra"
            right, wrong = (FORMS.get(template, "%s") % answer for answer in (gold, other))
            scores = [r.score for r in prompted.score([right, wrong], [example] * 2)]
            assert scores == [1.0, 0.0], template
            own = prompted.score([prompted.gold_response(example)], [example])[0]
            assert own.score == 1.0
            if template in FORMS or module is ucit:
                parts = prompted.compute_rewards([right, wrong], [example] * 2)
                assert [p["accuracy"] for p in parts] == [1.0, 0.0]


def test_the_question_is_asked_with_its_image_first(root):
    (row,) = BUILT_IN_TASKS["ucit_clevr_math"].load("train", root=root)
    assert example_text(row) == "<image>\nHow many are left? Answer in a word."
    prompted = prompted_task.make_prompted_task(
        BUILT_IN_TASKS["mrcl_finmme"], "steps", mrcl.get_config().rewards, shared_sandbox_pool()
    )
    (row,) = BUILT_IN_TASKS["mrcl_finmme"].load("train", root=root)
    (turn,) = prompted.build_prompt(row)
    text = content_text(turn["content"])
    assert text.startswith("<image>What was the growth in %?\nThe final answer is the capital")
    assert text.endswith("inside \\boxed{}.")


def reward_of(name, response, root, **settings):
    task = resolve_task(name)
    config = (mrcl if name.startswith("mrcl") else ctbench).get_config()
    template = "steps" if name.startswith("mrcl") else "answer"
    prompted = prompted_task.make_prompted_task(
        task, template, config.rewards, shared_sandbox_pool()
    )
    (example,) = task.load("train", root=root)
    return prompted.compute_rewards([response], [example])[0]["reward"]


LONG = "word " * 20


@pytest.mark.parametrize(
    ("name", "response", "reward"),
    [
        ("mrcl_navigation", LONG + "\\boxed{R, R, U}", 1.0),
        ("mrcl_navigation", LONG + "\\boxed{R,U,U}", 1 / 3),
        ("mrcl_navigation", LONG + "\\boxed{R,R,U,U}", 0.0),  # longer than the path
        ("mrcl_navigation", "\\boxed{R,R,U}", 0.5),  # fewer than 20 words
        ("mrcl_wemath2", LONG + "\\boxed{4.5; 2}", 0.5),  # one of two parts
        ("mrcl_finmme", LONG + "\\boxed{12.59}", 1.0),
        ("mrcl_finmme", LONG + "12.5", 0.0),  # no box
        ("ctbench_art", FORMS["answer"] % "Vincent", 1 + 0.5),  # ROUGE-L of 1 in 3 words
        ("ctbench_ocr", "12:30 pm", 0.0 + 1.0),  # right, but without the form
    ],
)
def test_rewards_are_those_of_the_releases(name, response, reward, root):
    assert reward_of(name, response, root) == pytest.approx(reward)


def test_evaluation_reads_an_answer_without_its_box(root):
    task = BUILT_IN_TASKS["mrcl_medbookvqa"]
    prompted = prompted_task.make_prompted_task(
        task, "steps", mrcl.get_config().rewards, shared_sandbox_pool()
    )
    (example,) = task.load("test", root=root)
    responses = ["B", "\\boxed{B: Liver}", "b.", "It is B"]
    scores = [r.score for r in prompted.score(responses, [example] * 4)]
    assert scores == [1.0, 1.0, 0.0, 0.0]


def test_captions_of_the_test_images_are_found_by_their_row(root, tmp_path):
    task = BUILT_IN_TASKS["ucit_vizwiz"]
    assert task.load("test", root=root)[0].answer == CAPTIONS
    assert task.load("train", root=root)[0].answer == CAPTIONS[0]
    folder = tmp_path / "UCIT/instructions/VizWiz"
    rows = json.loads((folder / "test_3000.json").read_text())
    (folder / "test_3000.json").write_text(json.dumps(rows * 2))
    with pytest.raises(ValueError, match="captions of image_id 1 to 2, .*; got none of 2"):
        task.load("test", root=root)


def test_rows_and_folders_of_another_form_are_refused(tmp_path):
    task = BUILT_IN_TASKS["mrcl_puzzle"]
    with pytest.raises(ValueError, match="task mrcl_puzzle: no copy of MaolinLuo/MRCL .data.root "):
        task.load("train")
    with pytest.raises(ValueError, match=r"no copy of MaolinLuo/MRCL \(.*MaolinLuo__MRCL, "):
        task.load("train", root=str(tmp_path))
    file = tmp_path / "MRCL/Puzzle/jsons/train/data.json"
    file.parent.mkdir(parents=True)
    with pytest.raises(ValueError, match="MRCL has no Puzzle/jsons/train/data.json"):
        task.load("train", root=str(tmp_path))
    images = tmp_path / "MRCL/Puzzle/images"
    images.mkdir()
    painted_image().save(images / "0.png")
    good = {"image": "0.png", "conversations": turns("Which?", "A")}
    for row, message in (
        ({"image": "0.png", "question": "Which?"}, "got no conversations but image, question"),
        (good | {"conversations": turns("Which?", "A")[:1]}, "expected a turn of human and one"),
        (good | {"image": "1.png"}, "images/1.png"),
    ):
        file.write_text(json.dumps([good, row]))
        rows = task.load("train", root=str(tmp_path))
        assert rows[0].answer == "A"
        with pytest.raises(ValueError, match=f"mrcl_puzzle/train, row 1: .*{message}"):
            rows[1]
    for text, message in (("[", "not JSON in UTF-8"), ('{"a": 1}', "expected a list of objects")):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            task.load("train", root=str(tmp_path))
    with pytest.raises(ValueError, match="no split 'dev'; it has train, test"):
        task.load("dev", root=str(tmp_path))


@pytest.mark.parametrize("name", ["mrcl", "ctbench", "ucit"])
def test_a_task_of_a_benchmark_names_its_part(name):
    with pytest.raises(ValueError, match="tasks.mine.part='all': choose one of "):
        resolve_task("mine", {"mine": {"task": name, "part": "all"}})
    part = next(n for n in RELEASED_FIXTURES if n.startswith(name)).removeprefix(f"{name}_")
    mine = resolve_task("mine", {"mine": {"task": name, "part": part, "scorer": "exact"}})
    assert (mine.name, mine.scorer) == ("mine", "exact")
