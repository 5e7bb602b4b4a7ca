"""Construct or load the components of a world by name: networks and autoencoders."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from wmpo_gym.tasks import Task
from wmpo_gym.training.presets import NO_HINTS, TrainingHints
from wmpo_gym.utils.io import ArtifactError, read_json
from wmpo_gym.world.networks.autoencoder import Autoencoder, LatentAutoencoder, PixelAutoencoder
from wmpo_gym.world.networks.conv import ConvWorldModel
from wmpo_gym.world.networks.stdit import CONFIGS, STDiT
from wmpo_gym.world.world import WorldConfig, find_pretrained

NETWORKS: dict[str, type[Any]] = {"conv": ConvWorldModel, "stdit": STDiT}
STDIT_SIZES: dict[str, dict[str, Any]] = {
    # Small enough to train on pixels on a CPU.
    "small": {"hidden_size": 192, "depth": 4, "num_heads": 4, "patch_size": 4, "predict_sigma": False},
    "xl": {**CONFIGS["xl"], "patch_size": 2, "predict_sigma": True},
}
"""Sizes of the transformer; ``xl`` is the published one."""


def make_autoencoder(name: str) -> Autoencoder:
    """An autoencoder by name.

    Args:
        name: ``"pixels"``, or the directory or hub id of a diffusers ``AutoencoderKL``.

    Raises:
        ValueError: If there is no such directory.
        ArtifactError: If it holds another kind of model.
    """
    if name == "pixels":
        return PixelAutoencoder()
    return LatentAutoencoder.from_pretrained(find_pretrained(name, "autoencoder"))


def make_network(
    name: str,
    task: Task,
    autoencoder: Autoencoder,
    sampling: WorldConfig,
    *,
    seed: int,
    state_dim: int = 0,
    hints: TrainingHints = NO_HINTS,
    sizes: Mapping[str, Any] | None = None,
) -> nn.Module:
    """An untrained world model for a task; the global random generator is not changed.

    Args:
        name: ``"conv"`` or ``"stdit"``.
        task: Defines the sizes of frames, chunks and actions.
        autoencoder: Defines the size of the latents.
        sampling: Defines the context length and context noise.
        seed: Seed of the weights.
        state_dim: Dimension of the robot state that a ``conv`` network models; 0 for none.
        hints: Initial motion of a ``conv`` network.
        sizes: Further arguments of the network's class; for a transformer they override the small size.

    Raises:
        ValueError: If the frames do not fit the autoencoder or the sizes do not fit the network.
    """
    size, rest = divmod(task.image_size, autoencoder.downscale)
    if rest:
        raise ValueError(
            f"Frames of {task.image_size} pixels do not fit an autoencoder that downscales by "
            f"{autoencoder.downscale}; ask for another size, as in --task {task.base_name}@256."
        )
    given = dict(sizes or {})
    try:
        if name == "conv":
            latent_task = task if size == task.image_size else task.at(size)
            fitted: dict[str, Any] = {
                "channels": autoencoder.latent_channels,
                "context_frames": sampling.context_frames,
                "state_dim": state_dim,
            }
            if hints.motion_px is not None:
                scale = size / task.image_size
                fitted["shift_init"] = (hints.motion_px[0] * scale, hints.motion_px[1] * scale)
            return ConvWorldModel.for_task(latent_task, seed, **{**fitted, **given})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            fitted = {
                "in_channels": autoencoder.latent_channels,
                "pixels_per_latent": autoencoder.downscale,
                "base_size": task.image_size,
                "context_frames": sampling.context_frames,
                "context_noise": sampling.context_noise,
                "chunk": task.chunk,
                "action_dim": task.action_dim,
            }
            return STDiT(**{**STDIT_SIZES["small"], **fitted, **given})
    except TypeError as error:
        raise ValueError(f"network_config does not fit the network {name!r}: {error}") from error


def load_network(directory: Path) -> nn.Module:
    """Load a world model saved with ``save_pretrained``, in evaluation mode.

    Raises:
        ArtifactError: If the directory holds another kind of network.
    """
    kinds = {kind.__name__: kind for kind in NETWORKS.values()}
    found = read_json(directory / "config.json").get("_class_name")
    if found not in kinds:
        raise ArtifactError(f"{directory} holds a {found!r}; world models are {', '.join(kinds)}.")
    return kinds[found].from_pretrained(directory).eval()
