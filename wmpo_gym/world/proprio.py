"""Proprioception: the robot's own state, estimated from the first frame and predicted from the actions.

Small images carry little depth information about the gripper, and imagined ones blur it further; yet depth
decides whether a grasp succeeds. The robot's state (joint angles, gripper pose and opening) is
recorded with every step. Two small networks are trained on these recordings, to estimate the state in a first
frame and to predict it from the actions, so that imagination needs no sensor. Keypoints of the first frame
(:mod:`wmpo_gym.world.keypoints`) encode the positions of the objects.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from wmpo_gym.data.augment import Symmetry
from wmpo_gym.data.episode import Episode
from wmpo_gym.training.runtime import ComputeSettings
from wmpo_gym.training.trainer import Loss
from wmpo_gym.utils.layers import RowLinear, rounded_quickly
from wmpo_gym.world.fit import FitSettings, FitTask, fit
from wmpo_gym.world.keypoints import KeypointEncoder, train_keypoints

VELOCITY_UNIT = 0.1  # scale of predicted velocity changes, in standard deviations of the state
POSITION_WEIGHT = 5.0  # initial factor of positions, since contact depends on small differences
WIDTH = 320
ENCODER_WIDTH = 24
KEYPOINTS = 8


@dataclass(frozen=True)
class ProprioTraining:
    """Settings of :func:`train_proprio`.

    Attributes:
        steps: Optimiser steps of the dynamics network.
        batch_size: Trajectories per such step.
        length: Steps per trajectory. On longer ones the network infers a failed grasp from the policy's later
            actions, which is misleading when the policy acts on imagined frames.
        reader_steps: Optimiser steps of the encoder.
        points_steps: Optimiser steps of the keypoint encoder.
        frames: Batch size of encoder and keypoint encoder, in frames.
        learning_rate: Peak learning rate of AdamW's one-cycle schedule, for all three.
        seed: Random seed.
    """

    steps: int = 12_000
    batch_size: int = 160
    length: int = 10
    reader_steps: int = 2000
    points_steps: int = 400
    frames: int = 48
    learning_rate: float = 3e-3
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the steps.

        Raises:
            ValueError: If a part has no optimiser step.
        """
        if min(self.steps, self.reader_steps, self.points_steps) < 1:
            raise ValueError(
                f"The proprioception model takes at least 1 step of each part, got {self.steps} of the "
                f"dynamics, {self.reader_steps} of the encoder and {self.points_steps} of the keypoints; "
                "to do without it, make a world that does not follow the robot's state."
            )

    @classmethod
    def of_steps(cls, steps: int, *, seed: int = 0) -> ProprioTraining:
        """Settings for ``steps`` dynamics steps, with the steps of the other parts in proportion."""
        share = steps / cls.steps
        reader, points = (max(1, round(n * share)) for n in (cls.reader_steps, cls.points_steps))
        return cls(steps=steps, reader_steps=reader, points_steps=points, seed=seed)


def robot_state_size(state_dim: int) -> int:
    """Numbers M of a robot state of :class:`ProprioModel` with ``state_dim`` measured ones; 0 for none."""
    return 2 * state_dim + 2 * KEYPOINTS if state_dim else 0


