"""Check a config before any accelerator is used: rows, prompt lengths, padding, memory, disk."""

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from cptjax.common import buckets, console
from cptjax.common.runs import prestage_runs, select_runs
from cptjax.config import Stage, resolve_stages
from cptjax.continual import driver, stage_evaluation
from cptjax.data import collate, row_checks
from cptjax.data.data_config import DataConfig
from cptjax.data.mixture import Mixture
from cptjax.data.row_checks import SplitReport
from cptjax.models import load
from cptjax.models.config import ModelConfig
from cptjax.planning import disk, memory
from cptjax.tasks.scoring import sandbox
from cptjax.training.build import stage_mixture
from cptjax.training.programs import abstract_stage

BAD_ROWS_SHOWN = 20  # bad rows printed per split
PADDING_STEPS = 500  # steps per stage whose padding is counted
HISTOGRAM_BINS, HISTOGRAM_WIDTH = 12, 40
DEVICE_COUNTS = (1, 4, 8, 16, 64)  # shown if the mesh has a size of -1
PROMPT_CHARS = 1500  # characters printed per prompt


@dataclasses.dataclass(frozen=True)
class Padding:
    """The padding of all batches of one row length."""

    length: int
    batches: int
    tokens: int  # that are not padding
    slots: int

    @property
    def waste(self) -> float:
        return 1 - self.tokens / self.slots


def run_preflight(
    config: ConfigDict, rows: int | None = None, workdir: str = ""
) -> list[SplitReport]:
    """Check every run of a config, and print the results.

    Raise a ValueError if a split has more bad rows than allowed, or if the checkpoints do not fit
    on the disk of `workdir`.
    """
    if rows is not None and rows < 1:
        raise ValueError(f"--rows={rows}: expected a number of rows of at least 1")
    driver.check_all_runs(config)
    runs = [(name, single, resolve_stages(single)) for name, single in select_runs(config)]
    reports = check_all_rows(runs, rows, config.rewards.timeout)
    for name, single, stages in runs:
        for stage in stages:
            splits = row_checks.training_splits(stage, stages)
            keys = [row_checks.split_key(single, spec) for spec in splits]
            show_stage(name, single, stage, [reports[key] for key in keys])
    refuse_bad_rows(list(reports.values()))
    show_disk(runs, reports, set(prestage_runs(config)), workdir)
    return list(reports.values())


def check_all_rows(
    runs: Sequence[tuple[str, ConfigDict, list[Stage]]], rows: int | None, timeout: float
) -> dict[tuple, SplitReport]:
    """Check and print every split that the runs read.

    A split that several runs read is checked once.
    """
    reports: dict[tuple, SplitReport] = {}
    shown_prompts: set[tuple[str, str]] = set()  # (task, template)
    pool = sandbox.SandboxPool(processes=1, timeout=timeout)
    try:
        for name, config, stages in runs:
            limit = max(DataConfig.from_config(config.data).length_buckets)
            for spec in row_checks.run_splits(config, stages):
                key = row_checks.split_key(config, spec)
                if key in reports:
                    continue
                reports[key] = row_checks.check_split(config, spec, rows, pool)
                prompt = (spec.task, spec.template)
                show_split(name, reports[key], limit, prompts=prompt not in shown_prompts)
                shown_prompts.add(prompt)
    finally:
        pool.close()
    return reports


def refuse_bad_rows(reports: Sequence[SplitReport]) -> None:
    """Raise the error that a run would raise for bad rows."""
    for report in reports:
        allowed = report.spec.allowed_bad_rows
        if len(report.bad) > allowed:
            raise ValueError(
                f"{report.name}: {len(report.bad)} bad rows, {allowed} allowed by data.bad_rows; "
                f"the first: {report.bad[0]}"
            )
        if not report.rows:
            raise ValueError(
                f"{report.name}: no good row; give the task data or take it out of the config"
            )


