"""``wmpo train sft``: supervised fine-tuning of a policy."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

from wmpo_gym.cli.common import Flat, load_episodes, load_policy, task_of
from wmpo_gym.policies.sft import SFTSettings, train_sft


@dataclass(frozen=True)
class Command:
    """Fine-tune a vision-language-action policy on recorded episodes, failures included.

    Interrupted, the same command goes on from its last checkpoint, to the same weights.

    Attributes:
        episodes: Directories of episodes.
        out: Directory of the policy; checkpoints and TensorBoard curves go to the same name with
            .training behind it.
        task: Task, or the directory of an import or a world; that of imported episodes by default.
        policy: Go on from this policy (directory, hub id or task name); a new one by default.
        seed: Decides the initial weights and everything random.
        settings: How to train.
    """

    episodes: tuple[Path, ...]
    out: Path
    task: str | None = None
    policy: str | None = None
    seed: int = 0
    settings: Flat[SFTSettings] = field(default_factory=SFTSettings)

    def run(self) -> None:
        """Train and save."""
        from wmpo_gym.progress import progress_bar

        task = task_of(self.task, self.episodes)
        episodes = load_episodes(self.episodes, task)
        start = load_policy(self.policy, seed=self.seed) if self.policy else None
        logs = self.out.with_name(self.out.name + ".training")
        with progress_bar(total=self.settings.steps, desc="fine-tuning", unit="step") as bar:

            def show(step: int, steps: int, metrics: dict[str, float]) -> None:
                bar.set_postfix_str(f"loss {metrics['loss']:.3f}", refresh=False)
                bar.update(step - bar.n)

            policy = train_sft(
                episodes,
                task,
                settings=self.settings,
                seed=self.seed,
                policy=start,
                progress=show,
                log_dir=logs,
                checkpoint_dir=logs / "checkpoint",
            )
        policy.save_pretrained(
            self.out,
            {
                "task": task.name,
                "task_spec": task.to_dict(),
                "command": " ".join(["wmpo", *sys.argv[1:]]),
                "episodes": len(episodes),
                "seed": self.seed,
                "settings": self.settings.to_dict(),
            },
        )
        print(f"fine-tuned on {len(episodes)} episodes; the policy is in {self.out}")
