"""Unsupervised keypoints of the first frame (spatial softmax).

First frames of one task differ in the positions of a few objects. An encoder that compresses a frame to the
coordinates of a few keypoints, from which a decoder reconstructs it, learns to place keypoints on those
objects.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from wmpo_gym.training.runtime import ComputeSettings
from wmpo_gym.training.trainer import Loss
from wmpo_gym.world.fit import FitSettings, FitTask, fit

SIDE = 32  # maximum side of the feature maps
WIDTH = 16
RADIUS = 0.12  # of the Gaussian rendered for a keypoint, in half images
LEAST_SPREAD = 0.02  # minimum standard deviation of a keypoint, in half images


class KeypointEncoder(nn.Module):
    """Encoder of a frame as ``n`` keypoints, each the centre of mass of one feature map (spatial softmax).

    Args:
        image_size: Side of the square frames.
        channels: Frame channels C.
        n: Number of keypoints.
    """

    middle: Tensor
    spread: Tensor
    axis: Tensor

    def __init__(self, image_size: int, channels: int, n: int) -> None:
        super().__init__()
        patch = next(p for p in (1, 2, 4, 8, 16, 32) if image_size <= SIDE * p or p == 32)
        self.patch, self.n = patch, n
        self.maps = nn.Sequential(
            nn.PixelUnshuffle(patch),
            nn.Conv2d(channels * patch**2, WIDTH, 5, padding=2), nn.ReLU(),
            nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.ReLU(),
            nn.Conv2d(WIDTH, n, 3, padding=1),
        )  # fmt: skip
        self.sharpness = nn.Parameter(torch.ones(()))
        self.register_buffer("axis", torch.linspace(-1, 1, image_size // patch))
        self.register_buffer("middle", torch.zeros(2 * n))
        self.register_buffer("spread", torch.ones(2 * n))

    def keypoints(self, frames: Tensor) -> Tensor:
        """Coordinates ``(B, n, 2)``, column and row in [-1, 1], in frames ``(B, C, h, w)``."""
        maps = self.maps(frames) * self.sharpness.exp()
        weights = maps.flatten(2).softmax(dim=2).view_as(maps)
        columns, rows = weights.sum(dim=2) * self.axis, weights.sum(dim=3) * self.axis
        return torch.stack([columns.sum(dim=2), rows.sum(dim=2)], dim=2)

    def forward(self, frames: Tensor) -> Tensor:
        """Coordinates ``(B, 2 n)``, standardised over the first frames."""
        return (self.keypoints(frames).flatten(1) - self.middle) / self.spread


class _Reconstruction(FitTask):
    """Reconstruct first frames from their keypoints."""

    component = "keypoints"

    def __init__(self, encoder: KeypointEncoder, frames: Tensor, settings: FitSettings) -> None:
        self.encoder, self.config = encoder, settings
        self.frames, self.differences = frames, frames - frames.mean(dim=0)
        self.scale = float(self.differences.square().mean())
        self.rng = np.random.default_rng([settings.seed, 29])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.decoder = nn.Sequential(
                nn.Conv2d(encoder.n, 24, 3, padding=1), nn.ReLU(),
                nn.Conv2d(24, frames.shape[1] * encoder.patch**2, 3, padding=1),
                nn.PixelShuffle(encoder.patch),
            )  # fmt: skip
        nn.init.zeros_(self.decoder[-2].weight)  # type: ignore[arg-type]
        self.network = nn.ModuleList([encoder, self.decoder])

    def draw(self, step: int) -> dict[str, Tensor]:
        chosen = torch.from_numpy(self.rng.integers(0, len(self.frames), self.config.batch_size))
        chosen = self.runtime.local(chosen)
        return self.runtime.to_device(
            {"frames": self.frames[chosen], "differences": self.differences[chosen]}
        )

    def compute_loss(self, batch: dict[str, Tensor]) -> Loss:
        spots = _spots(self.encoder.keypoints(batch["frames"]), self.encoder.axis)
        error = (self.decoder(spots) - batch["differences"]).square().mean() / self.scale
        return self.share(error, len(spots))


def train_keypoints(
    encoder: KeypointEncoder,
    frames: Tensor,
    settings: FitSettings,
    *,
    compute: ComputeSettings | None = None,
    checkpoint_dir: Path | None = None,
    progress: bool = False,
) -> float:
    """Train a keypoint encoder to reconstruct first frames.

    Args:
        encoder: Trained in place.
        frames: First frames ``(N, C, h, w)`` in [-1, 1], on the CPU; at least one.
        settings: How to train.
        compute: Device and precision; None is float32 on the encoder's device.
        checkpoint_dir: Directory of the checkpoint, from which training resumes.
        progress: Show a progress bar.

    Returns:
        Share of the frames' variance that the keypoints do not explain (last tenth of the steps); 0 if all
        frames are equal.
    """
    task = _Reconstruction(encoder, frames, settings)
    if task.scale == 0:
        return 0.0
    error = fit(task, settings, compute=compute, checkpoint_dir=checkpoint_dir, progress=progress)
    with torch.no_grad():
        device = encoder.axis.device
        found = torch.cat([encoder.keypoints(part.to(device)).flatten(1) for part in frames.split(256)])
    encoder.middle.copy_(found.mean(dim=0))
    encoder.spread.copy_(found.std(dim=0, correction=0).clamp(min=LEAST_SPREAD))
    return error


def _spots(keypoints: Tensor, axis: Tensor) -> Tensor:
    """Gaussian heatmaps ``(B, n, s, s)`` at keypoints ``(B, n, 2)``."""
    columns, rows = ((keypoints[..., i, None] - axis).square() for i in (0, 1))
    return (-(columns[:, :, None, :] + rows[:, :, :, None]) / (2 * RADIUS**2)).exp()
