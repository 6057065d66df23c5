"""What an analysis found: sentences, tables and charts, for the console and as a page with its numbers beside it."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from cptjax import console, metrics
from cptjax.report import page


@dataclasses.dataclass(frozen=True)
class Table:
    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclasses.dataclass(frozen=True)
class Picture:
    title: str
    note: str
    chart: Markup | None  # None = there is nothing to draw


@dataclasses.dataclass(frozen=True)
class Finding:
    title: str
    said: Sequence[str]
    tables: Sequence[Table]
    pictures: Sequence[Picture]
    numbers: dict[str, Any]


def tell(found: Finding) -> None:
    """On the console."""
    for table in found.tables:
        console.table(table.title, table.header, table.rows)
    for sentence in found.said:
        console.say(sentence)


def write(found: Finding, out: Path) -> Path:
    """As a self-contained page, its numbers as JSON beside it."""
    metrics.write_text(out, page.environment().get_template("finding.html.jinja").render(title=found.title, found=found))
    metrics.write_json(out.with_suffix(".json"), metrics.plain(found.numbers))
    return out
