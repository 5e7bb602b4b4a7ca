"""Calibration of a success classifier: the decision threshold and its quality on held-out episodes.

An episode counts as a success as soon as one of its windows reaches the threshold. The threshold is therefore
chosen on the largest score of each episode, not on the scores of single clips.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from wmpo_gym.data.episode import Episode
from wmpo_gym.reward.classifier import Calibration, SuccessClassifier
from wmpo_gym.statistics import wilson_interval

JITTER = 0.55  # scale of a logistic distribution with standard deviation one
_EPS = 1e-3  # resolution of the scores: closer to 0 or 1 than this they count as equal


def split_episodes(
    episodes: Sequence[Episode],
    *,
    seed: int,
    fraction: float = 0.25,
    minimum: int = 60,
    holdout: Collection[int] | None = None,
) -> tuple[list[Episode], list[Episode]]:
    """Split episodes into training and held-out ones, by start state and stratified by outcome.

    Args:
        episodes: Labelled episodes.
        seed: Seed of the choice.
        fraction: Share to hold out.
        minimum: Hold out at least this many episodes, if that leaves half of them for training.
        holdout: Start-state ids to hold out; None draws them.

    Returns:
        The training episodes and the held-out ones.

    Raises:
        ValueError: If either side would lack successes or failures.
    """
    if holdout is not None:
        held = [e.start_state_id is not None and e.start_state_id in holdout for e in episodes]
    else:
        n = len(episodes)
        target = max(fraction * n, min(minimum, n // 2))
        held = _draw_holdout(episodes, target / n, np.random.default_rng([seed, 4]))
    training = [e for e, h in zip(episodes, held, strict=True) if not h]
    held_out = [e for e, h in zip(episodes, held, strict=True) if h]
    for side, name in ((training, "training"), (held_out, "calibration")):
        good = sum(bool(e.success) for e in side)
        if not 0 < good < len(side):
            raise ValueError(
                f"{good} successes and {len(side) - good} failures are left for {name}; at least one of each "
                "is needed. Choose other start states to hold out, or collect more episodes."
            )
    return training, held_out


def _draw_holdout(episodes: Sequence[Episode], share: float, rng: np.random.Generator) -> list[bool]:
    """Whether each episode is held out: ``share`` of each outcome, at least one episode and never all."""
    groups: dict[Any, list[int]] = {}
    for i, episode in enumerate(episodes):
        key = ("single", i) if episode.start_state_id is None else episode.start_state_id
        groups.setdefault(key, []).append(i)
    # A group counts as a success if any of its episodes is one; single episodes per start state are the rule.
    outcome = {key: any(bool(episodes[i].success) for i in rows) for key, rows in groups.items()}
    held = [False] * len(episodes)
    for kind in (True, False):
        keys = [key for key in groups if outcome[key] is kind]
        total = sum(len(groups[key]) for key in keys)
        taken = 0
        for k in rng.permutation(len(keys))[: len(keys) - 1]:
            if taken >= max(1, round(share * total)):
                break
            for i in groups[keys[k]]:
                held[i], taken = True, taken + 1
    return held


def episode_scores(classifier: SuccessClassifier, episodes: Sequence[Episode]) -> list[np.ndarray]:
    """Probability at every frame of every episode, as :meth:`SuccessClassifier.scores`."""
    was_training = classifier.training
    classifier.eval()
    try:
        return [classifier.scores(np.asarray(e.frames), e.task_id) for e in episodes]
    finally:
        classifier.train(was_training)


def calibrate(
    classifier: SuccessClassifier, episodes: Sequence[Episode], replays: Sequence[Episode] = ()
) -> Calibration:
    """Choose the threshold for the best F1 on held-out episodes; see :func:`best_threshold`.

    Args:
        classifier: Trained on other episodes; it is not changed. Set its ``calibration`` to the result.
        episodes: Labelled episodes, successes and failures; the metrics are measured on these.
        replays: The world model's replays of held-out episodes. The threshold is chosen on them too, because
            in use it scores imagined episodes.

    Returns:
        The threshold with its metrics.

    Raises:
        ValueError: If successes or failures are missing, or an episode has no label.
    """
    labels = outcome_labels(episodes)
    if labels.all() or not labels.any():
        raise ValueError(
            f"A threshold cannot be calibrated on {int(labels.sum())} successes and {int((~labels).sum())} "
            "failures; hold out at least one of each (a few dozen give a usable interval)."
        )
    scores = episode_scores(classifier, episodes)
    largest = [np.nanmax(s) for s in [*scores, *episode_scores(classifier, replays)]]
    threshold = best_threshold(np.array(largest), np.append(labels, outcome_labels(replays)))
    return _measure(scores, episodes, labels, threshold)


def assess(
    classifier: SuccessClassifier, episodes: Sequence[Episode], threshold: float | None = None
) -> Calibration:
    """Metrics of a given threshold on labelled episodes.

    Args:
        classifier: Scores the episodes; it is not changed.
        episodes: Labelled episodes that it was neither trained nor calibrated on.
        threshold: Probability in [0, 1]; None is the classifier's own.

    Raises:
        ValueError: If an episode has no label.
    """
    threshold = classifier.threshold if threshold is None else threshold
    scores = episode_scores(classifier, episodes)
    return _measure(scores, episodes, outcome_labels(episodes), threshold)


def outcome_labels(episodes: Sequence[Episode]) -> np.ndarray:
    """Outcomes of episodes as booleans ``(N,)``.

    Raises:
        ValueError: If an episode has no outcome.
    """
    if unlabelled := sum(e.success is None for e in episodes):
        raise ValueError(
            f"{unlabelled} of {len(episodes)} episodes have no outcome; leave out play episodes."
        )
    return np.array([e.success for e in episodes], dtype=bool)


def best_threshold(scores: np.ndarray, labels: np.ndarray) -> float:
    """The threshold with the best expected F1 when logistic noise is added to every score.

    The best threshold for the scores as they are depends on one or two episodes. Noise of about one logit
    gives the middle of the gap where the outcomes are well separated. Both outcomes have the same weight:
    with mostly successful episodes F1 would otherwise be best with nearly all of them claimed.

    Args:
        scores: ``(N,)`` largest probability of each episode.
        labels: ``(N,)`` outcomes, at least one of each.

    Returns:
        A probability in [0, 1].
    """
    logits, levels = _logit(scores), _logit(np.linspace(_EPS, 1 - _EPS, 2001))
    weight = 1 / np.where(labels, labels.sum(), (~labels).sum())
    claimed = weight / (1 + np.exp((levels[:, None] - logits) / JITTER))  # expected share at each level
    f1 = 2 * (claimed * labels).sum(1) / (claimed.sum(1) + 1)
    best = levels[f1 >= f1.max() - 1e-9]
    return float(1 / (1 + np.exp(-best.mean())))


def _measure(
    scores: Sequence[np.ndarray],
    episodes: Sequence[Episode],
    labels: np.ndarray,
    threshold: float,
) -> Calibration:
    best = np.array([np.nanmax(s) for s in scores])
    claimed = best >= threshold
    right = claimed & labels
    found = [(s, e) for s, e, r in zip(scores, episodes, right, strict=True) if r]
    errors = [int((s >= threshold).argmax()) - e.finish_step for s, e in found]
    hits, claims, real = int(right.sum()), int(claimed.sum()), int(labels.sum())
    return Calibration(
        threshold=float(threshold),
        precision=hits / claims if claims else math.nan,
        recall=hits / real if real else math.nan,
        f1=2 * hits / (claims + real) if claims + real else math.nan,
        n=len(labels),
        n_success=real,
        precision_ci95=wilson_interval(hits, claims),
        recall_ci95=wilson_interval(hits, real),
        plateau=(float(best[~claimed].max(initial=0.0)), float(best[claimed].min(initial=1.0))),
        finish_error=float(np.median(errors)) if errors else math.nan,
    )


def _logit(p: np.ndarray) -> np.ndarray:
    p = np.clip(np.asarray(p, dtype=np.float64), _EPS, 1.0 - _EPS)
    return np.log(p / (1.0 - p))
