"""Direct Preference Optimization (DPO) on pairs of rollouts: the paper's offline baseline."""

from __future__ import annotations

import copy
import logging
import math
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.common.vec_env import VecEnv

from wmpo_gym.algorithms.group_algorithm import GroupAlgorithm
from wmpo_gym.algorithms.trajectories import Trajectories
from wmpo_gym.policies.base import GroupPolicy

logger = logging.getLogger(__name__)

ROUNDING = 1e-4  # nats; before the first optimizer step every margin is zero up to rounding


def preference_pairs(
    successes: th.Tensor, group_ids: th.Tensor, failures_per_success: int, rng: np.random.Generator
) -> th.Tensor:
    """Pair every success with failures of the same start state.

    Args:
        successes: bool (N,).
        group_ids: int64 (N,); episodes with the same id share a start state.
        failures_per_success: Maximum number of pairs per success, each with a different failure.
        rng: Selects the failures if a group has more.

    Returns:
        int64 (P, 2), episodes (winner, loser); empty if no group has both successes and failures.
    """
    pairs = []
    for group in th.unique(group_ids):
        members = group_ids == group
        winners = (members & successes).nonzero().squeeze(1).numpy()
        losers = (members & ~successes).nonzero().squeeze(1).numpy()
        for winner in winners:
            chosen = rng.permutation(losers)[:failures_per_success]
            pairs += [(int(winner), int(loser)) for loser in chosen]
    return th.tensor(pairs, dtype=th.int64).reshape(-1, 2)


def pair_gain(log_prob: th.Tensor, reference: th.Tensor, mask: th.Tensor, rows: th.Tensor) -> th.Tensor:
    """Log-ratio of the policy to the reference per episode, in nats.

    Args:
        log_prob: Float (M, L), log-probabilities of M decisions under the current weights.
        reference: Float (M, L), log-probabilities under the weights that sampled them.
        mask: bool (M, L), the tokens whose actions were executed.
        rows: int64 (M,), episode of each decision, 0 to N-1.

    Returns:
        Float (N,), summed over the tokens of each episode.
    """
    difference = th.where(mask, log_prob - reference, th.zeros_like(log_prob)).sum(1)
    n_episodes = int(rows.max()) + 1
    return difference.new_zeros(n_episodes).index_add(0, rows.to(difference.device), difference)


def preference_loss(winner: th.Tensor, loser: th.Tensor, beta: float) -> th.Tensor:
    """DPO's loss per pair, ``-log sigmoid(beta * (winner - loser))`` (arXiv 2305.18290, eq. 7).

    Args:
        winner: Float (P,) from :func:`pair_gain`.
        loser: Float (P,).
        beta: Strength of the regularisation towards the reference.
    """
    return -th.nn.functional.logsigmoid(beta * (winner - loser))


