"""Supervised fine-tuning (behaviour cloning) on the action tokens of recorded episodes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR

from wmpo_gym.data.augment import Symmetry
from wmpo_gym.data.episode import Episode
from wmpo_gym.data.frames import prefetched
from wmpo_gym.policies.base import changing_weights, load_changing_weights
from wmpo_gym.policies.vla import VLAConfig
from wmpo_gym.policies.vla_policy import VLAPolicy, make_spaces
from wmpo_gym.policies.windows import WindowDataset, Windows, draws
from wmpo_gym.tasks import Task, get_task
from wmpo_gym.training.checkpoint import TrainingState
from wmpo_gym.training.presets import TrainingHints, hints_for
from wmpo_gym.training.runtime import ComputeSettings
from wmpo_gym.training.trainer import Loss, Trainer, TrainingSettings, TrainingTask
from wmpo_gym.utils.device import Precision

Progress = Callable[[int, int, dict[str, float]], None]
CHECKPOINT_EVERY = 100  # steps


@dataclass(frozen=True)
class SFTSettings:
    """Settings of supervised fine-tuning.

    Attributes:
        steps: Optimizer steps.
        batch: Windows per step.
        lr: Peak learning rate of the one-cycle schedule.
        weight_decay: Decoupled weight decay (AdamW).
        warmup: Fraction of the steps with learning-rate warm-up.
        max_grad_norm: Gradients are clipped to this norm.
        shift: Augmentation: maximum random image shift in pixels, in each direction.
        symmetries: Names of the task's symmetries (:mod:`wmpo_gym.training.presets`) to augment with. Leave
            out any that would remove a bias of the demonstrator that the policy should imitate.
    """

    steps: int = 500
    batch: int = 64
    lr: float = 2e-3
    weight_decay: float = 0.01
    warmup: float = 0.15
    max_grad_norm: float = 1.0
    shift: int = 2
    symmetries: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self)


def token_loss(policy: VLAPolicy, batch: Windows) -> tuple[torch.Tensor, float]:
    """Mean cross-entropy (nats) of the recorded action tokens, and the token accuracy."""
    targets = policy.encode(batch.actions)
    valid = batch.mask.repeat_interleave(policy.config.action_dim, dim=1)
    logits = policy.logits({"pixels": batch.pixels, "task_id": batch.task_id})[valid]
    targets = targets[valid].to(logits.device)
    return F.cross_entropy(logits, targets), (logits.argmax(-1) == targets).float().mean().item()


class FineTuning(TrainingTask):
    """Training task: cross-entropy of the action tokens of recorded decisions.

    Args:
        policy: The policy; frozen weights are not changed.
        windows: The training examples.
        symmetries: Each is applied to a random half of a batch.
        settings: How to fine-tune.
        seed: Seed of example order and augmentation.
    """

    component = "fine-tuning"

    def __init__(
        self,
        policy: VLAPolicy,
        windows: WindowDataset,
        symmetries: Sequence[Symmetry],
        settings: SFTSettings,
        seed: int,
    ) -> None:
        self.policy, self.network = policy, policy.network
        self.windows, self.symmetries, self.sft, self.seed = windows, symmetries, settings, seed
        self._batches: Iterator[Windows] | None = None

    def training_settings(self) -> TrainingSettings:
        """Settings for the trainer."""
        return TrainingSettings(
            steps=self.sft.steps,
            batch_size=self.sft.batch,
            learning_rate=self.sft.lr,
            weight_decay=self.sft.weight_decay,
            max_grad_norm=self.sft.max_grad_norm,
            seed=self.seed,
            checkpoint_every=CHECKPOINT_EVERY,
        )

    def optimizers(self) -> dict[str, tuple[Optimizer, LRScheduler]]:
        """AdamW with a one-cycle schedule."""
        trainable = [p for p in self.network.parameters() if p.requires_grad]
        optimizer = AdamW(trainable, lr=self.sft.lr, weight_decay=self.sft.weight_decay)
        steps, warmup = self.sft.steps, self.sft.warmup
        return {
            "network": (optimizer, OneCycleLR(optimizer, self.sft.lr, total_steps=steps, pct_start=warmup))
        }

    def draw(self, step: int) -> dict[str, torch.Tensor]:
        """This process's examples of a batch, see :meth:`tensors`."""
        if self._batches is None:
            self._batches = self._read_from(step)
        return self.runtime.to_device(self.runtime.local(self.tensors(next(self._batches))))

    @staticmethod
    def tensors(batch: Windows) -> dict[str, torch.Tensor]:
        """Fields of a batch plus ``n_actions``, its total number of recorded actions, in every row."""
        return {**vars(batch), "n_actions": batch.mask.sum().expand(len(batch))}

    def _read_from(self, step: int) -> Iterator[Windows]:
        """Batches starting at a step; earlier ones are drawn but not read."""
        rng = np.random.default_rng([self.seed, 3])
        drawn = draws(
            len(self.windows),
            self.sft.batch,
            n_symmetries=len(self.symmetries),
            shift=self.sft.shift,
            rng=rng,
        )
        remaining = islice(drawn, step, self.sft.steps)
        return iter(prefetched(self.windows.draw(draw, self.symmetries) for draw in remaining))

    def compute_loss(self, batch: Mapping[str, torch.Tensor]) -> Loss:
        """Cross-entropy of the tokens, as their contribution to the mean over the whole batch."""
        windows = Windows(*(batch[name] for name in ("pixels", "task_id", "actions", "mask")))
        loss, accuracy = token_loss(self.policy, windows)
        share = windows.mask.sum() / batch["n_actions"][0]
        metrics = {"loss": loss.item() * share.item(), "accuracy": accuracy * share.item()}
        return Loss(loss * share, metrics)

    def settings(self) -> dict[str, Any]:
        """Examples, augmentation and identity of the frozen weights."""
        same = {
            "warmup": self.sft.warmup,
            "shift": self.sft.shift,
            "symmetries": list(self.sft.symmetries),
            "windows": len(self.windows),
        }
        frozen = self.policy.kept_elsewhere()[1]
        return {**same, "frozen weights": frozen} if frozen else same

    def state(self) -> TrainingState:
        """State dict of the trained weights."""
        weights = {f"network.{k}": v for k, v in self.network.state_dict().items()}
        changing = changing_weights(weights, self.policy.kept_elsewhere()[0])
        state = TrainingState()
        state.add("network", {k.removeprefix("network."): v for k, v in changing.items()})
        return state

    def load_state(self, state: TrainingState) -> None:
        """Restore :meth:`state`."""
        kept = {name.removeprefix("network.") for name in self.policy.kept_elsewhere()[0]}
        load_changing_weights(self.network, state.part("network"), kept)


