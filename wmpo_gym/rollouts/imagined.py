"""Imagined episodes of full length, with nothing stopped at a claimed success."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from wmpo_gym.data.episode import Episode
from wmpo_gym.rollouts.policy_runner import Observation, acting, episode_seeds
from wmpo_gym.tasks import Task
from wmpo_gym.utils.progress import progress_bar
from wmpo_gym.world.world import World

if TYPE_CHECKING:
    import torch

NEVER = -1  # as a step: it did not happen
Choose = Callable[[Observation, slice, int], np.ndarray]


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

        def choose(obs: Observation, rows: slice, chunk: int) -> np.ndarray:
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

    def choose(obs: Observation, rows: slice, chunk: int) -> np.ndarray:
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

    task = world.task
    if world.classifier is None:
        raise ValueError("This world has no success classifier; train one with `wmpo train reward`.")
    parts = []
    with (
        torch.no_grad(),
        progress_bar(total=len(frames), desc="imagined episodes", disable=not progress) as bar,
    ):
        for i in range(0, len(frames), batch_size):
            rows = slice(i, min(i + batch_size, len(frames)))
            parts.append(_imagine_batch(world, choose, frames[rows], task_ids[rows], seeds[rows], rows))
            bar.update(rows.stop - rows.start)
    actions, clips, probs = (np.concatenate(column) for column in zip(*parts, strict=True))
    # NaN compares as not reached: the window is not full yet.
    reached = probs >= world.classifier.threshold
    claimed = np.where(reached.any(axis=1), reached.argmax(axis=1), NEVER)
    return Imagined(
        np.asarray(task_ids), actions.reshape(len(frames), task.horizon, -1), clips, probs, claimed
    )


def _imagine_batch(
    world: World, choose: Choose, frames: np.ndarray, task_ids: np.ndarray, seeds: Sequence[int], rows: slice
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Actions (n, chunks, K, D), frames (n, T+1, H, W, 3) and probabilities (n, T+1) of one batch."""
    import torch

    imagination: Any = world.imagination()
    classifier: Any = world.classifier
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    first = torch.as_tensor(frames, device=device_of(world))
    dream, judge = imagination.start(first), classifier.start(first)
    clips, probs = [frames[:, None]], [np.full((len(frames), 1), np.nan, np.float32)]
    actions = []
    for chunk in range(world.task.n_chunks):
        actions.append(choose({"pixels": clips[-1][:, -1], "task_id": np.asarray(task_ids)}, rows, chunk))
        noise = torch.stack([torch.randn(imagination.noise_shape, generator=g) for g in generators])
        made, dream = imagination.step(dream, actions[-1], noise)
        scores, judge = classifier.update(judge, made, task_ids)
        clips.append(made.cpu().numpy())
        probs.append(scores.cpu().numpy())
    return np.stack(actions, axis=1), np.concatenate(clips, axis=1), np.concatenate(probs, axis=1)


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
