from __future__ import annotations

import json
import math

import numpy as np
import pytest
from square_toys import square_episode

from wmpo_gym.reward.calibration import Calibration, assess, best_threshold, calibrate


class Scripted:
    """Scores an episode with what its meta says."""

    training = False
    threshold = 0.5

    def eval(self):
        return self

    def train(self, mode):
        assert mode is False

    def scores(self, frames, task_id):
        return self.table[frames.tobytes()]


def scripted(rows: list[tuple[bool, list[float]]]):
    """A classifier and episodes of the given outcomes and scores (NaN is put in front)."""
    classifier, episodes = Scripted(), []
    classifier.table = {}
    for i, (success, scores) in enumerate(rows):
        episodes.append(square_episode(i, success, steps=len(scores)))
        classifier.table[episodes[-1].frames.tobytes()] = np.array([math.nan, *scores], np.float32)
    return classifier, episodes


def test_separable_scores_give_the_middle():
    rows = [(False, [0.1, 0.2]), (False, [0.1, 0.1]), (True, [0.1, 0.8]), (True, [0.0, 0.9])]
    classifier, episodes = scripted(rows)
    result = calibrate(classifier, episodes)
    assert result.threshold == pytest.approx(0.5, abs=0.03) and result.f1 == 1.0
    assert result.plateau == pytest.approx((0.2, 0.8)) and result.finish_error == 0.0
    assert (result.n, result.n_success) == (4, 2)


def test_threshold_is_good_on_other_episodes():
    rng = np.random.default_rng(0)

    def draw(n):
        labels = rng.random(n) < 0.5
        logits = rng.normal(np.where(labels, 3.0, -1.0), 1.5)  # a threshold of one half is not the best
        return 1 / (1 + np.exp(-logits)), labels

    def f1(scores, labels, threshold):
        claimed = scores >= threshold
        return 2 * (claimed & labels).sum() / (claimed.sum() + labels.sum())

    test = draw(20000)
    best = max(f1(*test, t) for t in np.linspace(0.01, 0.99, 99))
    assert f1(*test, 0.5) < best - 0.005
    found = [f1(*test, best_threshold(*draw(60))) for _ in range(50)]
    assert np.mean(found) > best - 0.006 and min(found) > best - 0.03


def test_one_odd_episode_does_not_move_the_threshold():
    scores = np.array([0.02, 0.03, 0.04, 0.05, 0.95, 0.96, 0.97, 0.98])
    labels = scores > 0.5
    clean = best_threshold(scores, labels)
    # One success that is barely above the failures: best on these episodes is a threshold below it.
    odd = best_threshold(np.append(scores, 0.07), np.append(labels, True))
    assert 0.4 < clean < 0.6 and 0.07 < odd < clean


def test_outcomes_weigh_the_same():
    rng = np.random.default_rng(0)
    good, bad = 1 / (1 + np.exp(-rng.normal(1.0, 1.0, 400))), 1 / (1 + np.exp(-rng.normal(-1.0, 1.0, 400)))
    even = best_threshold(np.append(good, bad), np.arange(800) < 400)
    many = best_threshold(np.append(np.tile(good, 9), bad), np.arange(4000) < 3600)
    assert 0.2 < even < 0.6 and many == pytest.approx(even, abs=1e-3)


def test_replays_raise_the_threshold_but_not_the_figures():
    classifier, episodes = scripted([(False, [0.1]), (True, [0.9]), (False, [0.7]), (True, [0.95])])
    recorded, replays = episodes[:2], episodes[2:]
    alone, both = calibrate(classifier, recorded), calibrate(classifier, recorded, replays)
    assert alone.threshold == pytest.approx(0.5, abs=0.03) and 0.7 < both.threshold < 0.9
    assert (both.n, both.precision, both.recall) == (2, 1.0, 1.0)


def test_an_episode_counts_by_its_best_window():
    # Early in the last failure one window scores high: on single clips that is one error among many.
    rows = [(True, [0.1, 0.9]), (True, [0.2, 0.7]), (False, [0.8, 0.1]), (False, [0.1, 0.1])]
    classifier, episodes = scripted(rows)
    result = assess(classifier, episodes, 0.6)
    assert (result.precision, result.recall) == (pytest.approx(2 / 3), 1.0)
    assert result.f1 == pytest.approx(0.8)
    low, high = result.precision_ci95
    assert (low, high) == (pytest.approx(0.2077, abs=1e-4), pytest.approx(0.9385, abs=1e-4))
    assert result.plateau == pytest.approx((0.1, 0.7))


def test_scores_saturated_at_one():
    classifier, episodes = scripted([(False, [0.2]), (True, [1.0]), (True, [1.0])])
    result = calibrate(classifier, episodes)
    assert 0.5 < result.threshold < 0.99 and result.recall == 1.0


def test_nothing_claimed_survives_json():
    classifier, episodes = scripted([(False, [0.2]), (True, [0.3])])
    result = assess(classifier, episodes, 0.9)
    assert math.isnan(result.precision) and result.recall == 0.0
    text = json.dumps(result.to_dict(), allow_nan=False)
    again = Calibration.from_dict(json.loads(text))
    assert math.isnan(again.precision) and again.recall_ci95 == result.recall_ci95


@pytest.mark.parametrize("success", [True, False])
def test_one_sided_episodes(success):
    classifier, episodes = scripted([(success, [0.2]), (success, [0.3])])
    with pytest.raises(
        ValueError, match="2 successes and 0 failures" if success else "0 successes and 2 failures"
    ):
        calibrate(classifier, episodes)


def test_unlabelled_episodes():
    classifier, episodes = scripted([(True, [0.2]), (False, [0.3])])
    episodes[0].success = None
    with pytest.raises(ValueError, match="1 of 2 episodes have no outcome"):
        assess(classifier, episodes)
