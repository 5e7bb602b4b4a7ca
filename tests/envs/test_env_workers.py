"""Rows of the simulated environment in processes of their own."""

from __future__ import annotations

import pickle
from typing import Any

import gymnasium
import numpy as np
import pytest
from env_toys import assert_same

import wmpo_gym  # noqa: F401
from wmpo_gym.envs.simulated.env import SimulatedVectorEnv


@pytest.fixture(scope="module")
def spread() -> Any:
    env = gymnasium.make_vec(
        "WMPO-Simulated-v0", num_envs=3, num_workers=2, autoreset_mode="SAME_STEP", return_frames=True
    )
    yield env
    env.close()
    env.close()


def test_rows_in_workers_do_what_rows_here_do(spread: Any) -> None:
    here = gymnasium.make_vec("WMPO-Simulated-v0", num_envs=3, autoreset_mode="SAME_STEP", return_frames=True)
    assert_same(spread.reset(seed=3), here.reset(seed=3))
    actions = np.random.default_rng(0).uniform(-1, 1, (6, *here.action_space.shape)).astype(np.float32)
    for chunk in actions:  # over the horizon, so that rows reset
        assert_same(spread.step(chunk), here.step(chunk))
    assert spread.unwrapped.ledger.real_steps == here.unwrapped.ledger.real_steps > 0
    state = spread.unwrapped.get_state()
    after = [env.step(actions[0])[0]["pixels"] for env in (spread, here)]
    here.unwrapped.set_state(state)
    assert np.array_equal(here.step(actions[0])[0]["pixels"], after[0]) and np.array_equal(*after)
    mask = {"reset_mask": np.array([False, True, False]), "start_state_id": 7}
    assert_same(spread.reset(options=mask), here.reset(options=mask))


def test_errors_come_back_and_the_rows_go_on(spread: Any) -> None:
    spread.reset(seed=0)
    state = spread.unwrapped.get_state()
    broken = {**state, "dynamics.simulator": state["dynamics.simulator"][:, :-3]}
    with pytest.raises(ValueError, match="A move-block state has shape"):
        spread.unwrapped.set_state(broken)
    spread.unwrapped.set_state(state)
    assert np.array_equal(spread.unwrapped.get_state()["dynamics.simulator"], state["dynamics.simulator"])


def test_a_lost_process_is_named() -> None:
    env = SimulatedVectorEnv(2, num_workers=2)
    env.reset(seed=0)
    env._rows._processes[1].terminate()
    env._rows._processes[1].join()
    with pytest.raises(RuntimeError, match="Simulator process 1 ended unexpectedly"):
        env.step(np.zeros(env.action_space.shape, np.float32))
    env.close()


def test_settings() -> None:
    with pytest.raises(ValueError, match="num_workers counts processes, got -1"):
        SimulatedVectorEnv(2, num_workers=-1)
    assert SimulatedVectorEnv(2, num_workers=8).num_workers == 2
    assert pickle.loads(pickle.dumps(SimulatedVectorEnv(2, num_workers=2))).num_workers == 2
