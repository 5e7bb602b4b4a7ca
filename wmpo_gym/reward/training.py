"""Training of the success classifier: balanced clips, held-out calibration, one result per seed."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import time
from collections.abc import Collection, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wmpo_gym.data.episode import Episode
from wmpo_gym.data.optimizer_state import pack_slots, unpack_slots
from wmpo_gym.reward.calibration import assess, calibrate, split_episodes
from wmpo_gym.reward.classifier import KINDS, SuccessClassifier
from wmpo_gym.reward.data import ClipTable, augment, check_window_fits
from wmpo_gym.tasks import Task, get_task
from wmpo_gym.utils.io import (
    load_safetensors,
    mend_dir,
    read_json,
    save_safetensors,
    write_dir_atomic,
    write_json_atomic,
)
from wmpo_gym.utils.progress import progress_bar

logger = logging.getLogger(__name__)

LOG_EVERY = 20  # steps between TensorBoard points


@dataclass(frozen=True)
class ClassifierTraining:
    """Settings of a training.

    Attributes:
        steps: Optimiser steps.
        learning_rate: Peak; linear warm-up over a tenth of the steps, then cosine to zero.
        weight_decay: AdamW's.
        grad_clip: Bound of the gradient norm.
        positives: Clips per step that end at the finish of a success.
        negatives: Any other clips per step.
        late_negatives: Clips per step from the end of an episode that are no success.
        other_instruction: Successes of another instruction per step, shown as negatives (0 without them).
        late_steps: How far from the end a clip counts as late.
        noise: Standard deviation of the noise put on the preprocessed pixels.
        holdout_fraction: Share of the episodes kept for calibration.
        min_holdout: Episodes kept at least, if that leaves half of them for training; a threshold from 30
            episodes is off.
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
        """Defaults of a kind; for VideoMAE the published optimiser, which fine-tunes."""
        if kind == "videomae":
            return cls(
                steps=2000, learning_rate=1e-4, weight_decay=1e-4, positives=4, negatives=2, late_negatives=2,
                other_instruction=1, noise=0.0,
            )  # fmt: skip
        return cls()


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
    device: str | torch.device = "cpu",
    checkpoint_dir: str | Path | None = None,
    tensorboard: str | Path | None = None,
    progress: bool = True,
) -> tuple[SuccessClassifier, dict[str, Any]]:
    """Train a classifier on recorded episodes and calibrate it on those it did not see.

    The global random generators are left alone, and one seed gives one result.

    Args:
        episodes: Recorded episodes; those without an outcome or shorter than a window are left out, counted.
        task: The task, for its instructions and symmetries. Where its instructions are exclusive, a success
            of one serves as a negative of the others; without such clips a classifier that never saw the
            wrong object delivered rewards it.
        kind: ``"conv"`` or ``"videomae"``.
        steps: Optimiser steps; None is the config's.
        seed: Seed of weights, hold-out, clips and noise.
        imagined: World-model replays of recorded actions, labelled by the recorded outcome and cut at its
            finish; see :meth:`ClipTable.from_episodes`. Those that begin in a held-out start state are not
            trained on, but calibrated and reported on.
        holdout: Start-state ids to calibrate on; None draws them. All episodes of one start state stay on one
            side.
        config: Settings; None is the kind's defaults.
        classifier: Train on from this one (a pre-trained VideoMAE) instead of a new one.
        device: Where to train.
        checkpoint_dir: Where to keep checkpoints; a complete one of the same settings is resumed from and
            gives the same result as an uninterrupted training.
        tensorboard: Directory for the loss as TensorBoard scalars, or None.
        progress: Show a progress bar.

    Returns:
        The calibrated classifier in evaluation mode, on the CPU, and figures: the calibration, loss, counts,
        held-out start states, seconds, and quality on held-out imagined episodes (None without them).

    Raises:
        ValueError: If there are fewer than two successes or two failures (one to train on, one to calibrate
            on), an unknown kind, or a window longer than the task's episodes.
    """
    task = get_task(task)
    config = config or ClassifierTraining.for_kind(kind)
    if steps is not None:
        config = dataclasses.replace(config, steps=steps)
    classifier = classifier or make_classifier(kind, task, seed=seed)
    if classifier.n_instructions != len(task.instructions):
        raise ValueError(
            f"The classifier knows {classifier.n_instructions} instructions and {task.name!r} has "
            f"{len(task.instructions)}; make one with make_classifier({kind!r}, task)."
        )
    data = _prepare(episodes, imagined, task, classifier.window, config, seed, holdout)
    trainer = _Trainer(classifier.to(device), data.table, task, config, seed, checkpoint_dir, tensorboard)
    trainer.run(progress)
    classifier.to("cpu").eval()
    replays = data.held_replays
    classifier.calibration = calibrate(classifier, data.held_out, replays)
    figures = {
        "calibration": classifier.calibration.to_dict(),
        "imagined": assess(classifier, replays).to_dict() if replays else None,
        "loss": trainer.loss,
        "n_train": len(data.training),
        "n_train_success": sum(bool(e.success) for e in data.training),
        "n_imagined": data.n_imagined,
        "holdout": sorted({e.start_state_id for e in data.held_out if e.start_state_id is not None}),
        "seconds": round(trainer.seconds, 1),
        "seed": seed,
        "config": asdict(config),
    }
    return classifier, figures


