"""Conversion of optimizer states to and from flat tensor dictionaries, for checkpoints in safetensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch


def pack_slots(optimizer: torch.optim.Optimizer, prefix: str) -> dict[str, torch.Tensor]:
    """The state tensors (moments) of an optimizer such as Adam, by name.

    Param groups are not included; their settings are stored elsewhere in the checkpoint.
    """
    slots = optimizer.state_dict()["state"]
    return {f"{prefix}{i}.{name}": v for i, slot in slots.items() for name, v in slot.items()}


def unpack_slots(optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor], prefix: str) -> None:
    """Restore the result of :func:`pack_slots` in place; tensors without the prefix are ignored."""
    slots: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith(prefix):
            index, name = key[len(prefix) :].split(".", 1)
            slots.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": slots})
