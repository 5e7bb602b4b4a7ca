"""Storage of rollouts as a flat list of decisions, without padding.

A batch of N episodes of different lengths contains no data after an episode's end, so none of it can
contribute to a gradient. Pixels stay uint8 on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch as th

from wmpo_gym.algorithms.distributed import Ranks

# A batch of observations: a tensor, or a dictionary of tensors.
Obs = Any


def index_obs(obs: Obs, index: th.Tensor) -> Obs:
    """Rows of a batch of observations."""
    return {k: v[index] for k, v in obs.items()} if isinstance(obs, dict) else obs[index]


def obs_to(obs: Obs, device: th.device | str) -> Obs:
    """Move observations to a device."""
    return {k: v.to(device) for k, v in obs.items()} if isinstance(obs, dict) else obs.to(device)


def cat_obs(parts: Sequence[Obs]) -> Obs:
    """Concatenate batches of observations."""
    if isinstance(parts[0], dict):
        return {k: th.cat([p[k] for p in parts]) for k in parts[0]}
    return th.cat(list(parts))


def zero_obs(obs: Obs) -> Obs:
    """One row of zeros with the structure of a batch of observations."""
    if isinstance(obs, dict):
        return {k: zero_obs(v) for k, v in obs.items()}
    return obs.new_zeros(1, *obs.shape[1:])


def action_mask(n_actions: th.Tensor, chunk: int, tokens_per_action: int) -> th.Tensor:
    """Mask of the tokens of executed actions: those of a decision's first ``n_actions`` actions.

    Args:
        n_actions: int64 (M,), actions executed before the episode ended, 0 to ``chunk``.
        chunk: Actions per decision, K.
        tokens_per_action: Tokens per action.

    Returns:
        bool (M, chunk * tokens_per_action), tokens ordered action by action.
    """
    kept = th.arange(chunk, device=n_actions.device) < n_actions.unsqueeze(-1)
    return kept.repeat_interleave(tokens_per_action, dim=-1)


def informative_groups(scores: th.Tensor, bounds: tuple[float, float] | None = (0.1, 0.9)) -> th.Tensor:
    """Dynamic sampling (DAPO, arXiv 2503.14476): mask of the groups with a learning signal.

    Args:
        scores: Float or bool (n_groups, group_size), 1 for success; any return if ``bounds`` is None.
        bounds: Lowest and highest success rate to keep, both inclusive, compared in float32. None keeps every
            group whose scores are not all equal.

    Returns:
        bool (n_groups,), True for the groups to keep.
    """
    scores = scores.float()
    if bounds is None:
        return scores.amax(dim=1) > scores.amin(dim=1)
    rate = scores.mean(dim=1)
    low, high = th.tensor(bounds, dtype=th.float32)
    return (rate >= low) & (rate <= high)


@dataclass
class Trajectories:
    """N episodes with M decisions in total, sorted by episode, then by time.

    Attributes:
        obs: Observation of each decision, (M, ...) in the env's dtype.
        traces: (M, L), the policy's representation of a decision (int64 action tokens for token policies).
        log_probs: float32 (M, L), log-probabilities at sampling time.
        token_mask: bool (M, L), tokens of executed actions.
        rows: int64 (M,), episode of each decision, 0 to N-1.
        returns: float32 (N,), sum of rewards; NaN if the episode could not be scored.
        successes: bool (N,).
        lengths: int64 (N,), decisions per episode.
        n_actions: int64 (N,), actions executed per episode.
        group_ids: int64 (N,).
        start_state_ids: int64 (N,), -1 where the env has no numbered start states.
        global_indices: int64 (N,), index of each episode over all ranks; None if this rank holds all of them.
    """

    obs: Obs
    traces: th.Tensor
    log_probs: th.Tensor
    token_mask: th.Tensor
    rows: th.Tensor
    returns: th.Tensor
    successes: th.Tensor
    lengths: th.Tensor
    n_actions: th.Tensor
    group_ids: th.Tensor
    start_state_ids: th.Tensor
    global_indices: th.Tensor | None = None

    def __len__(self) -> int:
        """Number of episodes."""
        return len(self.returns)

    @property
    def n_decisions(self) -> int:
        """Number of decisions over all episodes."""
        return len(self.rows)

    @property
    def n_groups(self) -> int:
        """Number of groups."""
        return len(th.unique(self.group_ids))

    def token_counts(self) -> th.Tensor:
        """Number of tokens of executed actions per episode, int64 (N,)."""
        return th.zeros(len(self), dtype=th.int64).index_add(0, self.rows, self.token_mask.sum(1))

    def select(self, index: th.Tensor) -> Trajectories:
        """The episodes of a boolean mask or of increasing indices, with all their decisions."""
        index = index.nonzero().squeeze(1) if index.dtype == th.bool else index
        if len(index) == len(self):
            return self
        place = th.full((len(self),), -1, dtype=th.int64)
        place[index] = th.arange(len(index))
        decisions = (place[self.rows] >= 0).nonzero().squeeze(1)
        out: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        for name, value in out.items():
            if name == "obs":
                out[name] = index_obs(value, decisions)
            elif value is not None:
                out[name] = value[decisions if name in _PER_DECISION else index]
        out["rows"] = place[out["rows"]]
        return Trajectories(**out)

    @staticmethod
    def concatenate(parts: Sequence[Trajectories]) -> Trajectories:
        """Concatenate batches, without global indices; groups of different batches stay separate."""
        if len(parts) == 1:
            return parts[0]
        names = [f.name for f in fields(Trajectories) if f.name != "global_indices"]
        out: dict[str, Any] = {name: [getattr(p, name) for p in parts] for name in names}
        episodes = groups = 0
        for i, part in enumerate(parts):
            out["rows"][i] = part.rows + episodes
            _, group = th.unique(part.group_ids, return_inverse=True)
            out["group_ids"][i] = group + groups
            episodes, groups = episodes + len(part), groups + part.n_groups
        return Trajectories(**{k: cat_obs(v) if k == "obs" else th.cat(v) for k, v in out.items()})


_PER_DECISION = {"traces", "log_probs", "token_mask", "rows"}


class TrajectoryRecorder:
    """Collects a batch of episodes step by step, recording only the running rows.

    Args:
        n_rows: Episodes in the batch.
    """

    def __init__(self, n_rows: int) -> None:
        self._steps: list[tuple[th.Tensor, Obs, th.Tensor, th.Tensor, th.Tensor]] = []
        self.returns = np.zeros(n_rows, np.float64)
        self.lengths = np.zeros(n_rows, np.int64)
        self.n_actions = np.zeros(n_rows, np.int64)
        self.successes = np.zeros(n_rows, bool)

    def add(
        self,
        rows: np.ndarray,
        obs: Obs,
        traces: th.Tensor,
        log_probs: th.Tensor,
        token_mask: th.Tensor,
        rewards: np.ndarray,
        n_actions: np.ndarray,
    ) -> None:
        """Record one decision for each of ``rows`` (int64 (m,)); all inputs have m rows, obs on the CPU."""
        self._steps.append((th.as_tensor(rows), obs, traces.cpu(), log_probs.float().cpu(), token_mask))
        self.returns[rows] += rewards
        self.lengths[rows] += 1
        self.n_actions[rows] += n_actions

    def build(self, group_size: int, start_state_ids: np.ndarray | None) -> Trajectories:
        """Return the finished batch; ``group_size`` adjacent rows form a group."""
        rows, obs, traces, log_probs, token_mask = zip(*self._steps, strict=True)
        order = th.argsort(th.cat(rows), stable=True)
        n_rows = len(self.returns)
        ids = np.full(n_rows, -1, np.int64) if start_state_ids is None else start_state_ids
        return Trajectories(
            obs=index_obs(cat_obs(obs), order),
            traces=th.cat(traces)[order],
            log_probs=th.cat(log_probs)[order],
            token_mask=th.cat(token_mask)[order],
            rows=th.cat(rows)[order],
            returns=th.as_tensor(self.returns, dtype=th.float32),
            successes=th.as_tensor(self.successes),
            lengths=th.as_tensor(self.lengths),
            n_actions=th.as_tensor(self.n_actions),
            group_ids=th.arange(n_rows) // group_size,
            start_state_ids=th.as_tensor(ids, dtype=th.int64),
        )


class RolloutStatistics:
    """Rollout metrics of an iteration over all episodes, including those of dropped groups.

    Args:
        group_size: Rollouts per group.
    """

    def __init__(self, group_size: int) -> None:
        self.group_size = group_size
        self._batches: list[th.Tensor] = []  # float32 (n_rows, 4)

    def add(self, batch: Trajectories, kept: th.Tensor) -> None:
        """Add a batch; ``kept`` bool (n_groups,) marks the groups used for training."""
        columns = batch.successes, batch.returns, batch.lengths, kept.repeat_interleave(self.group_size)
        self._batches.append(th.stack([column.float() for column in columns], dim=1))

    def summary(self, ranks: Ranks) -> dict[str, float]:
        """Means and counts over all batches so far (at least one) of all ranks."""
        batches = [ranks.gather_rows(batch, self.group_size).unbind(1) for batch in self._batches]
        successes, returns, lengths, kept = (th.cat(part) for part in zip(*batches, strict=True))
        dropped = successes.view(-1, self.group_size).mean(1)[kept[:: self.group_size] == 0]
        return {
            "success_rate": successes.mean().item(),
            "ep_rew_mean": returns.mean().item(),
            "ep_len_mean": lengths.mean().item(),
            "episodes": len(returns),
            "batches": len(self._batches),
            "dropped_all_success": int((dropped > 0.5).sum()),
            "dropped_all_fail": int((dropped <= 0.5).sum()),
        }
