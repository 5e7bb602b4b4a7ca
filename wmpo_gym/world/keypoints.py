"""Places in a first picture: what stands where, told without anyone having named it.

Pictures of one task differ in where a few things stand. A small network that may say no more of a picture
than the places of a few points, from which another has to draw it again, soon puts points on those things.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor, nn

from wmpo_gym.utils.progress import progress_bar

SIDE = 32  # places a side, at most, among which a point is looked for
WIDTH = 16
RADIUS = 0.12  # of the spot that a point is drawn as, in half pictures
LEAST_SPREAD = 0.02  # half pictures; a point that moves less stands still


class Points(nn.Module):
    """Finds ``n`` points in a picture, each where a map of its own has its centre of gravity.

    Args:
        image_size: Side of the square frames.
        channels: Frame channels C.
        n: Points.
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

    def places(self, frames: Tensor) -> Tensor:
        """Where the points are: ``(B, n, 2)`` as column and row in [-1, 1]; frames ``(B, C, h, w)``."""
        maps = self.maps(frames) * self.sharpness.exp()
        weights = maps.flatten(2).softmax(dim=2).view_as(maps)
        columns, rows = weights.sum(dim=2) * self.axis, weights.sum(dim=3) * self.axis
        return torch.stack([columns.sum(dim=2), rows.sum(dim=2)], dim=2)

    def forward(self, frames: Tensor) -> Tensor:
        """The same as ``(B, 2 n)`` in standard deviations among first pictures."""
        return (self.places(frames).flatten(1) - self.middle) / self.spread


def train_points(
    points: Points,
    frames: Tensor,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    progress: bool = False,
) -> float:
    """Train them to tell first pictures apart.

    Args:
        points: Trained in place.
        frames: First pictures ``(N, C, h, w)`` in [-1, 1]; at least one.
        steps: Optimiser steps.
        batch_size: Pictures per step.
        learning_rate: Peak of AdamW's one cycle.
        seed: Seed of everything random.
        progress: Show a progress bar.

    Returns:
        Share of what tells the pictures from their mean that cannot be drawn from the points (mean square,
        last tenth of the steps); 0 if they are all alike.
    """
    rng = np.random.default_rng([seed, 29])
    differences = frames - frames.mean(dim=0)
    scale = float(differences.square().mean())
    if scale == 0:
        return 0.0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        painter = nn.Sequential(
            nn.Conv2d(points.n, 24, 3, padding=1), nn.ReLU(),
            nn.Conv2d(24, frames.shape[1] * points.patch**2, 3, padding=1),
            nn.PixelShuffle(points.patch),
        )  # fmt: skip
    nn.init.zeros_(painter[-2].weight)  # type: ignore[arg-type]

    def undrawn() -> Tensor:
        drawn = torch.from_numpy(rng.integers(0, len(frames), batch_size))
        spots = _spots(points.places(frames[drawn]), points.axis)
        return (painter(spots) - differences[drawn]).square().mean() / scale

    parameters = [*points.parameters(), *painter.parameters()]
    left = descend(undrawn, parameters, learning_rate, steps, "points", decay=1e-4, progress=progress)
    with torch.no_grad():
        found = torch.cat([points.places(part).flatten(1) for part in frames.split(256)])
    points.middle.copy_(found.mean(dim=0))
    points.spread.copy_(found.std(dim=0, correction=0).clamp(min=LEAST_SPREAD))
    return left


def descend(
    loss: Callable[[], Tensor],
    parameters: Iterable[nn.Parameter],
    rate: float,
    steps: int,
    name: str,
    *,
    decay: float = 1e-2,
    progress: bool = False,
) -> float:
    """Descend a loss by one cycle of AdamW; returns its mean over the last tenth of the steps."""
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, rate, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps)
    losses = []
    for _ in progress_bar(range(steps), desc=name, disable=not progress):
        value = loss()
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(float(value.detach()))
    return float(np.mean(losses[-max(1, len(losses) // 10) :]))


def _spots(places: Tensor, axis: Tensor) -> Tensor:
    """Round spots ``(B, n, s, s)`` at places ``(B, n, 2)``."""
    columns, rows = ((places[..., i, None] - axis).square() for i in (0, 1))
    return (-(columns[:, :, None, :] + rows[:, :, :, None]) / (2 * RADIUS**2)).exp()
