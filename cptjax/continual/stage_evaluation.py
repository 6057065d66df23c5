"""Evaluations of a run: all tasks after each stage, a few rows inside a stage."""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from cptjax.common import console, phases
from cptjax.common.run_log import Positions
from cptjax.config import (
    Stage,
    config_fingerprint,
    eval_templates,
    evaluated_tasks,
    replayed_tasks,
    resolve_stages,
)
from cptjax.continual import base_evaluations, progress
from cptjax.continual.open_run import Run
from cptjax.continual.resume import ResumePoint
from cptjax.data import model_context
from cptjax.data.cost import WorkCost
from cptjax.evaluation import base_kl, evaluate, judge, report, summary
from cptjax.evaluation.matrix import AccuracyTable
from cptjax.generation.sampling_config import eval_sampling
from cptjax.models import trainable
from cptjax.tasks.prompted_task import PromptedTask
from cptjax.tasks.task import limit_rows
from cptjax.types import Params

# With `checkpoint.keep` above this number, checkpoints inside a stage stay after it, for analyses.
KEPT_TO_RESUME = 2


def tasks_to_evaluate(config: ConfigDict, stages: list[Stage]) -> tuple[list[str], list[str]]:
    """Return the tasks of the stages and the general tasks, each once."""
    stage_tasks = evaluated_tasks(config, stages)
    general = dict.fromkeys(config.eval.general)
    return stage_tasks, [task for task in general if task not in stage_tasks]


def all_tasks_to_evaluate(run: Run) -> list[str]:
    stage_tasks, general = tasks_to_evaluate(run.config, run.stages)
    return [*stage_tasks, *general]


def finished_positions(config: ConfigDict, workdir: Path) -> Positions | None:
    """Return the positions of a finished run's files, or None: the run is not finished."""
    stages, evaluation = resolve_stages(config), progress.read_evaluation(workdir)
    every_task = {task for part in tasks_to_evaluate(config, stages) for task in part}
    if evaluation.get("stage") != len(stages) or not every_task <= set(evaluation["done"]):
        return None
    same = config.allow_change or evaluation["config"] in ("", config_fingerprint(config))
    return evaluation["positions"] if same else None


def select_tasks(run: Run, tasks: Sequence[str], flag: str) -> list[str]:
    """Return the tasks that a flag names, or all evaluated tasks if it names none.

    Unknown names are refused.
    """
    known = all_tasks_to_evaluate(run)
    if unknown := [task for task in tasks if task not in known]:
        raise ValueError(
            f"{flag} names {', '.join(unknown)}; the config evaluates {', '.join(known)}"
        )
    return list(tasks) or known


def templates_of_task(run: Run, task: str) -> list[str]:
    """Return the templates that a task is evaluated with.

    A task with its own template uses only that one.
    """
    by_name: dict[str, str] = {}
    for template in eval_templates(run.config, run.stages, task):
        name = run.datasets.prompted_task(task, run.config, template).template.name
        by_name.setdefault(name, template)
    return list(by_name.values())


def check_remaining_splits(run: Run, resume_point: ResumePoint) -> None:
    """Load and check all splits that the run will read, to report bad rows before any step."""
    remaining = [stage for stage in run.stages if not resume_point.is_trained(stage.number)]
    tasks = all_tasks_to_evaluate(run)
    if remaining or not set(tasks) <= set(resume_point.evaluated):
        for task in tasks:
            for template in templates_of_task(run, task):
                run.datasets.examples(task, "test", run.config, template)
                judge_of_task(run, run.datasets.prompted_task(task, run.config, template))
    for stage in remaining:
        for task in (*stage.tasks, *replayed_tasks(run.stages, stage)):
            run.datasets.examples(task, "train", stage.config)


# ---- after a stage -------------------------------------------------------------------------------