def _find_symmetries(task: Task, hints: TrainingHints, names: Sequence[str]) -> list[Symmetry]:
    known = {s.name: s for s in hints.symmetries}
    if missing := [n for n in names if n not in known]:
        raise ValueError(f"Task {task.name!r} has no symmetry {missing[0]!r}; known are {sorted(known)}.")
    return [known[n] for n in names]


def train_sft(
    episodes: Sequence[Episode],
    task: str | Task,
    *,
    config: VLAConfig | None = None,
    settings: SFTSettings | None = None,
    seed: int = 0,
    policy: VLAPolicy | None = None,
    policy_kwargs: Mapping[str, Any] | None = None,
    hints: TrainingHints | None = None,
    device: torch.device | str | None = None,
    precision: Precision | None = None,
    micro_batch: int | None = None,
    progress: Progress | None = None,
    log_dir: str | Path | None = None,
    checkpoint_dir: str | Path | None = None,
) -> VLAPolicy:
    """Fine-tune a VLA policy on demonstrations.

    The same seed, episodes and settings give the same weights on one machine; torch's and numpy's global
    generators are not changed.

    Args:
        episodes: Demonstrations; failures are not filtered out.
        task: The task they belong to.
        config: Configuration of the network; None is :meth:`VLAConfig.tiny` for the task.
        settings: Settings of the training.
        seed: Seeds the initial weights, the order of the examples and the augmentation.
        policy: Policy to fine-tune instead of a new one; ``config`` is then ignored.
        policy_kwargs: Further arguments of a new policy.
        hints: Defines the symmetries named in the settings; None is the task's hints.
        device: Training device, see :func:`~wmpo_gym.utils.device.resolve_device`; None is the policy's
            device, or the CPU for a new one.
        precision: ``"fp32"`` or ``"bf16"``, see :class:`VLAPolicy`; None is the policy's own.
        micro_batch: Windows per forward and backward pass, to limit memory; None for the whole batch. The
            gradient is the same up to rounding.
        progress: Called after each step, before its checkpoint, with (steps done, steps, {"loss", "accuracy",
            "lr"}).
        log_dir: Directory for TensorBoard curves.
        checkpoint_dir: Directory of the checkpoints; training resumes from a complete one of the same
            settings, with the same weights as without interruption.

    Returns:
        The policy, ready to sample.

    Raises:
        ValueError: If there are no examples, actions or images do not fit the task, the device
            or precision is unavailable, the policy was loaded in another precision, or the
            checkpoint is of another training.
    """
    task, settings = get_task(task), settings or SFTSettings()
    place = device if device is not None else policy.device if policy is not None else "cpu"
    compute = ComputeSettings(str(place), precision or "fp32", micro_batch).checked()
    if policy is not None and precision not in (None, policy.precision):
        raise ValueError(
            f"The policy computes in {policy.precision} and the training is to compute in {precision}; load "
            f"the policy with precision={precision!r}, or leave the precision of the training out."
        )
    symmetries = _find_symmetries(task, hints or hints_for(task), settings.symmetries)
    windows = WindowDataset(episodes, task.chunk)
    _check_fit(windows, task)
    if policy is None:
        size = task.image_size
        config = config or VLAConfig.tiny(chunk=task.chunk, action_dim=task.action_dim, image_size=size)
        spaces = make_spaces(config, (size, size, 3), len(task.instructions))
        options = {**(policy_kwargs or {}), **({"precision": precision} if precision else {})}
        policy = VLAPolicy(*spaces, config=config, instructions=task.instructions, seed=seed, **options)
    policy.to(compute.device)
    training = FineTuning(policy, windows, symmetries, settings, seed)

    def show(step: int, metrics: Mapping[str, float]) -> None:
        if progress is not None:
            shown = {"loss": metrics["loss"], "accuracy": metrics["accuracy"], "lr": metrics["learning_rate"]}
            progress(step, settings.steps, shown)

    trainer = Trainer(
        training,
        training.training_settings(),
        compute=replace(compute, precision=policy.precision),
        checkpoint_dir=checkpoint_dir,
        tensorboard=log_dir,
        on_step=show,
    )
    trainer.train(progress=False)
    return policy


