"""The one loop that steps a simulator."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Choose = Callable[[Any], np.ndarray]


@dataclass
class SimulatorRun:
    """What happened in one simulator; lists have an entry per executed step.

    Attributes:
        actions: The actions, each ``(D,)``.
        frames: The frames after the steps that were asked for, uint8 ``(H, W, 3)``.
        proprio: The robot's state after each step, or empty.
        success: Whether the task was done after the last step.
        success_step: Steps until the task was first done, from 1; None if it never was.
    """

    actions: list[np.ndarray]
    frames: list[np.ndarray]
    proprio: list[np.ndarray]
    success: bool
    success_step: int | None


def run_simulator(
    simulator: Any,
    actions: Choose | Iterable[np.ndarray],
    n_steps: int,
    *,
    stop_at_success: bool,
    frames: Literal["all", "last", "none"] = "none",
    proprio: bool = False,
    watch: Callable[[Any], None] | None = None,
) -> SimulatorRun:
    """Step a simulator from its present state.

    Args:
        simulator: See :class:`~wmpo_gym.envs.simulated.Simulator`.
        actions: The actions ``(D,)`` in order, or a function from the simulator to the next one.
        n_steps: Control steps at most, at least 1.
        stop_at_success: End when the task is done.
        frames: Which frames to render: after every step, after the last one, or none. The frame before the
            first step is the caller's.
        proprio: Read the robot's state after every step.
        watch: Called with the simulator after every step.
    """
    given = None if callable(actions) else iter(actions)
    run = SimulatorRun([], [], [], False, None)
    for step in range(1, n_steps + 1):
        action = actions(simulator) if given is None else next(given)  # type: ignore[operator]
        simulator.step(action)
        run.actions.append(action)
        run.success = bool(simulator.success)
        if run.success and run.success_step is None:
            run.success_step = step
        over = step == n_steps or (stop_at_success and run.success)
        if frames == "all" or (frames == "last" and over):
            run.frames.append(simulator.render())
        if proprio:
            run.proprio.append(simulator.proprio())
        if watch is not None:
            watch(simulator)
        if over:
            break
    return run