@dataclass(frozen=True)
class _Data:
    """What a training works on: clips of the training episodes, and what is kept from them."""

    table: ClipTable
    training: list[Episode]
    n_imagined: int
    held_out: list[Episode]
    held_replays: list[Episode]


def _prepare(
    episodes: Iterable[Episode],
    imagined: Iterable[Episode] | None,
    task: Task,
    window: int,
    config: ClassifierTraining,
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
        gradual_steps=task.gradual_steps,
        other_instructions=range(len(task.instructions)) if task.exclusive_instructions else (),
    )
    held_replays = [e for e in replays if e.start_state_id in held_ids]
    return _Data(table, training, len(trained_on), held_out, held_replays)


def make_classifier(kind: str, task: str | Task, *, seed: int = 0, **arguments: Any) -> SuccessClassifier:
    """A new classifier for a task, with weights drawn from ``seed``.

    Args:
        kind: ``"conv"`` or ``"videomae"``.
        task: Gives the number of instructions and, for ``"conv"``, the image size.
        seed: Seed of the weights; the global generator is left alone.
        arguments: Passed to the class.

    Raises:
        ValueError: If the kind is unknown.
    """
    import importlib

    task = get_task(task)
    if kind not in KINDS:
        raise ValueError(f"Unknown classifier kind {kind!r}; choose one of {', '.join(KINDS)}.")
    module, name = KINDS[kind]
    if kind == "conv":
        arguments.setdefault("image_size", task.image_size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return getattr(importlib.import_module(module), name)(
            n_instructions=len(task.instructions), **arguments
        )


def _usable(episodes: Iterable[Episode], window: int, what: str) -> list[Episode]:
    """Episodes with an outcome that fill a window; the others are counted in the log."""
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
            "with more noise if failures are. What was collected stays where it is and counts next time."
        )


