"""Several processes that train one policy: what each of them does, and what they tell one another.

Every *rank* is a process, as a rule with a GPU of its own, started by ``torchrun`` or ``accelerate launch``.
The groups of a wave are dealt out like cards: group g of all ranks together belongs to rank ``g % size``.
Random numbers are those that one process with all the rows would have drawn, decisions (which groups are
kept, when to stop) are made from what all ranks saw, and gradients are summed; so the number of ranks changes
rounding and nothing else.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import numpy as np
import torch as th
import torch.distributed as dist

T = TypeVar("T")
Rows = TypeVar("Rows", th.Tensor, np.ndarray)


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is this rank's part of a larger one."""
    return hasattr(tensor, "full_tensor")


class Ranks:
    """This process among those that train together; by itself it is all there is.

    Every method but :meth:`own` and :meth:`share` is a meeting: all ranks call it, in the same order.

    Args:
        index: Number of this process, from 0.
        size: Number of processes.
        device: What messages between them must lie on.
    """

    def __init__(self, index: int = 0, size: int = 1, device: th.device | str = "cpu") -> None:
        self.index, self.size, self.device = index, size, th.device(device)

    @classmethod
    def join(cls, device: th.device | str = "auto") -> Ranks:
        """The ranks that this process was started with; may be called again and again.

        Args:
            device: Where this process computes; ``"auto"`` is an own GPU where there are any.

        Raises:
            ImportError: If there are several processes and accelerate is missing.
        """
        if "LOCAL_RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) < 2:
            return cls()
        try:
            from accelerate import PartialState
        except ImportError as error:
            raise ImportError('Several processes need accelerate: pip install "wmpo-gym[train]"') from error
        state = PartialState(cpu=not th.cuda.is_available() or str(device).startswith("cpu"))
        if not state.is_main_process:
            logging.getLogger("wmpo_gym").setLevel(logging.ERROR)  # the main one has said it
        return cls(state.process_index, state.num_processes, state.device)

    @staticmethod
    def leave() -> None:
        """Say goodbye at the end of a script, as NCCL wants it and gloo needs it."""
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()
            # gloo's threads outlive the group. One that has not yet let go of the last message's tensors when
            # the interpreter ends aborts the process, so they are given the time.
            time.sleep(0.5)

    @property
    def is_main(self) -> bool:
        """Whether this process writes logs and files."""
        return self.index == 0

    # ------------------------------------------------------------------ who does what

    def share(self, n_rows: int, group_size: int) -> int:
        """How many of ``n_rows`` rows fall to each rank, in whole groups.

        Raises:
            ValueError: If the groups cannot be dealt out evenly.
        """
        groups, left = divmod(n_rows // group_size, self.size)
        if left:
            fitting = self.size * max(groups, 1)
            raise ValueError(
                f"{n_rows // group_size} groups cannot be dealt out evenly to {self.size} processes; take "
                f"n_groups={fitting} or {fitting + self.size}, or another number of processes."
            )
        return groups * group_size

    def own(self, per_group: Rows) -> Rows:
        """The entries of this rank's groups, of an array with one entry per group of all ranks."""
        return per_group[self.index :: self.size]

    # ------------------------------------------------------------------ meetings

    def merge(self, rows: th.Tensor, group_size: int) -> th.Tensor:
        """Rows ``(n, ...)`` of all ranks on the CPU, ``(size * n, ...)``, in the order of all groups."""
        if self.size == 1:
            return rows
        mine = rows.to(self.device)
        parts = [th.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(parts, mine)
        groups = th.stack(parts).cpu().unflatten(1, (-1, group_size))
        return groups.transpose(0, 1).flatten(0, 2)

    def places(self, mask: th.Tensor, group_size: int) -> tuple[th.Tensor, int]:
        """Where this rank's marked rows stand among the marked rows of all ranks.

        Args:
            mask: bool (n,).
            group_size: Rows per group.

        Returns:
            int64 with one entry per marked row, and the number of marked rows of all ranks.
        """
        everywhere = self.merge(mask, group_size)
        place = (everywhere.cumsum(0) - 1).view(-1, group_size)
        return self.own(place).flatten()[mask], int(everywhere.sum())

    def gather(self, value: T) -> list[T]:
        """The small objects of all ranks, by rank."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def total(self, count: int) -> int:
        """Sum of a count over all ranks."""
        return sum(self.gather(count))

    def largest(self, value: Any) -> Any:
        """Largest of a number over all ranks."""
        return max(self.gather(value))

    def add(self, numbers: dict[str, float]) -> dict[str, float]:
        """Sums over all ranks of numbers by name; a rank may lack some."""
        found = self.gather(numbers)
        names = dict.fromkeys(name for part in found for name in part)
        return {name: sum(part.get(name, 0.0) for part in found) for name in names}

    def on_main(self, function: Callable[[], T]) -> T:
        """Run something on the main rank while the others wait; all get its result, or its error."""
        if self.size == 1:
            return function()
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = function()
            except Exception as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def copy_main(self, tensors: Iterable[th.Tensor]) -> None:
        """Overwrite tensors with those of the main rank, in place."""
        if self.size == 1:
            return
        for tensor in tensors:
            message = tensor.detach().to(self.device).contiguous()
            dist.broadcast(message, src=0)
            tensor.detach().copy_(message)

    def sum_gradients(self, parameters: Iterable[th.Tensor]) -> None:
        """Sum ``.grad`` over all ranks, in place.

        A rank without rollouts has no gradients and adds zeros; where no rank has one, None stays None, which
        an optimizer treats otherwise than zero. Sharded gradients have been summed by then and are left.
        """
        parameters = [p for p in parameters if p.requires_grad and not is_sharded(p)]
        if self.size == 1 or not parameters:
            return
        some = th.tensor([p.grad is not None for p in parameters], dtype=th.int32, device=self.device)
        dist.all_reduce(some)
        for parameter in (p for p, n in zip(parameters, some.tolist(), strict=True) if n):
            if parameter.grad is None:
                parameter.grad = th.zeros_like(parameter)
            message = parameter.grad.contiguous()
            dist.all_reduce(message)
            parameter.grad.copy_(message)
