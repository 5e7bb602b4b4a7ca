"""The imagined and the simulated environment, and their adapter to Stable-Baselines3.

Names are imported when first used: ``import wmpo_gym.envs`` needs neither torch nor mujoco.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "ChunkEnv": "wmpo_gym.envs.chunk_env",
    "ChunkVectorEnv": "wmpo_gym.envs.chunk_env",
    "ImaginedEnv": "wmpo_gym.envs.imagined",
    "ImaginedVectorEnv": "wmpo_gym.envs.imagined",
    "Ledger": "wmpo_gym.envs.ledger",
    "SimulatedEnv": "wmpo_gym.envs.simulated.env",
    "SimulatedVectorEnv": "wmpo_gym.envs.simulated.env",
    "Sb3VecEnv": "wmpo_gym.envs.sb3",
    "make_sb3_env": "wmpo_gym.envs.sb3",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
