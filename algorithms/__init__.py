"""Policy optimisation algorithms with a Stable-Baselines3 interface, one module each.

Names are resolved on first use, so that ``import wmpo_gym.algorithms`` does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wmpo_gym.algorithms.dpo import DPO
    from wmpo_gym.algorithms.grpo import GRPO
    from wmpo_gym.algorithms.sac import make_sac

__all__ = ["DPO", "GRPO", "make_sac"]

_MODULES = {"DPO": "dpo", "GRPO": "grpo", "make_sac": "sac"}


def __getattr__(name: str) -> Any:
    """Import an algorithm on first access (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}.")
    try:
        return getattr(importlib.import_module(f"wmpo_gym.algorithms.{_MODULES[name]}"), name)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "stable_baselines3":
            raise
        raise ModuleNotFoundError(
            f"{name} needs stable-baselines3. Install it with: pip install 'wmpo-gym[train]'",
            name=error.name,
        ) from error
