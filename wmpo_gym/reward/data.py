"""Which windows of an episode are judged, what they are trained as, and what their scores decide."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from wmpo_gym.data.episode import Episode
from wmpo_gym.tasks import Symmetry

logger = logging.getLogger(__name__)

PUBLISHED_WINDOW = 8
PUBLISHED_MIN_STEPS = 100


# -- the rule ------------------------------------------------------------------------------------------------
def check_window_fits(n_frames: int, window: int) -> None:
    """Refuse an episode that no window fits into.

    Args:
        n_frames: Frames of the episode, its horizon + 1.
        window: Frames per window.

    Raises:
        ValueError: If the window is longer than the episode. The published rule calls that a failure, which
            nobody notices.
    """
    if n_frames < window:
        raise ValueError(
            f"An episode of {n_frames} frames (horizon {n_frames - 1}) never fills the classifier's window of"
            f" {window} frames; use a horizon from {window - 1} on, or a classifier with a shorter window."
        )


def first_success(probs: np.ndarray, threshold: float) -> tuple[bool, int]:
    """Outcome of an episode: it succeeds at the first frame whose window reaches the threshold.

    Every window that fits counts, the one that ends on the last frame included.

    Args:
        probs: ``(T+1,)`` success probability of the window that ends at each frame; NaN where none does.
        threshold: A probability equal to it counts.

    Returns:
        Whether the episode succeeds, and its finish step: the frame of the success, else T.

    Raises:
        ValueError: If no window was evaluated at all.
    """
    probs = np.asarray(probs)
    if np.isnan(probs).all():
        raise ValueError("None of the windows of this episode was evaluated, so its outcome is unknown.")
    reached = probs >= threshold  # False for NaN
    return bool(reached.any()), int(reached.argmax()) if reached.any() else len(probs) - 1


def published_decision(
    probs: np.ndarray,
    threshold: float,
    *,
    window: int = PUBLISHED_WINDOW,
    min_steps: int = PUBLISHED_MIN_STEPS,
) -> tuple[bool, int]:
    """The released rule with its faults, to compare with published runs; use :func:`first_success` instead.

    Windows that end before frame ``min_steps + window - 1`` are ignored, the window that ends on the last
    frame can never succeed, and an episode without any window fails silently.

    Args:
        probs: ``(T+1,)`` as for :func:`first_success`.
        threshold: A probability equal to it counts.
        window: Frames per window.
        min_steps: First frame at which a window may begin.

    Returns:
        Whether the episode succeeds, and its finish step.
    """
    last = len(probs) - 1
    for frame in range(min_steps + window - 1, last):
        if probs[frame] >= threshold:
            return True, frame
    return False, last


def published_clips(
    finish_step: int, success: bool, window: int = PUBLISHED_WINDOW
) -> tuple[tuple[int, int, bool] | None, list[int]]:
    """The released choice of training clips, to compare with published runs; use :class:`ClipTable` instead.

    Its positive clip ends one frame before the frame that was labelled as the finish.

    Returns:
        The terminal clip as (first frame, last frame, label), None if it does not fit; and the exclusive ends
        among which one further clip with label False is drawn (none if the list is empty).
    """
    if finish_step < window:
        return None, []
    ends = list(range(finish_step - window, window - 1, -1))
    return (finish_step - window, finish_step - 1, bool(success)), ends


# -- clips to train on ---------------------------------------------------------------------------------------
@dataclass(frozen=True)
class ClipTable:
    """Every clip of a set of episodes with its label, sorted into pools to draw from.

    Attributes:
        frames: uint8 ``(N, H, W, 3)``, the episodes end to end.
        end: int64 ``(M,)`` row of ``frames`` in which a clip ends.
        label: int64 ``(M,)``, 1 for success.
        task_id: int64 ``(M,)`` instruction the label is about.
        pools: Clip numbers by name: ``positive``; ``negative``, anything else; ``late``, negatives near the
            end of their episode, which look most like success; ``other``, successes of another instruction.
        window: Frames per clip.
    """

    frames: Tensor
    end: Tensor
    label: Tensor
    task_id: Tensor
    pools: Mapping[str, Tensor]
    window: int

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
    ) -> ClipTable:
        """Label every window of every episode.

        The window that ends at the finish of a success is positive and every other one is negative.

        Args:
            episodes: Recorded episodes; each ends at its first success, as :class:`Episode` says.
            window: Frames per clip.
            imagined: World-model replays of recorded actions, labelled by the recorded outcome. The imagined
                success may come a little early, so earlier windows of successes are left out.
            late_steps: A negative within this many frames of the episode's end is a late one.
            gradual_steps: So many windows right before a success are left out.
            other_instructions: Task ids that are certainly unfulfilled where another one is fulfilled: the
                positive clip of one is a negative of the others. Empty if that is not certain.

        Raises:
            ValueError: If an episode is shorter than the window.
        """
        end: list[int] = []
        label: list[int] = []
        task: list[int] = []
        pools: dict[str, list[int]] = {"positive": [], "negative": [], "late": [], "other": []}

        def add(row: int, task_id: int, *names: str) -> None:
            for name in names:
                pools[name].append(len(end))
            end.append(row)
            label.append(int("positive" in names))
            task.append(task_id)

        offset = 0
        for n, episode in enumerate([*episodes, *imagined]):
            finish = episode.finish_step
            check_window_fits(finish + 1, window)
            if not (episode.success and n >= len(episodes)):
                end_of_negatives = finish - gradual_steps if episode.success else finish + 1
                for t in range(window - 1, end_of_negatives):
                    add(
                        offset + t,
                        episode.task_id,
                        "negative",
                        *(["late"] if t > finish - late_steps else []),
                    )
            if episode.success:
                add(offset + finish, episode.task_id, "positive")
                for other in set(other_instructions) - {episode.task_id}:
                    add(offset + finish, other, "other")
            offset += finish + 1
        frames = torch.from_numpy(np.concatenate([e.frames for e in [*episodes, *imagined]]))
        numbers = {name: torch.tensor(rows, dtype=torch.long) for name, rows in pools.items()}
        ends, labels, tasks = (torch.tensor(x, dtype=torch.long) for x in (end, label, task))
        return cls(frames, ends, labels, tasks, numbers, window)

    def draw(self, counts: Mapping[str, int], generator: torch.Generator) -> Tensor:
        """Clip numbers, ``counts[name]`` of them from each pool with replacement.

        The share of an empty pool goes to the next one that is not (late to any negative and the reverse), so
        that the balance of positives and negatives stays.
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
        return torch.cat(rows)

    def clips(self, rows: Tensor) -> Tensor:
        """The frames of clips: uint8 ``(B, window, H, W, 3)``, a copy."""
        return self.frames[self.end[rows][:, None] + torch.arange(1 - self.window, 1)]


def augment(
    clips: Tensor, task_ids: Tensor, symmetries: Sequence[Symmetry], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Apply each symmetry of the task to a random half of the clips.

    Args:
        clips: uint8 ``(B, window, H, W, 3)``.
        task_ids: int64 ``(B,)``.
        symmetries: Transformations under which outcomes stay what they are.
        generator: Decides which clips.

    Returns:
        New clips and the task ids they are about now.
    """
    for symmetry in symmetries:
        moved = clips
        if symmetry.flip is not None:
            moved = moved.flip(2 if symmetry.flip == "vertical" else 3)
        moved = moved[..., list(symmetry.channel_order)]
        renamed = torch.tensor(symmetry.instruction_order)[task_ids]
        use = torch.rand(len(clips), generator=generator) < 0.5
        clips = torch.where(use[:, None, None, None, None], moved, clips)
        task_ids = torch.where(use, renamed, task_ids)
    return clips, task_ids
