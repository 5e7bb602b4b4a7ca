"""Rollouts as flat lists of the decisions that were really made.

A wave of N episodes of different length is stored decision by decision, without padding: nothing after an
episode's end is kept, so nothing of it can reach a gradient. Pixels stay uint8 on the CPU.
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
    """Observations on another device."""
    return {k: v.to(device) for k, v in obs.items()} if isinstance(obs, dict) else obs.to(device)


def cat_obs(parts: Sequence[Obs]) -> Obs:
    """Batches of observations, one after the other."""
    if isinstance(parts[0], dict):
        return {k: th.cat([p[k] for p in parts]) for k in parts[0]}
    return th.cat(list(parts))


def blank_obs(obs: Obs) -> Obs:
    """One row of zeros of the same kind as a batch of observations."""
    if isinstance(obs, dict):
        return {k: blank_obs(v) for k, v in obs.items()}
    return obs.new_zeros(1, *obs.shape[1:])


@dataclass
class Trajectories:
    """N episodes with M decisions in all, sorted by episode and then by time.

    Attributes:
        obs: What each decision was made on, (M, ...) in the env's dtype.
        traces: (M, L), what the policy needs to find a decision again (for token policies int64 tokens).
        log_probs: float32 (M, L) at the time of sampling.
        token_mask: bool (M, L), tokens of actions that were carried out.
        rows: int64 (M,), episode of each decision, 0 to N-1.
        returns: float32 (N,), sum of rewards; NaN if the episode could not be scored.
        successes: bool (N,).
        lengths: int64 (N,), decisions per episode.
        n_actions: int64 (N,), actions carried out per episode.
        group_ids: int64 (N,).
        start_state_ids: int64 (N,), -1 where the env has no numbered start states.
        places: int64 (N,), where each episode stands among those of all ranks; None if they are all here.
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
    places: th.Tensor | None = None

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
        """Tokens of actions that were carried out, int64 (N,)."""
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
        """Several waves as one, without places; the groups of different waves stay different groups."""
        if len(parts) == 1:
            return parts[0]
        names = [f.name for f in fields(Trajectories) if f.name != "places"]
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
    """Collects a wave step by step, the rows that are still running only.

    Args:
        n_rows: Episodes in the wave.
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
        """Record one decision of each of ``rows`` (int64 (m,)); everything has m rows, obs are on the CPU."""
        self._steps.append((th.as_tensor(rows), obs, traces.cpu(), log_probs.float().cpu(), token_mask))
        self.returns[rows] += rewards
        self.lengths[rows] += 1
        self.n_actions[rows] += n_actions

    def build(self, group_size: int, start_state_ids: np.ndarray | None) -> Trajectories:
        """The finished wave; rows form groups of ``group_size`` neighbours."""
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
    """What an iteration logs about its rollouts: every episode counts, those of dropped groups too.

    Args:
        group_size: Rollouts per group.
    """

    def __init__(self, group_size: int) -> None:
        self.group_size = group_size
        self._waves: list[th.Tensor] = []  # float32 (n_rows, 4)

    def add(self, wave: Trajectories, kept: th.Tensor) -> None:
        """Count a wave; ``kept`` bool (n_groups,) says which of its groups are used."""
        columns = wave.successes, wave.returns, wave.lengths, kept.repeat_interleave(self.group_size)
        self._waves.append(th.stack([column.float() for column in columns], dim=1))

    def summary(self, ranks: Ranks) -> dict[str, float]:
        """Means and counts over all waves so far (at least one) of all ranks."""
        waves = [ranks.merge(wave, self.group_size).unbind(1) for wave in self._waves]
        successes, returns, lengths, kept = (th.cat(part) for part in zip(*waves, strict=True))
        dropped = successes.view(-1, self.group_size).mean(1)[kept[:: self.group_size] == 0]
        return {
            "success_rate": successes.mean().item(),
            "ep_rew_mean": returns.mean().item(),
            "ep_len_mean": lengths.mean().item(),
            "episodes": len(returns),
            "waves": len(self._waves),
            "dropped_all_success": int((dropped > 0.5).sum()),
            "dropped_all_fail": int((dropped <= 0.5).sum()),
        }
