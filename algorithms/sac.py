"""Stable-Baselines3's SAC on the imagined and the simulated environment; no algorithm of our own.

What is added: a replay buffer whose memory is stated and checked before it is taken, a discount per action
chunk instead of per action, and demonstrations put into the buffer before training.
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
MEMORY_SHARE = 0.8  # of the free memory that a replay buffer may take


def make_sac(
    env: Any,
    n_envs: int = 16,
    *,
    buffer_size: int = 20_000,
    policy_kwargs: dict[str, Any] | None = None,
    seed: int | None = None,
    **kwargs: Any,
) -> SAC:
    """A SAC for either environment.

    Args:
        env: Environment id, ``VectorEnv`` of this package, or SB3 ``VecEnv``.
        n_envs: Rows, if ``env`` is an id.
        buffer_size: Transitions (action chunks) the replay buffer holds; it stores every frame twice.
        policy_kwargs: Of SB3's ``MultiInputPolicy``; by default 128 features and two layers of 256.
        seed: Seed of everything.
        **kwargs: Any argument of ``stable_baselines3.SAC``; these defaults differ from its own:
            ``train_freq`` 1, ``gradient_steps`` as many as rows, ``learning_starts`` 500, and ``gamma``
            0.99 per control step, that is 0.99 to the power of K per chunk.

    Raises:
        MemoryError: If the buffer would not fit into the free memory; names the size that would.
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
    """Memory of SB3's replay buffer: observation and next observation, action, reward, done, timeout."""
    parts = observation_space.values() if isinstance(observation_space, spaces.Dict) else [observation_space]
    seen = sum(_item_bytes(part) for part in parts)
    return buffer_size * (2 * seen + _item_bytes(action_space) + 3 * 4)


def _item_bytes(space: spaces.Space) -> int:
    sample = np.asarray(space.sample())
    return sample.size * sample.dtype.itemsize


def check_buffer(env: VecEnv, buffer_size: int) -> None:
    """State what a replay buffer will take, and refuse one that would not fit.

    Raises:
        MemoryError: If it would take more than four fifths of the free memory.
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
    """Put recorded episodes into the replay buffer, cut into chunks; the reward is 1 at a success.

    Args:
        model: Made by :func:`make_sac`.
        episodes: Labelled episodes of the task.
        task: Gives the chunk length; a last chunk that is not full is filled with its last action.

    Returns:
        Transitions added. SB3 adds as many at a time as there are rows, so the last few may be left out.

    Raises:
        ValueError: If an episode has no label or the environment's action space is not that of the task.
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
    # SB3 turns pictures into channels-first before they reach the buffer.
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
