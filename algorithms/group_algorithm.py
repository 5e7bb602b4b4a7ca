"""What GRPO and DPO share: waves of grouped rollouts, the learning loop, logs and resumable checkpoints."""

from __future__ import annotations

import logging
import time
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback, ConvertCallback
from stable_baselines3.common.type_aliases import MaybeCallback, Schedule
from stable_baselines3.common.vec_env import VecEnv

from wmpo_gym.algorithms.callbacks import GroupProgressBar
from wmpo_gym.algorithms.checkpoint import CheckpointDirectory, resume_or_refuse, save_training
from wmpo_gym.algorithms.distributed import Ranks
from wmpo_gym.algorithms.env_util import as_vec_env, read_ledger, rest, world_fitness
from wmpo_gym.algorithms.group_rollouts import GroupRollouts
from wmpo_gym.algorithms.policies import CnnPolicy, MlpPolicy, MultiInputPolicy
from wmpo_gym.algorithms.sharding import line_up, whole, whole_state
from wmpo_gym.algorithms.trajectories import Obs, Trajectories, blank_obs, obs_to
from wmpo_gym.envs.ledger import Ledger
from wmpo_gym.policies.base import GroupPolicy, policy_generators

logger = logging.getLogger(__name__)

SelfGroupAlgorithm = TypeVar("SelfGroupAlgorithm", bound="GroupAlgorithm")

NO_LIMIT = 10**12


class GroupAlgorithm(GroupRollouts):
    """Base of algorithms that learn from groups of rollouts with a common start state.

    A *wave* resets every row of the env, ``group_size`` neighbouring rows to one start state, and runs them
    to the end of their first episode. ``num_timesteps`` counts decisions of rows that are still running.

    Started by ``torchrun`` as several processes, each runs its share of the groups in its own env, gradients
    are summed, and the main process writes logs and files; every number below, but the rows of an ``env``
    that is no id, is of all processes together (``docs/distributed.md``).

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
        self.ranks = Ranks.join(device)
        if isinstance(env, str):
            env = as_vec_env(env, self.ranks.share(group_size * (n_groups or 8), group_size))
        super().__init__(
            policy,
            env,
            learning_rate,
            policy_kwargs=policy_kwargs,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log if self.ranks.is_main else None,
            verbose=verbose if self.ranks.is_main else 0,
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
        self.sharded = False  # whether the weights are spread over the ranks
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

    # ------------------------------------------------------------------ learning

    @abstractmethod
    def train(self, rollouts: Trajectories) -> None:
        """Improve the policy on the informative groups of one iteration (at least one, of all ranks)."""

    def _backward(self, loss: th.Tensor) -> None:
        """Add the gradient of this rank's part of the loss of all ranks."""
        # FSDP averages gradients over the ranks; these are to be summed.
        (loss * self.ranks.size if self.sharded else loss).backward()

    def _passes_short(self, n_passes: int) -> int:
        """How many passes fewer than another rank this one makes: sharded weights ask for equally many."""
        return self.ranks.largest(n_passes) - n_passes if self.sharded else 0

    def _blank_passes(self, n_passes: int, rollouts: Trajectories) -> None:
        """Passes over nothing, to keep the other ranks company."""
        obs, trace = blank_obs(rollouts.obs), blank_obs(rollouts.traces)
        for _ in range(n_passes):
            log_prob = self._log_prob(obs, trace)[0]
            if log_prob.requires_grad:
                self._backward(0.0 * log_prob.sum())

    def _log_prob(self, obs: Obs, traces: th.Tensor) -> tuple[th.Tensor, ...]:
        """The forward passes over some decisions; the policy's ``log_prob`` and ``entropy`` come first."""
        return self.policy.log_prob(obs_to(obs, self.device), traces.to(self.device))

    def _step_optimizer(self, max_grad_norm: float) -> float:
        """Step along the gradient accumulated by all ranks, scaled down to a norm; returns the norm before.

        A gradient that is not finite leaves the weights as they are.
        """
        optimizer = self.policy.optimizer
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.ranks.sum_gradients(parameters)
        norm = whole(th.nn.utils.clip_grad_norm_(parameters, max_grad_norm)).item()
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
        line_up(self)
        resumed = resume_or_refuse(self, resume)
        if resumed:
            reset_num_timesteps, total_timesteps = False, max(0, total_timesteps - self.num_timesteps)
        max_iterations = NO_LIMIT if max_iterations is None else max_iterations
        last_iteration = max_iterations if resumed else self._iteration + max_iterations
        total_timesteps, callback = self._setup_learn(
            total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar and self.ranks.is_main
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
            if self.ranks.total(len(rollouts)):
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
        spent = self.ranks.gather(ledger - self._ledger_seen)
        self.budget, self._ledger_seen = sum(spent, self.budget), ledger
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
        images = ["_last_obs", "_last_original_obs", "_last_episode_starts"]
        return [*super()._excluded_save_params(), *images, "ranks", "sharded"]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", "policy.optimizer"], []

    def _modules(self) -> list[str]:
        """Attributes that hold weights."""
        return [name for name in self._get_torch_save_params()[0] if name != "policy.optimizer"]

    def save(self, path: Any, exclude: Any = None, include: Any = None) -> None:
        """SB3's ``save`` (a zip with pickle inside), by the main process.

        Raises:
            ValueError: If the weights are spread over several processes, which the format cannot hold.
        """
        if self.sharded:
            raise ValueError("The weights are spread by FSDP; use save_policy() or save_checkpoint().")
        if self.ranks.is_main:
            super().save(path, exclude, include)

    def save_policy(
        self, directory: str | Path, meta: Mapping[str, Any] | None = None, *, merged: bool = False
    ) -> Path:
        """``policy.save_pretrained``, or ``save_merged``, once for all processes, each of which calls this.

        Raises:
            ValueError: If adapters are to be merged into weights that are spread over the processes.
        """
        if merged and self.sharded:
            raise ValueError("Adapters are not merged under FSDP; save them, and merge them in one process.")
        if merged:
            return self.ranks.on_main(lambda: self.policy.save_merged(directory, meta))
        given: dict[str, Any] = {}
        if self.sharded:
            given["state_dict"] = whole_state(self.policy.network.state_dict(), self.ranks)
        return self.ranks.on_main(lambda: self.policy.save_pretrained(directory, meta, **given))

    def save_checkpoint(self) -> Path:
        """Write all that a later ``learn(resume=True)`` needs to go on to the same numbers.

        Raises:
            ValueError: If the model was made without ``checkpoint_dir``.
            WriteError: If the disk is full; the model and earlier checkpoints are untouched.
        """
        if self.checkpoint_dir is None:
            raise ValueError("This model has no checkpoint_dir; give one to the constructor.")
        return save_training(self, CheckpointDirectory(self.checkpoint_dir))
