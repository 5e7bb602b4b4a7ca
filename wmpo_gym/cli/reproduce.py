"""``wmpo reproduce``: the full method at full length, from scratch or from pre-trained weights."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro

from wmpo_gym.cli.common import option_value
from wmpo_gym.pipeline.method import run_recipe
from wmpo_gym.pipeline.presets import Recipe, recipe_for
from wmpo_gym.tasks import get_task


@dataclass(frozen=True)
class Command:
    """Run the full method at full length.

    Stages: demonstrations, base policy, play, world model, classifier, gates, GRPO in imagination, paired
    test and report.

    If interrupted, the same command resumes with the unfinished stage.

    Attributes:
        task: Task name; NAME@64 sets the image size to 64 x 64 pixels. lift stands for lift-close@64, which
            has a closer camera and a higher lift, visible at this image size.
        preset: Default settings: demo, move-block, lift or paper (published sizes and settings); by default
            those of the task.
        seed: Random seed.
        out: Output directory; default runs/reproduce-TASK-SEED.
        device: Device for training and evaluation: auto (a GPU if available), cpu, cuda or cuda:1.
        precision: fp32, or bf16 on a GPU.
        recipe: Settings of all stages.
    """

    task: Annotated[str, tyro.conf.Positional] = "move-block"
    preset: str | None = None
    seed: int = 0
    out: Path | None = None
    device: str = "auto"
    precision: str = "fp32"
    recipe: tyro.conf.AvoidSubcommands[Recipe] = field(default_factory=Recipe)

    @classmethod
    def default_for(cls, options: Sequence[str]) -> Command:
        """Default values for the task and preset in the options."""
        preset = option_value(options, "--preset", "") or None
        recipe = recipe_for(_named_task(options) or cls.task, preset)
        return cls(task=recipe.task, preset=preset, recipe=recipe)

    def run(self) -> None:
        """Run the unfinished stages."""
        task = recipe_for(self.task, self.preset).task
        recipe = replace(self.recipe, task=task, seed=self.seed)
        out = self.out or Path("runs") / f"reproduce-{task.replace(':', '-')}-{self.seed}"
        run_recipe(
            recipe,
            out,
            device=self.device,
            precision=self.precision,
            command=" ".join(["wmpo", *sys.argv[1:]]),
        )


def _named_task(options: Sequence[str]) -> str | None:
    """The task in unparsed options: preferably a task name that does not follow an option, else any."""
    words = [(before, word) for before, word in zip(["", *options], options, strict=False) if _is_task(word)]
    free = [word for before, word in words if not before.startswith("-")]
    return next(iter([*free, *(word for _, word in words)]), None)


def _is_task(word: str) -> bool:
    if word.startswith("-"):
        return False
    try:
        get_task(word)
    except ValueError:
        return False
    return True
