"""Training examples of a policy: the observation at a control step and the following actions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from wmpo_gym.data.augment import (
    Symmetry,
    shift_images,
    transform_actions,
    transform_frames,
    transform_rows,
    transform_task_ids,
)
from wmpo_gym.data.episode import Episode
from wmpo_gym.data.frames import FrameLoader


@dataclass
class Windows:
    """Some training examples.

    Attributes:
        pixels: uint8 ``(B, H, W, 3)``, what was seen.
        task_id: int64 ``(B,)``.
        actions: float32 ``(B, K, D)``, what was done next; zero where the episode had ended.
        mask: bool ``(B, K)``, True where an action was recorded.
    """

    pixels: torch.Tensor
    task_id: torch.Tensor
    actions: torch.Tensor
    mask: torch.Tensor

    def __len__(self) -> int:
        return len(self.pixels)

    def rows(self, index: Any) -> Windows:
        """Some of the examples."""
        return Windows(self.pixels[index], self.task_id[index], self.actions[index], self.mask[index])


@dataclass(frozen=True)
class Draw:
    """Example indices and augmentation of a batch of size B.

    Attributes:
        index: int64 ``(B,)`` numbers of the examples.
        symmetries: bool ``(S, B)``, which of the S symmetries are applied to each.
        offsets: int64 ``(2, B)``, by how many pixels the images are shifted; None for not at all.
    """

    index: np.ndarray
    symmetries: np.ndarray
    offsets: np.ndarray | None


class WindowDataset:
    """Every control step of every episode as one training example; images are read when they are drawn.

    Args:
        episodes: Demonstrations, failures included.
        chunk: Actions per decision (K); the last K-1 examples of an episode are shorter and masked.
        workers: Threads that read frames from disk, see :class:`~wmpo_gym.data.frames.FrameLoader`.

    Raises:
        ValueError: If there is no action in any episode.
    """

    def __init__(self, episodes: Sequence[Episode], chunk: int, *, workers: int = 2) -> None:
        self.episodes, self.chunk = [e for e in episodes if e.n_steps], chunk
        if not self.episodes:
            raise ValueError(
                "No demonstrations to learn from: the episodes hold no action. Collect some first."
            )
        steps = np.array([e.n_steps for e in self.episodes])
        self._end = np.cumsum(steps)
        self._first = self._end - steps
        self.task_ids = np.array([e.task_id for e in self.episodes], np.int64)  # of each episode
        self._loader = FrameLoader(workers)

    def __len__(self) -> int:
        return int(self._end[-1])

    def rows(self, index: np.ndarray) -> Windows:
        """The examples of these numbers, int ``(B,)``."""
        return _tensors(*self._read(index))

    def draw(self, draw: Draw, symmetries: Sequence[Symmetry]) -> Windows:
        """An augmented batch.

        Args:
            draw: Which examples, and how they are varied.
            symmetries: The S symmetries it speaks of.
        """
        pixels, task_id, actions, mask = self._read(draw.index)
        for symmetry, chosen in zip(symmetries, draw.symmetries, strict=True):
            pixels = transform_rows(transform_frames, symmetry, pixels, chosen)
            task_id = transform_rows(transform_task_ids, symmetry, task_id, chosen)
            actions = transform_rows(transform_actions, symmetry, actions, chosen)
        if draw.offsets is not None:
            pixels = shift_images(pixels, draw.offsets)
        return _tensors(pixels, task_id, actions, mask)

    def _read(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        owner = np.searchsorted(self._end, index, side="right")
        step = index - self._first[owner]
        chosen = [self.episodes[i] for i in owner]
        frames = self._loader.read([(e.frames, np.array([s])) for e, s in zip(chosen, step, strict=True)])
        steps = step[:, None] + np.arange(self.chunk)
        mask = steps < np.array([e.n_steps for e in chosen])[:, None]
        actions = np.zeros((*steps.shape, chosen[0].actions.shape[1]), np.float32)
        for row, episode in enumerate(chosen):
            actions[row, mask[row]] = episode.actions[steps[row, mask[row]]]
        return np.concatenate(frames), self.task_ids[owner], actions, mask


def draws(n: int, batch: int, *, n_symmetries: int, shift: int, rng: np.random.Generator) -> Iterator[Draw]:
    """Endless shuffled batches; every example is drawn once before any is drawn again.

    Args:
        n: Number of examples.
        batch: Examples per batch.
        n_symmetries: Symmetries S; each is applied to a random half of the batch.
        shift: Largest shift of an image in pixels; 0 for none.
        rng: Random generator.
    """
    order = np.empty(0, np.int64)
    while True:
        while len(order) < batch:
            order = np.concatenate([order, rng.permutation(n)])
        index, order = order[:batch], order[batch:]
        symmetries = np.array([rng.random(batch) < 0.5 for _ in range(n_symmetries)]).reshape(-1, batch)
        offsets = rng.integers(-shift, shift + 1, (2, batch)) if shift else None
        yield Draw(index, symmetries, offsets)


def _tensors(*arrays: np.ndarray) -> Windows:
    return Windows(*map(torch.from_numpy, arrays))
