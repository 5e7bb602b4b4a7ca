"""Action statistics, and scaling between a robot's units and [-1, 1]."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

QUANTILES = (0.01, 0.99)


@dataclass(frozen=True)
class ActionStatistics:
    """Statistics of the actions in a data set, one entry per dimension, in the robot's units.

    Attributes:
        mean: Mean.
        std: Standard deviation.
        min: Minimum.
        max: Maximum.
        q01: 1 % quantile.
        q99: 99 % quantile.
        mask: Whether the dimension is scaled by its quantiles. A dimension with at most two values, such as a
            gripper's command, or one with equal quantiles is scaled by its minimum and maximum instead.
        n_steps: Number of actions.
        n_episodes: Number of episodes.
    """

    mean: np.ndarray
    std: np.ndarray
    min: np.ndarray
    max: np.ndarray
    q01: np.ndarray
    q99: np.ndarray
    mask: np.ndarray
    n_steps: int
    n_episodes: int

    @classmethod
    def of(cls, actions: Sequence[np.ndarray]) -> ActionStatistics:
        """Statistics of episodes' actions, each ``(T, D)`` in the robot's units."""
        steps = np.concatenate(actions).astype(np.float64)
        q01, q99 = np.quantile(steps, QUANTILES, axis=0)
        few = np.array([len(np.unique(column)) <= 2 for column in steps.T])
        return cls(
            mean=steps.mean(axis=0),
            std=steps.std(axis=0),
            min=steps.min(axis=0),
            max=steps.max(axis=0),
            q01=q01,
            q99=q99,
            mask=~few & (q99 > q01),
            n_steps=len(steps),
            n_episodes=len(actions),
        )

    @property
    def low(self) -> np.ndarray:
        """The value that is scaled to -1."""
        return np.where(self.mask, self.q01, self.min)

    @property
    def high(self) -> np.ndarray:
        """The value that is scaled to +1; equal to :attr:`low` in a constant dimension."""
        return np.where(self.mask, self.q99, self.max)

    def to_dict(self, name: str) -> dict[str, Any]:
        """The nested layout of OpenVLA's ``dataset_statistics.json``, under the data set's name."""
        columns = ("mean", "std", "max", "min", "q01", "q99", "mask")
        return {
            name: {
                "action": {column: getattr(self, column).tolist() for column in columns},
                "num_transitions": self.n_steps,
                "num_trajectories": self.n_episodes,
            }
        }


def to_unit(actions: ArrayLike, low: ArrayLike, high: ArrayLike) -> np.ndarray:
    """Map actions ``(..., D)`` from the robot's units to [-1, 1], float32; constant dimensions become 0.

    Values are not clipped: those outside ``low`` and ``high`` are outside [-1, 1].
    """
    actions, low, high = (np.asarray(x, np.float64) for x in (actions, low, high))
    span = high - low
    moving = span > 0
    unit = 2 * (actions - low) / np.where(moving, span, 1.0) - 1
    return np.where(moving, unit, 0.0).astype(np.float32)


def from_unit(actions: ArrayLike, low: ArrayLike, high: ArrayLike) -> np.ndarray:
    """Map actions ``(..., D)`` from [-1, 1] to the robot's units, float32; the inverse of :func:`to_unit`."""
    actions, low, high = (np.asarray(x, np.float64) for x in (actions, low, high))
    return (low + (actions + 1) / 2 * (high - low)).astype(np.float32)
