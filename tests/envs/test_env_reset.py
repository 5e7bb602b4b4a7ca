"""Seeds, start states, groups, partial resets, autoreset."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
from env_toys import TOY, WORLD, assert_same, make_batch, make_single
from gymnasium.error import ResetNeeded

from wmpo_gym.envs import make_sb3_env

KINDS = ("imagined", "simulated")
STILL = np.zeros((4, 3, 2), np.float32)


def uniform(seed: int, n: int = 4) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (n, 3, 2)).astype(np.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_seed_forms(kind: str) -> None:
    env = make_batch(kind, 4)
    by_int, by_list = env.reset(seed=5), env.reset(seed=[5, 6, 7, 8])
    assert_same(by_int, by_list)
    assert_same(env.reset(seed=np.int64(5)), by_list)
    assert env.np_random_seed == (5, 6, 7, 8)
    # None leaves a generator as it is: the next episode differs, and repeats after the same seeds
    following = env.reset()
    assert not np.array_equal(following[1]["start_state_id"], by_int[1]["start_state_id"])
    env.reset(seed=5)
    assert_same(env.reset(seed=[None] * 4), following)
    with pytest.raises(ValueError, match="one per row: num_envs=4, got 3"):
        env.reset(seed=[1, 2, 3])
    with pytest.raises(ValueError, match="row 2 is -1"):
        env.reset(seed=[1, 2, -1, 4])


@pytest.mark.parametrize("kind", KINDS)
def test_group_has_one_first_observation(kind: str) -> None:
    env = make_batch(kind, 4)
    obs, info = env.reset(seed=0, options={"start_state_id": np.array([3, 3, 9, 9])})
    assert info["start_state_id"].tolist() == [3, 3, 9, 9]
    assert np.array_equal(obs["pixels"][0], obs["pixels"][1])
    assert np.array_equal(obs["pixels"][2], obs["pixels"][3])
    assert not np.array_equal(obs["pixels"][0], obs["pixels"][2])
    one = make_single(kind).reset(seed=77, options={"start_state_id": 9})[0]
    assert np.array_equal(one["pixels"], obs["pixels"][2])
    actions = np.repeat(uniform(0, 1), 4, axis=0) * 0.1
    stepped = env.step(actions)[0]["pixels"]
    # own noise: the rows of a group part ways in imagination, and only there
    assert np.array_equal(stepped[0], stepped[1]) == (kind == "simulated")


def test_noise_seed_decides_the_noise() -> None:
    env = make_batch("imagined", 4, autoreset_mode="DISABLED", skip_finished=True, threshold=1.0)

    def imagine(**options: Any) -> np.ndarray:
        env.reset(seed=int(options.pop("seed", 0)), options={"start_state_id": 2, **options})
        return np.stack([env.step(uniform(1)[[0, 0, 0, 0]])[0]["pixels"] for _ in range(3)], 1)

    same = imagine(noise_seed=np.full(4, 12))
    assert all(np.array_equal(same[0], row) for row in same)
    assert np.array_equal(imagine(noise_seed=np.full(4, 12), seed=9), same)
    counted = imagine(noise_seed=12)
    assert np.array_equal(counted[0], same[0]) and not np.array_equal(counted[1], same[0])
    assert np.array_equal(counted, imagine(noise_seed=np.arange(12, 16)))
    assert not np.array_equal(imagine(seed=1), imagine(seed=2))


@pytest.mark.parametrize("kind", KINDS)
def test_options_do_not_shift_later_draws(kind: str) -> None:
    env = make_batch(kind, 4)
    env.reset(seed=3)
    expected = env.reset()[1]["start_state_id"]
    env.reset(seed=3, options={"start_state_id": 1, "noise_seed": 4})
    assert np.array_equal(env.reset()[1]["start_state_id"], expected)


@pytest.mark.parametrize("kind", KINDS)
def test_default_start_states_come_from_the_split(kind: str) -> None:
    env = make_batch(kind, 64)
    drawn = np.concatenate([env.reset(seed=100 * i)[1]["start_state_id"] for i in range(4)])
    assert set(drawn) == set(TOY.split_ids("train"))
    validation = make_batch(kind, 64, split="validation").reset(seed=0)[1]["start_state_id"]
    assert set(validation) <= set(TOY.split_ids("validation"))
    everything = make_batch(kind, 64, split=None)
    drawn = np.concatenate([everything.reset(seed=100 * i)[1]["start_state_id"] for i in range(6)])
    assert set(drawn) == set(everything.start_state_ids.tolist())


def test_world_without_start_states_of_the_split_says_so() -> None:
    with pytest.raises(ValueError, match="no start state of split 'test'"):
        make_batch("imagined", 2, split="test").reset(seed=0)


@pytest.mark.parametrize("kind", KINDS)
def test_partial_reset_leaves_the_others_alone(kind: str) -> None:
    env = make_batch(kind, 4, autoreset_mode="DISABLED", skip_finished=True, max_episode_steps=50)
    calm = make_batch(kind, 4, autoreset_mode="DISABLED", skip_finished=True, max_episode_steps=50)
    for e in (env, calm):
        e.reset(seed=0)
        before = e.step(uniform(0))
    mask = np.array([False, True, False, True])
    options = {
        "reset_mask": mask,
        "start_state_id": np.array([99, 2, -7, 2]),
    }  # unmasked ids are not looked at
    kept = dict(options)
    obs, info = env.reset(options=options)
    assert options.keys() == kept.keys() and options["reset_mask"] is mask
    assert np.array_equal(obs["pixels"][~mask], before[0]["pixels"][~mask])
    assert info["_start_state_id"].tolist() == mask.tolist() == info["_is_success"].tolist()
    assert info["start_state_id"][mask].tolist() == [2, 2]
    for t in range(3):
        mine, theirs = env.step(uniform(t + 1)), calm.step(uniform(t + 1))
        assert np.array_equal(mine[0]["pixels"][~mask], theirs[0]["pixels"][~mask])
        assert np.array_equal(mine[1][~mask], theirs[1][~mask])


def test_reset_mask_is_validated() -> None:
    env = make_batch("simulated", 4)
    with pytest.raises(ResetNeeded, match="Reset all rows once"):
        env.reset(options={"reset_mask": np.array([True, False, False, False])})
    env.reset(seed=0)
    with pytest.raises(TypeError, match="bool, got list"):
        env.reset(options={"reset_mask": [True, False, False, False]})
    with pytest.raises(TypeError, match="bool, got dtype int64"):
        env.reset(options={"reset_mask": np.ones(4, np.int64)})
    with pytest.raises(ValueError, match=r"shape \(4,\), got \(3,\)"):
        env.reset(options={"reset_mask": np.ones(3, np.bool_)})
    with pytest.raises(ValueError, match="selects no row"):
        env.reset(options={"reset_mask": np.zeros(4, np.bool_)})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start_state_id": 32}, "Unknown start_state_id \\[32\\] .* allowed: 0 to 31"),
        ({"start_state_id": -1}, "Unknown start_state_id \\[-1\\]"),
        ({"start_state_id": 1.5}, "must be an integer"),
        ({"start_state_id": True}, "must be an integer"),
        ({"start_state_id": np.arange(3)}, "shape \\(4,\\)"),
        ({"start_state": 3}, "Unknown reset option 'start_state'.*Did you mean 'start_state_id'"),
        ({"noise_seed": -4}, "must not be negative"),
        ({"noise_seed": "x"}, "must be an integer"),
        ({"task_id": 1}, "goes with 'start_frames'"),
        ({"start_frames": np.zeros((40, 40, 3), np.uint8)}, "cannot start from a picture"),
    ],
)
def test_bad_options_change_nothing(options: dict[str, Any], message: str) -> None:
    env, calm = make_batch("simulated", 4), make_batch("simulated", 4)
    for e in (env, calm):
        e.reset(seed=0)
    with pytest.raises(ValueError, match=message):
        env.reset(seed=1, options=options)
    assert_same(env.step(uniform(0)), calm.step(uniform(0)))
    assert_same(env.reset(), calm.reset())


def test_start_frames_begin_anywhere() -> None:
    env = make_batch("imagined", 4)
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (4, 40, 40, 3), dtype=np.uint8)
    obs, info = env.reset(seed=0, options={"start_frames": frames, "task_id": np.array([0, 1, 1, 0])})
    assert np.array_equal(obs["pixels"], frames) and obs["task_id"].tolist() == [0, 1, 1, 0]
    assert info["start_state_id"].tolist() == [-1] * 4
    assert info["instruction"].tolist() == [TOY.instructions[i] for i in (0, 1, 1, 0)]
    obs, info = env.reset(seed=0, options={"start_frames": frames[0], "start_state_id": 31})  # id as a label
    assert all(np.array_equal(o, frames[0]) for o in obs["pixels"])
    assert info["start_state_id"].tolist() == [31] * 4
    known = env.reset(seed=8, options={"start_state_id": 5})[1]
    given = env.reset(
        seed=8, options={"start_frames": WORLD.start_frames.frames[5], "task_id": 1, "start_state_id": 5}
    )
    assert_same(given[1], known)
    for bad, message in [
        ({"start_frames": frames[:, :20]}, "start_frames"),
        ({"start_frames": frames.astype(np.float32)}, "uint8"),
        ({"start_frames": frames, "task_id": 2}, "go right"),
    ]:
        with pytest.raises(ValueError, match=message):
            env.reset(options=bad)


def test_world_names_its_start_states() -> None:
    env = make_batch("imagined", 2)
    with pytest.raises(ValueError, match=r"\[24\] for task 'toy'; allowed: 0 to 23"):
        env.reset(options={"start_state_id": 24})
    assert env.start_state_ids.tolist() == list(range(24))


@pytest.mark.parametrize("kind", KINDS)
def test_step_needs_a_reset(kind: str) -> None:
    with pytest.raises(ResetNeeded):
        make_batch(kind, 4).step(STILL)
    with pytest.raises(ResetNeeded):
        make_single(kind).step(STILL[0])
    with pytest.raises(ResetNeeded):
        make_single(kind).get_state()


def test_the_mode_can_change_between_episodes() -> None:
    env = make_batch("simulated", 4, autoreset_mode="DISABLED", skip_finished=True, max_episode_steps=1)
    env.reset(seed=0)
    env.step(STILL)
    env.set_autoreset("SAME_STEP")
    assert not env.step(STILL)[3].any()  # rows that were left waiting are reset, as in NEXT_STEP
    _, _, _, truncated, info = env.step(STILL)
    assert truncated.all() and info["_final_info"].all()


@pytest.mark.parametrize("kind", KINDS)
def test_finished_rows_must_be_reset_or_wait(kind: str) -> None:
    strict = make_batch(kind, 4, autoreset_mode="DISABLED", max_episode_steps=1)
    strict.reset(seed=0)
    strict.step(STILL)
    with pytest.raises(AssertionError, match=r"rows \[0, 1, 2, 3\] are over"):
        strict.step(STILL)
    single = make_single(kind, max_episode_steps=1)
    single.reset(seed=0)
    single.step(STILL[0])
    with pytest.raises(ResetNeeded):
        single.step(STILL[0])
    patient = make_batch(kind, 4, autoreset_mode="DISABLED", skip_finished=True, max_episode_steps=1)
    patient.reset(seed=0)
    last, *_, last_info = patient.step(STILL)
    before = patient.ledger.copy()
    obs, rewards, terminated, truncated, info = patient.step(STILL)
    assert np.array_equal(obs["pixels"], last["pixels"])
    assert not (rewards.any() or terminated.any() or truncated.any() or info["n_frames"].any())
    assert np.array_equal(info["is_success"], last_info["is_success"])
    spent = patient.ledger - before
    assert (spent.real_steps, spent.imagined_frames, spent.nfe, spent.real_episodes) == (0, 0, 0, 0)
    patient.reset(options={"reset_mask": np.array([True, False, False, False])})
    info = patient.step(STILL)[4]
    assert (info["n_frames"] > 0).tolist() == [True, False, False, False]
    with pytest.raises(ValueError, match="DISABLED"):
        make_batch(kind, 4, skip_finished=True)


def test_another_split_counts_from_the_next_reset() -> None:
    env = gymnasium.make("WMPO-Simulated-v0")
    env.reset(seed=0)
    env.unwrapped.split = "test"
    ids = env.unwrapped.task_spec.split_ids("test")
    assert all(env.reset()[1]["start_state_id"] in ids for _ in range(3))
    with pytest.raises(ValueError, match="Unknown split 'tests'"):
        env.unwrapped.split = "tests"
    assert env.unwrapped.split == "test"
    batch = make_sb3_env("WMPO-Simulated-v0", 2)
    batch.reset()
    batch.set_attr("split", "test")
    batch.reset()
    assert all(info["start_state_id"] in ids for info in batch.unwrapped.reset_infos)
    batch.close()
