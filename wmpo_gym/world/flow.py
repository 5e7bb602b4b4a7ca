"""Rectified flow: the straight line from noise to frames, how to learn it and how to follow it.

Notation, as in the published code: a *timestep* is ``1000 * sigma``, and ``sigma`` in [0, 1] is the share of
noise, so 1000 is pure noise and 0 a clean latent::

    x_t      = (1 - sigma) * x0 + sigma * noise
    velocity = x0 - noise                        points from noise to data; diffusers uses the opposite sign

Frames come in two kinds. *Context frames* are given, *predicted frames* are denoised; only the latter enter
the loss and only the latter move while sampling.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor

VelocityFunction = Callable[[Tensor, Tensor], Tensor]

PAPER_CONTEXT_NOISE = 0.05
"""Noise level of the context frames in training as the paper has it: 50 of 1000 diffusion steps (§3.2)."""

RELEASE_CONTEXT_NOISE = 0.015
"""The same in the released code and weights: 15 of 1000."""


class WorldNetwork(Protocol):
    """What the flow asks of a network.

    A network may also offer ``encode_context(context, prev_action, sigma) -> cache`` and
    ``denoise(latents, timestep, actions, cache) -> velocity``, which give the same velocity of the predicted
    frames without computing the context again at every step.
    """

    def __call__(
        self,
        latents: Tensor,
        timestep: Tensor,
        actions: Tensor,
        context_mask: Tensor,
        *,
        prev_action: Tensor | None = None,
        context_sigma: Tensor | None = None,
    ) -> Tensor:
        """Velocity ``(B, C, H + K, h, w)``; what it holds on the context frames is ignored.

        Args:
            latents: ``(B, C, H + K, h, w)``, the H context frames first.
            timestep: ``(B,)`` in [0, 1000].
            actions: ``(B, K, D)``; action k leads to predicted frame k.
            context_mask: bool ``(B, H + K)``, True on context frames.
            prev_action: ``(B, D)``, the action that led to the last context frame.
            context_sigma: ``(B,)`` noise level of the context frames; None for the network's own.
        """


@dataclass(frozen=True)
class RectifiedFlow:
    """Loss and Euler sampler of a world model.

    Attributes:
        n_train_timesteps: Timestep of pure noise.
        context_noise: Noise level in [0, 1] of the context frames in training, against the drift of long
            rollouts. When sampling, the context stays clean but the network is told this level, as in the
            release; give a flow with 0 to tell it the truth instead.
        shift: Above 1 the sampler dwells on high noise, below 1 on low; see :func:`resolution_shift`.
        round_timesteps: Tell the network timesteps rounded to bfloat16, as the release does when its network
            runs in bfloat16 (33.333 becomes 33.25). Needed only to reproduce those numbers.
    """

    n_train_timesteps: int = 1000
    context_noise: float = PAPER_CONTEXT_NOISE
    shift: float = 1.0
    round_timesteps: bool = False

    def __post_init__(self) -> None:
        if not 0.0 <= self.context_noise < 1.0:
            raise ValueError(
                f"context_noise is a noise level in [0, 1), got {self.context_noise}; "
                f"15 diffusion steps of 1000 are {RELEASE_CONTEXT_NOISE}."
            )

    # -- learning ------------------------------------------------------------------------------------------
    def add_noise(self, latents: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """Point on the line between ``latents`` (timestep 0) and ``noise`` (timestep 1000).

        diffusers' ``scale_noise`` knows only the timesteps of a sampling grid; training draws any number.

        Args:
            latents: ``(B, C, T, h, w)``.
            noise: Same shape, standard normal.
            timestep: ``(B,)``, or ``(B, T)`` for a noise level per frame.
        """
        sigma = timestep / self.n_train_timesteps
        sigma = sigma.view(sigma.shape[0], 1, -1, 1, 1)
        return (1 - sigma) * latents + sigma * noise

    def corrupt(self, latents: Tensor, noise: Tensor, timestep: Tensor, context_mask: Tensor) -> Tensor:
        """Noise predicted frames to their ``timestep`` (B,) and context frames to :attr:`context_noise`.

        Both kinds share the one ``noise`` tensor. Shapes as in :meth:`add_noise`; ``context_mask`` is bool
        ``(B, T)``, True on context frames.
        """
        context_timestep = self.context_noise * self.n_train_timesteps
        per_frame = timestep[:, None].expand(context_mask.shape).masked_fill(context_mask, context_timestep)
        return self.add_noise(latents, noise, per_frame)

    @staticmethod
    def velocity(latents: Tensor, noise: Tensor) -> Tensor:
        """What the network learns: the direction from ``noise`` to the clean ``latents``."""
        return latents - noise

    def loss(
        self,
        network: WorldNetwork,
        latents: Tensor,
        actions: Tensor,
        context_mask: Tensor,
        *,
        timestep: Tensor,
        noise: Tensor,
        prev_action: Tensor | None = None,
    ) -> Tensor:
        """Mean squared error of the velocity, per sample and over its predicted frames only.

        Args:
            network: See :class:`WorldNetwork`.
            latents: Clean ``(B, C, T, h, w)``.
            actions: ``(B, K, D)``.
            context_mask: bool ``(B, T)``, True on context frames; samples may differ in how many they have.
            timestep: ``(B,)`` in [0, 1000]; see :meth:`sample_timesteps`.
            noise: Standard normal, shape of ``latents``.
            prev_action: ``(B, D)`` or None.

        Returns:
            ``(B,)``; its mean is the training loss.

        Raises:
            ValueError: If a sample has nothing but context frames.
        """
        predicted = (~context_mask).to(latents.dtype)
        if not bool(predicted.any(dim=1).all()):
            row = int((predicted.sum(dim=1) == 0).nonzero()[0])
            raise ValueError(f"Sample {row} has only context frames; leave at least one frame to predict.")
        velocity = network(
            self.corrupt(latents, noise, timestep, context_mask),
            self._told(timestep),
            actions,
            context_mask,
            prev_action=prev_action,
            context_sigma=self._context_sigma(latents),
        )
        per_frame = (velocity - self.velocity(latents, noise)).square().mean(dim=(1, 3, 4))
        return (per_frame * predicted).sum(dim=1) / predicted.sum(dim=1)

    def sample_timesteps(self, batch: int, generator: torch.Generator | None = None) -> Tensor:
        """Logit-normal training timesteps ``(batch,)`` in (0, 1000): middling noise most often."""
        return torch.sigmoid(torch.randn(batch, generator=generator)) * self.n_train_timesteps

    # -- sampling ------------------------------------------------------------------------------------------
    def timesteps(self, steps: int) -> Tensor:
        """Timesteps ``(steps,)`` the sampler stops at, from pure noise down; the last step goes on to 0.

        Raises:
            ValueError: If there are no steps.
        """
        if steps < 1:
            raise ValueError(f"Sampling takes at least one denoising step, got {steps}.")
        even = self.n_train_timesteps * (1.0 - torch.arange(steps, dtype=torch.float64) / steps)
        return shift_timestep(even.float(), self.shift, self.n_train_timesteps)

    def sample(
        self,
        network: WorldNetwork,
        noise: Tensor,
        context: Tensor,
        actions: Tensor,
        steps: int,
        *,
        prev_action: Tensor | None = None,
        cached: bool = True,
    ) -> Tensor:
        """Follow the flow from ``noise`` to a chunk of latents; differentiable, no guidance, no other noise.

        Args:
            network: See :class:`WorldNetwork`.
            noise: ``(B, C, K, h, w)`` standard normal.
            context: Clean ``(B, C, H, h, w)``.
            actions: ``(B, K, D)`` in [-1, 1].
            steps: Euler steps, each one network evaluation.
            prev_action: ``(B, D)`` or None.
            cached: Compute the context once per chunk where the network can; the numbers are the same.

        Returns:
            float32 ``(B, C, K, h, w)``.
        """
        velocity = self.velocity_function(network, context, actions, prev_action, cached=cached)
        *_, z = self.walk(velocity, noise, steps)
        return z

    def walk(self, velocity: VelocityFunction, noise: Tensor, steps: int) -> Iterator[Tensor]:
        """The stations of the way from ``noise`` to the latents, one after each of the Euler steps.

        Args:
            velocity: From :meth:`velocity_function`.
            noise: ``(B, C, K, h, w)`` standard normal.
            steps: Euler steps.
        """
        scheduler = copy.copy(_prepared_scheduler(self, steps, noise.device))
        z = noise.float()
        for t in scheduler.timesteps:
            # The scheduler's velocity points from data to noise, ours from noise to data.
            (z,) = scheduler.step(-velocity(z, t), t, z, return_dict=False)
            yield z

    def velocity_function(
        self,
        network: Any,
        context: Tensor,
        actions: Tensor,
        prev_action: Tensor | None = None,
        *,
        cached: bool = True,
    ) -> VelocityFunction:
        """``(z, timestep) -> velocity`` of a chunk's predicted frames, in float32; one timestep for all rows.

        Arguments as :meth:`sample`.
        """
        sigma = self._context_sigma(context)

        def told(z: Tensor, t: Tensor) -> Tensor:
            return self._told(t).expand(z.shape[0])

        if cached and hasattr(network, "encode_context"):
            cache = network.encode_context(context, prev_action=prev_action, sigma=sigma)
            return lambda z, t: network.denoise(z, told(z, t), actions, cache).float()

        n_context = context.shape[2]
        mask = torch.arange(n_context + actions.shape[1], device=context.device) < n_context
        mask = mask.expand(context.shape[0], -1)

        def velocity(z: Tensor, t: Tensor) -> Tensor:
            frames = torch.cat([context, z], dim=2)
            out = network(frames, told(z, t), actions, mask, prev_action=prev_action, context_sigma=sigma)
            return out[:, :, n_context:].float()

        return velocity

    def _context_sigma(self, like: Tensor) -> Tensor:
        return torch.full((like.shape[0],), self.context_noise, device=like.device)

    def _told(self, timestep: Tensor) -> Tensor:
        return timestep.bfloat16().float() if self.round_timesteps else timestep


def resolution_shift(height_px: int, width_px: int, n_frames: int) -> float:
    """Shift of the timesteps for a picture size: larger pictures hide more under the same noise.

    1 for 256x256 video, so the published world models are not shifted at all.

    Args:
        height_px: Frame height in pixels.
        width_px: Frame width in pixels.
        n_frames: 1 for a still picture; any larger number counts as video.
    """
    return math.sqrt(height_px * width_px / 512**2) * (1 if n_frames == 1 else 2)


def shift_timestep(timestep: Tensor, shift: float, n_train_timesteps: int = 1000) -> Tensor:
    """Bend timesteps towards noise (``shift`` above 1) or data (below 1); 0 and 1000 stay where they are.

    The published formula may overshoot 1000 by a rounding error, at which its sampler gives up (for instance
    at 64x96 pixels); the result is therefore cut off there.
    """
    u = timestep / n_train_timesteps
    return (shift * u / (1 + (shift - 1) * u) * n_train_timesteps).clamp(max=n_train_timesteps)


@lru_cache(maxsize=8)
def _prepared_scheduler(flow: RectifiedFlow, steps: int, device: torch.device) -> Any:
    """Diffusers' Euler scheduler before its first step; a copy of it counts its own steps."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=flow.n_train_timesteps)
    scheduler.set_timesteps(sigmas=(flow.timesteps(steps) / flow.n_train_timesteps).tolist(), device=device)
    scheduler.set_begin_index(0)  # spares a search, which would wait for the GPU
    return scheduler
