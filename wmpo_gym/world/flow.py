"""Rectified flow: training loss and Euler sampler of the straight path from noise to frames.

Notation, as in the published code: a *timestep* is ``1000 * sigma``, and ``sigma`` in [0, 1] is the share of
noise, so 1000 is pure noise and 0 a clean latent::

    x_t      = (1 - sigma) * x0 + sigma * noise
    velocity = x0 - noise                        points from noise to data; diffusers uses the opposite sign

*Context frames* are given, *predicted frames* are denoised; only predicted frames enter the loss and change
during sampling.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor

VelocityFunction = Callable[[Tensor, Tensor], Tensor]

PAPER_CONTEXT_NOISE = 0.05
"""Training noise level of the context frames in the paper: 50 of 1000 diffusion steps (§3.2)."""

RELEASE_CONTEXT_NOISE = 0.015
"""Training noise level of the context frames in the released code and weights: 15 of 1000."""


class WorldNetwork(Protocol):
    """Interface of a world-model network.

    A network may also offer ``encode_context(context, prev_action, sigma) -> cache`` and
    ``denoise(latents, timestep, actions, cache) -> velocity``, which compute the same velocity of the
    predicted frames but encode the context only once per chunk.
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
        """Velocity ``(B, C, H + K, h, w)``; its values at context frames are ignored.

        Args:
            latents: ``(B, C, H + K, h, w)``, the H context frames first.
            timestep: ``(B,)`` in [0, 1000].
            actions: ``(B, K, D)``; action k leads to predicted frame k.
            context_mask: bool ``(B, H + K)``, True on context frames.
            prev_action: ``(B, D)``, the action that led to the last context frame.
            context_sigma: ``(B,)`` noise level of the context frames; None for the network's default.
        """


