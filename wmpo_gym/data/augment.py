"""Data augmentation: symmetries of a task, and random image shifts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Symmetry:
    """A transformation of frames, actions and instructions that maps valid episodes of a task to valid ones.

    Attributes:
        name: Short name.
        flip: ``"vertical"`` mirrors image rows, ``"horizontal"`` mirrors image columns, None neither.
        action_signs: Factor (1 or -1) per action dimension.
        channel_order: Permutation of the RGB channels.
        instruction_order: ``instruction_order[i]`` is the task id that instruction i is mapped to.
    """

    name: str
    action_signs: tuple[float, ...]
    instruction_order: tuple[int, ...]
    flip: str | None = None
    channel_order: tuple[int, int, int] = (0, 1, 2)


def transform_frames(symmetry: Symmetry, frames: np.ndarray) -> np.ndarray:
    """Flip frames ``(..., H, W, 3)`` and permute their channels; the result may be a view."""
    if symmetry.flip is not None:
        frames = np.flip(frames, -3 if symmetry.flip == "vertical" else -2)
    order = list(symmetry.channel_order)
    return frames if order == [0, 1, 2] else frames[..., order]


def transform_actions(symmetry: Symmetry, actions: np.ndarray) -> np.ndarray:
    """Transform actions, float32 ``(..., D)``, by a symmetry."""
    return actions * np.array(symmetry.action_signs, np.float32)


def transform_task_ids(symmetry: Symmetry, task_ids: np.ndarray) -> np.ndarray:
    """Transform task ids, int64 ``(...)``, by a symmetry."""
    return np.array(symmetry.instruction_order, np.int64)[task_ids]


def transform_rows(
    transform: Callable[[Symmetry, np.ndarray], np.ndarray],
    symmetry: Symmetry,
    values: np.ndarray,
    chosen: np.ndarray,
) -> np.ndarray:
    """Apply one of the functions above to some rows of a batch.

    Args:
        transform: :func:`transform_frames`, :func:`transform_actions` or :func:`transform_task_ids`.
        symmetry: The symmetry.
        values: ``(B, ...)``.
        chosen: bool ``(B,)``, the rows to transform.

    Returns:
        A new array.
    """
    changed = values.copy()
    changed[chosen] = transform(symmetry, values[chosen])
    return changed


def shift_images(images: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Shift every image of a batch, with edge padding.

    Args:
        images: ``(B, H, W, 3)``.
        offsets: int ``(2, B)``, pixels along the rows and the columns.

    Returns:
        A new array.
    """
    n, height, width = images.shape[:3]
    rows = np.clip(np.arange(height) + offsets[0, :, None], 0, height - 1)
    columns = np.clip(np.arange(width) + offsets[1, :, None], 0, width - 1)
    return images[np.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]
