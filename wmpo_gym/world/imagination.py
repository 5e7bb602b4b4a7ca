"""Imagination: a world model rolled out chunk by chunk, each chunk on what the previous one made.

It knows frames, actions and noise, and nothing of episodes, rewards or seeds; those belong to the
environment. All randomness comes in through the ``noise`` argument, so a row depends on its own inputs only.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from wmpo_gym.world.flow import RectifiedFlow, WorldNetwork

if TYPE_CHECKING:
    from wmpo_gym.world.networks.autoencoder import Autoencoder
    from wmpo_gym.world.world import World

Index = Tensor | np.ndarray | slice | list[int]


@dataclass
class ImaginationState:
    """What the next chunk depends on, one row per trajectory.

    Attributes:
        context: float32 ``(B, C, H, h, w)``, the last H frames as latents.
        prev_action: float32 ``(B, D)``, the action that led to the last of them; zeros at the start.
            ``(B, D + M)`` with where the robot is behind it, if the network follows that (its ``motion``).
    """

    context: Tensor
    prev_action: Tensor

    def __len__(self) -> int:
        return self.context.shape[0]

    def rows(self, index: Index) -> ImaginationState:
        """A copy of some rows; ``index`` as for a tensor: integers, a bool mask or a slice."""
        return ImaginationState(**{name: _take(value, index) for name, value in self._items()})

    def assign(self, index: Index, other: ImaginationState) -> None:
        """Overwrite some rows in place with those of ``other``, in order."""
        for name, value in self._items():
            value[_index(index)] = getattr(other, name).to(value)

    def to(self, device: torch.device | str) -> ImaginationState:
        """The same state on a device."""
        return ImaginationState(**{name: value.to(device) for name, value in self._items()})

    def to_dict(self) -> dict[str, np.ndarray]:
        """Copies as numpy arrays, to be stored; :meth:`from_dict` restores the same numbers."""
        return {name: value.cpu().numpy().copy() for name, value in self._items()}

    @classmethod
    def from_dict(cls, arrays: dict[str, np.ndarray]) -> ImaginationState:
        """Rebuild a state from :meth:`to_dict`, on the CPU; a step takes it to the network.

        Raises:
            ValueError: If an array is missing.
        """
        names = [f.name for f in fields(cls)]
        if missing := [name for name in names if name not in arrays]:
            raise ValueError(f"An imagination state needs {' and '.join(names)}; it lacks {missing}.")
        return cls(**{name: torch.from_numpy(np.array(arrays[name], dtype=np.float32)) for name in names})

    def _items(self) -> list[tuple[str, Tensor]]:
        return [(f.name, getattr(self, f.name)) for f in fields(self)]


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

    @classmethod
    def from_world(cls, world: World, *, dtype: str = "float32", compile: bool = False) -> Imagination:
        """The imagination of a :class:`~wmpo_gym.world.world.World`, with its sampling settings.

        Args:
            world: The world, which is left as it is.
            dtype: ``"float32"``, or ``"bfloat16"`` for copies of network and autoencoder that compute in it.
            compile: Compile the network with ``torch.compile``.

        Raises:
            ValueError: If the dtype is unknown or the network does not compute in it.
        """
        network, autoencoder = world.network, world.autoencoder
        if dtype not in ("float32", *getattr(network, "other_dtypes", ())):
            raise ValueError(
                f"{type(network).__name__} does not compute in {dtype!r}; it does in "
                f"{' and '.join(['float32', *getattr(network, 'other_dtypes', ())])}."
            )
        if dtype != "float32":
            wanted = getattr(torch, dtype)
            network, autoencoder = copy.deepcopy(network).to(wanted), autoencoder.in_dtype(wanted)
        return cls(
            CompiledNetwork(network) if compile else network,
            autoencoder,
            chunk=world.task.chunk,
            context_frames=world.config.context_frames,
            denoising_steps=world.config.denoising_steps,
            image_size=world.task.image_size,
            action_dim=world.task.action_dim,
            flow=RectifiedFlow(
                context_noise=world.config.context_noise, round_timesteps=world.config.round_timesteps
            ),
        )

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
            way = self.motion.rollout(state.prev_action[:, self.action_dim :], actions)
            prev_action = torch.cat([prev_action, way[:, -1]], dim=1)
        return frames, ImaginationState(torch.cat(known, dim=2), prev_action)

    def _sample(self, noise: Tensor, context: Tensor, actions: Tensor, prev_action: Tensor) -> Tensor:
        n = len(noise)
        noise, context, actions, prev_action = map(self._enough_rows, (noise, context, actions, prev_action))
        sampled = self.flow.sample(
            self.network, noise, context, actions, self.nfe_per_chunk, prev_action=prev_action
        )
        return sampled[:n]

    def _enough_rows(self, x: Tensor) -> Tensor:
        """With the last row repeated if there are so few that the CPU's kernels would round them otherwise.

        A row would depend on its batch.
        """
        wanted = getattr(self.network, "min_rows", 1)
        return x if len(x) >= wanted else x[torch.arange(wanted).clamp(max=len(x) - 1)]

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


def _index(index: Index) -> Any:
    return torch.as_tensor(index) if isinstance(index, (np.ndarray, list)) else index


def _take(value: Tensor, index: Index) -> Tensor:
    taken = value[_index(index)]
    return taken.clone() if isinstance(index, slice) else taken  # a slice would share its memory
