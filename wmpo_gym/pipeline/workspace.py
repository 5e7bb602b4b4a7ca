"""Directory of a run: artefacts of the stages, device, precision and wall-clock times."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wmpo_gym.training.runtime import ComputeSettings
from wmpo_gym.utils.config import keep_settings
from wmpo_gym.utils.device import Precision, check_precision, resolve_device
from wmpo_gym.utils.io import read_json, write_json_atomic
from wmpo_gym.utils.progress import progress_bar

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Workspace:
    """The directory of a run with its device and precision; data and models are passed separately.

    Attributes:
        directory: Directory of the artefacts.
        root: Directory of the whole run, of which ``directory`` may be one round.
        device: Device for training and evaluation.
        precision: ``"fp32"``, or ``"bf16"`` for bfloat16 autocast.
        progress: Whether to print headings, progress bars and tables.
    """

    directory: Path
    root: Path
    device: torch.device
    precision: Precision = "fp32"
    progress: bool = True

    @classmethod
    def open(
        cls,
        directory: str | Path,
        settings: dict[str, Any],
        *,
        device: str | torch.device = "auto",
        precision: str = "fp32",
        progress: bool = True,
    ) -> Workspace:
        """Start a run in a directory, or resume an interrupted one.

        Args:
            directory: The directory.
            settings: JSON-able settings that determine the artefacts; written to ``recipe.json``.
            device: See :func:`~wmpo_gym.utils.device.resolve_device`.
            precision: See :func:`~wmpo_gym.utils.device.check_precision`.
            progress: Whether to print headings, progress bars and tables.

        Raises:
            ValueError: If the device does not exist or lacks the precision, or if the directory holds a run
                with other settings.
        """
        found = resolve_device(device)
        checked = check_precision(precision, found)
        directory = Path(directory)
        keep_settings(directory / "recipe.json", settings)
        return cls(directory, directory, found, checked, progress)

    @property
    def compute(self) -> ComputeSettings:
        """Device and precision of a training."""
        return ComputeSettings(str(self.device), self.precision)

    def round(self, number: int) -> Workspace:
        """The subdirectory of a round, counted from 1; durations are added to those of the whole run."""
        return replace(self, directory=self.root / f"round-{number}")

    @property
    def seconds(self) -> dict[str, float]:
        """Wall-clock seconds spent in every stage so far, over all rounds and restarts."""
        file = self.root / "seconds.json"
        return read_json(file) if file.exists() else {}

    @contextmanager
    def stage(self, name: str, heading: str) -> Iterator[None]:
        """Print a heading and add the duration of the block to :attr:`seconds`, even if it is interrupted."""
        self.show(f"\n── {heading}")
        started = time.perf_counter()
        try:
            yield
        finally:
            seconds = self.seconds
            seconds[name] = round(seconds.get(name, 0.0) + time.perf_counter() - started, 1)
            write_json_atomic(self.root / "seconds.json", seconds)

    def show(self, text: str) -> None:
        """Print a line, if progress is shown."""
        if self.progress:
            print(text, flush=True)

    def bar(self, total: int, name: str) -> Any:
        """A progress bar."""
        return progress_bar(total=total, desc=name, disable=not self.progress)
