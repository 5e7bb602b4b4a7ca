"""A policy made by hand, and a world that cannot err: the simulator behind the interface of a world."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from wmpo_gym.tasks import get_task
from wmpo_gym.utils.rows import TensorRows

TASK = get_task("move-block")
SIDE = TASK.image_size
PIXELS_PER_CM = SIDE / 185
GOAL = np.array([SIDE / 2 + 55 * PIXELS_PER_CM, SIDE / 2])


class FetchPolicy:
    """Moves to the named block, carries it to a spot beside the disc's centre and lets go; noise optional.

    It sees pixels only. ``aim_error`` (centimetres, upwards) sets how often it succeeds.
    """

    device = "cpu"

    def __init__(self, aim_error: float = 0.0, noise: float = 0.0, seed: int = 0) -> None:
        self.aim_error, self.noise = aim_error, noise
        self.generator = torch.Generator().manual_seed(seed)
        self.batches: list[int] = []

    def sample(
        self, obs: dict[str, torch.Tensor], deterministic: bool = False
    ) -> tuple[torch.Tensor, None, None]:
        pixels, task_id = obs["pixels"].numpy().astype(float), obs["task_id"].numpy()
        self.batches.append(len(pixels))
        actions = np.stack([self._plan(p, 2 * t) for p, t in zip(pixels, task_id, strict=True)])
        out = torch.as_tensor(actions, dtype=torch.float32)
        if not deterministic:
            out[..., :2] += self.noise * torch.randn(out[..., :2].shape, generator=self.generator)
        return out, None, None

    def _plan(self, pixels: np.ndarray, channel: int) -> np.ndarray:
        others = np.delete(pixels, channel, axis=-1).max(axis=-1)
        block = _centroid(np.clip(pixels[..., channel] - others - 40, 0, None))
        tool = _centroid(np.clip(70 - pixels.max(axis=-1), 0, None))
        lit = (pixels.min(axis=-1) > 200).sum() > 1
        goal = GOAL - (0.0, self.aim_error * PIXELS_PER_CM)
        step = 12 * PIXELS_PER_CM
        if lit:
            moves, grip = goal - block, [1.0, 1.0, 1.0, 1.0]
            if np.abs(moves).max() < 4 * step:
                grip = [1.0, 1.0, 1.0, -1.0]
        else:
            moves, grip = block - tool, [-1.0, -1.0, -1.0, 1.0]
            if np.linalg.norm(goal - block) < 23 * PIXELS_PER_CM:
                return np.tile([-0.5, 0.0, -1.0], (4, 1))
        n = 3 if lit and grip[-1] < 0 else 4
        share = np.clip(moves / step / n, -1, 1) * (1, -1)
        plan = np.column_stack([np.tile(share, (4, 1)), grip])
        if n == 3:
            plan[3, :2] = 0
        return plan


def _centroid(mass: np.ndarray) -> np.ndarray:
    rows, cols = np.mgrid[: mass.shape[0], : mass.shape[1]] + 0.5
    total = mass.sum() or 1.0
    return np.array([(mass * cols).sum() / total, (mass * rows).sum() / total])


@dataclass
class TwinState(TensorRows):
    """States of the simulators that a batch of imagined episodes stands for."""

    states: torch.Tensor


@dataclass
class NothingKept(TensorRows):
    """The state of a classifier that looks at single frames."""

    unused: torch.Tensor


class TwinImagination:
    """The simulator behind the interface of ``Imagination``; it knows start frames by heart."""

    noise_shape = (1, TASK.chunk, 1, 1)
    nfe_per_chunk = 1
    chunk, device, network = TASK.chunk, torch.device("cpu"), torch.nn.Identity()

    def __init__(self, start_state_ids: list[int], blur: float = 0.0) -> None:
        from wmpo_gym.envs.simulated import make_simulator

        self.simulator, self.blur = make_simulator(TASK), blur
        self.known: dict[bytes, np.ndarray] = {}
        for start_state_id in start_state_ids:
            self.simulator.reset(start_state_id)
            self.known[self.simulator.render().tobytes()] = self.simulator.get_state()

    def start(self, frames: np.ndarray) -> TwinState:
        return TwinState(torch.tensor(np.stack([self.known[np.asarray(f).tobytes()] for f in frames])))

    def step(
        self, state: TwinState, actions: np.ndarray, noise: torch.Tensor
    ) -> tuple[torch.Tensor, TwinState]:
        frames, states = [], []
        for packed, chunk, shake in zip(
            state.states.numpy(), np.asarray(actions), np.asarray(noise), strict=True
        ):
            self.simulator.set_state(packed)
            clip = []
            for action in chunk:
                self.simulator.step(action)
                clip.append(self.simulator.render())
            frames.append(np.clip(np.stack(clip) + self.blur * shake.mean(), 0, 255).astype(np.uint8))
            states.append(self.simulator.get_state())
        return torch.from_numpy(np.stack(frames)), TwinState(torch.tensor(np.stack(states)))


class RuleClassifier:
    """Success as it looks: the named block within ``radius`` centimetres of the disc's centre, lamp dark."""

    window, threshold = 1, 0.5

    def __init__(self, radius: float = 16.0) -> None:
        self.radius = radius

    def start(self, frames: np.ndarray) -> NothingKept:
        return NothingKept(torch.zeros(len(frames)))

    def update(
        self, state: NothingKept, frames: np.ndarray, task_ids: np.ndarray
    ) -> tuple[torch.Tensor, NothingKept]:
        images = np.asarray(frames).astype(float)
        probs = [[self._prob(f, 2 * int(t)) for f in clip] for clip, t in zip(images, task_ids, strict=True)]
        return torch.tensor(probs, dtype=torch.float32), state

    def _prob(self, frame: np.ndarray, channel: int) -> float:
        others = np.delete(frame, channel, axis=-1).max(axis=-1)
        block = _centroid(np.clip(frame[..., channel] - others - 40, 0, None))
        dark = (frame.min(axis=-1) > 200).sum() == 0
        return float(dark and np.linalg.norm(block - GOAL) < self.radius * PIXELS_PER_CM)


@pytest.fixture
def fetch() -> type[FetchPolicy]:
    return FetchPolicy


@pytest.fixture
def twin_world():
    """Factory of worlds that dream the simulator: ``twin_world(ids, radius=…, blur=…)``."""

    def make(ids: list[int], radius: float = 16.0, blur: float = 0.0) -> SimpleNamespace:
        imagination = TwinImagination(ids, blur)
        return SimpleNamespace(
            task=TASK,
            classifier=RuleClassifier(radius),
            card={},
            imagination=lambda: imagination,
            network=torch.nn.Identity(),
            autoencoder=None,
        )

    return make


@pytest.fixture(scope="session")
def tiny_world():
    """A real world with untrained networks."""
    pytest.importorskip("mujoco")
    from wmpo_gym.reward.conv import ConvSuccessClassifier
    from wmpo_gym.rollouts.simulated import start_frames
    from wmpo_gym.world.networks.autoencoder import PixelAutoencoder
    from wmpo_gym.world.networks.conv import ConvWorldModel
    from wmpo_gym.world.world import StartFrames, World

    torch.manual_seed(0)
    ids = np.arange(4)
    frames, task_ids = start_frames(TASK, ids)
    network = ConvWorldModel(image_size=SIDE, widths=(16, 24), blocks=1, cond_dim=32)
    classifier = ConvSuccessClassifier(n_instructions=2)
    return World(
        TASK, network.eval(), PixelAutoencoder(), classifier.eval(), StartFrames(frames, ids, task_ids)
    )
