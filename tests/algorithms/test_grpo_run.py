"""GRPO as a Stable-Baselines3 algorithm: learning, callbacks, logs, files, determinism."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch as th
from grpo_toys import ReachEnv, Recorder, TokenPolicy, make, parameters, rollouts_of, vec
from stable_baselines3.common.callbacks import CheckpointCallback, EvalCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv
from stable_baselines3.ppo import MlpPolicy as ActorCriticPolicy

from wmpo_gym.algorithms import GRPO

# ---------------------------------------------------------------------- learning


@pytest.mark.parametrize(("policy", "rate"), [(TokenPolicy, 1e-2), ("MlpPolicy", 1e-2)])
def test_learns_the_toy_task(policy, rate):
    model = make(policy, vec(n_envs=64), group_size=8, learning_rate=rate)
    held_out = vec(n_envs=64)
    before = success_rate(model, held_out)
    model.learn(6_000)
    after = success_rate(model, held_out)
    assert before < 0.5
    assert after > 0.8


def success_rate(model, env) -> float:
    env.seed(12345)
    obs = env.reset()
    successes, live = np.zeros(env.num_envs), np.ones(env.num_envs, bool)
    while live.any():
        obs, rewards, dones, infos = env.step(model.predict(obs)[0])
        for i in np.flatnonzero(dones & live):
            successes[i] = infos[i]["is_success"]
        live &= ~dones
    return successes.mean()


def test_first_ratio_is_one():
    model = make(micro_batch_size=5).learn(100)
    assert all(entry["train/ratio_max_error"] < 1e-5 for entry in model.history if "train/loss" in entry)
    assert model.history[0]["train/n_updates"] == 2  # one step per epoch


def test_a_policy_that_contradicts_itself_is_reported():
    class Contradictory(TokenPolicy):
        def log_prob(self, obs, trace):
            log_prob, entropy = super().log_prob(obs, trace)
            return log_prob * 1.1, entropy

    with pytest.warns(UserWarning, match="disagrees with its sample"):
        make(Contradictory).learn(10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(Contradictory, recompute_log_probs=True).learn(10)


@pytest.mark.parametrize("normalizer", ["trajectory", "token"])
@pytest.mark.parametrize("ratio_level", ["token", "chunk"])
def test_micro_batches_do_not_change_the_gradient(normalizer, ratio_level):
    gradients = []
    for size in (None, 1, 7):
        model = make(micro_batch_size=size, loss_normalizer=normalizer, ratio_level=ratio_level, kl_coef=0.1)
        rollouts = rollouts_of(model)
        with th.no_grad():
            for p in model.policy.parameters():  # off policy, so that ratio, clip and KL all matter
                p.add_(0.1 * th.randn(p.shape, generator=th.Generator().manual_seed(1)))
        statistics = model.accumulate_gradient(rollouts, th.linspace(-1, 1, len(rollouts)))
        gradients.append(th.cat([p.grad.flatten() for p in model.policy.parameters()]))
        assert statistics["clip_fraction"] > 0 and statistics["kl"] > 0
    assert rollouts.n_decisions % 7  # the last micro-batch is a shorter one
    for gradient in gradients[1:]:
        th.testing.assert_close(gradient, gradients[0], atol=1e-7, rtol=1e-5)


def test_batch_size_counts_rollouts():
    model = make(batch_size=4, n_epochs=3, success_bounds=None)
    rollouts = rollouts_of(model)
    del model.train
    model.train(rollouts)
    assert model._n_updates == 3 * -(-len(rollouts) // 4)


def test_a_nan_gradient_leaves_the_weights_alone(caplog):
    class Broken(TokenPolicy):
        def log_prob(self, obs, trace):
            log_prob, entropy = super().log_prob(obs, trace)
            return log_prob * float("nan"), entropy

    model = make(Broken)
    before = parameters(model)
    with caplog.at_level(logging.WARNING), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.learn(10)
    assert th.equal(parameters(model), before)
    assert "norm is nan" in caplog.text
    assert model._n_updates == 0


def test_kl_holds_the_policy_at_its_start():
    moved = []
    for coefficient in (0.0, 100.0):
        model = make(kl_coef=coefficient, learning_rate=1e-3)
        start = parameters(model)
        model.learn(300)
        moved.append((parameters(model) - start).norm().item())
        assert ("train/kl" in model.history[-1]) == bool(coefficient)
    assert moved[1] < 0.8 * moved[0]


# ---------------------------------------------------------------------- idiom


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"env": vec(n_envs=6)}, "6 rows.*group_size=4.*num_envs=4"),
        ({"group_size": 1}, "at least 2"),
        ({"policy": "NoPolicy"}, "Unknown policy 'NoPolicy'.*VLAPolicy.*MlpPolicy"),
        ({"loss_normalizer": "mean"}, "'trajectory' or 'token'"),
        ({"ratio_level": "sequence"}, "'token' or 'chunk'"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        make(**kwargs)


def test_a_policy_without_token_log_probs_is_refused():
    with pytest.raises(TypeError, match="ActorCriticPolicy.*GroupPolicy"):
        make(ActorCriticPolicy)


def test_two_runs_are_equal():
    runs = [make(env=vec(), micro_batch_size=16).learn(300) for _ in range(2)]
    assert th.equal(parameters(runs[0]), parameters(runs[1]))
    other = make(seed=1).learn(300)
    assert not th.equal(parameters(runs[0]), parameters(other))


def test_the_global_torch_generator_is_not_used():
    model = make()
    th.manual_seed(5)
    expected = th.rand(1)
    th.manual_seed(5)
    model.learn(100)
    assert th.equal(th.rand(1), expected)


def test_callbacks_run_once_per_step_and_can_stop():
    recorder = Recorder(stop_at=4)
    model = make().learn(10_000, recorder)
    assert len(recorder.timesteps) == 4
    assert recorder.events == ["start", "end", "start"]
    assert model._iteration == 1


def test_sb3_callbacks(tmp_path):
    eval_env = DummyVecEnv([lambda: Monitor(ReachEnv())])
    evaluation = EvalCallback(eval_env, eval_freq=6, n_eval_episodes=4, log_path=str(tmp_path), verbose=0)
    checkpoints = CheckpointCallback(6, str(tmp_path / "zips"))
    model = make().learn(400, [evaluation, checkpoints])
    assert len(evaluation.evaluations_timesteps) >= 2
    assert evaluation.evaluations_successes
    assert len(list((tmp_path / "zips").glob("*.zip"))) >= 2
    assert model.history[-1]["time/total_timesteps"] == model.num_timesteps


def test_progress_bar_counts_decisions(capsys):
    model = make().learn(200, progress_bar=True)
    bar = capsys.readouterr().err
    assert "200/200" in bar and "success=" in bar
    assert model.num_timesteps >= 200


def test_iterations_may_be_the_limit(capsys):
    model = make(learning_rate=lambda progress: 1e-3 * progress, success_bounds=(0.0, 1.0))
    model.learn(max_iterations=3, progress_bar=True)
    assert model._iteration == len(model.history) == 3
    assert "3/3" in capsys.readouterr().err
    rates = [e["train/learning_rate"] for e in model.history]
    assert rates == pytest.approx([1e-3 * 2 / 3, 1e-3 / 3, 0.0])
    model.learn(max_iterations=2, reset_num_timesteps=False)
    assert model._iteration == 5
    model.learn(1, max_iterations=9)
    assert model._iteration == 6
    with pytest.raises(ValueError, match="total_timesteps or max_iterations"):
        model.learn()


def test_log_keys_and_tensorboard(tmp_path):
    model = make(tensorboard_log=str(tmp_path)).learn(100)
    expected = {
        *(f"rollout/{k}" for k in ("success_rate", "kept_groups", "dropped_all_success", "dropped_all_fail")),
        *("rollout/ep_len_mean", "rollout/ep_rew_mean", "time/fps", "time/iterations", "train/learning_rate"),
        *(
            f"train/{k}"
            for k in ("loss", "clip_fraction", "approx_kl", "entropy", "grad_norm", "ratio_max_error")
        ),
        *(f"budget/{k}" for k in ("real_episodes", "real_steps", "imagined_frames", "nfe", "seconds")),
        "train/n_updates",
    }
    assert expected <= set(model.history[0])
    assert list(Path(tmp_path).glob("GRPO_1/events.*"))
    json.dumps(model.history)


def test_budget_counts_what_was_spent():
    model = make().learn(100)
    # A DummyVecEnv restarts rows that have finished, and what they do then is spent too.
    assert model.budget.real_episodes >= sum(e["rollout/episodes"] for e in model.history)
    assert model.history[-1]["budget/real_steps"] == model.budget.real_steps > model.num_timesteps
    assert model.budget.real_steps == sum(env.ledger.real_steps for env in model.get_env().envs)


def test_world_fitness_is_recorded_and_warned_about():
    class ImaginedEnv(ReachEnv):
        world_fitness = {name: {"passed": True} for name in ("physics", "learnable", "faithful", "honest")}

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert make(env=vec(ImaginedEnv)).world_fitness == ImaginedEnv.world_fitness
        assert make(env=vec(ReachEnv)).world_fitness is None
    ImaginedEnv.world_fitness["honest"] = {"passed": False}
    ImaginedEnv.world_fitness["physics"] = {"passed": None}
    with pytest.warns(UserWarning, match="fails honest: .*world_fitness"):
        assert make(env=vec(ImaginedEnv)).world_fitness["honest"] == {"passed": False}
    ImaginedEnv.world_fitness = {}
    with pytest.warns(UserWarning, match="never validated for physics, learnable, faithful, honest"):
        assert make(env=vec(ImaginedEnv)).world_fitness == {}


def test_evaluate_policy():
    model = make()
    mean, _ = evaluate_policy(model, Monitor(ReachEnv()), n_eval_episodes=5)
    assert 0 <= mean <= 1
    obs = ReachEnv().reset(seed=0)[0]
    action, _ = model.predict(obs, deterministic=True)
    assert action.shape == (2, 2)


def test_save_and_load(tmp_path):
    model = make().learn(100)
    model.save(tmp_path / "model")
    assert (tmp_path / "model.zip").stat().st_size < 200_000
    loaded = GRPO.load(tmp_path / "model", env=vec(), device="cpu")
    obs = np.random.default_rng(0).normal(size=(10, 4)).astype(np.float32)
    assert np.array_equal(
        model.predict(obs, deterministic=True)[0], loaded.predict(obs, deterministic=True)[0]
    )
    assert loaded.group_rng.integers(1000, size=5).tolist() == model.group_rng.integers(1000, size=5).tolist()
    before = parameters(loaded)
    loaded.learn(100, reset_num_timesteps=False)
    assert loaded.num_timesteps >= model.num_timesteps + 100
    assert not th.equal(parameters(loaded), before)
    only_predicts = GRPO.load(tmp_path / "model", device="cpu")
    assert np.array_equal(
        only_predicts.predict(obs, deterministic=True)[0], model.predict(obs, deterministic=True)[0]
    )


def test_save_and_load_with_a_reference_policy(tmp_path):
    model = make(kl_coef=0.1).learn(100)
    model.save(tmp_path / "model")
    loaded = GRPO.load(tmp_path / "model", device="cpu")
    for a, b in zip(model.reference_policy.parameters(), loaded.reference_policy.parameters(), strict=True):
        assert th.equal(a, b)


def test_set_env_keeps_counting_the_budget():
    model = make().learn(50)
    spent = model.budget.real_steps
    env = vec(tolerance=0.3)
    model.set_env(env)
    model.learn(50)
    assert model.budget.real_steps == spent + sum(e.ledger.real_steps for e in env.envs)


def test_learning_rate_schedule():
    model = make(learning_rate=lambda progress: 1e-3 * progress).learn(200)
    rates = [e["train/learning_rate"] for e in model.history if "train/learning_rate" in e]
    assert rates[0] > rates[-1]


@pytest.mark.slow
def test_subprocess_env():
    env = SubprocVecEnv([ReachEnv] * 2, start_method="spawn")
    try:
        model = make(env=env, group_size=2).learn(10)
        assert model.budget.real_episodes >= 2
    finally:
        env.close()


def test_importing_the_package_is_cheap_and_a_missing_extra_is_named(monkeypatch):
    import subprocess
    import sys

    import wmpo_gym.algorithms as package

    code = "import sys, wmpo_gym.algorithms; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    monkeypatch.setitem(sys.modules, "stable_baselines3", None)
    for name in [n for n in sys.modules if n.startswith(("wmpo_gym.algorithms.", "stable_baselines3."))]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'wmpo-gym\[train\]'"):
        package.__getattr__("GRPO")
    with pytest.raises(AttributeError, match="it has DPO, GRPO, make_sac"):
        package.__getattr__("PPO")
