"""What was evaluated, on which start states, with which versions: saved beside every result.

Two success rates can be compared only if they were measured alike. An :class:`EvalProtocol` makes that
checkable: :func:`load_result` compares the protocol of a saved result with the one expected now and warns
about every difference by name.
"""

from __future__ import annotations

import importlib.metadata
import platform
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from wmpo_gym.tasks import FORMER_FIELDS, Task, get_task
from wmpo_gym.utils.io import read_json, write_json_atomic

PACKAGES = (
    "wmpo-gym",
    "numpy",
    "torch",
    "gymnasium",
    "stable-baselines3",
    "transformers",
    "diffusers",
    "mujoco",
)


class ProtocolMismatchWarning(UserWarning):
    """A saved result was measured differently from what is compared with it."""


def installed_versions() -> dict[str, str]:
    """Versions of Python and of the packages that can change a result; absent ones are left out."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


@dataclass(frozen=True)
class EvalProtocol:
    """Everything that fixes an evaluation besides the policy.

    Attributes:
        task: The task definition as plain data (:meth:`Task.to_dict`), so that a changed tolerance shows.
        env_id: ``"WMPO-Simulated-v0"`` or ``"WMPO-Imagined-v0"``.
        split: Split the start states come from.
        start_state_ids: The start states in order, one episode each.
        seed: Root of the per-episode seeds and of the policy's sampling.
        deterministic: Whether the policy acts greedily.
        temperature: Sampling temperature; ignored by greedy policies.
        num_envs: Rows of a wave; a sampling policy draws for a whole wave at once.
        variant: Scene variant of the simulator.
        world: Name or fingerprint of the world model, None in the simulator.
        versions: Package versions (:func:`installed_versions`).
    """

    task: dict[str, Any]
    env_id: str
    split: str
    start_state_ids: tuple[int, ...]
    seed: int
    deterministic: bool
    temperature: float = 1.0
    num_envs: int = 64
    variant: str = "nominal"
    world: str | None = None
    versions: dict[str, str] = field(default_factory=installed_versions)

    @property
    def episodes(self) -> int:
        """Number of episodes, one per start state listed."""
        return len(self.start_state_ids)

    @classmethod
    def make(
        cls, task: str | Task, split: str, episodes: int, *, seed: int, deterministic: bool, **more: Any
    ) -> EvalProtocol:
        """Protocol over the first ``episodes`` start states of a split.

        Args:
            task: Task or its name.
            split: ``"train"``, ``"validation"`` or ``"test"``.
            episodes: Number of start states.
            seed: Root seed.
            deterministic: Greedy actions.
            **more: Other fields; ``env_id`` defaults to the simulated twin.

        Raises:
            ValueError: If the split holds fewer start states, so that some would count twice.
        """
        task = get_task(task)
        ids = task.split_ids(split)
        if not 0 < episodes <= len(ids):
            raise ValueError(
                f"{episodes} episodes asked of split {split!r}, which has {len(ids)} start states; "
                f"choose 1 to {len(ids)}."
            )
        return cls(
            task=task.to_dict(),
            split=split,
            start_state_ids=tuple(ids[:episodes]),
            seed=seed,
            deterministic=deterministic,
            **({"env_id": "WMPO-Simulated-v0"} | more),
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON form, with the episode count spelled out for readers."""
        return asdict(self) | {"start_state_ids": list(self.start_state_ids), "episodes": self.episodes}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> EvalProtocol:
        """Rebuild from :meth:`to_dict`, also after a trip through JSON.

        Raises:
            ValueError: If a field is missing or unknown.
        """
        values = {k: v for k, v in data.items() if k != "episodes"}
        try:
            values["start_state_ids"] = tuple(int(i) for i in values["start_state_ids"])
            values["task"] = {k: v for k, v in values["task"].items() if k not in FORMER_FIELDS}
            return cls(**values)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"This is not an evaluation protocol: {error}. Evaluate again to write a new one."
            ) from error

    def differences(self, other: EvalProtocol) -> list[str]:
        """One line per field that differs, e.g. ``"versions.torch: 2.12.0, expected 2.13.0"``.

        Args:
            other: The protocol that is expected.
        """
        mine, theirs = _flat(self.to_dict()), _flat(other.to_dict())
        return [
            f"{key}: {_short(mine.get(key, 'absent'))}, expected {_short(theirs.get(key, 'absent'))}"
            for key in sorted(mine.keys() | theirs.keys())
            if mine.get(key) != theirs.get(key)
        ]


def save_result(path: str | Path, result: Mapping[str, Any], protocol: EvalProtocol) -> None:
    """Write a result and, beside it, the protocol it was measured under.

    Args:
        path: The result's ``.json``; the protocol goes to ``<stem>.protocol.json`` in the same folder.
        result: JSON-able figures.
        protocol: How they were measured.
    """
    path = Path(path)
    # The protocol first: a result without its protocol never exists on disk.
    write_json_atomic(protocol_path(path), protocol.to_dict())
    write_json_atomic(path, dict(result))


def load_result(
    path: str | Path, expected: EvalProtocol | None = None
) -> tuple[dict[str, Any], EvalProtocol]:
    """Read a result with its protocol, and warn where it was measured differently.

    Args:
        path: The result's ``.json``.
        expected: The protocol to compare with; None compares with the versions installed now only.

    Returns:
        The figures and their protocol.
    """
    path = Path(path)
    result, protocol = read_json(path), EvalProtocol.from_dict(read_json(protocol_path(path)))
    if expected is None:
        expected = EvalProtocol(**{**asdict(protocol), "versions": installed_versions()})
    differences = protocol.differences(expected)
    if differences:
        warnings.warn(
            f"{path} was measured under another protocol, so it may not be comparable:\n  "
            + "\n  ".join(differences),
            ProtocolMismatchWarning,
            stacklevel=2,
        )
    return result, protocol


def protocol_path(result_path: str | Path) -> Path:
    """Where the protocol of a result file lies."""
    path = Path(result_path)
    return path.with_name(f"{path.stem}.protocol.json")


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mapping with dotted keys; tuples become lists, as JSON has no tuples."""
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = _listed(value)
    return flat


def _listed(value: Any) -> Any:
    """Tuples as lists at every depth."""
    if isinstance(value, Mapping):
        return {k: _listed(v) for k, v in value.items()}
    return [_listed(v) for v in value] if isinstance(value, (list, tuple)) else value


def _short(value: Any) -> str:
    """Text of a value that stays on one line."""
    text = repr(value)
    return text if len(text) <= 60 else text[:40] + f"… ({len(text)} characters)"
