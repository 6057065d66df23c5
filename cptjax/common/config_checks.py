"""Check a whole config before anything runs: its sections, the kinds and ranges of its values."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from ml_collections.config_dict import ConfigDict

from cptjax.common.images import MAX_FILE_PIXELS
from cptjax.config import is_optional

SECTIONS = (
    *("arms", "sweep", "report", "prestage", "model", "mesh", "tasks", "data", "method"),
    *("rewards", "rollout", "train", "eval", "checkpoint", "log"),
)
LARGEST_WHOLE = 2**31 - 1  # of int32, in which jax counts
LARGEST_FLOAT = 3.4e38  # of float32
LARGEST_SEED = 2**32 - 1  # a larger one gives the random numbers of a smaller one
MAX_TOKENS = 2**24  # of one row
MAX_ROWS = 2**20  # of one batch
MAX_PROCESSES = 1024
MAX_STAGES = 1000
MAX_NAME = 200  # characters; most file systems allow 255 bytes


class Range(NamedTuple):
    """The least and the largest value of a setting; a float as `low` allows fractions."""

    low: int | float
    high: int | float = LARGEST_WHOLE


# The settings whose range no other module checks, or whose upper bound keeps a mistake from using
# all memory. `check_config` checks that the others are finite.
RANGES = {
    "seed": Range(0, LARGEST_SEED),
    "stuck_minutes": Range(0.0),
    "model.min_pixels": Range(1, MAX_FILE_PIXELS),
    "model.max_pixels": Range(1, MAX_FILE_PIXELS),
    "model.lora.rank": Range(0, 2**16),
    "model.lora.alpha": Range(1e-6),
    "mesh.data": Range(-1, MAX_ROWS),
    "mesh.fsdp": Range(-1, MAX_ROWS),
    "mesh.model": Range(-1, MAX_ROWS),
    "mesh.slices": Range(1, MAX_ROWS),
    "data.prompt_limit": Range(1, MAX_TOKENS),
    "data.bad_rows": Range(0),
    "data.limit": Range(1),
    "data.workers": Range(0, MAX_PROCESSES),
    "data.prefetch": Range(1, MAX_PROCESSES),
    "method.self_samples": Range(1, MAX_ROWS),
    "method.replay.batch": Range(1, MAX_ROWS),
    "method.overlong": Range(0, MAX_TOKENS),
    "rewards.accuracy": Range(0.0),
    "rewards.format": Range(0.0),
    "rewards.short_words": Range(0),
    "rewards.short_penalty": Range(0.0),
    "rewards.timeout": Range(0.001, 1e6),
    "rewards.processes": Range(1, MAX_PROCESSES),
    "rollout.group": Range(1, MAX_ROWS),
    "rollout.max_new_tokens": Range(1, MAX_TOKENS),
    "rollout.check_every": Range(1),
    "rollout.temperature": Range(0.0, 1e4),
    "train.batch": Range(1, MAX_ROWS),
    "train.micro_batch": Range(0, MAX_ROWS),
    "train.max_skipped": Range(1),
    "train.chunk": Range(1),
    "eval.limit": Range(1),
    "eval.every": Range(1),
    "eval.mini": Range(1),
    "eval.batch": Range(1, MAX_ROWS),
    "eval.max_new_tokens": Range(1, MAX_TOKENS),
    "eval.temperature": Range(0.0, 1e4),
    "eval.samples": Range(1, MAX_ROWS),
    "eval.drift": Range(0),
    "checkpoint.every": Range(0),
    "checkpoint.minutes": Range(0.0),
    "checkpoint.keep": Range(1),
    "log.every": Range(1),
    "log.gallery": Range(0),
    "log.report_minutes": Range(0.0),
}

# The kind of the items of each setting that is a tuple.
ITEMS = {
    "stages": Mapping,
    "seeds": int,
    "orders": tuple,
    "expect": Mapping,
    "model.freeze": str,
    "model.lora.targets": str,
    "data.outside_images": str,
    "data.buckets": int,
    "data.weights": float,
    "eval.general": str,
    "eval.templates": str,
}
NO_REPETITION = ("seeds", "orders", "model.freeze", "eval.general", "eval.templates")
_KIND_NAMES = {
    Mapping: "dicts",
    int: "whole numbers",
    float: "numbers",
    str: "strings",
    tuple: "tuples of indices of stages",
}


def check_sections(config: ConfigDict) -> None:
    """Refuse a config with missing sections, or with tuples whose items have the wrong kind."""
    for name in SECTIONS:
        if not isinstance(config.get(name), ConfigDict):
            got = f"got {config[name]!r:.200}" if name in config else "it does not exist"
            raise ValueError(f"config.{name}: expected a section (dict), {got}; {_START}")
    for name, arm in config.arms.items():
        if not isinstance(arm, ConfigDict):
            raise ValueError(f"config.arms.{name}: expected a dict of changes, got {arm!r:.200}")
    for name, kind in ITEMS.items():
        _check_items(name, _value(config, name), kind)


def check_config(config: ConfigDict) -> None:
    """Refuse a config with missing sections, values of wrong kinds, or values out of range."""
    check_sections(config)
    for name, allowed in RANGES.items():
        _check_range(config, name, allowed)
    for name, value in _values(config):
        _check_value(name, value)
    if not 1 <= len(config.stages) <= MAX_STAGES:
        example = "such as (dict(task='scienceqa', epochs=1), ...)"
        raise ValueError(
            f"config.stages: expected 1 to {MAX_STAGES} stages, {example}, got {len(config.stages)}"
        )
    if not all(0 <= seed <= LARGEST_SEED for seed in config.seeds):
        raise ValueError(f"config.seeds: expected 0 to {LARGEST_SEED}, got {config.seeds}")
    if not 1 <= len(config.name) <= MAX_NAME or not config.name.isprintable():
        raise ValueError(
            f"config.name: expected 1 to {MAX_NAME} characters, got {config.name!r:.80}"
        )
    _check_evaluation(config)


_START = "start from get_config() of configs/base.py"


def _value(config: ConfigDict, name: str) -> Any:
    """Return the value of a setting; refuse a config that does not have it."""
    node: Any = config
    for key in name.split("."):
        if not isinstance(node, ConfigDict) or key not in node:
            raise ValueError(f"config.{name} does not exist; {_START}")
        node = node[key]
    return node


def _check_items(name: str, value: Any, kind: type) -> None:
    """Check a setting that is a tuple."""
    expected = f"config.{name}: expected a tuple of {_KIND_NAMES[kind]}"
    if not isinstance(value, list | tuple):
        raise ValueError(f"{expected}, got {value!r:.200}")
    for item in value:
        if not _has_kind(item, kind):
            raise ValueError(f"{expected}, got the item {item!r:.200}")
    if kind is tuple and not all(_has_kind(index, int) for item in value for index in item):
        raise ValueError(f"{expected}, got {value!r:.200}")
    if name in NO_REPETITION and len({repr(item) for item in value}) < len(value):
        raise ValueError(f"config.{name}: expected each item once, got {value!r:.200}")


def _has_kind(value: Any, kind: type) -> bool:
    if kind in (int, float):
        is_number = isinstance(value, int if kind is int else int | float)
        return is_number and not isinstance(value, bool)
    kinds = {Mapping: (Mapping, ConfigDict), tuple: (tuple, list)}
    return isinstance(value, kinds.get(kind, kind))


def _check_range(config: ConfigDict, name: str, allowed: Range) -> None:
    """Refuse a number out of its range; None is fine where `optional` declares the setting."""
    value = _value(config, name)
    path, _, key = name.rpartition(".")
    if value is None and is_optional(config[path] if path else config, key):
        return
    kind = type(allowed.low)
    is_number = _has_kind(value, kind)
    if not is_number or not allowed.low <= value <= allowed.high:
        noun = "a whole number" if kind is int else "a number"
        too_large = is_number and value > allowed.high
        bound = f"at most {allowed.high}" if too_large else f"at least {allowed.low}"
        raise ValueError(f"config.{name}: expected {noun} of {bound}, got {value!r:.200}")


def _values(node: Any, name: str = "config") -> Iterator[tuple[str, Any]]:
    """Yield every value in a config, with its name."""
    if isinstance(node, Mapping | ConfigDict):
        for key, value in node.items():
            yield from _values(value, f"{name}.{key}")
    elif isinstance(node, list | tuple):
        for i, value in enumerate(node):
            yield from _values(value, f"{name}[{i}]")
    else:
        yield name, node


def _check_value(name: str, value: Any) -> None:
    """Refuse a number that float32 or int32 cannot hold, and text that cannot be written."""
    if isinstance(value, float) and not abs(value) <= LARGEST_FLOAT:
        raise ValueError(
            f"{name}: expected a finite number, of at most {LARGEST_FLOAT}, got {value}"
        )
    if isinstance(value, int) and not name.startswith(("config.seed", "config.arms")):
        if abs(value) > LARGEST_WHOLE:
            raise ValueError(f"{name}: expected at most {LARGEST_WHOLE}, got {value!r:.40}")
    if isinstance(value, str) and (not _is_unicode(value) or "\0" in value):
        raise ValueError(f"{name}: expected text that can be written, got {value!r:.200}")


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_evaluation(config: ConfigDict) -> None:
    """Check settings of `eval` that depend on each other."""
    if config.eval.samples > 1 and config.eval.temperature == 0:
        raise ValueError(
            f"config.eval.samples={config.eval.samples} with config.eval.temperature=0: all "
            "samples of a row are equal; set a temperature, or one sample"
        )
    general = config.eval.general
    for name, tasks in config.eval.groups.items():
        is_tuple = isinstance(tasks, list | tuple) and all(isinstance(t, str) for t in tasks)
        if not is_tuple or not tasks or not set(tasks) <= set(general):
            known = ", ".join(general) or "(), which is empty"
            raise ValueError(
                f"config.eval.groups.{name}: expected a tuple of tasks of config.eval.general "
                f"({known}), got {tasks!r}"
            )
