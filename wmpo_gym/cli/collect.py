"""``wmpo collect``: record episodes in the simulator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

from wmpo_gym.cli.common import Flat, check_policy_fits, load_policy, option_value
from wmpo_gym.data.store import EpisodeStore
from wmpo_gym.envs.simulated.scripted import (
    AnyExpert,
    ExpertConfig,
    default_expert,
    record_expert,
    record_play,
)
from wmpo_gym.tasks import Task, get_task
from wmpo_gym.utils.config import keep_settings
from wmpo_gym.utils.device import Precision, check_precision, resolve_device


@dataclass(frozen=True)
class Command:
    """Record episodes in the simulator, one directory each, with success labels.

    If interrupted, the same command resumes and records the same episodes; with a larger --episodes it adds
    further ones.

    Attributes:
        out: Output directory of the episodes; default runs/episodes-TASK.
        policy: expert (scripted demonstrations), play (scripted, unlabelled), or the directory, hub id or
            task name (the bundled one) of a policy.
        greedy: Act greedily instead of sampling from the policy.
        task: Task name; NAME@64 sets the image size to 64 x 64 pixels.
        episodes: Number of episodes.
        split: Split that start states are drawn from.
        variant: Scene variant.
        seed: Random seed of start states and actions.
        num_envs: Number of environments that a policy steps in parallel.
        video: Also write a video of every episode to OUT/videos.
        device: Device for a policy: auto (a GPU if available), cpu, cuda or cuda:1.
        precision: fp32, or bf16 for a policy on a GPU.
        expert: Error model of the scripted expert.
    """

    out: Path | None = None
    policy: str = "expert"
    greedy: bool = False
    task: str = "move-block"
    episodes: int = 128
    split: Literal["train", "validation", "test"] = "train"
    variant: str = "nominal"
    seed: int = 0
    num_envs: int = 64
    video: bool = False
    device: str = "auto"
    precision: Precision = "fp32"
    expert: Flat[tyro.conf.AvoidSubcommands[AnyExpert]] = field(default_factory=ExpertConfig)

    @classmethod
    def default_for(cls, options: Sequence[str]) -> Command:
        """Default values for the task in the options."""
        return cls(expert=default_expert(option_value(options, "--task", cls.task)))

    def run(self) -> None:
        """Record the missing episodes and print a summary."""
        from wmpo_gym.rollouts.rollout import choose_start_states

        task = get_task(self.task)
        out = self.out or Path("runs") / f"episodes-{task.name.replace(':', '-')}"
        ids = choose_start_states(task, self.split, self.episodes, self.seed)
        store = EpisodeStore(out)
        # A larger number of episodes continues the same collection; all other settings must stay equal.
        places = ("out", "episodes", "video", "device", "precision")
        keep_settings(
            out / "collection.json",
            {k: v for k, v in asdict(self).items() if k not in places},
            started=bool(store.directories()),
        )
        if self.policy in ("expert", "play"):
            self._script(task, ids, store)
        else:
            self._act(task, ids, store)
        if self.video:
            _film(store, out / "videos", task)
        _summarise(store, out)

    def _script(self, task: Task, ids: list[int], store: EpisodeStore) -> None:
        from wmpo_gym.utils.progress import progress_bar

        present = set(store.ids())
        missing = [i for i in ids if i not in present]
        if self.policy == "expert":
            recording = record_expert(
                missing, seed=self.seed, config=self.expert, variant=self.variant, task=task
            )
        else:
            recording = record_play(missing, seed=self.seed, variant=self.variant, task=task)
        with progress_bar(
            total=len(ids), initial=len(ids) - len(missing), desc=self.policy, unit="ep"
        ) as bar:
            for episode in recording:
                store.append(episode)
                bar.update()

    def _act(self, task: Task, ids: list[int], store: EpisodeStore) -> None:
        from wmpo_gym.rollouts.rollout import collect_episodes, make_rollout_env

        device = str(resolve_device(self.device))
        precision = check_precision(self.precision, device)
        policy = load_policy(self.policy, seed=self.seed, device=device, precision=precision)
        check_policy_fits(policy, self.policy, task)
        rows = min(self.num_envs, self.episodes)
        env = make_rollout_env("WMPO-Simulated-v0", rows, record_frames=True, task=task, variant=self.variant)
        try:
            collect_episodes(
                env, policy, ids, store, deterministic=self.greedy, seed=self.seed, actor=self.policy
            )
        finally:
            env.close()


def _film(store: EpisodeStore, directory: Path, task: Task) -> None:
    """Write one video per episode, named by its start state."""
    from wmpo_gym.utils.video import save_video

    scale = max(1, 256 // task.image_size)
    for episode in store:
        path = directory / f"{episode.start_state_id:06d}.mp4"
        if not path.exists():
            save_video(path, np.asarray(episode.frames), fps=task.control_hz, scale=scale)


def _summarise(store: EpisodeStore, out: Path) -> None:
    from wmpo_gym.statistics import success_rate

    outcomes = store.outcomes()
    labelled = [o for o in outcomes if o is not None]
    rate = f", success {success_rate(labelled)}" if labelled else ", unlabelled"
    print(f"{len(outcomes)} episodes in {out}{rate}")
