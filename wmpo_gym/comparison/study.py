"""Runs the cells of a comparison one by one; an interrupted one goes on with the cell it was in."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from wmpo_gym.comparison.methods import METHODS, STAGES, Workshop
from wmpo_gym.comparison.plan import SAW, Cell, Plan
from wmpo_gym.data.atomic import plain, read_json, write_json_atomic
from wmpo_gym.data.settings import keep_settings
from wmpo_gym.evaluation.protocol import EvalProtocol
from wmpo_gym.evaluation.rollouts import evaluate_policy_on
from wmpo_gym.evaluation.self_correction import measure_self_correction
from wmpo_gym.policies.vla_policy import VLAPolicy
from wmpo_gym.progress import progress_bar
from wmpo_gym.tasks import get_task

TRAINING = ("task", "selection_episodes", "bundled", "recipe", "baselines")
"""What of a plan decides how the policy of a cell is trained; the rest says which cells, and how to test."""


def run_study(
    plan: Plan, out: str | Path, *, trained_in: str | Path | None = None, progress: bool = True
) -> dict[str, Any]:
    """Train and test every cell that is not complete yet.

    Args:
        plan: What to compare; a directory is only taken up again with the same plan.
        out: Directory of the comparison.
        trained_in: Directory of another comparison, whose policies are tested instead of training new ones,
            as far as it has them. SB3's SAC is not kept, so its cells are always trained.
        progress: Show a progress bar with the time left.

    Returns:
        The contents of ``results.json``, which is written anew after every cell.

    Raises:
        ValueError: If the directory holds a comparison with another plan, or ``trained_in`` one whose
            policies were trained with other settings.
    """
    out = Path(out)
    kept = [out] if trained_in is None else [out, _same_training(plan, Path(trained_in))]
    keep_settings(out / "plan.json", plan.to_dict())
    cells, done = list(plan.cells()), []
    with progress_bar(total=len(cells), desc="cells", disable=not progress) as bar:
        for cell in cells:
            bar.set_postfix_str(cell.name)
            done += _cell(plan, cell, kept, progress)
            results = collect(plan, done)
            write_json_atomic(out / "results.json", results)
            bar.update(1)
    return results


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


def _same_training(plan: Plan, directory: Path) -> Path:
    """The directory, if what decides the training of its policies is as in the plan."""
    file = directory / "plan.json"
    if not file.exists():
        raise ValueError(f"{directory} holds no comparison (no plan.json); name the --out of another one.")
    given, there = plain(plan.to_dict()), read_json(file)
    names = [*TRAINING, *(["budgets"] if any(m.endswith("-lifelong") for m in plan.methods) else [])]
    if other := [name for name in names if json.loads(json.dumps(given[name])) != there.get(name)]:
        raise ValueError(
            f"The policies in {directory} were trained with other settings ({', '.join(other)}); use the "
            "same ones, or leave out --trained-in to train new policies."
        )
    return directory


def _cell(plan: Plan, cell: Cell, kept: list[Path], progress: bool) -> list[dict[str, Any]]:
    """Results of a cell, one per variant; trains and tests if they are not on the disk."""
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
    return read_json(file)["cells"]


def _trained(plan: Plan, cell: Cell, kept: list[Path], progress: bool) -> tuple[Any, dict[str, Any]]:
    """A cell's policy and what it cost, from the first directory that has it; else trained in the first."""
    for directory in (out / "cells" / cell.name for out in kept):
        if (directory / "costs.json").exists():
            policy = VLAPolicy.from_pretrained(directory / "policy", seed=cell.seed)
            return policy, read_json(directory / "costs.json")
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
