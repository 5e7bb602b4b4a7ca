"""Interface of importers: episode headers, read first and without images, and frames per episode."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from wmpo_gym.data.images import resize_area
from wmpo_gym.data.importers.settings import DEFAULT_OPTIONS, SourceOptions
from wmpo_gym.utils.io import ArtifactError

BLOCK = 64  # images resized at once


class SourceError(ArtifactError):
    """The data as a whole cannot be imported; the message names the file and what to do."""


class EpisodeFault(ValueError):
    """One episode cannot be imported; the message says why. It is skipped, the others are not."""


@dataclass
class EpisodeHeader:
    """A recorded episode without its images.

    Attributes:
        key: Name of the episode in its source.
        actions: float64 (T, D) in the robot's units; action t follows frame t.
        n_frames: Number of recorded images.
        instruction: The instruction; None if not recorded.
        start: Key of the start scene, equal for episodes of a source with the same start.
        success: Recorded outcome of the episode; None if not recorded.
        flags: Success flag after each action, bool (T,); None if not recorded.
        meta: JSON-able metadata to keep.
        proprio: Proprioception, float32 (at least T + 1 rows, P); None if not recorded.
        notes: Notes for the user.
    """

    key: str
    actions: np.ndarray
    n_frames: int
    instruction: str | None
    start: str
    success: bool | None = None
    flags: np.ndarray | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    proprio: np.ndarray | None = None
    notes: list[str] = field(default_factory=list)

    def thin(self, stride: int) -> None:
        """Keep the image and action of every ``stride``-th step; success flags are merged over each stride.

        Args:
            stride: Recorded steps per retained step.
        """
        if stride == 1:
            return
        self.actions = self.actions[::stride]
        self.n_frames = -(-self.n_frames // stride)
        if self.flags is not None:
            self.flags = np.logical_or.reduceat(self.flags, np.arange(0, len(self.flags), stride))
        if self.proprio is not None:
            self.proprio = self.proprio[::stride]

    def cut(self) -> None:
        """Truncate the episode at its first success, and at the last action with a recorded next image.

        Raises:
            EpisodeFault: If no action has an image before and after it.
        """
        steps = min(len(self.actions), self.n_frames - 1)
        if self.flags is not None:
            self.success = bool(self.flags.any())
            if self.success:
                steps = min(steps, int(self.flags.argmax()) + 1)
        if steps < 1:
            raise EpisodeFault(f"{len(self.actions)} actions and {self.n_frames} pictures make no step")
        self.actions, self.n_frames = self.actions[:steps], steps + 1
        self.proprio = None if self.proprio is None else usable_states(self.proprio, steps + 1)


class Source(ABC):
    """Recorded episodes in an external format.

    Attributes:
        format: Name of the format.
        name: Name of the data set.
        control_hz: Control steps per second; None if not recorded.
    """

    format: str
    name: str
    control_hz: float | None

    @classmethod
    def refuse_options(cls, options: SourceOptions, allowed: tuple[str, ...]) -> None:
        """Refuse options that do not apply to this format.

        Raises:
            SourceError: If there is one; the message names it.
        """
        for name, default in asdict(DEFAULT_OPTIONS).items():
            if name not in allowed and getattr(options, name) != default:
                raise SourceError(
                    f"--{name.replace('_', '-')} has no meaning for {cls.format} data; leave it out."
                )

    @abstractmethod
    def keys(self) -> list[str]:
        """Names of the episodes in order."""

    @abstractmethod
    def header(self, key: str) -> EpisodeHeader:
        """Header of an episode.

        Raises:
            EpisodeFault: If it cannot be used.
        """

    @abstractmethod
    def frames(self, key: str, count: int, size: int) -> np.ndarray:
        """The episode's first ``count`` images, resized, uint8 (count, size, size, 3).

        Raises:
            EpisodeFault: If they are missing or damaged.
        """

    def damage(self) -> list[str]:
        """Damage that is not specific to one episode, for the report."""
        return []

    def close(self) -> None:
        """Close open files; by default there are none."""
        return None

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# Exceptions that readers raise on damaged data.
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
    """Convert exceptions that readers raise on damaged data to :class:`EpisodeFault`."""
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
    """Convert actions to float64 (T, D).

    Raises:
        EpisodeFault: If they are not finite numbers of that shape with at least one step.
    """
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

    Returns None unless there are ``count`` rows of finite numbers, since the state is optional.
    """
    values = np.asarray(values)
    if values.dtype.kind not in "fiub" or values.ndim != 2 or len(values) < count or not values.size:
        return None
    values = values[:count].astype(np.float32)
    return values if np.isfinite(values).all() else None


