"""Helpers around group algorithms: start from a policy in memory, stop after so many iterations."""

from __future__ import annotations

from typing import Any

from stable_baselines3.common.callbacks import BaseCallback

from wmpo_gym.policies.base import GroupPolicy
from wmpo_gym.progress import progress_bar


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


class StopAfterIterations(BaseCallback):
    """Ends ``learn`` after a number of iterations.

    Args:
        iterations: How many.
        desc: Label of the progress bar.
        progress: Show one.

    Attributes:
        done: Iterations completed since ``learn`` began.
    """

    def __init__(self, iterations: int, *, desc: str = "iterations", progress: bool = False) -> None:
        super().__init__()
        self.iterations, self.done, self._rollouts = iterations, 0, 0
        self._bar = progress_bar(total=iterations, desc=desc, disable=not progress)

    def _on_rollout_start(self) -> None:
        # The update that follows a rollout is over when the next rollout starts.
        if self._rollouts:
            self.done += 1
            self._bar.update(1)
        self._rollouts += 1

    def _on_step(self) -> bool:
        return self.done < self.iterations

    def _on_training_end(self) -> None:
        self._bar.close()
