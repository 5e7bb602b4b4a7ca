"""Supervised fine-tuning: imitate recorded episodes, token by token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from wmpo_gym.data.episode import Episode
from wmpo_gym.data.frames import prefetched
from wmpo_gym.policies.base import changing_weights, load_changing_weights
from wmpo_gym.policies.vla import VLAConfig
from wmpo_gym.policies.vla_policy import VLAPolicy, make_spaces
from wmpo_gym.policies.windows import WindowDataset, Windows, draws
from wmpo_gym.tasks import Symmetry, Task, get_task
from wmpo_gym.training.checkpoint import pack_optimizer, unpack_optimizer
from wmpo_gym.utils.io import (
    load_safetensors,
    mend_dir,
    plain,
    read_json,
    save_safetensors,
    write_dir_atomic,
    write_json_atomic,
)

Progress = Callable[[int, int, dict[str, float]], None]
CHECKPOINT_EVERY = 100  # steps
READS_INSTRUCTION = 0.2  # nats; policies of move-block that tell the colours reach 0.8, others 0.0


@dataclass(frozen=True)
class SFTSettings:
    """How to fine-tune.

    Attributes:
        steps: Optimizer steps.
        batch: Windows per step.
        lr: Peak learning rate of the one-cycle schedule.
        weight_decay: Decoupled weight decay (AdamW).
        warmup: Share of the steps in which the rate rises.
        max_grad_norm: Gradients are scaled down to this norm.
        shift: Augmentation: move the picture by up to this many pixels in each direction.
        symmetries: Names of the task's symmetries to augment with. Leave out one that would undo a bias
            of the demonstrator you want to keep.
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
    """Mean cross-entropy (nats) of the recorded actions' tokens, and the share predicted exactly."""
    targets = policy.encode(batch.actions)
    kept = batch.mask.repeat_interleave(policy.config.action_dim, dim=1)
    logits = policy.logits({"pixels": batch.pixels, "task_id": batch.task_id})[kept]
    targets = targets[kept].to(logits.device)
    return F.cross_entropy(logits, targets), (logits.argmax(-1) == targets).float().mean().item()


def _parts(windows: Windows, size: int | None) -> Iterator[tuple[Windows, torch.Tensor]]:
    """Some windows at a time, None for all, each with its share of the recorded actions."""
    total = windows.mask.sum()
    for part in map(windows.rows, torch.arange(len(windows)).split(size or len(windows))):
        yield part, part.mask.sum() / total


def accumulate_gradient(policy: VLAPolicy, batch: Windows, micro_batch: int | None) -> tuple[float, float]:
    """Add the gradient of :func:`token_loss` to ``.grad``, micro-batch by micro-batch; its two values."""
    loss = accuracy = 0.0
    for part, share in _parts(batch, micro_batch):
        part_loss, part_accuracy = token_loss(policy, part)
        (part_loss * share).backward()
        loss, accuracy = loss + part_loss.item() * share.item(), accuracy + part_accuracy * share.item()
    return loss, accuracy


