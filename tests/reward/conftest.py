from __future__ import annotations

import pytest
from square_toys import SIZE, square_episode

from wmpo_gym.data.augment import Symmetry
from wmpo_gym.data.episode import Episode
from wmpo_gym.tasks import StartStates, Task
from wmpo_gym.training.presets import TrainingHints


@pytest.fixture
def task() -> Task:
    """Bring the red or the blue square onto the disc; small enough to learn in seconds."""
    return Task(
        name="squares",
        instructions=("red", "blue"),
        horizon=8,
        chunk=2,
        action_dim=2,
        control_hz=10.0,
        image_size=SIZE,
        start_states=StartStates(train=100, validation=10, test=10, seed=1),
        action_low=(-1.0, -1.0),
        action_high=(1.0, 1.0),
        success_tolerance_px=2.0,
        exclusive_instructions=True,
    )


@pytest.fixture
def hints() -> TrainingHints:
    """The task stays what it is when red and blue are exchanged."""
    swap = Symmetry("swap", (1.0, 1.0), (1, 0), channel_order=(2, 1, 0))
    return TrainingHints(symmetries=(swap,))


@pytest.fixture
def episodes() -> list[Episode]:
    """Sixty episodes, two in five successes, both instructions."""
    return [square_episode(i, i % 5 < 2, task_id=i % 2, steps=5 + i % 4) for i in range(60)]
