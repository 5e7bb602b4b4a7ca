"""Models that outlive the directory they began with, and environments of others."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from wmpo_gym.algorithms import GRPO
from wmpo_gym.world.world import find_pretrained


def test_a_saved_model_loads_without_the_policy_it_began_with(tmp_path: Path) -> None:
    shutil.copytree(find_pretrained("move-block", "policy"), tmp_path / "base")
    model = GRPO(
        "VLAPolicy",
        "WMPO-Simulated-v0",
        n_groups=1,
        group_size=2,
        policy_kwargs={"model": tmp_path / "base", "temperature": 1.3},
    )
    model.save(tmp_path / "model")
    assert model.policy_kwargs["model"] == tmp_path / "base"  # only the file is changed
    shutil.rmtree(tmp_path / "base")
    loaded = GRPO.load(tmp_path / "model")
    for name, weight in model.policy.state_dict().items():
        if torch.is_tensor(weight):
            assert torch.equal(weight, loaded.policy.state_dict()[name])
    assert loaded.policy.temperature == 1.3 and loaded.policy.instructions == model.policy.instructions
    model.env.close()


def test_an_environment_of_others_is_made_by_its_id() -> None:
    model = GRPO("MlpPolicy", "Pendulum-v1", n_groups=2, group_size=2, seed=0)
    assert model.n_envs == 4
    model.env.close()
    with pytest.raises(ValueError, match="no environment 'Pendulumm-v1'"):
        GRPO("MlpPolicy", "Pendulumm-v1", n_groups=2, group_size=2)


def test_no_log_interval_logs_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    model = GRPO("MlpPolicy", "Pendulum-v1", n_groups=2, group_size=2, seed=0, verbose=1)
    model.learn(max_iterations=1, log_interval=None)
    assert "rollout/" not in capsys.readouterr().out
    model.env.close()
