"""``wmpo demo``: the full method in ten minutes, from the bundled policy and play-trained world."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

from wmpo_gym.pipeline.method import run_recipe
from wmpo_gym.pipeline.presets import PRESETS


@dataclass(frozen=True)
class Command:
    """Run the full method, from real rollouts over imagination to a better policy.

    Collect 64 real rollouts, align the world model, train the classifier, check the gates, optimise in
    imagination, all of it twice, and compare before and after in the simulator.

    Interrupted, the same command resumes with the stage it was in.

    Attributes:
        seed: Seed of the rollouts, the trainings and the evaluation.
        out: Directory of the run.
        device: Where networks are trained and evaluated: auto (a GPU if there is one), cpu, cuda or cuda:1.
        precision: fp32, or bf16 on a GPU.
    """

    seed: int = 0
    out: Path = Path("runs/demo")
    device: str = "auto"
    precision: str = "fp32"

    def run(self) -> None:
        """Run what is missing."""
        run_recipe(
            replace(PRESETS["demo"], seed=self.seed),
            self.out,
            device=self.device,
            precision=self.precision,
            command=" ".join(["wmpo", *sys.argv[1:]]),
        )