def _find_symmetries(task: Task, names: Sequence[str]) -> list[Symmetry]:
    known = {s.name: s for s in task.symmetries}
    if missing := [n for n in names if n not in known]:
        raise ValueError(f"Task {task.name!r} has no symmetry {missing[0]!r}; it has {sorted(known)}.")
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
    device: torch.device | str | None = None,
    micro_batch: int | None = None,
    progress: Progress | None = None,
    log_dir: str | Path | None = None,
    checkpoint_dir: str | Path | None = None,
) -> VLAPolicy:
    """Fine-tune a VLA policy on demonstrations.

    The same seed, episodes and settings give the same weights on one machine; torch's and numpy's global
    generators are left alone.

    Args:
        episodes: Demonstrations; failures are imitated like successes.
        task: The task they belong to.
        config: The network; None is :meth:`VLAConfig.tiny` for the task.
        settings: How to train.
        seed: Seeds the initial weights, the order of the examples and the augmentation.
        policy: Go on from this policy instead of a new one; ``config`` is then ignored.
        policy_kwargs: Further arguments of the new policy, where there is none to go on from.
        device: Where to train; None is where the policy is, or the CPU.
        micro_batch: Windows per forward and backward pass, a bound on memory; None for the whole batch. The
            gradient is the same up to rounding.
        progress: Called after each step with (steps done, steps, {"loss", "accuracy", "lr"}).
        log_dir: Directory for TensorBoard curves.
        checkpoint_dir: Where to keep checkpoints; a complete one of the same settings is gone on from and
            gives the same weights as an uninterrupted training.

    Returns:
        The policy, ready to sample.

    Raises:
        ValueError: If there is nothing to learn from, or actions or images do not fit the task.
    """
    task, settings = get_task(task), settings or SFTSettings()
    symmetries = _find_symmetries(task, settings.symmetries)
    windows = WindowDataset(episodes, task.chunk)
    _check_fit(windows, task)
    if policy is None:
        size = task.image_size
        config = config or VLAConfig.tiny(chunk=task.chunk, action_dim=task.action_dim, image_size=size)
        spaces = make_spaces(config, (size, size, 3), len(task.instructions))
        policy = VLAPolicy(
            *spaces, config=config, instructions=task.instructions, seed=seed, **(policy_kwargs or {})
        )
    if device is not None:
        policy.to(device)
    rng = np.random.default_rng([seed, 3])
    trainable = [p for p in policy.network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=settings.lr, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.lr, total_steps=settings.steps, pct_start=settings.warmup
    )
    same = {**settings.to_dict(), "seed": seed, "windows": len(windows)}
    if digest := policy.kept_elsewhere()[1]:
        same["frozen weights"] = digest
    kept = Checkpoint(checkpoint_dir, same)
    done = kept.restore(policy, optimizer, schedule)
    writer = _writer(log_dir, done)
    policy.set_training_mode(True)
    drawn = draws(len(windows), settings.batch, n_symmetries=len(symmetries), shift=settings.shift, rng=rng)
    remaining = islice(drawn, done, settings.steps)  # those of the steps done are drawn, but not read
    batches = prefetched(windows.draw(draw, symmetries) for draw in remaining)
    for step, batch in enumerate(batches, done):
        optimizer.zero_grad(set_to_none=True)
        loss, accuracy = accumulate_gradient(policy, batch, micro_batch)
        torch.nn.utils.clip_grad_norm_(trainable, settings.max_grad_norm)
        optimizer.step()
        metrics = {"loss": loss, "accuracy": accuracy, "lr": optimizer.param_groups[0]["lr"]}
        schedule.step()
        if writer is not None:
            for key, value in metrics.items():
                writer.add_scalar(f"sft/{key}", value, step)
        if (step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == settings.steps:
            kept.save(step + 1, policy, optimizer, schedule)
        if progress is not None:
            progress(step + 1, settings.steps, metrics)
    if writer is not None:
        writer.close()
    policy.set_training_mode(False)
    return policy


@torch.no_grad()
def instruction_gap(
    policy: VLAPolicy, episodes: Sequence[Episode], task: Task, *, windows: int = 512, batch: int = 64
) -> float | None:
    """How much worse a policy explains recorded actions when it is told another instruction.

    Words are bound to things late and all at once; before, the mean over all instructions is imitated.

    Args:
        policy: The policy.
        episodes: Demonstrations.
        task: The task they belong to.
        windows: Control steps to look at, at most.
        batch: So many at once.

    Returns:
        Mean cross-entropy per action token under a wrong instruction minus that under the right one, in nats:
        near 0 if it is not read, else above :data:`READS_INSTRUCTION`. None if there is one instruction only.
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


@dataclass(frozen=True)
class Checkpoint:
    """Where a fine-tuning stands, on disk.

    Attributes:
        directory: Holds the one checkpoint there is; None keeps none.
        settings: What must be equal on going on, JSON-able.
    """

    directory: str | Path | None
    settings: dict[str, Any]

    def save(self, step: int, policy: VLAPolicy, optimizer: torch.optim.Optimizer, schedule: Any) -> None:
        """Write the state after ``step`` steps; the one before stays until this one is complete."""
        if self.directory is None:
            return
        tensors, numbers = pack_optimizer(optimizer)
        tensors = {f"optimizer.{k}": v for k, v in tensors.items()}
        weights = {f"network.{k}": v for k, v in policy.network.state_dict().items()}
        tensors |= changing_weights(weights, policy.kept_elsewhere()[0])
        # What a schedule keeps beside numbers are functions and its own settings, which are made anew.
        numbers["schedule"] = {"last_epoch": schedule.last_epoch, "_last_lr": schedule.get_last_lr()}
        with write_dir_atomic(self.directory) as temporary:
            save_safetensors(temporary / "state.safetensors", tensors)
            write_json_atomic(
                temporary / "state.json", {"step": step, "settings": self.settings, "optimizer": numbers}
            )

    def restore(self, policy: VLAPolicy, optimizer: torch.optim.Optimizer, schedule: Any) -> int:
        """Put everything back, in place.

        Returns:
            The steps done; 0 without a checkpoint.

        Raises:
            ValueError: If the checkpoint belongs to other settings or episodes.
            ArtifactError: If it is damaged.
        """
        if self.directory is None or not (mend_dir(self.directory) / "state.json").exists():
            return 0
        state = read_json(Path(self.directory) / "state.json")
        if state["settings"] != plain(self.settings):
            raise ValueError(
                f"{self.directory} holds a fine-tuning with other settings or episodes; finish it with the "
                "same ones or choose another directory."
            )
        parts: dict[str, dict[str, torch.Tensor]] = {"optimizer": {}, "network": {}}
        for key, value in load_safetensors(Path(self.directory) / "state.safetensors").items():
            part, _, name = key.partition(".")
            parts[part][name] = value
        kept = {name.removeprefix("network.") for name in policy.kept_elsewhere()[0]}
        load_changing_weights(policy.network, parts["network"], kept)
        unpack_optimizer(optimizer, parts["optimizer"], state["optimizer"])
        schedule.load_state_dict(state["optimizer"]["schedule"])
        return int(state["step"])


def _writer(log_dir: str | Path | None, step: int) -> Any:
    if log_dir is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(log_dir), purge_step=step)
