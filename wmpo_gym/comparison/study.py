"""Runs the cells of a comparison one by one; an interrupted one goes on with the cell it was in."""

from __future__ import annotations

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
from wmpo_gym.progress import progress_bar
from wmpo_gym.tasks import get_task


def run_study(plan: Plan, out: str | Path, *, progress: bool = True) -> dict[str, Any]:
    """Train and test every cell that is not complete yet.

    Args:
        plan: What to compare; a directory is only taken up again with the same plan.
        out: Directory of the comparison.
        progress: Show a progress bar with the time left.

    Returns:
        The contents of ``results.json``, which is written anew after every cell.

    Raises:
        ValueError: If the directory holds a comparison with another plan.
    """
    out = Path(out)
    keep_settings(out / "plan.json", plan.to_dict())
    cells, done = list(plan.cells()), []
    with progress_bar(total=len(cells), desc="cells", disable=not progress) as bar:
        for cell in cells:
            bar.set_postfix_str(cell.name)
            done += _cell(plan, cell, out, progress)
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


def _cell(plan: Plan, cell: Cell, out: Path, progress: bool) -> list[dict[str, Any]]:
    """Results of a cell, one per variant; trains and tests if they are not on the disk."""
    file = out / "cells" / cell.name / "results.json"
    if not file.exists():
        shop = Workshop(plan, cell, out, progress=progress)
        began, before = time.perf_counter(), sum(shop.stage_seconds().values())
        trained = METHODS[cell.method](shop)
        stages = shop.stage_seconds()
        seconds = time.perf_counter() - began - (sum(stages.values()) - before)
        seconds += sum(stages.get(stage, 0.0) for stage in STAGES[cell.method])
        entries = [
            {
                "method": cell.method,
                "budget": cell.budget,
                "seed": cell.seed,
                "variant": variant,
                **_tested(plan, cell, trained.policy, variant),
                "ledger": trained.ledger.to_dict(),
                "selection_ledger": trained.selection.to_dict(),
                "seconds": round(seconds, 1),
            }
            for variant in plan.variants
        ]
        write_json_atomic(file, {"cells": entries})
    return read_json(file)["cells"]


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
