"""GRPO with the vision-language-action policy on the package's own environments."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium.vector import AutoresetMode
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import Logger

import wmpo_gym  # noqa: F401 (registers the environments)
from wmpo_gym.algorithms import GRPO
from wmpo_gym.algorithms.env_util import finished_rows_wait, training_start_states
from wmpo_gym.envs import make_sb3_env
from wmpo_gym.tasks import get_task

pytest.importorskip("transformers")
pytest.importorskip("mujoco")

TASK = get_task("move-block")
ID = "WMPO-Simulated-v0"


def make(env, **kwargs) -> GRPO:
    policy = {"config": "tiny", "instructions": TASK.instructions}
    kwargs = {"group_size": 4, "seed": 0, "device": "cpu", "success_bounds": (0, 1), **kwargs}
    return GRPO("VLAPolicy", env, policy_kwargs=policy, **kwargs)


@pytest.fixture(scope="module")
def rolled_out():
    """A model and one iteration of rollouts with made-up returns: an untrained policy never succeeds."""
    model = make(gym.make_vec(ID, num_envs=8))
    kept = []
    model.train = kept.append
    model.learn(1)
    del model.train
    kept[0].returns = th.arange(8).float()
    return model, kept[0]


def test_rollouts(rolled_out):
    model, rollouts = rolled_out
    assert rollouts.obs["pixels"].dtype == th.uint8
    assert len(rollouts) == 8 and rollouts.n_decisions == model.num_timesteps == 8 * TASK.n_chunks
    assert rollouts.traces.dtype == th.int64
    assert (
        rollouts.traces.shape
        == rollouts.token_mask.shape
        == (8 * TASK.n_chunks, TASK.chunk * TASK.action_dim)
    )
    assert (rollouts.n_actions == TASK.horizon).all()
    first = th.stack([rollouts.obs["pixels"][rollouts.rows == row][0] for row in range(8)])
    assert (first[:4] == first[0]).all() and (first[4:] == first[4]).all() and (first[0] != first[4]).any()
    train = set(TASK.split_ids("train"))
    assert set(rollouts.start_state_ids.tolist()) <= train


def test_update(rolled_out):
    model, rollouts = rolled_out
    model.set_logger(Logger(None, []))
    before = th.cat([p.detach().flatten() for p in model.policy.parameters()])
    model.train(rollouts)
    after = th.cat([p.detach().flatten() for p in model.policy.parameters()])
    values = model.logger.name_to_value
    assert values["train/ratio_max_error"] < 1e-5
    assert values["train/n_updates"] == 2
    assert np.isfinite(values["train/loss"]) and not th.equal(before, after)


def test_micro_batches_do_not_change_the_gradient(rolled_out):
    model, rollouts = rolled_out
    advantages = th.linspace(-1, 1, 8)
    gradients = []
    for size in (None, 7):
        model.micro_batch_size = size
        model.policy.optimizer.zero_grad()
        model.accumulate_gradient(rollouts, advantages)
        gradients.append(th.cat([p.grad.flatten() for p in model.policy.parameters() if p.grad is not None]))
    th.testing.assert_close(gradients[0], gradients[1], atol=1e-6, rtol=1e-4)


def test_start_states_come_from_the_training_split():
    env = make_sb3_env(ID, 4)
    assert set(training_start_states(env)) == set(TASK.split_ids("train"))
    env = make_sb3_env(ID, 4, split="validation")
    assert set(training_start_states(env)) == set(TASK.split_ids("validation"))


def test_a_training_env_can_be_evaluated_on():
    env = gym.make_vec(ID, num_envs=4)
    model = make(env)
    batch = env.unwrapped
    assert batch.autoreset_mode is AutoresetMode.SAME_STEP
    with finished_rows_wait(model.get_env()):
        assert batch.autoreset_mode is AutoresetMode.DISABLED and batch.skip_finished
    assert batch.autoreset_mode is AutoresetMode.SAME_STEP and not batch.skip_finished
    model.learn(1)
    returns, lengths = evaluate_policy(model, model.get_env(), n_eval_episodes=6, return_episode_rewards=True)
    assert len(returns) == 6 and set(lengths) == {TASK.n_chunks}


def test_an_id_makes_the_rows():
    model = make(ID, group_size=2, n_groups=3)
    assert model.n_envs == 6


def test_the_budget_of_the_twin_is_exact():
    env = gym.make_vec(ID, num_envs=4)
    model = make(env).learn(1)
    steps = model.budget.real_steps
    assert steps == 4 * TASK.horizon and model.budget.real_episodes == 4
    assert steps == env.unwrapped.ledger.real_steps


def test_save_and_load(tmp_path):
    model = make(gym.make_vec(ID, num_envs=4))
    model.save(tmp_path / "model")
    loaded = GRPO.load(tmp_path / "model", env=gym.make_vec(ID, num_envs=4), device="cpu")
    obs = model.get_env().reset()
    assert np.array_equal(
        model.predict(obs, deterministic=True)[0], loaded.predict(obs, deterministic=True)[0]
    )
    loaded.learn(1)
