"""Base of the batched environments: task, spaces, settings and rendering; stepping is in ``chunk_env``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.utils import EzPickle
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from wmpo_gym.envs.ledger import Ledger
from wmpo_gym.envs.rows import EpisodeRows, RowGenerators, resize
from wmpo_gym.envs.validation import check_settings, parse_autoreset_mode
from wmpo_gym.tasks import Task, get_task


class ResumablePickle(EzPickle):
    """Pickle by constructor arguments plus the current state; weights are loaded from their files again."""

    spec: Any
    ledger: Ledger
    started: bool

    def __getstate__(self) -> dict[str, Any]:
        """Constructor arguments, spec, ledger and, after the first reset, the rows' state."""
        state = self.get_state() if self.started else None
        return {**super().__getstate__(), "spec": self.spec, "ledger": self.ledger.copy(), "state": state}

    def __setstate__(self, data: dict[str, Any]) -> None:
        """Rebuild the environment and restore its rows."""
        super().__setstate__(data)
        self.spec = data["spec"]
        if data["state"] is not None:
            self.set_state(data["state"])
        self.ledger = data["ledger"]

    def get_state(self) -> dict[str, np.ndarray]:
        """State of all rows."""
        raise NotImplementedError

    def set_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Restore the state of all rows."""
        raise NotImplementedError


class TaskVectorEnv(ResumablePickle, VectorEnv):
    """Task, spaces and settings of a batch; for the arguments see :class:`ChunkVectorEnv`."""

    metadata: dict[str, Any] = {"render_modes": ["rgb_array", "rgb_array_list"], "render_fps": 10}
    reward_term_names: tuple[str, ...] = ("success", "progress")

    def __init__(
        self,
        num_envs: int,
        task: str | Task,
        *,
        autoreset_mode: str | AutoresetMode = AutoresetMode.NEXT_STEP,
        max_episode_steps: int | None = None,
        render_mode: str | None = None,
        render_size: int = 256,
        return_frames: bool = False,
        image_size: int | None = None,
        split: str | None = "train",
        reward_terms: Mapping[str, float] | None = None,
        skip_finished: bool = False,
    ) -> None:
        self.task_spec = get_task(task)
        check_settings(num_envs, max_episode_steps, image_size, render_mode, self.metadata["render_modes"])
        if split is not None:
            self.task_spec.split_ids(split)  # raises for an unknown split
        self.num_envs = num_envs
        self.split = split
        self.max_episode_steps = self._max_episode_steps = max_episode_steps or self.task_spec.n_chunks
        self.render_mode = render_mode
        self.return_frames = return_frames
        self.wants_frames = return_frames or render_mode == "rgb_array_list"
        self.image_size = image_size or self.task_spec.image_size
        self._render_scale = max(1, render_size // self.task_spec.image_size)
        self.reward_weights = self._weights(reward_terms or {})
        self.set_autoreset(autoreset_mode, skip_finished=skip_finished)
        self._make_spaces()
        self.ledger = Ledger()
        self.started = False
        self._generators = RowGenerators(num_envs)
        self._episode = EpisodeRows.create(num_envs, self.task_spec.image_size)
        self._rewards = {name: np.zeros(num_envs) for name in self.reward_weights}
        self._stepped = np.zeros(num_envs, np.bool_)  # rows that executed a chunk in this step
        self._clips = np.zeros((num_envs, self.task_spec.chunk, *self._episode.pixels.shape[1:]), np.uint8)
        self._clip_lengths = np.zeros(num_envs, np.int64)
        self._proprio: dict[int, np.ndarray] = {}  # of the rows that executed a chunk, if available

    def set_autoreset(self, mode: str | AutoresetMode, *, skip_finished: bool = False) -> None:
        """Set how finished rows are handled; for the arguments see the constructor.

        Raises:
            ValueError: If the mode is unknown, or ``skip_finished`` is combined with an autoreset mode.
        """
        self.autoreset_mode = parse_autoreset_mode(mode)
        if skip_finished and self.autoreset_mode is not AutoresetMode.DISABLED:
            raise ValueError("skip_finished leaves finished rows alone; it needs autoreset_mode='DISABLED'.")
        self.skip_finished = skip_finished
        frames_per_render = 1 if self.render_mode == "rgb_array_list" else self.task_spec.chunk
        self.metadata = {
            **type(self).metadata,
            "render_fps": self.task_spec.control_hz / frames_per_render,
            "autoreset_mode": self.autoreset_mode,
        }

    def _weights(self, terms: Mapping[str, float]) -> dict[str, float]:
        unknown = sorted(set(terms) - set(self.reward_term_names))
        if unknown:
            raise ValueError(
                f"Unknown reward terms {unknown}; {type(self).__name__} knows "
                f"{', '.join(self.reward_term_names)}."
            )
        return {"success": 1.0, **terms}

    def _make_spaces(self) -> None:
        task, side = self.task_spec, self.image_size
        self.single_observation_space = spaces.Dict(
            {
                "pixels": spaces.Box(0, 255, (side, side, 3), np.uint8),
                "task_id": spaces.Discrete(len(task.instructions)),
            }
        )
        self.single_action_space = spaces.Box(-1.0, 1.0, (task.chunk, task.action_dim), np.float32)
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)

    @property
    def task(self) -> str:
        """Name of the task; :attr:`task_spec` is the task itself."""
        return self.task_spec.name

    @property
    def instructions(self) -> tuple[str, ...]:
        """The instructions; ``task_id`` indexes them."""
        return self.task_spec.instructions

    @property
    def task_description(self) -> tuple[str, ...]:
        """Instruction of every row's current episode."""
        return tuple(self.instructions[i] for i in self._episode.task_id)

    @property  # type: ignore[misc]  # as in SyncVectorEnv: one per row, and no setter
    def np_random(self) -> tuple[np.random.Generator | None, ...]:  # type: ignore[override]
        """The rows' generators (None before a row's first reset)."""
        return tuple(self._generators.generators)

    @property
    def np_random_seed(self) -> tuple[int | None, ...]:  # type: ignore[override]
        """The seeds of the rows' generators."""
        return tuple(self._generators.seeds)

    def adopt_generator(self, row: int, generator: np.random.Generator, seed: int | None) -> None:
        """Use a generator of the caller for ``row``."""
        self._generators.generators[row], self._generators.seeds[row] = generator, seed

    def render(self) -> tuple[Any, ...] | None:
        """One entry per row: its frame uint8 ``(H, W, 3)``, or the list of the last chunk's frames."""
        if self.render_mode is None:
            gymnasium.logger.warn(
                "render() needs a render_mode; give one to gymnasium.make, e.g. 'rgb_array'."
            )
            return None
        size = self._render_scale * self.task_spec.image_size
        if self.render_mode == "rgb_array":
            return tuple(resize(self._episode.pixels, size))
        return tuple(list(resize(c[:n], size)) for c, n in zip(self._clips, self._clip_lengths, strict=True))

    def describe(self) -> str:
        """Readable summary: task, instructions, action statistics, horizon, rewards."""
        task, n_steps = self.task_spec, self.max_episode_steps * self.task_spec.chunk
        actions = ", ".join(f"[{a:g}, {b:g}]" for a, b in zip(task.action_low, task.action_high, strict=True))
        rewards = ", ".join(f"{weight:g} x {name}" for name, weight in self.reward_weights.items())
        return "\n".join(
            [
                f"{type(self).__name__} of task {task.name!r}, {self.num_envs} row(s)",
                f"instructions: {'; '.join(self.instructions)}",
                f"one step: a chunk of {task.chunk} actions at {task.control_hz:g} Hz",
                f"action [-1, 1] stands for {actions} per dimension",
                f"episode: at most {self.max_episode_steps} chunks ({n_steps} control steps)",
                f"start states: split {self.split or 'any'}",
                f"reward: {rewards}",
            ]
        )
