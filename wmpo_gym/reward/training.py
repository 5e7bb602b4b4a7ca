"""Training of the success classifier on balanced clips, and its calibration on held-out episodes."""

from __future__ import annotations

import dataclasses
import importlib
import logging
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from wmpo_gym.data.augment import Symmetry
from wmpo_gym.data.episode import Episode
from wmpo_gym.reward.calibration import assess, calibrate, split_episodes
from wmpo_gym.reward.classifier import KINDS, SuccessClassifier, is_saved_classifier
from wmpo_gym.reward.data import ClipTable, augment, check_window_fits
from wmpo_gym.tasks import Task, get_task
from wmpo_gym.training.checkpoint import TrainingState
from wmpo_gym.training.presets import NO_HINTS, TrainingHints
from wmpo_gym.training.runtime import ComputeSettings
from wmpo_gym.training.trainer import Loss, Trainer, TrainingSettings, TrainingTask, warmup_until_cosine
from wmpo_gym.utils.device import Precision

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ClassifierTraining:
    """Training settings of the success classifier.

    Attributes:
        steps: Optimiser steps.
        learning_rate: Peak learning rate; linear warm-up over a tenth of the steps, then cosine decay to
            zero.
        weight_decay: Decoupled weight decay (AdamW).
        grad_clip: Gradients are clipped to this norm.
        positives: Clips per step that end at a success.
        negatives: Clips per step that end anywhere else.
        late_negatives: Clips per step near the end of an episode that are not a success.
        other_instruction: Clips per step that show a success of another instruction, as negatives; only for
            tasks with exclusive instructions.
        late_steps: Maximum distance of a late clip from the end of its episode, in frames.
        noise: Standard deviation of the noise added to the preprocessed pixels.
        holdout_fraction: Share of the episodes held out for calibration.
        min_holdout: Minimum number of held-out episodes, limited to half of all episodes; with fewer the
            threshold has high variance.
        checkpoint_every: Steps between checkpoints.
    """

    steps: int = 700
    learning_rate: float = 1.5e-3
    weight_decay: float = 1e-2
    grad_clip: float = 1.0
    positives: int = 24
    negatives: int = 16
    late_negatives: int = 24
    other_instruction: int = 8
    late_steps: int = 6
    noise: float = 0.05
    holdout_fraction: float = 0.25
    min_holdout: int = 60
    checkpoint_every: int = 200

    @classmethod
    def for_kind(cls, kind: str) -> ClassifierTraining:
        """Defaults of a kind of classifier; those of VideoMAE are the published ones for fine-tuning."""
        if kind != "videomae":
            return cls()
        return cls(
            steps=2000,
            learning_rate=1e-4,
            weight_decay=1e-4,
            positives=4,
            negatives=2,
            late_negatives=2,
            other_instruction=1,
            noise=0.0,
        )

    def clip_counts(self, table: ClipTable) -> dict[str, int]:
        """Clips per step from each pool of a table; see :meth:`ClipTable.draw`."""
        counts = {"positive": self.positives, "negative": self.negatives, "late": self.late_negatives}
        if len(table.pools["other"]):
            counts["other"] = self.other_instruction
        return counts


