"""The arithmetic of group-relative policy optimisation, free of environments and networks.

Shapes: N trajectories, M decisions (one action chunk each), L tokens per decision. ``rows`` int64 (M,) says
which trajectory a decision belongs to. Every function accepts an empty mask; none of them returns NaN for it.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch as th

LossNormalizer = Literal["trajectory", "token"]
KLKind = Literal["k1", "abs", "k2", "k3"]

# Added to the standard deviation of a group's returns (WMPO, and GRPO before it).
ADVANTAGE_EPS = 1e-6


def token_statistics(
    logits: th.Tensor, tokens: th.Tensor, temperature: float = 1.0
) -> tuple[th.Tensor, th.Tensor]:
    """Log-probability and entropy of categorical tokens.

    Args:
        logits: Float (..., n_bins).
        tokens: int64 (...), the chosen bins.
        temperature: Divides the logits; must be the one the tokens were sampled with.

    Returns:
        ``log_prob`` and ``entropy``, float (...), in nats.
    """
    log_probs = th.log_softmax(logits / temperature, dim=-1)
    chosen = log_probs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    return chosen, -(log_probs.exp() * log_probs).sum(-1)


def masked_mean(values: th.Tensor, mask: th.Tensor, dim: int | None = None) -> th.Tensor:
    """Mean of the entries where ``mask`` is True, over everything or over one dimension.

    Where nothing is kept the mean is 0; the published row-wise mean gives NaN there and poisons the update.
    """
    kept = th.where(mask, values, th.zeros_like(values))
    total, count = (kept.sum(), mask.sum()) if dim is None else (kept.sum(dim), mask.sum(dim))
    return total / count.clamp(min=1)


def action_mask(n_actions: th.Tensor, chunk: int, tokens_per_action: int) -> th.Tensor:
    """Which tokens of a decision were acted on: those of its first ``n_actions`` actions.

    Args:
        n_actions: int64 (M,), actions carried out before the episode ended, 0 to ``chunk``.
        chunk: Actions per decision, K.
        tokens_per_action: Tokens per action.

    Returns:
        bool (M, chunk * tokens_per_action), tokens ordered action by action.
    """
    kept = th.arange(chunk, device=n_actions.device) < n_actions.unsqueeze(-1)
    return kept.repeat_interleave(tokens_per_action, dim=-1)


def group_advantages(returns: th.Tensor, group_ids: th.Tensor, normalize: bool = True) -> th.Tensor:
    """Advantage of a trajectory over the others of its group: ``(R - mean) / (std + 1e-6)``.

    The standard deviation is the unbiased one. A group without spread gets 0 everywhere; a group of one has
    no baseline and keeps its return. A return of NaN means *unscorable*: it gets 0 and does not count in its
    group.

    Args:
        returns: Float (N,).
        group_ids: int64 (N,); equal numbers form a group, in any order.
        normalize: Divide by the standard deviation. False leaves ``R - mean`` (Dr. GRPO, arXiv 2503.20783).

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


def informative_groups(scores: th.Tensor, bounds: tuple[float, float] | None = (0.1, 0.9)) -> th.Tensor:
    """Dynamic sampling (DAPO, arXiv 2503.14476): which groups can teach anything.

    Args:
        scores: Float or bool (n_groups, group_size), 1 for success; any return if ``bounds`` is None.
        bounds: Lowest and highest success rate that is kept, both inclusive, compared in float32. None keeps
            every group whose scores are not all equal.

    Returns:
        bool (n_groups,), True for the groups to keep.
    """
    scores = scores.float()
    if bounds is None:
        return scores.amax(dim=1) > scores.amin(dim=1)
    rate = scores.mean(dim=1)
    low, high = th.tensor(bounds, dtype=th.float32)
    return (rate >= low) & (rate <= high)


def loss_units(mask: th.Tensor, rows: th.Tensor, normalizer: LossNormalizer) -> int:
    """Over how many tokens, or trajectories with a token, a minibatch's loss is averaged."""
    if normalizer == "token":
        return int(mask.sum())
    return len(th.unique(rows[mask.any(1)]))


def token_weights(
    mask: th.Tensor, rows: th.Tensor, normalizer: LossNormalizer = "trajectory", n_units: int | None = None
) -> th.Tensor:
    """Weight of every token in the loss of a minibatch; the loss is ``(weights * token_loss).sum()``.

    Because the weights are fixed before the forward passes, the minibatch may be cut into micro-batches at
    any place without changing the gradient.

    Args:
        mask: bool (M, L), the tokens that count.
        rows: int64 (M,), the trajectory of each decision.
        normalizer: ``"trajectory"``, the published one: mean over the tokens of a trajectory, then over
            trajectories (those without a token are left out). ``"token"``: mean over all tokens alike.
        n_units: :func:`loss_units` of the whole minibatch, if this is a part of it.

    Returns:
        float32 (M, L), 0 outside the mask; sums to 1 over the minibatch, or to 0 if nothing is kept.

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
    """The clipped objective, token by token.

    Attributes:
        loss: Float (M, L), to be weighted and summed; lower is better.
        clipped: bool (M, L), True where the clip took the gradient away.
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
    """PPO's pessimistic objective with DAPO's asymmetric clip; no dual clip, as published.

    Args:
        log_prob: Float (M, L) under the current weights.
        old_log_prob: Float (M, L) under the weights that sampled.
        advantages: Float (M, L) or (M, 1).
        clip_range: The ratio is cut at ``1 - clip_range`` below ...
        clip_range_high: ... and at ``1 + clip_range_high`` above.
    """
    log_ratio = log_prob - old_log_prob
    ratio = log_ratio.exp()
    free = -advantages * ratio
    cut = -advantages * ratio.clamp(1.0 - clip_range, 1.0 + clip_range_high)
    return Surrogate(th.maximum(free, cut), cut > free, log_ratio)


def kl_penalty(log_prob: th.Tensor, ref_log_prob: th.Tensor, kind: KLKind = "k3") -> th.Tensor:
    """Estimate of the divergence from a reference, token by token.

    ``k1`` is the plain difference, ``abs`` its size, ``k2`` half its square, and ``k3`` the unbiased estimate
    that is never negative (Schulman 2020; GRPO, arXiv 2402.03300, eq. 4).

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
