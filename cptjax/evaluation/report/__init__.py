"""Write the HTML report of one run, or of several runs compared, with their numbers as JSON."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cptjax.common import files
from cptjax.evaluation.report import expect, page, read
from cptjax.evaluation.report.read import Arm
from cptjax.evaluation.summary import RunTables


def write_report(folders: Sequence[Path | str], out: Path | str | None = None) -> Path:
    """Write the report on the runs under `folders`; default: report.html in the first folder."""
    out = Path(out) if out else Path(folders[0]) / "report.html"
    return _write_page(read.read_arms(folders), folders, out)


def write_run_report(tables: RunTables, summary: dict[str, Any]) -> Path:
    """Write report.html into the workdir of one run whose result files are already parsed."""
    label = tables.workdir.resolve().name
    out = tables.workdir / "report.html"
    files.write_text(out, page.render_run_page(read.ReportRun(label, tables, summary)))
    return out


def write_comparison(folder: Path) -> Path:
    """Write the report on all runs of one config, and again their summaries.

    The summaries now include the comparison with the joint run.
    """
    arms = read.read_arms([folder])
    for arm in arms:
        for run in arm.runs:
            files.write_json(run.path / "summary.json", run.summary)
    return _write_page(arms, [folder], folder / "report.html")


def _write_page(arms: Sequence[Arm], folders: Sequence[Path | str], out: Path) -> Path:
    if len(arms) == 1 and len(arms[0].runs) == 1:
        files.write_text(out, page.render_run_page(arms[0].runs[0]))
        return out
    title = Path(folders[0]).resolve().name
    if len(folders) > 1:
        title = " · ".join(arm.label for arm in arms)
    verdicts = expect.judge_expectations(arms)
    files.write_text(out, page.render_comparison_page(arms, title, verdicts))
    files.write_json(out.with_suffix(".json"), comparison_numbers(arms, verdicts))
    return out


def comparison_numbers(arms: Sequence[Arm], verdicts: Sequence[expect.Verdict]) -> dict[str, Any]:
    """Return mean, deviation and count over seeds of every metric, and the verdicts."""
    spreads: dict[str, dict[str, Any]] = {}
    for arm in arms:
        names = dict.fromkeys(name for run in arm.runs for name in run.summary["metrics"])
        spreads[arm.label] = {name: spread for name in names if (spread := arm.spread(name))}
    return {
        "unit": "fraction of 1",
        "arms": spreads,
        "expected": [verdict.to_dict() for verdict in verdicts],
    }
