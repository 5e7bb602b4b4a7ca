"""What GRPO and DPO share: waves of grouped rollouts, the learning loop, logs and resumable checkpoints."""

from __future__ import annotations

import logging
import math
import time
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback, ConvertCallback
from stable_baselines3.common.type_aliases import MaybeCallback, Schedule
from stable_baselines3.common.utils import obs_as_tensor
from stable_baselines3.common.vec_env import VecEnv

from wmpo_gym.algorithms.common.callbacks import GroupProgressBar
from wmpo_gym.algorithms.common.checkpoint import (
    CheckpointDirectory,
    policy_generators,
    resume_or_refuse,
    save_training,
)
from wmpo_gym.algorithms.common.env_util import (
    as_vec_env,
    finished_rows_wait,
    read_ledger,
    reset_groups,
    rest,
    take_rows,
    world_fitness,
)
from wmpo_gym.algorithms.common.objective import action_mask, informative_groups
from wmpo_gym.algorithms.common.policies import CnnPolicy, MlpPolicy, MultiInputPolicy
from wmpo_gym.algorithms.common.trajectories import (
    RolloutStatistics,
    Trajectories,
    TrajectoryRecorder,
    obs_to,
)
from wmpo_gym.envs.ledger import Ledger
from wmpo_gym.policies.base import GroupPolicy

logger = logging.getLogger(__name__)

SelfGroupAlgorithm = TypeVar("SelfGroupAlgorithm", bound="GroupAlgorithm")

# An episode that is still running after so many decisions has no time limit; a wave would never end.
MAX_DECISIONS = 10_000
NO_LIMIT = 10**12


