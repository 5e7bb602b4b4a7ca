"""How the robot itself moves, told from its first picture and its actions.

Where a hand is in depth, a small picture hardly says, and imagined pictures blur it further; yet it decides
whether a grip holds. The robot knows better: its own state (joint angles, place of the hand, opening of the
fingers; "proprioception") is recorded with every step. From such recordings two small networks learn to read
the state off a first picture and to follow it through the actions, so that imagination needs no sensor. What
the hand will meet on its way, the points found in the first picture tell (:mod:`wmpo_gym.world.keypoints`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from wmpo_gym.data.episode import Episode
from wmpo_gym.tasks import Task
from wmpo_gym.utils.io import (
    load_safetensors,
    read_json,
    save_safetensors,
    write_dir_atomic,
    write_json_atomic,
)
from wmpo_gym.utils.layers import RowLinear, rounded_quickly
from wmpo_gym.world.keypoints import Points, descend, train_points

STEP = 0.1  # units of the state (standard deviations) in which changes of its velocity are learned
FINE = 5.0  # by how much places weigh more at first: contact is a matter of hundredths of their range
WIDTH = 320
READER_WIDTH = 24
POINTS = 8


@dataclass(frozen=True)
class MotionTraining:
    """Settings of :func:`train_motion`.

    Attributes:
        steps: Optimiser steps of what follows the state.
        batch_size: Ways per such step.
        length: Steps of a way. Longer ones teach that the policy acts otherwise after a grip that failed,
            which tells nothing where its actions answer to imagined pictures.
        reader_steps: Optimiser steps of what reads it off a picture.
        points_steps: Optimiser steps of what finds points in it.
        pictures: Pictures per step of both.
        learning_rate: Peak of AdamW's one cycle, of all three.
        seed: Seed of everything random.
    """

    steps: int = 12_000
    batch_size: int = 160
    length: int = 10
    reader_steps: int = 2000
    points_steps: int = 400
    pictures: int = 48
    learning_rate: float = 3e-3
    seed: int = 0


class Motion(nn.Module):
    """Reads the robot's state off first pictures and follows it through actions.

    Its memory is the state, by how much it changed in the last step, and the points of the first picture, all
    in standard deviations: ``M = 2 P + 2 POINTS`` numbers for P measured ones.

    Args:
        image_size: Side of the square frames.
        channels: Frame channels C.
        action_dim: D.
        state_dim: P.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, image_size: int, channels: int, action_dim: int, state_dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(state_dim))
        self.register_buffer("deviation", torch.ones(state_dim))
        side, width = image_size // 2, 4 * channels
        layers: list[nn.Module] = [nn.PixelUnshuffle(2)]
        for wider in (READER_WIDTH, 2 * READER_WIDTH, 2 * READER_WIDTH):
            layers += [nn.Conv2d(width, wider, 3, stride=2, padding=1), nn.ReLU()]
            side, width = (side + 1) // 2, wider
        head: list[nn.Module] = [
            nn.Flatten(),
            RowLinear(width * side**2, 128),
            nn.ReLU(),
            RowLinear(128, state_dim),
        ]
        self.reader = nn.Sequential(*layers, *head)
        self.points = Points(image_size, channels, POINTS)
        first = RowLinear(2 * state_dim + action_dim + 2 * POINTS, WIDTH)
        self.change = nn.Sequential(
            first, nn.SiLU(),
            RowLinear(WIDTH, WIDTH), nn.SiLU(),
            RowLinear(WIDTH, state_dim),
        )  # fmt: skip
        for parameter in self.change[-1].parameters():
            nn.init.zeros_(parameter)
        with torch.no_grad():
            first.weight[:, :state_dim] *= FINE
            first.weight[:, -2 * POINTS :] *= FINE
        self.requires_grad_(False)  # a part of a world model that is not trained with it

    def start(self, frames: Tensor) -> Tensor:
        """Memory ``(B, M)`` of a robot that stands still in its first frames ``(B, C, h, w)`` in [-1, 1]."""
        state = self.reader(frames)
        return torch.cat([state, torch.zeros_like(state), self.points(frames)], dim=1)

    def follow(self, memory: Tensor, actions: Tensor) -> Tensor:
        """Memories ``(B, K, M)`` after each of the actions ``(B, K, D)``, from ``(B, M)`` before them."""
        size, way = len(self.mean), []
        state, velocity, points = memory.split([size, size, 2 * POINTS], dim=1)
        for action in actions.unbind(dim=1):
            told = torch.cat([state, velocity / STEP, action, points], dim=1)
            velocity = velocity + STEP * self.change(told)
            state = state + velocity
            way.append(torch.cat([state, velocity, points], dim=1))
        return torch.stack(way, dim=1)

    @torch.no_grad()
    def recall(self, first: Tensor, actions: np.ndarray) -> np.ndarray:
        """Memories float32 ``(T + 1, M)`` of an episode with first frame ``(C, h, w)``, actions ``(T, D)``.

        As imagination would have them: only the first picture is looked at.
        """
        memory = self.start(_twice(first))
        way = self.follow(memory, torch.from_numpy(actions).expand(2, -1, -1))
        return torch.cat([memory[:, None], way], dim=1)[0].numpy()

    @torch.no_grad()
    def remember(self, first: Tensor, proprio: np.ndarray) -> np.ndarray:
        """Memories float32 ``(T + 1, M)`` of an episode whose states ``(T + 1, P)`` were recorded."""
        states = (torch.from_numpy(np.array(proprio)) - self.mean) / self.deviation
        velocity = torch.diff(states, dim=0, prepend=states[:1])
        points = self.points(_twice(first))[:1].expand(len(states), -1)
        return torch.cat([states, velocity, points], dim=1).numpy()


