"""Charts as inline SVG: no script, no network, colours from the page's style, so dark and light come for free."""

import dataclasses
import math
from collections.abc import Sequence

from markupsafe import Markup, escape

WIDTH, HEIGHT = 400, 270  # of a large chart; text is 11 units high, so that a phone still shows it
SMALL_CHART = (290, 170)
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 12, 40
DUMBBELL_HEIGHT = 34  # height of a dumbbell row


@dataclasses.dataclass(frozen=True)
class Point:
    x: float
    y: float
    tip: str = ""
    error: float | None = None  # half the length of the error bar
    ring: bool = False  # drawn hollow and larger


@dataclasses.dataclass(frozen=True)
class Series:
    label: str
    points: Sequence[Point]
    color: int = 0
    line: bool = True
    dots: bool = True
    faint: bool = False
    named: bool = False  # the label is written beside the last point


def axis_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Returns round numbers from at most `low` to at least `high`."""
    span = (high - low) or abs(high) or 1.0
    rough = span / count
    exponent = math.floor(math.log10(rough))
    power = 10**exponent
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, max(12, 3 - exponent)) for i in range(first, max(last, first + 1) + 1)]


def format_tick(value: float) -> str:
    if abs(value) >= 10000 or (value and abs(value) < 0.001):
        return f"{value:.0e}".replace("e+0", "e").replace("e-0", "e-").replace("-", "−")
    return f"{value:.4g}".replace("-", "−")


def widen_range(values: Sequence[float], span: float, most: float = math.inf) -> list[float]:
    """Returns ends that lie at least `span` apart, so that noise does not fill an axis, and where possible not above `most`."""
    low, high = min(values), max(values)
    spare = max(0.0, span - (high - low)) / 2
    over = max(0.0, min(high + spare - most, spare))
    return [low - spare - over, high + spare - over]


class ChartFrame:
    """A plot's scales and axes."""

    def __init__(
        self,
        xs: Sequence[float],
        ys: Sequence[float],
        x_ticks: Sequence[tuple[float, str]] | None,
        size: tuple[int, int],
    ):
        self.width, self.height = size
        self.y_ticks = axis_ticks(min(ys), max(ys), 5 if self.height > 200 else 4)
        marks = axis_ticks(min(xs), max(xs), 4)
        inner = [v for v in marks if min(xs) <= v <= max(xs)]
        self.x_ticks = (
            list(x_ticks)
            if x_ticks
            else [(v, format_tick(v)) for v in (inner if len(inner) > 2 else marks)]
        )
        places = [v for v, _ in self.x_ticks] + list(xs)
        self.x0, self.x1 = (
            min(places),
            max(places) if max(places) > min(places) else min(places) + 1,
        )

    def x(self, value: float) -> float:
        return LEFT + (value - self.x0) / (self.x1 - self.x0) * (self.width - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high = self.y_ticks[0], self.y_ticks[-1]
        return TOP + (high - value) / (high - low) * (self.height - TOP - BOTTOM)

    def axes(self, x_label: str, y_label: str) -> list[str]:
        bottom, middle = self.height - BOTTOM, (TOP + self.height - BOTTOM) / 2
        out = [
            svg_line(
                "grid zero" if v == 0 else "grid", LEFT, self.y(v), self.width - RIGHT, self.y(v)
            )
            for v in self.y_ticks
        ]
        out += [
            svg_text("tick", LEFT - 6, self.y(v) + 3.5, format_tick(v), "end") for v in self.y_ticks
        ]
        out += [svg_text("tick", self.x(v), bottom + 15, name) for v, name in self.x_ticks]
        out += [svg_text("axis", (LEFT + self.width - RIGHT) / 2, self.height - 6, x_label)]
        return out + [svg_text("axis", 11, middle, y_label, turn=True)]


def svg_line(style: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{style}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def svg_text(
    style: str, x: float, y: float, words: str, anchor: str = "middle", turn: bool = False
) -> str:
    rotate = f' transform="rotate(-90 {x:.1f} {y:.1f})"' if turn else ""
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{rotate}>{escape(words)}</text>'


def svg_circle(style: str, x: float, y: float, r: float, tip: str = "") -> str:
    inner = f"<title>{escape(tip)}</title>" if tip else ""
    return f'<circle class="{style}" cx="{x:.1f}" cy="{y:.1f}" r="{r}">{inner}</circle>'


def svg_figure(body: Sequence[str], title: str, width: int, height: int) -> Markup:
    return Markup(
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">{"".join(body)}</svg>'
    )


def line_chart(
    series: Sequence[Series],
    title: str,
    x_label: str = "",
    y_label: str = "",
    x_ticks: Sequence[tuple[float, str]] | None = None,
    borders: Sequence[float] = (),
    include: Sequence[float] = (),
    span: tuple[float, float] = (0, 0),
    most: float = math.inf,
    size: tuple[int, int] = (WIDTH, HEIGHT),
) -> Markup | None:
    """Draws lines and dots; `borders` are dashed vertical lines, `include` y values to reach, `span` the least width of each axis,
    `most` where x should end."""
    points = [p for s in series for p in s.points if math.isfinite(p.x) and math.isfinite(p.y)]
    if not points:
        return None
    reach = [p.y + sign * (p.error or 0) for p in points for sign in (-1, 1)]
    frame = ChartFrame(
        widen_range([p.x for p in points], span[0], most),
        widen_range([*reach, *include], span[1]),
        x_ticks,
        size,
    )
    out = frame.axes(x_label, y_label)
    out += [svg_line("border", frame.x(b), TOP, frame.x(b), frame.height - BOTTOM) for b in borders]
    for s in series:
        out += series_elements(frame, s)
    return svg_figure(out + series_labels(frame, series), title, *size)


def series_elements(frame: ChartFrame, s: Series) -> list[str]:
    points = [p for p in s.points if math.isfinite(p.x) and math.isfinite(p.y)]
    style = f"c{s.color % 8}{' faint' * s.faint}"
    path = " ".join(f"{frame.x(p.x):.1f},{frame.y(p.y):.1f}" for p in points)
    out = (
        [f'<polyline class="line {style}" points="{path}"/>'] if s.line and len(points) > 1 else []
    )
    for p in points:
        x, y = frame.x(p.x), frame.y(p.y)
        if p.error:
            out.append(
                svg_line(f"error {style}", x, frame.y(p.y - p.error), x, frame.y(p.y + p.error))
            )
        if s.dots:
            out.append(
                svg_circle(
                    f"{'ring' if p.ring else 'dot'} {style}", x, y, 5 if p.ring else 3.5, p.tip
                )
            )
    return out


def series_labels(frame: ChartFrame, series: Sequence[Series]) -> list[str]:
    """Writes labels beside points, moved down where two would meet."""
    wanted = [
        (frame.x(s.points[-1].x), frame.y(s.points[-1].y), s)
        for s in series
        if s.named and s.points
    ]
    taken = [(x - 5, x + 5, y) for x, y, _ in wanted]
    out = []
    for x, y, s in sorted(wanted, key=lambda w: w[1]):
        width = 6.2 * len(s.label) + 10
        left = x + 9 if x + 9 + width < frame.width else x - 9 - width + 10
        while any(abs(y - t) < 13 and left < r and left + width > l for l, r, t in taken):
            y += 4
        taken.append((left, left + width, y))
        out.append(svg_text(f"name t{s.color % 8}", left, y + 4, s.label, "start"))
    return out


@dataclasses.dataclass(frozen=True)
class DumbbellPair:
    """One row of a dumbbell chart: a ring where it was, a dot where it is."""

    label: str
    ring: float
    dot: float
    color: int = 0


def dumbbell_chart(
    pairs: Sequence[DumbbellPair],
    title: str,
    x_label: str,
    ring: str,
    dot: str,
    include: Sequence[float] = (),
) -> Markup | None:
    """Draws one line per pair from ring to dot; `ring` and `dot` name the two in the tooltips."""
    pairs = [p for p in pairs if math.isfinite(p.ring) and math.isfinite(p.dot)]
    if not pairs:
        return None
    height, left, right = (
        DUMBBELL_HEIGHT * len(pairs) + BOTTOM + TOP,
        min(150, 20 + 6.6 * max(len(p.label) for p in pairs)),
        WIDTH - 22,
    )
    values = [*include, *(v for p in pairs for v in (p.ring, p.dot))]
    marks, bottom = axis_ticks(min(values), max(values)), height - BOTTOM
    x = lambda v: left + (v - marks[0]) / (marks[-1] - marks[0]) * (right - left)
    out = [svg_line("grid zero" if v == 0 else "grid", x(v), TOP, x(v), bottom) for v in marks]
    out += [svg_text("tick", x(v), bottom + 15, format_tick(v)) for v in marks] + [
        svg_text("axis", (left + right) / 2, height - 6, x_label)
    ]
    for i, p in enumerate(pairs):
        y, color = TOP + DUMBBELL_HEIGHT * (i + 0.5), f"c{p.color % 8}"
        out += [
            svg_text("name", left - 12, y + 4, p.label, "end"),
            svg_line(f"stem {color}", x(p.ring), y, x(p.dot), y),
        ]
        out += [
            svg_circle(
                f"ring {color}",
                x(p.ring),
                y,
                5.5,
                f"{p.label}, {ring}: {format_tick(round(p.ring, 1))}",
            )
        ]
        out += [
            svg_circle(
                f"dot {color}",
                x(p.dot),
                y,
                5.5,
                f"{p.label}, {dot}: {format_tick(round(p.dot, 1))}",
            )
        ]
    return svg_figure(out, title, WIDTH, height)
