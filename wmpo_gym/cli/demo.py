"""``wmpo demo``: the method lived through in ten minutes, from the bundled policy and play-trained world."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

from wmpo_gym.pipeline.presets import DEMO
from wmpo_gym.pipeline.run import run_recipe


@dataclass(frozen=True)
class Command:
    """Live the whole method: from real rollouts over imagination to a better policy.

    Collect 64 real rollouts, align the world model, train the classifier, check the gates, optimise in
    imagination, all of it twice, and compare before and after in the simulated twin.

    Interrupted, the same command goes on with the stage it was in.

    Attributes:
        seed: Seed of the rollouts, the trainings and the evaluation.
        out: Directory of the run.
    """

    seed: int = 0
    out: Path = Path("runs/demo")

    def run(self) -> None:
        """Run what is missing."""
        recipe = replace(DEMO, seed=self.seed)
        run_recipe(recipe, self.out, bundled=True, command=" ".join(["wmpo", *sys.argv[1:]]))
