"""Device, precision and processes of a training."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from wmpo_gym.utils.device import Precision, check_precision, resolve_device

T = TypeVar("T")
SHARDING = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM")


@dataclass(frozen=True)
class ComputeSettings:
    """Device, precision and micro-batch size of a training; they affect the result only by rounding.

    Attributes:
        device: ``auto`` (a GPU if there is one), ``cpu``, ``cuda`` or ``cuda:<index>``.
        precision: ``fp32``, or ``bf16`` for bfloat16 autocast with float32 weights.
        micro_batch_size: Rows per forward and backward pass of a process, to limit memory; gradients are
            accumulated. None for the whole batch at once.
    """

    device: str = "auto"
    precision: Precision = "fp32"
    micro_batch_size: int | None = None

    def checked(self) -> ComputeSettings:
        """Copy with the resolved device and precision of this process.

        Raises:
            ValueError: If the device or precision is unavailable, if they contradict the configuration of
                ``accelerate``, or if there are fewer devices than processes.
        """
        if self.micro_batch_size is not None and self.micro_batch_size < 1:
            raise ValueError(f"micro_batch_size must be at least 1 row, got {self.micro_batch_size}.")
        device = resolve_device(self.device)
        precision = check_precision(self.precision, device)
        _check_launch(device, precision)
        return replace(self, device=str(device), precision=precision)


def process_count() -> int:
    """Number of processes of this training, over all machines."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1


def is_main_process() -> bool:
    """Whether this process writes what a command makes; the others only compute their share."""
    return process_count() == 1 or os.environ.get("RANK", "0") == "0"


def _check_launch(device: torch.device, precision: str) -> None:
    """Check that a launch by torchrun or ``accelerate launch`` fits this machine and the settings.

    Raises:
        ValueError: If it does not; the message names the setting and what to change.
    """
    if (mixed := os.environ.get("ACCELERATE_MIXED_PRECISION", "no")) not in ("no", ""):
        if mixed != precision:
            raise ValueError(
                f"accelerate is configured for mixed_precision {mixed!r} and the precision asked for is "
                f"{precision!r}; give --precision {mixed if mixed == 'bf16' else 'fp32'}, or set "
                "mixed_precision: no in accelerate's configuration."
            )
    if process_count() == 1:
        return
    if sharded := [name for name in SHARDING if os.environ.get(name, "false").lower() == "true"]:
        raise ValueError(
            f"This training keeps a whole copy of the network in every process; {sharded[0]} asks to shard "
            "it. Use distributed_type MULTI_GPU (or torchrun) instead."
        )
    local = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    if device.type == "cuda":
        if device.index is not None:
            raise ValueError(
                f"{local} processes on this machine cannot share the device {str(device)!r}; give --device "
                "cuda, which gives each process its own GPU."
            )
        count = torch.cuda.device_count()
        if local > count:
            raise ValueError(
                f"{local} processes were started on this machine, which has {count} GPU(s); start at most "
                f"{count} (--nproc-per-node, or num_processes in accelerate's configuration), or give "
                "--device cpu."
            )
    elif local > (count := os.cpu_count() or 1):
        raise ValueError(
            f"{local} processes were started on this machine, which has {count} CPU core(s); start at most "
            f"{count} (--nproc-per-node, or num_processes in accelerate's configuration)."
        )


