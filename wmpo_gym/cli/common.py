"""What several commands need: finding policies, worlds and episodes, and choosing start states."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import numpy as np
import tyro

from wmpo_gym.data.atomic import ArtifactError
from wmpo_gym.data.episode import Episode
from wmpo_gym.data.store import EpisodeStore
from wmpo_gym.tasks import Task

if TYPE_CHECKING:
    from wmpo_gym.policies.vla_policy import VLAPolicy
    from wmpo_gym.world.world import World

T = TypeVar("T")
# Settings whose options carry no prefix: --steps instead of --training.steps.
Flat = Annotated[T, tyro.conf.OmitArgPrefixes]


def load_policy(name_or_dir: str, *, seed: int = 0) -> VLAPolicy:
    """A policy from a directory, a hub id or the name of a task with a bundled one.

    Raises:
        ValueError: If there is none.
        ArtifactError: If its files are damaged.
    """
    from wmpo_gym.policies.vla_policy import VLAPolicy
    from wmpo_gym.world.world import find_pretrained

    return VLAPolicy.from_pretrained(find_pretrained(name_or_dir, "policy"), seed=seed)


def load_world(name_or_dir: str) -> World:
    """A world from a directory, a hub id or the name of a task with a bundled one.

    Raises:
        ValueError: If there is none.
        ArtifactError: If its files are damaged.
    """
    from wmpo_gym.world.world import World

    return World.from_pretrained(name_or_dir)


def load_episodes(directories: Sequence[Path], task: Task) -> list[Episode]:
    """The episodes of several stores; broken ones are skipped with a warning.

    Raises:
        ArtifactError: If a directory does not exist or holds no whole episode.
        ValueError: If an episode was recorded for another task.
    """
    episodes = []
    for directory in directories:
        found = EpisodeStore(directory).load()
        if not found:
            raise ArtifactError(f"{directory} holds no whole episode; `wmpo collect` records some.")
        for episode in found:
            if episode.meta.get("task", task.name) != task.name:
                raise ValueError(
                    f"{directory} holds episodes of task {episode.meta['task']!r}, not {task.name!r}."
                )
        episodes += found
    return episodes


def choose_start_states(task: Task, split: str, n: int, seed: int) -> list[int]:
    """Draw n different start states of a split.

    A larger n with the same seed begins with the same start states, so that a collection can be extended.

    Raises:
        ValueError: If the split is unknown or has fewer start states.
    """
    ids = task.split_ids(split)
    if not 0 < n <= len(ids):
        raise ValueError(
            f"{n} episodes asked of split {split!r}, which has {len(ids)} start states; choose 1 to "
            f"{len(ids)}."
        )
    return np.random.default_rng([seed, 0x57A7]).permutation(np.arange(ids.start, ids.stop))[:n].tolist()
