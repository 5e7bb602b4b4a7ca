"""KeypointEncoder that are found in first pictures."""

import numpy as np
import pytest
import torch

from wmpo_gym.world.fit import FitSettings
from wmpo_gym.world.keypoints import LEAST_SPREAD, KeypointEncoder, train_keypoints
from wmpo_gym.world.networks.autoencoder import PixelAutoencoder


def scenes(n: int, seed: int) -> tuple[torch.Tensor, np.ndarray]:
    """Pictures of a red square on grey, somewhere; and where, as row and column of its corner."""
    places = np.random.default_rng(seed).integers(2, 24, (n, 2))
    made = []
    for row, column in places:
        picture = np.full((32, 32, 3), 90, np.uint8)
        picture[row : row + 6, column : column + 6] = (200, 30, 30)
        made.append(picture)
    encoded = PixelAutoencoder().encode(torch.from_numpy(np.stack(made))[:, None])
    return encoded[:, :, 0], places


def learn(points: KeypointEncoder, frames: torch.Tensor, steps: int) -> float:
    return train_keypoints(points, frames, FitSettings(steps=steps, batch_size=32, weight_decay=1e-4))


@pytest.fixture(scope="module")
def found() -> tuple[KeypointEncoder, float]:
    torch.manual_seed(0)
    points = KeypointEncoder(32, 3, 4)
    return points, learn(points, scenes(200, 0)[0], 300)


def test_they_tell_where_the_square_is(found):
    points, undrawn = found
    assert undrawn < 0.6
    pictures, places = scenes(120, 1)
    with torch.no_grad():
        told = points(pictures).numpy()
    known = np.c_[told, np.ones(len(told))]
    reading = np.linalg.lstsq(known[:60], places[:60], rcond=None)[0]
    error = np.abs(known[60:] @ reading - places[60:]).mean()
    assert error < 1.0  # pixels; the square may be anywhere in 22


def test_one_scene_tells_nothing(found):
    points, (picture, _) = KeypointEncoder(32, 3, 2), scenes(1, 2)
    before = [p.clone() for p in points.parameters()]
    assert learn(points, picture.expand(4, -1, -1, -1), 5) == 0.0
    assert all(torch.equal(a, b) for a, b in zip(before, points.parameters(), strict=True))


def test_a_point_that_stands_still_is_not_magnified():
    points = KeypointEncoder(32, 3, 2)
    learn(points, scenes(6, 3)[0], 1)  # hardly moves them
    assert float(points.spread.min()) == pytest.approx(LEAST_SPREAD)


@pytest.mark.parametrize("side", [8, 40, 64, 256])
def test_any_picture_size(side):
    points = KeypointEncoder(side, 3, 3)
    assert len(points.axis) <= 32 and points(torch.zeros(2, 3, side, side)).shape == (2, 6)
