"""Comparison of a world with its paired simulator: the same actions from the same start states in both.

The comparison is fair only over the full horizon. An imagined episode of the environment stops when its
classifier fires; the policy never chose actions for the rest, and a replay of the cut sequence would count
every early claim as false. Here imagination goes on to the horizon, the claim is the classifier's first
firing, and the simulator's outcome is its first success, each at whatever step it comes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from wmpo_gym.evaluation.metrics import object_error
from wmpo_gym.rollouts.imagined import NEVER, Imagined, imagine_full_horizon
from wmpo_gym.rollouts.simulated import Replay, replay, start_frames
from wmpo_gym.statistics import Agreement, precision_recall
from wmpo_gym.world.world import World


@dataclass
class TwinComparison:
    """Imagination and twin of the same actions from the same start states.

    Attributes:
        start_state_ids: int64 (N,).
        imagined: The imagined episodes.
        replay: The simulated ones.
        agreement: Claims judged by outcomes: precision, recall, accuracy, gap in points.
        error: float64 (N, T+1), object error in pixels, or None (see :func:`object_error`).
    """

    start_state_ids: np.ndarray
    imagined: Imagined
    replay: Replay
    agreement: Agreement
    error: np.ndarray | None

    def error_at_success(self) -> np.ndarray:
        """Object error (M,) at the step that decides: of the true success, else of the false claim."""
        if self.error is None:
            return np.zeros(0)
        step = np.where(self.replay.success, self.replay.success_step, self.imagined.claimed_step)
        decided = np.flatnonzero(step != NEVER)
        errors = self.error[decided, step[decided]]
        return errors[~np.isnan(errors)]

    def error_by_step(self) -> dict[str, list[float]]:
        """Median, mean and 90th percentile of the object error (pixels) per control step 0 to T."""
        if self.error is None:
            return {}
        return {
            "median": np.nanmedian(self.error, axis=0).tolist(),
            "mean": np.nanmean(self.error, axis=0).tolist(),
            "p90": np.nanpercentile(self.error, 90, axis=0).tolist(),
        }


def compare_with_twin(
    world: World,
    policy: Any,
    start_state_ids: Sequence[int] | np.ndarray,
    *,
    seed: int = 0,
    deterministic: bool = False,
    variant: str = "nominal",
    record_frames: bool = True,
    progress: bool = False,
) -> TwinComparison:
    """Imagine a policy's episodes to the full horizon and replay their actions in the simulator.

    Args:
        world: The world to judge.
        policy: See :func:`~wmpo_gym.rollouts.policy_runner.acting`.
        start_state_ids: Start states of the task, of any split; the simulator renders their first frames.
        seed: Root seed.
        deterministic: Greedy actions.
        variant: Scene variant.
        record_frames: Render the twin too; without it there is no object error and no video.
        progress: Show progress bars.
    """
    ids = np.asarray(start_state_ids, np.int64)
    frames, task_ids = start_frames(world.task, ids, variant)
    imagined = imagine_full_horizon(
        world,
        policy,
        frames,
        task_ids,
        seed=seed,
        deterministic=deterministic,
        start_state_ids=ids,
        progress=progress,
    )
    twin = replay(
        world.task, ids, imagined.actions, variant=variant, record_frames=record_frames, progress=progress
    )
    error = None if twin.frames is None else object_error(world.task, imagined.frames, twin.frames, task_ids)
    return TwinComparison(ids, imagined, twin, twin_agreement(imagined, twin), error)


def twin_agreement(imagined: Imagined, twin: Replay) -> Agreement:
    """Claims of imagination judged by the twin."""
    return precision_recall(imagined.claimed, twin.success)
