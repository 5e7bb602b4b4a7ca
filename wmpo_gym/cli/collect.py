"""``wmpo collect``: record episodes in the simulated twin."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from wmpo_gym.cli.common import Flat, choose_start_states, load_policy
from wmpo_gym.data.settings import keep_settings
from wmpo_gym.data.store import EpisodeStore
from wmpo_gym.envs.simulated.scripted import ExpertConfig, record_expert, record_play
from wmpo_gym.tasks import Task, get_task


@dataclass(frozen=True)
class Command:
    """Record episodes in the simulated twin, one directory each, with success labels.

    Interrupted, the same command goes on where it stopped and records the same episodes; with a larger
    ``--episodes`` it adds to them.

    Attributes:
        out: Directory of the episodes.
        actor: Who acts: the scripted expert, task-agnostic play (no labels), or a policy.
        policy: Directory, hub id or task name (the bundled one) of the policy, for ``--actor policy``.
        greedy: Let the policy act greedily instead of sampling.
        task: Task.
        episodes: How many.
        split: Split the start states are drawn from.
        variant: Scene variant.
        seed: Decides the start states and everything random.
        num_envs: Rows that a policy acts in at once.
        expert: The expert's mistakes.
    """

    out: Path
    actor: Literal["expert", "play", "policy"] = "expert"
    policy: str = "move-block"
    greedy: bool = False
    task: str = "move-block"
    episodes: int = 128
    split: Literal["train", "validation", "test"] = "train"
    variant: str = "nominal"
    seed: int = 0
    num_envs: int = 64
    expert: Flat[ExpertConfig] = field(default_factory=ExpertConfig)

    def run(self) -> None:
        """Record what is missing and say how it went."""
        task = get_task(self.task)
        ids = choose_start_states(task, self.split, self.episodes, self.seed)
        # A longer collection is the same one continued; all the rest decides what gets recorded.
        keep_settings(
            self.out / "collection.json",
            {k: v for k, v in asdict(self).items() if k not in ("out", "episodes")},
        )
        store = EpisodeStore(self.out)
        if self.actor == "policy":
            self._act(task, ids, store)
        else:
            self._script(task, ids, store)
        self._summarise(store)

    def _script(self, task: Task, ids: list[int], store: EpisodeStore) -> None:
        from wmpo_gym.progress import progress_bar

        if task.name != "move-block":
            raise ValueError(f"Task {task.name!r} has no scripted actor; use --actor policy.")
        present = set(store.ids())
        missing = [i for i in ids if i not in present]
        if self.actor == "expert":
            recording = record_expert(missing, seed=self.seed, config=self.expert, variant=self.variant)
        else:
            recording = record_play(missing, seed=self.seed, variant=self.variant)
        with progress_bar(total=len(ids), initial=len(ids) - len(missing), desc=self.actor, unit="ep") as bar:
            for episode in recording:
                store.append(episode)
                bar.update()

    def _act(self, task: Task, ids: list[int], store: EpisodeStore) -> None:
        from wmpo_gym.evaluation.rollouts import collect_episodes, make_rollout_env

        policy = load_policy(self.policy, seed=self.seed)
        rows = min(self.num_envs, self.episodes)
        env = make_rollout_env("WMPO-Simulated-v0", rows, record_frames=True, task=task, variant=self.variant)
        try:
            collect_episodes(
                env, policy, ids, store, deterministic=self.greedy, seed=self.seed, actor=self.policy
            )
        finally:
            env.close()

    def _summarise(self, store: EpisodeStore) -> None:
        from wmpo_gym.evaluation.statistics import success_rate

        outcomes = store.outcomes()
        labelled = [o for o in outcomes if o is not None]
        rate = f", success {success_rate(labelled)}" if labelled else ", unlabelled"
        print(f"{len(outcomes)} episodes in {self.out}{rate}")
