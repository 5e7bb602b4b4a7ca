"""From nothing, or from the bundled weights, to the report."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from stable_baselines3.common.callbacks import BaseCallback

from wmpo_gym.algorithms.grpo import GRPO
from wmpo_gym.algorithms.trajectories import Trajectories
from wmpo_gym.data.episode import Episode
from wmpo_gym.envs.ledger import Ledger
from wmpo_gym.evaluation.gates import gates_text
from wmpo_gym.evaluation.learning import grpo_from_policy
from wmpo_gym.evaluation.twin import TwinComparison, compare_with_twin
from wmpo_gym.pipeline.presets import Recipe
from wmpo_gym.pipeline.stages import Run
from wmpo_gym.policies.vla_policy import VLAPolicy
from wmpo_gym.report.report import Report, choose_clips, write_report
from wmpo_gym.report.results import build_results, print_table
from wmpo_gym.rollouts.protocol import EvalProtocol, save_result
from wmpo_gym.rollouts.rollout import evaluate_policy_on, make_rollout_env
from wmpo_gym.statistics import success_rate
from wmpo_gym.utils.io import read_json, write_json_atomic
from wmpo_gym.utils.progress import progress_bar
from wmpo_gym.world.world import World


def run_recipe(
    recipe: Recipe, out: str | Path, *, bundled: bool = False, progress: bool = True, command: str = ""
) -> dict[str, Any]:
    """Run every stage that is not complete yet.

    Args:
        recipe: The settings.
        out: Directory of the run; an interrupted one is taken up where it stopped.
        bundled: Start from the bundled base policy and play-pretrained world model.
        progress: Show headings, bars and tables.
        command: The command line, for the report.

    Returns:
        The contents of ``results.json``.
    """
    run = Run(recipe, out, bundled=bundled, progress=progress)
    base = run.base_policy(run.demonstrations())
    practised = practise(run, run, base, gates=True)
    # The product of a run is its last policy and the last world it was optimised in.
    practised.world.save_pretrained(run.out / "world")
    practised.policy.save_pretrained(run.out / "policy")
    results, comparison, protocol = judge(run, base, practised)
    write_report(
        run.out / "report.html", _report(run, results, practised.curve, comparison, protocol, command)
    )
    if progress:
        print()
        print_table(results)
        print(f"\nThe report is {run.out / 'report.html'}")
    return results


@dataclass
class Practised:
    """A policy after practice in imagination.

    Attributes:
        policy: The policy.
        world: The last world it practised in.
        real: What the rollouts of all rounds have cost.
        imagined: What practice has cost.
        curve: Learning curve over all rounds.
        gates: Of the first round's world, before any practice; those of the last one are in its card.
    """

    policy: VLAPolicy
    world: World
    real: Ledger
    imagined: Ledger
    curve: list[dict[str, Any]]
    gates: dict[str, dict[str, Any]]

    @property
    def spent(self) -> Ledger:
        """Both together."""
        return self.real + self.imagined


def practise(
    run: Run, shared: Run, policy: VLAPolicy, *, rounds: int | None = None, gates: bool = False
) -> Practised:
    """Act, build or refresh the world, optimise in it; as many times as the recipe has rounds.

    Args:
        run: Where the artefacts belong.
        shared: The run that holds demonstrations, play and the play-pretrained network.
        policy: To start from.
        rounds: Stop after so many of the recipe's rounds.
        gates: Measure the gates before every optimisation.
    """
    demos, play = shared.demonstrations(), shared.play()
    network, spent, imagined = shared.pretrained_network(play), Ledger(), Ledger()
    real: list[Episode] = []
    curve: list[dict[str, Any]] = []
    first: dict[str, dict[str, Any]] = {}
    for number in range(1, (rounds or run.recipe.rounds) + 1):
        part = run.round(number)
        real += part.rollouts(policy)
        world = part.imagined_world(network, real, demos, play)
        if gates:
            measured = part.gates(world, policy, earlier=first)
            first = first or measured
            if run.progress:
                print(gates_text(measured))
        policy, log = optimise(part, world, policy, real)
        network = world.network
        spent, imagined = spent + part.spent_on_rollouts(), imagined + Ledger(**log["budget"])
        before = (number - 1) * run.recipe.grpo.iterations
        curve += [{**point, "iteration": before + point["iteration"]} for point in log["curve"]]
    return Practised(policy, world, spent, imagined, curve, first)


# -- policy optimisation -------------------------------------------------------------------------------------
class Curve(BaseCallback):
    """Learning curve on the validation split.

    What it measures is shown, not used: no checkpoint is chosen by it.
    """

    def __init__(self, run: Run, world: World, file: Path) -> None:
        super().__init__()
        self.run, self.world, self.file = run, world, file
        self.points: list[dict[str, Any]] = read_json(file) if file.exists() else []
        self._bar = progress_bar(total=run.recipe.grpo.iterations, desc="GRPO", disable=not run.progress)

    def _on_rollout_start(self) -> None:
        self._bar.update(self.model._iteration - self._bar.n)
        if self.model._iteration % self.run.recipe.curve_every == 0:
            self._add_point()

    def _on_step(self) -> bool:
        return True

    def _on_training_end(self) -> None:
        self._bar.update(self.model._iteration - self._bar.n)
        self._add_point()
        self._bar.close()

    def _add_point(self) -> None:
        iteration = self.model._iteration
        if iteration not in {p["iteration"] for p in self.points}:
            self.points.append({"iteration": iteration, **self._measure()})
            write_json_atomic(self.file, self.points)

    def _measure(self) -> dict[str, Any]:
        recipe, policy = self.run.recipe, self.model.policy
        ids = list(self.run.task.split_ids("validation")[: recipe.curve_episodes])
        twin = compare_with_twin(self.world, policy, ids, seed=recipe.seed, record_frames=False)
        real = evaluate_policy_on(
            self.run.task,
            policy,
            "validation",
            len(ids),
            deterministic=False,
            seed=recipe.seed,
            progress=False,
        )
        figures = {
            "imagined_success": success_rate(twin.imagined.claimed).to_dict(),
            "twin_success": success_rate(twin.replay.success).to_dict(),
            "simulated_success": real.rate.to_dict(),
        }
        self._bar.set_postfix_str(
            f"imagined {twin.imagined.claimed.mean():.0%}, twin {real.success.mean():.0%}"
        )
        return figures


def optimise(
    run: Run, world: World, policy: VLAPolicy, real: list[Episode]
) -> tuple[VLAPolicy, dict[str, Any]]:
    """GRPO in imagination; returns the improved policy, and its curve, history and budget.

    Args:
        run: Where the artefacts belong.
        world: To imagine in.
        policy: To start from.
        real: Rollouts that keyframes are taken from.
    """
    directory, log = run.out / "optimised_policy", run.out / "grpo.json"
    if not log.exists():
        settings = run.recipe.grpo
        with run.stage("grpo", f"GRPO in imagination: {settings.iterations} iterations"):
            env = make_rollout_env(
                "WMPO-Imagined-v0",
                settings.n_groups * settings.group_size,
                task=run.task,
                world=world.with_keyframes(real, settings.keyframes, seed=run.recipe.seed),
                dual_noise=settings.dual_noise,
                consecutive_windows=settings.consecutive_windows,
            )
            model = grpo_from_policy(
                ShuffledGRPO if settings.shuffle_rewards else GRPO,
                policy,
                env,
                learning_rate=lambda left: settings.learning_rate * (left + 1 / settings.iterations),
                group_size=settings.group_size,
                n_epochs=settings.n_epochs,
                seed=run.recipe.seed,
                checkpoint_dir=run.out / "checkpoints" / "grpo",
                tensorboard_log=str(run.out / "tensorboard"),
            )
            curve = Curve(run, world, run.out / "curve.json")
            model.learn(max_iterations=settings.iterations, callback=curve, resume=True)
            model.policy.save_pretrained(directory)
            history = {"curve": curve.points, "history": model.history, "budget": model.budget.to_dict()}
            write_json_atomic(log, history)
            env.close()
    return VLAPolicy.from_pretrained(directory, seed=run.recipe.seed), read_json(log)


class ShuffledGRPO(GRPO):
    """Control: outcomes belong to other rollouts than those that earned them."""

    def collect_batch(self, callback: BaseCallback) -> Trajectories | None:
        """A batch whose returns and successes are permuted together."""
        batch = super().collect_batch(callback)
        if batch is None:
            return None
        order = torch.as_tensor(self.group_rng.permutation(len(batch)))
        return replace(batch, returns=batch.returns[order], successes=batch.successes[order])


# -- figures -------------------------------------------------------------------------------------------------
def judge(
    run: Run, base: VLAPolicy, practised: Practised
) -> tuple[dict[str, Any], TwinComparison, EvalProtocol]:
    """Figures on the test split: paired, and the imagined ones judged by their twin; and the protocol."""
    recipe, task = run.recipe, run.task
    with run.stage("evaluate", f"Before and after in the twin: {recipe.test_episodes} test start states"):
        tested = {
            (name, greedy): evaluate_policy_on(
                task,
                policy,
                "test",
                recipe.test_episodes,
                deterministic=greedy,
                seed=recipe.seed,
                progress=run.progress,
            )
            for name, policy in (("base", base), ("wmpo", practised.policy))
            for greedy in (False, True)
        }
        ids = list(task.split_ids("test")[: recipe.test_episodes])
        comparison = compare_with_twin(
            practised.world, practised.policy, ids, seed=recipe.seed + 2, progress=run.progress
        )
    results = build_results(
        base=tested["base", False].success,
        wmpo=tested["wmpo", False].success,
        agreement=comparison.agreement,
        greedy=(tested["base", True].success, tested["wmpo", True].success),
        budget=_budget(run.recipe, practised),
        seconds=run.seconds,
        gates=practised.gates,
        length_of_successes={
            name: tested[name, False].mean_length_of_successes for name in ("base", "wmpo")
        },
        seed=recipe.seed,
    )  # fmt: skip
    protocol = tested["wmpo", False].protocol
    assert protocol is not None  # evaluate_policy_on always writes one
    save_result(run.out / "results.json", results, protocol)
    return results, comparison, protocol


def _budget(recipe: Recipe, practised: Practised) -> dict[str, Any]:
    """What the method used, real episodes apart from demonstrations and play, and measurement left out."""
    real, imagined = practised.real, practised.imagined
    return {
        "real_episodes": real.real_episodes,
        "real_steps": real.real_steps,
        "demonstrations": recipe.demos,
        "play_episodes": recipe.play,
        "imagined_frames": imagined.imagined_frames,
        "nfe": imagined.nfe,
        "imagination_seconds": round(imagined.seconds, 1),
    }


def _report(
    run: Run,
    results: dict[str, Any],
    curve: list[dict[str, Any]],
    comparison: TwinComparison,
    protocol: EvalProtocol,
    command: str,
) -> Report:
    failed = [name for name, gate in results["gates"].items() if gate["passed"] is False]
    notes = [
        f"The world failed the gate {name!r}: {results['gates'][name]['explanation']}" for name in failed
    ]
    return Report(
        title=f"WMPO on {run.task.name}",
        results=results,
        curve=curve,
        gates=results["gates"],
        clips=choose_clips(comparison, run.task),
        protocol=protocol,
        command=command,
        notes=notes,
        control_hz=run.task.control_hz,
    )
