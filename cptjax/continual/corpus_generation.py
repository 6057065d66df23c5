"""Generate a corpus: sample and grade responses of a stage, or of another model, to a task's rows.

FILE.jsonl has a line per response, grouped by row, with the keys of a run's rollouts. Its
provenance stands in FILE.source.json, which `training/corpus.py` expects. A killed command
continues with the parts that it has sampled, and ends in the same bytes.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from cptjax.common import buckets, console, distributed, files
from cptjax.common.config_checks import check_config
from cptjax.common.runs import expand_runs
from cptjax.config import Stage, merge_config
from cptjax.continual import reevaluate
from cptjax.continual.model_state import newest_stage, restore_stage_params
from cptjax.continual.open_run import Run, open_run_readonly
from cptjax.continual.workdir import refuse_changed_config, software_versions
from cptjax.data.cost import WorkCost, sampling_cost
from cptjax.data.device_batches import batch_slices, cut_to_shards
from cptjax.data.prompts import make_example_encoder
from cptjax.evaluation.evaluate import rows_of_process
from cptjax.generation import generate
from cptjax.generation.sampling_config import SamplingConfig, rollout_sampling
from cptjax.tasks.prompted_task import PromptedTask
from cptjax.tasks.rewards import is_correct
from cptjax.tasks.task import example_text, limit_rows
from cptjax.training import rollouts
from cptjax.training.corpus import provenance_path
from cptjax.training.sampling_cache import SamplingCache
from cptjax.types import Example, Params


@dataclasses.dataclass(frozen=True)
class CorpusRequest:
    """Which responses a corpus has."""

    task: str
    samples: int  # responses per row
    stage: int | None = None  # of the workdir; 0 = its base model, None = the newest finished one
    model: str = ""  # Hugging Face folder or hub id, instead of a stage
    split: str = "train"
    rows: int | None = None  # None = all
    template: str = ""  # "" = the one that the task is trained with
    temperature: float | None = None  # None = rollout.temperature; likewise the next two
    top_p: float | None = None
    max_new_tokens: int | None = None

    def settings(self, config: ConfigDict) -> ConfigDict:
        """Return the config with the settings of the request."""
        given = {
            name: getattr(self, name)
            for name in ("temperature", "top_p", "max_new_tokens")
            if getattr(self, name) is not None
        }
        changes: dict[str, Any] = {"rollout": {"group": self.samples, **given}}
        if self.template:
            changes["data"] = {"template": self.template}
        return merge_config(config, changes)


def generate_corpus(
    config: ConfigDict, workdir: str | Path, request: CorpusRequest, out: str | Path
) -> dict[str, Any]:
    """Write the corpus `out` and its provenance; return the provenance."""
    out = Path(out)
    if out.suffix != ".jsonl":
        raise ValueError(f"--out={str(out)!r}: expected a path that ends with .jsonl")
    if request.model and request.stage is not None:
        raise ValueError("--model is not a stage of the workdir: leave out --model or --stage")
    if not request.model and not workdir:
        raise ValueError("expected --workdir of a run, or --model; got neither")
    files.local_folder(out.parent, "--out")
    folder = reevaluate.fetch_run(workdir or out.parent)
    is_run = distributed.decide_on_main(lambda: (folder / "config.json").is_file())
    if workdir and not is_run:
        raise ValueError(
            f"--workdir={str(folder)!r} has no config.json; expected the folder of one run"
        )
    check_config(config)
    single = reevaluate.select_run(config, folder) if workdir else expand_runs(config)[0][1]
    if request.model:
        # The weights are only read, so they have the type of the arithmetic.
        model = {"path": request.model, "param_dtype": single.model.compute_dtype}
        single = merge_config(single, {"model": {**model, "lora": {"rank": 0}, "freeze": ()}})
    else:
        refuse_changed_config(single, folder)
    with open_run_readonly(single, folder) as run:
        return _generate(run, request, out)


def _generate(run: Run, request: CorpusRequest, out: Path) -> dict[str, Any]:
    checkpoints, number = run.files.checkpoints, request.stage
    if request.model:
        number = 0
    elif number is None:
        number = newest_stage(run.files.workdir, checkpoints)
    trained = [s.config for s in run.stages if request.task in s.tasks]
    settings = request.settings(trained[-1] if trained else run.config)
    prompted = run.datasets.prompted_task(request.task, settings)
    examples = run.datasets.examples(request.task, request.split, settings)
    rows = limit_rows(range(len(examples)), request.rows, seed=settings.seed).tolist()
    asked = dataclasses.asdict(request) | {"stage": number}
    stage = Stage(number, (request.task,), None, None, settings)
    cache = SamplingCache(out, stage, run.model_ctx.mesh, more=json.dumps(asked, sort_keys=True))
    found = distributed.decide_on_main(lambda: _read_finished(out, cache.fingerprint))
    if found is not None:
        console.print_message(f"{out} is complete")
        return found
    step = checkpoints.stage_end(number) if number else 0
    params = restore_stage_params(run.config, run.model_ctx, checkpoints, number)
    sampling = rollout_sampling(settings)
    lines, cost = _sample_lines(run, settings, params, prompted, examples, rows, sampling, cache)
    lines = [{"stage": number, "step": step, **line} for line in lines]
    provenance = asked | {
        "model": request.model or run.config.model.path or run.config.model.preset,
        "run": "" if request.model else buckets.shown(run.files.workdir),
        "step": step,
        "template": prompted.template.name,
        "sampling": dataclasses.asdict(sampling),
        "seed": settings.seed,
        "versions": software_versions(run.model_ctx),
        "fingerprint": cache.fingerprint,
        "cost": cost.logged() | {"seconds": cache.seconds},
        **summarise_corpus(lines, request.samples),
    }
    if distributed.is_main_process():
        files.write_json(provenance_path(out), provenance)
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        files.write_text(out, text)
    distributed.gather_objects(True)  # the parts are deleted only after the file is written
    cache.discard()
    return files.to_jsonable(provenance)


def _read_finished(out: Path, fingerprint: str) -> dict[str, Any] | None:
    """Return the provenance of a finished corpus, or None; refuse to replace another file."""
    if not out.exists():
        return None
    source = provenance_path(out)
    provenance = files.read_json(source, dict) if source.is_file() else {}
    if provenance.get("fingerprint") != fingerprint:
        raise ValueError(
            f"--out={str(out)!r} exists and was generated with other settings; remove it, or "
            "choose another name"
        )
    return provenance


def _sample_lines(
    run: Run,
    settings: ConfigDict,
    params: Params,
    prompted: PromptedTask,
    examples: Sequence[Example],
    rows: Sequence[int],
    sampling: SamplingConfig,
    cache: SamplingCache,
) -> tuple[list[dict[str, Any]], WorkCost]:
    """Sample and grade the responses to some rows, divided among the processes."""
    model_ctx, own = run.model_ctx, rows_of_process(rows)
    processes = jax.process_count()
    size = cut_to_shards(settings.train.batch, model_ctx.shards * processes) // processes
    tasks = {prompted.name: prompted}
    encode = make_example_encoder(model_ctx, tasks, False, max(model_ctx.buckets))
    weights = generate.prepare_weights(model_ctx, params, sampling)
    key = jax.random.fold_in(jax.random.key(settings.seed), 40_000)

    def sample(part: Sequence[int]) -> tuple[list[list[Any]], WorkCost]:
        filled = [*part, *[part[-1]] * (size - len(part))]  # to the compiled shape
        items = [encode(examples[i]) for i in filled]
        encoded = [item.encoded for item in items]
        limits = np.where(np.arange(size) < len(part), sampling.max_new_tokens, 0)
        out = generate.sample_responses(
            model_ctx, weights, encoded, key, np.asarray(filled), sampling, limits=limits
        )
        texts = out.texts[: len(part) * sampling.group]
        rewards = rollouts.grade_responses(tasks, items[: len(part)], texts)
        lengths = out.mask.sum(1).reshape(size, -1)[: len(part)]
        found = zip(texts, rewards, out.finished.tolist(), strict=False)
        return [list(each) for each in found], sampling_cost(model_ctx.cfg, encoded, lengths)

    lines: dict[int, list[dict[str, Any]]] = {}
    total, right = WorkCost(), 0
    with console.progress_bar(f"responses to {prompted.name}", total=len(own)) as bar:
        for part in batch_slices(len(own), size):
            found, cost = cache.next_part(lambda part=part: sample(own[part]))
            total += cost
            for i, row in enumerate(own[part]):
                group = found[i * sampling.group : (i + 1) * sampling.group]
                lines[row] = _lines_of_row(row, examples[row], group)
            right += sum(is_correct(rewards) for _, rewards, _ in found)
            bar.advance(part.stop - part.start, correct=right)
    by_row: dict[int, list[dict[str, Any]]] = {}
    for of_process in distributed.gather_objects(lines):
        by_row |= of_process
    total = sum(distributed.gather_objects(total), WorkCost())
    return [line for row in rows for line in by_row[row]], total


def _lines_of_row(row: int, example: Example, group: Sequence[Sequence[Any]]) -> list[dict]:
    return [
        {
            "task": example.task,
            "id": example.id,
            "row": row,
            "sample": k,
            "prompt": example_text(example),
            "response": text,
            "answer": files.to_jsonable(example.answer),
            "reward": rewards.get("reward"),
            "rewards": rewards,
            "finished": finished,
        }
        for k, (text, rewards, finished) in enumerate(group)
    ]


# ---- summary -------------------------------------------------------------------------------------


def pass_at_k(correct: int, samples: int, k: int) -> float:
    """Return the chance that one of k responses, chosen among the samples, is correct."""
    return 1 - math.comb(samples - correct, k) / math.comb(samples, k)


def summarise_corpus(lines: Sequence[Mapping[str, Any]], samples: int) -> dict[str, Any]:
    """Return pass@k for powers of two up to K, and the shares of never and always solved rows."""
    right = np.array([is_correct(line["rewards"]) for line in lines]).reshape(-1, samples)
    counts = right.sum(1).tolist()
    ks = sorted({*(2**i for i in range(samples.bit_length()) if 2**i <= samples), samples})
    return {
        "responses": len(lines),
        "correct": sum(counts),
        "finished_share": float(np.mean([line["finished"] for line in lines])),
        "pass_at_k": {k: float(np.mean([pass_at_k(n, samples, k) for n in counts])) for k in ks},
        "never_solved": float(np.mean([n == 0 for n in counts])),
        "always_solved": float(np.mean([n == samples for n in counts])),
    }


def format_summary(provenance: Mapping[str, Any], out: str | Path) -> str:
    """Describe a corpus in two lines."""
    chances = ", ".join(f"pass@{k} {100 * v:.1f}" for k, v in provenance["pass_at_k"].items())
    finished, never, always = (
        f"{100 * provenance[name]:.1f} %"
        for name in ("finished_share", "never_solved", "always_solved")
    )
    return (
        f"{out}: {provenance['responses']} responses, {provenance['correct']} correct, "
        f"{finished} finished\n{chances}; rows never solved {never}, always {always}"
    )
