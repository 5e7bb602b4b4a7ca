"""A robosuite environment as one scene that all rows of a process share.

Building a scene takes seconds and its meshes tens of megabytes, so a process builds each one once. A row is
merely a state vector: the scene holds one row at a time and changes rows by loading their states.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
import random
import weakref
from collections.abc import Iterator
from typing import Any

import mujoco
import numpy as np

from wmpo_gym.envs.simulated.tabletop.camera import Camera, decimate
from wmpo_gym.envs.simulated.tabletop.definitions import Definition, definition_of
from wmpo_gym.envs.simulated.tabletop.osc import ArmControl, is_plain_osc
from wmpo_gym.tasks import Task

PHYSICS = mujoco.mjtState.mjSTATE_INTEGRATION
SETTLING_STEPS = 10  # control steps without motion after a reset, as in the published evaluation


class Scene:
    """One task in one variant.

    Args:
        task: The task.
        variant: One of ``task.variants``.

    Raises:
        ValueError: If robosuite has no such environment, or its actions or camera are not the task's.
    """

    def __init__(self, task: Task, variant: str) -> None:
        self.task, self.variant = task, variant
        self.definition = definition_of(task)
        seed = task.start_states.seed
        with _quiet(), _seeded(None, seed):
            self.env = _make(self.definition, task)
            self.env.reset()
        self.model: mujoco.MjModel = self.env.sim.model._model
        self.data: mujoco.MjData = self.env.sim.data._data
        decimate(self.model)
        self.definition.apply(self.model, variant)
        self._arm = ArmControl(self.env) if is_plain_osc(self.env) else None
        self._robots = self.env.robots
        self._nominal = self.model.body_pos.copy(), self.model.body_quat.copy()
        self._starts: dict[int, np.ndarray] = {}
        self._camera: Camera | None = None
        self._holder: Any = None

    # -- rows ------------------------------------------------------------------------------------------------
    def hold(self, row: Any) -> None:
        """Put a row's state into the simulator, and the present one's aside; rows have a ``saved`` state."""
        holder = self._holder and self._holder()
        if holder is row:
            return
        if holder is not None:
            holder.saved = self.dump()
        self._holder = weakref.ref(row)
        if row.saved is not None:
            self.load(row.saved)

    def start(self, start_state_id: int) -> None:
        """Put the simulator into a start state: placed by the id's seed, then settled."""
        if start_state_id not in self._starts:
            seed = [self.task.start_states.seed, start_state_id]
            self.model.body_pos[:], self.model.body_quat[:] = self._nominal
            with _quiet(), _seeded(self.env, int(np.random.SeedSequence(seed).generate_state(1)[0])):
                self.env.reset()
            self.definition.move_goal(self.model, self.variant, np.random.default_rng([*seed, 1]))
            still = np.zeros(self.task.action_dim)
            for _ in range(SETTLING_STEPS):
                self.step(still)
            self._starts[start_state_id] = self.dump()
        self.load(self._starts[start_state_id])

    # -- time ------------------------------------------------------------------------------------------------
    def step(self, action: np.ndarray) -> None:
        """Advance one control step."""
        if self._arm is not None:
            posture = self._robots[0].part_controllers["right"].initial_joint
            self._arm.step(self.data, action, posture)
        else:
            for i in range(int(self.env.control_timestep / self.env.model_timestep)):
                self.env.sim.step1()
                self.env._pre_action(action, i == 0)
                self.env.sim.step2()
        self._refresh()

    def _refresh(self) -> None:
        """Bring what follows from the state up to date, without a trace in the steps to come."""
        warmstart = self.data.qacc_warmstart.copy()
        mujoco.mj_forward(self.model, self.data)
        self.data.qacc_warmstart[:] = warmstart

    # -- state -----------------------------------------------------------------------------------------------
    def _controls(self) -> list[tuple[Any, str]]:
        """What the controllers remember between steps: (object, attribute), each an array."""
        memory: list[tuple[Any, str]] = []
        for robot in self._robots:
            memory += [(gripper, "current_action") for gripper in robot.gripper.values() if gripper.dof]
            memory += [(c, "initial_joint") for c in robot.part_controllers.values()]
        return memory

    def dump(self) -> np.ndarray:
        """Everything needed to go on exactly, float64: physics, fixtures, and the controllers' memory."""
        physics = np.empty(mujoco.mj_stateSize(self.model, PHYSICS))
        mujoco.mj_getState(self.model, self.data, physics, PHYSICS)
        memory = [np.ravel(getattr(owner, name)) for owner, name in self._controls()]
        return np.concatenate([physics, self.model.body_pos.ravel(), self.model.body_quat.ravel(), *memory])

    def load(self, state: np.ndarray) -> None:
        """Restore what :meth:`dump` returned.

        Raises:
            ValueError: If the array has another length.
        """
        expected = self.dump().shape
        if np.shape(state) != expected:
            raise ValueError(
                f"A state of {self.task.name!r} has shape {expected}, got {np.shape(state)}; is it another "
                "task's?"
            )
        n = mujoco.mj_stateSize(self.model, PHYSICS)
        physics, rest = np.ascontiguousarray(state[:n]), state[n:]
        for place in (self.model.body_pos, self.model.body_quat):
            place[:] = rest[: place.size].reshape(place.shape)
            rest = rest[place.size :]
        for owner, name in self._controls():
            like = getattr(owner, name)
            setattr(owner, name, rest[: like.size].reshape(like.shape).copy())
            rest = rest[like.size :]
        mujoco.mj_setState(self.model, self.data, physics, PHYSICS)
        self._refresh()

    # -- picture ---------------------------------------------------------------------------------------------
    def render(self) -> np.ndarray:
        """The picture, uint8 ``(image_size, image_size, 3)``."""
        if self._camera is None:
            self._camera = Camera(self.model, self.definition.camera, self.task.image_size)
        return self._camera.render(self.data)


