"""``wmpo export``: write episodes as a LeRobotDataset."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from wmpo_gym.cli.common import (
    check_policy_fits,
    iterate_episodes,
    load_policy,
    load_world,
    policy_and_world,
    task_of,
)
from wmpo_gym.data.episode import Episode
from wmpo_gym.data.exporters import export_lerobot
from wmpo_gym.data.store import EpisodeStore
from wmpo_gym.tasks import Task


@dataclass(frozen=True)
class Command:
    """Write a LeRobotDataset v3 of recorded episodes, or (--imagine) of rollouts of a policy in a world.

    Actions are in the robot's units. Imagined episodes are marked in the column "imagined", and their success
    label is the prediction of the world's classifier.

    Attributes:
        out: Output directory of the data set.
        episodes: Directories of episodes to export.
        task: Task name, or the directory of an import or a world; by default the task of the episodes.
        imagine: Number of episodes to imagine, instead of --episodes.
        world: World for --imagine (directory, hub id or task name); the bundled one by default.
        policy: Policy for --imagine (directory, hub id or task name); the bundled one by default.
        greedy: Act greedily instead of sampling.
        camera: Camera name: the image column is observation.images.CAMERA.
        codec: Video codec: h264 (lossy, LeRobot's default), or lossless.
        seed: Random seed of the imagined episodes.
    """

    out: Path
    episodes: tuple[Path, ...] = ()
    task: str | None = None
    imagine: int = 0
    world: str | None = None
    policy: str | None = None
    greedy: bool = False
    camera: str = "main"
    codec: Literal["h264", "lossless"] = "h264"
    seed: int = 0

    def run(self) -> None:
        """Write the data set and print its size."""
        if bool(self.episodes) == bool(self.imagine):
            raise ValueError("Give either --episodes, to export them, or --imagine with how many to make.")
        found: Iterable[Episode]
        if self.imagine:
            task, found = self._imagined()
            total = self.imagine
        else:
            task = task_of(self.task, self.episodes)
            found = iterate_episodes(self.episodes, task)
            total = sum(len(EpisodeStore(directory)) for directory in self.episodes)
        report = export_lerobot(found, self.out, task, camera=self.camera, codec=self.codec, total=total)
        print(
            f"{report.episodes} episodes ({report.imagined} imagined), {report.frames:,} frames in {self.out}"
        )

    def _imagined(self) -> tuple[Task, Iterable[Episode]]:
        from wmpo_gym.rollouts.rollout import make_rollout_env, rollout

        if self.imagine < 1:
            raise ValueError(f"--imagine must be at least 1, got {self.imagine}.")
        name, place = policy_and_world(self.policy, self.world)
        world, policy = load_world(place), load_policy(name, seed=self.seed)
        check_policy_fits(policy, name, world.task)
        rows = min(self.imagine, 64)
        env = make_rollout_env("WMPO-Imagined-v0", rows, record_frames=True, world=world)
        ids = world.start_frames.ids[[i % len(world.start_frames.ids) for i in range(self.imagine)]]
        try:
            made = rollout(
                env,
                policy,
                ids,
                deterministic=self.greedy,
                seed=self.seed,
                record_frames=True,
                progress=True,
                description="imagining",
            )
        finally:
            env.close()
        return world.task, made.episodes(world.task, imagined=True, actor=name)
