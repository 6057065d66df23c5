"""One evaluation by hand: the model of a stage of a run, or any Hugging Face folder, on some of the config's tasks."""

import contextlib
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from cptjax import evaluate, exams, multihost, resume, session, settings, summary
from cptjax.session import Run
from cptjax.workdir import local, locked, refuse_change

SHOWN = ("task", "metric", "value", "stderr", "n", "scorer", "template")


def run(
    config: ConfigDict, workdir: str | Path, stage: int | None = None, model: str = "", tasks: tuple[str, ...] = (), record: bool = False
) -> list[dict[str, Any]]:  # fmt: skip
    """The rows of evals.csv for a stage (None = the newest finished one), or for `model`; `record` appends those of a stage to it."""
    if model and (stage is not None or record):
        raise ValueError("--model is not a stage of the workdir: leave out --stage and --record")
    workdir = local(workdir)
    single = chosen(config, workdir)
    settings.check(single)
    if model:
        single = settings.merge(single, {"model": {"path": model}})
    else:
        refuse_change(single, workdir)
    alone = locked(root_of(config, workdir)[0]) if record else contextlib.nullcontext()
    with alone, session.visit(single, workdir) as current:
        number = 0 if model else newest(current) if stage is None else stage
        names = exams.named(current, tasks, "--tasks")
        current.params = current.at_stage(number)
        step = current.checkpoints.stage_end(number) if number else 0
        rows = [row for task in names for row in answered(current, number, task, step)]
        if record:
            append(current, number, rows)
    return rows


def chosen(config: ConfigDict, workdir: Path) -> ConfigDict:
    """The one run of the config that the workdir belongs to, on the base model that its pre-stage made."""
    root, sub = root_of(config, workdir)
    return dict(settings.variants(config, root))[sub]


def root_of(config: ConfigDict, workdir: Path) -> tuple[Path, str]:
    """The workdir of all runs of the config, and the sub-folder of the one that is asked for."""
    found = settings.variants(config)
    subs = [sub for sub, _ in found if workdir.absolute().parts[-len(Path(sub).parts) :] == Path(sub).parts or not sub]
    if len(subs) != 1:
        names = ", ".join(sub for sub, _ in found)
        raise ValueError(f"the config describes {len(found)} runs; expected --workdir to end with one of {names}")
    return workdir.absolute().parents[len(Path(subs[0]).parts) - 1] if subs[0] else workdir.absolute(), subs[0]


def newest(current: Run) -> int:
    """The newest finished stage; 0 before the first."""
    return max((n for n, _, kind in current.checkpoints.found() if kind == "stages"), default=0) if current.checkpoints else 0


def answered(current: Run, number: int, task: str, step: int) -> list[dict[str, Any]]:
    e, about = current.config.eval, exams.common(current, number, step)
    taken = [exams.take(current, number, task, t, e.forced_prefix, exams.after(number)) for t in exams.templates_of(current, task)]
    return [row for exam in taken for row in evaluate.rows(exam, about)]


def append(current: Run, number: int, rows: list[dict[str, Any]]) -> None:
    """Put the rows behind a finished run's; an unfinished one would cut them off when it goes on."""
    marks = resume.read_marks(current)
    if marks.get("stage") != len(current.stages) or set(marks["done"]) != {t for part in exams.tasks_of(current) for t in part}:
        raise ValueError(f"{current.workdir} is not finished, and going on with it would cut the rows off; leave out --record")
    if multihost.first():
        log = session.metrics.Log(current.workdir)
        log.evals(rows)
        session.metrics.write_json(resume.marks_file(current), marks | {"positions": log.positions()})
        log.close()
        summary.write(current.workdir)


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text in columns."""
    said = [[f"{row[k]:.4f}" if isinstance(row[k], float) else str(row[k] if row[k] is not None else "") for k in SHOWN] for row in rows]
    widths = [max(map(len, column)) for column in zip(SHOWN, *said, strict=True)]
    return "\n".join("  ".join(x.ljust(w) for x, w in zip(line, widths, strict=True)).rstrip() for line in (SHOWN, *said))
