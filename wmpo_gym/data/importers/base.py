"""What an importer offers, whatever the format: episodes one by one, cheap descriptions before pictures."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np

from wmpo_gym.data.images import resize_area
from wmpo_gym.utils.io import ArtifactError

BLOCK = 64  # pictures resized at once


class SourceError(ArtifactError):
    """The data as a whole cannot be imported; the message names the file and what to do."""


class EpisodeFault(ValueError):
    """One episode cannot be imported; the message says why. It is skipped, the others are not."""


@dataclass
class Outline:
    """An episode without its pictures.

    Attributes:
        key: Name in its source.
        actions: float64 (T, D) in the robot's units, cut at the episode's end; T + 1 pictures belong to them.
        success: Outcome, None if the source does not say.
        instruction: The sentence, None if the source does not say.
        start: Episodes of one source with an equal ``start`` began in the same scene.
        meta: Anything else worth keeping, JSON-able.
        proprio: The robot's own state, float32 (T + 1, P); None if not known at every picture.
    """

    key: str
    actions: np.ndarray
    success: bool | None
    instruction: str | None
    start: str
    meta: dict[str, Any] = field(default_factory=dict)
    proprio: np.ndarray | None = None


class Source(ABC):
    """Recorded episodes in a format of others.

    Attributes:
        format: Name of the format.
        name: Name of the data set.
        control_hz: Control steps per second, None if the source does not say.
    """

    format: str
    name: str
    control_hz: float | None

    @abstractmethod
    def keys(self) -> list[str]:
        """Names of the episodes in order."""

    @abstractmethod
    def outline(self, key: str) -> Outline:
        """An episode without its pictures.

        Raises:
            EpisodeFault: If it cannot be used.
        """

    @abstractmethod
    def frames(self, key: str, count: int, size: int) -> np.ndarray:
        """The episode's first ``count`` pictures, uint8 (count, size, size, 3).

        Raises:
            EpisodeFault: If they are missing or damaged.
        """

    def damage(self) -> list[str]:
        """What is broken beside single episodes, for the report."""
        return []

    def close(self) -> None:
        """Let go of files; nothing is to be done where none stays open."""
        return None

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# What readers of damaged data raise.
_COMPLAINTS = (
    OSError,
    RuntimeError,
    LookupError,
    ValueError,
    TypeError,
    ArithmeticError,
    AttributeError,
    MemoryError,
)


@contextmanager
def faults() -> Iterator[None]:
    """Turn whatever damaged data makes a reader raise into an :class:`EpisodeFault`."""
    try:
        yield
    except (EpisodeFault, SourceError):
        raise
    except _COMPLAINTS as error:
        raise EpisodeFault(
            f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        ) from error


def needs(module: str, extra: str = "data") -> ModuleType:
    """Import an optional library.

    Raises:
        ImportError: If it is missing; the message holds the pip line.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"This format needs {module.partition('.')[0]}: pip install 'wmpo-gym[{extra}]'"
        ) from error


def check_actions(actions: Any) -> np.ndarray:
    """Actions as float64 (T, D) with at least one step, or an :class:`EpisodeFault`."""
    actions = np.asarray(actions)
    if actions.dtype.kind not in "fiu" or actions.ndim != 2 or 0 in actions.shape:
        raise EpisodeFault(f"its actions are {actions.dtype} {actions.shape}, not numbers (T, D)")
    actions = actions.astype(np.float64)
    if not np.isfinite(actions).all():
        step, dim = np.argwhere(~np.isfinite(actions))[0]
        raise EpisodeFault(f"its action is {actions[step, dim]} at step {step}, dimension {dim}")
    return actions


def usable_states(values: Any, count: int) -> np.ndarray | None:
    """The first ``count`` rows of a recorded state as float32 (count, P).

    An episode can do without its state, so that whatever is not ``count`` rows of finite numbers is None.
    """
    values = np.asarray(values)
    if values.dtype.kind not in "fiub" or values.ndim != 2 or len(values) < count or not values.size:
        return None
    values = values[:count].astype(np.float32)
    return values if np.isfinite(values).all() else None


def outcome(flags: np.ndarray | None, n_frames: int, n_actions: int) -> tuple[bool | None, int]:
    """Outcome of an episode and the number of its actions that count.

    An episode ends at its first success, and an action counts only if the picture after it was recorded.

    Args:
        flags: Per action, whether the task was done after it; None if that was not recorded.
        n_frames: Pictures there are.
        n_actions: Actions there are.

    Raises:
        EpisodeFault: If no action has a picture before and after it.
    """
    steps = min(n_actions, n_frames - 1)
    success = None if flags is None else bool(flags.any())
    if flags is not None and success:
        steps = min(steps, int(flags.argmax()) + 1)
    if steps < 1:
        raise EpisodeFault(f"{n_actions} actions and {n_frames} pictures make no step")
    return success, steps


def zero_or_one(values: np.ndarray | None) -> np.ndarray | None:
    """Flags from a column of zeros and ones; None from any other, such as a dense reward."""
    if values is None or values.dtype.kind not in "fiub" or not np.isin(values, (0, 1)).all():
        return None
    return values.astype(bool)


def shrink(frames: Iterator[np.ndarray], count: int, size: int) -> np.ndarray:
    """Blocks of pictures (n, H, W, 3) as one array uint8 (count, size, size, 3).

    Raises:
        EpisodeFault: If there are fewer.
    """
    made = [resize_area(block, size, size) for block in frames]
    found = sum(map(len, made))
    if found < count:
        raise EpisodeFault(f"{found} of its {count} pictures are there")
    return np.concatenate(made)[:count]


def choose_camera(cameras: list[str], wanted: str | None, where: str) -> str:
    """The camera to use: the one asked for, the only one, or the only ``agentview``.

    Raises:
        SourceError: If that does not decide; the message lists the cameras.
    """
    known = ", ".join(cameras) or "none"
    if wanted is not None:
        found = [c for c in cameras if wanted in (c, c.rpartition(".")[2], c.removesuffix("_image"))]
        if len(found) != 1:
            raise SourceError(f"{where} has no camera {wanted!r}; it has {known}.")
        return found[0]
    agentview = [c for c in cameras if "agentview" in c]
    for candidates in (cameras, agentview):
        if len(candidates) == 1:
            return candidates[0]
    raise SourceError(f"{where} has the cameras {known}; choose one with --camera.")
