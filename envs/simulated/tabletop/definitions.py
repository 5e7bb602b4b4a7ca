"""What the simulator has to know about each task beside the task itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import mujoco
import numpy as np

from wmpo_gym.tasks import ROBOSUITE, Task

OWN = ("wmpo_gym.envs.simulated.tabletop.own_tasks",)  # registers three of them
GREY_TABLE = "table_mat"  # robosuite's arenas bring this material; it is the published disruption too
DARK_WOOD = (70.0, 42.0, 24.0)  # mean colour
Point = tuple[float, float, float]


@dataclass(frozen=True)
class Definition:
    """How to build a task's scene and its variants.

    Attributes:
        env_name: Name of the environment in robosuite's registry.
        packages: Packages that register it.
        camera: Camera of the observation.
        fovy: Vertical opening of the camera in degrees; None leaves it as it is (45 for ``agentview``).
        view: Where the camera stands and what it looks at, ``((x, y, z), (x, y, z))`` in metres; None leaves
            it as it is.
        robots: Name of the robot.
        controller: Controller configuration; None is the robot's default.
        env_kwargs: Further arguments of ``robosuite.make``.
        main_object: Joint of the object whose place decides, "" if unknown.
        clearance: Metres above the table that the centre of its body must reach, beside what robosuite asks
            for; None asks for no more.
        wooden: Texture that turns to dark wood in the variant ``"texture"``.
        goal: Body that stands elsewhere in the variant ``"moved-goal"``.
        goal_shift: Smallest and largest shift of it in metres, ``((x, y), (x, y))``.
    """

    env_name: str
    packages: tuple[str, ...] = ()
    camera: str = "agentview"
    fovy: float | None = None
    view: tuple[Point, Point] | None = None
    robots: str = "Panda"
    controller: str | dict[str, Any] | None = None
    env_kwargs: dict[str, Any] = field(default_factory=dict)
    main_object: str = ""
    clearance: float | None = None
    wooden: str = ""
    goal: str = ""
    goal_shift: tuple[tuple[float, float], tuple[float, float]] = ((0.0, 0.0), (0.0, 0.0))

    def apply(self, model: mujoco.MjModel, variant: str) -> None:
        """Change a fresh model to what the task and a variant want, in place."""
        if self.fovy is not None:
            model.camera(self.camera).fovy = self.fovy
        if self.view is not None:
            model.camera(self.camera).pos = self.view[0]
            model.camera(self.camera).quat = _looking(*map(np.array, self.view))
        if variant == "background":
            model.geom_matid[model.geom("table_visual").id] = model.material(GREY_TABLE).id
        elif variant == "texture":
            _paint(model, self.wooden, dark_wood)

    def move_goal(self, model: mujoco.MjModel, variant: str, rng: np.random.Generator) -> None:
        """Shift the goal at the beginning of an episode, in place."""
        if variant == "moved-goal":
            model.body_pos[model.body(self.goal).id, :2] += rng.uniform(*self.goal_shift)


def _looking(eye: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Attitude (a quaternion) of an upright camera; MuJoCo's look along their negative z axis."""
    back = (eye - target) / np.linalg.norm(eye - target)
    right = np.cross([0.0, 0.0, 1.0], back)
    right /= np.linalg.norm(right)
    attitude = np.empty(4)
    mujoco.mju_mat2Quat(attitude, np.stack([right, np.cross(back, right), back], axis=1).ravel())
    return attitude


LIFT = Definition("Lift", main_object="cube_joint0", wooden="cube_redwood")
DEFINITIONS: dict[str, Definition] = {
    "lift": LIFT,
    # Lower and nearer, and from a corner: where the hand is against the cube can be seen in every direction.
    # robosuite's own rule holds after a rise of 2 cm, when the fingers of a hand that goes up too soon have
    # not closed: no small picture of that moment tells a grip from a miss. At 8 cm the cube is clear of its
    # place.
    "lift-close": replace(LIFT, clearance=0.08, fovy=16.5, view=((0.72, 0.74, 1.54), (-0.02, 0.0, 0.94))),
    "stack": Definition("Stack", main_object="cubeA_joint0", wooden="cubeB_greenwood"),
    "square": Definition(
        "NutAssemblySquare",
        main_object="SquareNut_joint0",
        wooden="brass-metal",
        goal="peg1",
        goal_shift=((0.0, -0.04), (0.0, 0.0)),
    ),
    "stack-three": Definition(
        "WmpoStackThree", packages=OWN, main_object="cubeA_joint0", wooden="cubeB_green"
    ),
    "three-piece-assembly": Definition(
        "WmpoThreePieceAssembly",
        packages=OWN,
        main_object="first_joint0",
        wooden="base_base",
        goal="base_main",
        goal_shift=((-0.02, -0.02), (0.02, 0.02)),
    ),
    "coffee": Definition(
        "WmpoCoffee",
        packages=OWN,
        main_object="pod_joint0",
        wooden="machine_machine",
        goal="machine_main",
        goal_shift=((-0.03, -0.03), (0.03, 0.03)),
    ),
}


def definition_of(task: Task) -> Definition:
    """The definition of a task: one of ours, or what :func:`wmpo_gym.tasks.robosuite_task` wrote down."""
    if task.base_name in DEFINITIONS:
        return DEFINITIONS[task.base_name]
    settings = task.simulator or {"env_name": task.base_name.removeprefix(ROBOSUITE)}
    return Definition(**{**settings, "packages": tuple(settings.get("packages", ()))})


def dark_wood(height: int, width: int) -> np.ndarray:
    """Picture of dark wood, uint8 ``(height, width, 3)``: the grain runs along the columns."""
    y, x = np.mgrid[:height, :width] / max(height, width)
    rings = 9 * x + 0.25 * np.sin(5 * y) + 0.06 * np.sin(23 * y + 9 * x)
    grain = 1.0 + 0.35 * np.sin(2 * np.pi * rings) * np.cos(2 * np.pi * 0.31 * rings)
    return np.clip(grain[..., None] * DARK_WOOD, 0, 255).astype(np.uint8)


def _paint(model: mujoco.MjModel, texture: str, picture: Callable[[int, int], np.ndarray]) -> None:
    """Write a picture into a texture of the model, in place."""
    index = model.texture(texture).id
    height, width, channels = (int(t[index]) for t in (model.tex_height, model.tex_width, model.tex_nchannel))
    start, size = int(model.tex_adr[index]), height * width * channels
    colours = picture(width, width)  # a cube's six faces lie below one another
    tiled = np.tile(colours, (height // width, 1, 1)) if height > width else colours[:height]
    model.tex_data[start : start + size] = np.resize(tiled[..., :channels], size)
