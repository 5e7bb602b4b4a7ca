"""Base class of the success classifiers: windows, streaming scores, threshold, calibration and files."""

from __future__ import annotations

import abc
import importlib
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from wmpo_gym.reward.data import check_window_fits, first_success
from wmpo_gym.utils.io import (
    ArtifactError,
    load_safetensors,
    read_json,
    save_safetensors,
    write_dir_atomic,
    write_json_atomic,
)
from wmpo_gym.utils.rows import TensorRows

FORMAT_VERSION = 1
FRAMES_PER_UPDATE = 32  # for recorded episodes; limits memory for large images
KINDS = {
    "conv": ("wmpo_gym.reward.conv", "ConvSuccessClassifier"),
    "videomae": ("wmpo_gym.reward.videomae", "VideoMAESuccessClassifier"),
}


@dataclass(frozen=True)
class Calibration:
    """A threshold and its quality on ``n`` episodes.

    Attributes:
        threshold: Minimum probability of a window that counts as success.
        precision: Fraction of claimed successes that are true; NaN without claims.
        recall: Fraction of true successes that are claimed.
        f1: Harmonic mean of the two.
        n: Number of calibration episodes.
        n_success: True successes among them.
        precision_ci95: 95 % Wilson interval of the precision.
        recall_ci95: 95 % Wilson interval of the recall.
        plateau: Scores below and above the threshold; any threshold between them gives the same claims.
        finish_error: Median of claimed minus true finish step over true positives; NaN without any.
    """

    threshold: float
    precision: float
    recall: float
    f1: float
    n: int
    n_success: int
    precision_ci95: tuple[float, float]
    recall_ci95: tuple[float, float]
    plateau: tuple[float, float]
    finish_error: float = math.nan

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable form; non-finite numbers become None."""
        values = asdict(self)
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Calibration:
        """Rebuild from :meth:`to_dict`, also from JSON.

        Raises:
            TypeError: If an entry is missing or unknown.
            ValueError: If the threshold is not a probability.
        """
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        for name in ("precision", "recall", "f1", "finish_error"):
            values[name] = math.nan if values.get(name) is None else values[name]
        if not 0.0 <= values.get("threshold", -1.0) <= 1.0:
            raise ValueError(f"a threshold lies between 0 and 1, not {values.get('threshold')}")
        return cls(**values)


@dataclass
class StreamState(TensorRows):
    """State of streaming classification: the latest frames of each episode, one row per episode.

    Attributes:
        pixels: float32 ``(B, window - 1, 3, h, w)``, preprocessed frames; zeros before the first one.
        count: int64 ``(B,)``, frames so far.
    """

    pixels: Tensor
    count: Tensor


class SuccessClassifier(nn.Module, abc.ABC):
    """Classifier of whether the last frame of a window fulfils the instruction.

    The network has two logits per instruction; the score is the sigmoid of the second logit of the row's
    instruction (as published; the first logit is only used in the training loss).

    Args:
        window: Frames per window.
        n_instructions: Instructions of the task.

    Attributes:
        calibration: Threshold and its quality; None before :func:`~wmpo_gym.reward.calibration.calibrate`.
    """

    kind: ClassVar[str]

    def __init__(self, window: int, n_instructions: int) -> None:
        super().__init__()
        if window < 1 or n_instructions < 1:
            raise ValueError(
                f"A classifier needs at least one frame and one instruction, got window {window} and "
                f"n_instructions {n_instructions}."
            )
        self.window, self.n_instructions = window, n_instructions
        self.calibration: Calibration | None = None
        self._threshold: float | None = None

    # -- the network -----------------------------------------------------------------------------------------
    @abc.abstractmethod
    def arguments(self) -> dict[str, Any]:
        """JSON-serialisable constructor arguments of this classifier."""

    @abc.abstractmethod
    def preprocess(self, frames: Tensor) -> Tensor:
        """Preprocess frames for the network, in training and inference.

        Args:
            frames: uint8 ``(N, H, W, 3)``.

        Returns:
            float32 ``(N, 3, h, w)``.
        """

    @abc.abstractmethod
    def logits(self, clips: Tensor) -> Tensor:
        """Logits ``(B, 2 * n_instructions)`` of preprocessed clips ``(B, window, 3, h, w)``."""

    def forward(self, clips: Tensor, task_ids: Tensor) -> Tensor:
        """Logits of each row's instruction.

        Args:
            clips: float32 ``(B, window, 3, h, w)``, preprocessed.
            task_ids: int64 ``(B,)``.

        Returns:
            ``(B, 2)``; the score is ``sigmoid(logits[:, 1])``.
        """
        pairs = self.logits(clips).view(len(clips), self.n_instructions, 2)
        return pairs[torch.arange(len(clips), device=pairs.device), task_ids]

    def probabilities(self, clips: Tensor, task_ids: Tensor) -> Tensor:
        """Success probability ``(B,)`` of clips; arguments as :meth:`forward`."""
        # Rounded from float64: the float32 sigmoid depends on the row's position in the last bit.
        return torch.sigmoid(self(clips, task_ids)[:, 1].double()).float()

    # -- threshold -------------------------------------------------------------------------------------------
    @property
    def threshold(self) -> float:
        """Minimum probability of success: set explicitly, else calibrated, else 0.5."""
        if self._threshold is not None:
            return self._threshold
        return 0.5 if self.calibration is None else self.calibration.threshold

    @threshold.setter
    def threshold(self, value: float) -> None:
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"A threshold is a probability between 0 and 1, got {value}.")
        self._threshold = float(value)

    def reset_threshold(self) -> None:
        """Remove an explicitly set threshold and the calibration, before a new training."""
        self._threshold = self.calibration = None

    @property
    def device(self) -> torch.device:
        """Device of the network."""
        return next(self.parameters()).device

    # -- streaming -------------------------------------------------------------------------------------------
    @torch.no_grad()
    def start(self, frames: Tensor | np.ndarray) -> StreamState:
        """State after the first frame of each episode.

        Args:
            frames: uint8 ``(B, H, W, 3)``.
        """
        frames = self._frames(frames, 4)
        pixels = self.preprocess(frames)[:, None]
        before = pixels.new_zeros(len(pixels), self.window, *pixels.shape[2:])
        latest = torch.cat([before, pixels], dim=1)[:, 2:]  # window - 1 of them
        return StreamState(latest, torch.ones(len(pixels), dtype=torch.long, device=pixels.device))

    @torch.no_grad()
    def update(
        self, state: StreamState, frames: Tensor | np.ndarray, task_ids: Tensor | np.ndarray
    ) -> tuple[Tensor, StreamState]:
        """Score the next K frames; each frame is preprocessed once. ``state`` is not changed.

        Args:
            state: From :meth:`start` or the previous update.
            frames: uint8 ``(B, K, H, W, 3)``.
            task_ids: int64 ``(B,)``.

        Returns:
            Success probability float32 ``(B, K)`` of the window that ends at each frame, NaN where there are
            not yet enough frames for a window; and the new state.

        Raises:
            ValueError: If shapes, dtype or task ids are wrong.
        """
        frames = self._frames(frames, 5)
        batch, chunk = frames.shape[:2]
        task_ids = self._task_ids(task_ids, batch)
        if len(state) != batch:
            raise ValueError(f"The state has {len(state)} rows and the frames have {batch}.")
        new = self.preprocess(frames.flatten(0, 1)).unflatten(0, (batch, chunk))
        pixels = torch.cat([state.pixels.to(new), new], dim=1)
        count = state.count.to(new.device)
        ready = count[:, None] + torch.arange(1, chunk + 1, device=new.device) >= self.window
        clips = torch.stack([pixels[:, k : k + chunk] for k in range(self.window)], dim=2)
        rows, probs = task_ids[:, None].expand(-1, chunk), new.new_full((batch, chunk), torch.nan)
        if ready.all():  # the usual case, from the second or third chunk on
            probs = self.probabilities(clips.flatten(0, 1), rows.flatten()).view(batch, chunk)
        elif ready.any():
            probs[ready] = self.probabilities(clips[ready], rows[ready])
        return probs, StreamState(pixels[:, chunk:].contiguous(), count + chunk)

    def scores(self, frames: Tensor | np.ndarray, task_id: int) -> np.ndarray:
        """Success probability at every frame of one episode.

        Args:
            frames: uint8 ``(T+1, H, W, 3)``.
            task_id: Its instruction.

        Returns:
            float32 ``(T+1,)``, NaN at the first ``window - 1`` frames.

        Raises:
            ValueError: If the episode is shorter than the window.
        """
        frames = self._frames(frames, 4)
        check_window_fits(len(frames), self.window)
        first = self.start(frames[:1])
        state = StreamState(torch.zeros_like(first.pixels), torch.zeros_like(first.count))  # before any frame
        probs = []
        for part in frames[None].split(FRAMES_PER_UPDATE, dim=1):
            p, state = self.update(state, part, torch.tensor([task_id]))
            probs.append(p[0])
        return torch.cat(probs).cpu().numpy()

    def decide(self, frames: Tensor | np.ndarray, task_id: int) -> tuple[bool, int]:
        """Success and finish step of one episode; see :func:`~wmpo_gym.reward.data.first_success`."""
        return first_success(self.scores(frames, task_id), self.threshold)

    def _frames(self, frames: Tensor | np.ndarray, ndim: int) -> Tensor:
        frames = torch.as_tensor(frames)
        if frames.dtype != torch.uint8 or frames.ndim != ndim or frames.shape[-1] != 3:
            shape = "(B, H, W, 3)" if ndim == 4 else "(B, K, H, W, 3)"
            raise ValueError(f"Frames must be uint8 {shape}, got {frames.dtype} {tuple(frames.shape)}.")
        return frames.to(self.device)

    def _task_ids(self, task_ids: Tensor | np.ndarray, batch: int) -> Tensor:
        ids = torch.as_tensor(task_ids, device=self.device).long()
        n = self.n_instructions
        if ids.shape != (batch,) or not bool(((ids >= 0) & (ids < n)).all()):
            raise ValueError(
                f"task_ids must be {batch} numbers between 0 and {n - 1} (the classifier knows {n} "
                f"instructions), got {ids.tolist()}."
            )
        return ids

    # -- on disk ---------------------------------------------------------------------------------------------
    def save_pretrained(self, directory: str | Path) -> None:
        """Write ``config.json`` and ``model.safetensors``; the directory appears complete or not at all."""
        with write_dir_atomic(directory) as tmp:
            save_safetensors(tmp / "model.safetensors", self.state_dict())
            write_json_atomic(
                tmp / "config.json",
                {
                    "format_version": FORMAT_VERSION,
                    "kind": self.kind,
                    "arguments": self.arguments(),
                    "threshold": self._threshold,
                    "calibration": None if self.calibration is None else self.calibration.to_dict(),
                },
            )

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> SuccessClassifier:
        """Load what :meth:`save_pretrained` wrote, in evaluation mode; the base class takes any kind.

        Raises:
            ArtifactError: If a file is missing, truncated, edited, or of another kind than asked for.
        """
        path = Path(directory)
        config = read_json(path / "config.json")
        try:
            if config["format_version"] != FORMAT_VERSION:
                raise ValueError(
                    f"format version {config['format_version']}, this release reads {FORMAT_VERSION}"
                )
            module, name = KINDS[config["kind"]]
            found = getattr(importlib.import_module(module), name)
            if not issubclass(found, cls):
                raise ValueError(f"it is of kind {config['kind']!r}, not a {cls.__name__}")
            with torch.random.fork_rng(devices=[]):  # initial weights are drawn before they are replaced
                classifier = found(**config["arguments"])
            if config["calibration"] is not None:
                classifier.calibration = Calibration.from_dict(config["calibration"])
            if config["threshold"] is not None:
                classifier.threshold = config["threshold"]
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(
                f"{path / 'config.json'} does not describe a success classifier: {error}."
            ) from error
        weights = load_safetensors(path / "model.safetensors")
        try:
            classifier.load_state_dict(weights)
        except RuntimeError as error:
            raise ArtifactError(
                f"{path / 'model.safetensors'} does not fit {path / 'config.json'}: {error}. One of "
                "them was edited or comes from another classifier; restore both, or train it again."
            ) from error
        return classifier.eval()


def is_saved_classifier(directory: str | Path) -> bool:
    """Whether a directory was written by :meth:`SuccessClassifier.save_pretrained`."""
    file = Path(directory) / "config.json"
    config = read_json(file) if file.is_file() else None
    return isinstance(config, dict) and "kind" in config
