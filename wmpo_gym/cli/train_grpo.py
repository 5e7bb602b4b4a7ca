"""``wmpo train grpo``: optimise a policy in a world model or in the simulator."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from wmpo_gym.cli.common import BUNDLED, Flat, load_world, policy_and_world, policy_task
from wmpo_gym.pipeline.presets import GRPOSettings
from wmpo_gym.policies.memory import PolicyMemory
from wmpo_gym.tasks import Task, get_task
from wmpo_gym.utils.config import keep_settings
from wmpo_gym.utils.device import check_precision, resolve_device
from wmpo_gym.utils.io import write_json_atomic
from wmpo_gym.utils.progress import progress_wanted


@dataclass(frozen=True)
class Command:
    """Optimise a policy with Group Relative Policy Optimization.

    If interrupted, the same command resumes from the last checkpoint and ends with the same weights. Several
    processes share the groups: torchrun --nproc-per-node 8 --no-python wmpo train grpo ...
    (docs/scaling/distributed.md).

    Attributes:
        out: Output directory of the optimised policy. Checkpoints, TensorBoard curves and history.json go to
            OUT.training.
        policy: Initial policy (directory, hub id or task name). If none of policy, world and task is given,
            the bundled policy and world are used.
        env: Environment of the rollouts: imagined (the world model), or simulated (the paired simulator).
        world: World model for --env imagined (directory, hub id or task name).
        task: Task for --env simulated; by default the task of the policy.
        iterations: Number of iterations, each of rollouts and updates.
        n_groups: Groups per iteration.
        group_size: Rollouts per group, all from the same start state.
        learning_rate: Learning rate; it is high because there are few updates.
        n_epochs: Passes over the rollouts of an iteration.
        clip_range: Lower clip range: the probability ratio is clipped at 1 - CLIP_RANGE.
        clip_range_high: Upper clip range: the probability ratio is clipped at 1 + CLIP_RANGE_HIGH.
        batch_size: Rollouts per minibatch; by default all.
        temperature: Sampling temperature; by default that of the policy.
        dual_noise: Count an imagined success only if a second rollout with other noise also succeeds.
        consecutive_windows: Number of consecutive frames that must reach the classifier's threshold.
        device: Device for policy and world: auto (a GPU if available), cpu, cuda or cuda:1.
        rows_at_once: Rollouts imagined in parallel; affects speed and memory only. On a GPU all by default.
        merge: With --lora-rank, save the full policy with merged adapters instead of the adapters alone.
        offload: Keep the world on the CPU while the policy is updated.
        seed: Random seed.
        memory: Precision, adapters and batching of the policy.
    """

    out: Path
    policy: str | None = None
    env: Literal["imagined", "simulated"] = "imagined"
    world: str | None = None
    task: str | None = None
    iterations: int = 25
    n_groups: int = GRPOSettings.n_groups
    group_size: int = GRPOSettings.group_size
    learning_rate: float = GRPOSettings.learning_rate
    n_epochs: int = GRPOSettings.n_epochs
    clip_range: float = 0.2
    clip_range_high: float = 0.28
    batch_size: int | None = None
    temperature: float | None = None
    dual_noise: bool = False
    consecutive_windows: int = 1
    device: str = "auto"
    rows_at_once: int | None = None
    merge: bool = False
    offload: bool = False
    seed: int = 0
    memory: Flat[PolicyMemory] = field(default_factory=PolicyMemory)

    def run(self) -> None:
        """Train and save."""
        self._resolved()._train()

    def _resolved(self) -> Command:
        """This command with the policy, and the world or task, filled in.

        Raises:
            ValueError: If the options do not determine them, or an option would have no effect.
        """
        if self.env == "simulated":
            if self.world is not None:
                raise ValueError("--world is for --env imagined; leave it out, or leave out --env.")
            policy = self.policy or self.task or BUNDLED
            return replace(self, policy=policy, task=self.task or policy_task(policy).name)
        if self.task is not None:
            raise ValueError(
                f"--task {self.task} is for --env simulated; in imagination the world decides the task. Give "
                "--world, or --env simulated."
            )
        policy, world = policy_and_world(self.policy, self.world)
        return replace(self, policy=policy, world=world)

    def _train(self) -> None:
        from wmpo_gym.algorithms.distributed import Ranks, mixed_precision
        from wmpo_gym.algorithms.grpo import GRPO
        from wmpo_gym.world.world import find_pretrained

        device = resolve_device(self.device)
        check_precision("bf16" if self.memory.precision == "bf16" else "fp32", device)
        ranks = Ranks.join(device)
        self._require_room(ranks.size)
        logs = self.out.with_name(self.out.name + ".training")
        # More iterations continue the same training.
        settings = {k: v for k, v in self._settings().items() if k != "iterations"}
        started = (logs / "checkpoints").exists()
        ranks.on_main(lambda: keep_settings(logs / "command.json", settings, started=started))
        env, start_state_ids = self._make_env(
            ranks.rows_per_rank(self.n_groups * self.group_size, self.group_size)
        )
        model = GRPO(
            "VLAPolicy",
            env,
            learning_rate=self.learning_rate,
            group_size=self.group_size,
            n_groups=self.n_groups,
            batch_size=self.batch_size,
            micro_batch_size=self.memory.micro_batch or GRPOSettings.micro_batch_size,
            recompute_log_probs="bf16" in (self.memory.precision, mixed_precision()),
            n_epochs=self.n_epochs,
            clip_range=self.clip_range,
            clip_range_high=self.clip_range_high,
            start_state_ids=start_state_ids,
            checkpoint_dir=logs / "checkpoints",
            tensorboard_log=str(logs),
            policy_kwargs={
                "model": find_pretrained(str(self.policy), "policy"),
                "temperature": self.temperature,
                **self.memory.policy_kwargs(),
            },
            seed=self.seed,
            device=self._device,
        )
        try:
            model.learn(max_iterations=self.iterations, progress_bar=progress_wanted(), resume=True)
        finally:
            env.close()
        provenance = self._provenance(model, env.unwrapped.task_spec)
        model.save_policy(self.out, provenance, merged=self.merge and bool(model.policy.lora))
        if not ranks.is_main:
            return
        write_json_atomic(logs / "history.json", model.history)
        budget = ", ".join(f"{v:,.0f} {k.replace('_', ' ')}" for k, v in model.budget.to_dict().items())
        print(f"{len(model.history)} iterations ({budget}); the policy is in {self.out}")

    @property
    def _device(self) -> str:
        return str(resolve_device(self.device))

    def _require_room(self, n_processes: int) -> None:
        from wmpo_gym.algorithms.distributed import sharding_enabled
        from wmpo_gym.capacity.estimate import Option
        from wmpo_gym.capacity.fit import require_room
        from wmpo_gym.capacity.workload import default_rows_at_once, saved_workload

        device, real = self._device, self.env == "simulated"
        workload = saved_workload(
            None if real else self.world,
            str(self.policy),
            n_groups=self.n_groups,
            group_size=self.group_size,
            n_epochs=self.n_epochs,
            micro_batch=self.memory.micro_batch or GRPOSettings.micro_batch_size,
            rows_at_once=self.rows_at_once or default_rows_at_once(device),
            **({"horizon": get_task(str(self.task)).horizon} if real else {}),
        )
        sharded = n_processes > 1 and sharding_enabled()
        if sharded and self.merge:
            raise ValueError(
                "--merge needs the whole policy in one place and FSDP spreads it; leave it out, and merge "
                "afterwards with VLAPolicy.from_pretrained(adapters).save_merged(directory)."
            )
        require_room(workload, Option(self.memory, self.offload, sharded), device, n_processes)

    def _make_env(self, rows: int) -> tuple[Any, list[int]]:
        from wmpo_gym.rollouts.rollout import make_rollout_env

        if self.env == "simulated":
            task = get_task(str(self.task))
            return make_rollout_env("WMPO-Simulated-v0", rows, task=task), list(task.split_ids("train"))
        world = load_world(str(self.world))
        env = make_rollout_env(
            "WMPO-Imagined-v0",
            rows,
            world=world,
            device=self._device,
            max_batch=self.rows_at_once,
            offload=self.offload,
            dual_noise=self.dual_noise,
            consecutive_windows=self.consecutive_windows,
        )
        return env, world.start_frames.ids.tolist()

    def _settings(self) -> dict[str, Any]:
        """The settings that affect the result."""
        skipped = ("out", "device", "rows_at_once", "merge", "offload", "memory")
        return {k: v for k, v in asdict(self).items() if k not in skipped} | self.memory.changes()

    def _provenance(self, model: Any, task: Task) -> dict[str, Any]:
        return {
            "task": task.name,
            "task_spec": task.to_dict(),
            "command": " ".join(["wmpo", *sys.argv[1:]]),
            "settings": self._settings(),
            "iterations": len(model.history),
            "budget": model.budget.to_dict(),
            "world_fitness": model.world_fitness,
        }
