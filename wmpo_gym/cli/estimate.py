"""``wmpo estimate``: parameters, memory and computation of a run, without loading weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from wmpo_gym.cli.common import BUNDLED, Flat, policy_and_world
from wmpo_gym.policies.memory import PolicyMemory
from wmpo_gym.utils.device import resolve_device
from wmpo_gym.utils.io import write_json_atomic

_GRPO_OPTIONS = ("n_groups", "group_size", "n_epochs", "rows_at_once", "offload", "fsdp")
_WORLD_MODEL_OPTIONS = ("steps", "batch_size", "peak_tflops", "utilisation")


@dataclass(frozen=True)
class Command:
    """Estimate parameters, memory and computation of a training run, and find settings that fit a machine.

    Networks are built and traced on the meta device; no weights are loaded. The exit status is 1 if the run
    does not fit.

    Attributes:
        training: Training to estimate: GRPO in imagination, or the world model.
        preset: The bundled world and policy, or those of the paper at the published sizes.
        task: With --preset paper: coffee, stack-three, three-piece-assembly or square.
        world: Another world (directory, hub id or task name); only its configuration is read.
        policy: Another policy (directory, hub id or task name); only its configuration is read.
        machines: GPUs x memory of each in GB, for instance 1x80, or 4x8x80 for four machines with eight GPUs;
            here is this machine. Default: 1x80 and 4x8x80 for --preset paper (1x80 and 8x80 for its world
            model), else here.
        n_groups: Groups per iteration.
        group_size: Rollouts per group.
        n_epochs: Passes over the rollouts of an iteration.
        rows_at_once: Rollouts imagined in parallel.
        offload: Keep the world on the CPU while the policy is updated.
        fsdp: Shard the policy over the GPUs.
        steps: With --training world-model: optimiser steps.
        batch_size: With --training world-model: batch size over all devices.
        peak_tflops: With --training world-model: assumed peak of a device in TFLOP/s; by default that of an
            NVIDIA A100 in bfloat16.
        utilisation: With --training world-model: assumed fraction of that peak.
        json: Output file for the estimate.
        memory: Memory options of the policy. If none of these, --offload or --fsdp is given, all combinations
            are tried. For the world model only --micro-batch applies.
    """

    training: Literal["grpo", "world-model"] = "grpo"
    preset: Literal["bundled", "paper"] = "bundled"
    task: str = "coffee"
    world: str | None = None
    policy: str | None = None
    machines: tuple[str, ...] | None = None
    n_groups: int | None = None
    group_size: int | None = None
    n_epochs: int | None = None
    rows_at_once: int | None = None
    offload: bool = False
    fsdp: bool = False
    steps: int | None = None
    batch_size: int | None = None
    peak_tflops: float | None = None
    utilisation: float | None = None
    json: Path | None = None
    memory: Flat[PolicyMemory] = field(default_factory=PolicyMemory)

    def run(self) -> int:
        """Count and print."""
        self._refuse_options()
        fits, content, text = self._grpo() if self.training == "grpo" else self._world_model()
        if self.json is not None:
            write_json_atomic(self.json, content)
        print(text)
        return int(not fits)

    def _given(self, *names: str) -> dict[str, Any]:
        """The named options that were given, with their values."""
        return {name: getattr(self, name) for name in names if getattr(self, name) not in (None, False)}

    def _refuse_options(self) -> None:
        """Refuse options that do not apply to the chosen training.

        Raises:
            ValueError: If there are any; the message names them.
        """
        if self.training == "grpo":
            foreign = self._given(*_WORLD_MODEL_OPTIONS)
        else:
            foreign = self._given(*_GRPO_OPTIONS) | replace(self.memory, micro_batch=None).changes()
        if foreign:
            named = ", ".join(f"--{name.replace('_', '-')}" for name in foreign)
            other = "world-model" if self.training == "grpo" else "grpo"
            raise ValueError(
                f"{named} cannot be given with --training {self.training}; leave it out, or give --training "
                f"{other}."
            )

    def _machines(self, *paper: str) -> list[Any]:
        from wmpo_gym.capacity.fit import Machine

        default = paper if self.preset == "paper" else ("here",)
        return [Machine.parse(text) for text in self.machines or default]

    def _grpo(self) -> tuple[bool, dict[str, Any], str]:
        from wmpo_gym.capacity.estimate import Estimator, Option
        from wmpo_gym.capacity.fit import make_plan, plan_text

        machines, estimator = self._machines("1x80", "4x8x80"), Estimator(self._workload())
        memory = replace(self.memory, micro_batch=None)  # micro_batch belongs to the workload
        considered = None
        if memory.changes() or self.offload or self.fsdp:
            considered = [Option(memory, self.offload, self.fsdp)]
        plans = [make_plan(estimator, machine, considered) for machine in machines]
        content = {"parameters": estimator.parameters, "plans": [plan.to_dict() for plan in plans]}
        return all(plan.best is not None for plan in plans), content, plan_text(estimator, plans)

    def _workload(self) -> Any:
        from wmpo_gym.capacity.workload import default_rows_at_once, published_workload, saved_workload
        from wmpo_gym.pipeline.presets import GRPOSettings

        given = self._given("n_groups", "group_size", "n_epochs", "rows_at_once")
        if self.memory.micro_batch is not None:
            given["micro_batch"] = self.memory.micro_batch
        if self.preset == "paper":
            return published_workload(self.task, **given)
        default = GRPOSettings()
        usual = {name: getattr(default, name) for name in ("n_groups", "group_size", "n_epochs")}
        usual |= {
            "micro_batch": default.micro_batch_size,
            "rows_at_once": default_rows_at_once(str(resolve_device("auto"))),
        }
        name, place = policy_and_world(self.policy, self.world)
        return saved_workload(place, name, **{**usual, **given})

    def _world_model(self) -> tuple[bool, dict[str, Any], str]:
        from wmpo_gym.capacity.training import Speed, TrainingEstimator, plan_training, training_text

        machines, speed = self._machines("1x80", "8x80"), Speed(**self._given("peak_tflops", "utilisation"))
        settings = self._given("steps", "batch_size")
        for name, value in settings.items():
            if value < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}.")
        estimators = {
            gpu: TrainingEstimator(**self._world_training(settings), bf16=gpu)
            for gpu in {machine.gpu for machine in machines}
        }
        plans = [
            plan_training(estimators[m.gpu], m, speed, micro_batch=self.memory.micro_batch) for m in machines
        ]
        estimator = estimators[machines[0].gpu]
        content = {
            "parameters": estimator.parameters,
            "flops_per_step": estimator.flops(),
            "assumed": asdict(speed),
            "plans": [plan.to_dict() for plan in plans],
        }
        fits = all(plan.best is not None for plan in plans)
        return fits, content, training_text(estimator, plans, speed)

    def _world_training(self, changes: dict[str, Any]) -> dict[str, Any]:
        """Arguments of the estimator of a world model's training."""
        from wmpo_gym.capacity.workload import Component, read_world
        from wmpo_gym.pipeline.components import new_network
        from wmpo_gym.pipeline.presets import PRESETS
        from wmpo_gym.tasks import get_task
        from wmpo_gym.world.networks.autoencoder import SDXL_AUTOENCODER
        from wmpo_gym.world.training import WorldModelTraining
        from wmpo_gym.world.world import find_pretrained

        if self.preset == "paper":
            import torch

            recipe, task = PRESETS["paper"], get_task(self.task)
            autoencoder = Component("LatentAutoencoder", SDXL_AUTOENCODER).build()
            with torch.device("meta"):
                network = new_network(recipe, task, autoencoder)
            name, settings, steps = f"paper, world model of {task.name}", recipe.align, recipe.denoising_steps
        else:
            parts, task = read_world(find_pretrained(self.world or BUNDLED, "world"))
            network, autoencoder = parts.network.build(), parts.autoencoder.build()
            steps = parts.sampling.denoising_steps
            name, settings = f"world model of {task.name} ({self.world or BUNDLED})", WorldModelTraining()
        return {
            "name": name,
            "network": network,
            "autoencoder": autoencoder,
            "image_size": task.image_size,
            "settings": replace(settings, **changes),
            "denoising_steps": steps,
        }
