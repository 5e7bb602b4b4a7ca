"""``wmpo reproduce``: the whole method at full length, from nothing."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro

from wmpo_gym.pipeline.presets import Recipe, recipe_for
from wmpo_gym.pipeline.run import run_recipe
from wmpo_gym.tasks import get_task


@dataclass(frozen=True)
class Command:
    """The whole method at full length, from nothing.

    Demonstrations, base policy, play, world model, classifier, gates, GRPO in imagination, paired test and
    report.

    Interrupted, the same command goes on with the stage it was in.

    Attributes:
        task: Task; NAME@64 asks for pictures of 64 x 64 pixels. lift alone is lift-close@64, with the camera
            nearer and a lift that it can see.
        seed: Everything random derives from it.
        out: Directory of the run; default runs/reproduce-TASK-SEED.
        recipe: Every other number.
    """

    task: Annotated[str, tyro.conf.Positional] = "move-block"
    seed: int = 0
    out: Path | None = None
    recipe: tyro.conf.AvoidSubcommands[Recipe] = field(default_factory=Recipe)

    @classmethod
    def default_for(cls, options: Sequence[str]) -> Command:
        """The recipe of the task that the options name."""
        task = next((w for w in options if not w.startswith("-") and _is_task(w)), cls.task)
        recipe = recipe_for(task)
        return cls(task=recipe.task, recipe=recipe)

    def run(self) -> None:
        """Run what is missing."""
        recipe = replace(self.recipe, task=recipe_for(self.task).task, seed=self.seed)
        out = self.out or Path("runs") / f"reproduce-{recipe.task.replace(':', '-')}-{self.seed}"
        run_recipe(recipe, out, command=" ".join(["wmpo", *sys.argv[1:]]))


def _is_task(word: str) -> bool:
    try:
        get_task(word)
    except ValueError:
        return False
    return True
