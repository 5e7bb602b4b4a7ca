"""Group Relative Policy Optimization."""

from __future__ import annotations

from wmpo_gym.algorithms.grpo.grpo import GRPO

__all__ = ["GRPO"]
