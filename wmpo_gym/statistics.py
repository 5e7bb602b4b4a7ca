"""Success rates with confidence intervals, paired comparisons, and accuracy of claimed successes.

All results are deterministic: intervals use score formulas, not resampling.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike


@dataclass(frozen=True)
class Rate:
    """A proportion with its sample size and confidence interval.

    Attributes:
        successes: Number of successes.
        n: Number of trials; 0 gives ``value`` NaN and the interval [0, 1].
        low: Lower end of the interval, a fraction.
        high: Upper end of the interval, a fraction.
    """

    successes: int
    n: int
    low: float
    high: float

    @property
    def value(self) -> float:
        """The proportion as a fraction, NaN without trials."""
        return self.successes / self.n if self.n else math.nan

    def to_dict(self) -> dict[str, Any]:
        """JSON form ``{"success", "n", "ci95"}`` in fractions; an undefined rate is null."""
        return {"success": self.value if self.n else None, "n": self.n, "ci95": [self.low, self.high]}

    def __str__(self) -> str:
        """Percent with interval and count, as in ``83.6 % [80.1, 86.6] (n=512)``."""
        if not self.n:
            return "undefined (n=0)"
        return f"{100 * self.value:.1f} % [{100 * self.low:.1f}, {100 * self.high:.1f}] (n={self.n})"


@dataclass(frozen=True)
class Difference:
    """A difference of two paired proportions in percentage points.

    Attributes:
        points: Second minus first, percentage points.
        low: Lower end of the interval.
        high: Upper end of the interval.
        n: Number of pairs.
    """

    points: float
    low: float
    high: float
    n: int

    def to_dict(self) -> dict[str, Any]:
        """JSON form ``{"points", "ci95", "n"}``."""
        return {"points": self.points, "ci95": [self.low, self.high], "n": self.n}

    def __str__(self) -> str:
        """Signed points with interval and count."""
        return f"{self.points:+.1f} points [{self.low:+.1f}, {self.high:+.1f}] (n={self.n})"


@dataclass(frozen=True)
class Agreement:
    """Accuracy of claimed successes against the true outcomes of the same episodes.

    Attributes:
        precision: Fraction of claimed successes that are true.
        recall: Fraction of true successes that are claimed.
        specificity: Fraction of true failures that are not claimed; exposes over-claiming if almost all
            episodes succeed.
        accuracy: Fraction of episodes whose claim is correct.
        claimed: Rate of claims.
        true: Rate of true successes.
        gap: Claimed minus true in points (the hallucination gap), paired.
    """

    precision: Rate
    recall: Rate
    specificity: Rate
    accuracy: Rate
    claimed: Rate
    true: Rate
    gap: Difference

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall: NaN without successes and claims."""
        hits, errors = self.precision.successes, self.accuracy.n - self.accuracy.successes
        return 2 * hits / (2 * hits + errors) if hits or errors else math.nan

    def to_dict(self) -> dict[str, Any]:
        """JSON form with one entry per metric."""
        names = ("precision", "recall", "specificity", "accuracy", "claimed", "true")
        metrics: dict[str, Any] = {name: getattr(self, name).to_dict() for name in names}
        return metrics | {"f1": None if math.isnan(self.f1) else self.f1, "gap": self.gap.to_dict()}


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a proportion (E. B. Wilson, JASA 22, 1927).

    Args:
        successes: Number of successes, 0 to ``n``.
        n: Number of trials; 0 gives (0, 1).
        confidence: Coverage in (0, 1).

    Returns:
        Lower and upper end, fractions in [0, 1].

    Raises:
        ValueError: If the counts or the confidence are invalid.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"successes={successes} of n={n} is impossible; give 0 <= successes <= n.")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} must lie strictly between 0 and 1, e.g. 0.95.")
    if n == 0:
        return 0.0, 1.0
    z2 = NormalDist().inv_cdf(0.5 + confidence / 2) ** 2
    p = successes / n
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2 * (p * (1 - p) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    # Exactly 0 and 1 at the ends, where rounding would leave 1e-17.
    return 0.0 if successes == 0 else centre - half, 1.0 if successes == n else centre + half


def success_rate(outcomes: ArrayLike, confidence: float = 0.95) -> Rate:
    """Rate of a list of outcomes with its Wilson interval.

    Args:
        outcomes: Booleans, shape (N,).
        confidence: Coverage of the interval.
    """
    values = _outcomes(outcomes, "outcomes")
    successes, n = int(values.sum()), len(values)
    return Rate(successes, n, *wilson_interval(successes, n, confidence))


def paired_difference(first: ArrayLike, second: ArrayLike, confidence: float = 0.95) -> Difference:
    """Difference in success rate between ``second`` and ``first`` on the same start states.

    The interval is the hybrid score interval for paired proportions (R. G. Newcombe, Statistics in Medicine
    17, 1998, method 10): Wilson limits of both rates, joined with the correlation of the pairs. Unlike the
    Wald interval it keeps its coverage with few pairs and near 0 or 100 %.

    Args:
        first: Outcomes of the reference, booleans (N,).
        second: Outcomes of the other on the same start states in the same order, booleans (N,).
        confidence: Coverage of the interval.

    Returns:
        ``second - first`` in percentage points with its interval.

    Raises:
        ValueError: If the lengths differ or there are no pairs.
    """
    before, after = _outcomes(first, "first"), _outcomes(second, "second")
    if len(before) != len(after) or not len(before):
        raise ValueError(
            f"A paired difference needs equally many outcomes, at least one; got {len(before)} and "
            f"{len(after)}. Evaluate both on the same start states."
        )
    n = len(before)
    p1, p2 = after.mean(), before.mean()
    low1, high1 = wilson_interval(int(after.sum()), n, confidence)
    low2, high2 = wilson_interval(int(before.sum()), n, confidence)
    phi = _pair_correlation(before, after)
    # The radicands are squared distances under a correlation |phi| <= 1; max() only removes rounding below 0.
    down = math.sqrt(max(0.0, (p1 - low1) ** 2 - 2 * phi * (p1 - low1) * (high2 - p2) + (high2 - p2) ** 2))
    up = math.sqrt(max(0.0, (high1 - p1) ** 2 - 2 * phi * (high1 - p1) * (p2 - low2) + (p2 - low2) ** 2))
    delta = float(p1 - p2)
    return Difference(100 * delta, 100 * (delta - down), 100 * (delta + up), n)


def precision_recall(claimed: ArrayLike, true: ArrayLike) -> Agreement:
    """Compare claimed successes with true outcomes of the same episodes.

    Args:
        claimed: Claimed success, e.g. by the classifier in imagination, booleans (N,).
        true: True success, e.g. from replaying the same actions in the paired simulator, booleans (N,).

    Raises:
        ValueError: If the lengths differ or there are no episodes.
    """
    claims, truth = _outcomes(claimed, "claimed"), _outcomes(true, "true")
    gap = paired_difference(truth, claims)
    return Agreement(
        precision=success_rate(truth[claims]),
        recall=success_rate(claims[truth]),
        specificity=success_rate(~claims[~truth]),
        accuracy=success_rate(claims == truth),
        claimed=success_rate(claims),
        true=success_rate(truth),
        gap=gap,
    )


def hallucination_gap(claimed: ArrayLike, true: ArrayLike) -> Difference:
    """Claimed minus true success of the same episodes, percentage points; positive means over-claimed."""
    return paired_difference(true, claimed)


def _outcomes(values: ArrayLike, name: str) -> np.ndarray:
    """Boolean (N,) array; rejects values other than 0 and 1."""
    array = np.asarray(values)
    if array.ndim != 1 or not np.isin(array, (0, 1)).all():
        raise ValueError(
            f"{name} must be a flat list of success (1) or failure (0), got {array.dtype} {array.shape}."
        )
    return array.astype(bool)


def _pair_correlation(before: np.ndarray, after: np.ndarray) -> float:
    """Phi of the 2x2 table of pairs, shrunk towards 0 by Newcombe's continuity correction when positive."""
    n = len(before)
    both, neither = int((before & after).sum()), int((~before & ~after).sum())
    only_after, only_before = int((~before & after).sum()), int((before & ~after).sum())
    margins = (both + only_after) * (only_before + neither) * (both + only_before) * (only_after + neither)
    if margins == 0:
        return 0.0
    product = both * neither - only_after * only_before
    return (max(product - n / 2, 0.0) if product > 0 else float(product)) / math.sqrt(margins)
