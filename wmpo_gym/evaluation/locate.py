"""Where the named object is in a picture, measured alike in imagined and in simulated frames."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from wmpo_gym.tasks import Task

Locator = Callable[[np.ndarray, np.ndarray], np.ndarray]

MARGIN = 30.0  # grey levels by which a block's channel must exceed the others; below is blur and noise
LEAST_AREA = 3.0  # pixels' worth of full colour below which a block counts as gone
FULL_COLOUR = 140.0  # excess of a pixel that a block covers entirely, after the margin


def locate_coloured_block(frames: np.ndarray, task_ids: np.ndarray) -> np.ndarray:
    """Centre of the named block by its colour: of ``move-block``, or the red cube of the arm's tasks.

    The excess of a channel over the two others is proportional to the share of the pixel that the block
    covers, so its centre of mass is exact to a few hundredths of a pixel. The tool hides the same part of the
    block in both kinds of frame, so its bias cancels in a comparison.

    Args:
        frames: uint8 (N, ..., H, W, 3).
        task_ids: int (N,); 0 names the red one, 1 the blue one.

    Returns:
        float64 (N, ..., 2), continuous pixels (column, row); NaN where the block is not to be seen.
    """
    pixels = frames.astype(np.float32)
    channel = np.where(np.asarray(task_ids) == 0, 0, 2).reshape(-1, *[1] * (frames.ndim - 1))
    colour = np.take_along_axis(pixels, channel, axis=-1)[..., 0]
    opposite = np.take_along_axis(pixels, 2 - channel, axis=-1)[..., 0]
    mass = np.clip(colour - np.maximum(opposite, pixels[..., 1]) - MARGIN, 0.0, None).astype(np.float64)
    total = mass.sum(axis=(-2, -1))
    rows, cols = (np.arange(n) + 0.5 for n in mass.shape[-2:])
    with np.errstate(invalid="ignore", divide="ignore"):
        centre = np.stack([(mass.sum(axis=-2) * cols).sum(-1), (mass.sum(axis=-1) * rows).sum(-1)], axis=-1)
        centre = centre / total[..., None]
    centre[total < LEAST_AREA * FULL_COLOUR] = np.nan
    return centre


LOCATORS: dict[str, Locator] = {
    name: locate_coloured_block for name in ("move-block", "lift", "lift-close", "stack", "stack-three")
}
EPISODES_AT_ONCE = 32  # floating-point copies of more clips would fill the memory


def object_error(
    task: Task, imagined: np.ndarray, twin: np.ndarray, task_ids: np.ndarray
) -> np.ndarray | None:
    """Distance between the named object in two clips of the same actions.

    Args:
        task: Names the locator in :data:`LOCATORS`.
        imagined: uint8 (N, T, H, W, 3).
        twin: uint8 (N, T, H, W, 3).
        task_ids: int (N,).

    Returns:
        float64 (N, T) in pixels: the picture's width where imagination has lost the object, NaN where the
        twin does not show it either. None if the task has no locator.
    """
    if task.base_name not in LOCATORS:
        return None
    locate, task_ids = LOCATORS[task.base_name], np.asarray(task_ids)
    parts = [slice(i, i + EPISODES_AT_ONCE) for i in range(0, len(imagined), EPISODES_AT_ONCE)]
    here, there = (
        np.concatenate([locate(clips[part], task_ids[part]) for part in parts]) for clips in (imagined, twin)
    )
    error = np.linalg.norm(here - there, axis=-1)
    error[np.isnan(here).any(axis=-1)] = imagined.shape[-2]
    error[np.isnan(there).any(axis=-1)] = np.nan
    return error
