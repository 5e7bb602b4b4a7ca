"""The arm's tasks on robosuite: physics, states, pictures, success, errors."""

from __future__ import annotations

import os
import random
import warnings
from itertools import islice
from typing import Any

import gymnasium
import numpy as np
import pytest

import wmpo_gym  # noqa: F401
from wmpo_gym.envs.simulated import make_simulator
from wmpo_gym.tasks import PANDA_TASKS, get_task, robosuite_task

robosuite = pytest.importorskip("robosuite")

from wmpo_gym.data.importers.base import SourceError  # noqa: E402
from wmpo_gym.data.importers.replay import make_state_renderer  # noqa: E402
from wmpo_gym.envs.simulated.scripted import ExpertConfig, record_expert, record_play  # noqa: E402
from wmpo_gym.envs.simulated.tabletop import camera  # noqa: E402
from wmpo_gym.envs.simulated.tabletop.expert import Arm, ArmExpertConfig, arm_expert, cube_yaw  # noqa: E402
from wmpo_gym.envs.simulated.tabletop.osc import ArmControl, is_plain_osc  # noqa: E402
from wmpo_gym.envs.simulated.tabletop.scene import Scene, shared_scene  # noqa: E402
from wmpo_gym.rollouts.rollout import make_rollout_env, rollout  # noqa: E402

TASKS = tuple(task.name for task in PANDA_TASKS)


def some(*fast: str) -> list[Any]:
    """Every task; all but a few only when slow tests are wanted, since each builds a scene."""
    return [t if t in fast else pytest.param(t, marks=pytest.mark.slow) for t in TASKS]


def sim_of(task: str, variant: str = "nominal") -> Any:
    return make_simulator(f"{task}@64", variant)


def place(sim: Any, joint: str, xyz: tuple[float, float, float]) -> None:
    """Put a free object somewhere, upright."""
    address = int(sim.scene.model.joint(joint).qposadr[0])
    sim.scene.data.qpos[address : address + 7] = [*xyz, 1, 0, 0, 0]
    sim.scene.load(sim.scene.dump())


def wave(seed: int, n: int = 6) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (n, 7))


# -- physics and control -------------------------------------------------------------------------------------
def test_control_is_robosuites() -> None:
    sim = sim_of("lift")
    sim.reset(3)
    scene, env = sim.scene, sim.scene.env
    assert is_plain_osc(env)
    arm, gripper = ArmControl(env), env.robots[0].gripper["right"]
    posture = env.robots[0].part_controllers["right"].initial_joint
    for action in wave(0, 12):
        before, fingers = scene.dump(), gripper.current_action.copy()
        for i in range(25):
            env.sim.step1()
            env._pre_action(action, i == 0)
            torques = scene.data.ctrl.copy()
            env.sim.step2()
        theirs = scene.data.qpos.copy(), scene.data.qvel.copy()
        scene.load(before)
        gripper.current_action = fingers
        arm.step(scene.data, action, posture)
        # robosuite rounds rotations to single precision.
        assert np.allclose(scene.data.ctrl, torques, atol=1e-4)
        assert np.allclose(scene.data.qpos, theirs[0], atol=1e-7)
        assert np.allclose(scene.data.qvel, theirs[1], atol=1e-5)


def test_fewer_triangles_do_not_change_the_physics(monkeypatch: pytest.MonkeyPatch) -> None:
    thinned = sim_of("lift").scene
    monkeypatch.setattr("wmpo_gym.envs.simulated.tabletop.scene.decimate", lambda model: None)
    full = Scene(get_task("lift@64"), "nominal")
    assert int(thinned.model.mesh_facenum.sum()) < 0.25 * int(full.model.mesh_facenum.sum())
    for scene in (thinned, full):
        scene.start(3)
        for action in wave(0):
            scene.step(action)
    assert np.array_equal(thinned.dump(), full.dump())
    pictures = [scene.render().astype(float) for scene in (thinned, full)]
    assert 0 < np.abs(pictures[0] - pictures[1]).mean() < 5


