"""The task of a command that was given episodes is the one they belong to."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from wmpo_gym.cli.common import policy_and_world, policy_task, task_of
from wmpo_gym.data.episode import Episode
from wmpo_gym.data.store import EpisodeStore
from wmpo_gym.utils.io import ArtifactError
from wmpo_gym.world.world import find_pretrained


def store(root: Path, **meta: str) -> Path:
    frames, actions = np.zeros((2, 8, 8, 3), np.uint8), np.zeros((1, 7), np.float32)
    EpisodeStore(root, codec="npy").append(Episode(frames, actions, None, 1, 0, 0, "lift the cube", meta))
    return root


def test_recorded_episodes_name_their_task(tmp_path: Path) -> None:
    assert task_of(None, [store(tmp_path, task="lift-close@64")]).name == "lift-close@64"
    assert task_of("move-block", [tmp_path]).name == "move-block"


def test_no_task_is_assumed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="do not say which task.*give --task"):
        task_of(None, [store(tmp_path / "a")])
    (tmp_path / "b").mkdir()
    with pytest.raises(ArtifactError, match="holds no whole episode"):
        task_of(None, [tmp_path / "b"])


def test_policy_and_world_belong_together() -> None:
    assert policy_and_world(None, None) == ("move-block", "move-block")
    assert policy_and_world("move-block", None) == ("move-block", "move-block")
    assert policy_and_world("mine", "my-world") == ("mine", "my-world")
    with pytest.raises(ValueError, match="give --world, too"):
        policy_and_world("mine", None)
    with pytest.raises(ValueError, match="give --policy, too"):
        policy_and_world(None, "my-world")


def test_the_task_of_a_policy_follows_from_its_card() -> None:
    assert policy_task("move-block").name == "move-block"
    directory = find_pretrained("move-block", "policy")  # as older pipelines wrote them: without a task
    assert policy_task(str(directory)).name == "move-block"
