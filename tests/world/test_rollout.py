"""The imagined rollout: rows stop when they are finished, and nothing depends on what goes on beside them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from wmpo_gym.world.rollout import ImaginedChunk, imagine_rollouts, noise_per_row
from wmpo_gym.world.world import World

AGES = np.array([1, 3, 2])  # chunks


@pytest.fixture(scope="module")
def world() -> World:
    return World.from_pretrained("move-block")


def imagine(world: World, ages: np.ndarray | None, **options) -> list[ImaginedChunk]:
    task, imagination, n = world.task, world.imagination(), len(AGES)
    actions = np.random.default_rng(0).uniform(-1, 1, (n, 3, task.chunk, task.action_dim)).astype(np.float32)
    return list(
        imagine_rollouts(
            imagination,
            world.classifier,
            world.start_frames.frames[:n],
            world.start_frames.task_ids[:n],
            lambda obs, rows, chunk: actions[rows, chunk],
            noise_per_row(imagination, [torch.Generator().manual_seed(i) for i in range(n)]),
            3,
            finished=None if ages is None else lambda rows, steps, probs: ages[rows] * task.chunk <= steps,
            **options,
        )
    )


@pytest.mark.parametrize("max_batch", [None, 1, 2])
def test_rows_stop_and_the_others_go_on_unchanged(world: World, max_batch: int | None) -> None:
    whole, stopped = imagine(world, None), imagine(world, AGES, max_batch=max_batch)
    assert [chunk.rows.tolist() for chunk in stopped] == [[0, 1, 2], [1, 2], [1]]
    for full, part in zip(whole, stopped, strict=True):
        assert full.probs is not None and part.probs is not None
        np.testing.assert_array_equal(part.frames, full.frames[part.rows])
        np.testing.assert_array_equal(part.probs, full.probs[part.rows])


def test_no_rows_give_no_chunks(world: World) -> None:
    empty = world.start_frames.frames[:0]
    none = np.zeros(0, np.int64)
    chunks = imagine_rollouts(world.imagination(), None, empty, none, None, None, 3)  # type: ignore[arg-type]
    assert list(chunks) == []