@pytest.mark.parametrize("task", some("lift"))
def test_rows_repeat_and_restore_exactly(task: str) -> None:
    """Two rows of one scene, stepped in turns, do what each does alone, also after a restore."""
    first, second = sim_of(task), sim_of(task)
    first.reset(0), second.reset(1)
    alone, states = [], []
    for action in wave(1):
        first.step(action)
        alone.append(first.render())
        states.append(first.get_state())
    first.reset(0)
    for action, picture, state in zip(wave(1), alone, states, strict=True):
        first.step(action)
        second.step(-action)
        assert np.array_equal(first.get_state(), state)
        assert np.array_equal(first.render(), picture)
    second.set_state(states[2])
    for action, state in zip(wave(1)[3:], states[3:], strict=True):
        second.step(action)
        assert np.array_equal(second.get_state(), state)
    assert second.start_state_id == 0


def test_start_states_are_the_same_in_a_scene_made_anew() -> None:
    task = get_task("lift@64")
    sim = sim_of("lift")
    states = []
    for i in (0, 1, task.split_ids("validation")[0], task.split_ids("test")[0]):
        sim.reset(i)
        states.append(sim.get_state()[:-1])
    assert len({s.tobytes() for s in states}) == 4
    again = Scene(task, "nominal")
    again.start(1)
    again.start(0)
    assert np.array_equal(again.dump(), states[0])
    with pytest.raises(ValueError, match="Unknown start_state_id 9728"):
        sim.reset(9728)


def test_global_generators_are_left_alone() -> None:
    shared_scene.cache_clear()
    before = random.getstate(), np.random.get_state()[1].tobytes()
    sim = sim_of("stack")
    sim.reset(700)
    assert before == (random.getstate(), np.random.get_state()[1].tobytes())


# -- Gymnasium -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("task", some("lift"))
def test_both_check_envs_pass_without_a_warning(task: str) -> None:
    from gymnasium.utils.env_checker import check_env
    from stable_baselines3.common.env_checker import check_env as sb3_check_env

    sim_of("lift").reset(0)  # robosuite's own imports warn
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(gymnasium.make("WMPO-Simulated-v0", task=f"{task}@64", render_mode="rgb_array").unwrapped)
        sb3_check_env(gymnasium.make("WMPO-Simulated-v0", task=task).unwrapped)


def test_batch_rows_equal_the_single_environment() -> None:
    batch = gymnasium.make_vec("WMPO-Simulated-v0", num_envs=3, task="lift@64", return_frames=True)
    single = gymnasium.make("WMPO-Simulated-v0", task="lift@64", return_frames=True)
    batch.reset(seed=4)
    single.reset(seed=5)
    actions = np.random.default_rng(0).uniform(-1, 1, (2, *batch.action_space.shape)).astype(np.float32)
    for chunk in actions:
        obs, _, _, _, infos = batch.step(chunk)
        ours, _, _, _, info = single.step(chunk[1])
        assert np.array_equal(obs["pixels"][1], ours["pixels"])
        assert np.array_equal(infos["frames"][1], info["frames"])
    assert single.unwrapped.max_episode_steps == 8 and info["instruction"] == "lift the cube"


# -- success -------------------------------------------------------------------------------------------------
def test_lift_succeeds_with_the_cube_in_the_air() -> None:
    sim = sim_of("lift")
    sim.reset(0)
    assert not sim.success
    place(sim, "cube_joint0", (0.1, 0.1, 0.86))
    assert sim.success


def test_lift_close_succeeds_with_the_cube_clear_of_its_place() -> None:
    sim = sim_of("lift-close")
    sim.reset(0)
    place(sim, "cube_joint0", (0.1, 0.1, 0.86))
    assert not sim.success
    place(sim, "cube_joint0", (0.1, 0.1, 0.89))
    assert sim.success


def test_stack_succeeds_with_red_on_green_and_let_go() -> None:
    sim = sim_of("stack")
    sim.reset(0)
    assert not sim.success
    green = sim.scene.data.body("cubeB_main").xpos
    place(sim, "cubeB_joint0", (0.1, 0.1, green[2]))
    place(sim, "cubeA_joint0", (0.1, 0.1, green[2] + 0.0449))
    assert sim.success
    place(sim, "cubeA_joint0", (0.1, 0.2, green[2] + 0.0449))  # in the air beside it
    assert not sim.success


