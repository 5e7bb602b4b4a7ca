"""One recorded or imagined episode."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from wmpo_gym.data.frames import FrameArray, StoredFrames


@dataclass
class Episode:
    """Frames, actions and outcome of one episode.

    Attributes:
        frames: RGB observations, uint8 (T+1, H, W, 3); frame t precedes action t. An array, or
            :class:`~wmpo_gym.data.frames.StoredFrames` with the same indexing, read from disk.
        actions: Normalised actions, float32 (T, D), finite, usually within [-1, 1].
        success: Whether the task succeeded; None for unlabelled play.
        finish_step: Index of the last frame, equal to T.
        start_state_id: Id of the task's start state; None if the episode has another start.
        task_id: Index of the instruction in the task's list.
        instruction: The instruction.
        meta: JSON-able metadata (policy, seed, control frequency ...).
        proprio: Proprioception (joint angles, end-effector position ...), float32 (T+1, P), one row per
            frame; None if it was not recorded.
    """

    frames: FrameArray
    actions: np.ndarray
    success: bool | None
    finish_step: int
    start_state_id: int | None
    task_id: int
    instruction: str
    meta: dict[str, Any] = field(default_factory=dict)
    proprio: np.ndarray | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.frames, StoredFrames):
            self.frames = np.asarray(self.frames)
        self.actions = np.asarray(self.actions)
        for fault in self._faults():
            raise ValueError(f"Not a valid episode: {fault}.")
        self.success = None if self.success is None else bool(self.success)
        self.finish_step, self.task_id = int(self.finish_step), int(self.task_id)
        self.start_state_id = None if self.start_state_id is None else int(self.start_state_id)

    def _faults(self) -> list[str]:
        f, a, faults = self.frames, self.actions, []
        if f.dtype != np.uint8 or f.ndim != 4 or f.shape[-1] != 3 or 0 in f.shape:
            faults.append(f"frames must be uint8 (T+1, H, W, 3), got {f.dtype} {f.shape}")
        if a.dtype != np.float32 or a.ndim != 2:
            faults.append(f"actions must be float32 (T, D), got {a.dtype} {a.shape}")
        elif not np.isfinite(a).all():
            step, dim = np.argwhere(~np.isfinite(a))[0]
            faults.append(f"actions must be finite, got {a[step, dim]} at step {step}, dimension {dim}")
        if len(f) != len(a) + 1:
            faults.append(f"{len(a)} actions need {len(a) + 1} frames, got {len(f)}")
        p = self.proprio
        if p is not None and (p.dtype != np.float32 or p.ndim != 2 or len(p) != len(f) or not p.size):
            faults.append(f"proprio must be float32 ({len(f)}, P), a row per frame, got {p.dtype} {p.shape}")
        elif p is not None and not np.isfinite(p).all():
            step, dim = np.argwhere(~np.isfinite(p))[0]
            faults.append(f"proprio must be finite, got {p[step, dim]} at frame {step}, number {dim}")
        if self.finish_step != len(a):
            faults.append(f"finish_step must be the last frame, {len(a)}, got {self.finish_step}")
        if self.success not in (True, False, None):
            faults.append(f"success must be True, False or None, got {self.success!r}")
        if self.task_id < 0 or (self.start_state_id is not None and self.start_state_id < 0):
            faults.append(f"ids must be >= 0, got {self.task_id=}, {self.start_state_id=}")
        return faults

    @property
    def n_steps(self) -> int:
        """Number of actions, T."""
        return len(self.actions)

    @property
    def state_dim(self) -> int:
        """Size of the proprioception vector, P; 0 if it was not recorded."""
        return 0 if self.proprio is None else self.proprio.shape[1]
