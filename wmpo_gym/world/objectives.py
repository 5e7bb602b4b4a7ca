"""What the world model is trained on: one action chunk per row, from a context that may be self-made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from wmpo_gym.data.optimizer_state import pack_slots, unpack_slots
from wmpo_gym.world.flow import RectifiedFlow

if TYPE_CHECKING:
    from wmpo_gym.world.training import LatentBatch

ROBUST_WIDTH = 0.1  # below this error (in [-1, 1] grey levels) the frame loss is quadratic, above linear


def _broadcast(x: Tensor) -> Tensor:
    return x[:, None, None, None, None]


def row_means(error: Tensor, batch: LatentBatch, changed_weight: float) -> Tensor:
    """Weighted mean per row ``(B,)``, in shares of the batch's mean weight.

    Args:
        error: ``(B, C, K, h, w)``.
        batch: What it is the error of; frames after an episode's end do not count.
        changed_weight: Extra weight of pixels that changed since the last context frame.
    """
    changed = (batch.targets - batch.last).abs().amax(dim=1, keepdim=True) > 0.1
    weights = (1 + changed_weight * changed) * batch.valid[:, None, :, None, None]
    return (weights * error).mean(dim=(1, 2, 3, 4)) / weights.mean()


@dataclass
class ChunkObjective:
    """Loss of one chunk and the frames to go on from.

    A network that predicts clean frames (``predict``) gets a robust frame loss: the absolute error favours
    the likelier of two outcomes where the squared error would paint a mixture of both. Any other network gets
    the rectified-flow velocity loss of the paper (§3.2), and the next context is sampled from it.
    """

    pure_noise: float
    context_noise: float
    changed_weight: float
    denoising_steps: int

    def __call__(self, network: Any, batch: LatentBatch, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Loss per row ``(B,)`` and predicted latents ``(B, C, K, h, w)``."""
        n = len(batch.targets)
        noise = torch.randn(batch.targets.shape, generator=generator)
        pure = torch.rand(n, generator=generator) < self.pure_noise
        sigma = torch.where(pure, torch.ones(n), torch.sigmoid(torch.randn(n, generator=generator)))
        noisy = (1 - _broadcast(sigma)) * batch.targets + _broadcast(sigma) * noise
        level, context = self._noisy_context(batch.context, generator)
        if hasattr(network, "predict"):
            cache = network.encode_context(context, batch.prev_action, level)
            prediction = network.predict(noisy, sigma, batch.actions, cache)
            loss = self._frame_loss(prediction, batch)
        else:
            loss = self._velocity_loss(network, context, level, noisy, noise, sigma, batch)
            prediction = None
        if prediction is None or self.denoising_steps > 1:
            prediction = self._sample(network, batch, noise)
        return loss, prediction

    def _noisy_context(self, context: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        # Half of the rows keep a clean context, which is what imagination offers.
        n = len(context)
        level = (
            torch.rand(n, generator=generator)
            * self.context_noise
            * (torch.rand(n, generator=generator) < 0.5)
        )
        noise = torch.randn(context.shape, generator=generator)
        return level, (1 - _broadcast(level)) * context + _broadcast(level) * noise

    def _frame_loss(self, prediction: Tensor, batch: LatentBatch) -> Tensor:
        error = ((prediction - batch.targets).square() + ROBUST_WIDTH**2).sqrt() - ROBUST_WIDTH
        return row_means(error, batch, self.changed_weight)

    def _velocity_loss(
        self,
        network: nn.Module,
        context: Tensor,
        level: Tensor,
        noisy: Tensor,
        noise: Tensor,
        sigma: Tensor,
        batch: LatentBatch,
    ) -> Tensor:
        frames = torch.cat([context, noisy], dim=2)
        mask = torch.zeros(frames.shape[0], frames.shape[2], dtype=torch.bool)
        mask[:, : context.shape[2]] = True
        velocity = network(
            frames, 1000 * sigma, batch.actions, mask, prev_action=batch.prev_action, context_sigma=level
        )
        error = (velocity[:, :, context.shape[2] :] - (batch.targets - noise)).square()
        return row_means(error, batch, self.changed_weight)

    @torch.no_grad()
    def _sample(self, network: nn.Module, batch: LatentBatch, noise: Tensor) -> Tensor:
        return RectifiedFlow(context_noise=0.0).sample(
            network, noise, batch.context, batch.actions, self.denoising_steps, prev_action=batch.prev_action
        )


class PatchCritic(nn.Module):
    """A patch discriminator on (last frame, chunk) clips: tells recorded chunks from predicted ones.

    Hinge loss. Its own optimiser lives here, so that the trainer stays short.

    Args:
        channels: Channels per frame.
        chunk: Frames per chunk.
        width: Channels of the first layer.
        learning_rate: Adam's.
        seed: Seed of the weights.
    """

    def __init__(
        self, channels: int, chunk: int, *, width: int = 32, learning_rate: float = 4e-4, seed: int = 0
    ) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.net = nn.Sequential(
                nn.Conv2d(channels * (chunk + 1), width, 4, stride=2, padding=1),
                nn.LeakyReLU(0.2),
                nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),
                nn.GroupNorm(8, 2 * width),
                nn.LeakyReLU(0.2),
                nn.Conv2d(2 * width, 1, 3, padding=1),
            )
        self.optimizer = torch.optim.Adam(self.parameters(), lr=learning_rate, betas=(0.5, 0.99))

    def forward(self, batch: LatentBatch, chunk: Tensor) -> Tensor:
        """Patch scores ``(B, 1, h/4, w/4)``; larger means more like a recording."""
        return self.net(torch.cat([batch.last, chunk], dim=2).transpose(1, 2).flatten(1, 2))

    def generator_loss(self, batch: LatentBatch, chunk: Tensor) -> Tensor:
        """What the world model lowers: minus the mean score of its chunks."""
        return -self(batch, chunk).mean()

    def train_step(self, batch: LatentBatch, chunk: Tensor) -> float:
        """One step of the critic itself; returns its hinge loss."""
        real, fake = self(batch, batch.targets), self(batch, chunk)
        loss = torch.relu(1 - real).mean() + torch.relu(1 + fake).mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())

    def checkpoint(self) -> dict[str, Tensor]:
        """Weights and moments under names that begin with ``critic.``."""
        weights = {f"critic.net.{k}": v for k, v in self.state_dict().items()}
        return weights | pack_slots(self.optimizer, "critic.optimizer.")

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take back what :meth:`checkpoint` gave."""
        self.load_state_dict({k[11:]: v for k, v in tensors.items() if k.startswith("critic.net.")})
        unpack_slots(self.optimizer, tensors, "critic.optimizer.")
