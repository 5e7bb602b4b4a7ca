"""Estimate of the memory and computation of world-model training before it starts.

Network and autoencoder are copied to the ``meta`` device, where forward and backward passes are run while
operations and bytes are counted (:mod:`~wmpo_gym.capacity.meter`). Assumptions: AdamW with float32 weights,
gradients and two moments, averaged weights (EMA) on the device, and a full copy of all of these in every
process. Hours are operations divided by an assumed speed, not timed.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from wmpo_gym.capacity.estimate import ADAM_MOMENTS, FLOAT32, RESERVE
from wmpo_gym.capacity.fit import Machine, TooLittleMemoryError, format_flops, format_size
from wmpo_gym.capacity.meter import Cost, measure
from wmpo_gym.world.networks.autoencoder import Autoencoder
from wmpo_gym.world.proprio import robot_state_size
from wmpo_gym.world.training import WorldModelTraining

PEAK_TFLOPS = 312.0
"""Peak bfloat16 matrix product throughput of an NVIDIA A100 without sparsity (data sheet)."""
UTILISATION = 0.4
"""Assumed share of the peak during training; not measured."""
ENCODED_ROWS = 16  # rows whose frames fill one batch of the autoencoder


@dataclass(frozen=True)
class Speed:
    """Assumed compute speed of a device.

    Attributes:
        peak_tflops: Peak in 10^12 operations per second.
        utilisation: Share of the peak reached in training, in (0, 1].

    Raises:
        ValueError: If the peak is not positive or the share outside (0, 1].
    """

    peak_tflops: float = PEAK_TFLOPS
    utilisation: float = UTILISATION

    def __post_init__(self) -> None:
        if not self.peak_tflops > 0:
            raise ValueError(f"peak_tflops must be positive, got {self.peak_tflops}.")
        if not 0 < self.utilisation <= 1:
            raise ValueError(f"utilisation must be above 0 and at most 1, got {self.utilisation}.")

    def hours(self, flops: float, devices: int) -> float:
        """Hours for a number of operations on several devices."""
        return flops / (devices * 1e12 * self.peak_tflops * self.utilisation) / 3600


@dataclass(frozen=True)
class TrainingFootprint:
    """Peak memory of one device in bytes, by component.

    Attributes:
        micro_batch: Rows per forward and backward pass.
        weights: Weights of network and autoencoder.
        gradients: Gradients of the network.
        optimizer: AdamW's moments and the averaged weights.
        working: Activations or the optimizer step's allocations, whichever is larger.
    """

    micro_batch: int
    weights: int
    gradients: int
    optimizer: int
    working: int

    @property
    def peak(self) -> int:
        """Sum of the components."""
        return self.weights + self.gradients + self.optimizer + self.working


class TrainingEstimator:
    """Estimator of the cost of world-model training.

    Args:
        name: Display name of the training run.
        network: The world model; it is not modified and may be on the ``meta`` device.
        autoencoder: The autoencoder; it is not modified and may be on the ``meta`` device.
        image_size: Side of the frames in pixels.
        settings: Training settings.
        denoising_steps: Denoising steps per chunk when predicted contexts are sampled.
        bf16: Whether training uses bfloat16 autocast.
    """

    def __init__(
        self,
        name: str,
        network: nn.Module,
        autoencoder: Autoencoder,
        image_size: int,
        settings: WorldModelTraining,
        *,
        denoising_steps: int,
        bf16: bool,
    ) -> None:
        self.name, self.settings, self.image_size = name, settings, image_size
        self.network: Any = on_meta(network)
        self.autoencoder: Any = on_meta(autoencoder)
        self.denoising_steps, self.bf16 = denoising_steps, bf16
        self._row_cost = lru_cache(maxsize=None)(self._measure_row)
        self._encoding_cost = lru_cache(maxsize=None)(self._measure_encoding)

    @property
    def parameters(self) -> dict[str, int]:
        """Parameters of the network and of the autoencoder."""
        vae = getattr(self.autoencoder, "vae", None)
        return {"world model": _count(self.network), "autoencoder": 0 if vae is None else _count(vae)}

    @property
    def _autocast(self) -> torch.dtype | None:
        return torch.bfloat16 if self.bf16 else None

    def _measure_encoding(self, rows: int) -> Cost:
        """Cost of encoding the context and targets of some rows; without autocast, as in the trainer."""
        config, side = self.network.config, self.image_size
        frames = torch.empty(rows, config.chunk, side, side, 3, dtype=torch.uint8, device="meta")
        context = frames.new_empty(rows, config.context_frames, side, side, 3)
        known = [frames, context, *_tensors(getattr(self.autoencoder, "vae", None))]
        return measure(lambda: [self.autoencoder.encode(x) for x in (context, frames)], known)

    def _measure_row(self, rows: int) -> tuple[Cost, Cost]:
        """Cost of a forward and backward pass, and of sampling the chunks that the next step continues."""
        network, config = self.network, self.network.config
        side = self.image_size // self.autoencoder.downscale
        state_dim = getattr(config, "state_dim", 0) or 0
        with torch.device("meta"):
            shape = (rows, self.autoencoder.latent_channels)
            context = torch.empty(*shape, config.context_frames, side, side)
            targets = torch.empty(*shape, config.chunk, side, side)
            actions, level = torch.empty(rows, config.chunk, config.action_dim), torch.empty(rows)
            previous = torch.empty(rows, config.action_dim + robot_state_size(state_dim))
            mask = torch.empty(rows, config.context_frames + config.chunk, dtype=torch.bool)
        inputs = [context, targets, actions, level, previous, mask]
        for parameter in network.parameters():
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
        known = [*inputs, *_tensors(network)]

        def forward_and_backward() -> None:
            if hasattr(network, "predict"):
                cache = network.encode_context(context, previous, level)
                out = network.predict(targets, level, actions, cache)
            else:
                out = network(
                    torch.cat([context, targets], dim=2), 1000 * level, actions, mask, previous, level
                )
            out.float().square().mean().backward()

        training = measure(forward_and_backward, known, self._autocast)
        if not self._samples:
            return training, Cost(0, 0, 0)
        with torch.no_grad():
            encode = measure(lambda: network.encode_context(context, previous, level), known, self._autocast)
            cache = network.encode_context(context, previous, level)
            known += [leaf for leaf in tree_leaves(cache) if isinstance(leaf, Tensor)]
            step = measure(lambda: network.denoise(targets, level, actions, cache), known, self._autocast)
        return training, Cost(
            encode.flops + self.denoising_steps * step.flops, encode.kept + max(encode.peak, step.peak), 0
        )

    @property
    def _samples(self) -> bool:
        """Whether predicted contexts are sampled in addition to the training pass."""
        one_pass = hasattr(self.network, "predict") and self.denoising_steps == 1
        return self.settings.restart_prob < 1 and not one_pass

    def flops(self) -> dict[str, float]:
        """Operations per optimizer step over all devices, by purpose."""
        rows = self.settings.batch_size
        training, sampling = self._row_cost(1)
        return {
            "training": rows * training.flops,
            "sampling contexts": rows * sampling.flops,
            "encoding frames": rows * self._encoding_cost(1).flops,
        }

    def footprint(self, ranks: int, micro_batch: int | None = None) -> TrainingFootprint:
        """Memory of one of ``ranks`` devices; with ``micro_batch`` None all of its rows form one batch."""
        local = -(-self.settings.batch_size // ranks)
        rows = min(micro_batch or local, local)
        count = FLOAT32 * sum(p.numel() for p in self.network.parameters() if p.requires_grad)
        averaged = count if self.settings.ema_decay else 0
        # Frames are encoded in batches, so that the peak does not grow with the number of rows.
        costs = (*self._row_cost(rows), self._encoding_cost(min(local, ENCODED_ROWS)))
        config = self.network.config
        frames = local * (config.context_frames + config.chunk) * 3 * self.image_size**2
        activations = frames + max(cost.peak for cost in costs)
        return TrainingFootprint(
            micro_batch=rows,
            weights=FLOAT32 * sum(self.parameters.values()),
            gradients=count,
            optimizer=ADAM_MOMENTS * count // FLOAT32 + averaged,
            working=max(activations, count),  # the optimizer step allocates one float per parameter
        )


@dataclass(frozen=True)
class TrainingPlan:
    """Memory plan of world-model training on a machine.

    Attributes:
        machine: The machine.
        rows: Evaluated micro-batch sizes, largest first.
        best: The largest micro-batch that fits; None if none does.
        hours: Estimated hours for all steps, see :class:`Speed`.
    """

    machine: Machine
    rows: list[TrainingFootprint]
    best: TrainingFootprint | None
    hours: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {
            "machine": asdict(self.machine),
            "options": [
                {**asdict(row), "peak": row.peak, "fits": row.peak <= self.machine.usable}
                for row in self.rows
            ],
            "best_micro_batch": self.best.micro_batch if self.best else None,
            "estimated_hours": self.hours,
        }


def plan_training(
    estimator: TrainingEstimator, machine: Machine, speed: Speed, micro_batch: int | None = None
) -> TrainingPlan:
    """Find the largest micro-batch with which training fits on a machine.

    Args:
        estimator: Estimator of the training.
        machine: The machine.
        speed: Assumed speed of the devices.
        micro_batch: The only size to evaluate; None halves the rows of a device until they fit.
    """
    local = -(-estimator.settings.batch_size // machine.ranks)
    sizes = [min(micro_batch, local)] if micro_batch else _halved(local)
    rows: list[TrainingFootprint] = []
    for size in sizes:
        rows.append(estimator.footprint(machine.ranks, size))
        if rows[-1].peak <= machine.usable:
            break
    best = rows[-1] if rows[-1].peak <= machine.usable else None
    total = estimator.settings.steps * sum(estimator.flops().values())
    return TrainingPlan(machine, rows, best, speed.hours(total, machine.ranks))


def require_training_room(
    estimator: TrainingEstimator, device: str, ranks: int = 1, micro_batch: int | None = None
) -> None:
    """Check that a device has enough memory for training.

    Args:
        estimator: Estimator of the training.
        device: Device of the training.
        ranks: Processes that share the batch; on a CPU they share its memory.
        micro_batch: Rows per forward and backward pass; None uses all rows of a process.

    Raises:
        TooLittleMemoryError: If the training does not fit.
    """
    if torch.device(device).type not in ("cpu", "cuda"):
        return
    machine = Machine.here(device)
    machine = replace(machine, ranks=ranks, memory=machine.memory // (1 if machine.gpu else ranks))
    footprint = estimator.footprint(ranks, micro_batch)
    if footprint.peak <= machine.usable:
        return
    best = plan_training(estimator, machine, Speed()).best
    advice = (
        "No micro-batch makes it fit; take a smaller network or a larger device"
        if best is None
        else f"It would fit with --micro-batch-size {best.micro_batch}"
    )
    raise TooLittleMemoryError(
        f"{estimator.name} takes {format_size(footprint.peak)} with {footprint.micro_batch} rows per pass; "
        f"{machine.name} has {format_size(machine.usable)}. {advice}. `wmpo estimate --training world-model` "
        "shows the plan."
    )


def training_text(estimator: TrainingEstimator, plans: Sequence[TrainingPlan], speed: Speed) -> str:
    """The text that `wmpo estimate --training world-model` prints."""
    settings, flops = estimator.settings, estimator.flops()
    total = sum(flops.values())
    shares = ", ".join(f"{name} {value / total:.0%}" for name, value in flops.items() if value)
    lines = [
        f"{estimator.name}: {settings.steps:,} steps of {settings.batch_size} rows, frames of "
        f"{estimator.image_size} x {estimator.image_size}, {'bf16' if estimator.bf16 else 'fp32'}",
        "",
        *(
            f"  {name:<14}{count:>16,} parameters{format_size(FLOAT32 * count):>12}"
            for name, count in estimator.parameters.items()
            if count
        ),
        f"  one step: {format_flops(total)} ({shares})",
        f"  hours are estimates: {speed.utilisation:.0%} of {speed.peak_tflops:g} TFLOP/s per device, "
        "assumed and not measured",
    ]
    for plan in plans:
        machine = plan.machine
        lines += [
            "",
            f"{machine.name}: {format_size(machine.usable)} per device ({format_size(machine.memory)} less a "
            f"reserve of {RESERVE:.0%})",
        ]
        for row in plan.rows:
            parts = ", ".join(
                f"{name} {format_size(getattr(row, name))}"
                for name in ("weights", "gradients", "optimizer", "working")
            )
            verdict = "fits" if row.peak <= machine.usable else "too large"
            lines.append(
                f"  --micro-batch-size {row.micro_batch:<5}{format_size(row.peak):>12}  {verdict} ({parts})"
            )
        if plan.best is None:
            lines.append("  DOES NOT FIT; take a smaller network or larger devices.")
        lines.append(f"  estimated hours: {plan.hours:,.1f} for {settings.steps:,} steps")
    return "\n".join(lines)


def on_meta(component: Any) -> Any:
    """Copy a component to the ``meta`` device without copying its data."""
    module = component if isinstance(component, nn.Module) else getattr(component, "vae", None)
    memo: dict[int, Any] = {}
    if module is not None:
        for parameter in module.parameters():
            empty = torch.empty_like(parameter, device="meta")
            memo[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
        for buffer in module.buffers():
            memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(component, memo)


def _halved(rows: int) -> list[int]:
    """``rows``, halved repeatedly (rounded up) down to 1."""
    halves = itertools.accumulate(itertools.repeat(rows, rows.bit_length() + 1), lambda n, _: -(-n // 2))
    return sorted(set(halves), reverse=True)


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _tensors(module: nn.Module | None) -> list[Tensor]:
    """Parameters, gradients and buffers."""
    if module is None:
        return []
    parameters = list(module.parameters())
    return [*parameters, *(p.grad for p in parameters if p.grad is not None), *module.buffers()]