class DPO(GroupAlgorithm):
    """Direct Preference Optimization (arXiv 2305.18290) of whole episodes, as in WMPO's comparison (§4.1).

    Each iteration collects groups of rollouts from shared start states with the current policy, pairs every
    success with failures of its group, and raises the log-probability of the success relative to that of the
    failure. The reference is the policy that sampled the rollouts: its log-probabilities are stored while
    sampling, so no second model is needed. With ``max_iterations=1`` all rollouts come from the initial
    policy, which is the paper's offline baseline; every further iteration collects new rollouts.

    DPO lowers the likelihood of failures without bound and degrades the policy if training continues too
    long. Some groups are therefore held out for validation, and the weights with the lowest held-out loss
    are restored; if that loss never falls below log 2 (indifference), the policy is unchanged. A lower loss
    does not guarantee a higher success rate; a subclass can measure success directly in :meth:`score`.

    Args:
        policy: See :class:`~wmpo_gym.algorithms.group_algorithm.GroupAlgorithm` for this and every
            argument that is not listed here.
        env: See GroupAlgorithm.
        learning_rate: A number or a schedule.
        beta: Strength of the regularisation towards the reference; larger values stay closer to it.
        sft_weight: Weight of the winners' negative log-likelihood per token, which keeps them from losing
            probability together with the failures (arXiv 2404.19733, eq. 1); 0 is standard DPO.
        failures_per_success: Maximum number of pairs per success, with different failures of its group.
        batch_size: Pairs per optimizer step.
        micro_batch_size: Pairs per forward pass, None for the whole minibatch; does not change the gradient.
        n_epochs: Maximum number of epochs over the pairs of an iteration.
        patience: Epochs without a lower held-out loss after which an iteration ends.
        validation_share: Fraction of the groups held out for validation; 0 uses none and keeps the last
            weights.
        max_grad_norm: Gradients are clipped to this norm.
        **kwargs: Further arguments of GroupAlgorithm.

    Attributes:
        history: One dictionary of logged metrics per iteration.
        budget: Cost of training so far (:class:`~wmpo_gym.envs.ledger.Ledger`).
    """

    log_name = "DPO"
    resume_settings: ClassVar[tuple[str, ...]] = (
        *GroupAlgorithm.resume_settings,
        *"beta sft_weight failures_per_success batch_size micro_batch_size n_epochs patience".split(),
        *"validation_share max_grad_norm".split(),
    )

    def __init__(
        self,
        policy: str | type[GroupPolicy] | GroupPolicy = "VLAPolicy",
        env: str | gym.vector.VectorEnv | VecEnv | None = None,
        learning_rate: float | Schedule = 1e-5,
        group_size: int = 8,
        n_groups: int | None = None,
        beta: float = 0.1,
        sft_weight: float = 0.0,
        failures_per_success: int = 4,
        batch_size: int = 32,
        micro_batch_size: int | None = 16,
        n_epochs: int = 40,
        patience: int = 5,
        validation_share: float = 0.2,
        max_grad_norm: float = 1.0,
        **kwargs: Any,
    ) -> None:
        counts = {
            "failures_per_success": failures_per_success,
            "batch_size": batch_size,
            "n_epochs": n_epochs,
            "patience": patience,
        }
        for name, count in counts.items():
            if count < 1:
                raise ValueError(f"{name} must be at least 1, got {count}.")
        if not beta > 0:
            raise ValueError(f"beta must be above 0, got {beta}.")
        if not sft_weight >= 0:
            raise ValueError(f"sft_weight must not be negative, got {sft_weight}.")
        if not 0 <= validation_share < 1:
            raise ValueError(f"validation_share must lie in [0, 1), got {validation_share}.")
        self.beta = beta
        self.sft_weight = sft_weight
        self.failures_per_success = failures_per_success
        self.batch_size = batch_size
        self.micro_batch_size = micro_batch_size
        self.n_epochs = n_epochs
        self.patience = patience
        self.validation_share = validation_share
        self.max_grad_norm = max_grad_norm
        super().__init__(policy, env, learning_rate, group_size, n_groups, **kwargs)

    def train(self, rollouts: Trajectories) -> None:
        """Update the policy on the preference pairs of one iteration; no change if there are none."""
        successes, group_ids = self._outcomes(rollouts)
        pairs = preference_pairs(successes, group_ids, self.failures_per_success, self.group_rng)
        self.logger.record("rollout/n_pairs", len(pairs))
        if not len(pairs):
            logger.warning(
                "Iteration %d: no group has both a success and a failure, no update.", self._iteration
            )
            return
        training, held_out = self._split(pairs, group_ids)
        self.policy.set_training_mode(True)
        self._update_learning_rate(self.policy.optimizer)
        best, best_score, best_epoch = self._weights(), self._agreed_score(rollouts, held_out), 0
        metrics: dict[str, float] = {}
        for epoch in range(1, self.n_epochs + 1):
            metrics = self._epoch(rollouts, training)
            score = self._agreed_score(rollouts, held_out)
            if score is None or best_score is None:
                continue
            metrics["validation_score"] = score
            if score > best_score:
                best, best_score, best_epoch = self._weights(), score, epoch
            elif epoch - best_epoch >= self.patience:
                break
        if best_score is not None:
            self.policy.load_state_dict(best)
            metrics |= {"best_validation_score": best_score, "best_epoch": best_epoch}
        self.policy.set_training_mode(False)
        for name, value in {**metrics, "epochs": epoch, "n_updates": self._n_updates}.items():
            self.logger.record(f"train/{name}", value)

    def score(self, rollouts: Trajectories, held_out: th.Tensor) -> float | None:
        """Validation score of the current weights, higher is better.

        Called before the first epoch and after every epoch.

        Args:
            rollouts: Rollouts of the iteration.
            held_out: Pairs ``(P, 2)`` excluded from training, as indices into the rollouts of all ranks.

        Returns:
            The negative loss on the held-out pairs. None if there are none; the last weights are then kept.
        """
        return -self._held_out_loss(rollouts, held_out) if len(held_out) else None

    def _agreed_score(self, rollouts: Trajectories, held_out: th.Tensor) -> float | None:
        """The main rank's score, used by all ranks because rounding may differ between them."""
        return self.ranks.gather(self.score(rollouts, held_out))[0]

    def _outcomes(self, rollouts: Trajectories) -> tuple[th.Tensor, th.Tensor]:
        """Successes and group ids of the rollouts of all ranks, in the order of their global indices."""
        if self.ranks.size == 1 or rollouts.global_indices is None:
            return rollouts.successes, rollouts.group_ids
        parts = zip(*self.ranks.gather((rollouts.global_indices, rollouts.successes)), strict=True)
        indices, successes = (th.cat(part) for part in parts)
        return successes[indices.argsort()], indices.sort().values // self.group_size

    def _weights(self) -> dict[str, th.Tensor]:
        return copy.deepcopy(self.policy.state_dict())

    def _split(self, pairs: th.Tensor, group_ids: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """Training pairs and held-out pairs, split by group; at least one group stays for training."""
        group = group_ids[pairs[:, 0]]
        groups = th.unique(group).numpy()
        n_held = math.ceil(self.validation_share * len(groups))
        held = self.group_rng.permutation(groups)[: min(n_held, len(groups) - 1)]
        back = th.isin(group, th.as_tensor(held))
        return pairs[~back], pairs[back]

    def _epoch(self, rollouts: Trajectories, pairs: th.Tensor) -> dict[str, float]:
        """One epoch over the pairs in random order; metrics are means over the optimizer steps."""
        order = th.as_tensor(self.group_rng.permutation(len(pairs)))
        steps = [self._update(rollouts, pairs[index]) for index in order.split(self.batch_size)]
        return {name: float(np.mean([step[name] for step in steps])) for name in steps[0]}

    def _update(self, rollouts: Trajectories, pairs: th.Tensor) -> dict[str, float]:
        """One optimizer step on a minibatch of pairs ``(P, 2)``."""
        self.policy.optimizer.zero_grad()
        total, n_tokens = {"loss": 0.0, "pair_accuracy": 0.0, "margin": 0.0}, rollouts.token_counts()
        parts = self._micro_batches(rollouts, pairs)
        n_missing = self._missing_forwards(len(parts))
        for part in parts:
            winner, loser = self._gains(rollouts, part)
            loss = preference_loss(winner, loser, self.beta).sum() / len(pairs)
            if self.sft_weight:
                # The reference's log-likelihood is constant and left out.
                per_token = winner / n_tokens[part[:, 0]].to(winner)
                loss = loss - self.sft_weight * per_token.sum() / len(pairs)
            self._backward(loss)
            margin = (winner - loser).detach()
            total["loss"] += loss.item()
            total["pair_accuracy"] += (margin > ROUNDING).float().sum().item() / len(pairs)
            total["margin"] += margin.sum().item() / len(pairs)
        self._dummy_forwards(n_missing, rollouts)
        return {**self.ranks.add(total), "grad_norm": self._step_optimizer(self.max_grad_norm)}

    def _micro_batches(self, rollouts: Trajectories, pairs: th.Tensor) -> tuple[th.Tensor, ...]:
        """Micro-batches of the pairs of this rank's groups, as indices into its own rollouts."""
        if self.ranks.size > 1 and rollouts.global_indices is not None:
            here = th.isin(pairs, rollouts.global_indices).all(1)
            pairs = th.searchsorted(rollouts.global_indices, pairs[here])
        return pairs.split(self.micro_batch_size or len(pairs)) if len(pairs) else ()

    def _gains(self, rollouts: Trajectories, pairs: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """Log-ratios to the reference of winners and losers, in nats per episode: (P,) each."""
        episodes, place = th.unique(pairs, return_inverse=True)
        some = rollouts.select(episodes)
        log_prob = self._log_prob(some.obs, some.traces)[0]
        gain = pair_gain(log_prob, some.log_probs.to(self.device), some.token_mask.to(self.device), some.rows)
        return gain[place[:, 0]], gain[place[:, 1]]

    @th.no_grad()
    def _held_out_loss(self, rollouts: Trajectories, pairs: th.Tensor) -> float:
        self.policy.set_training_mode(False)
        parts = self._micro_batches(rollouts, pairs)
        n_missing = self._missing_forwards(len(parts))
        losses = [preference_loss(*self._gains(rollouts, part), self.beta) for part in parts]
        self._dummy_forwards(n_missing, rollouts)
        self.policy.set_training_mode(True)
        share = (th.cat(losses).sum() / len(pairs)).item() if losses else 0.0
        return sum(self.ranks.gather(share))
