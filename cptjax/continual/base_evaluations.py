"""The evaluation of a base model, which the runs of a workdir share.

Arms, seeds and sweeps often begin with the same model. The first run that evaluates a task before
its first stage keeps the results in base_evaluations/ of the workdir. Another run copies them if
everything that decides them is equal: the model, its mesh and devices, the settings of evaluations,
the task's rows, the code and the versions of the packages. Of a workdir in a bucket, the folder is
only in the local copy, so the runs of one host share.
"""

import hashlib
import json
from typing import Any

import jax

from cptjax.common import console, distributed, files
from cptjax.config import config_to_dict
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


def find(run: Run, task: str, templates: list[str]) -> dict[str, Any] | None:
    """Return the results of a task that another run kept, or None.

    Only the main process gets the rows.
    """
    kept = None
    if run.files.shared and distributed.is_main_process():
        path = run.files.shared / FOLDER / f"{_fingerprint(run, task, templates)}.json"
        try:
            kept = files.read_checked_json(path) if path.is_file() else None
        except ValueError as error:
            console.print_warning(f"{error}; the task is evaluated again")
    return kept if distributed.gather_objects(kept is not None)[0] else None


def keep(run: Run, task: str, templates: list[str], results: dict[str, Any]) -> None:
    """Keep the results of a task for other runs."""
    if run.files.shared and run.files.log:
        folder = run.files.shared / FOLDER
        folder.mkdir(exist_ok=True)
        path = folder / f"{_fingerprint(run, task, templates)}.json"
        name = str(run.files.workdir.relative_to(run.files.shared))
        files.write_checked_json(path, results | {"run": name})


def _fingerprint(run: Run, task: str, templates: list[str]) -> str:
    """Return a hash of what decides the results of a task."""
    c, settings = run.config, config_to_dict(run.config)
    inputs = workdir.recorded_inputs(run.files.workdir)
    # Greedy responses of loaded weights do not depend on the seed.
    seed = c.seed if c.eval.temperature or not c.model.path else None
    if settings["prestage"]:
        settings["model"]["path"] = ""  # its weights are among the inputs
    facts = {
        "settings": {k: v for k, v in settings.items() if k not in OTHER_SECTIONS},
        "eval": {k: v for k, v in settings["eval"].items() if k not in OTHER_EVAL_SETTINGS},
        "task": [task, settings["tasks"].get(task), templates],
        "sampling": [repr(eval_sampling(c)), seed, c.train.chunk],
        "inputs": {k: v for k, v in inputs.items() if not k.startswith(("stage ", "rows of "))},
        "rows": inputs.get(f"rows of {task} test"),
        "versions": [fingerprints.code_hash(), fingerprints.package_versions()],
        "devices": [jax.devices()[0].device_kind, jax.device_count(), jax.process_count()],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
