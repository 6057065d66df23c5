"""From a ConfigDict to checked, resolved stages: unknown keys and wrong types are refused with the nearest name."""

import copy
import dataclasses
import difflib
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

FREE_SECTIONS = ("tasks", "arms", "prestage", "groups")  # sections whose keys are the user's own
MULTI_RUN_SECTIONS = (
    "arms",
    "seeds",
    "orders",
    "prestage",
)  # what makes several runs of a config; neither an arm nor the pre-stage may set it
UNTYPED_KEYS = ("filter", "online_filter")  # None or a small dict
NUMBER_TYPES = (int, float)
UNHASHED_SECTIONS = (
    "allow_change",
    "log",
    "checkpoint",
    "mesh",
    "expect",
)  # may differ when a run is continued
OPTIONAL_TYPES: dict[str, type] = {  # what may be None, and its type where it is not
    "data.limit": int,
    "eval.limit": int,
    "eval.every": int,
    "method.tis_cap": float,
    "method.clip_dual": float,
    "method.kl_limit": float,
    "train.clip": float,
}
MINIMUM_VALUES = {  # smallest sensible value of what nothing else checks
    "data.prompt_limit": 1,
    "data.bad_rows": 0,
    "data.limit": 1,
    "data.workers": 0,
    "data.prefetch": 1,
    "rewards.processes": 1,
    "rollout.max_new_tokens": 1,
    "rollout.check_every": 1,
    "rollout.group": 1,
    "train.batch": 1,
    "train.micro_batch": 0,
    "train.max_skipped": 1,
    "train.chunk": 1,
    "eval.limit": 1,
    "eval.every": 1,
    "eval.mini": 1,
    "eval.batch": 1,
    "eval.max_new_tokens": 1,
    "eval.temperature": 0,
    "eval.drift": 0,
    "method.self_samples": 1,
    "log.every": 1,
    "log.gallery": 0,
    "mesh.slices": 1,
}
# What a stage may override. The rest belongs to the run: one model, one mesh, one way to evaluate.
STAGE_SECTIONS = ("data", "method", "rewards", "rollout", "train", "eval.every", "eval.mini", "log")
RUN_ONLY_KEYS = (
    "data.prompt_limit",
    "data.buckets",
    "rewards.timeout",
    "rewards.processes",
    "log.tensorboard",
    "log.wandb",
)


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage: what is trained on, for how long, with which settings."""

    number: int  # from 1; 0 is the base model
    tasks: tuple[str, ...]
    steps: int | None
    epochs: float | None
    config: ConfigDict  # the run's config with this stage's overrides

    @property
    def name(self) -> str:
        return "+".join(self.tasks)


def merge_config(
    config: ConfigDict, overrides: Mapping[str, Any], where: str = "config"
) -> ConfigDict:
    """A copy of the config with nested overrides; what the config does not know is refused."""
    out = ConfigDict(copy.deepcopy(config.to_dict()))
    with out.unlocked(), out.ignore_type():
        _merge_into(out, overrides, where)
    return out


def _merge_into(target: ConfigDict, overrides: Mapping[str, Any], where: str) -> None:
    for key, value in overrides.items():
        place = f"{where}.{key}"
        if key not in target:
            close = difflib.get_close_matches(key, list(target), 1)
            hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(target))}"
            raise ValueError(f"{place} does not exist; {hint}")
        if key in FREE_SECTIONS and isinstance(target[key], ConfigDict):
            target[key] = ConfigDict(value)
        elif isinstance(target[key], ConfigDict) and isinstance(value, Mapping | ConfigDict):
            _merge_into(target[key], value, place)
        else:
            target[key] = _check_type(target[key], value, place, key in UNTYPED_KEYS)


def _check_type(old: Any, new: Any, place: str, loose: bool) -> Any:
    """The new value if its type fits the old one's."""
    if loose:
        return new
    optional = next(
        (kind for name, kind in OPTIONAL_TYPES.items() if place.endswith(f".{name}")), None
    )
    if new is None or old is None:
        return _check_optional(new, optional, place)
    if isinstance(old, bool) != isinstance(new, bool):
        raise ValueError(f"{place} is {new!r}; expected {type(old).__name__} like {old!r}")
    if isinstance(old, NUMBER_TYPES) and isinstance(new, NUMBER_TYPES):
        if isinstance(old, int) and not isinstance(new, int):
            raise ValueError(f"{place} is {new!r}; expected a whole number like {old!r}")
        return float(new) if isinstance(old, float) else new
    if isinstance(old, tuple) and isinstance(new, list | tuple):
        return tuple(new)
    if isinstance(old, str) and place.endswith(".refresh") and isinstance(new, int):
        return new
    if isinstance(old, str) and place.endswith("eval.tasks") and isinstance(new, list | tuple):
        return ",".join(new)
    if not isinstance(new, type(old)):
        raise ValueError(f"{place} is {new!r}; expected {type(old).__name__} like {old!r}")
    return new


