"""Imagined rollouts: a world model generates frames chunk by chunk and a success classifier scores them.

The same loop is used by the environment, the full-horizon evaluation, imagined replays and the check that
re-imagines a claimed success with different noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from wmpo_gym.utils.rows import pad_rows

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from wmpo_gym.reward.classifier import StreamState, SuccessClassifier
    from wmpo_gym.world.imagination import Imagination, ImaginationState

MAX_ROWS = 128  # default batch size of the networks, bounded by memory

Choose = Callable[[dict[str, np.ndarray], np.ndarray, int], np.ndarray]
Noise = Callable[[np.ndarray], "Tensor"]
Finished = Callable[[np.ndarray, int, "np.ndarray | None"], np.ndarray]


@dataclass
class RolloutState:
    """State of all rows between two chunks.

    Attributes:
        imagination: State of the world model.
        classifier: State of the success classifier; None without a classifier.
    """

    imagination: ImaginationState
    classifier: StreamState | None

    def rows(self, index: Any) -> RolloutState:
        """A copy of some rows."""
        return RolloutState(
            self.imagination.rows(index), None if self.classifier is None else self.classifier.rows(index)
        )

    def assign(self, index: Any, other: RolloutState) -> None:
        """Overwrite some rows in place with those of ``other``, in order."""
        self.imagination.assign(index, other.imagination)
        if self.classifier is not None and other.classifier is not None:
            self.classifier.assign(index, other.classifier)

    def to(self, device: torch.device | str) -> RolloutState:
        """Copy on a device."""
        classifier = None if self.classifier is None else self.classifier.to(device)
        return RolloutState(self.imagination.to(device), classifier)


@dataclass
class ImaginedChunk:
    """One chunk of the n rows that are still running.

    Attributes:
        rows: int64 (n,), row indices.
        actions: float32 (n, K, D).
        frames: uint8 (n, K, H, W, 3), after each action.
        probs: float32 (n, K), success probability per frame, NaN where the classifier's window is not full;
            None without a classifier.
    """

    rows: np.ndarray
    actions: np.ndarray
    frames: np.ndarray
    probs: np.ndarray | None


def start(imagination: Imagination, classifier: SuccessClassifier | None, frames: np.ndarray) -> RolloutState:
    """The state of rollouts at their first frames, uint8 (N, H, W, 3)."""
    import torch

    first = torch.tensor(frames, device=imagination.device)
    with torch.no_grad():
        return RolloutState(imagination.start(first), None if classifier is None else classifier.start(first))


def imagine_chunk(
    imagination: Imagination,
    classifier: SuccessClassifier | None,
    state: RolloutState,
    rows: np.ndarray,
    task_ids: np.ndarray,
    actions: np.ndarray,
    noise: Tensor,
    *,
    max_batch: int | None = None,
) -> ImaginedChunk:
    """Imagine the next chunk of some rows and classify its frames.

    Args:
        imagination: The world model's sampler.
        classifier: Scores every frame, or None.
        state: State of all rows; the entries of ``rows`` are updated in place.
        rows: int64 (n,), row indices.
        task_ids: int64 (n,), their instruction indices.
        actions: float32 (n, K, D) in [-1, 1].
        noise: float32 (n, C, K, h, w), standard normal, on the CPU.
        max_batch: Maximum batch size of the networks; does not affect the results. None is
            :func:`default_max_batch`.
    """
    import torch

    max_batch = max_batch or default_max_batch(imagination)
    # On a CPU, a batch of one uses different kernels, which differ in the last bit.
    least = 2 if imagination.device.type == "cpu" else 1
    clips, scores = [], []
    for i in range(0, len(rows), max_batch):
        part = slice(i, i + max_batch)
        n = len(rows[part])
        some, ids, chosen = (pad_rows(x[part], least) for x in (rows, task_ids, actions))
        before = state.rows(some)
        with torch.no_grad():
            frames, after = imagination.step(before.imagination, chosen, pad_rows(noise[part], least))
            classified = None
            if classifier is not None:
                assert before.classifier is not None, "started with a classifier"
                probs, classified = classifier.update(before.classifier, frames, torch.as_tensor(ids))
                scores.append(probs[:n].cpu().numpy())
        state.assign(some, RolloutState(after, classified))
        clips.append(frames[:n].cpu().numpy())
    return ImaginedChunk(rows, actions, np.concatenate(clips), np.concatenate(scores) if scores else None)


def imagine_rollouts(
    imagination: Imagination,
    classifier: SuccessClassifier | None,
    frames: np.ndarray,
    task_ids: np.ndarray,
    choose: Choose,
    noise: Noise,
    n_chunks: int,
    *,
    finished: Finished | None = None,
    max_batch: int | None = None,
) -> Iterator[ImaginedChunk]:
    """Imagine rollouts chunk by chunk, up to the horizon or until all are finished.

    Args:
        imagination: The world model's sampler.
        classifier: Scores every frame, or None.
        frames: uint8 (N, H, W, 3), first frames.
        task_ids: int64 (N,), instruction indices.
        choose: Policy of the running rows. Called with their observations (``pixels`` uint8 (n, H, W, 3) and
            ``task_id`` int64 (n,)), row indices int64 (n,) and the chunk's number; returns actions float32
            (n, K, D).
        noise: Called with row indices int64 (n,); returns standard normal float32 (n, C, K, h, w); see
            :func:`noise_per_row`.
        n_chunks: The horizon in chunks.
        finished: Termination test after each chunk. Called with the row indices int64 (n,), the control
            steps so far and the chunk's success probabilities, (n, K) or None; returns bool (n,), True for
            rows that end. None runs all rows to the horizon.
        max_batch: As for :func:`imagine_chunk`.

    Yields:
        The chunks, each with the rows that were still running.
    """
    if not len(frames):
        return
    task_ids, at_once = np.asarray(task_ids), max_batch or default_max_batch(imagination)
    states = [start(imagination, classifier, frames[i : i + at_once]) for i in range(0, len(frames), at_once)]
    state = RolloutState(
        type(states[0].imagination).concatenate([s.imagination for s in states]),
        None
        if states[0].classifier is None
        else type(states[0].classifier).concatenate([s.classifier for s in states if s.classifier]),
    )
    rows, pixels = np.arange(len(frames)), np.asarray(frames)
    for chunk in range(n_chunks):
        actions = choose({"pixels": pixels, "task_id": task_ids[rows]}, rows, chunk)
        imagined = imagine_chunk(
            imagination, classifier, state, rows, task_ids[rows], actions, noise(rows), max_batch=at_once
        )
        yield imagined
        pixels = imagined.frames[:, -1]
        if finished is not None:
            running = ~finished(rows, (chunk + 1) * imagination.chunk, imagined.probs)
            rows, pixels = rows[running], pixels[running]
            if not len(rows):
                return


def noise_per_row(imagination: Imagination, generators: Sequence[torch.Generator]) -> Noise:
    """Noise from a CPU generator per row, so that a row's noise does not depend on its batch or device."""
    import torch

    shape = imagination.noise_shape

    def noise(rows: np.ndarray) -> Tensor:
        drawn = torch.empty(len(rows), *shape)
        for own, row in zip(drawn, rows, strict=True):
            torch.randn(shape, generator=generators[int(row)], out=own)
        return drawn

    return noise


def default_max_batch(imagination: Imagination) -> int:
    """Default batch size: the network's ``cpu_batch`` on a CPU (bounded by its caches), else ``MAX_ROWS``."""
    on_cpu = imagination.device.type == "cpu"
    return getattr(imagination.network, "cpu_batch", MAX_ROWS) if on_cpu else MAX_ROWS