def train_classifier(
    episodes: Iterable[Episode],
    task: str | Task,
    *,
    kind: str = "conv",
    steps: int | None = None,
    seed: int = 0,
    imagined: Iterable[Episode] | None = None,
    holdout: Collection[int] | None = None,
    config: ClassifierTraining | None = None,
    classifier: SuccessClassifier | None = None,
    hints: TrainingHints = NO_HINTS,
    device: str | torch.device = "cpu",
    precision: Precision = "fp32",
    micro_batch: int | None = None,
    checkpoint_dir: str | Path | None = None,
    tensorboard: str | Path | None = None,
    progress: bool = True,
) -> tuple[SuccessClassifier, dict[str, Any]]:
    """Train a classifier on recorded episodes and calibrate it on held-out ones.

    The same seed gives the same result; the global random generators are not changed.

    Args:
        episodes: Recorded episodes; those without an outcome or shorter than a window are excluded and
            counted in the log.
        task: The task, for its instructions. Where its instructions are exclusive, a success of one
            is a negative of the others: without such
            negatives, the classifier also rewards delivering the wrong object.
        kind: ``"conv"`` or ``"videomae"``.
        steps: Optimiser steps; None is the config's.
        seed: Seed of weights, hold-out, clips and noise.
        imagined: World-model replays of recorded actions, labelled by the recorded outcome and cut at its
            finish; see :meth:`ClipTable.from_episodes`. Those from a held-out start state are only
            used for calibration and evaluation.
        holdout: Start-state ids for calibration; None draws them. All episodes of a start state are in the
            same split.
        config: Settings; None is the kind's defaults.
        classifier: The classifier to train, in place, for instance a pre-trained VideoMAE; None creates a
            new one.
        hints: Symmetries for data augmentation, and steps before a success to exclude.
        device: Device of training and calibration, see :func:`~wmpo_gym.utils.device.resolve_device`.
        precision: ``"fp32"``, or ``"bf16"`` for bfloat16 autocast with float32 weights.
        micro_batch: Clips per forward and backward pass, to limit memory; None for the whole batch.
        checkpoint_dir: Directory of the checkpoints; training resumes from a complete one of the same
            settings, with the same result as without interruption.
        tensorboard: Directory for the loss as TensorBoard scalars, or None.
        progress: Show a progress bar.

    Returns:
        The calibrated classifier in evaluation mode, on the CPU, and metrics: the calibration, the mean loss
        of the steps since the second-last checkpoint, counts, held-out start states, seconds, and quality on
        held-out imagined episodes (None without them).

    Raises:
        ValueError: If there are fewer than two successes or two failures (one to train on, one to calibrate
            on), an unknown kind, a window longer than the task's episodes, an unavailable device or
            precision, or a checkpoint of another training.
    """
    task = get_task(task)
    config = config or ClassifierTraining.for_kind(kind)
    if steps is not None:
        config = dataclasses.replace(config, steps=steps)
    compute = ComputeSettings(str(device), precision, micro_batch).checked()
    classifier = classifier or make_classifier(kind, task, seed=seed)
    if classifier.n_instructions != len(task.instructions):
        raise ValueError(
            f"The classifier knows {classifier.n_instructions} instructions and {task.name!r} has "
            f"{len(task.instructions)}; make one with make_classifier({kind!r}, task)."
        )
    data = _prepare(episodes, imagined, task, classifier.window, config, hints, seed, holdout)
    clip_classification = ClipClassification(
        classifier.to(compute.device), data.table, hints.symmetries, config, seed
    )
    trainer = Trainer(
        clip_classification,
        clip_classification.training_settings(),
        compute=compute,
        checkpoint_dir=checkpoint_dir,
        tensorboard=tensorboard,
    )
    history = trainer.train(progress=progress)
    replays = data.held_out_replays
    classifier.calibration = calibrate(classifier, data.held_out, replays)
    metrics = {
        "calibration": classifier.calibration.to_dict(),
        "imagined": assess(classifier, replays).to_dict() if replays else None,
        "loss": history[-1]["loss"] if history else math.nan,
        "n_train": len(data.training),
        "n_train_success": sum(bool(e.success) for e in data.training),
        "n_imagined": data.n_imagined,
        "holdout": sorted({e.start_state_id for e in data.held_out if e.start_state_id is not None}),
        "seconds": round(trainer.seconds, 1),
        "seed": seed,
        "config": asdict(config),
    }
    return classifier.to("cpu").eval(), metrics