def _check_optional(new: Any, kind: type | None, place: str) -> Any:
    """A value where the old or the new one is None."""
    if new is None and kind is None:
        raise ValueError(f"{place} is None; expected a value, see configs/base.py")
    fits = isinstance(new, NUMBER_TYPES if kind is float else kind or object) and not (
        kind and isinstance(new, bool)
    )
    if new is not None and not fits:
        raise ValueError(
            f"{place} is {new!r}; expected None or {'a number' if kind is float else 'a whole number'}"
        )
    return new


def check_config_values(config: ConfigDict) -> None:
    """Numbers below what makes sense, groups of what is not evaluated, and values of a wrong type that a config file set itself."""
    for name, least in MINIMUM_VALUES.items():
        section, key = name.split(".")
        value = config[section][key]
        if value is None and name in OPTIONAL_TYPES:
            continue
        whole = name != "eval.temperature"
        if (
            isinstance(value, bool)
            or not isinstance(value, int if whole else NUMBER_TYPES)
            or value < least
        ):
            raise ValueError(
                f"config.{name} is {value!r}; expected {'a whole' if whole else 'a'} number of at least {least}"
            )
    for name, tasks in config.eval.groups.items():
        if (
            not isinstance(tasks, list | tuple)
            or not tasks
            or not set(tasks) <= set(config.eval.general)
        ):
            known = ", ".join(config.eval.general) or "(), which is empty"
            raise ValueError(
                f"config.eval.groups.{name} is {tasks!r}; expected a tuple of tasks of config.eval.general: {known}"
            )


def replayed_tasks(stages: Sequence[Stage], stage: Stage) -> list[str]:
    """Earlier stages' tasks whose rows are mixed into a stage, each once."""
    earlier = [t for s in stages[: stage.number - 1] for t in s.tasks]
    return (
        list(dict.fromkeys(t for t in earlier if t not in stage.tasks))
        if stage.config.method.replay.fraction
        else []
    )


def evaluated_tasks(config: ConfigDict, run: Sequence[Stage]) -> list[str]:
    """The tasks of `eval.tasks`, each once: those of the stages, or the ones that are named."""
    names = (
        [task for each in run for task in each.tasks]
        if config.eval.tasks == "all"
        else config.eval.tasks.split(",")
    )
    return list(dict.fromkeys(names))


def eval_templates(config: ConfigDict, run: Sequence[Stage], task: str) -> tuple[str, ...]:
    """The templates that a task is evaluated under: `eval.templates`, else the one that it was last trained with, else the run's."""
    trained = [each.config.data.template for each in run if task in each.tasks]
    return tuple(config.eval.templates) or tuple([config.data.template, *trained][-1:])


def resolve_stages(config: ConfigDict) -> list[Stage]:
    """The run's stages, each with its own resolved config."""
    if not config.stages:
        raise ValueError(
            "config.stages is empty; expected something like (dict(task='scienceqa', epochs=1), ...)"
        )
    return [_resolve_stage(config, i, dict(raw)) for i, raw in enumerate(config.stages, 1)]


def _resolve_stage(config: ConfigDict, number: int, raw: dict[str, Any]) -> Stage:
    where = f"config.stages[{number - 1}]"
    tasks = raw.pop("task", None)
    steps, epochs = raw.pop("steps", None), raw.pop("epochs", None)
    if not tasks:
        raise ValueError(f"{where} names no task; expected task='name' or task=('a', 'b')")
    if (steps is None) == (epochs is None):
        raise ValueError(
            f"{where}: expected one of steps=N and epochs=N, got steps={steps} epochs={epochs}"
        )
    amount = epochs if steps is None else steps
    if (
        isinstance(amount, bool)
        or not isinstance(amount, int if epochs is None else NUMBER_TYPES)
        or amount <= 0
    ):
        raise ValueError(
            f"{where}: expected {'a whole number of steps' if epochs is None else 'epochs'} above 0, got {amount!r}"
        )
    merged = merge_config(config, raw, where)
    for name in _set_keys(raw):
        if (
            not any(name == own or name.startswith(f"{own}.") for own in STAGE_SECTIONS)
            or name in RUN_ONLY_KEYS
        ):
            raise ValueError(
                f"{where} sets {name}, which belongs to the whole run; a stage may set {', '.join(STAGE_SECTIONS)}"
            )
    return Stage(
        number, (tasks,) if isinstance(tasks, str) else tuple(tasks), steps, epochs, merged
    )


def _set_keys(tree: Mapping, before: str = "") -> list[str]:
    """Dotted names of what a nested mapping sets, two levels deep."""
    deeper = lambda value: isinstance(value, Mapping | ConfigDict) and not before
    return [
        n
        for key, v in tree.items()
        for n in (_set_keys(v, f"{key}.") if deeper(v) else [f"{before}{key}"])
    ]


