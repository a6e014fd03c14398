"""Small SVG charts for the report: no script, no network, colours from the page's style sheet, every text escaped.

Charts are drawn on a 520 x 300 canvas that scales with the page. Series colours are the classes ``s0`` to ``s5``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["Axis", "Curve", "Point", "curves", "scatter"]

WIDTH, HEIGHT = 520, 300
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 14, 46
SERIES = 6


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

    @classmethod
    def around(cls, values: Sequence[float], pixels: tuple[float, float], label: str) -> Axis:
        """The axis that holds `values` with a little room on both sides."""
        low, high = min(values), max(values)
        room = 0.06 * (high - low) if high > low else 0.05 * abs(high) + 1e-9
        return cls(low - room, high + room, *pixels, label)

    def __call__(self, value: float) -> float:
        """Pixel of `value`."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Three to seven round values inside the axis.

        >>> Axis(0.0, 10.0, 0, 100, "").ticks()
        [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]
        """
        raw = (self.high - self.low) / 6
        magnitude = 10.0 ** math.floor(math.log10(raw))
        step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= raw * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        return [round(k * step, 12) for k in range(first, math.floor(self.high / step + 1e-9) + 1)]


def scatter(points: Sequence[Point], x_label: str, y_label: str) -> str:
    """An SVG scatter plot; hollow marks are those not `filled`, labels stand beside their marks."""
    reach = [value for p in points for value in (p.spread or (p.x,))] + [p.x for p in points]
    x = Axis.around(reach, (LEFT, WIDTH - RIGHT), x_label)
    y = Axis.around([p.y for p in points], (HEIGHT - BOTTOM, TOP), y_label)
    marks, boxes = [], [_box(x(p.x), y(p.y) + 4, "middle", 2) for p in points]
    for p in sorted(points, key=lambda p: (p.y, p.x), reverse=True):
        px, py, color = x(p.x), y(p.y), f"s{p.series % SERIES}"
        if p.spread is not None:
            low, high = (f"{x(value):.1f}" for value in p.spread)
            marks.append(f'<line class="{color} spread" x1="{low}" x2="{high}" y1="{py:.1f}" y2="{py:.1f}"/>')
        shape, title = "dot" if p.filled else "ring", escape(f"{p.label}: {p.x:.4g}, {p.y:.4g}")
        marks.append(
            f'<circle class="{color} {shape}" cx="{px:.1f}" cy="{py:.1f}" r="5.5"><title>{title}</title></circle>'
        )
        tx, ty, anchor = _free(px, py, len(p.label), boxes)
        boxes.append(_box(tx, ty, anchor, len(p.label)))
        marks.append(f'<text class="mark" x="{tx:.1f}" y="{ty:.1f}" text-anchor="{anchor}">{escape(p.label)}</text>')
    return _svg(x, y, marks, f"{y_label} over {x_label}")


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
    x = Axis.around([v for line in lines for v in line.xs], (LEFT, WIDTH - RIGHT), x_label)
    y = Axis(0.0, 1.0, HEIGHT - BOTTOM, TOP, y_label)
    marks = []
    for line in lines:
        path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in zip(line.xs, line.ys, strict=True))
        style = f"s{line.series % SERIES} curve" + (" dashed" if line.dashed else "")
        marks.append(f'<polyline class="{style}" points="{path}"><title>{escape(line.label)}</title></polyline>')
    return _svg(x, y, marks, f"{y_label} over {x_label}")


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
