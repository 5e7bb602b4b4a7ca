"""Trainings that one process and several must agree on; torchrun runs this file, the test imports it."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from wmpo_gym.data.episode import Episode
from wmpo_gym.tasks import MOVE_BLOCK
from wmpo_gym.training.presets import hints_for
from wmpo_gym.training.runtime import ComputeSettings
from wmpo_gym.utils.io import save_safetensors
from wmpo_gym.world.networks.autoencoder import PixelAutoencoder
from wmpo_gym.world.networks.stdit import STDiT
from wmpo_gym.world.training import WorldModelTrainer, WorldModelTraining

SIZE = 16
SETTINGS = WorldModelTraining(
    steps=5,
    batch_size=4,
    warmup_steps=1,
    teacher_forcing=0.2,
    checkpoint_every=2,
    adversarial=0.05,
    divergence_threshold=1.0,
)


def tiny_stdit() -> STDiT:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return STDiT(
            in_channels=3, context_frames=2, chunk=4, action_dim=3, hidden_size=24, depth=1, num_heads=2,
            patch_size=4, predict_sigma=False, pixels_per_latent=1, base_size=SIZE,
        )  # fmt: skip


def episodes() -> list[Episode]:
    rng = np.random.default_rng(0)
    return [
        Episode(
            rng.integers(0, 256, (n + 1, SIZE, SIZE, 3), dtype=np.uint8),
            rng.uniform(-1, 1, (n, 3)).astype(np.float32), None, n, i, 0, "push", {},
        )
        for i, n in enumerate([12, 7, 9])
    ]  # fmt: skip


def train(settings: WorldModelTraining = SETTINGS, **kwargs) -> WorldModelTrainer:
    trainer = WorldModelTrainer(
        tiny_stdit(), PixelAutoencoder(), replace(MOVE_BLOCK, image_size=SIZE), episodes(), settings,
        denoising_steps=2, symmetries=hints_for("move-block").symmetries, **kwargs,
    )  # fmt: skip
    trainer.train(progress=False)
    return trainer


if __name__ == "__main__":
    trainer = train(compute=ComputeSettings("cpu"), checkpoint_dir=Path(sys.argv[1]) / "c")
    file = Path(sys.argv[1]) / f"rank-{trainer.runtime.index}.safetensors"
    losses = torch.tensor([[e["loss"], e["discriminator_loss"], e["grad_norm"]] for e in trainer.history])
    save_safetensors(file, {**trainer.network.state_dict(), "history": losses})
    torch.distributed.destroy_process_group()
