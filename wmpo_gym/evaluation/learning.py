"""Group algorithms that start from a policy in memory."""

from __future__ import annotations

from typing import Any

from wmpo_gym.algorithms.group_algorithm import GroupAlgorithm
from wmpo_gym.policies.base import GroupPolicy


def grpo_from_policy(algorithm: type[GroupAlgorithm], policy: GroupPolicy, env: Any, **kwargs: Any) -> Any:
    """An algorithm whose policy starts as a copy of one in memory.

    Args:
        algorithm: :class:`~wmpo_gym.algorithms.grpo.GRPO` or another group algorithm.
        policy: Is copied, not changed.
        env: What to train in.
        **kwargs: Arguments of the algorithm.
    """
    return algorithm.from_policy(policy, env, **kwargs)
