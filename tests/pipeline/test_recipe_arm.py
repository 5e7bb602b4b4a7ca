"""The recipe on a task of the arm: every stage, at a size that takes a minute."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from wmpo_gym.envs.simulated.tabletop.expert import ArmExpertConfig
from wmpo_gym.pipeline.method import run_recipe
from wmpo_gym.pipeline.presets import LIFT, PRESETS, GRPOSettings, recipe_for
from wmpo_gym.policies.sft import SFTSettings
from wmpo_gym.world.networks.conv import ConvWorldModel
from wmpo_gym.world.proprio import ProprioTraining
from wmpo_gym.world.training import WorldModelTraining
from wmpo_gym.world.world import World

FEW_STEPS = WorldModelTraining(steps=2, batch_size=2, checkpoint_every=2)
TINY = replace(
    LIFT,
    task="lift-close@32",
    demos=16,
    expert=ArmExpertConfig(grasp_noise=0.02),
    sft=SFTSettings(steps=2, batch=8),
    play=2,
    pretrain=FEW_STEPS,
    rollouts=4,
    align=FEW_STEPS,
    classifier_steps=4,
    grpo=GRPOSettings(iterations=1, n_groups=2, group_size=2),
    gate_episodes=2,
    curve_every=1,
    curve_episodes=2,
    test_episodes=4,
)


def test_every_arm_task_has_a_recipe() -> None:
    assert recipe_for("lift") == LIFT and recipe_for("move-block") == PRESETS["move-block"]
    assert LIFT.task == recipe_for("lift-close").task == "lift-close@64"
    assert recipe_for("lift@128") == replace(LIFT, task="lift@128")
    assert recipe_for("move-block@48") == replace(PRESETS["move-block"], task="move-block@48")
    assert recipe_for("square") == replace(LIFT, task="square@64")
    assert recipe_for("coffee@128").task == "coffee@128"


@pytest.mark.slow
def test_every_stage_runs_on_lift(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("robosuite")

    def no_gain(*args: Any, **kwargs: Any) -> Any:
        from wmpo_gym.evaluation.gates import learnable_gate

        return learnable_gate(np.array([True, False]), np.array([True, False]), 1)

    monkeypatch.setattr("wmpo_gym.pipeline.method.measure_learnable", no_gain)
    short = partial(ProprioTraining, steps=3, reader_steps=3, points_steps=3)
    monkeypatch.setattr("wmpo_gym.world.proprio.ProprioTraining", short)
    results = run_recipe(TINY, tmp_path, progress=False)
    assert results["wmpo"]["n"] == 4 and results["budget"]["real_episodes"] == 4
    assert all(results["gates"][name]["passed"] is not None for name in ("physics", "faithful", "honest"))
    world = World.from_pretrained(tmp_path / "world")
    assert world.task.name == "lift-close@32" and world.task.n_chunks == 8
    assert (tmp_path / "report.html").exists()


def test_the_network_fits_the_picture() -> None:
    from wmpo_gym.tasks import get_task

    patches = {
        size: ConvWorldModel.for_task(get_task(f"lift@{size}"), 0).config.patch for size in (32, 64, 128)
    }
    assert patches == {32: 2, 64: 4, 128: 8}
    assert ConvWorldModel.for_task(get_task("move-block"), 0).config.patch == 2
