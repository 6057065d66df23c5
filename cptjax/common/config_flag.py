"""The --config flag: load a config file, and override any of its settings on the command line."""

import ast
import contextlib
import copy
import difflib
import importlib
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags
from ml_collections.config_dict import ConfigDict, FieldReference
from ml_collections.config_flags import config_path

from cptjax.common import config_checks, files
from cptjax.common.runs import expand_runs, prestage_runs
from cptjax.config import (
    FREE_SECTIONS,
    MULTI_RUN_SECTIONS,
    get_setting,
    is_optional,
    nearest_names,
    resolve_stages,
)

REPOSITORY_ROOT = Path(__file__).resolve().parents[2]
STAGE_KEYS = ("task", "steps", "epochs")  # settings that only stages have


def define_config_flag(flag_values: flags.FlagValues = flags.FLAGS) -> flags.FlagHolder:
    """Define `--config=configs/X.py[:argument]` and `--config.section.key=value`.

    A config file may import others from the repository's root: `from configs.base import METHODS`.
    """
    sys.path.insert(0, str(REPOSITORY_ROOT))
    parsers = {
        int: _OptionalParser(flags.IntegerParser()),
        float: _OptionalParser(flags.FloatParser()),
        object: _LiteralParser(),
        type(None): _LiteralParser(),
    }
    for kind, parser in parsers.items():
        config_flags.register_flag_parser_for_type(kind, parser)
    holder = config_flags.DEFINE_config_file(
        "config", None, "Config file, with its argument after a colon.", flag_values
    )
    flag = flag_values["config"]
    flag.parser = _ConfigFileParser(flag.parser)
    return holder


class _OptionalParser(flags.ArgumentParser):
    """Parse `None` as None, and any other text with another parser."""

    def __init__(self, parser: flags.ArgumentParser):
        self.parser = parser

    def parse(self, argument: Any) -> Any:
        return None if argument == "None" else self.parser.parse(argument)

    def flag_type(self) -> str:
        return self.parser.flag_type()


class _LiteralParser(flags.ArgumentParser):
    """Parse a Python literal or `dict(a=1, b=2)`; other text stays a string."""

    def parse(self, argument: Any) -> Any:
        try:
            node = ast.parse(argument, mode="eval").body
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "dict":
                return {word.arg: ast.literal_eval(word.value) for word in node.keywords}
            return ast.literal_eval(node)
        except (ValueError, SyntaxError, TypeError):
            return argument

    def flag_type(self) -> str:
        return "literal"


class _ConfigFileParser(flags.ArgumentParser):
    """Load a config file and prepare its overrides on the command line."""

    def __init__(self, parser: flags.ArgumentParser):
        self.parser = parser

    def parse(self, argument: str) -> ConfigDict:
        with _explain_config_file(argument):
            config = self.parser.parse(argument)
            if not isinstance(config, ConfigDict):
                getattr(config, "lock", None)  # raises the error of a file that is not loaded yet
                got = type(config).__name__
                raise ValueError(f"get_config() returns {got}; expected a ConfigDict")
            config_checks.check_sections(config)
            base = importlib.import_module("configs.base").get_config()
            _refuse_unknown_settings(config, base)
        with config.unlocked():
            _separate_arms_and_stages(config)
            for override in sys.argv:
                if path := override_path(override):
                    _prepare_override(config, path, is_none=override.endswith("=None"))
        return config

    def flag_type(self) -> str:
        return self.parser.flag_type()


def _refuse_unknown_settings(config: ConfigDict, base: ConfigDict, where: str = "config") -> None:
    """Refuse settings that configs/base.py does not declare, such as misspelt ones."""
    for key, value in config.items():
        if key not in base:
            raise ValueError(f"{where}.{key} does not exist; {nearest_names(key, base)}")
        if key not in FREE_SECTIONS and isinstance(base[key], ConfigDict):
            if isinstance(value, ConfigDict):
                _refuse_unknown_settings(value, base[key], f"{where}.{key}")


@contextlib.contextmanager
def _explain_config_file(argument: str) -> Iterator[None]:
    """Turn whatever the code of a config file raises into an error that names the file."""
    try:
        yield
    except BaseException as error:  # also sys.exit() and MemoryError
        reason = str(error).strip()
        if reason.startswith("Error whilst parsing config file"):  # its last line is the reason
            reason = reason.splitlines()[-1].strip()
        elif not isinstance(error, flags.Error | ValueError | OSError):
            reason = files.describe_error(error)
        prefix = "" if argument and argument in reason else f"--config={argument}: "
        raise flags.Error(f"{prefix}{' '.join(reason.split())}") from error


def override_path(argument: str) -> tuple[str | int, ...]:
    """Return the path of the setting that a flag overrides; () if the flag is no override.

    `--config.stages[1].epochs=3` gives ("stages", 1, "epochs").
    """
    match = re.match(r"--?(?:no)?config\.([^=]+)", argument)
    return config_path.split(match[1]) if match else ()


def flag_name(path: Sequence[str | int]) -> str:
    """Return the flag of a setting, as written on the command line."""
    return "--config" + "".join(f"[{k}]" if isinstance(k, int) else f".{k}" for k in path)


def _separate_arms_and_stages(config: ConfigDict) -> None:
    """Copy every arm and every stage, because they may share dicts and an override is for one."""
    for name, arm in config.arms.items():
        config.arms[name] = ConfigDict(copy.deepcopy(arm.to_dict()))
    for section in (config, config.prestage, *config.arms.values()):
        if "stages" in section:
            section.stages = tuple(copy.deepcopy(stage) for stage in section.stages)


