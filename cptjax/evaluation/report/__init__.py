"""Write the HTML report of one run, or of several runs compared, with their numbers as JSON."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cptjax.common import buckets, files
from cptjax.evaluation.report import differences, expect, page, read
from cptjax.evaluation.report.read import Arm
from cptjax.evaluation.summary import RunTables


def write_report(
    folders: Sequence[Path | str],
    out: Path | str | None = None,
    baseline: str = "",
    sort: str = "",
) -> Path:
    """Write the report on the runs under `folders`; default: report.html in the first folder.

    `baseline` and `sort` replace those of `config.report`.
    """
    folders = [buckets.fetch(folder) for folder in folders]
    page_path = folders[0] / "report.html" if out is None else files.output_page(out)
    with files.explain_errors(f"the result files in {', '.join(map(str, folders))}"):
        _write_page(read.read_arms(folders, sort), folders, page_path, baseline)
    for path in (page_path, page_path.with_suffix(".json")):
        if path.is_file():
            buckets.publish(path)
    return page_path


def write_run_report(tables: RunTables, summary: dict[str, Any], is_live: bool = False) -> Path:
    """Write report.html into the workdir of one run whose result files are already parsed.

    `is_live`: the run goes on, so the page loads itself again every minute.
    """
    label = tables.workdir.resolve().name
    out = tables.workdir / "report.html"
    files.write_text(out, page.render_run_page(read.ReportRun(label, tables, summary), is_live))
    return out


def write_comparison(folder: Path, names: Sequence[str] = ()) -> Path:
    """Write the report on all runs of one config, which lists their sub-folders as `names`.

    The summaries and pages of finished runs are written again, with the metrics that compare them
    with other runs.
    """
    if any(names):
        files.write_json(folder / read.RUNS_FILE, names)
    arms = read.read_arms([folder])
    for run in [run for arm in arms for run in arm.runs if run.table.finished]:
        path = run.path / "summary.json"
        if not path.is_file() or files.read_json(path).get("metrics") != run.summary["metrics"]:
            files.write_json(path, run.summary)
            write_run_report(run.tables, run.summary)
    return _write_page(arms, [folder], folder / "report.html")


def _write_page(
    arms: Sequence[Arm], folders: Sequence[Path | str], out: Path, baseline: str = ""
) -> Path:
    if len(arms) == 1 and len(arms[0].runs) == 1:
        differences.choose_baseline(arms, baseline)  # refuses an unknown one
        files.write_text(out, page.render_run_page(arms[0].runs[0]))
        return out
    title = Path(folders[0]).resolve().name
    if len(folders) > 1:
        title = " · ".join(arm.label for arm in arms)
    verdicts = expect.judge_expectations(arms)
    reference = differences.choose_baseline(arms, baseline)
    metrics = dict.fromkeys(n for arm in arms for run in arm.runs for n in run.summary["metrics"])
    compared = differences.compare_with_baseline(arms, reference, metrics)
    comparison = page.render_comparison_page(
        arms, title, verdicts, reference, compared, read.missing_runs(folders)
    )
    files.write_text(out, comparison)
    numbers = {
        "unit": "fraction of 1",
        "arms": arm_spreads(arms),
        "baseline": reference and reference.label,
        "differences": {
            label: {name: difference.to_dict() for name, difference in found.items()}
            for label, found in compared.items()
        },
        "expected": [verdict.to_dict() for verdict in verdicts],
    }
    files.write_json(out.with_suffix(".json"), numbers)
    return out


def arm_spreads(arms: Sequence[Arm]) -> dict[str, dict[str, Any]]:
    """Return mean, deviation and count over seeds of every metric, by arm."""
    spreads: dict[str, dict[str, Any]] = {}
    for arm in arms:
        names = dict.fromkeys(name for run in arm.runs for name in run.summary["metrics"])
        spreads[arm.label] = {name: spread for name in names if (spread := arm.spread(name))}
    return spreads
