"""Configs resolve into stages; unknown keys and wrong types are refused in one line."""

import pytest
from ml_collections import ConfigDict

from configs.base import get_config
from cptjax.common.config_checks import check_config
from cptjax.config import (
    config_differences,
    config_fingerprint,
    config_to_dict,
    eval_templates,
    evaluated_tasks,
    merge_config,
    resolve_stages,
)


@pytest.fixture
def c():
    c = get_config()
    c.stages = (
        dict(task="a", steps=2),
        dict(task=("b", "c"), epochs=0.5, method=dict(kl_coef=0.5), train=dict(lr=1)),
    )
    return c


def test_stages_are_resolved(c):
    one, two = resolve_stages(c)
    assert (one.number, one.name, one.tasks, one.steps, one.epochs) == (1, "a", ("a",), 2, None)
    assert (two.number, two.name, two.tasks, two.steps, two.epochs) == (
        2,
        "b+c",
        ("b", "c"),
        None,
        0.5,
    )
    assert (one.config.method.kl_coef, two.config.method.kl_coef) == (0.01, 0.5)
    assert two.config.train.lr == 1.0 and isinstance(two.config.train.lr, float)
    assert c.method.kl_coef == 0.01


@pytest.mark.parametrize(
    "override, message",
    [
        ({"methd": {}}, "config.methd does not exist; did you mean 'method'"),
        (
            {"method": {"kl_coeff": 1.0}},
            "config.method.kl_coeff does not exist; did you mean 'kl_coef'",
        ),
        ({"train": {"zzz": 1}}, "config.train.zzz does not exist; known: b1"),
        ({"train": {"lr": "1e-3"}}, "config.train.lr: expected a number like 1e-06, got '1e-3'"),
        ({"train": {"lr": None}}, "config.train.lr: expected a number like 1e-06, got None"),
        (
            {"train": {"batch": 1.5}},
            "config.train.batch: expected a whole number like 128, got 1.5",
        ),
        (
            {"train": {"batch": True}},
            "config.train.batch: expected a whole number like 128, got True",
        ),
        ({"data": {"pack": 1}}, "config.data.pack: expected True or False, got 1"),
        ({"data": {"limit": 0.5}}, "config.data.limit: expected None or a whole number, got 0.5"),
        ({"eval": {"every": True}}, "config.eval.every: expected None or a whole number, got True"),
        ({"method": {"tis_cap": "2"}}, "config.method.tis_cap: expected None or a number, got '2'"),
        (
            {"model": {"freeze": "vision"}},
            r"config.model.freeze: expected a tuple like \(\), got 'vision'",
        ),
        (
            {"eval": {"general": "mmmu"}},
            "config.eval.general: expected a tuple like \\(\\), got 'mmmu'",
        ),
        ({"method": 3}, "config.method: expected a section \\(dict\\), got 3"),
    ],
)
def test_an_unknown_key_or_wrong_type_is_refused(c, override, message):
    with pytest.raises(ValueError, match=message):
        merge_config(c, override)


def test_values_of_fitting_types_are_converted_and_accepted(c):
    merged = merge_config(
        c,
        {
            "data": {"limit": 5},
            "method": {
                "tis_cap": 2,
                "refresh": 40,
                "filter": {"name": "window", "samples": 2},
                "clip_dual": None,
            },
            "train": {"clip": None},
            "model": {"freeze": ["vision"]},
            "tasks": {"mine": {"train": "x.jsonl"}},
        },
    )
    assert (
        merged.data.limit == 5
        and merged.method.tis_cap == 2
        and merged.method.clip_dual is None
        and merged.train.clip is None
    )
    assert (
        merged.model.freeze == ("vision",)
        and merged.tasks.mine.train == "x.jsonl"
        and merged.method.filter["samples"] == 2
    )


@pytest.mark.parametrize(
    "stages, message",
    [
        ((), "config.stages is empty"),
        (
            (dict(steps=1),),
            r"config.stages\[0\]: expected task='name' or task=\('a', 'b'\), got no task",
        ),
        ((dict(task="a"),), "expected one of steps=N and epochs=N"),
        ((dict(task="a", steps=1, epochs=1),), "expected one of steps=N and epochs=N"),
        ((dict(task="a", steps=0),), "above 0, got 0"),
        (
            (dict(task="a", steps=1), dict(task="a", steps=1, trian={})),
            r"config.stages\[1\].trian does not exist; did you mean 'train'",
        ),
        (
            (dict(task="a", steps=1, model=dict(path="x")),),
            "sets model.path, which belongs to the whole run",
        ),
        (
            (dict(task="a", steps=1, eval=dict(limit=3)),),
            "sets eval.limit, which belongs to the whole run",
        ),
        (
            (dict(task="a", steps=1, data=dict(prompt_limit=3)),),
            "sets data.prompt_limit, which belongs to the whole run",
        ),
        ((dict(task="a", steps=1, seed=3),), "sets seed, which belongs to the whole run"),
    ],
)
def test_a_wrong_stage_is_refused(c, stages, message):
    c.stages = stages
    with pytest.raises(ValueError, match=message):
        resolve_stages(c)


