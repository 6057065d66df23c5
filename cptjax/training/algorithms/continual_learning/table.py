"""The table of continual-learning methods, and how a stage's methods are read from its config.

Each hook has one entry in `config.method`, for example penalty=dict(name="ewc", coef=1.0). A
setting that is None has the default of the method's class. `method.plugin="file.py:Class"` adds a
class of the user's own, with the settings in `method.plugin_settings`.
"""

import dataclasses
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from cptjax.common import files
from cptjax.training.algorithms.continual_learning.agem import AGEM
from cptjax.training.algorithms.continual_learning.cpo import CPO
from cptjax.training.algorithms.continual_learning.dare import DARE
from cptjax.training.algorithms.continual_learning.der import DER, DERPP
from cptjax.training.algorithms.continual_learning.er import ER
from cptjax.training.algorithms.continual_learning.ewc import EWC
from cptjax.training.algorithms.continual_learning.gpm import GPM
from cptjax.training.algorithms.continual_learning.hooks import (
    ContinualMethod,
    Methods,
    overrides_hook,
)
from cptjax.training.algorithms.continual_learning.l2 import L2
from cptjax.training.algorithms.continual_learning.lwf import LwF
from cptjax.training.algorithms.continual_learning.mas import MAS
from cptjax.training.algorithms.continual_learning.max_merge import MaxMerge
from cptjax.training.algorithms.continual_learning.merged_lora import MergedLora
from cptjax.training.algorithms.continual_learning.o_lora import OLoRA
from cptjax.training.algorithms.continual_learning.online_ewc import OnlineEWC
from cptjax.training.algorithms.continual_learning.rapo import RaPO
from cptjax.training.algorithms.continual_learning.replay import GoldReplay, PromptReplay
from cptjax.training.algorithms.continual_learning.si import SI
from cptjax.training.algorithms.continual_learning.task_arithmetic import TaskArithmetic
from cptjax.training.algorithms.continual_learning.ties import TIES
from cptjax.training.algorithms.continual_learning.wise_ft import WiseFT

# Entry in `config.method` -> its methods, in the order in which a step and a stage's end use them.
CONTINUAL_METHODS: dict[str, tuple[type[ContinualMethod], ...]] = {
    "reward": (RaPO,),
    "loss": (LwF,),
    "stage_end": (WiseFT, TaskArithmetic, TIES, DARE, MaxMerge),
    "penalty": (L2, EWC, OnlineEWC, SI, MAS, CPO),
    # A memory stores outputs of the model that the stage ends with, before adapters are merged.
    "replay": (GoldReplay, PromptReplay, ER, DER, DERPP),
    "gradient": (AGEM, GPM),
    "parameters": (MergedLora, OLoRA),
}


def continual_methods(method: ConfigDict) -> Methods:
    """Return the continual-learning methods of `config.method`."""
    chosen = [
        build_method(f"method.{hook}", classes, method[hook])
        for hook, classes in CONTINUAL_METHODS.items()
        if hook in method  # the config of an old run may not have it
    ]
    if method.get("plugin"):
        cls = load_plugin(method.plugin)
        given = method.plugin_settings or {}
        if not isinstance(given, Mapping | ConfigDict):
            raise ValueError(f"method.plugin_settings: expected a dict, got {given!r:.200}")
        with files.explain_errors(f"method.plugin={method.plugin!r}"):
            chosen.append(make_method("method.plugin_settings", cls, given))
    elif given := method.get("plugin_settings"):
        given = dict(given) if isinstance(given, Mapping | ConfigDict) else given
        raise ValueError(
            f"method.plugin_settings={given} without method.plugin: set "
            "method.plugin='file.py:Class'"
        )
    return tuple(m for m in chosen if m is not None)


# What a method can override to do something.
HOOKS = sorted(
    name
    for name, value in vars(ContinualMethod).items()
    if name[0] != "_" and name != "check" and (callable(value) or isinstance(value, property))
)


def check_methods(config: ConfigDict) -> None:
    """Refuse settings and combinations of a stage's methods that make no sense."""
    methods = continual_methods(config.method)
    for m in methods:
        with files.explain_errors(f"config.method, {m.name}"):
            m.check(config)
        if not overrides_hook(m, *HOOKS):
            raise ValueError(f"{m.name}: expected one of the hooks {', '.join(HOOKS)}, got none")
    with_memory = [m.name for m in methods if m.memory is not None]
    if len(with_memory) > 1:
        raise ValueError(f"expected one method with a memory, got {' and '.join(with_memory)}")
    names = [m.name for m in methods]
    if len(set(names)) < len(names):
        raise ValueError(f"method.plugin: expected a name that differs from {names[:-1]}")


def build_method(
    where: str, classes: tuple[type[ContinualMethod], ...], settings: Mapping[str, Any]
) -> ContinualMethod | None:
    """Return the method that an entry of `config.method` names, or None for name="none"."""
    name = settings["name"]
    given = {k: v for k, v in settings.items() if k != "name" and v is not None}
    by_name = {cls.name: cls for cls in classes}
    if name in by_name:
        return make_method(where, by_name[name], given)
    if name != "none":
        raise ValueError(f"{where}.name={name!r}: choose one of none, {', '.join(by_name)}")
    if given:
        raise ValueError(f"{where}: {given} without a name does nothing; set {where}.name")
    return None


def make_method(where: str, cls: type[ContinualMethod], given: Mapping[str, Any]) -> Any:
    """Return a method with its settings; refuse unknown and missing ones."""
    fields = {f.name: f for f in dataclasses.fields(cls)}
    if unknown := sorted(set(given) - set(fields)):
        raise ValueError(
            f"{where}.{unknown[0]}={given[unknown[0]]!r} is not a setting of {cls.name!r}, "
            f"which takes {', '.join(fields) or 'none'}"
        )
    missing = [
        name
        for name, field in fields.items()
        if field.default is dataclasses.MISSING and name not in given
    ]
    if missing:
        raise ValueError(f"{where}.name={cls.name!r} needs {where}.{missing[0]}")
    return cls(**given)


def load_plugin(target: str) -> type[ContinualMethod]:
    """Load the class of `method.plugin`, written "file.py:Class"."""
    path, _, name = target.rpartition(":")
    where = f"method.plugin={target!r}"
    if not path.endswith(".py") or not Path(path).is_file():
        raise ValueError(f"{where}: expected an existing file and a class, 'file.py:Class'")
    key = str(Path(path).resolve())
    stamp = Path(path).stat().st_mtime_ns
    if (key, stamp) not in _PLUGIN_MODULES:
        spec = importlib.util.spec_from_file_location(Path(path).stem, path)
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException as error:  # also sys.exit()
            raise ValueError(f"{where}: the file raises {type(error).__name__}: {error}") from error
        _PLUGIN_MODULES[key, stamp] = module
    cls = getattr(_PLUGIN_MODULES[key, stamp], name, None)
    is_method = isinstance(cls, type) and issubclass(cls, ContinualMethod)
    if not is_method or not dataclasses.is_dataclass(cls) or not hasattr(cls, "name"):
        raise ValueError(
            f"{where}: expected a frozen dataclass with a `name` that inherits from "
            f"cptjax.ContinualMethod, got {cls!r}"
        )
    return cls


# A file is loaded once, since equal methods must be instances of one class to share programs.
_PLUGIN_MODULES: dict[tuple[str, int], Any] = {}
