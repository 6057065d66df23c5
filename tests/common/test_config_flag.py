"""Every setting can be overridden on the command line; a wrong override is one line."""

import json
import sys

import pytest
from absl import flags
from ml_collections import ConfigDict

from configs.base import METHODS, get_config
from cptjax.common import config_flag
from cptjax.common.runs import expand_arms, expand_runs
from cptjax.config import config_to_dict, resolve_stages

CONFIG = """
from ml_collections import ConfigDict
from configs.base import METHODS, get_config as base

def get_config():
    c = base()
    grpo = METHODS["grpo"]
    c.stages = (dict(task="a", steps=2, method=grpo), dict(task="b", epochs=1, method=grpo))
    shared = dict(method=METHODS["sft"], model=dict(freeze=()))
    c.arms = ConfigDict(dict(one=shared, two=shared))
    c.prestage = ConfigDict(dict(stages=(dict(task="a", steps=1),)))
    c.tasks.mine = dict(train="x.jsonl", limit=None)
    return c
"""


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Load the config above with overrides, as a command does."""
    path = tmp_path / "config.py"
    path.write_text(CONFIG)

    def load(*overrides):
        argv = ["command", f"--config={path}", *(f"--config.{each}" for each in overrides)]
        monkeypatch.setattr(sys, "argv", argv)
        values = flags.FlagValues()
        holder = config_flag.define_config_flag(values)
        values(argv)
        return holder.value

    return load


def example_values(section, prefix=""):
    """A flag for every setting, with a value that is not its default."""
    for key, value in section.items():
        kind = section.get_type(key)
        if isinstance(value, ConfigDict):
            yield from example_values(value, f"{prefix}{key}.")
        elif kind is bool:
            yield f"{prefix}{key}", str(not value), not value
        elif kind in (int, float):
            yield f"{prefix}{key}", str(kind(7)), kind(7)
        elif kind is tuple:
            yield f"{prefix}{key}", "1,2", (1, 2)
        else:
            yield f"{prefix}{key}", "word", "word"


SETTINGS = list(example_values(get_config()))
OPTIONAL = {
    f"{section}.{key}"
    for section in ("data", "method", "train", "eval")
    for key, value in get_config()[section].items(preserve_field_references=True)
    if not isinstance(value, (ConfigDict, int, float, str, tuple))
}


@pytest.mark.parametrize("owner", ["", "arms.one.", "prestage.", "stages[1]."])
def test_every_setting_can_be_overridden(load, owner):
    """A setting of the run, an arm, the pre-stage or a stage, set in the config before or not."""
    settings = [s for s in SETTINGS if owner == "" or s[0].split(".")[0] in ("method", "train")]
    config = load(*(f"{owner}{name}={text}" for name, text, _ in settings))
    path = config_flag.override_path(f"--config.{owner}x=1")[:-1]
    for name, _, value in settings:
        found = config
        for key in (*path, *name.split(".")):
            found = found[key]
        assert found == value and type(found) is type(value), name


def test_settings_whose_default_is_none_can_be_set_and_all_optional_ones_unset(load):
    assert OPTIONAL == {
        "data.limit", "method.clip_dual", "method.kl_limit", "method.tis_cap", "method.filter",
        "method.online_filter", "method.refresh", "method.plugin_settings", "train.clip", "eval.limit", "eval.every",
    }  # fmt: skip
    config = load("data.limit=100", "eval.limit=50", "eval.every=3", "method.tis_cap=2")
    found = config.data.limit, config.eval.limit, config.eval.every, config.method.tis_cap
    assert found == (100, 50, 3, 2.0)
    config = load(*(f"{name}=None" for name in sorted(OPTIONAL)))
    for name in OPTIONAL:
        section, key = name.split(".")
        assert config[section][key] is None, name
    assert load("tasks.mine.limit=5").tasks.mine.limit == 5


@pytest.mark.parametrize("text", ["dict(lo=0.1, max_refills=10)", '{"lo": 0.1, "max_refills": 10}'])
def test_a_dict_valued_setting_is_a_literal(load, text):
    for name in ("", "stages[1].", "arms.two."):
        config = load(f"{name}method.online_filter={text}")
        found = {
            "": config,
            "stages[1].": config.stages[1],
            "arms.two.": config.arms.two,
        }[name]["method"]["online_filter"]
        assert dict(found) == {"lo": 0.1, "max_refills": 10}


def test_an_override_of_a_stage_changes_that_stage_alone(load):
    config = load("stages[1].epochs=3", "stages[0].train.lr=1", "stages[1].method.kl_coef=0.5")
    first, second = resolve_stages(config)
    assert (first.steps, second.epochs) == (2, 3)
    assert (first.config.train.lr, second.config.train.lr) == (1.0, 1e-6)
    assert (first.config.method.kl_coef, second.config.method.kl_coef) == (0.01, 0.5)
    assert METHODS["grpo"]["kl_coef"] == 0.01  # the preset that both stages name
    config = load("stages[0].steps=None", "stages[0].epochs=0.5")
    assert (resolve_stages(config)[0].steps, resolve_stages(config)[0].epochs) == (None, 0.5)


def test_an_override_of_an_arm_changes_that_arm_alone(load):
    config = load("arms.one.model.freeze=vision", "arms.one.method.replay.fraction=0.5")
    assert config.arms.one.model.freeze == ("vision",) and config.arms.two.model.freeze == ()
    assert config.arms.one.method.replay.fraction == 0.5
    assert config.arms.two.method.replay.fraction == METHODS["sft"]["replay"]["fraction"] is None


def test_a_sweep_of_any_setting_is_a_list_of_values(load):
    """One value is a list too; a dict that is the value of a setting is swept by its keys."""
    config = load("sweep.train.lr=1e-6,1e-5", "sweep.data.limit=None,8", "sweep.method.kl_coef=0.5")
    assert list(expand_arms(config))[:4] == [
        f"one+lr={lr}+limit={limit}+kl_coef=0.5" for lr in (1e-6, 1e-5) for limit in (None, 8)
    ]
    window = "method.filter=dict(name='window', samples=8)"
    config = load(window, "sweep.method.filter.lo=1,2,4")
    config.stages, config.arms = (dict(task="a", steps=1),), ConfigDict()
    runs = expand_runs(config)
    assert [(name, run.method.filter["lo"]) for name, run in runs] == [
        (f"lo={lo}", lo) for lo in (1, 2, 4)
    ]
    assert all(run.method.filter["samples"] == 8 for _, run in runs)
    with pytest.raises(ValueError, match="config.sweep.trian: no setting has this name; did you"):
        expand_runs(load("sweep.trian.lr=1"))


def test_overrides_without_effect_on_the_type_leave_the_config_equal(load):
    plain = load()
    assert config_to_dict(load("data.limit=None", "train.lr=1e-6")) == config_to_dict(plain)
    assert json.dumps(config_to_dict(plain))


@pytest.mark.parametrize(
    "override, message",
    [
        ("train.lrr=1", "--config.train.lrr does not exist in the config; did you mean --config.train.lr?"),
        ("lr=1", "--config.lr does not exist in the config; did you mean --config.train.lr?"),
        ("stages[1].trian.lr=1", "did you mean --config.stages[1].train.lr?"),
        ("arms.one.train.lrr=1", "did you mean --config.arms.one.train.lr?"),
        ("arms.on.train.lr=1", "--config.arms.on does not exist; did you mean 'one'?"),
        ("tasks.mine.lmit=1", "--config.tasks.mine.lmit does not exist in the config; did you mean 'limit'?"),
        ("stages[2].steps=1", "--config.stages[2].steps does not exist; there are 2 stages"),
        ("train.batch=None", "--config.train.batch: expected a value like 128, got None"),
        ("stages[0].train.batch=None", "--config.stages[0].train.batch: expected a value like 128"),
        ("data.limit=abc", "--config.data.limit=abc: invalid literal for int()"),
        ("train.batch=1.5", "--config.train.batch=1.5: invalid literal for int()"),
        ("method.filter.name=window", 'set it as a whole: --config.method.filter="dict(name=..., ...)"'),
        ("stages[1.steps=2", "Could not parse 'stages[1.steps'"),
    ],
)  # fmt: skip
def test_a_wrong_override_is_refused_in_one_line(load, override, message):
    with pytest.raises(flags.Error) as error:
        load(override)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "flag, hint",
    [
        ("train.lr", "set --config.arms.a.train.lr$"),
        ("seed", "itself$"),
        ("data.template", r"set --config.stages\[0\].data.template$"),
    ],
)
def test_an_override_that_every_run_sets_again_is_refused(flag, hint):
    c = get_config()
    c.stages = (dict(task="a", steps=1, data=dict(template="direct")),)
    c.arms = ConfigDict(dict(a=dict(train=dict(lr=0.5)), b=dict(train=dict(lr=0.25))))
    c.seeds = (1, 2)
    with pytest.raises(ValueError, match=f"--config.{flag} changes nothing, .*{hint}"):
        config_flag.refuse_ineffective_overrides(c, ["--workdir=x", f"--config.{flag}=3"])
    config_flag.refuse_ineffective_overrides(
        c, ["--config.train.batch=3", "--config.arms.a.train.lr=0.1", "--config.seeds=1,2"]
    )
    c.arms.b = ConfigDict({})
    config_flag.refuse_ineffective_overrides(c, ["--config.train.lr=0.1"])  # one arm looks at it
