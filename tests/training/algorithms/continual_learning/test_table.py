"""Settings of continual-learning methods: defaults, refusals, and a class of the user's own."""

import re
from pathlib import Path

import jax.numpy as jnp
import pytest
from stage_fixtures import method_config, train_all_stages

from configs import base
from cptjax.training.algorithms.continual_learning.ewc import EWC
from cptjax.training.algorithms.continual_learning.hooks import (
    ContinualMethod,
    HookArrays,
    total_penalty,
)
from cptjax.training.algorithms.continual_learning.table import (
    CONTINUAL_METHODS,
    check_methods,
    continual_methods,
)

README = Path(__file__).parents[4] / "README.md"


def config(method="sft", **settings):
    c = base.get_config()
    c.method.update(base.METHODS[method] | settings)
    return c


def test_a_setting_that_is_none_has_the_default_of_the_class():
    (ewc,) = continual_methods(config(penalty=dict(name="ewc", coef=2.0)).method)
    assert ewc == EWC(2.0, samples=64)
    assert continual_methods(config().method) == ()


def test_every_method_has_a_name_of_its_own():
    names = [cls.name for classes in CONTINUAL_METHODS.values() for cls in classes]
    assert len(set(names)) == len(names) and set(CONTINUAL_METHODS) <= set(base.METHODS["sft"])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(penalty=dict(name="mass", coef=1.0)), "none, .*ewc"),
        (dict(penalty=dict(name="l2", coef=-1.0)), "coef=-1.0: expected a number above 0"),
        (dict(penalty=dict(name="l2", coef=0.0)), "does nothing"),
        (dict(penalty=dict(name="l2")), "needs method.penalty.coef"),
        (dict(penalty=dict(coef=1.0)), "without a name does nothing"),
        (dict(penalty=dict(name="l2", coef=1.0, samples=3)), "samples=3 is not a setting of 'l2'"),
        (dict(penalty=dict(name="ewc", coef=1.0, samples=0)), "at least 1 row"),
        (dict(stage_end=dict(name="wise_ft", weight=1.0)), "0 < weight < 1"),
        (dict(replay=dict(name="gold", fraction=1.0)), "0 < fraction < 1"),
        (dict(replay=dict(name="prompts", fraction=0.5)), "expected 'gold'"),
        (dict(plugin="missing.py:A"), "existing file"),
        (dict(plugin_settings={"a": 1}), "without method.plugin"),
    ],
)
def test_bad_settings_are_one_clear_line(settings, words):
    with pytest.raises(ValueError, match=words) as error:
        check_methods(config(**settings))
    assert "\n" not in str(error.value)


def test_a_class_of_the_users_own_acts_in_the_update(tmp_path):
    """The class is the one that the README shows."""
    path = tmp_path / "my_method.py"
    (code,) = re.findall(r"```python\n(import dataclasses.*?)```", README.read_text(), re.DOTALL)
    path.write_text(code)
    lines = {}
    for coef in (0.0, 0.5):
        method = dict(plugin=f"{path}:L1Movement", plugin_settings={"coef": coef})
        c = method_config("sft", steps=2, method=method, train=dict(lr=1e-2))
        lines[coef] = train_all_stages(c, tmp_path / str(coef))[2]
    free, held = lines[0.0], lines[0.5]
    assert [line["penalty"] for line in free] == [0, 0] and held[0]["penalty"] == 0
    assert held[1]["penalty"] > 1e-3 and held[0]["loss"] == free[0]["loss"]
    assert held[1]["grad_norm"] != free[1]["grad_norm"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("1 / 0", "raises ZeroDivisionError"),
        ("class Decay: pass", "inherits from cptjax.ContinualMethod"),
        (
            "import dataclasses, cptjax\n@dataclasses.dataclass(frozen=True)\n"
            "class Decay(cptjax.ContinualMethod):\n    name = 'decay'\n"
            "    def penalti(self, trained, start, kept): return 1.0\n",
            "decay: expected one of the hooks .*begin_stage, .*penalty, .*, got none",
        ),
    ],
)
def test_a_plugin_that_is_no_method_is_refused(text, words, tmp_path):
    path = tmp_path / "my_method.py"
    path.write_text(text)
    with pytest.raises(ValueError, match=words):
        check_methods(config(plugin=f"{path}:Decay"))


def test_a_penalty_that_is_no_scalar_is_refused_by_its_name():
    class Three(ContinualMethod):
        name = "three"

        def penalty(self, trained, start, kept):
            return jnp.ones(3)

    with pytest.raises(ValueError, match=r"three.penalty: expected a scalar, got shape \(3,\)"):
        total_penalty([Three()], {}, HookArrays())
    assert total_penalty([], {}, HookArrays()) is None


def test_hooks_of_the_base_class_do_nothing():
    method = ContinualMethod()
    assert method.penalty({}, None, None) is None and method.begin_stage({}) is None
    assert method.project_gradient({"a": 1}, None) == {"a": 1} and method.replayed_share == 0
