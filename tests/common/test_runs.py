"""Configs expand into runs: arms, sweeps, seeds, orders, base models, single stages."""

import pytest
from ml_collections import ConfigDict

from configs.base import METHODS, get_config
from cptjax.common.runs import expand_arms, expand_runs, prestage_runs, select_runs
from cptjax.config import config_differences, config_fingerprint, config_to_dict, recorded_config


@pytest.fixture
def c():
    c = get_config()
    c.stages = (
        dict(task="a", steps=2),
        dict(task=("b", "c"), epochs=0.5, method=dict(kl_coef=0.5), train=dict(batch=8)),
    )
    return c


def test_a_single_run_has_no_sub_folder(c):
    assert [(folder, run.seed) for folder, run in expand_runs(c)] == [("", 0)]


def test_arms_seeds_and_orders_are_multiplied(c):
    c.seeds, c.orders = (3, 4), ((0, 1), (1, 0))
    c.arms = ConfigDict(
        dict(
            x=dict(train=dict(lr=0.5)),
            y=dict(stages=(dict(task="b", steps=1), dict(task="a", steps=1))),
        )
    )
    runs = dict(expand_runs(c))
    assert list(runs) == [f"{arm}/seed{s}_order{o}" for arm in "xy" for s in (3, 4) for o in (0, 1)]
    assert (
        runs["x/seed4_order0"].seed == 4
        and runs["x/seed4_order0"].train.lr == 0.5
        and runs["y/seed3_order0"].train.lr == 1e-6
    )
    assert [s["task"] for s in runs["y/seed3_order1"].stages] == ["a", "b"]
    assert not any(len(run.arms) or run.seeds or run.orders for run in runs.values())
    assert all(dict(expand_runs(run)).keys() == {""} for run in runs.values())


def test_a_schedule_of_another_length_has_no_other_order(c):
    c.orders = ((0, 1), (1, 0))
    c.arms = ConfigDict(dict(joint=dict(stages=(dict(task=("a", "b"), steps=1),)), sft={}))
    assert [folder for folder, _ in expand_runs(c)] == ["joint", "sft/order0", "sft/order1"]


@pytest.mark.parametrize("section", ["arms", "prestage"])
@pytest.mark.parametrize(
    "name, value",
    [("seeds", (1, 2)), ("orders", ((1, 0),)), ("prestage", {"seed": 1}), ("arms", {"b": {}})],
)
def test_an_arm_and_the_prestage_cannot_set_seeds_orders_arms_or_prestage(c, section, name, value):
    c[section] = ConfigDict({"x": {name: value}} if section == "arms" else {name: value})
    with pytest.raises(
        ValueError, match=f"config.{section}.* sets {name}, which belongs to the whole config"
    ):
        prestage_runs(c), expand_runs(c)


def test_an_arm_with_its_own_model_does_not_use_the_prestage(c, tmp_path):
    c.prestage = ConfigDict(dict(stages=(dict(task="a", steps=1),)))
    c.arms = ConfigDict(dict(own=dict(model=dict(path="elsewhere/hf")), made={}))
    runs = dict(expand_runs(c, tmp_path))
    assert runs["own"].model.path == "elsewhere/hf" and not len(runs["own"].prestage)
    assert runs["made"].model.path == str(tmp_path / "base" / "hf")
    assert recorded_config(runs["own"], tmp_path / "own")["model"]["path"] == "elsewhere/hf"
    assert recorded_config(runs["made"], tmp_path / "made")["model"]["path"] == "../base/hf"
    other = dict(expand_runs(c, tmp_path / "moved"))["made"]
    assert (
        config_fingerprint(runs["made"])
        == config_fingerprint(other)
        != config_fingerprint(runs["own"])
    )


def test_an_order_names_every_stage_once(c):
    c.orders = ((0, 0),)
    with pytest.raises(
        ValueError, match=r"config.orders: expected each of 0..1 once, got \(0, 0\)"
    ):
        expand_runs(c)


