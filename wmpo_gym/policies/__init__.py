"""Vision-language-action policies: action tokens, the network, its processor and supervised fine-tuning.

Names are resolved lazily so that importing the package costs neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wmpo_gym.policies.base import GroupPolicy
    from wmpo_gym.policies.sft import SFTSettings, train_sft
    from wmpo_gym.policies.tokens import ActionTokenizer
    from wmpo_gym.policies.vla import VLAConfig, VLANetwork
    from wmpo_gym.policies.vla_policy import VLAPolicy

_HOMES = {
    "ActionTokenizer": "tokens",
    "GroupPolicy": "base",
    "SFTSettings": "sft",
    "VLAConfig": "vla",
    "VLANetwork": "vla",
    "VLAPolicy": "vla_policy",
    "train_sft": "sft",
}

__all__ = [
    "ActionTokenizer",
    "GroupPolicy",
    "SFTSettings",
    "VLAConfig",
    "VLANetwork",
    "VLAPolicy",
    "train_sft",
]


def __getattr__(name: str) -> Any:
    """Import the module that defines ``name`` on first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("wmpo_gym"):
            raise
        raise ModuleNotFoundError(
            f"{name} needs {error.name}. Install it with: pip install 'wmpo-gym[vla]'", name=error.name
        ) from error
