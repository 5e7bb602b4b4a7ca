"""Windows of the success classifier: sampling of labelled training clips and the success rule."""

from __future__ import annotations

import logging
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from wmpo_gym.data.augment import Symmetry, transform_frames, transform_rows, transform_task_ids
from wmpo_gym.data.episode import Episode
from wmpo_gym.data.frames import FrameArray, FrameLoader

logger = logging.getLogger(__name__)


# -- the rule ------------------------------------------------------------------------------------------------
def check_window_fits(n_frames: int, window: int) -> None:
    """Raise an error if an episode is shorter than a window.

    Args:
        n_frames: Frames of the episode, its horizon + 1.
        window: Frames per window.

    Raises:
        ValueError: If the window is longer than the episode. The published rule would silently count it as a
            failure.
    """
    if n_frames < window:
        raise ValueError(
            f"An episode of {n_frames} frames (horizon {n_frames - 1}) never fills the classifier's window of"
            f" {window} frames; use a horizon from {window - 1} on, or a classifier with a shorter window."
        )


def first_success(probs: np.ndarray, threshold: float) -> tuple[bool, int]:
    """Outcome of an episode: success at the first frame whose window reaches the threshold.

    All full windows count, including the one that ends at the last frame.

    Args:
        probs: ``(T+1,)`` success probability of the window that ends at each frame; NaN where the window is
            not full.
        threshold: Success threshold, inclusive.

    Returns:
        Whether the episode succeeds, and its finish step: the frame of the success, else T.

    Raises:
        ValueError: If no window was evaluated.
    """
    probs = np.asarray(probs)
    if np.isnan(probs).all():
        raise ValueError("None of the windows of this episode was evaluated, so its outcome is unknown.")
    reached = probs >= threshold  # False for NaN
    return bool(reached.any()), int(reached.argmax()) if reached.any() else len(probs) - 1


