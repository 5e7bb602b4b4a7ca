"""How good a world model's pictures are, step by step, and whether it obeys the actions.

Recorded episodes are imagined again from their first frame with their own actions, over their whole length,
and compared with the recording. No success classifier is needed, so that a world that is only pre-trained can
be judged too.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from wmpo_gym.data.episode import Episode
from wmpo_gym.evaluation.locate import object_error
from wmpo_gym.world.world import World

ROWS_AT_ONCE = 128  # episodes that the network imagines side by side; more would fill the memory
LEAST_SQUARED_ERROR = 1e-3  # of grey levels; keeps the PSNR of a perfect frame finite (78 dB)


def dream(world: World, frames: np.ndarray, actions: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """Imagine what actions lead to.

    Args:
        world: The world; its classifier is not used.
        frames: uint8 (N, H, W, 3), where to start.
        actions: float32 (N, T, D), whole chunks.
        seed: Seed of the noise.

    Returns:
        uint8 (N, T+1, H, W, 3), the start frames first.
    """
    import torch

    imagination, n = world.imagination(), len(frames)
    generator = torch.Generator().manual_seed(seed)
    # Never a batch of one: rows do not depend on their batch from two rows on.
    parts = [slice(i, j) for i, j in itertools.pairwise([*range(0, max(n - 1, 1), ROWS_AT_ONCE), n])]
    states, clips = [imagination.start(frames[part]) for part in parts], [frames[:, None]]
    for chunk in np.split(actions, actions.shape[1] // world.task.chunk, axis=1):
        noise = torch.randn((n, *imagination.noise_shape), generator=generator)
        made = []
        for i, part in enumerate(parts):
            pictures, states[i] = imagination.step(states[i], chunk[part], noise[part])
            made.append(pictures.cpu().numpy())
        clips.append(np.concatenate(made))
    return np.concatenate(clips, axis=1)


def world_quality(world: World, episodes: Sequence[Episode], *, seed: int = 0) -> dict[str, Any]:
    """Judge a world on recorded episodes that it was not trained on.

    Args:
        world: The world.
        episodes: At least one; labels are not used.
        seed: Seed of the imagination's noise.

    Returns:
        Lists over the control steps 1 to T, means over the episodes that last so long: ``psnr_db``, ``ssim``
        (Wang et al. 2004) and, where the task's object can be located, the median ``object_error_px``; and
        how much the picture changes, in grey levels, under ``different_actions`` and ``different_noise``.

    Raises:
        ValueError: If there is no episode, or one longer than the task's horizon.
    """
    task = world.task
    if not episodes or max(e.n_steps for e in episodes) > task.horizon:
        raise ValueError(
            f"Judging a world needs episodes of at most {task.horizon} steps; got {len(episodes)}."
        )
    actions = np.stack([_to_horizon(e.actions, task.horizon) for e in episodes])
    real = np.stack([_to_horizon(np.asarray(e.frames), task.horizon + 1) for e in episodes])
    made = dream(world, real[:, 0], actions, seed=seed)
    lasts = np.array([e.n_steps for e in episodes])[:, None] >= np.arange(1, task.horizon + 1)
    by_step = {
        "psnr_db": _psnr(made[:, 1:], real[:, 1:]),
        "ssim": _ssim(made[:, 1:], real[:, 1:]),
    }
    quality: dict[str, Any] = {"episodes": len(episodes)}
    for name, values in by_step.items():
        quality[name] = [
            float(v[m].mean()) if m.any() else None for v, m in zip(values.T, lasts.T, strict=True)
        ]
    errors = object_error(task, made, real, np.array([e.task_id for e in episodes]))
    if errors is not None:
        errors = np.where(lasts, errors[:, 1:], np.nan)
        quality["object_error_px"] = [
            float(np.nanmedian(column)) if np.isfinite(column).any() else None for column in errors.T
        ]
    return quality | _sensitivity(world, made, actions, seed)


def sampler_distance(world: World, other: World, episodes: Sequence[Episode], *, seed: int = 0) -> float:
    """How far two worlds' pictures of the same actions and the same noise are apart, in grey levels."""
    horizon = world.task.horizon
    first = np.stack([e.frames[0] for e in episodes])
    actions = np.stack([_to_horizon(e.actions, horizon) for e in episodes])
    ours, theirs = (dream(w, first, actions, seed=seed)[:, 1:].astype(np.int16) for w in (world, other))
    return float(np.abs(ours - theirs).mean())


