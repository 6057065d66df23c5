"""An open run: config, stages, model context, files, and what the stages share."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path

from ml_collections import ConfigDict

from cptjax.common import buckets, cluster, console, distributed, files, trackers
from cptjax.common.profiler import StepProfiler
from cptjax.common.run_log import Positions, RunLog
from cptjax.common.signals import StopSignals
from cptjax.config import Stage, config_to_dict, recorded_config, resolve_stages
from cptjax.continual import progress, workdir
from cptjax.continual.checkpoint import Checkpoints, checkpoint_folder, open_checkpoints
from cptjax.continual.live_report import LiveReport
from cptjax.continual.model_state import (
    frozen_weights_methods,
    restore_stage_params,
    split_trained,
)
from cptjax.data import model_context
from cptjax.data.data_config import DataConfig
from cptjax.data.datasets import Datasets
from cptjax.data.model_context import ModelContext
from cptjax.evaluation.base_kl import BaseResponses
from cptjax.evaluation.evaluate import EvalPrompts
from cptjax.evaluation.judge import Judge
from cptjax.models import load, trainable
from cptjax.tasks.scoring.sandbox import SandboxPool
from cptjax.types import Params

# Bytes of address space of a sandbox process: enough for a user's large libraries, and a limit for
# algebra that never stops growing.
SANDBOX_MEMORY = 16 << 30


@dataclasses.dataclass
class RunFiles:
    """What a run writes into its workdir."""

    workdir: Path
    log: RunLog | None  # None in a read-only run, and on every process but the first
    checkpoints: Checkpoints | None  # None in a read-only run that has none
    # The cost since the last line of metrics.jsonl.
    unlogged_cost: dict[str, float] = dataclasses.field(default_factory=dict)
    report: LiveReport | None = None  # as `log`
    profiler: StepProfiler | None = None  # None = no steps are profiled
    # The folder of several runs, in which they share the evaluation of their base model.
    shared: Path | None = None

    def write_live_report(self) -> None:
        """Write the report of the running run, if it is time."""
        if self.report:
            self.report.write_if_due()

    def positions(self) -> Positions:
        """Return the length and hash of each append-only file; they are in the bucket, too."""
        positions = self.log.positions() if self.log else {}
        buckets.push(self.workdir)
        return positions

    def close(self) -> None:
        try:
            if self.profiler:
                self.profiler.close()
            if self.checkpoints:
                self.checkpoints.close()
        finally:
            if self.report:
                with contextlib.suppress(OSError):  # a full disk, of which the run tells itself
                    self.report.sessions.record()
            if self.log:
                self.log.close()


@dataclasses.dataclass(frozen=True)
class Run:
    """One config in one workdir, with everything that its stages and evaluations share."""

    config: ConfigDict
    stages: list[Stage]
    model_ctx: ModelContext
    files: RunFiles
    datasets: Datasets
    sandbox: SandboxPool
    stop_signals: StopSignals
    # Kept between evaluations: prompts by (task, template), and the base model's responses by task.
    eval_prompts: dict[tuple[str, str], EvalPrompts] = dataclasses.field(default_factory=dict)
    base_responses: dict[str, BaseResponses] = dataclasses.field(default_factory=dict)
    judges: dict[str, Judge] = dataclasses.field(default_factory=dict)  # by `judge` of their tasks
    # The frozen weights, which all models of the run share; {} = a method changes them, or all
    # weights are trained.
    frozen: Params = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def base_params(self) -> Params:
        """The base model in the compute dtype, loaded on first use."""
        base = restore_stage_params(self.config, self.model_ctx, self.files.checkpoints, 0)
        return self.copy_for_comparison(trainable.join_params(self.frozen, base))

    def copy_for_comparison(self, params: Params, dtype: str = "") -> Params:
        """Copy parameters that training steps will donate; frozen ones are shared if they can be.

        The copy has the compute dtype unless `dtype` names another.
        """
        copied, shared = params, {}
        if not frozen_weights_methods(self.stages):
            copied, shared = split_trained(self.config, params)
        copied = load.copy_params(copied, dtype or self.config.model.compute_dtype)
        return trainable.join_params(copied, shared)

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # Closing waits for saves in the background, which need all processes. After an error the
        # others may wait for this process, so it does not wait for them.
        failed = kind is not None and issubclass(kind, Exception)
        if not (failed and cluster.is_connected()):
            self.close()

    def close(self) -> None:
        try:
            self.files.close()
        finally:
            self.sandbox.close()


def open_run(
    config: ConfigDict,
    folder: Path,
    stop_signals: StopSignals | None = None,
    profile: str = "",
    shared: Path | None = None,
) -> Run:
    """Open a run to train it; `driver.accept_changes` has checked its workdir.

    profile: steps to profile, see `StepProfiler`; "" = none
    shared: the folder of several runs; None = there are no others
    """
    profiler = StepProfiler(profile, folder, len(config.stages)) if profile else None
    folder.mkdir(parents=True, exist_ok=True)
    model_ctx = _load_model_context(config)
    log = live_report = None
    if distributed.is_main_process():
        log = RunLog(folder, trackers.open_trackers(folder, config_to_dict(config)))
        live_report = LiveReport(folder, config.log.report_minutes)
    c = config.checkpoint
    checkpoints = Checkpoints(
        checkpoint_folder(folder),
        c.every,
        c.minutes,
        c.keep,
        c.async_save,
        tidy=True,
        on_saved=functools.partial(progress.record_saved, folder),
    )
    run_files = RunFiles(folder, log, checkpoints, {}, live_report, profiler, shared)
    return _build_run(config, model_ctx, run_files, stop_signals or StopSignals())


@contextlib.contextmanager
def open_run_readonly(config: ConfigDict, folder: Path) -> Iterator[Run]:
    """Open a run without writing to its workdir; it may be running in another process."""
    model_ctx, checkpoints = _load_model_context(config), open_checkpoints(folder)
    run = _build_run(config, model_ctx, RunFiles(folder, None, checkpoints), StopSignals())
    with contextlib.closing(run):
        yield run


def _build_run(
    config: ConfigDict, model_ctx: ModelContext, run_files: RunFiles, stop_signals: StopSignals
) -> Run:
    r = config.rewards
    sandbox = SandboxPool(processes=r.processes, timeout=r.timeout, memory=SANDBOX_MEMORY)
    recording = run_files.log is not None
    datasets = Datasets(config, model_ctx, sandbox, run_files.workdir, recording)
    return Run(
        config, resolve_stages(config), model_ctx, run_files, datasets, sandbox, stop_signals
    )


def _load_model_context(config: ConfigDict) -> ModelContext:
    lengths = DataConfig.from_config(config.data).length_buckets
    with console.show_waiting(f"loading the model ({load.describe_model_source(config.model)})"):
        return model_context.load_model_context(config.model, config.mesh, lengths)


def write_run_files(run: Run, inputs: dict[str, str], changed: list[str]) -> None:
    """Write config.json, versions.json and inputs.json; call it after all checks of the workdir.

    `inputs` are the hashes of the files and rows. Refuse those that differ from the run's start.
    `changed` are accepted changes.
    """
    folder = run.files.workdir
    rows = distributed.gather_objects(workdir.changed_inputs(folder, inputs))[0]
    workdir.refuse_changed_inputs(run.config, folder, rows)
    accepted = list(dict.fromkeys([*changed, *rows]))

    def write() -> None:
        files.write_json(folder / "config.json", recorded_config(run.config, folder))
        workdir.record_start(folder, run.model_ctx, accepted, inputs)

    distributed.decide_on_main(write)  # a damaged versions.json is refused on all processes
