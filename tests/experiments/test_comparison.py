"""The whole comparison at a size that takes seconds, its resumption, and its statistics."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from wmpo_gym.data.store import EpisodeStore
from wmpo_gym.envs.simulated import make_simulator
from wmpo_gym.envs.simulated.scripted import ExpertConfig, record_expert
from wmpo_gym.evaluation.self_correction import first_contact_failed
from wmpo_gym.experiments import run as experiment
from wmpo_gym.experiments.methods import METHODS
from wmpo_gym.experiments.plan import DATA_USED, Baselines, ExperimentPlan, preset
from wmpo_gym.experiments.run import run_experiment
from wmpo_gym.experiments.summary import (
    bootstrap,
    gain,
    interquartile_mean,
    markdown_table,
    mean_success,
    probability_of_improvement,
    summarise,
    write_summary,
)
from wmpo_gym.pipeline.presets import GRPOSettings, Recipe
from wmpo_gym.policies.sft import SFTSettings
from wmpo_gym.world.training import WorldModelTraining

FEW_STEPS = WorldModelTraining(steps=2, batch_size=4)
QUICK = ExperimentPlan(
    methods=tuple(DATA_USED),
    budgets=(32,),
    seeds=(0,),
    variants=("nominal", "texture"),
    self_correction=True,
    episodes=8,
    selection_episodes=4,
    recipe=Recipe(
        base_policy="move-block",
        pretrained_world="move-block",
        demos=8,
        sft=SFTSettings(steps=2),
        play=4,
        align=FEW_STEPS,
        classifier_steps=4,
        grpo=GRPOSettings(iterations=1, n_groups=2, group_size=4),
        curve_every=9,
        curve_episodes=4,
    ),
    baselines=Baselines(
        dpo_imagined_groups=2, sft=SFTSettings(steps=2), sac_gradient_steps=1, sac_imagined_chunks=64
    ),
)


RESULTS = Path(__file__).parents[2] / "docs" / "results"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A comparison that was stopped in its third cell and finished by a second call."""
    out = tmp_path_factory.mktemp("comparison")

    def stopped(context: Any) -> Any:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(METHODS, "dpo", stopped)
        with pytest.raises(KeyboardInterrupt):
            run_experiment(QUICK, out, progress=False)
    assert len(json.loads((out / "results.json").read_text())["cells"]) == 4
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(METHODS, "base", stopped)  # done before: must not run again
        results = run_experiment(QUICK, out, progress=False)
    return out, results


def test_every_cell_is_there_and_counted_by_its_environment(finished: tuple[Path, dict[str, Any]]) -> None:
    _, results = finished
    assert [(c["method"], c["variant"]) for c in results["cells"]] == [
        (m, v) for m in DATA_USED for v in ("nominal", "texture")
    ]
    spent = {c["method"]: c["ledger"] for c in results["cells"]}
    assert spent["base"]["real_episodes"] == 0
    for method in sorted(set(DATA_USED) - {"base", "sac", "sac-demos"}):
        assert spent[method]["real_episodes"] == 32, method
    for method in ("sac", "sac-demos"):
        assert 32 <= spent[method]["real_episodes"] <= 32 + 16, method
    for method, ledger in spent.items():
        imagines = method.startswith("wmpo") or method.endswith("-imagined")
        assert (ledger["imagined_frames"] > 0) == imagines and (ledger["nfe"] > 0) == imagines, method
    for cell in results["cells"]:
        assert cell["n"] == 8 and cell["success"] == cell["outcomes"].count("1") / 8


def test_other_settings_are_refused(finished: tuple[Path, dict[str, Any]]) -> None:
    out, _ = finished
    with pytest.raises(ValueError, match="other settings"):
        run_experiment(replace(QUICK, episodes=4), out, progress=False)


