"""Training of the small auxiliary networks with AdamW and a one-cycle schedule."""

from __future__ import annotations

import json
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR

from wmpo_gym.training.checkpoint import TrainingState
from wmpo_gym.training.runtime import ComputeSettings
from wmpo_gym.training.trainer import Loss, Trainer, TrainingSettings, TrainingTask


@dataclass(frozen=True)
class FitSettings(TrainingSettings):
    """Settings of :func:`fit`."""

    batch_size: int = 48
    learning_rate: float = 3e-3


class FitTask(TrainingTask):
    """A task whose batches are drawn with a numpy generator.

    Attributes:
        config: Settings.
        rng: Random generator of the batches.
        losses: Losses of the last tenth of the steps.
    """

    config: TrainingSettings
    rng: np.random.Generator
    network: nn.Module
    losses: deque[float]

    def optimizers(self) -> dict[str, tuple[Optimizer, LRScheduler]]:
        """AdamW with a one-cycle schedule."""
        rate, decay = self.config.learning_rate, self.config.weight_decay
        optimizer = torch.optim.AdamW(self.network.parameters(), rate, weight_decay=decay)
        return {"adamw": (optimizer, OneCycleLR(optimizer, rate, self.config.steps))}

    def share(self, mean: Tensor, n: int) -> Loss:
        """The part of the batch's mean loss that ``n`` rows with the given mean contribute."""
        loss = mean * (n / self.config.batch_size)
        return Loss(loss, {"loss": float(loss.detach())})

    def state(self) -> TrainingState:
        """Weights, generator and losses."""
        state = super().state()
        state.values |= {"rng": json.dumps(self.rng.bit_generator.state), "losses": list(self.losses)}
        return state

    def load_state(self, state: TrainingState) -> None:
        """Restore :meth:`state`."""
        super().load_state(state)
        self.rng.bit_generator.state = json.loads(state.values["rng"])
        self.losses.extend(state.values["losses"])


def fit(
    task: FitTask,
    settings: TrainingSettings,
    *,
    compute: ComputeSettings | None = None,
    checkpoint_dir: Path | None = None,
    progress: bool = False,
) -> float:
    """Train a task's network.

    Args:
        task: The task.
        settings: How to train.
        compute: Device and precision; None is float32 on the network's device.
        checkpoint_dir: Directory of the checkpoint. Training resumes from an existing one; a finished
            training is only loaded.
        progress: Show a progress bar.

    Returns:
        Mean loss of the last tenth of the steps.
    """
    task.losses = deque(maxlen=max(1, settings.steps // 10))
    trainer = Trainer(
        task,
        settings,
        compute=compute,
        checkpoint_dir=checkpoint_dir,
        on_step=lambda _, metrics: task.losses.append(metrics["loss"]),
    )
    trainer.train(progress=progress)
    return float(np.mean(task.losses))
