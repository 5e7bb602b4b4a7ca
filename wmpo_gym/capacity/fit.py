"""Memory check of a run on a machine, and selection of memory-saving options that make it fit."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from wmpo_gym.capacity.estimate import FLOAT32, GIB, RESERVE, Estimator, Footprint, Option, options
from wmpo_gym.capacity.workload import Workload
from wmpo_gym.utils.memory import available_memory
from wmpo_gym.utils.progress import progress_bar

UNKNOWN = 2**60  # bytes assumed if the free memory is unknown; every run then fits


class TooLittleMemoryError(ValueError):
    """A run does not fit into memory; the message names options that would."""


@dataclass(frozen=True)
class Machine:
    """Devices that share the groups of a run.

    Attributes:
        name: Display name.
        ranks: Number of devices.
        memory: Memory of one device in bytes.
        gpu: Whether the devices are GPUs.
    """

    name: str
    ranks: int
    memory: int
    gpu: bool = True

    @classmethod
    def parse(cls, text: str) -> Machine:
        """Parse ``"1x80"`` (one GPU of 80 GB), ``"4x8x80"`` (four machines of eight) or ``"here"``.

        Raises:
            ValueError: If the text has another form.
        """
        if text == "here":
            device = "cuda" if torch.cuda.is_available() else "cpu"
            return cls.here(device)
        if not re.fullmatch(r"[1-9]\d*x([1-9]\d*x)?[1-9]\d*", text):
            raise ValueError(
                f"No machine {text!r}; give the number of GPUs and the memory of one in GB like 1x80, with "
                "several machines like 4x8x80, or 'here'."
            )
        *counts, memory = (int(number) for number in text.split("x"))
        ranks = counts[0] * (counts[1] if len(counts) > 1 else 1)
        return cls(f"{' x '.join(map(str, counts))} x {memory} GB", ranks, memory * GIB)

    @classmethod
    def here(cls, device: str) -> Machine:
        """A device of this machine, with its currently free memory."""
        free = available_memory(device) or UNKNOWN
        if torch.device(device).type == "cuda":
            return cls(f"{torch.cuda.get_device_name(device)} here", 1, free)
        return cls("CPU here", 1, free, gpu=False)

    @property
    def usable(self) -> int:
        """Memory of a device without the reserve, in bytes."""
        return int(self.memory * (1 - RESERVE))


@dataclass(frozen=True)
class Row:
    """One memory option evaluated on a machine.

    Attributes:
        option: The option.
        footprint: Memory of one device; without activations if the option does not fit in any case.
        fits: Whether it fits into the device's memory.
    """

    option: Option
    footprint: Footprint
    fits: bool


@dataclass(frozen=True)
class Plan:
    """Memory plan of a workload on a machine.

    Attributes:
        machine: The machine.
        rows: Evaluated options, in order of preference.
        best: First option that fits; None if none does.
        flops: Operations per iteration with the best option (or the last one), by purpose.
        host_bytes: Host memory of one device's rollouts.
    """

    machine: Machine
    rows: list[Row]
    best: Option | None
    flops: dict[str, float]
    host_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {
            "machine": asdict(self.machine),
            "options": [
                {"flags": row.option.flags(), "fits": row.fits, **asdict(row.footprint)} for row in self.rows
            ],
            "best": self.best.flags() if self.best else None,
            "flops_per_iteration": self.flops,
            "host_bytes": self.host_bytes,
        }


def make_plan(estimator: Estimator, machine: Machine, wanted: Sequence[Option] | None = None) -> Plan:
    """Evaluate memory options of a workload on a machine.

    Args:
        estimator: Estimator of the workload.
        machine: The machine.
        wanted: Options to evaluate; None evaluates all.
    """
    choices = options(estimator.workload, machine.ranks, machine.gpu) if wanted is None else wanted
    candidates = list(choices)
    rows = []
    for option in progress_bar(candidates, desc=machine.name, unit="option"):
        footprint = estimator.footprint(option, machine.ranks, machine.usable)
        rows.append(Row(option, footprint, footprint.peak <= machine.usable))
    best = next((row.option for row in rows if row.fits), None)
    flops = estimator.flops(best or candidates[-1], machine.ranks)
    return Plan(machine, rows, best, flops, estimator.host_bytes(machine.ranks))


def require_room(workload: Workload, option: Option, device: str, ranks: int = 1) -> None:
    """Check, before anything is loaded, that a device has enough memory for a run.

    Args:
        workload: The run.
        option: Memory option of the run.
        device: Device of the run.
        ranks: Processes that share the groups, each with its own device; on a CPU they share its memory.

    Raises:
        TooLittleMemoryError: If the run does not fit.
    """
    if torch.device(device).type not in ("cpu", "cuda"):
        return
    machine, estimator = Machine.here(device), Estimator(workload)
    machine = replace(machine, ranks=ranks, memory=machine.memory // (1 if machine.gpu else ranks))
    if not machine.gpu:  # half precision is not supported on a CPU
        option = replace(option, memory=replace(option.memory, precision="fp32", four_bit=False))
    try:
        footprint = estimator.footprint(option, ranks, machine.usable)
    except RuntimeError as error:  # an operation that the meta device does not support
        warnings.warn(f"The memory of {workload.name} could not be counted: {error}", stacklevel=2)
        return
    if footprint.peak <= machine.usable:
        return
    best = make_plan(estimator, machine).best
    advice = "No option alone makes it fit" if best is None else f"It would fit with {best.flags()}"
    raise TooLittleMemoryError(
        f"{workload.name} takes {format_size(footprint.imagining)} while imagining and "
        f"{format_size(footprint.updating)} while updating; {machine.name} has "
        f"{format_size(machine.usable)}. {advice}; a smaller --micro-batch, fewer --rows-at-once or fewer "
        "groups take less too. `wmpo estimate` shows the plan."
    )


# -- text output ---------------------------------------------------------------------------------------------
def plan_text(estimator: Estimator, plans: Sequence[Plan]) -> str:
    """The text that `wmpo estimate` prints."""
    work, counts = estimator.workload, estimator.parameters
    lines = [
        f"{work.name}: {work.n_groups} groups x {work.group_size} rollouts x {work.n_chunks} decisions, "
        f"frames of {work.image_size} x {work.image_size}, micro-batches of {work.micro_batch} decisions",
        "",
        f"  {'':<14}{'parameters':>16}{'float32':>12}",
    ]
    for name, count in counts.items():
        if not count:
            continue
        lines.append(f"  {name:<14}{count:>16,}{format_size(FLOAT32 * count):>12}")
    for plan in plans:
        lines += ["", *_plan_lines(estimator, plan)]
    return "\n".join(lines)


def _plan_lines(estimator: Estimator, plan: Plan) -> list[str]:
    machine = plan.machine
    width = max(len(row.option.flags()) for row in plan.rows) + 2
    lines = [
        f"{machine.name}: {format_size(machine.usable)} per device ({format_size(machine.memory)} less a "
        f"reserve of {RESERVE:.0%})",
        f"  {'':<{width}}{'imagining':>12}{'updating':>12}",
    ]
    for row in plan.rows:
        sizes = [format_size(row.footprint.imagining), format_size(row.footprint.updating)]
        if "activations" not in row.footprint.parts:
            sizes = [f"> {size}" for size in sizes]
        verdict = "fits" if row.fits else "too large"
        lines.append(f"  {row.option.flags():<{width}}{sizes[0]:>12}{sizes[1]:>12}  {verdict}")
    shown = next((row for row in plan.rows if row.option == plan.best), plan.rows[-1])
    if plan.best is None:
        lines.append("  DOES NOT FIT; take smaller micro-batches, fewer groups or larger devices.")
    else:
        lines.append(f"  take: {plan.best.flags()}")
    parts = ", ".join(f"{name} {format_size(size)}" for name, size in shown.footprint.parts.items())
    size = estimator.policy_size(shown.option.memory)
    total = sum(plan.flops.values())
    flops = ", ".join(f"{name} {value / total:.0%}" for name, value in plan.flops.items() if value)
    return [
        *lines,
        f"  memory: {parts}",
        f"  trained: {size.trained:,} parameters, {format_size(FLOAT32 * size.trained)} to save",
        f"  one iteration without extra batches, at most: {format_flops(total)} ({flops})",
        f"  rollouts in host memory: {format_size(plan.host_bytes)} per device",
    ]


def format_size(n_bytes: float) -> str:
    """Bytes in GiB or MiB."""
    return f"{n_bytes / GIB:.1f} GiB" if n_bytes >= GIB else f"{n_bytes / 2**20:.1f} MiB"


def format_flops(n: float) -> str:
    """Floating-point operations with a unit."""
    for factor, unit in ((1e18, "EFLOP"), (1e15, "PFLOP"), (1e12, "TFLOP")):
        if n >= factor:
            return f"{n / factor:.2f} {unit}"
    return f"{n / 1e9:.2f} GFLOP"
