"""Group algorithms that start from a policy in memory."""

from __future__ import annotations

from typing import Any

from wmpo_gym.policies.base import GroupPolicy


def grpo_from_policy(algorithm: type, policy: GroupPolicy, env: Any, **kwargs: Any) -> Any:
    """An algorithm whose policy starts as a copy of one in memory.

    Args:
        algorithm: :class:`~wmpo_gym.algorithms.grpo.GRPO` or another group algorithm.
        policy: Is copied, not changed.
        env: What to train in.
        **kwargs: Arguments of the algorithm.
    """
    arguments = policy._get_constructor_parameters()
    arguments = {k: v for k, v in arguments.items() if k not in ("observation_space", "action_space")}
    model = algorithm(type(policy), env, policy_kwargs=arguments, **kwargs)
    weights = {k: v for k, v in policy.state_dict().items() if "extra_state" not in k}
    model.policy.load_state_dict({**model.policy.state_dict(), **weights})
    return model
