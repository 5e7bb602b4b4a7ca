"""Distributed training of one policy: collective operations, and sharding with FSDP2.

Every *rank* is a process, usually with its own GPU, started by ``torchrun`` or ``accelerate launch``;
accelerate sets up the process group and the communication. Group g of a batch of rollouts belongs to rank
``g % size``. Random numbers equal those a single process with all rows would draw, global decisions (which
groups to keep, when to stop) use the data of all ranks, and gradients are summed. The number of ranks
therefore changes nothing but rounding.

A policy too large for one GPU is sharded over the ranks: weights, gradients and optimizer state. Sharding is
enabled as usual in accelerate: in the configuration file of ``accelerate launch``, or with
``ACCELERATE_USE_FSDP=true`` before ``torchrun``. Every forward pass is then collective: the ranks gather the
weights layer by layer. ``Accelerator.prepare`` is not used, because it shards on accelerators only (not on a
CPU, where it can be tested) and drops the moments of an optimizer that has already taken steps.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import numpy as np
import torch as th
from torch import nn

from wmpo_gym.training.runtime import run_on_main

T = TypeVar("T")
Rows = TypeVar("Rows", th.Tensor, np.ndarray)


class Ranks:
    """Process group of a training run, as seen by one rank; a single process is rank 0 of 1.

    Every method except :meth:`local_slice` and :meth:`rows_per_rank` is collective: all ranks must call it,
    in the same order.

    Args:
        index: Rank of this process, from 0.
        size: Number of processes.
        device: Device of tensors that are sent to other ranks.
    """

    def __init__(self, index: int = 0, size: int = 1, device: th.device | str = "cpu") -> None:
        self.index, self.size, self.device = index, size, th.device(device)

    @classmethod
    def join(cls, device: th.device | str = "auto") -> Ranks:
        """Join the process group this process was started in; may be called repeatedly.

        Args:
            device: Compute device of this process; ``"auto"`` uses one GPU per process if available.

        Raises:
            ImportError: If there are several processes and accelerate is missing.
            ValueError: If accelerate's configuration is for more processes than were started, or more
                processes were started on this machine than it has GPUs.
        """
        if "LOCAL_RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) < 2:
            _require_one_process()
            return cls()
        try:
            from accelerate import PartialState
        except ImportError as error:
            raise ImportError('Several processes need accelerate: pip install "wmpo-gym[train]"') from error
        on_cpu = not th.cuda.is_available() or str(device).startswith("cpu")
        n_here = int(os.environ.get("LOCAL_WORLD_SIZE") or int(os.environ["LOCAL_RANK"]) + 1)
        if not on_cpu and n_here > (n_gpus := th.cuda.device_count()):
            raise ValueError(
                f"{n_here} processes were started on this machine, which has {n_gpus} GPU(s), and each needs "
                f"its own. Start {n_gpus} (num_processes in the accelerate configuration, torchrun's "
                "--nproc-per-node), or compute on the CPU with --device cpu."
            )
        state = PartialState(cpu=on_cpu)
        if not state.is_main_process:
            logging.getLogger("wmpo_gym").setLevel(logging.ERROR)  # logged by the main process
        return cls(state.process_index, state.num_processes, state.device)

    @staticmethod
    def leave() -> None:
        """Destroy the process group at the end of a script; required by gloo, recommended for NCCL."""
        if th.distributed.is_initialized():
            from accelerate import PartialState

            state = PartialState()
            state.wait_for_everyone()
            state.destroy_process_group()
            # gloo's threads outlive the group. A thread that still holds tensors of the last message when the
            # interpreter exits aborts the process, so wait for it.
            time.sleep(0.5)

    @property
    def is_main(self) -> bool:
        """Whether this process writes logs and files."""
        return self.index == 0

    # ------------------------------------------------------------------ assignment of rows to ranks

    def rows_per_rank(self, n_rows: int, group_size: int) -> int:
        """Number of rows per rank, in whole groups, out of ``n_rows`` in total.

        Raises:
            ValueError: If the groups cannot be divided evenly.
        """
        groups, left = divmod(n_rows // group_size, self.size)
        if left:
            fitting = self.size * max(groups, 1)
            raise ValueError(
                f"{n_rows // group_size} groups cannot be dealt out evenly to {self.size} processes; take "
                f"n_groups={fitting} or {fitting + self.size}, or another number of processes."
            )
        return groups * group_size

    def local_slice(self, per_group: Rows) -> Rows:
        """This rank's entries of an array with one entry per group of all ranks."""
        return per_group[self.index :: self.size]

    # ------------------------------------------------------------------ collective operations

    def gather_rows(self, rows: th.Tensor, group_size: int) -> th.Tensor:
        """Gather rows ``(n, ...)`` of all ranks on the CPU as ``(size * n, ...)``, in global group order."""
        if self.size == 1:
            return rows
        from accelerate.utils import gather

        groups = gather(rows.to(self.device)).cpu().unflatten(0, (self.size, -1, group_size))
        return groups.transpose(0, 1).flatten(0, 2)

    def global_indices(self, mask: th.Tensor, group_size: int) -> tuple[th.Tensor, int]:
        """Indices of this rank's masked rows among the masked rows of all ranks.

        Args:
            mask: bool (n,).
            group_size: Rows per group.

        Returns:
            int64 with one entry per masked row of this rank, and the number of masked rows over all ranks.
        """
        everywhere = self.gather_rows(mask, group_size)
        index = (everywhere.cumsum(0) - 1).view(-1, group_size)
        return self.local_slice(index).flatten()[mask], int(everywhere.sum())

    def gather(self, value: T) -> list[T]:
        """Gather a small object from every rank, ordered by rank."""
        if self.size == 1:
            return [value]
        from accelerate.utils import gather_object

        return gather_object([value])

    def total(self, count: int) -> int:
        """Sum of a count over all ranks."""
        return sum(self.gather(count))

    def largest(self, value: Any) -> Any:
        """Maximum of a number over all ranks."""
        return max(self.gather(value))

    def add(self, numbers: dict[str, float]) -> dict[str, float]:
        """Sum named numbers over all ranks; names missing on a rank count as 0."""
        found = self.gather(numbers)
        names = dict.fromkeys(name for part in found for name in part)
        return {name: sum(part.get(name, 0.0) for part in found) for name in names}

    def on_main(self, function: Callable[[], T]) -> T:
        """Run a function on the main rank while the others wait; all ranks get its result or its error."""
        return function() if self.size == 1 else run_on_main(function, self.is_main)

    def broadcast(self, tensors: Iterable[th.Tensor]) -> None:
        """Broadcast the main rank's tensors, in place."""
        if self.size == 1:
            return
        from accelerate.utils import broadcast

        for tensor in tensors:
            tensor.detach().copy_(broadcast(tensor.detach().to(self.device).contiguous()))

    def sum_gradients(self, parameters: Iterable[th.Tensor]) -> None:
        """Sum ``.grad`` over all ranks, in place.

        A rank without rollouts has no gradients and adds zeros. If no rank has a gradient, None stays None,
        because optimizers treat None and zero differently. Sharded gradients are already summed and skipped.
        """
        parameters = [p for p in parameters if p.requires_grad and not is_sharded(p)]
        if self.size == 1 or not parameters:
            return
        from accelerate.utils import reduce

        has_gradient = th.tensor([p.grad is not None for p in parameters], dtype=th.int32, device=self.device)
        counts = reduce(has_gradient, "sum").tolist()
        for parameter in (p for p, n in zip(parameters, counts, strict=True) if n):
            if parameter.grad is None:
                parameter.grad = th.zeros_like(parameter)
            parameter.grad.copy_(reduce(parameter.grad.contiguous(), "sum"))


