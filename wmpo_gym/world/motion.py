"""How the robot itself moves, told from its first picture and its actions.

Where a hand is in depth, a small picture hardly says, and imagined pictures blur it further; yet it decides
whether a grip holds. The robot knows better: its own state (joint angles, place of the hand, opening of the
fingers; "proprioception") is recorded with every step. From such recordings two small networks learn to read
the state off a first picture and to follow it through the actions, so that imagination needs no sensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from wmpo_gym.data.episode import Episode
from wmpo_gym.layers import RowLinear
from wmpo_gym.progress import progress_bar
from wmpo_gym.tasks import Task

STEP = 0.1  # units of the state (standard deviations) in which changes of its velocity are learned
WIDTH = 192
READER_WIDTH = 24


@dataclass(frozen=True)
class MotionTraining:
    """Settings of :func:`train_motion`.

    Attributes:
        steps: Optimiser steps.
        batch_size: Episodes per step.
        learning_rate: Peak of AdamW's one cycle.
        first_length: Steps of the first ways that are followed.
        last_length: By how many more the last ones are longer.
        seed: Seed of everything random.
    """

    steps: int = 2000
    batch_size: int = 32
    learning_rate: float = 3e-3
    first_length: int = 8
    last_length: int = 56
    seed: int = 0


class Motion(nn.Module):
    """Reads the robot's state off first pictures and follows it through actions.

    Its memory is the state and by how much it changed in the last step, both in standard deviations: ``M = 2
    P`` numbers for P measured ones.

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
        self.change = nn.Sequential(
            RowLinear(2 * state_dim + action_dim, WIDTH), nn.SiLU(),
            RowLinear(WIDTH, WIDTH), nn.SiLU(),
            RowLinear(WIDTH, state_dim),
        )  # fmt: skip
        for parameter in self.change[-1].parameters():
            nn.init.zeros_(parameter)
        self.requires_grad_(False)  # a part of a world model that is not trained with it

    def start(self, frames: Tensor) -> Tensor:
        """Memory ``(B, M)`` of a robot that stands still in its first frames ``(B, C, h, w)`` in [-1, 1]."""
        state = self.reader(frames)
        return torch.cat([state, torch.zeros_like(state)], dim=1)

    def follow(self, memory: Tensor, actions: Tensor) -> Tensor:
        """Memories ``(B, K, M)`` after each of the actions ``(B, K, D)``, from ``(B, M)`` before them."""
        (state, velocity), way = memory.chunk(2, dim=1), []
        for action in actions.unbind(dim=1):
            told = torch.cat([state, velocity / STEP, action], dim=1)
            velocity = velocity + STEP * self.change(told)
            state = state + velocity
            way.append(torch.cat([state, velocity], dim=1))
        return torch.stack(way, dim=1)

    @torch.no_grad()
    def recall(self, first: Tensor, actions: np.ndarray) -> np.ndarray:
        """Memories float32 ``(T + 1, M)`` of an episode with first frame ``(C, h, w)``, actions ``(T, D)``.

        As imagination would have them: only the first picture is looked at.
        """
        memory = self.start(first[None].expand(2, -1, -1, -1))  # a batch of one would be rounded otherwise
        way = self.follow(memory, torch.from_numpy(actions).expand(2, -1, -1))
        return torch.cat([memory[:, None], way], dim=1)[0].numpy()


def state_to_follow(task: Task, episodes: Sequence[Episode]) -> int:
    """P for a new network that is to learn from these episodes.

    It is 0 unless the robot's state was recorded in all of them, as many numbers in each, and in a task with
    symmetries, which do not say how they change it.
    """
    sizes = {episode.state_dim for episode in episodes}
    return 0 if task.symmetries or len(sizes) != 1 else sizes.pop()


def learn_motion(
    network: Any, autoencoder: Any, episodes: Sequence[Episode], *, seed: int, progress: bool = False
) -> dict[str, float]:
    """Teach a network that follows the robot how it moves, from those episodes that recorded its state.

    Args:
        network: Nothing happens to one without ``motion``.
        autoencoder: Maps frames to the network's latents.
        episodes: Of any kind.
        seed: Seed of the training.
        progress: Show a progress bar.

    Returns:
        See :func:`train_motion`; empty if nothing happened.
    """
    recorded = [episode for episode in episodes if episode.proprio is not None]
    motion = getattr(network, "motion", None)
    if motion is None or not recorded:
        return {}
    return train_motion(motion, recorded, autoencoder.encode, MotionTraining(seed=seed), progress=progress)


