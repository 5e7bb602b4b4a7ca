"""Actions, rewards, ends, frames, state, ledger."""

from __future__ import annotations

import io
from typing import Any

import gymnasium
import numpy as np
import pytest
from env_toys import TOY, WORLD, ToySim, assert_same, make_batch, make_single
from gymnasium.vector import AutoresetMode

from wmpo_gym.envs.ledger import Ledger
from wmpo_gym.envs.simulated.env import SimulatedVectorEnv

KINDS = ("imagined", "simulated")


def leaning(rng: np.random.Generator, n: int) -> np.ndarray:
    lean = rng.choice([-0.6, 0.0, 0.6], (n, 1, 1))
    return np.clip(rng.normal(lean, 0.5, (n, 3, 2)), -1, 1).astype(np.float32)


# -- actions -------------------------------------------------------------------------------------------------
def spoiled(value: Any, dtype: Any = np.float32) -> np.ndarray:
    actions = np.zeros((4, 3, 2), dtype)
    actions[2, 1, 0] = value
    return actions


BAD_ACTIONS = [
    (spoiled(np.nan), "row 2 is nan at chunk step 1, dimension 0"),
    (spoiled(np.inf), "row 2 is inf"),
    (spoiled(-np.inf), "row 2 is -inf"),
    (spoiled(1.5), r"row 2 is 1\.5 .* within \[-1, 1\]"),
    (spoiled(1.0001, np.float64), "row 2 is 1.0001"),
    (spoiled(0, np.int64), "dtype int64"),
    (spoiled(False, np.bool_), "dtype bool"),
    (np.full((4, 3, 2), None), "dtype object"),
    (np.zeros((4, 2, 3), np.float32), r"shape \(4, 2, 3\); expected .* \(4, 3, 2\)"),
    (np.zeros((3, 3, 2), np.float32), r"shape \(3, 3, 2\)"),
    (np.zeros((4, 6), np.float32), r"shape \(4, 6\)"),
]


@pytest.mark.parametrize(("actions", "message"), BAD_ACTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_bad_actions_name_row_and_value_and_change_nothing(kind: str, actions: Any, message: str) -> None:
    env, calm = make_batch(kind, 4), make_batch(kind, 4)
    for e in (env, calm):
        e.reset(seed=0)
        e.step(np.zeros((4, 3, 2), np.float32))
    spent = env.ledger.copy()
    with pytest.raises(ValueError, match=message):
        env.step(actions)
    assert env.ledger == spent
    good = leaning(np.random.default_rng(0), 4)
    assert_same(env.step(good), calm.step(good))


@pytest.mark.parametrize("kind", KINDS)
def test_single_env_checks_its_action_too(kind: str) -> None:
    env = make_single(kind)
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"shape \(1, 3, 2\); expected \(chunk, action_dim\) = \(3, 2\)"):
        env.step(np.zeros((1, 3, 2), np.float32))
    with pytest.raises(ValueError, match="nan"):
        env.step(np.full((3, 2), np.nan, np.float32))
    env.step(np.zeros((3, 2), np.float32))


@pytest.mark.parametrize("kind", KINDS)
def test_float64_and_lists_are_cast_and_left_as_they_were(kind: str) -> None:
    exact, lenient = make_batch(kind, 4), make_batch(kind, 4)
    actions = leaning(np.random.default_rng(0), 4)
    for e in (exact, lenient):
        e.reset(seed=0)
    assert_same(exact.step(actions), lenient.step(actions.astype(np.float64)))
    kept = actions.copy()
    assert_same(exact.step(actions), lenient.step(actions.tolist()))
    assert np.array_equal(actions, kept)


def test_bad_actions_of_rows_that_wait_for_their_reset_are_errors_too() -> None:
    env = make_batch("simulated", 4, max_episode_steps=1)
    env.reset(seed=0)
    env.step(np.zeros((4, 3, 2), np.float32))
    with pytest.raises(ValueError, match=r"rows with such values: \[0, 1, 2, 3\]"):
        env.step(np.full((4, 3, 2), np.nan, np.float32))