class ClipClassification(TrainingTask):
    """Training task: cross-entropy on balanced batches of labelled clips.

    Args:
        classifier: The network.
        table: The clips of the training episodes.
        symmetries: Symmetries of the task; each is applied to a random half of a batch.
        config: Settings.
        seed: Seed of clips and noise.
    """

    component = "success classifier"

    def __init__(
        self,
        classifier: SuccessClassifier,
        table: ClipTable,
        symmetries: Sequence[Symmetry],
        config: ClassifierTraining,
        seed: int,
    ) -> None:
        self.network: SuccessClassifier = classifier
        self.table, self.symmetries, self.config, self.seed = table, symmetries, config, seed
        self.counts = config.clip_counts(table)
        self.batch_size = sum(self.counts.values())
        self.generator = torch.Generator().manual_seed(seed)

    def training_settings(self) -> TrainingSettings:
        """Settings for the trainer."""
        return TrainingSettings(
            steps=self.config.steps,
            batch_size=self.batch_size,
            learning_rate=self.config.learning_rate,
            weight_decay=self.config.weight_decay,
            max_grad_norm=self.config.grad_clip,
            seed=self.seed,
            checkpoint_every=self.config.checkpoint_every,
        )

    def optimizers(self) -> dict[str, tuple[Optimizer, LRScheduler]]:
        """AdamW with linear warm-up over a tenth of the steps and cosine decay to zero."""
        config = self.config
        optimizer = AdamW(
            self.network.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        return {"network": (optimizer, warmup_until_cosine(optimizer, config.steps, 0.1))}

    def draw(self, step: int) -> dict[str, Tensor]:
        """Preprocessed, noisy ``clips`` float32 ``(B, window, 3, h, w)`` with ``task_ids`` and ``labels``."""
        rows = self.table.draw(self.counts, self.generator)
        clips, task_ids = augment(
            self.table.clips(rows), self.table.task_id[rows].long(), self.symmetries, self.generator
        )
        batch = {"clips": clips, "task_ids": task_ids, "labels": self.table.label[rows].long()}
        batch = self.runtime.to_device(self.runtime.local(batch))
        frames = batch["clips"]
        pixels = self.network.preprocess(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])
        if self.config.noise > 0:
            noise = torch.randn((len(rows), *pixels.shape[1:]), generator=self.generator)
            pixels = pixels + self.config.noise * self.runtime.to_device(self.runtime.local(noise))
        # Draw the next clips with a copy of the generator, to prefetch them while the network computes.
        following = torch.Generator().set_state(self.generator.get_state())
        self.table.prefetch(self.table.draw(self.counts, following))
        return batch | {"clips": pixels}

    def compute_loss(self, batch: Mapping[str, Tensor]) -> Loss:
        """Cross-entropy of the clips, as their contribution to the mean over the whole batch."""
        logits = self.network(batch["clips"], batch["task_ids"])
        loss = F.cross_entropy(logits, batch["labels"]) * (len(logits) / self.batch_size)
        return Loss(loss, {"loss": float(loss.detach())})

    def settings(self) -> dict[str, Any]:
        """The network, the clips and how they are drawn."""
        return {
            "noise": self.config.noise,
            "late_steps": self.config.late_steps,
            "clips_per_step": self.counts,
            "clips": {name: len(rows) for name, rows in self.table.pools.items()},
            "arguments": self.network.arguments(),
        }

    def state(self) -> TrainingState:
        """Weights and the generator of clips and noise."""
        state = super().state()
        state.add("random", {"generator": self.generator.get_state()})
        return state

    def load_state(self, state: TrainingState) -> None:
        """Restore :meth:`state`."""
        super().load_state(state)
        self.generator.set_state(state.part("random")["generator"])


@dataclass(frozen=True)
class _Data:
    """Data split of a training.

    Attributes:
        table: Training clips, recorded and imagined.
        training: Recorded training episodes.
        n_imagined: Number of imagined training episodes.
        held_out: Recorded episodes for calibration.
        held_out_replays: Imagined episodes from the start states of ``held_out``.
    """

    table: ClipTable
    training: list[Episode]
    n_imagined: int
    held_out: list[Episode]
    held_out_replays: list[Episode]


def _prepare(
    episodes: Iterable[Episode],
    imagined: Iterable[Episode] | None,
    task: Task,
    window: int,
    config: ClassifierTraining,
    hints: TrainingHints,
    seed: int,
    holdout: Collection[int] | None,
) -> _Data:
    """Check, split and label the episodes."""
    check_window_fits(task.horizon + 1, window)
    usable = _usable(episodes, window, "recorded")
    _check_outcomes(usable)
    training, held_out = split_episodes(
        usable, seed=seed, fraction=config.holdout_fraction, minimum=config.min_holdout, holdout=holdout
    )
    held_ids = {e.start_state_id for e in held_out if e.start_state_id is not None}
    replays = _usable(imagined or (), window, "imagined")
    trained_on = [e for e in replays if e.start_state_id not in held_ids]
    table = ClipTable.from_episodes(
        training,
        window,
        imagined=trained_on,
        late_steps=config.late_steps,
        gradual_steps=hints.gradual_steps,
        other_instructions=range(len(task.instructions)) if task.exclusive_instructions else (),
    )
    held_out_replays = [e for e in replays if e.start_state_id in held_ids]
    return _Data(table, training, len(trained_on), held_out, held_out_replays)