def test_more_cells_are_added_to_what_is_there(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    def untouched(context: Any) -> Any:
        raise AssertionError("trained again")

    plan = replace(QUICK, methods=("base",), variants=("nominal",))
    first = run_experiment(plan, tmp_path, progress=False)["cells"]
    more = replace(plan, methods=("sft", "base"), budgets=(64,))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(METHODS, "base", untouched)
        second = run_experiment(more, tmp_path, progress=False)["cells"]
    assert [(c["method"], c["budget"]) for c in second] == [("sft", 64), ("base", 0)]
    assert second[1] == first[0]
    lifelong = replace(plan, methods=("dpo-lifelong",), budgets=(32, 64))
    with pytest.raises(ValueError, match="budgets"):
        run_experiment(lifelong, tmp_path, progress=False)


def test_policies_of_another_comparison_are_tested_again_without_training(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    out, results = finished
    plan = replace(QUICK, methods=("base", "grpo", "wmpo"), variants=("background", "nominal"))

    def untouched(context: Any) -> Any:
        raise AssertionError("trained again")

    with pytest.MonkeyPatch.context() as patch:
        for method in plan.methods:
            patch.setitem(METHODS, method, untouched)
        again = run_experiment(plan, tmp_path / "again", trained_in=out, progress=False)["cells"]
    first = {c["method"]: c for c in results["cells"] if c["variant"] == "nominal"}
    assert [c["variant"] for c in again] == ["background", "nominal"] * 3
    for cell in again[1::2]:
        for figure in ("outcomes", "greedy", "ledger", "seconds"):
            assert cell[figure] == first[cell["method"]][figure], (cell["method"], figure)
    with pytest.raises(ValueError, match="other settings .selection_episodes"):
        run_experiment(
            replace(plan, selection_episodes=0), tmp_path / "other", trained_in=out, progress=False
        )
    with pytest.raises(ValueError, match="holds no experiment"):
        run_experiment(plan, tmp_path / "other", trained_in=tmp_path, progress=False)


def test_cells_side_by_side_are_those_one_by_one(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    plan = replace(QUICK, methods=("base", "sft", "demonstrations"), self_correction=False)
    with pytest.raises(ValueError, match="at least 1; got 0"):
        run_experiment(plan, tmp_path, jobs=0, progress=False)
    cells = run_experiment(plan, tmp_path, jobs=2, progress=False)["cells"]
    alone = {(c["method"], c["variant"]): c for c in finished[1]["cells"]}
    assert [(c["method"], c["variant"]) for c in cells] == [
        (m, v) for m in plan.methods for v in plan.variants
    ]
    for cell in cells:
        same = alone[cell["method"], cell["variant"]]
        assert cell["outcomes"] == same["outcomes"], cell["method"]
        assert cell["ledger"]["real_steps"] == same["ledger"]["real_steps"], cell["method"]


def test_table_and_plots_come_from_the_results_alone(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    out, _ = finished
    write_summary(json.loads((out / "results.json").read_text()), tmp_path)
    table = (tmp_path / "table.md").read_text()
    assert all(f"| {method} | " in table and f"`{method}` saw" in table for method in DATA_USED)
    plots = sorted(p.name for p in tmp_path.glob("*.svg"))
    assert plots == [f"success-by-{x}.svg" for x in ("imagined-frames", "real-episodes", "seconds")]


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="Unknown method ppo"):
        ExperimentPlan(methods=("ppo",))
    with pytest.raises(ValueError, match="Unknown preset"):
        preset("table3", "move-block")
    with pytest.raises(ValueError, match="multiples of 32"):
        ExperimentPlan(budgets=(100,))


def test_presets_cover_the_methods_that_exist() -> None:
    assert set(DATA_USED) == set(METHODS)
    assert experiment.DATA_USED is DATA_USED and set(preset("table1", "move-block").methods) <= set(DATA_USED)


# -- statistics ----------------------------------------------------------------------------------------------
def _scores(rates: list[float], n: int = 200) -> list[np.ndarray]:
    return [np.arange(n) < rate * n for rate in rates]


def test_statistics_on_known_outcomes() -> None:
    low, high = _scores([0.2, 0.4, 0.6, 0.8]), _scores([0.5, 0.7, 0.9, 0.9])
    assert mean_success(low) == pytest.approx(0.5)
    assert interquartile_mean(low) == pytest.approx(0.5)
    assert interquartile_mean(_scores([0.0, 0.4, 0.6, 1.0])) == pytest.approx(0.5)
    assert gain(low, high) == pytest.approx(25.0)
    assert probability_of_improvement(low, high) == pytest.approx((2 + 3 + 4 + 4) / 16)
    assert probability_of_improvement(low, low) == pytest.approx(0.5)


def test_the_interval_has_the_width_it_should() -> None:
    scores = [np.random.default_rng(s).random(400) < 0.5 for s in range(3)]
    value, low, high = bootstrap(mean_success, scores)
    assert value == pytest.approx(mean_success(scores))
    assert (high - low) / 2 == pytest.approx(1.96 * 0.5 / np.sqrt(1200), rel=0.15)


def test_pairs_are_resampled_together() -> None:
    scores = [np.random.default_rng(s).random(400) < 0.5 for s in range(3)]
    assert bootstrap(gain, scores, scores) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("ours", ["wmpo", "wmpo-lifelong"])
def test_the_lead_is_taken_over_the_smallest_budget(ours: str) -> None:
    cells = [
        {"method": m, "budget": b, "seed": 0, "variant": "nominal", "outcomes": bits, "success": 0.5, "n": 4,
         "greedy": {"outcomes": bits}, "ledger": {}, "seconds": 1.0}
        for m, b, bits in (("base", 0, "1000"), (ours, 128, "1111"), (ours, 256, "1110"))
    ]  # fmt: skip
    plan = {"budgets": [128, 256], "variants": ["nominal"], "methods": ["base", ours]}
    rows = summarise({"plan": plan, "cells": cells, "saw": {}})
    leads = {(r["method"], r["budget"]): r.get("wmpo_lead", {}).get("points") for r in rows}
    assert leads == {("base", 0): 75.0, (ours, 128): None, (ours, 256): 25.0}
    assert "| base | 0 |" in markdown_table({"plan": plan, "cells": cells, "saw": {}})


def test_an_unfinished_comparison_compares_equal_seeds_only() -> None:
    cells = [
        {"method": m, "budget": b, "seed": seed, "variant": "nominal", "outcomes": bits,
         "greedy": {"outcomes": bits}}
        for m, b, seed, bits in (
            ("base", 0, 0, "0000"), ("base", 0, 1, "1000"), ("sft", 128, 2, "1111"), ("wmpo", 128, 1, "1110")
        )
    ]  # fmt: skip
    plan = {"budgets": [128], "variants": ["nominal"], "methods": ["base", "sft", "wmpo"]}
    base, sft, wmpo = summarise({"plan": plan, "cells": cells, "saw": {}})
    assert base["seeds"] == [0, 1] and base["wmpo_lead"]["points"] == 50.0
    assert "wmpo_lead" not in sft and wmpo["seeds"] == [1]


def test_seconds_include_the_shared_stages_whoever_ran_them(finished: tuple[Path, dict[str, Any]]) -> None:
    out, results = finished
    seconds = {c["method"]: c["seconds"] for c in results["cells"]}
    stages = json.loads((out / "shared" / "seed0-32" / "seconds.json").read_text())
    world = stages["align"] + stages["reward"]
    assert world > 0
    for method in ("dpo-imagined", "sac-imagined", "wmpo"):  # only the first of them made the world
        assert seconds[method] >= world
    assert all(s > 0 for s in seconds.values())


def test_first_contact_fails_when_it_ends_without_the_object() -> None:
    missed, held = "missed", "held"
    assert first_contact_failed([None, missed, missed, None, held, None])
    assert first_contact_failed([None, missed])  # the episode ended it
    assert not first_contact_failed([missed, missed, held, None, missed, None])
    assert not first_contact_failed([None, None]) and not first_contact_failed([])


def test_self_correction_is_counted_in_the_simulator(finished: tuple[Path, dict[str, Any]]) -> None:
    """The expert without mistakes takes hold at once."""
    _, results = finished
    for cell in results["cells"]:
        counted = cell["self_correction"]
        assert 0 <= counted["recovered"] <= counted["failed_first_contacts"] <= counted["n"] == 8
    assert "of these, recovered" in markdown_table(results)
    actions = {
        e.start_state_id: e.actions
        for e in record_expert(range(6), seed=0, config=ExpertConfig(grasp_noise=0.0))
    }
    simulator = make_simulator("move-block", "nominal")
    failed = []
    for start, sequence in actions.items():
        simulator.reset(start)
        contacts = []
        for action in sequence:
            simulator.step(action)
            contacts.append(simulator.contact)
        assert "held" in contacts
        failed.append(first_contact_failed(contacts))
    assert not any(failed)


def test_lifelong_rounds_build_on_each_other(tmp_path: Path) -> None:
    plan = replace(QUICK, methods=("dpo-lifelong", "wmpo-lifelong"), budgets=(32, 64), variants=("nominal",))
    cells = run_experiment(plan, tmp_path, progress=False)["cells"]
    assert [(c["budget"], c["ledger"]["real_episodes"]) for c in cells] == [(32, 32), (64, 64)] * 2
    shared = tmp_path / "shared" / "seed0-lifelong"
    first, second = (set(EpisodeStore(shared / name / "rollouts").ids()) for name in ("round-1", "round-2"))
    assert len(first) == len(second) == 32 and not first & second
    frames = [c["ledger"]["imagined_frames"] for c in cells if c["method"] == "wmpo-lifelong"]
    assert frames[1] > frames[0] > 0
    with pytest.raises(ValueError, match="equal steps"):
        replace(plan, budgets=(32, 128))


@pytest.mark.parametrize("results", sorted(RESULTS.glob("*/*/results.json")), ids=str)
def test_committed_tables_and_plots_are_those_of_the_committed_results(results: Path, tmp_path: Path) -> None:
    write_summary(json.loads(results.read_text()), tmp_path)
    written = sorted(f.name for f in tmp_path.iterdir())
    assert written == sorted({f.name for f in results.parent.iterdir()} - {"results.json"})
    assert (tmp_path / "table.md").read_text() == (results.parent / "table.md").read_text()