class ProprioModel(nn.Module):
    """Estimates the robot's state in the first frame and predicts it from the actions.

    A *robot state* is the measured state, its change in the last step, and the keypoints of the first frame,
    all in standard deviations: ``M = 2 P + 2 KEYPOINTS`` numbers for P measured ones.

    The submodules have the names of their weights in saved worlds: ``reader`` is the encoder of frames,
    ``points`` the keypoint encoder, ``change`` the dynamics.

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
        for wider in (ENCODER_WIDTH, 2 * ENCODER_WIDTH, 2 * ENCODER_WIDTH):
            layers += [nn.Conv2d(width, wider, 3, stride=2, padding=1), nn.ReLU()]
            side, width = (side + 1) // 2, wider
        head: list[nn.Module] = [
            nn.Flatten(),
            RowLinear(width * side**2, 128),
            nn.ReLU(),
            RowLinear(128, state_dim),
        ]
        self.reader = nn.Sequential(*layers, *head)
        self.points = KeypointEncoder(image_size, channels, KEYPOINTS)
        first = RowLinear(2 * state_dim + action_dim + 2 * KEYPOINTS, WIDTH)
        self.change = nn.Sequential(
            first, nn.SiLU(),
            RowLinear(WIDTH, WIDTH), nn.SiLU(),
            RowLinear(WIDTH, state_dim),
        )  # fmt: skip
        for parameter in self.change[-1].parameters():
            nn.init.zeros_(parameter)
        with torch.no_grad():
            first.weight[:, :state_dim] *= POSITION_WEIGHT
            first.weight[:, -2 * KEYPOINTS :] *= POSITION_WEIGHT
        self.requires_grad_(False)  # trained separately from the world model

    def init_state(self, frames: Tensor) -> Tensor:
        """Robot state ``(B, M)`` at rest in first frames ``(B, C, h, w)`` in [-1, 1]."""
        state = self.reader(frames)
        return torch.cat([state, torch.zeros_like(state), self.points(frames)], dim=1)

    def rollout(self, robot_state: Tensor, actions: Tensor) -> Tensor:
        """Robot states ``(B, K, M)`` after each of the actions ``(B, K, D)``, from ``(B, M)`` before them."""
        size, trajectory = len(self.mean), []
        state, velocity, points = robot_state.split([size, size, 2 * KEYPOINTS], dim=1)
        for action in actions.unbind(dim=1):
            inputs = torch.cat([state, velocity / VELOCITY_UNIT, action, points], dim=1)
            velocity = velocity + VELOCITY_UNIT * self.change(inputs)
            state = state + velocity
            trajectory.append(torch.cat([state, velocity, points], dim=1))
        return torch.stack(trajectory, dim=1)

    @torch.no_grad()
    def rollout_from_frame(self, first: Tensor, actions: np.ndarray) -> np.ndarray:
        """Robot states float32 ``(T + 1, M)`` from a first frame ``(C, h, w)`` and actions ``(T, D)``.

        The same prediction as in imagination, which only uses the first frame.
        """
        device = self.mean.device
        state = self.init_state(_twice(first.to(device)))
        trajectory = self.rollout(state, torch.from_numpy(actions).to(device).expand(2, -1, -1))
        return torch.cat([state[:, None], trajectory], dim=1)[0].cpu().numpy()

    @torch.no_grad()
    def encode(self, first: Tensor, proprio: np.ndarray) -> np.ndarray:
        """Robot states float32 ``(T + 1, M)`` of recorded measurements ``(T + 1, P)`` and the first frame."""
        device = self.mean.device
        states = (torch.from_numpy(np.array(proprio)).to(device) - self.mean) / self.deviation
        velocity = torch.diff(states, dim=0, prepend=states[:1])
        points = self.points(_twice(first.to(device)))[:1].expand(len(states), -1)
        return torch.cat([states, velocity, points], dim=1).cpu().numpy()


def _twice(frame: Tensor) -> Tensor:
    """A batch ``(2, C, h, w)`` of one frame ``(C, h, w)``; a batch of one rounds differently."""
    return frame[None].expand(2, -1, -1, -1)


def proprio_size(episodes: Sequence[Episode], symmetries: Sequence[Symmetry] = ()) -> int:
    """State dimension P of a new network for these episodes.

    0 unless all episodes have recorded robot states of the same size, and 0 with symmetries, which do not
    define how the state changes.
    """
    sizes = {episode.state_dim for episode in episodes}
    return 0 if symmetries or len(sizes) != 1 else sizes.pop()


def learn_proprio(
    network: Any,
    autoencoder: Any,
    episodes: Sequence[Episode],
    settings: ProprioTraining,
    *,
    weights: Sequence[float] | None = None,
    compute: ComputeSettings | None = None,
    checkpoint_dir: str | Path | None = None,
    progress: bool = False,
) -> dict[str, float]:
    """Train the proprioception model of a network that has one, on the episodes with recorded states.

    Args:
        network: World model; without a proprioception model (``motion``) it is left unchanged.
        autoencoder: Maps frames to the network's latents.
        episodes: Of any kind.
        settings: How to train.
        weights: Relative frequency of each episode; None for equal ones.
        compute: Device and precision; None is float32 on the network's device.
        checkpoint_dir: Directory of the checkpoints, from which each part resumes.
        progress: Print what is trained, and show progress bars.

    Returns:
        See :func:`train_proprio`; empty if nothing was trained.
    """
    model = getattr(network, "motion", None)
    pairs = zip(episodes, weights or [1.0] * len(episodes), strict=True)
    recorded = [(episode, weight) for episode, weight in pairs if episode.proprio is not None]
    if model is None or not recorded:
        return {}
    episodes, weights = zip(*recorded, strict=True)
    if progress:
        print(
            f"training the proprioception model on {len(episodes)} episodes: {settings.points_steps:,} steps "
            f"for keypoints, {settings.reader_steps:,} for the encoder, {settings.steps:,} for the dynamics",
            flush=True,
        )
    return train_proprio(
        model, episodes, autoencoder.encode, settings, weights=weights, compute=compute,
        checkpoint_dir=checkpoint_dir, progress=progress,
    )  # fmt: skip


def train_proprio(
    model: ProprioModel,
    episodes: Sequence[Episode],
    encode: Callable[[Tensor], Tensor],
    settings: ProprioTraining,
    *,
    weights: Sequence[float] | None = None,
    compute: ComputeSettings | None = None,
    checkpoint_dir: str | Path | None = None,
    progress: bool = False,
) -> dict[str, float]:
    """Train keypoints on first frames, then the encoder on any frames, then the dynamics on states.

    Args:
        model: Trained in place. The normalisation of an untrained one is computed from the episodes.
        episodes: Episodes with ``proprio``, at least one of them with a step or more.
        encode: Frames uint8 ``(B, T, H, W, 3)`` to the world model's ``(B, C, T, h, w)``.
        settings: How to train.
        weights: Relative frequency of each episode; None for equal ones.
        compute: Device and precision; None is float32 on the model's device.
        checkpoint_dir: Directory of the checkpoints, from which each part resumes exactly.
        progress: Show progress bars.

    Returns:
        ``"reader"`` and ``"follow"``, mean absolute errors of the encoder and of the dynamics in standard
        deviations (last tenth of the steps); ``"points"``, see
        :func:`~wmpo_gym.world.keypoints.train_keypoints`.

    Raises:
        ValueError: If there is no such episode, or one whose ``proprio`` is missing or of another size.
    """
    recorded = _Recorded.of(episodes, weights, len(model.mean))
    if not bool(model.mean.any()):
        states = torch.cat([torch.from_numpy(np.array(e.proprio)) for e in recorded.episodes])
        model.mean.copy_(states.mean(0))
        model.deviation.copy_(states.std(0).clamp(min=1e-4))
    rng = np.random.default_rng([settings.seed, 23])

    def fit_settings(steps: int, batch_size: int, weight_decay: float = 1e-2) -> FitSettings:
        return FitSettings(
            steps=steps, batch_size=batch_size, learning_rate=settings.learning_rate,
            weight_decay=weight_decay, seed=settings.seed,
        )  # fmt: skip

    def checkpoints(part: str) -> Path | None:
        return None if checkpoint_dir is None else Path(checkpoint_dir) / part

    model.requires_grad_(True)
    with rounded_quickly(model):
        with torch.no_grad():
            first = [encode(torch.from_numpy(e.frames[None, :1]))[:, :, 0].cpu() for e in recorded.episodes]
        points = train_keypoints(
            model.points, torch.cat(first), fit_settings(settings.points_steps, settings.frames, 1e-4),
            compute=compute, checkpoint_dir=checkpoints("keypoints"), progress=progress,
        )  # fmt: skip
        windows = _ProprioWindows(model, recorded, encode, first)
        encoding = fit_settings(settings.reader_steps, settings.frames)
        reader = fit(
            _Encoding(windows, encoding, rng), encoding, compute=compute,
            checkpoint_dir=checkpoints("encoder"), progress=progress,
        )  # fmt: skip
        dynamics = fit_settings(settings.steps, settings.batch_size)
        follow = fit(
            _Dynamics(windows, dynamics, rng, settings.length), dynamics, compute=compute,
            checkpoint_dir=checkpoints("dynamics"), progress=progress,
        )  # fmt: skip
    model.requires_grad_(False)
    return {"points": points, "reader": reader, "follow": follow}


@dataclass(frozen=True)
class _Recorded:
    """Episodes with the robot's state, and how often each is drawn."""

    episodes: Sequence[Episode]
    shares: np.ndarray

    @classmethod
    def of(cls, episodes: Sequence[Episode], weights: Sequence[float] | None, size: int) -> _Recorded:
        pairs = list(zip(episodes, weights or [1.0] * len(episodes), strict=True))
        pairs = [(episode, weight) for episode, weight in pairs if episode.n_steps > 0]
        if not pairs or any(e.state_dim != size for e, _ in pairs):
            raise ValueError(
                f"Learning how this robot moves takes episodes with {size} numbers of proprio per frame; "
                "leave out those without, or make a world that does not follow it (state_dim=0)."
            )
        shares = np.array([weight for _, weight in pairs], float)
        return cls([episode for episode, _ in pairs], shares / shares.sum())

    def draw(self, n: int, rng: np.random.Generator) -> np.ndarray:
        return rng.choice(len(self.episodes), n, p=self.shares)