def _require_one_process() -> None:
    """Raise an error if ``accelerate launch --cpu`` started one process for a multi-process configuration."""
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ
    if launched and not {"WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"} & os.environ.keys():
        raise ValueError(
            "The accelerate configuration is for several processes, but one was started: accelerate launch "
            "does so on a CPU. Start them with torchrun --nproc-per-node N, or set num_processes to 1."
        )


# ---------------------------------------------------------------------- sharded weights


def sharding_enabled() -> bool:
    """Whether this process was launched with accelerate's FSDP enabled."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true")


def mixed_precision() -> str:
    """The ``mixed_precision`` of accelerate's configuration."""
    return os.environ.get("ACCELERATE_MIXED_PRECISION", "no")


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is a shard (a ``DTensor``)."""
    return hasattr(tensor, "full_tensor")


def full_tensor(tensor: Any) -> th.Tensor:
    """Gather a sharded tensor from all ranks (collective); other tensors are returned unchanged."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def full_state(state: Mapping[str, th.Tensor], ranks: Ranks) -> dict[str, th.Tensor]:
    """State dictionary of full tensors on the main rank, empty on the others (collective)."""
    found = {}
    for name, value in state.items():
        tensor = full_tensor(value)
        if ranks.is_main:
            found[name] = tensor.cpu() if is_sharded(value) else tensor
    return found