@torch.no_grad()
def instruction_gap(
    policy: VLAPolicy, episodes: Sequence[Episode], task: Task, *, windows: int = 512, batch: int = 64
) -> float | None:
    """Increase in token cross-entropy when a policy is conditioned on a wrong instruction.

    It measures whether the policy uses the instruction. In training it stays near 0 at first and then rises
    abruptly.

    Args:
        policy: The policy.
        episodes: Demonstrations.
        task: The task they belong to.
        windows: Maximum number of control steps to evaluate.
        batch: Batch size.

    Returns:
        Mean cross-entropy per action token under a wrong instruction minus that under the right one, in nats:
        near 0 if the instruction is ignored; see ``instruction_gap`` in
        :class:`~wmpo_gym.training.presets.TrainingHints`. None if the episodes have a single instruction.
    """
    dataset = WindowDataset(episodes, task.chunk)
    given = np.unique(dataset.task_ids)
    if len(given) < 2:
        return None
    chosen = np.random.default_rng(0).permutation(len(dataset))[:windows]
    parts = [dataset.rows(index) for index in np.array_split(chosen, range(batch, len(chosen), batch))]
    total = sum(part.mask.sum() for part in parts)

    def loss(parts: Sequence[Windows]) -> float:
        return sum((token_loss(policy, p)[0] * (p.mask.sum() / total)).item() for p in parts)

    following = np.roll(given, -1)
    other = [
        replace(p, task_id=torch.from_numpy(following[np.searchsorted(given, p.task_id.numpy())]))
        for p in parts
    ]
    return loss(other) - loss(parts)


def _check_fit(windows: WindowDataset, task: Task) -> None:
    size, n = task.image_size, len(task.instructions)
    for episode in windows.episodes:
        frame, action_dim = episode.frames.shape[1:], episode.actions.shape[1]
        if frame != (size, size, 3) or action_dim != task.action_dim:
            raise ValueError(
                f"Task {task.name!r} has {size}x{size} RGB frames and {task.action_dim} numbers per action; "
                f"the episodes have frames {tuple(frame)} and {action_dim} numbers."
            )
    if int(windows.task_ids.max()) >= n:
        raise ValueError(
            f"Task {task.name!r} has {n} instructions; an episode has task_id {windows.task_ids.max()}."
        )
