"""Operational-space control of one arm: robosuite's torques without robosuite's overhead.

robosuite computes the torques anew in every physics step, 25 times per control step; at 5 ms per control
step its Python costs several times what the physics does. Here the same formulas (Khatib 1987, with its
decoupling of position and orientation and its null-space posture) work on MuJoCo's arrays directly and take a
third of that.
"""

from __future__ import annotations

from typing import Any

import mujoco
import numpy as np

POSTURE_GAIN = 10.0  # stiffness of the null-space pull towards the posture of the episode's start, 1/s²


def is_plain_osc(env: Any) -> bool:
    """Whether :class:`ArmControl` computes what the environment's own controller would.

    True for one fixed-base arm under robosuite's default controller: ``OSC_POSE`` with fixed gains, deltas
    from the achieved pose and no interpolation, and a gripper commanded directly.
    """
    from robosuite.controllers.composite.composite_controller import CompositeController
    from robosuite.controllers.parts.arm.osc import OperationalSpaceController
    from robosuite.controllers.parts.gripper.simple_grip import SimpleGripController
    from robosuite.robots.fixed_base_robot import FixedBaseRobot

    if len(env.robots) != 1 or type(env.robots[0]) is not FixedBaseRobot or not env.lite_physics:
        return False
    robot = env.robots[0]
    whole, parts = robot.composite_controller, robot.part_controllers
    if type(whole) is not CompositeController or set(parts) != {"right", "right_gripper"}:
        return False
    arm, gripper = parts["right"], parts["right_gripper"]
    return (
        type(arm) is OperationalSpaceController
        and (arm.impedance_mode, arm.input_type, arm._goal_update_mode) == ("fixed", "delta", "achieved")
        and arm.use_ori
        and arm.uncoupling
        and arm.interpolator_pos is None
        and arm.interpolator_ori is None
        and arm.num_ref_sites == 1
        and type(gripper) is SimpleGripController
        and gripper.interpolator is None
    )


class ArmControl:
    """Runs control steps of one arm.

    Args:
        env: A robosuite environment for which :func:`is_plain_osc` holds.
    """

    def __init__(self, env: Any) -> None:
        robot = env.robots[0]
        arm, gripper = (robot.part_controllers[name] for name in ("right", "right_gripper"))
        self.model: mujoco.MjModel = env.sim.model._model
        self.n_substeps = int(env.control_timestep / env.model_timestep)
        self.gripper = robot.gripper["right"]
        self._qpos, self._dofs = np.array(arm.qpos_index), np.array(arm.qvel_index)
        self._site = int(env.sim.model.site_name2id(arm.ref_name))
        self._base = int(env.sim.model.site_name2id(f"{arm.naming_prefix}{arm.part_name}_center"))
        self._kp, self._kd = np.array(arm.kp), np.array(arm.kd)
        self._input = np.array(arm.input_min), np.array(arm.input_max)
        self._scale = np.abs(arm.output_max - arm.output_min) / np.abs(arm.input_max - arm.input_min)
        self._output_centre = (arm.output_max + arm.output_min) / 2.0
        self._input_centre = (arm.input_max + arm.input_min) / 2.0
        limits = self.model.actuator_ctrlrange
        self._motors = np.array(robot._ref_actuators_indexes_dict["right"])
        self._fingers = np.array(robot._ref_actuators_indexes_dict["right_gripper"])
        self._torque_limits = limits[self._motors, 0].copy(), limits[self._motors, 1].copy()
        low, high = limits[self._fingers].T
        scaled = gripper.use_action_scaling
        self._finger_centre = 0.5 * (high + low) if scaled else np.zeros(len(low))
        self._finger_scale = 0.5 * (high - low) if scaled else np.ones(len(low))
        self._finger_limits = low.copy(), high.copy()
        self._jacobian = np.zeros((6, self.model.nv))
        self._mass = np.zeros((self.model.nv, self.model.nv))

    def step(self, data: mujoco.MjData, action: np.ndarray, posture: np.ndarray) -> None:
        """Advance one control step.

        Args:
            data: The state, advanced in place. The gripper's present command is in ``self.gripper``.
            action: ``(7,)``: displacement, rotation vector and gripper, each in [-1, 1].
            posture: ``(n_joints,)`` joint angles that the null space pulls towards.
        """
        model, arm_action = self.model, np.clip(action[:6], *self._input)
        delta = (arm_action - self._input_centre) * self._scale + self._output_centre
        fingers = self.gripper.format_action(np.asarray(action[6:], dtype=np.float64))
        fingers = np.clip(self._finger_centre + self._finger_scale * fingers, *self._finger_limits)
        mujoco.mj_step1(model, data)
        base = data.site_xmat[self._base].reshape(3, 3)
        goal = data.site_xpos[self._site] + base @ delta[:3]
        # The rotation is meant in the frame of the robot's base.
        attitude = base @ _rotation(delta[3:]) @ base.T @ data.site_xmat[self._site].reshape(3, 3)
        for i in range(self.n_substeps):
            if i:
                mujoco.mj_step1(model, data)
            torques = self._torques(data, goal, attitude, posture)
            data.ctrl[self._motors] = np.clip(torques, *self._torque_limits)
            data.ctrl[self._fingers] = fingers
            mujoco.mj_step2(model, data)

    def _torques(
        self, data: mujoco.MjData, goal: np.ndarray, attitude: np.ndarray, posture: np.ndarray
    ) -> np.ndarray:
        mujoco.mj_jacSite(self.model, data, self._jacobian[:3], self._jacobian[3:], self._site)
        mujoco.mj_fullM(self.model, self._mass, data.qM)
        velocity = self._jacobian @ data.qvel
        jacobian, mass = self._jacobian[:, self._dofs], self._mass[np.ix_(self._dofs, self._dofs)]
        turn = attitude @ data.site_xmat[self._site].reshape(3, 3).T
        error = np.empty(6)
        error[:3] = goal - data.site_xpos[self._site]
        error[3:] = turn[2, 1] - turn[1, 2], turn[0, 2] - turn[2, 0], turn[1, 0] - turn[0, 1]
        error[3:] *= 0.5
        wanted = self._kp * error - self._kd * velocity  # the base stands still
        spread = jacobian @ np.linalg.inv(mass)  # J M^-1
        mobility = spread @ jacobian.T  # J M^-1 J^T
        wrench = np.concatenate(
            [_inverse(mobility[:3, :3]) @ wanted[:3], _inverse(mobility[3:, 3:]) @ wanted[3:]]
        )
        speed = data.qvel[self._dofs]
        pull = POSTURE_GAIN * (posture - data.qpos[self._qpos]) - 2 * np.sqrt(POSTURE_GAIN) * speed
        rest = mass @ pull
        rest -= jacobian.T @ (_inverse(mobility) @ (spread @ rest))  # what does not move the hand
        return jacobian.T @ wrench + rest + data.qfrc_bias[self._dofs]


def _inverse(matrix: np.ndarray) -> np.ndarray:
    try:
        return np.linalg.inv(matrix)
    except np.linalg.LinAlgError:  # a stretched arm
        return np.linalg.pinv(matrix)


def _rotation(vector: np.ndarray) -> np.ndarray:
    """Rotation matrix (3, 3) of a rotation vector (3,)."""
    quaternion, matrix = np.empty(4), np.empty(9)
    angle = float(np.linalg.norm(vector))
    mujoco.mju_axisAngle2Quat(quaternion, vector / angle if angle else np.array([1.0, 0.0, 0.0]), angle)
    mujoco.mju_quat2Mat(matrix, quaternion)
    return matrix.reshape(3, 3)
