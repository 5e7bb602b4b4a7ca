"""An optimizer's state as safetensors and JSON can hold it, for checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """An optimizer's state as tensors and JSON."""
    packed = optimizer.state_dict()
    slots = {f"{i}.{name}": v for i, slot in packed["state"].items() for name, v in slot.items()}
    tensors = {k: v for k, v in slots.items() if isinstance(v, torch.Tensor)}
    numbers = {k: v for k, v in slots.items() if k not in tensors}
    return tensors, {"slots": numbers, "param_groups": packed["param_groups"]}


def unpack_optimizer(
    optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor], state: Mapping[str, Any]
) -> None:
    """Put :func:`pack_optimizer`'s result back, in place."""
    slots: dict[int, dict[str, Any]] = {}
    for key, value in {**tensors, **state["slots"]}.items():
        index, name = key.split(".", 1)
        slots.setdefault(int(index), {})[name] = value
    groups = [
        {k: tuple(v) if isinstance(v, list) and k != "params" else v for k, v in group.items()}
        for group in state["param_groups"]
    ]
    optimizer.load_state_dict({"state": slots, "param_groups": groups})


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
