"""The whole method at a size that takes seconds: every stage real, stopped in the middle, taken up again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from wmpo_gym.pipeline import callbacks, method
from wmpo_gym.pipeline.method import open_workspace, run_recipe
from wmpo_gym.pipeline.presets import GRPOSettings, Recipe
from wmpo_gym.policies.sft import SFTSettings
from wmpo_gym.policies.vla_policy import VLAPolicy
from wmpo_gym.rollouts.rollout import evaluate_policy_on
from wmpo_gym.tasks import MOVE_BLOCK, get_task
from wmpo_gym.utils.io import load_safetensors
from wmpo_gym.utils.text import show_rate
from wmpo_gym.world.training import WorldModelTraining
from wmpo_gym.world.world import World

FEW_STEPS = WorldModelTraining(steps=4, batch_size=4, checkpoint_every=2)
TINY = Recipe(
    demos=40,
    sft=SFTSettings(steps=5),
    play=4,
    pretrain=FEW_STEPS,
    rollouts=8,
    align=FEW_STEPS,
    classifier_steps=6,
    grpo=GRPOSettings(iterations=2, n_groups=2, group_size=4),
    gate_episodes=4,
    curve_every=1,
    curve_episodes=4,
    test_episodes=8,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run that was stopped while the world model was aligned, and finished by a second call."""
    out = tmp_path_factory.mktemp("run")
    real = method.train_world

    def stopped(*args: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(method, "train_world", stopped)
        patch.setattr(method.GRPO, "learn", _learn_something)
        # What the *learnable* gate measures takes minutes; here it only has to be asked for.
        patch.setattr("wmpo_gym.pipeline.method.measure_learnable", lambda *a, **k: _no_gain())
        with pytest.raises(KeyboardInterrupt):
            run_recipe(TINY, out, progress=False)
        patch.setattr(method, "train_world", real)
        results = run_recipe(TINY, out, progress=False, command="wmpo reproduce")
    return out, results


def _learn_something(self: Any, *args: Any, real: Any = method.GRPO.learn, **kwargs: Any) -> Any:
    """So few rollouts may hold nothing to learn from; every round shall change the policy."""
    real(self, *args, **kwargs)
    with torch.no_grad():
        for parameter in self.policy.parameters():
            parameter.mul_(1.01)
    return self


def _no_gain() -> Any:
    import numpy as np

    from wmpo_gym.evaluation.gates import learnable_gate

    return learnable_gate(np.array([True, False]), np.array([True, False]), 1)


def test_results_hold_what_was_measured(finished: tuple[Path, dict[str, Any]]) -> None:
    out, results = finished
    assert json.loads((out / "results.json").read_text())["wmpo"] == results["wmpo"]
    for name in ("base", "wmpo"):
        part = results[name]
        assert 0 <= part["ci95"][0] <= part["success"] <= part["ci95"][1] <= 1 and part["n"] == 8
    low, high = results["paired_gain"]["ci95"]
    assert low <= results["paired_gain"]["points"] <= high
    assert results["budget"]["real_episodes"] == 8 and results["budget"]["demonstrations"] == 40
    assert results["budget"]["imagined_frames"] > 0 and results["budget"]["nfe"] > 0
    assert {"sft", "pretrain", "align", "reward", "gates", "grpo", "evaluate"} <= set(results["seconds"])
    assert set(results["gates"]) == {"physics", "learnable", "faithful", "honest"}


def test_the_policy_of_a_run_is_the_one_its_results_are_about(finished: tuple[Path, dict[str, Any]]) -> None:
    out, results = finished
    last, first = (
        load_safetensors(out / part / "policy" / "model.safetensors") for part in ("round-2", "round-1")
    )
    kept = load_safetensors(out / "policy" / "model.safetensors")
    assert all(torch.equal(kept[name], value) for name, value in last.items())
    assert not all(torch.equal(kept[name], value) for name, value in first.items())
    policy = VLAPolicy.from_pretrained(out / "policy", seed=TINY.seed)
    for greedy, figures in ((False, results["wmpo"]), (True, results["greedy"]["wmpo"])):
        again = evaluate_policy_on(
            TINY.task,
            policy,
            "test",
            TINY.test_episodes,
            deterministic=greedy,
            seed=TINY.seed,
            progress=False,
        )
        assert round(again.rate.to_dict()["success"], 4) == figures["success"]
        assert again.rate.to_dict()["n"] == figures["n"]


def test_the_report_shows_the_same_figures_and_needs_no_network(
    finished: tuple[Path, dict[str, Any]],
) -> None:
    out, results = finished
    text = (out / "report.html").read_text()
    for name in ("base", "wmpo"):
        assert show_rate(results[name]) in text
    assert "http://" not in text.replace("http://www.w3.org", "") and "https://" not in text
    assert text.count("data:video") + text.count("data:image") == 8


def test_a_finished_run_is_only_read(
    finished: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, _ = finished
    monkeypatch.setattr(method.GRPO, "learn", lambda *a, **k: pytest.fail("trained again"))
    monkeypatch.setattr("wmpo_gym.pipeline.method.train_sft", lambda *a, **k: pytest.fail("trained again"))
    world = World.from_pretrained(out / "world")
    assert set(world.card["gates"]) == {"physics", "learnable", "faithful", "honest"}
    assert world.card["recipe"]["rollouts"] == 8
    recipe, task = TINY.seeded(), get_task(TINY.task)
    workspace = open_workspace(recipe, out, progress=False)
    policy = method.train_policy(workspace, recipe, method.collect_demonstrations(workspace, recipe))
    rounds = [
        method.collect(
            workspace.round(number), recipe.for_round(number), policy, recipe.round_start_states(task, number)
        ).episodes
        for number in (1, 2)
    ]
    assert [len(episodes) for episodes in rounds] == [4, 4]
    assert not {e.start_state_id for e in rounds[0]} & {e.start_state_id for e in rounds[1]}


def test_a_policy_that_does_not_read_the_instruction_is_trained_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gaps, trained, real = iter([0.01, 0.5]), [], method.train_sft

    def training(*args: Any, **kwargs: Any) -> Any:
        trained.append((kwargs["policy"], kwargs["seed"], kwargs["checkpoint_dir"].name))
        return real(*args, **kwargs)

    monkeypatch.setattr(method, "train_sft", training)
    monkeypatch.setattr(method, "instruction_gap", lambda *a: next(gaps))
    recipe = TINY.seeded()
    workspace = open_workspace(recipe, tmp_path, progress=False)
    method.train_policy(workspace, recipe, method.collect_demonstrations(workspace, recipe))
    (first, *then), (second, *later) = trained
    assert first is None and second is not None
    assert then == [0, "sft"] and later == [1000, "sft-2"]


def test_the_gates_of_every_round_are_kept(finished: tuple[Path, dict[str, Any]]) -> None:
    out, results = finished
    card = World.from_pretrained(out / "world").card
    for gates, part in ((results["gates"], "round-1"), (card["gates"], "round-2")):
        assert json.dumps(gates) == json.dumps(json.loads((out / part / "gates.json").read_text()))
    assert results["gates"]["learnable"] == card["gates"]["learnable"]
    assert results["gates"]["faithful"] != card["gates"]["faithful"]


def test_other_settings_are_refused(finished: tuple[Path, dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match="other settings"):
        run_recipe(replace(TINY, rollouts=10), finished[0], progress=False)


def test_seeds_share_no_start_state_and_splits_stay_apart() -> None:
    task = get_task("move-block")
    for seed in (0, 1):
        starts = replace(Recipe(), seed=seed).start_states(task)
        chosen = [i for ids in starts.values() for i in ids]
        assert len(chosen) == len(set(chosen)) and {task.split_of(i) for i in chosen} == {"train"}
        more = replace(Recipe(), seed=seed, rollouts=1280).start_states(task)
        assert more["play"] == starts["play"] and more["rollouts"][:128] == starts["rollouts"]
        assert len(more["rollouts"]) == 1280 and not set(more["rollouts"]) & set(more["play"] + more["demos"])
    with pytest.raises(ValueError, match="train split"):
        replace(Recipe(), play=10**6).start_states(MOVE_BLOCK)


def test_controls_run_and_change_what_they_name(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wmpo_gym.pipeline.method.measure_learnable", lambda *a, **k: _no_gain())
    seen: dict[str, Any] = {}

    def no_classifier(episodes: list[Any], *args: Any, **kwargs: Any) -> Any:
        seen["episodes"] = len(episodes)
        raise KeyboardInterrupt

    control = replace(TINY, play=0, classifier_demos=False)
    with monkeypatch.context() as patch:
        patch.setattr("wmpo_gym.pipeline.method.train_classifier", no_classifier)
        with pytest.raises(KeyboardInterrupt):
            run_recipe(control, tmp_path, progress=False)
    assert seen["episodes"] == control.rollouts // control.rounds
    assert not (tmp_path / "play_world").exists() and (tmp_path / "round-1" / "world_model").exists()


def test_shuffled_rewards_keep_their_number_and_lose_their_owners() -> None:
    from wmpo_gym.algorithms.grpo import GRPO

    model = callbacks.ShuffledGRPO("MultiInputPolicy", "WMPO-Simulated-v0", n_groups=8, seed=0)
    waves = []

    def keep(self: Any, callback: Any) -> Any:
        waves.append(_marked_wave(64))
        return waves[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GRPO, "collect_batch", keep)
        shuffled = model.collect_batch(None)
    assert sorted(shuffled.returns.tolist()) == waves[0].returns.tolist()
    assert shuffled.returns.tolist() != waves[0].returns.tolist()
    assert (shuffled.successes == (shuffled.returns >= 32)).all() and shuffled.rows is waves[0].rows
    model.env.close()


def _marked_wave(n: int) -> Any:
    import torch

    from wmpo_gym.algorithms.trajectories import Trajectories

    rows, returns = torch.arange(n), torch.arange(n, dtype=torch.float32)
    one = torch.ones(n, 1)
    return Trajectories(
        {}, one.long(), one, one.bool(), rows, returns, returns >= n / 2, rows, rows, rows // 8, rows
    )