def make_classifier(
    kind: str, task: str | Task, *, seed: int = 0, pretrained: str | Path | None = None, **arguments: Any
) -> SuccessClassifier:
    """Create a classifier for a task, with new or pre-trained weights.

    Args:
        kind: ``"conv"`` or ``"videomae"``.
        task: Defines the number of instructions and, for ``"conv"``, the image size.
        seed: Seed of the new weights; the global generator is not changed.
        pretrained: Source of the weights: the directory of a saved classifier of this kind, or for
            ``"videomae"`` a VideoMAE of transformers (directory or hub id, ``"MCG-NJU/videomae-base"`` as
            published), which gets a new head. None draws all weights.
        arguments: Passed to the class, or for a VideoMAE of transformers to its ``from_transformers``.

    Raises:
        ValueError: If the kind is unknown, or the pre-trained classifier is of another kind or for another
            number of instructions.
        ArtifactError: If the files of a saved classifier are damaged.
        OSError: If there is no such pre-trained model.
    """
    task = get_task(task)
    if kind not in KINDS:
        raise ValueError(f"Unknown classifier kind {kind!r}; choose one of {', '.join(KINDS)}.")
    module, name = KINDS[kind]
    network = getattr(importlib.import_module(module), name)
    if pretrained is not None and is_saved_classifier(pretrained):
        return _saved_classifier(Path(pretrained), kind, task)
    if pretrained is not None and kind != "videomae":
        raise ValueError(
            f"{pretrained} is not the directory of a saved {kind!r} classifier; give one (of a world it is "
            "the folder `reward`), or train from new weights."
        )
    arguments["n_instructions"] = len(task.instructions)
    if kind == "conv":
        arguments.setdefault("image_size", task.image_size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if pretrained is not None:
            return network.from_transformers(pretrained, **arguments)
        return network(**arguments)


def _saved_classifier(directory: Path, kind: str, task: Task) -> SuccessClassifier:
    """Load a classifier for further training and reset its threshold; see :func:`make_classifier`."""
    classifier = SuccessClassifier.from_pretrained(directory)
    n = len(task.instructions)
    if (classifier.kind, classifier.n_instructions) != (kind, n):
        raise ValueError(
            f"{directory} holds a {classifier.kind!r} classifier for {classifier.n_instructions} "
            f"instructions; this training is of a {kind!r} classifier for the {n} of {task.name!r}. Give "
            "another one, or train from new weights."
        )
    classifier.reset_threshold()
    return classifier


def _usable(episodes: Iterable[Episode], window: int, what: str) -> list[Episode]:
    """Episodes with an outcome of at least one window; logs the number of others."""
    found = list(episodes)
    labelled = [e for e in found if e.success is not None]
    usable = [e for e in labelled if len(e.frames) >= window]
    if len(found) > len(labelled):
        logger.info("%d %s episodes without an outcome are left out.", len(found) - len(labelled), what)
    if len(labelled) > len(usable):
        logger.warning(
            "%d %s episodes have fewer than the %d frames of a window and are left out.",
            len(labelled) - len(usable), what, window,
        )  # fmt: skip
    return usable


def _check_outcomes(episodes: Sequence[Episode]) -> None:
    good = sum(bool(e.success) for e in episodes)
    if min(good, len(episodes) - good) < 2:
        raise ValueError(
            f"The data holds {good} successes and {len(episodes) - good} failures; a classifier needs "
            "at least two of each (one to learn from, one to calibrate on), and a few dozen to be good. "
            "Collect more episodes, with a policy that succeeds now and then if successes are missing, or "
            "with more noise if failures are. Episodes already collected are kept and used next time."
        )
