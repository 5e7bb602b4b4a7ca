"""Metrics of imagined frames against recorded ones: PSNR, SSIM, object error, action sensitivity.

Recorded episodes are imagined from their first frame with the recorded actions, over their whole length, and
compared with the recording. No success classifier is needed, so a pre-trained world can be evaluated too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from wmpo_gym.data.episode import Episode
from wmpo_gym.envs.simulated import find_locator
from wmpo_gym.rollouts.imagined import imagine_actions, imagine_frames, imagined_replays, to_horizon
from wmpo_gym.tasks import Task
from wmpo_gym.world.world import World

LEAST_SQUARED_ERROR = 1e-3  # of grey levels; keeps the PSNR of a perfect frame finite (78 dB)

EPISODES_AT_ONCE = 32  # floating-point copies of more clips would fill the memory


def object_error(
    task: Task, imagined: np.ndarray, twin: np.ndarray, task_ids: np.ndarray
) -> np.ndarray | None:
    """Distance between the named object in two clips of the same actions.

    Args:
        task: Its simulator says how the object is located.
        imagined: uint8 (N, T, H, W, 3).
        twin: uint8 (N, T, H, W, 3).
        task_ids: int (N,).

    Returns:
        float64 (N, T) in pixels: the picture's width where imagination has lost the object, NaN where the
        twin does not show it either. None if nothing says how to locate the object of the task.
    """
    locate, task_ids = find_locator(task), np.asarray(task_ids)
    if locate is None:
        return None
    parts = [slice(i, i + EPISODES_AT_ONCE) for i in range(0, len(imagined), EPISODES_AT_ONCE)]
    here, there = (
        np.concatenate([locate(clips[part], task_ids[part]) for part in parts]) for clips in (imagined, twin)
    )
    error = np.linalg.norm(here - there, axis=-1)
    error[np.isnan(here).any(axis=-1)] = imagined.shape[-2]
    error[np.isnan(there).any(axis=-1)] = np.nan
    return error


def world_quality(world: World, episodes: Sequence[Episode], *, seed: int = 0) -> dict[str, Any]:
    """Evaluate a world model on recorded episodes that it was not trained on.

    Args:
        world: The world.
        episodes: At least one; labels are not used.
        seed: Seed of the imagination's noise.

    Returns:
        Lists over the control steps 1 to T, each a mean over the episodes of at least that length:
        ``psnr_db``, ``ssim`` (Wang et al. 2004) and, if the task's object can be located, the median
        ``object_error_px``; and the change of the frames in grey levels under ``different_actions`` and
        ``different_noise``.

    Raises:
        ValueError: If there is no episode, or an episode is longer than the task's horizon.
    """
    task = world.task
    if not episodes or max(e.n_steps for e in episodes) > task.horizon:
        raise ValueError(
            f"Judging a world needs episodes of at most {task.horizon} steps; got {len(episodes)}."
        )
    actions = np.stack([to_horizon(e.actions, task.horizon) for e in episodes])
    recorded = np.stack([to_horizon(np.asarray(e.frames), task.horizon + 1) for e in episodes])
    imagined = imagine_frames(world, recorded[:, 0], actions, seed=seed)
    lasts = np.array([e.n_steps for e in episodes])[:, None] >= np.arange(1, task.horizon + 1)
    by_step = {
        "psnr_db": psnr(imagined[:, 1:], recorded[:, 1:]),
        "ssim": _ssim(imagined[:, 1:], recorded[:, 1:]),
    }
    quality: dict[str, Any] = {"episodes": len(episodes)}
    for name, values in by_step.items():
        quality[name] = [
            float(v[m].mean()) if m.any() else None for v, m in zip(values.T, lasts.T, strict=True)
        ]
    errors = object_error(task, imagined, recorded, np.array([e.task_id for e in episodes]))
    if errors is not None:
        errors = np.where(lasts, errors[:, 1:], np.nan)
        quality["object_error_px"] = [
            float(np.nanmedian(column)) if np.isfinite(column).any() else None for column in errors.T
        ]
    return quality | _sensitivity(world, imagined, actions, seed)


def sampler_distance(world: World, other: World, episodes: Sequence[Episode], *, seed: int = 0) -> float:
    """Mean absolute difference of two worlds' clips for the same actions and noise, in grey levels."""
    horizon = world.task.horizon
    first = np.stack([e.frames[0] for e in episodes])
    actions = np.stack([to_horizon(e.actions, horizon) for e in episodes])
    ours, theirs = (imagine_frames(w, first, actions, seed=seed)[:, 1:] for w in (world, other))
    return change_of_frames(ours, theirs)