class GroupAlgorithm(BaseAlgorithm):
    """Base of algorithms that learn from groups of rollouts with a common start state.

    A *wave* resets every row of the env, ``group_size`` neighbouring rows to one start state, and runs them
    to the end of their first episode. ``num_timesteps`` counts decisions of rows that are still running.

    Args:
        policy: ``"VLAPolicy"``, another alias, or a :class:`~wmpo_gym.policies.GroupPolicy` class.
        env: Environment id, Gymnasium ``VectorEnv`` or SB3 ``VecEnv``; its rows must fill whole groups. None
            for a loaded model that only predicts.
        learning_rate: A number, or a function of the remaining progress (1 to 0).
        group_size: Rollouts per start state.
        n_groups: Informative groups wanted per iteration; waves are repeated until there are as many, surplus
            groups are left out. None takes one wave with whatever it holds. For an env id it is also the
            number of groups in a wave (None: 8).
        success_bounds: Groups with a success rate outside are dropped (both bounds inclusive). None drops
            only groups whose returns are all equal.
        max_extra_waves: How many waves more than ``n_groups`` needs are run when groups are dropped.
        start_state_ids: Ids to draw start states from; None takes the env's own ``start_state_ids``. An env
            without any gives the rows of a group a common seed instead.
        checkpoint_dir: Where to write resumable checkpoints; None writes none.
        checkpoint_interval: Iterations between checkpoints.
        stats_window_size: Episodes in SB3's episode buffers (the logged rates cover the whole iteration).
        tensorboard_log: TensorBoard directory, or None.
        policy_kwargs: Arguments of the policy.
        verbose: 0 silent, 1 tables, 2 debug.
        seed: Seed of policy, start states and env rows; None draws one.
        device: Torch device, ``"auto"`` for CUDA when there is one.
        _init_setup_model: Build the policy now (SB3's ``load`` does it later).

    Raises:
        ValueError: If the rows of ``env`` do not fill whole groups, or an argument is out of range.
        TypeError: If the policy class cannot evaluate token log-probabilities.
    """

    policy: GroupPolicy
    policy_aliases: ClassVar[dict[str, Any]] = {
        "MlpPolicy": MlpPolicy,
        "CnnPolicy": CnnPolicy,
        "MultiInputPolicy": MultiInputPolicy,
    }
    # What must be equal for a checkpoint to go on to the same numbers.
    resume_settings: ClassVar[tuple[str, ...]] = tuple(
        "group_size n_envs n_groups success_bounds max_extra_waves learning_rate seed".split()
    )

    def __init__(
        self,
        policy: str | type[GroupPolicy],
        env: str | gym.vector.VectorEnv | VecEnv | None,
        learning_rate: float | Schedule,
        group_size: int = 8,
        n_groups: int | None = None,
        success_bounds: tuple[float, float] | None = (0.1, 0.9),
        max_extra_waves: int = 4,
        start_state_ids: Sequence[int] | None = None,
        checkpoint_dir: str | Path | None = None,
        checkpoint_interval: int = 1,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
    ) -> None:
        if group_size < 2:
            raise ValueError(f"group_size must be at least 2 to compare rollouts, got {group_size}.")
        super().__init__(
            policy,
            None if env is None else as_vec_env(env, group_size * (n_groups or 8)),
            learning_rate,
            policy_kwargs=policy_kwargs,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            verbose=verbose,
            device=device,
            support_multi_env=True,
            seed=seed,
            supported_action_spaces=(spaces.Box,),
        )
        self.group_size = group_size
        self.n_groups = n_groups
        self.success_bounds = success_bounds
        self.max_extra_waves = max_extra_waves
        self.start_state_ids = None if start_state_ids is None else np.asarray(start_state_ids, np.int64)
        self.checkpoint_dir = checkpoint_dir
        self.checkpoint_interval = checkpoint_interval
        # Here and not in _setup_model: load() restores attributes first and must not restart the id stream.
        self.group_rng = np.random.default_rng(seed)
        self.history: list[dict[str, float]] = []
        self.world_fitness: Any = None
        self.budget = Ledger()  # what learn() has spent in its env, runs before a resume included
        self._iteration = 0
        if _init_setup_model:
            self._setup_model()

    # ------------------------------------------------------------------ construction

    @staticmethod
    def _wrap_env(env: Any, verbose: int = 0, monitor_wrapper: bool = True) -> VecEnv:
        """SB3's hook of ``__init__``, ``load`` and ``set_env``; also accepts a Gymnasium ``VectorEnv``."""
        return BaseAlgorithm._wrap_env(as_vec_env(env, 1), verbose, monitor_wrapper)

    def _get_policy_from_name(self, policy_name: str) -> type[GroupPolicy]:
        """SB3's hook; the VLA is imported only when it is asked for."""
        if policy_name == "VLAPolicy":
            from wmpo_gym.policies.vla_policy import VLAPolicy

            return VLAPolicy
        if policy_name not in self.policy_aliases:
            names = ", ".join(["VLAPolicy", *self.policy_aliases])
            raise ValueError(f"Unknown policy {policy_name!r}; choose one of {names}.")
        return self.policy_aliases[policy_name]

    def _setup_model(self) -> None:
        """Build policy and optimizer; called by the constructor and again by ``load``."""
        if not issubclass(self.policy_class, GroupPolicy):
            raise TypeError(
                f"{type(self).__name__} needs a policy that samples and re-evaluates action tokens, got "
                f"{self.policy_class.__name__}. Use 'VLAPolicy', or subclass wmpo_gym.policies.GroupPolicy."
            )
        self._setup_lr_schedule()
        self.set_random_seed(self.seed)
        self.policy = self.policy_class(
            self.observation_space, self.action_space, self.lr_schedule, **self.policy_kwargs
        ).to(self.device)
        for i, generator in enumerate(policy_generators(self.policy).values()):
            generator.manual_seed(int(np.random.default_rng(self.seed).integers(2**63)) + i)
        if self.env is not None:
            self._check_env()

    def _check_env(self) -> None:
        """Check that the rows of the env fill groups, and note the fitness of its world."""
        if self.n_envs % self.group_size:
            fitting = self.group_size * max(1, self.n_envs // self.group_size)
            raise ValueError(
                f"The env has {self.n_envs} rows, which is not a multiple of group_size={self.group_size}; "
                f"make it with num_envs={fitting}, or load the model without an env if it only predicts."
            )
        self.world_fitness = world_fitness(self.env)

    def set_env(self, env: Any, force_reset: bool = True) -> None:
        """Train in another env with the same spaces; see :meth:`BaseAlgorithm.set_env`."""
        super().set_env(env, force_reset)
        self._check_env()

    # ------------------------------------------------------------------ rollouts

    def collect_wave(self, callback: BaseCallback) -> Trajectories | None:
        """One episode in every row.

        Returns:
            All of them, or None if the callback asked to stop.
        """
        obs, ids = reset_groups(self.env, self.group_size, self.group_rng, self.start_state_ids)
        recorder = TrajectoryRecorder(self.n_envs)
        chunk = self.action_space.shape[0] if len(self.action_space.shape) > 1 else 1
        waiting = np.clip(np.zeros(self.action_space.shape), self.action_space.low, self.action_space.high)
        live = np.arange(self.n_envs)
        for _ in range(MAX_DECISIONS):
            seen = obs_as_tensor(take_rows(obs, live), "cpu")
            with th.no_grad():
                chosen, log_probs, traces = self.policy.sample(obs_to(seen, self.device))
            actions = np.repeat(waiting[None], self.n_envs, axis=0).astype(self.action_space.dtype)
            actions[live] = np.clip(chosen.cpu().numpy(), self.action_space.low, self.action_space.high)
            obs, rewards, dones, infos = self.env.step(actions)
            self.num_timesteps += len(live)
            n_actions = np.array([infos[i].get("n_frames", chunk) for i in live], np.int64)
            mask = action_mask(th.as_tensor(n_actions), chunk, traces.shape[1] // chunk)
            recorder.add(live, seen, traces, log_probs, mask, rewards[live], n_actions)
            for i in live[dones[live]]:
                recorder.successes[i] = infos[i].get("is_success", recorder.returns[i] > 0)
                self._note_episode(recorder.returns[i], recorder.lengths[i], recorder.successes[i])
            live = live[~dones[live]]
            callback.update_locals(locals())
            if not callback.on_step():
                return None
            if not len(live):
                return recorder.build(self.group_size, ids)
        raise RuntimeError(
            f"Row {live[0]} of the env is still running after {MAX_DECISIONS} decisions; give the env a time "
            "limit (gymnasium.make(..., max_episode_steps=...))."
        )

    def _note_episode(self, total: float, length: int, success: bool) -> None:
        """Feed SB3's episode buffers (not the raw infos: rows may already run their next episode)."""
        episode = {"r": float(total), "l": int(length), "t": time.time() - self.start_time / 1e9}
        self._update_info_buffer([{"episode": episode, "is_success": bool(success)}], np.array([True]))

    def collect_rollouts(self, callback: BaseCallback) -> Trajectories | None:
        """The informative groups of one iteration (possibly none), or None if a callback asked to stop."""
        self.policy.set_training_mode(False)
        callback.on_rollout_start()
        per_wave = self.n_envs // self.group_size
        n_waves = 1 if self.n_groups is None else math.ceil(self.n_groups / per_wave) + self.max_extra_waves
        kept: list[Trajectories] = []
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
            if self.n_groups is not None and sum(map(len, kept)) >= self.n_groups * self.group_size:
                break
        rollouts = Trajectories.concatenate(kept)
        if self.n_groups is not None:
            rollouts = rollouts.select(th.arange(min(len(rollouts), self.n_groups * self.group_size)))
        for name, value in {**statistics.summary(), "kept_groups": rollouts.n_groups}.items():
            self.logger.record(f"rollout/{name}", value)
        callback.update_locals(locals())
        callback.on_rollout_end()
        return rollouts

    # ------------------------------------------------------------------ learning

    @abstractmethod
    def train(self, rollouts: Trajectories) -> None:
        """Improve the policy on the informative groups of one iteration (at least one)."""

    def _step_optimizer(self, max_grad_norm: float) -> float:
        """Step along the accumulated gradient, scaled down to a norm; returns the norm before that.

        A gradient that is not finite leaves the weights as they are.
        """
        optimizer = self.policy.optimizer
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = th.nn.utils.clip_grad_norm_(parameters, max_grad_norm).item()
        if np.isfinite(norm):
            optimizer.step()
            self._n_updates += 1
        else:
            logger.warning("Update skipped, the weights are unchanged: its gradient norm is %s.", norm)
        return norm

    def learn(
        self: SelfGroupAlgorithm,
        total_timesteps: int = NO_LIMIT,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str = "run",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
        max_iterations: int | None = None,
        resume: bool = False,
    ) -> SelfGroupAlgorithm:
        """Alternate rollouts and updates.

        Args:
            total_timesteps: Decisions to make; the last iteration is always finished. May be left out if
                ``max_iterations`` is given.
            callback: Called once per ``env.step``.
            log_interval: Iterations between log entries.
            tb_log_name: Name of the TensorBoard run.
            reset_num_timesteps: Count from zero. False goes on with a trained model for ``total_timesteps``
                more.
            progress_bar: Show a bar with the time left.
            max_iterations: Iterations (rollouts and an update each) after which to stop in any case.
            resume: Go on from the newest checkpoint in ``checkpoint_dir``, if there is one, with the numbers
                an uninterrupted run would have had; the two limits are then those of the whole run.

        Returns:
            The model.

        Raises:
            WriteError: If a checkpoint cannot be written; nothing trained is lost.
            ValueError: If no limit is given, or if the checkpoints belong to other settings, or to an earlier
                run and ``resume`` is False.
        """
        if total_timesteps >= NO_LIMIT and max_iterations is None:
            raise ValueError("learn() needs total_timesteps or max_iterations.")
        resumed = resume_or_refuse(self, resume)
        if resumed:
            reset_num_timesteps, total_timesteps = False, max(0, total_timesteps - self.num_timesteps)
        max_iterations = NO_LIMIT if max_iterations is None else max_iterations
        last_iteration = max_iterations if resumed else self._iteration + max_iterations
        total_timesteps, callback = self._setup_learn(
            total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar
        )
        self._ledger_seen = read_ledger(self.env)
        callback.on_training_start(locals(), globals())
        while self.num_timesteps < total_timesteps and self._iteration < last_iteration:
            started = time.time()
            rollouts = self.collect_rollouts(callback)
            if rollouts is None:
                break
            collected = time.time()
            self._iteration += 1
            left = (last_iteration - self._iteration) / max_iterations
            self._current_progress_remaining = min(1 - self.num_timesteps / total_timesteps, left)
            if len(rollouts):
                rest(self.env)
                self.train(rollouts)
            else:
                logger.warning("Iteration %d: no informative group, the update is skipped.", self._iteration)
            self.logger.record("time/rollout_seconds", collected - started)
            self.logger.record("time/train_seconds", time.time() - collected)
            self.dump_logs(write=self._iteration % log_interval == 0)
            if self.checkpoint_dir is not None and self._iteration % self.checkpoint_interval == 0:
                self.save_checkpoint()
        callback.on_training_end()
        return self

    def _init_callback(self, callback: MaybeCallback, progress_bar: bool = False) -> BaseCallback:
        """SB3's hook, with a progress bar that counts decisions."""
        if progress_bar:
            listed = callback if isinstance(callback, list) else [] if callback is None else [callback]
            listed = [c if isinstance(c, BaseCallback) else ConvertCallback(c) for c in listed]
            callback = [*listed, GroupProgressBar()]
        return super()._init_callback(callback, progress_bar=False)

    def dump_logs(self, write: bool = True) -> None:
        """Add times and budget to what was recorded, note it in ``history``, and write it to the logs."""
        seconds = max((time.time_ns() - self.start_time) / 1e9, 1e-9)
        record = self.logger.record
        record("time/iterations", self._iteration, exclude="tensorboard")
        record("time/total_timesteps", self.num_timesteps, exclude="tensorboard")
        record("time/time_elapsed", seconds, exclude="tensorboard")
        record("time/fps", (self.num_timesteps - self._num_timesteps_at_start) / seconds)
        ledger = read_ledger(self.env)
        self.budget, self._ledger_seen = self.budget + (ledger - self._ledger_seen), ledger
        for name, value in self.budget.to_dict().items():
            record(f"budget/{name}", value)
        numbers = (int, float, np.number)
        logged = self.logger.name_to_value.items()
        self.history.append({name: float(value) for name, value in logged if isinstance(value, numbers)})
        if write:
            self.logger.dump(self.num_timesteps)

    # ------------------------------------------------------------------ files

    def _excluded_save_params(self) -> list[str]:
        """Observations are images: SB3 would pickle a batch of them into every file."""
        return [*super()._excluded_save_params(), "_last_obs", "_last_original_obs", "_last_episode_starts"]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", "policy.optimizer"], []

    def save_checkpoint(self) -> Path:
        """Write all that a later ``learn(resume=True)`` needs to go on to the same numbers.

        Raises:
            ValueError: If the model was made without ``checkpoint_dir``.
            WriteError: If the disk is full; the model and earlier checkpoints are untouched.
        """
        if self.checkpoint_dir is None:
            raise ValueError("This model has no checkpoint_dir; give one to the constructor.")
        return save_training(self, CheckpointDirectory(self.checkpoint_dir))
