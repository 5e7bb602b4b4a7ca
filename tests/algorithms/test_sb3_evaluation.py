"""SB3's own evaluation works on every algorithm alike, beside training on the registered environments."""

from __future__ import annotations

import numpy as np
import pytest
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.evaluation import evaluate_policy

from wmpo_gym.algorithms import DPO, GRPO, make_sac
from wmpo_gym.algorithms.env_util import as_vec_env


def make(algorithm, env_id):
    if algorithm == "sac":
        return make_sac(env_id, 4, buffer_size=100, learning_starts=4, gradient_steps=1, seed=0)
    cls = {"grpo": GRPO, "dpo": DPO}[algorithm]
    return cls("MultiInputPolicy", as_vec_env(env_id, 4), group_size=4, seed=0, device="cpu")


@pytest.mark.parametrize("env_id", ["WMPO-Imagined-v0", "WMPO-Simulated-v0"])
@pytest.mark.parametrize("algorithm", ["grpo", "dpo", "sac"])
def test_callback_and_function_agree_on_what_they_measure(algorithm, env_id, tmp_path):
    model, held_out = make(algorithm, env_id), as_vec_env("WMPO-Simulated-v0", 2)
    callback = EvalCallback(
        held_out, eval_freq=2, n_eval_episodes=3, best_model_save_path=str(tmp_path),
        log_path=str(tmp_path), verbose=0, warn=False,
    )  # fmt: skip
    model.learn(16, callback=callback)
    with np.load(tmp_path / "evaluations.npz") as log:
        assert log["results"].shape[1] == 3 and log["successes"].shape == log["results"].shape
        assert ((log["results"] >= 0) & (log["results"] <= 1)).all()
    assert (tmp_path / "best_model.zip").exists()
    mean, spread = evaluate_policy(model, held_out, 3, deterministic=True, warn=False)
    assert 0 <= mean <= 1 and spread >= 0
    model.env.close()
    held_out.close()
