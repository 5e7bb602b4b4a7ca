"""When a claim of the success classifier counts: checks beyond a first window above the threshold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from wmpo_gym.utils.rows import Rows


def in_a_row(reached: np.ndarray, streak: np.ndarray, needed: int) -> tuple[np.ndarray, np.ndarray]:
    """Frames that end a run of enough frames above the threshold.

    Args:
        reached: bool (n, K), frames of a chunk above the threshold.
        streak: int64 (n,), length of the run that the chunk before ended with.
        needed: Frames in a row that count; 1 is any frame.

    Returns:
        bool (n, K), and the runs (n,) this chunk ends with.
    """
    counted = np.zeros_like(reached)
    for k in range(reached.shape[1]):
        streak = np.where(reached[:, k], streak + 1, 0)
        counted[:, k] = streak >= needed
    return counted, streak


@dataclass
class EpisodeHistory(Rows):
    """First frames, actions and noise seeds of running episodes, to imagine them again under other noise.

    Attributes:
        first: uint8 (rows, H, W, 3), first frames.
        actions: float32 (rows, chunks, K, D), zeros after ``age``.
        age: int64 (rows,), chunks executed.
        seed: int64 (rows,), seeds of the noise they had.
    """

    first: np.ndarray
    actions: np.ndarray
    age: np.ndarray
    seed: np.ndarray

    @classmethod
    def empty(cls, rows: int, frame: tuple[int, ...], actions: tuple[int, ...]) -> EpisodeHistory:
        """Zeros; shapes of a frame and of an episode's actions (chunks, K, D)."""
        return cls(
            np.zeros((rows, *frame), np.uint8),
            np.zeros((rows, *actions), np.float32),
            np.zeros(rows, np.int64),
            np.zeros(rows, np.int64),
        )

    def begin(self, rows: np.ndarray, first: np.ndarray, seeds: Any) -> None:
        """Start anew in some rows."""
        self.first[rows], self.seed[rows], self.age[rows], self.actions[rows] = first, seeds, 0, 0.0

    def add(self, rows: np.ndarray, actions: np.ndarray) -> None:
        """Note a chunk (n, K, D) per row."""
        self.actions[rows, self.age[rows]] = actions
        self.age[rows] += 1
