"""Soft Actor-Critic: Stable-Baselines3's own, with settings that fit these environments."""

from __future__ import annotations

from wmpo_gym.algorithms.sac.sac import add_demonstrations, buffer_bytes, make_sac

__all__ = ["add_demonstrations", "buffer_bytes", "make_sac"]
