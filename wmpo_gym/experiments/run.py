"""Runs the cells of a comparison; an interrupted one goes on with the cells it was in."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wmpo_gym.evaluation.self_correction import measure_self_correction
from wmpo_gym.experiments.methods import METHODS, STAGES, Workshop
from wmpo_gym.experiments.plan import SAW, Cell, Plan
from wmpo_gym.policies.vla_policy import VLAPolicy
from wmpo_gym.rollouts.protocol import EvalProtocol
from wmpo_gym.rollouts.rollout import evaluate_policy_on
from wmpo_gym.tasks import get_task
from wmpo_gym.utils.config import keep_settings
from wmpo_gym.utils.io import plain, read_json, write_json_atomic
from wmpo_gym.utils.progress import progress_bar

TRAINING = ("task", "selection_episodes", "bundled", "recipe", "baselines")
"""What of a plan decides how the policy of a cell is trained; the rest says which cells, and how to test."""


def run_study(
    plan: Plan,
    out: str | Path,
    *,
    trained_in: str | Path | None = None,
    jobs: int = 1,
    progress: bool = True,
) -> dict[str, Any]:
    """Train and test every cell that is not complete yet.

    Args:
        plan: What to compare; a directory is only taken up again with the same plan, but for the methods,
            the seeds and (lifelong methods apart) the budgets: only what it lacks of them is run.
        out: Directory of the comparison.
        trained_in: Directory of another comparison, whose policies are tested instead of training new ones,
            as far as it has them. SB3's SAC is not kept, so its cells are always trained.
        jobs: Processes that train side by side, each with its share of the cores.
        progress: Show a progress bar with the time left.

    Returns:
        The contents of ``results.json``, which is written anew after every cell; side by side, after
        those that share a world.

    Raises:
        ValueError: If the directory holds a comparison with another plan, or ``trained_in`` one whose
            policies were trained with other settings, or if there is to be no job.
    """
    if jobs < 1:
        raise ValueError(f"jobs is the number of processes that train, at least 1; got {jobs}.")
    out = Path(out)
    kept = [out] if trained_in is None else [out, _same_training(plan, Path(trained_in))]
    keep_settings(out / "plan.json", _fixed(plan))
    cells = list(plan.cells())
    with progress_bar(total=len(cells), desc="cells", disable=not progress) as bar:
        if jobs == 1:
            finished = _one_by_one(plan, cells, kept, bar, progress)
        else:
            finished = _side_by_side(plan, cells, kept, jobs)
        for n in finished:
            results = collect(plan, _complete(cells, out))
            write_json_atomic(out / "results.json", results)
            bar.update(n)
    return results


def _one_by_one(plan: Plan, cells: list[Cell], kept: list[Path], bar: Any, progress: bool) -> Iterator[int]:
    """Complete the cells in turn; yields how many came to it."""
    for cell in cells:
        bar.set_postfix_str(cell.name)
        _cell(plan, cell, kept, progress)
        yield 1


def _side_by_side(plan: Plan, cells: list[Cell], kept: list[Path], jobs: int) -> Iterator[int]:
    """The same in ``jobs`` processes: what a seed's cells share first, then those that share a world."""
    context, threads = multiprocessing.get_context("spawn"), max(1, (os.cpu_count() or 1) // jobs)
    with ProcessPoolExecutor(jobs, context, initializer=torch.set_num_threads, initargs=(threads,)) as pool:
        try:
            prepared, groups = {}, {}
            for seed in dict.fromkeys(cell.seed for cell in cells):
                own = [cell for cell in cells if cell.seed == seed]
                prepared[pool.submit(_prepare, plan, own, kept)] = own
            for ready in as_completed(prepared):
                ready.result()
                for group in _groups(prepared[ready]):
                    groups[pool.submit(_cells, plan, group, kept)] = len(group)
            for ready in as_completed(groups):
                ready.result()
                yield groups[ready]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _groups(cells: list[Cell]) -> list[list[Cell]]:
    """Cells of one seed by what they share: rollouts and world of a budget, or the rounds of a lifetime."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        key = cell.method if cell.method.endswith("-lifelong") else str(cell.budget)
        groups.setdefault(key, []).append(cell)
    return sorted(groups.values(), key=lambda group: -group[0].budget)  # the longest first


def _prepare(plan: Plan, cells: list[Cell], kept: list[Path]) -> None:
    """Make what those of a seed's cells stand on that are still to be trained."""
    missing = [cell for cell in cells if _kept(cell, kept) is None]
    if missing:
        shared = Workshop(plan, missing[0], kept[0]).shared
        shared.base_policy(shared.demonstrations())
        if any("pretrain" in STAGES[cell.method] for cell in missing):
            shared.pretrained_network(shared.play())


def _cells(plan: Plan, cells: list[Cell], kept: list[Path]) -> None:
    for cell in cells:
        _cell(plan, cell, kept, progress=False)


def _complete(cells: list[Cell], out: Path) -> list[dict[str, Any]]:
    """Results of all cells that are on the disk, one per variant."""
    files = [out / "cells" / cell.name / "results.json" for cell in cells]
    return [entry for file in files if file.exists() for entry in read_json(file)["cells"]]


def collect(plan: Plan, entries: list[dict[str, Any]]) -> dict[str, Any]:
    """The contents of ``results.json``."""
    protocol = EvalProtocol.make(
        plan.task, "test", plan.episodes, seed=0, deterministic=False, variant="nominal"
    )
    return {
        "protocol": protocol.to_dict() | {"variant": list(plan.variants), "seed": "that of the cell"},
        "plan": plain(plan.to_dict()),
        "saw": {method: SAW[method] for method in plan.methods},
        "cells": entries,
    }


def _training(plan: Plan) -> tuple[str, ...]:
    """What of a plan decides the training of its policies; its budgets set the rounds of a lifetime."""
    lifelong = any(method.endswith("-lifelong") for method in plan.methods)
    return (*TRAINING, "budgets") if lifelong else TRAINING


def _fixed(plan: Plan) -> dict[str, Any]:
    """What a directory is only taken up again with: all but which cells there are."""
    cells = {"methods", "seeds", "budgets"}.difference(_training(plan))
    return {name: value for name, value in plan.to_dict().items() if name not in cells}


def _same_training(plan: Plan, directory: Path) -> Path:
    """The directory, if what decides the training of its policies is as in the plan."""
    file = directory / "plan.json"
    if not file.exists():
        raise ValueError(f"{directory} holds no comparison (no plan.json); name the --out of another one.")
    given, there = plain(plan.to_dict()), read_json(file)
    if other := [name for name in _training(plan) if json.loads(json.dumps(given[name])) != there.get(name)]:
        raise ValueError(
            f"The policies in {directory} were trained with other settings ({', '.join(other)}); use the "
            "same ones, or leave out --trained-in to train new policies."
        )
    return directory


def _cell(plan: Plan, cell: Cell, kept: list[Path], progress: bool) -> None:
    """Train and test a cell, if its results are not on the disk."""
    file = kept[0] / "cells" / cell.name / "results.json"
    if not file.exists():
        policy, costs = _trained(plan, cell, kept, progress)
        entries = [
            {
                "method": cell.method,
                "budget": cell.budget,
                "seed": cell.seed,
                "variant": variant,
                **_tested(plan, cell, policy, variant),
                **costs,
            }
            for variant in plan.variants
        ]
        write_json_atomic(file, {"cells": entries})


def _kept(cell: Cell, kept: list[Path]) -> Path | None:
    """The first directory that has a cell's policy."""
    places = (out / "cells" / cell.name for out in kept)
    return next((place for place in places if (place / "costs.json").exists()), None)


def _trained(plan: Plan, cell: Cell, kept: list[Path], progress: bool) -> tuple[Any, dict[str, Any]]:
    """A cell's policy and what it cost, from where it is kept; else trained in the first directory."""
    if (place := _kept(cell, kept)) is not None:
        policy = VLAPolicy.from_pretrained(place / "policy", seed=cell.seed)
        return policy, read_json(place / "costs.json")
    shop = Workshop(plan, cell, kept[0], progress=progress)
    began, before = time.perf_counter(), sum(shop.stage_seconds().values())
    trained = METHODS[cell.method](shop)
    stages = shop.stage_seconds()
    seconds = time.perf_counter() - began - (sum(stages.values()) - before)
    seconds += sum(stages.get(stage, 0.0) for stage in STAGES[cell.method])
    costs = {
        "ledger": trained.ledger.to_dict(),
        "selection_ledger": trained.selection.to_dict(),
        "seconds": round(seconds, 1),
    }
    if isinstance(trained.policy, VLAPolicy):
        trained.policy.save_pretrained(shop.out / "policy")
        write_json_atomic(shop.out / "costs.json", costs)
    return trained.policy, costs


def _tested(plan: Plan, cell: Cell, policy: Any, variant: str) -> dict[str, Any]:
    """Success on the test start states, sampled and greedy, with every outcome."""
    sampled, greedy = (
        evaluate_policy_on(
            plan.task, policy, "test", plan.episodes, deterministic=deterministic, seed=cell.seed,
            variant=variant, progress=False,
        )
        for deterministic in (False, True)
    )  # fmt: skip
    length = sampled.mean_length_of_successes
    more = {}
    if plan.self_correction:
        ids = get_task(plan.task).split_ids("test")[: plan.episodes]
        more["self_correction"] = measure_self_correction(
            plan.task, policy, ids, seed=cell.seed, variant=variant
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
