"""Merge overrides into a config, resolve its stages, compare it with another."""

import copy
import dataclasses
import difflib
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections.config_dict import ConfigDict, FieldReference

# Sections whose keys the user chooses.
FREE_SECTIONS = ("tasks", "arms", "sweep", "prestage", "groups")

# Sections about several runs of one config; an arm or the pre-stage cannot set them.
MULTI_RUN_SECTIONS = ("arms", "sweep", "seeds", "orders", "prestage", "report")

# Sections that may change when a run is resumed: they do not change its results.
RESUME_SECTIONS = (
    *("allow_change", "log", "checkpoint", "mesh", "stuck_minutes"),
    *("expect", "report", "sweep", "fresh"),
)

# Settings that are None or a dict, which a stage replaces as a whole.
OPTIONAL_DICTS = ("filter", "online_filter", "plugin_settings")

# What a stage may override, except the keys that belong to the whole run, which has one model, one
# mesh and one evaluation.
STAGE_SECTIONS = ("data", "method", "rewards", "rollout", "train", "eval.every", "eval.mini", "log")
RUN_ONLY_KEYS = (
    "data.prompt_limit",
    "data.buckets",
    "data.outside_images",
    "rewards.timeout",
    "rewards.processes",
    "log.tensorboard",
    "log.wandb",
    "log.trackio",
    "log.mlflow",
    "log.report_minutes",
)

MAX_STEPS, MAX_EPOCHS = 10**9, 10**6  # of a stage

_TYPE_NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    str: "a string",
    tuple: "a tuple",
    ConfigDict: "a section (dict)",
}


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage: its tasks, its length and its settings."""

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
    """Return a copy of the config with nested overrides; refuse keys that it does not have."""
    merged = copy.deepcopy(config).unlock()
    _merge_into(merged, overrides, where)
    return merged


def _merge_into(section: ConfigDict, overrides: Mapping[str, Any], where: str) -> None:
    for key, value in overrides.items():
        name = f"{where}.{key}"
        if not isinstance(key, str) or key not in section:
            raise ValueError(f"{name} does not exist; {nearest_names(str(key), section)}")
        if key in FREE_SECTIONS and isinstance(section[key], ConfigDict):
            if not isinstance(value, Mapping | ConfigDict):
                raise ValueError(f"{name}: expected a section (dict), got {value!r:.200}")
            section[key] = ConfigDict(value)
        elif section.get_type(key) is ConfigDict and isinstance(value, Mapping | ConfigDict):
            _merge_into(section[key], value, name)
        else:
            section[key] = _cast_value(section, key, value, name)


def nearest_names(name: str, names: Iterable[str]) -> str:
    """Return a hint for an error about an unknown name: the nearest known name, or all names."""
    names = sorted(names)
    close = difflib.get_close_matches(name, names, 1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}"


def get_setting(node: Any, path: Sequence[str | int]) -> Any:
    """Return the value of a setting; None if it does not exist."""
    for key in path:
        is_index = isinstance(key, int) and isinstance(node, list | tuple) and key < len(node)
        is_key = isinstance(node, Mapping | ConfigDict) and key in node
        node = node[key] if is_index or is_key else None
    return node.to_dict() if isinstance(node, ConfigDict) else node


def is_optional(section: ConfigDict, key: str) -> bool:
    """Return whether a setting may be None, that is, whether it is declared with `optional`."""
    fields = dict(section.items(preserve_field_references=True))
    return isinstance(fields[key], FieldReference)


def declare_recorded(config: ConfigDict) -> ConfigDict:
    """Let every setting of a recorded config be None: JSON does not say which ones may be.

    The values were checked when the run was started.
    """
    for key, value in list(config.items()):
        if isinstance(value, ConfigDict) and key not in OPTIONAL_DICTS:
            declare_recorded(value)
            continue
        value = value.to_dict() if isinstance(value, ConfigDict) else value
        kind = object if value is None or isinstance(value, dict) else type(value)
        del config[key]
        config[key] = FieldReference(value, field_type=kind)
    return config


def _cast_value(section: ConfigDict, key: str, value: Any, name: str) -> Any:
    """Return the value in the type that the config declares for the setting; refuse other types."""
    kind, optional = section.get_type(key), is_optional(section, key)
    if kind in (object, type(None)) or (value is None and optional):
        return value
    if kind is tuple and isinstance(value, list):
        return tuple(value)
    if kind is str and isinstance(value, list | tuple):  # eval.tasks=("a", "b")
        return ",".join(map(str, value))
    is_bool = isinstance(value, bool)
    if kind is float and isinstance(value, int) and not is_bool:
        return float(value)
    if not isinstance(value, kind) or is_bool != (kind is bool):
        expected = _TYPE_NAMES.get(kind, kind.__name__)
        default = section[key]
        has_example = kind not in (ConfigDict, bool) and default is not None
        example = f" like {default!r}" if has_example else ""
        raise ValueError(
            f"{name}: expected {'None or ' * optional}{expected}{example}, got {value!r}"
        )
    return value


def replayed_tasks(stages: Sequence[Stage], stage: Stage) -> list[str]:
    """Return the tasks of earlier stages that a stage replays, each once."""
    if not stage.config.method.replay.fraction:
        return []
    earlier = [task for other in stages[: stage.number - 1] for task in other.tasks]
    return [task for task in dict.fromkeys(earlier) if task not in stage.tasks]


def evaluated_tasks(config: ConfigDict, stages: Sequence[Stage]) -> list[str]:
    """Return the tasks of `eval.tasks`, each once: those of all stages, or the named ones."""
    if not all(config.eval.tasks.split(",")):
        raise ValueError(f"config.eval.tasks={config.eval.tasks!r}: expected all, or names 'a,b'")
    if config.eval.tasks == "all":
        names = [task for stage in stages for task in stage.tasks]
    else:
        names = config.eval.tasks.split(",")
    return list(dict.fromkeys(names))


def eval_templates(config: ConfigDict, stages: Sequence[Stage], task: str) -> tuple[str, ...]:
    """Return the templates under which a task is evaluated.

    These are `eval.templates`. If there are none, it is the template that the task was last trained
    with, or the template of the run for a task that no stage trains on.
    """
    if config.eval.templates:
        return tuple(config.eval.templates)
    trained = [stage.config.data.template for stage in stages if task in stage.tasks]
    return (trained[-1] if trained else config.data.template,)


def resolve_stages(config: ConfigDict) -> list[Stage]:
    """Return the run's stages, each with its own complete config."""
    if not config.stages:
        raise ValueError(
            "config.stages is empty; expected for example (dict(task='scienceqa', epochs=1), ...)"
        )
    for i, stage in enumerate(config.stages):
        if not isinstance(stage, Mapping | ConfigDict):
            raise ValueError(
                f"config.stages[{i}]: expected dict(task=..., ...), got {stage!r:.200}"
            )
    return [
        _resolve_stage(config, number, dict(stage)) for number, stage in enumerate(config.stages, 1)
    ]


