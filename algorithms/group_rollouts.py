"""Waves of grouped rollouts, and which of their groups are kept (dynamic sampling)."""

from __future__ import annotations

import math
import time

import numpy as np
import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.utils import obs_as_tensor

from wmpo_gym.algorithms.distributed import Ranks
from wmpo_gym.algorithms.env_util import finished_rows_wait, reset_groups, take_rows
from wmpo_gym.algorithms.objective import action_mask, informative_groups
from wmpo_gym.algorithms.trajectories import (
    Obs,
    RolloutStatistics,
    Trajectories,
    TrajectoryRecorder,
    blank_obs,
    obs_to,
)
from wmpo_gym.policies.base import GroupPolicy

# An episode that is still running after so many decisions has no time limit; a wave would never end.
MAX_DECISIONS = 10_000


class GroupRollouts(BaseAlgorithm):
    """The half of a :class:`~wmpo_gym.algorithms.group_algorithm.GroupAlgorithm` that collects."""

    policy: GroupPolicy
    ranks: Ranks
    group_size: int
    n_groups: int | None
    success_bounds: tuple[float, float] | None
    max_extra_waves: int
    start_state_ids: np.ndarray | None
    group_rng: np.random.Generator

    def collect_wave(self, callback: BaseCallback) -> Trajectories | None:
        """One episode in every row.

        Returns:
            All of them, or None if the callback asked to stop.
        """
        obs, ids = reset_groups(self.env, self.group_size, self.group_rng, self.start_state_ids, self.ranks)
        recorder = TrajectoryRecorder(self.n_envs)
        chunk = self.action_space.shape[0] if len(self.action_space.shape) > 1 else 1
        waiting = np.clip(np.zeros(self.action_space.shape), self.action_space.low, self.action_space.high)
        running = np.ones(self.n_envs, bool)
        places, n_live = self.ranks.places(th.as_tensor(running), self.group_size)
        for _ in range(MAX_DECISIONS):
            live = np.flatnonzero(running)
            seen = obs_as_tensor(take_rows(obs, live), "cpu")
            chosen, log_probs, traces = self._sample(seen, places, n_live)
            actions = np.repeat(waiting[None], self.n_envs, axis=0).astype(self.action_space.dtype)
            actions[live] = np.clip(chosen.cpu().numpy(), self.action_space.low, self.action_space.high)
            obs, rewards, dones, infos = self.env.step(actions)
            self.num_timesteps += n_live
            n_actions = np.array([infos[i].get("n_frames", chunk) for i in live], np.int64)
            mask = action_mask(th.as_tensor(n_actions), chunk, traces.shape[1] // chunk)
            recorder.add(live, seen, traces, log_probs, mask, rewards[live], n_actions)
            for i in live[dones[live]]:
                recorder.successes[i] = infos[i].get("is_success", recorder.returns[i] > 0)
                self._note_episode(recorder.returns[i], recorder.lengths[i], recorder.successes[i])
            running &= ~dones
            callback.update_locals(locals())
            if self.ranks.largest(not callback.on_step()):
                return None
            places, n_live = self.ranks.places(th.as_tensor(running), self.group_size)
            if not n_live:
                return recorder.build(self.group_size, ids)
        raise RuntimeError(
            f"{n_live} rows of the env are still running after {MAX_DECISIONS} decisions; give the env a "
            "time limit (gymnasium.make(..., max_episode_steps=...))."
        )

    @th.no_grad()
    def _sample(self, obs: Obs, places: th.Tensor, n_live: int) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """Decisions of this rank's live rows, which stand at ``places`` among the ``n_live`` of all ranks."""
        if self.ranks.size == 1:
            return self.policy.sample(obs_to(obs, self.device))
        if len(places):
            return self.policy.sample_part(obs_to(obs, self.device), places, n_live)
        # Its rows are done. It asks in vain, lest the others draw or gather weights without it.
        chosen, log_probs, traces = self.policy.sample_part(
            obs_to(blank_obs(obs), self.device), places.new_zeros(1), n_live
        )
        return chosen[:0], log_probs[:0], traces[:0]

    def _note_episode(self, total: float, length: int, success: bool) -> None:
        """Feed SB3's episode buffers (not the raw infos: rows may already run their next episode)."""
        episode = {"r": float(total), "l": int(length), "t": time.time() - self.start_time / 1e9}
        self._update_info_buffer([{"episode": episode, "is_success": bool(success)}], np.array([True]))

    def collect_rollouts(self, callback: BaseCallback) -> Trajectories | None:
        """The informative groups of one iteration (possibly none), or None if a callback asked to stop."""
        self.policy.set_training_mode(False)
        callback.on_rollout_start()
        per_wave = self.ranks.size * self.n_envs // self.group_size
        n_waves = 1 if self.n_groups is None else math.ceil(self.n_groups / per_wave) + self.max_extra_waves
        kept: list[Trajectories] = []
        places: list[th.Tensor] = []  # of the kept groups among those of all ranks
        n_kept = 0  # by all ranks
        statistics = RolloutStatistics(self.group_size)
        for _ in range(n_waves):
            with finished_rows_wait(self.env):
                wave = self.collect_wave(callback)
            if wave is None:
                return None
            scores = wave.returns if self.success_bounds is None else wave.successes
            informative = informative_groups(scores.view(-1, self.group_size), self.success_bounds)
            kept.append(wave.select(informative.repeat_interleave(self.group_size)))
            statistics.add(wave, informative)
            place, n_new = self.ranks.places(informative, 1)
            places.append(place + n_kept)
            n_kept += n_new
            if self.n_groups is not None and n_kept >= self.n_groups:
                break
        rollouts, place = Trajectories.concatenate(kept), th.cat(places)
        if self.n_groups is not None:
            wanted, n_kept = place < self.n_groups, min(n_kept, self.n_groups)
            rollouts, place = rollouts.select(wanted.repeat_interleave(self.group_size)), place[wanted]
        rollouts.places = (place[:, None] * self.group_size + th.arange(self.group_size)).flatten()
        for name, value in {**statistics.summary(self.ranks), "kept_groups": n_kept}.items():
            self.logger.record(f"rollout/{name}", value)
        callback.update_locals(locals())
        callback.on_rollout_end()
        return rollouts
