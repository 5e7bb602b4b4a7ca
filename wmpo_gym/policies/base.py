"""The policy interface of the group-based algorithms (GRPO, DPO).

It extends the ``predict`` of a Stable-Baselines3 policy by two methods for optimisation over action *tokens*:
sample a chunk together with the log-probability of each of its tokens, and evaluate these log-probabilities
again under changed weights.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping

import torch
from stable_baselines3.common.policies import BasePolicy
from torch import nn

Observation = dict[str, torch.Tensor]


def policy_generators(policy: torch.nn.Module) -> dict[str, torch.Generator]:
    """The generators a policy samples from, by attribute name."""
    return {name: value for name, value in vars(policy).items() if isinstance(value, torch.Generator)}


class GroupPolicy(BasePolicy):
    """A Stable-Baselines3 policy over chunks of K actions of D numbers, each chosen as L tokens.

    Tokens are ordered step by step: token ``k * D + d`` is dimension d of action k, so L = K * D.

    Both methods below apply the same sampling temperature, so that the ratio of a freshly sampled batch is
    exactly one. Randomness comes from a generator of the policy's own, never from torch's global one, and
    through :meth:`draw`, so that several processes can share out a batch.
    """

    _part: tuple[torch.Tensor, int] | None = None
    _has_drawn = False

    @abstractmethod
    def sample(
        self, obs: Observation, deterministic: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Choose one action chunk per row, without gradients.

        Args:
            obs: Batch of observations, ``pixels`` uint8 (B,H,W,3) or (B,3,H,W) and ``task_id`` int (B,).
            deterministic: Take the likeliest token everywhere instead of drawing.

        Returns:
            ``actions`` float32 (B,K,D) in the action space, ``log_prob`` float32 (B,L) of the chosen tokens,
            and ``trace`` int64 (B,L), these action tokens, which :meth:`log_prob` evaluates again.
        """

    @abstractmethod
    def log_prob(self, obs: Observation, trace: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probability of sampled action tokens under the current weights, with gradients.

        Args:
            obs: The observations the decisions were made on (see :meth:`sample`).
            trace: int64 (B,L) from :meth:`sample`.

        Returns:
            ``log_prob`` float32 (B,L) and ``entropy`` float32 (B,L), both in nats.
        """

    def kept_elsewhere(self) -> tuple[set[str], str]:
        """Frozen parameters of a saved base policy, which checkpoints of a training leave out.

        Returns:
            Their names, and a digest of their values that a resumed training compares.
        """
        return set(), ""

    def draw(self, numbers: Callable[[int], torch.Tensor], n_rows: int) -> torch.Tensor:
        """Random numbers for the rows of a batch; :meth:`sample` draws all of its own with it.

        Args:
            numbers: Draws from the policy's generator for a given number of rows (leading dimension).
            n_rows: Rows given to :meth:`sample`.

        Returns:
            ``numbers(n_rows)``; within :meth:`sample_part` those of these rows out of the whole batch's.
        """
        if self._part is None:
            return numbers(n_rows)
        self._has_drawn = True
        places, total = self._part
        return numbers(total)[places]

    def sample_part(
        self, obs: Observation, places: torch.Tensor, total: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """:meth:`sample` for some rows of a batch whose other rows are sampled by other processes.

        Args:
            obs: Observations of the n rows.
            places: int64 (n,), where they stand in the whole batch.
            total: Rows of the whole batch.

        Raises:
            TypeError: If :meth:`sample` does not :meth:`draw`: all processes would then draw the same.
        """
        self._part, self._has_drawn = (places, total), False
        try:
            sampled = self.sample(obs)
        finally:
            self._part = None
        if not self._has_drawn:
            raise TypeError(
                f"{type(self).__name__}.sample draws random numbers by itself, so several processes would "
                "draw the same; use self.draw(lambda n: torch.rand(n, ..., generator=...), len(batch))."
            )
        return sampled

    def _predict(self, observation: Observation, deterministic: bool = False) -> torch.Tensor:
        """Actions (B,K,D) for SB3's ``predict``."""
        return self.sample(observation, deterministic)[0]


def changing_weights(state: Mapping[str, torch.Tensor], kept: Collection[str]) -> dict[str, torch.Tensor]:
    """A state dict without the frozen parameters ``kept`` elsewhere and their quantisation states."""
    beside = tuple(f"{name}." for name in kept)
    return {k: v for k, v in state.items() if k not in kept and not k.startswith(beside)}


def load_changing_weights(
    module: nn.Module, state: Mapping[str, torch.Tensor], kept: Collection[str]
) -> None:
    """Counterpart of :func:`changing_weights`, in place.

    Raises:
        RuntimeError: If other parameters than ``kept`` are missing, or there are too many.
    """
    expected = changing_weights(module.state_dict(), kept).keys()
    if wrong := sorted(expected ^ state.keys()):
        raise RuntimeError(f"The checkpoint does not hold the weights of this policy: {wrong[0]}.")
    module.load_state_dict(state, strict=False)
