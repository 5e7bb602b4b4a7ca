"""Measurement of a world's validation gates, which are written to its card."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from wmpo_gym.data.episode import Episode
from wmpo_gym.envs.simulated import ROBOSUITE_SIM, find_simulator
from wmpo_gym.evaluation.gates import (
    MAX_ITERATIONS,
    MIN_GAIN,
    GateResult,
    faithful_gate,
    honest_gate,
    learnable_gate,
    physics_gate,
)
from wmpo_gym.evaluation.metrics import action_sensitivity, object_error, psnr_of_clips
from wmpo_gym.evaluation.twin import TwinComparison, compare_with_twin
from wmpo_gym.rollouts.imagined import NEVER, Imagined, imagine_episodes
from wmpo_gym.rollouts.simulated import simulate_full_horizon
from wmpo_gym.statistics import paired_difference, precision_recall
from wmpo_gym.tasks import GATES, Task
from wmpo_gym.world.world import World

SENSITIVITY_EPISODES = 32


def validate(
    world: World,
    policy: Any,
    *,
    episodes: int = 128,
    split: str = "validation",
    seed: int = 0,
    deterministic: bool = False,
    learnable: GateResult | Callable[[], GateResult] | None = None,
    real_episodes: Sequence[Episode] | None = None,
    progress: bool = True,
) -> dict[str, dict[str, Any]]:
    """Measure the validation gates and write them to the world's card.

    Args:
        world: The world; ``world.card["gates"]`` is replaced. Save the world to keep the result.
        policy: The policy to be trained in the world.
        episodes: Number of start states for gates 1, 3 and 4.
        split: Split of the start states; the world must not have been trained on it.
        seed: Root seed.
        deterministic: Use greedy actions.
        learnable: Result of gate 2, or a function that measures it (see :func:`measure_learnable`, which
            takes a minute or more). None keeps the result in the card, if any, since gate 2 depends on task
            and policy and not on the world.
        real_episodes: Held-out labelled episodes. If given, or if the task has no simulator, gates 3 and 4
            are measured on them, and gates 1 and 2 are not measurable.
        progress: Show progress bars.

    Returns:
        Gate name to :meth:`GateResult.to_dict`.

    Raises:
        ValueError: If there is neither a simulator nor real episodes.
    """
    if real_episodes is not None or not has_simulator(world.task):
        results = _validate_on_recordings(world, real_episodes, seed)
    else:
        ids = np.asarray(world.task.split_ids(split)[:episodes])
        kept = (world.card.get("gates") or {}).get("learnable")
        if learnable is not None:
            kept = (learnable() if callable(learnable) else learnable).to_dict()
        results = _validate_in_simulator(world, policy, ids, seed, deterministic, progress)
        results |= {"learnable": kept} if kept else {}
    world.card["gates"] = {name: results[name] for name in GATES if name in results}
    return world.card["gates"]


def _validate_in_simulator(
    world: World, policy: Any, ids: np.ndarray, seed: int, deterministic: bool, progress: bool
) -> dict[str, dict[str, Any]]:
    task = world.task
    actions, nominal = simulate_full_horizon(task, policy, ids, seed=seed, deterministic=deterministic)
    physics = physics_gate(task, ids, actions, nominal, seed=seed, progress=progress)
    comparison = compare_with_twin(
        world, policy, ids, seed=seed, deterministic=deterministic, progress=progress
    )
    return {"physics": physics.to_dict()} | judge_comparison(world, comparison, seed=seed)


def judge_comparison(world: World, comparison: TwinComparison, *, seed: int = 0) -> dict[str, dict[str, Any]]:
    """Gates 3 and 4 from a comparison with the paired simulator."""
    imagined, few = comparison.imagined, slice(0, SENSITIVITY_EPISODES)
    sensitivity = action_sensitivity(
        world, imagined.actions[few], imagined.frames[few, 0], imagined.task_ids[few], seed=seed
    )
    errors = None if comparison.error is None else comparison.error_at_success()
    horizon = comparison.error_by_step()
    metrics = {"median_object_error_px_at_horizon": horizon["median"][-1]} if horizon else {}
    faithful = faithful_gate(world.task, errors, sensitivity, **metrics)
    return {
        "faithful": faithful.to_dict(),
        "honest": honest_gate(comparison.agreement, "twin replay").to_dict(),
    }


def _validate_on_recordings(
    world: World, episodes: Sequence[Episode] | None, seed: int
) -> dict[str, dict[str, Any]]:
    if not episodes:
        raise ValueError(
            f"Task {world.task.name!r} has no simulator here; give real_episodes (`wmpo validate "
            "--recordings`): labelled episodes that neither world model nor classifier was trained on."
        )
    if any(e.meta.get("imagined") for e in episodes):
        raise ValueError("Imagined episodes cannot judge a world; give recorded ones.")
    imagined, truth = imagine_episodes(world, episodes, seed=seed)
    few = slice(0, SENSITIVITY_EPISODES)
    sensitivity = action_sensitivity(
        world, imagined.actions[few], imagined.frames[few, 0], imagined.task_ids[few], seed=seed
    )
    errors = _errors_at_end(world.task, imagined, episodes)
    faithful = faithful_gate(
        world.task,
        errors,
        sensitivity,
        explained_change=_explained_change(imagined, episodes),
        psnr_db=psnr_of_clips(
            [clip[1 : e.n_steps + 1] for clip, e in zip(imagined.frames, episodes, strict=True)],
            [np.asarray(e.frames)[1:] for e in episodes],
        ),
    )
    honest = honest_gate(precision_recall(imagined.claimed, truth), "the recorded outcomes")
    reason = "There is no simulator to perturb or to train in; only real episodes were available."
    unknown = (GateResult(name, None, {}, "", "a simulator", reason) for name in ("physics", "learnable"))
    missing = {gate.name: gate.to_dict() for gate in unknown}
    return missing | {"faithful": faithful.to_dict(), "honest": honest.to_dict()}


def _errors_at_end(task: Task, imagined: Imagined, episodes: Sequence[Episode]) -> np.ndarray | None:
    """Object error at the end of recorded successes, or else at the falsely predicted success."""
    errors = []
    for i, episode in enumerate(episodes):
        step = episode.n_steps if episode.success else int(imagined.claimed_step[i])
        if step == NEVER or step > episode.n_steps:
            continue
        frame, recorded = imagined.frames[i : i + 1, step : step + 1], episode.frames[None, step : step + 1]
        error = object_error(task, frame, recorded, imagined.task_ids[i : i + 1])
        if error is None:
            return None
        errors.append(float(error[0, 0]))
    return np.array([e for e in errors if np.isfinite(e)])


def _explained_change(imagined: Imagined, episodes: Sequence[Episode]) -> float:
    """Share of the recorded frames' change since the first frame that imagination explains.

    Median over the episodes of 1 minus the squared error relative to that of repeating the first frame; 1 is
    perfect.
    """
    shares = []
    for i, episode in enumerate(episodes):
        real = np.asarray(episode.frames, np.float32)
        missed = np.square(imagined.frames[i, 1 : episode.n_steps + 1] - real[1:]).sum()
        shares.append(1 - missed / max(np.square(real[1:] - real[0]).sum(), 1.0))
    return float(np.median(shares))


def measure_learnable(
    policy: Any,
    task: Task,
    *,
    episodes: int = 128,
    split: str = "validation",
    n_groups: int = 32,
    group_size: int = 8,
    block: int = 5,
    seed: int = 0,
    progress: bool = True,
    **grpo: Any,
) -> GateResult:
    """Measure gate 2: train a copy of a policy with GRPO in the simulator and compare success rates.

    Training stops when the required gain is reached. ``policy`` is not changed.

    Args:
        policy: A :class:`~wmpo_gym.policies.base.GroupPolicy`.
        task: The task; it needs a simulator.
        episodes: Number of start states for the comparison.
        split: Split of the start states; training uses the train split.
        n_groups: Groups per iteration.
        group_size: Rollouts per group.
        block: Iterations between evaluations of the gain.
        seed: Root seed.
        progress: Show progress bars.
        **grpo: Further arguments of :class:`~wmpo_gym.algorithms.grpo.GRPO`.
    """
    from wmpo_gym.algorithms.grpo import GRPO
    from wmpo_gym.rollouts.rollout import evaluate_policy_on, make_rollout_env

    def outcomes(candidate: Any) -> np.ndarray:
        return evaluate_policy_on(
            task, candidate, split, episodes, deterministic=False, seed=seed, progress=progress
        ).success

    env = make_rollout_env("WMPO-Simulated-v0", n_groups * group_size, task=task)
    ids = list(task.split_ids("train"))
    model = GRPO(policy, env, group_size=group_size, start_state_ids=ids, seed=seed, **grpo)
    before, iterations = outcomes(policy), 0
    while iterations < MAX_ITERATIONS:
        rounds = min(block, MAX_ITERATIONS - iterations)
        model.learn(max_iterations=rounds, reset_num_timesteps=iterations == 0, progress_bar=progress)
        iterations += rounds
        after = outcomes(model.policy)
        if paired_difference(before, after).points >= MIN_GAIN:
            break
    env.close()
    return learnable_gate(before, after, iterations)


def has_simulator(task: Task) -> bool:
    """Whether the task's paired simulator is available."""
    factory = find_simulator(task)
    if factory is None or not str(factory).startswith("wmpo_gym."):
        return factory is not None
    needed = ("mujoco", "robosuite") if factory == ROBOSUITE_SIM else ("mujoco",)
    return all(importlib.util.find_spec(package) is not None for package in needed)
