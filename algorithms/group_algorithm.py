"""Common base of GRPO and DPO: collection and filtering of rollout groups, and the training loop."""

from __future__ import annotations

import logging
import math
import time
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar, cast

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback, ConvertCallback
from stable_baselines3.common.type_aliases import MaybeCallback, Schedule
from stable_baselines3.common.utils import obs_as_tensor
from stable_baselines3.common.vec_env import VecEnv

from wmpo_gym.algorithms.callbacks import GroupProgressBar
from wmpo_gym.algorithms.checkpoint import ResumableAlgorithm
from wmpo_gym.algorithms.distributed import Ranks, full_tensor, mixed_precision, shard, sharding_enabled
from wmpo_gym.algorithms.env_util import (
    as_vec_env,
    finished_rows_wait,
    offload_env,
    read_ledger,
    reset_groups,
    take_rows,
    world_fitness,
)
from wmpo_gym.algorithms.policies import CnnPolicy, MlpPolicy, MultiInputPolicy
from wmpo_gym.algorithms.trajectories import (
    Obs,
    RolloutStatistics,
    Trajectories,
    TrajectoryRecorder,
    action_mask,
    informative_groups,
    obs_to,
    zero_obs,
)
from wmpo_gym.envs.ledger import Ledger
from wmpo_gym.policies.base import GroupPolicy, policy_generators

logger = logging.getLogger(__name__)

SelfGroupAlgorithm = TypeVar("SelfGroupAlgorithm", bound="GroupAlgorithm")

NO_LIMIT = 10**12

# An episode that runs longer than this many decisions has no time limit; a batch would never end.
MAX_DECISIONS = 10_000