def imagined_replays(world: World, episodes: Sequence[Episode], *, seed: int = 0) -> list[Episode]:
    """Labelled episodes as the world imagines them: same start, actions, length and outcome, imagined frames.

    A success classifier trained on them beside the recordings knows what imagination looks like.
    """
    if not episodes:
        return []
    horizon = world.task.horizon
    actions = np.stack([_to_horizon(e.actions, horizon) for e in episodes])
    made = dream(world, np.stack([e.frames[0] for e in episodes]), actions, seed=seed)
    return [
        dataclasses.replace(e, frames=clip[: e.n_steps + 1], meta={**e.meta, "imagined": True})
        for e, clip in zip(episodes, made, strict=True)
    ]


def moved_object_error(world: World, episodes: Sequence[Episode], *, seed: int = 0) -> float | None:
    """How far from its recorded place the named object ends in imagination, where the recording moved it.

    Args:
        world: The world; its classifier is not used.
        episodes: Recordings, of whom no labels are needed.
        seed: Seed of the imagination.

    Returns:
        Median over those episodes in pixels; None if there are none, or if objects cannot be located.
    """
    tolerance, errors = world.task.success_tolerance_px, []
    for imagined, recorded in zip(imagined_replays(world, episodes, seed=seed), episodes, strict=True):
        first, last, task_id = (
            recorded.frames[None, :1],
            recorded.frames[None, -1:],
            np.array([recorded.task_id]),
        )
        way = object_error(world.task, first, last, task_id)
        if way is None or tolerance is None:
            return None
        if way[0, 0] > tolerance:
            error = object_error(world.task, imagined.frames[None, -1:], last, task_id)
            assert error is not None  # the same task as above
            errors.append(error[0, 0])
    return float(np.nanmedian(errors)) if errors else None


def sample_video(world: World, episodes: Sequence[Episode], *, n: int = 6, seed: int = 0) -> np.ndarray:
    """Recordings (left) beside their imagination (right), one below the other.

    Returns:
        uint8 (T+1, n H + gaps, 2 W + gap, 3).
    """
    from wmpo_gym.report.video import side_by_side

    horizon = world.task.horizon
    chosen = episodes[:n]
    real = np.stack([_to_horizon(np.asarray(e.frames), horizon + 1) for e in chosen])
    actions = np.stack([_to_horizon(e.actions, horizon) for e in chosen])
    made = dream(world, real[:, 0], actions, seed=seed)
    rows = [
        np.pad(side_by_side(a, b), ((0, 0), (0, 2), (0, 0), (0, 0)), constant_values=255)
        for a, b in zip(real, made, strict=True)
    ]
    return np.concatenate(rows, axis=1)


def _to_horizon(values: np.ndarray, length: int) -> np.ndarray:
    """Repeat the last entry up to a length."""
    return values[np.minimum(np.arange(length), len(values) - 1)]


def _sensitivity(world: World, made: np.ndarray, actions: np.ndarray, seed: int) -> dict[str, float]:
    base = made.astype(np.int16)

    def change(other_actions: np.ndarray, other_seed: int) -> float:
        return float(
            np.abs(dream(world, made[:, 0], other_actions, seed=other_seed).astype(np.int16) - base).mean()
        )

    # Another episode's actions; a single episode is mirrored in action space instead.
    others = np.roll(actions, 1, axis=0) if len(actions) > 1 else -actions
    return {"different_actions": change(others, seed), "different_noise": change(actions, seed + 1)}


def _psnr(made: np.ndarray, real: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio in dB (N, T) of uint8 (N, T, H, W, 3)."""
    squared = np.square(made.astype(np.float32) - real).mean(axis=(2, 3, 4))
    return 10 * np.log10(255.0**2 / np.maximum(squared, LEAST_SQUARED_ERROR))


def _ssim(made: np.ndarray, real: np.ndarray) -> np.ndarray:
    """Structural similarity (N, T) of uint8 (N, T, H, W, 3)."""
    import torch
    from torchmetrics.functional.image import structural_similarity_index_measure

    pictures = [
        torch.from_numpy(x.reshape(-1, *x.shape[2:])).movedim(-1, 1).float() / 255 for x in (made, real)
    ]
    values = structural_similarity_index_measure(*pictures, data_range=1.0, reduction="none")
    return values.reshape(made.shape[:2]).numpy()
