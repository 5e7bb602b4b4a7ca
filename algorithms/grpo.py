"""Group Relative Policy Optimization for policies over action tokens."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3.common.type_aliases import MaybeCallback, Schedule
from stable_baselines3.common.vec_env import VecEnv

from wmpo_gym.algorithms.group_algorithm import NO_LIMIT, GroupAlgorithm
from wmpo_gym.algorithms.objective import (
    LossNormalizer,
    clipped_surrogate,
    group_advantages,
    kl_penalty,
    loss_units,
    masked_mean,
    token_weights,
)
from wmpo_gym.algorithms.trajectories import Obs, Trajectories, index_obs, obs_to
from wmpo_gym.policies.base import GroupPolicy

logger = logging.getLogger(__name__)

SelfGRPO = TypeVar("SelfGRPO", bound="GRPO")

# Above this the policy evaluates its own decisions differently from how it made them.
RATIO_TOLERANCE = 1e-3


class GRPO(GroupAlgorithm):
    """Group Relative Policy Optimization as WMPO uses it (arXiv 2511.09515 §3.4 and table 4).

    A rollout's advantage is how much better it ended than the others from the same start state, in standard
    deviations of their group; every token it acted on is pushed by it through PPO's clipped ratio, with
    DAPO's asymmetric clip and dynamic sampling (arXiv 2503.14476). No critic, no reward shaping, no KL by
    default.

    With few rollouts per iteration large minibatches are what makes it climb: one or two optimizer steps per
    epoch (``batch_size=None`` takes all rollouts at once). The sampling temperature belongs to the policy.

    Example::

        model = GRPO("VLAPolicy", "WMPO-Imagined-v0", n_groups=32, policy_kwargs={"model": "my-policy"})
        model.learn(100_000, progress_bar=True)
        model.policy.save_pretrained("my-better-policy")

    ``save`` and ``load`` are those of Stable-Baselines3 and use pickle inside: load only files you trust. To
    share a policy use ``policy.save_pretrained``; to survive a kill use ``checkpoint_dir``.

    Args:
        policy: See :class:`~wmpo_gym.algorithms.group_algorithm.GroupAlgorithm` for this and every
            argument that is not listed here.
        env: See there.
        learning_rate: A number or a schedule. The default suits policies of about a million weights; the
            published 7 B policy was trained with 5e-6.
        batch_size: Rollouts per optimizer step; None takes all of an iteration.
        micro_batch_size: Decisions per forward pass, None for the whole minibatch. Does not change the
            gradient, only memory and speed (on a CPU 64 to 128 is a third faster than all at once).
        n_epochs: Passes over the rollouts of an iteration.
        clip_range: How far the ratio may fall below 1.
        clip_range_high: How far the ratio may rise above 1.
        normalize_advantage: Divide by the standard deviation of the group's returns.
        loss_normalizer: ``"trajectory"`` averages over the tokens of a rollout, then over rollouts
            (published); ``"token"`` averages over all tokens alike.
        ratio_level: ``"token"`` clips every token's ratio by itself, ``"chunk"`` the geometric mean over the
            tokens of a decision.
        kl_coef: Weight of the divergence from the policy training started with; 0 keeps no copy of it.
        max_grad_norm: Gradients are scaled down to this norm.
        recompute_log_probs: Evaluate the old log-probabilities again with the training forward pass instead
            of keeping those of sampling; for policies whose two passes round differently (half precision).

    Attributes:
        history: One dictionary of logged numbers per iteration.
        budget: What training has spent (:class:`~wmpo_gym.envs.ledger.Ledger`).
        world_fitness: Gates of the world that was trained in; None if the env has no world.
    """

    resume_settings: ClassVar[tuple[str, ...]] = (
        *GroupAlgorithm.resume_settings,
        *"batch_size micro_batch_size n_epochs clip_range clip_range_high normalize_advantage".split(),
        *"loss_normalizer ratio_level kl_coef max_grad_norm recompute_log_probs".split(),
    )

    def __init__(
        self,
        policy: str | type[GroupPolicy] = "VLAPolicy",
        env: str | gym.vector.VectorEnv | VecEnv | None = None,
        learning_rate: float | Schedule = 5e-4,
        group_size: int = 8,
        n_groups: int | None = None,
        batch_size: int | None = None,
        micro_batch_size: int | None = 128,
        n_epochs: int = 2,
        clip_range: float = 0.2,
        clip_range_high: float = 0.28,
        normalize_advantage: bool = True,
        loss_normalizer: LossNormalizer = "trajectory",
        ratio_level: Literal["token", "chunk"] = "token",
        kl_coef: float = 0.0,
        max_grad_norm: float = 1.0,
        recompute_log_probs: bool = False,
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
        if loss_normalizer not in ("trajectory", "token"):
            raise ValueError(f"Unknown loss_normalizer {loss_normalizer!r}; choose 'trajectory' or 'token'.")
        if ratio_level not in ("token", "chunk"):
            raise ValueError(f"Unknown ratio_level {ratio_level!r}; choose 'token' or 'chunk'.")
        sizes = {"batch_size": batch_size, "micro_batch_size": micro_batch_size, "n_epochs": n_epochs}
        for name, size in sizes.items():
            if size is not None and size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}.")
        super().__init__(
            policy,
            env,
            learning_rate,
            group_size=group_size,
            n_groups=n_groups,
            success_bounds=success_bounds,
            max_extra_waves=max_extra_waves,
            start_state_ids=start_state_ids,
            checkpoint_dir=checkpoint_dir,
            checkpoint_interval=checkpoint_interval,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            policy_kwargs=policy_kwargs,
            verbose=verbose,
            seed=seed,
            device=device,
            _init_setup_model=False,
        )
        self.batch_size = batch_size
        self.micro_batch_size = micro_batch_size
        self.n_epochs = n_epochs
        self.clip_range = clip_range
        self.clip_range_high = clip_range_high
        self.normalize_advantage = normalize_advantage
        self.loss_normalizer = loss_normalizer
        self.ratio_level = ratio_level
        self.kl_coef = kl_coef
        self.max_grad_norm = max_grad_norm
        self.recompute_log_probs = recompute_log_probs
        if _init_setup_model:
            self._setup_model()

    def _setup_model(self) -> None:
        super()._setup_model()
        if self.kl_coef:
            self.reference_policy = copy.deepcopy(self.policy).requires_grad_(False)

    def _setup_learn(self, *args: Any, **kwargs: Any) -> tuple[int, Any]:
        if self.kl_coef and not self._n_updates:  # weights may have been put in since the constructor
            self.reference_policy.load_state_dict(self.policy.state_dict())
        return super()._setup_learn(*args, **kwargs)

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        modules, variables = super()._get_torch_save_params()
        return [*modules, *(["reference_policy"] if self.kl_coef else [])], variables

    def train(self, rollouts: Trajectories) -> None:
        """Update the policy on the rollouts of one iteration."""
        self.policy.set_training_mode(True)
        self._update_learning_rate(self.policy.optimizer)
        minibatches = self._minibatches(rollouts)
        if self.recompute_log_probs:  # in the very batches of the update: others may round differently
            rollouts.log_probs = th.cat([self._evaluate(rollouts.select(index)) for index in minibatches])
        advantages = group_advantages(rollouts.returns, rollouts.group_ids, self.normalize_advantage)
        scored = ~rollouts.returns.isnan()
        rollouts.token_mask = rollouts.token_mask & scored[rollouts.rows].unsqueeze(1)
        history: list[dict[str, float]] = []
        for _ in range(self.n_epochs):
            for index in minibatches:
                history.append(self._update(rollouts.select(index), advantages[index]))
        self.policy.optimizer.zero_grad()  # the gradient's memory, for the next rollouts
        self.policy.set_training_mode(False)
        self._log_update(history)

    def _minibatches(self, rollouts: Trajectories) -> list[th.Tensor]:
        """Indices of this rank's rollouts in each minibatch of the rollouts of all ranks."""
        total = self.ranks.total(len(rollouts))
        places = th.arange(total) if rollouts.places is None else rollouts.places
        size = self.batch_size or total
        return [(places // size == i).nonzero().squeeze(1) for i in range(-(-total // size))]

    def _update(self, batch: Trajectories, advantages: th.Tensor) -> dict[str, float]:
        """One optimizer step on a minibatch."""
        self.policy.optimizer.zero_grad()
        statistics = self.accumulate_gradient(batch, advantages)
        return {**statistics, "grad_norm": self._step_optimizer(self.max_grad_norm)}

    def accumulate_gradient(self, batch: Trajectories, advantages: th.Tensor) -> dict[str, float]:
        """Add the gradient of a minibatch's loss to ``.grad``, micro-batch by micro-batch.

        Args:
            batch: The minibatch.
            advantages: float32 (N,), of its trajectories.

        Returns:
            ``loss`` and the means over tokens of ``clip_fraction``, ``approx_kl``, ``entropy`` (and ``kl``);
            ``ratio_max_error``, the largest distance of a ratio from 1. All of them are of all ranks.
        """
        n_units = self.ranks.total(loss_units(batch.token_mask, batch.rows, self.loss_normalizer))
        weights = token_weights(batch.token_mask, batch.rows, self.loss_normalizer, n_units)
        parts = self._micro_batches(batch)
        n_short = self._passes_short(len(parts))
        total: dict[str, float] = {}
        ratio_error = 0.0
        for part in parts:
            mask = batch.token_mask[part].to(self.device)
            log_prob, entropy, *reference = self._log_prob(index_obs(batch.obs, part), batch.traces[part])
            # Old values outside the mask are arbitrary; the new ones in their place keep every ratio finite.
            old = th.where(mask, batch.log_probs[part].to(self.device), log_prob.detach())
            new = log_prob
            if self.ratio_level == "chunk":
                new, old = (masked_mean(x, mask, dim=1).unsqueeze(1).expand_as(mask) for x in (log_prob, old))
            advantage = advantages[batch.rows[part]].to(self.device).unsqueeze(1)
            surrogate = clipped_surrogate(new, old, advantage, self.clip_range, self.clip_range_high)
            token_loss = surrogate.loss
            sums = {"clip_fraction": surrogate.clipped, "entropy": entropy, "approx_kl": kl_penalty(old, new)}
            if reference:
                sums["kl"] = kl_penalty(log_prob, th.where(mask, reference[0], log_prob.detach()))
                token_loss = token_loss + self.kl_coef * sums["kl"]
            loss = (weights[part].to(self.device) * token_loss).sum()
            self._backward(loss)
            for name, values in sums.items():
                total[name] = total.get(name, 0.0) + values.detach()[mask].float().sum().item()
            total["loss"] = total.get("loss", 0.0) + loss.item()
            if mask.any():
                ratio_error = max(ratio_error, surrogate.log_ratio.detach()[mask].expm1().abs().max().item())
        self._blank_passes(n_short, batch)
        n_tokens = max(self.ranks.total(int(batch.token_mask.sum())), 1)
        means = {k: v if k == "loss" else v / n_tokens for k, v in self.ranks.add(total).items()}
        return {**means, "ratio_max_error": self.ranks.largest(ratio_error)}

    def _log_prob(self, obs: Obs, traces: th.Tensor) -> tuple[th.Tensor, ...]:
        passed = super()._log_prob(obs, traces)
        if not (self.kl_coef and th.is_grad_enabled()):
            return passed
        with th.no_grad():
            reference = self.reference_policy.log_prob(obs_to(obs, self.device), traces.to(self.device))
        return (*passed, reference[0])

    def _micro_batches(self, batch: Trajectories) -> tuple[th.Tensor, ...]:
        """Indices of the decisions of each micro-batch; none if there is no decision."""
        parts = th.arange(batch.n_decisions).split(self.micro_batch_size or max(batch.n_decisions, 1))
        return parts if batch.n_decisions else ()

    @th.no_grad()
    def _evaluate(self, rollouts: Trajectories) -> th.Tensor:
        """Log-probabilities of all decisions under the present weights, float32 (M, L)."""
        parts = self._micro_batches(rollouts)
        n_short = self._passes_short(len(parts))
        found = [self._log_prob(index_obs(rollouts.obs, part), rollouts.traces[part])[0] for part in parts]
        self._blank_passes(n_short, rollouts)
        return th.cat(found).float().cpu() if parts else rollouts.log_probs

    def _log_update(self, history: list[dict[str, float]]) -> None:
        """Record the means over the optimizer steps, and the ratio error of the very first one."""
        error = history[0]["ratio_max_error"]
        if error > RATIO_TOLERANCE:
            warnings.warn(
                f"{type(self.policy).__name__}.log_prob disagrees with its sample: before the first update "
                f"the ratio is off by {error:.2g} (it should be 1). Is dropout on in training mode, or the "
                "temperature not the same in both? In half precision set recompute_log_probs=True.",
                stacklevel=2,
            )
        for name in history[0]:
            if name != "ratio_max_error":
                self.logger.record(f"train/{name}", float(np.mean([h[name] for h in history])))
        self.logger.record("train/ratio_max_error", error)
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")

    def learn(
        self: SelfGRPO,
        total_timesteps: int = NO_LIMIT,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str = "GRPO",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
        max_iterations: int | None = None,
        resume: bool = False,
    ) -> SelfGRPO:
        """Alternate grouped rollouts and updates; see :meth:`GroupAlgorithm.learn` for the arguments."""
        return super().learn(
            total_timesteps,
            callback,
            log_interval,
            tb_log_name,
            reset_num_timesteps,
            progress_bar,
            max_iterations,
            resume,
        )