class _ProprioWindows:
    """All recorded states and actions in one tensor, shorter episodes padded."""

    def __init__(
        self,
        model: ProprioModel,
        recorded: _Recorded,
        encode: Callable[[Tensor], Tensor],
        first_frames: Sequence[Tensor],
    ) -> None:
        self.model, self.recorded, self.encode = model, recorded, encode
        device, mean, deviation = model.mean.device, model.mean.cpu(), model.deviation.cpu()
        self.steps = np.array([e.n_steps for e in recorded.episodes])
        n, longest = len(self.steps), self.steps.max()
        self.actions = torch.zeros(n, longest, recorded.episodes[0].actions.shape[1])
        self.states = torch.zeros(n, longest + 1, len(mean))
        for i, episode in enumerate(recorded.episodes):
            state = torch.from_numpy(np.array(episode.proprio))
            self.actions[i, : episode.n_steps] = torch.from_numpy(episode.actions)
            self.states[i, : episode.n_steps + 1] = (state - mean) / deviation
        with torch.no_grad():
            self.points = torch.cat([model.points(frame.to(device)).cpu() for frame in first_frames])


class _Encoding(FitTask):
    """Estimate the state in single frames, half of them first frames, where imagination starts."""

    component = "proprioception encoder"

    def __init__(self, windows: _ProprioWindows, config: FitSettings, rng: np.random.Generator) -> None:
        self.windows, self.config, self.rng, self.network = windows, config, rng, windows.model.reader

    def draw(self, step: int) -> dict[str, Tensor]:
        windows, rng, n = self.windows, self.rng, self.config.batch_size
        chosen = windows.recorded.draw(n, rng)
        steps = np.where(rng.random(n) < 0.5, 0, rng.integers(0, windows.steps[chosen] + 1))
        episodes = [windows.recorded.episodes[i] for i in chosen]
        frames = np.stack([e.frames[t : t + 1] for e, t in zip(episodes, steps, strict=True)])
        batch = {"frames": torch.from_numpy(frames), "states": windows.states[chosen, steps]}
        batch = self.runtime.to_device(self.runtime.local(batch))
        return {**batch, "frames": self.runtime.to_device(windows.encode(batch["frames"])[:, :, 0])}

    def compute_loss(self, batch: dict[str, Tensor]) -> Loss:
        error = (self.network(batch["frames"]) - batch["states"]).abs().mean()
        return self.share(error, len(batch["states"]))


