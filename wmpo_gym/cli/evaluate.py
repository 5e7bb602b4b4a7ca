"""``wmpo evaluate``: success of policies in the twin, and how far imagination can be believed."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from wmpo_gym.cli.common import load_policy, load_world
from wmpo_gym.tasks import get_task
from wmpo_gym.utils.device import resolve_device

if TYPE_CHECKING:
    from wmpo_gym.evaluation.twin import TwinComparison
    from wmpo_gym.policies.vla_policy import VLAPolicy
    from wmpo_gym.rollouts.protocol import EvalProtocol
    from wmpo_gym.rollouts.rollout import Rollouts
    from wmpo_gym.world.world import World

Pair = tuple["Rollouts", "Rollouts"]  # sampled and greedy, on the same start states


@dataclass(frozen=True)
class Command:
    """Evaluate a policy in the simulated twin, on start states it never saw, sampled and greedily.

    With --base the two are compared on the same start states; with --world its imagined successes are judged
    by running the same actions in the twin; with both and --out there is a report.html, too.

    Attributes:
        policy: Directory, hub id or task name (the bundled base policy).
        base: Policy to compare with.
        world: World to judge (directory, hub id or task name).
        task: Task.
        episodes: Start states, one episode each.
        split: Their split; reported numbers use test.
        variant: Scene variant of the twin.
        seed: Decides everything random.
        device: Where policies and world compute: auto (a GPU if there is one), cpu, cuda or cuda:1.
        clips: Side-by-side videos in the report.
        out: Directory for results.json, its protocol and report.html.
    """

    policy: str
    base: str | None = None
    world: str | None = None
    task: str = "move-block"
    episodes: int = 512
    split: Literal["train", "validation", "test"] = "test"
    variant: str = "nominal"
    seed: int = 0
    device: str = "auto"
    clips: int = 6
    out: Path | None = None

    def run(self) -> None:
        """Measure, print, save."""
        from wmpo_gym.pipeline.components import move_world
        from wmpo_gym.rollouts.protocol import save_result

        began = time.perf_counter()
        device = resolve_device(self.device)
        world = move_world(load_world(self.world), device) if self.world else None
        policy = self._measure(self.policy)
        base = self._measure(self.base) if self.base else None
        comparison = self._judge(world) if world else None
        results = _results(policy, base, comparison, time.perf_counter() - began)
        _show(results)
        protocol = policy[0].protocol
        if self.out is None or protocol is None:
            return
        save_result(self.out / "results.json", results, protocol)
        if world and base and comparison:
            self._report(world, comparison, results, protocol)
        print(f"\nwritten to {self.out}")

    def _measure(self, name_or_dir: str) -> Pair:
        from wmpo_gym.rollouts.rollout import evaluate_policy_on

        policy = self._load_policy(name_or_dir)
        sampled, greedy = (
            evaluate_policy_on(
                self.task,
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

    def _load_policy(self, name_or_dir: str) -> VLAPolicy:
        return load_policy(name_or_dir, seed=self.seed).to(resolve_device(self.device))

    def _judge(self, world: World) -> TwinComparison:
        from wmpo_gym.evaluation.twin import compare_with_twin

        ids = np.asarray(get_task(self.task).split_ids(self.split)[: self.episodes])
        policy = self._load_policy(self.policy)
        return compare_with_twin(world, policy, ids, seed=self.seed, variant=self.variant, progress=True)

    def _report(
        self, world: World, comparison: TwinComparison, results: dict[str, Any], protocol: EvalProtocol
    ) -> None:
        from wmpo_gym.report.report import Report, choose_clips, write_report

        assert self.out is not None
        report = Report(
            f"{self.policy} against {self.base} on {self.task}",
            results,
            gates=world.card.get("gates", {}),
            clips=choose_clips(comparison, get_task(self.task), self.clips),
            command=" ".join(["wmpo", *sys.argv[1:]]),
            protocol=protocol,
            control_hz=world.task.control_hz,
        )
        write_report(self.out / "report.html", report)


def _results(policy: Pair, base: Pair | None, twin: TwinComparison | None, seconds: float) -> dict[str, Any]:
    """The schema of ``results.json`` as far as it was measured."""
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
    from wmpo_gym.report.results import agreement_rows, aligned, show_rate, table

    if "base" in results:
        rows = table(results)
    else:
        rates = {"sampled, T = 1": results["wmpo"], "greedy": results["greedy"]["wmpo"]}
        rows = [("", "success", "n"), *((k, show_rate(r), str(r["n"])) for k, r in rates.items())]
    print(aligned(rows))
    if "agreement" in results:
        print("\n" + aligned([*agreement_rows(results)]))
