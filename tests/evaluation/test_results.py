"""The printed table holds the numbers of the JSON file."""

from __future__ import annotations

import io
import json
import re

import numpy as np
import pytest

from wmpo_gym.report.results import build_results, print_table
from wmpo_gym.statistics import paired_difference, precision_recall, success_rate


@pytest.fixture
def outcomes() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    u = rng.random(512)
    return {
        "base": u < 0.46,
        "wmpo": rng.random(512) < 0.84,
        "claimed": u[:128] < 0.9,
        "true": u[:128] < 0.85,
    }


@pytest.fixture
def results(outcomes) -> dict:
    return build_results(
        base=outcomes["base"],
        wmpo=outcomes["wmpo"],
        agreement=precision_recall(outcomes["claimed"], outcomes["true"]),
        budget={"real_episodes": 128, "imagined_frames": 123456},
        seconds={"collect": 4.25, "grpo": 100.0},
        greedy=(outcomes["base"], outcomes["wmpo"]),
        learning_rate=1e-5,
    )


def test_schema_and_units(results, outcomes):
    assert {
        "base",
        "wmpo",
        "paired_gain",
        "imagined_success",
        "hallucination_gap",
        "budget",
        "seconds",
    } <= set(results)
    assert results["base"]["n"] == 512 and len(results["base"]["ci95"]) == 2
    assert results["base"]["success"] == pytest.approx(success_rate(outcomes["base"]).value, abs=1e-4)
    assert results["paired_gain"]["points"] == pytest.approx(
        paired_difference(outcomes["base"], outcomes["wmpo"]).points, abs=1e-4
    )
    gap = 100 * (outcomes["claimed"].mean() - outcomes["true"].mean())
    assert (
        results["hallucination_gap"] == pytest.approx(gap, abs=1e-4) and 0 < results["imagined_success"] <= 1
    )
    assert results["seconds"]["total"] == pytest.approx(104.25) and results["learning_rate"] == 1e-5
    json.dumps(results, allow_nan=False)


def test_printed_numbers_are_those_of_the_file(results):
    out = io.StringIO()
    print_table(json.loads(json.dumps(results)), out)
    text = out.getvalue()
    for value in (results["base"]["success"], results["wmpo"]["success"], results["imagined_success"]):
        assert f"{100 * value:.1f} %" in text
    assert f"{results['paired_gain']['points']:+.1f} points" in text
    assert f"{results['hallucination_gap']:+.1f} points" in text
    assert "123,456" in text and "512" in text and "104.2" in text
    low, high = results["paired_gain"]["ci95"]
    assert re.search(re.escape(f"[{low:+.1f}, {high:+.1f}]"), text)


def test_undefined_figures_are_null_and_print_as_a_dash():
    r = build_results(
        base=[0, 0], wmpo=[0, 1], agreement=precision_recall([0, 0], [0, 0]), budget={}, seconds={"a": 1.0}
    )
    assert r["agreement"]["precision"]["success"] is None and r["agreement"]["f1"] is None
    out = io.StringIO()
    print_table(r, out)
    assert "precision  –" in out.getvalue()


def test_extra_entries_cannot_overwrite_the_schema():
    with pytest.raises(ValueError, match="hallucination_gap"):
        build_results(
            base=[0],
            wmpo=[1],
            agreement=precision_recall([1], [1]),
            budget={},
            seconds={},
            hallucination_gap=0.0,
        )