def _twice(frame: Tensor) -> Tensor:
    """A batch ``(2, C, h, w)`` of one frame ``(C, h, w)``; a batch of one would be rounded otherwise."""
    return frame[None].expand(2, -1, -1, -1)


def state_to_follow(task: Task, episodes: Sequence[Episode]) -> int:
    """P for a new network that is to learn from these episodes.

    It is 0 unless the robot's state was recorded in all of them, as many numbers in each, and in a task with
    symmetries, which do not say how they change it.
    """
    sizes = {episode.state_dim for episode in episodes}
    return 0 if task.symmetries or len(sizes) != 1 else sizes.pop()


def learn_motion(
    network: Any,
    autoencoder: Any,
    episodes: Sequence[Episode],
    *,
    weights: Sequence[float] | None = None,
    seed: int,
    directory: str | Path | None = None,
    progress: bool = False,
) -> dict[str, float]:
    """Teach a network that follows the robot how it moves, from those episodes that recorded its state.

    Args:
        network: Nothing happens to one without ``motion``.
        autoencoder: Maps frames to the network's latents.
        episodes: Of any kind.
        weights: How often an episode is chosen, relative to the others; None for equally often.
        seed: Seed of the training.
        directory: Where what was learned is kept; what is there already is taken instead of learning again.
        progress: Show a progress bar.

    Returns:
        See :func:`train_motion`; empty if nothing happened.
    """
    motion = getattr(network, "motion", None)
    told = zip(episodes, weights or [1.0] * len(episodes), strict=True)
    recorded = [(episode, weight) for episode, weight in told if episode.proprio is not None]
    if motion is None or not recorded:
        return {}
    if directory is not None and (Path(directory) / "errors.json").exists():
        motion.load_state_dict(load_safetensors(Path(directory) / "motion.safetensors"))
        return read_json(Path(directory) / "errors.json")
    episodes, weights = zip(*recorded, strict=True)
    errors = train_motion(
        motion, episodes, autoencoder.encode, MotionTraining(seed=seed), weights=weights, progress=progress
    )
    if directory is not None:
        with write_dir_atomic(directory) as kept:
            save_safetensors(kept / "motion.safetensors", motion.state_dict())
            write_json_atomic(kept / "errors.json", errors)
    return errors


def train_motion(
    motion: Motion,
    episodes: Sequence[Episode],
    encode: Callable[[Tensor], Tensor],
    settings: MotionTraining,
    *,
    weights: Sequence[float] | None = None,
    progress: bool = False,
) -> dict[str, float]:
    """Train its networks one by one: points on first pictures, the reader on any, the last on states.

    Args:
        motion: Trained in place. One that has learned nothing yet takes the scale of the state from the
            episodes.
        episodes: With ``proprio``; at least one of a step or more.
        encode: Frames uint8 ``(B, T, H, W, 3)`` to the world model's ``(B, C, T, h, w)``.
        settings: How to train.
        weights: How often an episode is chosen, relative to the others; None for equally often.
        progress: Show a progress bar.

    Returns:
        ``"reader"`` and ``"follow"``, mean absolute errors of the state in a picture and on the way, in
        standard deviations (last tenth of the steps); ``"points"``, see
        :func:`~wmpo_gym.world.keypoints.train_points`.

    Raises:
        ValueError: If there is no such episode, or one whose ``proprio`` is missing or of another size.
    """
    recorded = _Recorded.of(episodes, weights, len(motion.mean))
    if not bool(motion.mean.any()):
        states = torch.cat([torch.from_numpy(np.array(e.proprio)) for e in recorded.episodes])
        motion.mean.copy_(states.mean(0))
        motion.deviation.copy_(states.std(0).clamp(min=1e-4))
    rng = np.random.default_rng([settings.seed, 23])
    motion.requires_grad_(True)
    with rounded_quickly(motion):
        with torch.no_grad():
            seen = [encode(torch.from_numpy(e.frames[None, :1]))[:, :, 0] for e in recorded.episodes]
        points = train_points(
            motion.points, torch.cat(seen), steps=settings.points_steps, batch_size=settings.pictures,
            learning_rate=settings.learning_rate, seed=settings.seed, progress=progress,
        )  # fmt: skip
        ways = _Ways(motion, recorded, encode, seen)
        reader = descend(
            lambda: ways.reading_error(settings.pictures, rng), motion.reader.parameters(),
            settings.learning_rate, settings.reader_steps, "reader", progress=progress,
        )  # fmt: skip
        follow = descend(
            lambda: ways.following_error(settings.batch_size, settings.length, rng),
            motion.change.parameters(), settings.learning_rate, settings.steps, "motion", progress=progress,
        )  # fmt: skip
    motion.requires_grad_(False)
    return {"points": points, "reader": reader, "follow": follow}


