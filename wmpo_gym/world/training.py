"""Training of the world model with self-forcing: contexts are the model's own predictions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from wmpo_gym.data.augment import Symmetry
from wmpo_gym.data.episode import Episode
from wmpo_gym.tasks import Task
from wmpo_gym.training.checkpoint import TrainingState, pack_optimizer, unpack_optimizer
from wmpo_gym.training.runtime import ComputeSettings
from wmpo_gym.training.trainer import Loss, Trainer, TrainingSettings, TrainingTask, warmup_cosine
from wmpo_gym.world.objectives import (
    ChunkObjective,
    LatentBatch,
    Objective,
    PatchDiscriminator,
    loss_weights,
)
from wmpo_gym.world.optimizers import make_optimizers
from wmpo_gym.world.sampler import ChunkBatch, SelfForcingSampler

DISCRIMINATOR_LEARNING_RATE = 4e-4
DIVERGED_PIXEL = 0.5  # error (frames in [-1, 1]) above which a predicted pixel counts as wrong


@dataclass(frozen=True)
class WorldModelTraining(TrainingSettings):
    """Settings of one training stage.

    Attributes:
        steps: Optimiser steps.
        batch_size: Rows per step.
        learning_rate: Peak learning rate; linear warm-up, then cosine decay to ``final_lr_ratio`` of it.
        weight_decay: Of AdamW and Muon.
        max_grad_norm: Gradients are clipped to this norm.
        ema_decay: Decay of the exponential moving average of the weights (paper: 0.9999, release 0.99).
        seed: Random seed.
        checkpoint_every: Steps between checkpoints.
        log_every: Steps between points of the TensorBoard curves.
        warmup_steps: Steps of warm-up.
        final_lr_ratio: Final learning rate relative to the peak.
        muon: Learning rate of Muon relative to ``learning_rate``, for the ``inner_weights()`` of a network
            that defines them (``ConvWorldModel``); 0 uses AdamW for all weights, as published.
        pure_noise: Share of rows trained at noise level 1, the only level that one-step sampling uses.
        context_noise: Maximum noise level added to the context; the network is conditioned on the level.
        changed_weight: Extra loss weight of pixels that changed since the last context frame.
        adversarial: Weight of the adversarial loss; 0 trains no discriminator.
        teacher_forcing: Share of the training over which the proportion of recorded contexts decreases
            linearly from 1 to 0. Early predictions are too poor to train on.
        divergence_threshold: Share of wrong pixels (off by more than 0.5 in [-1, 1]) in a predicted context
            above which the recorded context replaces it. A prediction that diverged from its recording, for
            example by a missed grasp, would otherwise train the model to make objects jump.
        restart_prob: Probability per chunk that a row starts a new trajectory.
    """

    steps: int = 4000
    weight_decay: float = 1e-4
    ema_decay: float = 0.998
    warmup_steps: int = 50
    final_lr_ratio: float = 0.02
    muon: float = 4.0
    pure_noise: float = 0.9
    context_noise: float = 0.05
    changed_weight: float = 6.0
    adversarial: float = 0.0
    teacher_forcing: float = 0.3
    divergence_threshold: float = 0.01
    restart_prob: float = 0.1


class WorldModelTask(TrainingTask):
    """Training task: predict the next chunk of recorded episodes.

    Each row continues from the model's own prediction of the previous chunk (self-forcing), so that training
    contexts resemble those in imagination.

    Args:
        network: ``ConvWorldModel`` or ``STDiT``.
        autoencoder: Maps frames to the network's latents.
        task: The task.
        episodes: Recorded episodes of any kind; labels are not used.
        config: Settings.
        context_frames: H.
        objective: The loss.
        weights: Relative frequency of each episode; None for equal ones.
        symmetries: Each is applied to a random half of the trajectories.
        validate: Called with (averaged network, step) at every checkpoint; returns metrics to log.
        component: Name of the trained component.
    """

    def __init__(
        self,
        network: nn.Module,
        autoencoder: Any,
        task: Task,
        episodes: Sequence[Episode],
        config: WorldModelTraining,
        *,
        context_frames: int,
        objective: Objective,
        weights: Sequence[float] | None = None,
        symmetries: Sequence[Symmetry] = (),
        validate: Callable[[nn.Module, int], dict[str, float]] | None = None,
        component: str = "world model",
    ) -> None:
        self.network, self.autoencoder, self.config, self.objective = network, autoencoder, config, objective
        self.component, self._validate = component, validate
        self.sampler = SelfForcingSampler(
            episodes, task, n_rows=config.batch_size, context_frames=context_frames, seed=config.seed,
            weights=weights, symmetries=symmetries, restart_prob=config.restart_prob,
            recall=self._robot_states(),
        )  # fmt: skip
        self.generator = torch.Generator().manual_seed(config.seed)
        self.discriminator: PatchDiscriminator | None = None
        if config.adversarial > 0:
            self.discriminator = PatchDiscriminator(autoencoder.latent_channels, task.chunk, seed=config.seed)
        self.context: Tensor | None = None  # contexts of this process's rows, on the device

    def _robot_states(self) -> Callable[[Episode], np.ndarray] | None:
        """Function from an episode to its robot states, for a network with a proprioception model.

        Recorded states are preferred: with noisy estimates the network would learn to predict blurred
        averages.
        """
        proprio = getattr(self.network, "motion", None)
        if proprio is None:
            return None

        def states(episode: Episode) -> np.ndarray:
            first = self.autoencoder.encode(torch.from_numpy(episode.frames[None, :1]))[0, :, 0]
            if episode.proprio is None:
                return proprio.rollout_from_frame(first, episode.actions)
            return proprio.encode(first, episode.proprio)

        return states

    def modules(self) -> dict[str, nn.Module]:
        """See :class:`TrainingTask`."""
        discriminator = {} if self.discriminator is None else {"discriminator": self.discriminator}
        return {"network": self.network, **discriminator}

    def frozen_modules(self) -> list[nn.Module]:
        """See :class:`TrainingTask`."""
        teacher = getattr(self.objective, "teacher", None)
        return [m for m in (getattr(self.autoencoder, "vae", None), teacher) if m is not None]

    def optimizers(self) -> dict[str, tuple[Optimizer, LRScheduler]]:
        """See :class:`TrainingTask`."""
        cfg = self.config
        if self.discriminator is not None:
            self.discriminator_optimizer = torch.optim.Adam(
                self.discriminator.parameters(), lr=DISCRIMINATOR_LEARNING_RATE, betas=(0.5, 0.99)
            )
        optimizers = make_optimizers(
            self.network, learning_rate=cfg.learning_rate, weight_decay=cfg.weight_decay,
            muon=cfg.muon * cfg.learning_rate,
        )  # fmt: skip
        return {
            name: (optimizer, warmup_cosine(optimizer, cfg.steps, cfg.warmup_steps, cfg.final_lr_ratio))
            for name, optimizer in optimizers.items()
        }

    # -- a step --------------------------------------------------------------------------------------------
    def draw(self, step: int) -> tuple[LatentBatch, dict[str, Tensor]]:
        """See :class:`TrainingTask`; the batch and the objective's random numbers."""
        chunk = self.sampler.next()
        force = torch.from_numpy(chunk.is_first) | self._teacher_forced(step, len(chunk.is_first))
        batch = self._latents(self.runtime.local(_tensors(chunk)), self.runtime.local(force))
        n = len(chunk.is_first)
        targets, context = ((n, *x.shape[1:]) for x in (batch.targets, batch.context))
        draws = self.objective.draw(targets, context, self.generator)
        return batch, self.runtime.to_device(self.runtime.local(draws))

    def _teacher_forced(self, step: int, n: int) -> Tensor:
        """Bool ``(n,)``, True for rows that take the recorded context at this step."""
        share = 1.0 - step / max(1.0, self.config.teacher_forcing * self.config.steps)
        return torch.rand(n, generator=self.generator) < share

    def _latents(self, chunk: dict[str, Tensor], teacher_forced: Tensor) -> LatentBatch:
        """Encode a chunk's frames, and choose the recorded or the predicted context of each row."""
        chunk = self.runtime.to_device(chunk)
        recorded, targets = (self.autoencoder.encode(chunk[name]) for name in ("context", "targets"))
        if self.context is None:
            self.context = recorded
        wrong = ((self.context - recorded).abs().amax(dim=1) > DIVERGED_PIXEL).float().mean(dim=(1, 2, 3))
        use_recorded = self.runtime.to_device(teacher_forced) | (wrong > self.config.divergence_threshold)
        last = recorded[:, :, -1:]
        weights = loss_weights(targets, last, chunk["valid"], self.config.changed_weight)
        mean_weight = self.runtime.sum(weights.mean()) / self.runtime.size
        return LatentBatch(
            torch.where(use_recorded[:, None, None, None, None], recorded, self.context),
            targets,
            chunk["actions"],
            chunk["prev_action"],
            last,
            weights,
            mean_weight.expand(len(targets)),
        )

    def compute_loss(self, batch: tuple[LatentBatch, dict[str, Tensor]]) -> Loss:
        """See :class:`TrainingTask`."""
        rows, draws = batch
        losses, estimate, sample = self.objective(self.network, rows, draws)
        loss = losses.sum() / self.config.batch_size
        metrics = {"loss": float(loss.detach())}
        outputs = {"losses": losses.detach(), "context": rows.context, "sample": sample}
        if self.discriminator is not None:
            share = len(losses) / self.config.batch_size
            adversarial = self.discriminator.generator_loss(rows.last, estimate) * share
            loss = loss + self.config.adversarial * adversarial
            outputs |= {"last": rows.last, "targets": rows.targets, "estimate": estimate.detach()}
        return Loss(loss, metrics, outputs)

    def finish_step(self, outputs: dict[str, Tensor]) -> dict[str, float]:
        """See :class:`TrainingTask`: train the discriminator and keep the predictions as contexts."""
        self.sampler.update_priorities(self.runtime.gather(outputs["losses"]).cpu().numpy())
        metrics = {} if self.discriminator is None else self._train_discriminator(outputs)
        context, sample = outputs["context"], outputs["sample"]
        if self.autoencoder.lossless:  # quantise to 256 levels, as in imagination
            sample = self.autoencoder.encode(self.autoencoder.decode(sample))
        self.context = torch.cat([context, sample], dim=2)[:, :, -context.shape[2] :]
        return metrics

    def _train_discriminator(self, outputs: dict[str, Tensor]) -> dict[str, float]:
        assert self.discriminator is not None
        self.discriminator_optimizer.zero_grad(set_to_none=True)
        clips = tuple(outputs[name] for name in ("last", "targets", "estimate"))
        loss = 0.0
        for last, recorded, predicted in self.runtime.micro_batches(clips):
            with self.runtime.autocast():
                part = self.discriminator.loss(last, recorded, predicted)
            part = part * (len(last) / self.config.batch_size)
            part.backward()
            loss += float(part.detach())
        self.runtime.sum_gradients(self.discriminator.parameters())
        self.discriminator_optimizer.step()
        return self.runtime.sum({"discriminator_loss": loss})

    def validate(self, network: nn.Module, step: int) -> dict[str, float]:
        """See :class:`TrainingTask`."""
        return {} if self._validate is None else self._validate(network, step)

    # -- checkpoints ---------------------------------------------------------------------------------------
    def state(self) -> TrainingState:
        """See :class:`TrainingTask`."""
        state, sampler = super().state(), self.sampler.get_state()
        state.add("sampler", {k: torch.from_numpy(v) for k, v in sampler.items() if not isinstance(v, str)})
        state.values["sampler"] = {k: v for k, v in sampler.items() if isinstance(v, str)}
        assert self.context is not None  # set by the first step
        state.tensors |= {
            "context": self.runtime.gather(self.context),
            "generator": self.generator.get_state(),
        }
        if self.discriminator is not None:
            tensors, state.values["discriminator_optimizer"] = pack_optimizer(self.discriminator_optimizer)
            state.add("discriminator_optimizer", tensors)
        return state

    def load_state(self, state: TrainingState) -> None:
        """See :class:`TrainingTask`."""
        super().load_state(state)
        arrays = {name: tensor.numpy() for name, tensor in state.part("sampler").items()}
        self.sampler.set_state(arrays | state.values["sampler"])
        self.context = self.runtime.to_device(self.runtime.local(state.tensors["context"]))
        self.generator.set_state(state.tensors["generator"])
        if self.discriminator is not None:
            unpack_optimizer(
                self.discriminator_optimizer,
                state.part("discriminator_optimizer"),
                state.values["discriminator_optimizer"],
            )


