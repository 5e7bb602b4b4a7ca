"""One row of a robosuite task behind ``WMPO-Simulated-v0``."""

from __future__ import annotations

import numpy as np

from wmpo_gym.envs.simulated.tabletop.scene import Scene, shared_scene
from wmpo_gym.tasks import Task, get_task

TABLE_HEIGHT = 0.8  # metres, of robosuite's tables


class RobosuiteSim:
    """A robosuite environment as a :class:`~wmpo_gym.envs.simulated.Simulator`.

    Rows of a process share the scene; each keeps its own state.

    Args:
        variant: One of ``task.variants``.
        task: A task of this family or its name.
    """

    task_id = 0

    def __init__(self, variant: str = "nominal", task: str | Task = "lift") -> None:
        self.task, self.variant = get_task(task), variant
        self.start_state_id = -1
        self.saved: np.ndarray | None = None
        self._closing = False  # whether the last action closed the gripper
        self._shared = shared_scene(self.task, variant)

    @property
    def scene(self) -> Scene:
        """The scene, in this row's state."""
        self._shared.hold(self)
        return self._shared

    def reset(self, start_state_id: int) -> None:
        """Put the scene into one of the task's start states.

        Raises:
            ValueError: If the task has no such start state.
        """
        self.task.split_of(start_state_id)
        self.scene.start(start_state_id)
        self.start_state_id, self._closing = start_state_id, False

    def step(self, action: np.ndarray) -> None:
        """Advance one control step; ``action`` is ``(action_dim,)`` in [-1, 1]."""
        self._closing = bool(action[-1] > 0)
        self.scene.step(np.asarray(action, dtype=np.float64))

    def render(self) -> np.ndarray:
        """The task's camera, uint8 ``(image_size, image_size, 3)``."""
        return self.scene.render()

    def proprio(self) -> np.ndarray:
        """Angles of the arm's joints (radians), place of the hand and openings of the fingers (metres)."""
        robot, data = self.scene.env.robots[0], self.scene.env.sim.data
        hand = data.site_xpos[robot.eef_site_id["right"]]
        fingers = data.qpos[robot._ref_gripper_joint_pos_indexes["right"]]
        joints = data.qpos[robot._ref_joint_pos_indexes]
        return np.concatenate([joints, hand, fingers]).astype(np.float32)

    @property
    def success(self) -> bool:
        """Whether robosuite's own predicate holds now and, where the task asks for it, the object is high."""
        clearance = self._shared.definition.clearance
        if clearance is not None and self.scene.data.body(self.main_body).xpos[2] < TABLE_HEIGHT + clearance:
            return False
        return bool(self.scene.env._check_success())

    def get_state(self) -> np.ndarray:
        """Everything needed to continue exactly, float64."""
        return np.append(self.scene.dump(), self.start_state_id)

    def set_state(self, state: np.ndarray) -> None:
        """Restore what :meth:`get_state` returned.

        Raises:
            ValueError: If the array has another length.
        """
        self.scene.load(np.asarray(state)[:-1])
        self.start_state_id, self._closing = int(state[-1]), False

    @property
    def main_body(self) -> str:
        """Name of the body of the object whose place decides.

        Raises:
            ValueError: If it is not known which object matters.
        """
        joint = self._shared.definition.main_object
        if not joint:
            raise ValueError(
                f"It is not known which object of {self.task.name!r} matters, so none can be moved."
            )
        model = self._shared.model
        return model.body(int(model.joint(joint).bodyid[0])).name

    @property
    def contact(self) -> str | None:
        """``"held"`` with the main object between the fingers, ``"missed"`` with them closing without it.

        Raises:
            ValueError: If it is not known which object matters.
        """
        model, env = self._shared.model, self.scene.env
        geoms = np.flatnonzero(model.geom_bodyid == model.body(self.main_body).id)
        names = [model.geom(int(i)).name for i in geoms if model.geom_contype[i]]
        if env._check_grasp(gripper=env.robots[0].gripper, object_geoms=names):
            return "held"
        return "missed" if self._closing else None

    # -- for the gates ---------------------------------------------------------------------------------------
    def displace(self, offset: tuple[float, float] | np.ndarray) -> None:
        """Shift the main object by ``offset`` metres (x, y); used to measure how chaotic the physics is.

        Raises:
            ValueError: If it is not known which object matters.
        """
        scene, body = self.scene, self.main_body
        address = int(scene.model.jnt_qposadr[scene.model.body(body).jntadr[0]])
        scene.data.qpos[address : address + 2] += offset
        scene.load(scene.dump())

    def to_pixels(self, point: np.ndarray) -> np.ndarray:
        """Where the camera sees points of the world.

        Args:
            point: Metres ``(..., 2)`` on the table or ``(..., 3)`` in space.

        Returns:
            Continuous pixels ``(..., 2)`` as (column, row); pixel i covers [i, i + 1).
        """
        scene, size = self.scene, self.task.image_size
        point = np.asarray(point, dtype=np.float64)
        if point.shape[-1] == 2:
            point = np.concatenate([point, np.full((*point.shape[:-1], 1), TABLE_HEIGHT)], axis=-1)
        camera = scene.model.camera(scene.definition.camera).id
        seen = (point - scene.data.cam_xpos[camera]) @ scene.data.cam_xmat[camera].reshape(3, 3)
        x, y, z = np.moveaxis(seen, -1, 0)
        focal = size / 2 / np.tan(np.deg2rad(scene.model.cam_fovy[camera]) / 2)
        return np.stack([size / 2 - focal * x / z, size / 2 + focal * y / z], axis=-1)
