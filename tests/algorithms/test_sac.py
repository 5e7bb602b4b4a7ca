"""SB3's SAC on both environments, its memory, and demonstrations in its buffer."""

from __future__ import annotations

import numpy as np
import pytest
from stable_baselines3.common.evaluation import evaluate_policy

from wmpo_gym.algorithms import make_sac
from wmpo_gym.algorithms import sac as module
from wmpo_gym.algorithms.sac import add_demonstrations, buffer_bytes
from wmpo_gym.envs.simulated.scripted import record_expert
from wmpo_gym.tasks import get_task

TASK = get_task("move-block")


@pytest.mark.parametrize("env_id", ["WMPO-Imagined-v0", "WMPO-Simulated-v0"])
def test_trains_on_both_environments(env_id, capsys):
    model = make_sac(env_id, 2, buffer_size=100, learning_starts=4, gradient_steps=1, seed=0)
    assert "MiB" in capsys.readouterr().out
    assert model.gamma == pytest.approx(0.99**TASK.chunk)
    model.learn(8)
    assert model.num_timesteps >= 8 and model._n_updates > 0
    mean, _ = evaluate_policy(model, model.env, 2)
    assert 0.0 <= mean <= 1.0
    model.env.close()


def test_the_memory_stated_is_what_the_buffer_takes():
    model = make_sac("WMPO-Simulated-v0", 2, buffer_size=200)
    buffer = model.replay_buffer
    held = [*buffer.observations.values(), *buffer.next_observations.values()]
    held += [buffer.actions, buffer.rewards, buffer.dones, buffer.timeouts]
    stated = buffer_bytes(model.observation_space, model.action_space, 200)
    assert sum(a.nbytes for a in held) == stated
    model.env.close()


def test_a_buffer_that_does_not_fit_is_refused_with_the_size_that_would(monkeypatch):
    monkeypatch.setattr(module, "available_memory", lambda: 10 * 2**20)
    with pytest.raises(MemoryError, match=r"buffer_size=\d") as error:
        make_sac("WMPO-Simulated-v0", 2, buffer_size=1_000_000)
    fitting = int(str(error.value).split("buffer_size=")[1].split(" ")[0].replace(",", ""))
    env = make_sac("WMPO-Simulated-v0", 2, buffer_size=fitting).env
    env.close()


def test_demonstrations_become_transitions():
    model = make_sac("WMPO-Simulated-v0", 2, buffer_size=400)
    episodes = list(record_expert(TASK.split_ids("train")[:6], seed=0))
    added = add_demonstrations(model, episodes, TASK)
    chunks = [-(-e.n_steps // TASK.chunk) for e in episodes]
    assert added == sum(chunks) // 2 * 2
    buffer = model.replay_buffer
    first = episodes[0]
    assert np.array_equal(buffer.observations["pixels"][0, 0], first.frames[0].transpose(2, 0, 1))
    assert np.array_equal(buffer.actions[0, 0].reshape(TASK.chunk, -1), first.actions[: TASK.chunk])
    stored = buffer.rewards[: added // 2]
    assert stored.sum() == pytest.approx(sum(bool(e.success) for e in episodes), abs=1)
    ends = buffer.dones[: added // 2].astype(bool)
    assert ends[stored > 0].all() and not buffer.timeouts[: added // 2][stored > 0].any()
    model.env.close()


def test_unlabelled_episodes_are_refused():
    from dataclasses import replace

    model = make_sac("WMPO-Simulated-v0", 2, buffer_size=100)
    episodes = [replace(e, success=None) for e in record_expert(TASK.split_ids("train")[:1], seed=0)]
    with pytest.raises(ValueError, match="no success label"):
        add_demonstrations(model, episodes, TASK)
    model.env.close()