def _resolve_stage(config: ConfigDict, number: int, overrides: dict[str, Any]) -> Stage:
    where = f"config.stages[{number - 1}]"
    tasks = overrides.pop("task", None)
    steps, epochs = overrides.pop("steps", None), overrides.pop("epochs", None)
    if not tasks:
        raise ValueError(f"{where}: expected task='name' or task=('a', 'b'), got no task")
    names = [tasks] if isinstance(tasks, str) else tasks
    is_tuple = isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)
    if not is_tuple or len(set(names)) < len(names):
        raise ValueError(
            f"{where}: expected task='name' or task=('a', 'b') of different names, got {tasks!r}"
        )
    if (steps is None) == (epochs is None):
        raise ValueError(
            f"{where}: expected one of steps=N and epochs=N, got steps={steps} epochs={epochs}"
        )
    if epochs is None:
        length, kinds, expected, most = steps, int, "a whole number of steps", MAX_STEPS
    else:
        length, kinds, expected, most = epochs, int | float, "epochs", MAX_EPOCHS
    is_number = isinstance(length, kinds) and not isinstance(length, bool)
    if not is_number or not 0 < length <= most:
        bound = f"of at most {most}" if is_number and length > most else "above 0"
        raise ValueError(f"{where}: expected {expected} {bound}, got {length!r:.200}")
    merged = merge_config(config, overrides, where)
    for name in _overridden_names(overrides):
        allowed = any(name == s or name.startswith(f"{s}.") for s in STAGE_SECTIONS)
        if not allowed or name in RUN_ONLY_KEYS:
            raise ValueError(
                f"{where} sets {name}, which belongs to the whole run; a stage may set "
                f"{', '.join(STAGE_SECTIONS)}"
            )
    return Stage(number, tuple(names), steps, epochs, merged)


def _overridden_names(overrides: Mapping[str, Any]) -> list[str]:
    """Return the names, "section" or "section.key", of the settings that the overrides set."""
    names = []
    for section, value in overrides.items():
        if isinstance(value, Mapping | ConfigDict):
            names += [f"{section}.{key}" for key in value]
        else:
            names.append(section)
    return names


def config_to_dict(config: ConfigDict) -> dict[str, Any]:
    """Return the config as nested dicts of JSON values."""
    return json.loads(config.to_json_best_effort())


def recorded_config(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Return the content of config.json.

    The path of a pre-stage's model is relative to the workdir, so that both folders may be moved.
    """
    recorded = config_to_dict(config)
    if len(config.prestage):
        recorded["model"]["path"] = os.path.relpath(config.model.path, workdir)
    return recorded


def config_fingerprint(config: ConfigDict, sections: Sequence[str] = ()) -> str:
    """Return a hash of the settings that decide a run's results, or of some sections.

    If the model is made by a pre-stage, the settings of the pre-stage are hashed, not the path.
    """
    settings = config_to_dict(config)
    if settings["prestage"]:
        settings["model"]["path"] = ""
    names = sections or settings.keys() - set(RESUME_SECTIONS)
    hashed = {name: settings[name] for name in names}
    return hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()[:16]


def config_differences(old: Mapping, new: Mapping, where: str = "") -> list[str]:
    """List "section.key: old -> new" for every difference that may change a run's results."""
    lines = []
    for key in sorted({*old, *new}):
        before, after = old.get(key), new.get(key)
        if before == after or (not where and key in RESUME_SECTIONS):
            continue
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            lines += config_differences(before, after, f"{where}{key}.")
        elif _are_sections(before, after):  # the same number of stages
            for i, (old_part, new_part) in enumerate(zip(before, after, strict=True)):
                lines += config_differences(old_part, new_part, f"{where}{key}[{i}].")
        else:
            lines.append(f"{where}{key}: {before!r} -> {after!r}")
    return lines


def _are_sections(*values: Any) -> bool:
    """Return whether values are lists of mappings of one length."""
    lists = all(isinstance(v, list | tuple) and len(v) == len(values[0]) for v in values)
    return lists and all(isinstance(part, Mapping) for value in values for part in value)
