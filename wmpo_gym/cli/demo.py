"""``wmpo demo``: the full method in ten minutes, from the bundled policy and play-trained world."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

from wmpo_gym.pipeline.method import run_recipe
from wmpo_gym.pipeline.presets import PRESETS


@dataclass(frozen=True)
class Command:
    """Run the full method on the bundled task in about ten minutes.

    Two rounds of: collect 64 rollouts in the simulator, fine-tune the world model, train the success
    classifier, measure the gates, optimise the policy in imagination. Then compare the policies before and
    after in the simulator.

    If interrupted, the same command resumes with the unfinished stage.

    Attributes:
        seed: Random seed of rollouts, training and evaluation.
        out: Output directory.
        device: Device for training and evaluation: auto (a GPU if available), cpu, cuda or cuda:1.
        precision: fp32, or bf16 on a GPU.
    """

    seed: int = 0
    out: Path = Path("runs/demo")
    device: str = "auto"
    precision: str = "fp32"

    def run(self) -> None:
        """Run the unfinished stages."""
        run_recipe(
            replace(PRESETS["demo"], seed=self.seed),
            self.out,
            device=self.device,
            precision=self.precision,
            command=" ".join(["wmpo", *sys.argv[1:]]),
        )
