"""The evaluations of a run: all tasks after each stage, small ones inside a stage, and how they are recorded."""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cptjax.common import console
from cptjax.config import Stage, eval_templates, evaluated_tasks, replayed_tasks
from cptjax.continual import resume
from cptjax.continual.open_run import Run
from cptjax.continual.resume import ResumePoint
from cptjax.data import model_context
from cptjax.data.cost import WorkCost
from cptjax.evaluation import base_kl, evaluate, report, summary
from cptjax.evaluation.matrix import AccuracyTable
from cptjax.generation.sampling_config import eval_sampling
from cptjax.models import trainable
from cptjax.tasks.task import limit_rows
from cptjax.types import Params


def tasks_to_evaluate(run: Run) -> tuple[list[str], list[str]]:
    """(tasks of the stages, general tasks), each once."""
    own = evaluated_tasks(run.config, run.stages)
    return own, [t for t in dict.fromkeys(run.config.eval.general) if t not in own]


def select_tasks(run: Run, tasks: Sequence[str], flag: str) -> list[str]:
    """The tasks that a flag names, or all that are examined where it names none; others are refused."""
    known = [task for part in tasks_to_evaluate(run) for task in part]
    if unknown := [t for t in tasks if t not in known]:
        raise ValueError(
            f"{flag} names {', '.join(unknown)}; the config evaluates {', '.join(known)}"
        )
    return list(tasks) or known


def check_remaining_splits(run: Run, place: ResumePoint) -> None:
    """Every split that is still to be read is looked through, so that a wrong row is told before the first step."""
    coming = [which for which in run.stages if not place.finished(which.number)]
    tested = [task for part in tasks_to_evaluate(run) for task in part]
    for task in tested if coming or not set(tested) <= set(place.done) else ():
        for template in templates_of_task(run, task):
            run.examples(task, "test", run.config, template)
    for which in coming:
        for task in (*which.tasks, *replayed_tasks(run.stages, which)):
            run.examples(task, "train", which.config)


def evaluate_stage(run: Run, number: int, place: ResumePoint) -> None:
    """Evaluate all tasks after a stage and record its row; tasks recorded before a kill are left out."""
    done = list(place.done) if place.stage == number else []
    own, general = tasks_to_evaluate(run)
    step = run.checkpoints.stage_end(number) if number else 0
    for task in [t for t in (*own, *general) if t not in done]:
        evaluate_and_record(run, number, task, shared_eval_columns(run, number, step))
        done.append(task)
        resume.write_eval_progress(run, number, done)
    if run.log:
        write_results(run.workdir, number, run.stages[number - 1].name if number else "")


def write_results(workdir: Path, number: int, name: str) -> None:
    """Write summary and report after a stage and print its accuracies; each result file is parsed once."""
    tables = summary.load_run_tables(workdir)
    totals = summary.write_summary(tables)
    console.print_message(format_accuracies(tables.accuracy, number, name))
    report.write_run_report(tables, totals)


def format_accuracies(t: AccuracyTable, number: int, name: str) -> str:
    """An evaluation's accuracies in one line, in percent; of the general tasks the mean."""
    row = {task: 100 * cell.value for (stage, task), cell in t.cells.items() if stage == number}
    general = [row[task] for task in t.general if task in row]
    tasks = ", ".join(f"{task} {row[task]:.1f}" for task in t.tasks if task in row)
    stage = f"{describe_stage(number)} {name}".rstrip()
    return f"{stage}: {tasks}" + (f"; general {np.mean(general):.1f}" if general else "")


def evaluate_and_record(run: Run, number: int, task: str, about: dict[str, Any]) -> None:
    """One task: under every template, and how far the model has moved on it."""
    e, began = run.config.eval, time.perf_counter()
    spent = WorkCost()
    for i, template in enumerate(templates_of_task(run, task)):
        result = evaluate_current_model(
            run, number, task, template, e.forced_prefix, describe_stage(number)
        )
        spent += result.cost
        if run.log:
            run.log.evals(evaluate.eval_rows(result, about))
            if i == 0:
                run.log.predictions(number, evaluate.prediction_rows(result, about["step"]))
    base_kl_rows = [measure_base_kl(run, task, about)] if e.drift else []
    if run.log:
        run.log.evals(base_kl_rows)
        cost = spent.logged() | {"seconds": time.perf_counter() - began}
        run.log.step(number, about["step"], {"event": "evaluate", "task": task, **cost})


