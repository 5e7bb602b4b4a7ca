"""World-model-based policy optimization for vision-language-action policies.

Importing the package registers its environments with Gymnasium and offers its main names, which are imported
when they are first used::

    import gymnasium
    import wmpo_gym

    env = gymnasium.make("WMPO-Imagined-v0", task="move-block")
    policy = wmpo_gym.load_pretrained("move-block", "policy")
    print(wmpo_gym.evaluate("move-block", policy, n_episodes=64).rate)

``gymnasium.make("wmpo_gym:WMPO-Imagined-v0")`` does the import by itself. The entry points are strings, so
that the import stays light: neither torch nor mujoco is loaded before an environment is made.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import gymnasium

from wmpo_gym.tasks import TASKS, Task, get_task, register_task

if TYPE_CHECKING:
    from wmpo_gym.algorithms.dpo import DPO
    from wmpo_gym.algorithms.grpo import GRPO
    from wmpo_gym.api import collect, evaluate, load_pretrained, train_reward, train_world
    from wmpo_gym.data.episode import Episode
    from wmpo_gym.data.store import EpisodeStore
    from wmpo_gym.envs.imagined import ImaginedEnv, ImaginedVectorEnv
    from wmpo_gym.envs.simulated.env import SimulatedEnv, SimulatedVectorEnv
    from wmpo_gym.evaluation.validation import validate
    from wmpo_gym.policies.sft import train_sft
    from wmpo_gym.policies.vla_policy import VLAPolicy
    from wmpo_gym.world.world import World

__all__ = [
    "DPO",
    "GRPO",
    "Episode",
    "EpisodeStore",
    "ImaginedEnv",
    "ImaginedVectorEnv",
    "SimulatedEnv",
    "SimulatedVectorEnv",
    "Task",
    "VLAPolicy",
    "World",
    "__version__",
    "collect",
    "evaluate",
    "get_task",
    "load_pretrained",
    "register_task",
    "train_reward",
    "train_sft",
    "train_world",
    "validate",
]

__version__ = "0.1.0"

_ENTRY_POINTS = {
    "Imagined": ("wmpo_gym.envs.imagined:ImaginedEnv", "wmpo_gym.envs.imagined:ImaginedVectorEnv"),
    "Simulated": (
        "wmpo_gym.envs.simulated.env:SimulatedEnv",
        "wmpo_gym.envs.simulated.env:SimulatedVectorEnv",
    ),
}


def _register(env_id: str, kind: str, **kwargs: str) -> None:
    """Register one id, single and batched.

    The environments truncate by themselves, so no ``max_episode_steps`` is registered: Gymnasium's
    ``TimeLimit`` would flag an episode that succeeds in its last chunk as truncated too.
    """
    if env_id not in gymnasium.registry:
        single, batched = _ENTRY_POINTS[kind]
        gymnasium.register(env_id, entry_point=single, vector_entry_point=batched, kwargs=kwargs)


for _kind in _ENTRY_POINTS:
    _register(f"WMPO-{_kind}-v0", _kind)
    for _name in TASKS:
        _title = "".join(part.capitalize() for part in _name.split("-"))
        _register(f"WMPO/{_title}-{_kind}-v0", _kind, task=_name)

_LAZY = {
    "DPO": "wmpo_gym.algorithms",
    "Episode": "wmpo_gym.data.episode",
    "EpisodeStore": "wmpo_gym.data.store",
    "GRPO": "wmpo_gym.algorithms",
    "ImaginedEnv": "wmpo_gym.envs.imagined",
    "ImaginedVectorEnv": "wmpo_gym.envs.imagined",
    "SimulatedEnv": "wmpo_gym.envs.simulated.env",
    "SimulatedVectorEnv": "wmpo_gym.envs.simulated.env",
    "VLAPolicy": "wmpo_gym.policies",
    "World": "wmpo_gym.world.world",
    "collect": "wmpo_gym.api",
    "evaluate": "wmpo_gym.api",
    "load_pretrained": "wmpo_gym.api",
    "train_reward": "wmpo_gym.api",
    "train_sft": "wmpo_gym.policies.sft",
    "train_world": "wmpo_gym.api",
    "validate": "wmpo_gym.evaluation.validation",
}


def __getattr__(name: str) -> Any:
    """Import a name when it is first used (PEP 562)."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}.")
    value = globals()[name] = getattr(importlib.import_module(_LAZY[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
