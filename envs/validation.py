"""Validation of the arguments of the environments.

Nothing is modified: after a failed call all rows are in the state they had before, so one invalid action or
option does not lose the other rows of a batch.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode

from wmpo_gym.tasks import Task

ROUNDING = 1e-5  # tolerance by which an action may exceed [-1, 1]
OPTIONS = ("start_state_id", "reset_mask", "noise_seed", "start_frames", "task_id")


def parse_autoreset_mode(mode: str | AutoresetMode) -> AutoresetMode:
    """Accept an :class:`AutoresetMode`, its value (``"SameStep"``) or its name (``"SAME_STEP"``).

    Raises:
        ValueError: If it is none of these.
    """
    if isinstance(mode, AutoresetMode):
        return mode
    for candidate in AutoresetMode:
        if mode in (candidate.value, candidate.name):
            return candidate
    raise ValueError(f"Unknown autoreset_mode {mode!r}; choose one of {[m.name for m in AutoresetMode]}.")


def check_settings(
    num_envs: int,
    max_episode_steps: int | None,
    image_size: int | None,
    render_mode: str | None,
    render_modes: Sequence[str],
) -> None:
    """Validate constructor arguments.

    Raises:
        ValueError: If an argument is invalid; the message names it and the allowed values.
    """
    for name, value in (
        ("num_envs", num_envs),
        ("max_episode_steps", max_episode_steps),
        ("image_size", image_size),
    ):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    if render_mode not in (None, *render_modes):
        raise ValueError(
            f"Unknown render_mode {render_mode!r}; choose None or one of {', '.join(render_modes)}."
        )


def parse_seeds(seed: int | Sequence[int | None] | None, num_envs: int) -> list[int | None]:
    """Convert a ``seed`` argument to one seed per row, with the semantics of ``SyncVectorEnv``.

    Args:
        seed: None keeps every generator, an int s seeds row i with s + i, a sequence holds one int or None
            per row.
        num_envs: Number of rows.

    Raises:
        ValueError: If a seed is negative, not an integer, or the sequence has another length.
    """
    if seed is None:
        return [None] * num_envs
    if isinstance(seed, (int, np.integer)):
        seeds: list[Any] = [int(seed) + i for i in range(num_envs)]
    else:
        seeds = [int(s) if isinstance(s, np.integer) else s for s in seed]
    if len(seeds) != num_envs:
        raise ValueError(f"A sequence of seeds needs one per row: num_envs={num_envs}, got {len(seeds)}.")
    for row, s in enumerate(seeds):
        if s is not None and (not isinstance(s, int) or s < 0):
            raise ValueError(f"The seed of row {row} is {s!r}; give a non-negative integer or None.")
    return seeds


def check_actions(actions: Any, shape: tuple[int, int, int]) -> np.ndarray:
    """Validate actions and return them as float32, clipped to [-1, 1].

    Values that exceed the range by at most :data:`ROUNDING` are clipped, because affine wrappers such as
    ``RescaleAction`` round.

    Args:
        actions: Array-like of ``shape``, of any floating dtype.
        shape: ``(num_envs, chunk, action_dim)``.

    Raises:
        ValueError: On another shape or dtype, and on NaN, infinite or out-of-range values.
    """
    array = np.asarray(actions)
    if array.shape != shape:
        raise ValueError(
            f"Actions have shape {array.shape}; expected (num_envs, chunk, action_dim) = {shape}."
        )
    if array.dtype.kind != "f":
        raise ValueError(
            f"Actions have dtype {array.dtype}; expected float32 (cast with .astype(np.float32))."
        )
    allowed = np.abs(array) <= 1.0 + ROUNDING  # false for NaN too
    bad = np.flatnonzero(~allowed.all(axis=(1, 2))).tolist()
    if bad:
        row = bad[0]
        step, dim = (int(i) for i in np.argwhere(~allowed[row])[0])
        others = f" (rows with such values: {bad})" if len(bad) > 1 else ""
        raise ValueError(
            f"Action of row {row} is {float(array[row, step, dim])} at chunk step {step}, dimension {dim}"
            f"{others}; actions must be finite and within [-1, 1]: clip them first. No row was stepped."
        )
    return np.clip(array.astype(np.float32), -1.0, 1.0)


@dataclass(frozen=True)
class ResetOptions:
    """The ``options`` of a reset, checked and broadcast to one entry per row of the environment.

    Attributes:
        rows: Indices of the rows to reset, increasing.
        start_state_id: int64 ``(num_envs,)`` or None (drawn by each row's generator).
        noise_seed: int64 ``(num_envs,)`` or None (drawn by each row's generator).
        start_frames: uint8 ``(num_envs, H, W, 3)`` or None.
        task_id: int64 ``(num_envs,)`` or None; instruction index for ``start_frames``.
    """

    rows: np.ndarray
    start_state_id: np.ndarray | None = None
    noise_seed: np.ndarray | None = None
    start_frames: np.ndarray | None = None
    task_id: np.ndarray | None = None

    @classmethod
    def parse(cls, options: Mapping[str, Any] | None, num_envs: int, task: Task) -> ResetOptions:
        """Parse reset options without modifying the mapping, since outer wrappers read it again.

        Raises:
            ValueError: On an unknown key or a value of the wrong shape or range.
            TypeError: If ``reset_mask`` is not a boolean array.
        """
        options = options or {}
        for key in options:
            if key not in OPTIONS:
                near = difflib.get_close_matches(str(key), OPTIONS, n=1, cutoff=0.0)[0]
                raise ValueError(
                    f"Unknown reset option {key!r}; known: {', '.join(OPTIONS)}. Did you mean {near!r}?"
                )
        given = {key: value for key, value in options.items() if value is not None}
        seeds = _integers("noise_seed", given, num_envs)
        if seeds is not None and np.ndim(given["noise_seed"]) == 0:
            seeds = seeds + np.arange(num_envs)  # as for `seed`: rows of a group keep their own noise
        if seeds is not None and seeds.min() < 0:
            raise ValueError(f"options['noise_seed'] must not be negative, got {given['noise_seed']!r}.")
        task_id = _integers("task_id", given, num_envs)
        if task_id is not None:
            if "start_frames" not in given:
                raise ValueError(
                    "options['task_id'] goes with 'start_frames'; a start state fixes its instruction."
                )
            if task_id.min() < 0 or task_id.max() >= len(task.instructions):
                raise ValueError(
                    f"options['task_id'] is {given['task_id']!r}; {task.name!r} has the instructions "
                    f"{dict(enumerate(task.instructions))}."
                )
        return cls(
            rows=_masked_rows(given, num_envs),
            start_state_id=_integers("start_state_id", given, num_envs),
            noise_seed=seeds,
            start_frames=_frames(given, num_envs, task.image_size),
            task_id=task_id,
        )


def _masked_rows(given: Mapping[str, Any], num_envs: int) -> np.ndarray:
    if "reset_mask" not in given:
        return np.arange(num_envs)
    mask = given["reset_mask"]
    if not isinstance(mask, np.ndarray) or mask.dtype != np.bool_:
        found = f"dtype {mask.dtype}" if isinstance(mask, np.ndarray) else type(mask).__name__
        raise TypeError(f"options['reset_mask'] must be a NumPy array of dtype bool, got {found}.")
    if mask.shape != (num_envs,):
        raise ValueError(f"options['reset_mask'] must have shape ({num_envs},), got {mask.shape}.")
    if not mask.any():
        raise ValueError("options['reset_mask'] selects no row; set at least one entry to True.")
    return np.flatnonzero(mask)


def _integers(name: str, given: Mapping[str, Any], num_envs: int) -> np.ndarray | None:
    if name not in given:
        return None
    array = np.asarray(given[name])
    if array.dtype.kind not in "iu" or array.shape not in ((), (num_envs,)):
        raise ValueError(
            f"options[{name!r}] must be an integer or an integer array of shape ({num_envs},), got "
            f"{given[name]!r}."
        )
    return np.broadcast_to(array, (num_envs,)).astype(np.int64)


def _frames(given: Mapping[str, Any], num_envs: int, size: int) -> np.ndarray | None:
    if "start_frames" not in given:
        return None
    frames = np.asarray(given["start_frames"])
    single = (size, size, 3)
    if frames.dtype != np.uint8 or frames.shape not in (single, (num_envs, *single)):
        raise ValueError(
            f"options['start_frames'] must be uint8 of shape {single} or {(num_envs, *single)}, "
            f"got {frames.dtype} of shape {frames.shape}."
        )
    return np.broadcast_to(frames, (num_envs, *single))
