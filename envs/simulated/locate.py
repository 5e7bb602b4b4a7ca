"""The named object in a frame, located alike in imagined and in simulated frames."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

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
