"""Before any accelerator is used: are the rows good, do prompts fit their limit, what does padding waste, will it fit?"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict

from cptjax.common import console
from cptjax.config import Stage, all_runs, resolve_stages
from cptjax.continual import driver
from cptjax.data import collate, row_checks
from cptjax.data.data_config import DataConfig
from cptjax.data.mixture import Mixture
from cptjax.data.row_checks import SplitReport
from cptjax.models import load
from cptjax.planning import memory
from cptjax.tasks.scoring import sandbox
from cptjax.training.programs import abstract_stage

BAD_ROWS_SHOWN = 20  # bad rows printed of one split
PADDING_STEPS = 500  # of a stage, whose padding is counted
HISTOGRAM_BINS, HISTOGRAM_WIDTH = 12, 40  # of a histogram
DEVICE_COUNTS = (1, 4, 8, 16, 64)  # where the mesh leaves their number open
PROMPT_CHARS = 1500  # characters printed of a prompt


@dataclasses.dataclass(frozen=True)
class Padding:
    """The batches of one length."""

    length: int
    batches: int
    tokens: int  # that are not padding
    slots: int

    @property
    def waste(self) -> float:
        return 1 - self.tokens / self.slots


def run_preflight(config: ConfigDict, rows: int | None = None) -> list[SplitReport]:
    """Checks every run that a config describes and prints what it finds; more bad rows than allowed are a ValueError."""
    if rows is not None and rows < 1:
        raise ValueError(f"--rows={rows}: a number of rows >= 1 is expected")
    driver.check_all_runs(config)
    plans = [(name, single, resolve_stages(single)) for name, single in all_runs(config)]
    found = check_all_rows(plans, rows, config.rewards.timeout)
    for name, single, stages in plans:
        for each in stages:
            show_stage(
                name,
                single,
                each,
                [
                    found[row_checks.split_key(single, r)]
                    for r in row_checks.training_splits(each, stages)
                ],
            )
    refuse_bad_rows(list(found.values()))
    return list(found.values())


def check_all_rows(
    plans: Sequence[tuple[str, ConfigDict, list[Stage]]], rows: int | None, timeout: float
) -> dict[tuple, SplitReport]:
    found: dict[tuple, SplitReport] = {}
    pool = sandbox.SandboxPool(processes=1, timeout=timeout)
    try:
        for name, config, stages in plans:
            for spec in row_checks.run_splits(config, stages):
                if (key := row_checks.split_key(config, spec)) not in found:
                    new = all(
                        (f.spec.task, f.spec.template) != (spec.task, spec.template)
                        for f in found.values()
                    )
                    found[key] = row_checks.check_split(config, spec, rows, pool)
                    show_split(
                        name,
                        found[key],
                        max(DataConfig.from_config(config.data).length_buckets),
                        prompts=new,
                    )
    finally:
        pool.close()
    return found


def refuse_bad_rows(found: Sequence[SplitReport]) -> None:
    """Says in one line why a run would stop."""
    for each in found:
        allowed = each.spec.allowed_bad_rows
        if len(each.bad) > allowed:
            more = f"{len(each.bad)} bad rows, {allowed} allowed by data.bad_rows; the first: {each.bad[0]}"
            raise ValueError(f"{each.name}: {more}")
        if not each.rows:
            raise ValueError(
                f"{each.name}: no good row; give the task data or take it out of the config"
            )


def padding_by_length(
    order: Mixture, sources: Sequence[np.ndarray], buckets: Sequence[int], pack: bool
) -> list[Padding]:
    """The padding of a stage's first batches, by row length; `sources` are the token counts of its lists."""
    lengths: dict[int, list[tuple[int, int]]] = {}
    for step in range(min(order.steps(1), PADDING_STEPS)):
        sizes = [int(sources[p.source][p.index]) for p in order.rows(step)]
        length = collate.smallest_bucket(
            max(max(sizes), min(sum(sizes), max(buckets))) if pack else max(sizes), buckets
        )
        rows = (
            collate.round_up_size(1 + max(row for row, _ in collate.first_fit(sizes, length)))
            if pack
            else len(sizes)
        )
        lengths.setdefault(length, []).append((sum(sizes), rows * length))
    return [
        Padding(n, len(all_), sum(t for t, _ in all_), sum(s for _, s in all_))
        for n, all_ in sorted(lengths.items())
    ]


