"""Statistics of actions, and the way from a robot's units to [-1, 1] and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

QUANTILES = (0.01, 0.99)


@dataclass(frozen=True)
class ActionStatistics:
    """What the actions of a data set are like, one entry per dimension, in the robot's units.

    Attributes:
        mean: Mean.
        std: Standard deviation.
        min: Least value.
        max: Greatest value.
        q01: 1 % quantile.
        q99: 99 % quantile.
        mask: Whether the dimension is scaled by its quantiles. A dimension with at most two values, such as a
            gripper's command, or one that rests in 98 % of the steps is scaled by its extremes instead.
        n_steps: Actions counted.
        n_episodes: Episodes counted.
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
        """What becomes -1."""
        return np.where(self.mask, self.q01, self.min)

    @property
    def high(self) -> np.ndarray:
        """What becomes +1; equal to :attr:`low` in a dimension that never moves."""
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
    """Map actions ``(..., D)`` from the robot's units to [-1, 1], float32; what never moves becomes 0.

    Not clipped: what lies outside ``low`` and ``high`` lies outside [-1, 1].
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
