"""Single environment: a wrapper around a batch of one row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import gymnasium
import numpy as np
from gymnasium.utils import EzPickle

from wmpo_gym.envs.base import ResumablePickle
from wmpo_gym.tasks import Task


def _of_batch(name: str, doc: str) -> property:
    """Property that forwards to the attribute ``name`` of the wrapped batch."""

    def read(self: ChunkEnv) -> Any:
        return getattr(self._batch, name)

    def write(self: ChunkEnv, value: Any) -> None:
        setattr(self._batch, name, value)

    return property(read, write, doc=doc)


class ChunkEnv(ResumablePickle, gymnasium.Env):
    """Single Gymnasium environment backed by one row of :attr:`vector_class`.

    Args:
        task: As for :attr:`vector_class`.
        **kwargs: As for :attr:`vector_class`, without ``num_envs``, ``autoreset_mode`` and ``skip_finished``.
    """

    vector_class: ClassVar[type]
    metadata: dict[str, Any] = {"render_modes": ["rgb_array", "rgb_array_list"], "render_fps": 10}

    def __init__(self, task: str | Task | None = None, **kwargs: Any) -> None:
        EzPickle.__init__(self, task, **kwargs)
        self._batch = self.vector_class(1, task, autoreset_mode="DISABLED", **kwargs)
        self.observation_space = self._batch.single_observation_space
        self.action_space = self._batch.single_action_space
        self.render_mode = self._batch.render_mode
        self.metadata = {k: v for k, v in self._batch.metadata.items() if k != "autoreset_mode"}

    ledger = _of_batch("ledger", "Budget spent, a :class:`Ledger`.")
    started = _of_batch("started", "Whether there has been a reset.")
    task = _of_batch("task", "Name of the task.")
    task_spec = _of_batch("task_spec", "The :class:`Task`.")
    instructions = _of_batch("instructions", "The instructions; ``task_id`` indexes them.")
    start_state_ids = _of_batch("start_state_ids", "Ids that the reset option ``start_state_id`` accepts.")
    split = _of_batch("split", "Split that start states are drawn from; None draws from all.")
    reward_weights = _of_batch("reward_weights", "Weight of each reward term.")
    max_episode_steps = _of_batch("max_episode_steps", "Chunks after which an episode is truncated.")
    _max_episode_steps = _of_batch("max_episode_steps", "The same under the name LeRobot reads.")

    @property
    def task_description(self) -> str:
        """Instruction of the current episode."""
        return self._batch.task_description[0]

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Begin a new episode; see the batched environment for the options."""
        super().reset(seed=seed)
        self._batch.adopt_generator(0, self.np_random, self.np_random_seed)
        obs, infos = self._batch.reset(options=options)
        return self._first(obs), self._first_info(infos)

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Execute one action chunk ``(K, D)``.

        Raises:
            ValueError: If the action is not finite, out of range or has another shape or dtype.
            FinishedRowError: If the episode is over; call ``reset``.
        """
        if np.shape(action) != self.action_space.shape:
            raise ValueError(
                f"The action has shape {np.shape(action)}; expected (chunk, action_dim) = "
                f"{self.action_space.shape}."
            )
        obs, rewards, terminations, truncations, infos = self._batch.step(np.asarray(action)[None])
        info = self._first_info(infos)
        return self._first(obs), float(rewards[0]), bool(terminations[0]), bool(truncations[0]), info

    def render(self) -> Any:
        """The current frame, or the list of the last chunk's frames."""
        frames = self._batch.render()
        return None if frames is None else frames[0]

    def describe(self) -> str:
        """Readable summary of the environment's settings."""
        return self._batch.describe()

    def get_state(self) -> dict[str, np.ndarray]:
        """State from which the episode continues exactly: arrays of leading length 1, for ``np.savez``."""
        return self._batch.get_state()

    def set_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Restore a state returned by :meth:`get_state`, including the generators."""
        self._batch.set_state(state)
        self._np_random, self._np_random_seed = self._batch.np_random[0], self._batch.np_random_seed[0]

    def close(self) -> None:
        """Close the batch; may be called repeatedly."""
        self._batch.close()

    @staticmethod
    def _first(obs: dict[str, np.ndarray]) -> dict[str, Any]:
        return {key: value[0] for key, value in obs.items()}

    @staticmethod
    def _first_info(infos: dict[str, Any]) -> dict[str, Any]:
        """Info of the row with Python scalars, so that flags compare with ``is`` and infos are JSON-able."""
        row = {key: value[0] for key, value in infos.items() if not key.startswith("_")}
        return {key: value.item() if isinstance(value, np.generic) else value for key, value in row.items()}
