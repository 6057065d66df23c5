"""Plot line charts and dumbbell charts as inline SVG."""

import dataclasses
import itertools
import math
from collections.abc import Sequence

from markupsafe import Markup, escape

# Colours are classes of the page's style sheet, so that charts have its light and dark scheme.
WIDTH, HEIGHT = 400, 270  # of a large chart; text is 11 units high, readable on a phone
SMALL_CHART = (290, 170)  # width, height
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 12, 40  # margins
DUMBBELL_HEIGHT = 34  # of one row
LABEL_CHARS = 24  # longer labels of a dumbbell row are cut; the tooltip has the whole label
CHAR_WIDTH = 6.6  # of a label
SMALLEST_SPAN = 1e-9  # of an axis, as a share of its values
TICK_DIGITS = 4  # significant digits of a tick label; more where ticks are close together


@dataclasses.dataclass(frozen=True)
class Point:
    x: float
    y: float
    tip: str = ""
    error: float | None = None  # half the length of the error bar
    ring: bool = False  # hollow and larger


@dataclasses.dataclass(frozen=True)
class Series:
    label: str
    points: Sequence[Point]
    color: int = 0
    line: bool = True
    dots: bool = True
    faint: bool = False
    named: bool = False  # the label is written next to the last point


def axis_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return round numbers that span the range from `low` to `high`."""
    span = high - low
    # A range of a few rounding errors has no round numbers in it, and is one value.
    if span <= SMALLEST_SPAN * max(abs(low), abs(high)):
        span = abs(high) or 1.0
    rough = span / count
    exponent = math.floor(math.log10(rough))
    power = 10**exponent
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [round(i * step, max(12, 3 - exponent)) for i in range(first, max(last, first + 1) + 1)]


def format_tick(value: float, digits: int = TICK_DIGITS) -> str:
    """Format a number with at most this many significant digits."""
    text = f"{value:.{digits}g}"
    if abs(value) >= 10000 or (value and abs(value) < 0.001):
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        text = min(f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}", text, key=len)
    return text.replace("-", "−")


def label_ticks(ticks: Sequence[float]) -> list[tuple[float, str]]:
    """Return ticks with their labels, whose digits suffice for their distances."""
    step = min(b - a for a, b in itertools.pairwise(ticks))
    digits = TICK_DIGITS
    while any(abs(float(f"{v:.{digits}g}") - v) > step / 100 for v in ticks):
        digits += 1
    return [(v, format_tick(v, digits)) for v in ticks]


def widen_range(values: Sequence[float], span: float, most: float = math.inf) -> list[float]:
    """Return the range of values, widened to at least `span` so that noise does not fill an axis.

    The range does not exceed `most` if the values do not.
    """
    low, high = min(values), max(values)
    spare = max(0.0, span - (high - low)) / 2
    over = max(0.0, min(high + spare - most, spare))
    return [low - spare - over, high + spare - over]


class ChartFrame:
    """The scales and axes of a plot."""

    def __init__(
        self,
        xs: Sequence[float],
        ys: Sequence[float],
        x_ticks: Sequence[tuple[float, str]] | None,
        size: tuple[int, int],
    ):
        self.width, self.height = size
        self.y_ticks = axis_ticks(min(ys), max(ys), 5 if self.height > 200 else 4)
        if not x_ticks:
            ticks = axis_ticks(min(xs), max(xs), 4)
            inner = [v for v in ticks if min(xs) <= v <= max(xs)]
            x_ticks = label_ticks(inner if len(inner) > 2 else ticks)
        self.x_ticks = list(x_ticks)
        values = [v for v, _ in self.x_ticks] + list(xs)
        self.x0, self.x1 = min(values), max(values)
        if self.x1 == self.x0:
            self.x1 = self.x0 + 1

    def x(self, value: float) -> float:
        return LEFT + (value - self.x0) / (self.x1 - self.x0) * (self.width - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high = self.y_ticks[0], self.y_ticks[-1]
        return TOP + (high - value) / (high - low) * (self.height - TOP - BOTTOM)

    def axes(self, x_label: str, y_label: str) -> list[str]:
        bottom, right = self.height - BOTTOM, self.width - RIGHT
        elements = []
        for v, name in label_ticks(self.y_ticks):
            style = "grid zero" if v == 0 else "grid"
            elements.append(svg_line(style, LEFT, self.y(v), right, self.y(v)))
            elements.append(svg_text("tick", LEFT - 6, self.y(v) + 3.5, name, "end"))
        for v, name in self.x_ticks:
            elements.append(svg_text("tick", self.x(v), bottom + 15, name))
        elements.append(svg_text("axis", (LEFT + right) / 2, self.height - 6, x_label))
        elements.append(svg_text("axis", 11, (TOP + bottom) / 2, y_label, turn=True))
        return elements


def svg_line(style: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{style}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def svg_text(
    style: str, x: float, y: float, text: str, anchor: str = "middle", turn: bool = False
) -> str:
    rotate = f' transform="rotate(-90 {x:.1f} {y:.1f})"' if turn else ""
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{rotate}'
    return f'<text class="{style}" {place}>{escape(text)}</text>'


def svg_circle(style: str, x: float, y: float, r: float, tip: str = "") -> str:
    inner = f"<title>{escape(tip)}</title>" if tip else ""
    return f'<circle class="{style}" cx="{x:.1f}" cy="{y:.1f}" r="{r}">{inner}</circle>'


def svg_figure(body: Sequence[str], title: str, width: int, height: int) -> Markup:
    head = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">'
    return Markup(f"{head}{''.join(body)}</svg>")


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
    """Plot lines and dots; return None if there is no point.

    `borders` are the places of dashed vertical lines, `include` y values that the axis must reach,
    `span` the smallest ranges of the two axes, and `most` the largest useful x.
    """
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
    elements = frame.axes(x_label, y_label)
    bottom = frame.height - BOTTOM
    elements += [svg_line("border", frame.x(b), TOP, frame.x(b), bottom) for b in borders]
    for s in series:
        elements += series_elements(frame, s)
    return svg_figure(elements + series_labels(frame, series), title, *size)


def series_elements(frame: ChartFrame, series: Series) -> list[str]:
    points = [p for p in series.points if math.isfinite(p.x) and math.isfinite(p.y)]
    style = f"c{series.color % 8}{' faint' * series.faint}"
    elements = []
    if series.line and len(points) > 1:
        path = " ".join(f"{frame.x(p.x):.1f},{frame.y(p.y):.1f}" for p in points)
        elements.append(f'<polyline class="line {style}" points="{path}"/>')
    for p in points:
        x, y = frame.x(p.x), frame.y(p.y)
        if p.error:
            low, high = frame.y(p.y - p.error), frame.y(p.y + p.error)
            elements.append(svg_line(f"error {style}", x, low, x, high))
        if series.dots and p.ring:
            elements.append(svg_circle(f"ring {style}", x, y, 5, p.tip))
        elif series.dots:
            elements.append(svg_circle(f"dot {style}", x, y, 3.5, p.tip))
    return elements


def series_labels(frame: ChartFrame, series: Sequence[Series]) -> list[str]:
    """Place labels next to the last points of their series, moved down where two would overlap."""
    labelled = [
        (frame.x(s.points[-1].x), frame.y(s.points[-1].y), s)
        for s in series
        if s.named and s.points
    ]
    occupied = [(x - 5, x + 5, y) for x, y, _ in labelled]  # left, right, y
    elements = []
    for x, y, s in sorted(labelled, key=lambda label: label[1]):
        width = 6.2 * len(s.label) + 10
        left = x + 9 if x + 9 + width < frame.width else max(2, x - 9 - width + 10)
        while any(abs(y - oy) < 13 and left < r and left + width > l for l, r, oy in occupied):
            y += 4
        occupied.append((left, left + width, y))
        elements.append(svg_text(f"name t{s.color % 8}", left, y + 4, s.label, "start"))
    return elements


@dataclasses.dataclass(frozen=True)
class DumbbellPair:
    """One row of a dumbbell chart: a ring for the value before, a dot for the value after."""

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
    """Plot a line from ring to dot for each pair; tooltips call them `ring` and `dot`."""
    pairs = [p for p in pairs if math.isfinite(p.ring) and math.isfinite(p.dot)]
    if not pairs:
        return None
    height, right = DUMBBELL_HEIGHT * len(pairs) + BOTTOM + TOP, WIDTH - 22
    left = 20 + CHAR_WIDTH * min(LABEL_CHARS, max(len(p.label) for p in pairs))
    bottom = height - BOTTOM
    values = [*include, *(v for p in pairs for v in (p.ring, p.dot))]
    ticks = axis_ticks(min(values), max(values), 5 if left < 120 else 4)

    def x(value: float) -> float:
        return left + (value - ticks[0]) / (ticks[-1] - ticks[0]) * (right - left)

    elements = []
    for v, name in label_ticks(ticks):
        elements.append(svg_line("grid zero" if v == 0 else "grid", x(v), TOP, x(v), bottom))
        elements.append(svg_text("tick", x(v), bottom + 15, name))
    elements.append(svg_text("axis", (left + right) / 2, height - 6, x_label))
    for i, p in enumerate(pairs):
        y, color = TOP + DUMBBELL_HEIGHT * (i + 0.5), f"c{p.color % 8}"
        label = p.label if len(p.label) <= LABEL_CHARS else p.label[: LABEL_CHARS - 1] + "…"
        elements += [
            svg_text("name", left - 12, y + 4, label, "end"),
            svg_line(f"stem {color}", x(p.ring), y, x(p.dot), y),
            svg_circle(f"ring {color}", x(p.ring), y, 5.5, f"{p.label}, {ring}: {_tip(p.ring)}"),
            svg_circle(f"dot {color}", x(p.dot), y, 5.5, f"{p.label}, {dot}: {_tip(p.dot)}"),
        ]
    return svg_figure(elements, title, WIDTH, height)


def _tip(value: float) -> str:
    return format_tick(round(value, 1))
