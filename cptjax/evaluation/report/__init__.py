"""One self-contained HTML page about a run, or about several runs side by side, and their numbers as JSON."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cptjax.common import files
from cptjax.evaluation.report import expect, page, read
from cptjax.evaluation.report.read import Arm
from cptjax.evaluation.summary import RunTables


def write_report(folders: Sequence[Path | str], out: Path | str | None = None) -> Path:
    """Writes the report on the runs under `folders`; without `out`, as report.html into the first of them."""
    return _write_page(
        read.read_arms(folders), folders, Path(out) if out else Path(folders[0]) / "report.html"
    )


def write_run_report(tables: RunTables, totals: dict[str, Any]) -> Path:
    """Write report.html into the workdir of one run whose files are already parsed; `totals` is its summary."""
    label = tables.workdir.resolve().name
    out = tables.workdir / "report.html"
    files.write_text(out, page.render_run_page(read.report_run(tables, totals, label)))
    return out


def write_comparison(folder: Path) -> Path:
    """Writes the report on the runs of one config, and their summaries again: each now knows the joint run beside it."""
    arms = read.read_arms([folder])
    for run in (run for arm in arms for run in arm.runs):
        files.write_json(run.path / "summary.json", run.summary)
    return _write_page(arms, [folder], folder / "report.html")


def _write_page(arms: Sequence[Arm], folders: Sequence[Path | str], out: Path) -> Path:
    if len(arms) == 1 and len(arms[0].runs) == 1:
        files.write_text(out, page.render_run_page(arms[0].runs[0]))
        return out
    title = (
        Path(folders[0]).resolve().name if len(folders) == 1 else " · ".join(a.label for a in arms)
    )
    verdicts = expect.judge_expectations(arms)
    files.write_text(out, page.render_comparison_page(arms, title, verdicts))
    files.write_json(out.with_suffix(".json"), comparison_numbers(arms, verdicts))
    return out


def comparison_numbers(arms: Sequence[Arm], verdicts: Sequence[expect.Verdict]) -> dict[str, Any]:
    """What a comparison amounts to: mean, deviation and count over seeds of every number, and what of the expected was found."""
    names = {
        arm.label: dict.fromkeys(name for run in arm.runs for name in run.summary["metrics"])
        for arm in arms
    }
    spreads = {
        arm.label: {name: s for name in names[arm.label] if (s := arm.spread(name))} for arm in arms
    }
    return {"unit": "fraction of 1", "arms": spreads, "expected": [v.plain() for v in verdicts]}
