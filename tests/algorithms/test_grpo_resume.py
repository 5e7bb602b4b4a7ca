"""A killed run goes on to the same numbers; a full disk or a damaged file costs nothing that was trained."""

from __future__ import annotations

import errno
import json
import logging
import shutil

import numpy as np
import pytest
import torch as th
from grpo_toys import TokenPolicy, vec
from kills import disk_states
from stable_baselines3.common.callbacks import BaseCallback

from wmpo_gym.algorithms import GRPO
from wmpo_gym.algorithms.checkpoint import CheckpointDirectory
from wmpo_gym.utils.io import WriteError

TOTAL = 400


class Killed(Exception):
    """Stands for Ctrl-C or a lost machine."""


class KillAfter(BaseCallback):
    def __init__(self, steps: int):
        super().__init__()
        self.steps = steps

    def _on_step(self):
        if self.n_calls == self.steps:
            raise Killed
        return True


def make(directory, **kwargs) -> GRPO:
    kwargs = {"seed": 3, "device": "cpu", "learning_rate": lambda p: 3e-3 * p, "group_size": 4, **kwargs}
    return GRPO(kwargs.pop("policy", TokenPolicy), vec(), checkpoint_dir=directory, **kwargs)


def state(model):
    weights = th.cat([p.detach().flatten() for p in model.policy.parameters()])
    slots = model.policy.optimizer.state_dict()["state"]
    moments = [slots[i][name] for i in sorted(slots) for name in sorted(slots[i])]
    logs = [{k: v for k, v in e.items() if not k.startswith(("time/", "budget/"))} for e in model.history]
    return weights, moments, logs, model.num_timesteps, model._n_updates, model._iteration


def assert_same(a, b):
    for x, y in zip(state(a), state(b), strict=True):
        if isinstance(x, th.Tensor):
            assert th.equal(x, y)
        elif isinstance(x, list) and x and isinstance(x[0], th.Tensor):
            assert all(th.equal(u, v) for u, v in zip(x, y, strict=True))
        else:
            assert x == y


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return make(tmp_path_factory.mktemp("whole")).learn(TOTAL)


@pytest.mark.parametrize("steps", [2, 8, 17])
def test_a_killed_run_continues_with_the_same_numbers(tmp_path, steps, uninterrupted):
    with pytest.raises(Killed):
        make(tmp_path).learn(TOTAL, KillAfter(steps), resume=True)
    resumed = make(tmp_path)
    np.random.seed(99)  # a fresh process is in another random state
    resumed.learn(TOTAL, resume=True)
    assert_same(resumed, uninterrupted)
    assert len(resumed.history) > 3


def test_it_can_be_killed_again_and_again(tmp_path, uninterrupted):
    for _ in range(3):
        with pytest.raises(Killed):
            make(tmp_path).learn(TOTAL, KillAfter(5), resume=True)
    resumed = make(tmp_path).learn(TOTAL, resume=True)
    assert_same(resumed, uninterrupted)
    # What the killed iterations spent is lost with them; what led to a checkpoint is not.
    assert resumed.budget.real_steps >= resumed.num_timesteps


def test_killed_between_any_two_writes(tmp_path):
    def run(directory):
        model = GRPO(TokenPolicy, vec(n_envs=8), seed=3, device="cpu", group_size=4, checkpoint_dir=directory)
        return model.learn(max_iterations=3, resume=True)

    whole = run(tmp_path / "whole")
    states = disk_states(run, tmp_path / "once")
    newest = [CheckpointDirectory(state).newest_iteration() for state in states]
    assert newest == sorted(newest) and set(newest) == {0, 1, 2, 3}  # nothing once complete is lost
    # Killed again while it goes on from a checkpoint that was being written.
    half_way = next(state for state in states if list(state.glob(".iteration-000002.tmp/*")))
    states += disk_states(run, tmp_path / "twice", begin=half_way)
    assert len(states) > 60
    for state in states:
        assert_same(run(state), whole)


def test_a_limit_of_iterations_is_that_of_the_whole_run(tmp_path):
    whole = make(tmp_path / "whole").learn(max_iterations=4)
    with pytest.raises(Killed):
        make(tmp_path / "killed").learn(max_iterations=4, callback=KillAfter(8))
    resumed = make(tmp_path / "killed").learn(max_iterations=4, resume=True)
    assert resumed._iteration == 4
    assert_same(resumed, whole)


def test_a_finished_run_is_not_repeated(tmp_path):
    model = make(tmp_path).learn(100)
    again = make(tmp_path).learn(100, resume=True)
    assert_same(model, again)


