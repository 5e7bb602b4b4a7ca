"""Self-forcing training data of the world model: each row continues from the model's own prediction.

A row starts at some frame of some episode. The model predicts the next action chunk; the row continues from
*the prediction*, not from the recorded frames, until the episode ends. Every prediction is trained on, so no
network call is spent on building contexts, and after a few steps a batch holds contexts of all depths, as in
imagination. Trajectories that do not begin at an episode's start begin where the loss was largest: the
moments that decide an episode (a grasp) are few among the many in which something just moves on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from wmpo_gym.data.augment import Symmetry, transform_actions, transform_frames
from wmpo_gym.data.episode import Episode
from wmpo_gym.data.frames import FrameArray, FrameLoader
from wmpo_gym.tasks import Task

MEMORIES = 4096  # size of the cache of proprioception, in episodes
MAX_PRIORITY = 10.0  # maximum priority of a chunk relative to the mean


@dataclass
class ChunkBatch:
    """One chunk per row, as arrays.

    Attributes:
        context: uint8 ``(B, H, h, w, 3)`` recorded context frames.
        targets: uint8 ``(B, K, h, w, 3)`` frames to predict; the last one repeats after the episode's end.
        actions: float32 ``(B, K, D)``; zeros after the episode's end.
        prev_action: float32 ``(B, D)``, or ``(B, D + M)`` with the robot state appended.
        valid: bool ``(B, K)``, False after the episode's end.
        is_first: bool ``(B,)``, True if the row starts a new trajectory and takes the recorded context.
    """

    context: np.ndarray
    targets: np.ndarray
    actions: np.ndarray
    prev_action: np.ndarray
    valid: np.ndarray
    is_first: np.ndarray


class SelfForcingSampler:
    """Sampler of consecutive chunks from ``n_rows`` independent trajectories through recorded episodes.

    Args:
        episodes: At least one, each of at least one step.
        task: Gives the chunk length.
        n_rows: Rows B.
        context_frames: H.
        seed: Seed of the trajectories.
        weights: Relative sampling frequency of each episode; None for equal ones.
        symmetries: Each is applied to a random half of the trajectories.
        from_start: Share of trajectories that start at the episode's first frame, as imagination does.
        restart_prob: Probability per chunk that a trajectory is replaced by a new one.
        recall: Returns the robot states of an episode, float32 ``(T + 1, M)``
            (:class:`~wmpo_gym.world.proprio.ProprioModel`); None for a network without proprioception.
        workers: Threads that prefetch the next chunk of every row from disk; see
            :class:`~wmpo_gym.data.frames.FrameLoader`. The batches do not depend on it.

    Raises:
        ValueError: If there is no episode to train on, or if symmetries are given together with ``recall``:
            they do not define how the robot state changes.
    """

    def __init__(
        self,
        episodes: Sequence[Episode],
        task: Task,
        *,
        n_rows: int,
        context_frames: int,
        seed: int,
        weights: Sequence[float] | None = None,
        symmetries: Sequence[Symmetry] = (),
        from_start: float = 0.5,
        restart_prob: float = 0.1,
        recall: Callable[[Episode], np.ndarray] | None = None,
        workers: int = 2,
    ) -> None:
        self.episodes = [e for e in episodes if e.n_steps > 0]
        if not self.episodes:
            raise ValueError(
                "No episode with at least one step to train the world model on; collect some first."
            )
        if recall is not None and symmetries:
            raise ValueError(
                "Symmetries do not say how they change the robot's state; train without them, or a network "
                "with state_dim=0."
            )
        self._recall = None
        if recall is not None:
            self._recall = lru_cache(MEMORIES)(lambda i: recall(self.episodes[i]))
        self._loader = FrameLoader(workers)
        self.symmetries = tuple(symmetries)
        self.task, self.n_rows, self.context_frames = task, n_rows, context_frames
        self.from_start, self.restart_prob = from_start, restart_prob
        p = np.ones(len(self.episodes)) if weights is None else np.asarray(weights, dtype=np.float64)
        # Episodes are weighted by their length, so that all chunks are equally frequent.
        p = p * np.array([e.n_steps for e in self.episodes])
        self._p = np.cumsum(p / p.sum())
        lengths = np.array([-(-e.n_steps // task.chunk) for e in self.episodes])
        self._first_cell = np.cumsum(lengths) - lengths
        self._cell_episode = np.repeat(np.arange(len(self.episodes)), lengths)
        self._cell_weight = np.repeat(p / lengths, lengths)
        self._error = np.ones(lengths.sum())  # per chunk of every episode, relative to the average
        self._cell_sum: np.ndarray | None = None  # cumulative cell weights; None if outdated
        self._rng = np.random.default_rng([seed, 3])
        self._episode = np.zeros(n_rows, np.int64)
        self._step = np.full(
            n_rows, np.iinfo(np.int64).max
        )  # past the end of any episode, so that all rows start
        self._symmetry = np.zeros((n_rows, len(symmetries)), bool)

    def next(self) -> ChunkBatch:
        """The next chunk of every row; rows at the end of their episode start a new trajectory."""
        is_first = np.array([self._advance(i) for i in range(self.n_rows)])
        starts = self._step - self.task.chunk
        frames = self._loader.read([self._request(i, s) for i, s in enumerate(starts)])
        rows = [self._row(i, s, f) for i, (s, f) in enumerate(zip(starts, frames, strict=True))]
        continued = [i for i, s in enumerate(self._step) if s < self._episode_of(i).n_steps]
        self._loader.prefetch([self._request(i, self._step[i]) for i in continued])
        context, targets, actions, before, valid = map(np.stack, zip(*rows, strict=True))
        return ChunkBatch(context, targets, actions, before, valid, is_first)

    def _episode_of(self, i: int) -> Episode:
        return self.episodes[self._episode[i]]

    def _advance(self, i: int) -> bool:
        """Move row ``i`` to its next chunk; returns whether a new trajectory starts there."""
        is_first = bool(
            self._step[i] >= self._episode_of(i).n_steps or self._rng.random() < self.restart_prob
        )
        if is_first:
            self._start(i)
        self._step[i] += self.task.chunk
        return is_first

    def _request(self, i: int, step: int) -> tuple[FrameArray, np.ndarray]:
        """Frame array and the indices of row ``i``'s context and target frames at a step."""
        episode = self._episode_of(i)
        index = np.arange(step - self.context_frames + 1, step + self.task.chunk + 1)
        return episode.frames, np.clip(index, 0, episode.n_steps)

    def _row(self, i: int, step: int, frames: np.ndarray) -> tuple[np.ndarray, ...]:
        episode, k, h = self._episode_of(i), self.task.chunk, self.context_frames
        actions = np.zeros((k + 1, episode.actions.shape[1]), np.float32)
        steps = np.arange(step - 1, step + k)
        inside = (steps >= 0) & (steps < episode.n_steps)
        actions[inside] = episode.actions[steps[inside]]
        for symmetry, use in zip(self.symmetries, self._symmetry[i], strict=True):
            if use:
                frames = transform_frames(symmetry, frames)
                actions = transform_actions(symmetry, actions)
        before = actions[0]
        if self._recall is not None:
            before = np.concatenate([before, self._recall(int(self._episode[i]))[step]])
        return frames[:h], frames[h:], actions[1:], before, inside[1:]

    def update_priorities(self, losses: np.ndarray) -> None:
        """Update the sampling priorities from the losses ``(B,)`` of the last batch."""
        step = np.maximum(self._step - self.task.chunk, 0)
        cells = self._first_cell[self._episode] + step // self.task.chunk
        relative = np.clip(losses / max(float(losses.mean()), 1e-9), 0.1, MAX_PRIORITY)
        self._error[cells] += 0.5 * (relative - self._error[cells])
        self._cell_sum = None

    def _start(self, i: int) -> None:
        rng, chunk = self._rng, self.task.chunk
        if rng.random() < self.from_start:
            self._episode[i] = min(int(np.searchsorted(self._p, rng.random())), len(self.episodes) - 1)
            self._step[i] = 0
        else:
            if self._cell_sum is None:
                self._cell_sum = np.cumsum(self._cell_weight * self._error)
            p = self._cell_sum
            cell = min(np.searchsorted(p, rng.random() * p[-1]), len(p) - 1)
            self._episode[i] = self._cell_episode[cell]
            nearby = (cell - self._first_cell[self._episode[i]]) * chunk + rng.integers(1 - chunk, chunk)
            self._step[i] = np.clip(nearby, 0, self.episodes[self._episode[i]].n_steps - 1)
        self._symmetry[i] = rng.random(len(self.symmetries)) < 0.5

    def get_state(self) -> dict[str, np.ndarray | str]:
        """Positions of all trajectories and the generator state, for exact resumption."""
        return {
            "episode": self._episode.copy(), "step": self._step.copy(), "symmetry": self._symmetry.copy(),
            "error": self._error.copy(), "rng": json.dumps(self._rng.bit_generator.state),
        }  # fmt: skip

    def set_state(self, state: dict) -> None:
        """Restore what :meth:`get_state` returned."""
        self._episode, self._step = state["episode"].copy(), state["step"].copy()
        self._symmetry, self._error = state["symmetry"].copy(), state["error"].copy()
        self._cell_sum = None
        self._rng.bit_generator.state = json.loads(state["rng"])