@dataclass(frozen=True)
class _Recorded:
    """Episodes with the robot's state, and how often each is chosen."""

    episodes: Sequence[Episode]
    shares: np.ndarray

    @classmethod
    def of(cls, episodes: Sequence[Episode], weights: Sequence[float] | None, size: int) -> _Recorded:
        told = list(zip(episodes, weights or [1.0] * len(episodes), strict=True))
        told = [(episode, weight) for episode, weight in told if episode.n_steps > 0]
        if not told or any(e.state_dim != size for e, _ in told):
            raise ValueError(
                f"Learning how this robot moves takes episodes with {size} numbers of proprio per frame; "
                "leave out those without, or make a world that does not follow it (state_dim=0)."
            )
        shares = np.array([weight for _, weight in told], float)
        return cls([episode for episode, _ in told], shares / shares.sum())

    def draw(self, n: int, rng: np.random.Generator) -> np.ndarray:
        return rng.choice(len(self.episodes), n, p=self.shares)


class _Ways:
    """All recorded states and actions side by side, the shorter episodes filled up."""

    def __init__(
        self,
        motion: Motion,
        recorded: _Recorded,
        encode: Callable[[Tensor], Tensor],
        first_pictures: Sequence[Tensor],
    ) -> None:
        self.motion, self.recorded, self.encode = motion, recorded, encode
        self.steps = np.array([e.n_steps for e in recorded.episodes])
        n, longest = len(self.steps), self.steps.max()
        self.actions = torch.zeros(n, longest, recorded.episodes[0].actions.shape[1])
        self.states = torch.zeros(n, longest + 1, len(motion.mean))
        for i, episode in enumerate(recorded.episodes):
            state = torch.from_numpy(np.array(episode.proprio))
            self.actions[i, : episode.n_steps] = torch.from_numpy(episode.actions)
            self.states[i, : episode.n_steps + 1] = (state - motion.mean) / motion.deviation
        with torch.no_grad():
            self.points = torch.cat([motion.points(picture) for picture in first_pictures])

    def reading_error(self, n: int, rng: np.random.Generator) -> Tensor:
        """Of ``n`` pictures, half of them first ones, which is what imagination starts from."""
        chosen = self.recorded.draw(n, rng)
        steps = np.where(rng.random(n) < 0.5, 0, rng.integers(0, self.steps[chosen] + 1))
        episodes = [self.recorded.episodes[i] for i in chosen]
        frames = np.stack([e.frames[t : t + 1] for e, t in zip(episodes, steps, strict=True)])
        read = self.motion.reader(self.encode(torch.from_numpy(frames))[:, :, 0])
        return (read - self.states[chosen, steps]).abs().mean()

    def following_error(self, n: int, length: int, rng: np.random.Generator) -> Tensor:
        """From ``n`` recorded states, on ways of up to ``length`` steps; a quarter from the beginning."""
        chosen = self.recorded.draw(n, rng)
        start = np.where(rng.random(n) < 0.25, 0, rng.integers(0, self.steps[chosen]))
        way = start[:, None] + np.arange(length)
        valid = torch.from_numpy(way < self.steps[chosen][:, None])[..., None]
        way = np.minimum(way, self.steps.max() - 1)
        state, before = self.states[chosen, start], self.states[chosen, np.maximum(start - 1, 0)]
        memory = torch.cat([state, state - before, self.points[chosen]], dim=1)
        followed = self.motion.follow(memory, self.actions[chosen[:, None], way])
        errors = followed[..., : state.shape[1]] - self.states[chosen[:, None], way + 1]
        return (errors.abs() * valid).sum() / (valid.sum() * state.shape[1])