@pytest.mark.parametrize("kwargs", [{"policy": "MlpPolicy"}, {"kl_coef": 0.1}, {"checkpoint_interval": 2}])
def test_every_kind_of_state_is_restored(tmp_path, kwargs):
    whole = make(tmp_path / "whole", **kwargs).learn(TOTAL)
    with pytest.raises(Killed):
        make(tmp_path / "killed", **kwargs).learn(TOTAL, KillAfter(12))
    resumed = make(tmp_path / "killed", **kwargs).learn(TOTAL, resume=True)
    assert_same(resumed, whole)


def test_global_random_states_are_restored(tmp_path):
    import random

    model = make(tmp_path).learn(50)
    model.save_checkpoint()
    expected = random.random(), np.random.rand(), th.rand(1)
    random.random(), np.random.rand(), th.rand(7)
    make(tmp_path).learn(50, resume=True)
    assert (random.random(), np.random.rand(), th.rand(1)) == expected


def test_checkpoints_hold_no_pickle_and_only_the_newest_are_kept(tmp_path):
    model = make(tmp_path).learn(300)
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == [f"iteration-{i:06d}" for i in (model._iteration - 1, model._iteration)]
    files = sorted(p.name for p in (tmp_path / names[-1]).iterdir())
    assert files == ["optimizer.safetensors", "policy.safetensors", "rng.safetensors", "state.json"]
    saved = json.loads((tmp_path / names[-1] / "state.json").read_text())
    assert saved["num_timesteps"] == model.num_timesteps


@pytest.mark.parametrize("damage", ["truncate", "no state", "not json"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, damage, caplog, uninterrupted):
    with pytest.raises(Killed):
        make(tmp_path).learn(TOTAL, KillAfter(14))
    newest = CheckpointDirectory(tmp_path).complete()[-1]
    weights, text = newest / "policy.safetensors", newest / "state.json"
    if damage == "truncate":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "no state":
        text.unlink()
    else:
        text.write_text("{")
    with caplog.at_level(logging.WARNING):
        resumed = make(tmp_path).learn(TOTAL, resume=True)
    assert newest.name in caplog.text
    assert_same(resumed, uninterrupted)


def test_half_written_checkpoints_are_ignored(tmp_path, uninterrupted):
    with pytest.raises(Killed):
        make(tmp_path).learn(TOTAL, KillAfter(11))
    newest = CheckpointDirectory(tmp_path).complete()[-1]
    shutil.copytree(newest, tmp_path / ".iteration-000099.tmp")
    (tmp_path / ".iteration-000099.tmp" / "state.json").unlink()
    assert_same(make(tmp_path).learn(TOTAL, resume=True), uninterrupted)
    assert not list(tmp_path.glob(".*"))  # and cleared away by the next one


def test_a_full_disk_keeps_everything(tmp_path, monkeypatch, uninterrupted):
    from wmpo_gym.algorithms import checkpoint

    model = make(tmp_path)
    written = checkpoint.save_safetensors
    calls = []

    def full(path, *args, **kwargs):
        calls.append(path)
        if len(calls) > 7:  # in the middle of the third checkpoint
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        written(path, *args, **kwargs)

    monkeypatch.setattr(checkpoint, "save_safetensors", full)
    with pytest.raises(WriteError, match="No space left.*still in memory.*iteration-000002 is intact"):
        model.learn(TOTAL)
    assert model._iteration == 3
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["iteration-000001", "iteration-000002"]
    monkeypatch.undo()
    # Either the run in memory goes on ...
    model.save_checkpoint()
    # ... or a new process does.
    assert_same(make(tmp_path).learn(TOTAL, resume=True), uninterrupted)


def test_other_settings_are_refused(tmp_path):
    make(tmp_path).learn(50)
    with pytest.raises(ValueError, match=r"n_epochs=4 \(was 2\).*another checkpoint_dir"):
        make(tmp_path, n_epochs=4).learn(50, resume=True)


def test_an_earlier_run_is_not_overwritten(tmp_path):
    make(tmp_path).learn(50)
    with pytest.raises(ValueError, match="earlier run.*resume=True"):
        make(tmp_path).learn(50)


def test_one_model_may_learn_twice(tmp_path):
    model = make(tmp_path).learn(50)
    model.learn(50, reset_num_timesteps=False)
    assert CheckpointDirectory(tmp_path).newest_iteration() == model._iteration


def test_resume_needs_a_directory():
    with pytest.raises(ValueError, match="checkpoint_dir"):
        make(None).learn(10, resume=True)
    with pytest.raises(ValueError, match="checkpoint_dir"):
        make(None).save_checkpoint()


def test_the_bar_of_a_resumed_run_starts_where_it_was(tmp_path, capsys):
    with pytest.raises(Killed):
        make(tmp_path).learn(TOTAL, KillAfter(14))
    done = make(tmp_path)
    done.learn(TOTAL, resume=True, progress_bar=True)
    bar = capsys.readouterr().err
    assert f" 0/{TOTAL}" not in bar and f"{TOTAL}/{TOTAL}" in bar
