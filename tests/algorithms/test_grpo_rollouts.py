"""What GRPO collects: groups, live rows only, masks, dynamic sampling."""

from __future__ import annotations

import logging

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from grpo_toys import CountdownEnv, Recorder, make, parameters, rollouts_of, vec
from gymnasium import spaces


def test_groups_share_a_start_state_and_nothing_else():
    model = make(env=vec(n_envs=12), success_bounds=(0.0, 1.0))
    rollouts = rollouts_of(model)
    assert rollouts.group_ids.tolist() == [g for g in range(3) for _ in range(4)]
    ids = rollouts.start_state_ids.view(3, 4)
    assert (ids == ids[:, :1]).all() and len(ids[:, 0].unique()) == 3
    first = th.stack([rollouts.obs[rollouts.rows == row][0] for row in range(12)]).view(3, 4, -1)
    assert (first == first[:, :1]).all()
    logged = [[s for s, start in env.reset_log if start is not None] for env in model.get_env().envs]
    assert len({s[0] for s in logged}) == 12  # own noise


def test_without_start_states_a_group_shares_a_seed():
    model = make(env=vec(CountdownEnv, 8), success_bounds=(0.0, 1.0))
    rollouts = rollouts_of(model)
    lengths = rollouts.lengths.view(2, 4)
    assert (lengths == lengths[:, :1]).all()
    assert (rollouts.start_state_ids == -1).all()


def test_start_states_are_drawn_from_the_argument():
    model = make(start_state_ids=[3, 5], env=vec(n_envs=32), success_bounds=(0.0, 1.0))
    assert set(rollouts_of(model).start_state_ids.tolist()) == {3, 5}


def test_only_running_rows_are_sampled_stored_and_counted():
    env = vec(CountdownEnv, 8)
    model = make(env=env, start_state_ids=[0, 3], success_bounds=(0.0, 1.0))  # episodes of 1 and 4 decisions
    recorder = Recorder()
    model.learn(1, recorder)
    rollouts = recorder.rollouts[0]
    lengths = rollouts.lengths.tolist()
    assert sorted(lengths) == [1] * 4 + [4] * 4
    assert rollouts.n_decisions == model.num_timesteps == 20
    assert model.policy.seen == [8, 4, 4, 4]
    assert recorder.timesteps == [8, 12, 16, 20]
    assert rollouts.rows.tolist() == [i for i, n in enumerate(lengths) for _ in range(n)]
    for row, length in enumerate(lengths):  # in order of time
        assert rollouts.obs[rollouts.rows == row].flatten().tolist() == list(range(length, 0, -1))


def test_tokens_after_success_are_masked():
    model = make(env=vec(n_envs=64), success_bounds=(0.0, 1.0))
    rollouts = rollouts_of(model)
    per_row = th.zeros(len(rollouts), dtype=th.int64).index_add(0, rollouts.rows, rollouts.token_mask.sum(1))
    assert th.equal(per_row, 2 * rollouts.n_actions)  # two numbers per action
    half = rollouts.token_mask.sum(1) == 2
    assert half.any()
    assert (rollouts.token_mask[half] == th.tensor([True, True, False, False])).all()
    last = th.cat([rollouts.rows[1:] != rollouts.rows[:-1], th.tensor([True])])
    assert last[half].all()
    assert rollouts.successes[rollouts.rows[half]].all()


@pytest.mark.parametrize(("tolerance", "key"), [(9.0, "dropped_all_success"), (0.0, "dropped_all_fail")])
def test_no_informative_group_skips_the_update(tolerance, key, caplog):
    model = make(env=vec(tolerance=tolerance), n_groups=4, max_extra_batches=2)
    before = parameters(model)
    with caplog.at_level(logging.WARNING):
        model.learn(1)
    assert th.equal(parameters(model), before)
    entry = model.history[0]
    assert (
        entry["rollout/batches"] == 3 and entry["rollout/kept_groups"] == 0 and entry[f"rollout/{key}"] == 12
    )
    assert "no informative group" in caplog.text


def test_batches_are_repeated_until_there_are_enough_groups():
    model = make(env=vec(n_envs=8), n_groups=6, max_extra_batches=50)
    rollouts = rollouts_of(model)
    entry = model.history[0]
    assert rollouts.n_groups == 6 == entry["rollout/kept_groups"]
    assert len(rollouts) == 24
    assert rollouts.group_ids.tolist() == [g for g in range(6) for _ in range(4)]
    rates = rollouts.successes.float().view(6, 4).mean(1)
    assert ((rates > 0) & (rates < 1)).all()
    assert entry["rollout/episodes"] == 8 * entry["rollout/batches"] >= 24
    dropped = entry["rollout/dropped_all_success"] + entry["rollout/dropped_all_fail"]
    assert dropped >= 1 and dropped + 6 <= 2 * entry["rollout/batches"] <= dropped + 7


def test_an_episode_without_end_is_refused(monkeypatch):
    monkeypatch.setattr("wmpo_gym.algorithms.group_algorithm.MAX_DECISIONS", 3)
    with pytest.raises(RuntimeError, match="still running after 3 decisions.*max_episode_steps"):
        make(env=vec(CountdownEnv, 4), start_state_ids=[3]).learn(1)


class ImageEnv(gym.Env):
    observation_space = spaces.Dict(
        {"pixels": spaces.Box(0, 255, (40, 40, 3), np.uint8), "task_id": spaces.Discrete(2)}
    )
    action_space = spaces.Box(-1.0, 1.0, (2, 2), np.float32)
    render_mode = None

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.seed_pixels = self.np_random.integers(0, 256, (40, 40, 3), np.uint8)
        return {"pixels": self.seed_pixels, "task_id": 1}, {}

    def step(self, action):
        success = bool(action[0, 0] > 0)
        return (
            {"pixels": self.seed_pixels, "task_id": 1},
            float(success),
            True,
            False,
            {"is_success": success},
        )


def test_pixels_stay_bytes_and_small_image_policies_work():
    model = make("MultiInputPolicy", vec(ImageEnv, 8))
    rollouts = rollouts_of(model)
    assert rollouts.obs["pixels"].dtype == th.uint8
    assert rollouts.obs["pixels"].shape[1:] == (3, 40, 40)
    del model.train
    model.learn(50)
    assert model._n_updates
