"""The bundled worlds and policy give what they gave when they were made."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from wmpo_gym.policies.vla_policy import VLAPolicy
from wmpo_gym.world.world import World, find_pretrained

ROWS = 3


def first_frames(world: World) -> np.ndarray:
    size = world.task.image_size
    frames = np.random.default_rng(1).integers(0, 256, (ROWS, size, size, 3), dtype=np.uint8)
    frames[0] = world.start_frames.frames[0]
    return frames


@pytest.mark.parametrize("name", ["world", "play"])
def test_a_bundled_world_imagines_as_before(golden, name: str) -> None:
    expected, _ = golden("bundled")
    world = World.from_pretrained(find_pretrained("move-block", name))
    imagination, task = world.imagination(), world.task
    noise = torch.randn(ROWS, *imagination.noise_shape, generator=torch.Generator().manual_seed(0))
    shape = (ROWS, task.chunk, task.action_dim)
    actions = np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)
    frames, state = imagination.step(imagination.start(first_frames(world)), actions, noise)
    np.testing.assert_array_equal(frames, expected[f"{name}.frames"].numpy())
    second, _ = imagination.step(state, actions, noise)
    np.testing.assert_array_equal(second, expected[f"{name}.second"].numpy())
    if world.classifier is not None:
        clip = np.concatenate([first_frames(world)[:1], frames[0], second[0]])
        scores = expected[f"{name}.scores"].numpy()
        np.testing.assert_allclose(world.classifier.scores(clip, 0), scores, rtol=0, atol=1e-6)


def test_the_bundled_policy_acts_as_before(golden) -> None:
    expected, _ = golden("bundled")
    policy = VLAPolicy.from_pretrained(find_pretrained("move-block", "policy"))
    world = World.from_pretrained(find_pretrained("move-block", "world"))
    with torch.no_grad():
        observation = {
            "pixels": torch.from_numpy(first_frames(world)),
            "task_id": torch.tensor([0, 1, 0]),
        }
        logits = policy.logits(observation)
    torch.testing.assert_close(logits, expected["policy.logits"], rtol=0, atol=1e-5)