@functools.lru_cache(maxsize=2)
def shared_scene(task: Task, variant: str) -> Scene:
    """The process's scene of a task and variant; the two used last are kept."""
    return Scene(task, variant)


def _make(definition: Definition, task: Task) -> Any:
    robosuite = _robosuite()
    for package in definition.packages:
        importlib.import_module(package)
    if definition.env_name not in robosuite.ALL_ENVIRONMENTS:
        raise ValueError(
            f"robosuite has no environment {definition.env_name!r}; registered are "
            f"{', '.join(sorted(robosuite.ALL_ENVIRONMENTS))}. If a package registers it, name that package: "
            "wmpo_gym.tasks.robosuite_task(..., packages=('the_package',))."
        )
    env = robosuite.make(
        definition.env_name,
        robots=definition.robots,
        controller_configs=_controller(robosuite, definition),
        has_renderer=False,
        has_offscreen_renderer=False,
        use_camera_obs=False,
        hard_reset=False,
        ignore_done=True,
        renderer="mujoco",
        **{"control_freq": task.control_hz, **definition.env_kwargs},
    )
    if env.action_dim != task.action_dim:
        raise ValueError(
            f"Robot and controller of {task.name!r} take actions of {env.action_dim} numbers, the task says "
            f"{task.action_dim}; give robosuite_task(..., action_dim={env.action_dim})."
        )
    return env


def _controller(robosuite: Any, definition: Definition) -> Any:
    """The controller configuration in the form that robosuite wants for the whole robot."""
    wanted = definition.controller
    if isinstance(wanted, str):
        if wanted in robosuite.ALL_PART_CONTROLLERS:
            wanted = robosuite.load_part_controller_config(default_controller=wanted)
        elif wanted in robosuite.ALL_COMPOSITE_CONTROLLERS or wanted.endswith(".json"):
            wanted = robosuite.load_composite_controller_config(controller=wanted, robot=definition.robots)
        else:
            known = [*robosuite.ALL_PART_CONTROLLERS, *robosuite.ALL_COMPOSITE_CONTROLLERS]
            raise ValueError(
                f"robosuite has no controller {wanted!r}; there are {', '.join(known)}, or give a .json file."
            )
    if wanted is not None and "body_parts" not in wanted:  # one arm's, as robosuite had it up to 1.4
        from robosuite.controllers.composite.composite_controller_factory import (
            refactor_composite_controller_config,
        )

        wanted = refactor_composite_controller_config(wanted, definition.robots, ["right"])
    return wanted


def _robosuite() -> Any:
    """The library, imported without its side effect on the choice of OpenGL."""
    asked = os.environ.get("MUJOCO_GL")
    try:
        return importlib.import_module("robosuite")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"This task needs the package {error.name!r}. Install it with: pip install 'wmpo-gym[robosuite]'",
            name=error.name,
        ) from error
    except ImportError as error:  # OpenCV wants libraries of a desktop
        raise ImportError(
            f"robosuite cannot be imported: {error}. If a lib*.so is missing, OpenCV wants it: apt-get "
            "install libgl1 libglib2.0-0 libxcb1, or pip install --force-reinstall opencv-python-headless"
        ) from error
    finally:
        os.environ.pop("MUJOCO_GL", None)
        if asked is not None:
            os.environ["MUJOCO_GL"] = asked


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep robosuite's notes about optional parts to itself."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def _seeded(env: Any, seed: int) -> Iterator[None]:
    """Seed all that robosuite draws from, and leave the global generators as they were.

    robosuite 1.5.1 draws from NumPy's and Python's global generators, later versions from generators of their
    own.
    """
    states = np.random.get_state(), random.getstate()
    np.random.seed(seed)
    random.seed(seed)
    if env is not None:
        sampler = getattr(env, "placement_initializer", None)
        parts = [env, *env.robots, sampler, *getattr(sampler, "samplers", {}).values()]
        for i, part in enumerate(parts):
            if hasattr(part, "rng"):
                part.rng = np.random.default_rng([seed, i])
    try:
        yield
    finally:
        np.random.set_state(states[0])
        random.setstate(states[1])
