"""What happens between the steps of a stage: log, save, evaluate a little, stop."""

import dataclasses
from typing import Any

from cptjax.common import console, distributed, images, run_log
from cptjax.common.signals import Preempted
from cptjax.config import Stage
from cptjax.continual import stage_evaluation
from cptjax.continual.open_run import Run
from cptjax.tasks.task import conversation_images
from cptjax.training.algorithms.distillation import has_ema_teacher
from cptjax.training.stage_context import StageContext, StageProgress
from cptjax.types import Params, TrainState

# ---- during a stage ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class StageCallbacks:
    """What happens between the steps of a stage: log, save, evaluate a little, stop."""

    run: Run
    stage: Stage
    ctx: StageContext
    frozen: Params
    bar: console.ProgressBar

    def after_step(
        self, state: TrainState, progress: StageProgress, info: dict, rows: list[dict]
    ) -> bool:
        """False = stop now; everything is saved."""
        run, last = self.run, progress.step == self.ctx.steps
        self.log(progress, info, rows)
        self.bar.advance(1, **{k: info[k] for k in ("reward", "loss") if k in info})
        stop = run.sigterm.agreed()
        if not last and (run.checkpoints.due(progress.step) or stop):
            self.save(state, progress, run.facts())
        if stop:
            return last
        self.examine(state, progress)
        return True

    def log(self, progress: StageProgress, info: dict, rows: list[dict]) -> None:
        run, c = self.run, self.stage.config
        gathered = distributed.concat_lists(distributed.gather_objects(rows)) if rows else []
        for name in run_log.COST_KEYS:
            if name in info:
                run.spent[name] = run.spent.get(name, 0) + info[name]
        if progress.step % c.log.every == 0 or progress.step == self.ctx.steps:
            if run.log:
                run.log.step(self.stage.number, progress.step, info | run.spent)
            run.spent = {}
        if run.log and gathered and c.log.rollouts:
            run.log.rollouts(
                self.stage.number, add_thumbnails(gathered, self.ctx, c.log.gallery, progress.step)
            )

    def save(self, state: TrainState, progress: StageProgress, facts: dict[str, Any]) -> None:
        run, trees = self.run, {"state": state}
        if run.fisher is not None:
            trees["fisher"] = run.fisher
        if has_ema_teacher(self.stage.config.method):
            trees["teacher"] = self.ctx.teacher.trained
        run.checkpoints.save(
            "steps",
            self.stage.number,
            progress.step,
            trees,
            facts | {"progress": dataclasses.asdict(progress)},
        )

    def examine(self, state: TrainState, progress: StageProgress) -> None:
        """The small evaluation that belongs to this step. Always after the step was saved: a run that goes on from there repeats it."""
        every, run = self.stage.config.eval.every, self.run
        if (
            not every
            or progress.step % every
            or progress.step >= self.ctx.steps
            or not progress.step
        ):
            return
        facts, was = run.facts(), run.sigterm.waits
        run.sigterm.waits = False  # it may take long: SIGTERM ends it at once
        try:
            self.bar.advance(
                0,
                **stage_evaluation.evaluate_within_stage(
                    run, self.stage, state.params, self.frozen, progress.step
                ),
            )
        except Preempted:
            self.save(state, progress, facts)
            run.checkpoints.wait()
            raise
        finally:
            run.sigterm.waits = was


def add_thumbnails(rows: list[dict], ctx: StageContext, gallery: int, step: int) -> list[dict]:
    """Rows of a step, the first `gallery` prompts of the stage's first and last steps with their picture."""
    if step not in (1, ctx.steps):
        return rows
    seen: dict[str, str | None] = {}
    for row in rows:
        if row["id"] not in seen and len(seen) < gallery:
            source = ctx.sources[list(ctx.builder.prompted_tasks).index(row["task"])]
            image = next(conversation_images(source[row["row"]].messages), None)
            seen[row["id"]] = None if image is None else images.thumbnail_uri(image)
        if seen.get(row["id"]):
            row["image"] = seen[row["id"]]
    return rows
