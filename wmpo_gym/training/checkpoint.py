"""Training checkpoints in safetensors and JSON, written atomically."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wmpo_gym.utils.io import (
    ArtifactError,
    load_safetensors,
    mend_dir,
    plain,
    read_json,
    save_safetensors,
    write_dir_atomic,
    write_json_atomic,
)

FORMAT = 2  # format 1 had no number and differed between networks


@dataclass
class TrainingState:
    """State from which a training resumes exactly.

    Attributes:
        tensors: Tensors by dotted name.
        values: JSON-serialisable values.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)

    def add(self, prefix: str, tensors: Mapping[str, Tensor]) -> None:
        """Add tensors under names that begin with ``prefix`` and a dot."""
        self.tensors |= {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}

    def part(self, prefix: str) -> dict[str, Tensor]:
        """Tensors added under ``prefix``."""
        start = f"{prefix}."
        return {k[len(start) :]: v for k, v in self.tensors.items() if k.startswith(start)}


def save_checkpoint(
    directory: str | Path, component: str, settings: Mapping[str, Any], state: TrainingState
) -> None:
    """Write a checkpoint atomically, replacing an earlier one.

    Args:
        directory: Directory of the single checkpoint.
        component: Name of the trained component, for instance ``"world model"``.
        settings: Settings that must match on resuming, JSON-serialisable.
        state: The state.

    Raises:
        WriteError: If it cannot be written; an earlier checkpoint is untouched.
    """
    header = {"format": FORMAT, "component": component, "settings": settings}
    with write_dir_atomic(directory) as temporary:
        save_safetensors(temporary / "state.safetensors", state.tensors)
        write_json_atomic(temporary / "state.json", {**header, "values": state.values})


def load_checkpoint(
    directory: str | Path, component: str, settings: Mapping[str, Any]
) -> TrainingState | None:
    """Read a checkpoint; None if there is none.

    Args:
        directory: As given to :func:`save_checkpoint`.
        component: Name of the component to train.
        settings: Settings of the training.

    Raises:
        ValueError: If the checkpoint has another format or belongs to another component or other settings.
        ArtifactError: If it is damaged.
    """
    directory = Path(directory)
    if not (mend_dir(directory) / "state.json").exists():
        return None
    header = read_json(directory / "state.json")
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        found = header.get("format", 1) if isinstance(header, dict) else None
        raise ValueError(
            f"{directory} holds a checkpoint of format {found!r}, this release reads {FORMAT}. Finish that "
            "training with the release that began it, or choose another directory (or delete this one) and "
            "train from the start; finished worlds, classifiers and policies load unchanged."
        )
    if header["component"] != component:
        raise ValueError(
            f"{directory} holds a checkpoint of another component: {header['component']!r}, this training "
            f"is of {component!r}. Choose another directory."
        )
    if changed := _differences(header["settings"], plain(dict(settings))):
        raise ValueError(
            f"{directory} holds a training with other settings or data: {', '.join(changed)}. Finish it with "
            "the same ones or choose another directory."
        )
    if not isinstance(header.get("values"), dict):
        raise ArtifactError(f"{directory / 'state.json'} was edited: it has no values; train it again.")
    return TrainingState(load_safetensors(directory / "state.safetensors"), header["values"])


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Settings that differ, with both values."""
    names = {**now, **before}
    unset = "not set"
    return [
        f"{name} = {now.get(name, unset)!r} (was {before.get(name, unset)!r})"
        for name in names
        if now.get(name, unset) != before.get(name, unset)
    ]


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state as tensors and JSON."""
    packed = optimizer.state_dict()
    slots = {f"{i}.{name}": v for i, slot in packed["state"].items() for name, v in slot.items()}
    tensors = {k: v for k, v in slots.items() if isinstance(v, Tensor)}
    numbers = {k: v for k, v in slots.items() if k not in tensors}
    return tensors, {"slots": numbers, "param_groups": packed["param_groups"]}


def unpack_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], state: Mapping[str, Any]
) -> None:
    """Restore an optimizer in place from the result of :func:`pack_optimizer`."""
    slots: dict[int, dict[str, Any]] = {}
    for key, value in {**tensors, **state["slots"]}.items():
        index, name = key.split(".", 1)
        slots.setdefault(int(index), {})[name] = value
    groups = [
        {k: tuple(v) if isinstance(v, list) and k != "params" else v for k, v in group.items()}
        for group in state["param_groups"]
    ]
    optimizer.load_state_dict({"state": slots, "param_groups": groups})
