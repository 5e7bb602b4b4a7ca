"""A world that dreams the simulator agrees with it exactly; worlds that do not are found out."""

from __future__ import annotations

import numpy as np
import pytest

from wmpo_gym.envs.simulated.locate import locate_coloured_block
from wmpo_gym.evaluation.metrics import object_error
from wmpo_gym.evaluation.twin import compare_with_twin
from wmpo_gym.rollouts.imagined import imagine_actions, imagine_episodes, imagine_full_horizon
from wmpo_gym.rollouts.rollout import make_rollout_env, rollout
from wmpo_gym.rollouts.simulated import replay, start_frames
from wmpo_gym.tasks import get_task

pytest.importorskip("mujoco")
TASK = get_task("move-block")
IDS = list(TASK.split_ids("validation")[:8])


def test_a_perfect_world_agrees_with_its_twin(fetch, twin_world):
    c = compare_with_twin(twin_world(IDS), fetch(12.0, noise=0.2), IDS, seed=1)
    assert (c.imagined.frames == c.replay.frames).all() and np.nanmax(c.error) == 0.0
    assert 0 < c.replay.success.sum() < len(IDS)
    assert c.agreement.accuracy.value >= 7 / 8  # the classifier looks at pixels, the simulator at the state
    assert c.imagined.actions.shape == (8, TASK.horizon, TASK.action_dim)
    assert np.isfinite(c.imagined.actions).all()


def test_imagination_goes_on_after_the_claim(fetch, twin_world):
    world = twin_world(IDS)
    frames, task_ids = start_frames(TASK, np.array(IDS))
    imagined = imagine_full_horizon(world, fetch(0.0), frames, task_ids, deterministic=True)
    early = imagined.claimed_step[imagined.claimed]
    assert len(early) and early.max() < TASK.horizon
    assert np.isnan(imagined.probs[:, 0]).all() and np.isfinite(imagined.probs[:, 1:]).all()
    twin = replay(TASK, IDS, imagined.actions)
    # Replayed in full, every early claim is confirmed, at about the same step.
    assert twin.success[imagined.claimed].all()
    assert np.abs(twin.success_step - imagined.claimed_step)[imagined.claimed].max() <= 2


def test_early_claims_are_false_but_still_judged_over_the_full_horizon(fetch, twin_world):
    generous = twin_world(IDS, radius=200.0)  # claims whenever the lamp is dark
    c = compare_with_twin(generous, fetch(40.0), IDS, deterministic=True, record_frames=False)
    assert c.imagined.claimed.all() and (c.imagined.claimed_step == 1).all()
    assert c.agreement.precision.value == c.replay.success.mean() < 0.5
    assert c.agreement.gap.points == pytest.approx(100 * (1 - c.replay.success.mean()))
    assert c.error is None and c.error_by_step() == {}


def test_the_replay_agrees_with_the_environment(fetch):
    r = rollout(make_rollout_env("WMPO-Simulated-v0", 8, task=TASK), fetch(3.0), IDS, deterministic=True)
    full = np.nan_to_num(r.actions).reshape(8, TASK.horizon, -1)
    twin = replay(TASK, IDS, full)
    won = r.success
    assert won.any() and twin.success[won].all() and (twin.success_step[won] == r.n_frames[won]).all()


def test_truncated_actions_are_refused(fetch):
    r = rollout(make_rollout_env("WMPO-Simulated-v0", 2, task=TASK), fetch(0.0), IDS[:2], deterministic=True)
    with pytest.raises(ValueError, match="full horizon"):
        replay(TASK, IDS[:2], r.actions.reshape(2, TASK.horizon, -1))
    with pytest.raises(ValueError, match="full horizon"):
        replay(TASK, IDS[:2], np.zeros((2, 4, 3)))


def test_noise_belongs_to_the_episode_not_to_the_batch(fetch, twin_world):
    world = twin_world(IDS, blur=30.0)
    frames, task_ids = start_frames(TASK, np.array(IDS))
    args = (world, np.zeros((8, TASK.horizon, 3), np.float32), frames, task_ids)
    whole, parts, other = (
        imagine_actions(*args),
        imagine_actions(*args, batch_size=3),
        imagine_actions(*args, seed=9),
    )
    assert (whole.frames == parts.frames).all()
    assert (whole.frames[:, 1:] != other.frames[:, 1:]).any()
    assert (whole.frames[0, 1] != whole.frames[1, 1]).any()


def test_recorded_episodes_are_imagined_and_late_claims_dropped(fetch, twin_world):
    env = make_rollout_env("WMPO-Simulated-v0", 8, task=TASK, record_frames=True)
    r = rollout(env, fetch(9.0), IDS, deterministic=True, record_frames=True)
    episodes = list(r.episodes(TASK))
    imagined, truth = imagine_episodes(twin_world(IDS), episodes)
    assert (truth == r.success).all()
    assert (imagined.claimed_step <= r.n_frames + TASK.chunk).all()
    for i, e in enumerate(episodes):
        assert (imagined.frames[i, : e.n_steps + 1] == e.frames).all()
    episodes[0].success = None
    with pytest.raises(ValueError, match="labelled"):
        imagine_episodes(twin_world(IDS), episodes)


def test_the_locator_finds_the_named_block(fetch):
    from wmpo_gym.envs.simulated import make_simulator

    simulator = make_simulator(TASK)
    for start_state_id in IDS:
        simulator.reset(start_state_id)
        found = locate_coloured_block(simulator.render()[None], np.array([simulator.task_id]))[0]
        assert np.abs(found - simulator.to_pixels(simulator.position(simulator.target))).max() < 0.15
    assert np.isnan(locate_coloured_block(np.full((1, 40, 40, 3), 150, np.uint8), np.array([0]))).all()


def test_object_error_measures_a_shift_and_counts_a_lost_object_as_a_picture_width():
    frames, task_ids = start_frames(TASK, np.array(IDS[:2]))
    shifted = np.roll(frames, (1, 2), axis=(1, 2))
    grey = np.full_like(frames, 150)
    error = object_error(TASK, shifted, frames, task_ids)
    assert error == pytest.approx(np.full(2, 5**0.5), abs=0.3)
    assert (object_error(TASK, grey, frames, task_ids) == TASK.image_size).all()
    assert np.isnan(object_error(TASK, frames, grey, task_ids)).all()


def test_error_at_success_takes_the_deciding_step(fetch, twin_world):
    c = compare_with_twin(twin_world(IDS), fetch(6.0), IDS, deterministic=True)
    c.error[:] = np.arange(TASK.horizon + 1)
    decided = c.replay.success | c.imagined.claimed
    expected = np.where(c.replay.success, c.replay.success_step, c.imagined.claimed_step)[decided]
    assert c.error_at_success().tolist() == expected.tolist()
    assert c.error_by_step()["median"] == list(range(TASK.horizon + 1))
