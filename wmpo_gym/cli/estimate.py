"""``wmpo estimate``: what a run will take, before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from wmpo_gym.cli.common import Flat, choose_device
from wmpo_gym.policies.memory import PolicyMemory
from wmpo_gym.utils.io import write_json_atomic


@dataclass(frozen=True)
class Command:
    """Parameters, memory and computation of GRPO in imagination, and what makes it fit on a machine.

    Networks are built without memory and run without computing; nothing is loaded. Exit status 1 if it does
    not fit.

    Attributes:
        preset: The bundled world and policy, or those of the paper at their sizes.
        task: With --preset paper: coffee, stack-three, three-piece-assembly or square.
        world: Another world (directory, hub id or task name); only its configuration is read.
        policy: Another policy, likewise.
        machines: GPUs and the memory of one in GB, like 1x80, or 4x8x80 for four machines with eight; here is
            this machine. By default 1x80 and 4x8x80 for the paper, else here.
        n_groups: Groups per iteration.
        group_size: Rollouts per group.
        n_epochs: Passes over the rollouts of an iteration.
        rows_at_once: Rollouts imagined at once.
        offload: Keep the world on the CPU while the policy is updated.
        fsdp: Spread the policy over the GPUs.
        json: File for the figures.
        memory: How the policy is kept. Without these options, --offload and --fsdp, all ways are tried.
    """

    preset: Literal["bundled", "paper"] = "bundled"
    task: str = "coffee"
    world: str = "move-block"
    policy: str = "move-block"
    machines: tuple[str, ...] | None = None
    n_groups: int | None = None
    group_size: int | None = None
    n_epochs: int | None = None
    rows_at_once: int | None = None
    offload: bool = False
    fsdp: bool = False
    json: Path | None = None
    memory: Flat[PolicyMemory] = field(default_factory=PolicyMemory)

    def run(self) -> int:
        """Count and print."""
        from wmpo_gym.capacity.estimate import Estimator, Option
        from wmpo_gym.capacity.fit import Machine, make_plan, plan_text

        default = ("1x80", "4x8x80") if self.preset == "paper" else ("here",)
        machines = [Machine.parse(text) for text in self.machines or default]
        estimator = Estimator(self._workload())
        memory = replace(self.memory, micro_batch=None)  # which is the workload's
        wanted = None
        if memory.changes() or self.offload or self.fsdp:
            wanted = [Option(memory, self.offload, self.fsdp)]
        plans = [make_plan(estimator, machine, wanted) for machine in machines]
        if self.json is not None:
            content = {"parameters": estimator.parameters, "plans": [plan.to_dict() for plan in plans]}
            write_json_atomic(self.json, content)
        print(plan_text(estimator, plans))
        return int(any(plan.best is None for plan in plans))

    def _workload(self) -> Any:
        from wmpo_gym.capacity.workload import published_workload, saved_workload
        from wmpo_gym.cli.train_grpo import MICRO_BATCH, usual_rows
        from wmpo_gym.cli.train_grpo import Command as Train

        given: dict[str, Any] = {
            name: getattr(self, name)
            for name in ("n_groups", "group_size", "n_epochs", "rows_at_once")
            if getattr(self, name) is not None
        }
        if self.memory.micro_batch is not None:
            given["micro_batch"] = self.memory.micro_batch
        if self.preset == "paper":
            return published_workload(self.task, **given)
        usual = {name: getattr(Train, name) for name in ("n_groups", "group_size", "n_epochs")}
        usual |= {"micro_batch": MICRO_BATCH, "rows_at_once": usual_rows(choose_device("auto"))}
        return saved_workload(self.world, self.policy, **{**usual, **given})
