"""Imagined episodes of full length, with nothing stopped at a claimed success."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from wmpo_gym.data.episode import Episode
from wmpo_gym.rollouts.policy_runner import Observation, acting, episode_seeds
from wmpo_gym.tasks import Task
from wmpo_gym.utils.progress import progress_bar
from wmpo_gym.world.rollout import Choose, imagine_rollouts, noise_per_row
from wmpo_gym.world.world import World

if TYPE_CHECKING:
    import torch

NEVER = -1  # as a step: it did not happen


@dataclass
class Imagined:
    """N full-horizon imagined episodes of T control steps.

    Attributes:
        task_ids: int64 (N,).
        actions: float32 (N, T, D).
        frames: uint8 (N, T+1, H, W, 3), the start frame first.
        probs: float32 (N, T+1), success probability per frame; NaN where the classifier's window is not full.
        claimed_step: int64 (N,), first frame whose probability reaches the threshold, or -1.
    """

    task_ids: np.ndarray
    actions: np.ndarray
    frames: np.ndarray
    probs: np.ndarray
    claimed_step: np.ndarray

    @property
    def claimed(self) -> np.ndarray:
        """Whether success was claimed, bool (N,)."""
        return self.claimed_step != NEVER


def imagine_full_horizon(
    world: World,
    policy: Any,
    frames: np.ndarray,
    task_ids: np.ndarray,
    *,
    seed: int = 0,
    deterministic: bool = False,
    start_state_ids: np.ndarray | None = None,
    batch_size: int = 64,
    progress: bool = False,
) -> Imagined:
    """Imagine episodes of a policy that go on after a claimed success.

    Args:
        world: World with a success classifier.
        policy: See :func:`~wmpo_gym.rollouts.policy_runner.acting`.
        frames: uint8 (N, H, W, 3) first frames.
        task_ids: int64 (N,) instructions.
        seed: Root seed of noise and sampling.
        deterministic: Greedy actions; the world's noise stays.
        start_state_ids: int64 (N,), to give an episode the same noise wherever it stands in the list.
        batch_size: Episodes imagined at once.
        progress: Show a progress bar.
    """
    seeds = episode_seeds(seed, np.arange(len(frames)) if start_state_ids is None else start_state_ids)
    with acting(policy, deterministic=deterministic, seed=seed) as act:

        def choose(obs: Observation, rows: np.ndarray, chunk: int) -> np.ndarray:
            return act(obs)

        return _imagine(world, choose, frames, task_ids, seeds, batch_size, progress)


def imagine_actions(
    world: World,
    actions: np.ndarray,
    frames: np.ndarray,
    task_ids: np.ndarray,
    *,
    seed: int = 0,
    batch_size: int = 64,
) -> Imagined:
    """Imagine what given actions (N, T, D) lead to; other arguments as :func:`imagine_full_horizon`."""
    task = world.task
    check_full_horizon(task, actions, len(frames))
    chunks = np.asarray(actions, np.float32).reshape(len(frames), task.n_chunks, task.chunk, task.action_dim)

    def choose(obs: Observation, rows: np.ndarray, chunk: int) -> np.ndarray:
        return chunks[rows, chunk]

    return _imagine(
        world, choose, frames, task_ids, episode_seeds(seed, np.arange(len(frames))), batch_size, False
    )


def imagine_episodes(
    world: World, episodes: Sequence[Episode], *, seed: int = 0
) -> tuple[Imagined, np.ndarray]:
    """Imagine recorded episodes from their first frames, and when each of them was over.

    Where an episode ended early its last action is repeated to the horizon; claims more than a chunk after
    the recorded end are dropped, because nothing is known about what would have happened then.

    Returns:
        The imagined episodes, and whether each recording succeeded, bool (N,).

    Raises:
        ValueError: If an episode is not labelled, or longer than the task's horizon.
    """
    task = world.task
    for i, episode in enumerate(episodes):
        if episode.success is None or not 0 < episode.n_steps <= task.horizon:
            raise ValueError(
                f"Episode {i} has {episode.n_steps} steps and success={episode.success}; judging a world "
                f"needs labelled episodes of 1 to {task.horizon} steps."
            )
    actions = np.stack(
        [np.pad(e.actions, ((0, task.horizon - e.n_steps), (0, 0)), mode="edge") for e in episodes]
    )
    frames, task_ids = np.stack([e.frames[0] for e in episodes]), np.array([e.task_id for e in episodes])
    imagined = imagine_actions(world, np.clip(actions, -1, 1), frames, task_ids, seed=seed)
    ends = np.array([e.n_steps for e in episodes])
    imagined.claimed_step[imagined.claimed_step > ends + task.chunk] = NEVER
    return imagined, np.array([bool(e.success) for e in episodes])


def imagine_frames(world: World, frames: np.ndarray, actions: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """Imagine what given actions lead to, without a success classifier.

    Args:
        world: The world; its classifier is not used.
        frames: uint8 (N, H, W, 3), first frames.
        actions: float32 (N, T, D), whole chunks.
        seed: Seed of the noise.

    Returns:
        uint8 (N, T+1, H, W, 3), the first frames included.
    """
    import torch

    imagination, generator = world.imagination(), torch.Generator().manual_seed(seed)
    chunks = np.split(actions, actions.shape[1] // world.task.chunk, axis=1)
    rollouts = imagine_rollouts(
        imagination,
        None,
        frames,
        np.zeros(len(frames), np.int64),
        lambda obs, rows, chunk: chunks[chunk][rows],
        lambda rows: torch.randn((len(rows), *imagination.noise_shape), generator=generator),
        len(chunks),
    )
    return np.concatenate([frames[:, None], *(chunk.frames for chunk in rollouts)], axis=1)


def imagined_replays(world: World, episodes: Sequence[Episode], *, seed: int = 0) -> list[Episode]:
    """Labelled episodes as the world imagines them: same start, actions, length and outcome, imagined frames.

    A success classifier that is trained on them beside the recordings learns what imagined frames look like.
    """
    if not episodes:
        return []
    horizon = world.task.horizon
    actions = np.stack([to_horizon(e.actions, horizon) for e in episodes])
    imagined = imagine_frames(world, np.stack([e.frames[0] for e in episodes]), actions, seed=seed)
    return [
        dataclasses.replace(e, frames=clip[: e.n_steps + 1], meta={**e.meta, "imagined": True})
        for e, clip in zip(episodes, imagined, strict=True)
    ]


def to_horizon(values: np.ndarray, length: int) -> np.ndarray:
    """Repeat the last entry up to a length."""
    return values[np.minimum(np.arange(length), len(values) - 1)]


def _imagine(
    world: World,
    choose: Choose,
    frames: np.ndarray,
    task_ids: np.ndarray,
    seeds: Sequence[int],
    batch_size: int,
    progress: bool,
) -> Imagined:
    import torch

    task, classifier, imagination = world.task, world.classifier, world.imagination()
    if classifier is None:
        raise ValueError("This world has no success classifier; train one with `wmpo train reward`.")
    task_ids, parts = np.asarray(task_ids), []
    with progress_bar(total=len(frames), desc="imagined episodes", disable=not progress) as bar:
        for first in range(0, len(frames), batch_size):
            batch = slice(first, min(first + batch_size, len(frames)))
            rollouts = imagine_rollouts(
                imagination,
                classifier,
                frames[batch],
                task_ids[batch],
                lambda obs, rows, chunk, first=first: choose(obs, first + rows, chunk),  # type: ignore[misc]
                noise_per_row(imagination, [torch.Generator().manual_seed(s) for s in seeds[batch]]),
                task.n_chunks,
            )
            columns = zip(*((c.actions, c.frames, c.probs) for c in rollouts), strict=True)
            parts.append([np.concatenate(column, axis=1) for column in columns])
            bar.update(batch.stop - batch.start)
    actions, clips, probs = (np.concatenate(column) for column in zip(*parts, strict=True))
    clips = np.concatenate([frames[:, None], clips], axis=1)
    probs = np.concatenate([np.full((len(frames), 1), np.nan, np.float32), probs], axis=1)
    # NaN compares as not reached: the window is not full yet.
    reached = probs >= classifier.threshold
    claimed = np.where(reached.any(axis=1), reached.argmax(axis=1), NEVER)
    return Imagined(task_ids, actions, clips, probs, claimed)


def device_of(world: World) -> torch.device:
    """Where the world's network is."""
    import torch

    parameter = next(world.network.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def check_full_horizon(task: Task, actions: np.ndarray, n: int) -> None:
    """Refuse actions that are not (n, T, D), finite and of full length."""
    expected, finite = (n, task.horizon, task.action_dim), np.isfinite(actions).all()
    if np.shape(actions) != expected or not finite:
        raise ValueError(
            f"A replay needs finite actions of shape {expected} for the full horizon, got {np.shape(actions)}"
            f"{'' if finite else ' with NaN'}. Actions cut off at an imagined success would make every early "
            "claim look false; use imagine_full_horizon."
        )
