"""The gates pass a world that cannot err and fail worlds with one known fault each."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from wmpo_gym.evaluation import gates as gates_module
from wmpo_gym.evaluation import validation as validation_module
from wmpo_gym.evaluation.gates import (
    GateResult,
    faithful_gate,
    gates_text,
    honest_gate,
    learnable_gate,
    physics_gate,
)
from wmpo_gym.evaluation.metrics import action_sensitivity
from wmpo_gym.evaluation.validation import measure_learnable, validate
from wmpo_gym.rollouts.rollout import make_rollout_env, rollout
from wmpo_gym.rollouts.simulated import Replay, replay, simulate_full_horizon, start_frames
from wmpo_gym.statistics import precision_recall
from wmpo_gym.tasks import GATES, get_task

pytest.importorskip("mujoco")
TASK = get_task("move-block")
IDS = np.array(TASK.split_ids("validation")[:8])


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr(validation_module, "SENSITIVITY_EPISODES", 3)


def test_simulating_on_finds_the_success_of_the_stopped_episode(fetch):
    r = rollout(make_rollout_env("WMPO-Simulated-v0", 8, task=TASK), fetch(6.0), IDS, deterministic=True)
    actions, full = simulate_full_horizon(TASK, fetch(6.0), IDS, deterministic=True, batch_size=5)
    assert np.isfinite(actions).all() and actions.shape == (8, TASK.horizon, TASK.action_dim)
    assert r.success.any() and (full.success_step[r.success] == r.n_frames[r.success]).all()


def test_physics_gate_counts_flips(fetch):
    actions, nominal = simulate_full_horizon(TASK, fetch(0.0), IDS, deterministic=True)
    calm = physics_gate(TASK, IDS, actions, nominal)
    assert calm.passed and calm.figures["outcome_flips"]["n"] == 8
    far = physics_gate(TASK, IDS, actions, nominal, displacement_px=9.0)
    assert not far.passed and far.figures["outcome_flips"]["success"] >= nominal.success.mean() / 2


def test_the_shift_is_as_long_as_it_says(monkeypatch):
    seen = {}

    def spy(task, ids, actions, *, displacement, **kwargs):
        seen["shift"] = displacement
        return Replay(np.full(len(ids), -1), None)

    monkeypatch.setattr(gates_module, "replay", spy)
    physics_gate(TASK, IDS, np.zeros((8, 20, 3)), Replay(np.full(8, -1), None), displacement_px=0.5)
    from wmpo_gym.envs.simulated import make_simulator

    to_pixels = make_simulator(TASK).to_pixels
    lengths = np.linalg.norm(to_pixels(seen["shift"]) - to_pixels(np.zeros((8, 2))), axis=1)
    assert lengths == pytest.approx(np.full(8, 0.5)) and len(np.unique(seen["shift"])) > 8


@pytest.mark.parametrize(
    ("after", "iterations", "passed"), [(0.7, 10, True), (0.6, 10, False), (0.9, 16, False)]
)
def test_learnable_gate_wants_fifteen_points_in_fifteen_iterations(after, iterations, passed):
    u = np.arange(100) / 100
    assert learnable_gate(u < 0.5, u < after, iterations).passed is passed


def test_faithful_gate_wants_both_the_place_and_the_reaction():
    obeys = {"different_actions": 5.0, "different_noise": 1.0, "action_sensitivity": 5.0}
    deaf = {"different_actions": 1.0, "different_noise": 1.0, "action_sensitivity": 1.0}
    limit = TASK.success_tolerance_px / 4
    near, far = np.full(9, 0.9 * limit), np.full(9, 1.1 * limit)
    assert faithful_gate(TASK, near, obeys).passed is True
    assert faithful_gate(TASK, far, obeys).passed is False
    assert faithful_gate(TASK, near, deaf).passed is False
    assert faithful_gate(TASK, np.zeros(0), obeys).passed is False
    assert faithful_gate(TASK, None, obeys).passed is None and faithful_gate(TASK, None, deaf).passed is False


def test_honest_gate_wants_both_precision_and_recall():
    true = np.arange(10) < 5
    assert honest_gate(precision_recall(true, true), "x").passed is True
    assert honest_gate(precision_recall(np.ones(10, bool), true), "x").passed is False
    assert honest_gate(precision_recall(np.arange(10) < 3, true), "x").passed is False
    assert honest_gate(precision_recall(np.zeros(10, bool), true), "x").passed is False


def test_action_sensitivity_of_a_world_without_noise_is_infinite(fetch, twin_world):
    frames, task_ids = start_frames(TASK, IDS)
    actions, _ = simulate_full_horizon(TASK, fetch(0.0), IDS, deterministic=True)
    quiet = action_sensitivity(twin_world(IDS), actions, frames, task_ids)
    noisy = action_sensitivity(twin_world(IDS, blur=60.0), actions, frames, task_ids)
    assert quiet["different_noise"] == 0.0 and quiet["action_sensitivity"] == float("inf")
    assert noisy["different_noise"] > quiet["different_actions"] > 0.1


def test_validate_writes_the_card(fetch, twin_world):
    world = twin_world(TASK.split_ids("validation")[:6])
    passed = GateResult("learnable", True, {"iterations": 5}, "w", "x", "y")
    gates = validate(world, fetch(6.0, noise=0.1), episodes=6, learnable=lambda: passed, progress=False)
    assert list(gates) == list(GATES) and world.card["gates"] is gates
    assert [gates[g]["passed"] for g in GATES] == [True] * 4
    json.dumps(gates, allow_nan=False)
    text = gates_text(gates)
    assert text.count("passed") == 4 and "points" not in text.splitlines()[0]
    # Gate 2 belongs to task and policy: measuring the others again keeps it.
    again = validate(world, fetch(6.0), episodes=6, progress=False)
    assert again["learnable"]["figures"] == {"iterations": 5}


def test_validate_without_gate_two_leaves_it_missing(fetch, twin_world):
    world = twin_world(IDS, radius=200.0)
    gates = validate(world, fetch(40.0), episodes=8, progress=False)
    assert set(gates) == {"physics", "faithful", "honest"}
    assert gates["honest"]["passed"] is False
    assert "not measured" in gates_text(gates) and "FAILED" in gates_text(gates)


def test_validate_on_real_episodes_needs_no_simulator(fetch, twin_world):
    env = make_rollout_env("WMPO-Simulated-v0", 8, task=TASK, record_frames=True)
    episodes = list(rollout(env, fetch(9.0), IDS, deterministic=True, record_frames=True).episodes(TASK))
    gates = validate(twin_world(IDS), fetch(), real_episodes=episodes, progress=False)
    assert gates["physics"]["passed"] is None and gates["learnable"]["passed"] is None
    assert gates["faithful"]["passed"] is True and gates["faithful"]["figures"]["psnr_db"] > 60
    assert gates["honest"]["figures"]["true"]["n"] == 8
    with pytest.raises(ValueError, match="real_episodes"):
        validate(twin_world(IDS), fetch(), real_episodes=[], progress=False)


@pytest.mark.slow
def test_gate_two_is_measured_with_grpo():
    pytest.importorskip("transformers")
    from wmpo_gym.policies.vla import VLAConfig
    from wmpo_gym.policies.vla_policy import VLAPolicy, make_spaces

    config = VLAConfig.tiny()
    policy = VLAPolicy(*make_spaces(config, (32, 32, 3), 2), config=config, instructions=TASK.instructions)
    before = {k: v.clone() for k, v in policy.state_dict().items()}
    gate = measure_learnable(policy, TASK, episodes=8, n_groups=2, group_size=4, block=8, progress=False)
    assert gate.passed is False and gate.figures["iterations"] == 15
    assert all((v == before[k]).all() for k, v in policy.state_dict().items())


def test_replay_is_deterministic(fetch):
    actions, _ = simulate_full_horizon(TASK, fetch(6.0), IDS, deterministic=True)
    a, b = (replay(TASK, IDS, actions, record_frames=True) for _ in range(2))
    assert (a.frames == b.frames).all() and (a.success_step == b.success_step).all()


def test_objects_that_a_recording_moved_are_looked_for_where_it_left_them(monkeypatch):
    from wmpo_gym.envs.simulated.scripted import ExpertConfig, record_expert
    from wmpo_gym.evaluation import metrics

    episodes = list(record_expert(range(4), seed=0, config=ExpertConfig(), task=TASK))
    still = [replace(e, frames=np.repeat(e.frames[:1], len(e.frames), 0)) for e in episodes]
    world = SimpleNamespace(task=TASK)

    def error(imagined, recorded):
        monkeypatch.setattr(metrics, "imagined_replays", lambda *a, **k: imagined)
        return metrics.moved_object_error(world, recorded)

    assert any(e.success for e in episodes) and error(episodes, episodes) == 0.0
    assert error(still, episodes) > TASK.success_tolerance_px
    assert error(still, still) is None  # nothing moved
    world.task = replace(TASK, name="unknown")
    assert error(still, episodes) is None  # nothing can be located


def test_physics_is_not_measurable_without_what_it_needs(monkeypatch) -> None:
    class Plain:
        """A simulator that follows the protocol and nothing more."""

    monkeypatch.setattr(gates_module, "make_simulator", lambda task, variant: Plain())
    result = gates_module.physics_gate(TASK, np.zeros(0), np.zeros(0), Replay(np.zeros(0), None))
    assert result.passed is None and "no displace and no to_pixels" in result.explanation
