"""One self-contained HTML page about a run, or about several runs side by side."""

from collections.abc import Sequence
from pathlib import Path

from cptjax import metrics
from cptjax.report import page, read


def write(folders: Sequence[Path | str], out: Path | str | None = None) -> Path:
    """Writes the report on the runs under `folders`; without `out`, as report.html into the first of them."""
    arms = read.arms(folders)
    out = Path(out) if out else Path(folders[0]) / "report.html"
    if len(arms) == 1 and len(arms[0].runs) == 1:
        text = page.run_page(arms[0].runs[0])
    else:
        text = page.compare_page(arms, Path(folders[0]).resolve().name if len(folders) == 1 else " · ".join(a.label for a in arms))
    metrics.write_text(out, text)
    return out
