"""Simulators behind ``WMPO-Simulated-v0``: one module per family, found by the name of its task."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import Protocol

import numpy as np

from wmpo_gym.envs.simulated.locate import locate_coloured_block
from wmpo_gym.tasks import PANDA_TASKS, ROBOSUITE, Task, get_task


class Simulator(Protocol):
    """What ``WMPO-Simulated-v0`` asks of a simulator; every row of a batch has its own.

    A simulator may also offer ``proprio() -> float32 (P,)``, the robot's own state, which is recorded with
    the frames; and ``displace(offset)``, which shifts the named object by metres ``(2,)``, together with
    ``to_pixels(point)``, which maps metres to pixels of the observation. The *physics* gate needs these two
    and is not measurable without them.
    """

    task_id: int
    """Instruction of the present episode; fixed by the start state."""

    def reset(self, start_state_id: int) -> None:
        """Put the scene into a start state of the task."""

    def step(self, action: np.ndarray) -> None:
        """Advance one control step; ``action`` is ``(action_dim,)`` in [-1, 1]."""

    def render(self) -> np.ndarray:
        """The observation, uint8 ``(image_size, image_size, 3)``."""

    @property
    def success(self) -> bool:
        """Whether the task is done in the present state."""

    def get_state(self) -> np.ndarray:
        """Everything needed to continue exactly, float64 of fixed length."""

    def set_state(self, state: np.ndarray) -> None:
        """Restore what :meth:`get_state` returned."""


SimulatorFactory = Callable[..., Simulator]

# "module:class" or a callable taking (variant, task); a string is imported when the first simulator is made.
ROBOSUITE_SIM = "wmpo_gym.envs.simulated.tabletop.sim:RobosuiteSim"
SIMULATORS: dict[str, str | SimulatorFactory] = {
    "move-block": "wmpo_gym.envs.simulated.move_block:MoveBlockSim",
    **{task.name: ROBOSUITE_SIM for task in PANDA_TASKS},
}


# Finds the named object in frames: (uint8 (N, ..., H, W, 3), task ids (N,)) -> pixels (N, ..., 2).
Locator = Callable[[np.ndarray, np.ndarray], np.ndarray]
LOCATORS: dict[str, Locator] = {
    name: locate_coloured_block for name in ("move-block", "lift", "lift-close", "stack", "stack-three")
}


def find_locator(task: Task) -> Locator | None:
    """What finds a task's named object in frames, or None if nothing was registered."""
    return LOCATORS.get(task.name, LOCATORS.get(task.base_name))


def register_simulator(
    task: str | Task, factory: str | SimulatorFactory, *, locate: Locator | None = None
) -> None:
    """Name the simulator of a task of your own.

    Args:
        task: The task, known to :func:`wmpo_gym.tasks.register_task`.
        factory: Called with ``variant`` and ``task``, or a string ``"module:name"`` of such a callable
            (needed where another process has to find it).
        locate: What finds the named object in frames, see :data:`LOCATORS`; without it the *faithful* gate
            cannot measure the object's position.
    """
    SIMULATORS[get_task(task).name] = factory
    if locate is not None:
        LOCATORS[get_task(task).name] = locate


def find_simulator(task: Task) -> str | SimulatorFactory | None:
    """What makes a task's simulator: a callable, the name of one, or None if there is none."""
    if task.base_name.startswith(ROBOSUITE):
        return SIMULATORS.get(task.name, ROBOSUITE_SIM)
    return SIMULATORS.get(task.name, SIMULATORS.get(task.base_name))


def make_simulator(task: str | Task = "move-block", variant: str = "nominal") -> Simulator:
    """Make the simulator of a task.

    Args:
        task: Task or its name.
        variant: One of ``task.variants``.

    Raises:
        ValueError: If the task has no simulator or no such variant.
        ModuleNotFoundError: If the physics library is missing; the message holds the pip line.
        OSError: If MUJOCO_GL names an OpenGL library that is not there.
    """
    task = get_task(task)
    factory = find_simulator(task)
    if factory is None:
        raise ValueError(
            f"Task {task.name!r} has no simulator; there are simulators for {', '.join(SIMULATORS)}. "
            "Add yours with wmpo_gym.envs.simulated.register_simulator."
        )
    if variant not in task.variants:
        raise ValueError(
            f"Unknown variant {variant!r} of {task.name!r}; choose one of {', '.join(task.variants)}."
        )
    if isinstance(factory, str):
        module, _, name = factory.partition(":")
        try:
            factory = getattr(importlib.import_module(module), name)
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"The simulator of {task.name!r} needs the package {error.name!r}. Install it with: "
                "pip install 'wmpo-gym[sim]'",
                name=error.name,
            ) from error
        except (AttributeError, ImportError) as error:  # how MuJoCo fails where that library is missing
            raise OSError(
                f"MuJoCo cannot be imported with MUJOCO_GL={os.environ.get('MUJOCO_GL')!r} ({error}). "
                "Unset it, or apt-get install what it names: libegl1 libgl1 for egl, libosmesa6 for osmesa."
            ) from error
    return factory(variant=variant, task=task)