def expand_runs(config: ConfigDict, root: Path | None = None) -> list[tuple[str, ConfigDict]]:
    """(sub-folder, config) of every run that a config describes: arms x seeds x orders; one run has no sub-folder.

    With the workdir as `root` each stands on the base model that its pre-stage makes there.
    """
    arms = config.arms.to_dict()
    runs = (
        [(name, _arm_config(config, name, changes)) for name, changes in arms.items()]
        if arms
        else [("", config)]
    )
    own = {
        name
        for name, changes in arms.items()
        if {"path", "preset"} & changes.get("model", {}).keys()
    }
    return [
        (f"{arm}/{sub}".strip("/"), _put_on_base(one, root, config, arm in own))
        for arm, c in runs
        for sub, one in _seeds_and_orders(c)
    ]


def _arm_config(config: ConfigDict, name: str, changes: Mapping[str, Any]) -> ConfigDict:
    """An arm's config; a schedule of its own that is longer or shorter than the others' has no other order."""
    _refuse_multi_run_sections(changes, f"config.arms.{name}")
    arm = merge_config(config, changes, f"config.arms.{name}")
    return arm if len(arm.stages) == len(config.stages) else merge_config(arm, {"orders": ()})


def _refuse_multi_run_sections(changes: Mapping[str, Any], where: str) -> None:
    found = [name for name in MULTI_RUN_SECTIONS if name in changes]
    if found:
        raise ValueError(
            f"{where} sets {found[0]}, which belongs to the whole config: set config.{found[0]}"
        )


def all_runs(config: ConfigDict) -> list[tuple[str, ConfigDict]]:
    """(sub-folder, config) of every run that a config asks for: those that make base models, then the others."""
    return [*prestage_runs(config).items(), *expand_runs(config)]


def prestage_runs(config: ConfigDict) -> dict[str, ConfigDict]:
    """Sub-folder -> config of the runs that make the base models: none without a pre-stage, else one, or one a seed."""
    if not len(config.prestage):
        return {}
    _refuse_multi_run_sections(config.prestage, "config.prestage")
    plain = merge_config(config, {"prestage": {}, "arms": {}, "seeds": (), "orders": ()})
    seeds = config.seeds or (config.seed,)
    return {
        _base_folder(config, s): merge_config(
            merge_config(plain, {"seed": s}), config.prestage.to_dict(), "config.prestage"
        )
        for s in seeds
    }


def _base_folder(config: ConfigDict, seed: int) -> str:
    return f"base/seed{seed}" if config.seeds else "base"


def _put_on_base(
    single: ConfigDict, root: Path | None, config: ConfigDict, own: bool
) -> ConfigDict:
    """The run on the model that its pre-stage makes under `root`, or on its arm's own; only the former keeps its pre-stage."""
    if own:
        return merge_config(single, {"prestage": {}})
    if root is None or not len(config.prestage):
        return single
    return merge_config(
        single, {"model": {"path": str(root.absolute() / _base_folder(config, single.seed) / "hf")}}
    )


def _seeds_and_orders(config: ConfigDict) -> list[tuple[str, ConfigDict]]:
    out = []
    seeds, orders = config.seeds or (config.seed,), config.orders or (None,)
    for seed in seeds:
        for i, order in enumerate(orders):
            parts = [f"seed{seed}"] * bool(config.seeds) + [f"order{i}"] * bool(config.orders)
            changes: dict[str, Any] = {"seed": seed, "seeds": (), "orders": ()}
            if order is not None:
                changes["stages"] = _reorder_stages(config.stages, order)
            single = merge_config(config, changes)
            with single.unlocked():
                single.arms = ConfigDict()
            out.append(("_".join(parts), single))
    return out


def _reorder_stages(stages: tuple, order: tuple[int, ...]) -> tuple:
    if sorted(order) != list(range(len(stages))):
        raise ValueError(
            f"config.orders has {tuple(order)}; expected each of 0..{len(stages) - 1} once"
        )
    return tuple(stages[i] for i in order)


def config_to_dict(config: ConfigDict) -> dict[str, Any]:
    """The config as JSON holds it."""
    return json.loads(config.to_json_best_effort())


def recorded_config(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """The config as config.json holds it: the base model of a pre-stage by its place beside the workdir, so that both may move."""
    out = config_to_dict(config)
    if len(config.prestage):
        out["model"]["path"] = os.path.relpath(config.model.path, workdir)
    return out


def config_fingerprint(config: ConfigDict, sections: Sequence[str] = ()) -> str:
    """A hash of what decides a run's results, or of some sections; a pre-stage stands for the path of the model that it made."""
    whole = config_to_dict(config)
    if whole["prestage"]:
        whole["model"]["path"] = ""
    kept = {
        k: v
        for k, v in whole.items()
        if (k in sections if sections else k not in UNHASHED_SECTIONS)
    }
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


def config_differences(old: Mapping, new: Mapping, where: str = "") -> list[str]:
    """Lines "section.key: old -> new" for everything that differs and matters."""
    lines = []
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if a == b or (not where and key in UNHASHED_SECTIONS):
            continue
        both = isinstance(a, Mapping) and isinstance(b, Mapping)
        lines += (
            config_differences(a, b, f"{where}{key}.")
            if both
            else [f"{where}{key}: {a!r} -> {b!r}"]
        )
    return lines