def padding_by_length(
    order: Mixture, sources: Sequence[np.ndarray], buckets: Sequence[int], pack: bool
) -> list[Padding]:
    """Return the padding of a stage's first batches, by row length.

    `sources` has the token counts of the rows of each list.
    """
    by_length: dict[int, list[tuple[int, int]]] = {}  # (tokens, slots) of each batch
    for step in range(min(order.steps(1), PADDING_STEPS)):
        sizes = [int(sources[row.source][row.index]) for row in order.rows(step)]
        if pack:
            longest = max(max(sizes), min(sum(sizes), max(buckets)))
            length = collate.smallest_bucket(longest, buckets)
            packed = 1 + max(row for row, _ in collate.first_fit(sizes, length))
            rows = collate.round_up_size(packed)
        else:
            length = collate.smallest_bucket(max(sizes), buckets)
            rows = len(sizes)
        by_length.setdefault(length, []).append((sum(sizes), rows * length))
    return [
        Padding(length, len(batches), *(sum(column) for column in zip(*batches, strict=True)))
        for length, batches in sorted(by_length.items())
    ]


def histogram_lines(title: str, values: Sequence[int], limit: int) -> list[str]:
    """Return a histogram as lines of text, after a line with the median and the largest value."""
    low, top = min(values), max(values)
    width = -(-(top - low + 1) // HISTOGRAM_BINS)
    counts = np.bincount((np.asarray(values) - low) // width)
    middle, high = np.percentile(values, [50, 99]).astype(int)
    lines = [
        f"{title}: median {middle}, 99 % up to {high}, longest {top} of {limit} ({top / limit:.0%})"
    ]
    for i, count in enumerate(counts.tolist()):
        start = low + i * width
        bar = "#" * -(-count * HISTOGRAM_WIDTH // int(counts.max()))
        lines.append(f"{start:>8}-{start + width - 1:<7} {bar:<{HISTOGRAM_WIDTH}} {count}")
    return lines


def show_split(name: str, report: SplitReport, limit: int, prompts: bool) -> None:
    """Print one split: bad rows, sizes, prompts."""
    console.print_message(
        f"\n{_label(name)}{report.name}, template {report.template}: "
        f"{report.read} of {report.total} rows read, {len(report.bad)} bad"
    )
    for row in report.bad[:BAD_ROWS_SHOWN]:
        console.print_message(f"  {row}")
    if len(report.bad) > BAD_ROWS_SHOWN:
        console.print_message(f"  and {len(report.bad) - BAD_ROWS_SHOWN} more")
    if not report.rows:
        return
    kind = "prompt and gold response" if report.spec.with_gold else "the prompt"
    lines = histogram_lines(f"tokens of {kind}", report.tokens, limit)
    image_tokens = [row.image_tokens for row in report.rows]
    if any(image_tokens):
        lines += histogram_lines("of them for images", image_tokens, limit)
    for i, prompt in enumerate(report.prompts if prompts else (), 1):
        lines.append(f"prompt {i} of {report.name}:")
        lines += [f"  | {line}" for line in prompt[:PROMPT_CHARS].splitlines()]
    console.print_message("\n".join(lines))


def _label(name: str) -> str:
    return f"{name}: " if name else ""


def show_stage(name: str, config: ConfigDict, stage: Stage, reports: Sequence[SplitReport]) -> None:
    """Print a stage's length, its padding and its estimated memory."""
    c = stage.config
    read = [len(report.rows) for report in reports]
    if not all(read):
        return
    sizes = [report.total - len(report.bad) for report in reports]
    steps = count_steps(config, stage, reports)
    own_rows = sum(sizes[: len(stage.tasks)])
    length = f"{steps} steps"
    if stage.epochs and c.method.epoch_unit == "responses":
        length += " per response to each row (its epochs count responses)"
    console.print_message(
        f"\n{_label(name)}stage {stage.number} {stage.name} ({c.method.name}): "
        f"{own_rows} rows, batch {c.train.batch}, {length}"
    )
    buckets = DataConfig.from_config(c.data).length_buckets
    tokens = [report.tokens for report in reports]
    padding = padding_by_length(
        stage_mixture(stage, read, config.seed), tokens, buckets, c.data.pack
    )
    total = Padding(
        length=0,
        batches=sum(p.batches for p in padding),
        tokens=sum(p.tokens for p in padding),
        slots=sum(p.slots for p in padding),
    )
    lines = [(str(p.length or "all"), str(p.batches), f"{p.waste:.0%}") for p in [*padding, total]]
    console.print_table("batches by row length", ("row length", "batches", "padding"), lines)
    longest = max(p.length for p in padding)
    show_memory(c, longest, max(row.patches for report in reports for row in report.rows))


def count_steps(config: ConfigDict, stage: Stage, reports: Sequence[SplitReport]) -> int:
    """Return the steps of a stage; `reports` are those of its training splits."""
    sizes = [report.total - len(report.bad) for report in reports]
    return stage.steps or stage_mixture(stage, sizes, config.seed).steps(stage.epochs)


def show_disk(
    runs: Sequence[tuple[str, ConfigDict, list[Stage]]],
    reports: Mapping[tuple, SplitReport],
    prestages: set[str],
    workdir: str,
) -> None:
    """Print what all runs together need on disk, and refuse a disk without space for checkpoints.

    Files of several runs lie in one workdir.
    """
    sizes = []
    for name, config, stages in runs:
        steps = [
            count_steps(config, stage, [reports[row_checks.split_key(config, s)] for s in splits])
            for stage in stages
            for splits in [row_checks.training_splits(stage, stages)]
        ]
        test_rows = count_test_rows(config, stages, reports)
        sizes.append(disk.disk_bytes(config, stages, steps, test_rows))
        if name in prestages:
            sizes[-1]["models of pre-stages"] = disk.exported_model_bytes(config)
    total = disk.add_runs(sizes, runs[0][1].checkpoint)
    whole = sum(total.values())
    unit, scale = ("GB", 1e9) if whole > 1e9 else ("MB", 1e6)
    lines = [(name, f"{size / scale:.2f}") for name, size in {**total, "all": whole}.items()]
    console.print_table("expected disk of the workdir", ("files", unit), lines)
    if buckets.is_address(workdir):
        console.print_message(f"--workdir={workdir}: a bucket has no limit to compare with")
    if not workdir or buckets.is_address(workdir):
        return
    folder = Path(workdir).absolute()
    free = shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists())).free
    checkpoints = total[disk.STAGE_ENDS] + total[disk.STAGE_STEPS]
    text = f"--workdir={workdir}: its disk has {free / scale:.2f} {unit} free"
    if free < checkpoints:
        raise ValueError(
            f"{text}, the checkpoints need {checkpoints / scale:.2f} {unit}; free some, lower "
            "checkpoint.keep, or use another disk"
        )
    if free < whole:
        console.print_warning(f"{text}, the run may need up to {whole / scale:.2f} {unit}")


def count_test_rows(
    config: ConfigDict, stages: list[Stage], reports: Mapping[tuple, SplitReport]
) -> int:
    """Return the number of rows of one evaluation of all tasks."""
    tasks = {task for part in stage_evaluation.tasks_to_evaluate(config, stages) for task in part}
    rows = {  # by task, whatever its templates
        report.spec.task: report.total - len(report.bad)
        for spec in row_checks.run_splits(config, stages)
        for report in [reports[row_checks.split_key(config, spec)]]
        if spec.split == "test"
    }
    return sum(rows[task] for task in tasks)


def show_memory(config: ConfigDict, prompt: int, patches: int) -> None:
    """Print the estimated memory per device, for several device counts if the mesh has a -1."""
    cfg = load.find_model_config(config.model)
    sizes = memory_by_device_count(config, cfg, prompt, patches)
    unit, scale = ("GB", 1e9) if max(s["peak"] for s in sizes.values()) > 1e9 else ("MB", 1e6)
    parts = next(iter(sizes.values()))
    lines = [(part, *(f"{s[part] / scale:.2f}" for s in sizes.values())) for part in parts]
    console.print_table(
        f"expected {unit} per device, by arithmetic", ("devices", *map(str, sizes)), lines
    )


def memory_by_device_count(
    config: ConfigDict, cfg: ModelConfig, prompt: int, patches: int
) -> dict[int, dict[str, float]]:
    """Return the bytes per device for each device count that divides micro-batches and weights."""
    sizes, error = {}, None
    for n in memory.possible_device_counts(config.mesh, DEVICE_COUNTS, config.train.batch):
        try:
            stage = abstract_stage(config, cfg, memory.mesh_of_size(config.mesh, n))
            sizes[n] = memory.estimate_bytes(stage, prompt, patches)
        except ValueError as reason:  # n devices do not divide a micro-batch or the weights
            error = reason
    if not sizes:
        raise error
    return sizes