def train_motion(
    motion: Motion,
    episodes: Sequence[Episode],
    encode: Callable[[Tensor], Tensor],
    settings: MotionTraining,
    *,
    progress: bool = False,
) -> dict[str, float]:
    """Train both networks, each by itself: the reader on single pictures, the other on recorded states.

    Args:
        motion: Trained in place. One that has learned nothing yet takes the scale of the state from the
            episodes.
        episodes: With ``proprio``; at least one of a step or more.
        encode: Frames uint8 ``(B, T, H, W, 3)`` to the world model's ``(B, C, T, h, w)``.
        settings: How to train.
        progress: Show a progress bar.

    Returns:
        Mean absolute errors of the last tenth of the steps, in standard deviations: ``"reader"`` of the state
        in a picture, ``"follow"`` of the states on the way.

    Raises:
        ValueError: If there is no such episode, or one whose ``proprio`` is missing or of another size.
    """
    episodes, size = [episode for episode in episodes if episode.n_steps > 0], len(motion.mean)
    if not episodes or any(e.state_dim != size for e in episodes):
        raise ValueError(
            f"Learning how this robot moves takes episodes with {size} numbers of proprio per frame; leave "
            "out those without, or make a world that does not follow it (state_dim=0)."
        )
    states = [torch.from_numpy(np.array(episode.proprio)) for episode in episodes]
    if not bool(motion.mean.any()):
        motion.mean.copy_(torch.cat(states).mean(0))
        motion.deviation.copy_(torch.cat(states).std(0).clamp(min=1e-4))
    states = [(state - motion.mean) / motion.deviation for state in states]
    motion.requires_grad_(True)
    rng = np.random.default_rng([settings.seed, 23])
    optimizer = torch.optim.AdamW(motion.parameters(), settings.learning_rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.learning_rate, settings.steps)
    errors = []
    for step in progress_bar(range(settings.steps), desc="motion", disable=not progress):
        drawn = rng.integers(0, len(episodes), settings.batch_size)
        chosen = [(episodes[i], states[i]) for i in drawn]
        reader = _reading_error(motion, chosen, encode, rng)
        # Longer and longer ways: at first, errors would pile up to nothing that can be learned from.
        length = settings.first_length + step * settings.last_length // settings.steps
        follow = _following_error(motion, chosen, length, rng)
        optimizer.zero_grad(set_to_none=True)
        (reader + follow).backward()
        torch.nn.utils.clip_grad_norm_(motion.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        errors.append((float(reader.detach()), float(follow.detach())))
    motion.requires_grad_(False)
    last = np.mean(errors[-max(1, len(errors) // 10) :], axis=0)
    return {"reader": float(last[0]), "follow": float(last[1])}


Recorded = Sequence[tuple[Episode, Tensor]]


def _reading_error(
    motion: Motion, recorded: Recorded, encode: Callable[[Tensor], Tensor], rng: np.random.Generator
) -> Tensor:
    """Half of the pictures are first ones, which is what imagination starts from."""
    steps = [0 if rng.random() < 0.5 else int(rng.integers(0, e.n_steps + 1)) for e, _ in recorded]
    frames = np.stack([e.frames[t : t + 1] for (e, _), t in zip(recorded, steps, strict=True)])
    wanted = torch.stack([state[t] for (_, state), t in zip(recorded, steps, strict=True)])
    return (motion.reader(encode(torch.from_numpy(frames))[:, :, 0]) - wanted).abs().mean()


def _following_error(motion: Motion, recorded: Recorded, length: int, rng: np.random.Generator) -> Tensor:
    """From recorded states, on ways of up to ``length`` steps; half of them from the beginning."""
    actions = torch.zeros(len(recorded), length, recorded[0][0].actions.shape[1])
    wanted = torch.zeros(len(recorded), length, recorded[0][1].shape[1])
    valid, memory = torch.zeros(len(recorded), length, 1), []
    for i, (episode, state) in enumerate(recorded):
        start = 0 if rng.random() < 0.5 else int(rng.integers(0, episode.n_steps))
        n = min(length, episode.n_steps - start)
        actions[i, :n] = torch.from_numpy(episode.actions[start : start + n])
        wanted[i, :n], valid[i, :n] = state[start + 1 : start + 1 + n], 1.0
        memory.append(torch.cat([state[start], state[start] - state[max(start - 1, 0)]]))
    states = motion.follow(torch.stack(memory), actions)[..., : wanted.shape[2]]
    return ((states - wanted).abs() * valid).sum() / (valid.sum() * wanted.shape[2])
