"""Autoencoders of world models: identity on pixels, or a diffusers ``AutoencoderKL``.

Frames are uint8 ``(B, T, H, W, 3)`` as in episodes and observations; latents are float32 ``(B, C, T, h, w)``
with ``h = H / downscale``. Both classes process each frame independently.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from wmpo_gym.utils.io import ArtifactError, read_json, write_json_atomic

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

SDXL_SCALING = 0.13025
"""Factor that scales the latents of the SDXL autoencoder to unit variance; there is no shift."""

SDXL_AUTOENCODER: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "scaling_factor": SDXL_SCALING,
}
"""The SDXL autoencoder's sizes, as arguments of diffusers' ``AutoencoderKL``."""


class Autoencoder(ABC):
    """Interface of an autoencoder: maps frames to latents and back.

    Attributes:
        latent_channels: C.
        downscale: Pixels per latent along each side.
        lossless: Whether ``encode(decode(z))`` only quantises ``z`` to 256 levels.
    """

    latent_channels: int
    downscale: int
    lossless: bool

    @abstractmethod
    def encode(self, frames: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Latents float32 ``(B, C, T, h, w)`` of uint8 frames ``(B, T, H, W, 3)``.

        Args:
            frames: The frames.
            generator: Generator to sample from the posterior; None takes the posterior's mode.
        """

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Frames uint8 ``(B, T, H, W, 3)`` of latents ``(B, C, T, h, w)``."""

    def in_dtype(self, dtype: torch.dtype) -> Autoencoder:
        """A copy that computes in ``dtype``; the same object if there is nothing to convert."""
        return self

    @abstractmethod
    def save_pretrained(self, directory: str | Path) -> None:
        """Write ``config.json`` and any weights as safetensors."""


class PixelAutoencoder(Autoencoder):
    """Identity: latents are the pixels on [-1, 1]. ``decode(encode(frames))`` is exactly ``frames``."""

    latent_channels, downscale, lossless = 3, 1, True

    def encode(self, frames: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """See :class:`Autoencoder`; there is no posterior and ``generator`` is not used."""
        return _to_unit(frames.movedim(-1, 1).contiguous())

    def decode(self, latents: Tensor) -> Tensor:
        """See :class:`Autoencoder`; rounds to the nearest level."""
        levels = (latents.float() + 1.0).mul_(127.5).round_().clamp_(0, 255)
        return levels.to(torch.uint8).movedim(1, -1).contiguous()

    def save_pretrained(self, directory: str | Path) -> None:
        """Write a ``config.json``; there are no weights."""
        write_json_atomic(Path(directory) / "config.json", {"_class_name": type(self).__name__})

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> PixelAutoencoder:
        """Counterpart of :meth:`save_pretrained`.

        Raises:
            ArtifactError: If the directory holds another class.
        """
        _expect_class(directory, cls.__name__)
        return cls()


class LatentAutoencoder(Autoencoder):
    """Image autoencoder of diffusers, applied frame by frame (published: that of SDXL base 1.0).

    Args:
        vae: The autoencoder; its config gives channels, downscale and scaling factor.
        micro_batch: Maximum number of frames per call, to limit memory.
    """

    lossless = False

    def __init__(self, vae: AutoencoderKL, *, micro_batch: int = 64) -> None:
        if micro_batch < 1:
            raise ValueError(f"micro_batch must be at least 1 frame, got {micro_batch}.")
        self.vae = vae.eval().requires_grad_(False)
        self.micro_batch = micro_batch
        self.latent_channels: int = vae.config.latent_channels
        self.downscale: int = 2 ** (len(vae.config.block_out_channels) - 1)
        self.scaling: float = vae.config.scaling_factor
        self.shift: float = getattr(vae.config, "shift_factor", None) or 0.0
        for name in ("latents_mean", "latents_std"):
            if getattr(vae.config, name, None) is not None:
                raise ValueError(
                    f"This autoencoder normalises its latents by {name}, which is not supported; "
                    "scaling_factor and shift_factor are."
                )

    @torch.no_grad()
    def encode(self, frames: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """See :class:`Autoencoder`. The release draws from the posterior; the mode needs no seed.

        Raises:
            ValueError: If the frames' sides are not multiples of :attr:`downscale`.
        """
        height, width = frames.shape[2:4]
        if height % self.downscale or width % self.downscale:
            raise ValueError(
                f"Frames of {height}x{width} pixels do not fit an autoencoder that downscales by "
                f"{self.downscale}; resize them to multiples of it."
            )
        images = frames.flatten(0, 1).movedim(-1, 1)
        batches = images.split(self.micro_batch)
        posteriors = [self.vae.encode(self._input(_to_unit(x))).latent_dist for x in batches]
        latents = torch.cat([p.mode() for p in posteriors]).float()
        if generator is not None:
            # Drawn for all frames at once, so that the noise does not depend on the micro-batch.
            noise = torch.randn(latents.shape, generator=generator, device=generator.device)
            latents += torch.cat([p.std for p in posteriors]).float() * noise.to(latents.device)
        latents = (latents - self.shift) * self.scaling
        return latents.unflatten(0, frames.shape[:2]).transpose(1, 2).contiguous()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """See :class:`Autoencoder`; truncates to whole levels as the release does."""
        flat = latents.transpose(1, 2).flatten(0, 1) / self.scaling + self.shift
        pixels = [self.vae.decode(self._input(z)).sample for z in flat.split(self.micro_batch)]
        frames = torch.cat([truncate_to_uint8(x) for x in pixels]).movedim(1, -1)
        return frames.unflatten(0, (latents.shape[0], latents.shape[2])).contiguous()

    def in_dtype(self, dtype: torch.dtype) -> LatentAutoencoder:
        """See :class:`Autoencoder`."""
        return LatentAutoencoder(copy.deepcopy(self.vae).to(dtype), micro_batch=self.micro_batch)

    def _input(self, x: Tensor) -> Tensor:
        return x.to(self.vae.device, self.vae.dtype)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write a directory readable by ``AutoencoderKL.from_pretrained``."""
        self.vae.save_pretrained(directory, safe_serialization=True)

    @classmethod
    def from_pretrained(cls, directory: str | Path, *, micro_batch: int = 64) -> LatentAutoencoder:
        """Load from :meth:`save_pretrained` or from any saved ``AutoencoderKL``; safetensors only.

        Raises:
            ArtifactError: If the directory holds another class.
        """
        from diffusers import AutoencoderKL

        _expect_class(directory, "AutoencoderKL")
        return cls(AutoencoderKL.from_pretrained(directory, use_safetensors=True), micro_batch=micro_batch)


def truncate_to_uint8(pixels: Tensor) -> Tensor:
    """Pixels on [-1, 1] to levels 0..255, truncated rather than rounded, as in the published decoder."""
    return ((pixels.float() * 0.5 + 0.5) * 255.0).clamp(0, 255).to(torch.uint8)


def _to_unit(frames: Tensor) -> Tensor:
    """Levels 0..255 to [-1, 1]."""
    if frames.dtype != torch.uint8:
        raise ValueError(f"Frames must be uint8 with levels 0..255, got {frames.dtype}.")
    return frames.float() / 127.5 - 1.0


def _expect_class(directory: str | Path, name: str) -> None:
    path = Path(directory) / "config.json"
    config = read_json(path)
    found = config.get("_class_name") if isinstance(config, dict) else None
    if found != name:
        raise ArtifactError(f"{path} describes a {found!r}; give the directory of a saved {name}.")