def test_square_succeeds_with_the_nut_around_its_peg() -> None:
    sim = sim_of("square")
    sim.reset(0)
    assert not sim.success
    peg = sim.scene.data.body("peg1").xpos
    place(sim, "SquareNut_joint0", (peg[0], peg[1], 0.83))
    assert sim.success
    place(sim, "SquareNut_joint0", (peg[0], peg[1], 0.96))  # lies on its top
    assert not sim.success


def test_stack_three_succeeds_with_the_whole_tower() -> None:
    sim = sim_of("stack-three")
    sim.reset(0)
    green = sim.scene.data.body("cubeB_main").xpos[2]
    place(sim, "cubeB_joint0", (0.1, 0.1, green))
    place(sim, "cubeA_joint0", (0.1, 0.1, green + 0.0449))
    assert not sim.success
    place(sim, "cubeC_joint0", (0.1, 0.1, green + 0.0848))
    assert sim.success
    place(sim, "cubeC_joint0", (0.1, 0.1, green + 0.095))  # above it, without touching
    assert not sim.success


def test_assembly_succeeds_with_both_pieces_in() -> None:
    sim = sim_of("three-piece-assembly")
    sim.reset(0)
    x, y, z = sim.scene.data.body("base_main").xpos
    place(sim, "first_joint0", (x, y, z + 0.04))
    assert not sim.success
    place(sim, "second_joint0", (x, y, z + 0.062))
    assert sim.success
    place(sim, "second_joint0", (x, y, z + 0.102))  # the peg stands on the tube
    assert not sim.success
    place(sim, "second_joint0", (x, y, z + 0.087))
    place(sim, "first_joint0", (x, y, z + 0.065))  # the peg is in the tube, the tube on the base
    assert not sim.success


def test_coffee_succeeds_with_the_pod_in_and_the_lid_down() -> None:
    sim = sim_of("coffee")
    sim.reset(0)
    scene = sim.scene
    cup = scene.data.site("machine_cup").xpos.copy()
    place(sim, "pod_joint0", (cup[0], cup[1], cup[2] + 0.014))
    assert not sim.success
    scene.data.joint("machine_hinge").qpos[0] = 0.05
    scene.load(scene.dump())
    assert sim.success
    place(sim, "pod_joint0", (0.0, 0.2, 0.814))
    assert not sim.success


def test_lid_stays_up_by_itself() -> None:
    sim = sim_of("coffee")
    sim.reset(0)
    for _ in range(20):
        sim.step(np.zeros(7))
    assert sim.scene.data.joint("machine_hinge").qpos[0] > 1.4


# -- pictures and variants -----------------------------------------------------------------------------------
@pytest.mark.parametrize("task", some("lift"))
def test_variants_look_different_and_start_alike(task: str) -> None:
    nominal = sim_of(task)
    nominal.reset(5)
    picture, state = nominal.render().astype(int), nominal.get_state()
    for variant in get_task(task).variants[1:]:
        sim = sim_of(task, variant)
        sim.reset(5)
        changed = np.abs(sim.render() - picture).max(axis=-1) > 20
        assert changed.mean() > (0.2 if variant == "background" else 0.001), variant
        assert np.array_equal(sim.get_state(), state) == (variant != "moved-goal")


def goals_of(sim: Any, body: str, n: int = 8) -> np.ndarray:
    places = []
    for i in range(n):
        sim.reset(i)
        places.append(sim.scene.data.body(body).xpos.copy())
    return np.array(places)


