"""DPO: its arithmetic, that it learns, that it stops in time, and that a killed run goes on."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch as th
from grpo_toys import TokenPolicy, parameters, rollouts_of, vec
from stable_baselines3.common.evaluation import evaluate_policy

from wmpo_gym.algorithms import DPO
from wmpo_gym.algorithms.dpo import pair_gain, preference_loss, preference_pairs


def make(env=None, cls=DPO, **kwargs) -> DPO:
    kwargs = {"seed": 0, "device": "cpu", "learning_rate": 3e-3, "group_size": 8, **kwargs}
    return cls(TokenPolicy, vec(n_envs=64) if env is None else env, **kwargs)


def test_pairs_stay_within_their_start_state():
    successes = th.tensor([1, 0, 0, 0, 1, 1, 0, 0], dtype=th.bool)
    groups = th.tensor([5, 5, 5, 5, 2, 2, 7, 7])
    pairs = preference_pairs(successes, groups, 2, np.random.default_rng(0))
    assert pairs.shape == (2, 2) and (pairs[:, 0] == 0).all()
    assert len(set(pairs[:, 1].tolist())) == 2 and set(pairs[:, 1].tolist()) <= {1, 2, 3}
    assert preference_pairs(successes, th.arange(8), 2, np.random.default_rng(0)).shape == (0, 2)


def test_gain_sums_what_was_acted_on():
    log_prob = th.tensor([[-1.0, -2.0], [-1.0, -5.0], [-3.0, -1.0]], requires_grad=True)
    reference = th.tensor([[-2.0, -2.0], [-2.0, 9.0], [-1.0, -1.0]])
    mask = th.tensor([[True, True], [True, False], [True, True]])
    gain = pair_gain(log_prob, reference, mask, th.tensor([0, 0, 1]))
    assert gain.tolist() == [2.0, -2.0]
    loss = preference_loss(gain[:1], gain[1:], beta=0.5)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-2.0)))
    loss.sum().backward()
    assert log_prob.grad[1, 1] == 0 and log_prob.grad[0, 0] < 0 < log_prob.grad[2, 0]


def test_learns_the_toy_task():
    model = make(vec(n_envs=128), n_epochs=20)
    held_out = vec(n_envs=64)
    held_out.seed(7)
    before = evaluate_policy(model, held_out, 256, deterministic=False)[0]
    model.learn(max_iterations=12)
    held_out.seed(7)
    after = evaluate_policy(model, held_out, 256, deterministic=False)[0]
    assert before < 0.5 and after > before + 0.15
    first = model.history[0]
    assert first["train/best_validation_score"] > -math.log(2) and first["train/pair_accuracy"] > 0.6


def test_a_policy_starts_where_its_reference_is():
    model = make()
    rollouts = rollouts_of(model)
    pairs = preference_pairs(rollouts.successes, rollouts.group_ids, 4, np.random.default_rng(0))
    with th.no_grad():
        winner, loser = model._gains(rollouts, pairs)
    assert winner.abs().max() < 1e-4 and loser.abs().max() < 1e-4


def test_micro_batches_do_not_change_the_update():
    moved = []
    for size in (None, 3):
        model = make(micro_batch_size=size)
        rollouts = rollouts_of(model)
        pairs = preference_pairs(rollouts.successes, rollouts.group_ids, 2, np.random.default_rng(0))[:10]
        model._update(rollouts, pairs)
        moved.append(th.cat([p.grad.flatten() for p in model.policy.parameters()]))
    th.testing.assert_close(moved[0], moved[1], atol=1e-7, rtol=1e-4)


def test_sft_weight_holds_up_the_winners():
    """With the preference all but switched off, what is left is imitation of the winners."""
    gains = {}
    for weight in (0.0, 1.0):
        model = make(sft_weight=weight, beta=1e-6, learning_rate=1e-3)
        rollouts = rollouts_of(model)
        pairs = preference_pairs(rollouts.successes, rollouts.group_ids, 4, np.random.default_rng(0))
        for _ in range(5):
            model._update(rollouts, pairs)
        with th.no_grad():
            winner, loser = model._gains(rollouts, pairs)
        gains[weight] = winner.mean().item()
    assert gains[1.0] > 1.5 * gains[0.0] > 0  # Adam makes long steps of the small gradient too


def test_a_subclass_judges_by_its_own_measure():
    scores = iter([0.3, 0.1, 0.5, 0.2, 0.2])

    class Judged(DPO):
        def score(self, rollouts, held_out):
            return next(scores)

    model = make(cls=Judged, n_epochs=10, patience=2, validation_share=0.0)
    model.learn(max_iterations=1)
    logged = model.history[0]
    assert logged["train/best_epoch"] == 2 and logged["train/best_validation_score"] == 0.5
    assert logged["train/epochs"] == 4


def test_stops_before_it_diverges():
    model = make(learning_rate=3e-2, n_epochs=30, patience=2)
    rollouts = rollouts_of(model, max_iterations=1)
    del model.train
    rollouts.successes = th.rand(len(rollouts), generator=th.Generator().manual_seed(0)) < 0.5
    before = parameters(model)
    model.train(rollouts)  # outcomes by chance: what is learned on some groups is wrong on the others
    logged = model.logger.name_to_value
    assert logged["train/epochs"] < 30
    assert logged["train/best_validation_score"] >= -math.log(2) > logged["train/validation_score"]
    assert th.equal(parameters(model), before) == (logged["train/best_epoch"] == 0)


def test_without_pairs_nothing_changes(caplog):
    model = make(vec(n_envs=16, tolerance=0.0), success_bounds=(0.0, 1.0))
    before = parameters(model)
    model.learn(max_iterations=1)
    assert th.equal(parameters(model), before) and "no group has both a success and a failure" in caplog.text
    assert model.history[-1]["rollout/n_pairs"] == 0


def test_a_resumed_run_gives_the_same_numbers(tmp_path):
    whole = make(vec(n_envs=32)).learn(max_iterations=3)
    make(vec(n_envs=32), checkpoint_dir=tmp_path).learn(max_iterations=2)
    resumed = make(vec(n_envs=32), checkpoint_dir=tmp_path).learn(max_iterations=3, resume=True)
    assert th.equal(parameters(whole), parameters(resumed))


def test_save_and_load(tmp_path):
    model = make().learn(max_iterations=1)
    model.save(tmp_path / "dpo")
    loaded = DPO.load(tmp_path / "dpo", device="cpu")
    assert th.equal(parameters(model), parameters(loaded)) and loaded.beta == model.beta


@pytest.mark.parametrize(
    ("argument", "value"), [("beta", 0.0), ("patience", 0), ("validation_share", 1.0), ("batch_size", 0)]
)
def test_bad_arguments(argument, value):
    with pytest.raises(ValueError, match=argument):
        make(**{argument: value})
