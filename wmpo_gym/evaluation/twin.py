"""Twin replay: run the actions of imagined episodes in the simulator and see whether the claims hold.

The comparison is fair only over the full horizon. An imagined episode of the environment stops when its
classifier fires; the policy never chose actions for the rest, and a replay of the cut sequence would count
every early claim as false. Here imagination goes on to the horizon, the claim is its first firing, and the
twin's outcome is its first success, each at whatever step it comes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from wmpo_gym.envs.simulated import make_simulator
from wmpo_gym.evaluation.locate import object_error
from wmpo_gym.rollouts.imagined import NEVER, Imagined, check_full_horizon, imagine_full_horizon
from wmpo_gym.rollouts.policy_runner import acting
from wmpo_gym.statistics import Agreement, precision_recall
from wmpo_gym.tasks import Task, get_task
from wmpo_gym.utils.progress import progress_bar
from wmpo_gym.world.world import World


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


@dataclass
class TwinComparison:
    """Imagination and twin of the same actions from the same start states.

    Attributes:
        start_state_ids: int64 (N,).
        imagined: The imagined episodes.
        replay: The simulated ones.
        agreement: Claims judged by outcomes: precision, recall, accuracy, gap in points.
        error: float64 (N, T+1), object error in pixels, or None (see :func:`object_error`).
    """

    start_state_ids: np.ndarray
    imagined: Imagined
    replay: Replay
    agreement: Agreement
    error: np.ndarray | None

    def error_at_success(self) -> np.ndarray:
        """Object error (M,) at the step that decides: of the true success, else of the false claim."""
        if self.error is None:
            return np.zeros(0)
        step = np.where(self.replay.success, self.replay.success_step, self.imagined.claimed_step)
        decided = np.flatnonzero(step != NEVER)
        errors = self.error[decided, step[decided]]
        return errors[~np.isnan(errors)]

    def error_by_step(self) -> dict[str, list[float]]:
        """Median, mean and 90th percentile of the object error (pixels) per control step 0 to T."""
        if self.error is None:
            return {}
        return {
            "median": np.nanmedian(self.error, axis=0).tolist(),
            "mean": np.nanmean(self.error, axis=0).tolist(),
            "p90": np.nanpercentile(self.error, 90, axis=0).tolist(),
        }


def compare_with_twin(
    world: World,
    policy: Any,
    start_state_ids: Sequence[int] | np.ndarray,
    *,
    seed: int = 0,
    deterministic: bool = False,
    variant: str = "nominal",
    record_frames: bool = True,
    progress: bool = False,
) -> TwinComparison:
    """Imagine a policy's episodes to the full horizon and replay their actions in the simulator.

    Args:
        world: The world to judge.
        policy: See :func:`~wmpo_gym.rollouts.policy_runner.acting`.
        start_state_ids: Start states of the task, of any split; the simulator renders their first frames.
        seed: Root seed.
        deterministic: Greedy actions.
        variant: Scene variant.
        record_frames: Render the twin too; without it there is no object error and no video.
        progress: Show progress bars.
    """
    ids = np.asarray(start_state_ids, np.int64)
    frames, task_ids = start_frames(world.task, ids, variant)
    imagined = imagine_full_horizon(
        world,
        policy,
        frames,
        task_ids,
        seed=seed,
        deterministic=deterministic,
        start_state_ids=ids,
        progress=progress,
    )
    twin = replay(
        world.task, ids, imagined.actions, variant=variant, record_frames=record_frames, progress=progress
    )
    error = None if twin.frames is None else object_error(world.task, imagined.frames, twin.frames, task_ids)
    return TwinComparison(ids, imagined, twin, twin_agreement(imagined, twin), error)


def twin_agreement(imagined: Imagined, twin: Replay) -> Agreement:
    """Claims of imagination judged by the twin."""
    return precision_recall(imagined.claimed, twin.success)


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
    if displacement is not None and not hasattr(simulator, "displace_block"):
        raise ValueError(
            f"The simulator of {task.name!r} has no displace_block method, so nothing can be perturbed."
        )
    steps, clips = [], []
    walk = progress_bar(range(len(actions)), desc="twin replay", disable=not progress)
    for i in walk:
        simulator.reset(int(start_state_ids[i]))
        if displacement is not None:
            simulator.displace_block(displacement[i])  # type: ignore[attr-defined]
        clip, first = [simulator.render()] if record_frames else [], NEVER
        for t, action in enumerate(actions[i], start=1):
            simulator.step(action)
            if first == NEVER and simulator.success:
                first = t
            if record_frames:
                clip.append(simulator.render())
        steps.append(first)
        clips.append(clip)
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
                    for k, action in enumerate(chosen[-1][row], start=1):
                        simulator.step(action)
                        if first[row] == NEVER and simulator.success:
                            first[row] = chunk * task.chunk + k
                        if watch is not None:
                            watch(i + row, simulator)
            actions.append(np.concatenate(chosen, axis=1))
            steps.append(first)
    return np.concatenate(actions), Replay(np.concatenate(steps), None)