def zero_or_one(values: np.ndarray | None) -> np.ndarray | None:
    """Convert a column of zeros and ones to flags; None for any other, such as a dense reward."""
    if values is None or values.dtype.kind not in "fiub" or not np.isin(values, (0, 1)).all():
        return None
    return values.astype(bool)


def as_frames(images: np.ndarray, name: str, *, scale: float | None = None) -> np.ndarray:
    """Recorded images as uint8 (N, H, W, 3).

    Args:
        images: (N, H, W, C) or (N, C, H, W) with 1, 3 or 4 channels: uint8, or floats in [0, 1] or [0, 255].
        name: Name of the images, for the message.
        scale: Factor for float images; None infers it from these images.

    Raises:
        EpisodeFault: If the images have another type, shape or range.
    """
    given = f"{name} is {images.dtype} {images.shape}"
    if images.ndim != 4 or images.dtype.kind not in "uf" or images.dtype.itemsize == 2 or 0 in images.shape:
        raise EpisodeFault(f"{given}, not images uint8 or float (T, H, W, C)")
    if images.shape[-1] not in (1, 3, 4):
        if images.shape[1] not in (1, 3, 4):
            raise EpisodeFault(f"{given}; images have 1, 3 or 4 channels")
        images = np.moveaxis(images, 1, -1)
    if images.dtype.kind == "f":
        if not np.isfinite(images).all() or images.min() < 0 or images.max() > 255.5:
            raise EpisodeFault(f"{given} with values outside [0, 255]")
        scale = float_scale(images) if scale is None else scale
        images = np.clip(images * scale + 0.5, 0, 255)
    images = images[..., :3].astype(np.uint8)
    return np.repeat(images, 3, axis=-1) if images.shape[-1] == 1 else images


def float_scale(images: np.ndarray) -> float:
    """Factor that scales images to [0, 255]."""
    return 255.0 if images.dtype.kind == "f" and images.max() <= 1.0 else 1.0


def shrink(frames: Iterator[np.ndarray], count: int, size: int) -> np.ndarray:
    """Resize blocks of images (n, H, W, 3) and join them to uint8 (count, size, size, 3).

    Raises:
        EpisodeFault: If there are fewer than ``count`` images.
    """
    made = [resize_area(block, size, size) for block in frames]
    found = sum(map(len, made))
    if found < count:
        raise EpisodeFault(f"{found} of its {count} pictures are there")
    return np.concatenate(made)[:count]


def choose_camera(cameras: list[str], wanted: str | None, where: str) -> str:
    """The camera to use: the requested one, the only one, or the only ``agentview``.

    Args:
        cameras: Full names in the data.
        wanted: A full name, its part after the last dot, or either without ``_image`` or ``_rgb``.
        where: The data set, for the message.

    Raises:
        SourceError: If the camera is unknown or ambiguous; the message lists the cameras.
    """
    known = ", ".join(cameras) or "none"
    if wanted is not None:
        if wanted in cameras:
            return wanted
        found = [c for c in cameras if wanted in _short_names(c)]
        found = found or [c for c in cameras if wanted in c]
        if len(found) > 1:
            raise SourceError(
                f"{where}: camera {wanted!r} is ambiguous; it may be {', '.join(found)}. Give the whole name."
            )
        if not found:
            raise SourceError(f"{where} has no camera {wanted!r}; it has {known}.")
        return found[0]
    agentview = [c for c in cameras if "agentview" in c]
    for candidates in (cameras, agentview):
        if len(candidates) == 1:
            return candidates[0]
    raise SourceError(f"{where} has the cameras {known}; choose one with --camera.")


def _short_names(camera: str) -> set[str]:
    last = camera.rpartition(".")[2]
    return {last, *(name.removesuffix(end) for name in (camera, last) for end in ("_image", "_rgb"))}


def refuse_pointer(path: Path) -> None:
    """Refuse a git-LFS pointer in place of the file.

    Raises:
        EpisodeFault: If the file is one.
    """
    with open(path, "rb") as file:
        if file.read(len(_LFS)) == _LFS:
            raise EpisodeFault(f"{path.name} is a git-LFS pointer, not the file; run `git lfs pull` there")


_LFS = b"version https://git-lfs"