def histogram_lines(title: str, values: Sequence[int], limit: int) -> list[str]:
    """Text bars of how often each size occurs, and how near the largest comes to the limit."""
    low, top = min(values), max(values)
    width = -(-(top - low + 1) // HISTOGRAM_BINS)
    counts = np.bincount((np.asarray(values) - low) // width)
    bar = lambda n: "#" * -(-n * HISTOGRAM_WIDTH // int(counts.max()))
    bars = (
        f"{low + i * width:>8}-{low + (i + 1) * width - 1:<7} {bar(n):<{HISTOGRAM_WIDTH}} {n}"
        for i, n in enumerate(counts.tolist())
    )
    middle, high = np.percentile(values, [50, 99]).astype(int)
    return [
        f"{title}: median {middle}, 99 % up to {high}, longest {top} of {limit} ({top / limit:.0%})",
        *bars,
    ]


def show_split(name: str, found: SplitReport, limit: int, prompts: bool) -> None:
    """Prints one split: bad rows, sizes, prompts."""
    counts = f"{found.read} of {found.total} rows read, {len(found.bad)} bad"
    console.print_message(f"\n{_label(name)}{found.name}, template {found.spec.template}: {counts}")
    for row in found.bad[:BAD_ROWS_SHOWN]:
        console.print_message(f"  {row}")
    if len(found.bad) > BAD_ROWS_SHOWN:
        console.print_message(f"  and {len(found.bad) - BAD_ROWS_SHOWN} more")
    if not found.rows:
        return
    kind = "tokens of prompt and answer" if found.spec.with_gold else "tokens of the prompt"
    lines = histogram_lines(kind, found.tokens, limit)
    if any(row.image_tokens for row in found.rows):
        lines += histogram_lines(
            "of them for pictures", [row.image_tokens for row in found.rows], limit
        )
    for i, prompt in enumerate(found.prompts if prompts else (), 1):
        lines += [
            f"prompt {i} of {found.name}:",
            *("  | " + line for line in prompt[:PROMPT_CHARS].splitlines()),
        ]
    console.print_message("\n".join(lines))


def _label(name: str) -> str:
    return f"{name}: " if name else ""


def show_stage(name: str, config: ConfigDict, each: Stage, found: Sequence[SplitReport]) -> None:
    """Prints a stage's length, its padding and the memory that it is expected to take."""
    c, read = each.config, tuple(len(f.rows) for f in found)
    if not all(read):
        return
    n, fraction = len(each.tasks), c.method.replay.fraction
    order = lambda sizes: Mixture(
        sizes[:n],
        c.train.batch,
        tuple(c.data.weights),
        sizes[n:],
        fraction,
        config.seed,
        each.number,
    )
    sizes = tuple(f.total - len(f.bad) for f in found)
    steps = each.steps or order(sizes).steps(each.epochs)
    title = f"{_label(name)}stage {each.number} {each.name} ({c.method.name})"
    console.print_message(f"\n{title}: {sum(sizes[:n])} rows, batch {c.train.batch}, {steps} steps")
    rows = padding_by_length(
        order(read),
        [f.tokens for f in found],
        DataConfig.from_config(c.data).length_buckets,
        c.data.pack,
    )
    total = Padding(
        0, sum(p.batches for p in rows), sum(p.tokens for p in rows), sum(p.slots for p in rows)
    )
    lines = [(str(p.length or "all"), str(p.batches), f"{p.waste:.0%}") for p in [*rows, total]]
    console.print_table("batches by row length", ("row length", "batches", "padding"), lines)
    show_memory(c, max(p.length for p in rows), max(row.patches for f in found for row in f.rows))


def show_memory(config: ConfigDict, prompt: int, patches: int) -> None:
    """Prints the expected memory per device for the mesh, or for several numbers of devices where it leaves them open."""
    cfg = load.find_model_config(config.model)
    counts = memory.possible_device_counts(config.mesh, DEVICE_COUNTS, config.train.batch)
    sizes = [
        memory.estimate_bytes(
            abstract_stage(config, cfg, memory.mesh_of_size(config.mesh, n)), prompt, patches
        )
        for n in counts
    ]
    unit, scale = ("GB", 1e9) if sizes[0]["peak"] > 1e9 else ("MB", 1e6)
    lines = [(part, *(f"{s[part] / scale:.2f}" for s in sizes)) for part in sizes[0]]
    console.print_table(
        f"expected {unit} per device, by arithmetic", ("devices", *map(str, counts)), lines
    )
