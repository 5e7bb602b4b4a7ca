"""``wmpo convert world``: convert released WMPO files to a world of this package."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Command:
    """Convert a released world model, autoencoder, reward model and first frames to one world directory.

    No code from the files is executed, all files are checked before anything is written, and weights are
    memory-mapped. Task settings come from a table that names the source of each.

    Attributes:
        task: coffee, square, stack-three or three-piece-assembly.
        network: World-model weights: the directory, a safetensors file or index, or ema.pt.
        autoencoder: Directory of the SDXL autoencoder (diffusers).
        reward: Reward model, videomae_TASK.pth.
        statistics: The task's dataset_statistics.json.
        start_frames: Directory of first frames, ID.png.
        out: Output directory of the world.
        context_noise: Noise level of the context frames: 0.015 in the release (default), 0.05 in the paper.
        round_timesteps: Round timesteps to bfloat16, as the release does.
        classifier_normalisation: Pixel normalisation of the classifier: imagenet, as in the release's
            rollouts (default), or half (mean and deviation 0.5), as in its training scripts.
    """

    task: str
    network: Path
    autoencoder: Path
    reward: Path
    statistics: Path
    start_frames: Path
    out: Path
    context_noise: float | None = None
    round_timesteps: bool = False
    classifier_normalisation: Literal["imagenet", "half"] | None = None

    def run(self) -> None:
        """Convert and report."""
        from wmpo_gym.convert.released import released_task
        from wmpo_gym.convert.world import WorldFiles, convert_world

        files = WorldFiles(self.network, self.autoencoder, self.reward, self.statistics, self.start_frames)
        task = released_task(self.task).asked(
            context_noise=self.context_noise,
            round_timesteps=self.round_timesteps or None,
            classifier_normalisation=self.classifier_normalisation,
        )
        done = convert_world(files, self.out, task)
        print(done.report())
        print(f'\ngymnasium.make("WMPO-Imagined-v0", world="{self.out}")')
