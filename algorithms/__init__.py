"""Algorithms in the idiom of Stable-Baselines3; one folder each.

Names are resolved on first use, so that ``import wmpo_gym.algorithms`` does not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wmpo_gym.algorithms.grpo import GRPO

__all__ = ["GRPO"]


def __getattr__(name: str) -> Any:
    """Import an algorithm when it is asked for (PEP 562)."""
    if name == "GRPO":
        try:
            from wmpo_gym.algorithms.grpo import GRPO
        except ModuleNotFoundError as error:
            if (error.name or "").split(".")[0] != "stable_baselines3":
                raise
            raise ModuleNotFoundError(
                "GRPO needs stable-baselines3. Install it with: pip install 'wmpo-gym[train]'",
                name=error.name,
            ) from error
        return GRPO
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}.")