class Runtime:
    """Device of this process and its slice of each batch in distributed training.

    All processes draw the same random numbers for the whole batch; each computes its own rows, and losses and
    gradients are summed. The number of processes therefore affects the result only by rounding. Methods
    marked *collective* are called by all processes in the same order.

    Args:
        compute: Device, precision and micro-batch size.

    Raises:
        ValueError: See :meth:`ComputeSettings.checked`.
    """

    def __init__(self, compute: ComputeSettings) -> None:
        compute = compute.checked()
        self.device, self.precision = torch.device(compute.device), compute.precision
        self.micro_batch_size = compute.micro_batch_size
        self.index, self.size = 0, 1
        if process_count() > 1:
            state = _join(cpu=self.device.type != "cuda")
            self.index, self.size = state.process_index, state.num_processes
            if self.device.type == "cuda":
                self.device = torch.device("cuda", state.local_process_index)
            if not state.is_main_process:
                logging.getLogger("wmpo_gym").setLevel(logging.ERROR)  # only the main process logs

    @property
    def is_main(self) -> bool:
        """Whether this process writes logs and files."""
        return self.index == 0

    def autocast(self) -> AbstractContextManager[Any]:
        """Autocast context for computing losses."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def to_device(self, batch: T) -> T:
        """Move a tensor, or a nested structure of tensors, to the device."""
        from accelerate.utils import send_to_device

        return send_to_device(batch, self.device)

    # -- rows ----------------------------------------------------------------------------------------------
    def local_rows(self, batch_size: int) -> slice:
        """Rows of a batch that this process computes.

        Raises:
            ValueError: If the batch cannot be divided evenly.
        """
        rows, left = divmod(batch_size, self.size)
        if left or not rows:
            raise ValueError(
                f"A batch of {batch_size} rows cannot be divided evenly among {self.size} processes; use a "
                f"batch_size that is a multiple of {self.size}, or another number of processes."
            )
        return slice(self.index * rows, (self.index + 1) * rows)

    def local(self, batch: T) -> T:
        """This process's rows of tensors whose first dimension is the whole batch."""
        if self.size == 1:
            return batch
        from accelerate.utils import find_batch_size, slice_tensors

        return slice_tensors(batch, self.local_rows(find_batch_size(batch)))

    def micro_batches(self, batch: T) -> Iterator[T]:
        """Split a batch into micro-batches along the first dimension."""
        if self.micro_batch_size is None:
            yield batch
            return
        from accelerate.utils import find_batch_size, slice_tensors

        for start in range(0, find_batch_size(batch), self.micro_batch_size):
            yield slice_tensors(batch, slice(start, start + self.micro_batch_size))

    # -- collective ----------------------------------------------------------------------------------------
    def gather(self, rows: Tensor) -> Tensor:
        """Rows of all processes, in the order of the whole batch; collective."""
        if self.size == 1:
            return rows
        from accelerate.utils import gather

        return gather(rows.contiguous())

    def sum(self, value: T) -> T:
        """Sum over the processes of a tensor, or of numbers in a dictionary; collective."""
        if self.size == 1:
            return value
        from accelerate.utils import reduce

        if isinstance(value, dict):
            totals = reduce(
                torch.tensor(list(value.values()), dtype=torch.float64, device=self.device), "sum"
            )
            return dict(zip(value, totals.tolist(), strict=True))  # type: ignore[return-value]
        return reduce(value, "sum")

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum ``.grad`` over the processes, in place; collective."""
        if self.size == 1:
            return
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.copy_(self.sum(parameter.grad))

    def on_main(self, function: Callable[[], T]) -> T:
        """Call a function in the main process only; all return its result or raise its error. Collective."""
        return function() if self.size == 1 else run_on_main(function, self.is_main)


def run_on_main(function: Callable[[], T], is_main: bool) -> T:
    """Call a function in the main one of several joined processes; all get its result or its error."""
    from accelerate.utils import broadcast_object_list

    outcome: list[Any] = [None, None]
    if is_main:
        try:
            outcome[0] = function()
        except Exception as error:
            outcome[1] = error
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def _join(cpu: bool) -> Any:
    """Accelerate's state of this process, which joins the process group.

    The state is shared by the whole Python process and fixed to the first kind of device, so it is reset for
    another one.
    """
    from accelerate.state import AcceleratorState, PartialState

    if PartialState._shared_state and PartialState._shared_state.get("_cpu") != cpu:
        AcceleratorState._reset_state(reset_partial_state=True)
    return PartialState(cpu=cpu)


@contextmanager
def private_random_state(device: torch.device) -> Iterator[None]:
    """Context manager that restores torch's global random state on exit."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