# -- clips to train on ---------------------------------------------------------------------------------------
@dataclass(frozen=True)
class ClipTable:
    """Index of all labelled clips of a set of episodes, grouped into sampling pools.

    Only indices and labels are in memory; frames are read when a clip is drawn.

    Attributes:
        episodes: Frames of each episode, uint8 ``(T+1, H, W, 3)``.
        first: int64 ``(N,)`` global index of each episode's first frame, over the concatenated episodes.
        end: int32 ``(M,)`` global index of a clip's last frame.
        label: int8 ``(M,)``, 1 for success.
        task_id: int32 ``(M,)`` instruction that the label refers to.
        pools: Clip indices by pool: ``positive``; ``negative``, anything else; ``late``, negatives near the
            end of their episode, which are hardest to distinguish from success; ``other``, successes of
            another instruction.
        window: Frames per clip.
        loader: Reads the frames.
    """

    episodes: Sequence[FrameArray]
    first: np.ndarray
    end: Tensor
    label: Tensor
    task_id: Tensor
    pools: Mapping[str, Tensor]
    window: int
    loader: FrameLoader

    @classmethod
    def from_episodes(
        cls,
        episodes: Sequence[Episode],
        window: int,
        *,
        imagined: Sequence[Episode] = (),
        late_steps: int = 6,
        gradual_steps: int = 0,
        other_instructions: Sequence[int] = (),
        workers: int = 2,
    ) -> ClipTable:
        """Label every window of every episode.

        The window that ends at the success frame is positive; all others are negative.

        Args:
            episodes: Recorded episodes; each ends at its first success (see :class:`Episode`).
            window: Frames per clip.
            imagined: World-model replays of recorded actions, labelled by the recorded outcome. Success may
                occur slightly earlier in imagination, so other windows of successful replays are excluded.
            late_steps: A negative within this many frames of the episode's end belongs to the ``late`` pool.
            gradual_steps: Number of windows right before a success to exclude.
            other_instructions: Ids of mutually exclusive instructions: the positive clip of one is a
                negative of the others. Empty if they are not exclusive.
            workers: Threads that read frames from disk, see :class:`~wmpo_gym.data.frames.FrameLoader`.

        Raises:
            ValueError: If an episode is shorter than the window.
        """
        # Compact arrays, since hours of recordings contain millions of clips.
        end, label, task = array("i"), array("b"), array("i")
        pools = {name: array("i") for name in ("positive", "negative", "late", "other")}

        def add(rows: range, task_id: int, *names: str) -> None:
            for name in names:
                pools[name].extend(range(len(end), len(end) + len(rows)))
            end.extend(rows)
            label.extend([int("positive" in names)] * len(rows))
            task.extend([task_id] * len(rows))

        offset, every = 0, [*episodes, *imagined]
        for n, episode in enumerate(every):
            finish = episode.finish_step
            check_window_fits(finish + 1, window)
            if not (episode.success and n >= len(episodes)):
                stop = finish - gradual_steps if episode.success else finish + 1
                late = min(max(finish - late_steps + 1, window - 1), stop)
                add(range(offset + window - 1, offset + late), episode.task_id, "negative")
                add(range(offset + late, offset + stop), episode.task_id, "negative", "late")
            if episode.success:
                last = range(offset + finish, offset + finish + 1)
                add(last, episode.task_id, "positive")
                for other in set(other_instructions) - {episode.task_id}:
                    add(last, other, "other")
            offset += finish + 1
        lengths = np.array([e.finish_step + 1 for e in every], np.int64)
        return cls(
            [e.frames for e in every],
            np.cumsum(lengths) - lengths,
            _tensor(end),
            _tensor(label),
            _tensor(task),
            {name: _tensor(rows) for name, rows in pools.items()},
            window,
            FrameLoader(workers),
        )

    def draw(self, counts: Mapping[str, int], generator: torch.Generator) -> Tensor:
        """Sample clip indices with replacement, ``counts[name]`` from each pool.

        An empty pool is replaced by another non-empty negative pool, which preserves the balance of positives
        and negatives.
        """
        fallback = {
            "other": ("late", "negative"),
            "late": ("negative", "other"),
            "negative": ("late", "other"),
        }
        rows = []
        for name, count in counts.items():
            pool = next((self.pools[n] for n in (name, *fallback.get(name, ())) if len(self.pools[n])), None)
            if pool is None:
                raise ValueError(f"There is no {name} clip to draw; the episodes hold only the other kind.")
            rows.append(pool[torch.randint(len(pool), (count,), generator=generator)])
        return torch.cat(rows).long()

    def clips(self, rows: Tensor) -> Tensor:
        """Frames of the clips, uint8 ``(B, window, H, W, 3)``, a copy."""
        return torch.from_numpy(np.stack(self.loader.read(self._requests(rows))))

    def prefetch(self, rows: Tensor) -> None:
        """Start reading the frames of clips that will be requested next with :meth:`clips`."""
        self.loader.prefetch(self._requests(rows))

    def _requests(self, rows: Tensor) -> list[tuple[FrameArray, np.ndarray]]:
        ends = self.end[rows].numpy().astype(np.int64)
        owners = np.searchsorted(self.first, ends, side="right") - 1
        steps = (ends - self.first[owners])[:, None] + np.arange(1 - self.window, 1)
        return [(self.episodes[i], index) for i, index in zip(owners, steps, strict=True)]


def _tensor(values: array[int]) -> Tensor:
    return torch.from_numpy(np.array(values))


def augment(
    clips: Tensor, task_ids: Tensor, symmetries: Sequence[Symmetry], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Apply each symmetry of the task to a random half of the clips.

    Args:
        clips: uint8 ``(B, window, H, W, 3)``.
        task_ids: int64 ``(B,)``.
        symmetries: Transformations that preserve outcomes.
        generator: Random generator that selects the clips.

    Returns:
        Transformed clips and task ids.
    """
    frames, ids = clips.numpy(), task_ids.numpy()
    for symmetry in symmetries:
        chosen = (torch.rand(len(frames), generator=generator) < 0.5).numpy()
        frames = transform_rows(transform_frames, symmetry, frames, chosen)
        ids = transform_rows(transform_task_ids, symmetry, ids, chosen)
    return torch.from_numpy(frames), torch.from_numpy(ids)
