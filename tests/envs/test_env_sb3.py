"""The Stable-Baselines3 adapter."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
from env_toys import TOY, WORLD, assert_same, make_batch
from gymnasium.vector import AutoresetMode
from stable_baselines3 import PPO, SAC
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecMonitor

from wmpo_gym.envs import Sb3VecEnv, make_sb3_env

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "imagined": ("WMPO-Imagined-v0", {"world": WORLD}),
    "simulated": ("WMPO-Simulated-v0", {"task": TOY}),
}
STILL = np.zeros((3, 3, 2), np.float32)


def make(kind: str, n_envs: int = 3, **kwargs: Any) -> VecMonitor:
    env_id, needed = KINDS[kind]
    return make_sb3_env(env_id, n_envs, **needed, **kwargs)


def moves(seed: int, n: int = 3) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.clip(rng.normal(rng.choice([-0.6, 0.6], (n, 1, 1)), 0.5, (n, 3, 2)), -1, 1).astype(np.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_adapter_tells_the_story_of_the_batch(kind: str) -> None:
    """Observations, rewards, dones and infos are those of the SAME_STEP batch with the same seeds."""
    env, batch = make(kind), make_batch(kind, 3, autoreset_mode="SAME_STEP")
    env.seed(4)
    obs, (expected, expected_info) = env.reset(), batch.reset(seed=4)
    assert_same(obs, expected)
    assert env.venv.reset_infos[1]["start_state_id"] == expected_info["start_state_id"][1]
    ends = 0
    for t in range(12):
        obs, rewards, dones, infos = env.step(moves(t))
        expected, their_rewards, terminated, truncated, their_infos = batch.step(moves(t))
        assert_same(obs, expected)
        assert rewards.dtype == np.float32 and np.array_equal(rewards, their_rewards)
        assert np.array_equal(dones, terminated | truncated)
        for row, info in enumerate(infos):
            source = their_infos["final_info"] if dones[row] else their_infos
            assert info["is_success"] is bool(source["is_success"][row]) is bool(terminated[row])
            assert info["n_frames"] == source["n_frames"][row] > 0
            assert info["TimeLimit.truncated"] is bool(truncated[row])
            assert ("terminal_observation" in info) == dones[row]
            if dones[row]:
                ends += 1
                assert_same(info["terminal_observation"], their_infos["final_obs"][row])
                assert not np.array_equal(info["terminal_observation"]["pixels"], obs["pixels"][row])
                assert info["episode"]["l"] <= 4 and info["episode"]["r"] == float(info["is_success"])
                assert env.venv.reset_infos[row]["start_state_id"] == their_infos["start_state_id"][row]
    assert ends > 3


@pytest.mark.parametrize("kind", KINDS)
def test_seeds_and_options_are_used_once(kind: str) -> None:
    env = make(kind)
    env.seed(9)
    env.set_options([{"start_state_id": i, "noise_seed": 5} for i in (2, 2, 7)])
    first = env.reset()
    ids = [info["start_state_id"] for info in env.venv.reset_infos]
    assert ids == [2, 2, 7] and np.array_equal(first["pixels"][0], first["pixels"][1])
    second = env.reset()
    env.seed(9)
    env.set_options({"start_state_id": 2, "noise_seed": 5})
    assert np.array_equal(env.reset()["pixels"][2], first["pixels"][0])
    assert_same(env.reset(), second)
    env.set_options([{"start_state_id": 1}, {}, {"start_state_id": 1}])
    with pytest.raises(ValueError, match=r"rows only; set it for rows \[1\] too"):
        env.reset()


def test_equal_noise_seeds_per_row_are_equal_noise() -> None:
    env = make("imagined", threshold=1.0)
    env.set_options({"start_state_id": 2, "noise_seed": 5})
    env.reset()
    pixels = env.step(STILL)[0]["pixels"]
    assert np.array_equal(pixels[0], pixels[1]) and np.array_equal(pixels[0], pixels[2])


@pytest.mark.parametrize("kind", KINDS)
def test_waves_wait_at_no_cost(kind: str) -> None:
    env = make(kind, n_envs=6, skip_finished=True)
    env.seed(0)
    last = env.reset()
    live, wasted = np.ones(6, bool), 0
    for t in range(6):
        before = env.get_attr("ledger")[0].copy()
        obs, rewards, dones, infos = env.step(moves(t, 6))
        spent = env.get_attr("ledger")[0] - before
        assert spent.imagined_frames + spent.real_steps == sum(
            3 if kind == "imagined" else infos[i]["n_frames"] for i in np.flatnonzero(live)
        )
        assert not dones[~live].any() and not rewards[~live].any()
        assert np.array_equal(obs["pixels"][~live], last["pixels"][~live])
        for row in np.flatnonzero(dones):
            assert_same(infos[row]["terminal_observation"]["pixels"], obs["pixels"][row])
            assert infos[row]["is_success"] is not infos[row]["TimeLimit.truncated"]
        wasted += (~live).sum()
        live, last = live & ~dones, obs
    assert not live.any() and wasted > 6
    env.reset()
    assert env.step(moves(0, 6))[3][0]["n_frames"] > 0


def test_any_batch_of_ours_can_be_adapted() -> None:
    batch = gymnasium.make_vec("WMPO-Simulated-v0", num_envs=2, task=TOY)
    env = Sb3VecEnv(batch, skip_finished=True)
    assert batch.metadata["autoreset_mode"] is AutoresetMode.DISABLED and batch.unwrapped.skip_finished
    Sb3VecEnv(batch)
    assert batch.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP and not batch.unwrapped.skip_finished
    assert env.num_envs == 2 and env.spec.id == "WMPO-Simulated-v0"
    with pytest.raises(TypeError, match="without vectorization_mode"):
        Sb3VecEnv(gymnasium.make_vec("CartPole-v1", num_envs=2))


def test_attributes_and_methods_per_row() -> None:
    env = make("simulated", render_mode="rgb_array", render_size=40)
    env.seed(0)
    obs = env.reset()
    assert env.get_attr("task_description", [2]) == [TOY.instructions[obs["task_id"][2]]]
    assert env.get_attr("start_state_ids")[0].tolist() == list(range(32))
    assert len({id(ledger) for ledger in env.get_attr("ledger")}) == 1
    assert env.has_attr("ledger") and not env.has_attr("world_fitness")
    assert len(env.env_method("describe")) == 3
    assert np.array_equal(env.env_method("render", indices=[1])[0], obs["pixels"][1])
    assert env.render().shape == (80, 80, 3) and len(env.get_images()) == 3
    env.set_attr("return_frames", False)
    with pytest.raises(ValueError, match="leave out `indices`"):
        env.set_attr("return_frames", True, indices=[0])
    env.close()
    env.close()


def test_sac_learns_and_evaluates() -> None:
    env = make("imagined", n_envs=2)
    model = SAC(
        "MultiInputPolicy",
        env,
        buffer_size=64,
        learning_starts=8,
        batch_size=8,
        gradient_steps=1,
        seed=0,
        policy_kwargs={"net_arch": [8], "features_extractor_kwargs": {"cnn_output_dim": 8}},
        device="cpu",
    )
    model.learn(24)
    assert len(model.ep_info_buffer) > 0 and len(model.ep_success_buffer) > 0
    action, _ = model.predict(env.reset())
    assert action.shape == (2, 3, 2)
    rewards, lengths = evaluate_policy(model, env, n_eval_episodes=5, return_episode_rewards=True)
    assert len(rewards) == 5 and max(lengths) <= 4


def test_ppo_learns() -> None:
    env = make("simulated", n_envs=2)
    model = PPO(
        "MultiInputPolicy",
        env,
        n_steps=8,
        batch_size=8,
        n_epochs=1,
        seed=0,
        policy_kwargs={"net_arch": [8], "features_extractor_kwargs": {"cnn_output_dim": 8}},
        device="cpu",
    )
    model.learn(32)
    assert len(model.ep_success_buffer) > 0
