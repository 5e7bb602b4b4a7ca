"""Group Relative Policy Optimization (GRPO) for policies over action tokens: loss and policy update.

Rollout collection and the training loop are in :mod:`~wmpo_gym.algorithms.group_algorithm`.

Shapes: N trajectories, M decisions (one action chunk each), L tokens per decision. ``rows`` int64 (M,) is the
trajectory of each decision. Every function accepts an empty mask and does not return NaN for it.
"""

from __future__ import annotations

import copy
import logging
import warnings
from typing import Any, ClassVar, Literal, NamedTuple

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.common.vec_env import VecEnv

from wmpo_gym.algorithms.group_algorithm import GroupAlgorithm
from wmpo_gym.algorithms.trajectories import Obs, Trajectories, index_obs, obs_to
from wmpo_gym.policies.base import GroupPolicy

logger = logging.getLogger(__name__)

LossNormalizer = Literal["trajectory", "token"]
KLKind = Literal["k1", "abs", "k2", "k3"]

# Added to the standard deviation of a group's returns (WMPO, and GRPO before it).
ADVANTAGE_EPS = 1e-6

# Above this error, log_prob assigns sampled decisions other probabilities than sample did.
RATIO_TOLERANCE = 1e-3


def masked_mean(values: th.Tensor, mask: th.Tensor, dim: int | None = None) -> th.Tensor:
    """Mean of the entries where ``mask`` is True, over all entries or along one dimension.

    The mean over an empty mask is 0; the published row-wise mean is NaN there and corrupts the update.
    """
    kept = th.where(mask, values, th.zeros_like(values))
    total, count = (kept.sum(), mask.sum()) if dim is None else (kept.sum(dim), mask.sum(dim))
    return total / count.clamp(min=1)


def group_advantages(returns: th.Tensor, group_ids: th.Tensor, normalize: bool = True) -> th.Tensor:
    """Group-relative advantage of each trajectory: ``(R - mean) / (std + 1e-6)``.

    The standard deviation is unbiased. A group with equal returns gets advantage 0; a group of one has no
    baseline and keeps its return. A return of NaN marks an episode that could not be scored: its advantage
    is 0 and it is excluded from the group statistics.

    Args:
        returns: Float (N,).
        group_ids: int64 (N,); trajectories with the same id form a group, in any order.
        normalize: Divide by the standard deviation. False uses ``R - mean`` (Dr. GRPO, arXiv 2503.20783).

    Returns:
        float32 (N,).
    """
    scored = ~returns.isnan()
    values = th.where(scored, returns, th.zeros_like(returns)).double()
    _, group = th.unique(group_ids, return_inverse=True)
    n_groups = int(group.max()) + 1 if len(group) else 0

    def group_sum(x: th.Tensor) -> th.Tensor:
        return x.new_zeros(n_groups).index_add(0, group, x)

    count = group_sum(scored.double())
    alone = count == 1
    mean = th.where(alone, 0.0, group_sum(values) / count.clamp(min=1))
    centred = th.where(scored, values - mean[group], 0.0)
    if not normalize:
        return centred.float()
    variance = group_sum(centred.square()) / (count - 1).clamp(min=1)
    std = th.where(alone, 1.0, variance.sqrt())
    return (centred / (std[group] + ADVANTAGE_EPS)).float()


def loss_units(mask: th.Tensor, rows: th.Tensor, normalizer: LossNormalizer) -> int:
    """Number of tokens, or of trajectories with at least one token, that a minibatch's loss averages over."""
    if normalizer == "token":
        return int(mask.sum())
    return len(th.unique(rows[mask.any(1)]))


def token_weights(
    mask: th.Tensor, rows: th.Tensor, normalizer: LossNormalizer = "trajectory", n_units: int | None = None
) -> th.Tensor:
    """Weight of every token in the loss of a minibatch; the loss is ``(weights * token_loss).sum()``.

    Because the weights are computed before the forward passes, the minibatch can be split into micro-batches
    anywhere without changing the gradient.

    Args:
        mask: bool (M, L), the tokens that contribute to the loss.
        rows: int64 (M,), the trajectory of each decision.
        normalizer: ``"trajectory"`` (published): mean over the tokens of a trajectory, then over trajectories
            (excluding those without tokens). ``"token"``: mean over all tokens.
        n_units: :func:`loss_units` of the whole minibatch, if the inputs are only a part of it.

    Returns:
        float32 (M, L), 0 outside the mask; sums to 1 over the minibatch, or to 0 if the mask is empty.

    Raises:
        ValueError: If the normalizer is unknown.
    """
    if normalizer not in ("trajectory", "token"):
        raise ValueError(f"Unknown loss_normalizer {normalizer!r}; choose 'trajectory' or 'token'.")
    if not len(rows):
        return mask.float()
    n_units = loss_units(mask, rows, normalizer) if n_units is None else n_units
    if normalizer == "token":
        return mask.float() / max(n_units, 1)
    per_row = mask.sum(1).new_zeros(int(rows.max()) + 1).index_add(0, rows, mask.sum(1))
    return mask.float() / (per_row[rows] * n_units).clamp(min=1).unsqueeze(1)


