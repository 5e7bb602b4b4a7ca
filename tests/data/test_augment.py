"""Symmetries and shifts: what belongs to one example changes together, and nothing else does."""

from __future__ import annotations

import numpy as np

from wmpo_gym.data.augment import (
    shift_images,
    transform_actions,
    transform_frames,
    transform_rows,
    transform_task_ids,
)
from wmpo_gym.training.presets import hints_for


def test_symmetries_map_episodes_onto_episodes():
    mirror, swap = hints_for("move-block").symmetries
    frames = np.random.default_rng(0).integers(0, 255, (2, 4, 4, 3)).astype(np.uint8)
    actions = np.array([[0.5, 0.25, 1.0]], np.float32)
    for symmetry in (mirror, swap):
        once = transform_frames(symmetry, frames), transform_actions(symmetry, actions)
        assert not np.array_equal(once[0], frames) and once[1].dtype == np.float32
        assert np.array_equal(transform_frames(symmetry, once[0]), frames)
        assert np.array_equal(transform_actions(symmetry, once[1]), actions)
    assert transform_actions(mirror, actions).tolist() == [[0.5, -0.25, 1.0]]
    assert transform_task_ids(swap, np.array([0, 1, 1])).tolist() == [1, 0, 0]


def test_only_the_chosen_rows_change():
    mirror, _ = hints_for("move-block").symmetries
    frames = np.random.default_rng(0).integers(0, 255, (3, 2, 4, 5, 3)).astype(np.uint8)
    before = frames.copy()
    changed = transform_rows(transform_frames, mirror, frames, np.array([True, False, True]))
    assert np.array_equal(frames, before), "the input stays"
    assert np.array_equal(changed[1], frames[1])
    for row in (0, 2):
        assert np.array_equal(changed[row], frames[row, :, ::-1])


def test_a_shift_moves_the_image_and_repeats_its_border():
    images = np.zeros((64, 9, 9, 3), np.uint8)
    images[:, 4, 4] = 255
    offsets = np.random.default_rng(0).integers(-2, 3, (2, 64))
    rows = np.argwhere(shift_images(images, offsets)[..., 0])
    assert np.array_equal(rows[:, 0], np.arange(64)) and np.array_equal(rows[:, 1:].T, 4 - offsets)
    border = np.broadcast_to(np.arange(9, dtype=np.uint8)[:, None, None], (1, 9, 9, 3))
    shifted = shift_images(border, np.array([[2], [-2]]))
    assert shifted[0, :, 0, 0].tolist() == [2, 3, 4, 5, 6, 7, 8, 8, 8], "repeated, not wrapped"
