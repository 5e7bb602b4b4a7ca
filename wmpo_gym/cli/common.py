"""Shared helpers of the commands: load policies, worlds and episodes, and draw start states."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import numpy as np
import tyro

from wmpo_gym.data.episode import Episode
from wmpo_gym.data.store import EpisodeStore
from wmpo_gym.data.task_file import find_task, read_task
from wmpo_gym.tasks import TASKS, Task
from wmpo_gym.utils.io import ArtifactError

if TYPE_CHECKING:
    from wmpo_gym.policies.vla_policy import VLAPolicy
    from wmpo_gym.world.world import World

T = TypeVar("T")
BUNDLED = "move-block"  # the task whose weights come with the package
# Settings whose options carry no prefix: --steps instead of --training.steps.
Flat = Annotated[T, tyro.conf.OmitArgPrefixes]


def load_policy(name_or_dir: str, *, seed: int = 0, device: str = "cpu", **kwargs: Any) -> VLAPolicy:
    """A policy from a directory, a hub id or the name of a task with a bundled one.

    Args:
        name_or_dir: Directory, hub id or task name.
        seed: Seed of the policy's sampling.
        device: Device that the policy is moved to.
        **kwargs: Further arguments of :class:`~wmpo_gym.policies.VLAPolicy`.

    Raises:
        ValueError: If there is none.
        ArtifactError: If its files are damaged.
    """
    from wmpo_gym.policies.vla_policy import VLAPolicy
    from wmpo_gym.world.world import find_pretrained

    return VLAPolicy.from_pretrained(find_pretrained(name_or_dir, "policy"), seed=seed, **kwargs).to(device)


def policy_task(name_or_dir: str) -> Task:
    """The task that a policy was trained for, from its card.

    Raises:
        ValueError: If its card does not say.
    """
    from wmpo_gym.policies.weights import read_policy_card
    from wmpo_gym.world.world import find_pretrained

    card = read_policy_card(find_pretrained(name_or_dir, "policy"))
    meta = card.get("meta", {})
    if "task_spec" in meta:
        return Task.from_dict(meta["task_spec"])
    if "task" in meta or name_or_dir in TASKS:
        return find_task(str(meta.get("task", name_or_dir)))
    sentences, known = tuple(card.get("instructions", ())), TASKS.values()
    if len(same := [task for task in known if task.instructions == sentences]) == 1:
        return same[0]  # the sentences of only one task
    raise ValueError(f"The policy {name_or_dir} does not say which task it is for; give --task.")


def policy_and_world(policy: str | None, world: str | None) -> tuple[str, str]:
    """A matching policy and world: the given ones, or the bundled ones of one task.

    Args:
        policy: Directory, hub id or task name.
        world: Directory, hub id or task name.

    Raises:
        ValueError: If only one of them is given, and it is not the bundled one of a task.
    """
    if policy is None and world is None:
        return BUNDLED, BUNDLED
    for option, other in (("--policy", world), ("--world", policy)):
        given = policy if option == "--policy" else world
        if given is None and other not in TASKS:
            raise ValueError(f"{other} is not the bundled one of a task; give {option}, too.")
    return str(policy or world), str(world or policy)


def check_policy_fits(policy: VLAPolicy, name: str, task: Task) -> None:
    """Check that a policy's chunk length, action size and image size are the task's.

    Raises:
        ValueError: If they differ; the message gives both.
    """
    config, size = policy.config, policy.observation_space["pixels"].shape[1]
    has = (config.chunk, config.action_dim, size)
    if has != (task.chunk, task.action_dim, task.image_size):
        raise ValueError(
            f"The policy {name} is for chunks of {has[0]} x {has[1]} numbers and images of {size} pixels; "
            f"task {task.name!r} has {task.chunk} x {task.action_dim} and {task.image_size} pixels. Give the "
            "policy's task with --task, or another policy."
        )


def load_world(name_or_dir: str, *, device: str = "cpu") -> World:
    """A world from a directory, a hub id or the name of a task with a bundled one.

    Args:
        name_or_dir: Directory, hub id or task name.
        device: Device that its networks are moved to.

    Raises:
        ValueError: If there is none.
        ArtifactError: If its files are damaged.
    """
    from wmpo_gym.world.world import World

    return World.from_pretrained(name_or_dir).to(device)


def task_of(name: str | None, directories: Sequence[Path]) -> Task:
    """The named task, or else the task recorded with the episodes.

    Args:
        name: Name of a known task, or a directory, see :func:`~wmpo_gym.data.task_file.find_task`.
        directories: Stores of episodes.

    Raises:
        ValueError: If there is no such task, or none is named and the episodes record none.
        ArtifactError: If a description is damaged, or a directory holds no whole episode.
    """
    if name is not None:
        return find_task(name)
    for directory in directories:
        if (task := read_task(directory)) is not None:
            return task
    for directory in directories:
        store = EpisodeStore(directory)
        store.check_exists()
        for episode in store:
            if "task" in episode.meta:
                return find_task(str(episode.meta["task"]))
            break
        else:
            raise ArtifactError(
                f"{directory} holds no whole episode; `wmpo collect` or `wmpo import` makes some."
            )
    raise ValueError(
        f"{', '.join(map(str, directories))}: the episodes do not say which task they belong to; give --task."
    )


def iterate_episodes(directories: Sequence[Path], task: Task) -> Iterator[Episode]:
    """Iterate over the episodes of several stores; broken episodes are skipped with a warning.

    Raises:
        ArtifactError: If a directory does not exist or holds no complete episode.
        ValueError: If an episode was recorded for another task or with another action scaling.
    """
    return _of_task(directories, task, iter)


def load_episodes(directories: Sequence[Path], task: Task, frame_cache: Path | None = None) -> list[Episode]:
    """The episodes of several stores; frames stay on disk until they are read.

    Args:
        directories: The stores.
        task: The task that all episodes must belong to.
        frame_cache: Directory of decoded frames, see :meth:`~wmpo_gym.data.store.EpisodeStore.open`.

    Raises:
        ArtifactError: See :func:`iterate_episodes`.
        ValueError: See :func:`iterate_episodes`.
        WriteError: If decoded frames cannot be written.
    """
    return list(_of_task(directories, task, lambda store: store.open(frame_cache)))


def _of_task(
    directories: Sequence[Path], task: Task, read: Callable[[EpisodeStore], Iterable[Episode]]
) -> Iterator[Episode]:
    """The episodes that ``read`` yields for each store, after checking their task."""
    for directory in directories:
        own, store, empty = read_task(directory), EpisodeStore(directory), True
        if own is not None and own != task:
            raise ValueError(
                f"{directory} was imported as {own.name!r} with other limits or instructions than this "
                f"{task.name!r}; import it for this one, `wmpo import --task` with the first directory."
            )
        store.check_exists()
        for episode in read(store):
            if episode.meta.get("task", task.name) != task.name:
                raise ValueError(
                    f"{directory} holds episodes of task {episode.meta['task']!r}, not {task.name!r}."
                )
            yield episode
            empty = False
        if empty:
            raise ArtifactError(
                f"{directory} holds no whole episode; `wmpo collect` or `wmpo import` makes some."
            )


def split_episodes(episodes: list[Episode], share: float, seed: int) -> tuple[list[Episode], list[Episode]]:
    """Split episodes at random into training episodes and a held-out fraction ``share``.

    Raises:
        ValueError: If the fraction is not in [0, 1).
    """
    if not 0 <= share < 1:
        raise ValueError(f"--holdout must be a share of the episodes in [0, 1), got {share}.")
    held = set(
        np.random.default_rng([seed, 5]).permutation(len(episodes))[: round(share * len(episodes))].tolist()
    )
    parts = (
        [e for i, e in enumerate(episodes) if i not in held],
        [e for i, e in enumerate(episodes) if i in held],
    )
    return parts


def option_value(options: Sequence[str], name: str, default: str) -> str:
    """The value of one option, parsed before all others because their defaults depend on it.

    Args:
        options: The words after the command.
        name: The option, for instance ``"--task"``.
        default: The value if the option is not given.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument(name, dest="value", default=default)
    return str(parser.parse_known_args([w for w in options if w not in ("-h", "--help")])[0].value)