class Surrogate(NamedTuple):
    """Clipped surrogate objective per token.

    Attributes:
        loss: Float (M, L), unweighted loss; lower is better.
        clipped: bool (M, L), True where clipping removes the gradient.
        log_ratio: Float (M, L), new minus old log-probability.
    """

    loss: th.Tensor
    clipped: th.Tensor
    log_ratio: th.Tensor


def clipped_surrogate(
    log_prob: th.Tensor,
    old_log_prob: th.Tensor,
    advantages: th.Tensor,
    clip_range: float = 0.2,
    clip_range_high: float = 0.28,
) -> Surrogate:
    """PPO's clipped objective with DAPO's asymmetric clip range; no dual clip, as published.

    Args:
        log_prob: Float (M, L) under the current weights.
        old_log_prob: Float (M, L) under the weights that sampled the decisions.
        advantages: Float (M, L) or (M, 1).
        clip_range: The ratio is clipped below at ``1 - clip_range``.
        clip_range_high: The ratio is clipped above at ``1 + clip_range_high``.
    """
    log_ratio = log_prob - old_log_prob
    ratio = log_ratio.exp()
    free = -advantages * ratio
    cut = -advantages * ratio.clamp(1.0 - clip_range, 1.0 + clip_range_high)
    return Surrogate(th.maximum(free, cut), cut > free, log_ratio)


def kl_penalty(log_prob: th.Tensor, ref_log_prob: th.Tensor, kind: KLKind = "k3") -> th.Tensor:
    """Estimate of the KL divergence from a reference policy per token.

    ``k1`` is the difference of log-probabilities, ``abs`` its absolute value, ``k2`` half its square, and
    ``k3`` the unbiased non-negative estimate (Schulman 2020; GRPO, arXiv 2402.03300, eq. 4).

    Raises:
        ValueError: If the kind is unknown.
    """
    difference = log_prob - ref_log_prob
    if kind == "k1":
        return difference
    if kind == "abs":
        return difference.abs()
    if kind == "k2":
        return 0.5 * difference.square()
    if kind == "k3":
        return th.expm1(-difference) + difference
    raise ValueError(f"Unknown KL estimate {kind!r}; choose 'k1', 'abs', 'k2' or 'k3'.")


