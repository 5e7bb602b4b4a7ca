"""Losses of the world model on single chunks with a recorded or predicted context."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from wmpo_gym.world.flow import RectifiedFlow, interpolate

ROBUST_WIDTH = 0.1  # error (frames in [-1, 1]) up to which the frame loss is quadratic; linear above
CHANGED = 0.1  # pixel change since the last context frame (frames in [-1, 1]) above which weights rise


class LatentBatch(NamedTuple):
    """Batch of chunks in latent space, one per row.

    Attributes:
        context: ``(B, C, H, h, w)``, recorded or predicted frames.
        targets: ``(B, C, K, h, w)``.
        actions: ``(B, K, D)``.
        prev_action: ``(B, D)``, or ``(B, D + M)`` with the robot state appended.
        last: ``(B, C, 1, h, w)``, the recorded frame before the targets.
        weights: ``(B, 1, K, h, w)`` loss weights; 0 after an episode's end.
        mean_weight: ``(B,)``, the mean weight over the whole batch, repeated for every row.
    """

    context: Tensor
    targets: Tensor
    actions: Tensor
    prev_action: Tensor
    last: Tensor
    weights: Tensor
    mean_weight: Tensor


def loss_weights(targets: Tensor, last: Tensor, valid: Tensor, changed_weight: float) -> Tensor:
    """Weights ``(B, 1, K, h, w)`` of the loss.

    Args:
        targets: ``(B, C, K, h, w)``.
        last: ``(B, C, 1, h, w)``, the frame before them.
        valid: bool ``(B, K)``, False after an episode's end, which is excluded.
        changed_weight: Extra weight of pixels that changed since the last context frame.
    """
    changed = (targets - last).abs().amax(dim=1, keepdim=True) > CHANGED
    return (1 + changed_weight * changed) * valid[:, None, :, None, None]


def weighted_row_means(error: Tensor, batch: LatentBatch) -> Tensor:
    """Weighted mean per row ``(B,)`` of errors ``(B, C, K, h, w)``, relative to the batch's mean weight."""
    return (batch.weights * error).mean(dim=(1, 2, 3, 4)) / batch.mean_weight


class ChunkLoss(NamedTuple):
    """Result of an objective on a batch.

    Attributes:
        losses: ``(B,)``.
        estimate: Predicted clean latents ``(B, C, K, h, w)``, differentiable.
        sample: Sampled latents of the same shape, used as the next context; no gradient.
    """

    losses: Tensor
    estimate: Tensor
    sample: Tensor


