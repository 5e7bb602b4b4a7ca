"""The threshold, and how good it is: measured on whole episodes that the classifier was not trained on.

In use an episode succeeds as soon as one of its windows reaches the threshold, so what is calibrated is the
largest score of an episode, not the score of single clips.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from wmpo_gym.data.episode import Episode

if TYPE_CHECKING:
    from wmpo_gym.reward.classifier import SuccessClassifier

WOBBLE = 0.55  # scale of a logistic distribution with standard deviation one
_EPS = 1e-3  # scores are not told apart closer to 0 or 1 than this


@dataclass(frozen=True)
class Calibration:
    """A threshold and its quality on ``n`` episodes.

    Attributes:
        threshold: Probability from which on a window counts as success.
        precision: Share of the claimed successes that are real; NaN if none is claimed.
        recall: Share of the real successes that are claimed.
        f1: Harmonic mean of the two.
        n: Episodes it was measured on.
        n_success: Successes among them.
        precision_ci95: Wilson interval of the precision.
        recall_ci95: Wilson interval of the recall.
        plateau: Scores next to the threshold; any other between them claims the same episodes.
        finish_error: Median of claimed minus real finish step over rightly claimed successes; NaN if none is.
    """

    threshold: float
    precision: float
    recall: float
    f1: float
    n: int
    n_success: int
    precision_ci95: tuple[float, float]
    recall_ci95: tuple[float, float]
    plateau: tuple[float, float]
    finish_error: float = math.nan

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form; numbers that are not finite become None."""
        values = asdict(self)
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Calibration:
        """Rebuild from :meth:`to_dict`, also after a trip through JSON.

        Raises:
            TypeError: If an entry is missing or unknown.
            ValueError: If the threshold is no probability.
        """
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        for name in ("precision", "recall", "f1", "finish_error"):
            values[name] = math.nan if values.get(name) is None else values[name]
        if not 0.0 <= values.get("threshold", -1.0) <= 1.0:
            raise ValueError(f"a threshold lies between 0 and 1, not {values.get('threshold')}")
        return cls(**values)


def split_episodes(
    episodes: Sequence[Episode],
    *,
    seed: int,
    fraction: float = 0.25,
    minimum: int = 60,
    holdout: Collection[int] | None = None,
) -> tuple[list[Episode], list[Episode]]:
    """Part episodes into training and held-out ones, whole start states at a time, both outcomes alike.

    Args:
        episodes: Labelled episodes.
        seed: Seed of the choice.
        fraction: Share to hold out.
        minimum: Hold out at least so many, if that leaves half for training.
        holdout: Start-state ids to hold out; None chooses.

    Raises:
        ValueError: If either side would lack successes or failures.
    """
    if holdout is not None:
        held = [e.start_state_id is not None and e.start_state_id in holdout for e in episodes]
    else:
        n = len(episodes)
        wanted = max(fraction * n, min(minimum, n // 2))
        held = _draw_holdout(episodes, wanted / n, np.random.default_rng([seed, 4]))
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
    """Whether each episode is held out: per outcome ``share`` of them, at least one, never all."""
    groups: dict[Any, list[int]] = {}
    for i, episode in enumerate(episodes):
        key = ("alone", i) if episode.start_state_id is None else episode.start_state_id
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
        classifier: Trained on other episodes; it is not changed, set ``classifier.calibration`` yourself.
        episodes: Labelled episodes, successes and failures. The figures are those on them.
        replays: The world model's replays of held-out episodes, which the threshold is chosen on too: it is
            imagined episodes that will be judged by it.

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
    """Quality of a threshold that is already chosen (the classifier's own by default) on other episodes."""
    threshold = classifier.threshold if threshold is None else threshold
    scores = episode_scores(classifier, episodes)
    return _measure(scores, episodes, outcome_labels(episodes), threshold)


def outcome_labels(episodes: Sequence[Episode]) -> np.ndarray:
    """Outcomes as booleans ``(N,)``.

    Raises:
        ValueError: If an episode has none.
    """
    if unlabelled := sum(e.success is None for e in episodes):
        raise ValueError(
            f"{unlabelled} of {len(episodes)} episodes have no outcome; leave out play episodes."
        )
    return np.array([e.success for e in episodes], dtype=bool)


def best_threshold(scores: np.ndarray, labels: np.ndarray) -> float:
    """The threshold with the best F1, if scores wobble a little from one set of episodes to the next.

    Both outcomes weigh the same: where demonstrations make most of the episodes successes, F1 would be best
    with nearly all claimed.

    Which threshold is best on these very episodes hangs on one or two of them. Letting every score wobble by
    about one logit gives the middle of the gap where outcomes are well separated, and is no worse elsewhere.

    Args:
        scores: ``(N,)`` largest probability of each episode.
        labels: ``(N,)`` outcomes, at least one of each.
    """
    logits, levels = _logit(scores), _logit(np.linspace(_EPS, 1 - _EPS, 2001))
    weight = 1 / np.where(labels, labels.sum(), (~labels).sum())
    claimed = weight / (1 + np.exp((levels[:, None] - logits) / WOBBLE))  # expected share, per level
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
        precision_ci95=_wilson(hits, claims),
        recall_ci95=_wilson(hits, real),
        plateau=(float(best[~claimed].max(initial=0.0)), float(best[claimed].min(initial=1.0))),
        finish_error=float(np.median(errors)) if errors else math.nan,
    )


def _wilson(hits: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % Wilson score interval of a share."""
    if n == 0:
        return 0.0, 1.0
    share = hits / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def _logit(p: np.ndarray) -> np.ndarray:
    p = np.clip(np.asarray(p, dtype=np.float64), _EPS, 1.0 - _EPS)
    return np.log(p / (1.0 - p))
