"""``wmpo evaluate``: success rates in the simulator, and precision of imagined successes."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from wmpo_gym.cli.common import check_policy_fits, load_policy, load_world, policy_task
from wmpo_gym.data.task_file import find_task
from wmpo_gym.utils.device import Precision, check_precision, resolve_device

if TYPE_CHECKING:
    from wmpo_gym.evaluation.twin import TwinComparison
    from wmpo_gym.policies.vla_policy import VLAPolicy
    from wmpo_gym.rollouts.protocol import EvalProtocol
    from wmpo_gym.rollouts.rollout import Rollouts
    from wmpo_gym.tasks import Task
    from wmpo_gym.world.world import World

Pair = tuple["Rollouts", "Rollouts"]  # sampled and greedy, on the same start states


@dataclass(frozen=True)
class Command:
    """Evaluate a policy in the simulator on held-out start states, with sampled and with greedy actions.

    With --base, two policies are compared on the same start states. With --world, imagined successes are
    checked by replaying the same actions in the simulator. With both and --out, a report.html is written.

    Attributes:
        policy: Directory, hub id or task name (the bundled base policy).
        base: Policy to compare with.
        world: World to check (directory, hub id or task name).
        task: Task name; by default the task of the policy.
        episodes: Number of start states, one episode each.
        split: Split of the start states; reported numbers use test.
        variant: Scene variant of the simulator.
        seed: Random seed.
        clips: Number of side-by-side videos in the report.
        out: Directory for results.json, its protocol and report.html.
        device: Device for policy and world: auto (a GPU if available), cpu, cuda or cuda:1.
        precision: fp32, or bf16 for the policy on a GPU.
    """

    policy: str
    base: str | None = None
    world: str | None = None
    task: str | None = None
    episodes: int = 512
    split: Literal["train", "validation", "test"] = "test"
    variant: str = "nominal"
    seed: int = 0
    clips: int = 6
    out: Path | None = None
    device: str = "auto"
    precision: Precision = "fp32"

    def run(self) -> None:
        """Measure, print, save."""
        from wmpo_gym.rollouts.protocol import save_result

        began = time.perf_counter()
        device = str(resolve_device(self.device))
        task = find_task(self.task) if self.task else policy_task(self.policy)
        load = partial(
            load_policy, seed=self.seed, device=device, precision=check_precision(self.precision, device)
        )
        loaded = {name: load(name) for name in (self.policy, self.base) if name}
        for name, each in loaded.items():
            check_policy_fits(each, name, task)
        world = load_world(self.world, device=device) if self.world else None
        if world and world.task.name != task.name:
            raise ValueError(
                f"The world {self.world} is of task {world.task.name!r}, the policy of {task.name!r}; give "
                "a world of the same task."
            )
        policy = self._measure(loaded[self.policy], task)
        base = self._measure(loaded[self.base], task) if self.base else None
        comparison = self._compare(world, load(self.policy)) if world else None
        results = _results(policy, base, comparison, time.perf_counter() - began)
        _show(results)
        protocol = policy[0].protocol
        if self.out is None or protocol is None:
            return
        save_result(self.out / "results.json", results, protocol)
        if world and base and comparison:
            self._report(world, comparison, results, protocol)
        print(f"\nwritten to {self.out}")

    def _measure(self, policy: VLAPolicy, task: Task) -> Pair:
        from wmpo_gym.rollouts.rollout import evaluate_policy_on

        sampled, greedy = (
            evaluate_policy_on(
                task,
                policy,
                self.split,
                self.episodes,
                deterministic=deterministic,
                seed=self.seed,
                variant=self.variant,
            )
            for deterministic in (False, True)
        )
        return sampled, greedy

    def _compare(self, world: World, policy: VLAPolicy) -> TwinComparison:
        from wmpo_gym.evaluation.twin import compare_with_twin

        ids = np.asarray(world.task.split_ids(self.split)[: self.episodes])
        return compare_with_twin(world, policy, ids, seed=self.seed, variant=self.variant, progress=True)

    def _report(
        self, world: World, comparison: TwinComparison, results: dict[str, Any], protocol: EvalProtocol
    ) -> None:
        from wmpo_gym.report.report import Report, choose_clips, write_report

        assert self.out is not None
        report = Report(
            f"{self.policy} against {self.base} on {world.task.name}",
            results,
            gates=world.card.get("gates", {}),
            clips=choose_clips(comparison, world.task, self.clips),
            command=" ".join(["wmpo", *sys.argv[1:]]),
            protocol=protocol,
            control_hz=world.task.control_hz,
        )
        write_report(self.out / "report.html", report)


def _results(policy: Pair, base: Pair | None, twin: TwinComparison | None, seconds: float) -> dict[str, Any]:
    """The measured part of ``results.json``."""
    from wmpo_gym.report.results import build_results, comparison

    spent: dict[str, Any] = {
        "real_episodes": sum(len(r) for pair in (policy, base) if pair for r in pair),
        "imagined_frames": 0 if twin is None else int(np.prod(twin.imagined.actions.shape[:2])),
    }
    times = {"evaluation": round(seconds, 1)}
    if base and twin:
        return build_results(
            base=base[0].success,
            wmpo=policy[0].success,
            greedy=(base[1].success, policy[1].success),
            agreement=twin.agreement,
            budget=spent,
            seconds=times,
        )
    results: dict[str, Any] = {"budget": spent, "seconds": {"total": round(seconds, 1), **times}}
    for target, i in ((results, 0), (results.setdefault("greedy", {}), 1)):
        target |= (
            comparison(base[i].success, policy[i].success) if base else {"wmpo": policy[i].rate.to_dict()}
        )
    if twin:
        results |= {
            "imagined_success": twin.agreement.claimed.value,
            "hallucination_gap": twin.agreement.gap.points,
            "agreement": twin.agreement.to_dict(),
        }
    return results


def _show(results: dict[str, Any]) -> None:
    from wmpo_gym.report.results import agreement_rows, table
    from wmpo_gym.utils.text import aligned, show_rate

    if "base" in results:
        rows = table(results)
    else:
        rates = {"sampled, T = 1": results["wmpo"], "greedy": results["greedy"]["wmpo"]}
        rows = [("", "success", "n"), *((k, show_rate(r), str(r["n"])) for k, r in rates.items())]
    print(aligned(rows))
    if "agreement" in results:
        print("\n" + aligned([*agreement_rows(results)]))