def test_moved_goal_stays_in_its_rectangle() -> None:
    sim = sim_of("square", "moved-goal")
    places = goals_of(sim, "peg1")
    assert np.ptp(places[:, 0]) == 0 and 0.06 <= places[:, 1].min() < places[:, 1].max() <= 0.10
    assert np.array_equal(goals_of(sim, "peg1", 1), places[:1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "body", "limit"), [("three-piece-assembly", "base_main", 0.02), ("coffee", "machine_main", 0.03)]
)
def test_moved_goals_of_our_own_tasks(task: str, body: str, limit: float) -> None:
    nominal, moved = (goals_of(sim_of(task, v), body) for v in ("nominal", "moved-goal"))
    assert np.ptp(nominal, axis=0).max() == 0
    shift = np.abs(moved - nominal)
    assert (
        shift[:, :2].max() <= limit and shift[:, 2].max() == 0 and len(np.unique(moved[:, 0])) == len(moved)
    )


# -- demonstrators -------------------------------------------------------------------------------------------
def demonstrate(task: str, ids: range, **mistakes: Any) -> list[bool]:
    return [
        e.success for e in record_expert(ids, seed=0, config=ArmExpertConfig(**mistakes), task=f"{task}@16")
    ]


def test_expert_lifts_and_its_mistakes_show() -> None:
    assert sum(demonstrate("lift", range(4))) >= 3
    assert not any(demonstrate("lift", range(2), grasp_offset=(0.0, 0.0, 0.06)))


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_experts_mostly_succeed(task: str) -> None:
    assert sum(demonstrate(task, range(20))) >= 16


@pytest.mark.parametrize(("height", "last"), [(0.0, "held"), (0.06, "missed")])
def test_contact_tells_a_grasp_from_a_miss(height: float, last: str) -> None:
    sim = sim_of("lift")
    sim.reset(0)
    act = arm_expert(sim, ArmExpertConfig(grasp_offset=(0.0, 0.0, height)), np.random.default_rng(0))
    seen = []
    for _ in range(40):
        sim.step(act(sim))
        seen.append(sim.contact)
    assert seen[0] is None and seen[-1] == last and ("held" in seen) == (last == "held")


def test_play_is_unlabelled_and_repeats() -> None:
    one, two = (next(record_play([3], seed=s, task="lift@16")) for s in (0, 0))
    assert one.success is None and one.n_steps == 64
    assert np.array_equal(one.actions, two.actions) and np.array_equal(one.frames, two.frames)


@pytest.mark.parametrize(("patience", "stands"), [(10, True), (60, False)])
def test_an_impatient_hand_closes_while_a_finger_stands_on_the_cube(patience: int, stands: bool) -> None:
    sim = sim_of("lift")
    sim.reset(0)
    arm = Arm(sim, ArmExpertConfig(grasp_noise=0.0, action_noise=0.0), np.random.default_rng(0))
    yaw = cube_yaw(arm.yaw("cube_main"))
    aside = 0.04 * np.array([np.cos(yaw - np.pi / 2), np.sin(yaw - np.pi / 2), 0.0])  # as far as a finger is
    goal, closed = arm.body("cube_main")[2], None
    for action in islice(arm.pick("cube_main", offset=aside, yaw=yaw, patience=patience), 40):
        if action[6] > 0 and closed is None:
            closed = arm.position[2] - goal
        sim.step(action)
    assert (closed is not None and closed > 0.01) == stands  # a reached place is within 8 mm


@pytest.mark.parametrize(("hold", "height"), [(2, 0.0), (8, 0.08)])
def test_a_hand_that_goes_up_before_the_fingers_have_met_leaves_the_cube(hold: int, height: float) -> None:
    sim = sim_of("lift")
    sim.reset(0)
    arm = Arm(sim, ArmExpertConfig(grasp_noise=0.0, action_noise=0.0), np.random.default_rng(0))
    before = arm.body("cube_main")[2]
    for action in islice(arm.pick("cube_main", yaw=cube_yaw(arm.yaw("cube_main")), hold=hold), 60):
        sim.step(action)
    assert arm.body("cube_main")[2] - before == pytest.approx(height, abs=0.02)


def test_mistakes_of_another_kind_of_expert_are_refused() -> None:
    with pytest.raises(ValueError, match="'lift@16' is set by ArmExpertConfig, got ExpertConfig"):
        next(record_expert([0], seed=0, config=ExpertConfig(), task="lift@16"))
    with pytest.raises(ValueError, match="'robosuite:Door' has no scripted expert; there is one for lift,"):
        next(record_expert([0], seed=0, task="robosuite:Door"))