@phases.phase("evaluation")
def evaluate_stage(
    run: Run, number: int, params: Params, evaluated_before: Sequence[str] = ()
) -> None:
    """Evaluate all tasks after a stage and record the results.

    Tasks in `evaluated_before` are already recorded and are skipped.
    """
    done = list(evaluated_before)
    step = run.files.checkpoints.stage_end(number) if number else 0
    columns, copied = shared_eval_columns(run, number, step), {}
    for task in all_tasks_to_evaluate(run):
        if task not in evaluated_before:
            copied[task] = evaluate_and_record(run, number, params, task, columns)
            done.append(task)
            record_evaluated(run, number, done)
            run.files.write_live_report()
    if sources := sorted(filter(None, set(copied.values()))):
        tasks = ", ".join(task for task, source in copied.items() if source)
        console.print_message(
            f"results of the base model on {tasks} are those of {', '.join(sources)}, "
            "which has the same model, rows and settings"
        )
    if number and run.config.checkpoint.keep <= KEPT_TO_RESUME:
        run.files.checkpoints.remove_steps(number)
    if run.files.log:
        name = run.stages[number - 1].name if number else ""
        write_results(run.files.workdir, number, name)


def record_evaluated(run: Run, number: int, done: list[str]) -> None:
    """Record that these tasks are evaluated; the first time, wait for the stage's checkpoint."""
    if len(done) == 1:
        run.files.checkpoints.wait()
    if run.files.log:
        fingerprint = config_fingerprint(run.config)
        progress.record_evaluation(
            run.files.workdir, number, done, run.files.positions(), fingerprint
        )


def evaluate_and_record(
    run: Run, number: int, params: Params, task: str, columns: dict[str, Any]
) -> str:
    """Evaluate a task with each of its templates, measure the KL to the base model, record both.

    The results of a base model may be those of another run, whose name is returned; else "".
    """
    e, log, began = run.config.eval, run.files.log, time.perf_counter()
    templates = templates_of_task(run, task)
    path = None if number else base_evaluations.kept_path(run, task, templates)
    results = None if number else base_evaluations.find(path)
    if results is None:
        results = evaluate_with_templates(run, number, params, task, templates, columns)
        base_evaluations.keep(run, path, results)
    kl_rows = measure_task_drift(run, params, task, columns) if e.drift else []
    if log:
        log.evals([*results["evals"], *kl_rows])
        log.predictions(number, results["predictions"])
        logged = results["cost"] | {"seconds": time.perf_counter() - began}
        log.step(number, columns["step"], {"event": "evaluate", "task": task, **logged})
    return results.get("run", "")


def evaluate_with_templates(
    run: Run,
    number: int,
    params: Params,
    task: str,
    templates: Sequence[str],
    columns: dict[str, Any],
) -> dict[str, Any]:
    """Return the rows of evals.csv, the predictions with the first template, and the cost."""
    e, when = run.config.eval, describe_stage(number)
    results = [
        evaluate_with_template(
            run,
            number,
            params,
            task,
            template,
            when,
            forced=e.forced_prefix,
            gold=e.gold_probability,
        )
        for template in templates
    ]
    return {
        "evals": [row for result in results for row in evaluate.eval_rows(result, columns)],
        "predictions": evaluate.prediction_rows(results[0], columns["step"]),
        "cost": sum((result.cost for result in results), WorkCost()).logged(),
    }


def measure_task_drift(
    run: Run, params: Params, task: str, columns: dict[str, Any]
) -> list[dict[str, Any]]:
    """Measure KL(base || model) on a task; return rows of evals.csv.

    The base model's responses are sampled once per run.
    """
    c, e, base = run.config, run.config.eval, run.base_params
    template = eval_templates(c, run.stages, task)[0]
    prompted = run.datasets.prompted_task(task, c, template)
    if task not in run.base_responses:
        run.base_responses[task] = base_kl.sample_base_responses(
            run.model_ctx,
            base,
            prompted,
            run.datasets.examples(task, "test", c, template),
            dataclasses.replace(
                eval_sampling(c), group=1, temperature=1.0, top_p=1.0, gather=False
            ),
            count=e.drift,
            batch=e.batch,
            seed=c.seed,
        )
    metrics = base_kl.measure_base_kl(
        run.model_ctx, base, params, run.base_responses[task], c.train.chunk
    )
    return base_kl.base_kl_rows(prompted, metrics, e.max_new_tokens, columns)


def write_results(workdir: Path, number: int, name: str) -> None:
    """Write summary and report after a stage, and print its accuracies."""
    tables = summary.load_run_tables(workdir)
    totals = summary.write_summary(tables)
    console.print_message(format_accuracies(tables.accuracy, number, name))
    report.write_run_report(tables, totals, is_live=not tables.accuracy.finished)


