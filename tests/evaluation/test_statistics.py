"""Intervals against published tables, edge counts, and coverage by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest

from wmpo_gym.statistics import (
    hallucination_gap,
    paired_difference,
    precision_recall,
    success_rate,
    wilson_interval,
)


def pairs(both: int, only_first: int, only_second: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    first = [1] * both + [1] * only_first + [0] * only_second + [0] * neither
    second = [1] * both + [0] * only_first + [1] * only_second + [0] * neither
    return np.array(first, bool), np.array(second, bool)


@pytest.mark.parametrize(
    ("k", "n", "expected"),
    [
        (81, 263, (0.2553, 0.3662)),
        (15, 148, (0.0624, 0.1605)),
        (0, 20, (0.0, 0.1611)),
        (1, 29, (0.0061, 0.1718)),
    ],
)
def test_wilson_interval_reproduces_the_table_of_newcombe_1998(k, n, expected):
    assert wilson_interval(k, n) == pytest.approx(expected, abs=5e-5)


def test_wilson_interval_agrees_with_scipy():
    binomtest = pytest.importorskip("scipy.stats").binomtest
    for k, n, confidence in ((0, 7, 0.95), (7, 7, 0.95), (3, 128, 0.9), (430, 512, 0.99)):
        theirs = binomtest(k, n).proportion_ci(confidence, method="wilson")
        assert wilson_interval(k, n, confidence) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_wilson_interval_of_nothing_says_nothing():
    assert wilson_interval(0, 0) == (0.0, 1.0)
    assert math.isnan(success_rate([]).value)
    assert success_rate([]).to_dict()["success"] is None


@pytest.mark.parametrize(("k", "n", "confidence"), [(3, 2, 0.95), (-1, 5, 0.95), (1, 5, 1.0), (1, 5, 0.0)])
def test_impossible_counts_are_errors(k, n, confidence):
    with pytest.raises(ValueError, match="successes|confidence"):
        wilson_interval(k, n, confidence)


def test_a_rate_prints_count_and_interval():
    text = str(success_rate([1] * 3 + [0]))
    assert text.startswith("75.0 % [") and text.endswith("(n=4)")


def test_paired_difference_has_the_coverage_it_claims():
    rng = np.random.default_rng(0)
    n, hits, runs = 64, 0, 1500
    # Correlated pairs: second succeeds wherever first does, and on half of the rest but for a few losses.
    for _ in range(runs):
        u = rng.random(n)
        first, second = u < 0.45, (u < 0.75) & ~(u < 0.05)
        d = paired_difference(first, second)
        hits += d.low <= 100 * (0.70 - 0.45) <= d.high
    assert 0.93 <= hits / runs <= 0.99


def test_paired_difference_is_tighter_when_the_pairs_agree():
    agreeing = paired_difference(*pairs(40, 0, 20, 40))
    opposed = paired_difference(*pairs(10, 30, 50, 10))
    assert agreeing.points == opposed.points == pytest.approx(20.0)
    assert agreeing.high - agreeing.low < 0.7 * (opposed.high - opposed.low)


def test_paired_difference_is_antisymmetric_and_deterministic():
    first, second = pairs(30, 5, 25, 40)
    forth, back = paired_difference(first, second), paired_difference(second, first)
    assert forth == paired_difference(first, second)
    assert (forth.points, forth.low, forth.high) == pytest.approx((-back.points, -back.high, -back.low))


def test_paired_difference_of_certain_outcomes_stays_open():
    d = paired_difference(np.zeros(20, bool), np.ones(20, bool))
    assert d.points == 100.0 and d.low < 100.0 and d.high == pytest.approx(100.0)


def test_unequal_or_odd_outcomes_are_errors():
    with pytest.raises(ValueError, match="same start states"):
        paired_difference([1, 0], [1])
    with pytest.raises(ValueError, match="success"):
        paired_difference([0.5, 1.0], [1, 0])


def test_precision_recall_of_a_hand_counted_table():
    claimed = [1, 1, 1, 1, 0, 0, 0, 0, 0, 0]
    true = [1, 1, 1, 0, 1, 0, 0, 0, 0, 0]
    a = precision_recall(claimed, true)
    assert (a.precision.value, a.recall.value, a.specificity.value, a.accuracy.value) == (
        0.75,
        0.75,
        5 / 6,
        0.8,
    )
    assert a.f1 == pytest.approx(0.75)
    assert a.gap.points == 0.0
    assert a.to_dict()["precision"]["n"] == 4


def test_precision_without_a_claim_is_undefined_not_zero():
    a = precision_recall([0, 0], [1, 0])
    assert a.precision.n == 0 and math.isnan(a.precision.value) and a.recall.value == 0.0 and a.f1 == 0.0


def test_hallucination_gap_is_positive_when_over_claimed():
    assert hallucination_gap([1, 1, 1, 0], [1, 0, 0, 0]).points == 50.0
