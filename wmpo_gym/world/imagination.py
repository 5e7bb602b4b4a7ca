"""Imagination: sample a world model chunk by chunk, each conditioned on the frames of the one before.

It knows frames, actions and noise, and nothing of episodes, rewards or seeds; those belong to the
environment. All randomness comes in through the ``noise`` argument, so a row depends on its own inputs only.
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
    """What the next chunk depends on, one row per trajectory.

    Attributes:
        context: float32 ``(B, C, H, h, w)``, the last H frames as latents.
        prev_action: float32 ``(B, D)``, the action that led to the last of them; zeros at the start.
            ``(B, D + M)`` with where the robot is behind it, if the network follows that (its ``motion``).
    """

    context: Tensor
    prev_action: Tensor


class Imagination:
    """Generate frames, a chunk per step, for a batch of trajectories at once.

    Args:
        network: World model; see :class:`~wmpo_gym.world.flow.WorldNetwork`.
        autoencoder: Maps frames to latents and back.
        chunk: K, actions and frames per step.
        context_frames: H, frames the network sees.
        denoising_steps: Euler steps per chunk.
        image_size: Side of the square frames, or ``(height, width)``, in pixels.
        action_dim: D.
        flow: Sampler settings.

    Attributes:
        noise_shape: ``(C, K, h, w)`` of the noise that a row needs per step.
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
        """What follows the robot's own state, if the network has it; else None."""
        return getattr(self.network, "motion", None)

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return getattr(self.network, "device", torch.device("cpu"))

    @torch.no_grad()
    def start(self, frames: Tensor | np.ndarray) -> ImaginationState:
        """State at the beginning of trajectories: the robot has stood still in front of its first frame.

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
        # Encoded once and repeated, not the other way round: an encoder may draw from its posterior.
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
        """Imagine one chunk; ``state`` is left as it was.

        Args:
            state: From :meth:`start` or the step before.
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
        # Recorded frames lie on the grid of 256 levels and so do the pixels a network trained on them should
        # see. A lossy autoencoder is left out of the loop instead: encoding anew each chunk would add its
        # losses up (the published loop keeps the generated latents for that reason).
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
        """Padded to the network's ``min_rows``: fewer would be rounded differently on a CPU."""
        return pad_rows(x, getattr(self.network, "min_rows", 1))

    @staticmethod
    def _check(name: str, value: Tensor, shape: tuple[int, ...]) -> None:
        if tuple(value.shape) != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}.")


class CompiledNetwork:
    """A world model whose two halves, context and denoising step, went through ``torch.compile``."""

    def __init__(self, network: Any) -> None:
        self.original = network
        self.encode_context = torch.compile(network.encode_context)
        self.denoise = torch.compile(network.denoise)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.original, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """As the network itself, not compiled."""
        return self.forward(*args, **kwargs)
