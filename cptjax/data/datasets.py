"""Load the tasks and splits of a run, each once, and check their rows."""

import contextlib
import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from cptjax.common import console, distributed, files
from cptjax.data import row_checks
from cptjax.data.model_context import ModelContext
from cptjax.data.row_checks import CheckedRows, RowChecks, SplitSpec
from cptjax.tasks import prompted_task
from cptjax.tasks.bad_rows import BadRow, drop_bad_rows
from cptjax.tasks.prompted_task import PromptedTask
from cptjax.tasks.scoring.sandbox import SandboxPool
from cptjax.tasks.task import Examples, Subset
from cptjax.types import Example


@dataclasses.dataclass(frozen=True)
class Datasets:
    """The prompted tasks and the checked rows of a run, built when first needed and kept."""

    config: ConfigDict  # of the run
    model_ctx: ModelContext
    sandbox: SandboxPool
    workdir: Path  # `rows/` in it records the checks of public datasets
    recording: bool  # whether this process may write there
    _prompted: dict[tuple, PromptedTask] = dataclasses.field(default_factory=dict)
    _examples: dict[SplitSpec, CheckedRows] = dataclasses.field(default_factory=dict)

    def prompted_task(self, name: str, config: ConfigDict, template: str = "") -> PromptedTask:
        """Return a task with the template and the reward weights of a stage or the evaluation."""
        template = template or config.data.template
        key = (name, template, tuple(config.rewards.items()))
        if key not in self._prompted:
            task = row_checks.resolve_config_task(config, name)
            self._prompted[key] = prompted_task.make_prompted_task(
                task, template, config.rewards, self.sandbox
            )
        return self._prompted[key]

    def examples(
        self, name: str, split: str, config: ConfigDict, template: str = ""
    ) -> CheckedRows:
        """Return the good rows of a split.

        Bad rows are printed, and refused above `data.bad_rows`.
        """
        spec = row_checks.split_spec(config, name, split, template)
        if spec not in self._examples:
            self._examples[spec] = self._load(spec, self.prompted_task(name, config, template))
        return self._examples[spec]

    def loaded_splits(self) -> list[tuple[SplitSpec, CheckedRows]]:
        """Return the splits that are loaded so far."""
        return list(self._examples.items())

    def _load(self, spec: SplitSpec, prompted: PromptedTask) -> CheckedRows:
        examples = row_checks.load_split(self.config, spec, prompted.task)
        if not len(examples) and not getattr(examples, "bad", ()):
            raise ValueError(f"task {spec.task}: its {spec.split} split has no rows")
        length = {f"number of rows of {spec.task} {spec.split}": len(examples)}
        distributed.require_equal(length, "give all processes the same data")
        # The user's files may change between two starts of the run. Public datasets do not, and
        # reading all their rows takes a long time.
        read = self._read_or_check if isinstance(examples, Examples) else self._check
        checks = read(spec, prompted, examples)
        allowed = spec.allowed_bad_rows
        good = drop_bad_rows(examples, checks.bad, allowed, console.print_message)
        rows = list(good.indices) if isinstance(good, Subset) else list(range(len(examples)))
        return CheckedRows(examples, rows, checks.tokens[rows])

    def _check(
        self, spec: SplitSpec, prompted: PromptedTask, examples: Sequence[Example]
    ) -> RowChecks:
        model_ctx = self.model_ctx
        limit = max(model_ctx.buckets)
        return row_checks.check_rows(examples, prompted, model_ctx.processor, spec, limit)

    def _read_or_check(
        self, spec: SplitSpec, prompted: PromptedTask, examples: Sequence[Example]
    ) -> RowChecks:
        """Return the recorded checks of an earlier start of this run; else check and record."""
        key = repr(row_checks.split_key(self.config, dataclasses.replace(spec, allowed_bad_rows=0)))
        digest = hashlib.sha256(key.encode()).hexdigest()[:8]
        path = self.workdir / "rows" / f"{spec.task}_{spec.split}_{digest}.json"
        if recorded := distributed.gather_objects(_read_recorded(path))[0]:
            bad = [BadRow(*row) for row in recorded["bad"]]
            return RowChecks(bad, np.array(recorded["tokens"], np.int32))
        checks = self._check(spec, prompted, examples)
        if self.recording:
            bad = [dataclasses.astuple(row) for row in checks.bad]
            files.write_checked_json(path, {"bad": bad, "tokens": checks.tokens.tolist()})
        return checks


def _read_recorded(path: Path) -> dict[str, Any]:
    """Return the recorded checks as the main process reads them; {} = none, or a damaged file."""
    if distributed.is_main_process() and path.is_file():
        with contextlib.suppress(ValueError):
            return files.read_checked_json(path)
    return {}
