"""The result of an analysis: sentences, tables and charts for the console and a page."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from cptjax.common import buckets, console, files
from cptjax.evaluation.report import page


@dataclasses.dataclass(frozen=True)
class FindingTable:
    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclasses.dataclass(frozen=True)
class FindingChart:
    title: str
    note: str
    chart: Markup | None  # None without points


@dataclasses.dataclass(frozen=True)
class Finding:
    title: str
    sentences: Sequence[str]
    tables: Sequence[FindingTable]
    charts: Sequence[FindingChart]
    numbers: dict[str, Any]


def print_finding(finding: Finding) -> None:
    """Print tables and sentences to the console."""
    for table in finding.tables:
        console.print_table(table.title, table.header, table.rows)
    for sentence in finding.sentences:
        console.print_message(sentence)


def write_finding(finding: Finding, out: Path) -> Path:
    """Write a self-contained page, and the numbers as JSON next to it; return the page."""
    template = page.jinja_environment().get_template("finding.html.jinja")
    files.write_text(out, template.render(title=finding.title, finding=finding))
    files.write_json(out.with_suffix(".json"), finding.numbers)
    for path in (out, out.with_suffix(".json")):
        buckets.publish(path)
    return out
