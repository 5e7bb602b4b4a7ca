"""Numbers and tables as text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def aligned(rows: list[tuple[str, ...]]) -> str:
    """Rows of text as columns of equal width."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def percent(fraction: float | None) -> str:
    """A fraction as percent with one decimal, a dash if undefined."""
    return "–" if fraction is None or math.isnan(fraction) else f"{100 * fraction:.1f} %"


def show_rate(rate: Mapping[str, Any]) -> str:
    """``83.6 % [80.1, 86.6]`` of a rate entry."""
    low, high = rate["ci95"]
    return (
        "–" if rate["success"] is None else f"{percent(rate['success'])} [{100 * low:.1f}, {100 * high:.1f}]"
    )


def show_points(difference: Mapping[str, Any]) -> str:
    """``+37.5 points [+33.0, +41.8]`` of a difference entry; the interval is optional."""
    points, interval = difference["points"], difference.get("ci95")
    if points is None:
        return "–"
    return f"{points:+.1f} points" + (f" [{interval[0]:+.1f}, {interval[1]:+.1f}]" if interval else "")


def show_number(value: Any) -> str:
    """Counts with thousands separators, other numbers with one decimal, text as it is."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return "–" if value is None else str(value)
    return f"{value:,.0f}" if float(value).is_integer() or abs(value) >= 1000 else f"{value:.1f}"
