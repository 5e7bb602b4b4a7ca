"""Stable-Baselines3's SAC, configured for the imagined and the simulated environment.

Additions: the memory of the replay buffer is reported and checked before allocation, the discount is per
action chunk instead of per action, and the buffer can be pre-filled with demonstrations.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3 import SAC
from stable_baselines3.common.vec_env import VecEnv

from wmpo_gym.algorithms.env_util import as_vec_env
from wmpo_gym.data.episode import Episode
from wmpo_gym.tasks import Task
from wmpo_gym.utils.memory import available_memory

logger = logging.getLogger(__name__)

STEP_DISCOUNT = 0.99  # per control step; a chunk of K steps is discounted by its K-th power
MEMORY_SHARE = 0.8  # largest fraction of the free memory for a replay buffer


def make_sac(
    env: Any,
    n_envs: int = 16,
    *,
    buffer_size: int = 20_000,
    policy_kwargs: dict[str, Any] | None = None,
    seed: int | None = None,
    **kwargs: Any,
) -> SAC:
    """Create a SAC model for the imagined or the simulated environment.

    Args:
        env: Environment id, ``VectorEnv`` of this package, or SB3 ``VecEnv``.
        n_envs: Number of rows if ``env`` is an id.
        buffer_size: Replay buffer capacity in transitions (action chunks); it stores every frame twice.
        policy_kwargs: Arguments of SB3's ``MultiInputPolicy``; by default 128 features and two layers of 256.
        seed: Random seed.
        **kwargs: Any argument of ``stable_baselines3.SAC``. These defaults differ from SB3's: ``train_freq``
            1, ``gradient_steps`` equal to the number of rows, ``learning_starts`` 500, and ``gamma`` 0.99
            per control step, that is 0.99 to the power of K per chunk.

    Raises:
        MemoryError: If the buffer does not fit into the free memory; the message names a size that fits.
    """
    env = as_vec_env(env, n_envs)
    check_buffer(env, buffer_size)
    settings: dict[str, Any] = {
        "train_freq": 1,
        "gradient_steps": env.num_envs,
        "learning_starts": 500,
        "gamma": STEP_DISCOUNT ** env.action_space.shape[0],
    }
    features = {"features_extractor_kwargs": {"cnn_output_dim": 128}, "net_arch": [256, 256]}
    return SAC(
        "MultiInputPolicy",
        env,
        buffer_size=buffer_size,
        policy_kwargs=features if policy_kwargs is None else policy_kwargs,
        seed=seed,
        **{**settings, **kwargs},
    )


# -- memory --------------------------------------------------------------------------------------------------
def buffer_bytes(observation_space: spaces.Space, action_space: spaces.Box, buffer_size: int) -> int:
    """Size in bytes of SB3's replay buffer: observation, next observation, action, reward, done, timeout."""
    parts = observation_space.values() if isinstance(observation_space, spaces.Dict) else [observation_space]
    observation = sum(_item_bytes(part) for part in parts)
    return buffer_size * (2 * observation + _item_bytes(action_space) + 3 * 4)


def _item_bytes(space: spaces.Space) -> int:
    sample = np.asarray(space.sample())
    return sample.size * sample.dtype.itemsize


def check_buffer(env: VecEnv, buffer_size: int) -> None:
    """Print the memory a replay buffer needs, and raise an error if it does not fit.

    Raises:
        MemoryError: If it needs more than four fifths of the free memory.
    """
    size, free = buffer_bytes(env.observation_space, env.action_space, buffer_size), available_memory()
    print(f"SAC's replay buffer of {buffer_size:,} transitions takes {size / 2**20:,.0f} MiB.")
    if free is not None and size > MEMORY_SHARE * free:
        fitting = int(buffer_size * MEMORY_SHARE * free / size)
        raise MemoryError(
            f"SAC's replay buffer of {buffer_size:,} transitions would take {size / 2**30:.1f} GiB, "
            f"{free / 2**30:.1f} GiB are free; buffer_size={fitting:,} would fit, or use smaller frames."
        )


# -- demonstrations ------------------------------------------------------------------------------------------
def add_demonstrations(model: SAC, episodes: Sequence[Episode], task: Task) -> int:
    """Add recorded episodes to the replay buffer, split into chunks; the reward is 1 at success.

    Args:
        model: Model created by :func:`make_sac`.
        episodes: Labelled episodes of the task.
        task: Defines the chunk length; an incomplete last chunk is padded with its last action.

    Returns:
        Number of transitions added. SB3 adds one transition per row at a time, so the last few may be left
        out.

    Raises:
        ValueError: If an episode has no label, or the environment's action space differs from the task's.
    """
    if model.action_space.shape != (task.chunk, task.action_dim):
        raise ValueError(
            f"The environment takes actions {model.action_space.shape}, the task {task.name!r} gives "
            f"{(task.chunk, task.action_dim)}."
        )
    if unlabelled := sum(e.success is None for e in episodes):
        raise ValueError(
            f"{unlabelled} of {len(episodes)} episodes have no success label; SAC needs rewards."
        )
    transitions = [t for episode in episodes for t in _transitions(episode, task)]
    rows = model.n_envs
    for i in range(0, len(transitions) - rows + 1, rows):
        frames, following, task_ids, actions, rewards, dones, infos = zip(
            *transitions[i : i + rows], strict=True
        )
        ids = np.array(task_ids)
        model.replay_buffer.add(
            _observations(frames, ids),
            _observations(following, ids),
            np.stack(actions),
            np.array(rewards, np.float32),
            np.array(dones),
            list(infos),
        )
    return len(transitions) // rows * rows


def _observations(frames: Sequence[np.ndarray], task_ids: np.ndarray) -> dict[str, np.ndarray]:
    # SB3 transposes images to channels-first before it stores them in the buffer.
    return {"pixels": np.stack(frames).transpose(0, 3, 1, 2), "task_id": task_ids}


def _transitions(episode: Episode, task: Task) -> list[tuple[Any, ...]]:
    """(frame, next frame, task id, chunk, reward, done, info) per chunk of an episode."""
    out, k = [], task.chunk
    for start in range(0, episode.n_steps, k):
        end = min(start + k, episode.n_steps)
        chunk = episode.actions[start:end]
        chunk = np.concatenate([chunk, np.repeat(chunk[-1:], k - len(chunk), axis=0)])
        last = end == episode.n_steps
        success = last and bool(episode.success)
        info = {"TimeLimit.truncated": last and not success}
        out.append(
            (episode.frames[start], episode.frames[end], episode.task_id, chunk, float(success), last, info)
        )
    return out
