"""What happens between the steps of a stage: log, save, evaluate a little, stop."""

import dataclasses
from typing import Any

from cptjax.common import console, distributed, images, run_log
from cptjax.common.signals import Preempted
from cptjax.config import Stage
from cptjax.continual import stage_evaluation
from cptjax.continual.open_run import Run
from cptjax.training.algorithms.distillation import has_ema_teacher
from cptjax.training.stage_context import StageContext, StageProgress
from cptjax.types import Params, TrainState

# ---- during a stage ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class StageCallbacks:
    """What happens between the steps of a stage: log, save, evaluate a little, stop."""

    current: Run
    which: Stage
    room: StageContext
    frozen: Params
    bar: console.ProgressBar

    def after_step(
        self, state: TrainState, progress: StageProgress, info: dict, rows: list[dict]
    ) -> bool:
        """False = stop now; everything is saved."""
        current, last = self.current, progress.step == self.room.steps
        self.log(progress, info, rows)
        self.bar.advance(1, **{k: info[k] for k in ("reward", "loss") if k in info})
        stop = current.sigterm.agreed()
        if not last and (current.checkpoints.due(progress.step) or stop):
            self.save(state, progress, current.facts())
        if stop:
            return last
        self.examine(state, progress)
        return True

    def log(self, progress: StageProgress, info: dict, rows: list[dict]) -> None:
        current, c = self.current, self.which.config
        gathered = distributed.concat_lists(distributed.gather_objects(rows)) if rows else []
        for name in run_log.COST_KEYS:
            if name in info:
                current.spent[name] = current.spent.get(name, 0) + info[name]
        if progress.step % c.log.every == 0 or progress.step == self.room.steps:
            if current.log:
                current.log.step(self.which.number, progress.step, info | current.spent)
            current.spent = {}
        if current.log and gathered and c.log.rollouts:
            current.log.rollouts(
                self.which.number, add_thumbnails(gathered, self.room, c.log.gallery, progress.step)
            )

    def save(self, state: TrainState, progress: StageProgress, facts: dict[str, Any]) -> None:
        current, trees = self.current, {"state": state}
        if current.fisher is not None:
            trees["fisher"] = current.fisher
        if has_ema_teacher(self.which.config.method):
            trees["teacher"] = self.room.teacher.trained
        current.checkpoints.save(
            "steps",
            self.which.number,
            progress.step,
            trees,
            facts | {"progress": dataclasses.asdict(progress)},
        )

    def examine(self, state: TrainState, progress: StageProgress) -> None:
        """The small evaluation that belongs to this step. Always after the step was saved: a run that goes on from there repeats it."""
        every, current = self.which.config.eval.every, self.current
        if (
            not every
            or progress.step % every
            or progress.step >= self.room.steps
            or not progress.step
        ):
            return
        facts, was = current.facts(), current.sigterm.waits
        current.sigterm.waits = False  # it may take long: SIGTERM ends it at once
        try:
            self.bar.advance(
                0,
                **stage_evaluation.evaluate_within_stage(
                    current, self.which, state.params, self.frozen, progress.step
                ),
            )
        except Preempted:
            self.save(state, progress, facts)
            current.checkpoints.wait()
            raise
        finally:
            current.sigterm.waits = was


def add_thumbnails(rows: list[dict], room: StageContext, gallery: int, step: int) -> list[dict]:
    """Rows of a step, the first `gallery` prompts of the stage's first and last steps with their picture."""
    if step not in (1, room.steps):
        return rows
    seen: dict[str, str | None] = {}
    for row in rows:
        if row["id"] not in seen and len(seen) < gallery:
            source = room.sources[list(room.tutor.courses).index(row["task"])]
            seen[row["id"]] = images.example_thumbnail(source[row["row"]])
        if seen.get(row["id"]):
            row["image"] = seen[row["id"]]
    return rows