class WorldModelTrainer(Trainer):
    """Trains a world model on episodes.

    Args:
        network: ``ConvWorldModel`` or ``STDiT``; trained in place, and holds the averaged weights at the end.
        autoencoder: Maps frames to the network's latents.
        task: The task.
        episodes: Recorded episodes of any kind; labels are not used.
        config: Settings.
        context_frames: H.
        denoising_steps: Steps the network will be sampled with; also used to sample self-forced contexts.
        objective: The loss; None is :class:`~wmpo_gym.world.objectives.ChunkObjective`.
        weights: Relative frequency of each episode.
        symmetries: Each is applied to a random half of the trajectories.
        validate: Called with (averaged network, step) at every checkpoint; returns metrics to log.
        component: Name of the trained component; checkpoints of other components are rejected.
        compute: Device, precision and micro-batches; None is float32 on the network's device.
        checkpoint_dir: Directory of the checkpoints; training resumes from a complete one.
        tensorboard: Directory for TensorBoard scalars, or None.

    Raises:
        ValueError: If there is no episode to train on, or see
            :class:`~wmpo_gym.training.trainer.Trainer`.
    """

    task: WorldModelTask

    def __init__(
        self,
        network: nn.Module,
        autoencoder: Any,
        task: Task,
        episodes: Sequence[Episode],
        config: WorldModelTraining,
        *,
        context_frames: int = 2,
        denoising_steps: int = 1,
        objective: Objective | None = None,
        weights: Sequence[float] | None = None,
        symmetries: Sequence[Symmetry] = (),
        validate: Callable[[nn.Module, int], dict[str, float]] | None = None,
        component: str = "world model",
        compute: ComputeSettings | None = None,
        checkpoint_dir: str | Path | None = None,
        tensorboard: str | Path | None = None,
    ) -> None:
        if objective is None:
            # If every chunk starts a new trajectory, no prediction is used as a context.
            objective = ChunkObjective(
                config.pure_noise, config.context_noise, denoising_steps, self_forcing=config.restart_prob < 1
            )
        world_model = WorldModelTask(
            network, autoencoder, task, episodes, config, context_frames=context_frames, objective=objective,
            weights=weights, symmetries=symmetries, validate=validate, component=component,
        )  # fmt: skip
        super().__init__(
            world_model, config, compute=compute, checkpoint_dir=checkpoint_dir, tensorboard=tensorboard
        )


def _tensors(chunk: ChunkBatch) -> dict[str, Tensor]:
    """A chunk's arrays as tensors."""
    names = ("context", "targets", "actions", "prev_action", "valid")
    return {name: torch.from_numpy(getattr(chunk, name)) for name in names}
