"""Every task by name. A new one is a file with a `make` and a line here; a user's own needs neither (`user.py`)."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from cptjax.tasks import (
    competition_math,
    countdown,
    docvqa,
    geometry3k,
    gqa,
    ifeval,
    jigsaw,
    mmlu,
    mmlu_pro,
    mmmu,
    pathvqa,
    pope,
    refcoco,
    scienceqa,
    superclevr,
    synthetic,
    textvqa,
    user,
    vizwiz,
)
from cptjax.tasks.tables import BadRow
from cptjax.tasks.task import Task, nearest
from cptjax.tasks.validate import check, validate

__all__ = ["MAKERS", "PAPER_A", "PAPER_C", "TASKS", "BadRow", "Task", "check", "resolve", "validate"]

# What a config's tasks.<name>.task may name; the other settings go to these functions.
MAKERS: dict[str, Callable[..., Task]] = {
    "scienceqa": scienceqa.make,
    "textvqa": textvqa.make,
    "vizwiz": vizwiz.make,
    "gqa": gqa.make,
    "geometry3k": geometry3k.make,
    "pathvqa": pathvqa.make,
    "superclevr": superclevr.make,
    "mmmu": mmmu.make,
    "mmlu_pro": mmlu_pro.make,
    "pope": pope.make,
    "jigsaw": jigsaw.make,
    "countdown": countdown.make,
    "mmlu": mmlu.make,
    "ifeval": ifeval.make,
    "math": competition_math.make,
    "refcoco": refcoco.make,
    "docvqa": docvqa.make,
    "drawn": synthetic.make,
}

_PARITY = {"scorer": "mathruler_parity"}
_VARIANTS = [
    # Paper A (arXiv 2507.05386): its seven tasks in its order, one gold answer each, then its general benchmarks; all scored by the
    # lenient scorer, with the benchmark's own beside it.
    scienceqa.make("cpt7_scienceqa", also=("mcq_letter",), **_PARITY),
    textvqa.make("cpt7_textvqa", ocr=True, single=True, also=("vqa_soft",), **_PARITY),
    vizwiz.make("cpt7_vizwiz", single=True, also=("vqa_soft",), **_PARITY),
    gqa.make("cpt7_gqa", train_rows=80_000, also=("exact_match",), **_PARITY),
    geometry3k.make("cpt7_geometry3k", also=("math",), **_PARITY),
    pathvqa.make("cpt7_pathvqa", also=("pathvqa_split",), **_PARITY),
    superclevr.make("cpt7_superclevr", also=("vqa_em_modal",), **_PARITY),
    mmmu.make("cpt7_mmmu", also=("mmmu_official",), **_PARITY),
    mmlu_pro.make("cpt7_mmlu_pro", shots=0, also=("mmlu_pro",), **_PARITY),
    pope.make("cpt7_pope", also=("yes_no",), **_PARITY),
    # Paper C (arXiv 2510.18874): its own splits of public data.
    ifeval.make("retain_ifeval", paper_c=True),
    mmlu.make("retain_mmlu", paper_c=True, template="letter"),
    countdown.make("drawn_countdown", drawn=True),
    *(synthetic.make(f"drawn_{family}", family) for family in synthetic.FAMILIES),
]
TASKS: dict[str, Task] = {name: make(name) for name, make in MAKERS.items() if name != "drawn"} | {task.name: task for task in _VARIANTS}
PAPER_A = tuple(f"cpt7_{name}" for name in ("scienceqa", "textvqa", "vizwiz", "gqa", "geometry3k", "pathvqa", "superclevr"))
PAPER_C = ("retain_ifeval", "retain_mmlu", "countdown")


def resolve(name: str, user_tasks: Mapping[str, Mapping[str, Any]] | None = None, pixels: tuple[int, int] | None = None) -> Task:
    """Returns a task by name: the config's own first (its data, or a built-in with other settings), then the built-in.

    `pixels` are the model's limits; a task whose answers are places in pixels is refused under others.
    """
    task = _resolve(name, user_tasks or {})
    if pixels and task.pixels not in (None, pixels):
        of = "states places in images of {} to {} pixels, but the model sees {} to {}".format(*task.pixels, *pixels)
        raise ValueError(f"task {name} {of}; set min_pixels and max_pixels of tasks.{name} or of model so that they agree")
    return task


def _resolve(name: str, user_tasks: Mapping[str, Mapping[str, Any]]) -> Task:
    if name not in user_tasks:
        if name not in TASKS:
            known = {**TASKS, **user_tasks}
            raise ValueError(f"no task {name!r}{nearest(name, known)}; there are {', '.join(known)}")
        return TASKS[name]
    settings = dict(user_tasks[name])
    base = settings.pop("task", None)
    if base is None:
        return user.make(name, **settings)
    if base not in MAKERS:
        raise ValueError(f"tasks.{name}.task: no task {base!r}{nearest(base, MAKERS)}; there are {', '.join(MAKERS)}")
    _check_settings(name, MAKERS[base], settings)
    return MAKERS[base](name, **settings)


def _check_settings(name: str, make: Callable[..., Task], settings: Mapping[str, Any]) -> None:
    known = ({*inspect.signature(make).parameters, *inspect.signature(Task).parameters}) - {"name", "load", "fields", "pixels"}
    for key in settings:
        if key not in known:
            raise ValueError(f"tasks.{name}: unknown setting {key!r}{nearest(key, known)}; there are {', '.join(sorted(known))}")