def moved_object_error(world: World, episodes: Sequence[Episode], *, seed: int = 0) -> float | None:
    """Final position error of the task's object, over the recordings in which the object was moved.

    Args:
        world: The world; its classifier is not used.
        episodes: Recordings; labels are not used.
        seed: Seed of the imagination's noise.

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
        moved = object_error(world.task, first, last, task_id)
        if moved is None or tolerance is None:
            return None
        if moved[0, 0] > tolerance:
            error = object_error(world.task, imagined.frames[None, -1:], last, task_id)
            assert error is not None  # the same task as above
            errors.append(error[0, 0])
    return float(np.nanmedian(errors)) if errors else None


def sample_video(world: World, episodes: Sequence[Episode], *, n: int = 6, seed: int = 0) -> np.ndarray:
    """Video of recordings (left) and their imagination (right), one episode per row.

    Returns:
        uint8 (T+1, n H + gaps, 2 W + gap, 3).
    """
    from wmpo_gym.utils.video import side_by_side

    horizon = world.task.horizon
    chosen = episodes[:n]
    recorded = np.stack([to_horizon(np.asarray(e.frames), horizon + 1) for e in chosen])
    actions = np.stack([to_horizon(e.actions, horizon) for e in chosen])
    imagined = imagine_frames(world, recorded[:, 0], actions, seed=seed)
    rows = [
        np.pad(side_by_side(a, b), ((0, 0), (0, 2), (0, 0), (0, 0)), constant_values=255)
        for a, b in zip(recorded, imagined, strict=True)
    ]
    return np.concatenate(rows, axis=1)


def change_of_frames(imagined: np.ndarray, other: np.ndarray) -> float:
    """Mean absolute difference in grey levels (0 to 255) of two uint8 arrays of one shape."""
    return float(np.abs(imagined.astype(np.int16) - other).mean())


def _sensitivity(world: World, imagined: np.ndarray, actions: np.ndarray, seed: int) -> dict[str, float]:
    def change(other_actions: np.ndarray, other_seed: int) -> float:
        return change_of_frames(
            imagine_frames(world, imagined[:, 0], other_actions, seed=other_seed), imagined
        )

    # Another episode's actions; with a single episode its negated actions.
    others = np.roll(actions, 1, axis=0) if len(actions) > 1 else -actions
    return {"different_actions": change(others, seed), "different_noise": change(actions, seed + 1)}


def action_sensitivity(
    world: World, actions: np.ndarray, frames: np.ndarray, task_ids: np.ndarray, *, seed: int = 0
) -> dict[str, float]:
    """Sensitivity of the frames to the actions, compared with the noise.

    Args:
        world: The world.
        actions: float (N, T, D); the different actions of an episode are those of the previous one.
        frames: uint8 (N, H, W, 3) start frames.
        task_ids: int64 (N,).
        seed: Seed of the noise.

    Returns:
        Mean absolute difference in grey levels (0 to 255) over all imagined frames under
        ``different_actions`` and under ``different_noise``, and their ratio ``action_sensitivity`` (infinite
        if noise changes nothing).
    """

    def imagine(chosen: np.ndarray, noise_seed: int) -> np.ndarray:
        return imagine_actions(world, chosen, frames, task_ids, seed=noise_seed).frames[:, 1:]

    base = imagine(actions, seed)
    by_actions = change_of_frames(imagine(np.roll(actions, 1, axis=0), seed), base)
    by_noise = change_of_frames(imagine(actions, seed + 1), base)
    return {
        "different_actions": by_actions,
        "different_noise": by_noise,
        "action_sensitivity": by_actions / by_noise if by_noise else float("inf"),
    }


def psnr(imagined: np.ndarray, recorded: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio in dB per frame, shape (...), of uint8 (..., H, W, 3)."""
    squared = np.square(imagined.astype(np.float32) - recorded).mean(axis=(-3, -2, -1))
    return 10 * np.log10(255.0**2 / np.maximum(squared, LEAST_SQUARED_ERROR))


def psnr_of_clips(imagined: Sequence[np.ndarray], recorded: Sequence[np.ndarray]) -> float:
    """Mean over clips of the PSNR in dB of a clip's mean squared error; uint8 (T, H, W, 3) each."""
    squared = [np.square(a.astype(float) - b).mean() for a, b in zip(imagined, recorded, strict=True)]
    return float(np.mean(10 * np.log10(255.0**2 / np.maximum(squared, LEAST_SQUARED_ERROR))))


def _ssim(imagined: np.ndarray, recorded: np.ndarray) -> np.ndarray:
    """Structural similarity (N, T) of uint8 (N, T, H, W, 3)."""
    import torch
    from torchmetrics.functional.image import structural_similarity_index_measure

    clips = [
        torch.from_numpy(x.reshape(-1, *x.shape[2:])).movedim(-1, 1).float() / 255
        for x in (imagined, recorded)
    ]
    values = structural_similarity_index_measure(*clips, data_range=1.0, reduction="none")
    return values.reshape(imagined.shape[:2]).numpy()