class GroupAlgorithm(ResumableAlgorithm):
    """Base class of algorithms that train on groups of rollouts from a shared start state.

    One *batch* of rollouts resets every row of the env, ``group_size`` adjacent rows to the same start state,
    and runs each row until its first episode ends. ``num_timesteps`` counts the decisions of rows that are
    still running.

    With several processes started by ``torchrun``, each runs its share of the groups in its own env,
    gradients are summed, and the main process writes logs and files. The counts below are totals over all
    processes, except for the rows of an ``env`` that is not given as an id (``docs/distributed.md``).

    Args:
        policy: ``"VLAPolicy"``, another alias, a :class:`~wmpo_gym.policies.GroupPolicy` class, or a
            ``GroupPolicy`` instance, whose weights are copied.
        env: Environment id, Gymnasium ``VectorEnv`` or SB3 ``VecEnv``; the number of rows must be a multiple
            of ``group_size``. None for a loaded model that only predicts.
        learning_rate: A number, or a function of the remaining progress (1 to 0).
        group_size: Rollouts per start state.
        n_groups: Informative groups per iteration; batches are collected until this number is reached, and
            surplus groups are dropped. None collects one batch and uses all of its informative groups. For an
            env id it is also the number of groups in a batch (None: 8).
        success_bounds: Groups with a success rate outside these bounds (inclusive) are dropped. None drops
            only groups whose returns are all equal.
        max_extra_batches: Maximum number of additional batches collected to replace dropped groups.
        start_state_ids: Ids to draw start states from; None uses the env's ``start_state_ids``. In an env
            without start state ids, the rows of a group share a seed instead.
        checkpoint_dir: Directory for resumable checkpoints; None writes none.
        checkpoint_interval: Iterations between checkpoints.
        stats_window_size: Episodes in SB3's episode buffers (the logged rates cover the whole iteration).
        tensorboard_log: TensorBoard directory, or None.
        policy_kwargs: Arguments of the policy.
        verbose: 0 silent, 1 tables, 2 debug.
        seed: Random seed of policy, start states and env rows; None draws one.
        device: Torch device, ``"auto"`` for CUDA when there is one.
        _init_setup_model: Build the policy now (SB3's ``load`` does it later).

    Raises:
        ValueError: If the rows of ``env`` do not fill whole groups, or an argument is out of range.
        TypeError: If the policy class cannot evaluate token log-probabilities.
    """

    log_name: ClassVar[str] = "run"  # of TensorBoard runs
    policy_aliases: ClassVar[dict[str, Any]] = {
        "MlpPolicy": MlpPolicy,
        "CnnPolicy": CnnPolicy,
        "MultiInputPolicy": MultiInputPolicy,
    }
    resume_settings: ClassVar[tuple[str, ...]] = tuple(
        "group_size n_envs n_groups success_bounds max_extra_batches learning_rate seed".split()
    )

    def __init__(
        self,
        policy: str | type[GroupPolicy] | GroupPolicy,
        env: str | gym.vector.VectorEnv | VecEnv | None,
        learning_rate: float | Schedule,
        group_size: int = 8,
        n_groups: int | None = None,
        success_bounds: tuple[float, float] | None = (0.1, 0.9),
        max_extra_batches: int = 4,
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
        start: GroupPolicy | None = None
        kind: Any = policy
        if isinstance(policy, GroupPolicy):
            start = cast(GroupPolicy, policy)
            kind, policy_kwargs = type(start), {**_constructor_arguments(start), **(policy_kwargs or {})}
        self.ranks = Ranks.join(device)
        if isinstance(env, str):
            env = as_vec_env(env, self.ranks.rows_per_rank(group_size * (n_groups or 8), group_size))
        super().__init__(
            kind,
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
        self.max_extra_batches = max_extra_batches
        self.start_state_ids = None if start_state_ids is None else np.asarray(start_state_ids, np.int64)
        self.checkpoint_dir = checkpoint_dir
        self.checkpoint_interval = checkpoint_interval
        # Not in _setup_model: load() calls it after restoring attributes and must not reseed this generator.
        self.group_rng = np.random.default_rng(seed)
        self.history: list[dict[str, float]] = []
        self.sharded = False
        self.world_fitness: Any = None
        self.budget = Ledger()  # cost of learn() in its env, including runs before a resume
        self._iteration = 0
        if _init_setup_model:
            self._setup_model()
            if start is not None:
                weights = {k: v for k, v in start.state_dict().items() if "extra_state" not in k}
                self.policy.load_state_dict({**self.policy.state_dict(), **weights})

    # ------------------------------------------------------------------ construction

    @staticmethod
    def _wrap_env(env: Any, verbose: int = 0, monitor_wrapper: bool = True) -> VecEnv:
        """SB3's hook in ``__init__``, ``load`` and ``set_env``; also accepts a Gymnasium ``VectorEnv``."""
        return BaseAlgorithm._wrap_env(as_vec_env(env, 1), verbose, monitor_wrapper)

    def _get_policy_from_name(self, policy_name: str) -> type[GroupPolicy]:
        """SB3's hook; imports the VLA policy only if it is requested."""
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
        """Check that the env's rows form whole groups, and read the validation gates of its world model."""
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

    def collect_batch(self, callback: BaseCallback) -> Trajectories | None:
        """Run one episode in every row.

        Returns:
            All episodes, or None if the callback requested a stop.
        """
        obs, ids = reset_groups(self.env, self.group_size, self.group_rng, self.start_state_ids, self.ranks)
        recorder = TrajectoryRecorder(self.n_envs)
        chunk = self.action_space.shape[0] if len(self.action_space.shape) > 1 else 1
        waiting = np.clip(np.zeros(self.action_space.shape), self.action_space.low, self.action_space.high)
        running = np.ones(self.n_envs, bool)
        live_indices, n_live = self.ranks.global_indices(th.as_tensor(running), self.group_size)
        for _ in range(MAX_DECISIONS):
            live = np.flatnonzero(running)
            live_obs = obs_as_tensor(take_rows(obs, live), "cpu")
            chosen, log_probs, traces = self._sample(live_obs, live_indices, n_live)
            actions = np.repeat(waiting[None], self.n_envs, axis=0).astype(self.action_space.dtype)
            actions[live] = np.clip(chosen.cpu().numpy(), self.action_space.low, self.action_space.high)
            obs, rewards, dones, infos = self.env.step(actions)
            self.num_timesteps += n_live
            n_actions = np.array([infos[i].get("n_frames", chunk) for i in live], np.int64)
            mask = action_mask(th.as_tensor(n_actions), chunk, traces.shape[1] // chunk)
            recorder.add(live, live_obs, traces, log_probs, mask, rewards[live], n_actions)
            for i in live[dones[live]]:
                recorder.successes[i] = infos[i].get("is_success", recorder.returns[i] > 0)
                self._note_episode(recorder.returns[i], recorder.lengths[i], recorder.successes[i])
            running &= ~dones
            callback.update_locals(locals())
            if self.ranks.largest(not callback.on_step()):
                return None
            live_indices, n_live = self.ranks.global_indices(th.as_tensor(running), self.group_size)
            if not n_live:
                return recorder.build(self.group_size, ids)
        raise RuntimeError(
            f"{n_live} rows of the env are still running after {MAX_DECISIONS} decisions; give the env a "
            "time limit (gymnasium.make(..., max_episode_steps=...))."
        )

    @th.no_grad()
    def _sample(self, obs: Obs, indices: th.Tensor, n_live: int) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """Sample decisions for this rank's running rows, given their indices among all ranks' ``n_live``."""
        if self.ranks.size == 1:
            return self.policy.sample(obs_to(obs, self.device))
        if len(indices):
            return self.policy.sample_part(obs_to(obs, self.device), indices, n_live)
        # All rows of this rank are done; sampling is collective, so it samples for a row of zeros.
        chosen, log_probs, traces = self.policy.sample_part(
            obs_to(zero_obs(obs), self.device), indices.new_zeros(1), n_live
        )
        return chosen[:0], log_probs[:0], traces[:0]

    def _note_episode(self, total: float, length: int, success: bool) -> None:
        """Add an episode to SB3's buffers (not the raw infos: the row may already be in its next episode)."""
        episode = {"r": float(total), "l": int(length), "t": time.time() - self.start_time / 1e9}
        self._update_info_buffer([{"episode": episode, "is_success": bool(success)}], np.array([True]))

    def collect_rollouts(self, callback: BaseCallback) -> Trajectories | None:
        """Collect the informative groups of one iteration; None if a callback requested a stop."""
        self.policy.set_training_mode(False)
        callback.on_rollout_start()
        per_batch = self.ranks.size * self.n_envs // self.group_size
        n_batches = (
            1 if self.n_groups is None else math.ceil(self.n_groups / per_batch) + self.max_extra_batches
        )
        kept: list[Trajectories] = []
        indices: list[th.Tensor] = []  # of the kept groups, among the kept groups of all ranks
        n_kept = 0  # over all ranks
        statistics = RolloutStatistics(self.group_size)
        for _ in range(n_batches):
            with finished_rows_wait(self.env):
                batch = self.collect_batch(callback)
            if batch is None:
                return None
            scores = batch.returns if self.success_bounds is None else batch.successes
            informative = informative_groups(scores.view(-1, self.group_size), self.success_bounds)
            kept.append(batch.select(informative.repeat_interleave(self.group_size)))
            statistics.add(batch, informative)
            index, n_new = self.ranks.global_indices(informative, 1)
            indices.append(index + n_kept)
            n_kept += n_new
            if self.n_groups is not None and n_kept >= self.n_groups:
                break
        rollouts, index = Trajectories.concatenate(kept), th.cat(indices)
        if self.n_groups is not None:
            used, n_kept = index < self.n_groups, min(n_kept, self.n_groups)
            rollouts, index = rollouts.select(used.repeat_interleave(self.group_size)), index[used]
        rollouts.global_indices = (index[:, None] * self.group_size + th.arange(self.group_size)).flatten()
        for name, value in {**statistics.summary(self.ranks), "kept_groups": n_kept}.items():
            self.logger.record(f"rollout/{name}", value)
        callback.update_locals(locals())
        callback.on_rollout_end()
        return rollouts

    # ------------------------------------------------------------------ learning

    def _synchronize_ranks(self) -> None:
        """Broadcast the main rank's weights and random states; shard the weights if FSDP is enabled.

        Raises:
            ValueError: If the envs of the ranks differ in size, or half precision is configured without FSDP.
        """
        ranks = self.ranks
        if ranks.size == 1:
            return
        if mixed_precision() != "no" and not sharding_enabled():
            raise ValueError(
                f"mixed_precision {mixed_precision()!r} of the accelerate configuration has an effect with "
                "FSDP only; set it to 'no', or distributed_type to FSDP."
            )
        rows = ranks.gather(self.n_envs)
        if len(set(rows)) > 1:
            raise ValueError(f"The envs of the processes have {rows} rows; give every process as many.")
        self.group_rng.bit_generator.state = ranks.gather(self.group_rng.bit_generator.state)[0]
        for module in (getattr(self, name) for name in self._modules()):
            for generator in policy_generators(module).values():
                generator.set_state(ranks.gather(generator.get_state())[0])
            if not self.sharded:
                ranks.broadcast([*module.parameters(), *module.buffers()])
                if sharding_enabled():
                    shard(module, ranks)
        self.sharded = sharding_enabled()

    @abstractmethod
    def train(self, rollouts: Trajectories) -> None:
        """Update the policy on the informative groups of one iteration (at least one over all ranks)."""

    def _backward(self, loss: th.Tensor) -> None:
        """Backpropagate this rank's part of the loss over all ranks."""
        # FSDP averages gradients over the ranks, but they must be summed.
        (loss * self.ranks.size if self.sharded else loss).backward()

    def _missing_forwards(self, n_forwards: int) -> int:
        """Number of dummy forward passes this rank needs to match the others, if the weights are sharded.

        With sharded weights all ranks must run the same number of forward passes.
        """
        return self.ranks.largest(n_forwards) - n_forwards if self.sharded else 0

    def _dummy_forwards(self, n_forwards: int, rollouts: Trajectories) -> None:
        """Dummy forward and backward passes, so that collective operations match across ranks."""
        obs, trace = zero_obs(rollouts.obs), zero_obs(rollouts.traces)
        for _ in range(n_forwards):
            log_prob = self._log_prob(obs, trace)[0]
            if log_prob.requires_grad:
                self._backward(0.0 * log_prob.sum())

    def _log_prob(self, obs: Obs, traces: th.Tensor) -> tuple[th.Tensor, ...]:
        """Forward passes over some decisions; the policy's ``log_prob`` and ``entropy`` come first."""
        return self.policy.log_prob(obs_to(obs, self.device), traces.to(self.device))

    def _step_optimizer(self, max_grad_norm: float) -> float:
        """Optimizer step with the gradient summed over all ranks and clipped; returns the unclipped norm.

        The step is skipped if the gradient is not finite.
        """
        optimizer = self.policy.optimizer
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.ranks.sum_gradients(parameters)
        norm = full_tensor(th.nn.utils.clip_grad_norm_(parameters, max_grad_norm)).item()
        if np.isfinite(norm):
            optimizer.step()
            self._n_updates += 1
        else:
            logger.warning("Update skipped, the weights are unchanged: the gradient norm is %s.", norm)
        return norm

    def learn(
        self: SelfGroupAlgorithm,
        total_timesteps: int = NO_LIMIT,
        callback: MaybeCallback = None,
        log_interval: int | None = 1,
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
        max_iterations: int | None = None,
        resume: bool = False,
    ) -> SelfGroupAlgorithm:
        """Run the training loop: collect rollouts, then update the policy.

        Args:
            total_timesteps: Number of decisions; the last iteration is always completed. Optional if
                ``max_iterations`` is given.
            callback: Called once per ``env.step``.
            log_interval: Iterations between log entries; None writes none.
            tb_log_name: Name of the TensorBoard run; None uses the algorithm's name.
            reset_num_timesteps: Start counting from zero. False continues training a trained model for
                ``total_timesteps`` more decisions.
            progress_bar: Show a progress bar with the remaining time.
            max_iterations: Maximum number of iterations (rollouts and one update each).
            resume: Continue from the newest checkpoint in ``checkpoint_dir``, if there is one. The results
                are those of an uninterrupted run, and both limits apply to the whole run.

        Returns:
            The model.

        Raises:
            WriteError: If a checkpoint cannot be written; no training progress is lost.
            ValueError: If no limit is given, or if the checkpoints were written with different settings, or
                by an earlier run while ``resume`` is False.
        """
        if total_timesteps >= NO_LIMIT and max_iterations is None:
            raise ValueError("learn() needs total_timesteps or max_iterations.")
        self._synchronize_ranks()
        resumed = self._resume(resume)
        if resumed:
            reset_num_timesteps, total_timesteps = False, max(0, total_timesteps - self.num_timesteps)
        max_iterations = NO_LIMIT if max_iterations is None else max_iterations
        last_iteration = max_iterations if resumed else self._iteration + max_iterations
        total_timesteps, callback = self._setup_learn(
            total_timesteps,
            callback,
            reset_num_timesteps,
            tb_log_name or self.log_name,
            progress_bar and self.ranks.is_main,
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
                offload_env(self.env)
                self.train(rollouts)
            else:
                logger.warning("Iteration %d: no informative group, update skipped.", self._iteration)
            self.logger.record("time/rollout_seconds", collected - started)
            self.logger.record("time/train_seconds", time.time() - collected)
            self.dump_logs(write=log_interval is not None and self._iteration % log_interval == 0)
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
        """Add times and budget to the recorded metrics, append them to ``history`` and write the logs."""
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


def _constructor_arguments(policy: GroupPolicy) -> dict[str, Any]:
    """Constructor arguments of a policy, without the observation and action space."""
    arguments = policy._get_constructor_parameters()
    return {k: v for k, v in arguments.items() if k not in ("observation_space", "action_space")}
