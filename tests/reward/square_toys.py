"""A toy task: bring the red or the blue square onto the disc."""

from __future__ import annotations

import numpy as np

from wmpo_gym.data.episode import Episode

SIZE, DISC = 16, (4, 11)  # side of the picture, centre (row, column) of the disc


def picture(centre: tuple[int, int], colour: int) -> np.ndarray:
    """A square of one colour channel (0 red, 2 blue) on a grey table with a green disc."""
    image = np.full((SIZE, SIZE, 3), 120, np.uint8)
    image[DISC[0] - 3 : DISC[0] + 4, DISC[1] - 3 : DISC[1] + 4] = (40, 200, 40)
    row, column = centre
    image[row - 1 : row + 2, column - 1 : column + 2] = 20
    image[row - 1 : row + 2, column - 1 : column + 2, colour] = 240
    return image


def square_episode(
    index: int, success: bool, *, task_id: int = 0, colour: int | None = None, steps: int = 8
) -> Episode:
    """A square that walks straight to the disc, or in a failure to a place beside it."""
    rng = np.random.default_rng(index)
    goal = np.array(DISC) if success else np.array([11, rng.integers(2, 14)])
    start = np.array([rng.integers(2, 14), 2])
    centres = np.round(start + (goal - start) * np.linspace(0, 1, steps + 1)[:, None]).astype(int)
    colour = 2 * task_id if colour is None else colour
    frames = np.stack([picture((int(r), int(c)), colour) for r, c in centres])
    noise = rng.integers(-6, 7, frames.shape)
    return Episode(
        frames=(frames + noise).clip(0, 255).astype(np.uint8),
        actions=np.zeros((steps, 2), np.float32),
        success=success,
        finish_step=steps,
        start_state_id=index,
        task_id=task_id,
        instruction=("red", "blue")[task_id],
    )
