"""GRPO on the package's batched environments, imagined and simulated alike."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch as th

from wmpo_gym.algorithms import GRPO

pytest.importorskip("mujoco")
sys.path.append(str(Path(__file__).parents[1] / "envs"))
from env_toys import TOY, make_batch  # noqa: E402

KINDS = ("imagined", "simulated")


def make(kind: str, num_envs: int = 16, **kwargs) -> GRPO:
    kwargs = {"group_size": 4, "seed": 0, "device": "cpu", "success_bounds": (0.0, 1.0), **kwargs}
    return GRPO("MultiInputPolicy", make_batch(kind, num_envs), **kwargs)


def rollouts_of(model):
    kept = []
    model.train = kept.append
    model.learn(max_iterations=1)
    del model.train
    return kept[0]


def parameters(model) -> th.Tensor:
    return th.cat([p.detach().flatten() for p in model.policy.parameters()])


@pytest.fixture(autouse=True)
def _no_gates(recwarn):
    """The toy world was never validated, and training in it says so."""


@pytest.mark.parametrize("kind", KINDS)
def test_a_finished_row_costs_nothing(kind):
    model = make(kind, 32)
    rollouts = rollouts_of(model)
    lengths = rollouts.lengths
    assert rollouts.successes.any() and (lengths < TOY.n_chunks).any()
    assert model.num_timesteps == lengths.sum() == rollouts.n_decisions
    if kind == "imagined":
        assert model.budget.imagined_frames == TOY.chunk * model.num_timesteps
        assert model.budget.nfe > 0 and model.budget.real_steps == 0
    else:
        assert model.budget.real_episodes == len(rollouts)
        assert model.budget.real_steps == rollouts.n_actions.sum()
        assert model.budget.imagined_frames == 0


@pytest.mark.parametrize("kind", KINDS)
def test_groups_begin_alike(kind):
    rollouts = rollouts_of(make(kind))
    first = th.stack([rollouts.obs["pixels"][rollouts.rows == row][0] for row in range(16)])
    groups = first.view(4, 4, -1)
    assert (groups == groups[:, :1]).all()
    assert len({tuple(g[0].tolist()) for g in groups}) == 4
    assert max(rollouts.start_state_ids) < TOY.start_states.train


def test_rows_of_a_group_have_their_own_noise():
    """With one and the same action everywhere only the noise of the world is left to differ."""
    model = make("imagined", 8, group_size=8)
    sample = model.policy.sample
    model.policy.sample = lambda obs, deterministic=False: sample(obs, True)
    rollouts = rollouts_of(model)
    last = [rollouts.obs["pixels"][rollouts.rows == row][1] for row in range(8) if rollouts.lengths[row] > 1]
    assert len(last) > 1
    assert any((frame != last[0]).any() for frame in last[1:])


@pytest.mark.parametrize("kind", KINDS)
def test_two_runs_are_equal(kind):
    runs = [make(kind, success_bounds=None).learn(max_iterations=2) for _ in range(2)]
    assert runs[0]._n_updates
    assert th.equal(parameters(runs[0]), parameters(runs[1]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_resumes_to_the_same_numbers(kind, tmp_path):
    whole = make(kind, success_bounds=None, checkpoint_dir=tmp_path / "whole").learn(max_iterations=3)
    make(kind, success_bounds=None, checkpoint_dir=tmp_path / "part").learn(max_iterations=1)
    resumed = make(kind, success_bounds=None, checkpoint_dir=tmp_path / "part")
    resumed.learn(max_iterations=3, resume=True)
    assert th.equal(parameters(resumed), parameters(whole))
    assert resumed.budget.nfe == whole.budget.nfe and resumed.budget.real_steps == whole.budget.real_steps


def test_an_unvalidated_world_is_warned_about_and_recorded():
    with pytest.warns(UserWarning, match="never validated"):
        model = make("imagined")
    assert model.world_fitness == {}
