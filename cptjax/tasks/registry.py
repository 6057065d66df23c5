"""The table of tasks by name, built in or from a config.

A new dataset needs a file in datasets/ with a `make_task`, and a row in TASK_MAKERS. A user's own
data needs neither; see user_data/task.py.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from cptjax.tasks.datasets import (
    competition_math,
    countdown,
    ctbench,
    docvqa,
    geometry3k,
    gqa,
    ifeval,
    jigsaw,
    knowledge,
    mme,
    mmlu,
    mmlu_pro,
    mmmu,
    mmstar,
    mrcl,
    pathvqa,
    pope,
    prose,
    refcoco,
    safety,
    scienceqa,
    superclevr,
    textvqa,
    ucit,
    vizwiz,
)
from cptjax.tasks.synthetic import dataset, exercises, families
from cptjax.tasks.task import Task, did_you_mean, refuse_old_name
from cptjax.tasks.user_data import task


def find_built_in(name: str) -> Task | None:
    """Return the built-in task of that name, if there is one."""
    # A named function rather than BUILT_IN_TASKS.get, since worker processes must import it.
    return BUILT_IN_TASKS.get(name)


# tasks.<name>.task of a config names one of these functions; the other settings are its arguments.
TASK_MAKERS: dict[str, Callable[..., Task]] = {
    "scienceqa": scienceqa.make_task,
    "textvqa": textvqa.make_task,
    "vizwiz": vizwiz.make_task,
    "gqa": gqa.make_task,
    "geometry3k": geometry3k.make_task,
    "pathvqa": pathvqa.make_task,
    "superclevr": superclevr.make_task,
    "mmmu": mmmu.make_task,
    "mmlu_pro": mmlu_pro.make_task,
    "pope": pope.make_task,
    "jigsaw": functools.partial(jigsaw.make_task, find_task=find_built_in),
    "countdown": countdown.make_task,
    "mmlu": mmlu.make_task,
    "ifeval": ifeval.make_task,
    "math": competition_math.make_task,
    "refcoco": refcoco.make_task,
    "docvqa": docvqa.make_task,
    "mme": mme.make_task,
    "mmstar": mmstar.make_task,
    "wildjailbreak": safety.make_wildjailbreak,
    "wildguardtest": safety.make_wildguardtest,
    "knowledge": knowledge.make_task,
    "prose": prose.make_task,
    "exercise": exercises.make_task,
    "synthetic": dataset.make_synthetic_task,
    # These have parts, each a task of its own below.
    "mrcl": mrcl.make_task,
    "ctbench": ctbench.make_task,
    "ucit": ucit.make_task,
}
OF_PARTS = {"mrcl": mrcl.PARTS, "ctbench": ctbench.SCORERS, "ucit": ucit.FOLDERS}

_PARITY = {"scorer": "mathruler_parity"}


def make_paper_a_tasks(prefix: str, released: bool) -> list[Task]:
    """Return paper A's tasks (arXiv 2507.05386): seven in its order, and its general benchmarks.

    Their rows have one gold answer. All use the paper's lenient scorer, and also report the
    benchmark's and the score of the paper's SFT models. `released` words the prompts, and divides
    Super-CLEVR, as in the paper's files; the prompts of the general benchmarks are not released.
    """
    own = {"released": True} if released else {}

    def fields(*official: str) -> dict[str, Any]:
        return {**_PARITY, "also": (*official, "lower_exact_match")}

    return [
        scienceqa.make_task(
            f"{prefix}_scienceqa", **own, **fields("mcq_letter", "scienceqa_strict")
        ),
        textvqa.make_task(f"{prefix}_textvqa", ocr=True, single=True, **own, **fields("vqa_soft")),
        vizwiz.make_task(f"{prefix}_vizwiz", single=True, **own, **fields("vqa_soft")),
        gqa.make_task(
            f"{prefix}_gqa", train_rows=80_000, **own, **fields("exact_match", "gqa_strict")
        ),
        geometry3k.make_task(f"{prefix}_geometry3k", **fields("math")),
        pathvqa.make_task(f"{prefix}_pathvqa", **fields("pathvqa_split")),
        superclevr.make_task(f"{prefix}_superclevr", **own, **fields("vqa_em_modal")),
        mmmu.make_task(f"{prefix}_mmmu", **fields("mmmu_official")),
        mmlu_pro.make_task(f"{prefix}_mmlu_pro", shots=0, **fields("mmlu_pro")),
        pope.make_task(f"{prefix}_pope", **fields("pope")),
    ]


_VARIANTS = [
    *make_paper_a_tasks("cpt7", released=False),
    *make_paper_a_tasks("released", released=True),
    # Paper C (arXiv 2510.18874): its prompts and readings of the answers, on its own splits.
    ifeval.make_task("retain_ifeval", paper_c=True),
    mmlu.make_task("retain_mmlu", paper_c=True),
    competition_math.make_task("retain_math", paper_c=True),
    countdown.make_task("retain_countdown", paper_c=True),
    countdown.make_task("synthetic_countdown", synthetic=True),
    jigsaw.make_task("synthetic_jigsaw", images="synthetic"),
    *(
        dataset.make_synthetic_task(f"synthetic_{family}", family)
        for family in families.SYNTHETIC_FAMILIES
    ),
    *(
        TASK_MAKERS[name](f"{name}_{part}", part=part)
        for name, parts in OF_PARTS.items()
        for part in parts
    ),
]
BUILT_IN_TASKS: dict[str, Task] = {
    name: make(name) for name, make in TASK_MAKERS.items() if name not in ("synthetic", *OF_PARTS)
} | {task.name: task for task in _VARIANTS}


def resolve_task(
    name: str,
    user_tasks: Mapping[str, Mapping[str, Any]] | None = None,
    pixels: tuple[int, int] | None = None,
    outside_images: tuple[str, ...] = (),
    patch: int | None = None,
) -> Task:
    """Return a task by name: one of the config's tasks, or else a built-in one.

    `pixels` are the model's limits (min_pixels, max_pixels), and `patch` is the side of its
    patches. A task whose answers are positions in pixels must have the same, since both decide how
    an image is resized. `outside_images` are folders outside of the data's from which a user's rows
    may take images.
    """
    resolved = _find_task(name, user_tasks or {}, outside_images)
    if pixels and resolved.pixels not in (None, pixels):
        raise ValueError(
            f"task {name}: its answers are positions in images of {resolved.pixels[0]} to "
            f"{resolved.pixels[1]} pixels, but the model sees {pixels[0]} to {pixels[1]}; "
            f"set min_pixels and max_pixels of tasks.{name} or of model to agree"
        )
    if patch and resolved.patch not in (None, patch):
        raise ValueError(
            f"task {name}: its answers are positions in images for patches of {resolved.patch} "
            f"pixels, but the model's have {patch}; leave the task out, or choose a model with "
            f"patches of {resolved.patch} pixels"
        )
    return resolved


def _find_task(
    name: str, user_tasks: Mapping[str, Mapping[str, Any]], outside_images: tuple[str, ...]
) -> Task:
    if name not in user_tasks:
        if name not in BUILT_IN_TASKS:
            refuse_old_name("task", name)
            known = {**BUILT_IN_TASKS, **user_tasks}
            names = ", ".join([*user_tasks, *TASK_MAKERS])
            hint = did_you_mean(name, known) or f"; there are {names}"
            raise ValueError(f"no task {name!r:.80}{hint}")
        return BUILT_IN_TASKS[name]
    if not isinstance(user_tasks[name], Mapping):
        raise ValueError(
            f"tasks.{name}: expected a dict of settings, got {user_tasks[name]!r:.200}"
        )
    settings = dict(user_tasks[name])
    base = settings.pop("task", None)
    if base is None:
        return task.make_user_task(name, outside_images, **settings)
    if base not in TASK_MAKERS:
        refuse_old_name(f"tasks.{name}.task", base)
        raise ValueError(
            f"tasks.{name}.task: no task {base!r}{did_you_mean(base, TASK_MAKERS)}; "
            f"there are {', '.join(TASK_MAKERS)}"
        )
    _check_task_settings(name, TASK_MAKERS[base], settings)
    return TASK_MAKERS[base](name, **settings)


def _check_task_settings(name: str, make: Callable[..., Task], settings: Mapping[str, Any]) -> None:
    known = {*inspect.signature(make).parameters, *inspect.signature(Task).parameters}
    known -= {"name", "load", "fields", "pixels", "patch", "find_task"}
    for key in settings:
        if key not in known:
            refuse_old_name(f"tasks.{name}", key)
            raise ValueError(
                f"tasks.{name}: unknown setting {key!r}{did_you_mean(key, known)}; "
                f"there are {', '.join(sorted(known))}"
            )
