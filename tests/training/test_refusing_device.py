"""Whatever trains or imagines does so on a device that refuses tensors of the CPU, with the CPU's numbers."""

from __future__ import annotations

import warnings
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

import wmpo_gym  # noqa: F401 (registers the environments)
from wmpo_gym.tasks import MOVE_BLOCK

pytest.importorskip("mujoco")
pytest.importorskip("peft")
pytest.importorskip("stable_baselines3")

IMAGINED = "WMPO-Imagined-v0"
LEARNING_RATE = 5e-4


def assert_same(found: Any, expected: Any, where: str = "", *, rtol: float, atol: float) -> None:
    """The two hold the same numbers."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for name in expected:
            assert_same(found[name], expected[name], f"{where}.{name}", rtol=rtol, atol=atol)
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), where
        for i, (a, b) in enumerate(zip(found, expected, strict=True)):
            assert_same(a, b, f"{where}[{i}]", rtol=rtol, atol=atol)
    else:
        a, b = np.asarray(found), np.asarray(expected)
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol, err_msg=where)


def on_cpu(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.cpu() for name, value in state.items() if isinstance(value, torch.Tensor)}


def check(pretend_device, function, *args, rtol: float = 0.0, atol: float = 0.0) -> Any:
    """A run gives on the device what it gives on the CPU; returns that.

    Tolerances are for gradients: attention and optimizers take other kernels there, which round otherwise,
    and Adam makes whole steps of gradients that are nearly zero.
    """
    expected = function("cpu", *args)
    assert_same(pretend_device(function, *args), expected, rtol=rtol, atol=atol)
    return expected


def imagine(device: str) -> list[np.ndarray]:
    env = gym.make_vec(IMAGINED, num_envs=3, device=device)
    obs, _ = env.reset(seed=0)
    frames = [obs["pixels"]]
    rng = np.random.default_rng(0)
    for _ in range(3):
        obs, rewards, *_, info = env.step(rng.uniform(-1, 1, env.action_space.shape).astype(np.float32))
        frames += [obs["pixels"], rewards, info["success_prob"]]
    env.close()
    return frames


def test_imagining_on_the_device(pretend_device) -> None:
    frames = check(pretend_device, imagine)
    assert (frames[0] != frames[3]).any()


def learn(device: str, algorithm: str, **policy_kwargs: Any) -> dict[str, Any]:
    from wmpo_gym import algorithms
    from wmpo_gym.world.world import find_pretrained

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = getattr(algorithms, algorithm)(
            "VLAPolicy",
            gym.make_vec(IMAGINED, num_envs=8, device=device),
            group_size=4,
            success_bounds=(0, 1),
            learning_rate=LEARNING_RATE,
            seed=0,
            device=device,
            policy_kwargs={"model": find_pretrained("move-block", "policy"), **policy_kwargs},
            **({"validation_share": 0.5, "n_epochs": 2} if algorithm == "DPO" else {}),
        )
        before = on_cpu(model.policy.state_dict())
        model.learn(max_iterations=1)
    assert {p.device.type for p in model.policy.parameters()} == {torch.device(device).type}
    weights = on_cpu(model.policy.state_dict())
    kept = {k: v for k, v in model.history[0].items() if "time/" not in k and "seconds" not in k}
    changed = any(not torch.equal(before[name], weights[name]) for name in weights)
    return {"weights": weights, "history": kept, "changed": changed, "updates": model._n_updates}


def _learn_lora(device: str, algorithm: str) -> dict[str, Any]:
    return learn(device, algorithm, lora={"r": 4, "lora_alpha": 4})


@pytest.mark.parametrize("algorithm", ["GRPO", "DPO"])
@pytest.mark.parametrize("run", [learn, _learn_lora], ids=["whole", "lora"])
def test_learning_on_the_device(pretend_device, algorithm: str, run) -> None:
    learned = check(pretend_device, run, algorithm, rtol=2e-3, atol=LEARNING_RATE / 10)
    assert learned["updates"] > 0 and (learned["changed"] or algorithm == "DPO")  # which may keep the old


def evaluate(device: str) -> dict[str, Any]:
    from wmpo_gym.policies.vla_policy import VLAPolicy
    from wmpo_gym.rollouts.rollout import make_rollout_env, rollout
    from wmpo_gym.world.world import find_pretrained

    policy = VLAPolicy.from_pretrained(find_pretrained("move-block", "policy")).to(device)
    env = make_rollout_env("WMPO-Simulated-v0", 4, task=MOVE_BLOCK)
    found = rollout(env, policy, MOVE_BLOCK.split_ids("test")[:4], seed=0)
    env.close()
    return {"success": found.success, "actions": found.actions}


def test_evaluating_a_policy_on_the_device(pretend_device) -> None:
    check(pretend_device, evaluate)


def classify(device: str) -> dict[str, Any]:
    from wmpo_gym.world.world import World, find_pretrained

    classifier = World.from_pretrained(find_pretrained("move-block", "world")).classifier.to(device)
    frames = np.random.default_rng(0).integers(0, 256, (20, 40, 40, 3), dtype=np.uint8)
    return {"scores": classifier.scores(frames, 0), "decision": classifier.decide(frames, 0)}


def test_classifying_on_the_device(pretend_device) -> None:
    check(pretend_device, classify)
