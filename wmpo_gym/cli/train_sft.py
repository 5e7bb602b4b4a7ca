"""``wmpo train sft``: supervised fine-tuning of a policy."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wmpo_gym.cli.common import Flat, load_episodes, load_policy, task_of
from wmpo_gym.policies.memory import PolicyMemory
from wmpo_gym.policies.sft import SFTSettings, instruction_gap, train_sft
from wmpo_gym.training.presets import hints_for
from wmpo_gym.training.runtime import is_main_process
from wmpo_gym.utils.device import check_precision, resolve_device

if TYPE_CHECKING:
    from wmpo_gym.policies.vla_policy import VLAPolicy


@dataclass(frozen=True)
class Command:
    """Fine-tune a vision-language-action policy on recorded episodes (all of them, failures included).

    If interrupted, the same command resumes from the last checkpoint and ends with the same weights.

    Attributes:
        episodes: Directories of episodes.
        out: Output directory of the policy. Checkpoints and TensorBoard curves go to OUT.training.
        task: Task name, or the directory of an import or a world; by default the task of the episodes.
        policy: Policy to fine-tune (directory, hub id or task name); by default a new one.
        device: Device: auto (a GPU if available), cpu, cuda or cuda:1.
        merge: With --lora-rank, save the full policy with merged adapters instead of the adapters alone.
        seed: Random seed of initial weights and training.
        frame_cache: Directory for decoded, uncompressed frames; by default .frames in each directory of
            episodes.
        settings: Training settings.
        memory: Precision, adapters and batching of the policy.
    """

    episodes: tuple[Path, ...]
    out: Path
    task: str | None = None
    policy: str | None = None
    device: str = "auto"
    merge: bool = False
    seed: int = 0
    frame_cache: Path | None = None
    settings: Flat[SFTSettings] = field(default_factory=SFTSettings)
    memory: Flat[PolicyMemory] = field(default_factory=PolicyMemory)

    def run(self) -> None:
        """Train and save."""
        from wmpo_gym.utils.progress import progress_bar

        device = resolve_device(self.device)
        check_precision(self.memory.precision, device)
        task = task_of(self.task, self.episodes)
        episodes = load_episodes(self.episodes, task, self.frame_cache)
        kwargs = self.memory.policy_kwargs()
        if self.policy is None and self.memory.lora_rank is not None:
            raise ValueError("Adapters belong to a policy that is there already; name it with --policy.")
        start = self._start(kwargs) if self.policy else None
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
                policy_kwargs=kwargs,
                device=device,
                micro_batch=self.memory.micro_batch,
                progress=show,
                log_dir=logs,
                checkpoint_dir=logs / "checkpoint",
            )
        if not is_main_process():
            return
        save = policy.save_merged if self.merge and policy.lora else policy.save_pretrained
        save(
            self.out,
            {
                "task": task.name,
                "task_spec": task.to_dict(),
                "command": " ".join(["wmpo", *sys.argv[1:]]),
                "episodes": len(episodes),
                "seed": self.seed,
                "settings": {**self.settings.to_dict(), **self.memory.changes()},
            },
        )
        print(f"fine-tuned on {len(episodes)} episodes; the policy is in {self.out}")
        at_once = self.memory.micro_batch or self.settings.batch
        gap = instruction_gap(policy, episodes, task, batch=at_once)
        required = hints_for(task).instruction_gap
        if gap is not None and required is not None and gap < required:
            print(
                "The policy hardly uses the instruction: with another one, its loss on the episodes is only "
                f"{gap:.2f} nats per token higher (required: {required}); train on with --policy."
            )

    def _start(self, kwargs: dict[str, Any]) -> VLAPolicy:
        """Load the policy to fine-tune, after checking that the device has enough memory to train it."""
        from wmpo_gym.capacity.estimate import Option
        from wmpo_gym.capacity.fit import require_room
        from wmpo_gym.capacity.workload import saved_workload

        assert self.policy is not None
        at_once = self.memory.micro_batch or self.settings.batch
        workload = saved_workload(
            None, self.policy, n_groups=1, group_size=1, n_epochs=1, micro_batch=at_once
        )
        require_room(workload, Option(self.memory), str(resolve_device(self.device)))
        return load_policy(self.policy, seed=self.seed, **kwargs)
