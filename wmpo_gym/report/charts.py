"""Charts as inline SVG: curves with bands, and points with intervals.

The SVG is generated directly, without a plotting library, so that colours come from the page's style sheet
(light and dark mode), charts scale to any width, and no dependency is needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 640, 300
LEFT, RIGHT, TOP, BOTTOM = 62, 26, 12, 52


@dataclass(frozen=True)
class Series:
    """One curve.

    Attributes:
        name: Legend text.
        x: Positions.
        y: Fractions in [0, 1]; NaN or None leaves a point out.
        low: Lower interval ends, or None.
        high: Upper interval ends, or None.
        dashed: Draw a dashed line, used for imagined rather than simulated results.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    low: Sequence[float | None] | None = None
    high: Sequence[float | None] | None = None
    dashed: bool = False

    def points(self) -> list[tuple[float, float, float, float]]:
        """Points with a finite y, as (x, y, low, high)."""
        rows = zip(self.x, self.y, self.low or self.y, self.high or self.y, strict=True)
        return [
            (x, y, y if a is None else a, y if b is None else b)
            for x, y, a, b in rows
            if y is not None and math.isfinite(y)
        ]


def line_chart(series: Sequence[Series], *, x_label: str, y_label: str, title: str) -> str:
    """Curves of success (percent axis from 0 to 100) as an ``<svg>`` with a legend below.

    Args:
        series: The curves; those without a finite point are omitted.
        x_label: Text below the x axis.
        y_label: Text above the y axis.
        title: Description for screen readers.

    Returns:
        HTML text, or a note if there is nothing to draw.
    """
    drawn = [s for s in series if s.points()]
    if not drawn:
        return '<p class="note">Nothing was recorded for this chart.</p>'
    xs = [p[0] for s in drawn for p in s.points()]
    lo, hi = min(xs), max(xs)
    span = (hi - lo) or 1.0

    def at(x: float, y: float) -> tuple[float, float]:
        return _x((x - lo) / span), _y(y)

    body = [_grid_percent()]
    for x in _ticks(lo, hi):
        body.append(
            f'<text class="tick" x="{at(x, 0)[0]:.1f}" y="{HEIGHT - 30}" text-anchor="middle">{x:g}</text>'
        )
    for i, s in enumerate(drawn):
        body.append(_curve(s, i, at))
    body.append(
        f'<text class="axis" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">'
        f"{escape(x_label)}</text>"
    )
    svg = _svg("".join(body), HEIGHT, title)
    return f'<p class="axis-title">{escape(y_label)}</p>{svg}{_legend(drawn)}'


def interval_chart(rows: Sequence[tuple[str, float, float, float, int]], *, title: str) -> str:
    """Rates as points with their intervals, one row each, on a percent axis.

    Args:
        rows: (label, rate, low, high, colour 0 to 3), rates as fractions; undefined rates are omitted.
        title: Description for screen readers.
    """
    rows = [r for r in rows if r[1] is not None and math.isfinite(r[1])]
    if not rows:
        return '<p class="note">Nothing was recorded for this chart.</p>'
    left, pitch = 24, 50
    height = pitch * len(rows) + 40

    def at(y: float) -> float:
        return left + y * (WIDTH - RIGHT - left)

    body = []
    for k in range(0, 101, 20):
        x = at(k / 100)
        body.append(f'<line class="grid" x1="{x:.1f}" y1="6" x2="{x:.1f}" y2="{height - 26}"/>')
        body.append(f'<text class="tick" x="{x:.1f}" y="{height - 8}" text-anchor="middle">{k} %</text>')
    for i, (label, rate, low, high, colour) in enumerate(rows):
        y = pitch * i + 36
        tip = f"{label}: {100 * rate:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"
        body.append(
            f'<g class="s{colour}"><title>{escape(tip)}</title>'
            f'<text class="label" x="{left + 6}" y="{y - 14}">{escape(label)}</text>'
            f'<line class="whisker" x1="{at(low):.1f}" y1="{y}" x2="{at(high):.1f}" y2="{y}"/>'
            f'<circle class="dot" cx="{at(rate):.1f}" cy="{y}" r="6"/></g>'
        )
    return _svg("".join(body), height, title)


def _curve(series: Series, index: int, at: Callable[[float, float], tuple[float, float]]) -> str:
    points = series.points()
    upper = [at(x, high) for x, _, _, high in points]
    lower = [at(x, low) for x, _, low, _ in points]
    outline = " ".join(f"{x:.1f},{y:.1f}" for x, y in [*upper, *reversed(lower)])
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(x, y) for x, y, _, _ in points))
    band = f'<polygon class="band" points="{outline}"/>' if series.low else ""
    dots = "".join(
        f'<circle class="dot" cx="{at(x, y)[0]:.1f}" cy="{at(x, y)[1]:.1f}" r="3.5">'
        f"<title>{escape(series.name)} at {x:g}: {100 * y:.1f} %</title></circle>"
        for x, y, _, _ in points
    )
    dashed = " dashed" if series.dashed else ""
    return f'<g class="s{index % 4}">{band}<polyline class="line{dashed}" points="{line}"/>{dots}</g>'


def _grid_percent() -> str:
    parts = []
    for k in range(0, 101, 20):
        y = _y(k / 100)
        parts.append(f'<line class="grid" x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{k} %</text>')
    return "".join(parts)


def _legend(series: Sequence[Series]) -> str:
    items = "".join(
        f'<li class="s{i % 4}"><span class="key{" dashed" if s.dashed else ""}"></span>{escape(s.name)}</li>'
        for i, s in enumerate(series)
    )
    return f'<ul class="legend">{items}</ul>'


def _svg(body: str, height: float, title: str) -> str:
    box = f"0 0 {WIDTH} {height:g}"
    return f'<svg class="chart" viewBox="{box}" role="img" aria-label="{escape(title)}">{body}</svg>'


def _ticks(low: float, high: float, wanted: int = 8) -> list[float]:
    """Round positions that cover [low, high] with about ``wanted`` steps."""
    if high <= low:
        return [low]
    raw = (high - low) / wanted
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(m * magnitude for m in (1, 2, 5, 10) if m * magnitude >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [round((first + i) * step, 10) for i in range(int((high - first * step) / step + 1e-9) + 1)]


def _x(share: float) -> float:
    return LEFT + share * (WIDTH - LEFT - RIGHT)


def _y(fraction: float) -> float:
    return TOP + (1 - fraction) * (HEIGHT - TOP - BOTTOM)
