"""Action statistics: the physical values that correspond to the policy's -1 and +1."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wmpo_gym.convert.released import ACTION_BOUNDS, ReleasedTask
from wmpo_gym.policies.tokens import unnormalise_actions
from wmpo_gym.utils.io import ArtifactError, read_json


@dataclass(frozen=True)
class ActionStatistics:
    """Physical range of every number of an action.

    Attributes:
        low: Physical value of -1.
        high: Physical value of +1.
        mask: False where the policy's value is already physical (a gripper).
        key: Entry of the statistics file; None if it has only one.
    """

    low: tuple[float, ...]
    high: tuple[float, ...]
    mask: tuple[bool, ...]
    key: str | None = None

    def unnormalise(self, actions: Tensor) -> Tensor:
        """Policy actions ``(..., D)`` in [-1, 1] to physical ones; see :func:`unnormalise_actions`."""
        low, high = (torch.tensor(v, dtype=actions.dtype, device=actions.device) for v in self.bounds)
        return unnormalise_actions(actions, low, high, torch.tensor(self.mask, device=actions.device))

    @property
    def bounds(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """``low`` and ``high`` with -1 and +1 where the mask is False: a task's action limits."""
        low = tuple(v if m else -1.0 for v, m in zip(self.low, self.mask, strict=True))
        return low, tuple(v if m else 1.0 for v, m in zip(self.high, self.mask, strict=True))

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self)


def read_statistics(path: str | Path, task: ReleasedTask) -> ActionStatistics:
    """Read a ``dataset_statistics.json``, flat or with an entry per data set.

    Args:
        path: The file.
        task: Names the entry, the kind of bounds and the number of action dimensions.

    Raises:
        ArtifactError: If the file is of another task or action dimension, has no mask, or its numbers make
            no range.
    """
    key, entry = _entry(path, task)
    if "mask" not in entry:
        raise ArtifactError(
            f'{path} has no mask, so that nobody can tell which numbers are normalised: add "mask" with one '
            "true or false per action dimension (false for a gripper in [-1, 1])."
        )
    low_name, high_name = ACTION_BOUNDS[task.action_bounds.value]
    low = tuple(float(v) for v in _values(path, entry, low_name, task))
    high = tuple(float(v) for v in _values(path, entry, high_name, task))
    mask = tuple(_values(path, entry, "mask", task))
    for i, (a, b, scaled) in enumerate(zip(low, high, mask, strict=True)):
        if not (math.isfinite(a) and math.isfinite(b)) or (scaled and a >= b):
            raise ArtifactError(
                f"{path}: action dimension {i} ranges from {a} to {b}, which is no range; compute the "
                "statistics again, or set its mask to false."
            )
    return ActionStatistics(low, high, mask, key)


def _entry(path: str | Path, task: ReleasedTask) -> tuple[str | None, Mapping[str, Any]]:
    """The actions' statistics of the task, and their key if the file has keys."""
    content = read_json(path)
    if not isinstance(content, dict) or not content:
        raise ArtifactError(f"{path} does not hold the statistics of a data set.")
    if isinstance(content.get("action"), dict):
        return None, content["action"]
    wanted = task.statistics_key.value
    keys = [k for k in content if k in (wanted, f"{wanted}_no_noops")]
    keys = keys or [k for k in content if k.startswith(f"{task.release_name}_d")]
    entry = content[keys[0]] if len(keys) == 1 else None
    if not isinstance(entry, dict) or not isinstance(entry.get("action"), dict):
        raise ArtifactError(
            f"{path} holds the statistics of {', '.join(map(repr, content))}; task {task.name!r} needs those "
            f"of {wanted!r}. It belongs to a checkpoint of another task."
        )
    return keys[0], entry["action"]


def _values(path: str | Path, entry: Mapping[str, Any], name: str, task: ReleasedTask) -> list[Any]:
    """One list of the statistics, checked: booleans for the mask, numbers else."""
    values, kind = entry.get(name), bool if name == "mask" else (int, float)
    if not isinstance(values, list) or not all(isinstance(v, kind) for v in values):
        raise ArtifactError(
            f"{path}: {name} is {values!r}, expected a list with one entry per action dimension."
        )
    if len(values) != task.action_dim.value:
        raise ArtifactError(
            f"{path}: {name} has {len(values)} entries, task {task.name!r} has actions of "
            f"{task.action_dim.value} dimensions. It belongs to another robot or task."
        )
    return values
