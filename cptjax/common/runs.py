"""Expand a config into its runs: arms x sweep x seeds x orders, base models, single stages."""

import fnmatch
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections.config_dict import ConfigDict

from cptjax.config import (
    MULTI_RUN_SECTIONS,
    evaluated_tasks,
    get_setting,
    merge_config,
    nearest_names,
    resolve_stages,
)

MAX_RUNS = 2000
# Folders in a workdir, which no arm may be named like.
RESERVED_NAMES = ("base", "fresh", "hf", "checkpoints", "rollouts", "predictions", "old", "corpus")
FRESH_FOLDER = "fresh"  # in the folder of a run: runs of its stages, each from the base model


class ArmPart(NamedTuple):
    """One of `config.arms`, or one choice of an axis of `config.sweep`."""

    name: str
    where: str  # the setting that declares it, for errors
    path: tuple[str, ...]  # of the setting that it changes; () = it has changes of several
    value: Any  # of the setting, or nested changes


def select_runs(
    config: ConfigDict, only: str = "", workdir: Path | None = None
) -> list[tuple[str, ConfigDict]]:
    """List the (sub-folder, config) of all runs, or of those that `only` names.

    `only` has sub-folders or patterns of them (`*`, `?`, `[...]`), separated by commas; a folder
    stands for all runs in it. The runs that make the base models of the others come first.
    """
    runs = list(prestage_runs(config).items())
    for folder, run_config in expand_runs(config, workdir):
        runs += [(folder, run_config), *fresh_runs(folder, run_config)]
    if not only:
        return runs
    names = [name for name, _ in runs if name]
    selected = set()
    for pattern in only.split(","):
        found = {n for n in names if fnmatch.fnmatchcase(n, pattern) or n.startswith(f"{pattern}/")}
        if not found:
            known = nearest_names(pattern, names) if names else "the config has one run"
            raise ValueError(f"--only={only}: no run is named {pattern!r}; {known}")
        selected |= found
    for name, run_config in runs:
        if name in selected and len(run_config.prestage):
            selected.add(prestage_folder(config, run_config.seed))
    return [(name, run_config) for name, run_config in runs if name in selected]


def list_parts(config: ConfigDict, only: str = "") -> list[str]:
    """List the arms, seeds and orders that `only` selects, each as a value of `only` for itself."""
    selected = {name for name, _ in select_runs(config, only)}
    return [name for name, _ in expand_runs(config) if name and name in selected]


def expand_runs(config: ConfigDict, workdir: Path | None = None) -> list[tuple[str, ConfigDict]]:
    """List the (sub-folder, config) of arms x seeds x orders; a single run has the sub-folder "".

    With a workdir, each run starts from the base model that the pre-stage exports there.
    """
    runs = []
    for arm, parts in expand_arms(config).items():
        for folder, run_config in _seeds_and_orders(_arm_config(config, parts)):
            if _has_own_model(parts):
                run_config = merge_config(run_config, {"prestage": {}})
            elif workdir is not None and len(config.prestage):
                model = workdir.absolute() / prestage_folder(config, run_config.seed) / "hf"
                run_config = merge_config(run_config, {"model": {"path": str(model)}})
            runs.append((f"{arm}/{folder}".strip("/"), run_config))
    return runs


# ---- arms ----------------------------------------------------------------------------------------


def expand_arms(config: ConfigDict) -> dict[str, tuple[ArmPart, ...]]:
    """Return the parts of each arm by its name: `arms` times every axis of `sweep`.

    In `sweep`, a tuple has values of the setting at that place, and a word that is no setting has
    named changes, as `arms` has:

        arms = dict(sft=dict(...), grpo=dict(...))
        sweep = dict(train=dict(lr=(1e-6, 1e-5)), mix=dict(none={}, half=dict(method=dict(...))))

    gives sft+lr=1e-06+none, sft+lr=1e-06+half, and so on.
    """
    axes = [_named_parts(config.arms, "config.arms")] if len(config.arms) else []
    axes += _find_axes(config, config.sweep)
    axis_lengths = (*map(len, axes), len(config.seeds) or 1, len(config.orders) or 1)
    if math.prod(axis_lengths) > MAX_RUNS:
        raise ValueError(f"the config describes more than {MAX_RUNS} runs; reduce arms or sweep")
    arms = {"+".join(part.name for part in parts): parts for parts in itertools.product(*axes)}
    if len(arms) < math.prod(map(len, axes)):
        raise ValueError(f"config.sweep: two arms have one name, of {', '.join(arms)}; rename them")
    return arms


def _file_order(section: ConfigDict) -> list[str]:
    """Return the keys of a section in the order of the config file, not sorted by name."""
    return list(vars(section)["_fields"])


def _named_parts(choices: ConfigDict, where: str) -> list[ArmPart]:
    parts = []
    for name in _file_order(choices):
        if not isinstance(choices[name], ConfigDict):
            raise ValueError(f"{where}.{name}: expected a dict of changes, got {choices[name]!r}")
        if not re.fullmatch(r"\w[\w.=+-]*", name) or name in RESERVED_NAMES or len(name) > 100:
            raise ValueError(
                f"{where}: {name!r:.120} cannot be the name of a folder of runs; expected letters, "
                f"digits and . = + - _, and none of {', '.join(RESERVED_NAMES)}"
            )
        _refuse_multi_run_sections(choices[name], f"{where}.{name}")
        parts.append(ArmPart(name, f"{where}.{name}", (), choices[name].to_dict()))
    return parts


