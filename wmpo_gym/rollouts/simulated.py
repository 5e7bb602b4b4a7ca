"""Episodes in the simulator that go on to the horizon: replayed actions, and a policy's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from wmpo_gym.envs.simulated import make_simulator
from wmpo_gym.envs.simulated.rollout import run_simulator
from wmpo_gym.rollouts.imagined import NEVER, check_full_horizon
from wmpo_gym.rollouts.policy_runner import acting
from wmpo_gym.tasks import Task, get_task
from wmpo_gym.utils.progress import progress_bar


@dataclass
class Replay:
    """What happened in the simulator.

    Attributes:
        success_step: int64 (N,), control steps until the first success, or -1.
        frames: uint8 (N, T+1, H, W, 3), or None if they were not recorded.
    """

    success_step: np.ndarray
    frames: np.ndarray | None

    @property
    def success(self) -> np.ndarray:
        """Whether the task succeeded at any step, bool (N,)."""
        return self.success_step != NEVER


def start_frames(
    task: str | Task, start_state_ids: np.ndarray, variant: str = "nominal"
) -> tuple[np.ndarray, np.ndarray]:
    """First frames uint8 (N, H, W, 3) as the simulator shows them, and instructions int64 (N,)."""
    simulator = make_simulator(task, variant)
    frames, task_ids = [], []
    for start_state_id in start_state_ids:
        simulator.reset(int(start_state_id))
        frames.append(simulator.render())
        task_ids.append(simulator.task_id)
    return np.stack(frames), np.array(task_ids, np.int64)


def replay(
    task: str | Task,
    start_state_ids: Sequence[int] | np.ndarray,
    actions: np.ndarray,
    *,
    variant: str = "nominal",
    record_frames: bool = False,
    displacement: np.ndarray | None = None,
    progress: bool = False,
) -> Replay:
    """Run action sequences in the simulator to the full horizon; success is the first one at any step.

    Args:
        task: Task or its name.
        start_state_ids: Where each sequence starts (N,).
        actions: float (N, T, D) with T the task's horizon.
        variant: Scene variant.
        record_frames: Render every step.
        displacement: float (N, 2) metres by which the named object is shifted before the first step, or None.
        progress: Show a progress bar.

    Raises:
        ValueError: If the actions are not finite or not of full length, as after a truncation at the imagined
            success, or if the simulator cannot displace its object.
    """
    task = get_task(task)
    check_full_horizon(task, actions, len(start_state_ids))
    simulator = make_simulator(task, variant)
    if displacement is not None and not hasattr(simulator, "displace"):
        raise ValueError(
            f"The simulator of {task.name!r} has no displace method, so nothing can be perturbed."
        )
    steps, clips = [], []
    for i in progress_bar(range(len(actions)), desc="replay in the simulator", disable=not progress):
        simulator.reset(int(start_state_ids[i]))
        if displacement is not None:
            simulator.displace(displacement[i])  # type: ignore[attr-defined]
        first = [simulator.render()] if record_frames else []
        frames: Any = "all" if record_frames else "none"
        run = run_simulator(simulator, actions[i], len(actions[i]), stop_at_success=False, frames=frames)
        steps.append(NEVER if run.success_step is None else run.success_step)
        clips.append(first + run.frames)
    return Replay(np.array(steps, np.int64), np.array(clips, np.uint8) if record_frames else None)


def simulate_full_horizon(
    task: str | Task,
    policy: Any,
    start_state_ids: Sequence[int] | np.ndarray,
    *,
    seed: int = 0,
    deterministic: bool = False,
    variant: str = "nominal",
    batch_size: int = 64,
    watch: Callable[[int, Any], None] | None = None,
) -> tuple[np.ndarray, Replay]:
    """Let a policy act in the simulator up to the horizon, also after a success.

    Args:
        task: Task or its name.
        policy: See :func:`~wmpo_gym.rollouts.policy_runner.acting`.
        start_state_ids: Where to start.
        seed: Root seed of the sampling.
        deterministic: Greedy actions.
        variant: Scene variant.
        batch_size: Simulators that run side by side.
        watch: Called after every control step with the episode's index and its simulator.

    Returns:
        Its actions float32 (N, T, D) and what they led to.
    """
    task, actions, steps = get_task(task), [], []
    with acting(policy, deterministic=deterministic, seed=seed) as act:
        for i in range(0, len(start_state_ids), batch_size):
            ids = start_state_ids[i : i + batch_size]
            simulators = [make_simulator(task, variant) for _ in ids]
            for simulator, start_state_id in zip(simulators, ids, strict=True):
                simulator.reset(int(start_state_id))
            task_ids = np.array([s.task_id for s in simulators], np.int64)
            first, chosen = np.full(len(ids), NEVER), []
            for chunk in range(task.n_chunks):
                chosen.append(
                    act({"pixels": np.stack([s.render() for s in simulators]), "task_id": task_ids})
                )
                for row, simulator in enumerate(simulators):
                    run = run_simulator(
                        simulator,
                        chosen[-1][row],
                        task.chunk,
                        stop_at_success=False,
                        watch=None if watch is None else partial(watch, i + row),
                    )
                    if first[row] == NEVER and run.success_step is not None:
                        first[row] = chunk * task.chunk + run.success_step
            actions.append(np.concatenate(chosen, axis=1))
            steps.append(first)
    return np.concatenate(actions), Replay(np.concatenate(steps), None)
