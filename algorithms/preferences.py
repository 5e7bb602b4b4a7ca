"""The arithmetic of preference optimisation over episodes, free of environments and networks."""

from __future__ import annotations

import numpy as np
import torch as th


def preference_pairs(
    successes: th.Tensor, group_ids: th.Tensor, failures_per_success: int, rng: np.random.Generator
) -> th.Tensor:
    """Pair every success with failures of the same start state.

    Args:
        successes: bool (N,).
        group_ids: int64 (N,); equal numbers had a common start state.
        failures_per_success: Most pairs per success, each with another failure.
        rng: Chooses the failures where there are more.

    Returns:
        int64 (P, 2), episodes (winner, loser); empty if no group holds both.
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
    """Log-probability of episodes under the policy minus that under the reference, in nats.

    Args:
        log_prob: Float (M, L) of M decisions under the current weights.
        reference: Float (M, L) under the weights that sampled them.
        mask: bool (M, L), the tokens that were acted on.
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
        beta: Weight of the reference.
    """
    return -th.nn.functional.logsigmoid(beta * (winner - loser))