# -- random walks through the interface ----------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", KINDS)
def test_invariants_over_random_sequences(kind: str, seed: int) -> None:
    """Whatever is called in whatever order, what must always hold holds."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 6))
    mode = list(AutoresetMode)[seed % 3]
    terms = {"progress": 0.5} if seed % 2 else None
    skip = mode is AutoresetMode.DISABLED and seed >= 3
    env = make_batch(
        kind,
        n,
        autoreset_mode=mode,
        skip_finished=skip,
        return_frames=True,
        reward_terms=terms,
        max_episode_steps=4,
    )
    env.reset(seed=seed)
    chunks, done, steps = np.zeros(n, int), np.zeros(n, bool), 0
    for _ in range(25):
        if rng.random() < 0.15 or (mode is AutoresetMode.DISABLED and not skip and done.any()):
            mask = done | (rng.random(n) < 0.4)
            mask[rng.integers(n)] = True
            obs, info = env.reset(options={"reset_mask": mask, "start_state_id": rng.integers(0, 24, n)})
            chunks[mask], done[mask] = 0, False
            assert info["_is_success"].tolist() == mask.tolist() and not info["is_success"].any()
            continue
        if rng.random() < 0.2:
            env.set_state(env.get_state())
        frozen = done if mode is not AutoresetMode.SAME_STEP else np.zeros(n, bool)
        obs, rewards, terminated, truncated, info = env.step(leaning(rng, n))
        assert obs in env.observation_space
        assert not (terminated & truncated).any()
        assert (
            np.array_equal(rewards, sum(info[f"reward_{t}"] for t in env.reward_weights))
            or "final_info" in info
        )
        chunks = np.where(frozen, 0, chunks + 1)
        over = terminated | truncated
        last = info
        if "final_info" in info:
            assert mode is AutoresetMode.SAME_STEP and np.array_equal(info["_final_info"], over)
            last = {
                **info,
                **{k: np.where(over, info["final_info"][k], info[k]) for k in ("is_success", "n_frames")},
            }
            assert all(info["final_obs"][i] in env.single_observation_space for i in np.flatnonzero(over))
        else:
            assert not (mode is AutoresetMode.SAME_STEP and over.any())
        live = ~frozen
        assert np.array_equal(last["is_success"][live], terminated[live])
        assert ((last["n_frames"][live] >= 1) & (last["n_frames"][live] <= 3)).all()
        assert (last["n_frames"][live & ~terminated] == 3).all() and not last["n_frames"][frozen].any()
        assert np.array_equal(truncated[live], ((chunks >= 4) & ~terminated)[live])
        steps += int(last["n_frames"].sum())
        if mode is AutoresetMode.SAME_STEP:
            chunks, done = np.where(over, 0, chunks), np.zeros(n, bool)
        elif skip:
            done = done | over
        else:
            done = over
    if kind == "simulated":
        assert env.ledger.real_steps == steps and env.ledger.imagined_frames == 0
    else:
        assert env.ledger.nfe * 3 == env.ledger.imagined_frames * 2 and env.ledger.real_steps == 0


@pytest.mark.parametrize("kind", KINDS)
def test_reward_is_a_sum_of_named_terms(kind: str) -> None:
    env = make_batch(kind, 8, reward_terms={"progress": 0.25}, autoreset_mode="DISABLED", skip_finished=True)
    _, info = env.reset(seed=0)
    assert not info["reward_success"].any() and not info["reward_progress"].any()
    rng, total, progress = np.random.default_rng(0), np.zeros(8), np.zeros(8)
    for _ in range(4):
        _, rewards, terminated, _, info = env.step(leaning(rng, 8))
        assert np.array_equal(rewards, info["reward_success"] + info["reward_progress"])
        assert np.array_equal(info["reward_success"], terminated.astype(float))
        total, progress = total + rewards, progress + info["reward_progress"]
    assert info["is_success"].any() and not info["is_success"].all()
    assert np.allclose(progress, 0.25 * info["success_prob"])
    assert np.allclose(total - progress, info["is_success"])
    plain = make_batch(kind, 2)
    assert plain.reward_weights == {"success": 1.0} and "reward_progress" not in plain.reset(seed=0)[1]
    with pytest.raises(ValueError, match=r"\['style'\].*success, progress"):
        make_batch(kind, 2, reward_terms={"style": 1.0})


@pytest.mark.parametrize("kind", KINDS)
def test_success_ends_the_chunk_at_its_frame(kind: str) -> None:
    env = make_batch(kind, 16, return_frames=True, autoreset_mode="DISABLED", skip_finished=True)
    env.reset(seed=0)
    rng, early = np.random.default_rng(0), 0
    for _ in range(4):
        obs, _, terminated, _, info = env.step(leaning(rng, 16))
        for row in np.flatnonzero(info["_frames"]):
            n = info["n_frames"][row]
            clip = info["frames"][row]
            assert np.array_equal(clip[n - 1], obs["pixels"][row])
            assert all(np.array_equal(frame, clip[n - 1]) for frame in clip[n:])
            early += terminated[row] and n < 3
        if kind == "imagined":
            assert np.array_equal(
                terminated | ~info["_frames"] & info["is_success"], info["success_prob"] >= 0.85
            )
    assert early > 0, "no episode ended inside a chunk"


# -- what it costs -------------------------------------------------------------------------------------------
def test_finished_rows_are_not_put_through_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    env = make_batch("imagined", 6, autoreset_mode="DISABLED", skip_finished=True)
    env.reset(seed=0)
    rows = []
    real = env._imagination.step
    monkeypatch.setattr(env._imagination, "step", lambda s, a, z: (rows.append(len(a)), real(s, a, z))[1])
    expected, live = [], np.ones(6, bool)
    for _ in range(4):
        expected.append(int(live.sum()))
        _, _, terminated, truncated, _ = env.step(leaning(np.random.default_rng(1), 6))
        live &= ~(terminated | truncated)
        if not live.any():
            break
    assert [max(2, e) if e else 0 for e in expected] == rows and expected[-1] < 6
    assert env.ledger.imagined_frames == 3 * sum(expected) and env.ledger.nfe == 2 * sum(expected)
    env.step(leaning(np.random.default_rng(1), 6))
    assert len(rows) == len(expected) or live.any()


def test_only_needed_frames_are_rendered() -> None:
    counts = {}
    for wants in (False, True):
        env = make_batch("simulated", 2, return_frames=wants)
        env.reset(seed=0)
        env.step(np.zeros((2, 3, 2), np.float32))
        counts[wants] = [s.rendered for s in env.simulators]
    assert counts == {False: [2, 2], True: [4, 4]}


def test_simulators_are_made_at_the_first_reset_and_released_once() -> None:
    env = make_batch("simulated", 2)
    assert env.simulators == ()
    env.reset(seed=0)
    assert all(isinstance(s, ToySim) for s in env.simulators)
    env.close()
    env.close()
    assert env.simulators == () and env.closed


def test_ledger_counts_and_subtracts() -> None:
    env = make_batch("simulated", 3, max_episode_steps=2, autoreset_mode="SAME_STEP")
    env.reset(seed=0)
    assert env.ledger.real_episodes == 0  # a start state that nothing was done in costs no episode
    before = env.ledger.copy()
    for _ in range(3):
        env.step(np.zeros((3, 3, 2), np.float32))
    spent = env.ledger - before
    assert (spent.real_episodes, spent.real_steps, spent.imagined_frames, spent.nfe) == (6, 27, 0, 0)
    assert spent.seconds > 0 and before + spent == env.ledger
    assert Ledger(**env.ledger.to_dict()) == env.ledger
    assert sum([spent, spent], Ledger()).real_steps == 54


# -- state ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
def test_state_goes_through_npz_and_restores_everything(kind: str) -> None:
    env = make_batch(kind, 4, autoreset_mode="SAME_STEP")
    rng = np.random.default_rng(0)
    env.reset(seed=0)
    env.step(leaning(rng, 4))
    file = io.BytesIO()
    np.savez(file, **env.get_state())
    file.seek(0)
    with np.load(file, allow_pickle=False) as stored:
        state = dict(stored)
    assert all(len(value) == 4 for value in state.values())
    actions = [leaning(rng, 4) for _ in range(6)]
    expected = [env.step(a) for a in actions]
    env.set_state(state)
    assert_same([env.step(a) for a in actions], expected)
    other = make_batch(kind, 4, autoreset_mode="SAME_STEP")  # never reset
    other.set_state(state)
    assert_same([other.step(a) for a in actions], expected)


@pytest.mark.parametrize("kind", KINDS)
def test_one_row_branches_into_many(kind: str) -> None:
    env = make_batch(kind, 4, autoreset_mode="DISABLED", skip_finished=True, max_episode_steps=20)
    env.reset(seed=0)
    actions = leaning(np.random.default_rng(3), 4)
    env.step(actions * 0.2)
    env.set_state(env.get_state([2, 2]), rows=[0, 3])
    obs = env.step(np.repeat(actions[:1], 4, axis=0))[0]["pixels"]
    assert np.array_equal(obs[0], obs[2]) and np.array_equal(obs[3], obs[2])
    assert not np.array_equal(obs[1], obs[2])


@pytest.mark.parametrize("kind", KINDS)
def test_single_env_restores_its_generator(kind: str) -> None:
    env = make_single(kind)
    env.reset(seed=0)
    state = env.get_state()
    expected = env.reset()
    env.set_state(state)
    assert_same(env.reset(), expected)
    with pytest.raises(ValueError, match="rng"):
        env.set_state({k: v for k, v in state.items() if k != "rng"})
    with pytest.raises(ValueError, match="hold 1 row"):
        env.set_state({k: np.concatenate([v, v]) for k, v in state.items()})


def test_move_block_state_is_exact() -> None:
    env = SimulatedVectorEnv(2, "move-block", autoreset_mode="DISABLED")
    env.reset(seed=0)
    rng = np.random.default_rng(0)
    act = [rng.uniform(-1, 1, env.action_space.shape).astype(np.float32) for _ in range(3)]
    env.step(act[0])
    state = env.get_state()
    expected = [env.step(a) for a in act[1:]]
    env.reset(seed=9)
    env.set_state(state)
    assert_same([env.step(a) for a in act[1:]], expected)
    assert env.task_description == tuple(env.instructions[s.task_id] for s in env.simulators)


def test_task_id_and_start_states_agree_with_the_simulator() -> None:
    env = SimulatedVectorEnv(3, "move-block", split="test")
    obs, info = env.reset(seed=0)
    assert all(env.task_spec.split_of(int(i)) == "test" for i in info["start_state_id"])
    assert obs["task_id"].tolist() == [s.task_id for s in env.simulators]
    assert np.array_equal(obs["pixels"][1], env.simulators[1].render())
    assert TOY.n_chunks == 4 and WORLD.task is TOY


def test_an_action_that_was_rounded_beyond_its_range_is_clipped() -> None:
    env = gymnasium.make("WMPO-Simulated-v0")
    rescaled = gymnasium.wrappers.RescaleAction(env, np.float32(0.1), np.float32(0.2))
    rescaled.reset(seed=0)
    for bound in (rescaled.action_space.low, rescaled.action_space.high):
        rescaled.step(bound)
    with pytest.raises(ValueError, match="clip them first"):
        env.step(np.full(env.action_space.shape, -1.001, np.float32))
