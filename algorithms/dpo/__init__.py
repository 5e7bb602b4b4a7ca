"""Direct Preference Optimization over pairs of rollouts."""

from __future__ import annotations

from wmpo_gym.algorithms.dpo.dpo import DPO

__all__ = ["DPO"]