def format_accuracies(table: AccuracyTable, number: int, name: str) -> str:
    """Format the accuracies after a stage in one line, in percent; general tasks are averaged."""
    cells = table.cells.items()
    row = {task: 100 * cell.value for (stage, task), cell in cells if stage == number}
    general = [row[task] for task in table.general if task in row]
    tasks = ", ".join(f"{task} {row[task]:.1f}" for task in table.tasks if task in row)
    stage = f"{describe_stage(number)} {name}".rstrip()
    return f"{stage}: {tasks}" + (f"; general {np.mean(general):.1f}" if general else "")


def describe_stage(number: int) -> str:
    return f"after stage {number}" if number else "before any stage"


def shared_eval_columns(run: Run, number: int, step: int) -> dict[str, Any]:
    """Return the columns of evals.csv that all rows of one evaluation share."""
    e = run.config.eval
    decoding = "greedy" if e.temperature == 0 else f"T={e.temperature}"
    decoding += f", top_p={e.top_p}" if e.top_p < 1 else ""
    decoding += f", {e.samples} samples" if e.samples > 1 else ""
    return {
        "stage": number,
        "stage_name": run.stages[number - 1].name if number else "base",
        "step": step,
        "pixels": model_context.describe_pixel_limits(run.model_ctx),
        "decoding": f"{decoding}, {e.max_new_tokens} tokens",
    }


# ---- one task ------------------------------------------------------------------------------------


def evaluate_with_template(
    run: Run,
    number: int,
    params: Params,
    task: str,
    template: str,
    when: str,
    *,
    forced: bool = False,
    gold: bool = False,
    mini: int | None = None,
) -> evaluate.TaskResult:
    """Evaluate a model on the test rows of a task, or on a fixed choice of `mini` rows.

    The random numbers of the responses depend only on the seed and the stage number.
    """
    c, cached = run.config, run.eval_prompts
    if (task, template) not in cached:
        prompted = run.datasets.prompted_task(task, c, template)
        examples = run.datasets.examples(task, "test", c, template)
        cached[task, template] = evaluate.EvalPrompts(
            run.model_ctx, prompted, examples, c.data.workers
        )
    eval_prompts = cached[task, template]
    rows = limit_rows(range(len(eval_prompts.examples)), mini, seed=0).tolist()
    return evaluate.evaluate_task(
        run.model_ctx,
        params,
        eval_prompts,
        rows,
        sampling=eval_sampling(c),
        batch=c.eval.batch,
        key=jax.random.fold_in(jax.random.key(c.seed), 10_000 + number),
        chunk=c.train.chunk,
        forced=forced,
        gold=gold,
        judge=judge_of_task(run, eval_prompts.prompted),
        title=f"evaluate {task} {when}",
    )


def judge_of_task(run: Run, prompted: PromptedTask) -> judge.Judge | None:
    """Return the judge of a task, if it has one; tasks of a run share it."""
    name = prompted.task.judge
    if name and name not in run.judges:
        run.judges[name] = judge.open_judge(name, run.config, run.sandbox)
    return run.judges.get(name)


# ---- inside a stage ------------------------------------------------------------------------------


@phases.phase("evaluation")
def evaluate_within_stage(
    run: Run, stage: Stage, trained: Params, frozen: Params, step: int
) -> dict[str, float]:
    """Evaluate a few rows of each task after a step.

    Return the mean accuracy on the stage's tasks, and on the other tasks.
    """
    params, log = trainable.join_params(trained, frozen), run.files.log
    began, cost = time.perf_counter(), WorkCost()
    columns = shared_eval_columns(run, stage.number, step)
    accuracies: dict[str, list[float]] = {"accuracy": [], "others": []}
    for task in tasks_to_evaluate(run.config, run.stages)[0]:
        template = templates_of_task(run, task)[0]
        result = evaluate_with_template(
            run,
            stage.number,
            params,
            task,
            template,
            f"at step {step}",
            mini=stage.config.eval.mini,
        )
        cost += result.cost
        rows = evaluate.eval_rows(result, columns, mini=True)
        group = "accuracy" if task in stage.tasks else "others"
        accuracies[group] += [row["value"] for row in rows]
        if log:
            log.evals(rows)
    if log:
        logged = cost.logged() | {"seconds": time.perf_counter() - began}
        log.step(stage.number, step, {"event": "evaluate", **logged})
    return {name: float(np.mean(values)) for name, values in accuracies.items() if values}