def shard_like(value: th.Tensor, like: Any) -> th.Tensor:
    """This rank's shard of a tensor that every rank holds in full, sharded like ``like``."""
    if not is_sharded(like) or value.shape != like.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    value = value.to(like.device, like.dtype)
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def shard_state(module: nn.Module, state: Mapping[str, th.Tensor]) -> dict[str, th.Tensor]:
    """Shard a state dictionary of full tensors like the module's."""
    now = module.state_dict()
    return {k: shard_like(v, now[k]) if k in now else v for k, v in state.items()}


def shard_optimizer_state(
    optimizer: th.optim.Optimizer, tensors: Mapping[str, th.Tensor]
) -> dict[str, th.Tensor]:
    """Shard the tensors of a packed optimizer state like its parameters."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return {k: shard_like(v, parameters[int(k.split(".", 1)[0])]) for k, v in tensors.items()}


def shard(policy: Any, ranks: Ranks) -> None:
    """Shard ``policy.network`` and its optimizer state over the ranks, in place.

    Every rank must hold the same weights. The layers wrapped individually are the model's
    ``_no_split_modules`` (transformers), or those the configuration names
    (``fsdp_transformer_layer_cls_to_wrap``).

    Args:
        policy: Policy that calls its module ``network`` for every decision and whose ``optimizer`` trains
            only that module.
        ranks: The process group.

    Raises:
        TypeError: If the policy trains weights outside ``network``.
        ValueError: If the weights have several dtypes, or the configuration uses an unsupported option.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    network: Any = getattr(policy, "network", None)
    trained = [p for group in policy.optimizer.param_groups for p in group["params"]]
    names = {p: n for n, p in network.named_parameters()} if isinstance(network, nn.Module) else {}
    if not all(p in names for p in trained):
        raise TypeError(
            f"FSDP shards `policy.network`, and {type(policy).__name__} trains weights outside of it; put "
            "them into one module of that name that is called for every decision, or train without FSDP."
        )
    if len(types := sorted({str(p.dtype) for p in network.parameters()})) > 1:
        raise ValueError(
            f"FSDP wants weights of one type, this policy has {', '.join(types)}: with adapters keep the "
            "frozen ones in float32 too, not quantised; accelerate's mixed_precision: bf16 computes in bf16."
        )
    layers, options = fsdp_options(network)
    options["mesh"] = init_device_mesh(ranks.device.type, (ranks.size,))
    for module in reversed(list(network.modules())):  # the inner ones first
        if type(module).__name__ in layers:
            fully_shard(module, **options)
    fully_shard(network, **options)
    sharded = dict(network.named_parameters())
    moments = {sharded[names[p]]: slots for p, slots in policy.optimizer.state.items()}
    policy.optimizer.state.clear()
    for parameter, slots in moments.items():
        policy.optimizer.state[parameter] = {k: shard_like(v, parameter) for k, v in slots.items()}
    for group in policy.optimizer.param_groups:
        group["params"] = [sharded[names[p]] for p in group["params"]]


def fsdp_options(network: nn.Module) -> tuple[set[str], dict[str, Any]]:
    """Layer classes to wrap and arguments of ``fully_shard``, from accelerate's configuration."""
    from accelerate import FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

    plugin = FullyShardedDataParallelPlugin(fsdp_version=int(os.environ.get("FSDP_VERSION", "2")))
    refused = {
        "fsdp_version: 1": plugin.fsdp_version != 2,
        "fsdp_offload_params": isinstance(plugin.cpu_offload, CPUOffloadPolicy),
        "fsdp_activation_checkpointing": plugin.activation_checkpointing,
        "fsdp_cpu_ram_efficient_loading": plugin.cpu_ram_efficient_loading,
    }
    if requested := [name for name, is_set in refused.items() if is_set]:
        raise ValueError(
            f"{', '.join(requested)} is not offered; take it out of the accelerate configuration."
        )
    precision = {"no": None, "bf16": th.bfloat16}
    if (name := mixed_precision()) not in precision:
        raise ValueError(f"mixed_precision {name!r} is not offered; choose {' or '.join(precision)}.")
    # Weights and moments stay float32, as published; only the forward and backward passes use bf16.
    dtypes = MixedPrecisionPolicy(param_dtype=precision[name], reduce_dtype=th.float32)
    named = plugin.transformer_cls_names_to_wrap
    if not named:
        named = [name for m in network.modules() for name in getattr(m, "_no_split_modules", None) or ()]
    return set(named), {"mp_policy": dtypes, "reshard_after_forward": plugin.reshard_after_forward}