class Objective(Protocol):
    """Interface of a world-model loss."""

    def draw(
        self, target_shape: tuple[int, ...], context_shape: tuple[int, ...], generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Random tensors for a batch, with the batch dimension first, on the CPU."""

    def __call__(self, network: Any, batch: LatentBatch, draws: dict[str, Tensor]) -> ChunkLoss:
        """Loss of a batch, given the random tensors of :meth:`draw`."""


@dataclass
class ChunkObjective:
    """Loss against the recorded frames.

    A network that predicts clean frames (``predict``) is trained with a robust frame loss: under uncertainty
    the absolute error favours the likelier outcome, the squared error the mean of all. Any other network
    is trained with the rectified-flow velocity loss of the paper (§3.2).

    Attributes:
        pure_noise: Share of rows trained at noise level 1, the only level that one-step sampling uses.
        context_noise: Maximum noise level of the context.
        denoising_steps: Steps the network will be sampled with.
        self_forcing: Continue rows from the model's own samples; otherwise from the recorded frames.
    """

    pure_noise: float
    context_noise: float
    denoising_steps: int
    self_forcing: bool = True

    def draw(
        self, target_shape: tuple[int, ...], context_shape: tuple[int, ...], generator: torch.Generator
    ) -> dict[str, Tensor]:
        """See :class:`Objective`: noise and noise levels of the targets and of the context."""
        n = target_shape[0]
        noise = torch.randn(target_shape, generator=generator)
        pure = torch.rand(n, generator=generator) < self.pure_noise
        sigma = torch.where(pure, torch.ones(n), torch.sigmoid(torch.randn(n, generator=generator)))
        # Half of the rows keep a clean context, as in imagination.
        level = torch.rand(n, generator=generator) * self.context_noise
        level = level * (torch.rand(n, generator=generator) < 0.5)
        context_noise = torch.randn(context_shape, generator=generator)
        return {"noise": noise, "sigma": sigma, "context_sigma": level, "context_noise": context_noise}

    def __call__(self, network: Any, batch: LatentBatch, draws: dict[str, Tensor]) -> ChunkLoss:
        """See :class:`Objective`."""
        if hasattr(network, "predict"):
            losses, estimate = self._frame_loss(network, batch, draws)
        else:
            losses, estimate = self._velocity_loss(network, batch, draws)
        if not self.self_forcing:
            return ChunkLoss(losses, estimate, batch.targets)
        if hasattr(network, "predict") and self.denoising_steps == 1:
            return ChunkLoss(losses, estimate, estimate.detach())
        return ChunkLoss(losses, estimate, self._sample(network, batch, draws["noise"]))

    def _frame_loss(
        self, network: Any, batch: LatentBatch, draws: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        sigma, level = draws["sigma"], draws["context_sigma"]
        noisy = interpolate(batch.targets, draws["noise"], sigma)
        context = interpolate(batch.context, draws["context_noise"], level)
        cache = network.encode_context(context, batch.prev_action, level)
        estimate = network.predict(noisy, sigma, batch.actions, cache)
        error = ((estimate - batch.targets).square() + ROBUST_WIDTH**2).sqrt() - ROBUST_WIDTH
        return weighted_row_means(error, batch), estimate

    def _velocity_loss(
        self, network: Any, batch: LatentBatch, draws: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        n_context, flow = batch.context.shape[2], RectifiedFlow()
        latents = torch.cat([batch.context, batch.targets], dim=2)
        is_context = torch.arange(latents.shape[2], device=latents.device) < n_context
        losses, estimate = flow.loss_and_estimate(
            network,
            latents,
            batch.actions,
            is_context.expand(len(latents), -1),
            timestep=flow.n_train_timesteps * draws["sigma"],
            noise=torch.cat([draws["context_noise"], draws["noise"]], dim=2),
            prev_action=batch.prev_action,
            context_sigma=draws["context_sigma"],
            weights=nn.functional.pad(batch.weights, (0, 0, 0, 0, n_context, 0)),
        )
        return losses / batch.mean_weight, estimate[:, :, n_context:]

    @torch.no_grad()
    def _sample(self, network: nn.Module, batch: LatentBatch, noise: Tensor) -> Tensor:
        return RectifiedFlow(context_noise=0.0).sample(
            network, noise, batch.context, batch.actions, self.denoising_steps, prev_action=batch.prev_action
        )


class PatchDiscriminator(nn.Module):
    """Scores patches of (last frame, chunk) clips: recorded chunks high, predicted ones low (hinge loss).

    Args:
        channels: Channels per frame.
        chunk: Frames per chunk.
        width: Channels of the first layer.
        seed: Seed of the weights.
    """

    def __init__(self, channels: int, chunk: int, *, width: int = 32, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.net = nn.Sequential(
                nn.Conv2d(channels * (chunk + 1), width, 4, stride=2, padding=1),
                nn.LeakyReLU(0.2),
                nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),
                nn.GroupNorm(8, 2 * width),
                nn.LeakyReLU(0.2),
                nn.Conv2d(2 * width, 1, 3, padding=1),
            )

    def forward(self, last: Tensor, chunk: Tensor) -> Tensor:
        """Patch scores ``(B, 1, h/4, w/4)`` of chunks ``(B, C, K, h, w)`` after ``(B, C, 1, h, w)``."""
        return self.net(torch.cat([last, chunk], dim=2).transpose(1, 2).flatten(1, 2))

    def generator_loss(self, last: Tensor, chunk: Tensor) -> Tensor:
        """The world model's loss: minus the mean score of its chunks."""
        return -self(last, chunk).mean()

    def loss(self, last: Tensor, recorded: Tensor, predicted: Tensor) -> Tensor:
        """Hinge loss of the discriminator."""
        real, fake = self(last, recorded), self(last, predicted)
        return torch.relu(1 - real).mean() + torch.relu(1 + fake).mean()