def _prepare_override(config: ConfigDict, path: Sequence[str | int], is_none: bool) -> None:
    """Make sure that an overridden setting exists and has the type that the config declares.

    Arms, the pre-stage and stages have only the settings that they change, but ml_collections
    overrides only settings that exist, and takes their types from the current values.
    """
    if path[0] == "sweep" and len(path) > 1:
        _prepare_sweep(config.sweep, path[1:])
        return
    section, keys = _find_overrides(config, path)
    if section is not config and keys[0] in STAGE_KEYS:
        section[keys[0]] = section.get(keys[0]) if keys[0] == "task" else None
        return
    if not set(FREE_SECTIONS).isdisjoint(keys):
        _check_free_keys(section, path, keys)
        return
    declared = config
    for key in keys[:-1]:
        _check_exists(config, declared, key, path, keys)
        if key not in section:
            section[key] = {}
        section, kind, declared = section[key], declared.get_type(key), declared[key]
        if kind is not ConfigDict:  # a setting that may be None or a dict, such as method.filter
            if not isinstance(section, Mapping | ConfigDict):
                whole = flag_name(path[:-1])
                raise flags.IllegalFlagValueError(
                    f"{flag_name(path)}: {whole} is {section!r}, which has no settings of its own; "
                    f'set it as a whole: {whole}="dict({path[-1]}=..., ...)"'
                )
            return
    key = keys[-1]
    _check_exists(config, declared, key, path, keys)
    if is_none and not is_optional(declared, key):
        raise flags.IllegalFlagValueError(
            f"{flag_name(path)}: expected a value like {declared[key]!r}, got None; "
            "configs/base.py says which settings may be None"
        )
    if section is declared:
        return
    kind = declared.get_type(key)
    if isinstance(section, ConfigDict):
        if key in section:
            del section[key]
        section[key] = FieldReference(declared[key], field_type=kind)
    else:
        section[key] = None if kind is object else declared[key]


def _prepare_sweep(section: ConfigDict, path: Sequence[str]) -> None:
    """Make sure that the sweep of a setting exists, as a tuple; `expand_arms` checks its name."""
    for key in path[:-1]:
        if key not in section:
            section[key] = {}
        section = section[key]
    section[path[-1]] = section.get(path[-1], ())


def _find_overrides(
    config: ConfigDict, path: Sequence[str | int]
) -> tuple[ConfigDict | dict, Sequence[str | int]]:
    """Return the arm, pre-stage, stage or config that an override changes, and its keys there."""
    section, keys = config, path
    if path[0] == "arms" and len(path) > 2:
        if path[1] not in config.arms:
            raise flags.IllegalFlagValueError(
                f"{flag_name(path[:2])} does not exist; {nearest_names(path[1], config.arms)}"
            )
        section, keys = config.arms[path[1]], path[2:]
    elif path[0] == "prestage" and len(path) > 1:
        section, keys = config.prestage, path[1:]
    if keys[0] == "stages" and len(keys) > 2:
        stages = section.stages if "stages" in section else ()
        if keys[1] not in range(len(stages)):
            raise flags.IllegalFlagValueError(
                f"{flag_name(path)} does not exist; there are {len(stages)} stages, counted from 0"
            )
        section, keys = stages[keys[1]], keys[2:]
    return section, keys


def _check_exists(
    config: ConfigDict,
    declared: ConfigDict,
    key: str | int,
    path: Sequence[str | int],
    keys: Sequence[str | int],
) -> None:
    """Refuse an override of a setting that the config does not have, with the nearest name."""
    if key in declared:
        return
    owner = path[: len(path) - len(keys)]
    names = [flag_name([*owner, name]) for name in _setting_names(config)]
    close = [name for name in names if name.endswith(f".{key}")]  # the section was left out
    close += difflib.get_close_matches(flag_name(path), names, 1, 0.5)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise flags.IllegalFlagValueError(f"{flag_name(path)} does not exist in the config{hint}")


def _check_free_keys(section: Any, path: Sequence[str | int], keys: Sequence[str | int]) -> None:
    """Refuse an override of a key that a user's own section, such as `tasks`, does not have."""
    for key in keys:
        if isinstance(section, Mapping | ConfigDict) and key not in section:
            raise flags.IllegalFlagValueError(
                f"{flag_name(path)} does not exist in the config; {nearest_names(key, section)}"
            )
        section = section[key]


def _setting_names(section: ConfigDict, prefix: str = "") -> list[str]:
    """Return the dotted names of all settings."""
    names = []
    for key, value in section.items():
        names.append(f"{prefix}{key}")
        if isinstance(value, ConfigDict):
            names += _setting_names(value, f"{prefix}{key}.")
    return names


def refuse_ineffective_overrides(config: ConfigDict, argv: Sequence[str]) -> None:
    """Refuse an override that has no effect because every arm or stage sets the value itself."""
    overridden = [path for path in map(override_path, argv) if path]
    paths = [path for path in overridden if path[0] not in MULTI_RUN_SECTIONS]
    if not paths:
        return
    runs = [*prestage_runs(config).values(), *(run for _, run in expand_runs(config))]
    stages = [stage.config for run in runs for stage in resolve_stages(run)]
    for path in paths:
        value = get_setting(config, path)
        if all(get_setting(stage, path) != value for stage in stages):
            owners = [("arms", arm) for arm in config.arms]
            owners += [("stages", i) for i in range(len(config.stages))]
            setters = [
                flag_name((*owner, *path))
                for owner in owners
                if get_setting(config, (*owner, *path)) is not None
            ]
            hint = f"; set {setters[0]}" if setters else ""
            raise ValueError(
                f"{flag_name(path)} changes nothing, since every run of the config sets it "
                f"itself{hint}"
            )
