"""Small Gaussian policies for group algorithms, for any ``Box`` action space."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch as th
from gymnasium import spaces
from stable_baselines3.common.torch_layers import (
    BaseFeaturesExtractor,
    CombinedExtractor,
    FlattenExtractor,
    NatureCNN,
)
from stable_baselines3.common.type_aliases import Schedule
from torch import nn

from wmpo_gym.policies.base import GroupPolicy


class GaussianPolicy(GroupPolicy):
    """Diagonal Gaussian policy over the action (chunk); every action component counts as one token.

    The trace is the unclipped action, float32 (B, L), ordered action by action, where L is the size of the
    action space.

    Args:
        observation_space: Any space the features extractor accepts.
        action_space: ``Box``.
        lr_schedule: Learning-rate schedule of the optimizer.
        net_arch: Hidden layers between features and means.
        log_std_init: Log of the initial standard deviation, in units of half the action range.
        temperature: Multiplies the standard deviation, in both ``sample`` and ``log_prob``.
        features_extractor_class: Features extractor; None uses the default of the policy class.
        features_extractor_kwargs: Arguments of the features extractor.
        optimizer_class: Optimizer class.
        optimizer_kwargs: Arguments of the optimizer besides the learning rate.
    """

    default_extractor: ClassVar[type[BaseFeaturesExtractor]] = FlattenExtractor

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        lr_schedule: Schedule,
        net_arch: tuple[int, ...] = (64, 64),
        log_std_init: float = -1.0,
        temperature: float = 1.0,
        features_extractor_class: type[BaseFeaturesExtractor] | None = None,
        features_extractor_kwargs: dict[str, Any] | None = None,
        optimizer_class: type[th.optim.Optimizer] = th.optim.AdamW,
        optimizer_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(
            observation_space,
            action_space,
            features_extractor_class=features_extractor_class or self.default_extractor,
            features_extractor_kwargs=features_extractor_kwargs,
            optimizer_class=optimizer_class,
            optimizer_kwargs=optimizer_kwargs,
        )
        if temperature <= 0:
            raise ValueError(f"temperature must be positive, got {temperature}.")
        self.temperature = temperature
        self.features_extractor = self.make_features_extractor()
        n_tokens = math.prod(action_space.shape)
        sizes = [self.features_extractor.features_dim, *net_arch]
        hidden = [m for a, b in zip(sizes, sizes[1:], strict=False) for m in (nn.Linear(a, b), nn.Tanh())]
        head = nn.Linear(sizes[-1], n_tokens)
        nn.init.normal_(head.weight, std=0.01)
        nn.init.zeros_(head.bias)
        self.mean = nn.Sequential(*hidden, head)
        self.log_std = nn.Parameter(th.full((n_tokens,), log_std_init))
        low, high = th.as_tensor(action_space.low).flatten(), th.as_tensor(action_space.high).flatten()
        self.register_buffer("centre", (high + low).float() / 2)
        self.register_buffer("half_range", (high - low).float() / 2)
        self._generator = th.Generator()
        self.optimizer = self.optimizer_class(self.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)

    def _distribution(self, obs: Any) -> th.distributions.Normal:
        mean = self.mean(self.extract_features(obs, self.features_extractor)) * self.half_range + self.centre
        return th.distributions.Normal(mean, self.log_std.exp() * self.half_range * self.temperature)

    @th.no_grad()
    def sample(self, obs: Any, deterministic: bool = False) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """See :meth:`GroupPolicy.sample`; the actions are clipped to the action space."""
        distribution = self._distribution(obs)
        trace = distribution.mean
        if not deterministic:
            # Drawn on the CPU, so that a seed gives the same noise on every device.
            noise = self.draw(lambda n: th.randn(n, *trace.shape[1:], generator=self._generator), len(trace))
            trace = trace + distribution.stddev * noise.to(trace.device)
        actions = trace.clamp(self.centre - self.half_range, self.centre + self.half_range)
        return actions.view(-1, *self.action_space.shape), distribution.log_prob(trace), trace

    def log_prob(self, obs: Any, trace: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """See :meth:`GroupPolicy.log_prob`."""
        distribution = self._distribution(obs)
        return distribution.log_prob(trace), distribution.entropy()


class GaussianCnnPolicy(GaussianPolicy):
    """:class:`GaussianPolicy` for an image with sides of at least 36 pixels."""

    default_extractor = NatureCNN


class GaussianMultiInputPolicy(GaussianPolicy):
    """:class:`GaussianPolicy` for a ``Dict`` of images (sides of at least 36 pixels) and vectors."""

    default_extractor = CombinedExtractor


MlpPolicy = GaussianPolicy
CnnPolicy = GaussianCnnPolicy
MultiInputPolicy = GaussianMultiInputPolicy