def _find_axes(
    config: ConfigDict, section: ConfigDict, above: tuple[str, ...] = ()
) -> list[list[ArmPart]]:
    """Return the axes in `sweep`, or in a section of it."""
    axes = []
    for name in _file_order(section):
        path, values = (*above, name), section[name]
        where = f"config.sweep.{'.'.join(path)}"
        if path[0] in (*MULTI_RUN_SECTIONS, "seed"):
            raise ValueError(f"{where}: {path[0]} belongs to the whole config; set it there")
        if isinstance(values, ConfigDict) and path[0] not in config:
            if not all(isinstance(changes, ConfigDict) for changes in values.values()):
                raise ValueError(
                    f"{where}: no setting has this name; {nearest_names(name, config)}"
                )
            axes.append(_named_parts(values, where))
        elif isinstance(values, ConfigDict):
            axes += _find_axes(config, values, path)
        elif isinstance(values, tuple | list) and values:
            axes.append([ArmPart(f"{name}={value}", where, path, value) for value in values])
        else:
            raise ValueError(f"{where}: expected a tuple of values, got {values!r}")
    for part in itertools.chain(*axes):
        if not re.fullmatch(r"[\w.=+-]+", part.name):
            raise ValueError(
                f"{part.where}: {part.name!r} cannot be part of a folder's name; name it, as in "
                "config.sweep.word = dict(name=dict(...))"
            )
    return axes


def _arm_config(config: ConfigDict, parts: Sequence[ArmPart]) -> ConfigDict:
    """Return the config of one arm."""
    merged = config
    for part in parts:
        where = "config.sweep" if part.path else part.where
        merged = merge_config(merged, _nest_change(merged, part.path, part.value), where)
    for part in parts:
        stages = resolve_stages(merged) if part.path else []
        if part.path and part.value not in [get_setting(s.config, part.path) for s in stages]:
            raise ValueError(
                f"{part.where}={part.value!r} changes nothing, since each stage or another axis "
                "sets it"
            )
    if len(merged.stages) != len(config.stages):
        merged.orders = ()  # the orders index the stages of the config, not those of this arm
    return merged


def _nest_change(node: Any, path: Sequence[str], value: Any) -> Any:
    """Return the override that sets the value at a path.

    A dict that is the value of a setting, such as `method.filter`, keeps its other keys.
    """
    if not path:
        return value
    change = {path[0]: _nest_change(get_setting(node, path[:1]), path[1:], value)}
    return {**node, **change} if isinstance(node, Mapping) else change


def _has_own_model(parts: Sequence[ArmPart]) -> bool:
    """Return whether an arm names its model, so that its base is not that of the pre-stage."""
    models = [_nest_change({}, part.path, part.value).get("model", {}) for part in parts]
    return any(not {"path", "preset"}.isdisjoint(model) for model in models)


def _refuse_multi_run_sections(changes: Mapping[str, Any], where: str) -> None:
    for name in MULTI_RUN_SECTIONS:
        if name in changes:
            raise ValueError(
                f"{where} sets {name}, which belongs to the whole config; set config.{name}"
            )


# ---- seeds and orders ----------------------------------------------------------------------------


def _seeds_and_orders(config: ConfigDict) -> list[tuple[str, ConfigDict]]:
    """List the (sub-folder, config) of every seed and order of one arm."""
    runs = []
    for seed in config.seeds or (config.seed,):
        for i, order in enumerate(config.orders or (range(len(config.stages)),)):
            seed_part = [f"seed{seed}"] if config.seeds else []
            order_part = [f"order{i}"] if config.orders else []
            changes = {
                "seed": seed,
                "stages": _reorder_stages(config.stages, order),
                **{"seeds": (), "orders": (), "arms": {}, "sweep": {}},
            }
            runs.append(("_".join(seed_part + order_part), merge_config(config, changes)))
    return runs


def _reorder_stages(stages: Sequence[Mapping], order: Sequence[int]) -> tuple[Mapping, ...]:
    if sorted(order) != list(range(len(stages))):
        raise ValueError(
            f"config.orders: expected each of 0..{len(stages) - 1} once, got {tuple(order)}"
        )
    return tuple(stages[i] for i in order)


# ---- base models and single stages ---------------------------------------------------------------


def prestage_runs(config: ConfigDict) -> dict[str, ConfigDict]:
    """Return the configs of the runs that make base models, by sub-folder.

    Without a pre-stage there is none; with `seeds` there is one for each seed.
    """
    if not len(config.prestage):
        return {}
    _refuse_multi_run_sections(config.prestage, "config.prestage")
    single = {"prestage": {}, "arms": {}, "sweep": {}, "seeds": (), "orders": ()}
    runs = {}
    for seed in config.seeds or (config.seed,):
        run_config = merge_config(config, {**single, "seed": seed})
        run_config = merge_config(run_config, config.prestage.to_dict(), "config.prestage")
        runs[prestage_folder(config, seed)] = run_config
    return runs


def prestage_folder(config: ConfigDict, seed: int) -> str:
    return f"base/seed{seed}" if config.seeds else "base"


def fresh_runs(folder: str, run_config: ConfigDict) -> list[tuple[str, ConfigDict]]:
    """List the runs that train each stage of a run but the first from the base model.

    They are the references of the metric `plasticity`. Only the stage's tasks are evaluated.
    """
    stages, runs = resolve_stages(run_config) if run_config.fresh else [], []
    for stage in stages[1:]:
        if tasks := [t for t in stage.tasks if t in evaluated_tasks(run_config, stages)]:
            name = f"{folder}/{FRESH_FOLDER}/stage{stage.number}".strip("/")
            settings = {"tasks": tasks, "general": (), "groups": {}}
            changes = {
                "stages": (run_config.stages[stage.number - 1],),
                "eval": {**settings, "before": False, "every": None, "drift": 0},
                "expect": (),
            }
            runs.append((name, merge_config(run_config, changes)))
    return runs
