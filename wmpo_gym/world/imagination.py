"""Imagination: sample a world model chunk by chunk, each conditioned on the previous frames.

It handles frames, actions and noise; episodes, rewards and seeds belong to the environment. All randomness
enters through the ``noise`` argument, so each row depends only on its own inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from wmpo_gym.utils.rows import TensorRows, pad_rows
from wmpo_gym.world.flow import RectifiedFlow, WorldNetwork

if TYPE_CHECKING:
    from wmpo_gym.world.networks.autoencoder import Autoencoder


@dataclass
class ImaginationState(TensorRows):
    """State between two chunks, one row per trajectory.

    Attributes:
        context: float32 ``(B, C, H, h, w)``, the last H frames as latents.
        prev_action: float32 ``(B, D)``, the action that led to the last of them; zeros at the start.
            ``(B, D + M)`` with the robot state appended if the network has a proprioception model.
    """

    context: Tensor
    prev_action: Tensor


class Imagination:
    """Sampler of a world model: generates one chunk of frames per step for a batch of trajectories.

    Args:
        network: World model; see :class:`~wmpo_gym.world.flow.WorldNetwork`.
        autoencoder: Maps frames to latents and back.
        chunk: K, actions and frames per step.
        context_frames: H, the number of conditioning frames.
        denoising_steps: Euler steps per chunk.
        image_size: Side of the square frames, or ``(height, width)``, in pixels.
        action_dim: D.
        flow: Sampler settings.

    Attributes:
        noise_shape: ``(C, K, h, w)`` of the noise per row and step.
        nfe_per_chunk: Network evaluations per row and step.
    """

    def __init__(
        self,
        network: WorldNetwork,
        autoencoder: Autoencoder,
        *,
        chunk: int,
        context_frames: int,
        denoising_steps: int,
        image_size: int | tuple[int, int],
        action_dim: int,
        flow: RectifiedFlow | None = None,
    ) -> None:
        self.network, self.autoencoder = network, autoencoder
        self.flow = RectifiedFlow() if flow is None else flow
        self.chunk, self.context_frames, self.action_dim = chunk, context_frames, action_dim
        self.nfe_per_chunk = denoising_steps
        self.image_size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        height, width = (side // autoencoder.downscale for side in self.image_size)
        self.noise_shape = (autoencoder.latent_channels, chunk, height, width)

    @property
    def motion(self) -> Any:
        """The network's proprioception model, or None."""
        return getattr(self.network, "motion", None)

    @property
    def device(self) -> torch.device:
        """Device of the network."""
        return getattr(self.network, "device", torch.device("cpu"))

    @torch.no_grad()
    def start(self, frames: Tensor | np.ndarray) -> ImaginationState:
        """Initial state of trajectories: the first frame repeated, as if the robot had been at rest.

        Args:
            frames: uint8 ``(B, height, width, 3)`` first frames.

        Raises:
            ValueError: If the frames are not uint8 or of another shape.
        """
        frames = torch.as_tensor(frames).to(self.device)
        if frames.dtype != torch.uint8 or tuple(frames.shape[1:]) != (*self.image_size, 3):
            raise ValueError(
                f"Start frames must be uint8 (B, {self.image_size[0]}, {self.image_size[1]}, 3), got "
                f"{frames.dtype} {tuple(frames.shape)}."
            )
        # Encode once, then repeat: an encoder may sample from its posterior.
        context = self.autoencoder.encode(frames[:, None]).repeat(1, 1, self.context_frames, 1, 1)
        prev_action = context.new_zeros(len(frames), self.action_dim)
        if self.motion is not None:
            first = self._enough_rows(context[:, :, 0])
            prev_action = torch.cat([prev_action, self.motion.init_state(first)[: len(frames)]], dim=1)
        return ImaginationState(context, prev_action)

    @torch.no_grad()
    def step(
        self, state: ImaginationState, actions: Tensor | np.ndarray, noise: Tensor | np.ndarray
    ) -> tuple[Tensor, ImaginationState]:
        """Imagine one chunk; ``state`` is not modified.

        Args:
            state: From :meth:`start` or the previous step.
            actions: float32 ``(B, K, D)`` in [-1, 1].
            noise: float32 ``(B, C, K, h, w)``, standard normal.

        Returns:
            uint8 frames ``(B, K, height, width, 3)`` and the state after them.

        Raises:
            ValueError: If actions or noise do not have these shapes.
        """
        state = state.to(self.device)
        actions, noise = (torch.as_tensor(x).to(self.device, torch.float32) for x in (actions, noise))
        self._check("actions", actions, (len(state), self.chunk, self.action_dim))
        self._check("noise", noise, (len(state), *self.noise_shape))
        latents = self._sample(noise, state.context, actions, state.prev_action)
        frames = self.autoencoder.decode(latents)
        # A lossless autoencoder re-encodes the decoded frames, so that contexts are quantised to 256 levels
        # like the recorded frames in training. With a lossy one, re-encoding would accumulate its error; the
        # generated latents are used instead, as published.
        latents = latents[:, :, -self.context_frames :]
        if self.autoencoder.lossless:
            latents = self.autoencoder.encode(frames[:, -self.context_frames :])
        known = [state.context[:, :, self.chunk :], latents]
        prev_action = actions[:, -1].clone()
        if self.motion is not None:
            states = self.motion.rollout(state.prev_action[:, self.action_dim :], actions)
            prev_action = torch.cat([prev_action, states[:, -1]], dim=1)
        return frames, ImaginationState(torch.cat(known, dim=2), prev_action)

    def _sample(self, noise: Tensor, context: Tensor, actions: Tensor, prev_action: Tensor) -> Tensor:
        n = len(noise)
        noise, context, actions, prev_action = map(self._enough_rows, (noise, context, actions, prev_action))
        sampled = self.flow.sample(
            self.network, noise, context, actions, self.nfe_per_chunk, prev_action=prev_action
        )
        return sampled[:n]

    def _enough_rows(self, x: Tensor) -> Tensor:
        """Pad to the network's ``min_rows``; smaller batches round differently on a CPU."""
        return pad_rows(x, getattr(self.network, "min_rows", 1))

    @staticmethod
    def _check(name: str, value: Tensor, shape: tuple[int, ...]) -> None:
        if tuple(value.shape) != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}.")


class CompiledNetwork:
    """World model with ``torch.compile`` applied to its context encoder and its denoising step."""

    def __init__(self, network: Any) -> None:
        self.original = network
        self.encode_context = torch.compile(network.encode_context)
        self.denoise = torch.compile(network.denoise)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.original, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Forward pass of the network, not compiled."""
        return self.forward(*args, **kwargs)