@dataclass(frozen=True)
class RectifiedFlow:
    """Loss and Euler sampler of a world model.

    Attributes:
        n_train_timesteps: Timestep of pure noise.
        context_noise: Noise level in [0, 1] of the context frames in training, which reduces drift in
            long rollouts. When sampling, the context stays clean but the network is conditioned on this
            level, as in the release; 0 conditions it on the true level.
        shift: Values above 1 allocate more steps to high noise levels, values below 1 to low ones; the
            published world models use 1.
        round_timesteps: Round the timesteps given to the network to bfloat16, as the release does when its
            network runs in bfloat16 (33.333 becomes 33.25). Only needed to reproduce the release.
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

        diffusers' ``scale_noise`` only supports the timesteps of a sampling grid; training draws them
        continuously.

        Args:
            latents: ``(B, C, T, h, w)``.
            noise: Same shape, standard normal.
            timestep: ``(B,)``, or ``(B, T)`` for a noise level per frame.
        """
        return interpolate(latents, noise, timestep / self.n_train_timesteps)

    def corrupt(
        self,
        latents: Tensor,
        noise: Tensor,
        timestep: Tensor,
        context_mask: Tensor,
        context_sigma: Tensor | None = None,
    ) -> Tensor:
        """Add noise to predicted frames at ``timestep`` (B,) and to context frames at their own level.

        Both use the same ``noise`` tensor. Shapes as in :meth:`add_noise`; ``context_mask`` is bool
        ``(B, T)``, True on context frames, and ``context_sigma`` ``(B,)`` the context's noise level in
        [0, 1], None for :attr:`context_noise`.
        """
        if context_sigma is None:
            context_sigma = self._context_sigma(latents)
        sigma = timestep / self.n_train_timesteps
        return interpolate(latents, noise, torch.where(context_mask, context_sigma[:, None], sigma[:, None]))

    @staticmethod
    def velocity(latents: Tensor, noise: Tensor) -> Tensor:
        """Regression target: the velocity from ``noise`` to the clean ``latents``."""
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
        context_sigma: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Tensor:
        """Mean squared error of the velocity, per sample and over its predicted frames only.

        Args:
            network: See :class:`WorldNetwork`.
            latents: Clean ``(B, C, T, h, w)``.
            actions: ``(B, K, D)``.
            context_mask: bool ``(B, T)``, True on context frames; their number may differ between samples.
            timestep: ``(B,)`` in [0, 1000]; see :meth:`sample_timesteps`.
            noise: Standard normal, shape of ``latents``.
            prev_action: ``(B, D)`` or None.
            context_sigma: ``(B,)`` noise level of the context in [0, 1]; None for :attr:`context_noise`.
            weights: Weights of the squared errors, broadcast to ``latents``; None for 1.

        Returns:
            ``(B,)``; its mean is the training loss.

        Raises:
            ValueError: If a sample has only context frames.
        """
        losses, _ = self.loss_and_estimate(
            network, latents, actions, context_mask, timestep=timestep, noise=noise, prev_action=prev_action,
            context_sigma=context_sigma, weights=weights,
        )  # fmt: skip
        return losses

    def loss_and_estimate(
        self,
        network: WorldNetwork,
        latents: Tensor,
        actions: Tensor,
        context_mask: Tensor,
        *,
        timestep: Tensor,
        noise: Tensor,
        prev_action: Tensor | None = None,
        context_sigma: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """:meth:`loss` and the estimate of the clean latents ``(B, C, T, h, w)`` from the predicted velocity.

        The estimate is differentiable and undefined on context frames. Arguments as in :meth:`loss`.
        """
        predicted = (~context_mask).to(latents.dtype)
        if not bool(predicted.any(dim=1).all()):
            row = int((predicted.sum(dim=1) == 0).nonzero()[0])
            raise ValueError(f"Sample {row} has only context frames; leave at least one frame to predict.")
        if context_sigma is None:
            context_sigma = self._context_sigma(latents)
        noisy = self.corrupt(latents, noise, timestep, context_mask, context_sigma)
        velocity = network(
            noisy,
            self._quantised(timestep),
            actions,
            context_mask,
            prev_action=prev_action,
            context_sigma=context_sigma,
        )
        error = (velocity - self.velocity(latents, noise)).square()
        per_frame = (error if weights is None else weights * error).mean(dim=(1, 3, 4))
        losses = (per_frame * predicted).sum(dim=1) / predicted.sum(dim=1)
        sigma = (timestep / self.n_train_timesteps)[:, None, None, None, None]
        return losses, noisy + sigma * velocity

    def sample_timesteps(self, batch: int, generator: torch.Generator | None = None) -> Tensor:
        """Logit-normal training timesteps ``(batch,)`` in (0, 1000), densest at medium noise."""
        return torch.sigmoid(torch.randn(batch, generator=generator)) * self.n_train_timesteps

    # -- sampling ------------------------------------------------------------------------------------------
    def timesteps(self, steps: int) -> Tensor:
        """Timesteps ``(steps,)`` of the sampler in decreasing order; the last step ends at 0.

        Raises:
            ValueError: If ``steps`` is less than 1.
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
        """Sample a chunk of latents from ``noise``: deterministic, differentiable, without guidance.

        Args:
            network: See :class:`WorldNetwork`.
            noise: ``(B, C, K, h, w)`` standard normal.
            context: Clean ``(B, C, H, h, w)``.
            actions: ``(B, K, D)`` in [-1, 1].
            steps: Euler steps, each one network evaluation.
            prev_action: ``(B, D)`` or None.
            cached: Encode the context once per chunk if the network supports it; the result is the same.

        Returns:
            float32 ``(B, C, K, h, w)``.
        """
        velocity = self.velocity_function(network, context, actions, prev_action, cached=cached)
        *_, z = self.integrate(velocity, noise, steps)
        return z

    def integrate(self, velocity: VelocityFunction, noise: Tensor, steps: int) -> Iterator[Tensor]:
        """Euler integration from ``noise`` to the latents; yields the sample after each step.

        Args:
            velocity: From :meth:`velocity_function`.
            noise: ``(B, C, K, h, w)`` standard normal.
            steps: Euler steps.
        """
        scheduler = copy.copy(_prepared_scheduler(self, steps, noise.device))
        z = noise.float()
        for t in scheduler.timesteps:
            # The scheduler expects the velocity from data to noise, which is the negative of ours.
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

        Arguments as in :meth:`sample`.
        """
        sigma = self._context_sigma(context)

        def timestep(z: Tensor, t: Tensor) -> Tensor:
            return self._quantised(t).expand(z.shape[0])

        if cached and hasattr(network, "encode_context"):
            cache = network.encode_context(context, prev_action=prev_action, sigma=sigma)
            return lambda z, t: network.denoise(z, timestep(z, t), actions, cache).float()

        n_context = context.shape[2]
        mask = torch.arange(n_context + actions.shape[1], device=context.device) < n_context
        mask = mask.expand(context.shape[0], -1)

        def velocity(z: Tensor, t: Tensor) -> Tensor:
            frames = torch.cat([context, z], dim=2)
            out = network(frames, timestep(z, t), actions, mask, prev_action=prev_action, context_sigma=sigma)
            return out[:, :, n_context:].float()

        return velocity

    def _context_sigma(self, like: Tensor) -> Tensor:
        return torch.full((like.shape[0],), self.context_noise, device=like.device)

    def _quantised(self, timestep: Tensor) -> Tensor:
        return timestep.bfloat16().float() if self.round_timesteps else timestep


def interpolate(latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """Mix latents with noise at the level ``sigma``, ``(B,)`` or ``(B, T)`` in [0, 1]."""
    sigma = sigma.view(sigma.shape[0], 1, -1, 1, 1)
    return (1 - sigma) * latents + sigma * noise


def shift_timestep(timestep: Tensor, shift: float, n_train_timesteps: int = 1000) -> Tensor:
    """Shift timesteps towards noise (``shift`` above 1) or data (below 1); 0 and 1000 are fixed points.

    The published formula may exceed 1000 by a rounding error, which makes its sampler fail (for instance at
    64x96 pixels); the result is therefore clamped.
    """
    u = timestep / n_train_timesteps
    return (shift * u / (1 + (shift - 1) * u) * n_train_timesteps).clamp(max=n_train_timesteps)


@lru_cache(maxsize=8)
def _prepared_scheduler(flow: RectifiedFlow, steps: int, device: torch.device) -> Any:
    """Diffusers' Euler scheduler before its first step; copy it before use, since it counts its steps."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=flow.n_train_timesteps)
    scheduler.set_timesteps(sigmas=(flow.timesteps(steps) / flow.n_train_timesteps).tolist(), device=device)
    scheduler.set_begin_index(0)  # avoids a search that would synchronise with the GPU
    return scheduler
