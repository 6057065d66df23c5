"""Draw the README's figure of the study on a real model: what each method learns and loses."""

from collections.abc import Mapping, Sequence
from typing import Any

from cptjax.evaluation.report import svg

# (part of an arm's numbers, title of its panel)
PANELS = (
    ("learned", "new tasks"),
    ("earlier", "earlier tasks"),
    ("general", "facts and instructions"),
    ("prose", "likelihood of prose"),
)
LABELS, PANEL, GAP, ROW, TOP, BOTTOM = 300, 150, 36, 24, 34, 40  # widths and heights
STYLE = (
    "<style>text{font:12px system-ui,sans-serif;fill:#222}.tick,.axis{font-size:11px;fill:#666}"
    ".head{font-weight:600}.grid{stroke:#e4e4e4}.zero{stroke:#888}"
    ".stem{stroke:#3367b0;stroke-width:2}.dot{fill:#3367b0}</style>"
)


def draw_panel(left: float, title: str, changes: Sequence[Sequence[float] | None]) -> list[str]:
    """Draw one dot with its 95 % interval per row; the axis has a line at 0."""
    ends = [100 * end for c in changes if c for end in (c[0] - c[1], c[0] + c[1])]
    ticks = svg.axis_ticks(min([0.0, *ends]), max([0.0, *ends]), 3)
    bottom = TOP + ROW * len(changes)

    def x(value: float) -> float:
        return left + (value - ticks[0]) / (ticks[-1] - ticks[0]) * PANEL

    elements = [svg.svg_text("head", left + PANEL / 2, 18, title)]
    for tick in ticks:
        elements += [
            svg.svg_line("grid zero" if tick == 0 else "grid", x(tick), TOP, x(tick), bottom),
            svg.svg_text("tick", x(tick), bottom + 15, svg.format_tick(tick)),
        ]
    for i, change in enumerate(changes):
        if change:
            (mean, half), y = (100 * value for value in change), TOP + ROW * (i + 0.5)
            elements += [
                svg.svg_line("stem", x(mean - half), y, x(mean + half), y),
                svg.svg_circle("dot", x(mean), y, 4),
            ]
    return elements


def draw_figure(arms: Mapping[str, Mapping[str, Any]], titles: Mapping[str, str]) -> str:
    """Return an SVG picture with one row per arm, in the order of `titles`."""
    names = [name for name in titles if name in arms]
    width = LABELS + len(PANELS) * (PANEL + GAP)
    height = TOP + ROW * len(names) + BOTTOM
    elements = [STYLE, f'<rect width="{width}" height="{height}" fill="#fff"/>']
    for i, name in enumerate(names):
        y = TOP + ROW * (i + 0.5) + 4
        elements.append(svg.svg_text("name", LABELS - 16, y, titles[name], "end"))
    for i, (part, title) in enumerate(PANELS):
        changes = [arms[name].get(part) for name in names]
        elements += draw_panel(LABELS + i * (PANEL + GAP), title, changes)
    middle = LABELS + len(PANELS) * (PANEL + GAP) / 2
    elements.append(svg.svg_text("axis", middle, height - 6, "change in points"))
    picture = svg.svg_figure(elements, "What each method learns and loses", width, height)
    return str(picture).replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1) + "\n"
