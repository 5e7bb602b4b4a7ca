"""Run the trials of an experiment; an interrupted experiment is resumed."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wmpo_gym.evaluation.self_correction import measure_self_correction
from wmpo_gym.experiments.methods import METHODS, STAGES, TrialContext
from wmpo_gym.experiments.plan import DATA_USED, ExperimentPlan, Trial
from wmpo_gym.policies.vla_policy import VLAPolicy
from wmpo_gym.rollouts.protocol import EvalProtocol
from wmpo_gym.rollouts.rollout import evaluate_policy_on
from wmpo_gym.tasks import get_task
from wmpo_gym.utils.config import keep_settings
from wmpo_gym.utils.device import check_precision, resolve_device
from wmpo_gym.utils.io import plain, read_json, write_json_atomic
from wmpo_gym.utils.progress import progress_bar

TRAINING = ("task", "selection_episodes", "recipe", "baselines")
"""Fields of a plan that decide how a policy is trained; the others name the trials and the tests."""
CELLS = "cells"  # name of the trials in directories and results files


@dataclass(frozen=True)
class Experiment:
    """An experiment and its directories.

    Attributes:
        plan: What to compare.
        directories: Its own directory, then others whose policies are used instead of training new ones.
        device: Device for training and evaluation.
        precision: ``"fp32"`` or ``"bf16"``.
        progress: Print progress.
    """

    plan: ExperimentPlan
    directories: tuple[Path, ...]
    device: str = "auto"
    precision: str = "fp32"
    progress: bool = True

    def context(self, trial: Trial) -> TrialContext:
        """The training context of a trial."""
        return TrialContext(
            self.plan,
            trial,
            self.directories[0],
            device=self.device,
            precision=self.precision,
            progress=self.progress,
        )

    def trained(self, trial: Trial) -> Path | None:
        """The first directory that holds the policy of a trial."""
        places = (directory / CELLS / trial.name for directory in self.directories)
        return next((place for place in places if (place / "costs.json").exists()), None)


def run_experiment(
    plan: ExperimentPlan,
    out: str | Path,
    *,
    trained_in: str | Path | None = None,
    jobs: int = 1,
    device: str = "auto",
    precision: str = "fp32",
    progress: bool = True,
) -> dict[str, Any]:
    """Train and test every trial that is not complete yet.

    Args:
        plan: What to compare. A directory is only resumed with the same plan except for the methods, the
            seeds and (lifelong methods apart) the budgets, of which only what is missing is run.
        out: Directory of the experiment.
        trained_in: Directory of another experiment whose policies, where available, are tested instead of
            training new ones. Policies of SB3's SAC are not saved, so its trials are always trained.
        jobs: Processes that train in parallel, each with its share of the cores.
        device: Device for training and evaluation, see :func:`~wmpo_gym.utils.device.resolve_device`.
        precision: ``"fp32"``, or ``"bf16"`` on a GPU.
        progress: Show a progress bar with the remaining time.

    Returns:
        The contents of ``results.json``, which is rewritten after every trial; with several jobs, after every
        group of trials that share a world.

    Raises:
        ValueError: If the directory holds an experiment with another plan, or ``trained_in`` one whose
            policies were trained with other settings, or if jobs, device or precision are not possible.
    """
    if jobs < 1:
        raise ValueError(f"jobs is the number of processes that train, at least 1; got {jobs}.")
    check_precision(precision, resolve_device(device))
    out = Path(out)
    directories = (out,) if trained_in is None else (out, _same_training(plan, Path(trained_in)))
    keep_settings(out / "plan.json", _fixed(plan))
    trials = list(plan.trials())
    experiment = Experiment(plan, directories, device, precision, progress and jobs == 1)
    with progress_bar(total=len(trials), desc="trials", disable=not progress) as bar:
        if jobs == 1:
            finished = _run_in_turn(experiment, trials, bar)
        else:
            finished = _run_in_parallel(experiment, trials, jobs)
        for n in finished:
            results = collect_results(plan, _complete(trials, out))
            write_json_atomic(out / "results.json", results)
            bar.update(n)
    return results


def _run_in_turn(experiment: Experiment, trials: list[Trial], bar: Any) -> Iterator[int]:
    """Complete the trials one by one; yields the number of trials after each."""
    for trial in trials:
        bar.set_postfix_str(trial.name)
        _run_trial(experiment, trial)
        yield 1


def _run_in_parallel(experiment: Experiment, trials: list[Trial], jobs: int) -> Iterator[int]:
    """Complete the trials in ``jobs`` processes: first the stages shared by a seed, then groups of trials."""
    context, threads = multiprocessing.get_context("spawn"), max(1, (os.cpu_count() or 1) // jobs)
    with ProcessPoolExecutor(jobs, context, initializer=torch.set_num_threads, initargs=(threads,)) as pool:
        try:
            prepared, groups = {}, {}
            for seed in dict.fromkeys(trial.seed for trial in trials):
                own = [trial for trial in trials if trial.seed == seed]
                prepared[pool.submit(_prepare, experiment, own)] = own
            for ready in as_completed(prepared):
                ready.result()
                for group in _groups(prepared[ready]):
                    groups[pool.submit(_run_trials, experiment, group)] = len(group)
            for ready in as_completed(groups):
                ready.result()
                yield groups[ready]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _groups(trials: list[Trial]) -> list[list[Trial]]:
    """Group the trials of a seed by shared artefacts: rollouts and world of a budget, or lifelong rounds."""
    groups: dict[str, list[Trial]] = {}
    for trial in trials:
        key = trial.method if trial.method.endswith("-lifelong") else str(trial.budget)
        groups.setdefault(key, []).append(trial)
    return sorted(groups.values(), key=lambda group: -group[0].budget)  # the longest first


def _prepare(experiment: Experiment, trials: list[Trial]) -> None:
    """Run the stages that the untrained trials of a seed share."""
    missing = [trial for trial in trials if experiment.trained(trial) is None]
    if missing:
        context = experiment.context(missing[0])
        context.base_policy()
        if any("pretrain" in STAGES[trial.method] for trial in missing):
            context.pretrained_world()


def _run_trials(experiment: Experiment, trials: list[Trial]) -> None:
    for trial in trials:
        _run_trial(experiment, trial)


def _complete(trials: list[Trial], out: Path) -> list[dict[str, Any]]:
    """Saved results of all trials, one per variant."""
    files = [out / CELLS / trial.name / "results.json" for trial in trials]
    return [entry for file in files if file.exists() for entry in read_json(file)[CELLS]]


def collect_results(plan: ExperimentPlan, entries: list[dict[str, Any]]) -> dict[str, Any]:
    """The contents of ``results.json``."""
    protocol = EvalProtocol.make(
        plan.task, "test", plan.episodes, seed=0, deterministic=False, variant="nominal"
    )
    return {
        "protocol": protocol.to_dict() | {"variant": list(plan.variants), "seed": "that of the cell"},
        "plan": plain(plan.to_dict()),
        "saw": {method: DATA_USED[method] for method in plan.methods},
        CELLS: entries,
    }


def _training(plan: ExperimentPlan) -> tuple[str, ...]:
    """Fields of a plan that decide the training; budgets do where they set the lifelong rounds."""
    lifelong = any(method.endswith("-lifelong") for method in plan.methods)
    return (*TRAINING, "budgets") if lifelong else TRAINING


def _fixed(plan: ExperimentPlan) -> dict[str, Any]:
    """The settings that must be equal to resume a directory: all fields except those that list the trials."""
    trials = {"methods", "seeds", "budgets"}.difference(_training(plan))
    return {name: value for name, value in plan.to_dict().items() if name not in trials}


def _same_training(plan: ExperimentPlan, directory: Path) -> Path:
    """The directory, after checking that its policies were trained with the settings of the plan."""
    file = directory / "plan.json"
    if not file.exists():
        raise ValueError(f"{directory} holds no experiment (no plan.json); name the --out of another one.")
    given, there = plain(plan.to_dict()), read_json(file)
    if other := [name for name in _training(plan) if json.loads(json.dumps(given[name])) != there.get(name)]:
        raise ValueError(
            f"The policies in {directory} were trained with other settings ({', '.join(other)}); use the "
            "same ones, or leave out --trained-in to train new policies."
        )
    return directory


def _run_trial(experiment: Experiment, trial: Trial) -> None:
    """Train and test a trial, unless its results are saved."""
    plan, file = experiment.plan, experiment.directories[0] / CELLS / trial.name / "results.json"
    if not file.exists():
        policy, costs = _trained(experiment, trial)
        entries = [
            {
                "method": trial.method,
                "budget": trial.budget,
                "seed": trial.seed,
                "variant": variant,
                **_tested(plan, trial, policy, variant),
                **costs,
            }
            for variant in plan.variants
        ]
        write_json_atomic(file, {CELLS: entries})


def _trained(experiment: Experiment, trial: Trial) -> tuple[Any, dict[str, Any]]:
    """The policy of a trial and its cost: loaded if it was trained, else trained now."""
    if (place := experiment.trained(trial)) is not None:
        policy = VLAPolicy.from_pretrained(place / "policy", seed=trial.seed)
        return policy.to(resolve_device(experiment.device)), read_json(place / "costs.json")
    context = experiment.context(trial)
    began, before = time.perf_counter(), sum(context.stage_seconds().values())
    trained = METHODS[trial.method](context)
    stages = context.stage_seconds()
    seconds = time.perf_counter() - began - (sum(stages.values()) - before)
    seconds += sum(stages.get(stage, 0.0) for stage in STAGES[trial.method])
    costs = {
        "ledger": trained.ledger.to_dict(),
        "selection_ledger": trained.selection.to_dict(),
        "seconds": round(seconds, 1),
    }
    if isinstance(trained.policy, VLAPolicy):
        trained.policy.save_pretrained(context.directory / "policy")
        write_json_atomic(context.directory / "costs.json", costs)
    return trained.policy, costs


def _tested(plan: ExperimentPlan, trial: Trial, policy: Any, variant: str) -> dict[str, Any]:
    """Success on the test start states, sampled and greedy, with every outcome."""
    sampled, greedy = (
        evaluate_policy_on(
            plan.task,
            policy,
            "test",
            plan.episodes,
            deterministic=deterministic,
            seed=trial.seed,
            variant=variant,
            progress=False,
        )
        for deterministic in (False, True)
    )
    length = sampled.mean_length_of_successes
    more = {}
    if plan.self_correction:
        ids = get_task(plan.task).split_ids("test")[: plan.episodes]
        more["self_correction"] = measure_self_correction(
            plan.task, policy, ids, seed=trial.seed, variant=variant
        )
    return {
        **more,
        **sampled.rate.to_dict(),
        "outcomes": _bits(sampled.success),
        "greedy": {**greedy.rate.to_dict(), "outcomes": _bits(greedy.success)},
        "length_of_successes": None if np.isnan(length) else length,
    }


def _bits(outcomes: np.ndarray) -> str:
    """One character per start state, in the protocol's order: 1 success, 0 failure."""
    return "".join("1" if success else "0" for success in outcomes)
