"""The arithmetic of GRPO against tensors computed by the published code (see tests/golden/grpo.json)."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import DummyVecEnv

from wmpo_gym.algorithms import GRPO
from wmpo_gym.algorithms.grpo import (
    clipped_surrogate,
    group_advantages,
    kl_penalty,
    masked_mean,
    token_weights,
)
from wmpo_gym.algorithms.trajectories import Trajectories, action_mask, informative_groups
from wmpo_gym.policies.base import GroupPolicy
from wmpo_gym.policies.tokens import token_statistics

N, T, K, D, BINS = 8, 4, 8, 7, 256  # trajectories, chunks, actions per chunk, numbers per action, bins
TEMPERATURE, REWARD = 1.6, 5.0


@pytest.fixture(scope="module")
def data(golden):
    return golden("grpo")[0]


@pytest.fixture(scope="module")
def meta(golden):
    return golden("grpo")[1]


def close(a, b, atol=3e-6, rtol=1e-6):
    th.testing.assert_close(th.as_tensor(a, dtype=th.float32), b.float(), atol=atol, rtol=rtol)


@pytest.mark.parametrize(("suffix", "temperature"), [("", 1.0), ("_T1.6", TEMPERATURE)])
def test_token_statistics(data, suffix, temperature):
    log_prob, entropy = token_statistics(data["helpers.logits"], data["helpers.labels"], temperature)
    close(log_prob, data[f"helpers.logprob{suffix}"])
    close(entropy, data[f"helpers.entropy{suffix}"])


def test_entropy_loss(data):
    entropy = token_statistics(data["helpers.logits"], data["helpers.labels"])[1]
    close(masked_mean(entropy, data["helpers.entropy_loss_mask"]).view(1), data["helpers.entropy_loss"])


def test_masked_reductions(data):
    values, mask = data["masked.values"], data["masked.mask"]
    close(masked_mean(values, mask).view(1), data["masked.mean_all"])
    close(masked_mean(values, th.zeros_like(mask)).view(1), data["masked.mean_allfalse"])
    close(masked_mean(values[:2], mask[:2], dim=1), data["masked.mean_rows01"])
    close((masked_mean(values, mask) * mask.sum()).view(1), data["masked.sum_all"])
    spread = masked_mean((values - masked_mean(values, mask)).square(), mask) * mask.sum() / (mask.sum() - 1)
    close(spread.view(1), data["masked.var_all"])


def test_an_empty_row_has_mean_zero_where_the_published_code_has_nan(data):
    published = data["masked.mean_axis_with_one_empty_row"]
    ours = masked_mean(data["masked.values"], data["masked.mask"], dim=1)
    assert published.isnan().tolist() == [False, False, True]
    close(ours, published.nan_to_num(0.0))


@pytest.mark.parametrize(("kind", "name"), [("k1", "kl"), ("abs", "abs"), ("k2", "mse")])
def test_kl_estimates(data, kind, name):
    close(kl_penalty(data["kl.logprob"], data["kl.ref"], kind), data[f"kl.{name}"])


def test_policy_loss(data):
    log_prob = data["policy_loss.log_prob"].clone().requires_grad_()
    mask = data["policy_loss.mask"]
    surrogate = clipped_surrogate(log_prob, data["policy_loss.old_log_prob"], data["policy_loss.advantages"])
    loss = (token_weights(mask, th.zeros(4, dtype=th.int64), "token") * surrogate.loss).sum()
    loss.backward()
    close(loss.detach().view(1), data["policy_loss.pg_loss"])
    close(log_prob.grad, data["policy_loss.grad_log_prob"], atol=1e-8)
    close(masked_mean(surrogate.clipped.float(), mask).view(1), data["policy_loss.clipfrac"])
    close(masked_mean(-surrogate.log_ratio.detach(), mask).view(1), data["policy_loss.ppo_kl"])
    none = th.zeros_like(mask)
    nothing = (token_weights(none, th.zeros(4, dtype=th.int64), "token") * surrogate.loss.detach()).sum()
    empty = [
        nothing,
        masked_mean(surrogate.clipped.float(), none),
        masked_mean(surrogate.log_ratio.detach(), none),
    ]
    close(th.stack(empty), data["policy_loss.allmasked"])


def test_policy_loss_table(data, meta):
    assert meta["policy_loss_table_columns"][:2] == ["advantage", "ratio"]
    advantage, ratio, loss, clipped, kl, gradient = data["policy_loss.table"].unbind(1)
    log_prob = ratio.log().requires_grad_()
    surrogate = clipped_surrogate(log_prob, th.zeros_like(ratio), advantage)
    surrogate.loss.sum().backward()
    close(surrogate.loss.detach(), loss)
    close(surrogate.clipped.float(), clipped)
    close(-surrogate.log_ratio.detach(), kl)
    close(log_prob.grad, gradient)


def test_advantages_of_groups_of_eight(data):
    rewards = data["grpo.token_level_rewards"].sum(1)
    mask = action_mask(data["grpo.finish_step"], 4, 7)
    assert th.equal(mask, data["grpo.mask"])
    advantages = group_advantages(rewards, data["grpo.group_index"])
    close(advantages.unsqueeze(1) * mask, data["grpo.advantages"])


def test_advantages_of_mixed_groups(data):
    ours = group_advantages(data["grpo_mixed.rewards"], data["grpo_mixed.group_index"])
    close(ours, data["grpo_mixed.advantage"])


def test_trajectory_mask(data):
    assert th.equal(action_mask(data["traj_mask.finish_step"], 16, 1), data["traj_mask.mask"])


def test_group_filter(data, meta):
    acc = data["filter.acc"]
    kept = informative_groups(acc, (0.1, 0.9))
    rows = kept.repeat_interleave(acc.shape[1]).nonzero().squeeze(1)
    assert kept.nonzero().squeeze(1).tolist() == meta["results"]["filter_kept_groups"]
    assert th.equal(rows, data["filter.kept_rows"])
    assert th.equal(rows[: 3 * acc.shape[1]], data["filter.after_truncation_to_3_groups"])


def test_group_filter_bounds_are_inclusive_at_every_size(meta):
    for size, counts in meta["results"]["filter_success_counts_kept_by_group_size"].items():
        groups = th.arange(int(size)) < th.arange(int(size) + 1).unsqueeze(1)
        assert informative_groups(groups).nonzero().squeeze(1).tolist() == counts


class LinearTokenPolicy(GroupPolicy):
    """``logits = features @ W + b``, the stand-in for the VLA in the reference vectors."""

    def __init__(self, observation_space, action_space, lr_schedule, weight, bias):
        super().__init__(observation_space, action_space)
        self.weight, self.bias = th.nn.Parameter(weight.clone()), th.nn.Parameter(bias.clone())
        self.optimizer = th.optim.AdamW(self.parameters(), lr=lr_schedule(1))

    def log_prob(self, obs, trace):
        return token_statistics(obs @ self.weight + self.bias, trace, TEMPERATURE)

    def sample(self, obs, deterministic=False):
        raise AssertionError("not sampled here")


class FeatureEnv(gym.Env):
    observation_space = spaces.Box(-np.inf, np.inf, (K * D, 5))
    action_space = spaces.Box(-1, 1, (K, D))
    render_mode = None


def rollouts(data, finish_step=None) -> Trajectories:
    """The reference rollouts in our storage: decisions after the finish are not stored at all."""
    finish = data["pipeline.finish_step"] if finish_step is None else finish_step
    left = (finish.unsqueeze(1) - K * th.arange(T)).clamp(0, K)
    live = left > 0
    rows, _ = live.nonzero(as_tuple=True)
    return Trajectories(
        obs=data["pipeline.features"][live],
        traces=data["pipeline.responses"][live] - (32000 - BINS),
        log_probs=data["update.old_log_probs"].view(N, T, K * D)[live],
        token_mask=action_mask(left[live], K, D),
        rows=rows,
        returns=REWARD * data["pipeline.complete"].float(),
        successes=data["pipeline.complete"],
        lengths=live.sum(1),
        n_actions=finish,
        group_ids=data["pipeline.group_index"],
        start_state_ids=data["pipeline.group_index"],
    )


def make_model(data, tensor_prefix="update.W_start", **kwargs) -> GRPO:
    weight = data[tensor_prefix]
    bias = data[tensor_prefix.replace("W", "b")]
    model = GRPO(
        LinearTokenPolicy,
        DummyVecEnv([FeatureEnv] * 4),
        learning_rate=0.02,
        group_size=4,
        batch_size=4,
        n_epochs=1,
        policy_kwargs={"weight": weight, "bias": bias},
        device="cpu",
        **kwargs,
    )
    model.set_logger(Logger(None, []))
    return model


def test_pipeline(data, meta):
    ours = rollouts(data)
    assert ours.successes.float().tolist() == data["pipeline.acc"].tolist()
    per_trajectory = th.zeros(N, T * K * D)
    advantages = group_advantages(ours.returns, ours.group_ids)
    place = th.cat([th.arange(n) for n in ours.lengths])
    for m, (row, chunk) in enumerate(zip(ours.rows, place, strict=True)):
        span = slice(int(chunk) * K * D, (int(chunk) + 1) * K * D)
        per_trajectory[row, span] = ours.token_mask[m].float() * advantages[row]
    close(per_trajectory, data["pipeline.advantages"])
    rewards = data["pipeline.token_level_rewards"]
    close(ours.returns, rewards.sum(1))
    assert rewards.nonzero().tolist() == meta["results"]["reward_nonzero_positions"]
    # The published reward sits on the last token that we keep.
    for row, position in rewards.nonzero().tolist():
        assert position == ours.n_actions[row] * D - 1


def test_old_log_probs(data, meta):
    model = make_model(data, "update.W_old")
    ours = rollouts(data)
    log_probs = model._evaluate(ours)
    close(log_probs * ours.token_mask, ours.log_probs * ours.token_mask)
    published = meta["results"]["entropy_metrics_old_policy"]["actor_after/entropy_loss_eval"]
    entropy = model.policy.log_prob(ours.obs, ours.traces)[1].detach()
    weights = token_weights(ours.token_mask, ours.rows) * N
    means = th.zeros(N).index_add(0, ours.rows, (weights * entropy).sum(1))
    close(means, th.tensor(published))


@pytest.mark.parametrize(("prefix", "max_grad_norm"), [("update", 1.0), ("update_clip0.03", 0.03)])
def test_two_updates(data, prefix, max_grad_norm):
    model = make_model(data, max_grad_norm=max_grad_norm)
    ours = rollouts(data)
    advantages = group_advantages(ours.returns, ours.group_ids)
    for step in range(2):
        index = th.arange(4 * step, 4 * step + 4)
        if prefix == "update":
            model.policy.optimizer.zero_grad()
            model.accumulate_gradient(ours.select(index), advantages[index])
            close(model.policy.weight.grad, data[f"update.step{step}.grad_W"], atol=1e-8, rtol=1e-5)
            close(model.policy.bias.grad, data[f"update.step{step}.grad_b"], atol=1e-8, rtol=1e-5)
        statistics = model._update(ours.select(index), advantages[index])
        close([statistics["grad_norm"]], data[f"{prefix}.step{step}.grad_norm"])
        close(model.policy.weight.detach(), data[f"{prefix}.step{step}.W_after"], atol=1e-5)
        close(model.policy.bias.detach(), data[f"{prefix}.step{step}.b_after"], atol=1e-5)


def test_train_does_the_two_updates_in_order(data, meta):
    model = make_model(data)
    with pytest.warns(UserWarning, match="the ratio is off"):  # the reference starts off policy
        model.train(rollouts(data))
    close(model.policy.weight.detach(), data["update.step1.W_after"], atol=1e-5)
    close(model.policy.bias.detach(), data["update.step1.b_after"], atol=1e-5)
    logged = meta["results"]["update_metrics"]
    values = model.logger.name_to_value
    assert values["train/loss"] == pytest.approx(np.mean(logged["actor/pg_loss"]), abs=3e-6)
    assert values["train/grad_norm"] == pytest.approx(np.mean(logged["actor/grad_norm"]), abs=3e-6)
    assert values["train/n_updates"] == 2


def test_metrics_per_trajectory(data, meta):
    """The published code logs one micro-batch per trajectory."""
    ours = rollouts(data)
    advantages = group_advantages(ours.returns, ours.group_ids)
    logged = meta["results"]["update_metrics"]
    for step, key in enumerate(["W_start", "step0.W_after"]):
        model = make_model(data, f"update.{key}")
        for i in range(4 * step, 4 * step + 4):
            index = th.tensor([i])
            statistics = model.accumulate_gradient(ours.select(index), advantages[index])
            assert statistics["loss"] == pytest.approx(logged["actor/pg_loss"][i], abs=5e-6)
            assert statistics["clip_fraction"] == pytest.approx(logged["actor/pg_clipfrac"][i], abs=1e-6)


def test_on_policy_ratio_is_one(data, meta):
    model = make_model(data, "update.W_old")
    ours = rollouts(data)
    advantages = group_advantages(ours.returns, ours.group_ids)
    index = th.arange(4)
    statistics = model.accumulate_gradient(ours.select(index), advantages[index])
    assert statistics["ratio_max_error"] < 1e-5
    assert statistics["clip_fraction"] == 0
    expected = meta["results"]["on_policy_first_minibatch"]
    assert statistics["loss"] == pytest.approx(np.mean(expected["actor/pg_loss"]), abs=3e-6)
    assert statistics["approx_kl"] == pytest.approx(0, abs=1e-6)


def test_an_episode_of_no_action_changes_nothing_where_the_published_code_has_nan(data, meta):
    assert meta["results"]["finish_step_zero_grad_has_nan"]
    assert meta["results"]["finish_step_zero_pg_loss"][0] == "nan"
    finish = data["pipeline.finish_step"].clone()
    finish[0] = 0
    ours = rollouts(data, finish)
    assert len(ours) == N and 0 not in ours.rows.tolist()
    advantages = group_advantages(ours.returns, ours.group_ids)
    index = th.arange(4)
    model = make_model(data)
    model.accumulate_gradient(ours.select(index), advantages[index])
    with_empty = model.policy.weight.grad.clone()
    model.policy.optimizer.zero_grad()
    statistics = model.accumulate_gradient(ours.select(index[1:]), advantages[1:4])
    close(with_empty, model.policy.weight.grad, atol=1e-9)
    published = [float(x) for x in meta["results"]["finish_step_zero_pg_loss"][1:]]
    assert statistics["loss"] == pytest.approx(np.mean(published), abs=3e-6)
