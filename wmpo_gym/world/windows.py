"""Training windows: the frames a world model sees, those it predicts, and the actions in between.

Frame i of an episode is the observation after i actions. The window that starts at step s has the context
frames s - H + 1 .. s, the predicted frames s + 1 .. s + K and the actions s .. s + K - 1, so that predicted
frame k is where action k has led. Context before the episode's first frame is that frame again, as if the
robot had stood still; this is also how imagination starts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class Windows:
    """N windows of one episode.

    Attributes:
        frames: uint8 ``(N, H + K, height, width, 3)``, context first.
        actions: float32 ``(N, K, D)``.
        prev_action: float32 ``(N, D)``, the action that led to the last context frame; zeros at the start.
    """

    frames: NDArray[np.uint8]
    actions: NDArray[np.float32]
    prev_action: NDArray[np.float32]


def window_indices(
    finish_step: int, *, context_frames: int, chunk: int, stride: int = 1
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which frames and actions belong to each window of an episode.

    Args:
        finish_step: Index of the last frame to use. (The release takes one less on its real-robot data.)
        context_frames: H.
        chunk: K.
        stride: Steps between the starts of two windows.

    Returns:
        Frame indices ``(N, H + K)`` and action indices ``(N, K)``, where N is ``finish_step - chunk + 1`` at
        stride 1, and 0 for an episode shorter than a chunk.

    Raises:
        ValueError: If there is no context, no chunk or no stride.
    """
    for name, value in (("context_frames", context_frames), ("chunk", chunk), ("stride", stride)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    starts = np.arange(0, max(finish_step - chunk + 1, 0), stride, dtype=np.int64)[:, None]
    frames = starts + np.arange(1 - context_frames, chunk + 1)
    return np.maximum(frames, 0), starts + np.arange(chunk)


def cut_windows(
    frames: NDArray[np.uint8],
    actions: NDArray[np.float32],
    finish_step: int | None = None,
    *,
    context_frames: int,
    chunk: int,
    stride: int = 1,
) -> Windows:
    """Cut an episode into windows.

    Args:
        frames: uint8 ``(T + 1, height, width, 3)``.
        actions: float32 ``(T, D)`` in [-1, 1]; see :func:`normalise_actions`.
        finish_step: Index of the last frame to use; None for the last there is.
        context_frames: H.
        chunk: K.
        stride: Steps between the starts of two windows.

    Raises:
        ValueError: If frames or actions are missing. The published code cuts such an episode all the same,
            into windows whose last one is a frame short.
    """
    finish_step = len(actions) if finish_step is None else finish_step
    if len(frames) < finish_step + 1 or len(actions) < finish_step:
        raise ValueError(
            f"finish_step {finish_step} takes {finish_step + 1} frames and {finish_step} actions, got "
            f"{len(frames)} and {len(actions)}; leave the episode out or lower finish_step."
        )
    in_frames, in_actions = window_indices(
        finish_step, context_frames=context_frames, chunk=chunk, stride=stride
    )
    before = np.concatenate([np.zeros_like(actions[:1]), actions])  # before[s] led to frame s
    return Windows(frames[in_frames], actions[in_actions], before[in_actions[:, 0]])


def normalise_actions(actions: ArrayLike, low: ArrayLike, high: ArrayLike) -> NDArray[np.float32]:
    """Map actions to [-1, 1] by their 1 % and 99 % quantiles (or their least and greatest values).

    ``2 * (a - low) / (high - low) - 1`` in every dimension. Not clipped: what lies outside the quantiles lies
    outside [-1, 1].

    Args:
        actions: ``(..., D)``.
        low: ``(D,)``, which becomes -1.
        high: ``(D,)``, which becomes 1.

    Raises:
        ValueError: If a dimension has no range, naming it.
    """
    actions, low, high = (np.asarray(x, dtype=np.float32) for x in (actions, low, high))
    flat = np.flatnonzero(~(high > low))  # written so that NaN is caught too
    if flat.size:
        d = int(flat[0])
        raise ValueError(
            f"Action dimension {d} has no range to normalise by: low {low[d]}, high {high[d]}. If it never "
            "moves, drop it or give it the limits of the robot."
        )
    return 2 * (actions - low) / (high - low) - 1
