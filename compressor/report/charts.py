"""Small SVG charts for the report: no script, no network, colours from the page's style sheet, every text escaped.

Charts are drawn on a 520 x 300 canvas that scales with the page. Series colours are the classes ``s0`` to ``s5``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["PERCENT", "Axis", "Curve", "Point", "curves", "scatter", "timeline"]

WIDTH, HEIGHT = 520, 300
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 14, 46
SERIES = 6
Range = tuple[float, float]
EVERYTHING: Range = (-math.inf, math.inf)
POSITIVE: Range = (0.0, math.inf)
PERCENT: Range = (0.0, 100.0)


@dataclass(frozen=True)
class Point:
    """One mark of a scatter plot; `spread` is a horizontal range drawn through it."""

    x: float
    y: float
    label: str
    series: int
    filled: bool = True
    spread: tuple[float, float] | None = None


@dataclass(frozen=True)
class Curve:
    """A polyline."""

    xs: Sequence[float]
    ys: Sequence[float]
    label: str
    series: int
    dashed: bool = False


@dataclass(frozen=True)
class Axis:
    """Linear scale from data to pixels with round ticks."""

    low: float
    high: float
    start: float  # pixel of `low`
    end: float  # pixel of `high`
    label: str
    whole: bool = False  # whether only whole numbers have a tick

    @classmethod
    def around(
        cls, values: Sequence[float], pixels: tuple[float, float], label: str, within: Range = EVERYTHING
    ) -> Axis:
        """The axis that holds `values` with a little room on both sides, but none outside `within`.

        >>> axis = Axis.around([99.0, 100.0], (0, 100), "agreement, %", within=(0.0, 100.0))
        >>> axis.low, axis.high
        (98.94, 100.0)
        """
        low, high = min(values), max(values)
        room = 0.06 * (high - low) if high > low else 0.05 * abs(high) + 1e-9
        return cls(max(low - room, min(low, within[0])), min(high + room, max(high, within[1])), *pixels, label)

    def __call__(self, value: float) -> float:
        """Pixel of `value`."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Three to seven round values inside the axis.

        >>> Axis(0.0, 10.0, 0, 100, "").ticks()
        [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]
        """
        raw = max((self.high - self.low) / 6, 1.0 if self.whole else 0.0)
        magnitude = 10.0 ** math.floor(math.log10(raw))
        step = next(
            m * magnitude for m in ((1, 2, 5, 10) if self.whole else (1, 2, 2.5, 5, 10)) if m * magnitude >= raw * 0.999
        )
        first = math.ceil(self.low / step - 1e-9)
        return [round(k * step, 12) for k in range(first, math.floor(self.high / step + 1e-9) + 1)]


def scatter(points: Sequence[Point], x_label: str, y_label: str, within: Range = EVERYTHING) -> str:
    """An SVG scatter plot; hollow marks are those not `filled`, labels stand beside their marks.

    Args:
        points: to be marked; `x` is positive.
        x_label: with its unit.
        y_label: with its unit.
        within: values that y can have; the axis goes no further.
    """
    reach = [value for p in points for value in (p.spread or (p.x,))] + [p.x for p in points]
    x = Axis.around(reach, (LEFT, WIDTH - RIGHT), x_label, POSITIVE)
    y = Axis.around([p.y for p in points], (HEIGHT - BOTTOM, TOP), y_label, within)
    marks, boxes = [], [_box(x(p.x), y(p.y) + 4, "middle", 2) for p in points]
    for p in sorted(points, key=lambda p: (p.y, p.x), reverse=True):
        px, py, color = x(p.x), y(p.y), f"s{p.series % SERIES}"
        if p.spread is not None:
            low, high = (f"{x(value):.1f}" for value in p.spread)
            marks.append(f'<line class="{color} spread" x1="{low}" x2="{high}" y1="{py:.1f}" y2="{py:.1f}"/>')
        marks.append(_dot(px, py, p))
        tx, ty, anchor = _free(px, py, len(p.label), boxes)
        boxes.append(_box(tx, ty, anchor, len(p.label)))
        marks.append(f'<text class="mark" x="{tx:.1f}" y="{ty:.1f}" text-anchor="{anchor}">{escape(p.label)}</text>')
    return _svg(x, y, marks, f"{y_label} over {x_label}")


Mark = tuple[float, str]
Box = tuple[float, float, float, float]  # left, top, right, bottom
# Where a label may stand relative to its mark, best first: beside it, above and below it, then further below.
PLACES = (
    *((10, 4, "start"), (-10, 4, "end"), (0, -11, "middle"), (0, 20, "middle")),
    *((dx, dy, anchor) for dy in (20, 35, 50, 65, 80) for dx, anchor in ((10, "start"), (-10, "end"))),
)


def _box(x: float, y: float, anchor: str, characters: int) -> Box:
    """Room that a text of so many characters takes when its baseline is at (x, y); 6.4 wide and 13 high a character."""
    wide = 6.4 * characters
    left = x - {"start": 0.0, "middle": wide / 2, "end": wide}[anchor]
    return left, y - 11, left + wide, y + 3


def _free(px: float, py: float, characters: int, boxes: Sequence[Box]) -> tuple[float, float, str]:
    """The first place for a label that is inside the canvas and overlaps nothing; the first one of all when none is."""
    for dx, dy, anchor in PLACES:
        left, top, right, bottom = _box(px + dx, py + dy, anchor, characters)
        inside = left >= LEFT and right <= WIDTH and top >= 0 and bottom <= HEIGHT - BOTTOM
        if inside and not any(left < r and right > le and top < b and bottom > t for le, t, r, b in boxes):
            return px + dx, py + dy, anchor
    return px + PLACES[0][0], py + PLACES[0][1], PLACES[0][2]


def curves(lines: Sequence[Curve], x_label: str, y_label: str) -> str:
    """An SVG plot of polylines on common axes."""
    x = Axis.around([v for line in lines for v in line.xs], (LEFT, WIDTH - RIGHT), x_label, POSITIVE)
    y = Axis(0.0, 1.0, HEIGHT - BOTTOM, TOP, y_label)
    return _svg(x, y, [_polyline(x, y, line) for line in lines], f"{y_label} over {x_label}")


def timeline(points: Sequence[Point], lines: Sequence[Curve], changes: Sequence[Mark], y_label: str) -> str:
    """An SVG plot of values run by run: lines, marks on them, and a vertical line where the level changed.

    Args:
        points: marks without labels; their labels are shown when they are pointed at.
        lines: levels and other curves on the same axes.
        changes: where, and what is written there.
        y_label: with its unit.
    """
    runs = [p.x for p in points]
    x = Axis(min(runs) - 0.6, max(runs) + 0.6, LEFT, WIDTH - RIGHT, "run", whole=True)
    heights = [p.y for p in points] + [v for line in lines for v in line.ys]
    heights += [0.97 * min(heights), 1.03 * max(heights)]  # noise of a thousandth must not fill the chart
    y = Axis.around(heights, (HEIGHT - BOTTOM, TOP + 16), y_label, POSITIVE)
    marks = []
    for at, text in changes:
        px, left = x(at), x(at) > (LEFT + WIDTH - RIGHT) / 2
        tx, anchor = (px - 5, "end") if left else (px + 5, "start")
        marks.append(f'<line class="change" x1="{px:.1f}" x2="{px:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        marks.append(f'<text class="mark" x="{tx:.1f}" y="{TOP + 8}" text-anchor="{anchor}">{escape(text)}</text>')
    marks += [_polyline(x, y, line) for line in lines]
    marks += [_dot(x(p.x), y(p.y), p, radius=3.5) for p in points]
    return _svg(x, y, marks, f"{y_label} run by run")


def _polyline(x: Axis, y: Axis, line: Curve) -> str:
    path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in zip(line.xs, line.ys, strict=True))
    style = f"s{line.series % SERIES} curve" + (" dashed" if line.dashed else "")
    return f'<polyline class="{style}" points="{path}"><title>{escape(line.label)}</title></polyline>'


def _dot(px: float, py: float, p: Point, radius: float = 5.5) -> str:
    look, title = f"s{p.series % SERIES} {'dot' if p.filled else 'ring'}", escape(f"{p.label}: {p.x:.4g}, {p.y:.4g}")
    return f'<circle class="{look}" cx="{px:.1f}" cy="{py:.1f}" r="{radius}"><title>{title}</title></circle>'


def _svg(x: Axis, y: Axis, marks: Sequence[str], title: str) -> str:
    floor, left = y(y.low), x(x.low)
    grid = [
        f'<line class="grid" x1="{left:.1f}" x2="{x(x.high):.1f}" y1="{y(v):.1f}" y2="{y(v):.1f}"/>' for v in y.ticks()
    ]
    grid += [
        f'<text class="tick" x="{left - 8:.1f}" y="{y(v) + 4:.1f}" text-anchor="end">{v:g}</text>' for v in y.ticks()
    ]
    grid += [
        f'<text class="tick" x="{x(v):.1f}" y="{floor + 18:.1f}" text-anchor="middle">{v:g}</text>' for v in x.ticks()
    ]
    grid += [
        f'<line class="grid" x1="{x(v):.1f}" x2="{x(v):.1f}" y1="{floor:.1f}" y2="{floor + 4:.1f}"/>' for v in x.ticks()
    ]
    middle = (y.start + y.end) / 2
    labels = [
        f'<text class="axis" x="{(x.start + x.end) / 2:.1f}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x.label)}</text>',
        f'<text class="axis" transform="translate(13 {middle:.1f}) rotate(-90)" text-anchor="middle">{escape(y.label)}</text>',
    ]
    body = "".join([*grid, *labels, *marks])
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title, quote=True)}">{body}</svg>'
