"""Small environments and policies on which the algorithms' tests run."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import nn

from wmpo_gym.algorithms import GRPO
from wmpo_gym.envs.ledger import Ledger
from wmpo_gym.policies.base import GroupPolicy

CHUNK, DIM, HORIZON = 2, 2, 3


class ReachEnv(gym.Env):
    """Move a point to a target within three chunks of two actions; the start state names the target."""

    metadata = {"render_modes": []}
    render_mode = None
    observation_space = spaces.Box(-4.0, 4.0, (4,), np.float32)
    action_space = spaces.Box(-1.0, 1.0, (CHUNK, DIM), np.float32)

    def __init__(self, tolerance: float = 0.25) -> None:
        self.tolerance = tolerance
        self.start_state_ids = np.arange(32)
        self.ledger = Ledger()
        self.reset_log: list[tuple[int | None, int | None]] = []

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        start = (options or {}).get("start_state_id")
        self.reset_log.append((seed, start))
        start = int(self.np_random.integers(32)) if start is None else start
        self.target = np.random.default_rng(start).uniform(-0.8, 0.8, 2)
        self.position = np.zeros(2)
        self.time = 0
        return self._obs(), {"start_state_id": start, "n_frames": 0, "is_success": False}

    def _obs(self) -> np.ndarray:
        return np.concatenate([self.position, self.target - self.position]).astype(np.float32)

    def step(self, action: np.ndarray):
        assert self.action_space.contains(action), action
        self.ledger.real_episodes += self.time == 0
        self.time += 1
        for n_frames, step in enumerate(action, start=1):  # noqa: B007 (read after the loop)
            self.ledger.real_steps += 1
            self.position = np.clip(self.position + 0.4 * step, -2, 2)
            success = bool(np.linalg.norm(self.position - self.target) < self.tolerance)
            if success:
                break
        info = {"n_frames": n_frames, "is_success": success}
        return self._obs(), float(success), success, not success and self.time == HORIZON, info


class CountdownEnv(gym.Env):
    """Ends after as many decisions as its start state says; succeeds if the last action is positive."""

    observation_space = spaces.Box(0.0, 10.0, (1,), np.float32)
    action_space = spaces.Box(-1.0, 1.0, (CHUNK, DIM), np.float32)
    render_mode = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        self.left = 1 + int((options or {}).get("start_state_id", self.np_random.integers(4)))
        return np.array([self.left], np.float32), {}

    def step(self, action: np.ndarray):
        self.left -= 1
        done = self.left == 0
        success = done and bool(action.mean() > 0)
        return np.array([self.left], np.float32), float(success), done, False, {"is_success": success}


def vec(env_class: type = ReachEnv, n_envs: int = 16, **kwargs: Any) -> DummyVecEnv:
    return DummyVecEnv([lambda: env_class(**kwargs)] * n_envs)


class TokenPolicy(GroupPolicy):
    """A two-layer network over action tokens."""

    n_bins, temperature = 9, 1.3

    def __init__(self, observation_space, action_space, lr_schedule):
        super().__init__(observation_space, action_space)
        self.n_tokens = int(np.prod(action_space.shape))
        self.network = nn.Sequential(
            nn.Linear(observation_space.shape[0], 64), nn.Tanh(), nn.Linear(64, self.n_tokens * self.n_bins)
        )
        nn.init.zeros_(self.network[2].weight)
        self._generator = th.Generator()
        self.seen: list[int] = []  # rows of every call of sample
        self.optimizer = th.optim.AdamW(self.parameters(), lr=lr_schedule(1))

    def _log_probs(self, obs: th.Tensor) -> th.Tensor:
        logits = self.network(obs.float()).view(-1, self.n_tokens, self.n_bins)
        return th.log_softmax(logits / self.temperature, -1)

    def _race(self, n_rows: int) -> th.Tensor:
        return th.empty(n_rows, self.n_tokens, self.n_bins).exponential_(generator=self._generator)

    @th.no_grad()
    def sample(self, obs, deterministic=False):
        self.seen.append(len(obs))
        log_probs = self._log_probs(obs)
        if deterministic:
            trace = log_probs.argmax(-1)
        else:
            race = self.draw(self._race, len(obs))
            trace = (log_probs.exp() / race).argmax(-1)
        actions = trace.float() / (self.n_bins - 1) * 2 - 1
        chosen = log_probs.gather(-1, trace.unsqueeze(-1)).squeeze(-1)
        return actions.view(-1, *self.action_space.shape), chosen, trace

    def log_prob(self, obs, trace):
        log_probs = self._log_probs(obs)
        chosen = log_probs.gather(-1, trace.unsqueeze(-1)).squeeze(-1)
        return chosen, -(log_probs.exp() * log_probs).sum(-1)


def make(policy=TokenPolicy, env=None, **kwargs) -> GRPO:
    kwargs = {"seed": 0, "device": "cpu", "learning_rate": 3e-3, "group_size": 4, **kwargs}
    return GRPO(policy, vec() if env is None else env, **kwargs)


def parameters(model) -> th.Tensor:
    return th.cat([p.detach().flatten() for p in model.policy.parameters()])


class Recorder(BaseCallback):
    """Notes what happens at every step."""

    def __init__(self, stop_at: int | None = None):
        super().__init__()
        self.stop_at, self.timesteps, self.events = stop_at, [], []
        self.rollouts = []

    def _on_rollout_start(self):
        self.events.append("start")

    def _on_rollout_end(self):
        self.events.append("end")
        self.rollouts.append(self.locals["rollouts"])

    def _on_step(self):
        self.timesteps.append(self.num_timesteps)
        return self.stop_at is None or self.n_calls < self.stop_at


def rollouts_of(model, **kwargs):
    """One iteration's rollouts, without an update."""
    recorder = Recorder()
    model.train = lambda rollouts: None
    model.learn(1, recorder, **kwargs)
    return recorder.rollouts[0]