@pytest.mark.parametrize("size", [64, 128, 256])
def test_camera_sees_the_cube_where_projection_says(size: int) -> None:
    sim = make_simulator(get_task("lift").at(size))
    sim.reset(2)
    picture = sim.render().astype(float)
    red = np.clip(picture[..., 0] - picture[..., 1:].max(axis=-1) - 30, 0, None)
    row, column = np.average(
        np.indices(red.shape) + 0.5, axis=(1, 2), weights=np.broadcast_to(red, (2, size, size))
    )
    cube = sim.to_pixels(sim.scene.data.body("cube_main").xpos)
    assert picture.shape == (size, size, 3)
    assert (
        abs(cube[0] - column) < 0.01 * size and abs(cube[1] - row) < 0.02 * size
    )  # its top is the brightest


def test_the_nearer_camera_sees_the_same_scene_larger() -> None:
    lift, close = sim_of("lift"), sim_of("lift-close")
    lift.reset(4)
    close.reset(4)
    assert np.array_equal(lift.scene.data.qpos, close.scene.data.qpos)
    red = [(sim.render()[..., 0].astype(int) - sim.render()[..., 1] > 30).sum() for sim in (lift, close)]
    assert 2 < red[1] / red[0] < 4
    for body in ("gripper0_right_eef", "gripper0_right_right_gripper"):  # in the picture from the start
        hand = close.to_pixels(close.scene.data.body(body).xpos)
        assert (hand > 0).all() and (hand < 64).all(), body


class Wave:
    """A policy that moves about."""

    def predict(self, obs: dict[str, np.ndarray], deterministic: bool = False) -> tuple[np.ndarray, None]:
        chunk = wave(int(obs["pixels"].sum()) % 97, 8)
        return np.repeat(chunk[None].astype(np.float32), len(obs["pixels"]), axis=0), None


def test_rollouts_and_recordings_tell_the_robots_state() -> None:
    task = get_task("lift-close@32")
    env = make_rollout_env("WMPO-Simulated-v0", 2, record_frames=True, task=task)
    made = list(rollout(env, Wave(), [3, 4, 5], record_frames=True).episodes(task))
    env.close()
    made += record_play([6], seed=0, task=task)
    sim = make_simulator(task)
    for episode in made:
        sim.reset(episode.start_state_id)
        states = [sim.proprio()]
        for action in episode.actions:
            sim.step(action)
            states.append(sim.proprio())
        assert episode.proprio.shape == (episode.n_steps + 1, 12)  # joints, place of the hand, fingers
        np.testing.assert_array_equal(episode.proprio, np.stack(states))


def test_displacement_moves_the_object_that_matters() -> None:
    sim = sim_of("stack")
    sim.reset(0)
    before = {n: sim.scene.data.body(n).xpos.copy() for n in ("cubeA_main", "cubeB_main")}
    sim.displace((0.002, -0.001))
    after = {n: sim.scene.data.body(n).xpos for n in before}
    assert np.allclose(after["cubeA_main"] - before["cubeA_main"], (0.002, -0.001, 0), atol=1e-12)
    assert np.array_equal(after["cubeB_main"], before["cubeB_main"])


def test_recorded_states_are_drawn_as_they_looked() -> None:
    sim = sim_of("lift")
    sim.reset(0)
    scene, states, seen = sim.scene, [], []
    for action in wave(0, 3):
        sim.step(action)
        states.append(np.concatenate([[scene.data.time], scene.data.qpos, scene.data.qvel]))
        seen.append(sim.render())
    elsewhere = scene.env.sim.model.get_xml().replace(
        os.path.dirname(robosuite.__file__), "/home/me/robosuite"
    )
    assert "/home/me/robosuite/models" in elsewhere
    args = {"env_name": "Lift", "type": 1}
    drawer = make_state_renderer(args, "agentview_image", 64, "lift.hdf5")
    drawn = drawer.render(np.stack(states), elsewhere)
    # Saved as text, the scene loses its last digits.
    assert np.abs(drawn.astype(int) - np.stack(seen)).mean() < 0.05
    with pytest.raises(SourceError, match="states of 32 numbers, the file holds"):
        drawer.render(np.zeros((2, 31)), elsewhere)
    with pytest.raises(SourceError, match="no scene"):
        drawer.render(np.stack(states), None)
    with pytest.raises(SourceError, match="link0.stl of package 'robosuite', which does not have it"):
        drawer.render(np.stack(states), elsewhere.replace("robots/panda", "robots/pando"))
    with pytest.raises(SourceError, match="of package 'mimicgen_', which is not installed"):
        drawer.render(np.stack(states), elsewhere.replace("me/robosuite/models", "me/mimicgen_/models"))
    drawer.close()
    drawer.close()