def measure_base_kl(run: Run, task: str, about: dict[str, Any]) -> dict[str, Any]:
    """Return the line of evals.csv with the KL from the base model to the current one on a task."""
    c, model_ctx = run.config, run.model_ctx
    template = eval_templates(c, run.stages, task)[0]
    prompted = run.prompted(task, c, template)
    sampling = dataclasses.replace(eval_sampling(c), temperature=1.0, gather=False)
    responses = run.cached(
        ("drift", task),
        lambda: base_kl.sample_base_responses(
            model_ctx,
            run.base(),
            prompted,
            run.examples(task, "test", c, template),
            sampling,
            count=c.eval.drift,
            batch=c.eval.batch,
            seed=c.seed,
        ),
    )
    metric = base_kl.measure_base_kl(model_ctx, run.base(), run.params, responses, c.train.chunk)
    return base_kl.base_kl_row(prompted, metric, c.eval.max_new_tokens, about)


def templates_of_task(run: Run, task: str) -> list[str]:
    """The templates to ask a task under, each once: a task with a template of its own has that one alone."""
    c = run.config
    asked = eval_templates(c, run.stages, task)
    found = {
        run.prompted(task, c, template).template.name: template for template in reversed(asked)
    }
    return list(reversed(found.values()))


def describe_stage(number: int) -> str:
    return f"after stage {number}" if number else "before any stage"


def evaluate_current_model(
    run: Run,
    number: int,
    task: str,
    template: str,
    forced: bool,
    when: str,
    mini: int | None = None,
) -> evaluate.TaskResult:
    """The current model's answers to a task's test rows, or to the same `mini` of them; their randomness depends on the stage alone."""
    c = run.config
    prompted, examples = (
        run.prompted(task, c, template),
        run.examples(task, "test", c, template),
    )
    eval_prompts = run.cached(
        ("sheets", task, template),
        lambda: evaluate.EvalPrompts(run.model_ctx, prompted, examples, c.data.workers),
    )
    rows = limit_rows(range(len(eval_prompts.examples)), mini, seed=0).tolist()
    key = jax.random.fold_in(jax.random.key(c.seed), 10_000 + number)
    return evaluate.evaluate_task(
        run.model_ctx,
        run.params,
        eval_prompts,
        rows,
        sampling=eval_sampling(c),
        batch=c.eval.batch,
        key=key,
        forced=forced,
        title=f"evaluate {task} {when}",
    )


def evaluate_within_stage(
    run: Run, which: Stage, trained: Params, frozen: Params, step: int
) -> dict[str, float]:
    """The small evaluations after a step of a stage; mean accuracy on the stage's own tasks and on the others."""
    run.params = trainable.join_params(trained, frozen)
    began, spent = time.perf_counter(), WorkCost()
    found: dict[str, list[float]] = {"accuracy": [], "others": []}
    for task in tasks_to_evaluate(run)[0]:
        template = templates_of_task(run, task)[0]
        result = evaluate_current_model(
            run, which.number, task, template, False, f"at step {step}", which.config.eval.mini
        )
        spent += result.cost
        rows = evaluate.eval_rows(result, shared_eval_columns(run, which.number, step), mini=True)
        found["accuracy" if task in which.tasks else "others"] += [row["value"] for row in rows]
        if run.log:
            run.log.evals(rows)
    if run.log:
        cost = spent.logged() | {"seconds": time.perf_counter() - began}
        run.log.step(which.number, step, {"event": "evaluate", **cost})
    run.params = None
    return {name: float(np.mean(values)) for name, values in found.items() if values}


def shared_eval_columns(run: Run, number: int, step: int) -> dict[str, Any]:
    """What all lines of one evaluation share."""
    e = run.config.eval
    said = f"{'greedy' if e.temperature == 0 else f'T={e.temperature}'}, {e.max_new_tokens} tokens"
    name = run.stages[number - 1].name if number else "base"
    return {
        "stage": number,
        "stage_name": name,
        "step": step,
        "pixels": model_context.describe_pixel_limits(run.model_ctx),
        "decoding": said,
    }