class _Trainer:
    """The optimisation, resumable to the same numbers."""

    def __init__(
        self,
        classifier: SuccessClassifier,
        table: ClipTable,
        task: Task,
        config: ClassifierTraining,
        seed: int,
        checkpoint_dir: str | Path | None,
        tensorboard: str | Path | None,
    ) -> None:
        self.classifier, self.table, self.task, self.config, self.seed = classifier, table, task, config, seed
        self.checkpoint_dir = Path(checkpoint_dir) if checkpoint_dir else None
        self.tensorboard = Path(tensorboard) if tensorboard else None
        self.generator = torch.Generator().manual_seed(seed)
        self.optimizer = torch.optim.AdamW(
            classifier.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        self.counts = {
            "positive": config.positives,
            "negative": config.negatives,
            "late": config.late_negatives,
        }
        if len(table.pools["other"]):
            self.counts["other"] = config.other_instruction
        self.step, self.loss, self.seconds = 0, math.nan, 0.0

    def run(self, progress: bool) -> None:
        """Train to ``config.steps``, from the last checkpoint if there is one."""
        self._resume()
        started = time.perf_counter() - self.seconds
        self.classifier.train()
        total = self.config.steps
        cuda = [self.classifier.device] if self.classifier.device.type == "cuda" else []
        with (
            self._writer() as writer,
            torch.random.fork_rng(devices=cuda),
            progress_bar(
                total=total, initial=self.step, desc="success classifier", disable=not progress
            ) as bar,
        ):
            while self.step < total:
                torch.manual_seed(self.seed * 1_000_003 + self.step)  # for dropout, if the network has any
                loss = self._train_step()
                self.loss = loss if math.isnan(self.loss) else 0.98 * self.loss + 0.02 * loss
                self.seconds = time.perf_counter() - started
                bar.update(1)
                if writer is not None and self.step % LOG_EVERY == 0:
                    writer.add_scalar("classifier/loss", self.loss, self.step)
                if self.step % self.config.checkpoint_every == 0 or self.step == total:
                    bar.set_postfix(loss=f"{self.loss:.4f}")
                    self._checkpoint()

    def _writer(self) -> AbstractContextManager[Any]:
        if self.tensorboard is None:
            return nullcontext()
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(self.tensorboard), purge_step=self.step)

    def _train_step(self) -> float:
        config = self.config
        warmup = max(1.0, 0.1 * config.steps)
        factor = min((self.step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * self.step / config.steps)))
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate * factor
        clips, task_ids, labels = self._batch()
        loss = F.cross_entropy(self.classifier(clips, task_ids), labels)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.classifier.parameters(), config.grad_clip)
        if not torch.isfinite(norm):
            raise FloatingPointError(
                f"The gradient is not finite at step {self.step}; lower the learning rate, "
                f"{config.learning_rate}."
            )
        self.optimizer.step()
        self.step += 1
        return float(loss.detach())

    def _batch(self) -> tuple[Tensor, Tensor, Tensor]:
        """Noisy clips ``(B, window, 3, h, w)``, task ids and labels, on the classifier's device."""
        rows = self.table.draw(self.counts, self.generator)
        clips, task_ids = augment(
            self.table.clips(rows), self.table.task_id[rows].long(), self.task.symmetries, self.generator
        )
        device = self.classifier.device
        pixels = self.classifier.preprocess(clips.flatten(0, 1).to(device)).unflatten(0, clips.shape[:2])
        if self.config.noise > 0:
            pixels = pixels + self.config.noise * torch.randn(pixels.shape, generator=self.generator).to(
                device
            )
        # The next clips are drawn with a copy of the generator, to read them while the network computes.
        following = torch.Generator().set_state(self.generator.get_state())
        self.table.prefetch(self.table.draw(self.counts, following))
        return pixels, task_ids.to(device), self.table.label[rows].long().to(device)

    def _meta(self) -> dict[str, Any]:
        clips = {name: len(rows) for name, rows in self.table.pools.items()}
        settings = {"config": asdict(self.config), "seed": self.seed, "clips": clips}
        return json.loads(json.dumps({**settings, "arguments": self.classifier.arguments()}))

    def _checkpoint(self) -> None:
        if self.checkpoint_dir is None:
            return
        tensors = {f"model.{k}": v for k, v in self.classifier.state_dict().items()}
        tensors |= pack_slots(self.optimizer, "optimizer.")
        tensors["generator"] = self.generator.get_state()
        with write_dir_atomic(self.checkpoint_dir) as tmp:
            save_safetensors(tmp / "state.safetensors", tensors)
            progress = {"step": self.step, "loss": self.loss, "seconds": self.seconds}
            write_json_atomic(tmp / "state.json", {**progress, "settings": self._meta()})

    def _resume(self) -> None:
        if self.checkpoint_dir is None or not (mend_dir(self.checkpoint_dir) / "state.json").exists():
            return
        meta = read_json(self.checkpoint_dir / "state.json")
        if meta.get("settings") != self._meta():
            raise ValueError(
                f"{self.checkpoint_dir} holds a training with other settings or episodes; finish it with the "
                "same ones or choose another directory."
            )
        tensors = load_safetensors(self.checkpoint_dir / "state.safetensors")
        self.classifier.load_state_dict(
            {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
        )
        unpack_slots(self.optimizer, tensors, "optimizer.")
        self.generator.set_state(tensors["generator"])
        self.step, self.loss, self.seconds = meta["step"], meta["loss"], meta["seconds"]
        logger.info("Resumed the classifier's training at step %d.", self.step)
