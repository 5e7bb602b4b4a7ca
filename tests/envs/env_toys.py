"""A task small enough to see through, its simulator, and a world of real components with random weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from wmpo_gym.envs.imagined import ImaginedEnv, ImaginedVectorEnv
from wmpo_gym.envs.simulated import register_simulator
from wmpo_gym.envs.simulated.env import SimulatedEnv, SimulatedVectorEnv
from wmpo_gym.tasks import StartStates, Task, register_task
from wmpo_gym.world.networks.autoencoder import PixelAutoencoder
from wmpo_gym.world.networks.conv import ConvWorldModel
from wmpo_gym.world.world import StartFrames, World, WorldConfig

TOY = Task(
    name="toy",
    instructions=("go right", "go left"),
    horizon=12,
    chunk=3,
    action_dim=2,
    control_hz=10.0,
    image_size=40,
    start_states=StartStates(train=20, validation=5, test=7, seed=1),
    action_low=(-0.1, -0.1),
    action_high=(0.1, 0.1),
    success_tolerance_px=2.0,
    variants=("nominal", "dark"),
)
register_task(TOY)


class ToySim:
    """A bright square that moves; done when it is far enough on the named side."""

    def __init__(self, variant: str = "nominal", task: Task = TOY) -> None:
        self.level = 255 if variant == "nominal" else 120
        self.task_id = 0
        self.rendered = 0
        self.position = np.zeros(2)

    def reset(self, start_state_id: int) -> None:
        rng = np.random.default_rng([7, start_state_id])
        self.task_id = int(rng.integers(2))
        self.position = rng.uniform(-0.5, 0.5, 2)

    def step(self, action: np.ndarray) -> None:
        self.position = np.clip(self.position + 0.4 * np.asarray(action, np.float64), -1, 1)

    def render(self) -> np.ndarray:
        self.rendered += 1
        frame = np.zeros((40, 40, 3), np.uint8)
        x, y = ((self.position + 1) * 17).astype(int)
        frame[y : y + 5, x : x + 5, self.task_id] = self.level
        return frame

    @property
    def success(self) -> bool:
        return bool(self.position[0] * (1 if self.task_id == 0 else -1) > 0.8)

    def get_state(self) -> np.ndarray:
        return np.array([*self.position, self.task_id])

    def set_state(self, state: np.ndarray) -> None:
        self.position, self.task_id = state[:2].copy(), int(state[2])


register_simulator(TOY, ToySim)


@dataclass
class Seen:
    """What :class:`HashClassifier` remembers of a row: the sum of its last frame and the frames so far."""

    last: torch.Tensor
    count: torch.Tensor

    def rows(self, index: Any) -> Seen:
        index = torch.as_tensor(index)
        return Seen(self.last[index].clone(), self.count[index].clone())

    def assign(self, index: Any, other: Seen) -> None:
        index = torch.as_tensor(index)
        self.last[index], self.count[index] = other.last, other.count

    def to(self, device: str) -> Seen:
        return Seen(self.last.to(device), self.count.to(device))

    def to_dict(self) -> dict[str, np.ndarray]:
        return {"last": self.last.numpy().copy(), "count": self.count.numpy().copy()}

    @classmethod
    def from_dict(cls, arrays: dict[str, np.ndarray]) -> Seen:
        return cls(torch.tensor(arrays["last"]), torch.tensor(arrays["count"]))


class HashClassifier(torch.nn.Module):
    """Calls frames successes by a hash of a window's pixels and the instruction.

    One wrong pixel changes the verdict, and the share of successes is 1 - threshold whatever the world shows.
    """

    def __init__(self, window: int = 2, threshold: float = 0.85) -> None:
        super().__init__()
        self.window, self.threshold = window, threshold

    def start(self, frames: torch.Tensor) -> Seen:
        sums = frames.flatten(1).long().sum(1)
        return Seen(sums, torch.ones_like(sums))

    def update(self, state: Seen, frames: torch.Tensor, task_ids: torch.Tensor) -> tuple[torch.Tensor, Seen]:
        probs = []
        for frame in frames.unbind(1):
            sums = frame.flatten(1).long().sum(1)
            hashed = (31 * sums + 17 * state.last + 7 * task_ids) % 997
            state = Seen(sums, state.count + 1)
            probs.append(torch.where(state.count >= self.window, hashed / 997, torch.nan))
        return torch.stack(probs, 1), state


def tiny_world(task: Task = TOY, **classifier: Any) -> World:
    """A world whose network has random weights and whose classifier is a :class:`HashClassifier`."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = ConvWorldModel(
            image_size=task.image_size,
            chunk=task.chunk,
            action_dim=task.action_dim,
            widths=(8, 16),
            cond_dim=32,
            blocks=1,
            detail=8,
        )
        for parameter in network.parameters():  # some start at zero, and then nothing would ever happen
            torch.nn.init.normal_(parameter, std=0.15)
    rng = np.random.default_rng(3)
    n, side = 24, task.image_size  # 20 ids of the training split and 4 of the validation split
    return World(
        task=task,
        network=network.eval(),
        autoencoder=PixelAutoencoder(),
        classifier=HashClassifier(**classifier),
        start_frames=StartFrames(
            rng.integers(0, 256, (n, side, side, 3), dtype=np.uint8), np.arange(n), np.arange(n) % 2
        ),
        config=WorldConfig(context_frames=2, denoising_steps=2),
    )


WORLD = tiny_world()


def make_single(kind: str, **kwargs: Any) -> ImaginedEnv | SimulatedEnv:
    """Single environment of the toy task, ``"imagined"`` or ``"simulated"``."""
    return ImaginedEnv(world=WORLD, **kwargs) if kind == "imagined" else SimulatedEnv(TOY, **kwargs)


def make_batch(kind: str, num_envs: int, **kwargs: Any) -> ImaginedVectorEnv | SimulatedVectorEnv:
    """Batched environment of the toy task."""
    if kind == "imagined":
        return ImaginedVectorEnv(num_envs, world=WORLD, **kwargs)
    return SimulatedVectorEnv(num_envs, TOY, **kwargs)


def assert_same(left: Any, right: Any, where: str = "") -> None:
    """Exact equality of nested dicts, tuples and arrays, types and dtypes included."""
    assert type(left) is type(right), (where, type(left), type(right))
    if isinstance(left, dict):
        assert left.keys() == right.keys(), (where, left.keys() ^ right.keys())
        for key in left:
            assert_same(left[key], right[key], f"{where}.{key}")
    elif isinstance(left, (tuple, list)):
        assert len(left) == len(right), where
        for i, (a, b) in enumerate(zip(left, right, strict=True)):
            assert_same(a, b, f"{where}[{i}]")
    elif isinstance(left, np.ndarray) and left.dtype == object:
        assert_same(list(left), list(right), where)
    elif isinstance(left, np.ndarray):
        assert left.dtype == right.dtype and left.shape == right.shape, (where, left.dtype, right.dtype)
        assert np.array_equal(left, right), (where, np.argwhere(left != right)[:5])
    else:
        assert left == right, (where, left, right)
