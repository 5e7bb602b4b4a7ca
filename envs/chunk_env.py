"""Common batched implementation of the imagined and the simulated environment.

One ``step`` executes one action chunk of K control steps. A subclass of :class:`ChunkVectorEnv` defines how
an episode begins and how a chunk is executed; this module handles seeds, start states, autoreset, validation,
info, state and the ledger.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from gymnasium.error import ResetNeeded
from gymnasium.vector import AutoresetMode

from wmpo_gym.envs.base import TaskVectorEnv
from wmpo_gym.envs.rows import Chunk, EpisodeRows, Starts, add_info, object_array, resize, take_prefixed
from wmpo_gym.envs.single import ChunkEnv
from wmpo_gym.envs.validation import ResetOptions, check_actions, parse_seeds

__all__ = ["Chunk", "ChunkEnv", "ChunkVectorEnv", "FinishedRowError", "Starts", "State"]

INFO_COLUMNS = ("is_success", "success_prob", "start_state_id", "n_frames", "nfe")
State = dict[str, np.ndarray]


class FinishedRowError(ResetNeeded, AssertionError):
    """A finished row was stepped without a reset (an AssertionError too, as in ``SyncVectorEnv``)."""


class ChunkVectorEnv(TaskVectorEnv):
    """Base class of the batched environments.

    Args:
        num_envs: Number of rows.
        task: Task or its name.
        autoreset_mode: ``AutoresetMode`` or its name.
        max_episode_steps: Chunks after which an episode is truncated; None is the task's horizon.
        render_mode: None, ``"rgb_array"`` (current frame) or ``"rgb_array_list"`` (the chunk's frames).
        render_size: Rendered frames are enlarged by an integer factor to about this side in pixels.
        return_frames: Return the chunk's frames, uint8 ``(K, H, W, 3)``, in ``info["frames"]`` of every step
            and, if the simulator provides it, the robot's state, float32 ``(K + 1, P)``, in
            ``info["proprio"]``.
        image_size: Side of the observation in pixels; None is the task's.
        split: Split that start states are drawn from; None draws from all of them.
        reward_terms: Weight per named term, added to ``{"success": 1.0}``. Known: ``reward_term_names``.
        skip_finished: In DISABLED mode, a finished row repeats its last observation with reward 0 and False
            flags until it is reset, at no cost; otherwise stepping it is an error.

    Raises:
        ValueError: If an argument is invalid; the message lists the allowed values.
    """

    # -- implemented by subclasses ---------------------------------------------------------------------------
    @property
    def start_state_ids(self) -> np.ndarray:
        """Ids that ``options={"start_state_id": …}`` accepts, int64."""
        raise NotImplementedError

    def _open(self) -> None:
        """Load weights or create simulators; called before every reset, cheap after the first call."""

    def _begin(self, starts: Starts) -> tuple[np.ndarray, np.ndarray]:
        """Begin episodes; returns the first frames uint8 (n, H, W, 3) and task ids int64 (n,)."""
        raise NotImplementedError

    def _advance(self, rows: np.ndarray, actions: np.ndarray) -> Chunk:
        """Execute ``actions`` (n, K, D) in ``rows`` and add the cost to the ledger."""
        raise NotImplementedError

    def _dump_rows(self, rows: np.ndarray) -> State:
        """State of the dynamics at ``rows``, arrays of leading length n."""
        raise NotImplementedError

    def _load_rows(self, rows: np.ndarray, state: State) -> None:
        """Restore the state returned by :meth:`_dump_rows` in ``rows``."""
        raise NotImplementedError

    def _reward_terms(self, rows: np.ndarray, chunk: Chunk) -> dict[str, np.ndarray]:
        """Unweighted reward terms (n,) by name; called before the rows are updated."""
        return {
            "success": chunk.is_success.astype(np.float64),
            # Telescoping: the sum over an episode is the success probability of the last frame.
            "progress": chunk.success_prob - self._episode.success_prob[rows],
        }

    # -- episodes --------------------------------------------------------------------------------------------
    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Begin new episodes in all rows, or in those that ``options["reset_mask"]`` selects.

        Args:
            seed: None, an int (row i gets seed + i) or one int or None per row.
            options: ``start_state_id`` (int or int array ``(num_envs,)``; rows with the same id have the same
                first observation and independent noise), ``noise_seed`` (int array, or an int s for s + i in
                row i), ``start_frames`` (uint8 ``(H, W, 3)`` or ``(num_envs, H, W, 3)``; a
                ``start_state_id`` is then only a label) with optional ``task_id``, and ``reset_mask`` (bool
                array). Other values are drawn from the row's generator.

        Raises:
            ValueError: If a seed or an option is invalid; the environment is unchanged.
        """
        began = time.perf_counter()
        seeds = parse_seeds(seed, self.num_envs)
        choice = ResetOptions.parse(options, self.num_envs, self.task_spec)
        if not self.started and len(choice.rows) < self.num_envs:
            raise ResetNeeded("Reset all rows once before a reset with a reset_mask.")
        self._open()
        self._check_choice(choice)
        self._generators.seed(choice.rows, seeds)
        self._start(choice)
        self.started = True
        self.ledger.seconds += time.perf_counter() - began
        return self._observation(), self._info(choice.rows)

    def _check_choice(self, choice: ResetOptions) -> None:
        """Check that the start states exist; ids given with start frames are only labels."""
        if choice.start_state_id is None or choice.start_frames is not None:
            return
        wanted = np.unique(choice.start_state_id[choice.rows])
        unknown = wanted[~np.isin(wanted, self.start_state_ids)]
        if unknown.size:
            known = np.sort(self.start_state_ids)
            gapless = known.size == known[-1] - known[0] + 1
            allowed = (
                f"{known[0]} to {known[-1]}" if gapless else f"{known.size} ids like {known[:8].tolist()}"
            )
            raise ValueError(
                f"Unknown start_state_id {unknown.tolist()} for task {self.task!r}; allowed: {allowed} "
                "(all in env.unwrapped.start_state_ids)."
            )

    @property
    def split(self) -> str | None:
        """Split from which start states are drawn; None draws from all.

        Setting it takes effect at the next reset.
        """
        return self._split

    @split.setter
    def split(self, split: str | None) -> None:
        if split is not None:
            self.task_spec.split_ids(split)  # raises for an unknown split
        self._split = split
        self.__dict__.pop("_pool", None)

    @cached_property
    def _pool(self) -> np.ndarray:
        """Ids from which start states are drawn."""
        others = self.task_spec.start_states.total if self.split else 0
        excluded = set(range(others)) - set(self.task_spec.split_ids(self.split or "train"))
        pool = np.array([i for i in self.start_state_ids.tolist() if i not in excluded], np.int64)
        if not pool.size:
            raise ValueError(
                f"There is no start state of split {self.split!r}; give another one, or None for all."
            )
        return pool

    def _start(self, choice: ResetOptions) -> None:
        """Begin episodes in ``choice.rows``; values the caller did not set are drawn."""
        rows = choice.rows
        # Always draw three numbers per episode, so that options do not change a row's later draws.
        draws = self._generators.draw(rows, 3)
        ids, noise, task_ids = self._pool[draws[:, 0] % len(self._pool)], draws[:, 1], None
        if choice.start_frames is not None:
            ids, task_ids = np.full(len(rows), -1), draws[:, 2] % len(self.instructions)
        if choice.start_state_id is not None:
            ids = choice.start_state_id[rows]
        if choice.noise_seed is not None:
            noise = choice.noise_seed[rows]
        if choice.task_id is not None:
            task_ids = choice.task_id[rows]
        frames = None if choice.start_frames is None else choice.start_frames[rows]
        pixels, task_ids = self._begin(Starts(rows, ids, noise, frames, task_ids))
        self._episode.begin(rows, pixels, task_ids, ids)
        for term in self._rewards.values():
            term[rows] = 0.0
        self._stepped[rows] = False
        if self.wants_frames:
            self._clips[rows, 0], self._clip_lengths[rows] = pixels, 1

    def step(
        self, actions: np.ndarray
    ) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Execute one action chunk in every row that is not finished.

        Args:
            actions: ``(num_envs, K, D)`` in [-1, 1]; those of finished rows are checked but not executed.

        Returns:
            Observations, rewards float64, terminations, truncations (never both) and infos.

        Raises:
            ValueError: If an action is invalid; the message names row and value, and no row is stepped.
            FinishedRowError: In DISABLED mode without ``skip_finished``, if a finished row was not reset.
        """
        began = time.perf_counter()
        if not self.started:
            raise ResetNeeded("Call reset() before step().")
        finished = self._episode.done.copy()
        if finished.any() and self.autoreset_mode is AutoresetMode.DISABLED and not self.skip_finished:
            raise FinishedRowError(
                f"The episodes of rows {np.flatnonzero(finished).tolist()} are over; call reset with "
                "options={'reset_mask': …} first, or make the environment with skip_finished=True."
            )
        task, active = self.task_spec, np.flatnonzero(~finished)
        actions = check_actions(actions, (self.num_envs, task.chunk, task.action_dim))
        terminations, truncations = np.zeros((2, self.num_envs), np.bool_)
        for column in (*self._rewards.values(), self._episode.n_frames, self._episode.nfe, self._stepped):
            column[:] = 0
        if active.size:
            self._execute(active, actions[active])
        terminations[active] = self._episode.is_success[active]
        truncations[active] = self._episode.n_steps[active] >= self.max_episode_steps
        truncations &= ~terminations
        rewards = np.sum([*self._rewards.values()], axis=0)
        self._episode.done[active] = (terminations | truncations)[active]
        infos = self._autoreset(finished)
        self.ledger.seconds += time.perf_counter() - began
        return self._observation(), rewards, terminations, truncations, infos

    def rest(self) -> None:
        """Free memory that the next reset or step can allocate again; called before a policy update."""

    def _execute(self, rows: np.ndarray, actions: np.ndarray) -> None:
        chunk = self._advance(rows, actions)
        for name, values in self._reward_terms(rows, chunk).items():
            if name in self._rewards:
                self._rewards[name][rows] = self.reward_weights[name] * values
        self._episode.advance(rows, chunk)
        self._stepped[rows] = True
        if self.wants_frames:
            self._clips[rows], self._clip_lengths[rows] = chunk.frames, chunk.n_frames
        if chunk.proprio is not None:
            self._proprio = dict(zip(rows.tolist(), chunk.proprio, strict=True))

    def _autoreset(self, finished: np.ndarray) -> dict[str, Any]:
        """Reset rows according to the autoreset mode; returns the infos of the step."""
        infos: dict[str, Any] = {}
        ended = np.flatnonzero(self._episode.done & ~finished)
        if self.autoreset_mode is AutoresetMode.SAME_STEP and ended.size:
            observation = self._observation()
            last = [{key: value[row].copy() for key, value in observation.items()} for row in ended]
            add_info(infos, self.num_envs, ended, {"final_obs": object_array(last)})
            infos["final_info"], infos["_final_info"] = self._info(ended), infos["_final_obs"].copy()
            self._start(ResetOptions(ended))
        if self.autoreset_mode is not AutoresetMode.DISABLED and finished.any():
            self._start(ResetOptions(np.flatnonzero(finished)))
        return {**infos, **self._info(np.arange(self.num_envs))}

    def _observation(self) -> dict[str, np.ndarray]:
        return {
            "pixels": resize(self._episode.pixels, self.image_size),
            "task_id": self._episode.task_id.copy(),
        }

    def _info(self, rows: np.ndarray) -> dict[str, Any]:
        columns = {name: getattr(self._episode, name)[rows] for name in INFO_COLUMNS}
        columns["instruction"] = object_array([self.instructions[i] for i in self._episode.task_id[rows]])
        columns.update({f"reward_{name}": values[rows] for name, values in self._rewards.items()})
        infos: dict[str, Any] = {}
        add_info(infos, self.num_envs, rows, columns)
        stepped = rows[self._stepped[rows]]
        if self.return_frames and stepped.size:
            add_info(infos, self.num_envs, stepped, {"frames": self._clips[stepped]})
            if self._proprio:
                proprio = np.stack([self._proprio[row] for row in stepped.tolist()])
                add_info(infos, self.num_envs, stepped, {"proprio": proprio})
        return infos

    # -- state -----------------------------------------------------------------------------------------------
    def get_state(self, rows: Iterable[int] | None = None) -> State:
        """State from which ``rows`` (None: all) continue exactly, including the generators.

        Returns:
            A flat dict of arrays of leading length n, suitable for ``np.savez``.
        """
        if not self.started:
            raise ResetNeeded("Call reset() before get_state().")
        index = np.arange(self.num_envs) if rows is None else np.asarray(list(rows))
        state = self._episode.rows(index).to_dict()
        state["rng"] = self._generators.pack(index)
        return state | {f"dynamics.{key}": value for key, value in self._dump_rows(index).items()}

    def set_state(self, state: Mapping[str, np.ndarray], rows: Iterable[int] | None = None) -> None:
        """Restore a state returned by :meth:`get_state` in ``rows`` (None: all).

        The state may come from other row indices or another batch.

        Raises:
            ValueError: If the state has another number of rows or lacks an entry.
        """
        index = np.arange(self.num_envs) if rows is None else np.asarray(list(rows))
        if not self.started:
            self.reset()
        missing = sorted(set(self.get_state(index[:1])) - set(state))
        lengths = {len(value) for value in state.values()}
        if missing or lengths != {len(index)}:
            raise ValueError(
                f"The state must hold {len(index)} row(s) of everything; it holds {sorted(lengths)}, lacks "
                f"{missing or 'nothing'}."
            )
        self._load_rows(index, take_prefixed(state, "dynamics."))
        self._episode.assign(index, EpisodeRows.from_dict(state))
        self._stepped[index] = False
        self._clips[index, 0], self._clip_lengths[index] = state["pixels"], 1
        self._generators.unpack(index, state["rng"])
