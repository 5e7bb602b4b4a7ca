"""Trainer of all networks: world model, proprioception, distillation, classifier and fine-tuning.

A :class:`TrainingTask` draws batches and computes their loss. The :class:`Trainer` implements everything
else: device and precision, micro-batches, processes, gradient clipping, schedules, weight averaging (EMA),
    logs, and
checkpoints from which an interrupted training resumes exactly.
"""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from wmpo_gym.training.checkpoint import (
    TrainingState,
    load_checkpoint,
    pack_optimizer,
    save_checkpoint,
    unpack_optimizer,
)
from wmpo_gym.training.runtime import ComputeSettings, Runtime, private_random_state
from wmpo_gym.utils.progress import progress_bar

logger = logging.getLogger(__name__)

SEED_STRIDE = 1_000_003  # between the torch seeds of trainings with consecutive seeds


@dataclass(frozen=True)
class TrainingSettings:
    """Settings shared by all trainings.

    Attributes:
        steps: Optimiser steps.
        batch_size: Rows per step, over all processes.
        learning_rate: Peak learning rate.
        weight_decay: Decoupled weight decay.
        max_grad_norm: Gradients are clipped to this norm.
        ema_decay: Decay of the exponential moving average of the weights, which replaces the weights at the
            end; 0 for no average.
        seed: Random seed.
        checkpoint_every: Steps between checkpoints, validations and entries of the history.
        log_every: Steps between points of the TensorBoard curves.
    """

    steps: int = 1000
    batch_size: int = 32
    learning_rate: float = 1e-3
    weight_decay: float = 1e-2
    max_grad_norm: float = 1.0
    ema_decay: float = 0.0
    seed: int = 0
    checkpoint_every: int = 250
    log_every: int = 20


@dataclass
class Loss:
    """Loss of a micro-batch, as its contribution to the loss of the whole batch.

    Attributes:
        loss: Scalar to differentiate; summed over micro-batches and processes.
        metrics: Metrics to log, summed in the same way.
        outputs: Tensors with a leading batch dimension, concatenated over micro-batches and passed to
            :meth:`TrainingTask.finish_step`.
    """

    loss: Tensor
    metrics: dict[str, float] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)


class TrainingTask:
    """Definition of a training: network, optimizers, batches and loss.

    Attributes:
        component: Name of the trained component; checkpoints of other components are rejected.
        network: The network. Trained in place; returns to its original device when training ends.
        runtime: Device and processes; set by the trainer before anything else is called.
    """

    component: str
    network: nn.Module
    runtime: Runtime

    def modules(self) -> dict[str, nn.Module]:
        """All trained modules by name."""
        return {"network": self.network}

    def frozen_modules(self) -> list[nn.Module]:
        """Modules used in the forward pass but not trained."""
        return []

    def optimizers(self) -> dict[str, tuple[Optimizer, LRScheduler]]:
        """Optimizers of the network, each with its schedule; called once the modules are on the device."""
        raise NotImplementedError

    def draw(self, step: int) -> Any:
        """This process's rows of the next batch, on the device.

        Random numbers are drawn for the whole batch from CPU generators, identically in every process
        (:meth:`~wmpo_gym.training.runtime.Runtime.local` selects the rows). Returns tensors in a tuple or
        dictionary.
        """
        raise NotImplementedError

    def compute_loss(self, batch: Any) -> Loss:
        """Loss of a micro-batch of the rows returned by :meth:`draw`."""
        raise NotImplementedError

    def finish_step(self, outputs: dict[str, Tensor]) -> dict[str, float]:
        """Called after the optimizers' step with the outputs of all rows; returns further metrics."""
        return {}

    def validate(self, network: nn.Module, step: int) -> dict[str, float]:
        """Metrics of the averaged network at a checkpoint; called in the main process only."""
        return {}

    def settings(self) -> dict[str, Any]:
        """Further settings that must match on resuming; JSON-serialisable."""
        return {}

    def state(self) -> TrainingState:
        """Weights, generators and all else that :meth:`load_state` restores; called by all processes."""
        state = TrainingState()
        for name, module in self.modules().items():
            state.add(name, module.state_dict())
        return state

    def load_state(self, state: TrainingState) -> None:
        """Restore :meth:`state`."""
        for name, module in self.modules().items():
            module.load_state_dict(state.part(name))


