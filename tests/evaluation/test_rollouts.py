"""Rollouts do not depend on how many rows run them, spend nothing on finished rows, and resume."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from wmpo_gym.data.store import EpisodeStore
from wmpo_gym.rollouts.policy_runner import acting, episode_seeds
from wmpo_gym.rollouts.rollout import collect_episodes, evaluate_policy_on, make_rollout_env, rollout
from wmpo_gym.tasks import get_task

pytest.importorskip("mujoco")
TASK = get_task("move-block")
IDS = list(TASK.split_ids("test")[:7])


def simulated(num_envs: int, **kwargs):
    return make_rollout_env("WMPO-Simulated-v0", num_envs, task=TASK, **kwargs)


def test_results_do_not_depend_on_the_number_of_rows(fetch):
    a = rollout(simulated(7), fetch(9.0), IDS, deterministic=True, seed=1)
    b = rollout(simulated(3), fetch(9.0), IDS, deterministic=True, seed=1)
    assert a.start_state_ids.tolist() == IDS
    for name in ("success", "n_frames", "task_ids"):
        assert (getattr(a, name) == getattr(b, name)).all()
    assert np.array_equal(a.actions, b.actions, equal_nan=True)
    assert a.success.any() and len(a) == 7 and a.rate.n == 7


def test_actions_after_the_end_are_nan_and_finished_rows_cost_nothing(fetch):
    policy = fetch(0.0)
    r = rollout(simulated(4), policy, IDS, deterministic=True)
    chunks = np.isfinite(r.actions).all(axis=(2, 3)).sum(axis=1)
    assert (chunks == -(-r.n_frames // TASK.chunk)).all()
    assert sum(policy.batches) == chunks.sum()
    assert r.ledger.real_steps == r.n_frames.sum()
    assert r.ledger.real_episodes == len(IDS)


def test_more_rows_than_episodes(fetch):
    few = rollout(simulated(5), fetch(0.0), IDS[:2], deterministic=True)
    assert few.start_state_ids.tolist() == IDS[:2] and few.success.shape == (2,)


def test_sampling_is_repeatable_and_leaves_the_policy_as_it_was(fetch):
    policy = fetch(0.0, noise=0.3)
    state, outside = policy.generator.get_state(), torch.get_rng_state()
    a = rollout(simulated(4), policy, IDS, seed=5)
    b = rollout(simulated(4), policy, IDS, seed=5)
    c = rollout(simulated(4), policy, IDS, seed=6)
    assert np.array_equal(a.actions, b.actions, equal_nan=True)
    assert not np.array_equal(a.actions, c.actions, equal_nan=True)
    assert torch.equal(policy.generator.get_state(), state) and torch.equal(torch.get_rng_state(), outside)


def test_recorded_frames_match_the_episode(fetch):
    env = simulated(3, record_frames=True)
    r = rollout(env, fetch(0.0), IDS[:4], deterministic=True, record_frames=True)
    assert [len(f) for f in r.frames] == (r.n_frames + 1).tolist()
    episodes = list(r.episodes(TASK, source="test"))
    assert [e.start_state_id for e in episodes] == IDS[:4]
    assert [e.success for e in episodes] == r.success.tolist()
    simulator = env.unwrapped.simulators[0]
    simulator.reset(IDS[0])
    assert (episodes[0].frames[0] == simulator.render()).all()
    for action, frame in zip(episodes[0].actions, episodes[0].frames[1:], strict=True):
        simulator.step(action)
        assert (simulator.render() == frame).all()
    assert simulator.success == episodes[0].success


def test_imagined_rollouts_do_not_depend_on_the_number_of_rows(fetch, tiny_world):
    tiny_world.classifier.threshold = 1.0
    ids = [2, 0, 3, 0, 1]

    def imagine(num_envs: int):
        env = make_rollout_env("WMPO-Imagined-v0", num_envs, world=tiny_world, record_frames=True)
        return rollout(env, fetch(0.0), ids, deterministic=True, seed=3, record_frames=True)

    a, b = imagine(5), imagine(2)
    assert all((x == y).all() for x, y in zip(a.frames, b.frames, strict=True))
    assert np.array_equal(a.actions, b.actions)
    assert (a.frames[1][0] == a.frames[3][0]).all()  # one start state twice, under different seeds
    assert a.ledger.imagined_frames == 5 * TASK.horizon and (a.n_frames == TASK.horizon).all()
    assert a.ledger.real_episodes == 0


def test_a_vla_policy_is_evaluated_in_both_environments(tiny_world):
    pytest.importorskip("transformers")
    from wmpo_gym.evaluation.twin import compare_with_twin
    from wmpo_gym.policies.vla import VLAConfig
    from wmpo_gym.policies.vla_policy import VLAPolicy, make_spaces

    config = VLAConfig.tiny()
    spaces = make_spaces(config, (TASK.image_size, TASK.image_size, 3), len(TASK.instructions))
    policy = VLAPolicy(*spaces, config=config, instructions=TASK.instructions)
    draws = policy.get_extra_state().clone()
    r = evaluate_policy_on(TASK, policy, "test", 3, deterministic=False, progress=False)
    c = compare_with_twin(tiny_world, policy, IDS[:3], seed=1)
    assert r.rate.n == 3 and r.protocol.temperature == 1.0
    assert c.imagined.frames.shape == c.replay.frames.shape == (3, TASK.horizon + 1, 40, 40, 3)
    assert np.isfinite(c.error[:, 0]).all() and (c.error[:, 0] == 0).all()
    assert (policy.get_extra_state() == draws).all()


def test_wrong_environments_are_refused(fetch):
    import gymnasium

    with pytest.raises(ValueError, match="skip_finished=True"):
        rollout(gymnasium.make_vec("WMPO-Simulated-v0", 2), fetch(), IDS)
    with pytest.raises(ValueError, match="return_frames=True"):
        rollout(simulated(2), fetch(), IDS, record_frames=True)
    with pytest.raises(TypeError, match="neither sample"), acting(object(), deterministic=True, seed=0):
        pass


def test_collecting_resumes_to_the_episodes_of_an_uninterrupted_run(fetch, tmp_path):
    def collect(store: EpisodeStore, ids: list[int]) -> int:
        return collect_episodes(
            simulated(3, record_frames=True), fetch(0, 0.3), ids, store, seed=2, progress=False
        )

    whole, cut = EpisodeStore(tmp_path / "whole", codec="npy"), EpisodeStore(tmp_path / "cut", codec="npy")
    assert collect(whole, IDS) == 7
    reference = whole.load()
    for episode in reference[:4]:  # killed in the middle of the second wave
        cut.append(episode)
    assert collect(cut, IDS) == 3 and collect(cut, IDS) == 0
    resumed = cut.load()
    assert [e.start_state_id for e in resumed] == IDS
    for a, b in zip(resumed, reference, strict=True):
        assert (a.frames == b.frames).all() and (a.actions == b.actions).all() and a.success == b.success
    with pytest.raises(ValueError, match="named twice"):
        collect(cut, [1, 1])


def test_evaluation_carries_its_protocol(fetch):
    r = evaluate_policy_on(TASK, fetch(0.0), "test", 5, deterministic=True, num_envs=4, progress=False)
    assert r.protocol.start_state_ids == tuple(IDS[:5]) and r.protocol.num_envs == 4
    assert r.protocol.env_id == "WMPO-Simulated-v0" and r.protocol.deterministic
    assert r.rate.n == 5


def test_seeds_belong_to_the_episode_not_to_its_place():
    seeds = episode_seeds(0, np.array([4, 9, 4]))
    assert seeds[0] != seeds[2] and episode_seeds(0, np.array([9])) == [seeds[1]]
    assert len({*seeds, *episode_seeds(1, np.array([4, 9, 4]))}) == 6
