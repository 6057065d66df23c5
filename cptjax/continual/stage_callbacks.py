"""What happens between the steps of a stage: log, save, evaluate a few rows, stop."""

import dataclasses
import itertools
from typing import Any

from cptjax.common import console, distributed, images, run_log
from cptjax.common.signals import Preempted
from cptjax.config import Stage
from cptjax.continual import resume, stage_evaluation
from cptjax.continual.open_run import Run
from cptjax.tasks.task import conversation_images
from cptjax.training import rollouts
from cptjax.training.method_needs import method_needs
from cptjax.training.stage_context import StageContext, StageProgress
from cptjax.types import Params, TrainState


@dataclasses.dataclass(frozen=True)
class StageCallbacks:
    """What happens between the training steps of a stage."""

    run: Run
    stage: Stage
    ctx: StageContext
    frozen: Params
    kept: dict[str, Any]  # what continual-learning methods kept from the stages before
    bar: console.ProgressBar

    def after_step(
        self, state: TrainState, progress: StageProgress, info: dict, rows: list[dict]
    ) -> bool:
        """Log and save a step; return False to stop after SIGTERM, when everything is saved."""
        run, last = self.run, progress.step == self.ctx.steps
        if run.files.profiler:
            run.files.profiler.advance(self.stage.number, progress.step)
        self.log(progress, info, rows)
        self.bar.advance(1, **{k: info[k] for k in ("reward", "loss") if k in info})
        stop = run.stop_signals.agreed()
        if not last and (run.files.checkpoints.due(progress.step) or stop):
            self.save(state, progress, resume.checkpoint_record(run))
        if stop:
            return last
        self.evaluate_if_due(state, progress)
        run.files.write_live_report()
        return True

    def log(self, progress: StageProgress, info: dict, rows: list[dict]) -> None:
        """Add a step to metrics.jsonl, if it is due, and its rollouts to their file."""
        run_files, c, number = self.run.files, self.stage.config, self.stage.number
        rows = distributed.concat_lists(distributed.gather_objects(rows)) if rows else []
        cost = run_files.unlogged_cost
        for name in run_log.COST_KEYS:
            if name in info:
                cost[name] = cost.get(name, 0) + info[name]
        if progress.step % c.log.every == 0 or progress.step == self.ctx.steps:
            if run_files.log:
                run_files.log.step(number, progress.step, info | cost)
            cost.clear()
        if run_files.log and rows and c.log.rollouts:
            rows = add_thumbnails(rows, self.ctx, c.log.gallery, progress.step)
            run_files.log.rollouts(number, rows)

    def save(self, state: TrainState, progress: StageProgress, record: dict[str, Any]) -> None:
        """Save the state inside the stage with a `record` of `resume.checkpoint_record`."""
        trees: dict[str, Any] = {"state": state}
        if self.kept:
            trees["kept"] = self.kept
        if method_needs(self.stage.config.method).teacher == "follower":
            trees["teacher"] = self.ctx.teacher.trained
        if self.ctx.ahead is not None:
            trees["rollouts"] = rollouts.rollouts_to_arrays(self.ctx.builder, self.ctx.ahead)
        record = record | {"progress": dataclasses.asdict(progress)}
        self.run.files.checkpoints.save("steps", self.stage.number, progress.step, trees, record)

    def evaluate_if_due(self, state: TrainState, progress: StageProgress) -> None:
        """Evaluate a few rows of each task, if that is due at this step.

        The step is logged before, and saved if that is due, so a run that continues from this step
        repeats the evaluation.
        """
        every, run, step = self.stage.config.eval.every, self.run, progress.step
        if not every or not step or step % every or step >= self.ctx.steps:
            return
        record = resume.checkpoint_record(run)  # before the evaluation adds lines to the files
        try:
            with run.stop_signals.immediate():  # the evaluation may take long
                accuracies = stage_evaluation.evaluate_within_stage(
                    run, self.stage, state.params, self.frozen, step
                )
            self.bar.advance(0, **accuracies)
        except Preempted:
            self.save(state, progress, record)
            run.files.checkpoints.wait()
            raise


def add_thumbnails(rows: list[dict], ctx: StageContext, gallery: int, step: int) -> list[dict]:
    """Add the images to the rows of the first `gallery` prompts of a stage's first and last step.

    `image` is the first one. If there are more, the first row of the prompt has them in `images`.
    """
    if step not in (1, ctx.steps):
        return rows
    thumbnails: dict[str, list[str]] = {}  # by id of the prompt
    for row in rows:
        if row["id"] not in thumbnails and len(thumbnails) < gallery:
            source = ctx.sources[list(ctx.builder.prompted_tasks).index(row["task"])]
            shown = conversation_images(source[row["row"]].messages)
            thumbnails[row["id"]] = [
                images.thumbnail_uri(image)
                for image in itertools.islice(shown, images.MOST_THUMBNAILS)
            ]
            if len(thumbnails[row["id"]]) > 1:
                row["images"] = thumbnails[row["id"]]
        if thumbnails.get(row["id"]):
            row["image"] = thumbnails[row["id"]][0]
    return rows