class _Dynamics(FitTask):
    """Predict recorded states on trajectories of up to ``length`` steps; a quarter start at the beginning."""

    component = "proprioception dynamics"

    def __init__(
        self, windows: _ProprioWindows, config: FitSettings, rng: np.random.Generator, length: int
    ) -> None:
        self.windows, self.config, self.rng, self.length = windows, config, rng, length
        self.network = windows.model.change

    def frozen_modules(self) -> list[nn.Module]:
        return [self.windows.model]

    def draw(self, step: int) -> dict[str, Tensor]:
        windows, rng, n = self.windows, self.rng, self.config.batch_size
        chosen = windows.recorded.draw(n, rng)
        start = np.where(rng.random(n) < 0.25, 0, rng.integers(0, windows.steps[chosen]))
        steps = start[:, None] + np.arange(self.length)
        valid = torch.from_numpy(steps < windows.steps[chosen][:, None])[..., None]
        steps = np.minimum(steps, windows.steps.max() - 1)
        state, before = windows.states[chosen, start], windows.states[chosen, np.maximum(start - 1, 0)]
        batch = {
            "robot_state": torch.cat([state, state - before, windows.points[chosen]], dim=1),
            "actions": windows.actions[chosen[:, None], steps],
            "targets": windows.states[chosen[:, None], steps + 1],
            "valid": valid,
            "count": (valid.sum() * state.shape[1]).expand(n),
        }
        return self.runtime.to_device(self.runtime.local(batch))

    def compute_loss(self, batch: dict[str, Tensor]) -> Loss:
        predicted = self.windows.model.rollout(batch["robot_state"], batch["actions"])
        targets = batch["targets"]
        errors = (predicted[..., : targets.shape[-1]] - targets).abs() * batch["valid"]
        loss = errors.sum() / batch["count"][0]
        return Loss(loss, {"loss": float(loss.detach())})
