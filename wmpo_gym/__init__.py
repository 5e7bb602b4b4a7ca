"""World-model-based policy optimization for vision-language-action policies.

Importing the package registers its environments with Gymnasium::

    import gymnasium
    import wmpo_gym

    env = gymnasium.make("WMPO-Imagined-v0", task="move-block")

``gymnasium.make("wmpo_gym:WMPO-Imagined-v0")`` does the import by itself. The entry points are strings, so
that the import stays light: neither torch nor mujoco is loaded before an environment is made.
"""

from __future__ import annotations

import gymnasium

from wmpo_gym.tasks import TASKS

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
