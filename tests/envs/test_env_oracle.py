"""The batch against Gymnasium's ``SyncVectorEnv`` of single environments, exactly, infos included."""

from __future__ import annotations

import numpy as np
import pytest
from env_toys import assert_same, make_batch, make_single
from gymnasium.vector import AutoresetMode, SyncVectorEnv

KINDS = ("imagined", "simulated")


def actions_of(rng: np.random.Generator, env: SyncVectorEnv) -> np.ndarray:
    """Random chunks that lean to one side, so that episodes succeed as well as fail."""
    lean = rng.choice([-0.6, 0.0, 0.6], (env.num_envs, 1, 1))
    return np.clip(rng.normal(lean, 0.5, env.action_space.shape), -1, 1).astype(np.float32)


@pytest.mark.parametrize("mode", [m.value for m in AutoresetMode])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("return_frames", [False, True])
def test_batch_equals_sync_vector_env(kind: str, mode: str, return_frames: bool) -> None:
    n = 4
    ours = make_batch(kind, n, autoreset_mode=mode, return_frames=return_frames)
    oracle = SyncVectorEnv(
        [lambda: make_single(kind, return_frames=return_frames)] * n, autoreset_mode=AutoresetMode(mode)
    )
    assert ours.single_observation_space == oracle.single_observation_space
    assert ours.observation_space == oracle.observation_space
    assert ours.action_space == oracle.action_space
    assert_same(ours.reset(seed=11), oracle.reset(seed=11))
    rng = np.random.default_rng(5)
    ends = {"terminated": 0, "truncated": 0}
    for _ in range(14):
        actions = actions_of(rng, oracle)
        got, expected = ours.step(actions), oracle.step(actions)
        assert_same(got, expected)
        _, _, terminated, truncated, _ = got
        ends["terminated"] += terminated.sum()
        ends["truncated"] += truncated.sum()
        done = terminated | truncated
        if mode == AutoresetMode.DISABLED.value and done.any():
            mask = done | (rng.random(n) < 0.2)
            seeds = [int(s) if s < 100 else None for s in rng.integers(0, 200, n)]
            options = {"start_state_id": int(rng.integers(24)), "noise_seed": None}
            got = ours.reset(seed=seeds, options={**options, "reset_mask": mask})
            assert_same(got, oracle.reset(seed=seeds, options={**options, "reset_mask": mask}))
    assert min(ends.values()) > 0, f"the episodes ended in one way only: {ends}"


@pytest.mark.parametrize("kind", KINDS)
def test_single_env_equals_its_row_whatever_the_batch(kind: str) -> None:
    """Row i of a batch of 5, of 2 and the single environment see the same episode to the last bit."""
    seeds, actions = (
        [3, 14, 15, 92, 65],
        np.random.default_rng(1).uniform(-1, 1, (4, 5, 3, 2)).astype(np.float32),
    )
    many = make_batch(kind, 5, autoreset_mode="DISABLED", skip_finished=True)
    few = make_batch(kind, 2, autoreset_mode="DISABLED", skip_finished=True)
    single = make_single(kind)
    obs, info = many.reset(seed=seeds)
    for pair in ([0, 3], [4, 1]):
        few_obs, few_info = few.reset(seed=[seeds[i] for i in pair])
        assert np.array_equal(few_obs["pixels"], obs["pixels"][pair])
        assert np.array_equal(few_info["start_state_id"], info["start_state_id"][pair])
    history = [many.step(a) for a in actions]
    few.reset(seed=[seeds[0], seeds[3]])
    pairwise = [few.step(a[[0, 3]]) for a in actions]
    for row, seed in enumerate(seeds):
        single.reset(seed=seed)
        for t, (obs, rewards, terminated, truncated, info) in enumerate(history):
            one = single.step(actions[t, row])
            assert np.array_equal(one[0]["pixels"], obs["pixels"][row])
            assert one[1:4] == (rewards[row], terminated[row], truncated[row])
            assert one[4]["success_prob"] == info["success_prob"][row]
            if row in (0, 3):
                assert np.array_equal(one[0]["pixels"], pairwise[t][0]["pixels"][[0, 3].index(row)])
            if one[2] or one[3]:
                break


@pytest.mark.parametrize("max_batch", [1, 2, 3])
def test_rows_per_network_call_do_not_matter(max_batch: int) -> None:
    whole, parts = make_batch("imagined", 5), make_batch("imagined", 5, max_batch=max_batch)
    assert_same(whole.reset(seed=0), parts.reset(seed=0))
    rng = np.random.default_rng(2)
    for _ in range(5):
        actions = rng.uniform(-1, 1, whole.action_space.shape).astype(np.float32)
        assert_same(whole.step(actions), parts.step(actions))
