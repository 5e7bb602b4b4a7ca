"""Training of the world model: self-forced streams, EMA, resumable to the same numbers."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from wmpo_gym.data.episode import Episode
from wmpo_gym.tasks import Task
from wmpo_gym.utils.io import (
    load_safetensors,
    mend_dir,
    read_json,
    save_safetensors,
    write_dir_atomic,
    write_json_atomic,
)
from wmpo_gym.utils.progress import progress_bar
from wmpo_gym.world.objectives import ChunkObjective, PatchCritic
from wmpo_gym.world.optimizers import JointOptimizer
from wmpo_gym.world.sampler import ChunkBatch, SelfForcingSampler

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class WorldModelTraining:
    """Settings of one training stage.

    Attributes:
        steps: Optimiser steps.
        batch_size: Rows per step.
        learning_rate: Peak; linear warm-up over ``warmup`` steps, then cosine to ``final_lr`` of it.
        warmup: Steps of warm-up.
        final_lr: Share of the learning rate left at the end.
        muon: Step size of Muon in units of ``learning_rate``. It trains the inner weights of a network that
            names them (``ConvWorldModel``); 0 for AdamW throughout, as published.
        weight_decay: Of AdamW and Muon.
        grad_clip: Bound of the gradient norm.
        ema_decay: Decay of the averaged weights that are kept (paper: 0.9999, release 0.99).
        pure_noise: Share of rows trained at noise level 1, which is where one-step sampling happens.
        context_noise: Largest noise level put on the context; the network is told the level.
        changed_weight: Extra loss weight of pixels that changed since the last context frame.
        adversarial: Weight of the patch critic's loss (0 switches it off).
        recorded: Share of the training during which recorded contexts give way to self-made ones: at its
            start all contexts are recorded, at its end only those of new walks. Before the model can predict
            at all, its own frames teach nothing.
        diverged: Share of wrong pixels (off by more than 0.5 in [-1, 1]) in a self-made context from which on
            the recorded one takes its place. A walk that went another way than its recording, say by a grip
            that failed there, would teach that things jump.
        restart: Probability per chunk that a row leaves its walk for a new one.
        seed: Seed of everything random.
        checkpoint_every: Steps between checkpoints.
    """

    steps: int = 4000
    batch_size: int = 32
    learning_rate: float = 1e-3
    warmup: int = 50
    final_lr: float = 0.02
    muon: float = 4.0
    weight_decay: float = 1e-4
    grad_clip: float = 1.0
    ema_decay: float = 0.998
    pure_noise: float = 0.9
    context_noise: float = 0.05
    changed_weight: float = 6.0
    adversarial: float = 0.0
    recorded: float = 0.3
    diverged: float = 0.01
    restart: float = 0.1
    seed: int = 0
    checkpoint_every: int = 250


class WorldModelTrainer:
    """Trains a network on episodes.

    Args:
        network: ``ConvWorldModel`` or ``STDiT``; trained in place, and holds the averaged weights at the end.
        autoencoder: Maps frames to the network's latents.
        task: The task.
        episodes: Recorded episodes of any kind; labels are not used.
        config: Settings.
        context_frames: H.
        denoising_steps: Steps the network will be sampled with; self-forced contexts are made with as many.
        objective: What is learned from a batch; None is :class:`~wmpo_gym.world.objectives.ChunkObjective`.
        weights: Relative frequency of each episode.
        checkpoint_dir: Where to keep checkpoints; a complete one found there is resumed from.
        tensorboard: Directory for TensorBoard scalars, or None.
        validate: Called with (averaged network, step) at every checkpoint; returns figures to log.
    """

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
        objective: Callable[..., tuple[Tensor, Tensor]] | None = None,
        weights: Sequence[float] | None = None,
        checkpoint_dir: str | Path | None = None,
        tensorboard: str | Path | None = None,
        validate: Callable[[nn.Module, int], dict[str, float]] | None = None,
    ) -> None:
        self.network, self.autoencoder, self.config, self.validate = network, autoencoder, config, validate
        self.sampler = SelfForcingSampler(
            episodes, task, n_rows=config.batch_size, context_frames=context_frames, seed=config.seed,
            weights=weights, restart=config.restart, recall=self._recall(),
        )  # fmt: skip
        self.objective = objective or ChunkObjective(
            pure_noise=config.pure_noise,
            context_noise=config.context_noise,
            changed_weight=config.changed_weight,
            denoising_steps=denoising_steps,
        )
        self.generator = torch.Generator().manual_seed(config.seed)
        self.optimizer = JointOptimizer(
            network, learning_rate=config.learning_rate, weight_decay=config.weight_decay,
            inner=getattr(network, "inner_weights", list)(),
            muon=config.muon * config.learning_rate,
        )  # fmt: skip
        self.ema = {k: p.detach().clone() for k, p in network.named_parameters()}
        self.critic = None
        if config.adversarial > 0:
            self.critic = PatchCritic(autoencoder.latent_channels, task.chunk, seed=config.seed)
        self.context: Tensor | None = None
        self.step, self.seconds = 0, 0.0
        self.history: list[dict[str, float]] = []
        self.checkpoint_dir = Path(checkpoint_dir) if checkpoint_dir else None
        self.tensorboard = Path(tensorboard) if tensorboard else None

    def _recall(self) -> Callable[[Episode], np.ndarray] | None:
        """Where the robot is in an episode, for a network that follows it.

        As recorded, if it was: by a state that is wrong now and then, the network would learn to draw
        something in between.
        """
        motion = getattr(self.network, "motion", None)
        if motion is None:
            return None

        def recall(episode: Episode) -> np.ndarray:
            first = self.autoencoder.encode(torch.from_numpy(episode.frames[None, :1]))[0, :, 0]
            if episode.proprio is None:
                return motion.recall(first, episode.actions)
            return motion.remember(first, episode.proprio)

        return recall

    def train(self, *, progress: bool = True, description: str = "world model") -> list[dict[str, float]]:
        """Train to ``config.steps`` (from the last checkpoint, if there is one).

        Returns:
            Logged figures, one dict per checkpoint: step, loss, seconds, and what ``validate`` returned.
        """
        self._resume()
        writer = self._writer()
        running, started = [], time.perf_counter() - self.seconds
        self.network.train()
        with progress_bar(
            total=self.config.steps, initial=self.step, desc=description, disable=not progress
        ) as bar:
            while self.step < self.config.steps:
                running.append(self._train_step())
                bar.update(1)
                if self.step % self.config.checkpoint_every == 0 or self.step == self.config.steps:
                    self.seconds = time.perf_counter() - started
                    figures = {k: float(np.mean([r[k] for r in running])) for k in running[0]}
                    self._log(figures, writer)
                    bar.set_postfix(loss=f"{figures['loss']:.4f}")
                    running.clear()
                    self._checkpoint()
        if writer is not None:
            writer.close()
        with torch.no_grad():
            for name, parameter in self.network.named_parameters():
                parameter.copy_(self.ema[name])
        self.network.eval()
        return self.history

    def _train_step(self) -> dict[str, float]:
        cfg = self.config
        batch = self._batch()
        losses, prediction = self.objective(self.network, batch, self.generator)
        self.sampler.update_priorities(losses.detach().numpy())
        loss = losses.mean()
        figures = {"loss": float(loss.detach())}
        if self.critic is not None:
            loss = loss + cfg.adversarial * self.critic.generator_loss(batch, prediction)
        self.network.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), cfg.grad_clip)
        if not torch.isfinite(norm):
            raise FloatingPointError(
                f"The gradient is not finite at step {self.step}; the last checkpoint is intact. Lower "
                f"learning_rate (now {cfg.learning_rate})."
            )
        cosine = cfg.final_lr + (1 - cfg.final_lr) * 0.5 * (1 + math.cos(math.pi * self.step / cfg.steps))
        self.optimizer.step(cosine * warmup_share(self.step, cfg.warmup))
        if self.critic is not None:
            figures["critic_loss"] = self.critic.train_step(batch, prediction.detach())
        decay = min(cfg.ema_decay, (self.step + 1) / (self.step + 10))
        update_average(self.ema, self.network, decay)
        # The next context is on the pixel grid that imagination works on.
        ahead = prediction.detach()
        if self.autoencoder.lossless:
            ahead = self.autoencoder.encode(self.autoencoder.decode(ahead))
        self.context = torch.cat([batch.context, ahead], dim=2)[:, :, -batch.context.shape[2] :]
        self.step += 1
        return {**figures, "grad_norm": float(norm)}

    def _batch(self) -> LatentBatch:
        chunk = self.sampler.next()
        recorded, targets = (
            self.autoencoder.encode(torch.from_numpy(frames)) for frames in (chunk.context, chunk.targets)
        )
        if self.context is None:
            self.context = recorded
        share = 1.0 - self.step / max(1.0, self.config.recorded * self.config.steps)
        wrong = ((self.context - recorded).abs().amax(dim=1) > 0.5).float().mean(dim=(1, 2, 3))
        use_recorded = (
            torch.from_numpy(chunk.is_first)
            | (torch.rand(len(recorded), generator=self.generator) < share)
            | (wrong > self.config.diverged)
        )
        context = torch.where(use_recorded[:, None, None, None, None], recorded, self.context)
        return LatentBatch.of(chunk, context, targets, recorded)

    # -- logs and checkpoints --------------------------------------------------------------------------------
    def averaged_network(self) -> nn.Module:
        """A copy of the network with the averaged weights, in evaluation mode."""
        import copy

        twin = copy.deepcopy(self.network).eval()
        twin.load_state_dict({**twin.state_dict(), **self.ema})
        return twin

    def _writer(self) -> Any:
        if self.tensorboard is None:
            return None
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(self.tensorboard), purge_step=self.step)

    def _log(self, figures: dict[str, float], writer: Any) -> None:
        if self.validate is not None:
            figures.update(self.validate(self.averaged_network(), self.step))
        self.history.append({"step": self.step, "seconds": round(self.seconds, 1), **figures})
        logger.info("world model step %d: %s", self.step, {k: round(v, 4) for k, v in figures.items()})
        if writer is not None:
            for name, value in figures.items():
                writer.add_scalar(f"world_model/{name}", value, self.step)

    def _checkpoint(self) -> None:
        if self.checkpoint_dir is None:
            return
        stream = self.sampler.get_state()
        tensors = {f"network.{k}": v for k, v in self.network.state_dict().items()}
        tensors |= {f"ema.{k}": v for k, v in self.ema.items()}
        tensors |= self.optimizer.pack()
        if self.critic is not None:
            tensors |= self.critic.checkpoint()
        tensors |= {
            f"stream.{k}": torch.from_numpy(v) for k, v in stream.items() if isinstance(v, np.ndarray)
        }
        tensors |= {"context": self.context, "generator": self.generator.get_state()}
        with write_dir_atomic(self.checkpoint_dir) as tmp:
            save_safetensors(tmp / "state.safetensors", tensors)
            write_json_atomic(
                tmp / "state.json",
                {
                    "step": self.step, "seconds": self.seconds, "history": self.history, "rng": stream["rng"],
                    "config": asdict(self.config),
                },
            )  # fmt: skip

    def _resume(self) -> None:
        if self.checkpoint_dir is None or not (mend_dir(self.checkpoint_dir) / "state.json").exists():
            return
        meta, tensors = (
            read_json(self.checkpoint_dir / "state.json"),
            load_safetensors(self.checkpoint_dir / "state.safetensors"),
        )
        if meta["config"] != json.loads(json.dumps(asdict(self.config))):
            raise ValueError(
                f"{self.checkpoint_dir} holds a training with other settings; finish it with the same "
                "settings or choose another directory."
            )

        def part(prefix: str) -> dict[str, Tensor]:
            return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}

        self.network.load_state_dict(part("network."))
        averages = part("ema.")
        self.ema = {name: averages[name] for name in self.ema}  # files keep no order
        self.optimizer.unpack(tensors)
        if self.critic is not None:
            self.critic.restore(tensors)
        self.sampler.set_state({k: v.numpy() for k, v in part("stream.").items()} | {"rng": meta["rng"]})
        self.context, self.step, self.seconds = tensors["context"], meta["step"], meta["seconds"]
        self.history = meta["history"]
        self.generator.set_state(tensors["generator"])
        logger.info("resumed the world model's training at step %d", self.step)


def warmup_share(step: int, warmup: int) -> float:
    """Share of the learning rate at an optimiser step (from 0) of a linear warm-up, as published."""
    return min(1.0, (step + 1) / (warmup + 1))


def update_average(average: dict[str, Tensor], network: nn.Module, decay: float) -> None:
    """Move averaged weights towards the network's, in place; frozen parameters are left out, as published."""
    trained = [(average[name], p) for name, p in network.named_parameters() if p.requires_grad]
    with torch.no_grad():
        torch._foreach_lerp_([a for a, _ in trained], [p for _, p in trained], 1 - decay)


@dataclass
class LatentBatch:
    """A :class:`ChunkBatch` in the network's space: context, targets ``(B, C, T, h, w)``, all as tensors."""

    context: Tensor
    targets: Tensor
    actions: Tensor
    prev_action: Tensor
    valid: Tensor
    last: Tensor

    @classmethod
    def of(cls, chunk: ChunkBatch, context: Tensor, targets: Tensor, recorded: Tensor) -> LatentBatch:
        """Join encoded frames with the chunk's other arrays; ``last`` is the recorded frame before it."""
        return cls(
            context, targets, torch.from_numpy(chunk.actions), torch.from_numpy(chunk.prev_action),
            torch.from_numpy(chunk.valid), recorded[:, :, -1:],
        )  # fmt: skip