def test_a_sweep_multiplies_the_arms_in_the_order_of_the_config(c):
    c.arms = ConfigDict(dict(sft=dict(method=METHODS["sft"]), grpo=dict(method=METHODS["grpo"])))
    c.sweep = ConfigDict(
        dict(
            train=dict(lr=(1e-5, 1e-6)),
            keep=dict(none={}, half=dict(method=dict(entropy_coef=0.5))),
        )
    )
    c.seeds = (0, 1)
    runs = dict(expand_runs(c))
    arms = [
        f"{method}+lr={lr}+{keep}"
        for method in ("sft", "grpo")
        for lr in ("1e-05", "1e-06")
        for keep in ("none", "half")
    ]
    assert list(expand_arms(c)) == arms  # neither sorted by name nor by number
    assert list(runs) == [f"{arm}/seed{seed}" for arm in arms for seed in (0, 1)]
    for name, run in runs.items():
        assert run.method.name == name.partition("+")[0]
        assert run.train.lr == float(name.partition("lr=")[2][:5])
        assert run.method.entropy_coef == (0.5 if "half" in name else 0.0)
        assert dict(expand_runs(run)).keys() == {""}
    assert len({config_fingerprint(run) for run in runs.values()}) == len(runs)


def test_a_run_of_a_sweep_is_the_run_that_sets_the_value_itself(c):
    c.sweep = ConfigDict(dict(train=dict(lr=(0.5,))))
    (name, swept), c.sweep = expand_runs(c)[0], ConfigDict()
    c.train.lr = 0.5
    ((_, run),) = expand_runs(c)
    assert name == "lr=0.5" and config_to_dict(swept) == config_to_dict(run)
    old = {k: v for k, v in config_to_dict(run).items() if k not in ("sweep", "fresh", "report")}
    assert config_differences(old, config_to_dict(run)) == []  # config.json before sweeps existed


def test_one_key_of_a_filter_is_swept(c):
    c.method.filter = dict(name="window", samples=8)
    c.sweep = ConfigDict(dict(method=dict(filter=dict(lo=(1, 2)))))
    found = {name: dict(run.method.filter) for name, run in expand_runs(c)}
    assert found == {f"lo={lo}": {"name": "window", "samples": 8, "lo": lo} for lo in (1, 2)}


def test_a_swept_model_does_not_use_the_prestage(c, tmp_path):
    c.prestage = ConfigDict(dict(stages=(dict(task="a", steps=1),)))
    c.sweep = ConfigDict(dict(size=dict(own=dict(model=dict(path="elsewhere/hf")), made={})))
    runs = dict(expand_runs(c, tmp_path))
    assert runs["own"].model.path == "elsewhere/hf" and not len(runs["own"].prestage)
    assert runs["made"].model.path == str(tmp_path / "base" / "hf")


@pytest.mark.parametrize(
    "sweep, message",
    [
        (
            dict(train=dict(lrr=(1.0,))),
            "config.sweep.train.lrr does not exist; did you mean 'lr'",
        ),
        (
            dict(trian=dict(lr=(1.0,))),
            "config.sweep.trian: no setting has this name; did you mean 'train'",
        ),
        (dict(train=dict(lr=())), r"config.sweep.train.lr: expected a tuple of values, got \(\)"),
        (dict(train=dict(lr=0.5)), "config.sweep.train.lr: expected a tuple of values, got 0.5"),
        (dict(train=dict(lr=("a",))), "config.sweep.train.lr: expected a number"),
        (
            dict(train=dict(lr=(0.5, 0.5))),
            "config.sweep: two arms have one name, of lr=0.5; rename",
        ),
        (dict(model=dict(path=("a/b",))), "'path=a/b' cannot be part of a folder's name; name it"),
        (dict(seed=(1, 2)), "config.sweep.seed: seed belongs to the whole config"),
        (
            dict(x=dict(y=dict(seeds=(1,)))),
            "config.sweep.x.y sets seeds, which belongs to the whole",
        ),
        (dict(train=dict(batch=(8, 16))), None),
        (dict(x=dict(y=dict(train=dict(lr=0.5))), train=dict(lr=(0.1, 0.2))), None),
        (
            dict(train=dict(lr=(0.1, 0.2)), x=dict(y=dict(train=dict(lr=0.5)))),
            "config.sweep.train.lr=0.1 changes nothing, since each stage or another axis sets it",
        ),
    ],
)
def test_a_sweep_that_makes_no_sense_is_refused(c, sweep, message):
    c.sweep = ConfigDict(sweep)
    if message is None:
        assert len(expand_runs(c)) == 2
        return
    with pytest.raises(ValueError, match=message):
        expand_runs(c)


