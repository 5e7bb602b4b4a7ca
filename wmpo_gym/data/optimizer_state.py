"""An optimizer's state as safetensors and JSON can hold it, for checkpoints."""

from __future__ import annotations

from collections.abc import Mapping

import torch


def pack_slots(optimizer: torch.optim.Optimizer, prefix: str) -> dict[str, torch.Tensor]:
    """Only the moments of an optimizer that holds nothing but tensors (Adam and its kin).

    For trainings whose settings stand elsewhere in the checkpoint.
    """
    slots = optimizer.state_dict()["state"]
    return {f"{prefix}{i}.{name}": v for i, slot in slots.items() for name, v in slot.items()}


def unpack_slots(optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor], prefix: str) -> None:
    """Put :func:`pack_slots`' result back, in place; tensors of other names are left alone."""
    slots: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith(prefix):
            index, name = key[len(prefix) :].split(".", 1)
            slots.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": slots})