# -- any robosuite environment -------------------------------------------------------------------------------
def test_any_registered_environment_runs() -> None:
    task = robosuite_task("Door", instruction="open the door", horizon=80, camera="frontview", image_size=64)
    door = make_simulator(task)
    starts = []
    for i in (0, 1, 0):
        door.reset(i)
        starts.append((door.scene.model.body("Door_main").pos.copy(), door.render()))
    assert not np.array_equal(starts[0][0], starts[1][0])  # the door's place is not part of MuJoCo's state
    assert all(np.array_equal(a, b) for a, b in zip(starts[0], starts[2], strict=True))
    state = door.get_state()
    door.reset(1)
    door.set_state(state)
    assert np.array_equal(door.render(), starts[0][1]) and not door.success
    env = gymnasium.make("WMPO-Simulated-v0", task="robosuite:Door")
    assert env.reset(seed=0)[0]["pixels"].shape == (256, 256, 3)
    with pytest.raises(ValueError, match="not known which object"):
        door.displace((0.0, 0.01))


def test_other_controllers_go_through_robosuites_own_code() -> None:
    task = robosuite_task("Lift", action_dim=8, image_size=64, controller="JOINT_POSITION")
    sim, other = make_simulator(task), make_simulator(task)
    assert not is_plain_osc(sim.scene.env)
    actions = np.random.default_rng(0).uniform(-1, 1, (4, 8))
    sim.reset(0)
    states = []
    for action in actions:
        sim.step(action)
        states.append(sim.get_state())
    other.reset(1)
    other.step(actions[0])
    other.set_state(states[0])
    for action, state in zip(actions[1:], states[1:], strict=True):
        other.step(action)
        sim.step(action)
        assert np.array_equal(other.get_state(), state)


def test_wrong_settings_are_named() -> None:
    with pytest.raises(ValueError, match="no environment 'Doors'; registered are .*Door,.*packages="):
        make_simulator("robosuite:Doors")
    with pytest.raises(ValueError, match="take actions of 7 numbers, the task says 6"):
        make_simulator(robosuite_task("Lift", action_dim=6))
    with pytest.raises(ValueError, match="no controller 'PID'; there are .*OSC_POSE"):
        make_simulator(robosuite_task("Lift", controller="PID"))
    with pytest.raises(ValueError, match="no camera 'nowhere'; it has frontview"):
        make_simulator(robosuite_task("Lift", camera="nowhere")).render()
    with pytest.raises(ValueError, match=r"What follows the @ in 'lift@big'"):
        get_task("lift@big")
    sim = sim_of("lift")
    sim.reset(0)
    with pytest.raises(ValueError, match="is it another task's"):
        sim.set_state(np.zeros(9))


def test_missing_opengl_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    sim = make_simulator(get_task("lift").at(48))
    sim.reset(0)

    def no_library(name: str) -> Any:
        raise AttributeError("'NoneType' object has no attribute 'eglQueryString'")

    with monkeypatch.context() as patch:
        patch.setattr(camera.importlib, "import_module", no_library)
        with pytest.raises(camera.GLUnavailableError, match="apt-get install libegl1 libgl1.*libosmesa6"):
            sim.render()
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: -1)
        with pytest.raises(camera.GLUnavailableError, match="spawn"):
            sim.render()
    assert sim.render().shape == (48, 48, 3)
