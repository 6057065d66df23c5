"""What an analysis found: sentences, tables and charts, for the console and as a page with its numbers beside it."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from cptjax.common import console, files
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
    chart: Markup | None  # None = there is nothing to draw


@dataclasses.dataclass(frozen=True)
class Finding:
    title: str
    sentences: Sequence[str]
    tables: Sequence[FindingTable]
    charts: Sequence[FindingChart]
    numbers: dict[str, Any]


def print_finding(found: Finding) -> None:
    """On the console."""
    for table in found.tables:
        console.print_table(table.title, table.header, table.rows)
    for sentence in found.sentences:
        console.print_message(sentence)


def write_finding(found: Finding, out: Path) -> Path:
    """As a self-contained page, its numbers as JSON beside it."""
    files.write_text(
        out,
        page.jinja_environment()
        .get_template("finding.html.jinja")
        .render(title=found.title, finding=found),
    )
    files.write_json(out.with_suffix(".json"), files.to_jsonable(found.numbers))
    return out