class Trainer:
    """Trainer of a :class:`TrainingTask`.

    Args:
        task: The training task.
        settings: Settings of the training.
        compute: Device, precision and micro-batches; None is float32 on the network's device.
        checkpoint_dir: Directory of the checkpoint; training resumes from a complete one.
        tensorboard: Directory for TensorBoard curves, or None.
        on_step: Called after each step, before its checkpoint, with the steps done and the step's metrics.

    Raises:
        ValueError: If device, precision or processes are unavailable, or the batch is not divisible among
            them.
    """

    def __init__(
        self,
        task: TrainingTask,
        settings: TrainingSettings,
        *,
        compute: ComputeSettings | None = None,
        checkpoint_dir: str | Path | None = None,
        tensorboard: str | Path | None = None,
        on_step: Callable[[int, Mapping[str, float]], None] | None = None,
    ) -> None:
        self.task, self.settings, self.on_step = task, settings, on_step
        self.checkpoint_dir = Path(checkpoint_dir) if checkpoint_dir else None
        self.tensorboard = Path(tensorboard) if tensorboard else None
        self.step, self.seconds = 0, 0.0
        self.history: list[dict[str, float]] = []
        runtime = Runtime(compute or ComputeSettings(device=str(device_of(task.network))))
        runtime.local_rows(settings.batch_size)  # raises if not divisible
        self.runtime = task.runtime = runtime
        modules = [*task.modules().values(), *task.frozen_modules()]
        self._original_devices = [(module, device_of(module)) for module in modules]
        for module in modules:
            module.to(runtime.device)
        self.optimizers = task.optimizers()
        self.ema = AveragedWeights(task.network, settings.ema_decay) if settings.ema_decay else None

    @property
    def network(self) -> nn.Module:
        """The trained network."""
        return self.task.network

    def train(self, *, progress: bool = True, description: str | None = None) -> list[dict[str, float]]:
        """Train to ``settings.steps``, from the checkpoint if there is one.

        Args:
            progress: Show a progress bar.
            description: Title of the progress bar; None is the component.

        Returns:
            The history: step, seconds, mean metrics and validation at every checkpoint.

        Raises:
            FloatingPointError: If a gradient is not finite.
            ValueError: If the checkpoint is of another component, format or other settings.
        """
        settings = self.settings
        self._resume()
        started = time.perf_counter() - self.seconds
        since_log, since_checkpoint = Means(), Means()
        bar = progress_bar(
            total=settings.steps, initial=self.step, desc=description or self.task.component,
            disable=not (progress and self.runtime.is_main),
        )  # fmt: skip
        for module in self.task.modules().values():
            module.train()
        with self._writer() as writer, private_random_state(self.runtime.device), bar:
            while self.step < settings.steps:
                metrics = self.train_step()
                since_log.add(metrics)
                since_checkpoint.add(metrics)
                bar.update(1)
                if self.on_step is not None:
                    self.on_step(self.step, metrics)
                at_end = self.step == settings.steps
                if writer is not None and (self.step % settings.log_every == 0 or at_end):
                    self._write(writer, since_log.take())
                if self.step % settings.checkpoint_every == 0 or at_end:
                    self.seconds = time.perf_counter() - started
                    entry = self._record(since_checkpoint.take(), writer)
                    if "loss" in entry:
                        bar.set_postfix(loss=f"{entry['loss']:.4f}")
                    self._save()
        if self.ema is not None:
            self.ema.copy_to(self.task.network)
        for module in self.task.modules().values():
            module.zero_grad(set_to_none=True)  # free the gradients before moving the weights
        for module, device in self._original_devices:
            module.to(device)
        for module in self.task.modules().values():
            module.eval()
        return self.history

    def train_step(self) -> dict[str, float]:
        """One optimiser step; returns its metrics."""
        torch.manual_seed(self.settings.seed * SEED_STRIDE + self.step)  # for dropout
        batch = self.task.draw(self.step)
        for optimizer, _ in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        self.task.network.zero_grad(set_to_none=True)
        metrics: dict[str, float] = {}
        outputs: list[dict[str, Tensor]] = []
        for part in self.runtime.micro_batches(batch):
            with self.runtime.autocast():
                result = self.task.compute_loss(part)
            result.loss.backward()
            outputs.append(result.outputs)
            for name, value in result.metrics.items():
                metrics[name] = metrics.get(name, 0.0) + value
        metrics = self.runtime.sum(metrics)
        metrics["grad_norm"] = self._clip_gradients()
        for optimizer, schedule in self.optimizers.values():
            metrics.setdefault("learning_rate", optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        if self.ema is not None:
            self.ema.step(self.ema.parameters)
        self.step += 1
        return metrics | self.task.finish_step(_joined(outputs))

    def _clip_gradients(self) -> float:
        parameters = [p for p in self.task.network.parameters() if p.requires_grad]
        self.runtime.sum_gradients(parameters)
        norm = float(nn.utils.clip_grad_norm_(parameters, self.settings.max_grad_norm))
        if not math.isfinite(norm):
            raise FloatingPointError(
                f"The gradient of the {self.task.component} is not finite at step {self.step}; the last "
                f"checkpoint is intact. Lower learning_rate (now {self.settings.learning_rate})."
            )
        return norm

    def averaged_network(self) -> nn.Module:
        """A copy of the network with the averaged weights, in evaluation mode."""
        network = copy.deepcopy(self.task.network).eval()
        if self.ema is not None:
            self.ema.copy_to(network)
        return network

    # -- logs ----------------------------------------------------------------------------------------------
    def _writer(self) -> AbstractContextManager[Any]:
        if self.tensorboard is None or not self.runtime.is_main:
            return nullcontext()
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(self.tensorboard), purge_step=self.step)

    def _write(self, writer: Any, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            writer.add_scalar(f"{self.task.component.replace(' ', '_')}/{name}", value, self.step)

    def _record(self, metrics: dict[str, float], writer: Any) -> dict[str, float]:
        """Append the training metrics since the last checkpoint and the validation metrics to the history."""
        validation = self.runtime.on_main(lambda: self.task.validate(self.averaged_network(), self.step))
        entry = {"step": self.step, "seconds": round(self.seconds, 1), **metrics, **validation}
        self.history.append(entry)
        shown = {k: round(v, 4) for k, v in (metrics | validation).items()}
        logger.info("%s, step %d: %s", self.task.component, self.step, shown)
        if writer is not None:
            self._write(writer, validation)
        return entry

    # -- checkpoints ---------------------------------------------------------------------------------------
    def _settings(self) -> dict[str, Any]:
        return {**asdict(self.settings), **self.task.settings()}

    def _save(self) -> None:
        if self.checkpoint_dir is None:
            return
        directory, state = self.checkpoint_dir, self.task.state()
        state.values |= {"step": self.step, "seconds": self.seconds, "history": self.history}
        if self.ema is not None:
            state.add("ema", self.ema.tensors())
        for name, (optimizer, schedule) in self.optimizers.items():
            tensors, packed = pack_optimizer(optimizer)
            state.add(f"optimizer.{name}", tensors)
            # Only the schedule's counters are stored; its functions and settings are recreated.
            packed["schedule"] = {"last_epoch": schedule.last_epoch, "_last_lr": schedule.get_last_lr()}
            state.values[f"optimizer.{name}"] = packed
        self.runtime.on_main(lambda: save_checkpoint(directory, self.task.component, self._settings(), state))

    def _resume(self) -> None:
        if self.checkpoint_dir is None:
            return
        state = load_checkpoint(self.checkpoint_dir, self.task.component, self._settings())
        if state is None:
            return
        self.task.load_state(state)
        if self.ema is not None:
            self.ema.load(state.part("ema"), state.values["step"])
        for name, (optimizer, schedule) in self.optimizers.items():
            packed = state.values[f"optimizer.{name}"]
            unpack_optimizer(optimizer, state.part(f"optimizer.{name}"), packed)
            schedule.__dict__.update(packed["schedule"])
        self.step, self.seconds = state.values["step"], state.values["seconds"]
        self.history = state.values["history"]
        logger.info("Resumed the training of the %s at step %d.", self.task.component, self.step)


class AveragedWeights(EMAModel):
    """Exponential moving average (EMA) of a network's trained weights.

    The decay rises as ``(i + 1) / (i + 10)`` at step i (from 0) up to its final value, so that the initial
    weights soon lose influence; the warm-up of diffusers would start at 0. Frozen weights are excluded, as
    published.

    Args:
        network: The network.
        decay: Final decay.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
        self.names, self.parameters = list(trained), list(trained.values())
        super().__init__(self.parameters, decay=decay, foreach=True)

    def get_decay(self, optimization_step: int) -> float:
        """The decay of a step, counted from 1."""
        return min(self.decay, optimization_step / (optimization_step + 9))

    def tensors(self) -> dict[str, Tensor]:
        """The averages by name."""
        return dict(zip(self.names, self.shadow_params, strict=True))

    def load(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """Restore the averages :meth:`tensors` of step ``step``."""
        self.optimization_step = step
        for name, average in self.tensors().items():
            average.copy_(tensors[name])

    def copy_to(self, network: nn.Module) -> None:
        """Copy the averaged weights into the network or a copy of it."""
        with torch.no_grad():
            parameters = dict(network.named_parameters())
            for name, average in self.tensors().items():
                parameters[name].copy_(average)


class Means:
    """Running means of metrics."""

    def __init__(self) -> None:
        self._values: dict[str, list[float]] = {}

    def add(self, metrics: Mapping[str, float]) -> None:
        """Add the metrics of a step."""
        for name, value in metrics.items():
            self._values.setdefault(name, []).append(value)

    def take(self) -> dict[str, float]:
        """The means since the last call."""
        values, self._values = self._values, {}
        return {name: float(np.mean(found)) for name, found in values.items()}


# -- learning-rate schedules -------------------------------------------------------------------------------
def warmup_share(step: int, warmup: int) -> float:
    """Learning-rate factor of a linear warm-up at an optimiser step (from 0), as published."""
    return min(1.0, (step + 1) / (warmup + 1))


def _cosine(step: int, steps: int) -> float:
    return 0.5 * (1 + math.cos(math.pi * step / steps))


def warmup_cosine(optimizer: Optimizer, steps: int, warmup: int, final_share: float = 0.0) -> LambdaLR:
    """Cosine decay from the peak to ``final_share`` of it, times a linear warm-up over ``warmup`` steps."""
    return LambdaLR(
        optimizer,
        lambda i: (final_share + (1 - final_share) * _cosine(i, steps)) * warmup_share(i, warmup),
    )


def warmup_until_cosine(optimizer: Optimizer, steps: int, warmup: float = 0.1) -> LambdaLR:
    """Minimum of a linear warm-up over the fraction ``warmup`` of the steps and a cosine decay to 0."""
    rise = max(1.0, warmup * steps)
    return LambdaLR(optimizer, lambda i: min((i + 1) / rise, _cosine(i, steps)))


# -- helpers -----------------------------------------------------------------------------------------------
def device_of(module: nn.Module) -> torch.device:
    """Device of a module's first parameter or buffer; the CPU if it has none."""
    tensor = next(module.parameters(), next(module.buffers(), None))
    return torch.device("cpu") if tensor is None else tensor.device


def _joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Outputs of all micro-batches, concatenated."""
    if len(parts) == 1:
        return parts[0]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
