"""The tasks and rows that a run reads: each task is prompted once, each split loaded and checked once."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from cptjax.common import console, distributed, files
from cptjax.data import row_checks
from cptjax.data.model_context import ModelContext
from cptjax.data.row_checks import SplitSpec
from cptjax.tasks import prompted_task, registry
from cptjax.tasks.bad_rows import BadRow, drop_bad_rows
from cptjax.tasks.prompted_task import PromptedTask
from cptjax.tasks.scoring.sandbox import SandboxPool
from cptjax.tasks.task import Examples
from cptjax.types import Example


@dataclasses.dataclass(frozen=True)
class Datasets:
    """The prompted tasks and the checked rows of a run, built when first needed and kept."""

    config: ConfigDict  # of the run
    model_ctx: ModelContext
    sandbox: SandboxPool
    workdir: Path  # `rows/` in it records which rows of public datasets are bad
    recording: bool  # whether this process may write there
    _prompted: dict[tuple, PromptedTask] = dataclasses.field(default_factory=dict)
    _examples: dict[SplitSpec, Sequence[Example]] = dataclasses.field(default_factory=dict)

    def prompted_task(self, name: str, config: ConfigDict, template: str = "") -> PromptedTask:
        """Return a task under the template and the reward weights of a stage or of the evaluation."""
        template = template or config.data.template
        key = (name, template, tuple(config.rewards.items()))
        if key not in self._prompted:
            task = registry.resolve_task(name, config.tasks.to_dict())
            self._prompted[key] = prompted_task.make_prompted_task(
                task, template, config.rewards, self.sandbox
            )
        return self._prompted[key]

    def examples(
        self, name: str, split: str, config: ConfigDict, template: str = ""
    ) -> Sequence[Example]:
        """Return the good rows of a split; bad rows are reported, and refused above `data.bad_rows`."""
        spec = row_checks.split_spec(config, name, split, template)
        if spec not in self._examples:
            self._examples[spec] = self._load(spec, self.prompted_task(name, config, template))
        return self._examples[spec]

    def _load(self, spec: SplitSpec, prompted: PromptedTask) -> Sequence[Example]:
        examples = row_checks.load_examples(self.config, spec)
        if not len(examples) and not getattr(examples, "bad", ()):
            raise ValueError(f"task {spec.task}: its {spec.split} split has no rows")
        find = functools.partial(
            row_checks.find_bad_rows,
            examples,
            prompted,
            self.model_ctx.processor,
            spec,
            max(self.model_ctx.buckets),
        )
        # The user's files may change between two starts. Public datasets do not, and reading all their rows takes long.
        bad = self._read_or_find(spec, find) if isinstance(examples, Examples) else find()
        return drop_bad_rows(examples, bad, spec.allowed, console.print_message)

    def _read_or_find(self, spec: SplitSpec, find: functools.partial) -> list[BadRow]:
        """Return the bad rows that an earlier start of this run recorded, or find and record them."""
        key = repr(row_checks.split_key(self.config, dataclasses.replace(spec, allowed=0)))
        digest = hashlib.sha256(key.encode()).hexdigest()[:8]
        path = self.workdir / "rows" / f"{spec.task}_{spec.split}_{digest}.json"
        if distributed.gather_objects(path.is_file())[0]:
            return [BadRow(*row) for row in json.loads(path.read_text())]
        bad = find()
        if self.recording:
            files.write_json(path, [dataclasses.astuple(row) for row in bad])
        return bad