def test_a_sweep_of_what_every_stage_sets_is_refused(c):
    c.stages = tuple({**stage, "train": {"batch": 8}} for stage in c.stages)
    c.sweep = ConfigDict(dict(train=dict(batch=(16, 32))))
    with pytest.raises(ValueError, match="config.sweep.train.batch=16 changes nothing"):
        expand_runs(c)


def test_only_selects_runs_and_their_base_models(c):
    c.prestage = ConfigDict(dict(stages=(dict(task="a", steps=1),)))
    c.arms = ConfigDict(
        dict(sft={}, sft_low=dict(train=dict(lr=0.5)), own=dict(model=dict(path="x")))
    )
    c.seeds = (1, 2)
    names = lambda only: [name for name, _ in select_runs(c, only)]
    arms = [f"{arm}/seed{s}" for arm in ("sft", "sft_low", "own") for s in (1, 2)]
    assert names("") == ["base/seed1", "base/seed2", *arms]
    assert names("sft/seed2") == ["base/seed2", "sft/seed2"]
    assert names("sft") == ["base/seed1", "base/seed2", "sft/seed1", "sft/seed2"]
    assert names("own/*") == ["own/seed1", "own/seed2"]  # has a model of its own
    assert names("*/seed1,own/seed2") == [
        *("base/seed1", "sft/seed1", "sft_low/seed1", "own/seed1", "own/seed2")
    ]
    assert names("base") == ["base/seed1", "base/seed2"]
    for wrong, message in (
        ("sft/seed3", "no run is named 'sft/seed3'; did you mean 'sft/seed2'"),
        (
            "sft,zz",
            f"no run is named 'zz'; known: {', '.join(sorted(['base/seed1', 'base/seed2', *arms]))}",
        ),
        ("sft,", "no run is named ''; known: base/seed1"),
    ):
        with pytest.raises(ValueError, match=f"--only={wrong}: {message}"):
            select_runs(c, wrong)
    c.arms, c.seeds, c.prestage = ConfigDict(), (), ConfigDict()
    with pytest.raises(
        ValueError, match="--only=sft: no run is named 'sft'; the config has one run"
    ):
        select_runs(c, "sft")


def test_each_later_stage_is_also_run_from_the_base_model(c):
    """Only where `fresh` is set, with the stage's settings, and evaluated on its tasks only."""
    c.eval.update(tasks="a,b", general=("facts",), every=5, drift=8)
    c.eval.groups = ConfigDict(dict(text=("facts",)))
    c.seeds, c.arms = (1, 2), ConfigDict(dict(x=dict(fresh=True), y={}))
    runs = dict(select_runs(c))
    names = [f"x/seed{s}{end}" for s in (1, 2) for end in ("", "/fresh/stage2")]
    assert list(runs) == [*names, "y/seed1", "y/seed2"]
    run = runs["x/seed2/fresh/stage2"]
    assert run.seed == 2 and list(map(dict, run.stages)) == [dict(c.stages[1])]
    assert (run.eval.tasks, run.eval.general, run.eval.before) == ("b", (), False)
    assert run.eval.every is None and run.eval.drift == 0 and not len(run.eval.groups)
    c.orders = ((1, 0),)  # stage 2 trains a
    assert dict(select_runs(c, "x/seed1_order0/*"))["x/seed1_order0/fresh/stage2"].eval.tasks == "a"
    c.eval.tasks = "b"
    assert list(dict(select_runs(c, "x"))) == ["x/seed1_order0", "x/seed2_order0"]
