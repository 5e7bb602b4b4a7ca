"""Filters for the success classifier's predictions: consecutive windows, and a check under other noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from wmpo_gym.utils.rows import Rows


def in_a_row(reached: np.ndarray, streak: np.ndarray, needed: int) -> tuple[np.ndarray, np.ndarray]:
    """Debounce success predictions: mark frames preceded by enough consecutive frames above the threshold.

    Args:
        reached: bool (n, K), frames of a chunk above the threshold.
        streak: int64 (n,), length of the run at the end of the previous chunk.
        needed: Required number of consecutive frames; 1 accepts any frame.

    Returns:
        bool (n, K), and the length of the run at the end of this chunk (n,).
    """
    counted = np.zeros_like(reached)
    for k in range(reached.shape[1]):
        streak = np.where(reached[:, k], streak + 1, 0)
        counted[:, k] = streak >= needed
    return counted, streak


@dataclass
class EpisodeHistory(Rows):
    """History of running episodes, from which they can be imagined again under different noise.

    Attributes:
        first: uint8 (rows, H, W, 3), first frames.
        actions: float32 (rows, chunks, K, D), zeros after ``age``.
        age: int64 (rows,), chunks executed.
        seed: int64 (rows,), noise seeds of the episodes.
    """

    first: np.ndarray
    actions: np.ndarray
    age: np.ndarray
    seed: np.ndarray

    @classmethod
    def empty(cls, rows: int, frame: tuple[int, ...], actions: tuple[int, ...]) -> EpisodeHistory:
        """All zeros, for the shapes of a frame and of an episode's actions (chunks, K, D)."""
        return cls(
            np.zeros((rows, *frame), np.uint8),
            np.zeros((rows, *actions), np.float32),
            np.zeros(rows, np.int64),
            np.zeros(rows, np.int64),
        )

    def begin(self, rows: np.ndarray, first: np.ndarray, seeds: Any) -> None:
        """Begin new episodes in some rows."""
        self.first[rows], self.seed[rows], self.age[rows], self.actions[rows] = first, seeds, 0, 0.0

    def add(self, rows: np.ndarray, actions: np.ndarray) -> None:
        """Append one action chunk per row, (n, K, D)."""
        self.actions[rows, self.age[rows]] = actions
        self.age[rows] += 1