def test_a_stage_may_set_its_own_sections(c):
    own = dict(
        eval=dict(every=2, mini=3),
        data=dict(template="direct"),
        log=dict(every=4),
        rewards=dict(format=0.0),
    )
    c.stages = (dict(task="a", steps=1, **own),)
    assert resolve_stages(c)[0].config.eval.every == 2


@pytest.mark.parametrize(
    "name, value",
    [
        ("data.limit", 0),
        ("eval.batch", 0),
        ("eval.limit", 0),
        ("train.batch", 0),
        ("log.every", 0),
        ("eval.every", 0),
        ("rollout.group", 0),
        ("data.prefetch", 0),
        ("eval.drift", -1),
    ],
)
def test_numbers_that_are_too_small_are_refused(c, name, value):
    check_config(c)
    section, key = name.split(".")
    c[section][key] = value
    with pytest.raises(
        ValueError, match=f"config.{name}: expected a whole number of at least ., got {value}"
    ):
        check_config(c)


def test_groups_hold_only_general_tasks(c):
    c.eval.general, c.eval.groups = ("facts", "pope"), ConfigDict({"text": ("facts",)})
    check_config(c)
    for wrong in ("facts", (), ("facts", "mmlu")):
        with pytest.raises(
            ValueError,
            match=r"config.eval.groups.text: expected a tuple of tasks of config.eval.general "
            r"\(facts, pope\), got",
        ):
            check_config(merge_config(c, {"eval": {"groups": {"text": wrong}}}))


def test_a_task_is_evaluated_under_the_template_of_its_last_training(c):
    """A task that is never trained has the run's template.

    `eval.templates` replaces all of them.
    """
    direct = dict(data=dict(template="direct"))
    c.stages = (
        dict(task="a", steps=1),
        dict(task=("a", "b"), steps=1, **direct),
        dict(task="b", steps=1, data=dict(template="boxed")),
    )
    templates = lambda: [eval_templates(c, resolve_stages(c), t) for t in ("a", "b", "general")]
    assert templates() == [("direct",), ("boxed",), ("cot",)]
    c.eval.templates = ("answer", "none")
    assert templates() == [("answer", "none")] * 3


def test_changes_that_matter_are_listed_and_change_the_fingerprint(c):
    old = config_to_dict(c)
    other = merge_config(
        c,
        {
            "train": {"lr": 0.5},
            "seed": 3,
            "mesh": {"fsdp": 2},
            "log": {"every": 7},
            "tasks": {"n": {"train": "x"}},
        },
    )
    assert config_differences(old, config_to_dict(other)) == [
        "seed: 0 -> 3",
        "tasks.n: None -> {'train': 'x'}",
        "train.lr: 1e-06 -> 0.5",
    ]
    assert (
        config_differences(
            old, config_to_dict(merge_config(c, {"log": {"every": 7}, "allow_change": True}))
        )
        == []
    )
    c.stages = (dict(task="a", steps=1), dict(task="b", steps=1))
    other = merge_config(c, {"stages": (c.stages[0], dict(task="b", steps=2))})
    assert config_differences(config_to_dict(c), config_to_dict(other)) == [
        "stages[1].steps: 1 -> 2"
    ]
    assert config_fingerprint(c) == config_fingerprint(merge_config(c, {"mesh": {"fsdp": 2}}))
    assert config_fingerprint(c) != config_fingerprint(merge_config(c, {"seed": 1}))


def test_evaluated_tasks_are_all_or_named():
    c = get_config()
    c.stages = (dict(task=("a", "b"), steps=1), dict(task="a", steps=1))
    run = resolve_stages(c)
    assert evaluated_tasks(c, run) == ["a", "b"]
    assert evaluated_tasks(merge_config(c, {"eval": {"tasks": ("b", "c")}}), run) == ["b", "c"]
    c.eval.tasks = "c,a"
    assert evaluated_tasks(c, run) == ["c", "a"]
