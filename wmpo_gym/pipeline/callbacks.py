"""The learning curve of policy optimisation, and its control experiment."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from stable_baselines3.common.callbacks import BaseCallback

from wmpo_gym.algorithms.grpo import GRPO
from wmpo_gym.algorithms.trajectories import Trajectories
from wmpo_gym.evaluation.twin import compare_with_twin
from wmpo_gym.pipeline.presets import Recipe
from wmpo_gym.pipeline.workspace import Workspace
from wmpo_gym.rollouts.rollout import evaluate_policy_on
from wmpo_gym.statistics import success_rate
from wmpo_gym.utils.io import read_json, write_json_atomic
from wmpo_gym.world.world import World


class EvalCallback(BaseCallback):
    """Learning curve on validation start states; it is displayed, and no checkpoint is chosen by it.

    Args:
        workspace: Where ``curve.json`` is kept.
        recipe: How often and on how many episodes to evaluate.
        world: The world in which the policy is optimised.

    Attributes:
        points: One entry per evaluated iteration.
    """

    def __init__(self, workspace: Workspace, recipe: Recipe, world: World) -> None:
        super().__init__()
        self.recipe, self.world = recipe, world
        self._file = workspace.directory / "curve.json"
        self.points: list[dict[str, Any]] = read_json(self._file) if self._file.exists() else []
        self._bar = workspace.bar(recipe.grpo.iterations, "GRPO")

    def _on_rollout_start(self) -> None:
        self._bar.update(self.model._iteration - self._bar.n)
        if self.model._iteration % self.recipe.curve_every == 0:
            self._add_point()

    def _on_step(self) -> bool:
        return True

    def _on_training_end(self) -> None:
        self._bar.update(self.model._iteration - self._bar.n)
        self._add_point()
        self._bar.close()

    def _add_point(self) -> None:
        iteration = self.model._iteration
        if iteration not in {p["iteration"] for p in self.points}:
            self.points.append({"iteration": iteration, **self._evaluate()})
            write_json_atomic(self._file, self.points)

    def _evaluate(self) -> dict[str, Any]:
        recipe, policy, task = self.recipe, self.model.policy, self.world.task
        ids = list(task.split_ids("validation")[: recipe.curve_episodes])
        twin = compare_with_twin(self.world, policy, ids, seed=recipe.seed, record_frames=False)
        simulated = evaluate_policy_on(
            task, policy, "validation", len(ids), deterministic=False, seed=recipe.seed, progress=False
        )
        self._bar.set_postfix_str(
            f"imagined {twin.imagined.claimed.mean():.0%}, simulated {simulated.success.mean():.0%}"
        )
        return {
            "imagined_success": success_rate(twin.imagined.claimed).to_dict(),
            "twin_success": success_rate(twin.replay.success).to_dict(),
            "simulated_success": simulated.rate.to_dict(),
        }


class ShuffledGRPO(GRPO):
    """Control experiment: the outcomes of a batch of rollouts are permuted."""

    def collect_batch(self, callback: BaseCallback) -> Trajectories | None:
        """A batch whose returns and successes are permuted together."""
        batch = super().collect_batch(callback)
        if batch is None:
            return None
        order = torch.as_tensor(self.group_rng.permutation(len(batch)))
        return replace(batch, returns=batch.returns[order], successes=batch.successes[order])
