"""The evaluation of a base model, which the runs of a workdir share.

Arms, seeds and sweeps often begin with the same model. The first run that evaluates a task before
its first stage keeps the results in base_evaluations/ of the workdir. Another run copies them if
everything that decides them is equal: the model, its mesh and devices, the settings of evaluations,
the task's rows, the code and the versions of the packages. Of a workdir in a bucket, the folder is
only in the local copy, so the runs of one host share.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import jax

from cptjax.common import console, distributed, files
from cptjax.config import config_fingerprint
from cptjax.continual import fingerprints, workdir
from cptjax.continual.open_run import Run
from cptjax.generation.sampling_config import eval_sampling

FOLDER = "base_evaluations"
# Sections of a config that do not decide the evaluation of a base model. Of the last four and of
# `train`, the fingerprint has what matters: the task, its templates, the sampling, train.chunk.
OTHER_SECTIONS = (
    *("name", "seed", "seeds", "orders", "arms", "sweep", "fresh", "expect", "report", "prestage"),
    *("method", "train", "checkpoint", "log", "allow_change", "stuck_minutes"),
    *("tasks", "stages", "rollout", "eval"),
)
# The same of the section `eval`.
OTHER_EVAL_SETTINGS = (
    *("tasks", "general", "groups", "templates", "every", "mini", "before", "drift"),
)


def kept_path(run: Run, task: str, templates: list[str]) -> Path | None:
    """Return the file of a task's results; None if there are no other runs, or another process."""
    if not (run.files.shared and distributed.is_main_process()):
        return None
    return run.files.shared / FOLDER / f"{_fingerprint(run, task, templates)}.json"


def find(path: Path | None) -> dict[str, Any] | None:
    """Return the results that another run kept, or None, on all processes alike.

    Only the main process gets the rows.
    """
    kept = None
    try:
        kept = files.read_checked_json(path) if path and path.is_file() else None
    except ValueError as error:
        console.print_warning(f"{error}; the task is evaluated again")
    return kept if distributed.gather_objects(kept is not None)[0] else None


def keep(run: Run, path: Path | None, results: dict[str, Any]) -> None:
    """Keep results for other runs."""
    if path:
        path.parent.mkdir(exist_ok=True)
        name = str(run.files.workdir.relative_to(run.files.shared))
        files.write_checked_json(path, results | {"run": name})


def _fingerprint(run: Run, task: str, templates: list[str]) -> str:
    """Return a hash of what decides the results of a task."""
    c = run.config
    inputs = workdir.recorded_inputs(run.files.workdir)
    # Greedy responses of loaded weights do not depend on the seed.
    seed = c.seed if c.eval.temperature or not c.model.path else None
    facts = {
        "settings": config_fingerprint(c, sorted(set(c) - set(OTHER_SECTIONS))),
        "eval": {k: v for k, v in c.eval.to_dict().items() if k not in OTHER_EVAL_SETTINGS},
        "task": [task, c.tasks.to_dict().get(task), templates],
        "sampling": [repr(eval_sampling(c)), seed, c.train.chunk],
        "inputs": {k: v for k, v in inputs.items() if not k.startswith(("stage ", "rows of "))},
        "rows": inputs.get(f"rows of {task} test"),
        "versions": [fingerprints.code_hash(), fingerprints.package_versions()],
        "devices": [jax.devices()[0].device_kind, jax.device_count(), jax.process_count()],
    }
    text = json.dumps(files.to_jsonable(facts), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
