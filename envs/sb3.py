"""Adapter of both environments to Stable-Baselines3's ``VecEnv``.

SB3 does not accept a ``gymnasium.vector.VectorEnv``, and it expects finished rows to be reset in the same
step, with the last observation and the last info in ``infos[i]``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv

try:
    from stable_baselines3.common.vec_env import VecEnv, VecMonitor
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "The adapter needs stable-baselines3. Install it with: pip install 'wmpo-gym[train]'",
        name=error.name,
    ) from error

from wmpo_gym.envs.chunk_env import ChunkVectorEnv

Indices = int | Iterable[int] | None
# Attributes of a ChunkVectorEnv that hold one entry per row.
PER_ROW = ("task_description", "np_random", "np_random_seed", "simulators")


def make_sb3_env(env_id: str, n_envs: int = 1, *, skip_finished: bool = False, **kwargs: Any) -> VecMonitor:
    """Create a batched environment for Stable-Baselines3.

    Args:
        env_id: ``"WMPO-Imagined-v0"``, ``"WMPO-Simulated-v0"`` or one of the ids per task.
        n_envs: Number of rows.
        skip_finished: For algorithms that collect one batch of episodes at a time: a finished row reports
            done once, then repeats its last observation with reward 0 and done False, at no cost, until the
            next ``reset()``. Code that waits for the next done (``evaluate_policy``, SB3's own algorithms)
            needs False.
        **kwargs: Passed to ``gymnasium.make_vec``.

    Returns:
        The adapter inside a ``VecMonitor`` (episode returns and lengths in ``info["episode"]``).
    """
    return VecMonitor(Sb3VecEnv(gymnasium.make_vec(env_id, n_envs, **kwargs), skip_finished=skip_finished))


class Sb3VecEnv(VecEnv):
    """SB3 ``VecEnv`` around a :class:`ChunkVectorEnv`, which may be inside vector wrappers.

    Args:
        env: The batch; its autoreset mode is set to the one SB3 needs.
        skip_finished: See :func:`make_sb3_env`.

    Raises:
        TypeError: If ``env`` is another kind of vector environment.
    """

    def __init__(self, env: VectorEnv, *, skip_finished: bool = False) -> None:
        if not isinstance(env.unwrapped, ChunkVectorEnv):
            raise TypeError(
                f"Expected a batch of this package's environments, got {type(env.unwrapped).__name__}; make "
                "it with gymnasium.make_vec(env_id, num_envs) without vectorization_mode."
            )
        mode = AutoresetMode.DISABLED if skip_finished else AutoresetMode.SAME_STEP
        env.unwrapped.set_autoreset(mode, skip_finished=skip_finished)
        self.env: Any = env
        self._actions: np.ndarray | None = None
        super().__init__(env.num_envs, env.single_observation_space, env.single_action_space)
        self.metadata = {**env.metadata, "render_modes": [env.render_mode] if env.render_mode else []}

    @property
    def spec(self) -> Any:
        """Gymnasium spec of the environment."""
        return self.env.spec

    def reset(self) -> Any:
        """Begin new episodes in all rows, with the seeds and options set before (used once)."""
        obs, infos = self.env.reset(seed=list(self._seeds), options=self._merged_options())
        self._reset_seeds()
        self._reset_options()
        self.reset_infos = [_row(infos, row) for row in range(self.num_envs)]
        return obs

    def _merged_options(self) -> dict[str, Any]:
        """Merge SB3's options per row into one array per option."""
        keys = {key for options in self._options for key in options}
        merged: dict[str, Any] = {}
        for key in sorted(keys):
            lacking = [row for row, options in enumerate(self._options) if key not in options]
            if lacking:
                raise ValueError(
                    f"The option {key!r} is set for some rows only; set it for rows {lacking} too."
                )
            merged[key] = np.stack([np.asarray(options[key]) for options in self._options])
        return merged

    def step_async(self, actions: np.ndarray) -> None:
        """Store the actions ``(n_envs, K, D)``."""
        self._actions = actions

    def step_wait(self) -> Any:
        """Execute the stored actions; return observations, rewards float32, dones and one info per row."""
        obs, rewards, terminations, truncations, infos = self.env.step(self._actions)
        dones = terminations | truncations
        rows = [_row(infos, row) for row in range(self.num_envs)]
        for row in np.flatnonzero(dones).tolist():
            if "final_info" in infos:
                # The top level of the info already belongs to the next episode.
                self.reset_infos[row] = rows[row]
                rows[row] = _row(infos["final_info"], row)
                rows[row]["terminal_observation"] = infos["final_obs"][row]
            else:
                rows[row]["terminal_observation"] = {key: value[row].copy() for key, value in obs.items()}
        for row, info in enumerate(rows):
            info["TimeLimit.truncated"] = bool(truncations[row])
        return obs, rewards.astype(np.float32), dones, rows

    def close(self) -> None:
        """Close the batch."""
        self.env.close()

    def get_images(self) -> Sequence[np.ndarray | None]:
        """The rows' current frames."""
        frames = self.env.render()
        return [None] * self.num_envs if frames is None else list(frames)

    def get_attr(self, attr_name: str, indices: Indices = None) -> list[Any]:
        """Attribute of the batch, once per selected row."""
        value = (
            getattr(self.env, attr_name)
            if hasattr(self.env, attr_name)
            else getattr(self.env.unwrapped, attr_name)
        )
        return [value[row] if attr_name in PER_ROW else value for row in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: Indices = None) -> None:
        """Set an attribute of the batch, which all rows share.

        Raises:
            ValueError: If only some rows are named.
        """
        if list(self._get_indices(indices)) != list(range(self.num_envs)):
            raise ValueError(f"{attr_name!r} belongs to the whole batch; leave out `indices`.")
        setattr(self.env.unwrapped, attr_name, value)

    def env_method(self, method_name: str, *args: Any, indices: Indices = None, **kwargs: Any) -> list[Any]:
        """Call a method of the batch once and return its result per selected row (``render``: row's own)."""
        method: Callable[..., Any] = getattr(self.env.unwrapped, method_name)
        result = method(*args, **kwargs)
        per_row = method_name == "render" and result is not None
        return [result[row] if per_row else result for row in self._get_indices(indices)]

    def env_is_wrapped(self, wrapper_class: type, indices: Indices = None) -> list[bool]:
        """False for every row, because rows are not wrapped individually."""
        return [False for _ in self._get_indices(indices)]


def _row(infos: dict[str, Any], row: int) -> dict[str, Any]:
    """The info of one row: entries whose mask is set, scalars as Python scalars."""
    picked = {}
    for key, values in infos.items():
        if key.startswith("_") or key in ("final_obs", "final_info") or not infos[f"_{key}"][row]:
            continue
        value = values[row]
        picked[key] = value.item() if isinstance(value, np.generic) else value
    return picked
