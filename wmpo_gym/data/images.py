"""Image resizing."""

from __future__ import annotations

import numpy as np


def resize_area(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize images ``(..., H, W, 3)`` uint8 to ``(..., height, width, 3)``; always a new array.

    Integer upscaling repeats pixels; any other size averages areas. The aspect ratio is not kept, as in the
    training data of OpenVLA.
    """
    rows, columns = frames.shape[-3:-1]
    if height % rows == 0 and width % columns == 0:
        return frames.repeat(height // rows, axis=-3).repeat(width // columns, axis=-2)
    lead = frames.shape[:-3]
    lines = _overlaps(rows, height) @ frames.reshape(*lead, rows, columns * 3).astype(np.float64)
    resized = _overlaps(columns, width) @ lines.reshape(*lead, height, columns, 3)
    return np.rint(resized).astype(np.uint8)


def _overlaps(before: int, after: int) -> np.ndarray:
    """Share of each input pixel in each output pixel, ``(after, before)``; rows add up to 1."""
    edges = np.arange(after + 1) * (before / after)
    pixels = np.arange(before)
    overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return np.clip(overlap, 0.0, None) * (after / before)
