"""How evaluation asks a policy for actions, whatever kind of policy it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

Observation = dict[str, np.ndarray]
Act = Callable[[Observation], np.ndarray]


@contextmanager
def acting(policy: Any, *, deterministic: bool, seed: int) -> Iterator[Act]:
    """A function from observations to action chunks, and the policy as it was afterwards.

    While it is in use, the policy's own generators are seeded, so that an evaluation is repeatable and does
    not shift the random numbers of a training that goes on after it; torch's global generator is not touched.

    Args:
        policy: A :class:`~wmpo_gym.policies.base.GroupPolicy`, a Stable-Baselines3 policy or algorithm, or
            anything with ``sample(obs, deterministic)`` on tensors or ``predict(obs, deterministic=…)`` on
            arrays.
        deterministic: Greedy actions.
        seed: Seed of the sampling.

    Yields:
        ``act(obs)``: float32 actions (n, K, D) within [-1, 1] for n observations.

    Raises:
        TypeError: If the policy has neither method.
    """
    import torch

    if not hasattr(policy, "sample") and hasattr(getattr(policy, "policy", None), "sample"):
        policy = policy.policy  # an algorithm around such a policy
    act = _act_of(policy, deterministic)
    generators = [v for v in vars(policy).values() if isinstance(v, torch.Generator)]
    states = [g.get_state() for g in generators]
    training = getattr(policy, "training", False)
    if training:
        policy.set_training_mode(False)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for i, generator in enumerate(generators):
            generator.manual_seed(seed + i)
        try:
            yield act
        finally:
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)
            if training:
                policy.set_training_mode(True)


def _act_of(policy: Any, deterministic: bool) -> Act:
    import torch

    def by_sampling(obs: Observation) -> np.ndarray:
        device = getattr(policy, "device", "cpu")
        tensors = {name: torch.as_tensor(value, device=device) for name, value in obs.items()}
        return _clipped(policy.sample(tensors, deterministic)[0].cpu().numpy())

    def by_prediction(obs: Observation) -> np.ndarray:
        return _clipped(np.asarray(policy.predict(obs, deterministic=deterministic)[0]))

    if hasattr(policy, "sample"):
        return by_sampling
    if hasattr(policy, "predict"):
        return by_prediction
    raise TypeError(
        f"{type(policy).__name__} cannot be evaluated: it has neither sample(obs, deterministic) nor "
        "predict(obs, deterministic=...). Give a GroupPolicy, or a Stable-Baselines3 policy or algorithm."
    )


def _clipped(actions: np.ndarray) -> np.ndarray:
    return np.clip(actions, -1.0, 1.0).astype(np.float32)


def episode_seed(seed: int, start_state_id: int, repeat: int = 0) -> int:
    """Seed of one episode: depends on the root seed and the episode, not on the batch it runs in.

    Args:
        seed: Root seed.
        start_state_id: Start state, -1 if unnumbered.
        repeat: How many earlier episodes of the list begin in the same start state.
    """
    return int(np.random.SeedSequence([seed, start_state_id + 1, repeat]).generate_state(1)[0])


def episode_seeds(seed: int, start_state_ids: np.ndarray) -> list[int]:
    """:func:`episode_seed` of every episode in a list that may name a start state several times."""
    seen: dict[int, int] = {}
    seeds = []
    for start_state_id in np.asarray(start_state_ids).tolist():
        seeds.append(episode_seed(seed, start_state_id, seen.get(start_state_id, 0)))
        seen[start_state_id] = seen.get(start_state_id, 0) + 1
    return seeds
