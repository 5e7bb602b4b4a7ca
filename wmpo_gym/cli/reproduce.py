"""``wmpo reproduce``: the whole method at full length, from nothing."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro

from wmpo_gym.recipe.run import run_recipe
from wmpo_gym.recipe.settings import Recipe


@dataclass(frozen=True)
class Command:
    """The whole method at full length, from nothing.

    Demonstrations, base policy, play, world model, classifier, gates, GRPO in imagination, paired test and
    report.

    Interrupted, the same command goes on with the stage it was in.

    Attributes:
        task: Task.
        seed: Everything random derives from it.
        out: Directory of the run; default runs/reproduce-TASK-SEED.
        recipe: Every other number.
    """

    task: Annotated[str, tyro.conf.Positional] = "move-block"
    seed: int = 0
    out: Path | None = None
    recipe: Recipe = field(default_factory=Recipe)

    def run(self) -> None:
        """Run what is missing."""
        recipe = replace(self.recipe, task=self.task, seed=self.seed)
        out = self.out or Path("runs") / f"reproduce-{self.task}-{self.seed}"
        run_recipe(recipe, out, command=" ".join(["wmpo", *sys.argv[1:]]))