class GRPO(GroupAlgorithm):
    """Group Relative Policy Optimization as used in WMPO (arXiv 2511.09515 §3.4 and table 4).

    The advantage of a rollout is its return relative to the other rollouts from the same start state, in
    standard deviations of the group. It weights PPO's clipped ratio of every executed token, with DAPO's
    asymmetric clip range and dynamic sampling (arXiv 2503.14476). There is no critic, no reward shaping and,
    by default, no KL penalty.

    With few rollouts per iteration, large minibatches work best: one or two optimizer steps per epoch
    (``batch_size=None`` uses all rollouts at once). The sampling temperature is a setting of the policy.

    Example::

        model = GRPO("VLAPolicy", "WMPO-Imagined-v0", n_groups=32, policy_kwargs={"model": "my-policy"})
        model.learn(100_000, progress_bar=True)
        model.policy.save_pretrained("my-better-policy")

    ``save`` and ``load`` are those of Stable-Baselines3 and use pickle: load only files you trust. To share a
    policy use ``policy.save_pretrained``; to resume interrupted runs use ``checkpoint_dir``.

    Args:
        policy: See :class:`~wmpo_gym.algorithms.group_algorithm.GroupAlgorithm` for this and every
            argument that is not listed here.
        env: See GroupAlgorithm.
        learning_rate: A number or a schedule. The default is tuned for policies of about a million
            parameters; the published 7B policy was trained with 5e-6.
        batch_size: Rollouts per optimizer step; None uses all rollouts of an iteration.
        micro_batch_size: Decisions per forward pass, None for the whole minibatch. Affects memory and speed,
            not the gradient (64 to 128 is fastest on a CPU).
        n_epochs: Epochs over the rollouts of an iteration.
        clip_range: Lower clip range of the ratio (clipped below at 1 - clip_range).
        clip_range_high: Upper clip range of the ratio (clipped above at 1 + clip_range_high).
        normalize_advantage: Divide by the standard deviation of the group's returns.
        loss_normalizer: ``"trajectory"`` averages over the tokens of a rollout, then over rollouts
            (published); ``"token"`` averages over all tokens.
        ratio_level: ``"token"`` clips the ratio of each token, ``"chunk"`` the geometric mean over the tokens
            of a decision.
        kl_coef: Weight of the KL divergence from the initial policy; 0 keeps no copy of that policy.
        max_grad_norm: Gradients are clipped to this norm.
        recompute_log_probs: Recompute the old log-probabilities with the training forward pass instead of
            reusing those from sampling; for policies whose two passes round differently (half precision).
        **kwargs: Further arguments of GroupAlgorithm.

    Attributes:
        history: One dictionary of logged metrics per iteration.
        budget: Cost of training so far (:class:`~wmpo_gym.envs.ledger.Ledger`).
        world_fitness: Validation gates of the world model; None if the env has no world model.
    """

    log_name = "GRPO"
    resume_settings: ClassVar[tuple[str, ...]] = (
        *GroupAlgorithm.resume_settings,
        *"batch_size micro_batch_size n_epochs clip_range clip_range_high normalize_advantage".split(),
        *"loss_normalizer ratio_level kl_coef max_grad_norm recompute_log_probs".split(),
    )

    def __init__(
        self,
        policy: str | type[GroupPolicy] | GroupPolicy = "VLAPolicy",
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
        **kwargs: Any,
    ) -> None:
        if loss_normalizer not in ("trajectory", "token"):
            raise ValueError(f"Unknown loss_normalizer {loss_normalizer!r}; choose 'trajectory' or 'token'.")
        if ratio_level not in ("token", "chunk"):
            raise ValueError(f"Unknown ratio_level {ratio_level!r}; choose 'token' or 'chunk'.")
        sizes = {"batch_size": batch_size, "micro_batch_size": micro_batch_size, "n_epochs": n_epochs}
        for name, size in sizes.items():
            if size is not None and size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}.")
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
        super().__init__(policy, env, learning_rate, group_size, n_groups, **kwargs)

    def _setup_model(self) -> None:
        super()._setup_model()
        if self.kl_coef:
            self.reference_policy = copy.deepcopy(self.policy).requires_grad_(False)

    def _setup_learn(self, *args: Any, **kwargs: Any) -> tuple[int, Any]:
        if self.kl_coef and not self._n_updates:  # weights may have been loaded since the constructor
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
        if self.recompute_log_probs:  # with the same batches as the update, so that rounding is the same
            rollouts.log_probs = th.cat([self._evaluate(rollouts.select(index)) for index in minibatches])
        advantages = group_advantages(rollouts.returns, rollouts.group_ids, self.normalize_advantage)
        scored = ~rollouts.returns.isnan()
        rollouts.token_mask = rollouts.token_mask & scored[rollouts.rows].unsqueeze(1)
        history: list[dict[str, float]] = []
        for _ in range(self.n_epochs):
            for index in minibatches:
                history.append(self._update(rollouts.select(index), advantages[index]))
        self.policy.optimizer.zero_grad()  # frees the gradients' memory for the next rollouts
        self.policy.set_training_mode(False)
        self._log_update(history)

    def _minibatches(self, rollouts: Trajectories) -> list[th.Tensor]:
        """For each global minibatch, the indices of this rank's rollouts."""
        total = self.ranks.total(len(rollouts))
        indices = th.arange(total) if rollouts.global_indices is None else rollouts.global_indices
        size = self.batch_size or total
        return [(indices // size == i).nonzero().squeeze(1) for i in range(-(-total // size))]

    def _update(self, batch: Trajectories, advantages: th.Tensor) -> dict[str, float]:
        """One optimizer step on a minibatch."""
        self.policy.optimizer.zero_grad()
        statistics = self.accumulate_gradient(batch, advantages)
        return {**statistics, "grad_norm": self._step_optimizer(self.max_grad_norm)}

    def accumulate_gradient(self, batch: Trajectories, advantages: th.Tensor) -> dict[str, float]:
        """Add the gradient of a minibatch's loss to ``.grad``, micro-batch by micro-batch.

        Args:
            batch: The minibatch.
            advantages: float32 (N,), one per trajectory.

        Returns:
            ``loss``, the means over tokens of ``clip_fraction``, ``approx_kl``, ``entropy`` (and ``kl``), and
            ``ratio_max_error``, the largest distance of a ratio from 1; all over all ranks.
        """
        n_units = self.ranks.total(loss_units(batch.token_mask, batch.rows, self.loss_normalizer))
        weights = token_weights(batch.token_mask, batch.rows, self.loss_normalizer, n_units)
        parts = self._micro_batches(batch)
        n_missing = self._missing_forwards(len(parts))
        total: dict[str, float] = {}
        ratio_error = 0.0
        for part in parts:
            mask = batch.token_mask[part].to(self.device)
            log_prob, entropy, *reference = self._log_prob(index_obs(batch.obs, part), batch.traces[part])
            # Old values outside the mask are arbitrary; replaced by the new ones so that ratios stay finite.
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
        self._dummy_forwards(n_missing, batch)
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
        """Decision indices of each micro-batch; empty if there are no decisions."""
        parts = th.arange(batch.n_decisions).split(self.micro_batch_size or max(batch.n_decisions, 1))
        return parts if batch.n_decisions else ()

    @th.no_grad()
    def _evaluate(self, rollouts: Trajectories) -> th.Tensor:
        """Log-probabilities of all decisions under the current weights, float32 (M, L)."""
        parts = self._micro_batches(rollouts)
        n_missing = self._missing_forwards(len(parts))
        found = [self._log_prob(index_obs(rollouts.obs, part), rollouts.traces[part])[0] for part in parts]
        self._dummy_forwards(n_missing, rollouts)
        return th.cat(found).float().cpu() if parts else rollouts.log_probs

    def _log_update(self, history: list[dict[str, float]]) -> None:
        """Log the means over the optimizer steps, and the ratio error of the first one."""
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
